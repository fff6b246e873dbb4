"""Encode and decode every structure on the disk; mirrors FORMAT.md section by section.

`decode` checks length, magic, version, reserved bytes and ranges, in that order, and raises
`FormatError`; MACs are checked by whoever holds the key. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Final, Self

from sealfs.errors import FormatError, IntegrityError
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, Geometry

MAGICS: Final = {
    "superblock": b"SEALFS1\0",
    "identity": b"SEALIDN1",
    "record": b"SEALREC1",
    "block": b"SEALBLK1",
    "leaf": b"SEALLEF",
    "node": b"SEALNOD",
    "root": b"SEALROT",
}
"""What structures begin with, and what separates one kind of MAC or tag from another."""

LABELS: Final = {
    "tree": b"sealfs1 tree",
    "journal": b"sealfs1 journal",
    "superblock": b"sealfs1 superblock",
    "identity": b"sealfs1 identity",
    "anchor": b"sealfs1 anchor",
    "data": b"sealfs1 data",
}
"""HKDF labels (FORMAT.md 3.1)."""

VERSION: Final = 1
SUITE_AES_256_GCM: Final = 1
MAC_SIZE: Final = 32
TREE_MAC_SIZE: Final = 24
ANCHOR_COUNT: Final = 8
NO_MAC: Final = bytes(TREE_MAC_SIZE)
HOLE: Final = bytes(ENTRY_SIZE)
PRESENT: Final = 1

_SUPERBLOCK: Final = struct.Struct("<8sII16sQQHHBBBBII24sIBBHIIQ32s32s192s112s32s")
_ROW: Final = struct.Struct("<IB3s32s")
_IDENTITY: Final = struct.Struct("<8sII32s32s")
ENTRY: Final = struct.Struct("<IQ16sI")
ENTRY_PARTS: Final = struct.Struct("<12s16sI")
"""The same 32 bytes as (nonce, tag, flags)."""
_RECORD: Final = struct.Struct("<8s16sQIIII32s24sQIIIII60s32s32s")
_ANCHOR: Final = struct.Struct("<Q16s")
_ALLOC: Final = struct.Struct("<QI")
_GROUP: Final = struct.Struct("<QI24s")
_HOLE: Final = struct.Struct("<QQ")

ROW_SIZE: Final = _ROW.size
IDENTITY_HEADER_SIZE: Final = _IDENTITY.size
SUPERBLOCK_SIZE: Final = _SUPERBLOCK.size
RECORD_HEADER_SIZE: Final = _RECORD.size
_FIRST_MAC_AT: Final = RECORD_HEADER_SIZE - 2 * MAC_SIZE

FLAG_BARRIER: Final = 1
FLAG_ROOT: Final = 2


def _layout(packed: struct.Struct, names: str) -> list[tuple[str, int, int]]:
    codes = packed.format.lstrip("<")
    sizes, digits = [], ""
    for char in codes:
        if char.isdigit():
            digits += char
            continue
        sizes.append(struct.calcsize(f"<{digits}{char}"))
        digits = ""
        if len(sizes) == 1 and sizes[0] == 0:
            sizes.pop()
    offsets = [0, *accumulate(sizes)]
    return [(name, offsets[i], sizes[i]) for i, name in enumerate(names.split())]


LAYOUTS: Final = {
    "Superblock": _layout(
        _SUPERBLOCK,
        "magic version features uuid generation size group_blocks fanout depth key_generation"
        " clean reserved header_pages journal_pages root_mac root_slot root_position root_place"
        " identity_pages tail_page epoch_count tail_sequence tail_mac table_digest anchors"
        " reserved2 mac",
    ),
    "Epoch table": _layout(_ROW, "epoch key_generation reserved salt"),
    "Identity": _layout(_IDENTITY, "magic version content_size checksum mac"),
    "Leaf page": _layout(ENTRY, "epoch counter tag flags"),
    "Journal record": _layout(
        _RECORD,
        "magic uuid sequence epoch flags page page_count previous_mac root_mac size alloc_count"
        " group_count direct_count inline_count hole_count reserved header_mac mac",
    ),
}
"""Field, offset and size of each structure, from the structs that encode them."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A state that a host may remember: a record's sequence and the start of its MAC."""

    sequence: int
    mac: bytes


