"""A file that appears under its name complete, or not at all.

It is made under a temporary name in the same directory and named at the end. The temporary name
follows from the final one, so the next attempt finds what a killed one left; a flock tells a dead
leftover from one that is being written. Knows nothing of what is in the file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Self

from sealfs.errors import AlreadyExists, Busy, NotFound, UsageError

PREFIX = ".sealfs-"
SUFFIX = ".new"


class Newborn:
    """One file on its way; a context manager that removes what was not named.

    Attributes:
        path: where it will appear.
        temporary: where it is until then: an empty file of mode 0600 at first.
    """

    def __init__(self, path: Path, *, replace: bool = False) -> None:
        self.path = path
        self._replace = replace
        digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
        self.temporary = path.parent / f"{PREFIX}{digest}{SUFFIX}"
        self._fd = -1
        self._is_named = False

    def __enter__(self) -> Self:
        self._check_place()
        self._fd = self._create()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_named:
            with contextlib.suppress(OSError):
                self.temporary.unlink()
        os.close(self._fd)

    def name(self) -> None:
        """Give the file, which is durable by now, its name; durable on return.

        Raises:
            AlreadyExists: somebody made a file of that name meanwhile.
        """
        if self._replace:
            os.replace(self.temporary, self.path)
            self._is_named = True
        else:
            self._link()
        # Crash here: named or not, complete in both cases.
        sync_directory(self.path.parent)

    def _link(self) -> None:
        try:
            os.link(self.temporary, self.path)  # unlike rename, never replaces another's file
        except FileExistsError:
            raise AlreadyExists(self.path, "exists; somebody else made it meanwhile") from None
        except OSError as exc:
            if exc.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # A file system without hard links: the window for another's file is a moment.
            if os.path.lexists(self.path):
                raise AlreadyExists(self.path, "exists") from None
            os.rename(self.temporary, self.path)
            self._is_named = True

    def _check_place(self) -> None:
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise NotFound(self.path.parent, "no such directory") from None
            return
        if stat.S_ISDIR(status.st_mode):
            raise AlreadyExists(self.path, "is a directory")
        if not self._replace:
            raise AlreadyExists(self.path, "exists, and nothing is overwritten")
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(self.path, "is not a regular file, so it cannot be replaced")

    def _create(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        while True:
            try:
                fd = os.open(self.temporary, flags, 0o600)
            except FileExistsError:
                self._remove_leftover()
                continue
            except OSError as exc:
                # The user knows the final name only.
                raise OSError(exc.errno, exc.strerror, str(self.path.parent)) from None
            if not self._is_locked(fd):
                os.close(fd)
                raise self._busy()
            return fd

    def _remove_leftover(self) -> None:
        """Remove what a killed run left.

        Raises:
            Busy: it is being written.
        """
        try:
            fd = os.open(self.temporary, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            if not self._is_locked(fd):
                raise self._busy()
            # Only whoever holds the lock of the file that has the name now may remove it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), self.temporary.lstat()):
                    self.temporary.unlink()
        finally:
            os.close(fd)

    @staticmethod
    def _is_locked(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _busy(self) -> Busy:
        return Busy(self.path, "is being written by another sealfs command")


def sync_directory(path: Path) -> None:
    """Make names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
