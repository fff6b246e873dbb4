"""Crashes, failures and altered bytes at the places that the other crash tests do not come to.

Each test brings an image to one such place: a tree of three levels, leaf pages that are evicted,
two images on one cache, operations that meet each other in the middle of a call of the disk, what
is refused, pages and records that the holder of the key alone could have written. Then the oracle
of crash_support.py is asked, at power cuts, and refcheck with it.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import Any

import crash_support
import pytest
import test_tamper
from crash_support import (
    BLOCKS_MAX,
    GEOMETRY,
    IDENTITY,
    KEY,
    PAGE,
    SMALL_COMMIT_BLOCKS,
    CrashFailure,
    Lab,
    Oracle,
    Recipe,
    set_limit,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from simulation import SimulatedDisk, SimulatedStorage
from test_crash_faults import WideSession
from test_image import slots_named

from sealfs.errors import (
    BlockDamaged,
    Busy,
    FormatError,
    IntegrityError,
    ReadOnly,
    SealfsError,
    StorageFailed,
    UsageError,
)
from sealfs.image.cache import BlockCache
from sealfs.image.image import SealedImage
from sealfs.image.journal import encode_record
from sealfs.image.layout import Geometry
from sealfs.image.record import Record
from sealfs.image.steps import Steps, run

DEEP = Geometry(
    group_blocks=4, fanout=4, depth=3, header_pages=4, identity_pages=1, journal_pages=12
)


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)
    set_limit("PREALLOCATE_GROUPS", 2, monkeypatch.setattr)


class BranchLab(Lab):
    """A lab whose failures are repeated by running the test again."""

    def fail(self, recipe: Recipe, text: str) -> CrashFailure:
        return CrashFailure(f"{text}\nrecipe: {recipe}")


def session_of(lab: Lab, letters: str, *, watch: bool = False) -> WideSession:
    """Open a fresh image and do these letters; with `watch`, cut the power on the way."""
    recipe = Recipe(lab.seed, "empty", letters or "-")
    session = WideSession(lab, recipe, lab.fresh(), Oracle())
    if watch:
        session.on_acknowledge = lab.watch(session.storage, session.oracle, recipe, None)
    for letter in letters:
        session.do(letter)
    return session


def survives(session: WideSession, name: str) -> None:
    """Cut the power now, in several ways, and ask the oracle."""
    recipe = Recipe(session.lab.seed, "empty", name)
    session.storage.on_point = None
    session.lab.at_point(session.disk, session.oracle, recipe, 1, full=True)


# -- the shape of the tree


@pytest.mark.parametrize("leaves_max", [3, 4096])
def test_a_deeper_tree_with_few_leaf_pages_in_memory_survives_power_cuts(
    leaves_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_support, "GEOMETRY", DEEP)
    set_limit("LEAVES_MAX", leaves_max, monkeypatch.setattr)
    lab = BranchLab(seed=31, cap_point=1, inner=0.01, again=0.05, later=0.0, cache_blocks=24)
    for letters in (
        "bf",
        "bfZGwc",
        "bcZcGbc",
        "bfDxfqc",
        "pgfdcA",
        "bcSGegf",
        "bcbcwsxf",
        "bcrgrwf",
    ):
        session = session_of(lab, letters, watch=True)
        assert session.image.read(0, BLOCKS_MAX * PAGE) == session.oracle.latest()
        session.do("h")
        session.do("c")
        assert session.image.status()["slots_used"] == slots_named(session.image)
        session.image.abandon()


@pytest.mark.parametrize("depth", [2, 3])
def test_a_group_that_comes_and_goes_between_two_checkpoints_leaves_no_node_page(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crash_support, "GEOMETRY", DEEP if depth == 3 else GEOMETRY)
    lab = BranchLab(seed=32, cap_point=2, inner=0.02, later=0.0)
    session = session_of(lab, "bc", watch=True)
    session.write(20 * PAGE, 2 * PAGE)
    session.do("f")
    session.discard(20, 4)
    session.do("c")
    assert 1 not in session.image._volume.tree.nodes[1]
    survives(session, "come-and-gone")


# -- what an image tells while it goes on, and when it does not


def test_a_journal_that_fills_up_asks_for_a_checkpoint_and_a_crash_finds_no_slot_lost() -> None:
    lab = BranchLab(seed=33, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bc")
    image = session.image
    assert not image.wants_checkpoint
    wanted = []
    for _ in range(4):
        session.do("w")
        assert image.dirty_size == PAGE
        session.do("f")
        wanted.append(image.wants_checkpoint)
    used = image.status()["journal_used_pages"]
    assert used * 2 >= GEOMETRY.journal_pages
    assert wanted == sorted(wanted)
    assert wanted[-1]
    survives(session, "journal-half-full")
    image.abandon()
    again = lab.reopened(
        SimulatedStorage(session.disk), session.recipe, "again", session.oracle.memory
    )
    assert not again.wants_checkpoint
    assert again.status()["slots_used"] == slots_named(again)
    assert (again.slot_size, again.group_size) == (6 * PAGE, 4 * PAGE)


def refusals(image: SealedImage) -> Iterator[tuple[type[SealfsError], Callable[[], object]]]:
    largest = GEOMETRY.size_max
    yield UsageError, lambda: image.write(largest - 100, b"x" * 200)
    yield UsageError, lambda: image.try_write(largest, b"x")
    yield UsageError, lambda: image.resize(-1)
    yield UsageError, lambda: image.resize(largest + 1)


def test_what_is_refused_and_what_is_nothing_changes_nothing() -> None:
    lab = BranchLab(seed=34, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bc")
    image, size = session.image, session.oracle.size
    changes: list[str] = []
    session.storage.on_call = lambda name, offset, size: changes.append(name)
    for error, call in refusals(image):
        with pytest.raises(error):
            call()
    assert image.try_write(5, b"")
    image.discard(size, PAGE)
    image.discard(size + PAGE, PAGE)
    assert image.try_read(size, PAGE) == b""
    assert bytes(run(image.read_steps(size + PAGE, PAGE))) == b""
    assert image.seek(-1, os.SEEK_DATA) is None
    assert set(changes) <= {"allocate"}
    assert not image.is_dirty
    assert image.read(0, size) == session.oracle.latest()
    survives(session, "refusals")


@pytest.mark.parametrize("size", [-1, GEOMETRY.size_max + 1])
def test_an_image_of_an_impossible_size_is_not_begun(size: int) -> None:
    storage = SimulatedStorage()
    with pytest.raises(UsageError):
        SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=GEOMETRY)
    assert not storage.disk.pending
    assert storage.size() == 0


def test_an_image_opened_for_reading_after_a_crash_takes_nothing_and_is_not_written() -> None:
    lab = BranchLab(seed=35)
    session = session_of(lab, "bcwgf")
    session.image.abandon()
    disk = session.disk.crash(("o",) * len(session.disk.pending))
    before = bytes(disk.durable)
    storage = SimulatedStorage(disk)
    image = lab.open(
        storage, session.recipe, "read-only", session.oracle.memory[:1], read_only=True
    )
    calls: list[Callable[[], object]] = [
        lambda: image.write(0, b"x"),
        lambda: image.discard(0, PAGE),
        lambda: image.resize(PAGE),
        lambda: image.preallocate(0, PAGE),
    ]
    for call in calls:
        with pytest.raises(ReadOnly):
            call()
    assert image.check(data=True) == []
    assert not image.wants_checkpoint
    image.flush()
    image.checkpoint()
    assert image.read(0, image.size) == session.oracle.latest()
    image.close()
    image.close()
    assert not disk.pending
    assert disk.durable == before


# -- operations that meet each other


def at_call(session: WideSession, wanted: str, act: Callable[[], None]) -> list[int]:
    """Do something in the middle of the next call of that name; return a list of when."""
    done: list[int] = []

    def on_call(name: str, offset: int, size: int) -> None:
        if name == wanted and not done:
            done.append(offset)
            act()

    session.storage.on_call = on_call
    return done


def test_a_write_that_meets_space_being_given_back_waits_and_is_not_lost() -> None:
    lab = BranchLab(seed=36, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bc")
    image = session.image
    session.discard(1, 2)
    results: list[bool] = []
    data = b"waiting!" * (PAGE // 8)
    done = at_call(session, "punch", lambda: results.append(run(image.write_steps(PAGE, data))))
    session.do("c")
    assert done
    assert results == [False]
    assert image.read(PAGE, PAGE) == bytes(PAGE)
    session.oracle.write(PAGE, data)
    assert run(image.write_steps(PAGE, data))
    session.do("f")
    survives(session, "meets-reclaim")


def test_a_write_that_meets_a_shrink_is_before_it_or_kept() -> None:
    lab = BranchLab(seed=37, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bc")
    image, oracle = session.image, session.oracle
    data = b"between!" * (PAGE // 8)

    def write() -> None:
        oracle.write(0, data)
        assert image.try_write(0, data)

    at_call(session, "write_durable", write)
    oracle.resize(6 * PAGE)
    image.resize(6 * PAGE)
    # The write is accepted, and no more than that.
    assert image.is_dirty
    assert image.oldest_dirty is not None
    survives(session, "meets-shrink")
    session.do("f")
    assert image.read(0, PAGE) == data
    survives(session, "meets-shrink-flushed")


def drive(*operations: Steps[Any]) -> list[Any]:
    """Run operations by turns, each one's work before the next one's; return their results."""
    results: list[Any] = [None] * len(operations)
    sent: dict[int, Any] = dict.fromkeys(range(len(operations)))
    works: dict[int, Callable[[], Any]] = {}
    while sent or works:
        for number, value in list(sent.items()):
            del sent[number]
            try:
                works[number] = operations[number].send(value)
            except StopIteration as stop:
                results[number] = stop.value
        for number, work in list(works.items()):
            sent[number] = work()
            del works[number]
    return results


def test_reads_that_load_one_leaf_page_twice_after_a_crash_find_the_same() -> None:
    lab = BranchLab(seed=38)
    session = session_of(lab, "bcwf")
    session.image.abandon()
    image = lab.reopened(
        SimulatedStorage(session.disk), session.recipe, "again", session.oracle.memory
    )
    found = drive(image.read_steps(PAGE, PAGE), image.read_steps(0, 4 * PAGE))
    latest = session.oracle.latest()
    assert [bytes(each) for each in found] == [latest[PAGE : 2 * PAGE], latest[: 4 * PAGE]]


def test_a_read_whose_group_moves_while_its_leaf_page_is_read_finds_old_or_new() -> None:
    lab = BranchLab(seed=39, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bcr")
    image, oracle = session.image, session.oracle
    old = oracle.latest()
    reading = image.read_steps(PAGE, PAGE)
    work = next(reading)
    result = work()
    session.write(0, 16 * PAGE)
    session.do("f")
    with contextlib.suppress(StopIteration):
        while True:
            result = reading.send(result)()
    assert image._volume.tree.leaf(0) is not None
    assert image.read(PAGE, PAGE) == oracle.latest()[PAGE : 2 * PAGE] != old[PAGE : 2 * PAGE]
    survives(session, "group-moved")


def test_a_seek_whose_group_goes_while_its_leaf_page_is_read_finds_the_hole() -> None:
    lab = BranchLab(seed=40, cap_point=2, inner=0.0, later=0.0)
    session = session_of(lab, "bcr")
    image = session.image
    seeking = image.seek_steps(0, os.SEEK_DATA)
    result = next(seeking)()
    session.discard(0, 8)
    found: int | None = -1
    try:
        while True:
            result = seeking.send(result)()
    except StopIteration as stop:
        found = stop.value
    assert found == 8 * PAGE
    survives(session, "group-gone")


# -- two images on one cache


@pytest.fixture
def crowded() -> tuple[WideSession, SealedImage]:
    """An image, and another one that holds all of the cache they share."""
    lab = BranchLab(seed=41, cap_point=2, inner=0.0, later=0.0, cache_blocks=8)
    session = session_of(lab, "bc")
    storage = SimulatedStorage(lab.fresh())
    cache: BlockCache = session.image._cache.shared
    other = SealedImage.open(storage, image_key=KEY, cache=cache, geometry=GEOMETRY)
    for block in range(8):
        assert other.try_write(block * PAGE, bytes([block + 1]) * PAGE)
    return session, other


def test_a_discard_waits_for_room_that_another_image_holds(
    crowded: tuple[WideSession, SealedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = crowded
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            other.flush()

    monkeypatch.setattr("sealfs.image.image.time.sleep", sleep)
    session.discard_bytes(PAGE + 100, 200)
    assert len(waits) == 2
    assert session.image.read(0, 3 * PAGE) == session.oracle.latest()[: 3 * PAGE]
    survives(session, "waited-for-room")
    other.abandon()
    assert session.image.dirty_size == 0


def test_a_discard_in_a_cache_full_of_its_own_writes_has_them_flushed() -> None:
    lab = BranchLab(seed=43, cap_point=2, inner=0.0, later=0.0, cache_blocks=5)
    session = session_of(lab, "bc", watch=True)
    data = b"own fill" * (5 * PAGE // 8)
    session.oracle.write(20 * PAGE, data)
    assert session.image.try_write(20 * PAGE, data)
    session.discard_bytes(PAGE + 100, 200)
    survives(session, "own-writes")


def test_a_cache_that_stays_full_fails_what_needs_room_and_loses_nothing(
    crowded: tuple[WideSession, SealedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, other = crowded
    set_limit("ROOM_ATTEMPTS_MAX", 3, monkeypatch.setattr)
    set_limit("ROOM_WAIT", 0, monkeypatch.setattr)
    image = session.image
    with pytest.raises(Busy):
        image.discard(PAGE + 100, 200)
    with pytest.raises(Busy):
        image.resize(6 * PAGE + 100)
    with pytest.raises((Busy, AssertionError)):
        image.write(0, b"x" * PAGE)
    assert image.poisoned is None
    assert image.size == session.oracle.size
    assert image.read(0, image.size) == session.oracle.latest()
    survives(session, "stays-full")
    other.close()
    session.do("w")
    session.do("f")
    survives(session, "room-again")


def test_a_poisoned_image_gives_its_room_to_the_one_beside_it(
    crowded: tuple[WideSession, SealedImage],
) -> None:
    session, other = crowded
    storage = other._storage
    assert isinstance(storage, SimulatedStorage)
    storage.fail(1)
    with pytest.raises(StorageFailed):
        other.flush()
    assert other.status()["poisoned"]
    assert other.check(data=False) == []
    other.close()
    for letter in "wgf":
        session.do(letter)
    survives(session, "room-of-the-poisoned")


# -- altered bytes


def judged(raw: bytearray, error: type[SealfsError]) -> None:
    """It is refused with that error, and nothing was written."""
    storage = SimulatedStorage(SimulatedDisk.of(raw))
    changes: list[str] = []
    storage.on_call = lambda name, offset, size: changes.append(name)
    with pytest.raises(error):
        test_tamper.opened(storage)
    assert changes == []


@pytest.mark.parametrize("column", ["slots", "positions"])
@pytest.mark.parametrize("name", ["clean", "journal"])
def test_a_node_page_that_places_its_children_elsewhere_is_refused(name: str, column: str) -> None:
    # Above level 1 slots and positions are outside the MAC: what they lead to is inside it.
    state = test_tamper.history(test_tamper.IDENTITY)[0][name]
    fanout = test_tamper.GEOMETRY.fanout
    image = test_tamper.opened(SimulatedStorage(SimulatedDisk.of(state.raw)), read_only=True)
    top = image._volume.tree.top
    page = test_tamper.GEOMETRY.node_offset(top.slot, top.position, top.place)
    for value in range(256):
        raw = bytearray(state.raw)
        at = page + (24 * fanout if column == "slots" else 29 * fanout)
        if raw[at] == value:
            continue
        raw[at] = value
        storage = SimulatedStorage(SimulatedDisk.of(raw))
        try:
            again = test_tamper.opened(storage)
        except (FormatError, IntegrityError):
            assert not storage.disk.pending
            continue
        # The child was there too: the place it had before, which nobody has taken since.
        content = b"".join(map(test_tamper.fill, state.content))
        assert again.read(0, len(content)) == content


def test_a_damaged_leaf_page_that_a_record_needs_is_named_after_the_crash() -> None:
    lab = BranchLab(seed=44)
    session = session_of(lab, "bcwf")
    slot, _, _ = session.image._volume.tree.leaf_source(0)
    session.image.abandon()
    raw = session.disk.device()
    for place in (0, 1):
        raw[GEOMETRY.leaf_offset(slot, place) + 40] ^= 1
    storage = SimulatedStorage(SimulatedDisk.of(raw))
    image = lab.open(storage, session.recipe, "damaged", session.oracle.memory)
    latest = session.oracle.latest()
    assert image.lost_groups == [0]
    assert image.read(PAGE, PAGE) == latest[PAGE : 2 * PAGE]
    assert image.read(4 * PAGE, image.size) == latest[4 * PAGE :]
    for block in (0, 2, 3):
        with pytest.raises(BlockDamaged):
            image.read(block * PAGE, PAGE)
    assert {finding.first_block for finding in image.check(data=True)} == {0, 2}


def forged(image: SealedImage, record: Record, under: bytes) -> tuple[bytes, bytes]:
    """Return (a record whose payload pages are these bytes, its MAC), as a key holder can."""
    volume = image._volume
    key = AESGCM(bytes(volume.cipher._key(record.epoch)))
    entries = []
    for i, block in enumerate(record.inline_blocks):
        nonce = struct.pack("<IQ", record.epoch, (1 << 40) + record.sequence * 64 + i)
        page = under[i * PAGE : (i + 1) * PAGE]
        data = b"SEALBLK1" + IDENTITY.uuid + struct.pack("<Q", block)
        stream = key.encrypt(nonce, bytes(PAGE), data)[:PAGE]
        plain = bytes(a ^ b for a, b in zip(page, stream, strict=True))
        sealed = key.encrypt(nonce, plain, data)
        assert sealed[:PAGE] == page
        entries.append(nonce + sealed[PAGE:] + struct.pack("<I", 1))
    record.inline_entries = b"".join(entries)
    head, mac = encode_record(record, volume._keys.journal)
    return bytes(head) + under, mac


def test_records_that_overlap_are_refused_though_a_key_holder_wrote_them() -> None:
    # One page, then half the journal over it, then the other half: more than there is room for.
    lab = BranchLab(seed=42)
    session = session_of(lab, "wfc")
    image = session.image
    raw = bytearray(session.disk.device())
    volume = image._volume
    tail, half = volume.journal.tail, GEOMETRY.journal_pages // 2
    assert 0 < tail.page < half
    sequence, previous = tail.sequence, tail.mac
    for page, count in ((tail.page, 0), (0, half - 1), (half, half - 1)):
        sequence += 1
        at = GEOMETRY.journal_page_offset(page)
        record = Record(
            uuid=IDENTITY.uuid,
            sequence=sequence,
            epoch=volume.cipher.epoch,
            page=page,
            previous_mac=previous,
            size=volume.size,
            inline_blocks=list(range(count)),
        )
        under = bytes(raw[at + PAGE : at + (1 + count) * PAGE])
        whole, previous = forged(image, record, under)
        raw[at : at + len(whole)] = whole
        storage = SimulatedStorage(SimulatedDisk.of(raw))
        if page < half:
            continue
        changes: list[str] = []
        storage.on_call = lambda name, offset, size, changes=changes: changes.append(name)
        with pytest.raises(IntegrityError, match="more records than it has room for"):
            lab.open(storage, session.recipe, "forged", session.oracle.memory)
        assert changes == []
