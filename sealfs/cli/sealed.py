"""Finding and opening the sealed image that a user's path means.

A path may be a sealed file, or the plain file that a mount shows for it. Opening checks the
registry: an authentic image that stands where another one is registered is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealfs.cli.settings import Settings
from sealfs.errors import Busy, FormatError, KeyNotFound, NotFound, UsageError
from sealfs.image.cache import BlockCache
from sealfs.image.format import SUPERBLOCK_SIZE, Identity
from sealfs.image.image import SealedImage
from sealfs.image.recovery import Witness, read_identity
from sealfs.image.storage import FileStorage
from sealfs.mount import freshness
from sealfs.mount.imagekeys import lent_keys

if TYPE_CHECKING:
    from sealfs.keys.service import KeyService
    from sealfs.mount.control import RunningMount

SUFFIX = ".sealed"
CLEAN_CACHE_SIZE = 16 << 20
DIRTY_CACHE_SIZE = 64 << 20
_F_OFD_GETLK = 36  # <linux/fcntl.h>
_FLOCK = struct.Struct("hhqqi4x")
_MOUNTINFO = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is: `sealed` its file, `shown` its plain view where a mount shows it."""

    sealed: Path
    shown: Path | None = None
    mount: RunningMount | None = None


def find(path: Path) -> Place:
    """Return what a user's path means.

    Raises:
        NotFound: neither a sealed file nor a file under a mount.
        Busy: it lies under a mount whose daemon is gone.
    """
    mount = _mount_of(path)
    if mount is not None:
        real = Path(os.path.realpath(path))
        source, mountpoint = Path(mount.status["source"]), Path(mount.status["mountpoint"])
        if mountpoint in real.parents:
            below = real.relative_to(mountpoint)
            sealed = source / below.parent / (below.name + SUFFIX)
            if not sealed.exists():
                raise NotFound(path, "no such file under the mount")
            return Place(sealed, real, mount)
        if source in real.parents and real.name.endswith(SUFFIX):
            return Place(path, mountpoint / str(real.relative_to(source))[: -len(SUFFIX)], mount)
    _check_is_file(path)
    return Place(path)


def is_in_use(path: Path) -> bool:
    """Whether somebody has the image open for writing; takes no lock and disturbs nobody."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        question = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, question)
    finally:
        os.close(fd)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def peek_storage(path: Path) -> FileStorage:
    """Open a file for looking only: no lock, so that nobody is kept from using the image."""
    return FileStorage(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))


@contextlib.contextmanager
def opened(settings: Settings, place: Place, keys: KeyService) -> Iterator[SealedImage]:
    """Open a registered image for reading, as nobody else's for that time.

    Raises:
        Busy: a mount or another command has it.
        ForeignImage: not the image registered under this path.
        RolledBack: it is older than this host knows it.
        SealfsError: whatever the key service or the image finds.
    """
    storage = _locked(settings, place)
    with contextlib.ExitStack() as stack:
        stack.callback(storage.close)
        identity = read_identity(storage)
        check_registered(place.sealed, identity, keys)
        lock = keys.lock_image(place.sealed, identity.uuid, shared=True)
        stack.callback(lock.close)
        known = freshness.witness(place.sealed, identity.uuid, keys.ledger)
        image = open_with(storage, identity, keys, known)
        stack.pop_all()
    try:
        yield image
    finally:
        image.abandon()
        lock.close()


def open_with(
    storage: FileStorage, identity: Identity, keys: KeyService, witness: Witness | None
) -> SealedImage:
    """Verify and open an image for reading; on failure the storage stays the caller's.

    `witness` says whether it is as new as this host knows it; None where that is not the question.
    """
    with lent_keys(keys, identity, storage.path) as image_keys:
        return SealedImage.open(
            storage, image_key=image_keys, cache=new_cache(), read_only=True, witness=witness
        )


def new_cache() -> BlockCache:
    """Return a cache for one command's image."""
    return BlockCache(clean_max=CLEAN_CACHE_SIZE, dirty_max=DIRTY_CACHE_SIZE)


def check_registered(path: Path, identity: Identity, keys: KeyService) -> None:
    """Refuse an image that is not the one registered under its path.

    Raises:
        ForeignImage: with the innocent and the hostile reason.
        KeyNotFound: this host knows neither the image nor its VM.
    """
    if keys.registry.lookup(path) is None and not keys.has(identity.kmi):
        raise KeyNotFound(identity.vm_id, "this host has no key for it")
    keys.registry.check(path, identity.uuid, identity.vm_id)


def _locked(settings: Settings, place: Place) -> FileStorage:
    """Take the image's lock, from a mount that holds it idle if need be."""
    try:
        return FileStorage.open(place.sealed, read_only=True)
    except Busy:
        mount = place.mount
        if mount is None:
            raise
        answer: dict[str, Any] = mount.call("close", path=os.path.realpath(place.sealed))
        if answer["in_use"]:
            settings.situation.mountpoint = place.shown
            raise Busy(place.sealed, f'is in use through "{place.shown}"') from None
    return FileStorage.open(place.sealed, read_only=True)


def _mount_of(path: Path) -> RunningMount | None:
    try:
        is_any = b" fuse.sealfs " in _MOUNTINFO.read_bytes()  # paths may hold any byte
    except OSError:
        is_any = True
    if not is_any:
        return None
    from sealfs.mount.control import find_mount  # slow to load, seldom needed

    return find_mount(path)


def _check_is_file(path: Path) -> None:
    if path.is_dir():
        raise UsageError(path, "is a directory, not a sealed image")
    if not path.exists():
        raise NotFound(path, "no such sealed image")
    if not path.is_file():
        raise UsageError(path, "is not a regular file")
    size = path.stat().st_size
    if size < SUPERBLOCK_SIZE:
        raise FormatError(path, f"is not a sealed image (it has {size} bytes)")