@dataclass(frozen=True, slots=True)
class Superblock:
    """Superblock (FORMAT.md 4.1), without its MAC."""

    uuid: bytes
    generation: int
    size: int
    geometry: Geometry
    root_mac: bytes
    root_slot: int
    root_position: int
    root_place: int
    tail_page: int
    tail_sequence: int
    tail_mac: bytes
    epoch_count: int
    table_digest: bytes
    key_generation: int = 1
    clean: bool = False
    anchors: tuple[Anchor, ...] = ()

    def encode(self) -> bytes:
        """Return the 480 bytes that the MAC covers."""
        g = self.geometry
        anchors = b"".join(_ANCHOR.pack(a.sequence, a.mac) for a in self.anchors[:ANCHOR_COUNT])
        packed = _SUPERBLOCK.pack(
            MAGICS["superblock"], VERSION, 0, self.uuid, self.generation, self.size,
            g.group_blocks, g.fanout, g.depth, self.key_generation, self.clean, 0,
            g.header_pages, g.journal_pages, self.root_mac, self.root_slot, self.root_position,
            self.root_place, g.identity_pages, self.tail_page, self.epoch_count,
            self.tail_sequence, self.tail_mac, self.table_digest, anchors, b"", b"",
        )  # fmt: skip
        return packed[:-MAC_SIZE]

    @classmethod
    def decode(cls, raw: bytes, path: str) -> Self:
        """Decode the first 512 bytes of a superblock; the MAC (the last 32) is not looked at.

        Raises:
            FormatError: no superblock, or a version or feature this sealfs does not know.
        """
        if len(raw) < SUPERBLOCK_SIZE:
            raise FormatError(path, f"superblock: {len(raw)} bytes, expected {SUPERBLOCK_SIZE}")
        (
            magic, version, features, uuid, generation, size, group_blocks, fanout, depth,
            key_generation, clean, reserved, header_pages, journal_pages, root_mac, root_slot,
            root_position, root_place, identity_pages, tail_page, epoch_count, tail_sequence,
            tail_mac, table_digest, anchors, reserved2, _,
        ) = _SUPERBLOCK.unpack(raw[:SUPERBLOCK_SIZE])  # fmt: skip
        if magic != MAGICS["superblock"]:
            raise FormatError(path, "is not a sealed image (no superblock)")
        if version != VERSION:
            raise FormatError(path, f"superblock: format version {version}, this sealfs reads 1")
        if features:
            raise FormatError(path, f"superblock: unknown feature bits {features:#x}")
        if reserved or any(reserved2) or clean > 1:
            raise FormatError(path, "superblock: reserved bytes are not zero")
        geometry = Geometry(
            group_blocks=group_blocks,
            fanout=fanout,
            depth=depth,
            header_pages=header_pages,
            identity_pages=identity_pages,
            journal_pages=journal_pages,
        )
        return cls(
            uuid=uuid, generation=generation, size=size, geometry=geometry, root_mac=root_mac,
            root_slot=root_slot, root_position=root_position, root_place=root_place,
            tail_page=tail_page, tail_sequence=tail_sequence, tail_mac=tail_mac,
            epoch_count=epoch_count, table_digest=table_digest, key_generation=key_generation,
            clean=bool(clean),
            anchors=tuple(Anchor(*pair) for pair in _ANCHOR.iter_unpack(anchors) if pair[0]),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class EpochRow:
    """A row of the epoch table (FORMAT.md 4.2)."""

    epoch: int
    key_generation: int
    salt: bytes

    def encode(self) -> bytes:
        """Return the 40 bytes of the row."""
        return _ROW.pack(self.epoch, self.key_generation, b"", self.salt)


def encode_table(rows: Sequence[EpochRow]) -> bytes:
    """Return the packed rows."""
    return b"".join(row.encode() for row in rows)


def decode_table(raw: bytes, path: str) -> list[EpochRow]:
    """Decode packed rows whose digest has been verified."""
    rows: list[EpochRow] = []
    for epoch, generation, reserved, salt in _ROW.iter_unpack(raw):
        if any(reserved) or (rows and epoch <= rows[-1].epoch):
            raise FormatError(path, f"epoch table: row {len(rows)} is malformed")
        rows.append(EpochRow(epoch, generation, salt))
    return rows


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose image this is and which key opens it (FORMAT.md 5).

    `wrapped_keys` holds (key generation, image key wrapped under the VM key); these and the
    recovery slots are the key service's own and opaque here.
    """

    uuid: bytes
    vm_id: str
    kmi: str
    label: str = ""
    generation: int = 1
    created: int = 0
    suite: int = SUITE_AES_256_GCM
    key_generation: int = 1
    wrapped_keys: tuple[tuple[int, bytes], ...] = ()
    recovery_slots: tuple[bytes, ...] = ()

    def encode_content(self) -> bytes:
        """Return the content, without its header."""
        parts = [
            struct.pack("<16sQQBB", self.uuid, self.generation, self.created, self.suite,
                        self.key_generation),
            *(_prefixed(text.encode()) for text in (self.vm_id, self.label, self.kmi)),
            bytes([len(self.wrapped_keys)]),
            *(bytes([generation]) + _prefixed(raw) for generation, raw in self.wrapped_keys),
            bytes([len(self.recovery_slots)]),
            *(_prefixed(raw) for raw in self.recovery_slots),
        ]  # fmt: skip
        return b"".join(parts)

    @classmethod
    def decode_content(cls, raw: bytes, path: str) -> Self:
        """Decode the content, whose checksum has been verified."""
        reader = _Reader(raw, path)
        uuid, generation, created, suite, key_generation = reader.unpack("<16sQQBB")
        if suite != SUITE_AES_256_GCM:
            raise FormatError(path, f"identity: cipher suite {suite}, this sealfs knows 1")
        vm_id, label, kmi = (reader.text() for _ in range(3))
        wrapped = tuple((reader.unpack("<B")[0], reader.prefixed()) for _ in range(reader.count()))
        recovery = tuple(reader.prefixed() for _ in range(reader.count()))
        reader.finish()
        return cls(
            uuid=uuid, vm_id=vm_id, kmi=kmi, label=label, generation=generation,
            created=created, suite=suite, key_generation=key_generation, wrapped_keys=wrapped,
            recovery_slots=recovery,
        )  # fmt: skip


def identity_header(content: bytes) -> bytes:
    """Return the first 16 bytes of an identity: what its MAC covers before the content."""
    return _IDENTITY.pack(MAGICS["identity"], VERSION, len(content), b"", b"")[:16]


def encode_identity(content: bytes, mac: bytes) -> bytes:
    """Return a copy of the identity as it stands on the disk."""
    digest = hashlib.sha256(content).digest()
    return _IDENTITY.pack(MAGICS["identity"], VERSION, len(content), digest, mac) + content


def decode_identity(raw: bytes, path: str) -> tuple[Identity, bytes, bytes]:
    """Return (identity, content, MAC) of a copy; the MAC is the key holder's to verify.

    Raises:
        FormatError: not an identity, or of a version this sealfs cannot read.
        IntegrityError: the checksum is wrong.
    """
    if len(raw) < _IDENTITY.size:
        raise FormatError(path, f"identity: {len(raw)} bytes, expected {_IDENTITY.size} or more")
    magic, version, size, checksum, mac = _IDENTITY.unpack(raw[: _IDENTITY.size])
    if magic != MAGICS["identity"]:
        raise FormatError(path, "is not a sealed image (no identity)")
    if version != VERSION:
        raise FormatError(path, f"identity: format version {version}, this sealfs reads 1")
    if size > len(raw) - _IDENTITY.size:
        raise FormatError(path, f"identity: content of {size} bytes is longer than its room")
    content = raw[_IDENTITY.size : _IDENTITY.size + size]
    if hashlib.sha256(content).digest() != checksum:
        raise IntegrityError(path, "identity: checksum differs")
    return Identity.decode_content(content, path), content, mac


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
        _RECORD.pack_into(
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
        ) = _RECORD.unpack(raw[:RECORD_HEADER_SIZE])  # fmt: skip
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


def _prefixed(raw: bytes) -> bytes:
    return struct.pack("<H", len(raw)) + raw


class _Reader:
    """Takes fields off a bounded byte string; leaving it is a `FormatError`."""

    def __init__(self, raw: bytes, path: str) -> None:
        self._raw, self._path, self._at = raw, path, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def prefixed(self) -> bytes:
        return self._take(self._number("<H"))

    def text(self) -> str:
        try:
            return self.prefixed().decode()
        except UnicodeDecodeError:
            raise FormatError(self._path, "identity: text is not UTF-8") from None

    def count(self) -> int:
        return self._number("<B")

    def finish(self) -> None:
        if self._at != len(self._raw):
            raise FormatError(self._path, f"identity: {len(self._raw) - self._at} bytes left over")

    def _number(self, layout: str) -> int:
        (number,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(number)

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._raw):
            raise FormatError(self._path, f"identity: cut off at byte {len(self._raw)}")
        self._at += size
        return self._raw[self._at - size : self._at]
