"""Kill -9 of the daemon under writers, again and again on the same images; nothing may be lost.

    tools/torture kills --kills 300 --seed 1     real mounts, keys from a software TPM
    tools/torture kills --replay 3 --seed 1      one batch again: the same draws, other moments

After each kill and remount every block must be, as a whole, what was acknowledged last or what
was written to it since, acknowledged or not. What was promised stands in the journals of the
writers, processes of their own (`kill_writer`). No group is lost, and no alarm of an older image.

A batch is made from the seed and its number, and has its own host and images. The moment of a
death is the machine's: a batch that is run again does not end in the same bytes, so it has no
digest. What was done is kept beside (`--state`), so that a run may be ended at any moment and
goes on with the batch where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import kill_writer
from exerciser import Stamps
from exerciser_files import BLOCK, HANG_AFTER, Watch
from host_support import Host
from kill_writer import ALL_DURABLE, ENTRY, ONE_DURABLE, PUNCH, WRITE
from mount_support import seal_new
from torture_record import ROOT, Record, state_path

IMAGES = 3
WRITERS = 2
"""For each image."""
IMAGE_SIZE = 8 << 20
KILLS_IN_BATCH = 20
PIECE = 1 << 20
STRIPES = (8, 256)
"""Blocks that one writer has in a row: writers meet in each group, or fill whole ones."""
OPTIONS = (
    "",
    "cache=4M,dirty=4M,commit=0.2,idle=0.5",
    "cache=4M,dirty=8M,commit=0.05",
    "freshness=flush,bump=1",
    "direct_io,dirty=4M",
)
ALARMS = ("RolledBack", "ForeignImage", "BlockDamaged", "are lost", "ERROR", "Traceback")
"""What the log of a daemon that takes over must not say."""


class Lost(Exception):
    """What a kill has done that it must not."""


class Mount(Protocol):
    """A mount that can be killed and made again."""

    base: Path
    mountpoint: Path
    lane: bool
    options: str

    def start(self) -> None: ...
    def beat(self) -> None: ...
    def kill(self) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...
    def log_text(self) -> str: ...


class HostMount:
    """The mount of a host of its own, by the commands that an administrator types."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.host = Host(base)
        self.mountpoint = self.host.mountpoint
        self.lane = True
        self.options = ""
        self._watch: Watch | None = None
        self._logged = 0
        self.pid = 0
        """Of the daemon, while there is one."""

    def start(self) -> None:
        log = self.host.log
        self._logged = log.stat().st_size if log.exists() else 0
        options = f"lane={'on' if self.lane else 'off'}"
        self.host.mount(",".join(filter(None, (options, self.options))))
        self.pid = self.host.daemon_pid()
        self._watch = Watch(self.mountpoint)

    def beat(self) -> None:
        assert self._watch is not None
        self._watch.beat()

    def kill(self) -> None:
        pid, self.pid = self.pid, 0
        self.host.kill_daemon(pid)
        self._end_watch()

    def log_text(self) -> str:
        """Return what this daemon has logged."""
        with open(self.host.log) as log:
            log.seek(self._logged)
            return log.read()

    def finish(self) -> None:
        self.host.umount()
        self.pid = 0
        self._end_watch()

    def abandon(self) -> None:
        """Leave no mount behind, whatever the state."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.pid = 0
        self.host.clear()
        self._end_watch()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.end()
            self._watch = None


# What was promised.


@dataclass(frozen=True)
class Version:
    """What a block may hold: what operation `number` wrote, or zeros."""

    number: int
    is_zeros: bool


@dataclass
class Promises:
    """What each block may hold, by what the journals of its writers say."""

    blocks: int
    versions: list[list[Version]] = field(init=False)
    """Oldest first; the first of them is acknowledged."""

    def __post_init__(self) -> None:
        self.stamps = Stamps(((0, self.blocks * BLOCK),))
        self.versions = [[Version(0, True)] for _ in range(self.blocks)]
        self._changes: dict[int, range] = {}

    def take(self, raw: bytes) -> Counter[str]:
        """Take a journal's entries since the last time into account; return what they were."""
        counts: Counter[str] = Counter()
        open_changes: list[int] = []
        for kind, number, first, count in ENTRY.iter_unpack(raw):
            if kind in (WRITE, PUNCH):
                self._changes[number] = range(first, first + count)
                open_changes.append(number)
                for block in self._changes[number]:
                    self.versions[block].append(Version(number, kind == PUNCH))
                counts["writes" if kind == WRITE else "punches"] += 1
            elif kind == ONE_DURABLE:
                self._settle(number, self._changes[number])
                counts["synchronous writes"] += 1
            elif kind == ALL_DURABLE:
                for change in open_changes:
                    self._settle(number, self._changes[change])
                open_changes.clear()
                counts["syncs"] += 1
        return counts

    def _settle(self, number: int, blocks: range) -> None:
        """Forget what stood in these blocks before operation `number` and those before it."""
        for block in blocks:
            versions = self.versions[block]
            durable = [at for at, version in enumerate(versions) if version.number <= number]
            del versions[: durable[-1]]

    def settle_all(self) -> None:
        """Have every write count as done: nobody was killed."""
        for versions in self.versions:
            del versions[:-1]

    def content(self, block: int, version: Version) -> bytes:
        if version.is_zeros:
            return bytes(BLOCK)
        return self.stamps.make(version.number, block * BLOCK, BLOCK)

    def adopt(self, offset: int, found: bytes) -> int:
        """Check what is there from `offset` on, and go on from it; return the blocks left old.

        Raises:
            Lost: a block is none of what it may be.
        """
        left_old = 0
        for at in range(0, len(found), BLOCK):
            block = (offset + at) // BLOCK
            content = found[at : at + BLOCK]
            versions = self.versions[block]
            for version in reversed(versions):
                if content == self.content(block, version):
                    break
            else:
                raise Lost(self._report(block, content))
            left_old += version is not versions[-1]
            self.versions[block] = [version]
        return left_old

    def _report(self, block: int, content: bytes) -> str:
        offset = block * BLOCK
        lines = [
            f"block {block} is none of the {len(self.versions[block])} it may be",
            f"  begins with: {self.stamps.describe(content, offset, 0)}",
            f"  ends with:   {self.stamps.describe(content, offset, BLOCK - 8)}",
        ]
        for version in self.versions[block]:
            what = "zeros" if version.is_zeros else "content"
            lines.append(f"  may be:      {what} of operation {version.number}")
        return "\n".join(lines)


