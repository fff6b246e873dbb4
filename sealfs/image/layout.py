"""Arithmetic of a sealed image: blocks, groups, slots, and where each of them lies in the file.

Nobody else divides by a block size or multiplies by a slot size. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

BLOCK_SIZE = 4096
"""Bytes in a block and in a page (FORMAT.md 1.1)."""

ENTRY_SIZE = 32
"""Bytes that a leaf page has for one block (FORMAT.md 6.1)."""

JOURNAL_PAGES_MIN = 256
JOURNAL_PAGES_MAX = 16384

SIZE_MAX = 1 << 47
"""128 TiB: what four levels of 128 over groups of 128 blocks cover."""


@dataclass(frozen=True)
class Geometry:
    """The constants of the format as parameters (FORMAT.md 2), so that tests can be small.

    What follows from them is computed once: offsets are asked for with every block.
    """

    group_blocks: int = 128
    fanout: int = 128
    depth: int = 4
    header_pages: int = 256
    identity_pages: int = 15
    journal_pages: int = JOURNAL_PAGES_MIN

    @cached_property
    def slot_pages(self) -> int:
        """Pages in a slot: two places of the leaf page and the group's blocks."""
        return self.group_blocks + 2

    @cached_property
    def slot_size(self) -> int:
        """Bytes in a slot."""
        return self.slot_pages * BLOCK_SIZE

    @cached_property
    def chunk_nodes(self) -> int:
        """Node pages in a slot that is used as a node chunk."""
        return self.slot_pages // 2

    @cached_property
    def group_count_max(self) -> int:
        """Groups that the tree can name."""
        return int(self.fanout**self.depth)

    @cached_property
    def size_max(self) -> int:
        """Bytes of the largest disk."""
        return self.group_count_max * self.group_blocks * BLOCK_SIZE

    @cached_property
    def table_rows_max(self) -> int:
        """Rows that the epoch table has room for (FORMAT.md 4.2)."""
        return (self.header_pages - 1 - self.identity_pages) * BLOCK_SIZE // 40

    @cached_property
    def journal_offset(self) -> int:
        """Where the journal begins."""
        return 2 * self.header_pages * BLOCK_SIZE

    @cached_property
    def slots_offset(self) -> int:
        """Where slot 0 begins."""
        return self.journal_offset + self.journal_pages * BLOCK_SIZE

    def superblock_offset(self, copy: int) -> int:
        """Where superblock A (0) or B (1) lies."""
        return copy * self.header_pages * BLOCK_SIZE

    def identity_offset(self, copy: int) -> int:
        """Where a copy of the identity lies."""
        return self.superblock_offset(copy) + BLOCK_SIZE

    def table_offset(self, copy: int) -> int:
        """Where a copy of the epoch table lies."""
        return self.superblock_offset(copy) + (1 + self.identity_pages) * BLOCK_SIZE

    def slot_offset(self, slot: int) -> int:
        """Where a slot begins; with slot = slot_count, where the file ends."""
        return self.slots_offset + slot * self.slot_size

    def slot_count_of(self, file_size: int) -> int:
        """Whole slots in a file of that length."""
        return max(0, file_size - self.slots_offset) // self.slot_size

    def leaf_offset(self, slot: int, place: int) -> int:
        """Where a place of a group's leaf page lies."""
        return self.slot_offset(slot) + place * BLOCK_SIZE

    def node_offset(self, slot: int, position: int, place: int) -> int:
        """Where a place of a node page lies."""
        return self.slot_offset(slot) + (2 * position + place) * BLOCK_SIZE

    def block_offset(self, slot: int, index: int) -> int:
        """Where block `index` (within its group) of the group in `slot` lies."""
        return self.slot_offset(slot) + (2 + index) * BLOCK_SIZE

    def journal_page_offset(self, page: int) -> int:
        """Where a page of the journal lies."""
        return self.journal_offset + page * BLOCK_SIZE


def geometry_for(size: int) -> Geometry:
    """Return the geometry of a new disk of `size` bytes: its journal is 1/16 of it, bounded.

    Each block of a busy guest passes through it, and a checkpoint costs as much for many as for
    few; what is in it is written home by the open after a crash: half a second on an SSD.
    """
    pages = size // 16 // BLOCK_SIZE
    return Geometry(journal_pages=min(max(pages, JOURNAL_PAGES_MIN), JOURNAL_PAGES_MAX))


def block_count_of(size: int) -> int:
    """Blocks that hold `size` bytes, the last one perhaps in part."""
    return -(-size // BLOCK_SIZE)


def group_runs(first: int, count: int, group_blocks: int) -> Iterator[tuple[int, int, int]]:
    """Cut a run of blocks at group borders: (group, first index in the group, count)."""
    while count > 0:
        group, index = divmod(first, group_blocks)
        part = min(count, group_blocks - index)
        yield group, index, part
        first += part
        count -= part


def runs_of(sorted_blocks: list[int]) -> Iterator[tuple[int, int]]:
    """Join sorted block indexes to runs: (first, count)."""
    first = last = -2
    for block in sorted_blocks:
        if block != last + 1:
            if first >= 0:
                yield first, last - first + 1
            first = block
        last = block
    if first >= 0:
        yield first, last - first + 1
