"""Brings parts of files into the page cache without waiting for it, and says when they are there.

Over io_uring: no thread, no hand-over of the interpreter. Where the kernel gives none, or it
could not be built, worker threads do the same. What is read is thrown away; whoever asked reads
again.

Concurrency: the owner's thread only; `_ended` alone is appended to by workers.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from functools import partial
from typing import Generic, TypeVar

try:
    from sealfs.mount._ring import Ring
except ImportError:  # it could not be built here
    Ring = None  # type: ignore[assignment, misc]

from sealfs.mount.workers import Workers

T = TypeVar("T")


class Fetcher(Generic[T]):
    """Reads under way; `T` is what the owner wants back when one has ended."""

    def __init__(self, workers: Workers, *, use_ring: bool = True) -> None:
        self._workers = workers
        self._ring = _ring() if use_ring else None
        self._wake_fd = -1
        if self._ring is None:
            self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waiting: dict[int, T] = {}
        self._number = 0
        self._ended: deque[int] = deque()

    @property
    def count(self) -> int:
        """Reads under way, and those ended that `done` has not told yet."""
        return len(self._waiting)

    def fileno(self) -> int:
        """Return a descriptor that is readable when `done` has something to say."""
        return self._wake_fd if self._ring is None else self._ring.fileno()

    def fetch(self, fd: int, offset: int, size: int, token: T) -> bool:
        """Begin to bring `size` bytes into the page cache; `done` returns the token then.

        Also when reading failed: whoever reads again meets that himself. `fd` stays open until
        then. False where too many are under way.
        """
        self._number += 1
        if self._ring is None:
            self._workers.post(partial(self._read, fd, offset, size, self._number))
        elif not self._ring.read(fd, offset, size, self._number):
            return False
        self._waiting[self._number] = token
        return True

    def done(self) -> list[T]:
        """Return the tokens of the reads that have ended since."""
        if self._ring is not None:
            numbers = self._ring.done()
        else:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            numbers = [self._ended.popleft() for _ in range(len(self._ended))]
        return [self._waiting.pop(number) for number in numbers]

    def close(self) -> None:
        """Let go of ring and descriptors; nothing may be under way."""
        if self._ring is not None:
            self._ring.close()
        else:
            os.close(self._wake_fd)

    def _read(self, fd: int, offset: int, size: int, number: int) -> None:
        with contextlib.suppress(OSError):
            os.preadv(fd, [bytearray(size)], offset)
        self._ended.append(number)
        os.eventfd_write(self._wake_fd, 1)


def _ring() -> Ring | None:
    try:
        return Ring() if Ring is not None else None
    except OSError:
        return None  # switched off, or not allowed in here