class Worker:
    """A writer's process, as seen from here."""

    def __init__(self, mount: Mount, image: int, index: int) -> None:
        name = f"disk{image}"
        self.journal = mount.base / f"{name}.journal{index}"
        self.journal.touch()
        self._read = 0
        self._process = subprocess.Popen(
            [
                sys.executable, Path(kill_writer.__file__), mount.mountpoint / name, self.journal,
                f"--blocks={IMAGE_SIZE // BLOCK}", f"--stripe={STRIPES[image % len(STRIPES)]}",
                f"--index={index}", f"--of={WRITERS}", f"--owner={image * WRITERS + index}",
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )  # fmt: skip

    def begin(self, seed: int, *, punches: bool, steps: int | None = None) -> None:
        """Have it open the file and write, until the daemon dies or after so many steps."""
        assert self._process.stdin is not None
        life = {"seed": seed, "punches": punches, "steps": steps}
        self._process.stdin.write(json.dumps(life) + "\n")
        self._process.stdin.flush()
        self._expect("ready")

    def ended(self) -> int:
        """Return how many steps this life had, when it has ended."""
        return int(self._expect("gone"))

    def entries(self) -> bytes:
        """Return what is new in the journal."""
        with open(self.journal, "rb") as journal:
            journal.seek(self._read)
            raw = journal.read()
        self._read += len(raw)
        return raw

    def end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(HANG_AFTER)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _expect(self, word: str) -> str:
        out = self._process.stdout
        assert out is not None
        if not select.select([out], [], [], HANG_AFTER)[0]:
            raise Lost(f"{self.journal.name}: the writer hangs, no {word!r}")
        line = out.readline()
        if not line.startswith(word):
            raise Lost(f"{self.journal.name}: the writer says {line!r} in place of {word!r}")
        return line[len(word) :]


# Kills.


class Siege:
    """Images under one mount, their writers, and kills."""

    def __init__(self, mount: Mount, rng: random.Random, images: int = IMAGES) -> None:
        self.mount = mount
        self.figures: Counter[str] = Counter()
        self._rng = rng
        self._names = [f"disk{image}" for image in range(images)]
        self._promises = [Promises(IMAGE_SIZE // BLOCK) for _ in range(images)]
        self._workers = [
            [Worker(mount, image, index) for index in range(WRITERS)] for image in range(images)
        ]

    def run(self, kills: int) -> None:
        """Kill so many times, on the mount that is there and those after it.

        Raises:
            Lost: something is wrong.
        """
        while self.figures["kills"] < kills:
            self._life()
            self.verify()

    def _life(self) -> None:
        delay = self._rng.choice((0.1, 1.0, 3.0)) * self._rng.random()
        for workers in self._workers:
            for worker in workers:
                # Without the lane, holes cannot be made.
                worker.begin(self._rng.randrange(1 << 30), punches=self.mount.lane)
        time.sleep(delay)
        self._kill()
        for promises, workers in zip(self._promises, self._workers, strict=True):
            for worker in workers:
                worker.ended()
                self.figures.update(promises.take(worker.entries()))
        self._remount()
        if self._rng.random() < 0.25:
            self._die_in_recovery()
            self._remount()

    def _kill(self) -> None:
        self.mount.kill()
        self.figures["kills"] += 1

    def _remount(self) -> None:
        # Options of the next life: the recovery is by another kind of daemon too.
        self.draw_options()
        self.mount.start()

    def draw_options(self) -> None:
        """Choose how the next mount is made."""
        self.mount.lane = self._rng.random() < 0.7
        self.mount.options = self._rng.choice(OPTIONS)

    def _die_in_recovery(self) -> None:
        """Kill while the images are being opened."""

        def open_them() -> None:
            with contextlib.suppress(OSError):
                for name in self._names:
                    os.close(os.open(self.mount.mountpoint / name, os.O_RDWR))

        opening = threading.Thread(target=open_them)
        opening.start()
        time.sleep(0.15 * self._rng.random())
        self._kill()
        opening.join()
        self.figures["kills in recovery"] += 1

    def verify(self) -> None:
        """Compare every block with what was promised.

        Raises:
            Lost: a block is something else, cannot be read, or the daemon sounds an alarm.
        """
        for name, promises in zip(self._names, self._promises, strict=True):
            try:
                self._verify_image(name, promises)
            except (OSError, Lost) as exc:
                log = self.mount.log_text()
                raise Lost(f"{name}, {dict(self.figures)}: {exc}\n{log}") from exc
        log = self.mount.log_text()
        if any(alarm in log for alarm in ALARMS):
            raise Lost(f"the daemon says\n{log}")

    def _verify_image(self, name: str, promises: Promises) -> None:
        how = self._rng.choice((0, os.O_DIRECT))
        fd = os.open(self.mount.mountpoint / name, os.O_RDONLY | os.O_CLOEXEC | how)
        try:
            for offset in range(0, IMAGE_SIZE, PIECE):
                self.mount.beat()
                found = os.pread(fd, PIECE, offset)
                if len(found) != PIECE:
                    raise Lost(f"{len(found)} bytes at {offset}, not {PIECE}")
                self.figures["blocks left old"] += promises.adopt(offset, found)
        finally:
            os.close(fd)

    def end(self) -> None:
        """End the writers."""
        for workers in self._workers:
            for worker in workers:
                worker.end()


def besiege(mount: Mount, rng: random.Random, kills: int, images: int = IMAGES) -> Counter[str]:
    """Kill the daemons of a mount so many times; not mounted before, nor afterwards.

    Raises:
        Lost: something is wrong.
    """
    with contextlib.ExitStack() as stack:
        siege = Siege(mount, rng, images)
        stack.callback(siege.end)
        stack.callback(mount.abandon)
        siege.draw_options()
        mount.start()
        siege.run(kills)
        mount.finish()
        return siege.figures


def batch(base: Path, seed: int, number: int, kills: int) -> Counter[str]:
    """Do one batch in an empty directory.

    Raises:
        Lost: something is wrong.
    """
    mount = HostMount(base)
    try:
        for image in range(IMAGES):
            path = mount.host.images / f"disk{image}.sealed"
            mount.host.run("create", path, "--size", str(IMAGE_SIZE), "--vm-id", f"vm{image}")
        figures = besiege(mount, random.Random(f"torture kills {seed} {number}"), kills)
        for image in range(IMAGES):
            mount.host.run("check", "--data", mount.host.images / f"disk{image}.sealed")
        return figures
    finally:
        mount.abandon()


def seal_all(mount_state: Path, source: Path, images: int) -> None:
    """Make the images for a mount without a TPM."""
    for image in range(images):
        path = source / f"disk{image}.sealed"
        seal_new(mount_state, path, vm_id=f"vm{image}", size=IMAGE_SIZE)


def run_batch(record: Record, seed: int, number: int, kills: int, directory: Path | None) -> bool:
    """Do one batch and note what came of it; return whether all was well."""
    base = Path(tempfile.mkdtemp(prefix="kills-", dir=directory))
    began = time.monotonic()
    failure, figures = None, Counter({"failures": 1})
    try:
        figures = batch(base, seed, number, kills)
        shutil.rmtree(base)
    except (Lost, AssertionError, OSError) as exc:
        failure = f"{type(exc).__name__}: {exc}"
        print(f"FAILED, batch {number}, kept in {base}: {failure}", flush=True)
    seconds = round(time.monotonic() - began, 1)
    entry = {"kills": figures["kills"], "seconds": seconds, "failure": failure}
    record.note(number, entry, figures, seconds)
    return failure is None


def main() -> int:
    """Kill until it was done as often as asked for; 1 at the first failure."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(prog="tools/torture kills")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--per-batch", type=int, default=KILLS_IN_BATCH)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="Where the progress is kept.")
    parser.add_argument("--summary", type=Path, help="Write what was reached, as JSON.")
    parser.add_argument("--directory", type=Path, help="Where to work; default: a temporary one.")
    parser.add_argument("--replay", type=int, metavar="BATCH")
    chosen = parser.parse_args()
    record = Record(state_path(chosen.state, "kills"), "kills", seed=chosen.seed)
    if record.document["seed"] != chosen.seed:
        sys.exit(f"seed {chosen.seed}: what was reached is of seed {record.document['seed']}")
    one = (chosen.seed, chosen.replay, chosen.per_batch, chosen.directory)
    if chosen.replay is not None:
        is_well = run_batch(record, *one)
        print(f"batch {chosen.replay}: {record.document['batches'][str(chosen.replay)]}")
        return 0 if is_well else 1
    numbers = record.wanted()
    is_well = True
    with contextlib.suppress(KeyboardInterrupt):
        while is_well and record.document["figures"].get("kills", 0) < chosen.kills:
            is_well = run_batch(
                record, chosen.seed, next(numbers), chosen.per_batch, chosen.directory
            )
            record.save()
            print(record.line(), file=sys.stderr, flush=True)
    if chosen.summary is not None:
        chosen.summary.write_text(record.text())
    is_reached: bool = record.document["figures"].get("kills", 0) >= chosen.kills
    return 0 if is_well and is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
