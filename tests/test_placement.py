"""Where the lane runs: beside a guest that waits for each answer, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from sealfs.mount import placement as placements
from sealfs.mount.placement import DELAY_MAX_NS, INTERVAL_NS, SHUN_NS, Placement

CPUS = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(CPUS) < 2, reason="one CPU: there is nothing to decide")


@pytest.fixture(autouse=True)
def _everywhere_again() -> Iterator[None]:
    yield
    os.sched_setaffinity(0, CPUS)


@pytest.fixture
def guest() -> Iterator[tuple[int, int]]:
    """A process that waits on a known CPU: (pid, CPU)."""
    cpu = CPUS[-1]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os, sys; os.sched_setaffinity(0, [{cpu}]);"
         "print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid, cpu
    process.communicate()


class Clocked:
    """A placement whose clock, load and delay the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 10**12
        self.requests = 0
        self.delay = 0
        monkeypatch.setattr(placements, "_delay_ns", lambda: self.delay)
        self.placement = Placement()
        self.look(0, 0, 0)

    def look(self, pid: int, requests: int, waits: int, after: int = INTERVAL_NS) -> int | None:
        self.now += after
        assert self.placement.is_due(self.now)
        self.requests += requests
        self.placement.look(self.now, pid, self.requests, waits)
        held = os.sched_getaffinity(0)
        assert held == ({self.placement.cpu} if self.placement.cpu is not None else set(CPUS))
        return self.placement.cpu


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    return Clocked(monkeypatch)


def test_it_moves_to_a_guest_that_waits_for_each_answer(
    clocked: Clocked, guest: tuple[int, int]
) -> None:
    pid, cpu = guest
    assert clocked.look(pid, 500, 500) == cpu
    assert not clocked.placement.is_due(clocked.now + INTERVAL_NS - 1)
    assert clocked.look(pid, 500, 460) == cpu
    clocked.placement.leave()
    assert os.sched_getaffinity(0) == set(CPUS)


@pytest.mark.parametrize(("requests", "waits"), [(500, 400), (500, 0), (9, 9), (0, 0)], ids=str)
def test_it_stays_with_nobody_who_asks_several_things_at_once_or_seldom(
    clocked: Clocked, guest: tuple[int, int], requests: int, waits: int
) -> None:
    pid, cpu = guest
    assert clocked.look(pid, requests, waits) is None
    assert clocked.look(pid, 500, 500) == cpu
    assert clocked.look(pid, requests, waits) is None


def test_what_was_counted_before_a_pause_says_nothing(
    clocked: Clocked, guest: tuple[int, int]
) -> None:
    pid, cpu = guest
    assert clocked.look(pid, 500, 500) == cpu
    assert clocked.look(pid, 500, 500, after=12 * INTERVAL_NS) is None
    assert clocked.look(pid, 500, 500) == cpu


def test_a_crowded_cpu_is_shunned_longer_each_time(
    clocked: Clocked, guest: tuple[int, int]
) -> None:
    pid, cpu = guest
    waited = []
    for _ in range(9):
        assert clocked.look(pid, 100, 100) == cpu
        clocked.delay += 100 * DELAY_MAX_NS
        assert clocked.look(pid, 100, 100) == cpu  # not more than moving saves
        clocked.delay += 100 * DELAY_MAX_NS + 1
        assert clocked.look(pid, 100, 100) is None
        left = clocked.now
        while clocked.look(pid, 100, 100) is None:
            assert clocked.now - left < 61 * SHUN_NS
        waited.append((clocked.now - left) // SHUN_NS)
    assert waited[:7] == [1, 2, 4, 8, 16, 32, 60]
    assert waited[-1] == 60


def test_who_is_gone_or_unknown_is_not_followed(clocked: Clocked) -> None:
    assert clocked.look(0, 500, 500) is None
    assert clocked.look(2**31 - 1, 500, 500) is None


def test_a_daemon_held_on_one_cpu_never_moves(
    monkeypatch: pytest.MonkeyPatch, guest: tuple[int, int]
) -> None:
    os.sched_setaffinity(0, {CPUS[0]})
    placement = Placement()
    placement.look(10**12, guest[0], 0, 0)
    placement.look(10**12 + INTERVAL_NS, guest[0], 500, 500)
    assert placement.cpu is None
    assert os.sched_getaffinity(0) == {CPUS[0]}


def test_this_thread_waits_for_its_cpu_now_and_then() -> None:
    """The kernel's own figure: it grows when two want one CPU."""
    before = placements._delay_ns()
    os.sched_setaffinity(0, {CPUS[0]})
    hog = subprocess.Popen([sys.executable, "-c", "import time\nend = time.monotonic() + 0.6\n"
                            "while time.monotonic() < end: pass"])  # fmt: skip
    while hog.poll() is None:
        sum(range(1000))
    assert placements._delay_ns() - before > 50_000_000
