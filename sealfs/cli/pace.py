"""How fast background work of a command goes."""

from __future__ import annotations

import time


class Pace:
    """Sleeps so that no more than `rate` bytes a second are gone through."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._due = time.monotonic()

    def after(self, size: int) -> None:
        """Wait for the time that `size` bytes should have taken."""
        if self._rate is not None:
            self._due += size / self._rate
            time.sleep(max(0.0, self._due - time.monotonic()))
