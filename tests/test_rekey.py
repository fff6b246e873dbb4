"""Another image key: begun, swept, ended, at every phase and in every order with other work."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from crash_support import GEOMETRY, IDENTITY, KEY, PAGE
from simulation import SimulatedDisk, SimulatedStorage
from test_refcheck import refcheck

from sealfs.errors import (
    BlockDamaged,
    Busy,
    FormatError,
    IntegrityError,
    NoSpace,
    StorageFailed,
)
from sealfs.image import cipher, sweep, tree
from sealfs.image.cache import BlockCache
from sealfs.image.format import LOST, RekeyPhase
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.sweep import Swept

NEW_KEY = hashlib.sha256(b"the next image key").digest()
KEYS = {1: KEY, 2: NEW_KEY}
WRAPPED = b"wrapped again"
BLOCKS = 40


def made(geometry: Geometry = GEOMETRY, blocks: int = BLOCKS) -> SimulatedStorage:
    storage = SimulatedStorage(SimulatedDisk())
    SealedImage.create(
        storage, identity=IDENTITY, image_key=KEY, size=blocks * PAGE, geometry=geometry
    )
    return storage


def opened(
    storage: SimulatedStorage, keys: object = None, *, geometry: Geometry = GEOMETRY,
    read_only: bool = False, cache_blocks: int = 64, record_roots: bool = True,
) -> SealedImage:  # fmt: skip
    return SealedImage.open(
        storage,
        image_key=KEYS if keys is None else keys,  # type: ignore[arg-type]
        cache=BlockCache(0, cache_blocks * PAGE),
        geometry=geometry,
        read_only=read_only,
        record_roots=record_roots,
    )


def value(block: int, version: int = 0) -> bytes:
    return bytes([block + 1, version]) * (PAGE // 2)


def fill(image: SealedImage, blocks: range = range(20)) -> None:
    for block in blocks:
        image.write(block * PAGE, value(block))
    image.flush()


def content(blocks: range = range(20), of: int = BLOCKS) -> bytes:
    return b"".join(value(b) if b in blocks else bytes(PAGE) for b in range(of))


def advance(image: SealedImage, phase: RekeyPhase) -> None:
    """Go on until the superblock is in this phase."""
    while image._volume.superblock.rekey.phase is not phase:
        image.rekey_part(1)


def finish(image: SealedImage, blocks_max: int = 4) -> int:
    """Go on to the end; return how many bytes were sealed again."""
    size = 0
    while not (part := image.rekey_part(blocks_max)).is_done:
        size += part.size
    return size


def report(storage: SimulatedStorage, keys: dict[int, bytes] = KEYS):  # type: ignore[no-untyped-def]
    found = refcheck.check(storage.disk.durable, keys, GEOMETRY)
    assert found.errors == []
    return found


def test_all_is_under_the_new_key_at_the_end() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    assert image.is_rekeying
    assert finish(image) == 20 * PAGE
    assert not image.is_rekeying
    assert image.read(0, image.size) == content()
    image.close()
    storage.reopen()
    again = opened(storage, {2: NEW_KEY})
    assert again.identity.key_generation == 2
    assert again.identity.wrapped_keys == ((2, WRAPPED),)
    assert again.read(0, again.size) == content()
    assert again.check(data=True) == []


def test_nothing_is_left_under_the_old_key_and_its_wrapped_key_is_overwritten() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.close()
    assert report(storage, {1: KEY}).under(1)["blocks"] == 20
    storage.reopen()
    image = opened(storage)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    half = report(storage)
    assert half.under(1) == {
        "epochs": 1, "identities": 2, "wrapped keys": 2, "leaves": 5, "nodes": 2, "blocks": 20,
    }  # fmt: skip
    assert half.under(2)["superblocks"] == 2
    finish(image)
    found = report(storage)
    assert found.under(1) == {}
    assert found.under(2) == {
        "superblocks": 2, "epochs": 1, "identities": 2, "wrapped keys": 2, "leaves": 5,
        "nodes": 3, "blocks": 20,
    }  # fmt: skip
    assert b"opaque" not in bytes(storage.disk.durable)
    image.abandon()


def test_a_sealfs_that_knows_no_rekey_would_refuse_both_superblocks() -> None:
    # It refuses feature bits; and takes the other copy where it can read that.
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    image.rekey_part()
    image.abandon()
    raw = storage.disk.durable
    for copy in (0, 1):
        at = GEOMETRY.superblock_offset(copy)
        assert raw[at + 12] == 1


@pytest.mark.parametrize("ends", [False, True])
def test_a_damaged_superblock_loses_nothing_that_was_acknowledged(ends: bool) -> None:
    # The other one must tell that records are missing, or show them; and need no key that is gone.
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    if ends:
        finish(image)
    image.write(PAGE, value(1, 5))
    image.flush()
    at = GEOMETRY.superblock_offset(image._volume._live_copy)
    keys = {each: KEYS[each] for each, _ in image.identity.wrapped_keys}
    image.abandon()
    storage.reopen()
    storage.disk.cached[at + 40] ^= 1
    storage.disk.durable[at + 40] ^= 1
    again = opened(storage, keys)
    assert again.read(PAGE, PAGE) == value(1, 5)
    assert again.read(2 * PAGE, PAGE) == value(2)


def test_a_writer_that_resumes_needs_no_second_look_at_what_is_done() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    assert image.rekey_part(4).size == 4 * PAGE
    assert image.rekey_sizes == (4 * PAGE, 20 * PAGE)
    image.close()
    storage.reopen()
    again = opened(storage)
    assert again.is_rekeying
    assert again.rekey_sizes == (4 * PAGE, 20 * PAGE)
    assert finish(again) == 16 * PAGE
    again.abandon()


def test_a_killed_rekey_finds_what_its_records_have_done() -> None:
    # The cursor of the superblock is behind; what was sealed again is not sealed a third time.
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    assert image.rekey_part(4).size == 4 * PAGE
    image.abandon()
    storage.reopen()
    again = opened(storage)
    assert finish(again) == 16 * PAGE
    assert again.read(0, again.size) == content()
    again.abandon()
    assert report(storage).under(1) == {}


def test_a_newer_write_wins_whether_it_came_before_or_after() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.write(PAGE, value(1, 7))  # dirty, in a group that is about to be sealed again
    steps = image.rekey_part_steps(4)
    work = next(steps)
    image.write(2 * PAGE, value(2, 8))  # while its old content is being read
    work = steps.send(work())
    image.write(3 * PAGE, value(3, 9))  # and while it is being committed
    while True:
        try:
            work = steps.send(work())
        except StopIteration:
            break
    expected = bytearray(content())
    for block, version in ((1, 7), (2, 8), (3, 9)):
        expected[block * PAGE : (block + 1) * PAGE] = value(block, version)
    assert image.read(0, image.size) == bytes(expected)
    finish(image)
    image.close()
    storage.reopen()
    again = opened(storage)
    assert again.read(0, again.size) == bytes(expected)
    again.abandon()
    assert report(storage).under(1) == {}


def test_groups_without_blocks_get_new_macs_too() -> None:
    storage = made()
    image = opened(storage)
    image.preallocate(0, 12 * PAGE)
    fill(image, range(4, 6))
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    assert report(storage).under(1)["leaves"] == 3
    assert finish(image) == 2 * PAGE
    assert report(storage).under(1) == {}
    assert image.read(0, image.size) == content(range(4, 6))
    image.abandon()


def test_groups_get_new_macs_where_memory_holds_fewer_of_their_leaf_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tree, "LEAVES_MAX", 3)
    image = opened(made())
    image.preallocate(0, BLOCKS * PAGE)
    assert image.status()["size"] // PAGE > 3 * GEOMETRY.group_blocks
    image.begin_rekey(WRAPPED, NEW_KEY)
    while not image.rekey_part().is_done:
        pass
    assert image.check(data=True) == []


def test_an_image_without_anything_is_rekeyed_too() -> None:
    storage = made()
    image = opened(storage)
    image.begin_rekey(WRAPPED, NEW_KEY)
    assert finish(image) == 0
    image.abandon()
    assert report(storage, {2: NEW_KEY}).under(2)["nodes"] == 1


def test_a_rekey_after_another_and_past_the_last_generation() -> None:
    storage = made()
    keys = {1: KEY}
    for count in range(256):
        old, new = count % 255 + 1, (count + 1) % 255 + 1
        keys = {old: keys[old], new: hashlib.sha256(b"%d" % count).digest()}
        image = opened(storage, keys)
        image.write(0, value(0, count % 256))
        image.flush()
        image.begin_rekey(b"wrapped %d" % count, keys[new])
        finish(image)
        image.close()
        storage.reopen()
    image = opened(storage, {2: keys[2]})
    assert image.identity.key_generation == 2
    assert image.read(0, PAGE) == value(0, 255)
    image.abandon()


def test_groups_that_come_and_go_while_it_walks(monkeypatch: pytest.MonkeyPatch) -> None:
    # It has listed the groups ahead.
    monkeypatch.setattr(sweep, "GROUPS_MAX", 1)
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.rekey_part(4)
    image.discard(8 * PAGE, 8 * PAGE)
    image.write(30 * PAGE, value(30))
    image.write(0, value(0, 3))
    image.flush()
    finish(image)
    assert image.read(8 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
    assert image.read(30 * PAGE, PAGE) == value(30)
    image.abandon()
    assert report(storage).under(1) == {}


def test_a_rekey_is_begun_once() -> None:
    storage = made()
    image = opened(storage)
    image.begin_rekey(WRAPPED, NEW_KEY)
    with pytest.raises(Busy, match="is being replaced already"):
        image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    with pytest.raises(Busy, match="is being replaced already"):
        image.begin_rekey(WRAPPED, NEW_KEY)
    image.abandon()


def damaged_at(storage: SimulatedStorage, image: SealedImage, block: int) -> int:
    slot = image._tree.slot_of(block // GEOMETRY.group_blocks)
    offset = GEOMETRY.block_offset(slot, block % GEOMETRY.group_blocks)
    storage.disk.cached[offset] ^= 1
    storage.disk.durable[offset] ^= 1
    return offset


def test_a_damaged_block_keeps_the_old_key_until_it_is_written_anew() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    damaged_at(storage, image, 6)
    for _ in range(2):  # and it says so again
        with pytest.raises(BlockDamaged, match="block 6 does not verify: all others are under"):
            finish(image)
    assert image.poisoned is None
    image.flush()
    found = refcheck.check(storage.disk.durable, KEYS, GEOMETRY)
    assert found.under(1)["blocks"] == 1
    image.write(6 * PAGE, value(6))
    image.flush()
    finish(image)
    assert image.read(0, image.size) == content()
    image.abandon()
    assert report(storage).under(1) == {}


def test_a_damaged_block_that_is_under_the_new_key_already_is_no_hindrance() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.write(6 * PAGE, value(6))
    image.flush()
    damaged_at(storage, image, 6)
    finish(image)
    assert [finding.first_block for finding in image.check(data=True)] == [6]
    image.abandon()


def test_a_damaged_leaf_page_keeps_the_old_key() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.close()
    storage.reopen()
    image = opened(storage)
    slot = image._tree.slot_of(2)
    for place in (0, 1):
        storage.disk.cached[GEOMETRY.leaf_offset(slot, place)] ^= 1
        storage.disk.durable[GEOMETRY.leaf_offset(slot, place)] ^= 1
    image.begin_rekey(WRAPPED, NEW_KEY)
    with pytest.raises(BlockDamaged, match="block 8 and 3 more do not verify"):
        finish(image)
    image.discard(8 * PAGE, 4 * PAGE)
    finish(image)
    assert image.read(0, image.size) == content([*range(8), *range(12, 20)])  # type: ignore[arg-type]
    image.abandon()


def test_blocks_that_were_given_up_for_lost_are_no_hindrance() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.checkpoint()
    image._tree.set_entries(2, 1, LOST)
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    finish(image)
    with pytest.raises(BlockDamaged):
        image.read(9 * PAGE, PAGE)
    assert image.read(10 * PAGE, PAGE) == value(10)
    image.abandon()


def test_with_little_memory_a_part_takes_what_there_is_room_for() -> None:
    storage = made()
    image = opened(storage, cache_blocks=3)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    for block in range(20, 22):
        assert image.try_write(block * PAGE, value(block))
    assert image.rekey_part().size == PAGE  # one frame is free
    assert image.try_write(22 * PAGE, value(22))
    assert image.rekey_part().needs_room
    image.flush()
    finish(image)
    image.abandon()
    assert report(storage).under(1) == {}


def test_writes_that_take_the_last_frames_while_a_part_is_looked_at_come_first() -> None:
    storage = made()
    image = opened(storage, cache_blocks=6)
    fill(image)
    image.checkpoint()
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    damaged_at(storage, image, 6)

    def part(*, is_late: bool) -> Swept:
        steps = image.rekey_part_steps(4)
        try:
            work = next(steps)
            while True:
                result = work()
                if is_late:
                    for block in range(20, 25):
                        assert image.try_write(block * PAGE, value(block))
                work = steps.send(result)
        except StopIteration as stop:
            found: Swept = stop.value
        return found

    def go_on() -> None:
        while True:
            late = part(is_late=True)
            assert late.needs_room
            assert not late.is_done
            image.flush()
            assert not part(is_late=False).needs_room

    with pytest.raises(BlockDamaged, match="block 6 does not verify"):
        go_on()
    assert image.poisoned is None
    image.write(6 * PAGE, value(6))
    image.flush()
    finish(image)
    assert image.read(0, image.size) == content(range(25))
    image.abandon()


# -- what an image says of itself


def sweeping() -> SimulatedStorage:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.close()
    storage.reopen()
    return storage


def test_without_the_old_key_a_half_done_image_is_refused() -> None:
    for keys in ({2: NEW_KEY}, NEW_KEY):
        with pytest.raises(IntegrityError, match="half under key generation 1, half under 2"):
            opened(sweeping(), keys)
    with pytest.raises(IntegrityError, match="no superblock authenticates"):
        opened(sweeping(), {1: KEY})


def test_an_identity_under_a_key_that_was_replaced_is_one_that_was_put_back() -> None:
    storage = made()
    before = bytes(storage.disk.durable)
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    finish(image)
    image.close()
    storage.reopen()
    size = GEOMETRY.identity_pages * PAGE
    for copy in (0, 1):
        at = GEOMETRY.identity_offset(copy)
        storage.disk.cached[at : at + size] = before[at : at + size]
        storage.disk.durable[at : at + size] = before[at : at + size]
    with pytest.raises(IntegrityError, match="identity does not authenticate"):
        opened(storage, KEYS)
    assert refcheck.check(storage.disk.durable, KEYS, GEOMETRY).errors


def test_a_row_of_a_key_generation_that_has_nothing_there_is_refused() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    rows = image._volume.table.rows
    rows[0] = replace(rows[0], key_generation=2)
    image.close()
    storage.reopen()
    with pytest.raises(FormatError, match="epoch 1 is of key generation 2, expected 1"):
        opened(storage)


def test_read_only_shows_a_half_done_image_and_changes_nothing() -> None:
    storage = sweeping()
    before = bytes(storage.disk.cached)
    image = opened(storage, read_only=True)
    assert image.is_rekeying
    assert image.read(0, image.size) == content()
    assert image.check(data=True) == []
    image.close()
    assert bytes(storage.disk.cached) == before


def test_the_old_key_is_wiped_from_memory_at_the_end() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.read(0, 20 * PAGE)
    keys = image._volume.cipher
    old = keys._image_keys[1]
    epoch_key = keys._keys[1]
    image.begin_rekey(WRAPPED, NEW_KEY)
    finish(image)
    assert keys.generations == {2}
    assert not any(old)
    assert not any(epoch_key)
    image.abandon()


# -- fewer epochs

TABLE = Geometry(
    group_blocks=4, fanout=4, depth=3, header_pages=3, identity_pages=1, journal_pages=24
)
"""102 rows."""


def full_table(*, is_killed: bool) -> tuple[SimulatedStorage, dict[int, int]]:
    """Write one block a session, until that is refused; return which and what."""
    storage = made(TABLE, 256)
    written: dict[int, int] = {}
    for number in range(256):
        image = opened(storage, KEY, geometry=TABLE)
        try:
            image.write(number * PAGE, value(number % 200))
        except NoSpace:
            image.abandon()
            storage.reopen()
            return storage, written
        written[number] = number % 200
        image.flush()
        image.abandon() if is_killed else image.close()
        storage.reopen()
    raise AssertionError("the table never filled up")


def is_right(image: SealedImage, written: dict[int, int]) -> bool:
    return all(image.read(b * PAGE, PAGE) == value(number) for b, number in written.items())


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_full_epoch_table_is_made_room_in(is_killed: bool) -> None:
    storage, written = full_table(is_killed=is_killed)
    image = opened(storage, KEY, geometry=TABLE)
    assert image.wants_retirement
    rows = len(image._volume.table.rows)
    assert rows >= TABLE.table_rows_max - 3
    size = 0
    while not (part := image.retire_part(3)).is_done:
        size += part.size
    size += part.size
    assert not image.wants_retirement
    assert len(image._volume.table.rows) <= rows // 2 + 2
    # The epochs that have fewest blocks: about one block for each row that was freed.
    assert size <= rows * PAGE
    image.write(255 * PAGE, value(3))
    written[255] = 3
    assert is_right(image, written)
    image.close()
    storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    assert is_right(image, written)
    image.abandon()
    assert refcheck.check(storage.disk.durable, KEY, TABLE).errors == []


def test_a_retirement_that_dies_again_and_again_gets_to_its_end() -> None:
    # At the very end of the table: each of these sessions, and each recovery, takes a row.
    storage, written = full_table(is_killed=True)
    for _ in range(2):
        image = opened(storage, KEY, geometry=TABLE)
        for _ in range(30):
            image.retire_part(2)
        image.abandon()
        storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    while not image.retire_part(2).is_done:
        pass
    assert not image.wants_retirement
    image.write(0, value(7))
    written[0] = 7
    assert is_right(image, written)
    image.close()


def test_rows_without_a_block_are_dropped_without_sealing_any() -> None:
    storage = made(TABLE, 256)
    for number in range(92):  # the next one would drop them by itself
        image = opened(storage, KEY, geometry=TABLE)
        image.write(number % 2 * PAGE, value(number))
        image.flush()
        image.close()
        storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    assert image.wants_retirement
    part = image.retire_part()
    assert (part.size, part.is_done) == (0, True)
    assert len(image._volume.table.rows) == 2  # of two blocks, one of them the last
    image.abandon()


def test_a_row_that_is_taken_into_use_behind_a_walk_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, written = full_table(is_killed=False)
    image = opened(storage, KEY, geometry=TABLE)
    monkeypatch.setattr(sweep, "GROUPS_MAX", 2)
    image.retire_part()  # has counted the first two groups
    with monkeypatch.context() as patch:
        patch.setattr(cipher, "EPOCH_BLOCKS_MAX", 1)
        patch.setattr(image, "_check_writable", lambda: None)  # as if there were room
        for block in (0, 1):  # each under an epoch of its own
            image.write(block * PAGE, value(9))
            written[block] = 9
            image.flush()
    while not image.retire_part(3).is_done:
        pass
    assert is_right(image, written)
    image.close()
    storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    assert is_right(image, written)


@pytest.mark.parametrize("what", ["leaf", "block"])
def test_a_retirement_that_meets_damage_drops_nothing_that_is_needed(what: str) -> None:
    storage, written = full_table(is_killed=False)
    image = opened(storage, KEY, geometry=TABLE)
    slot = image._tree.slot_of(3)
    image.abandon()
    offsets = [TABLE.block_offset(slot, 1)]
    if what == "leaf":
        offsets = [TABLE.leaf_offset(slot, place) for place in (0, 1)]
    for offset in offsets:
        storage.disk.cached[offset] ^= 1
        storage.disk.durable[offset] ^= 1
    storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    while image.wants_retirement:
        image.retire_part(3)
    assert image.poisoned is None
    image.abandon()
    for offset in offsets:
        storage.disk.cached[offset] ^= 1
        storage.disk.durable[offset] ^= 1
    storage.reopen()
    image = opened(storage, KEY, geometry=TABLE)
    assert is_right(image, written)


# -- what no crash state shows: the steps one by one


def test_both_copies_have_the_next_key_before_it_is_used() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    steps = image.begin_rekey_steps(WRAPPED, NEW_KEY)
    plan = next(steps)()
    next_work = steps.send(plan)
    storage.fail(2, "eio")  # the first copy is written, the second is not
    with pytest.raises(StorageFailed):
        next_work()
    image.abandon()
    storage.reopen()
    again = opened(storage)
    assert again.is_rekeying
    advance(again, RekeyPhase.SWEEPING)
    for copy in (0, 1):
        raw = storage.disk.durable[GEOMETRY.identity_offset(copy) :][:PAGE]
        assert WRAPPED in raw
    again.abandon()


def test_one_damaged_superblock_after_the_old_key_has_gone_costs_nothing() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    while image.identity.key_generation == 1:
        steps = image.rekey_part_steps(4)
        work = next(steps, None)
        while work is not None and image.identity.key_generation == 1:
            try:
                work = steps.send(work())
            except StopIteration:
                work = None
    assert image._volume.superblock.rekey.phase is RekeyPhase.SWEPT
    at = GEOMETRY.superblock_offset(image._volume._live_copy)
    image.abandon()
    storage.reopen()
    storage.disk.cached[at + 40] ^= 1
    storage.disk.durable[at + 40] ^= 1
    again = opened(storage, {2: NEW_KEY})
    assert again.read(0, again.size) == content()
    again.abandon()


def test_what_is_left_before_the_cursor_is_found_before_the_old_key_goes() -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image._volume.cursor = 3
    finish(image)
    assert image.read(0, image.size) == content()
    image.abandon()
    assert report(storage).under(1) == {}


def test_nothing_is_recorded_between_a_new_mac_and_its_superblock() -> None:
    # Replayed, the tree would lack what no record says.
    storage = made()
    image = opened(storage)
    image.preallocate(0, 12 * PAGE)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.rekey_part()
    image.write(20 * PAGE, value(20))
    image.flush()
    image.abandon()
    storage.reopen()
    again = opened(storage)
    assert again.read(20 * PAGE, PAGE) == value(20)
    again.abandon()


@pytest.mark.parametrize("node", [(1, 0), (1, 1), (2, 0)], ids=str)
def test_a_damaged_node_page_is_rebuilt_from_pages_under_either_key(node: tuple[int, int]) -> None:
    storage = made()
    image = opened(storage)
    fill(image)
    image.begin_rekey(WRAPPED, NEW_KEY)
    advance(image, RekeyPhase.SWEEPING)
    image.rekey_part(8)
    found = image._tree.nodes[node[0]][node[1]]
    offset = GEOMETRY.node_offset(found.slot, found.position, 0)
    image.close()
    storage.reopen()
    for at in (offset + 5, offset + PAGE + 5):
        storage.disk.cached[at] ^= 1
        storage.disk.durable[at] ^= 1
    again = opened(storage)
    assert again.rebuilt_nodes == [f"{node[0]}.{node[1]}"]
    finish(again)
    assert again.read(0, again.size) == content()
    again.abandon()
    assert report(storage).under(1) == {}
