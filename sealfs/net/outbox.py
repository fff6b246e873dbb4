"""Sealed frames on their way to one peer, laid out so that few system calls send them.

Pure. Frames of one size behind one another make a run; a shorter one may end it (UDP_SEGMENT).
"""

from __future__ import annotations

from typing import Final

from sealfs.net.link import RUN_SIZE_MAX, SEGMENT_COUNT_MAX

OUTBOX_SIZE: Final = 2 * RUN_SIZE_MAX


class Outbox:
    """A buffer of sealed frames, and the runs in it."""

    __slots__ = ("_count", "_limit", "_size", "_start", "at", "buffer", "runs")

    def __init__(self, frame_size_max: int) -> None:
        self.buffer = memoryview(bytearray(OUTBOX_SIZE + frame_size_max))
        self._limit = OUTBOX_SIZE
        self.at = 0
        """Where the next frame is to be sealed to; there is room for one of the largest."""
        self.runs: list[tuple[int, int, int]] = []
        """Runs that are closed: start, end, size of each frame."""
        self._start = self._size = self._count = 0

    def add(self, size: int) -> bool:
        """Take the frame of `size` bytes that was sealed to `at`; True when there is no room."""
        end = self.at + size
        if self._count:
            fits = end - self._start <= RUN_SIZE_MAX and self._count < SEGMENT_COUNT_MAX
            if size == self._size and fits:
                self._count += 1
                self.at = end
                return end >= self._limit
            if size < self._size and fits:
                self.at = end
                self.close_run()
                return end >= self._limit
            self.close_run()
        self._start, self._size, self._count = self.at, size, 1
        self.at = end
        return end >= self._limit

    def close_run(self) -> None:
        """Close the run that is being made, if any."""
        if self._count:
            self.runs.append((self._start, self.at, self._size))
            self._count = 0

    def clear(self) -> None:
        """Begin anew, when all runs were sent."""
        self.at = 0
        self.runs.clear()
