"""The images of a VM, and their identities written anew, in use or not.

An image that a mount holds is changed by that mount; any other here, locked meanwhile. Which keys
and slots an identity gets is the verb's business: it decides from an identity that authenticates.
"""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sealfs.cli import sealed
from sealfs.errors import Busy, ForeignImage, NotFound
from sealfs.image import identity as identities
from sealfs.image.format import Identity
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys.vmkey import wipe

if TYPE_CHECKING:
    from sealfs.keys.service import KeyService

TRIES_MAX = 5
"""How often an image that a mount opens or closes just now is tried again."""

ImageKeyOf = Callable[[Identity], bytearray]
Wanted = Callable[[Identity], Identity]


@dataclass(frozen=True, slots=True)
class Disk:
    """A registered image of a VM."""

    path: Path
    uuid: bytes
    vm_id: str


def disks_of(
    keys: KeyService, vm_id: str, *, without: Sequence[Path] = ()
) -> tuple[list[Disk], list[Path]]:
    """Return the registered images of a VM, each found to be there, and those that are left out.

    Args:
        keys: whose registry.
        vm_id: the VM's.
        without: paths of images to leave out, because they are lost.

    Raises:
        NotFound, StorageFailed: an image cannot be reached.
        ForeignImage: another image stands in its place.
        FormatError, IntegrityError: it says nothing legible of itself.
    """
    lost = {os.path.realpath(path) for path in without}
    found, left = [], []
    for entry in keys.registry.entries():
        if entry.vm_id != vm_id:
            continue
        disk = Disk(Path(entry.path), entry.image_uuid, vm_id)
        if entry.path in lost:
            left.append(disk.path)
        else:
            look(disk)
            found.append(disk)
    return found, left


def look(disk: Disk) -> Identity:
    """Return what an image says of itself, unverified. Raises as `disks_of`."""
    try:
        with contextlib.closing(FileStorage.peek(disk.path)) as storage:
            return _checked(disk, read_identity(storage))
    except NotFound:
        raise NotFound(disk.path, f'this image of VM "{disk.vm_id}" is not there') from None


def rewrite(disk: Disk, keys: KeyService, image_key_of: ImageKeyOf, wanted: Wanted) -> None:
    """Write an image's identity anew; durable on return.

    Args:
        disk: the image.
        keys: for its locks.
        image_key_of: returns the image's key, which is wiped here.
        wanted: returns what an authentic identity is to become.

    Raises:
        Busy: somebody has the image who cannot be asked to do it.
        ReadOnly: it may not be written, or a mount holds it for reading.
        SealfsError: whatever the key or the image says.
    """
    for attempt in range(TRIES_MAX):
        if _rewrite_in_mount(disk, wanted):
            return
        try:
            with alone(disk, keys) as storage:
                known = _checked(disk, read_identity(storage))
                key = image_key_of(known)
                try:
                    sure = identities.current(storage, known, key)
                    identities.rewrite(storage, wanted(sure), key)
                finally:
                    wipe(key)
                return
        except Busy:
            if attempt + 1 == TRIES_MAX:
                raise


@contextlib.contextmanager
def alone(disk: Disk, keys: KeyService) -> Iterator[FileStorage]:
    """Lend the file of an image that nobody uses.

    Raises:
        Busy: somebody does.
    """
    with contextlib.ExitStack() as stack:
        storage = FileStorage.open(disk.path)
        stack.callback(storage.close)
        stack.callback(keys.lock_image(disk.path, disk.uuid, shared=False).close)
        yield storage


def _rewrite_in_mount(disk: Disk, wanted: Wanted) -> bool:
    """Have the mount do it that holds the image; False if none does."""
    mount = sealed.find(disk.path).mount
    if mount is None:
        return False
    path = os.path.realpath(disk.path)
    known = look(disk)  # the mount verified it when it opened the image, and nobody else writes it
    after = wanted(known)
    answer = mount.call(
        "rewrite-identity",
        path=path,
        generation=known.generation,
        wrapped_keys=None
        if after.wrapped_keys == known.wrapped_keys
        else [[at, _text(raw)] for at, raw in after.wrapped_keys],
        recovery_slots=[_text(raw) for raw in after.recovery_slots],
    )
    return bool(answer["done"])


def _checked(disk: Disk, identity: Identity) -> Identity:
    if (identity.uuid, identity.vm_id) != (disk.uuid, disk.vm_id):
        raise ForeignImage(
            disk.path, f'another image stands where one of VM "{disk.vm_id}" is registered'
        )
    return identity


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def with_keys(identity: Identity, wrap: Callable[[bytes, bytes], bytes]) -> Identity:
    """Return an identity whose wrapped keys are `wrap(uuid, wrapped key)`."""
    wrapped = tuple((at, wrap(identity.uuid, raw)) for at, raw in identity.wrapped_keys)
    return replace(identity, wrapped_keys=wrapped)
