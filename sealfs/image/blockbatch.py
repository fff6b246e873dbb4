"""What `_blockbatch.c` does, to the same bytes, where that could not be built: slower."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE
from sealfs.image.plan import Buffer

_UNKNOWN = 2


def spans(blocks: Sequence[int], group_blocks: int) -> tuple[list[int], list[int]]:
    """Cut blocks where the group changes; see `_blockbatch.spans`."""
    groups: list[int] = []
    ends: list[int] = []
    for i, block in enumerate(blocks):
        group = block // group_blocks
        if not groups or groups[-1] != group:
            if groups:
                ends.append(i)
            groups.append(group)
    if groups:
        ends.append(len(blocks))
    return groups, ends


def flags_of(leaves: dict[int, bytearray], blocks: Sequence[int], group_blocks: int) -> bytes:
    """Say of each block whether it is there; see `_blockbatch.flags_of`."""
    flags = bytearray()
    for block in blocks:
        group, index = divmod(block, group_blocks)
        leaf = leaves.get(group)
        flags.append(_UNKNOWN if leaf is None else leaf[index * ENTRY_SIZE + 28] != 0)
    return bytes(flags)


def set_entries(
    leaves: dict[int, bytearray], blocks: Sequence[int], entries: Buffer, group_blocks: int
) -> None:
    """Set the entry of each block; see `_blockbatch.set_entries`."""
    if len(entries) != len(blocks) * ENTRY_SIZE:
        raise ValueError("set_entries: sizes do not fit")
    changes = []
    for i, block in enumerate(blocks):
        group, index = divmod(block, group_blocks)
        changes.append((leaves[group], index * ENTRY_SIZE, i * ENTRY_SIZE))
    for leaf, to, at in changes:
        leaf[to : to + ENTRY_SIZE] = entries[at : at + ENTRY_SIZE]


def home_offsets(blocks: Sequence[int], group_blocks: int, starts: Sequence[int]) -> bytes:
    """Return where each block lies; see `_blockbatch.home_offsets`."""
    groups, ends = spans(blocks, group_blocks)
    if len(starts) != len(groups):
        raise ValueError("home_offsets: sizes do not fit: starts")
    offsets = array("Q")
    first = 0
    for group, end, start in zip(groups, ends, starts, strict=True):
        base = start - group * group_blocks * BLOCK_SIZE
        offsets.extend(base + block * BLOCK_SIZE for block in blocks[first:end])
        first = end
    return offsets.tobytes()
