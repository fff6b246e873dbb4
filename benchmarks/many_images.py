#!/usr/bin/env python3
"""Open many large images in one mount: memory of the daemon, time of each first open.

Makes COUNT images of 1 TiB with 1 GiB written at the start of each, mounts them anew and opens
each once; then again after kill -9 of a daemon that left records in the journals. Times include
the key's way through the (software) TPM.

    benchmarks/many_images.py [--count 10] [--written 1024] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import HERE, SEALFS, environment, run

MIB = 1 << 20


def daemon_of(mountpoint: Path) -> int:
    """Return the pid of the daemon that serves a mount point."""
    script = "import sys; from pathlib import Path; from sealfs.mount.control import find_mount;"
    script += " print(find_mount(Path(sys.argv[1])).status['pid'])"
    return int(run(SEALFS.parent / "python", "-c", script, mountpoint).stdout)


def memory_of(pid: int) -> float:
    """Return the resident memory of a process in MiB, and its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def open_all(plain: Path, count: int) -> list[float]:
    """Open every image once and read its first block; return the seconds each took."""
    times = []
    for index in range(count):
        started = time.perf_counter()
        with open(plain / f"disk{index}", "rb") as file:
            file.read(4096)
        times.append(time.perf_counter() - started)
    return times


def fill(disk: Path, size: int, *, at: int = 0) -> None:
    """Write `size` bytes that do not compress, and sync them."""
    with open(disk, "r+b") as file:
        file.seek(at)
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())


def measure(count: int, written: int, scratch: Path) -> dict[str, float]:
    """Do all of it; return the figures."""
    state, images, plain = (scratch / name for name in ("state", "images", "plain"))
    images.mkdir()
    plain.mkdir()
    base: list[str | Path] = [SEALFS, "--state", state]
    run(*base, "init", "--tpm", "swtpm", "--no-recovery")
    for index in range(count):
        path = images / f"disk{index}.sealed"
        run(*base, "create", path, "--size", "1T", "--vm-id", f"vm{index}")
    run(*base, "mount", images, plain)
    try:
        for index in range(count):
            fill(plain / f"disk{index}", written * MIB)
        run(*base, "umount", plain)
        run(*base, "mount", images, plain)
        clean = open_all(plain, count)
        found = {"peak_mib_clean": memory_of(daemon_of(plain))}
        for index in range(count):
            fill(plain / f"disk{index}", 24 * MIB, at=MIB // 2)
        pid = daemon_of(plain)
        os.kill(pid, signal.SIGKILL)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.01)
        subprocess.run(["umount", "-l", plain], check=True)
        run(*base, "mount", images, plain)
        killed = open_all(plain, count)
        found["peak_mib_after_kill"] = memory_of(daemon_of(plain))
    finally:
        subprocess.run([*base, "umount", plain], check=False, capture_output=True)
    for name, times in (("clean", clean), ("after_kill", killed)):
        found[f"open_{name}_median_s"] = statistics.median(times)
        found[f"open_{name}_max_s"] = max(times)
    return found


def main() -> int:
    """Measure, print, and write the results down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--written", type=int, default=1024, help="MiB in each image")
    parser.add_argument("--scratch", type=Path, default=None)
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="sealfs-many-", dir=arguments.scratch))
    try:
        found = measure(arguments.count, arguments.written, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    about = environment() | {"count": arguments.count, "written_mib": arguments.written}
    text = json.dumps({"about": about, "figures": found}, indent=1) + "\n"
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "many-images.json").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
