"""Making a sealed image: key, file, registry entry, name, in this order.

A crash between any two steps leaves something that opens, or nothing but a temporary file that
the next attempt removes. An attempt that fails or is interrupted takes everything back, a key
that was made for nothing included.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sealfs.cli.errors import warn
from sealfs.cli.interrupts import shielded
from sealfs.cli.newborn import Newborn
from sealfs.cli.newkey import NewKey, key_for
from sealfs.cli.sealed import SUFFIX, new_cache
from sealfs.errors import SealfsError
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import geometry_for
from sealfs.image.storage import FileStorage
from sealfs.keys.ledger import Progress
from sealfs.keys.rotation import making_image
from sealfs.keys.statedir import StateDir
from sealfs.keys.vmkey import IMAGE_KEY_SIZE, VmKey, wipe
from sealfs.keys.wire import check_identifier
from sealfs.mount.freshness import NEWBORN, progress_of

if TYPE_CHECKING:
    from sealfs.keys.service import KeyService

Fill = Callable[[SealedImage], None]


@dataclass(frozen=True, slots=True)
class NewImage:
    """What is to be made. `vm_id` None: one is made up."""

    path: Path
    size: int
    vm_id: str | None
    label: str
    key: NewKey


def make(keys: KeyService, state: Path, wanted: NewImage, fill: Fill | None) -> tuple[str, bytes]:
    """Make a sealed image, filled by `fill` where there is one; return VM id and image uuid.

    Raises:
        AlreadyExists, Busy, NotFound: the name is taken, being written, or has no directory.
        UsageError: a VM id, label, PCR list or size that cannot be.
        KeyServiceError, NoSpace, StorageFailed: whatever a step meets.
    """
    vm_id = wanted.vm_id if wanted.vm_id is not None else keys.new_vm_id()
    check_identifier(vm_id, "VM id")
    if wanted.label:
        check_identifier(wanted.label, "disk label")
    if not wanted.path.name.endswith(SUFFIX):
        warn(f'"{wanted.path}": a mount shows only files named NAME{SUFFIX}')
    image_uuid = uuid.uuid4().bytes
    with (
        Newborn(wanted.path) as newborn,
        making_image(keys, wanted.path, vm_id),
        _vm_key(keys, state, vm_id, wanted) as vm_key,
    ):
        _warn_of_other_disks(keys, wanted.path, vm_id)
        # Crash here: a key without an image; the next image of that VM uses it.
        image_key = bytearray(keys.random(IMAGE_KEY_SIZE))
        try:
            identity = Identity(
                uuid=image_uuid,
                vm_id=vm_id,
                kmi=vm_key.kmi,
                label=wanted.label,
                created=int(time.time()),
                wrapped_keys=((1, vm_key.wrap_image_key(image_uuid, image_key)),),
                recovery_slots=vm_key.recovery_slots,
            )
            progress = _write(newborn, identity, image_key, wanted.size, fill)
        finally:
            wipe(image_key)
        with shielded():
            keys.ledger.accept(image_uuid, progress)
            # Crash here: a line in the ledger that concerns no image.
            _register_and_name(keys, newborn, identity)
    return vm_id, image_uuid


def _write(
    newborn: Newborn, identity: Identity, image_key: bytearray, size: int, fill: Fill | None
) -> Progress:
    """Write the whole image; durable on return. Return how far it has come."""
    storage = FileStorage.open(newborn.temporary)
    storage.path = str(newborn.path)  # the user has never heard of the temporary name
    try:
        SealedImage.create(
            storage,
            identity=identity,
            image_key=image_key,
            size=size,
            geometry=geometry_for(size),
        )
        if fill is None:
            return NEWBORN
        image = SealedImage.open(storage, image_key=image_key, cache=new_cache())
        try:
            fill(image)
            image.close()
        except BaseException:
            image.abandon()
            raise
        return progress_of(image.progress)
    finally:
        storage.close()


def _register_and_name(keys: KeyService, newborn: Newborn, identity: Identity) -> None:
    registry, path = keys.registry, newborn.path
    before = registry.lookup(path)
    registry.add(path, identity.uuid, identity.vm_id, replace=True)
    # Crash here: an entry without a file; the next image of that name replaces it.
    try:
        newborn.name()
    except BaseException:
        with contextlib.suppress(SealfsError):
            if before is None:
                registry.remove(path)
            else:
                registry.add(path, before.image_uuid, before.vm_id, replace=True)
        raise


@contextlib.contextmanager
def _vm_key(keys: KeyService, state: Path, vm_id: str, wanted: NewImage) -> Iterator[VmKey]:
    """Lend the VM's key; one that is made now and then not used is removed again."""
    with _making(state) as only_we_make:
        vm_key: VmKey | None = None
        is_new = False
        try:
            with shielded():
                vm_key, is_new = key_for(keys, vm_id, wanted.key)
            yield vm_key
        except BaseException:
            if is_new and vm_key is not None:
                with shielded(), contextlib.suppress(SealfsError, OSError):
                    _forget(keys, state, vm_key, only_we_make)
            raise
        finally:
            if vm_key is not None:
                vm_key.wipe()


@contextlib.contextmanager
def _making(state: Path) -> Iterator[Callable[[], bool]]:
    """Say that an image is being made; lends a function that tells whether nobody else does.

    A key made here may be in use by another command that makes a second disk of the same VM and
    has not registered it yet; it must not be taken from under it.
    """
    fd = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)

        def is_alone() -> bool:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        yield is_alone
    finally:
        os.close(fd)


def _forget(keys: KeyService, state: Path, vm_key: VmKey, only_we_make: Callable[[], bool]) -> None:
    if not only_we_make() or any(e.vm_id == vm_key.vm_id for e in keys.registry.entries()):
        return
    directory = StateDir.open(state)
    with directory.lock() as held:
        directory.remove(directory.record_file(vm_key.kmi), held)


def _warn_of_other_disks(keys: KeyService, path: Path, vm_id: str) -> None:
    here = os.path.realpath(path)
    for entry in keys.registry.entries():
        if entry.vm_id == vm_id and entry.path != here and os.path.exists(entry.path):
            warn(f'VM "{vm_id}" has a disk already, "{entry.path}"; this is another one of it')
            return
