"""Runs the lane on the CPU of a guest that waits for each answer before it asks again.

Then a question and its answer are two task switches. On another CPU each is an interrupt that
wakes an idle one, which costs several times what serving a block does (benchmarks/NOTES.md). A
guest that asks several things at once, or a CPU that others want too, gets the lane off again.

Concurrency: called by the lane alone; what it moves is the thread that calls.
"""

from __future__ import annotations

import contextlib
import os

INTERVAL_NS = 10_000_000
"""Between two looks: finding out where somebody runs costs tens of microseconds."""

REQUESTS_MIN = 10
"""In an interval; whoever asks less often than 1000 times a second is served soon enough."""

DELAY_MAX_NS = 40_000
"""Waiting for the CPU, for each request: more than moving there saves."""

SHUN_NS = 1_000_000_000
SHUN_MAX_NS = 60 * SHUN_NS
"""How long a crowded CPU is left alone: doubled each time."""


class Placement:
    """Where the lane runs."""

    def __init__(self) -> None:
        self._everywhere = os.sched_getaffinity(0)
        self._next_ns = 0
        self._requests = 0
        self._delay_ns = 0
        self._shunned_until_ns = 0
        self._shun_ns = SHUN_NS
        self.cpu: int | None = None
        """The CPU that the lane is held on; None: it runs wherever the kernel has it."""

    def is_due(self, now_ns: int) -> bool:
        """Whether it is time to look again."""
        return now_ns >= self._next_ns

    def look(self, now_ns: int, pid: int, requests: int, waits: int) -> None:
        """Decide where to run, and move there.

        Args:
            now_ns: of the monotonic clock.
            pid: of the task whose request came last.
            requests: served so far.
            waits: how often the lane has waited for one since the last look.
        """
        count, self._requests = requests - self._requests, requests
        is_late = now_ns - self._next_ns > 10 * INTERVAL_NS
        self._next_ns = now_ns + INTERVAL_NS
        delay, self._delay_ns = self._delay_ns, _delay_ns()
        if len(self._everywhere) == 1 or is_late:
            self.leave()  # the guest was idle meanwhile: what was counted says nothing
            return
        if count < REQUESTS_MIN or waits * 10 < count * 9:
            self.leave()
        elif self.cpu is not None and self._delay_ns - delay > count * DELAY_MAX_NS:
            self.leave()
            self._shunned_until_ns = now_ns + self._shun_ns
            self._shun_ns = min(2 * self._shun_ns, SHUN_MAX_NS)
        elif now_ns >= self._shunned_until_ns:
            self._move(_cpu_of(pid))

    def leave(self) -> None:
        """Run wherever the kernel likes."""
        if self.cpu is not None:
            self.cpu = None
            with contextlib.suppress(OSError):  # the set was changed from outside: it stays so
                os.sched_setaffinity(0, self._everywhere)

    def _move(self, cpu: int | None) -> None:
        if cpu is None or cpu == self.cpu or cpu not in self._everywhere:
            return
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
            self.cpu = cpu


def _cpu_of(pid: int) -> int | None:
    """Return the CPU that a task ran on last (proc(5), stat, field 39)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as stat:
            return int(stat.read(4096).rpartition(b")")[2].split()[36])
    except (OSError, ValueError, IndexError):
        return None  # it is gone, or not of our namespace


def _delay_ns() -> int:
    """Return how long this thread has waited for a CPU; 0 where the kernel does not count it."""
    try:
        with open("/proc/thread-self/schedstat", "rb", buffering=0) as stat:
            return int(stat.read(256).split()[1])
    except (OSError, ValueError, IndexError):
        return 0
