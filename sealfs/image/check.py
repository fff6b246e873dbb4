"""Verify a whole image and name what is wrong: which blocks of the disk, and what differs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.image.cipher import TAG_SIZE
from sealfs.image.format import ENTRY_PARTS
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, block_count_of, runs_of
from sealfs.image.steps import Steps

if TYPE_CHECKING:
    from sealfs.image.volume import Volume


@dataclass(frozen=True, slots=True)
class Finding:
    """Blocks of the disk that cannot be verified."""

    first_block: int
    block_count: int
    cause: str

    @property
    def offset(self) -> int:
        """Where they begin on the disk, in bytes."""
        return self.first_block * BLOCK_SIZE

    @property
    def size(self) -> int:
        """How many bytes of the disk they cover."""
        return self.block_count * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Part:
    """What a part of a check found, and where the next part begins."""

    findings: list[Finding]
    size: int
    """Bytes of the file that were looked at."""
    next_group: int | None
    """None: that was the last part."""


def check_part_steps(volume: Volume, start: int, count: int, *, data: bool) -> Steps[Part]:
    """Verify the leaf pages of the first `count` groups from the group `start` on.

    With `data` every block too. Node pages were verified at open; what those that were lost
    cover is named with the groups before it.
    """
    findings: list[Finding] = []
    groups = list(islice(volume.tree.groups(start), count + 1))
    for group in groups[:count]:
        findings += yield from _group_steps(volume, group, data)
    size = len(groups[:count]) * volume.geometry.slot_size
    following = groups[count] if len(groups) > count else None
    end = following or volume.geometry.group_count_max
    blocks = volume.geometry.group_blocks
    findings += [f for f in lost_findings(volume) if start <= f.first_block // blocks < end]
    return Part(sorted(findings, key=lambda each: each.first_block), size, following)


def lost_findings(volume: Volume) -> list[Finding]:
    """Return what is lost of the disk because a node page is."""
    end = block_count_of(volume.size)
    return [
        Finding(lost.first, min(lost.count, end - lost.first), lost.cause)
        for lost in volume.tree.lost
        if lost.first < end
    ]


def _group_steps(volume: Volume, group: int, data: bool) -> Steps[list[Finding]]:
    leaf = volume.tree.leaf(group)
    page = bytes(leaf) if leaf is not None else None
    findings: list[Finding] = yield partial(_check_group, volume, group, page, data)
    return findings


def _check_group(volume: Volume, group: int, page: bytes | None, data: bool) -> list[Finding]:
    group_blocks = volume.geometry.group_blocks
    first = group * group_blocks
    if page is None:
        try:
            page, _ = volume.read_leaf(group, volume.tree.leaf_source(group))
        except BlockDamaged:
            return [Finding(first, group_blocks, "leaf page does not authenticate")]
        except StorageFailed as exc:
            return [Finding(first, group_blocks, f"leaf page cannot be read: {exc.detail}")]
    if not data:
        return []
    causes: dict[str, list[int]] = {}
    sealed = _read_group(volume, group)
    for index in range(group_blocks):
        if page[index * ENTRY_SIZE + 28]:
            cause = _cause(volume, group, index, page, sealed)
            if cause is not None:
                causes.setdefault(cause, []).append(index)
    found = [
        Finding(first + start, count, cause)
        for cause, damaged in causes.items()
        for start, count in runs_of(damaged)
    ]
    return sorted(found, key=lambda finding: finding.first_block)


def _read_group(volume: Volume, group: int) -> bytes | None:
    """Return all blocks of a group as the device has them, None if not all can be read."""
    geometry = volume.geometry
    offset = geometry.block_offset(volume.tree.slot_of(group), 0)
    try:
        return volume.storage.read_direct(offset, geometry.group_blocks * BLOCK_SIZE)
    except StorageFailed:
        return None


def _cause(volume: Volume, group: int, index: int, page: bytes, sealed: bytes | None) -> str | None:
    """Return why a block does not open, None if it does."""
    block = group * volume.geometry.group_blocks + index
    content = bytearray(BLOCK_SIZE + TAG_SIZE)
    inline = volume.inline.get(block)
    try:
        if inline is not None:
            content[:BLOCK_SIZE] = volume.storage.read_direct(inline, BLOCK_SIZE)
        elif sealed is not None:
            content[:BLOCK_SIZE] = sealed[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE].ljust(
                BLOCK_SIZE, b"\0"
            )
        else:
            home = volume.geometry.block_offset(volume.tree.slot_of(group), index)
            content[:BLOCK_SIZE] = volume.storage.read_direct(home, BLOCK_SIZE)
    except StorageFailed as exc:
        return f"cannot be read: {exc.detail}"
    nonce, tag, _ = ENTRY_PARTS.unpack_from(page, index * ENTRY_SIZE)
    try:
        volume.cipher.open_block(block, content, nonce, tag)
    except BlockDamaged:
        if not any(memoryview(content)[:BLOCK_SIZE]):
            return "is all zeros on the storage: lost or punched there"
        return "tag differs: damaged, or altered outside sealfs"
    return None
