"""Requests of /dev/fuse: the twin of `_device.c`, where that was not built."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Mapping
from mmap import mmap

from sealfs.image.outbox import Outbox
from sealfs.image.reader import UNSURE

IDLE, OTHERS, BUSY = -1, -2, -3
"""What `next` returns where no request came; see there."""


class PlainDevice:
    """Requests of a descriptor that does not block, and how many there were."""

    def __init__(
        self, fd: int, buffer: mmap, others: tuple[int, ...], handles: Mapping[int, object],
        outbox: Outbox, not_taken: Callable[[list[int]], None], shared: object,
    ) -> None:  # fmt: skip
        """As the other one, which answers reads and writes by the `handles` besides."""
        self.requests = self.runs = self.answered = self.taken = 0
        self.missing = UNSURE
        self._in_a_row = 0
        self._fd = fd
        self._buffer = buffer
        self._outbox = outbox
        self._not_taken = not_taken
        self._poll = select.poll()
        for each in (fd, *others):
            self._poll.register(each, select.POLLIN)

    def next(self, nanoseconds: int, is_lone: bool) -> int:
        """Read the next request, at once or within so many nanoseconds.

        What the outbox keeps back is sent when there is none.

        Returns:
            Its size; IDLE: for so long there was none, OTHERS: one of the others is readable. The
            C module returns BUSY as well: it has answered many, and other tasks want to run.

        Raises:
            OSError: reading failed.
        """
        count = self._read()
        if count is None:
            self.runs += self._in_a_row > 0
            self._in_a_row = 0
            if failed := self._outbox.flush():
                self._not_taken(failed)
            end = time.monotonic_ns() + nanoseconds
            while count is None:
                if time.monotonic_ns() >= end:
                    return IDLE
                ready = self._poll.poll(0)
                if any(found == self._fd for found, _ in ready):
                    count = self._read()
                elif ready:
                    return OTHERS
        self.requests += 1
        self._in_a_row += 1
        return count

    def _read(self) -> int | None:
        try:
            return os.readv(self._fd, [self._buffer])
        except BlockingIOError:
            return None
