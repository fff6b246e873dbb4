"""The one seam to the disk: the `Storage` protocol, the plan executor, and the real file.

Everything the image room reads or writes passes here, so that a simulated disk can stand in.
Concurrency: `read*` may be called from any thread at any time; what changes the file comes from
one thread at a time (the image's single writer).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

try:
    from sealfs.image._blockwrite import write_blocks as _write_blocks
except ImportError:  # it could not be built here
    _write_blocks = None  # type: ignore[assignment]

from sealfs.errors import Busy, NoSpace, NotFound, ReadOnly, StorageFailed
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.plan import Buffer, Offsets, Step, WritePlan

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_F_OFD_SETLK = 37  # <linux/fcntl.h>
_SYNC_FILE_RANGE_WRITE = 2
WRITE_BACK_SIZE_MIN = 256 << 10
"""Writes of that many bytes are started towards the device at once."""

_IOV_MAX = 1024  # <limits.h>: buffers in one pwritev

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    """Call fallocate(2), which the os module lacks."""
    while _libc.fallocate(fd, mode, offset, size) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class Storage(Protocol):
    """A file as the image sees it. Offsets and sizes in bytes.

    Failures of writes and syncs raise `StorageFailed`, except ENOSPC of `allocate`, which is
    `NoSpace`; read failures raise `StorageFailed` too. Nothing is ever partly written without
    an exception.
    """

    path: str

    def size(self) -> int:
        """Return the length of the file."""

    def read(self, offset: int, size: int) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file."""

    def read_into(self, offset: int, buffer: Buffer) -> int:
        """Fill `buffer`; return the bytes read, fewer than asked only at the end of the file."""

    def read_nowait(self, offset: int, buffer: Buffer) -> bool:
        """Fill `buffer` if that needs no waiting for the disk (RWF_NOWAIT), else return False."""

    def fileno(self) -> int:
        """Return the descriptor of the file; -1 where there is none (a simulated disk)."""

    def read_direct(self, offset: int, size: int) -> bytes:
        """As `read`, past the page cache: what the device holds (page-aligned arguments)."""

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers one after the other; durable after the next `sync`."""

    def write_blocks(self, offsets: Offsets, content: Buffer) -> None:
        """Write block i of `content` at offsets[i]; durable after the next `sync`."""

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write with RWF_DSYNC: durable on return, and nothing else with it."""

    def sync(self) -> None:
        """Make everything written so far durable (fdatasync)."""

    def allocate(self, offset: int, size: int) -> None:
        """Reserve space without changing length or content (fallocate KEEP_SIZE)."""

    def punch(self, offset: int, size: int) -> None:
        """Give the range back to the file system; it reads as zeros."""

    def truncate(self, size: int) -> None:
        """Set the length of the file."""

    def clock(self) -> float:
        """Return seconds on a clock that goes on while the process or the machine is asleep."""

    def close(self) -> None:
        """Let go of the file and its lock."""


def pieces_of(offsets: Offsets) -> Iterator[tuple[int, int, int]]:
    """Join blocks that lie one behind the other: (offset, first block, count)."""
    first = 0
    for i in range(1, len(offsets) + 1):
        if i == len(offsets) or offsets[i] != offsets[i - 1] + BLOCK_SIZE:
            yield offsets[first], first, i - first
            first = i


def execute(storage: Storage, plan: WritePlan) -> None:
    """Carry out a plan step by step; the first failure ends it with its exception."""
    for step in plan:
        match step[0]:
            case Step.WRITE:
                storage.write(step[1], step[2])
            case Step.WRITE_BLOCKS:
                storage.write_blocks(step[1], step[2])
            case Step.SYNC:
                storage.sync()
            case Step.DURABLE:
                storage.write_durable(step[1], step[2])
            case Step.PUNCH:
                storage.punch(step[1], step[2])
            case Step.TRUNCATE:
                storage.truncate(step[1])


