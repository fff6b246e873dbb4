"""Large buffers for ciphertext that are used again.

A fresh one costs its zeroing and a page fault for each page: a tenth of the interpreter's time
under random writes (2026-11). What is in them is on the disk anyway.

Concurrency: any thread; a list's append and pop are atomic.
"""

from __future__ import annotations

from sealfs.image.layout import BLOCK_SIZE

SIZE = (8 << 20) + BLOCK_SIZE
"""Bytes: what the largest record seals, and a tag."""
SMALL = 256 << 10
"""A buffer up to that many bytes is as well made anew."""
KEPT_MAX = 2
"""Of the whole process: as many commits as can be sealed at once on two cores."""

_kept: list[bytearray] = []


def take(size: int) -> bytearray:
    """Return a buffer of `size` bytes at least, with anything in it."""
    if not SMALL < size <= SIZE:
        return bytearray(size)
    try:
        return _kept.pop()
    except IndexError:
        return bytearray(SIZE)


def give_back(buffer: bytearray) -> None:
    """Let others use a buffer that `take` gave; nobody may look at it any more."""
    if len(buffer) == SIZE and len(_kept) < KEPT_MAX:
        _kept.append(buffer)
