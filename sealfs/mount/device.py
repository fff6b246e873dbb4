"""Requests of /dev/fuse: the twin of `_device.c`, where that was not built."""

from __future__ import annotations

import os
import select
import time
from mmap import mmap


def spin_read(fd: int, buffer: mmap, others: tuple[int, ...], nanoseconds: int) -> int:
    """Read from a descriptor that does not block, as soon as there is something.

    Returns:
        The bytes read; -1 when the time is up, -2 when one of `others` is readable.

    Raises:
        OSError: reading failed.
    """
    poll = select.poll()
    for each in (fd, *others):
        poll.register(each, select.POLLIN)
    end = time.monotonic_ns() + nanoseconds
    while True:
        ready = poll.poll(0)
        if any(found == fd for found, _ in ready):
            try:
                return os.readv(fd, [buffer])
            except BlockingIOError:
                continue  # somebody else was quicker
        if ready:
            return -2
        if time.monotonic_ns() > end:
            return -1
