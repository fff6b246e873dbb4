"""The rows of the comparison: which job, what counts, and what is to be reached.

Pure: figures come in, judgements go out. Goals are ratios within one run, sealfs to the reference,
where more is better; for CPU the ratio is theirs to ours, so that more is better there as well.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

SEALFS = "sealfs"
BEST = "best"
"""Not a side: the best of `PEERS` in a row."""
PEERS = ("gocryptfs", "luks", "encfs", "cryfs")
"""What encrypts, as sealfs does."""
LIMITS = ("plain", "null")
"""What does not: a plain file, and the lane over a disk in memory."""
SIDES = (SEALFS, *PEERS, *LIMITS)

Metric = Literal["iops", "bytes", "cpu"]
UNITS: Mapping[str, str] = {"iops": "ops/s", "bytes": "MB/s", "cpu": "CPU s/GiB"}


@dataclass(frozen=True, slots=True)
class Goal:
    """At least `factor` times what `against` reached."""

    factor: float
    against: str

    def __str__(self) -> str:
        return f"{self.factor:g}x {self.against}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `is_cold`: every cache is emptied before each run."""

    name: str
    title: str
    metric: Metric
    must: tuple[Goal, ...]
    stretch: tuple[Goal, ...]
    job: str = ""
    is_cold: bool = False

    @property
    def job_name(self) -> str:
        """The file of `jobs/` that measures it."""
        return self.job or self.name


def _beat(factor: float, against: str = BEST) -> tuple[Goal, ...]:
    return (Goal(factor, against),)


# In the order of measuring: filling first, emptied caches last.
ROWS: tuple[Row, ...] = (
    Row("seqwrite-fill", "sequential write, fill", "bytes", _beat(1.1), _beat(1.5)),
    Row("seqwrite-over", "sequential write, overwrite", "bytes", _beat(1.1), _beat(1.5)),
    Row(
        "cpu-write", "daemon CPU, sequential write", "cpu",
        _beat(1.0, "gocryptfs"), _beat(2.0, "gocryptfs"), job="seqwrite-over",
    ),
    Row("seqread-direct", "sequential read, direct", "bytes", _beat(1.3), _beat(1.8)),
    Row(
        "cpu-read", "daemon CPU, sequential read", "cpu",
        _beat(1.0, "gocryptfs"), _beat(2.0, "gocryptfs"), job="seqread-direct",
    ),
    Row("seqread-buffered", "sequential read, buffered", "bytes", _beat(1.3), _beat(1.8)),
    Row("randread-16", "random read 4 KiB, depth 16", "iops", _beat(2.5), _beat(3.5)),
    Row(
        "randread-1", "random read 4 KiB, depth 1", "iops",
        (Goal(1.0, "gocryptfs"), Goal(0.75, "null")), _beat(1.2),
    ),
    Row(
        "randwrite-16", "random write 4 KiB, depth 16", "iops",
        (Goal(3.0, "gocryptfs"), Goal(1.2, "luks")), _beat(2.0, "luks"),
    ),
    Row(
        "randwrite-1", "random write 4 KiB, depth 1", "iops",
        _beat(1.5, "gocryptfs"), _beat(2.0),
    ),
    Row(
        "fsync-1", "random write 4 KiB, fsync after each", "iops",
        (Goal(0.7, "luks"), Goal(1.5, "gocryptfs")), _beat(1.0, "luks"),
    ),
    Row(
        "fsync-16", "random write 4 KiB, fsync after every 16", "iops",
        (Goal(0.9, "luks"), Goal(2.0, "gocryptfs")), _beat(1.5, "luks"),
    ),
    Row("mixed", "mixed 70/30, 16 KiB, 4 jobs on 4 images", "iops", _beat(1.5), _beat(2.0)),
    Row(
        "randread-cold", "random read 4 KiB, depth 16, caches cold", "iops",
        (Goal(2.0, BEST), Goal(0.25, "plain")), (Goal(3.0, BEST), Goal(0.4, "plain")),
        is_cold=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Judged:
    """A goal beside what was found.

    Attributes:
        goal: what was asked.
        side: whom it was compared with; of the best its name.
        ratio: of the medians; None where one of both was not measured.
        worst: of the worst pair.
    """

    goal: Goal
    side: str | None
    ratio: float | None
    worst: float | None

    @property
    def verdict(self) -> str:
        if self.ratio is None:
            return "not judged"
        return "yes" if self.ratio >= self.goal.factor else "no"


def best_peer(row: Row, runs: Mapping[str, Sequence[float]]) -> str | None:
    """Return the encrypting peer with the best median; None where none was measured."""
    there = [side for side in PEERS if runs.get(side)]
    pick = min if row.metric == "cpu" else max
    return pick(there, key=lambda side: statistics.median(runs[side]), default=None)


def judge(row: Row, goal: Goal, runs: Mapping[str, Sequence[float]]) -> Judged:
    """Compare one row's figures, by side and in the order of the pairs, with a goal."""
    side = best_peer(row, runs) if goal.against == BEST else goal.against
    ours, theirs = runs.get(SEALFS), runs.get(side or "")
    if not ours or not theirs:
        return Judged(goal, side, None, None)
    if row.metric == "cpu":
        ours, theirs = theirs, ours
    worst = min(
        (a / b for a, b in zip(ours, theirs, strict=False) if b), default=None
    )  # pairs: both ran within the same minute
    low = statistics.median(theirs)
    return Judged(goal, side, statistics.median(ours) / low if low else None, worst)


def reached(row: Row, goals: Sequence[Goal], runs: Mapping[str, Sequence[float]]) -> str:
    """Return `yes`, `no`, or `not judged` where a reference is missing and none was missed."""
    verdicts = {judge(row, goal, runs).verdict for goal in goals}
    return next(word for word in ("no", "not judged", "yes") if word in verdicts)
