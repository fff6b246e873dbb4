"""One fio run: a job of `jobs/` on one side, and what the side's daemon did meanwhile."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from machine import HERE, Failed, cpu_seconds, drop_caches, run
from peers import DISKS, Side

JOBS = HERE / "jobs"
BLOCK_SIZE = 4096
GIB = 1 << 30
FIO_SLACK = 600.0  # seconds that a run may take longer than asked: a fill of slow storage
PERCENTILES = ("50.000000", "99.000000", "99.900000")


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured. Times in seconds, the final fsync included.

    Attributes:
        iops: operations a second, reads and writes together.
        bytes: bytes a second.
        cpu: seconds of the daemon's CPU for a GiB; None without daemon.
        latency_ms: p50, p99 and p99.9 of completions; of several jobs or kinds the worst.
        hit_rate: blocks read that sealfs had in its plaintext cache, of all read.
        dirty_share: bytes that were not on the disk when the clock stopped, of those written.
    """

    iops: float
    bytes: float
    cpu: float | None
    latency_ms: tuple[float, ...]
    hit_rate: float | None
    dirty_share: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def fio(job: str, side: Side, *, size: int, seconds: float, seed: int = 1) -> Figures:
    """Run one job.

    Raises:
        Failed: fio, or the side.
    """
    before, cpu_before = side.status(), _cpu(side)
    environment = os.environ | {
        "DIRECTORY": str(side.directory),
        "SIZE": str(size),
        "SIZE_QUARTER": str(size // 4),
        "SECONDS_EACH": f"{int(seconds * 1000)}ms",
        "SEED": str(seed),
    }
    found = run(
        "fio", "--output-format=json", JOBS / f"{job}.fio",
        env=environment, cwd=side.directory.parent, timeout=seconds + FIO_SLACK,
    ).stdout  # fmt: skip
    cpu_after, after = _cpu(side), side.status()
    results = json.loads(found[found.index("{") :])["jobs"]
    failed = next((result["error"] for result in results if result["error"]), 0)
    if failed:
        raise Failed(f"fio: {os.strerror(failed)}")
    done = [
        (result, result[kind])
        for result in results
        for kind in ("read", "write")
        if result[kind]["total_ios"]
    ]
    if not done:
        raise Failed("fio did nothing")
    # fio's own rate stops its clock before the final fsync; the job's run time does not.
    elapsed = max(max(part["runtime"], result["job_runtime"]) for result, part in done) / 1000
    count = sum(part["total_ios"] for _, part in done)
    size_read = sum(result["read"]["io_bytes"] for result in results)
    size_written = sum(result["write"]["io_bytes"] for result in results)
    cpu = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
    shown = [part["clat_ns"].get("percentile", {}) for _, part in done]
    return Figures(
        iops=count / elapsed,
        bytes=(size_read + size_written) / elapsed,
        cpu=None if cpu is None else cpu * GIB / (size_read + size_written),
        latency_ms=tuple(max(part.get(name, 0) for part in shown) / 1e6 for name in PERCENTILES),
        hit_rate=_share(after.get("cache_hits"), before.get("cache_hits"), size_read // BLOCK_SIZE),
        dirty_share=_share(after.get("dirty"), 0 if "dirty" in after else None, size_written),
    )


def make_cold(side: Side) -> None:
    """Empty the side's own cache where it has a way, then the kernel's.

    Raises:
        Failed: one of them cannot be emptied.
    """
    side.empties()
    # Opening unseals the key and recovers the image: not what a read costs.
    with open(side.directory / DISKS[0], "rb"):
        pass
    drop_caches()


def make_warm(side: Side, size: int) -> None:
    """Have what the side keeps on the storage in the page cache, whatever was dropped meanwhile.

    And memory that is free, `size` bytes of it: on a virtual machine its host may have taken that
    back, and the first who is given it waits 7 us for each page. It is not to be who is measured.
    """
    for path in () if side.stored is None else filter(Path.is_file, side.stored.rglob("*")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1


def _cpu(side: Side) -> float | None:
    return None if side.pid is None else cpu_seconds(side.pid)


def _share(after: int | None, before: int | None, whole: int) -> float | None:
    return None if after is None or before is None or not whole else (after - before) / whole
