"""The state directory: keys, registry, ledger, embedded TPM; its lock, its durable writes.

The one module of the key room that writes files. A file is replaced as a whole: temporary file,
fsync, rename, fsync of the directory; a reader therefore needs no lock and sees the old or the
new content. Only the ledger is appended to as well; its reader finds the end by the MACs of its
rows. Whoever reads, changes and writes back holds the lock (`StateDir.lock`), so many
processes may share one state directory. The lock also covers the embedded TPM.

Concurrency: `lock` serialises the threads of a process by a mutex (no time limit: each holder is
bounded by its own TPM call) and processes by flock (10 s, then `Busy`). Not reentrant. An object
must not be used after a fork; open another one in the child.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sealfs.errors import (
    Busy,
    HostNotInitialised,
    KeyRecordDamaged,
    KeyServiceError,
    NoSpace,
    StorageFailed,
    UsageError,
)
from sealfs.keys import labels

LOCK_WAIT_S: Final = 10.0
LOCK_POLL_S: Final = 0.005
"""A use of the embedded TPM takes about 30 ms; polling at a sixth of it costs nothing."""

KEYS_DIRECTORY: Final = "keys"
TPM_DIRECTORY: Final = "tpm"
IMAGES_DIRECTORY: Final = "images"
"""One empty file for each image that was ever open here, to be locked."""
POLICIES_DIRECTORY: Final = "policies"
HOST_FILE: Final = "host.record"
HOST_PENDING_FILE: Final = "host.pending"
REGISTRY_FILE: Final = "registry"
NETWORKS_FILE: Final = "networks"
LEDGER_FILE: Final = "ledger"
AUDIT_FILE: Final = "audit.log"
LOCK_FILE: Final = "lock"
REPLACED_SUFFIX: Final = ".replaced"
"""Of what is left of a host whose TPM was replaced."""
RECORD_SUFFIX: Final = ".slot"
POLICY_SUFFIX: Final = ".policy"
GONE_SUFFIX: Final = ".gone"
"""The tombstone of a key that was moved or revoked."""
PENDING_SUFFIX: Final = ".next"
"""The record of the key that a VM's images are just being rewrapped to."""
TEMPORARY_PREFIX: Final = ".new-"


def record_name(kmi: str) -> str:
    """Return the file name for a KMI; a hash, so that no caller's text reaches a path."""
    return hashlib.sha256(labels.RECORD_NAME + kmi.encode("utf-8")).hexdigest()[:32] + RECORD_SUFFIX


