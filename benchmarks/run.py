#!/usr/bin/env python3
"""Measure sealfs beside its peers: alternating pairs of fio runs, medians, ratios, goals.

This machine or that one, quiet or busy: absolute figures mean little, so all sides run in turns
within minutes of each other, and the ratios are what counts. Every side is mounted with its
defaults; what cannot be is named in the report with the reason. Results go to
`benchmarks/results/NAME.json`, `.md` and `-*.png`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import report
from load import Figures, fio, make_cold, make_warm
from machine import HERE, Failed, environment, guest_level
from peers import MAKERS, Side
from rows import PEERS, ROWS, SEALFS, SIDES, Row

SIZE = "1280M"  # four times the caches at their defaults, 256M and 64M
MEMORY_SHARE = 2  # of the size: what a run takes of memory that was free, and room
SIZE_MIN = 16 << 20  # four disks, the smallest of four of the largest requests
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIZE = re.compile(r"(\d+)([KMG]?)", re.IGNORECASE)


@dataclass(slots=True)
class Results:
    """Everything that was found: figures by job and side in the order of pairs, and gaps."""

    about: dict[str, str]
    sides: dict[str, str] = field(default_factory=dict)
    runs: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)

    def gap(self, what: str, why: object) -> None:
        """Note what was not measured."""
        line = f"{what}: not measured: {why}"
        self.gaps.append(line)
        print(line, flush=True)

    def values(self, row: Row) -> dict[str, list[float]]:
        """Return the figures of one row by side, in the row's own metric."""
        found = {
            side: [getattr(figures, row.metric) for figures in runs]
            for side, runs in self.runs.get(row.job_name, {}).items()
        }
        return {side: runs for side, runs in found.items() if runs and None not in runs}

    def to_json(self) -> dict[str, Any]:
        runs = {
            job: {side: [figures.to_json() for figures in runs] for side, runs in sides.items()}
            for job, sides in self.runs.items()
        }
        return {"about": self.about, "sides": self.sides, "not_measured": self.gaps, "runs": runs}


@contextlib.contextmanager
def mounted(names: list[str], size: int, scratch: Path, results: Results) -> Iterator[list[Side]]:
    """Mount these sides; what cannot be is noted and left out."""
    with contextlib.ExitStack() as stack:
        sides = []
        for name in names:
            place = scratch / name
            place.mkdir()
            try:
                side = stack.enter_context(MAKERS[name](place, size))
            except (Failed, OSError) as exc:
                results.gap(name, exc)
                continue
            sides.append(side)
            results.sides[name] = side.about
            print(f"mounted: {name}: {side.about}", flush=True)
        yield sides


def measure(rows: list[Row], sides: list[Side], *, size: int, seconds: float, pairs: int,
            results: Results) -> None:  # fmt: skip
    """Run every job on every side that is in working order."""
    jobs = {row.job_name: row for row in rows}
    is_filled = False
    for job, row in jobs.items():
        if job != "seqwrite-fill" and not is_filled:
            is_filled = True
            for side in list(sides):
                try:
                    fio("fill", side, size=size, seconds=seconds)
                    fio("fill-quarters", side, size=size, seconds=seconds)
                except (Failed, OSError) as exc:
                    results.gap(f"{side.name}, everything that reads", exc)
                    sides.remove(side)
        _measure_job(row, sides, size=size, seconds=seconds, pairs=pairs, results=results)
        for each in (one for one in rows if one.job_name == job):
            print(report.row_line(each, results.values(each)), flush=True)


