"""Rules of the format that no other test held: each was found by a mutant that survived.

Most need what only a holder of the key can make (a record of any content), a second writer beside
the lock, or a system call that does what it rarely does.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import test_image
import test_image_space
from crash_support import (
    GEOMETRY,
    IDENTITY,
    KEY,
    PAGE,
    SMALL_COMMIT_BLOCKS,
    set_limit,
)
from simulation import SimulatedDisk, SimulatedStorage

from sealfs.errors import (
    BlockDamaged,
    Busy,
    IntegrityError,
    ReadOnly,
    RolledBack,
    StorageFailed,
    UsageError,
)
from sealfs.image import recovery
from sealfs.image.cache import BlockCache
from sealfs.image.cipher import TAG_SIZE, Subkeys
from sealfs.image.format import encode_identity
from sealfs.image.image import SealedImage
from sealfs.image.journal import encode_record
from sealfs.image.record import Record
from sealfs.image.recovery import Lineage, Witness
from sealfs.image.steps import run
from sealfs.image.storage import FileStorage
from sealfs.image.volume import FENCE_AGE, Volume, encode_superblock
from sealfs.keys.ledger import LedgerFile, Progress, new

BLOCKS = 40
SALTS = random.Random(0)
JOURNAL = range(GEOMETRY.journal_offset, GEOMETRY.slots_offset)


def created() -> SimulatedStorage:
    storage = SimulatedStorage()
    SealedImage.create(
        storage, identity=IDENTITY, image_key=KEY, size=BLOCKS * PAGE, geometry=GEOMETRY
    )
    return storage


def opened(
    storage: SimulatedStorage,
    *,
    witness: Witness | None = None,
    read_only: bool = False,
    record_roots: bool = False,
    cache: BlockCache | None = None,
) -> SealedImage:
    return SealedImage.open(
        storage,
        image_key=KEY,
        cache=cache or BlockCache(0, 64 * PAGE),
        random=SALTS.randbytes,
        geometry=GEOMETRY,
        read_only=read_only,
        record_roots=record_roots,
        witness=witness,
    )


def volume_of(disk: SimulatedDisk) -> Volume:
    volume, _ = recovery.open_volume(
        SimulatedStorage(disk),
        image_key=KEY,
        random=SALTS.randbytes,
        geometry=GEOMETRY,
        read_only=True,
    )
    return volume


def fill(value: int, count: int = 1) -> bytes:
    return bytes([value]) * (PAGE * count)


def killed(*writes: tuple[int, bytes]) -> SimulatedDisk:
    """Return the disk of an image whose writes, each flushed, are in the journal."""
    storage = created()
    image = opened(storage)
    for block, data in writes:
        image.write(block * PAGE, data)
        image.flush()
    image.abandon()
    storage.sync = lambda: None  # type: ignore[method-assign]
    return SimulatedDisk.of(storage.disk.device())


def append(
    disk: SimulatedDisk,
    inline: dict[int, bytes] | None = None,
    direct: dict[int, bytes] | None = None,
    **fields: Any,
) -> None:
    """Append an authentic record to the journal, whatever it says."""
    volume = volume_of(disk)
    tail, geometry = volume.journal.tail, volume.geometry
    volume.cipher.begin_epoch(volume.table.rows[-1])
    volume.cipher._counter = 1 << 20
    payload, inline_entries = sealed(volume, inline or {})
    data, direct_entries = sealed(volume, direct or {})
    record = Record(
        uuid=volume.superblock.uuid,
        sequence=tail.sequence + 1,
        epoch=volume.table.rows[-1].epoch,
        page=tail.page,
        previous_mac=tail.mac,
        size=volume.size,
        inline_blocks=list(inline or {}),
        inline_entries=inline_entries,
        direct_blocks=list(direct or {}),
        direct_entries=direct_entries,
    )
    for name, value in fields.items():
        setattr(record, name, value)
    assert tail.page + record.page_count <= geometry.journal_pages
    head, _ = encode_record(record, volume._keys.journal)
    writes = {geometry.journal_page_offset(tail.page): bytes(head) + payload}
    for number, block in enumerate(direct or {}):
        group, index = divmod(block, geometry.group_blocks)
        home = geometry.block_offset(volume.tree.slot_of(group), index)
        writes[home] = data[number * PAGE : (number + 1) * PAGE]
    for at, raw in writes.items():
        for content in (disk.cached, disk.durable):
            content[at : at + len(raw)] = raw


def sealed(volume: Volume, blocks: dict[int, bytes]) -> tuple[bytes, bytes]:
    """Return (ciphertext, entries)."""
    view = memoryview(bytearray(len(blocks) * PAGE + TAG_SIZE))
    entries = volume.cipher.seal_blocks(
        list(blocks), b"".join(blocks.values()), range(len(blocks)), view
    )
    return bytes(view[: len(blocks) * PAGE]), entries


def written_by_opening(
    disk: SimulatedDisk, witness: Witness | None = None
) -> tuple[SealedImage | None, list[int]]:
    """Open an image; return it, None where it is refused, and the offsets that were written."""
    storage = SimulatedStorage(disk)
    offsets: list[int] = []

    def on_call(name: str, offset: int, size: int) -> None:
        if name in ("write", "write_durable", "truncate", "punch"):
            offsets.append(offset)

    storage.on_call = on_call
    try:
        return opened(storage, witness=witness), offsets
    except (IntegrityError, RolledBack):
        return None, offsets


# -- the fence (FORMAT.md 4.1)


@pytest.mark.parametrize("superblocks", [1, 2])
def test_a_writer_stops_when_another_has_written_superblocks_meanwhile(superblocks: int) -> None:
    storage = created()
    first = opened(storage)
    first.write(0, fill(1))
    first.checkpoint()
    second = opened(SimulatedStorage(storage.disk))
    second.write(PAGE, fill(2))
    second.flush()  # draws an epoch: one superblock
    if superblocks == 2:
        second.checkpoint()
    places = [GEOMETRY.superblock_offset(copy) for copy in (0, 1)]
    before = [storage.read(at, 512) for at in places]
    first.write(2 * PAGE, fill(3))
    with pytest.raises(StorageFailed, match="somebody else has opened and written"):
        first.checkpoint()
    assert [storage.read(at, 512) for at in places] == before
    with pytest.raises(StorageFailed, match="takes no writes"):
        first.write(0, fill(4))


@pytest.mark.parametrize("act", ["flush", "checkpoint"])
def test_a_writer_that_slept_writes_nothing_over_what_another_wrote(act: str) -> None:
    storage = created()
    first = opened(storage)
    first.write(0, fill(1))
    first.flush()
    second = opened(SimulatedStorage(storage.disk))
    second.write(PAGE, fill(2))
    second.flush()
    if act == "flush":
        first.write(2 * PAGE, fill(3))
    before = bytes(storage.disk.cached)
    storage.time += 2 * FENCE_AGE
    with pytest.raises(StorageFailed, match="somebody else has opened and written"):
        getattr(first, act)()
    assert bytes(storage.disk.cached) == before


def test_a_writer_that_slept_between_its_record_and_the_homes_leaves_the_homes_alone() -> None:
    storage = created()
    first = opened(storage)
    first.write(0, fill(1))
    first.flush()
    home = first._volume.geometry.block_offset(first._volume.tree.slot_of(0), 1)
    first.write(PAGE, fill(3))

    def sleeps(name: str, offset: int, size: int) -> None:
        if name == "write_durable":
            storage.time += 2 * FENCE_AGE
            first._volume._live_raw = b"what was there before another wrote"

    storage.on_call = sleeps
    with pytest.raises(StorageFailed, match="somebody else has opened and written"):
        first.flush()
    assert not any(storage.read(home, PAGE))


def test_a_poisoned_image_is_closed_without_a_write() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1))
    image.flush()
    image.write(0, fill(2))
    storage.fail(1)
    with pytest.raises(StorageFailed):
        image.flush()
    calls: list[str] = []
    storage.on_call = lambda name, offset, size: calls.append(name)
    image.close()
    assert calls == []


# -- recovery (FORMAT.md 7, 9)


@pytest.mark.parametrize("is_same", [True, False])
def test_two_superblocks_that_nobody_wrote_side_by_side_are_refused(is_same: bool) -> None:
    storage = created()
    image = opened(storage)
    for value in (1, 2):
        image.write(0, fill(value))
        image.checkpoint()
    volume = image._volume
    image.abandon()
    uuid = volume.superblock.uuid if is_same else b"another " * 2
    generation = volume.superblock.generation - (not is_same)
    forged = dataclasses.replace(volume.superblock, uuid=uuid, generation=generation)
    raw = encode_superblock(forged, Subkeys.derive(KEY, uuid, 1))
    storage.disk.cached[:] = storage.disk.device()
    at = GEOMETRY.superblock_offset(1 - volume._live_copy)
    storage.disk.cached[at : at + len(raw)] = raw
    with pytest.raises(IntegrityError, match="two superblocks"):
        opened(SimulatedStorage(SimulatedDisk.of(storage.disk.cached)))


def test_nothing_is_written_when_the_witness_refuses() -> None:
    disk = killed((0, fill(1, 8)), (1, fill(2)))

    def witness(lineage: Lineage) -> None:
        raise RolledBack("x", "older")

    image, offsets = written_by_opening(disk, witness)
    assert image is None
    assert offsets == []


def test_recovery_ends_with_an_empty_journal_and_a_new_epoch() -> None:
    disk = killed((0, fill(1, 8)), (1, fill(2)))
    epochs = len(volume_of(disk).table.rows)
    image = opened(SimulatedStorage(disk))
    status = image.status()
    assert (status["journal_used_pages"], status["epochs"]) == (0, epochs + 1)
    assert not image.needs_checkpoint
    image.abandon()
    again = volume_of(SimulatedDisk.of(disk.durable))
    assert again.journal.used_pages == 0
    assert len(again.table.rows) == epochs + 1


def test_a_root_that_differs_from_that_of_the_replayed_tree_is_refused() -> None:
    disk = killed((0, fill(1, 8)))
    append(disk, {1: fill(2)}, root_mac=b"\1" * 24)
    image, offsets = written_by_opening(disk)
    assert image is None
    assert offsets == []


def test_a_record_that_gives_a_live_group_a_slot_is_refused() -> None:
    disk = killed((0, fill(1, 8)))
    append(disk, allocs=[(1, 9)])
    image, offsets = written_by_opening(disk)
    assert image is None
    assert offsets == []


def test_a_block_that_a_record_writes_and_makes_a_hole_is_a_hole() -> None:
    disk = killed((0, fill(1, 8)))
    append(disk, {1: fill(2)}, holes=[(1, 1)])
    image, _ = written_by_opening(disk)
    assert image is not None
    assert image.read(0, 8 * PAGE) == fill(1) + bytes(PAGE) + fill(1, 6)


def test_a_group_that_a_record_writes_and_takes_away_is_not_written_home() -> None:
    disk = killed((0, fill(1, 8)))
    append(disk, {1: fill(2)}, holes=[(0, 4)])
    image, offsets = written_by_opening(disk)
    assert image is not None
    assert not [offset for offset in offsets if offset in JOURNAL]
    assert image.read(0, 8 * PAGE) == bytes(4 * PAGE) + fill(1, 4)


def test_a_group_that_was_written_and_then_discarded_is_not_written_home() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 8))
    image.flush()
    image.write(PAGE, fill(2))
    image.flush()
    image.discard(0, 4 * PAGE)
    image.abandon()
    recovered, offsets = written_by_opening(SimulatedDisk.of(storage.disk.device()))
    assert recovered is not None
    assert not [offset for offset in offsets if offset in JOURNAL]
    assert recovered.read(0, 8 * PAGE) == bytes(4 * PAGE) + fill(1, 4)


def test_a_block_that_a_record_writes_in_place_is_not_covered_by_an_older_payload() -> None:
    disk = killed((0, fill(1)), (1, fill(2)))
    append(disk, direct={1: fill(3)})
    image, _ = written_by_opening(disk)
    assert image is not None
    assert image.read(0, 3 * PAGE) == fill(1) + fill(3) + bytes(PAGE)


@pytest.mark.parametrize("pages", [GEOMETRY.journal_pages // 2, GEOMETRY.journal_pages // 2 + 1])
def test_a_record_longer_than_half_the_journal_is_not_taken(pages: int) -> None:
    disk = killed((3, fill(1, 2)))
    append(disk, {block: fill(2) for block in range(pages - 1)})
    image, _ = written_by_opening(disk)
    assert image is not None
    is_taken = pages <= GEOMETRY.journal_pages // 2
    assert image.read(3 * PAGE, PAGE) == fill(2 if is_taken else 1)


def test_a_file_whose_length_was_lost_has_it_again_after_recovery() -> None:
    disk = killed((3, fill(1, 2)))
    slots = [volume_of(disk).tree.slot_of(group) for group in (0, 1)]
    for content in (disk.cached, disk.durable):
        del content[GEOMETRY.slot_offset(min(slots)) :]
    storage = SimulatedStorage(disk)
    for _ in range(2):
        image = opened(storage)
        assert image.read(3 * PAGE, 2 * PAGE) == fill(1, 2)
        image.abandon()
        assert storage.size() >= GEOMETRY.slot_offset(max(slots) + 1)
        storage = SimulatedStorage(SimulatedDisk.of(disk.durable))


@pytest.mark.parametrize("record_roots", [False, True])
def test_a_damaged_leaf_page_that_a_record_needs_costs_its_other_blocks(record_roots: bool) -> None:
    storage = created()
    image = opened(storage, record_roots=record_roots)
    image.write(0, fill(1, 8))
    image.checkpoint()
    image.write(PAGE, fill(2))
    image.flush()
    image.abandon()
    disk = SimulatedDisk.of(storage.disk.device())
    at = GEOMETRY.leaf_offset(volume_of(disk).tree.slot_of(0), 0)
    disk.cached[at : at + 2 * PAGE] = bytes(2 * PAGE)
    disk.durable[:] = disk.cached
    image = opened(SimulatedStorage(disk), record_roots=record_roots)
    assert image.read(PAGE, PAGE) == fill(2)
    assert image.read(4 * PAGE, 4 * PAGE) == fill(1, 4)
    for block in (0, 2, 3):
        with pytest.raises(BlockDamaged):
            image.read(block * PAGE, PAGE)


def test_a_damaged_epoch_table_is_read_from_the_other_copy() -> None:
    storage = created()
    image = opened(storage)
    for value in (1, 2):
        image.write(0, fill(value))
        image.checkpoint()
    live = image._volume._live_copy
    image.abandon()
    storage.disk.cached[GEOMETRY.table_offset(live) + 20] ^= 1
    image = opened(SimulatedStorage(SimulatedDisk.of(storage.disk.cached)))
    assert image.read(0, PAGE) == fill(2)


def test_an_identity_of_another_vm_is_refused_though_its_checksum_is_right() -> None:
    storage = created()
    content = IDENTITY.encode_content().replace(b"vm", b"MV")
    raw = encode_identity(content, bytes(32))
    for copy in (0, 1):
        storage.write(GEOMETRY.identity_offset(copy), [raw])
    with pytest.raises(IntegrityError, match="identity does not authenticate"):
        opened(storage)


def test_rows_that_a_damaged_leaf_page_may_name_are_kept() -> None:
    storage = created()
    for block in (0, 8, 16):
        image = opened(storage)
        image.write(block * PAGE, fill(1))
        image.close()
        storage.reopen()
    disk = storage.disk
    volume = volume_of(disk)
    slot = volume.tree.slot_of(0)
    for place in (0, 1):
        at = GEOMETRY.leaf_offset(slot, place)
        disk.cached[at : at + PAGE] = bytes(PAGE)
    volume = volume_of(disk)
    rows = list(volume.table.rows)
    assert len(rows) == 3
    volume.compact_table()
    assert volume.table.rows == rows


def test_superblocks_table_and_journal_are_read_past_the_page_cache() -> None:
    disk = killed((0, fill(1, 8)), (1, fill(2)))
    storage = SimulatedStorage(disk)
    seen: set[tuple[str, str]] = set()

    def on_read(name: str, offset: int, size: int) -> None:
        page = offset // PAGE % GEOMETRY.header_pages
        if offset in JOURNAL:
            seen.add((name, "journal"))
        elif offset < JOURNAL.start and page == 0:
            seen.add((name, "superblock"))
        elif offset < JOURNAL.start and page > GEOMETRY.identity_pages:
            seen.add((name, "table"))

    storage.on_read = on_read
    image = opened(storage)  # and a checkpoint, which recovery ends with
    assert seen == {("read_direct", what) for what in ("journal", "superblock", "table")}
    seen.clear()
    image.write(0, fill(3))
    image.checkpoint()
    assert seen == {("read_direct", what) for what in ("superblock", "table")}


@pytest.mark.parametrize("checkpoints", [1, 2, 3])
@pytest.mark.parametrize("hint", [0, 1, 0xFE, 0xFF])
def test_any_hint_leads_to_the_page(checkpoints: int, hint: int) -> None:
    storage = created()
    image = opened(storage)
    for value in range(1, checkpoints + 1):
        image.write(0, fill(value, 4))
        image.checkpoint()
    image.abandon()
    disk = SimulatedDisk.of(storage.disk.device())
    tree = volume_of(disk).tree
    for node in (tree.top, tree.nodes[1][0]):
        for place in (0, 1):
            at = GEOMETRY.node_offset(node.slot, node.position, place) + 28 * GEOMETRY.fanout
            disk.cached[at : at + GEOMETRY.fanout] = bytes([hint]) * GEOMETRY.fanout
    disk.durable[:] = disk.cached
    image = opened(SimulatedStorage(disk))
    assert image.read(0, 4 * PAGE) == fill(checkpoints, 4)


# -- space that an older state needs (FORMAT.md 8.3 step 5)


@pytest.fixture
def small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)


def cut_at_each_operation(storage: SimulatedStorage, work: Callable[[], object]) -> None:
    """Do some work; after each of its operations, opened again, the image reads as before."""
    expected = b""
    disks: list[SimulatedDisk] = []

    def on_point(kind: str) -> None:
        pending = storage.disk.pending
        disks.extend(storage.disk.crash((fate,) * len(pending)) for fate in "no")

    before = SimulatedDisk.of(storage.disk.device())
    image = opened(SimulatedStorage(before))
    expected = image.read(0, image.size)
    storage.on_point = on_point
    work()
    storage.on_point = None
    assert len(disks) > 4
    for disk in disks:
        image = opened(SimulatedStorage(disk))
        assert image.read(0, image.size) == expected
        assert image.lost_groups == []


@pytest.mark.usefixtures("small_commits")
def test_a_recovery_that_needs_a_node_chunk_takes_no_slot_that_the_records_need() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 4))
    image.checkpoint()
    image.write(PAGE, fill(2))  # replayed, it needs the leaf page in the old slot
    image.flush()
    image.write(0, fill(3, 4))  # moves the group
    image.flush()
    for group in (4, 8):  # two new node pages
        image.write(group * 4 * PAGE, fill(group, 4))
        image.flush()
    image.abandon()
    after = SimulatedStorage(SimulatedDisk.of(storage.disk.device()))
    cut_at_each_operation(after, lambda: opened(after))


@pytest.mark.usefixtures("small_commits")
def test_a_checkpoint_puts_no_new_node_page_where_one_was_given_up() -> None:
    storage = created()
    image = opened(storage)
    for group in (0, 4):
        image.write(group * 4 * PAGE, fill(group + 1, 4))
    image.checkpoint()
    image.discard(16 * PAGE, 16 * PAGE)
    image.write(32 * PAGE, fill(9, 4))
    image.flush()
    cut_at_each_operation(storage, image.checkpoint)


def test_a_hole_that_is_about_to_be_written_keeps_its_space() -> None:
    storage = test_image_space.create(BLOCKS * PAGE)
    image = test_image.opened(storage, geometry=test_image_space.SMALL)
    image.write(0, fill(1, 4))
    image.checkpoint()
    image.discard(PAGE, PAGE)
    image.write(PAGE, fill(2))
    run(image.checkpoint_steps())  # without a flush before it, as a mount may have it
    storage.room = len(storage.used)
    image.flush()
    image.checkpoint()
    assert image.read(0, 4 * PAGE) == fill(1) + fill(2) + fill(1, 2)


def test_a_write_over_a_damaged_group_and_a_part_of_another_heals_the_one() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 8))
    image.checkpoint()
    image.abandon()
    disk = SimulatedDisk.of(storage.disk.device())
    at = GEOMETRY.leaf_offset(volume_of(disk).tree.slot_of(0), 0)
    disk.cached[at : at + 2 * PAGE] = bytes(2 * PAGE)
    image = opened(SimulatedStorage(disk))
    image.write(0, fill(2, 6))
    image.flush()
    assert image.read(0, 8 * PAGE) == fill(2, 6) + fill(1, 2)


# -- what an image tells and takes


def test_an_image_asks_for_a_checkpoint_when_its_journal_is_half_full() -> None:
    storage = created()
    image = opened(storage)
    assert not image.wants_checkpoint
    used = 0
    for value in range(1, 4):
        image.write(0, fill(value))
        image.flush()
        used = image.status()["journal_used_pages"]
        assert image.wants_checkpoint == (used >= GEOMETRY.journal_pages // 2)
    assert used >= GEOMETRY.journal_pages // 2
    crashed = SimulatedStorage(SimulatedDisk.of(storage.disk.device()))
    reader = opened(crashed, read_only=True)
    assert reader.status()["journal_used_pages"] == used
    assert not reader.wants_checkpoint
    assert not reader.needs_checkpoint
    image.checkpoint()
    assert not image.wants_checkpoint


def test_an_image_asks_for_a_checkpoint_when_many_slots_wait_to_be_free() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 36))
    image.checkpoint()
    for group in range(9):
        image.discard(group * 4 * PAGE, 4 * PAGE)
        if image.status()["journal_used_pages"] * 2 >= GEOMETRY.journal_pages:
            break
        freed = image._volume.allocator.freed_count
        assert freed == group + 1
        with pytest.MonkeyPatch.context() as patch:
            set_limit("FREED_SLOTS_MAX", 4, patch.setattr)
            assert image.wants_checkpoint == (freed >= 2)
    else:
        pytest.fail("the journal takes nine records")


def test_what_is_only_to_be_read_takes_no_change() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 4))
    image.close()
    storage.reopen()
    before = bytes(storage.disk.cached)
    image = opened(storage, read_only=True)
    for call in changes_of(image):
        with pytest.raises(ReadOnly):
            call()
    assert not image.is_dirty
    assert image.read(0, 4 * PAGE) == fill(1, 4)
    assert image.check(data=True) == []
    image.close()
    assert storage.disk.cached == before


def test_a_poisoned_image_takes_no_change() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1))
    storage.fail(2)
    with pytest.raises(StorageFailed, match="simulated"):
        image.flush()
    for call in (*changes_of(image), image.flush, image.checkpoint):
        with pytest.raises(StorageFailed, match="takes no writes until it is opened again"):
            call()


def test_a_poisoned_image_with_nothing_to_flush_acknowledges_nothing() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1))
    image.flush()
    storage.fail(1)
    with pytest.raises(StorageFailed, match="simulated"):
        image.checkpoint()
    assert not image.is_dirty
    with pytest.raises(StorageFailed, match="takes no writes until it is opened again"):
        image.flush()


def test_a_flush_of_nothing_writes_nothing() -> None:
    storage = created()
    image = opened(storage)
    calls: list[str] = []
    storage.on_call = lambda name, offset, size: calls.append(name)
    image.flush()
    image.checkpoint()
    assert calls == []


def changes_of(image: SealedImage) -> list[Callable[[], object]]:
    return [
        lambda: image.write(0, fill(2)),
        lambda: image.discard(0, 4 * PAGE),
        lambda: image.resize(PAGE),
        lambda: image.resize(2 * BLOCKS * PAGE),
        lambda: image.preallocate(0, 8 * PAGE),
    ]


@pytest.mark.parametrize("size", [0, 1, GEOMETRY.size_max])
def test_a_disk_may_have_this_size(size: int) -> None:
    storage = SimulatedStorage()
    SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=GEOMETRY)
    image = opened(storage)
    assert image.size == size
    image.resize(PAGE)
    image.resize(size)
    image.close()
    assert volume_of(storage.disk).size == size


@pytest.mark.parametrize("size", [-1, GEOMETRY.size_max + 1])
def test_a_disk_may_not_have_this_size(size: int) -> None:
    storage = SimulatedStorage()
    with pytest.raises(UsageError, match="a disk has"):
        SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=size, geometry=GEOMETRY)
    assert storage.size() == 0
    image = opened(created())
    with pytest.raises(UsageError, match="a disk has"):
        image.resize(size)
    with pytest.raises(UsageError, match="a disk has"):
        image.write(GEOMETRY.size_max, b"x")


def test_the_oldest_dirty_write_is_known_until_it_is_flushed() -> None:
    image = opened(created())
    assert image.oldest_dirty is None
    image.write(0, fill(1))
    first = image.oldest_dirty
    assert first is not None
    image.write(PAGE, fill(2))
    assert image.oldest_dirty == first
    image.flush()
    assert image.oldest_dirty is None
    image.write(0, fill(3))
    assert image.oldest_dirty is not None
    image.resize(5)
    assert image.oldest_dirty is None


def test_reads_at_the_end_are_short_whichever_way() -> None:
    image = opened(created())
    size = image.size
    image.write(size - PAGE, fill(1))
    for flushed in (False, True):
        for at, length, expected in (
            (size - PAGE, PAGE, PAGE),
            (size - 100, PAGE, 100),
            (size - PAGE, 2 * PAGE, PAGE),
            (size - 2 * PAGE - 9, 3 * PAGE, 2 * PAGE + 9),
            (size, PAGE, 0),
            (size, 1, 0),
            (size + 5, 1, 0),
            (size - 5, 0, 0),
        ):
            tried = image.try_read(at, length)
            assert tried is None or len(tried) == expected
            assert len(run(image.read_steps(at, length))) == expected
            assert image.read(at, length) == (bytes(2 * PAGE) + fill(1))[-(size - at) :][:expected]
        if not flushed:
            image.checkpoint()


def test_resizing_to_the_same_size_writes_nothing() -> None:
    storage = created()
    image = opened(storage)
    calls: list[str] = []
    storage.on_call = lambda name, offset, size: calls.append(name)
    image.resize(image.size)
    assert set(calls) <= {"allocate"}


def test_a_new_size_is_durable_on_return() -> None:
    storage = created()
    image = opened(storage)
    for size in ((BLOCKS + 3) * PAGE + 5, 7 * PAGE + 9, 0, GEOMETRY.size_max):
        image.resize(size)
        assert not image.is_dirty
        lost = SimulatedDisk.of(storage.disk.durable)
        assert volume_of(lost).size == size


def test_what_was_abandoned_is_not_written_at_its_close() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1))
    image.flush()
    image.abandon()
    calls: list[str] = []
    storage.on_call = lambda name, offset, size: calls.append(name)
    image.close()
    image.abandon()
    assert calls == []


def test_a_long_write_leaves_room_to_another_image() -> None:
    cache = BlockCache(0, 8 * PAGE)
    image, other = opened(created(), cache=cache), opened(created(), cache=cache)
    other.write(0, fill(1, 2))
    image.write(0, fill(2, 16))
    assert image.read(0, 16 * PAGE) == fill(2, 16)


def test_an_edge_that_cannot_be_zeroed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache(8 * PAGE, 8 * PAGE)
    full, other = opened(created(), cache=cache), opened(created(), cache=cache)
    full.write(0, fill(1, 8)[: 4 * PAGE])
    full.write(4 * PAGE, fill(1, 4))
    assert full.dirty_size == 8 * PAGE
    set_limit("ROOM_ATTEMPTS_MAX", 3, monkeypatch.setattr)
    with pytest.raises(Busy, match="cache stays full"):
        other.discard(100, 5000)


def test_checking_flushes_first() -> None:
    image = opened(created())
    image.write(0, fill(1))
    assert image.check(data=True) == []
    assert not image.is_dirty


def test_a_write_into_a_group_whose_slot_is_going_waits() -> None:
    image = opened(created())
    image.write(0, fill(1, 4))
    image.flush()
    steps = image.discard_steps(0, 4 * PAGE)
    work = next(steps)
    assert run(image.write_steps(0, fill(2))) is False
    test_image.finish(steps, work)
    assert image.read(0, PAGE) == bytes(PAGE)
    assert run(image.write_steps(0, fill(2))) is True
    assert image.read(0, PAGE) == fill(2)


def test_a_write_may_fill_the_cache_to_the_last_block() -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 8))
    image.close()
    storage.reopen()
    image = opened(storage, cache=BlockCache(0, 2 * PAGE))
    assert run(image.write_steps(0, fill(2, 2))) is True
    assert run(image.write_steps(2 * PAGE, b"x")) is False
    image.flush()
    assert run(image.write_steps(2 * PAGE + 9, fill(3)[:PAGE])) is True
    assert image.read(0, 4 * PAGE) == fill(2, 2) + fill(1)[:9] + fill(3) + fill(1)[9:]


@pytest.mark.parametrize("end", [4 * PAGE + 1, 4 * PAGE + 2, 5 * PAGE - 1, 5 * PAGE])
def test_a_write_into_two_groups_that_are_not_in_memory_needs_one_call(end: int) -> None:
    storage = created()
    image = opened(storage)
    image.write(0, fill(1, 8))
    image.close()
    storage.reopen()
    image = opened(storage)
    data = b"x" * (end - 4 * PAGE + 5)
    assert run(image.write_steps(end - len(data), data)) is True
    assert image.read(0, 8 * PAGE) == fill(1, 4)[:-5] + data + fill(1, 8)[end:]


def test_preallocating_takes_a_record_for_64_groups() -> None:
    geometry = dataclasses.replace(GEOMETRY, depth=4, journal_pages=64)
    storage = SimulatedStorage()
    SealedImage.create(storage, identity=IDENTITY, image_key=KEY, size=PAGE, geometry=geometry)
    image = test_image.opened(storage, geometry=geometry)
    image.preallocate(0, 130 * 4 * PAGE)
    assert image.sequence == 3
    assert list(image._volume.tree.groups()) == list(range(130))
    assert image.size == PAGE


@pytest.mark.parametrize("is_flushed", [False, True])
def test_data_and_holes_are_found_from_everywhere(is_flushed: bool) -> None:
    present = {1, 2, 4, 5, 6, 7, 22, 23, 24, 36}
    image = opened(created())
    for block in sorted(present):
        image.write(block * PAGE, fill(1))
    if is_flushed:
        image.checkpoint()
        image.preallocate(12 * PAGE, 4 * PAGE)
    for offset in (*range(0, BLOCKS * PAGE, 1024), BLOCKS * PAGE - 1):
        blocks = range(offset // PAGE, BLOCKS)
        data = next((max(offset, b * PAGE) for b in blocks if b in present), None)
        hole = next((max(offset, b * PAGE) for b in blocks if b not in present), BLOCKS * PAGE)
        assert image.seek(offset, os.SEEK_DATA) == data
        assert image.seek(offset, os.SEEK_HOLE) == hole
    for offset in (-1, -PAGE, BLOCKS * PAGE, BLOCKS * PAGE + 1):
        assert image.seek(offset, os.SEEK_DATA) is None
        assert image.seek(offset, os.SEEK_HOLE) is None
    image.write((BLOCKS - 1) * PAGE, fill(1))
    assert image.seek((BLOCKS - 1) * PAGE, os.SEEK_HOLE) == BLOCKS * PAGE


# -- the file (FORMAT.md 8.4, 9 step 1)


def page_file(path: Path) -> FileStorage:
    storage = FileStorage.create(path / "x.sealed")
    storage.write(0, [fill(1, 2)])
    return storage


def test_a_failing_fdatasync_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = page_file(tmp_path)

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "simulated")

    monkeypatch.setattr(os, "fdatasync", fails)
    with pytest.raises(StorageFailed, match="fdatasync failed"):
        storage.sync()


Pwritev = Callable[[int, Sequence[memoryview], int, int], int]


def test_a_durable_write_asks_for_it_and_another_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, real, seen = page_file(tmp_path), os.pwritev, []

    def watched(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        seen.append(flags)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "pwritev", watched)
    storage.write_durable(0, [fill(2)])
    storage.write(0, [fill(3)])
    assert seen == [os.RWF_DSYNC, 0]


@pytest.mark.parametrize("most", [100, 1000, PAGE, PAGE + 1])
def test_short_writes_go_on_where_they_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    storage, real = page_file(tmp_path), os.pwritev

    def short(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        return real(fd, [b"".join(buffers)[:most]], offset, flags)

    monkeypatch.setattr(os, "pwritev", short)
    content = random.Random(most).randbytes(3 * PAGE)
    storage.write(512, [content[:PAGE], b"", content[PAGE : PAGE + 9], content[PAGE + 9 :]])
    assert storage.read(512, 3 * PAGE) == content


def test_direct_reads_ask_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, real, seen = page_file(tmp_path), os.open, []

    def watched(path: str, flags: int, *rest: int) -> int:
        seen.append(flags & os.O_DIRECT)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", watched)
    assert storage.read_direct(0, PAGE) == fill(1)
    assert seen == [os.O_DIRECT]


def test_a_file_has_one_writer_or_several_readers(tmp_path: Path) -> None:
    storage = page_file(tmp_path)
    path = tmp_path / "x.sealed"
    for read_only in (False, True):
        with pytest.raises(Busy, match="in use by another"):
            FileStorage.open(path, read_only=read_only)
    storage.close()
    readers = [FileStorage.open(path, read_only=True) for _ in range(2)]
    with pytest.raises(Busy, match="in use by another"):
        FileStorage.open(path)
    for reader in readers:
        reader.close()
    FileStorage.open(path).close()


# -- the ledger


def test_a_row_counts_only_behind_the_one_it_was_written_behind() -> None:
    key, host = b"k" * 32, b"h" * 16
    raw = new(host, 1, {}, key)
    rows: list[bytes] = []
    for sequence in (1, 2, 3):
        whole = raw + b"".join(rows)
        found = LedgerFile.decode(whole, key, "ledger")
        rows.append(found.row({b"i" * 16: Progress(sequence, bytes(16))}, key))
    without_the_second = LedgerFile.decode(raw + rows[0] + rows[2], key, "ledger")
    assert without_the_second.images[b"i" * 16].sequence == 1
    assert LedgerFile.decode(raw + rows[1], key, "ledger").images == {}
    assert LedgerFile.decode(raw + b"".join(rows), key, "ledger").images[b"i" * 16].sequence == 3
