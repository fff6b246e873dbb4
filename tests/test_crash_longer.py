"""Workloads of three operations: every pair of an operation and a barrier, in every order.

With the shorter ones of test_crash.py, where all are tried, a test run examines more than 20,000
distinct crash states; `tools/torture crash` goes on from there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from crash_support import LETTERS, PREFIXES, SMALL_COMMIT_BLOCKS, Lab, Recipe, set_limit
from test_crash import report, run

BARRIERS = "fcr"
STATES_MIN = 9_000
INNER_STATES_MIN = 1_500


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)


def workloads(lab: Lab) -> Iterator[tuple[str, str]]:
    """Every (operation, barrier) with a third operation before, between or behind."""
    rng = lab.rng("three operations")
    seen = set()  # the same branch of history twice would draw the same salts
    for prefix, letter, barrier in itertools.product(PREFIXES, LETTERS, BARRIERS):
        third = rng.choice(LETTERS)
        for order in ((letter, barrier, third), (letter, third, barrier), (third, letter, barrier)):
            letters = "".join(order)
            if letters.endswith("f"):
                letters = letters[:-1] + rng.choice("wsxgd")  # a flush follows anyway
            if (prefix, letters) not in seen:
                seen.add((prefix, letters))
                yield prefix, letters


def test_three_operations_survive_power_cuts() -> None:
    lab, began = Lab(seed=11, cap_point=5, inner=0.04, later=0.02, again=0.05), time.perf_counter()
    for prefix, letters in workloads(lab):
        run(lab, Recipe(lab.seed, prefix, letters))
    report(lab, began)
    assert lab.figures["states"] >= STATES_MIN
    assert lab.figures["states inside recovery"] >= INNER_STATES_MIN
