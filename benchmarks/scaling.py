#!/usr/bin/env python3
"""How cost grows: with the size of an image, with the images of a mount, with dirty data.

Three curves, each point on a mount of its own with default options. Nothing may grow faster than
what is in use (bytes on the storage, images, dirty bytes): each curve ends with a verdict. Results
go to `benchmarks/results/NAME.json`, `.md` and `-*.png`. As root, by .venv/bin/python; a run takes
5 GiB and ten minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

import growth
from growth import CURVES, Curve, Point
from machine import HERE, SEALFS, Failed, environment, memory_mib, run
from peers import daemon

from sealfs.mount.control import find_mount

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 4096
SIZES = (1 * GIB, 16 * GIB, 128 * GIB, 1024 * GIB, 10240 * GIB)
PATCHES = 1000
COUNTS = (1, 2, 5, 10, 20, 50)
DIRTY = (4, 16, 64, 256)  # MiB
LOADERS = 2
"""Processes that read and write all the while; with the one that measures, three requests."""
READ_SHARE = 0.7
UMOUNT_WAIT = 300.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FORK = multiprocessing.get_context("fork")


@dataclass(slots=True)
class Mount:
    """A mount that is up: where, and by whom."""

    plain: Path
    pid: int

    def status(self) -> dict[str, Any]:
        found = find_mount(self.plain)
        if found is None:
            raise Failed("the mount does not answer")
        return found.status


@dataclass(slots=True)
class Host:
    """A host to throw away, in a scratch directory: images in `sealed`, shown in `plain`."""

    scratch: Path
    sealed: Path = field(init=False)
    plain: Path = field(init=False)

    def __post_init__(self) -> None:
        self.sealed, self.plain = self.scratch / "sealed", self.scratch / "plain"
        self.sealed.mkdir()
        self.plain.mkdir()
        run(*self._sealfs, "init", "--tpm", "swtpm", "--no-recovery")

    @property
    def _sealfs(self) -> list[str | Path]:
        return [SEALFS, "--state", self.scratch / "state"]

    def create(self, name: str, size: int) -> None:
        path = self.sealed / f"{name}.sealed"
        run(*self._sealfs, "create", path, "--size", str(size), "--vm-id", name)

    def remove_all(self) -> None:
        for path in self.sealed.iterdir():
            path.unlink()

    @property
    def in_use(self) -> int:
        """Bytes that the images take on the storage."""
        return sum(path.stat().st_blocks * 512 for path in self.sealed.iterdir())

    @contextlib.contextmanager
    def mounted(self, options: str = "rw") -> Iterator[Mount]:
        command = [*self._sealfs, "mount", self.sealed, self.plain, "--foreground", "-o", options]

        def unmount() -> None:
            run(*self._sealfs, "umount", self.plain, timeout=UMOUNT_WAIT)

        with daemon(command, self.plain, self.scratch / "log", unmount=unmount) as pid:
            yield Mount(self.plain, pid)


@dataclass(frozen=True, slots=True)
class Area:
    """The written parts of some files: `count` parts of `length` bytes, one each `stride`."""

    files: tuple[Path, ...]
    length: int
    stride: int
    count: int

    def place(self) -> tuple[int, int]:
        """Return a file's index and an offset of a block in a written part, at random."""
        part = random.randrange(self.count) * self.stride
        within = random.randrange(self.length // BLOCK) * BLOCK
        return random.randrange(len(self.files)), part + within


def write_area(area: Area) -> None:
    """Write all of it, of bytes that do not compress; durable on return."""
    for path in area.files:
        with open(path, "r+b", buffering=0) as file:
            for part in range(area.count):
                file.seek(part * area.stride)
                file.write(os.urandom(area.length))
            os.fsync(file.fileno())


def first_opens(files: Sequence[Path]) -> list[float]:
    """Open each file for the first time and read its first block; return seconds."""
    times = []
    for path in files:
        started = time.perf_counter()
        with open(path, "rb", buffering=0) as file:
            file.read(BLOCK)
        times.append(time.perf_counter() - started)
    return times


def one_after_the_other(area: Area, seconds: float, seed: int) -> dict[str, list[float]]:
    """Read and write blocks at random, directly; return the seconds of each."""
    random.seed(seed)
    times: dict[str, list[float]] = {"read": [], "write": []}
    handles = [os.open(path, os.O_RDWR | os.O_DIRECT) for path in area.files]
    buffer = mmap(-1, BLOCK)
    buffer[:] = os.urandom(BLOCK)
    try:
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            index, offset = area.place()
            if random.random() < READ_SHARE:
                os.preadv(handles[index], [buffer], offset)
                times["read"].append(time.perf_counter() - started)
            else:
                os.pwrite(handles[index], buffer, offset)
                times["write"].append(time.perf_counter() - started)
    finally:
        for handle in handles:
            os.close(handle)
    return times


def under_load(area: Area, seconds: float) -> dict[str, float]:
    """Return p50, p99 and p99.9 of reads and writes in ms, beside others who do the same."""
    loaders = [
        FORK.Process(target=_load, args=(area, seconds, number + 2), daemon=True)
        for number in range(LOADERS)
    ]
    for loader in loaders:
        loader.start()
    try:
        times = one_after_the_other(area, seconds, seed=1)
    finally:
        for loader in loaders:
            loader.join(seconds + 30)
            loader.kill()
            loader.join()
    return growth.percentiles(times)


def _load(area: Area, seconds: float, seed: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    one_after_the_other(area, seconds, seed)


# The curves.


def measure_size(host: Host, chosen: argparse.Namespace) -> Generator[Point, None, None]:
    """The same data in ever larger images, clean at the beginning of each point."""
    for size in chosen.sizes:
        length = max(BLOCK, min(chosen.written, size) // chosen.patches // BLOCK * BLOCK)
        stride = max(length, size // chosen.patches // BLOCK * BLOCK)
        area = Area((host.plain / "disk",), length, stride, chosen.patches)
        host.create("disk", size)
        with host.mounted():
            started = time.perf_counter()
            write_area(area)
            written = time.perf_counter() - started
        with host.mounted() as mount:
            (opened,) = first_opens(area.files)
            after_open = memory_mib(mount.pid)
            latency = under_load(area, chosen.seconds)
            memory = memory_mib(mount.pid)
            in_use = host.in_use
        started = time.perf_counter()
        run(SEALFS, "--state", host.scratch / "state", "check", host.sealed / "disk.sealed")
        checked = time.perf_counter() - started
        yield Point(size / GIB, in_use, {
            "write, s": written, "open, s": opened, "check, s": checked,
            "memory after open, MiB": after_open, "memory, MiB": memory, **latency,
        })  # fmt: skip
        host.remove_all()


def measure_images(host: Host, chosen: argparse.Namespace) -> Generator[Point, None, None]:
    """Ever more images on one mount, each with the same data, all under load."""
    made = 0
    for count in chosen.counts:
        while made < count:
            host.create(f"disk{made}", chosen.image_size)
            made += 1
        files = tuple(host.plain / f"disk{index}" for index in range(count))
        area = Area(files, chosen.image_written, chosen.image_written, 1)
        with host.mounted():
            write_area(area)
        with host.mounted() as mount:
            opened = first_opens(files)
            after_open = memory_mib(mount.pid)
            latency = under_load(area, chosen.seconds)
            memory = memory_mib(mount.pid)
        yield Point(count, count, {
            "open, median, s": statistics.median(opened), "open, worst, s": max(opened),
            "memory after open, MiB": after_open, "memory, MiB": memory, **latency,
        })  # fmt: skip
    host.remove_all()


def measure_dirty(host: Host, chosen: argparse.Namespace) -> Generator[Point, None, None]:
    """Ever more bytes that wait to be committed: reads beside them, and the flush that ends it."""
    host.create("disk", chosen.image_size)
    file = host.plain / "disk"
    largest = max(chosen.dirty) * MIB
    area = Area((file,), min(largest, chosen.image_size), chosen.image_size, 1)
    with host.mounted():
        write_area(area)
    for amount in chosen.dirty:
        # Twice and more: half of the room is where a mount begins to write behind.
        with host.mounted(f"dirty={amount * 2 + 8}M") as mount:
            first_opens([file])
            yield _dirty_point(mount, file, amount, area, chosen.seconds)
    host.remove_all()


def _dirty_point(mount: Mount, file: Path, amount: int, area: Area, seconds: float) -> Point:
    chunk = min(MIB, area.length)
    content = mmap(-1, chunk)
    content[:] = os.urandom(chunk)
    handle = os.open(file, os.O_RDWR | os.O_DIRECT)
    block = mmap(-1, BLOCK)
    try:
        for offset in range(0, amount * MIB, chunk):
            os.pwrite(handle, content, offset % area.length)
        dirty = int(mount.status()["dirty"])
        times = []
        # No longer: a mount commits by itself 5 s after the first write.
        end = time.perf_counter() + min(seconds, 1.0)
        while (started := time.perf_counter()) < end:
            os.preadv(handle, [block], area.place()[1])
            times.append(time.perf_counter() - started)
        memory = memory_mib(mount.pid)
        started = time.perf_counter()
        os.fdatasync(handle)
        flushed = time.perf_counter() - started
    finally:
        os.close(handle)
    return Point(dirty / MIB, max(1, dirty), {
        "flush, s": flushed, "memory, MiB": memory, **growth.percentiles({"read": times}),
    })  # fmt: skip


MEASURE = {"size": measure_size, "images": measure_images, "dirty": measure_dirty}


def measure(chosen: argparse.Namespace, scratch: Path, found: dict[str, list[Point]]) -> None:
    """Measure the curves that were chosen into `found`, point by point."""
    for name in chosen.curves:
        place = scratch / name
        place.mkdir()
        found[name] = []
        with contextlib.closing(MEASURE[name](Host(place), chosen)) as points:
            for point in points:
                found[name].append(point)
                print(f"{name}: {CURVES[name].unit} {point.x:g}: {point.shown()}", flush=True)
        print("\n".join(growth.verdicts(CURVES[name], found[name])), flush=True)
        shutil.rmtree(place)


def write(chosen: argparse.Namespace, about: dict[str, str], found: dict[str, list[Point]]) -> None:
    """Write the results down."""
    curves: list[Curve] = [CURVES[name] for name in found]
    chosen.out.mkdir(exist_ok=True)
    document = {"about": about, "curves": {
        curve.name: {
            "points": [asdict(point) for point in found[curve.name]],
            "verdicts": growth.verdicts(curve, found[curve.name]),
        }
        for curve in curves
    }}  # fmt: skip
    base = chosen.out / chosen.name
    base.with_name(f"{chosen.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [f"- {key}: {value}" for key, value in about.items()]
    for curve in curves:
        lines += ["", f"## {curve.title}", "", *growth.table(curve, found[curve.name]), ""]
        lines += [f"- {line}" for line in growth.verdicts(curve, found[curve.name])]
        chart = growth.chart(
            curve, found[curve.name], chosen.out / f"{chosen.name}-{curve.name}.png"
        )
        lines += ["", f"![{curve.title}]({chart.name})" if isinstance(chart, Path) else chart]
    base.with_name(f"{chosen.name}.md").write_text("\n".join(lines) + "\n")
    print(f"written: {base}.json, .md")


def _interrupt(number: int, frame: object) -> None:
    for other in SIGNALS:  # taking back is not to be interrupted again
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Measure, print, and write the results down."""
    chosen = _arguments()
    about = environment(chosen.scratch) | {
        "written": f"{chosen.written // MIB} MiB in {chosen.patches} patches",
        "seconds": f"{chosen.seconds:g}",
    }
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    scratch = Path(tempfile.mkdtemp(prefix="sealfs-scaling-", dir=chosen.scratch))
    found: dict[str, list[Point]] = {}
    try:
        measure(chosen, scratch, found)
    except KeyboardInterrupt:
        print("interrupted: everything is unmounted; nothing is written down", file=sys.stderr)
        return 130
    except Failed as exc:
        print(f"failed: {exc}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write(chosen, about, found)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    add("--seconds", type=float, default=10, help="of load at each point")
    add("--written", type=int, default=1024, help="MiB in each image of the first curve")
    add("--patches", type=int, default=PATCHES, help="that it is written in")
    add("--sizes", type=int, nargs="+", default=[size // GIB for size in SIZES], help="GiB")
    add("--counts", type=int, nargs="+", default=list(COUNTS), help="images on one mount")
    add("--image-size", type=int, default=1024, help="MiB, in the second and third curve")
    add("--image-written", type=int, default=64, help="MiB in each image of the second curve")
    add("--dirty", type=int, nargs="+", default=list(DIRTY), help="MiB")
    add("--scratch", type=Path, help="where the images are made; on ext4 or xfs")
    add("--out", type=Path, default=HERE / "results", help="where results go")
    add("--name", default="scaling", help="of the results")
    chosen = parser.parse_args()
    chosen.sizes = [size * GIB for size in chosen.sizes]
    chosen.written *= MIB
    chosen.image_size *= MIB
    chosen.image_written = min(chosen.image_written * MIB, chosen.image_size)
    return chosen


if __name__ == "__main__":
    sys.exit(main())
