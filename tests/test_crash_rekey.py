"""Power cuts, kills and failing calls while the image key is being replaced.

The oracle is that of test_crash.py: no block is lost or mixed up, at every operation of the disk of
every step of a rekey, and of other work in every phase of one, and inside the recoveries.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import pytest
from crash_support import LETTERS, REKEYS, SMALL_COMMIT_BLOCKS, Lab, Recipe, set_limit
from test_crash import report, run

STEPS = "kpKi"


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)
    set_limit("GROUPS_MAX", 3, monkeypatch.setattr)


def workloads() -> Iterator[tuple[str, str]]:
    """A whole rekey of every prefix; each letter in every phase; each before a step of a rekey."""
    for prefix in ("empty", "flushed", "settled", "full"):
        yield prefix, "K"
    for prefix in REKEYS:
        yield from ((prefix, letter) for letter in LETTERS + STEPS)
        yield from ((prefix, letter + step) for letter in "wxgdGSr" for step in "pK")


def test_a_rekey_survives_power_cuts_in_every_phase() -> None:
    lab, began = Lab(seed=21, cap_point=4, inner=0.03, later=0.04, again=0.1), time.perf_counter()
    for prefix, letters in workloads():
        run(lab, Recipe(lab.seed, prefix, letters))
    report(lab, began)
    assert lab.figures["states"] >= 4000
    assert lab.figures["states inside recovery"] >= 300


def test_a_rekey_survives_a_kill_in_every_phase() -> None:
    lab, began = Lab(seed=22, cap_point=1, inner=0.01, again=0.05), time.perf_counter()
    for prefix, letters in itertools.product(("settled", *REKEYS), ("K", "p", "gp", "xp")):
        for number in itertools.count(1):
            if not run(lab, Recipe(lab.seed, prefix, letters, "kill", number)):
                break
    report(lab, began)
    assert lab.figures["kills"] >= 200


@pytest.mark.parametrize("kind", ["eio", "short"])
def test_a_failing_call_of_a_rekey_is_survived_or_stops_everything(kind: str) -> None:
    lab, began = Lab(seed=23, cap_point=1, inner=0.0, again=0.05), time.perf_counter()
    for prefix, letters in itertools.product(("settled", "begun", "half"), ("K", "p", "gp")):
        for number in itertools.count(1):
            if not run(lab, Recipe(lab.seed, prefix, letters, kind, number)):
                break
    report(lab, began)
    assert lab.figures["failed calls"] >= 100
