"""Power cuts, kills and failing calls, at every operation of the disk and inside recovery.

The oracle: after reopening, every 4 KiB block is its last flushed value or one written later,
whole, and so is the size; the image always opens and no block is damaged; an independent reader
(tools/refcheck.py) finds the same content and the same root before recovery; recovery that is
interrupted anywhere and done again gives the same bytes; no (key, nonce) is used twice in the
whole run, over all branches; after a failed write or sync nothing is acknowledged any more.

What is tried is told by crash_support.py, the disk's fault model by simulation.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from crash_support import (
    GEOMETRY,
    IDENTITY,
    KEY,
    LETTERS,
    PAGE,
    PREFIXES,
    REKEYS,
    SMALL_COMMIT_BLOCKS,
    CrashFailure,
    Lab,
    Oracle,
    Recipe,
    Session,
    create,
    life_goes_on,
    refcheck,
    set_limit,
)
from simulation import ProcessDied, SimulatedDisk, SimulatedStorage, crash_fates

from sealfs.errors import SealfsError, StorageFailed
from sealfs.image import journal, recovery
from sealfs.image.allocator import Allocator
from sealfs.image.cache import BlockCache
from sealfs.image.format import Anchor
from sealfs.image.image import SealedImage
from sealfs.image.journal import Journal
from sealfs.image.layout import Geometry
from sealfs.image.plan import Buffer
from sealfs.image.tree import Tree

STATES_MIN = 2000
INNER_STATES_MIN = 200


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)


def workloads(prefixes: Sequence[str] = tuple(PREFIXES)) -> Iterator[tuple[str, str]]:
    """All sequences of one or two letters; a flush follows each, so none ends in one."""
    for prefix in prefixes:
        yield from ((prefix, letter) for letter in LETTERS)
        yield from (
            (prefix, first + second)
            for first, second in itertools.product(LETTERS, LETTERS)
            if second != "f"
        )


def faulty_workloads(first: str) -> Iterator[tuple[str, str]]:
    """Workloads of which every operation is killed, or fails: these letters, then any."""
    yield "empty", "b"
    for prefix, letters in workloads(("settled", "full")):
        if letters[0] in first or len(letters) == 1:
            yield prefix, letters


def start(lab: Lab, recipe: Recipe) -> Session:
    """Open an image and do everything up to the last letter, unwatched."""
    session = Session(lab, recipe, lab.fresh(), Oracle())
    for letter in (PREFIXES | REKEYS)[recipe.prefix] + recipe.letters[:-1]:
        session.do(letter)
    return session


def finish(session: Session) -> None:
    """Do the last letter, and a flush."""
    session.do(session.recipe.letters[-1])
    if session.recipe.letters[-1] != "f":
        session.do("f")


def run(lab: Lab, recipe: Recipe) -> bool:
    """Run one workload; False when its fault lies beyond its end."""
    try:
        if not recipe.fault:
            return run_power_cuts(lab, recipe)
        return run_kill(lab, recipe) if recipe.fault == "kill" else run_failure(lab, recipe)
    except SealfsError as exc:
        raise lab.fail(recipe, f"an error where none was due: {exc!r}") from exc


def run_power_cuts(lab: Lab, recipe: Recipe) -> bool:
    session = start(lab, recipe)
    watched = Recipe(recipe.seed, recipe.prefix, recipe.letters)
    session.on_acknowledge = lab.watch(session.storage, session.oracle, watched, None)
    finish(session)
    if session.image.read(0, session.image.size) != session.oracle.latest():
        raise lab.fail(recipe, "the running image reads other bytes than were written")
    session.image.abandon()
    lab.figures["workloads"] += 1
    return True


def run_kill(lab: Lab, recipe: Recipe) -> bool:
    """Kill the process at one of its operations; its page cache lives on."""
    session = start(lab, recipe)
    left = itertools.count(recipe.fault_at - 1, -1)

    def on_point(kind: str) -> None:
        if kind == "op" and next(left) == 0:
            raise ProcessDied

    session.storage.on_point = on_point
    try:
        finish(session)
    except ProcessDied:
        lab.figures["kills"] += 1
        after_death(lab, recipe, session)
        return True
    session.image.abandon()
    return False


def run_failure(lab: Lab, recipe: Recipe) -> bool:
    """Let one call fail: either it is survived, or nothing is acknowledged any more."""
    session = start(lab, recipe)
    session.storage.fail(recipe.fault_at, recipe.fault)
    try:
        finish(session)
    except StorageFailed:
        if recipe.letters[-1] != "r":
            still_refuses(lab, recipe, session)
    else:
        if not session.storage.failed_call:
            session.image.abandon()
            return False
        if session.storage.failed_call not in ("allocate", "punch"):
            raise lab.fail(recipe, f"a failed {session.storage.failed_call} was not reported")
    lab.figures["failed calls"] += 1
    if lab.rng(f"{recipe}|evict").random() < 0.5:
        session.disk.evict()
    after_death(lab, recipe, session)
    return True


def still_refuses(lab: Lab, recipe: Recipe, session: Session) -> None:
    """A poisoned image acknowledges nothing and writes nothing."""
    calls: list[str] = []
    session.storage.on_call = lambda name, offset, size: calls.append(name)
    with contextlib.suppress(StorageFailed):
        session.image.write(0, b"late")
    for call in (session.image.flush, session.image.checkpoint):
        try:
            call()
        except StorageFailed:
            continue
        raise lab.fail(
            recipe, f"{call.__name__} succeeds after a failed {session.storage.failed_call}"
        )
    if set(calls) - {"allocate"}:
        raise lab.fail(recipe, f"a poisoned image still writes: {calls}")
    session.storage.on_call = None


def after_death(lab: Lab, recipe: Recipe, session: Session) -> None:
    """Another process opens what is left, with crash states inside its recovery; life goes on."""
    with contextlib.suppress(SealfsError):
        session.image.abandon()
    memory = list(session.oracle.memory)
    lab.rng(f"{recipe}|death").shuffle(memory)
    disk, oracle = session.disk, session.oracle.remembering(memory[0])
    storage = lab.storage(disk)
    bare = Recipe(recipe.seed, recipe.prefix, recipe.letters, recipe.fault, recipe.fault_at)
    lab.watch(storage, oracle, bare, None)
    image = lab.reopened(storage, bare, "after death", memory)
    content = lab.content(image, bare)
    if complaint := oracle.complaint(content):
        raise lab.fail(bare, f"after {bare.fault}: {complaint}")
    image.abandon()
    lab.cut_again(disk, bare, content, memory)
    life_goes_on(lab, bare, disk, content)


def report(lab: Lab, began: float) -> None:
    figures = ", ".join(f"{count} {name}" for name, count in sorted(lab.figures.items()))
    seconds = time.perf_counter() - began
    print(f"\ncrash tests, seed {lab.seed}: {figures}, {len(lab.nonces)} nonces, {seconds:.0f} s")


def test_every_short_workload_survives_power_cuts() -> None:
    lab, began = Lab(seed=1), time.perf_counter()
    for prefix, letters in workloads():
        run(lab, Recipe(lab.seed, prefix, letters))
    report(lab, began)
    assert lab.figures["states"] >= STATES_MIN
    assert lab.figures["states inside recovery"] >= INNER_STATES_MIN


def test_workloads_survive_power_cuts_with_little_memory() -> None:
    # Writes flush because the cache is full.
    lab, began = Lab(seed=10, cap_point=2, cache_blocks=5), time.perf_counter()
    for prefix, letters in workloads(("settled",)):
        run(lab, Recipe(lab.seed, prefix, letters))
    report(lab, began)
    assert lab.figures["states"] >= 500


def test_every_short_workload_survives_a_kill() -> None:
    lab, began = Lab(seed=2, cap_point=1, inner=0.01, again=0.05), time.perf_counter()
    for prefix, letters in faulty_workloads("wgdSr"):
        for number in itertools.count(1):
            if not run(lab, Recipe(lab.seed, prefix, letters, "kill", number)):
                break
    report(lab, began)
    assert lab.figures["kills"] >= 300


@pytest.mark.parametrize("kind", ["eio", "short"])
def test_a_failing_call_is_survived_or_stops_everything(kind: str) -> None:
    lab, began = Lab(seed=3, cap_point=1, inner=0.0, again=0.05), time.perf_counter()
    for prefix, letters in faulty_workloads("gd"):
        for number in itertools.count(1):
            if not run(lab, Recipe(lab.seed, prefix, letters, kind, number)):
                break
    report(lab, began)
    assert lab.figures["failed calls"] >= 200


def test_an_image_is_not_there_or_complete_when_its_making_is_cut() -> None:
    lab = Lab(seed=4)
    storage = SimulatedStorage()
    opened = refused = 0

    def examine(*, full: bool) -> None:
        nonlocal opened, refused
        for fates in crash_fates(storage.disk.pending, lab.rng(opened + refused), full=full, cap=8):
            crashed = SimulatedStorage(storage.disk.crash(fates))
            recipe = Recipe(lab.seed, "create", str(opened + refused), choices=((0, fates),))
            try:
                image = lab.open(crashed, recipe, "create", Oracle().memory)
            except SealfsError:
                refused += 1
                assert not full, "an acknowledged image does not open"
                continue
            opened += 1
            assert lab.content(image, recipe) == Oracle().latest()
            image.abandon()

    storage.on_point = lambda kind: examine(full=False) if kind == "op" else None
    create(storage)
    examine(full=True)
    assert opened
    assert refused


def first_live_record(disk: SimulatedDisk, first: int) -> int:
    """Return where a record lies without which later ones are of no use."""
    for offset in range(first, first + GEOMETRY.journal_pages * PAGE, PAGE):
        damaged = bytearray(disk.cached)
        damaged[offset + 100] ^= 0xFF
        if refcheck.check(damaged, KEY, GEOMETRY).refused:
            return offset
    raise AssertionError("no two records in the journal")


@pytest.mark.parametrize("damaged", ["superblocks", "tables", "top node", "journal", "root"])
def test_a_refused_open_has_written_nothing(damaged: str) -> None:
    lab = Lab(seed=5)
    session = Session(lab, Recipe(5, "refused", damaged), lab.fresh(), Oracle())
    for letter in "bfcwfsfwf":
        session.do(letter)
    session.image.abandon()
    disk = SimulatedDisk.of(session.disk.device())
    half = GEOMETRY.header_pages * PAGE
    ranges = {
        "superblocks": [(0, 512), (half, 512)],
        "tables": [(2 * PAGE, 40), (half + 2 * PAGE, 40)],
        "journal": [(first_live_record(disk, 2 * half) + 100, 1)],
        "top node": [(lab.slots_at(), 6 * PAGE)],
        "root": [(64, 1), (half + 64, 1)],
    }[damaged]
    for offset, size in ranges:
        for at in range(offset, offset + size):
            disk.cached[at] ^= 0xFF
    disk.durable[:] = disk.cached
    storage = SimulatedStorage(disk)
    with pytest.raises(SealfsError):
        lab.open(storage, Recipe(5, "refused", damaged), "damaged", Oracle().memory)
    assert not disk.pending
    assert disk.durable == disk.cached


class NothingWritten(random.Random):
    """Of what a failing sync was to write, nothing has reached the disk."""

    def choice(self, seq: Sequence[str]) -> str:  # type: ignore[override]
        return seq[-1]


def test_pages_that_a_failed_sync_left_in_the_cache_are_written_again() -> None:
    # The 103rd row crosses a page of the epoch table. When the checkpoint that brings it into
    # the copy that is not live fails, the cache shows a page that the disk does not have.
    lab = Lab(seed=8)
    disk, oracle = lab.fresh(), Oracle()
    for number in range(104):
        session = Session(lab, Recipe(8, "table", f"row{number}"), disk, oracle)
        session.do("w")
        session.do("f")
        session.image.abandon()
        for call in range(6, 14) if number >= 100 else ():
            recipe = Recipe(8, "table", f"row{number}", "eio", call)
            fork = Session(lab, recipe, disk.clone(), Oracle())
            fork.storage.rng = NothingWritten()
            fork.storage.fail(call)
            with contextlib.suppress(SealfsError):
                fork.do("w")
                fork.do("c")
            fork.image.abandon()
            memory = list(fork.oracle.memory)
            image = lab.reopened(lab.storage(fork.disk), recipe, "after the failure", memory)
            content = lab.content(image, recipe)
            image.abandon()
            lab.cut_again(fork.disk, recipe, content, memory)


@pytest.mark.parametrize(
    ("geometry", "count"),
    [(dataclasses.replace(GEOMETRY, journal_pages=8), 4), (Geometry(journal_pages=256), 127)],
    ids=["small", "real"],
)
def test_a_record_is_at_most_half_the_journal(geometry: Geometry, count: int) -> None:
    # Blocks that have a live copy are written again, and go inline: as many as can.
    size = 2 * geometry.group_blocks * PAGE
    storage = SimulatedStorage()
    SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=geometry)
    cache = BlockCache(clean_max=size, dirty_max=size)
    image = SealedImage.open(storage, image_key=KEY, cache=cache, geometry=geometry)
    for value, blocks in ((1, geometry.group_blocks), (2, count)):
        image.write(0, bytes([value]) * (blocks * PAGE))
        image.flush()
    image.abandon()
    found = refcheck.check(storage.disk.durable, KEY, geometry)
    assert found.errors == []
    assert found.blocks[0] == b"\2" * PAGE


# -- does the harness bite? Each mutant breaks one rule of sections 8 and 9 below the image.


class Mutant(SimulatedStorage):
    """A storage that breaks a rule; it knows an operation by where it goes."""

    @staticmethod
    def is_superblock(offset: int) -> bool:
        return offset in (0, GEOMETRY.header_pages * PAGE)

    @staticmethod
    def is_record(offset: int) -> bool:
        first = 2 * GEOMETRY.header_pages
        return first * PAGE <= offset < (first + GEOMETRY.journal_pages) * PAGE

    @staticmethod
    def is_slot(offset: int) -> bool:
        return offset >= (2 * GEOMETRY.header_pages + GEOMETRY.journal_pages) * PAGE


class RecordNotDurable(Mutant):
    """8.2, 4: the record is only written."""

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        (super().write if self.is_record(offset) else super().write_durable)(offset, buffers)


class RecordHalfDurable(Mutant):
    """8.2, 4: only the first page of a record is durable."""

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        if self.is_record(offset) and len(data) > PAGE:
            super().write(offset + PAGE, [data[PAGE:]])
            data = data[:PAGE]
        super().write_durable(offset, [data])


class SuperblockNotDurable(Mutant):
    """8.3, 5: the superblock is only written."""

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        (super().write if self.is_superblock(offset) else super().write_durable)(offset, buffers)


class SuperblockOverLive(Mutant):
    """4.1: the superblock goes over the live one."""

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.is_superblock(offset):
            offset = GEOMETRY.header_pages * PAGE - offset
        super().write_durable(offset, buffers)


class NoSync(Mutant):
    """No fdatasync at all."""

    def sync(self) -> None:
        self._failing("sync", 0, 0)


class HeldSync(Mutant):
    """A sync is held back until it is known what comes after it, and dropped before that."""

    held = False

    def dropped_before(self, offset: int) -> bool:
        raise NotImplementedError

    def sync(self) -> None:
        self._failing("sync", 0, 0)
        self.held = True

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.held:
            self.held = False
            super().sync()
        super().write(offset, buffers)

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if self.held and not self.dropped_before(offset):
            super().sync()
        self.held = False
        super().write_durable(offset, buffers)


class NoSyncBeforeRecord(HeldSync):
    """8.2, 3."""

    def dropped_before(self, offset: int) -> bool:
        return self.is_record(offset)


class NoSyncBeforeSuperblock(HeldSync):
    """8.3, 4."""

    def dropped_before(self, offset: int) -> bool:
        return self.is_superblock(offset)


class NoSyncInRecovery(Mutant):
    """9, 8: what was read may live in the page cache alone."""

    first = True

    def sync(self) -> None:
        if self.first:
            self.first = False
            self._failing("sync", 0, 0)
            return
        super().sync()


class HomeBeforeRecord(Mutant):
    """8.1: a block with a live copy is written home before its record."""

    late: tuple[int, bytes] | None = None

    def _catch_up(self) -> None:
        if self.late is not None:
            (offset, data), self.late = self.late, None
            super().write_durable(offset, [data])

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._catch_up()
        if self.is_record(offset):
            self.late = (offset, b"".join(buffers))
        else:
            super().write_durable(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().write(offset, buffers)
        self._catch_up()

    def sync(self) -> None:
        self._catch_up()
        super().sync()


class NoHomeWrite(Mutant):
    """8.2, 5: what follows a record does not reach its home."""

    after_record = False

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.after_record = self.is_record(offset)
        super().write_durable(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if not (self.after_record and self.is_slot(offset)):
            super().write(offset, buffers)

    def sync(self) -> None:
        self.after_record = False
        super().sync()


class FailureSwallowed(Mutant):
    """8.4: a failed sync or durable write is taken for a good one."""

    def sync(self) -> None:
        try:
            super().sync()
        except StorageFailed:
            self.failed_call = "allocate"  # so that the harness does not miss the report

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        try:
            super().write_durable(offset, buffers)
        except StorageFailed:
            self.failed_call = "allocate"


class CachedOpen(Mutant):
    """9, 2: superblocks and journal are read from the page cache."""

    def read_direct(self, offset: int, size: int) -> bytes:
        return self.read(offset, size)


MUTANTS = [
    RecordNotDurable, RecordHalfDurable, SuperblockNotDurable, SuperblockOverLive, NoSync,
    NoSyncBeforeRecord, NoSyncBeforeSuperblock, NoSyncInRecovery, HomeBeforeRecord, NoHomeWrite,
    FailureSwallowed, CachedOpen,
]  # fmt: skip


def hunt(lab: Lab) -> Iterator[Recipe]:
    """Yield workloads in the order in which mutants are likeliest to show."""
    words = "w g x gfg wc gc xr bc d dc S r cw gr rw bw"
    for prefix, each in itertools.product(("settled", "full", "empty"), words.split()):
        yield Recipe(lab.seed, prefix, each)
        for fault in ("kill", "eio"):
            yield from (Recipe(lab.seed, prefix, each, fault, number) for number in range(1, 9))


def bitten(lab: Lab) -> CrashFailure | None:
    try:
        for recipe in hunt(lab):
            run(lab, recipe)
    except CrashFailure as exc:
        return exc
    return None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_the_harness_catches_a_storage_that(mutant: type[Mutant]) -> None:
    lab = Lab(seed=6, cap_point=6, inner=0.1, again=0.3, storage=mutant)
    caught = bitten(lab)
    assert caught is not None, f"{mutant.__name__} survives {dict(lab.figures)}"
    print(f"\n{mutant.__name__}: {str(caught).splitlines()[0]}")


def forget_pins(image: SealedImage, state: Anchor) -> None:
    image._volume.pins = ()


ENGINE_MUTANTS: dict[str, tuple[object, str, object]] = {
    "uses freed slots again at once": (Allocator, "free", Allocator.put_back),
    "takes records without their payload": (journal, "_payload_opens", lambda *_: True),
    "forgets the records when it opens": (recovery, "scan", lambda *_, **__: []),
    "does not wait for a checkpoint to use the journal again": (
        Journal, "place",
        lambda self, count: self.tail.page if self.tail.page + count <= self.page_count else 0,
    ),
    "writes node pages in place": (Tree, "take_changes", None),
    "forgets what its host is about to note": (SealedImage, "remembering", lambda *_: None),
    "forgets what its host has noted": (SealedImage, "remembered", forget_pins),
}  # fmt: skip


@pytest.mark.parametrize("name", ENGINE_MUTANTS)
def test_the_harness_catches_an_image_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement = ENGINE_MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement or in_place(Tree.take_changes))
    caught = bitten(Lab(seed=9, cap_point=6, inner=0.1, again=0.3))
    assert caught is not None
    print(f"\n{name}: {str(caught).splitlines()[0]}")


def in_place(take_changes: Callable[..., object]) -> Callable[..., object]:
    """Let every page go to the place where it is already."""

    def mutated(tree: Tree, take_node: Callable[[], tuple[int, int]]) -> object:
        for level in tree.nodes[1:]:
            for node in level.values():
                if node.slot >= 0:
                    node.place ^= 1
        return take_changes(tree, take_node)

    return mutated


def test_the_harness_catches_salts_that_repeat() -> None:
    lab = Lab(seed=7, randomness=lambda label: lambda size: b"\7" * size)
    caught = bitten(lab)
    assert caught is not None
    assert "used twice" in str(caught)


def test_a_recipe_is_read_as_it_is_printed() -> None:
    recipe = Recipe(1, "full", "wc", "kill", 3, ((4, ("n", "o", "nnzo", "g" * 8)), (1, ())))
    assert str(recipe) == "1 full:wc kill:3 @4 n,o,n2z1o1,g8 @1 -"
    assert Recipe.parse(str(recipe)) == recipe


if __name__ == "__main__":
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS)
    asked = Recipe.parse(sys.argv[1])
    run(Lab(seed=asked.seed, only=asked), asked)
    print(f"{asked}: survived")
