"""What one journal record is to say, before anything is sealed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from sealfs.image.plan import Buffer
from sealfs.image.record import head_pages_of


class Frames(NamedTuple):
    """Where the content of blocks is: frame by_block[block] of the slab, BLOCK_SIZE bytes each."""

    slab: Buffer
    by_block: Mapping[int, int]

    def of(self, blocks: Iterable[int]) -> list[int]:
        """Return the frame numbers of blocks."""
        return list(map(self.by_block.__getitem__, blocks))


@dataclass(slots=True)
class Batch:
    """What one record is to say; blocks are indexes on the VM's disk, ascending.

    A block stands in at most one of `full_groups`, `direct` and `inline`.
    """

    size: int
    barrier: bool = True
    full_groups: list[tuple[int, int]] = field(default_factory=list)
    """(group, free slot): all its blocks are given."""
    allocs: list[tuple[int, int]] = field(default_factory=list)
    direct: list[int] = field(default_factory=list)
    inline: list[int] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)

    def page_count(self, other: Batch | None = None) -> int:
        """Pages of the record, or of the one that says what `other` says as well."""
        counts = [len(self.allocs), len(self.full_groups), len(self.direct), len(self.inline),
                  len(self.holes)]  # fmt: skip
        if other is not None:
            counts[0] += len(other.allocs)
            counts[1] += len(other.full_groups)
            counts[2] += len(other.direct)
            counts[3] += len(other.inline)
        return head_pages_of(*counts) + counts[3]

    def add(self, other: Batch) -> None:
        """Say what another batch says as well."""
        self.allocs += other.allocs
        self.full_groups += other.full_groups
        self.direct += other.direct
        self.inline += other.inline

    def blocks(self, group_blocks: int) -> list[int]:
        """Return all blocks that it writes."""
        blocks: list[int] = []
        for group, _ in self.full_groups:
            blocks.extend(range(group * group_blocks, (group + 1) * group_blocks))
        return blocks + self.direct + self.inline
