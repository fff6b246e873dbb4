"""`key list`, `key show`, `key test` and `key recover`. Never prints a key."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import asked, sealed, survey
from sealfs.cli.errors import ExitCode, warn
from sealfs.cli.images import enter
from sealfs.cli.key_reseal import reseal_key
from sealfs.cli.named import record_of
from sealfs.cli.output import print_facts, print_json, print_table, printable
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import FormatError, KeyNotFound, KeyRecordDamaged, UsageError
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys.reports import recipient_text
from sealfs.keys.vmkey import wipe
from sealfs.mount import freshness

if TYPE_CHECKING:
    from sealfs.image.format import Identity
    from sealfs.keys.opening import AskPin
    from sealfs.keys.reports import KeyInfo, SlotReport
    from sealfs.keys.service import KeyService


@click.group("key")
def key_command() -> None:
    """Look at the keys of this host's VMs; try, reseal, rotate, move, recover, revoke them."""


key_command.add_command(reseal_key)


@key_command.command("list")
@common_options
def list_keys(settings: Settings) -> None:
    """List the key records of this host. Nothing is unsealed."""
    with settings.keys() as keys:
        records = keys.records()
    if settings.json:
        print_json([record.to_json() for record in records])
        return
    print_table(
        ("VM", "CREATED", "ORIGIN", "SLOTS"),
        [
            (
                record.vm_id or f"? ({record.file})",
                record.created[:19].replace("T", " "),
                record.origin,
                survey.key_text(record),
            )
            for record in records
        ],
    )


@key_command.command("show")
@click.argument("vm")
@common_options
def show_key(settings: Settings, vm: str) -> None:
    """Show the key record of a VM. Nothing is unsealed."""
    with settings.keys() as keys:
        record = record_of(keys, vm)
        last_use = keys.audit.last_use(record.kmi)
    if settings.json:
        print_json({**record.to_json(), "last_used": last_use})
        return
    slots = [
        (f"slot {index}", survey.slot_text(slot.to_json()))
        for index, slot in enumerate(record.slots)
    ]
    print_facts(
        [
            ("vm id", record.vm_id),
            ("kmi", record.kmi),
            ("created", record.created),
            ("origin", record.origin),
            ("last used", last_use or "not known"),
            ("record", str(settings.state / record.file)),
            *([("gone", record.gone)] if record.gone else []),
            *slots,
        ]
    )


@key_command.command("test")
@click.argument("vms", nargs=-1, metavar="VM...")
@click.option("--all", "every", is_flag=True, help="Every VM of this host.")
@click.option("--pin", "asks_pin", is_flag=True, help="Try PINs too; each VM's is asked for.")
@click.option("--pin-file", metavar="FILE", help="Where the PIN of the VM is, to try it too.")
@common_options
def test_keys(
    settings: Settings, vms: tuple[str, ...], every: bool, asks_pin: bool, pin_file: str | None
) -> int:
    """Unseal for real, through every slot, and foretell trouble. Nothing is changed.

    A slot with a PIN is tried where one is given; a wrong one counts. Exit code 3 when a slot
    does not open, or trouble is ahead.
    """
    if bool(vms) == every:
        raise UsageError("key test", "name virtual machines, or --all")
    if pin_file is not None and len(vms) != 1:
        raise UsageError("--pin-file", "holds the PIN of one VM; name that one")
    settings.pin_file = pin_file
    with settings.keys() as keys:
        named = [record_of(keys, vm) for vm in vms]
        records = [info for info in keys.records() if not info.gone] if every else named
        ask = settings.ask_pin if asks_pin or pin_file is not None else None
        found = [(record, *_try(keys, record, ask)) for record in records]
    if settings.json:
        print_json(
            [
                {
                    "vm_id": record.vm_id,
                    "kmi": record.kmi,
                    "file": record.file,
                    "problem": problem,
                    "slots": [slot.to_json() for slot in slots],
                }
                for record, slots, problem in found
            ]
        )
    else:
        print_table(("VM", "SLOT", "RESULT"), [row for item in found for row in _test_rows(*item)])
    is_bad = any(
        problem or any(slot.opens is False or slot.trouble for slot in slots)
        for _, slots, problem in found
    )
    return ExitCode.FINDINGS if is_bad else ExitCode.OK


