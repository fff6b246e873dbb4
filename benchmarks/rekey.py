#!/usr/bin/env python3
"""What a rekey at the default rate costs the VM: random reads with and without one, in turn.

On a mount of its own; results go to `benchmarks/results/NAME.json`. As root, by .venv/bin/python; a
run takes 2 GiB and three minutes. Pairs alternate, since the machine may be shared; the share of
the processor that the rekey takes is measured on an idle mount, and does not depend on others.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import HERE, environment

sys.path.insert(0, str(HERE.parent / "tests"))

from mount_support import mounted, seal_new

from sealfs.mount import control

MIB = 1 << 20
SIZE = 768 * MIB
PAIRS = 15
SECONDS = 2
IDLE_SECONDS = 10
DEPTHS = (1, 16)


def fio(path: Path, *more: str) -> dict[str, Any]:
    """Run one job on the disk and return fio's figures of it."""
    done = subprocess.run(
        [
            "fio", "--name=job", f"--filename={path}", "--ioengine=libaio", "--direct=1",
            f"--size={SIZE}", "--allow_file_create=0", "--output-format=json", *more,
        ],
        capture_output=True, text=True, check=True, cwd="/tmp",
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)["jobs"][0]
    return found


def reads(path: Path, depth: int) -> float:
    """Return random reads a second."""
    job = fio(path, "--rw=randread", "--bs=4k", f"--iodepth={depth}", "--norandommap",
              "--time_based", f"--runtime={SECONDS}")  # fmt: skip
    return float(job["read"]["iops"])


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(path: Path, pid: int, ask: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Return all figures; the disk is full, and `ask` speaks to its mount."""
    result: dict[str, Any] = {}
    ask("begin")
    before, began, done = processor_seconds(pid), time.monotonic(), ask("status")["done"]
    time.sleep(IDLE_SECONDS)
    elapsed = time.monotonic() - began
    result["idle"] = {
        "processor_share": round((processor_seconds(pid) - before) / elapsed, 3),
        "mib_a_second": round((ask("status")["done"] - done) / elapsed / MIB, 1),
    }
    ask("pause")
    for depth in DEPTHS:
        reads(path, depth)
        pairs = []
        for _ in range(PAIRS):
            without = reads(path, depth)
            if not ask("begin")["is_rekeying"]:
                raise SystemExit("the rekey is done: a larger disk is needed")
            pairs.append((round(without), round(reads(path, depth))))
            ask("pause")
        result[f"random reads, depth {depth}"] = {
            "pairs_without_and_with": pairs,
            "median_ratio": round(statistics.median(b / a for a, b in pairs), 3),
        }
    return result


def main() -> None:
    """Measure once and write the result."""
    parser = argparse.ArgumentParser(description="what a rekey costs the VM")
    parser.add_argument("--name", required=True, help="of the result file")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="storage to measure on")
    arguments = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="sealfs-rekey-", dir=arguments.dir))
    try:
        (base / "source").mkdir()
        seal_new(base / "state", base / "source" / "disk.sealed", vm_id="disk", size=SIZE)
        with mounted(base / "source", base / "plain") as mount:
            path = mount.mountpoint / "disk"
            socket = next(mount.run_dir.glob("*.sock"))
            sealed = str((mount.source / "disk.sealed").resolve())

            def ask(action: str) -> dict[str, Any]:
                return control.call(socket, "rekey", path=sealed, action=action)

            with path.open("rb"):
                fio(path, "--rw=write", "--bs=1m", "--end_fsync=1")
                result = {"environment": environment(arguments.dir), **measure(
                    path, mount.process.pid, ask
                )}  # fmt: skip
    finally:
        shutil.rmtree(base, ignore_errors=True)
    text = json.dumps(result, indent=1) + "\n"
    (HERE / "results" / f"{arguments.name}.json").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
