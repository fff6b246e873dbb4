"""The durable side of one image: superblock, tree, journal and slots; commit and checkpoint.

It knows committed blocks only; what is dirty is `image.py`'s. Everything that changes the file
is in here, in the orders of FORMAT.md 8, and comes one operation at a time. Long operations are
steps (`steps.py`): what they yield runs in a worker and touches, of the state shared with the
owner's thread, only what no owner code changes while an exclusive operation is under way.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

try:
    from sealfs.image import _blockbatch as batches
except ImportError:  # it could not be built here; the same in Python
    from sealfs.image import blockbatch as batches  # type: ignore[no-redef]

from sealfs.errors import BlockDamaged, IntegrityError, StorageFailed
from sealfs.image import scratch
from sealfs.image.allocator import Allocator
from sealfs.image.batch import Batch, Frames
from sealfs.image.cipher import (
    TAG_SIZE,
    BlockCipher,
    EpochTable,
    Subkeys,
    TreeMacs,
    epochs_of,
    mac_of,
    same_mac,
)
from sealfs.image.format import (
    ANCHOR_COUNT,
    HOLE,
    LOST,
    SUPERBLOCK_SIZE,
    Anchor,
    Rekey,
    RekeyPhase,
    Superblock,
    encode_table,
    next_generation,
)
from sealfs.image.journal import Journal, Tail, encode_record
from sealfs.image.layout import (
    BLOCK_SIZE,
    Geometry,
    block_count_of,
)
from sealfs.image.plan import Buffer, PlanStep, Step, WritePlan
from sealfs.image.record import Record
from sealfs.image.space import Space
from sealfs.image.steps import Steps
from sealfs.image.storage import Storage, execute
from sealfs.image.tree import EMPTY_LEAF, LEAVES_MAX, NO_SLOT, Tree

RECORD_BLOCKS_MAX = 2048
"""Blocks sealed for one record: 8 MiB, what a commit holds in memory beside the cache."""

FREED_SLOTS_MAX = 128
"""Slots of moved groups that wait for a checkpoint. With those of the record being written an image
may be larger by FREED_SLOTS_MAX + RECORD_BLOCKS_MAX / group_blocks slots for a while: 73 MiB."""

FENCE_AGE = 0.1
"""Seconds without a look at the superblocks, after which the process may have been asleep, and its
lock have gone to somebody else (network file systems give it away after half a minute and more)."""


@dataclass(slots=True)
class Written:
    """A durable record that memory does not know yet."""

    record: Record
    mac: bytes
    payload: memoryview
    leaves: dict[int, bytes]


class Volume:
    """The state that the live superblock and the records after it describe."""

    def __init__(
        self, storage: Storage, *, superblock: Superblock, live_copy: int, live_raw: bytes,
        keys: Subkeys, macs: TreeMacs, cipher: BlockCipher, table: EpochTable, tree: Tree,
        random: Callable[[int], bytes], record_roots: bool,
    ) -> None:  # fmt: skip
        self.storage = storage
        self.path = storage.path
        self.geometry: Geometry = superblock.geometry
        self.superblock = superblock
        self.cipher = cipher
        self.table = table
        self.tree = tree
        self.size = superblock.size
        """Committed size of the disk."""
        self.journal = Journal(
            self.geometry.journal_pages,
            Tail(superblock.tail_page, superblock.tail_sequence, superblock.tail_mac),
        )
        slot_count = self.geometry.slot_count_of(storage.size())
        self.allocator = Allocator(slot_count, self.geometry.chunk_nodes)
        self.recovering = False
        """Whether an open applies records: a damaged leaf page costs its group alone."""
        self.lost_groups: list[int] = []
        """Groups whose leaf page was damaged where a record needed it."""
        self.pins: tuple[Anchor, ...] = ()
        """States that somebody remembers, or is about to: every superblock names them."""
        self.cursor = superblock.rekey.cursor
        """First group that may hold something under the old image key, in a rekey."""
        self.inline: dict[int, int] = {}
        """Block to file offset of its newest inline payload, where that is not home yet."""
        self._live_copy = live_copy
        self._live_raw = live_raw
        self._fenced_at = storage.clock()
        self._keys = keys
        self._macs = macs
        self._random = random
        self._record_roots = record_roots
        self.space = Space(storage, self.geometry, self.allocator, tree)

    # -- leaves

    def read_leaf(self, group: int, source: tuple[int, int, bytes]) -> tuple[bytes, int]:
        """Read and verify a leaf page; any thread. Return (page, place).

        Raises:
            BlockDamaged: neither place holds the page with that MAC.
        """
        slot, hint, mac = source
        for place in (hint & 1, 1 - (hint & 1)):
            page = self.storage.read(self.geometry.leaf_offset(slot, place), BLOCK_SIZE)
            if self.tree.verify_leaf(group, page, mac):
                return page, place
        raise BlockDamaged(
            self.path,
            group * self.geometry.group_blocks,
            f"and the {self.geometry.group_blocks - 1} after it cannot be verified: leaf page of"
            f" group {group} (slot {slot}) does not authenticate",
        )

    def leaf(self, group: int) -> bytearray:
        """Return a group's leaf page, loading it now if need be (waits for the disk)."""
        leaf = self.tree.leaf(group)
        while leaf is None:
            source = self.tree.leaf_source(group)
            try:
                page, place = self.read_leaf(group, source)
            except BlockDamaged:
                if not self.recovering:
                    raise
                page, place = self._lost_leaf(group), source[1] & 1
                self.lost_groups.append(group)
            leaf = self.tree.admit_leaf(group, page, place, source[2])
        return leaf

    def _lost_leaf(self, group: int) -> bytes:
        """Return a leaf page in place of a damaged one: its blocks are there and never open.

        The records that recovery applies then say what is known since (FORMAT.md 9).
        """
        first = group * self.geometry.group_blocks
        count = min(block_count_of(self.size) - first, self.geometry.group_blocks)
        return (LOST * max(count, 0)).ljust(BLOCK_SIZE, b"\0")

    # -- applying records

    def apply(self, record: Record, leaves: dict[int, bytes] | None = None) -> None:
        """Apply a durable record to memory in body order (FORMAT.md 7).

        Args:
            record: the record.
            leaves: leaf pages of its GROUP operations; None in recovery, where they are on the
                disk, and where slots are yet to be marked busy.
        """
        for group, slot in record.allocs:
            if self.tree.slot_of(group) != NO_SLOT:
                raise IntegrityError(self.path, f"record {record.sequence}: ALLOC of a live group")
            self.allocator.occupy(slot)
            self.tree.put_group(group, slot, EMPTY_LEAF, None)
        for group, slot, mac in record.groups:
            self.allocator.occupy(slot)
            if leaves is None:
                old = self.tree.put_sealed_group(group, slot, mac)
            else:
                old = self.tree.put_group(group, slot, leaves[group], mac)
            if old != NO_SLOT:
                self.allocator.free(old)
            self._forget_inline(group * self.geometry.group_blocks, self.geometry.group_blocks)
        self._set_entries(record.direct_blocks, record.direct_entries)
        self._set_entries(record.inline_blocks, record.inline_entries)
        if record.size < self.size:
            first = block_count_of(record.size)
            self._make_holes(first, self.geometry.size_max // BLOCK_SIZE - first)
            self.space.note_cut()
        self.size = record.size
        for first, count in record.holes:
            self._make_holes(first, count)

    def _set_entries(self, blocks: Sequence[int], entries: bytes) -> None:
        group_blocks, leaves = self.geometry.group_blocks, self.tree.leaves
        groups, _ = batches.spans(blocks, group_blocks)
        for group in groups:
            if group not in leaves:
                self.leaf(group)
            self.tree.change_leaf(group)  # from here on it is not evicted
        batches.set_entries(leaves, blocks, entries, group_blocks)
        if self.inline:
            for block in blocks:
                self.inline.pop(block, None)

    def _make_holes(self, first: int, count: int) -> None:
        for group, index, part in self.live_parts(first, count):
            if part == self.geometry.group_blocks:
                self._give_up(group)
                continue
            self.leaf(group)
            self.tree.set_entries(group, index, HOLE * part)
            self.space.note_holes(group, index, part)
        self._forget_inline(first, count)

    def live_parts(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Return the parts of a run of blocks that lie in groups with a slot."""
        group_blocks = self.geometry.group_blocks
        end = first + count
        parts = []
        for group in self.tree.groups(first // group_blocks):
            start = max(first, group * group_blocks)
            stop = min(end, (group + 1) * group_blocks)
            if start >= stop:
                break
            parts.append((group, start % group_blocks, stop - start))
        return parts

    def _give_up(self, group: int) -> None:
        slot = self.tree.drop_group(group)
        self.allocator.free(slot)
        self.space.note_given_up(slot)
        self._forget_inline(group * self.geometry.group_blocks, self.geometry.group_blocks)

    def _forget_inline(self, first: int, count: int) -> None:
        if self.inline:
            for block in [b for b in self.inline if first <= b < first + count]:
                del self.inline[block]

    # -- commit (FORMAT.md 8.2)

    def has_room(self, page_count: int, full_group_count: int = 0) -> bool:
        """Whether a record of that length can be written without a checkpoint before it."""
        return (
            self.journal.place(page_count) is not None
            and self.tree.changed_leaf_count <= LEAVES_MAX
            and self.allocator.freed_count + full_group_count <= FREED_SLOTS_MAX
        )

    def commit_steps(self, batch: Batch, frames: Frames) -> Steps[None]:
        """Make a batch durable with one record, apply it, and write inline blocks home.

        Args:
            batch: what to say; its slots are reserved.
            frames: where the content of the batch's blocks is; read in a worker.
        """
        if self.cipher.is_spent:
            yield from self.checkpoint_steps(new_epoch=True)
        if not self.has_room(batch.page_count(), len(batch.full_groups)):
            yield from self.checkpoint_steps()
        page = self.journal.place(batch.page_count())
        assert page is not None, "a record is at most half the journal"
        start = page
        if self._record_roots:
            yield from self._commit_with_root(batch, frames, start)
            return
        # Crash until the record is durable: nothing happened. After it: recovery applies it.
        # The blocks go home in the same piece of work, before memory knows: whoever reads one
        # meanwhile finds it in the cache, where it is under commit.
        written: Written = yield lambda: self._write(batch, frames, start)
        self.apply(written.record, written.leaves)
        self.journal.advance(written.record, written.mac)

    def _commit_with_root(self, batch: Batch, frames: Frames, page: int) -> Steps[None]:
        """As the other half of `commit_steps`, with the root in the record (test builds).

        Memory is changed before the record is durable; a failure poisons the image anyway.
        """

        def seal_apply_write() -> Written:
            written = self._seal(batch, frames, page)
            self.apply(written.record, written.leaves)
            written.record.root_mac = self.tree.refresh(self.size)
            return self._log(written)

        written: Written = yield seal_apply_write
        self.journal.advance(written.record, written.mac)

    def _write(self, batch: Batch, frames: Frames, page: int) -> Written:
        return self._log(self._seal(batch, frames, page))

    def _seal(self, batch: Batch, frames: Frames, page: int) -> Written:
        """Seal a batch and make its direct data durable; return its record."""
        self._fence_after_sleep()
        geometry = self.geometry
        plan: WritePlan = []
        groups: list[tuple[int, int, bytes]] = []
        leaves: dict[int, bytes] = {}
        slots = [slot for _, slot in batch.full_groups + batch.allocs]
        execute(self.storage, self.space.extend_plan(slots))
        # One buffer for all groups: each is on its way to the disk before the next is sealed.
        view = memoryview(bytearray(geometry.slot_size + TAG_SIZE if batch.full_groups else 0))
        for group, slot in batch.full_groups:
            first = group * geometry.group_blocks
            blocks = range(first, first + geometry.group_blocks)
            entries = self.cipher.seal_blocks(
                blocks, frames.slab, frames.of(blocks), view[2 * BLOCK_SIZE :]
            )
            leaf = entries.ljust(BLOCK_SIZE, b"\0")
            view[:BLOCK_SIZE] = leaf
            whole: Buffer = view[: geometry.slot_size]
            execute(self.storage, [(Step.WRITE, geometry.slot_offset(slot), [whole])])
            groups.append((group, slot, self._macs.leaf(group, leaf)))
            leaves[group] = leaf
        direct, direct_entries = self._seal_run(batch.direct, frames)
        new_slots = dict(batch.allocs)
        plan.extend(self._home_writes(batch.direct, direct, new_slots))
        payload, inline_entries = self._seal_run(batch.inline, frames)
        record = Record(
            uuid=self.superblock.uuid,
            sequence=self.journal.tail.sequence + 1,
            epoch=self.cipher.epoch,
            page=page,
            previous_mac=self.journal.tail.mac,
            size=batch.size,
            barrier=batch.barrier,
            root_mac=bytes(24) if self._record_roots else None,
            allocs=batch.allocs,
            groups=groups,
            direct_blocks=batch.direct,
            direct_entries=direct_entries,
            inline_blocks=batch.inline,
            inline_entries=inline_entries,
            holes=batch.holes,
        )
        if slots or plan:
            plan.append((Step.SYNC,))
        execute(self.storage, plan)
        _give_back(direct)
        # Crash here: direct data lies where nothing durable points to; it is not there.
        return Written(record, b"", payload, leaves)

    def _log(self, written: Written) -> Written:
        """Make a record durable, and bring its inline blocks home."""
        record = written.record
        head, written.mac = encode_record(record, self._keys.journal)
        offset = self.geometry.journal_page_offset(record.page)
        whole: list[Buffer] = [head, written.payload]
        execute(self.storage, [(Step.DURABLE, offset, whole)])
        # Crash here: the record is durable, inline blocks are old at home; recovery writes them.
        if record.inline_blocks:
            self._fence_after_sleep()
            new_slots = dict(record.allocs)
            execute(
                self.storage, self._home_writes(record.inline_blocks, written.payload, new_slots)
            )
        _give_back(written.payload)
        return written

    def _seal_run(self, blocks: list[int], frames: Frames) -> tuple[memoryview, bytes]:
        view = memoryview(scratch.take(len(blocks) * BLOCK_SIZE + TAG_SIZE))
        entries = self.cipher.seal_blocks(blocks, frames.slab, frames.of(blocks), view)
        return view[: len(blocks) * BLOCK_SIZE], entries

    def _home_writes(
        self, blocks: list[int], sealed: memoryview, new_slots: dict[int, int]
    ) -> list[PlanStep]:
        """Return the step that brings sealed blocks, ascending, to their places."""
        if not blocks:
            return []
        geometry, group_blocks = self.geometry, self.geometry.group_blocks
        starts = []
        for group in batches.spans(blocks, group_blocks)[0]:
            slot = new_slots.get(group, NO_SLOT)
            if slot == NO_SLOT:
                slot = self.tree.slot_of(group)
            starts.append(geometry.block_offset(slot, 0))
        offsets = array("Q", batches.home_offsets(blocks, group_blocks, starts))
        return [(Step.WRITE_BLOCKS, offsets, sealed)]

    def length_plan(self) -> WritePlan:
        """Return the step that gives the file the length its busy slots call for."""
        return self.space.extend_plan([self.allocator.slot_count - 1])

    # -- checkpoint (FORMAT.md 8.3)

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the live superblock is behind."""
        return self.journal.used_pages > 0 or self.tree.is_changed

    def checkpoint_steps(
        self, *, new_epoch: bool = False, clean: bool = False, phase: RekeyPhase | None = None
    ) -> Steps[None]:
        """Bring tree and superblock up to date and free the journal.

        Args:
            new_epoch: draw one and seal under it from now on.
            clean: the image is being closed in order.
            phase: of a replacement of the image key, from now on (FORMAT.md 11); None: as it was.
                SWEEPING takes the next key into use, which the cipher has; with a new epoch.
        """
        self.space.reserve_nodes(self.tree.unplaced_nodes_max())
        pins = self.pins  # as of the frozen state: who remembers a state from now on takes its tail
        keys = self._keys
        if phase is RekeyPhase.SWEEPING:
            keys = self.cipher.subkeys(next_generation(self.superblock.key_generation))
        superblock, raw = yield lambda: self._write_checkpoint(new_epoch, clean, pins, phase, keys)
        self.tree.settle()
        self.superblock, self._live_raw, self._keys = superblock, raw, keys
        self._live_copy = 1 - self._live_copy
        if new_epoch:
            self.cipher.begin_epoch(self.table.rows[-1])
        # Step 5: the superblock is durable, so what only older states name is free now.
        self.journal.release()
        yield from self.space.reclaim_steps(clean=clean)

    def _rekey_at(self, phase: RekeyPhase | None) -> tuple[Rekey, int]:
        """Return what the next superblock says of a rekey, and the key generation of its MACs."""
        old = self.superblock
        match phase:
            case None if old.rekey.phase is RekeyPhase.SWEEPING:
                return replace(old.rekey, cursor=self.cursor), old.key_generation
            case None:
                return old.rekey, old.key_generation
            case RekeyPhase.SWEEPING:
                return Rekey(phase, old.key_generation), next_generation(old.key_generation)
            case RekeyPhase.SWEPT:
                return Rekey(phase, old.rekey.old_generation), old.key_generation
            case _:
                return Rekey(phase), old.key_generation

    def _write_checkpoint(
        self, new_epoch: bool, clean: bool, pins: tuple[Anchor, ...], phase: RekeyPhase | None,
        keys: Subkeys,
    ) -> tuple[Superblock, bytes]:  # fmt: skip
        old = self.superblock
        rekey, key_generation = self._rekey_at(phase)
        if phase is RekeyPhase.SWEEPING:
            # The root, and whatever is computed from here on, is under the new key; pages that
            # are as they were are authentic by the MAC that their parents have (FORMAT.md 11.2).
            self._macs.begin(keys.tree)
        if phase is RekeyPhase.SWEPT:
            self.table.keep_generation(key_generation)
        if new_epoch:
            if self.table.is_nearly_full:
                self.compact_table()
            self.table.draw(key_generation, self._random)
        root_mac = self.tree.refresh(self.size)
        for slot, position in self.tree.gone_nodes:
            self.allocator.free_node(slot, position)
        self.tree.gone_nodes.clear()
        pages = self.tree.take_changes(self.allocator.take_node)
        plan = self.space.extend_plan(list(self.tree.chunks()))
        pages.sort()
        content = b"".join([page for _, page in pages])
        plan.append((Step.WRITE_BLOCKS, array("Q", [offset for offset, _ in pages]), content))
        plan.extend(self._table_plan())
        # Inline blocks were written home by their commits; this makes them durable too.
        # Crash until here: the old superblock's pages are all untouched; replay again.
        plan.append((Step.SYNC,))
        tail = self.journal.tail
        rows = encode_table(self.table.rows)
        top = self.tree.top
        # The tail, what is pinned, and of the older ones as many as there is room for.
        named = dict.fromkeys((tail.anchor, *pins, *old.anchors))
        chosen = [anchor for anchor in named if anchor.sequence][:ANCHOR_COUNT]
        anchors = tuple(sorted(chosen, key=lambda anchor: -anchor.sequence))
        superblock = replace(
            old,
            generation=old.generation + 1,
            size=self.size,
            root_mac=root_mac,
            root_slot=top.slot,
            root_position=top.position,
            root_place=top.place,
            tail_page=tail.page,
            tail_sequence=tail.sequence,
            tail_mac=tail.mac,
            epoch_count=len(self.table.rows),
            table_digest=hashlib.sha256(rows).digest(),
            key_generation=key_generation,
            clean=clean,
            anchors=anchors,
            rekey=rekey,
        )
        raw = encode_superblock(superblock, keys)
        self._fence_after_sleep()
        execute(self.storage, plan)
        self._fence()
        page = raw.ljust(BLOCK_SIZE, b"\0")
        offset = self.geometry.superblock_offset(1 - self._live_copy)
        # Crash here: wholly old or wholly new superblock; both describe the same blocks.
        execute(self.storage, [(Step.DURABLE, offset, [page])])
        return superblock, raw

    def forget_generation(self, old: int) -> None:
        """Wipe the image key that was replaced, and accept nothing under it any more."""
        self._macs.forget_old()
        self.cipher.forget_generation(old, self.table.rows)

    def _table_plan(self) -> WritePlan:
        """Bring the copy of the epoch table that is not live up to date, where it differs."""
        offset = self.geometry.table_offset(1 - self._live_copy)
        rows = encode_table(self.table.rows)
        padded = rows.ljust(-(-len(rows) // BLOCK_SIZE) * BLOCK_SIZE, b"\0")
        # Past the page cache: after a failed sync it shows rows that are not on the disk.
        there = self.storage.read_direct(offset, len(padded)) if padded else b""
        return [
            (Step.WRITE, offset + at, [padded[at : at + BLOCK_SIZE]])
            for at in range(0, len(padded), BLOCK_SIZE)
            if padded[at : at + BLOCK_SIZE] != there[at : at + BLOCK_SIZE]
        ]

    def _fence(self) -> None:
        """Stop when somebody else has written a superblock since (FORMAT.md 4.1)."""
        read = self.storage.read_direct
        live = read(self.geometry.superblock_offset(self._live_copy), BLOCK_SIZE)
        other = read(self.geometry.superblock_offset(1 - self._live_copy), BLOCK_SIZE)
        newer = int.from_bytes(other[32:40], "little") > self.superblock.generation
        if live[:SUPERBLOCK_SIZE] != self._live_raw or (
            newer and superblock_is_authentic(other[:SUPERBLOCK_SIZE], self._keys)
        ):
            raise StorageFailed(
                self.path, "somebody else has opened and written this image meanwhile"
            )
        self._fenced_at = self.storage.clock()

    def _fence_after_sleep(self) -> None:
        """As `_fence`, where this process may have slept long enough to lose its lock."""
        if self.storage.clock() - self._fenced_at > FENCE_AGE:
            self._fence()

    def compact_table(self) -> None:
        """Drop the rows of the epoch table that no entry names; reads every leaf page."""
        epochs: set[int] = set()
        if self.tree.lost:
            return  # nor is what a lost node page covers
        for group in self.tree.groups():
            leaf = self.tree.leaf(group)
            try:
                page = leaf or self.read_leaf(group, self.tree.leaf_source(group))[0]
            except BlockDamaged:
                return  # what the damaged page names is not known: keep every row
            epochs |= epochs_of(page)
        self.table.compact(epochs)


def encode_superblock(superblock: Superblock, keys: Subkeys) -> bytes:
    """Return the 512 bytes with their MAC."""
    body = superblock.encode()
    return body + mac_of(keys.superblock, body)


def superblock_is_authentic(raw: bytes, keys: Subkeys) -> bool:
    """Whether the MAC of 512 bytes is right."""
    return len(raw) == SUPERBLOCK_SIZE and same_mac(mac_of(keys.superblock, raw[:-32]), raw[-32:])


def _give_back(sealed: memoryview) -> None:
    buffer = sealed.obj
    sealed.release()
    assert isinstance(buffer, bytearray)
    scratch.give_back(buffer)
