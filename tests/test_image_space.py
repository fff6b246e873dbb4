"""Space: ENOSPC belongs to the write that needs it, and what is given up comes back.

`FullStorage` counts pages as a file system does: a page is had once it was reserved or written,
until it is punched or cut off. When the room is used up `allocate` answers NoSpace, and a write to
a page that nobody reserved fails as a disk fails: it would poison the image. So FORMAT.md 8.4,
"commit and checkpoint need no new space", is one assertion: nothing but NoSpace, and that only of
write and preallocate (and discard and resize, before they begin). Then the same on real files, and
on a file system that is really full.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import test_image
from simulation import SimulatedDisk, SimulatedStorage
from test_image import IDENTITY, KEY, PAGE, SECTOR, Scheduler, Task, content_of, fill, opened

from sealfs.errors import NoSpace, SealfsError, StorageFailed
from sealfs.image import cipher, committer, recovery, volume
from sealfs.image.cache import BlockCache
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry, geometry_for
from sealfs.image.plan import Buffer
from sealfs.image.storage import FileStorage

MIB = 1 << 20
SMALL = Geometry(
    group_blocks=4, fanout=4, depth=2, header_pages=4, identity_pages=1, journal_pages=24
)
UNLIMITED = 1 << 40


def pages_of(offset: int, size: int) -> range:
    return range(offset // PAGE, -(-(offset + size) // PAGE))


class FullStorage(SimulatedStorage):
    """A simulated disk with `room` pages for everything."""

    def __init__(self, disk: SimulatedDisk | None = None) -> None:
        super().__init__(disk)
        self.used: set[int] = set()
        self.written: set[int] = set()
        self.room = UNLIMITED

    def _need(self, offset: int, size: int, error: type[SealfsError]) -> None:
        new = set(pages_of(offset, size)) - self.used
        if len(self.used) + len(new) > self.room:
            raise error(self.path, f"no space at page {offset // PAGE}: simulated")
        self.used |= new

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        size = sum(map(len, buffers))
        self._need(offset, size, StorageFailed)
        self.written.update(pages_of(offset, size))
        super().write(offset, buffers)

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        size = sum(map(len, buffers))
        self._need(offset, size, StorageFailed)
        self.written.update(pages_of(offset, size))
        super().write_durable(offset, buffers)

    def allocate(self, offset: int, size: int) -> None:
        self._need(offset, size, NoSpace)
        super().allocate(offset, size)

    def punch(self, offset: int, size: int) -> None:
        self.used -= set(range(-(-offset // PAGE), (offset + size) // PAGE))
        super().punch(offset, size)

    def truncate(self, size: int) -> None:
        # Growing keeps what was reserved past the end, as ext4 and xfs do.
        if size <= self.size():
            self.used = {page for page in self.used if page * PAGE < size}
        super().truncate(size)


def create(size: int, geometry: Geometry = SMALL) -> FullStorage:
    storage = FullStorage()
    SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=geometry)
    return storage


def reopened(storage: FullStorage, geometry: Geometry, label: object) -> SealedImage:
    """Open again; recovery may need a node chunk of its own (FORMAT.md 8.4)."""
    storage.reopen()
    for _ in range(20):
        try:
            return opened(storage, label=label, geometry=geometry)
        except NoSpace:
            storage.room += 10
    raise AssertionError("an image that has room does not open")


def refusal_of(sealed: SealedImage, offset: int, data: bytes) -> str:
    """Write; return the text of NoSpace, empty when the write was accepted."""
    try:
        sealed.write(offset, data)
    except NoSpace as exc:
        return str(exc)
    return ""


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committer, "SMALL_COMMIT_BLOCKS", 3)


# -- nothing but the write that needs the space meets its end


KINDS = (
    *("write", "write", "write", "groups", "groups", "flush", "checkpoint", "discard", "discard"),
    *("groups_gone", "shrink", "preallocate", "close", "kill"),
)


def fill_up(seed: int) -> int:
    """Work on an image in a storage that is full soon; return how often it was."""
    rng = random.Random(seed)
    geometry = Geometry(
        group_blocks=4,
        fanout=rng.choice((2, 4)),
        depth=rng.choice((2, 3)),
        header_pages=4,
        identity_pages=1,
        journal_pages=rng.choice((12, 24)),
    )
    blocks = min(geometry.size_max // PAGE, 64)
    storage = create(blocks * PAGE, geometry)
    sealed = opened(storage, label=seed, geometry=geometry)
    model = [0] * blocks
    first = rng.choice((1, 4, 7))
    sealed.write(0, fill(0xFF, first))
    model[:first] = [0xFF] * first
    sealed.flush()
    storage.room = len(storage.used) + rng.randrange(50)
    refused = 0
    values = itertools.cycle(range(1, 250))
    log: list[tuple[str, int, int]] = []
    for number in range(rng.choice((10, 40))):
        kind = rng.choice(KINDS)
        at = rng.randrange(blocks)
        count = min(rng.choice((1, 1, 3, 4, 9)), blocks - at)
        if kind.startswith("groups"):
            at -= at % 4
            count = min(4 * rng.choice((1, 2, 4)), blocks - at)
        log.append((kind, at, count))
        try:
            match kind:
                case "write" | "groups":
                    value = next(values)
                    try:
                        sealed.write(at * PAGE, fill(value, count))
                    except NoSpace:
                        refused += 1
                    else:
                        model[at : at + count] = [value] * count
                case "preallocate":
                    try:
                        sealed.preallocate(at * PAGE, count * PAGE)
                    except NoSpace:
                        refused += 1
                case "flush":
                    sealed.flush()
                case "checkpoint":
                    sealed.checkpoint()
                case "discard" | "groups_gone":
                    sealed.discard(at * PAGE, count * PAGE)
                    model[at : at + count] = [0] * count
                case "shrink":
                    sealed.resize(at * PAGE)
                    sealed.resize(blocks * PAGE)
                    model[at:] = [0] * (blocks - at)
                case "close":
                    sealed.close()
                    sealed = reopened(storage, geometry, f"{seed}.{number}")
                case "kill":
                    sealed.flush()
                    sealed.abandon()
                    sealed = reopened(storage, geometry, f"{seed}.{number}")
        except SealfsError as exc:
            raise AssertionError(f"seed {seed}: {exc!r}\n{log}") from exc
        assert sealed.poisoned is None, (seed, log)
        expected = b"".join(bytes([value]) * PAGE for value in model)
        assert sealed.read(0, blocks * PAGE) == expected, (seed, log)
    sealed.checkpoint()
    assert sealed.check(data=True) == [], (seed, log)
    sealed.close()
    return refused


@pytest.mark.parametrize("part", range(4))
@pytest.mark.usefixtures("small_commits")
def test_a_full_storage_refuses_writes_and_fails_nothing_else(part: int) -> None:
    refused = sum(fill_up(seed) for seed in range(part, 240, 4))
    assert refused > 40


class FullScheduler(Scheduler):
    """The scheduler of test_image.py, in a storage that is full soon."""

    refused = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.storage, FullStorage)
        self.storage.room = len(self.storage.used) + self.rng.randrange(5, 70)

    def begin_try_write(self, first: int, stop: int) -> None:
        value = next(self.values)
        wrote = self.registers.begin(first, stop, value)
        try:
            accepted = self.image.try_write(first * SECTOR, content_of(value, stop - first))
        except NoSpace:
            accepted = False
            self.refused += 1
        (self.registers.accept if accepted else self.registers.cancel)(wrote)
        self.log.append(f"try_write {first}-{stop} = {value} accepted: {accepted}")

    def advance(self, task: Task) -> None:
        result, error = task.result or (None, None)
        task.result = None
        try:
            task.work = task.steps.throw(error) if error else task.steps.send(result)
        except StopIteration as stop:
            self.tasks.remove(task)
            task.done(stop.value)
        except NoSpace as exc:
            kind = task.name.split()[0]
            if kind in ("flush", "checkpoint", "read", "seek") or self.image.poisoned:
                raise self.fail(f"{task.name}: {exc!r}") from exc
            self.log.append(f"NoSpace {task.name}")
            self.refused += 1
            self.tasks.remove(task)
            if kind == "write":
                task.done(False)
        except SealfsError as exc:
            raise self.fail(f"{task.name} failed: {exc!r}") from exc


@pytest.mark.parametrize("part", range(4))
@pytest.mark.usefixtures("small_commits")
def test_interleaved_operations_in_a_full_storage_fail_nothing_but_writes(
    part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_image, "create", lambda size: create(size, test_image.SMALL))
    refused = 0
    for seed in range(part, 120, 4):
        scheduler = FullScheduler(seed)
        for _ in range(120):
            scheduler.step()
        scheduler.finish()
        refused += scheduler.refused
    assert refused > 30


def test_a_slot_that_a_preallocation_is_about_to_give_is_nobody_elses() -> None:
    storage = create(40 * PAGE)
    sealed = opened(storage, geometry=SMALL)
    sealed.write(0, fill(1))
    sealed.checkpoint()
    steps = sealed.preallocate_steps(4 * PAGE, 4 * PAGE)
    work = next(steps)
    work = steps.send(work())  # the slot has its space; the record that names it is to be written
    storage.room = len(storage.used)
    with pytest.raises(NoSpace):
        sealed.write(8 * PAGE, fill(3))
    with pytest.raises(NoSpace):
        sealed.try_write(12 * PAGE, fill(4))
    test_image.finish(steps, work)
    sealed.write(4 * PAGE, fill(7))
    sealed.checkpoint()
    assert sealed.poisoned is None
    slots = [sealed._volume.tree.slot_of(group) for group in sealed._volume.tree.groups()]
    assert len(slots) == len(set(slots)) == 2
    sealed.abandon()
    storage.reopen()
    again = opened(storage, geometry=SMALL, label=1)
    assert again.read(0, 16 * PAGE) == fill(1) + bytes(3 * PAGE) + fill(7) + bytes(11 * PAGE)


def test_what_was_preallocated_can_be_written_in_a_full_storage() -> None:
    storage = create(40 * PAGE)
    sealed = opened(storage, geometry=SMALL)
    sealed.preallocate(0, 20 * PAGE)
    sealed.checkpoint()
    storage.room = len(storage.used)
    for _ in range(5):
        for block in range(20):
            sealed.write(block * PAGE, fill(block + 1))
        sealed.flush()
    with pytest.raises(NoSpace):
        sealed.write(20 * PAGE, fill(9))
    sealed.close()
    assert sealed.poisoned is None


# -- copies that have lost the space the original had

Action = Callable[[SealedImage], None]
FIRST_CHANGES: dict[str, Action] = {
    "discard": lambda sealed: sealed.discard(0, PAGE),
    "shrink": lambda sealed: sealed.resize(6 * PAGE),
    "grow": lambda sealed: sealed.resize(60 * PAGE),
    "write": lambda sealed: sealed.write(20 * PAGE, fill(2)),
    "overwrite": lambda sealed: sealed.write(0, fill(2)),
}


def sparse_copy(storage: FullStorage, *, of_zeros: bool) -> FullStorage:
    """Copy with holes where the original has zeros, or only where it was never written."""
    content = storage.disk.cached
    copy = FullStorage(SimulatedDisk.of(content))
    pages = range(len(content) // PAGE)
    if of_zeros:
        copy.used = {page for page in pages if any(content[page * PAGE : (page + 1) * PAGE])}
    else:
        copy.used = set(storage.written)
    return copy


@pytest.mark.parametrize("of_zeros", [True, False])
@pytest.mark.parametrize("name", FIRST_CHANGES)
def test_a_sparse_copy_in_a_full_storage_refuses_its_first_change_or_completes_it(
    name: str, of_zeros: bool
) -> None:
    refused = done = 0
    for room in range(45):
        storage = create(40 * PAGE)
        sealed = opened(storage, geometry=SMALL)
        sealed.write(0, fill(1, 8))
        sealed.close()
        copy = sparse_copy(storage, of_zeros=of_zeros)
        copy.room = len(copy.used) + room
        sealed = opened(copy, geometry=SMALL, label=room)
        try:
            FIRST_CHANGES[name](sealed)
        except NoSpace:
            refused += 1
            assert sealed.read(0, 8 * PAGE) == fill(1, 8)
        else:
            done += 1
            sealed.checkpoint()
        assert sealed.poisoned is None, room
        sealed.close()
    assert done > 0
    assert refused > 0 or not of_zeros


# -- the epoch table

TABLE = Geometry(
    group_blocks=4, fanout=4, depth=3, header_pages=3, identity_pages=1, journal_pages=24
)


def test_rows_of_the_epoch_table_that_nobody_names_are_dropped() -> None:
    storage = create(256 * PAGE, TABLE)
    most = 0
    for number in range(250):
        sealed = opened(storage, geometry=TABLE, label=number)
        sealed.write(number % 3 * PAGE, fill(number % 250 + 1))
        sealed.close() if number % 2 else sealed.flush()
        most = max(most, sealed.status()["epochs"])
        sealed.abandon()
        storage.reopen()
    assert TABLE.table_rows_max * 8 // 10 < most <= TABLE.table_rows_max
    sealed = opened(storage, geometry=TABLE, label="last")
    assert sealed.read(0, 3 * PAGE) == fill(250) + fill(248) + fill(249)


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_full_epoch_table_refuses_writes_and_still_opens(is_killed: bool) -> None:
    storage = create(256 * PAGE, TABLE)
    written: dict[int, int] = {}
    for number in range(256):
        sealed = opened(storage, geometry=TABLE, label=number)
        if refusal := refusal_of(sealed, number * PAGE, fill(number % 250 + 1)):
            break
        written[number] = number % 250 + 1
        sealed.flush()
        sealed.abandon() if is_killed else sealed.close()
        storage.reopen()
    else:
        pytest.fail("the table never filled up")
    assert "the epoch table is full" in refusal
    assert "sealing some again makes room" in refusal
    assert len(written) >= (TABLE.table_rows_max // 2 if is_killed else TABLE.table_rows_max) - 5
    assert sealed.poisoned is None
    with pytest.raises(NoSpace, match="epoch table is full"):
        sealed.discard(0, PAGE)
    with pytest.raises(NoSpace, match="epoch table is full"):
        sealed.resize(PAGE)
    sealed.flush()
    sealed.checkpoint()
    for block, value in written.items():
        assert sealed.read(block * PAGE, PAGE) == fill(value)
    sealed.abandon()
    storage.reopen()
    sealed = opened(storage, geometry=TABLE, label="again")
    assert sealed.check(data=True) == []
    sealed.close()


def test_epochs_spent_in_one_session_end_in_a_refusal_and_an_image_that_opens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cipher, "EPOCH_BLOCKS_MAX", 1)
    storage = create(256 * PAGE, TABLE)
    sealed = opened(storage, geometry=TABLE)
    model: dict[int, int] = {}
    for block in range(256):
        if refusal := refusal_of(sealed, block * PAGE, fill(block % 250 + 1)):
            break
        model[block] = block % 250 + 1
        sealed.flush()
    assert "epoch table is full" in refusal
    assert sealed.poisoned is None
    sealed.abandon()
    storage.reopen()
    sealed = opened(storage, geometry=TABLE, label="again")
    for block, value in model.items():
        assert sealed.read(block * PAGE, PAGE) == fill(value)


# -- slots that wait for a checkpoint


def test_groups_rewritten_again_and_again_stay_within_the_bound_and_a_close_gives_it_back() -> None:
    groups = 100
    geometry = Geometry(
        group_blocks=4, fanout=16, depth=2, header_pages=4, identity_pages=1, journal_pages=64
    )
    storage = create(groups * 4 * PAGE, geometry)
    sealed = opened(storage, geometry=geometry, cache=BlockCache(0, 1024 * PAGE))
    slots: list[int] = []
    for number in range(10):
        sealed.write(0, fill(number + 1, groups * 4))
        sealed.flush()
        slots.append(sealed.status()["slots_used"])
    named = test_image.slots_named(sealed)
    assert max(slots) > named + groups // 2, "the groups were not moved"
    assert max(slots) <= named + volume.FREED_SLOTS_MAX
    # A commit has the slots of its next record before the checkpoint that frees the old ones.
    peak = named + volume.FREED_SLOTS_MAX + groups
    assert len(storage.used) * PAGE <= geometry.slot_offset(peak)
    sealed.close()
    storage.reopen()
    assert len(storage.used) * PAGE <= geometry.slot_offset(named)
    sealed = opened(storage, geometry=geometry, label=1)
    assert sealed.read(0, groups * 4 * PAGE) == fill(10, groups * 4)


# -- real files


def real(path: Path, size: int, geometry: Geometry | None = None) -> None:
    storage = FileStorage.create(path)
    SealedImage.create(
        storage,
        identity=IDENTITY,
        image_key=KEY,
        size=size,
        geometry=geometry or geometry_for(size),
    )
    storage.close()


def open_real(path: Path, cache: BlockCache | None = None) -> SealedImage:
    return SealedImage.open(
        FileStorage.open(path), image_key=KEY, cache=cache or BlockCache(MIB, 16 * MIB)
    )


def used(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_new_disk_of_10_gib_takes_66_mib(tmp_path: Path) -> None:
    path = tmp_path / "x.sealed"
    real(path, 10 << 30)
    chunk = 130 * PAGE
    assert path.stat().st_size == 66 * MIB + chunk
    assert 66 * MIB <= used(path) <= 66 * MIB + chunk + 64 * 1024


def test_a_full_disk_takes_what_the_capacity_formula_says(tmp_path: Path) -> None:
    path = tmp_path / "x.sealed"
    size = 64 * MIB
    real(path, size)
    sealed = open_real(path)
    for at in range(0, size, 4 * MIB):
        sealed.write(at, random.Random(at).randbytes(4 * MIB))
    sealed.close()
    groups, headers, journal, chunk = size // 128 // PAGE, 2 * MIB, 4 * MIB, 130 * PAGE
    formula = headers + journal + chunk + groups * 130 * PAGE
    assert path.stat().st_size == formula
    assert formula <= used(path) <= formula + 64 * 1024
    assert formula - headers - journal - chunk == size * 130 // 128


@pytest.mark.parametrize(
    ("offset", "size"), [(4 * MIB, 8 * MIB), (MIB // 2 + 3 * PAGE, 8 * MIB), (0, 16 * MIB)]
)
def test_discarded_space_goes_back_to_the_file_system(
    tmp_path: Path, offset: int, size: int
) -> None:
    path = tmp_path / "x.sealed"
    real(path, 16 * MIB)
    sealed = open_real(path)
    sealed.write(0, random.Random(0).randbytes(16 * MIB))
    sealed.checkpoint()
    before = used(path)
    sealed.discard(offset, size)
    sealed.checkpoint()
    assert before - used(path) >= size * 8 // 10
    sealed.write(offset, fill(1, 256))
    sealed.close()
    sealed = open_real(path)
    assert sealed.read(offset, 256 * PAGE) == fill(1, 256)
    sealed.close()


def test_a_shrunk_disk_is_a_shorter_file(tmp_path: Path) -> None:
    path = tmp_path / "x.sealed"
    real(path, 16 * MIB)
    sealed = open_real(path)
    sealed.write(0, random.Random(0).randbytes(16 * MIB))
    sealed.checkpoint()
    before = used(path)
    sealed.resize(4 * MIB)
    sealed.checkpoint()
    assert before - used(path) >= 12 * MIB * 8 // 10
    assert path.stat().st_size <= 3 * MIB + 9 * 130 * PAGE
    sealed.close()


def test_whole_groups_rewritten_on_a_real_file_leave_no_space_behind(tmp_path: Path) -> None:
    path = tmp_path / "x.sealed"
    real(path, 8 * MIB)
    sealed = open_real(path)
    for number in range(10):
        sealed.write(0, fill(number + 1, 2048))
        sealed.flush()
        # A commit has the slots of its next record before the checkpoint that frees the old ones.
        peak = 1 + 16 + volume.FREED_SLOTS_MAX + volume.RECORD_BLOCKS_MAX // 128
        assert used(path) <= 3 * MIB + peak * 130 * PAGE + 64 * 1024
    assert used(path) > 3 * MIB + 30 * 130 * PAGE, "the groups were not moved"
    sealed.close()
    assert used(path) <= 3 * MIB + (1 + 16) * 130 * PAGE + 64 * 1024


def test_a_sparse_copy_has_its_headers_again_before_its_first_change(tmp_path: Path) -> None:
    path, copy = tmp_path / "x.sealed", tmp_path / "copy.sealed"
    real(path, 16 * MIB)
    sealed = open_real(path)
    sealed.write(0, random.Random(0).randbytes(MIB))
    sealed.close()
    subprocess.run(["cp", "--sparse=always", path, copy], check=True)
    assert used(copy) < used(path) - 2 * MIB
    sealed = open_real(copy)
    sealed.write(PAGE, fill(1))
    assert used(copy) >= 3 * MIB + 130 * PAGE
    sealed.close()
    sealed = open_real(copy)
    assert sealed.read(PAGE, PAGE) == fill(1)
    sealed.close()


# -- large disks


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_many_large_disks_in_one_process_take_memory_for_their_content_only(
    tmp_path: Path,
) -> None:
    geometry = Geometry(journal_pages=256)
    paths = [tmp_path / f"{number}.sealed" for number in range(6)]
    for path in paths:
        real(path, 1 << 40, geometry)
        sealed = open_real(path)
        for at in (0, 1 << 39, (1 << 40) - 2 * MIB):
            sealed.write(at, random.Random(at).randbytes(2 * MIB))
        sealed.close()
    before = resident()
    cache = BlockCache()
    images = [open_real(path, cache) for path in paths]
    for sealed in images:
        # Three ways down the tree: 3 pages on level 1, 3 on level 2, 2 and 1 above at most.
        assert sum(map(len, sealed._volume.tree.nodes)) <= 9
        assert len(sealed._volume.allocator._busy) < 64
        assert sealed.read(1 << 39, PAGE) == random.Random(1 << 39).randbytes(2 * MIB)[:PAGE]
    assert resident() - before < 48 * MIB
    for sealed in images:
        sealed.close()


# -- a file system that is really full


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    device, mountpoint = tmp_path / "device", tmp_path / "mounted"
    with device.open("wb") as file:
        file.truncate(48 * MIB)
    mountpoint.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", device], check=True)
    done = subprocess.run(
        ["mount", "-o", "loop", device, mountpoint], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no loop mount here: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", mountpoint], check=True)


@pytest.mark.fuse
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_full_file_system_refuses_a_write_and_loses_nothing(small_file_system: Path) -> None:
    path = small_file_system / "x.sealed"
    real(path, 256 * MIB)
    sealed = open_real(path)
    rng = random.Random(0)
    model: dict[int, bytes] = {}
    for at in range(0, 1 << 30, 64 * 1024):
        data = rng.randbytes(64 * 1024)
        if refusal_of(sealed, at, data):
            break
        model[at] = data
    assert sealed.poisoned is None
    assert len(model) > 200
    # What has its space can be written again and again, and is durable.
    for _ in range(3):
        for at in list(model)[::7]:
            model[at] = rng.randbytes(64 * 1024)
            sealed.write(at, model[at])
        sealed.flush()
    sealed.checkpoint()
    # A discard makes room for a write elsewhere.
    for at in sorted(model)[-32:]:
        sealed.discard(at, 64 * 1024)
        del model[at]
    sealed.checkpoint()
    model[512 * MIB] = rng.randbytes(64 * 1024)
    sealed.write(512 * MIB, model[512 * MIB])
    # Nor does a preallocation that finds no room harm anything.
    with pytest.raises(NoSpace):
        sealed.preallocate(600 * MIB, 200 * MIB)
    sealed.flush()
    assert sealed.poisoned is None
    sealed.abandon()
    sealed = open_real(path)
    for at, data in model.items():
        assert sealed.read(at, len(data)) == data
    assert sealed.check(data=True) == []
    sealed.close()


def test_the_bounds_are_those_that_the_documents_name() -> None:
    assert volume.FREED_SLOTS_MAX == 128
    assert recovery.DEFAULT_GEOMETRY.table_rows_max == 24_576
