"""`host-id`, `key enroll` and `key import`: a VM goes from one host to another."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import identities, sealed
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import warn
from sealfs.cli.images import enter
from sealfs.cli.keys import key_command
from sealfs.cli.named import record_of
from sealfs.cli.net import recheck
from sealfs.cli.newborn import Newborn
from sealfs.cli.output import print_facts, print_json, printable
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import NotFound, SealfsError, UsageError
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys import enrolment
from sealfs.keys.enrolment import HOST_KIND, PACKAGE_KIND, HostId, PackedImage
from sealfs.keys.rotation import changing_key
from sealfs.mount import freshness

if TYPE_CHECKING:
    from sealfs.keys.enrolment import Package
    from sealfs.keys.service import KeyService


@click.command("host-id")
@click.option("-o", "output", type=PATH, metavar="FILE", help="Write it there, for `key enroll`.")
@common_options
def host_id_command(settings: Settings, output: Path | None) -> None:
    """Tell who this host is: what `key enroll --to` on another host needs to give it a VM.

    Nothing of it is secret. Whoever enrolls a VM compares the fingerprint, by telephone say: the
    VM's key goes to the TPM that this fingerprint names.
    """
    with settings.keys() as keys:
        found = keys.host_id()
    text = enrolment.to_text(HOST_KIND, found.encode())
    if output is not None:
        settings.situation.destination = output
        _write(output, text)
    if settings.json:
        print_json({"host_id": found.host_id.hex(), "fingerprint": found.fingerprint, "text": text})
        return
    print_facts([("host id", found.host_id.hex()), ("fingerprint", found.fingerprint)])
    if output is None:
        print(f"\n{text}", end="")


@key_command.command("enroll", short_help="Give a VM's key to another host's TPM.")
@click.argument("vm")
@click.option(
    "--to",
    "target_file",
    type=PATH,
    required=True,
    metavar="HOST.enroll",
    help="What `sealfs host-id` wrote there.",
)
@click.option(
    "-o", "output", type=PATH, required=True, metavar="PACKAGE", help="What to carry there."
)
@click.option("--move", is_flag=True, help="This host refuses the VM from then on.")
@click.option("--fingerprint", help="The other host's; without, it is shown and asked about.")
@common_options
@pin_file_option
def enroll_key(
    settings: Settings,
    vm: str,
    target_file: Path,
    output: Path,
    move: bool,
    fingerprint: str | None,
) -> None:
    """Wrap a VM's key to another host's TPM; `key import` there makes it usable.

    The package holds no key in clear and opens on that host alone. It also tells how far each
    image has come, so that an older copy is refused there. Copy the images yourself.

    With --move nobody may be using the VM's images, and this host gives its key to nobody from
    then on, until it comes back by `key enroll --move` there and `key import` here.
    """
    target = HostId.decode(_read(target_file, HOST_KIND), str(target_file))
    with settings.keys() as keys:
        record = record_of(keys, vm)
        vm_id = record.vm_id
        keys.moving.check_may_leave(vm_id, target)
        _confirm(target, fingerprint)
        # A move made again, because its package was lost: nobody has used the images since.
        is_move = move and record.gone is None
        with changing_key(keys, vm_id), _images(settings, keys, vm_id, is_move=is_move) as images:
            package = keys.moving.pack(vm_id, target, images, is_move=move)
            settings.situation.destination = output
            _write(output, enrolment.to_text(PACKAGE_KIND, package))
            # Crash here: the package is complete, and the VM opens here still.
            if move:
                keys.moving.leave(vm_id, target)
                recheck()
    if settings.json:
        print_json(
            {
                "vm_id": vm_id,
                "to_host": target.host_id.hex(),
                "images": [image.path for image in images],
                "moved": move,
            }
        )


@key_command.command("import", short_help="Take a VM's key from another host.")
@click.argument("package_file", type=PATH, metavar="PACKAGE")
@click.argument("images", nargs=-1, type=PATH, metavar="[IMAGE]...")
@click.option(
    "--replace", is_flag=True, help="A network's key, even if this host has another one for it."
)
@common_options
@pin_file_option
def import_key(
    settings: Settings, package_file: Path, images: tuple[Path, ...], replace: bool
) -> None:
    """Make the key in a package usable here, sealed to this host's TPM, and register images.

    Those named, and those that stand where they were registered here or there. A package says
    who can open it, not who made it: take one only from somebody you trust with the VM. PINs and
    signed policies stay behind: `key reseal` sets them here. This host's recovery key gets into
    the images by `key recovery VM --refresh`.
    """
    for image in images:
        sealed.find(image)
    raw = _read(settings.about(package_file), PACKAGE_KIND)
    with settings.keys() as keys:
        package = keys.moving.take(raw, str(package_file), replace=replace)
        # Crash here: the key is usable; taken again, or by `register`, the images are too.
        entered = [_enter(settings, keys, settings.about(image), package) for image in images]
        found = {str(entry["image_uuid"]) for entry in entered}
        for packed in package.images:
            if packed.image_uuid.hex() in found:
                continue
            # Where it was registered here, when the VM comes back; else where it was there.
            own = [e.path for e in keys.registry.entries() if e.image_uuid == packed.image_uuid]
            for path in map(Path, (*own, packed.path)):
                if _is_image(path, packed.image_uuid):
                    entered.append(_enter(settings, keys, settings.about(path), package))
                    break
            else:
                warn(f'image "{packed.path}" is not here yet: copy it, and `sealfs register` it')
    if settings.json:
        print_json({"vm_id": package.vm_id, "kmi": package.kmi, "registered": entered})


@contextlib.contextmanager
def _images(
    settings: Settings, keys: KeyService, vm_id: str, *, is_move: bool
) -> Iterator[list[PackedImage]]:
    """Lend what is told of each image of a VM; for a move nobody can use them meanwhile."""
    disks, _ = identities.disks_of(keys, vm_id)
    found = []
    with contextlib.ExitStack() as stack:
        for disk in disks:
            if is_move:
                place = sealed.find(settings.about(disk.path))
                image = stack.enter_context(sealed.opened(settings, place, keys))
                state = freshness.progress_of(image.progress)
                keys.ledger.note({disk.uuid: state})
            progress = keys.ledger.find(disk.uuid) or freshness.NEWBORN
            found.append(PackedImage(disk.uuid, str(disk.path), progress))
        yield found


def _confirm(target: HostId, fingerprint: str | None) -> None:
    """Have a person vouch for the other host.

    Raises:
        UsageError: nobody does, or the fingerprint is another one.
    """
    subject = target.host_id.hex()
    if fingerprint is not None:
        if not enrolment.same_fingerprint(fingerprint, target.fingerprint):
            raise UsageError(
                subject, f"the fingerprint of this host id is {target.fingerprint}, another one"
            )
        return
    if not sys.stdin.isatty():
        raise UsageError(
            subject, "there is no terminal to confirm its fingerprint at; use --fingerprint"
        )
    question = f"Does that host say that its fingerprint is {target.fingerprint}?"
    if not click.confirm(question, err=True):
        raise UsageError(subject, "its fingerprint was not confirmed: nothing was done")


def _enter(
    settings: Settings, keys: KeyService, image: Path, package: Package
) -> dict[str, object]:
    """Verify an image with the key that came, and register it."""
    place = sealed.find(image)
    with contextlib.closing(FileStorage.open(place.sealed, read_only=True)) as storage:
        known = read_identity(storage)
        if known.vm_id != package.vm_id:
            raise UsageError(
                image, f'is an image of VM "{known.vm_id}", the package has "{package.vm_id}"'
            )
        witness = freshness.newcomer(place.sealed, known.uuid, keys.ledger)
        opened = sealed.open_with(storage, known, keys, witness)
        entered = enter(keys, place.sealed, opened, replace=False)
    if settings.verbose and not settings.json:
        print(f"{printable(str(image))}: registered, VM {printable(known.vm_id)}")
    return entered


def _is_image(path: Path, image_uuid: bytes) -> bool:
    try:
        with contextlib.closing(FileStorage.peek(path)) as storage:
            return read_identity(storage).uuid == image_uuid
    except SealfsError:
        return False


def _read(path: Path, kind: str) -> bytes:
    try:
        with open(path, "rb") as file:
            text = file.read(enrolment.TEXT_SIZE_MAX + 1)
    except FileNotFoundError:
        raise NotFound(path, "no such file") from None
    return enrolment.from_text(kind, text, str(path))


def _write(path: Path, text: str) -> None:
    """Write a file that is there complete or not at all; durable on return."""
    with Newborn(path) as newborn:
        with open(newborn.temporary, "r+", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        newborn.name()