def _measure_job(row: Row, sides: list[Side], *, size: int, seconds: float, pairs: int,
                 results: Results) -> None:  # fmt: skip
    job = row.job_name
    found = results.runs.setdefault(job, {side.name: [] for side in sides})
    working = list(sides)
    for pair in range(pairs):
        for side in list(working if pair % 2 == 0 else reversed(working)):
            try:
                if row.is_cold:
                    make_cold(side)
                else:
                    make_warm(side, MEMORY_SHARE * size)
                if job == "seqwrite-fill":
                    side.empty_disk(size)
                figures = fio(job, side, size=size, seconds=seconds, seed=pair + 1)
            except (Failed, OSError) as exc:
                results.gap(f"{side.name}, {job}", exc)
                working.remove(side)
                found[side.name] = []  # half a row is no median of pairs
                continue
            found[side.name].append(figures)


def main() -> int:
    """Measure, print, and write the results down."""
    arguments = _arguments()
    results = Results(environment(arguments.scratch))
    results.about |= {
        "pairs": str(arguments.pairs),
        "seconds": f"{arguments.seconds:g}",
        "size": f"{arguments.size >> 20} MiB",
        "page cache": "warm, but for the row that says cold",
    }
    for name in (name for name in SIDES if name not in arguments.sides):
        results.gap(name, "not asked for")
    results.gap("guest level", guest_level().removeprefix("not measured: "))
    rows = [row for row in ROWS if row.name in arguments.rows]
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    scratch = Path(tempfile.mkdtemp(prefix="sealfs-bench-", dir=arguments.scratch))
    status = 0
    try:
        with mounted(arguments.sides, arguments.size, scratch, results) as sides:
            measure(rows, sides, size=arguments.size, seconds=arguments.seconds,
                    pairs=arguments.pairs, results=results)  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted: everything is unmounted; nothing is written down", file=sys.stderr)
        status = 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if status == 0:
        _write(results, rows, arguments.out, arguments.name)
    return status


def _write(results: Results, rows: list[Row], out: Path, name: str) -> None:
    out.mkdir(exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(results.to_json(), indent=1) + "\n")
    values = {row.name: results.values(row) for row in rows}
    charts = report.charts(rows, values, out, name)
    if isinstance(charts, str):
        results.gap("charts", charts)
        charts = []
    text = report.markdown(results.about, results.sides, rows, values, results.gaps)
    text += report.caches(results.runs)
    text += "".join(f"\n![{chart.stem}]({chart.name})\n" for chart in charts)
    (out / f"{name}.md").write_text(text)
    print(f"\n{text}\nwritten: {out / name}.json, .md, {len(charts)} charts")


def _interrupt(number: int, frame: FrameType | None) -> None:
    for other in SIGNALS:  # taking back is not to be interrupted again
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    size = int(match[1]) << " KMG".find(match[2].upper() or " ") * 10 if match else 0
    if size < SIZE_MIN:
        raise argparse.ArgumentTypeError(f"{text}: a size of {SIZE_MIN >> 20}M or more")
    return size >> 22 << 22


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [row.name for row in ROWS]
    others = [side for side in SIDES if side != SEALFS]
    add = parser.add_argument
    add("--rows", nargs="+", default=names, choices=names, metavar="ROW",
        help=f"of {', '.join(names)}")  # fmt: skip
    add("--peers", nargs="+", default=others, choices=others, metavar="PEER",
        help=f"of {', '.join(others)}; encrypting: {', '.join(PEERS)}")  # fmt: skip
    add("--pairs", type=int, default=5, help="rounds; each side once in each")
    add("--seconds", type=float, default=10, help="of each run")
    add("--size", type=_size, default=_size(SIZE),
        help=f"of the disk; default {SIZE}, 4x the caches; smaller is a try only")  # fmt: skip
    add("--scratch", type=Path, help="where the disks are made; on ext4 or xfs")
    add("--out", type=Path, default=HERE / "results", help="where results go")
    add("--name", default="peers", help="of the results")
    arguments = parser.parse_args()
    if arguments.pairs < 1 or arguments.seconds <= 0:
        parser.error("--pairs and --seconds: more than 0")
    arguments.sides = [SEALFS, *arguments.peers]
    return arguments


if __name__ == "__main__":
    sys.exit(main())