class FileStorage:
    """A file on a local file system, held by an exclusive OFD lock while it is open.

    One descriptor for life: errors of write-back are reported once per descriptor, so a second
    one could swallow what the first must see. `read_direct` uses its own O_DIRECT descriptor,
    which never writes.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        self._direct_fd: int | None = None

    @classmethod
    def create(cls, path: Path) -> FileStorage:
        """Make a new, empty file (mode 0600); `AlreadyExists` is the caller's to find out."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        return cls._locked(fd, str(path), fcntl.F_WRLCK)

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False) -> FileStorage:
        """Open an existing file and lock it: one writer, or several readers.

        Raises:
            NotFound: there is no such file.
            Busy: somebody else has it open.
            ReadOnly: it may not be written (permissions, or a read-only file system).
        """
        flags = os.O_RDONLY if read_only else os.O_RDWR
        try:
            fd = os.open(path, flags | os.O_CLOEXEC)
        except FileNotFoundError:
            raise NotFound(path, "no such sealed image") from None
        except IsADirectoryError:
            raise NotFound(path, "is a directory, not a sealed image") from None
        except OSError as exc:
            if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                how = "reading" if read_only else "writing"
                raise ReadOnly(path, f"cannot be opened for {how}: {exc.strerror}") from exc
            raise StorageFailed(path, f"open failed: {exc.strerror}") from exc
        return cls._locked(fd, str(path), fcntl.F_RDLCK if read_only else fcntl.F_WRLCK)

    @classmethod
    def peek(cls, path: Path) -> FileStorage:
        """Open a file for a look at its headers: read-only, no lock, whoever has it open.

        Raises:
            NotFound, StorageFailed: as `open`.
        """
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))
        except (FileNotFoundError, IsADirectoryError):
            raise NotFound(path, "no such sealed image") from None
        except OSError as exc:
            raise StorageFailed(path, f"open failed: {exc.strerror}") from exc

    @classmethod
    def _locked(cls, fd: int, path: str, kind: int) -> FileStorage:
        # An OFD lock belongs to the open file description: it ends with the last descriptor,
        # however the process dies, and another open in this process meets it too.
        lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, lock)
        except OSError as exc:
            os.close(fd)
            if exc.errno in (errno.EAGAIN, errno.EACCES):
                raise Busy(path, "is in use by another sealfs process") from None
            raise StorageFailed(path, f"lock failed: {exc.strerror}") from exc
        return cls(fd, path)

    def fileno(self) -> int:
        return self._fd

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        buffer = bytearray(size)
        count = self.read_into(offset, buffer)
        return bytes(memoryview(buffer)[:count])

    def read_into(self, offset: int, buffer: Buffer) -> int:
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as exc:
                raise StorageFailed(self.path, _failure("read", offset, exc)) from exc
            if count == 0:
                break
            done += count
        return done

    def read_nowait(self, offset: int, buffer: Buffer) -> bool:
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except OSError:
            # EAGAIN: not in the page cache. Any other failure is met again, and reported, by
            # the read that waits.
            return False

    def read_direct(self, offset: int, size: int) -> bytes:
        if self._direct_fd is None:
            try:
                self._direct_fd = os.open(
                    f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                )
            except OSError:
                # A file system without O_DIRECT (tmpfs) has no device behind it either.
                return self.read(offset, size)
        buffer = mmap.mmap(-1, size)  # page-aligned, as O_DIRECT wants it
        done = 0
        while done < size:
            try:
                count = os.preadv(self._direct_fd, [memoryview(buffer)[done:]], offset + done)
            except OSError as exc:
                raise StorageFailed(self.path, _failure("read", offset, exc)) from exc
            done += count
            if count == 0 or done % mmap.PAGESIZE:
                break
        if done < min(size, self.size() - offset):
            # Not the file's end: a journal read so would look as if its records were not there.
            raise StorageFailed(self.path, f"read at offset {offset} gave {done} of {size} bytes")
        return buffer[:done]

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._write(offset, buffers, 0)
        size = sum(map(len, buffers))
        if size >= WRITE_BACK_SIZE_MIN:
            # On its way to the device now, so that the sync that follows finds little left to
            # do: sequential writes ran 1.2 times as fast (2026-11). A hint: its failure is the
            # sync's to report.
            _libc.sync_file_range(self._fd, offset, size, _SYNC_FILE_RANGE_WRITE)

    def write_blocks(self, offsets: Offsets, content: Buffer) -> None:
        if _write_blocks is None:
            view = memoryview(content)
            for at, first, count in pieces_of(offsets):
                self.write(at, [view[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]])
            return
        index, code = _write_blocks(self._fd, offsets, content, WRITE_BACK_SIZE_MIN)
        if index >= 0:
            failure = OSError(code, os.strerror(code))
            message = _failure("write", offsets[index], failure)
            raise StorageFailed(self.path, message) from failure

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._write(offset, buffers, os.RWF_DSYNC)

    def _write(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        pending = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while pending:
            try:
                count = os.pwritev(self._fd, pending[:_IOV_MAX], offset, flags)
            except OSError as exc:
                raise StorageFailed(self.path, _failure("write", offset, exc)) from exc
            offset += count
            while pending and count >= len(pending[0]):
                count -= len(pending.pop(0))
            if count:
                pending[0] = pending[0][count:]

    def sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            raise StorageFailed(self.path, f"fdatasync failed: {exc.strerror}") from exc

    def allocate(self, offset: int, size: int) -> None:
        try:
            _fallocate(self._fd, _FALLOC_FL_KEEP_SIZE, offset, size)
        except OSError as exc:
            if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise NoSpace(self.path, f"no space for {size} bytes: {exc.strerror}") from exc
            if exc.errno != errno.EOPNOTSUPP:
                raise StorageFailed(self.path, _failure("fallocate", offset, exc)) from exc
            # Without fallocate (some network file systems) space is found out by writing.

    def punch(self, offset: int, size: int) -> None:
        with contextlib.suppress(OSError):
            # Space is given back where the file system can; the hole itself is in the tree.
            _fallocate(self._fd, _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE, offset, size)

    def truncate(self, size: int) -> None:
        try:
            os.ftruncate(self._fd, size)
        except OSError as exc:
            raise StorageFailed(self.path, _failure("truncate", size, exc)) from exc

    def clock(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def close(self) -> None:
        if self._direct_fd is not None:
            os.close(self._direct_fd)
            self._direct_fd = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _failure(what: str, offset: int, exc: OSError) -> str:
    return f"{what} at offset {offset} failed: {exc.strerror}"
