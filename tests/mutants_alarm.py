"""A pytest plugin for tests of mutants: a test that hangs fails, and memory has a limit.

When the runner dies, this process goes with it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

MEMORY_MAX = 8 << 30
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
SECONDS_MAX = float(os.environ.get("MUTANT_TEST_SECONDS", "150"))
AGAIN = 5.0
"""Seconds after which it is told again, should somebody have caught it."""


class Hangs(BaseException):
    """A test has taken too long; not an `Exception`, so that no handler takes it for one."""


def _ring(number: int, frame: FrameType | None) -> None:
    raise Hangs(f"takes more than {SECONDS_MAX:.0f} s")


def pytest_configure(config: pytest.Config) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MAX, MEMORY_MAX))
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGALRM, _ring)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, SECONDS_MAX, AGAIN)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
