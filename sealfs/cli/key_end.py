"""`key recovery` and `key revoke`: who can open a VM besides this host, and that nobody can."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import identities, sealed
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import warn
from sealfs.cli.keys import key_command
from sealfs.cli.named import found_record, record_of
from sealfs.cli.net import recheck
from sealfs.cli.output import print_json
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import UsageError
from sealfs.image import identity as image_identity
from sealfs.image.format import Identity
from sealfs.keys import names
from sealfs.keys.rotation import changing_key

if TYPE_CHECKING:
    from sealfs.cli.identities import Disk
    from sealfs.keys.service import KeyService

PUBLIC_SIZE_MAX = 16 * 1024

LOST = click.option(
    "--lost",
    multiple=True,
    type=PATH,
    metavar="IMAGE",
    help="A registered image that is gone for good: go on without it.",
)


@key_command.command("recovery", short_help="Make another recovery key for a VM.")
@click.argument("vm")
@click.option(
    "--to",
    "recipient_file",
    type=PATH,
    metavar="FILE",
    help="Somebody's public X25519 key (PEM or hexadecimal); without, a key is made and printed.",
)
@click.option(
    "--refresh", is_flag=True, help="Make none; write those there are into all its images."
)
@LOST
@common_options
@pin_file_option
def recovery_key(
    settings: Settings,
    vm: str,
    recipient_file: Path | None,
    refresh: bool,
    lost: tuple[Path, ...],
) -> None:
    """Make another recovery key for one VM, beside those it has.

    It is shown this once and stored nowhere; `key recover` takes it, with any image of the VM. With
    --to the VM's key is wrapped to somebody's public key instead. Both stand in the VM's images
    afterwards, in use or not.
    """
    if refresh and recipient_file is not None:
        raise UsageError("--refresh", "makes no recovery key, so --to says nothing")
    recipient = None
    if recipient_file is not None:
        with open(recipient_file, "rb") as file:
            recipient = file.read(PUBLIC_SIZE_MAX + 1)
    with settings.keys() as keys:
        vm_id = record_of(keys, vm).vm_id
        with changing_key(keys, vm_id):
            disks, left = identities.disks_of(keys, vm_id, without=lost)
            made = keys.slots.recovery(
                vm_id, is_new=not refresh, recipient=recipient, subject=str(recipient_file)
            )
            # Crash here: this host knows the recovery key, the images are told by --refresh.
            if made.recovery_key is not None and not settings.json:
                print(f"recovery key {made.fingerprint}\n\n    {made.recovery_key}\n", flush=True)
            told: list[str] = []
            try:
                for disk in disks:
                    settings.about(disk.path)
                    identities.rewrite(
                        disk,
                        keys,
                        lambda known: _image_key(keys, known),
                        lambda known: dataclasses.replace(known, recovery_slots=made.slots),
                    )
                    told.append(str(disk.path))
            finally:
                # Also when an image fails: the key is stored nowhere.
                if settings.json:
                    print_json(
                        {
                            "vm_id": vm_id,
                            "fingerprint": made.fingerprint,
                            "recovery_key": made.recovery_key,
                            "images": told,
                        }
                    )
    for path in left:
        warn(f'"{path}" was left out: it knows nothing of new recovery keys')


@key_command.command("revoke", short_help="Destroy a VM's key, and with it its disks.")
@click.argument("vm")
@click.option("--yes", is_flag=True, help="Really: there is no way back.")
@LOST
@common_options
def revoke_key(settings: Settings, vm: str, yes: bool, lost: tuple[Path, ...]) -> None:
    """Destroy every way to a VM's key: on this host, and in each of its registered images.

    The images stay, and nothing opens them. A copy of one that was made before opens with its
    recovery key still, and on hosts that were enrolled. Interrupted, the same command goes on.
    """
    with settings.keys() as keys:
        record = found_record(keys, vm)
        vm_id = vm if record is None or not record.vm_id else record.vm_id
        is_network = names.is_network(vm_id)
        with changing_key(keys, vm_id), contextlib.ExitStack() as stack:
            disks, left = identities.disks_of(keys, vm_id, without=lost)
            if not yes:
                lost_too = "cuts off its VMs" if is_network else f"{len(disks)} disks with it"
                raise UsageError(vm_id, f"this destroys its key, and {lost_too}: say --yes")
            held = []
            for disk in disks:
                _let_go(settings, disk)
                held.append((stack.enter_context(identities.alone(disk, keys)), disk))
            keys.slots.revoke(vm_id)
            # Crash here: nothing opens on this host; the images have their recovery slots still.
            for storage, disk in held:
                known = identities.look(disk)
                image_identity.erase(storage, known)
            # Crash here: the records are there, and give their key to nobody.
            keys.slots.destroy(vm_id)
    recheck()
    for path in left:
        warn(f'"{path}" was left out: its recovery key opens it on another host')
    if is_network:
        warn("enrolled hosts have the network's key still: revoke it there too, or make another")
    else:
        warn("copies of its images made before still open: by recovery keys, and on enrolled hosts")
    if settings.json:
        print_json({"vm_id": vm_id, "erased": [str(disk.path) for disk in disks]})


def _image_key(keys: KeyService, known: Identity) -> bytearray:
    wrapped = known.wrapped_key(known.vm_id)
    return keys.image_key(known.kmi, known.vm_id, known.uuid, wrapped)


def _let_go(settings: Settings, disk: Disk) -> None:
    """Have a mount close the image that it holds without anybody using it."""
    mount = sealed.find(settings.about(disk.path)).mount
    if mount is not None:
        mount.call("close", path=os.path.realpath(disk.path))