def _try(
    keys: KeyService, record: KeyInfo, ask: AskPin | None
) -> tuple[list[SlotReport], str | None]:
    if record.problem is not None:
        return [], record.problem
    takes_pin = any("pin" in slot.policy for slot in record.slots)
    pin = ask(record.vm_id) if ask is not None and takes_pin else None
    try:
        return keys.test(record.kmi, pin=pin), None
    except (KeyRecordDamaged, KeyNotFound, FormatError) as error:
        return [], error.detail
    finally:
        if pin is not None:
            wipe(pin)


def _test_rows(
    record: KeyInfo, slots: list[SlotReport], problem: str | None
) -> list[tuple[str, str, str]]:
    name = record.vm_id or record.file
    if problem is not None:
        return [(name, "", problem)]
    rows = []
    for number, slot in enumerate(slots):
        result = slot.detail if slot.opens is not False else f"FAILS: {slot.detail}"
        rows.append(("" if number else name, slot.kind, "; ".join((result, *slot.trouble))))
    return rows


@key_command.command("recover", short_help="Make keys usable here again, by the recovery key.")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=PATH)
@click.option(
    "--recovery-key-file",
    "key_file",
    metavar="FILE",
    help="Where the recovery key is; - is standard input. Without, it is asked for.",
)
@click.option(
    "--replace", is_flag=True, help="Even if another image or path is registered; says what."
)
@common_options
def recover_keys(
    settings: Settings, images: tuple[Path, ...], key_file: str | None, replace: bool
) -> None:
    """Make the keys of images usable on this host, with the recovery key alone.

    Everything else comes from the image: works on a fresh host whose predecessor is lost. Each
    image is verified and registered under its path.
    """
    for image in images:
        sealed.find(settings.about(image))
    with settings.keys() as keys:
        recovery_key = recovery_key_from(key_file)
        recovered = [
            _recover(settings, keys, settings.about(image), recovery_key, replace)
            for image in images
        ]
    if settings.json:
        print_json(recovered)


def _recover(
    settings: Settings, keys: KeyService, image: Path, recovery_key: str, replace: bool
) -> dict[str, object]:
    place = sealed.find(image)
    storage = FileStorage.open(place.sealed, read_only=True)
    try:
        identity = read_identity(storage)
        keys.recover(identity.vm_id, identity.kmi, identity.recovery_slots, recovery_key).wipe()
        known = freshness.newcomer(place.sealed, identity.uuid, keys.ledger)
        opened = sealed.open_with(storage, identity, keys, known)
        _warn_of_recipients(keys, identity)
        entered = enter(keys, place.sealed, opened, replace=replace)
    finally:
        storage.close()
    if settings.verbose and not settings.json:
        print(f"{printable(str(image))}: recovered, VM {printable(identity.vm_id)}")
    return entered


def _warn_of_recipients(keys: KeyService, identity: Identity) -> None:
    """Name who could open the image besides: whoever could write to it could add himself."""
    record = record_of(keys, identity.vm_id)
    kept = {slot.recipient for slot in record.slots}
    for recipient in sorted(set(map(recipient_text, identity.recovery_slots)) - kept):
        warn(
            f'VM "{identity.vm_id}": recovery key {recipient} of the image was not taken over; '
            f"if it is yours: sealfs key recovery {shlex.quote(identity.vm_id)} --to FILE"
        )


def recovery_key_from(key_file: str | None) -> str:
    """Read the recovery key; it never stands in an argument or the environment.

    Raises:
        UsageError: no file was named and nobody is there to be asked, or it cannot be a key.
    """
    return asked.text("recovery key", key_file, option="--recovery-key-file")
