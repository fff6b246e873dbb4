"""Open file handles: what the number in a request stands for.

The namespace makes and ends them; the lane looks them up. A number is never used twice, so a
request with a stale one meets nothing.

Concurrency: used from the trio thread only; no await anywhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sealfs.mount.disk import Disk

if TYPE_CHECKING:
    from sealfs.image._blockread import Quick
    from sealfs.image._blocktake import Taker

SYNC_FLAGS = os.O_DSYNC  # O_SYNC contains it on Linux


@dataclass(frozen=True, slots=True)
class Handle:
    """One open of a VM file."""

    disk: Disk
    inode: int
    is_writable: bool
    is_synchronous: bool
    is_direct: bool
    quick: Quick | None
    """Answers reads that need nothing but memory (`SealedImage.quick`)."""
    taker: Taker | None
    """Accepts writes that need nothing but memory and are not to be durable at once."""


class Handles:
    """The open handles of a mount by number."""

    def __init__(self) -> None:
        self._next = 1
        self.by_number: dict[int, Handle] = {}

    def add(self, disk: Disk, inode: int, flags: int) -> int:
        """Make a handle for an open(2) with `flags`; return its number."""
        number = self._next
        self._next += 1
        is_direct = bool(flags & os.O_DIRECT)
        disk.buffered_handles += not is_direct
        is_writable = (flags & os.O_ACCMODE) != os.O_RDONLY
        is_synchronous = bool(flags & SYNC_FLAGS)
        self.by_number[number] = Handle(
            disk=disk,
            inode=inode,
            is_writable=is_writable,
            is_synchronous=is_synchronous,
            is_direct=is_direct,
            quick=disk.opened.quick(),
            taker=disk.opened.taker() if is_writable and not is_synchronous else None,
        )
        return number

    def get(self, number: int) -> Handle | None:
        """Return the handle, or None if there is none of that number."""
        return self.by_number.get(number)

    def remove(self, number: int) -> Handle | None:
        """End a handle and return it."""
        handle = self.by_number.pop(number, None)
        if handle is not None:
            handle.disk.buffered_handles -= not handle.is_direct
        return handle
