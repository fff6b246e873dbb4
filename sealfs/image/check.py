"""Verify a whole image and name what is wrong: which blocks of the disk, and what differs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from sealfs.errors import BlockDamaged
from sealfs.image.cipher import TAG_SIZE
from sealfs.image.format import ENTRY_PARTS
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, runs_of
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


def check_steps(volume: Volume, *, data: bool) -> Steps[list[Finding]]:
    """Verify every leaf page and, with `data`, every block. Node pages were verified at open."""
    findings: list[Finding] = []
    for group in list(volume.tree.groups()):
        leaf = volume.tree.leaf(group)
        page = bytes(leaf) if leaf is not None else None
        findings += yield partial(_check_group, volume, group, page, data)
    return findings


def _check_group(volume: Volume, group: int, page: bytes | None, data: bool) -> list[Finding]:
    group_blocks = volume.geometry.group_blocks
    first = group * group_blocks
    if page is None:
        try:
            page, _ = volume.read_leaf(group, volume.tree.leaf_source(group))
        except BlockDamaged:
            return [Finding(first, group_blocks, "leaf page does not authenticate")]
    if not data:
        return []
    damaged = [
        index
        for index in range(group_blocks)
        if page[index * ENTRY_SIZE + 28] and not _opens(volume, group, index, page)
    ]
    return [
        Finding(first + start, count, "tag differs: damaged, or altered outside sealfs")
        for start, count in runs_of(damaged)
    ]


def _opens(volume: Volume, group: int, index: int, page: bytes) -> bool:
    block = group * volume.geometry.group_blocks + index
    home = volume.geometry.block_offset(volume.tree.slot_of(group), index)
    sealed = bytearray(BLOCK_SIZE + TAG_SIZE)
    volume.storage.read_into(volume.inline.get(block, home), memoryview(sealed)[:BLOCK_SIZE])
    nonce, tag, _ = ENTRY_PARTS.unpack_from(page, index * ENTRY_SIZE)
    try:
        volume.cipher.open_block(block, sealed, nonce, tag)
    except BlockDamaged:
        return False
    return True