class ImageLock:
    """Says that an image is in use on this host, whatever file it was opened by; see `close`."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def detach(self) -> int:
        """Give the descriptor away: the lock is held until its last copy is closed."""
        descriptor, self._descriptor = self._descriptor, -1
        return descriptor

    def close(self) -> None:
        """Let go of it; more than once does no harm."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class HeldLock:
    """Proof that the state lock is held, asked for by everything that may be done only then."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor


class StateDir:
    """One state directory; use `create` at initialisation and `open` afterwards."""

    def __init__(self, path: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self.path = path
        self._lock_wait_s = lock_wait_s
        self._mutex = threading.Lock()
        self._owner: int | None = None
        self._process = os.getpid()

    @classmethod
    def create(cls, path: Path) -> StateDir:
        """Make the directory and its rooms (0700) where they are missing; durable on return.

        Raises:
            UsageError: cannot be made, or holds other people's files: closing `/tmp` to
                everybody would be no service.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.stat().st_mode & 0o077:
                if any(path.iterdir()):
                    raise UsageError(path, "is not empty and open to others; name a new directory")
                path.chmod(0o700)
            for room in (KEYS_DIRECTORY, TPM_DIRECTORY):
                (path / room).mkdir(mode=0o700, exist_ok=True)
            _sync_directory(path)
            _sync_directory(path.parent)
        except OSError as error:
            raise UsageError(path, f"cannot be made a state directory: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open_any(cls, path: Path) -> StateDir:
        """Open a directory in which a host was set up, be its record there or not.

        Raises:
            HostNotInitialised: nothing was set up there.
        """
        if not any((path / name).exists() for name in (HOST_FILE, REGISTRY_FILE, KEYS_DIRECTORY)):
            raise HostNotInitialised(path, "nothing was set up in this state directory")
        return cls.create(path)

    @classmethod
    def open(cls, path: Path) -> StateDir:
        """Open a directory that `init` made.

        Raises:
            HostNotInitialised: there is no host record in it.
            UsageError: other users may write to it.
        """
        state = cls(path)
        try:
            mode = path.stat().st_mode
            (path / HOST_FILE).lstat()
        except (FileNotFoundError, NotADirectoryError):
            raise HostNotInitialised(path, "no host record in this state directory") from None
        except OSError as error:
            raise UsageError(path, f"cannot be read: {error.strerror}") from error
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UsageError(path, f"others may write to it (mode {mode & 0o777:o}, wanted 700)")
        return state

    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock:
        """Lock an image by its uuid: two files may be copies of one image.

        Args:
            subject: how messages name the image.
            image_uuid: from its identity.
            shared: for reading, beside others who read.

        Raises:
            Busy: another process has the image, or a copy of it, open.
        """
        directory = self.path / IMAGES_DIRECTORY
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(directory / image_uuid.hex(), flags, 0o600)
        except FileNotFoundError:
            raise HostNotInitialised(self.path, "the state directory is gone") from None
        except OSError as error:
            raise StorageFailed(directory, f"cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno == errno.EAGAIN:
                raise Busy(subject, "is in use by another sealfs process, as a copy") from None
            raise StorageFailed(directory, f"cannot lock: {error.strerror}") from error
        return ImageLock(descriptor)

    @property
    def tpm_directory(self) -> Path:
        return self.path / TPM_DIRECTORY

    @property
    def keys_directory(self) -> Path:
        return self.path / KEYS_DIRECTORY

    def check_process(self) -> None:
        """Refuse use in a forked child: it shares TPM contexts, locks and secrets.

        Raises:
            KeyServiceError: this process is not the one that opened the directory.
        """
        if os.getpid() != self._process:
            raise KeyServiceError(
                self.path, "the key service was opened before a fork; open it again in the child"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[HeldLock]:
        """Hold the state lock.

        Raises:
            Busy: another process held it for `lock_wait_s`.
        """
        self.check_process()
        assert self._owner != threading.get_ident(), "the state lock is not reentrant"
        with self._mutex:
            self._owner = threading.get_ident()
            try:
                descriptor = self._open_lock_file()
                try:
                    self._wait_for_flock(descriptor)
                    yield HeldLock(descriptor)
                finally:
                    # Unlock, not only close: a fork of another thread may hold a duplicate
                    # between fork and exec. A TPM process was waited for before this line.
                    with contextlib.suppress(OSError):
                        fcntl.flock(descriptor, fcntl.LOCK_UN)
                    os.close(descriptor)
            finally:
                self._owner = None

    def _open_lock_file(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(self.path / LOCK_FILE, flags, 0o600)
        except (FileNotFoundError, NotADirectoryError):
            raise HostNotInitialised(self.path, "the state directory is gone") from None
        except OSError as error:
            raise UsageError(self.path, f"cannot be locked: {error.strerror}") from error

    def _wait_for_flock(self, descriptor: int) -> None:
        deadline = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    raise UsageError(self.path, f"cannot lock: {error.strerror}") from error
            if time.monotonic() > deadline:
                raise Busy(
                    self.path,
                    f"another sealfs process held the state directory for {self._lock_wait_s:g} s",
                )
            time.sleep(LOCK_POLL_S)

    def read(self, name: str, size_max: int) -> bytes | None:
        """Return a whole file below the state directory, None where there is none.

        Raises:
            KeyRecordDamaged: not a regular file, unreadable, or larger than `size_max`.
        """
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise KeyRecordDamaged(path, f"cannot be read: {error.strerror}") from error
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise KeyRecordDamaged(path, "is not a regular file")
            if facts.st_size > size_max:
                raise KeyRecordDamaged(
                    path, f"has {facts.st_size} bytes, at most {size_max} are allowed"
                )
            content = bytearray()
            while len(content) <= size_max and (piece := os.read(descriptor, size_max)):
                content += piece
            return bytes(content[:size_max])
        except OSError as error:
            raise KeyRecordDamaged(path, f"cannot be read: {error.strerror}") from error
        finally:
            os.close(descriptor)

    def has(self, name: str) -> bool:
        """Whether there is such a file; nothing is read."""
        return os.path.lexists(self.path / name)

    def write(self, name: str, content: bytes, held: HeldLock) -> None:
        """Replace a whole file; durable on return. The caller holds the lock.

        Raises:
            NoSpace: the file system is full; the old file stands.
            StorageFailed: any other failure; the old or the new file stands.
        """
        assert held.descriptor >= 0
        path = self.path / name
        self._sweep(path.parent)
        temporary = path.parent / (TEMPORARY_PREFIX + secrets.token_hex(8))
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(temporary, flags, 0o600)
            try:
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            # Crash here: the old file stands, a stray temporary file is swept by the next write.
            os.replace(temporary, path)
            # Crash here: the old or the new file stands, each of them whole.
            _sync_directory(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(path, "no space left to write it; nothing was changed") from error
            raise StorageFailed(path, f"cannot be written: {error.strerror}") from error

    def append(self, name: str, offset: int, content: bytes, held: HeldLock) -> None:
        """Write from `offset` on, which becomes the end of the file; durable on return.

        What stood behind `offset` is gone. The caller holds the lock.

        Raises:
            NoSpace: the file system is full. StorageFailed: any other failure. What stood before
            `offset` stands; behind it may be anything.
        """
        assert held.descriptor >= 0
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                rest = memoryview(content)
                while rest:
                    count = os.pwrite(descriptor, rest, offset + len(content) - len(rest))
                    rest = rest[count:]
                os.ftruncate(descriptor, offset + len(content))
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(path, "no space left to write it; nothing was changed") from error
            raise StorageFailed(path, f"cannot be written: {error.strerror}") from error

    def remove(self, name: str, held: HeldLock) -> None:
        """Remove a file if it is there; durable on return. The caller holds the lock."""
        assert held.descriptor >= 0
        path = self.path / name
        try:
            path.unlink(missing_ok=True)
            _sync_directory(path.parent)
        except OSError as error:
            raise StorageFailed(path, f"cannot be removed: {error.strerror}") from error

    def rename(self, old: str, new: str, held: HeldLock) -> None:
        """Rename a file of the state directory; durable on return. The caller holds the lock."""
        assert held.descriptor >= 0
        try:
            os.replace(self.path / old, self.path / new)
            _sync_directory((self.path / new).parent)
        except OSError as error:
            raise StorageFailed(self.path / new, f"cannot be named: {error.strerror}") from error

    def record_names(self, suffix: str = RECORD_SUFFIX) -> list[str]:
        """Return the names of all key record files, relative to the state directory, sorted.

        `suffix`: of another kind of file beside them.
        """
        try:
            found = os.listdir(self.keys_directory)
        except OSError as error:
            raise KeyRecordDamaged(
                self.keys_directory, f"cannot be read: {error.strerror}"
            ) from error
        return sorted(f"{KEYS_DIRECTORY}/{name}" for name in found if name.endswith(suffix))

    def policy_names(self) -> list[str]:
        """Return the names of all signed policies, relative to the state directory, sorted."""
        try:
            found = os.listdir(self.path / POLICIES_DIRECTORY)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise KeyRecordDamaged(
                self.path / POLICIES_DIRECTORY, f"cannot be read: {error.strerror}"
            ) from error
        return sorted(
            f"{POLICIES_DIRECTORY}/{name}" for name in found if name.endswith(POLICY_SUFFIX)
        )

    def make_room(self, directory: str) -> None:
        """Make a directory (0700) of the state directory where it is missing; durable on return.

        Raises:
            StorageFailed: it cannot be made.
        """
        try:
            (self.path / directory).mkdir(mode=0o700, exist_ok=True)
            _sync_directory(self.path)
        except OSError as error:
            raise StorageFailed(
                self.path / directory, f"cannot be made: {error.strerror}"
            ) from error

    def record_file(self, kmi: str) -> str:
        """Return the name of a KMI's record, relative to the state directory."""
        return f"{KEYS_DIRECTORY}/{record_name(kmi)}"

    def pending_file(self, kmi: str) -> str:
        """Return the name of the record that a KMI's will be replaced by, as `record_file`."""
        return self.record_file(kmi).removesuffix(RECORD_SUFFIX) + PENDING_SUFFIX

    def gone_file(self, kmi: str) -> str:
        """Return the name of a KMI's tombstone, as `record_file`."""
        return self.record_file(kmi).removesuffix(RECORD_SUFFIX) + GONE_SUFFIX

    def _sweep(self, directory: Path) -> None:
        # Every writer holds the lock, so a temporary file seen here was left by a dead one.
        for name in os.listdir(directory):
            if name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    (directory / name).unlink()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
