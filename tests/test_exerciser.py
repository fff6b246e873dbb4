"""A mounted file behaves as a plain one under random operations, and the exerciser can tell."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from pathlib import Path

import pytest
from exerciser import (
    LAYOUTS,
    Difference,
    Exerciser,
    Setup,
    Stamps,
    Twin,
    exercise,
)
from exerciser_files import PLANTS, Planted, Subject

needs_mount = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
)
SMALL = "cache=4M,dirty=4M,commit=0.2,idle=0.5"
SIZE = 300_001


def run_plain(
    base: Path, seed: int, operations: int, subject: Subject | None = None
) -> tuple[Counter[str], str]:
    """Exercise a plain file; return what was done and the trace."""
    trace = io.StringIO()
    with contextlib.closing(Twin(base / "twin", SIZE, LAYOUTS["small"])) as twin:
        exerciser = Exerciser(
            subject or Subject(base / "disk", SIZE), twin, seed=seed, crash_weight=1, trace=trace
        )
        try:
            exerciser.run(operations)
        finally:
            exerciser.dispose()
    return exerciser.counts, trace.getvalue()


def test_two_plain_files_do_not_differ(tmp_path: Path) -> None:
    counts, _ = run_plain(tmp_path, 1, 1500)
    assert len(counts) == 30, "an operation never came"


def test_a_seed_gives_the_same_operations(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    assert run_plain(tmp_path / "a", 3, 150)[1] == run_plain(tmp_path / "b", 3, 150)[1]


@pytest.mark.parametrize("fault", PLANTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    """In one of a few runs: what is overwritten before anybody looks is rightly not missed."""
    for seed in range(5, 13):
        base = tmp_path / str(seed)
        base.mkdir()
        subject = Planted(base / "disk", SIZE, fault=fault, at=3)
        try:
            run_plain(base, seed, 1500, subject)
        except Difference as exc:
            report = str(exc)
            break
    else:
        pytest.fail(f"{fault}: not found")
    assert subject.struck, report
    assert report.startswith(f"seed {seed}: operation ")
    assert "operations:\n" in report
    if fault == "old block after a close":
        assert "first difference at" in report
        assert "operation" in report.split("the last")[0].partition("found:")[2]


def test_stamps_say_where_they_come_from() -> None:
    stamps = Stamps(LAYOUTS["far"])
    start = LAYOUTS["far"][2][0]
    content = stamps.make(77, start + 3, 100)
    assert len(content) == 100
    assert content == stamps.make(77, start, 200)[3:103]
    assert stamps.describe(content, start + 3, 20) == (
        f"operation 77, written for {start + 16:#x} ({content[13:21].hex()})"
    )
    assert stamps.describe(bytes(16), 0, 9) == "zeros"
    assert stamps.describe(b"", 0, 0) == "nothing"


@pytest.mark.fuse
@needs_mount
@pytest.mark.parametrize(
    ("seed", "lane", "layout", "emphasis", "options", "operations"),
    [
        (1, "on", "near", "mixed", SMALL, 1000),
        (2, "on", "far", "direct", SMALL, 800),
        (3, "on", "small", "buffered", "", 800),
        (4, "off", "near", "direct", SMALL, 800),
        (5, "off", "small", "mixed", "", 800),
        (6, "on", "small", "direct", f"{SMALL},direct_io", 400),
        (7, "off", "far", "buffered", SMALL, 400),
    ],
)
def test_a_mounted_file_is_like_a_plain_one(
    tmp_path: Path, seed: int, lane: str, layout: str, emphasis: str, options: str, operations: int
) -> None:
    setup = Setup.drawn(seed, lane=lane == "on", layout=layout, emphasis=emphasis, options=options)
    counts = exercise(setup, tmp_path, operations, crash_weight=0.15)
    assert counts.total() == operations
