#!/usr/bin/env python3
"""Measure sealfs beside gocryptfs: alternating pairs of fio runs, medians, ratios.

This machine or that one, quiet or busy: absolute figures mean little, so both sides run in turns
within minutes of each other and the ratio is what counts. Results are written as JSON and a table
to `benchmarks/results/`.

    benchmarks/run.py [--pairs 5] [--seconds 10] [--jobs NAME ...] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
JOBS = ("randread-16", "randwrite-16", "read-1m", "write-1m")
SEALFS = HERE.parent / ".venv" / "bin" / "sealfs"
TARGETS = {"randread-16": 2.0, "randwrite-16": 1.5, "read-1m": 0.8, "write-1m": 0.8}


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output is shown when it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return done


@contextlib.contextmanager
def sealfs_mount(scratch: Path) -> Iterator[Path]:
    """A new sealed disk of 1 GiB behind a mount with default options."""
    state, source, plain = (scratch / name for name in ("state", "sealed", "sealfs"))
    source.mkdir()
    plain.mkdir()
    base = [SEALFS, "--state", state]
    run(*base, "init", "--tpm", "swtpm", "--no-recovery")
    run(*base, "create", source / "bench.raw.sealed", "--size", "1G", "--vm-id", "bench")
    run(*base, "mount", source, plain)
    try:
        yield plain
    finally:
        run(*base, "umount", plain)


@contextlib.contextmanager
def gocryptfs_mount(scratch: Path) -> Iterator[Path]:
    """A new gocryptfs directory with default options."""
    cipher, plain, password = (scratch / name for name in ("cipher", "gocryptfs", "password"))
    cipher.mkdir()
    plain.mkdir()
    password.write_text("benchmark\n")
    run("gocryptfs", "-q", "-init", "-passfile", password, cipher)
    run("gocryptfs", "-q", "-passfile", password, cipher, plain)
    try:
        yield plain
    finally:
        run("fusermount3", "-u", plain)


def fio(job: str, directory: Path, seconds: int) -> dict[str, float]:
    """Run one job; return operations and bytes a second, the final fsync included."""
    environment = os.environ | {"DIRECTORY": str(directory), "SECONDS_EACH": str(seconds)}
    found = run("fio", "--output-format=json", HERE / "jobs" / f"{job}.fio", env=environment).stdout
    (result,) = json.loads(found[found.index("{") :])["jobs"]
    side = result["read"] if result["read"]["total_ios"] else result["write"]
    # fio's own rate stops its clock before the final fsync; the job's run time does not.
    elapsed = max(side["runtime"], result["job_runtime"]) / 1000
    return {"iops": side["total_ios"] / elapsed, "bytes": side["io_bytes"] / elapsed}


def measure(jobs: list[str], pairs: int, seconds: int, scratch: Path) -> dict[str, Any]:
    """Run every job in alternating pairs; return all figures."""
    results: dict[str, Any] = {}
    with sealfs_mount(scratch) as ours, gocryptfs_mount(scratch) as theirs:
        sides = {"sealfs": ours, "gocryptfs": theirs}
        for directory in sides.values():
            fio("fill", directory, seconds)
        for job in jobs:
            runs: dict[str, list[float]] = {side: [] for side in sides}
            for pair in range(pairs):
                order = list(sides) if pair % 2 == 0 else list(reversed(sides))
                for side in order:
                    runs[side].append(fio(job, sides[side], seconds)["iops"])
            ratios = [a / b for a, b in zip(runs["sealfs"], runs["gocryptfs"], strict=True)]
            results[job] = {
                **runs,
                "ratio": statistics.median(runs["sealfs"]) / statistics.median(runs["gocryptfs"]),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "target": TARGETS.get(job),
            }
            print(table({job: results[job]}), flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """Return the figures as a Markdown table's rows."""
    rows = []
    for job, found in results.items():
        sides = [f"{statistics.median(found[side]):,.0f}" for side in ("sealfs", "gocryptfs")]
        rows.append(
            f"| {job} | {sides[0]} | {sides[1]} | {found['ratio']:.2f}"
            f" ({found['ratio_min']:.2f} to {found['ratio_max']:.2f}) | {found['target']} |"
        )
    return "\n".join(rows)


def environment() -> dict[str, str]:
    """What the figures were measured on."""
    with open("/proc/cpuinfo") as info:
        cpu = next((line.split(":")[1].strip() for line in info if "model name" in line), "?")
    commit = run("git", "-C", HERE, "rev-parse", "--short", "HEAD").stdout.strip()
    version = run("gocryptfs", "-version").stdout.split(";")[0].strip()
    return {
        "commit": commit,
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "python": platform.python_version(),
        "peer": version,
        "cache": "page cache warm",
        "date": datetime.date.today().isoformat(),
    }


def main() -> int:
    """Measure, print, and write the results down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=JOBS)
    parser.add_argument("--scratch", type=Path, default=None, help="where the disks are made")
    parser.add_argument("--name", default="first", help="results/NAME.json and .md")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sealfs-bench-", dir=arguments.scratch))
    head = "| job | sealfs, ops/s | gocryptfs, ops/s | ratio (worst to best pair) | must |"
    print(f"{head}\n|---|---|---|---|---|")
    try:
        results = measure(arguments.jobs, arguments.pairs, arguments.seconds, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    about = environment() | {"pairs": str(arguments.pairs), "seconds": str(arguments.seconds)}
    out = HERE / "results"
    out.mkdir(exist_ok=True)
    (out / f"{arguments.name}.json").write_text(
        json.dumps({"about": about, "jobs": results}, indent=1) + "\n"
    )
    lines = [f"- {key}: {value}" for key, value in about.items()]
    (out / f"{arguments.name}.md").write_text(
        "\n".join(lines) + f"\n\n{head}\n|---|---|---|---|---|\n{table(results)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
