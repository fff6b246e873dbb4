"""Space in the file system: reserved before a write is accepted, given back after a checkpoint.

ENOSPC belongs to the write that needs the space (FORMAT.md 8.4), so everything that a commit or a
checkpoint will write has its space before. What is given back is given back only when the
superblock that no longer needs it is durable (8.3, step 5).

Concurrency: reservations in the owner's thread, or in the worker of an exclusive operation. While
space is being given back in a worker, `is_reclaiming` keeps writes away from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sealfs.image.allocator import Allocator
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, Geometry, runs_of
from sealfs.image.plan import Step, WritePlan
from sealfs.image.steps import Steps
from sealfs.image.storage import Storage, execute
from sealfs.image.tree import NO_SLOT, Tree

SPACE_PARTS = 8
"""A slot's space is reserved in eighths (64 KiB): one bit each in a byte for the slot."""


class Space:
    """What the file system holds for the slots of one image."""

    def __init__(
        self, storage: Storage, geometry: Geometry, allocator: Allocator, tree: Tree
    ) -> None:
        self.keep: Callable[[int], bool] = lambda group: False
        """Whether the space of a group's holes is about to be used: they are not punched now."""
        self.leaving: set[int] = set()
        """Groups that the record being written takes the slot from."""
        self.punching: set[int] = set()
        """Groups of which blocks are being given back."""
        self.is_cutting = False
        """Whether the end of the file is being given back."""
        self.parts = bytearray(allocator.slot_count)
        """By slot: which of its eighths have their space, a bit each."""
        self.part_blocks = max(1, geometry.group_blocks // SPACE_PARTS)
        self._storage = storage
        self._geometry = geometry
        self._allocator = allocator
        self._tree = tree
        self._file_slots = allocator.slot_count
        self._chunks = list(tree.chunks())
        self._has_headers = False
        self._holes: list[tuple[int, int, int]] = []
        self._given_up: set[int] = set()
        self._is_cut = False

    def reserve(self, slot: int, index: int, count: int) -> None:
        """Have space in the file system for blocks of a slot, and for its leaf pages.

        Raises:
            NoSpace: there is none.
        """
        if slot >= len(self.parts):
            self.parts.extend(bytes(slot + 1 - len(self.parts)))
        part = self.part_blocks
        first, last = index // part, (index + count - 1) // part
        wanted = (1 << last + 1) - (1 << first)
        have = self.parts[slot]
        if wanted & ~have == 0:
            return
        start = self._geometry.block_offset(slot, first * part)
        end = self._geometry.block_offset(slot, min((last + 1) * part, self._geometry.group_blocks))
        if not have:
            if first == 0:
                start = self._geometry.slot_offset(slot)
            else:
                self._storage.allocate(self._geometry.slot_offset(slot), 2 * BLOCK_SIZE)
        self._storage.allocate(start, end - start)
        self.parts[slot] = have | wanted

    def has(self, slot: int, index: int, count: int) -> bool:
        """Whether blocks of a slot have their space in the file system, without asking for it."""
        if slot >= len(self.parts):
            return False
        first, last = index // self.part_blocks, (index + count - 1) // self.part_blocks
        return not ((1 << last + 1) - (1 << first)) & ~self.parts[slot]

    def reserve_metadata(self) -> None:
        """Have space for headers, journal and all node pages, before a session's first change.

        They had it when they were made; a copy of the file may not have kept it.

        Raises:
            NoSpace: there is none.
        """
        if not self._has_headers:
            self._storage.allocate(0, self._geometry.slots_offset)
            self._has_headers = True
        while self._chunks:
            self.reserve(self._chunks[-1], 0, self._geometry.group_blocks)
            self._chunks.pop()

    def reserve_leaf(self, slot: int) -> None:
        """Have space for both places of a slot's leaf page; raises NoSpace."""
        if slot >= len(self.parts) or not self.parts[slot]:
            self._storage.allocate(self._geometry.slot_offset(slot), 2 * BLOCK_SIZE)

    def is_reclaiming(self, group: int) -> bool:
        """Whether space of a group is being given back: no write may reserve it now."""
        return self.is_cutting or group in self.punching or group in self.leaving

    def reserve_nodes(self, count: int) -> None:
        """Have room, on the disk, for that many new node pages at the next checkpoint.

        Raises:
            NoSpace: there is none.
        """
        while self._allocator.free_node_count < count:
            slot = self._allocator.take()
            try:
                self.reserve(slot, 0, self._geometry.group_blocks)
            except BaseException:
                self._allocator.put_back(slot)
                raise
            self._allocator.add_chunk(slot)

    # -- the file's length

    def extend_plan(self, slots: Sequence[int]) -> WritePlan:
        """Return the step that makes the file long enough for these slots."""
        needed = max(slots, default=-1) + 1
        if needed <= self._file_slots:
            return []
        step = max(1, self._geometry.group_blocks // 8)  # few changes of the length
        self._file_slots = -(-needed // step) * step
        return [(Step.TRUNCATE, self._geometry.slot_offset(self._file_slots))]

    # -- giving back

    def note_holes(self, group: int, index: int, count: int) -> None:
        """Remember blocks that became holes; punched after a checkpoint, unless rewritten."""
        self._holes.append((group, index, count))

    def note_given_up(self, slot: int) -> None:
        """Remember a slot whose group became a hole."""
        self._given_up.add(slot)

    def note_cut(self) -> None:
        """Remember that the disk was shrunk: the file is cut after a checkpoint."""
        self._is_cut = True

    def reclaim_steps(self, *, clean: bool) -> Steps[None]:
        """Punch what became holes, cut the file after a shrink, free slots.

        Args:
            clean: the image is being closed: the space of every free slot goes.
        """
        geometry = self._geometry
        plan: WritePlan = []
        later: list[tuple[int, int, int]] = []
        for group, index, count in self._holes:
            slot = self._tree.slot_of(group)
            if slot == NO_SLOT:
                continue
            if self.keep(group):
                later.append((group, index, count))
                continue
            leaf = self._tree.leaf(group)
            if leaf is None:
                continue  # evicted: the space stays, which costs space and nothing else
            entries = leaf[index * ENTRY_SIZE : (index + count) * ENTRY_SIZE]
            holes = [i for i in range(count) if entries[i * ENTRY_SIZE + 28] == 0]
            for first, run in runs_of(holes):
                offset = geometry.block_offset(slot, index + first)
                plan.append((Step.PUNCH, offset, run * BLOCK_SIZE))
            self._forget(slot)
            self.punching.add(group)
        self._holes = later
        released = self._allocator.freed()
        for slot in self._given_up.intersection(released):
            plan.append((Step.PUNCH, geometry.slot_offset(slot), geometry.slot_size))
            self._forget(slot)
        self._given_up.difference_update(released)
        if plan:
            yield lambda: execute(self._storage, plan)
        self.punching.clear()
        self._allocator.release()
        if self._is_cut or clean:
            self._is_cut = False
            self._file_slots = self._allocator.trim()
            del self.parts[self._file_slots :]
            end = geometry.slot_offset(self._file_slots)
            self.is_cutting = True  # space reserved past the end would go with it
            yield lambda: execute(self._storage, [(Step.TRUNCATE, end)])
            self.is_cutting = False
        if clean:
            yield self._punch_free

    def _punch_free(self) -> None:
        """Give back the space of slots that became free in this session."""
        free = [s for s in self._allocator.free_slots() if s < len(self.parts) and self.parts[s]]
        size = self._geometry.slot_size
        execute(
            self._storage, [(Step.PUNCH, self._geometry.slot_offset(slot), size) for slot in free]
        )

    def _forget(self, slot: int) -> None:
        if slot < len(self.parts):
            self.parts[slot] = 0
