"""Encode and decode journal records (FORMAT.md 7); their MACs are `journal.py`'s business. Pure."""

from __future__ import annotations

import struct
from array import array
from dataclasses import dataclass, field
from typing import Final, Self

from sealfs.image.format import MAC_SIZE, MAGICS, NO_MAC, RECORD
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE

FLAG_BARRIER: Final = 1
FLAG_ROOT: Final = 2

RECORD_HEADER_SIZE: Final = RECORD.size
_FIRST_MAC_AT: Final = RECORD_HEADER_SIZE - 2 * MAC_SIZE

_ALLOC: Final = struct.Struct("<QI")
_GROUP: Final = struct.Struct("<QI24s")
_HOLE: Final = struct.Struct("<QQ")


@dataclass(slots=True)
class Record:
    """What a journal record says (FORMAT.md 7); its MACs are the journal's business.

    `entries` of direct and inline blocks are 32 bytes each, joined, in the order of the blocks.
    """

    uuid: bytes
    sequence: int
    epoch: int
    page: int
    previous_mac: bytes
    size: int
    barrier: bool = False
    root_mac: bytes | None = None
    allocs: list[tuple[int, int]] = field(default_factory=list)
    groups: list[tuple[int, int, bytes]] = field(default_factory=list)
    direct_blocks: list[int] = field(default_factory=list)
    direct_entries: bytes = b""
    inline_blocks: list[int] = field(default_factory=list)
    inline_entries: bytes = b""
    holes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def slots(self) -> list[int]:
        """Slots that it gives to groups."""
        return [slot for _, slot in self.allocs] + [slot for _, slot, _ in self.groups]

    @property
    def head_pages(self) -> int:
        """Pages of header and body."""
        counts = (len(self.allocs), len(self.groups), len(self.direct_blocks),
                  len(self.inline_blocks), len(self.holes))  # fmt: skip
        return head_pages_of(*counts)

    @property
    def page_count(self) -> int:
        """Pages of the whole record."""
        return self.head_pages + len(self.inline_blocks)

    def encode(self) -> bytearray:
        """Return header and body, padded to pages, with both MACs zero."""
        flags = FLAG_BARRIER * self.barrier | FLAG_ROOT * (self.root_mac is not None)
        head = bytearray(self.head_pages * BLOCK_SIZE)
        RECORD.pack_into(
            head, 0, MAGICS["record"], self.uuid, self.sequence, self.epoch, flags, self.page,
            self.page_count, self.previous_mac, self.root_mac or NO_MAC, self.size,
            len(self.allocs), len(self.groups), len(self.direct_blocks),
            len(self.inline_blocks), len(self.holes), b"", b"", b"",
        )  # fmt: skip
        body = b"".join(
            (
                *(_ALLOC.pack(*alloc) for alloc in self.allocs),
                *(_GROUP.pack(*group) for group in self.groups),
                array("Q", self.direct_blocks).tobytes(),
                self.direct_entries,
                array("Q", self.inline_blocks).tobytes(),
                self.inline_entries,
                *(_HOLE.pack(*hole) for hole in self.holes),
            )
        )
        head[RECORD_HEADER_SIZE : RECORD_HEADER_SIZE + len(body)] = body
        return head


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """The first 256 bytes of a record, decoded but not verified."""

    uuid: bytes
    sequence: int
    epoch: int
    flags: int
    page: int
    page_count: int
    previous_mac: bytes
    root_mac: bytes
    size: int
    counts: tuple[int, int, int, int, int]
    header_mac: bytes
    mac: bytes

    @classmethod
    def decode(cls, raw: bytes) -> Self | None:
        """Decode a header, or return None where the page does not begin with one."""
        if raw[:8] != MAGICS["record"] or len(raw) < RECORD_HEADER_SIZE:
            return None
        (
            _, uuid, sequence, epoch, flags, page, page_count, previous_mac, root_mac, size,
            allocs, groups, direct, inline, holes, _, header_mac, mac,
        ) = RECORD.unpack(raw[:RECORD_HEADER_SIZE])  # fmt: skip
        return cls(uuid, sequence, epoch, flags, page, page_count, previous_mac, root_mac, size,
                   (allocs, groups, direct, inline, holes), header_mac, mac)  # fmt: skip

    @property
    def head_pages(self) -> int:
        """Pages of header and body that the counts call for."""
        return head_pages_of(*self.counts)

    def decode_record(self, head: bytes) -> Record:
        """Decode the body of a record whose MACs have been verified."""
        alloc_count, group_count, direct_count, inline_count, hole_count = self.counts
        at = RECORD_HEADER_SIZE

        def take(size: int) -> bytes:
            nonlocal at
            at += size
            return head[at - size : at]

        return Record(
            uuid=self.uuid,
            sequence=self.sequence,
            epoch=self.epoch,
            page=self.page,
            previous_mac=self.previous_mac,
            size=self.size,
            barrier=bool(self.flags & FLAG_BARRIER),
            root_mac=self.root_mac if self.flags & FLAG_ROOT else None,
            allocs=list(_ALLOC.iter_unpack(take(alloc_count * _ALLOC.size))),
            groups=list(_GROUP.iter_unpack(take(group_count * _GROUP.size))),
            direct_blocks=array("Q", take(8 * direct_count)).tolist(),
            direct_entries=take(ENTRY_SIZE * direct_count),
            inline_blocks=array("Q", take(8 * inline_count)).tolist(),
            inline_entries=take(ENTRY_SIZE * inline_count),
            holes=list(_HOLE.iter_unpack(take(hole_count * _HOLE.size))),
        )


def head_pages_of(allocs: int, groups: int, direct: int, inline: int, holes: int) -> int:
    """Return the pages that header and body of a record with these counts take."""
    body = (
        allocs * _ALLOC.size
        + groups * _GROUP.size
        + (direct + inline) * (8 + ENTRY_SIZE)
        + holes * _HOLE.size
    )
    return -(-(RECORD_HEADER_SIZE + body) // BLOCK_SIZE)


def header_mac_input(head: bytes | bytearray) -> bytes:
    """Return what the header MAC of a record covers."""
    return bytes(head[:_FIRST_MAC_AT])


def set_header_mac(head: bytearray, mac: bytes) -> None:
    """Put the header MAC in its place."""
    head[_FIRST_MAC_AT : _FIRST_MAC_AT + MAC_SIZE] = mac


def record_mac_input(head: bytes | bytearray) -> bytes:
    """Return what the MAC of a record covers: all of header and body but the MAC itself."""
    view = memoryview(head)
    return b"".join((view[: _FIRST_MAC_AT + MAC_SIZE], view[RECORD_HEADER_SIZE:]))


def set_record_mac(head: bytearray, mac: bytes) -> None:
    """Put the MAC in its place."""
    head[_FIRST_MAC_AT + MAC_SIZE : RECORD_HEADER_SIZE] = mac
