"""Decide what a commit takes, how each block is written, and where its space comes from.

Between the cache and the volume: space is reserved here when a write is accepted, and batches are
made here when it is committed (FORMAT.md 8.1). The steps in here are exclusive: one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

try:
    from sealfs.image import _blockbatch as batches
except ImportError:  # it could not be built here; the same in Python
    from sealfs.image import blockbatch as batches  # type: ignore[no-redef]

from sealfs.errors import NoSpace
from sealfs.image.batch import Batch, Frames
from sealfs.image.cache import ImageCache
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, block_count_of, group_runs
from sealfs.image.plan import Buffer
from sealfs.image.reader import Reader
from sealfs.image.steps import Steps
from sealfs.image.tree import NO_SLOT
from sealfs.image.volume import RECORD_BLOCKS_MAX, Volume

SMALL_COMMIT_BLOCKS = 64
"""Up to 256 KiB all goes inline: one device flush instead of two (FORMAT.md 8.1)."""

UNKNOWN = 2
"""In what `flags_of` says: the leaf page is not in memory."""

_INVERTED = bytes.maketrans(b"\0\1", b"\1\0")

HOLES_MAX = 4096
"""HOLE runs in one record: 64 KiB of it."""


class Committer:
    """Space and batches of one image."""

    def __init__(self, volume: Volume, cache: ImageCache, reader: Reader) -> None:
        self._volume = volume
        self._tree = volume.tree
        self._geometry = volume.geometry
        self._cache = cache
        self._reader = reader
        self.reserved: dict[int, int] = {}
        """Group to the slot its first blocks will get; nothing on the disk names it yet."""
        self._new_nodes: set[int] = set()
        self.allocating: set[int] = set()
        """Groups that a preallocation under way gives their slots: not dirty, and not unused."""
        volume.space.keep = self.is_dirty_group

    # -- space

    def reserve(self, first: int, count: int) -> bool:
        """Reserve the space that committing these blocks will take; False when it must wait.

        Raises:
            NoSpace: the storage is full.
            BlockDamaged: the node page that names them is lost.
        """
        volume, tree = self._volume, self._tree
        for group, index, part in group_runs(first, count, self._geometry.group_blocks):
            if volume.space.is_reclaiming(group):
                return False
            slot = tree.slot_of(group)
            if slot == NO_SLOT:
                slot = self.reserved.get(group, NO_SLOT)
                if slot == NO_SLOT:
                    slot = self.reserve_slot(group)
            elif (
                part < self._geometry.group_blocks
                and tree.leaf(group) is None
                and self._reader.leaf_at_hand(group)[0] is None
            ):
                return False
            volume.space.reserve(slot, index, part)
        return True

    def has_space(self, first: int, count: int) -> bool:
        """Whether committing blocks of one group takes no space that they lack: the usual case."""
        group, index = divmod(first, self._geometry.group_blocks)
        node_index, i = divmod(group, self._geometry.fanout)
        node = self._tree.nodes[1].get(node_index)
        return (
            node is not None
            and bool(node.present[i])
            and group in self._tree.leaves
            and index + count <= self._geometry.group_blocks
            and self._volume.space.has(node.slots[i], index, count)
            and not self._volume.space.is_reclaiming(group)
        )

    def reserve_slot(self, group: int) -> int:
        """Choose the slot of a group that has none, and have room for the nodes above it."""
        volume = self._volume
        index = group // self._geometry.fanout
        node = self._tree.nodes[1].get(index)
        if node is None or node.slot == NO_SLOT:
            self._new_nodes.add(index)
            volume.space.reserve_nodes(len(self._new_nodes) * self._geometry.depth)
        slot = self.reserved[group] = volume.allocator.take()
        return slot

    def reserve_leaves(self, groups: list[int]) -> None:
        """Have space for both places of the leaf pages of these groups.

        Raises:
            NoSpace: the storage is full.
        """
        for group in groups:
            slot = self._tree.slot_of(group)
            if slot != NO_SLOT:
                self._volume.space.reserve_leaf(slot)

    def is_dirty_group(self, group: int) -> bool:
        """Whether a block of the group waits to be committed, or is being committed."""
        whole = self._geometry.group_blocks
        return self._cache.has_newer(group * whole, whole)

    def next_group(self, group: int) -> int:
        """Return the next group that holds something or is lost, or one beyond every disk."""
        beyond = self._geometry.group_count_max
        found = next(self._tree.groups(group + 1), beyond)
        size = self._geometry.group_blocks
        lost = (each.first // size for each in self._tree.lost if each.first // size > group)
        found = min(found, min(lost, default=beyond))
        for blocks in (self._cache.dirty, self._cache.committing):
            later = (block // size for block in blocks if block // size > group)
            found = min(found, min(later, default=beyond))
        return found

    # -- commit

    def commit_dirty_steps(self, size: int) -> Steps[None]:
        """Commit every dirty block and the size of the disk."""
        self._cache.begin_commit()
        yield from self._commit_taken_steps(size)

    def seal_again_steps(self, blocks: Sequence[int], content: Buffer) -> Steps[None]:
        """Commit blocks as they are committed already, so that the present epoch seals them.

        A write that is accepted meanwhile, or waits to be committed, is newer and stays so.

        Args:
            blocks: ascending; all of them are there.
            content: of each; read since the last commit. As many frames are free.
        """
        self._cache.begin_again(blocks, content)
        yield from self._commit_taken_steps(self._volume.size)

    def _commit_taken_steps(self, size: int) -> Steps[None]:
        """Commit what the cache has handed out, and the size of the disk."""
        blocks = sorted(self._cache.committing)
        is_small = len(blocks) <= SMALL_COMMIT_BLOCKS
        whole, leaves = self._geometry.group_blocks, self._tree.leaves
        groups, ends = batches.spans(blocks, whole)
        yield from self._reader.load_leaves_steps(
            [
                group
                for group, start, end in zip(groups, [0, *ends], ends, strict=False)
                if end - start < whole and group not in leaves
            ]
        )
        # Of these blocks nobody else makes a hole, nor fills one, while this operation runs.
        flags = batches.flags_of(leaves, blocks, whole)
        if is_small:
            flags = flags.replace(b"\0", b"\1")
        # The first record carries a new size: a block beyond the end that became durable before
        # the size did would come back from the dead when the disk grows over it.
        batch, count, start, at = Batch(size=size), 0, 0, 0
        while at < len(groups):
            room = self._room(batch, count)
            stop, at = _usual(ends, at, start, flags, room, whole)
            if stop > start:
                _add(batch, blocks[start:stop], flags[start:stop])
                count, start = count + stop - start, stop
                continue
            group, members = groups[at], blocks[start : ends[at]]
            start, at = ends[at], at + 1
            for part in self._split(self._decide(size, group, members, is_small=is_small)):
                part_count = len(part.blocks(whole))
                if count and (
                    count + part_count > RECORD_BLOCKS_MAX
                    or batch.page_count(part) > self._volume.journal.record_pages_max
                ):
                    yield from self._commit_batch_steps(batch)
                    batch, count = Batch(size=size), 0
                batch.add(part)
                count += part_count
        if count or size != self._volume.size:
            yield from self._commit_batch_steps(batch)
        self.drop_unused_slots()

    def _frames(self) -> Frames:
        return Frames(self._cache.slab, self._cache.committing)

    def _commit_batch_steps(self, batch: Batch) -> Steps[None]:
        yield from self._volume.commit_steps(batch, self._frames())
        # Only now: until the record is applied, a write into one of these groups must find the
        # slot that the group is about to get.
        for group, _ in batch.full_groups + batch.allocs:
            self.reserved.pop(group, None)
        # Home is written now: from here on reads go to the disk.
        self._cache.finish(batch.blocks(self._geometry.group_blocks))

    def _room(self, batch: Batch, count: int) -> int:
        """Return how many blocks a batch of `count` can take for sure, however they are written."""
        pages = self._volume.journal.record_pages_max - batch.page_count()
        return min(RECORD_BLOCKS_MAX - count, pages - pages * (8 + ENTRY_SIZE) // BLOCK_SIZE - 1)

    def _decide(self, size: int, group: int, members: list[int], *, is_small: bool) -> Batch:
        """Decide how a group's dirty blocks are written (FORMAT.md 8.1)."""
        batch = Batch(size=size)
        reserved = self.reserved.get(group, NO_SLOT)
        is_live = self._tree.slot_of(group) != NO_SLOT
        is_whole = len(members) == self._geometry.group_blocks
        if is_whole and (not is_small or (is_live and self._tree.leaf(group) is None)):
            slot = reserved if reserved != NO_SLOT else self._take_whole_slot()
            if slot != NO_SLOT:
                batch.full_groups = [(group, slot)]
                return batch
        if not is_live:
            batch.allocs = [(group, reserved)]
            if is_small:
                batch.inline = members
            else:
                batch.direct = members
            return batch
        leaf = self._volume.leaf(group)
        for block in members:
            at = block % self._geometry.group_blocks * ENTRY_SIZE
            # A hole has no old copy to lose; a live block goes through the journal.
            is_direct = not is_small and leaf[at + 28] == 0
            (batch.direct if is_direct else batch.inline).append(block)
        return batch

    def _split(self, batch: Batch) -> Iterator[Batch]:
        """Cut what one group writes to parts that fit in a record each."""
        pages_max = self._volume.journal.record_pages_max
        if batch.page_count() <= pages_max:
            yield batch
            return
        inline = batch.inline
        batch.inline = [0] * pages_max
        room = 2 * pages_max - batch.page_count()
        for at in range(0, len(inline), room):
            batch.inline = inline[at : at + room]
            yield batch
            batch = Batch(size=batch.size)

    def _take_whole_slot(self) -> int:
        """Take a slot to move a group to; NO_SLOT where the storage has no room for that."""
        slot = self._volume.allocator.take()
        try:
            self._volume.space.reserve(slot, 0, self._geometry.group_blocks)
        except NoSpace:
            self._volume.allocator.put_back(slot)
            return NO_SLOT
        return slot

    def drop_unused_slots(self) -> None:
        """Put back slots reserved for writes that were discarded before their commit."""
        for group in [
            g for g in self.reserved if g not in self.allocating and not self.is_dirty_group(g)
        ]:
            self._volume.allocator.put_back(self.reserved.pop(group))
        fanout = self._geometry.fanout
        nodes = self._tree.nodes[1]
        self._new_nodes = {g // fanout for g in self.reserved} | self._new_nodes.intersection(nodes)
        self._new_nodes -= {i for i in self._new_nodes if i in nodes and nodes[i].slot != NO_SLOT}

    # -- holes

    def partial_groups(self, first: int, count: int) -> list[int]:
        """Return the live groups of which a run of blocks covers a part."""
        whole = self._geometry.group_blocks
        return [g for g, _, part in self._volume.live_parts(first, count) if part < whole]

    def discard_steps(self, first: int, count: int) -> Steps[None]:
        """Make a run of blocks holes; `partial_groups` of it are loaded.

        The record comes first and the cache after it, in one go with the tree: whoever reads
        meanwhile finds the old content or zeros, and never the one after the other. A write that
        is accepted into the run meanwhile counts as one before the discard.
        """
        holes = self._holes_in(first, count)
        # From here to the record a write into these groups waits: its slot is about to go.
        whole = self._geometry.group_blocks
        self._volume.space.leaving = {
            group for run in holes for group, _, part in group_runs(*run, whole) if part == whole
        }
        start, end = first, first + count
        for at in range(0, len(holes), self._holes_max):
            batch = Batch(size=self._volume.size, holes=holes[at : at + self._holes_max])
            yield from self._volume.commit_steps(batch, self._frames())
            stop = sum(batch.holes[-1])
            self._forget(start, stop)
            start = stop
        self._forget(start, end)
        self._volume.space.leaving = set()
        self.drop_unused_slots()

    def _forget(self, first: int, end: int) -> None:
        """Drop what the cache has of blocks that have become holes."""
        if first < end:
            self._cache.discard(first, end - first)
            self._reader.version += 1

    def _holes_in(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the runs that a discard makes holes: what is live in it, groups it empties whole.

        A run never joins parts of two groups, unless it covers both.
        """
        group_blocks = self._geometry.group_blocks
        holes: list[tuple[int, int]] = []
        for group, index, part in self._volume.live_parts(first, count):
            start = group * group_blocks
            if part < group_blocks:
                leaf = self._volume.leaf(group)
                at, end = index * ENTRY_SIZE, (index + part) * ENTRY_SIZE
                if not any(leaf[at:end]):
                    continue
                if any(leaf[:at]) or any(leaf[end:]) or self.is_dirty_group(group):
                    holes.append((start + index, part))
                    continue
            if holes and sum(holes[-1]) == start and not holes[-1][0] % group_blocks:
                holes[-1] = (holes[-1][0], holes[-1][1] + group_blocks)
            else:
                holes.append((start, group_blocks))
        return holes

    @property
    def _holes_max(self) -> int:
        pages = self._volume.journal.record_pages_max
        return min(HOLES_MAX, (pages * BLOCK_SIZE - 256) // 16)

    def shrink_steps(self, size: int) -> Steps[None]:
        """Cut the disk; the end of its last block has been zeroed, perhaps not yet committed.

        As with `discard_steps`, the record comes first and the cache after it.
        """
        tail, end = block_count_of(size), self._geometry.size_max // BLOCK_SIZE
        whole = self._geometry.group_blocks
        self._volume.space.leaving = {
            group for group, _, part in self._volume.live_parts(tail, end - tail) if part == whole
        }
        # The last block and the size in one record: neither is ever seen without the other.
        self._cut_frame(size)
        last = [block for block in (tail - 1,) if block in self._cache.dirty]
        self._cache.begin_commit(last)
        batch = Batch(size=size)
        for block in last:
            batch = self._decide(size, block // whole, [block], is_small=True)
        yield from self._commit_batch_steps(batch)
        self._forget(tail, end)
        self._cut_frame(size)
        self._volume.space.leaving = set()
        self.drop_unused_slots()

    def _cut_frame(self, size: int) -> None:
        """Zero what a write that came between has put beyond the size into the last block."""
        frame = self._cache.dirty.get(size // BLOCK_SIZE)
        if frame is not None and size % BLOCK_SIZE:
            at = size % BLOCK_SIZE
            self._cache.frame(frame)[at:] = bytes(BLOCK_SIZE - at)

    # -- preallocation

    def alloc_steps(self, groups: list[int]) -> Steps[None]:
        """Give groups their reserved slots, empty."""
        allocs = [
            (group, self.reserved[group])
            for group in groups
            if group in self.reserved and self._tree.slot_of(group) == NO_SLOT
        ]
        yield from self._commit_batch_steps(Batch(size=self._volume.size, allocs=allocs))


def _usual(
    ends: list[int], at: int, start: int, flags: bytes, room: int, whole: int
) -> tuple[int, int]:
    """Find how far the blocks from `start` on, where group `at` begins, are nothing special.

    That is: of live groups whose leaf pages are in memory, not of whole groups, and not more than
    there is room for. Returns where those blocks end, and the group that comes then.
    """
    unknown = flags.find(UNKNOWN, start)
    limit = min(start + room, len(flags) if unknown < 0 else unknown)
    while at < len(ends) and ends[at] <= limit and ends[at] - start < whole:
        start = ends[at]
        at += 1
    return start, at


def _add(batch: Batch, blocks: list[int], flags: bytes) -> None:
    """Add blocks of live groups as `_decide` would have it (FORMAT.md 8.1)."""
    if 0 not in flags:
        batch.inline += blocks
    else:
        batch.inline += compress(blocks, flags)
        batch.direct += compress(blocks, flags.translate(_INVERTED))
