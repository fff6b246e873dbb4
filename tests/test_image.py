"""SealedImage as a disk: its operations interleaved, and what went wrong there once.

`Scheduler` drives several generators of one image by hand, as the
mount does: code between two yields runs whole, the work that was yielded runs some time later, and
in the middle of a work, at each of its calls of the storage, the owner's thread goes on with other
operations. Every choice comes from the seed.

The oracle of the interleaving knows *sectors* of 512 bytes, each a register: a read may return
what a write wrote unless another write lies wholly between the two in time; a discard, and what a
shrink cuts off, is a write of zeros. So a stale byte, a lost write, a byte that comes back from
the dead are each a failure. At the end everything is quiet: each sector is then read again, after
a flush and a lost page cache too, no slot is busy that nothing names, and `check` is clean.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from sending import sent
from simulation import SimulatedStorage

from sealfs.errors import BlockDamaged, SealfsError
from sealfs.image import committer, tree
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.steps import Steps, run

PAGE = 4096
SECTOR = 512
KEY = hashlib.sha256(b"image key").digest()
IDENTITY = Identity(uuid=bytes(range(16)), vm_id="vm", kmi="vm")
SMALL = Geometry(
    group_blocks=4, fanout=4, depth=2, header_pages=6, identity_pages=1, journal_pages=24
)


def seeded(label: object) -> Callable[[int], bytes]:
    numbers = itertools.count()
    return lambda size: hashlib.shake_256(f"{label}|{next(numbers)}".encode()).digest(size)


def create(size: int, geometry: Geometry = SMALL) -> SimulatedStorage:
    storage = SimulatedStorage()
    SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=geometry)
    return storage


def opened(
    storage: SimulatedStorage, *, cache: BlockCache | None = None, label: object = 0,
    geometry: Geometry = SMALL, record_roots: bool = False,
) -> SealedImage:  # fmt: skip
    return SealedImage.open(
        storage,
        image_key=KEY,
        cache=cache or BlockCache(64 * PAGE, 64 * PAGE),
        random=seeded(label),
        geometry=geometry,
        record_roots=record_roots,
    )


def fill(value: int, blocks: int = 1) -> bytes:
    return bytes([value]) * (blocks * PAGE)


def slots_named(image: SealedImage) -> int:
    """Slots in use: groups, and chunks with a node page or room for one."""
    volume = image._volume
    chunks = set(volume.tree.chunks()) | {slot for slot, _ in volume.allocator._free_nodes}
    return len(chunks) + len(list(volume.tree.groups()))


# -- interleaving


@dataclass(eq=False)
class Wrote:
    """Sectors written with one value; `end` is None until it has been accepted."""

    value: int
    start: int
    end: int | None = None


class Registers:
    """What each sector may be read as."""

    def __init__(self, sector_count: int) -> None:
        self._clock = itertools.count(1)
        self._wrote = [[Wrote(0, 0, 0)] for _ in range(sector_count)]
        self._all: list[Wrote] = []

    def now(self) -> int:
        return next(self._clock)

    def begin(self, first: int, stop: int, value: int) -> Wrote:
        wrote = Wrote(value, self.now())
        for sector in range(first, stop):
            self._wrote[sector].append(wrote)
        return wrote

    def cancel(self, wrote: Wrote) -> None:
        """It was not accepted."""
        for each in self._wrote:
            if wrote in each:
                each.remove(wrote)

    def accept(self, wrote: Wrote) -> None:
        wrote.end = self.now()

    def complaint(self, first: int, content: bytes, start: int) -> str | None:
        """Return what is wrong with a read of `content` that began at `start`."""
        for at in range(0, len(content), SECTOR):
            sector = first + at // SECTOR
            piece = content[at : at + SECTOR]
            value = int.from_bytes(piece[:4], "little")
            if piece != struct.pack("<I", value) * (SECTOR // 4):
                return f"sector {sector} is a mix"
            writers = self._wrote[sector]
            done = [w.start for w in writers if w.end is not None and w.end < start]
            newest = max(done, default=0)
            allowed = {w.value for w in writers if w.end is None or w.end >= newest}
            if value not in allowed:
                return f"sector {sector} reads {value}, allowed {sorted(allowed)}"
        return None


def content_of(value: int, sectors: int) -> bytes:
    return struct.pack("<I", value) * (sectors * SECTOR // 4)


@dataclass(eq=False)
class Task:
    """A generator under way."""

    name: str
    steps: Steps[Any]
    done: Callable[[Any], None]
    is_exclusive: bool = False
    work: Callable[[], Any] | None = None
    result: tuple[Any, BaseException | None] | None = None
    is_busy: bool = False


@dataclass
class Scheduler:
    """Interleaves operations of one image; see the module."""

    seed: int
    blocks: int = 40
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(self.seed)
        self.sector_max = 64 * 8
        self.registers = Registers(self.sector_max)
        self.values = itertools.count(1)
        self.storage = create(self.blocks * PAGE)
        self.cache = BlockCache(rng.choice((0, 2, 64)) * PAGE, rng.choice((12, 24, 64)) * PAGE)
        self.has_roots = rng.random() < 0.2
        self.image = opened(
            self.storage, cache=self.cache, label=self.seed, record_roots=self.has_roots
        )
        self.tasks: list[Task] = []
        self.depth = 0
        self.slow = rng.choice((0.0, 0.5))
        nowait = self.storage.read_nowait
        self.storage.read_nowait = (  # type: ignore[method-assign]
            lambda offset, buffer: self.rng.random() >= self.slow and nowait(offset, buffer)
        )
        self.storage.on_call = lambda name, offset, size: self.meanwhile()
        self.storage.on_read = lambda name, offset, size: self.meanwhile()

    def fail(self, text: str) -> AssertionError:
        tail = "\n".join(self.log[-60:])
        return AssertionError(f"{text}\nseed {self.seed}\n{tail}")

    # -- operations

    def begin(self) -> None:
        """Begin one more operation."""
        rng = self.rng
        exclusive = any(task.is_exclusive for task in self.tasks)
        kinds = ["read", "read", "write", "write", "try_read", "try_write", "seek"]
        if not exclusive:
            kinds += ["flush", "flush", "checkpoint", "discard", "discard", "resize", "preallocate"]
        kind = rng.choice(kinds)
        sectors = self.image.size // SECTOR
        if kind in ("read", "write", "discard", "preallocate", "try_read", "try_write"):
            if sectors == 0:
                return
            first = rng.randrange(sectors)
            if rng.random() < 0.6:
                first -= first % 8
            count = rng.choice((1, 3, 8, 8, 8, 16, 32, 32, 72))
            if rng.random() < 0.3:
                first -= first % 32
            stop = min(first + count, sectors)
            if kind in ("write", "try_write") and rng.random() < 0.1:
                first = sectors
                stop = min(first + count, self.sector_max)
                if first == stop:
                    return
            if kind == "discard" and rng.random() < 0.3:
                stop = sectors
        else:
            first = stop = 0
        getattr(self, f"begin_{kind}")(first, stop)

    def add(
        self, name: str, steps: Steps[Any], done: Callable[[Any], None], *, exclusive: bool = False
    ) -> None:
        self.log.append(f"begin {name}")
        task = Task(name, steps, done, exclusive)
        self.tasks.append(task)
        self.advance(task)

    def begin_read(self, first: int, stop: int) -> None:
        start = self.registers.now()

        def done(content: Any) -> None:
            if complaint := self.registers.complaint(first, bytes(content), start):
                raise self.fail(f"read {first}-{stop}: {complaint}")

        self.add(
            f"read {first}-{stop}",
            self.image.read_steps(first * SECTOR, (stop - first) * SECTOR),
            done,
        )

    def begin_try_read(self, first: int, stop: int) -> None:
        start = self.registers.now()
        offset, size = first * SECTOR, (stop - first) * SECTOR
        content: Any = None
        if size >= PAGE and self.rng.random() < 0.7:
            first = offset // PAGE * (PAGE // SECTOR)  # as the lane answers most reads
            count = 1 + self.rng.randrange(3)
            content = sent(self.image, first * SECTOR, count * PAGE)
        else:
            content = self.image.try_read(offset, size)
        if content is None:
            return
        self.log.append(f"try_read {first}-{stop}")
        if complaint := self.registers.complaint(first, bytes(content), start):
            raise self.fail(f"try_read {first}-{stop}: {complaint}")

    def begin_write(self, first: int, stop: int) -> None:
        value = next(self.values)
        wrote = self.registers.begin(first, stop, value)

        def done(accepted: Any) -> None:
            (self.registers.accept if accepted else self.registers.cancel)(wrote)
            self.log.append(f"write {first}-{stop} = {value} accepted: {accepted}")

        data = content_of(value, stop - first)
        self.add(
            f"write {first}-{stop} = {value}", self.image.write_steps(first * SECTOR, data), done
        )

    def begin_try_write(self, first: int, stop: int) -> None:
        value = next(self.values)
        wrote = self.registers.begin(first, stop, value)
        accepted = self.image.try_write(first * SECTOR, content_of(value, stop - first))
        (self.registers.accept if accepted else self.registers.cancel)(wrote)
        self.log.append(f"try_write {first}-{stop} = {value} accepted: {accepted}")

    def exclusive(self, name: str, steps: Steps[Any], wrote: Wrote | None = None) -> None:
        def done(_: Any) -> None:
            self.log.append(f"done {name}")
            if wrote is not None:
                self.registers.accept(wrote)

        self.add(name, steps, done, exclusive=True)

    def begin_flush(self, first: int, stop: int) -> None:
        self.exclusive("flush", self.image.flush_steps())

    def begin_checkpoint(self, first: int, stop: int) -> None:
        self.exclusive("checkpoint", self.image.checkpoint_steps())

    def begin_discard(self, first: int, stop: int) -> None:
        wrote = self.registers.begin(first, stop, 0)
        steps = self.image.discard_steps(first * SECTOR, (stop - first) * SECTOR)
        self.exclusive(f"discard {first}-{stop}", steps, wrote)

    def begin_resize(self, first: int, stop: int) -> None:
        size = self.rng.randrange(8 * 8, self.sector_max + 1)
        if self.rng.random() < 0.5:
            size -= size % 8
        # Zeros also when it is to grow: a write may make the disk longer still meanwhile.
        wrote = self.registers.begin(size, self.sector_max, 0)
        self.exclusive(f"resize {size}", self.image.resize_steps(size * SECTOR), wrote)

    def begin_preallocate(self, first: int, stop: int) -> None:
        steps = self.image.preallocate_steps(first * SECTOR, (stop - first) * SECTOR)
        self.exclusive(f"preallocate {first}-{stop}", steps)

    def begin_seek(self, first: int, stop: int) -> None:
        offset = self.rng.randrange(max(1, self.image.size))
        whence = self.rng.choice((os.SEEK_DATA, os.SEEK_HOLE))

        def done(found: Any) -> None:
            if found is not None and found < min(offset, self.image.size):
                raise self.fail(f"seek from {offset} found {found}")

        self.add(f"seek {offset}", self.image.seek_steps(offset, whence), done)

    # -- driving

    def advance(self, task: Task) -> None:
        """Run a generator's code to its next yield, in the owner's thread."""
        result, error = task.result or (None, None)
        task.result = None
        try:
            if error is not None:
                task.work = task.steps.throw(error)
            else:
                task.work = task.steps.send(result)
        except StopIteration as stop:
            self.tasks.remove(task)
            task.done(stop.value)
        except SealfsError as exc:
            raise self.fail(f"{task.name} failed: {exc!r}") from exc

    def run_work(self, task: Task) -> None:
        """Run what a generator has yielded, in a worker."""
        work, task.work = task.work, None
        assert work is not None
        task.is_busy = True
        try:
            task.result = (work(), None)
        except SealfsError as exc:
            task.result = (None, exc)
        finally:
            task.is_busy = False

    def meanwhile(self) -> None:
        """The owner's thread goes on while a worker is in a call of the storage."""
        if self.depth and self.depth < 3 and self.rng.random() < 0.3:
            for _ in range(self.rng.randrange(1, 4)):
                self.step()

    def step(self, *, can_begin: bool = True) -> None:
        """Do one thing: begin an operation, run a work, or go on after one."""
        ready = [task for task in self.tasks if task.result is not None]
        waiting = [task for task in self.tasks if task.work is not None and not task.is_busy]
        choices = ["advance"] * bool(ready) + ["work"] * bool(waiting)
        if can_begin and len(self.tasks) < 5:
            choices.append("begin")
        if not choices:
            return
        self.depth += 1
        try:
            match self.rng.choice(choices):
                case "advance":
                    self.owner(lambda: self.advance(self.rng.choice(ready)))
                case "work":
                    self.run_work(self.rng.choice(waiting))
                case "begin":
                    self.owner(self.begin)
        finally:
            self.depth -= 1

    def owner(self, act: Callable[[], None]) -> None:
        """Owner code is never interrupted."""
        depth, self.depth = self.depth, 0
        try:
            act()
        finally:
            self.depth = depth

    def settle(self) -> None:
        """Let everything end."""
        for _ in range(10_000):
            if not self.tasks:
                return
            self.step(can_begin=False)
        raise self.fail("operations do not end")

    def verify(self, stage: str) -> bytes:
        start = self.registers.now()
        content = self.image.read(0, self.image.size)
        if len(content) != self.image.size:
            raise self.fail(f"{stage}: {len(content)} bytes of {self.image.size}")
        if complaint := self.registers.complaint(0, content, start):
            raise self.fail(f"{stage}: {complaint}")
        return content

    def finish(self) -> None:
        self.settle()
        self.verify("at the end")
        self.image.flush()
        content = self.verify("after a flush")
        self.image.checkpoint()
        used, named = self.image.status()["slots_used"], slots_named(self.image)
        if used != named:
            raise self.fail(f"{used} slots are busy, {named} are named")
        if findings := self.image.check(data=True):
            raise self.fail(f"check: {findings}")
        size = self.image.size
        self.image.abandon()
        if self.cache.dirty_size or self.cache.clean_size:
            raise self.fail("the cache did not get everything back")
        disk = self.storage.disk
        crashed = SimulatedStorage(disk.crash(("o",) * len(disk.pending)))
        self.image = opened(crashed, label=f"{self.seed} again")
        if self.image.size != size or self.verify("reopened") != content:
            raise self.fail("what was flushed is not what is read after reopening")


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks make a big commit, and few leaf pages stay in memory."""
    monkeypatch.setattr(committer, "SMALL_COMMIT_BLOCKS", 3)
    monkeypatch.setattr(tree, "LEAVES_MAX", 3)


def interleave(seed: int, steps: int = 120) -> None:
    scheduler = Scheduler(seed)
    for _ in range(steps):
        scheduler.step()
    scheduler.finish()


SEEDS = 600
GROUPS_OF_SEEDS = 12


@pytest.mark.parametrize("part", range(GROUPS_OF_SEEDS))
def test_interleaved_operations_lose_nothing_and_read_nothing_stale(part: int) -> None:
    for seed in range(part, SEEDS, GROUPS_OF_SEEDS):
        interleave(seed)


@pytest.mark.parametrize("part", range(GROUPS_OF_SEEDS))
@pytest.mark.usefixtures("small_limits")
def test_interleaved_operations_are_right_when_little_stays_in_memory(part: int) -> None:
    for seed in range(SEEDS + part, 2 * SEEDS, GROUPS_OF_SEEDS):
        interleave(seed)


# -- what went wrong once, alone


def finish(steps: Steps[Any], work: Callable[[], Any]) -> None:
    """Run the work that was yielded last, and what comes after it."""
    try:
        while True:
            work = steps.send(work())
    except StopIteration:
        return


def test_a_read_during_a_discard_leaves_nothing_stale_behind() -> None:
    image = opened(create(40 * PAGE))
    image.write(0, fill(1))
    image.checkpoint()
    steps = image.discard_steps(0, PAGE)
    work = next(steps)
    image.read(0, PAGE)
    finish(steps, work)
    assert image.read(0, PAGE) == bytes(PAGE)


def test_a_partial_write_during_a_discard_brings_nothing_back() -> None:
    image = opened(create(40 * PAGE))
    image.write(0, fill(1, 2))
    image.flush()
    image.write(0, fill(2))
    steps = image.discard_steps(0, PAGE)
    work = next(steps)
    run(image.write_steps(512, b"new" * 100))
    finish(steps, work)
    assert image.read(0, 512) == bytes(512)
    # The two were under way at once: either may be the later one, but nothing older is back.
    assert image.read(512, 300) in (b"new" * 100, bytes(300))


def test_a_write_behind_the_end_survives_a_discard_up_to_the_old_end() -> None:
    storage = create(10 * PAGE + 100)
    image = opened(storage)
    image.write(8 * PAGE, fill(1, 2))
    image.close()
    storage.reopen()
    image = opened(storage, label=1)
    steps = image.discard_steps(9 * PAGE, PAGE + 100)
    work = next(steps)
    assert run(image.write_steps(10 * PAGE + 100, b"x" * 200))
    finish(steps, work)
    assert image.read(10 * PAGE, 300) == bytes(100) + b"x" * 200


def test_a_write_into_a_group_whose_first_commit_is_under_way_uses_its_slot() -> None:
    image = opened(create(40 * PAGE))
    image.write(0, fill(1))
    steps = image.flush_steps()
    work = next(steps)
    image.write(PAGE, fill(2))
    finish(steps, work)
    image.checkpoint()
    assert image.status()["slots_used"] == slots_named(image) == 2


def test_a_checkpoint_forgets_no_leaf_page_before_it_is_written(
    small_limits: None,
) -> None:
    storage = create(40 * PAGE)
    image = opened(storage, cache=BlockCache(0, 64 * PAGE))
    for block in range(0, 40, 4):
        image.write(block * PAGE, fill(block + 1))
    image.flush()
    failures: list[BlockDamaged] = []

    def read_all(name: str, offset: int, size: int) -> None:
        for block in range(0, 40, 4):
            try:
                assert run(image.read_steps(block * PAGE, PAGE)) == fill(block + 1)
            except BlockDamaged as exc:
                failures.append(exc)

    steps = image.checkpoint_steps()
    work = next(steps)
    storage.on_call = read_all
    finish(steps, work)
    assert failures == []


def test_zeroing_an_edge_does_not_spin_while_another_image_fills_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = BlockCache(8 * PAGE, 8 * PAGE)
    full, other = opened(create(40 * PAGE), cache=cache), opened(create(40 * PAGE), cache=cache)
    full.write(0, fill(1, 8))
    flush_steps, calls = other.flush_steps, itertools.count(1)

    def counted() -> Steps[None]:
        assert next(calls) < 100, "it spins in the owner's thread"
        return flush_steps()

    monkeypatch.setattr(other, "flush_steps", counted)
    steps = other.discard_steps(100, 5000)
    try:
        work = next(steps)
        while True:
            full.flush()  # what the mount does meanwhile
            work = steps.send(work())
    except StopIteration:
        pass
