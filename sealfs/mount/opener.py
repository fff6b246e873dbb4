"""From a sealed file to an open image, and the file's life: made, moved, removed.

The one place of the mount that meets both the image room and the key service. An image opens only
under the path it is registered for: an authentic image that was put in another's place is refused.

Order of steps on disk (a crash between any two leaves something that opens):
create: key record durable, image complete under a temporary name, ledger, registry, final name.
Move: entries of both paths durable, rename(2), old entries removed.
Remove: the file, then its entry, then its line in the ledger.

Concurrency: everything blocks and is called in worker threads, several at once. `_lock` is held
while a file is made, moved or removed, so that what was found in the registry still holds when it
is changed; only others of these wait for it. Opening takes no lock of ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sealfs.errors import AlreadyExists, SealfsError
from sealfs.image.format import Anchor, Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import geometry_for
from sealfs.image.recovery import peek, read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys.rotation import making_image
from sealfs.keys.vmkey import NewImageKey, wipe
from sealfs.mount import names
from sealfs.mount.disk import Opened
from sealfs.mount.freshness import NEWBORN, Ledger, progress_of, witness
from sealfs.mount.imagekeys import lent_keys
from sealfs.mount.names import SUFFIX, Ownership, sync_directory

if TYPE_CHECKING:
    from sealfs.image.cache import BlockCache
    from sealfs.keys.statedir import ImageLock

log = logging.getLogger("sealfs.mount")

_PEEKS_MAX = 4096  # sizes remembered
_HINTS_MAX = 4096  # VM ids remembered, for the log

STRAY_AGE = 3600.0  # seconds; no creation takes that long
_STRAY = re.compile(r"\.[0-9a-f]{32}\.new")

GROWING_SIZE = 256 << 20
"""A file made through the mount is empty and grows: its journal is that of a disk of 256 MiB."""


class RegistryEntry(Protocol):
    """What the registry knows of one path."""

    @property
    def path(self) -> str: ...
    @property
    def image_uuid(self) -> bytes: ...
    @property
    def vm_id(self) -> str: ...


class Registry(Protocol):
    """Which image belongs under which canonical path of this host."""

    def entries(self) -> Sequence[RegistryEntry]: ...
    def lookup(self, path: Path) -> RegistryEntry | None: ...
    def check(self, path: Path, image_uuid: bytes, vm_id: str) -> None: ...
    def add(self, path: Path, image_uuid: bytes, vm_id: str, *, replace: bool = False) -> None: ...
    def remove(self, path: Path) -> None: ...
    def moving(
        self, moves: Iterable[tuple[Path, Path]]
    ) -> contextlib.AbstractContextManager[None]: ...


class Keys(Protocol):
    """The key service as the mount needs it; any thread may call it."""

    @property
    def registry(self) -> Registry: ...
    @property
    def ledger(self) -> Ledger: ...
    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray: ...
    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey: ...
    def unlock(self, vm_id: str, pin: bytearray) -> None: ...
    def lock(self, vm_id: str) -> bool: ...
    def unlocked(self) -> Sequence[str]: ...
    @property
    def state_path(self) -> Path: ...
    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock: ...


class Opener:
    """Opens, makes, moves and removes sealed files, keeping the registry in step."""

    def __init__(self, keys: Keys, cache: BlockCache, *, read_only: bool) -> None:
        self.keys = keys
        self._cache = cache
        self._read_only = read_only
        self._lock = threading.Lock()
        self._vm_ids: dict[str, str] = {}
        self._sizes: dict[tuple[int, int], tuple[int, int, int]] = {}

    def serves(self, vm_id: str, source: Path) -> bool:
        """Whether an image of a VM is registered below a directory."""
        return any(
            entry.vm_id == vm_id and source in Path(entry.path).parents
            for entry in self.keys.registry.entries()
        )

    def vm_id_of(self, path: Path) -> str:
        """Return the VM id last read from this file, for the log; empty if it was never read."""
        return self._vm_ids.get(str(path), "")

    def open(self, path: Path) -> Opened:
        """Lock, identify, check the registry, unseal, recover.

        Raises:
            Busy: another process has the image.
            ForeignImage: not the image that is registered under this path.
            KeyServiceError: the key is missing, revoked or refused.
            RolledBack: the image is older than the host knows it, or the host's ledger is.
            FormatError, IntegrityError, StorageFailed: the image itself.
        """
        with contextlib.ExitStack() as undo:
            storage = FileStorage.open(path, read_only=self._read_only)
            undo.callback(storage.close)
            identity = read_identity(storage)
            self._remember(path, identity.vm_id)
            self.keys.registry.check(path, identity.uuid, identity.vm_id)
            lock = self.keys.lock_image(path, identity.uuid, shared=self._read_only)
            undo.callback(lock.close)
            with lent_keys(self.keys, identity, path) as image_keys:
                if not self._read_only:
                    self.keys.ledger.begin()
                image = SealedImage.open(
                    storage,
                    image_key=image_keys,
                    cache=self._cache,
                    read_only=self._read_only,
                    witness=witness(path, identity.uuid, self.keys.ledger),
                )
            undo.pop_all()
        for node in image.rebuilt_nodes:
            log.warning(
                'image="%s" vm="%s" node page %s was damaged; rebuilt, nothing is lost',
                path, identity.vm_id, node,
            )  # fmt: skip
        for lost in image.lost_ranges:
            log.error(
                'image="%s" vm="%s" bytes %d to %d of the disk are lost: %s',
                path, identity.vm_id, lost.offset, lost.offset + lost.size - 1, lost.cause,
            )  # fmt: skip
        for group in image.lost_groups:
            first = group * image.group_size
            log.error(
                'image="%s" vm="%s" leaf page of group %d is damaged: bytes %d to %d of the disk '
                "are lost, but for what was written last",
                path, identity.vm_id, group, first, first + image.group_size - 1,
            )  # fmt: skip
        return Opened(image, identity.vm_id, storage.fileno(), lock)

    def note(self, images: Mapping[bytes, Anchor]) -> None:
        """Note in the host's ledger how far images have come, by uuid; durable on return.

        Raises:
            KeyServiceError, StorageFailed, NoSpace: it could not be written.
        """
        self.keys.ledger.note({uuid: progress_of(state) for uuid, state in images.items()})

    def bump(self) -> None:
        """Bind what was noted to the TPM's counter; durable on return.

        Raises:
            KeyServiceError: the TPM does not answer, or the ledger is not what it was.
        """
        self.keys.ledger.bump()

    def size_of(self, path: Path, status: os.stat_result) -> int:
        """Return the size of the plain file, from the unverified superblock.

        Raises:
            FormatError: not a sealed image.
        """
        key = (status.st_dev, status.st_ino)
        known = self._sizes.get(key)
        if known is not None and known[:2] == (status.st_mtime_ns, status.st_ctime_ns):
            return known[2]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with contextlib.closing(FileStorage(fd, str(path))) as storage:
            size = peek(storage).size
        if len(self._sizes) >= _PEEKS_MAX:
            self._sizes.clear()
        self._sizes[key] = (status.st_mtime_ns, status.st_ctime_ns, size)
        return size

    def create(
        self, path: Path, vm_id: str, owner: Ownership, *, shares_directory: bool = False
    ) -> None:
        """Make an empty sealed image for the VM `vm_id` at `path`.

        Args:
            path: of the sealed file to be.
            vm_id: whose disk it is.
            owner: of the file.
            shares_directory: the disks of one directory are one VM's, not only those that
                differ in their last suffix alone (a snapshot, another format, a new version).

        Raises:
            AlreadyExists: the path is taken, or the VM id belongs to another path.
            KeyServiceError: no key could be made.
        """
        if os.path.lexists(path):
            raise AlreadyExists(path, "exists")
        temporary = path.parent / f".{uuid.uuid4().hex}.new"  # see `sweep`
        with self._lock, making_image(self.keys, path, vm_id):
            for entry in self.keys.registry.entries():
                other = Path(entry.path)
                is_same = other.parent == path.parent and (
                    shares_directory or names.stem(other) == names.stem(path)
                )
                # An entry whose file is gone blocks nobody.
                if entry.vm_id == vm_id and not is_same and os.path.lexists(other):
                    raise AlreadyExists(
                        path, f'VM id "{vm_id}" belongs to "{entry.path}"; choose another name'
                    )
            image_uuid = uuid.uuid4().bytes
            new = self.keys.new_image_key(vm_id, image_uuid)
            identity = Identity(
                uuid=image_uuid,
                vm_id=vm_id,
                kmi=new.kmi,
                created=int(time.time()),
                wrapped_keys=((1, new.wrapped),),
                recovery_slots=new.recovery_slots,
            )
            try:
                self._create_at(temporary, identity, new.key, owner)
                self.keys.ledger.accept(image_uuid, NEWBORN)
                # Crash here: a line in the ledger that concerns no image.
                self.keys.registry.add(path, image_uuid, vm_id, replace=True)
                # Crash here: an entry without a file; the next create replaces it.
                os.link(temporary, path)  # unlike rename, never replaces another's file
            except FileExistsError:
                raise AlreadyExists(path, "exists") from None
            finally:
                wipe(new.key)
                temporary.unlink(missing_ok=True)
            sync_directory(path.parent)

    def remove(self, path: Path) -> None:
        """Remove a sealed file and its registry entry; the VM's key stays."""
        with self._lock:
            gone = self.keys.registry.lookup(path)
            path.unlink()
            sync_directory(path.parent)
            # Crash here: an entry without a file, which the next create replaces.
            self.keys.registry.remove(path)
            self._forget(gone)

    def move(self, old: Path, new: Path) -> None:
        """Rename a sealed file, or a directory with all sealed files below it.

        What stands at `new` loses its name, as by `remove`.
        """
        moves = list(_moves(old, new))
        with self._lock:
            gone = self.keys.registry.lookup(new)
            with self.keys.registry.moving(moves):
                old.rename(new)
                sync_directory(new.parent)
                if old.parent != new.parent:
                    sync_directory(old.parent)
            self._forget(gone)

    def _forget(self, entry: RegistryEntry | None) -> None:
        """Drop an image that is no more from the ledger, unless it is elsewhere too."""
        if entry is None:
            return
        if all(other.image_uuid != entry.image_uuid for other in self.keys.registry.entries()):
            self.keys.ledger.accept(entry.image_uuid, None)

    def _create_at(self, path: Path, identity: Identity, key: bytearray, owner: Ownership) -> None:
        storage = FileStorage.create(path)
        try:
            SealedImage.create(
                storage,
                identity=identity,
                image_key=key,
                size=0,
                geometry=geometry_for(GROWING_SIZE),
            )
            if os.geteuid() == 0:
                os.fchown(storage.fileno(), owner.uid, owner.gid)
            os.fchmod(storage.fileno(), owner.mode)
        finally:
            storage.close()

    def _remember(self, path: Path, vm_id: str) -> None:
        if len(self._vm_ids) >= _HINTS_MAX:
            self._vm_ids.clear()
        self._vm_ids[str(path)] = vm_id


def sweep(source: Path, older_than: float = STRAY_AGE) -> int:
    """Remove what creations left that were cut short by a crash; return how many there were.

    Args:
        source: the directory of sealed files, with what is below it.
        older_than: seconds; what is younger may be in the making.
    """
    count = 0
    for directory, _, found in os.walk(source):
        for name in filter(_STRAY.fullmatch, found):
            stray = Path(directory, name)
            with contextlib.suppress(SealfsError, OSError):
                if time.time() - stray.lstat().st_mtime >= older_than:
                    # Who makes one holds its lock.
                    with contextlib.closing(FileStorage.open(stray)):
                        stray.unlink()
                        count += 1
    return count


def _moves(old: Path, new: Path) -> list[tuple[Path, Path]]:
    """Return (from, to) for each sealed file that a rename concerns."""
    if not stat.S_ISDIR(old.lstat().st_mode):
        return [(old, new)]
    return [
        (path, new / path.relative_to(old))
        for path in old.rglob(f"*{SUFFIX}")
        if path.is_file() and not path.is_symlink()
    ]
