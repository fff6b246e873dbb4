"""One mount under everything at once for a long time: content stays right and memory stays flat.

    tools/torture soak --minutes 30 --seed 1

On three images: fio with --verify; a writer that punches holes, whose content is compared after
each round; `resize`, `check`, `scrub`, and the mount's verbs flush (which checkpoints) and close.
The daemon's memory and descriptors are sampled all the while. It fails when a verification does,
when memory has grown by more than 5 % since the warm-up (5 minutes, or a sixth of a shorter run;
less than 6 minutes show coarse leaks only), or when a descriptor is left over with nothing in use.
The time begins when each of these was done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from exerciser_files import BLOCK, KEEP_SIZE, PUNCH_HOLE, fallocate
from kills import IMAGE_SIZE, WRITERS, HostMount, Promises, Worker
from mount_support import DEADLINE
from torture_record import commit

from sealfs.mount.control import find_mount

MIB = 1 << 20
FIO_SIZE = 8 * MIB
SIZES = (16 * MIB, 32 * MIB)
"""Between these the resized image is; fio has what is below."""
OPTIONS = "cache=8M,dirty=8M,commit=0.5,idle=2"
WARM_UP = 300.0  # seconds
WARM_UP_PART = 1 / 6
GROWTH_MAX = 0.05
GROWTH_MAX_SHORT = 0.25
"""Where the warm-up is less than a minute: threads and allocators are not settled by then."""
WARM_UP_FULL = 60.0
PARTS = 10
REPORT_EVERY = 10.0
RUN_IN = 2
"""Rounds of everything before the time begins: a busy machine starts slowly."""
STUCK_AFTER = 180.0  # seconds for one round of anything
STEPS = 300


class Wrong(Exception):
    """What a verification has found."""


class Memory:
    """What the daemon has taken, over time."""

    def __init__(self, pid: int) -> None:
        self._place = Path(f"/proc/{pid}")
        self._began = 0.0
        self.samples: list[tuple[float, int, int]] = []
        """(seconds since the beginning, KiB resident, open descriptors)"""

    def begin(self) -> None:
        """Count the seconds from here."""
        self._began = time.monotonic()

    def sample(self) -> None:
        status = (self._place / "status").read_text()
        resident = int(status.partition("VmRSS:")[2].split()[0])
        self.samples.append((time.monotonic() - self._began, resident, len(self.descriptors())))

    def descriptors(self) -> list[str]:
        """Return what is open."""
        found = []
        for entry in (self._place / "fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(entry))
        return sorted(found)

    def parts(self, column: int, since: float = 0.0) -> list[list[float]]:
        """Return minimum, median and maximum of each tenth of the time since then."""
        values = [sample[column] for sample in self.samples if sample[0] >= since]
        cuts = [len(values) * part // PARTS for part in range(PARTS + 1)]
        tenths = [values[first:last] for first, last in itertools.pairwise(cuts)]
        return [[min(tenth), statistics.median(tenth), max(tenth)] for tenth in tenths if tenth]

    def growth(self, warm_up: float) -> float:
        """Return by how much the last tenth's median is above the first's, after the warm-up."""
        parts = self.parts(1, warm_up)
        return parts[-1][1] / parts[0][1] - 1


class Soak:
    """One run on one mount."""

    def __init__(self, mount: HostMount, *, seed: int, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._mount = mount
        self._seed = seed
        self._seconds = seconds
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._moved: dict[str, float] = {}
        self._promises = Promises(IMAGE_SIZE // BLOCK)
        self._workers: list[Worker] = []
        self._size = SIZES[0]

    def run(self) -> Memory:
        """Do everything at once until the time is over."""
        found = find_mount(self._mount.mountpoint)
        assert found is not None
        self._call = found.call
        self._workers = [Worker(self._mount, 1, index) for index in range(WRITERS)]
        memory = Memory(self._mount.pid)
        try:
            self._touch()
            time.sleep(0.5)  # the daemon's end of the last request's socket
            before = memory.descriptors()
            self._all_at_once(memory)
            self._close_all()
            after = self._settled(memory, len(before))
        finally:
            for worker in self._workers:
                worker.end()
        left = Counter(after) - Counter(before)
        if len(after) > len(before):
            self.failures.append(f"descriptors left over: {sorted(left.elements())}")
        return memory

    def _all_at_once(self, memory: Memory) -> None:
        activities: dict[str, Callable[[random.Random], None]] = {
            "fio on a disk": lambda rng: self._fio(rng, "disk0"),
            "fio beside a resize": lambda rng: self._fio(rng, "disk2"),
            "writers": self._write,
            "resize": self._resize,
            "check": self._check,
            "verbs": self._ask,
        }
        threads = [
            threading.Thread(target=self._repeat, args=(name, action))
            for name, action in activities.items()
        ]
        for thread in threads:
            thread.start()
        try:
            while not self.failures and any(self.counts[name] < RUN_IN for name in activities):
                self._beat()
                self._stop.wait(0.1)
            memory.begin()
            reported = time.monotonic()
            end = reported + self._seconds
            while time.monotonic() < end and not self.failures:
                memory.sample()
                self._beat()
                if time.monotonic() - reported >= REPORT_EVERY:
                    reported = time.monotonic()
                    seconds, resident, descriptors = memory.samples[-1]
                    print(
                        f"soak: {seconds:.0f} s, {resident} KiB, {descriptors} descriptors, "
                        f"{self._shown()}", file=sys.stderr, flush=True,
                    )  # fmt: skip
                self._stop.wait(min(2.0, self._seconds / 60))
        finally:
            self._stop.set()
            for thread in threads:
                while thread.is_alive():
                    thread.join(1)
                    self._beat()

    def _shown(self) -> str:
        with self._lock:
            return ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))

    def _beat(self) -> None:
        """Have the mount live on, unless something is stuck: then its connection is ended."""
        oldest = min(self._moved.values(), default=time.monotonic())
        if time.monotonic() - oldest < STUCK_AFTER:
            self._mount.beat()

    def _repeat(self, name: str, action: Callable[[random.Random], None]) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                self._moved[name] = time.monotonic()
                action(random.Random(f"soak {self._seed} {name} {number}"))
                self._count(name)
                number += 1
        except Exception as exc:
            self.failures.append(f"{name}, round {number}: {type(exc).__name__}: {exc}")
            self._stop.set()
        finally:
            self._moved.pop(name)

    def _count(self, name: str, count: int = 1) -> None:
        with self._lock:
            self.counts[name] += count

    # What is done, a round at a time.

    def _fio(self, rng: random.Random, name: str) -> None:
        arguments = [
            "fio", "--name=soak", f"--filename={self._mount.mountpoint / name}",
            f"--rw={rng.choice(('randwrite', 'randrw', 'write'))}",
            f"--bs={rng.choice(('4k', '16k', '128k', '1m'))}",
            f"--size={FIO_SIZE}", f"--direct={rng.randrange(2)}",
            *rng.choice((["--ioengine=psync"], ["--ioengine=libaio", "--iodepth=8"])),
            f"--fsync={rng.choice((0, 0, 8, 32))}", f"--randseed={rng.randrange(1 << 30)}",
            "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0",
            "--output-format=json",
        ]  # fmt: skip
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, cwd=self._mount.base
        )
        if done.returncode != 0:
            raise Wrong(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        self._count("reads of fio", job["read"]["total_ios"])
        self._count("writes of fio", job["write"]["total_ios"])

    def _write(self, rng: random.Random) -> None:
        for worker in self._workers:
            worker.begin(rng.randrange(1 << 30), punches=self._mount.lane, steps=STEPS)
        for worker in self._workers:
            worker.ended()
        for worker in self._workers:
            done = self._promises.take(worker.entries())
            for name, count in done.items():
                self._count(name, count)
        self._promises.settle_all()
        fd = os.open(self._mount.mountpoint / "disk1", os.O_RDONLY | rng.choice((0, os.O_DIRECT)))
        try:
            for offset in range(0, IMAGE_SIZE, MIB):
                self._promises.adopt(offset, os.pread(fd, MIB, offset))
        finally:
            os.close(fd)

    def _resize(self, rng: random.Random) -> None:
        """Grow or shrink; what is new is zeros, and what is written there and punched is too."""
        path = self._mount.mountpoint / "disk2"
        size = rng.randint(*SIZES)
        old, self._size = self._size, size
        self._mount.host.run("resize", path, str(size), *(["--shrink"] if size < old else []))
        if os.stat(path).st_size != size:
            raise Wrong(f"resized to {size}, it has {os.stat(path).st_size}")
        fd = os.open(path, os.O_RDWR | rng.choice((0, os.O_DIRECT)))
        try:
            start = FIO_SIZE if rng.random() < 0.5 else min(old, size)
            content = rng.randbytes(min(size - start, rng.choice((BLOCK, 100_000, MIB))))
            if start == min(old, size) and any(os.pread(fd, len(content), start)):
                raise Wrong(f"grown from {old} to {size}, it is not zeros at {start}")
            os.pwrite(fd, content, start)
            if rng.random() < 0.5:
                os.fsync(fd)
            if os.pread(fd, len(content), start) != content:
                raise Wrong(f"{len(content)} bytes at {start} are not what was written")
            if self._mount.lane and content:
                fallocate(fd, KEEP_SIZE | PUNCH_HOLE, start, len(content))
                if any(os.pread(fd, len(content), start)):
                    raise Wrong(f"{len(content)} bytes at {start} are not zeros after a punch")
        finally:
            os.close(fd)

    def _check(self, rng: random.Random) -> None:
        run, mountpoint = self._mount.host.run, self._mount.mountpoint
        if rng.random() < 0.5:
            said = run("scrub", mountpoint, "--rate", rng.choice(("20M", "1G")))
            if said:
                raise Wrong(f"scrub says {said}")
        else:
            run("check", *rng.choice(([], ["--data"])), mountpoint / f"disk{rng.randrange(3)}")

    def _ask(self, rng: random.Random) -> None:
        name = f"disk{rng.randrange(3)}"
        path = str(self._mount.mountpoint / name)
        match rng.choice(("flush", "flush all", "close", "close all", "status")):
            case "flush":
                self._call("flush", path=path)
            case "flush all":
                self._call("flush")
            case "close":
                self._call("close", path=path)
            case "close all":
                self._call("close")
            case "status":
                for image in self._call("status")["images"]:
                    if image["poisoned"] or image["lost_groups"]:
                        raise Wrong(f"{image['path']}: {image}")
        self._stop.wait(rng.random())

    # Before and after.

    def _touch(self) -> None:
        """Have every image been open once, and nothing in use."""
        for image in range(3):
            (self._mount.mountpoint / f"disk{image}").read_bytes()
        self._close_all()

    @staticmethod
    def _settled(memory: Memory, count: int) -> list[str]:
        """Return what is open when no more than that is, or does not become so."""
        end = time.monotonic() + DEADLINE
        # Of the last request the daemon's end of the socket closes a little later than ours.
        while len(memory.descriptors()) > count and time.monotonic() < end:
            time.sleep(0.05)
        return memory.descriptors()

    def _close_all(self) -> None:
        end = time.monotonic() + DEADLINE
        while self._call("close")["in_use"]:
            if time.monotonic() > end:
                raise Wrong("an image stays in use")
            time.sleep(0.05)


def soak(base: Path, *, seed: int, seconds: float, options: str = OPTIONS) -> dict[str, Any]:
    """Run in an empty directory; return the document with the `failures`, if there are any."""
    mount = HostMount(base)
    mount.options = options
    mount.lane = "lane=off" not in options
    began = time.monotonic()
    run = Soak(mount, seed=seed, seconds=seconds)
    try:
        for image, size in enumerate((FIO_SIZE, IMAGE_SIZE, SIZES[0])):
            path = mount.host.images / f"disk{image}.sealed"
            mount.host.run("create", path, "--size", str(size), "--vm-id", f"vm{image}")
        mount.start()
        memory = run.run()
        mount.finish()
        for image in range(3):
            mount.host.run("check", "--data", mount.host.images / f"disk{image}.sealed")
    finally:
        mount.abandon()
    warm_up = min(WARM_UP, seconds * WARM_UP_PART)
    growth = memory.growth(warm_up)
    if growth > (GROWTH_MAX if warm_up >= WARM_UP_FULL else GROWTH_MAX_SHORT):
        run.failures.append(f"memory has grown by {growth:.1%} since {warm_up:.0f} s")
    log = mount.log_text()
    if "ERROR" in log:
        run.failures.append(log)
    return {
        "job": "soak", "commit": commit(), "seed": seed, "minutes": round(seconds / 60, 2),
        "options": options, "seconds": round(time.monotonic() - began, 1),
        "growth": round(growth, 4), "resident_kib": memory.parts(1),
        "descriptors": memory.parts(2), "operations": dict(sorted(run.counts.items())),
        "failures": run.failures,
    }  # fmt: skip


def main() -> int:
    """Soak; 1 when something was wrong."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="tools/torture soak")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--options", default=OPTIONS, help="Of the mount.")
    parser.add_argument("--summary", type=Path, help="Write what was reached, as JSON.")
    parser.add_argument("--directory", type=Path, help="Where to work; default: a temporary one.")
    chosen = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="soak-", dir=chosen.directory))
    document = soak(base, seed=chosen.seed, seconds=60 * chosen.minutes, options=chosen.options)
    text = json.dumps(document, indent=1) + "\n"
    if chosen.summary is not None:
        chosen.summary.write_text(text)
    print(text, end="")
    if document["failures"]:
        print(f"FAILED; kept in {base}")
        return 1
    shutil.rmtree(base)
    return 0


if __name__ == "__main__":
    sys.exit(main())
