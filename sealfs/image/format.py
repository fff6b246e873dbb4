"""Encode and decode superblock, epoch table and identity; mirrors FORMAT.md section by section.

`decode` checks length, magic, version, reserved bytes and ranges, in that order, and raises
`FormatError`; MACs are checked by whoever holds the key. Pure.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate
from typing import Any, Final, Self

from sealfs.errors import FormatError, IntegrityError, KeyGone
from sealfs.image.layout import ENTRY_SIZE, Geometry

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
FEATURE_REKEY: Final = 1
"""Feature bit 0: the image key is being replaced (FORMAT.md 11)."""
KEY_GENERATION_MAX: Final = 255
"""The one after it is 1 again: no more than two are ever in use at once."""
WRAPPED_KEYS_MAX: Final = 2
MAC_SIZE: Final = 32
TREE_MAC_SIZE: Final = 24
ANCHOR_COUNT: Final = 8
NO_MAC: Final = bytes(TREE_MAC_SIZE)
HOLE: Final = bytes(ENTRY_SIZE)
LOST: Final = bytes(28) + b"\1" + bytes(3)
"""An entry that says a block is there and never opens: there is no epoch 0."""
PRESENT: Final = 1

_SUPERBLOCK: Final = struct.Struct("<8sII16sQQHHBBBBII24sIBBHIIQ32s32s192sBB6sQ96s32s")
_ROW: Final = struct.Struct("<IB3s32s")
_IDENTITY: Final = struct.Struct("<8sII32s32s")
ENTRY: Final = struct.Struct("<IQ16sI")
ENTRY_PARTS: Final = struct.Struct("<12s16sI")
"""The same 32 bytes as (nonce, tag, flags)."""
RECORD: Final = struct.Struct("<8s16sQIIII32s24sQIIIII60s32s32s")
_ANCHOR: Final = struct.Struct("<Q16s")

ROW_SIZE: Final = _ROW.size
SUPERBLOCK_SIZE: Final = _SUPERBLOCK.size


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
        " rekey_phase old_generation reserved2 rekey_cursor reserved3 mac",
    ),
    "Epoch table": _layout(_ROW, "epoch key_generation reserved salt"),
    "Identity": _layout(_IDENTITY, "magic version content_size checksum mac"),
    "Leaf page": _layout(ENTRY, "epoch counter tag flags"),
    "Journal record": _layout(
        RECORD,
        "magic uuid sequence epoch flags page page_count previous_mac root_mac size alloc_count"
        " group_count direct_count inline_count hole_count reserved header_mac mac",
    ),
}
"""Field, offset and size of each structure, from the structs that encode them."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A state that a host may remember: a record's sequence and the first 16 bytes of its MAC."""

    sequence: int
    mac: bytes


def anchor_of(sequence: int, mac: bytes) -> Anchor:
    """Return the state after the record of this sequence and MAC."""
    return Anchor(sequence, mac[:16])


def next_generation(generation: int) -> int:
    """Return the key generation that follows one."""
    return generation % KEY_GENERATION_MAX + 1


class RekeyPhase(IntEnum):
    """How far the replacement of the image key has come (FORMAT.md 11)."""

    NONE = 0
    SWEEPING = 1
    SWEPT = 2


@dataclass(frozen=True, slots=True)
class Rekey:
    """What a superblock says of the replacement of the image key (FORMAT.md 11)."""

    phase: RekeyPhase = RekeyPhase.NONE
    old_generation: int = 0
    """The one that is being replaced."""
    cursor: int = 0
    """The first group that may hold something under the old key."""


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
    rekey: Rekey = Rekey()

    def encode(self) -> bytes:
        """Return the 480 bytes that the MAC covers."""
        g = self.geometry
        anchors = b"".join(_ANCHOR.pack(a.sequence, a.mac) for a in self.anchors[:ANCHOR_COUNT])
        rekey = self.rekey
        features = FEATURE_REKEY if rekey.phase else 0
        packed = _SUPERBLOCK.pack(
            MAGICS["superblock"], VERSION, features, self.uuid, self.generation, self.size,
            g.group_blocks, g.fanout, g.depth, self.key_generation, self.clean, 0,
            g.header_pages, g.journal_pages, self.root_mac, self.root_slot, self.root_position,
            self.root_place, g.identity_pages, self.tail_page, self.epoch_count,
            self.tail_sequence, self.tail_mac, self.table_digest, anchors, rekey.phase,
            rekey.old_generation, b"", rekey.cursor, b"", b"",
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
            tail_mac, table_digest, anchors, phase, old_generation, reserved2, cursor, reserved3, _,
        ) = _SUPERBLOCK.unpack(raw[:SUPERBLOCK_SIZE])  # fmt: skip
        if magic != MAGICS["superblock"]:
            raise FormatError(path, "is not a sealed image (no superblock)")
        if version != VERSION:
            raise FormatError(path, f"superblock: format version {version}, this sealfs reads 1")
        if features & ~FEATURE_REKEY:
            raise FormatError(path, f"superblock: unknown feature bits {features:#x}")
        if reserved or any(reserved2) or any(reserved3) or clean > 1:
            raise FormatError(path, "superblock: reserved bytes are not zero")
        if not key_generation:
            raise FormatError(path, "superblock: key generation 0")
        rekey = _rekey_of(phase, old_generation, cursor, features, key_generation, path)
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
            rekey=rekey,
        )  # fmt: skip


def _rekey_of(
    phase: int, old_generation: int, cursor: int, features: int, key_generation: int, path: str
) -> Rekey:
    """Return the fields of a replacement of the image key, which must fit one another."""
    has_old = phase > RekeyPhase.NONE
    if (
        phase > RekeyPhase.SWEPT
        or bool(phase) != bool(features & FEATURE_REKEY)
        or has_old != bool(old_generation)
        or (has_old and next_generation(old_generation) != key_generation)
        or (cursor and phase != RekeyPhase.SWEEPING)
    ):
        raise FormatError(
            path,
            f"superblock: rekey phase {phase}, key generations {old_generation} and"
            f" {key_generation} do not fit one another",
        )
    return Rekey(RekeyPhase(phase), old_generation, cursor)


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

    `wrapped_keys` holds (key generation, image key wrapped under the VM key), two of them while
    the image key is being replaced; these and the recovery slots are the key service's own and
    opaque here.
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

    @property
    def new_generation(self) -> int | None:
        """The key generation that is to replace the identity's own, None if none is."""
        others = [each for each, _ in self.wrapped_keys if each != self.key_generation]
        return others[0] if others else None

    def wrapped_key(self, path: str) -> bytes:
        """Return the wrapped key that goes with the identity's MAC.

        Raises:
            KeyGone: the image was erased.
            FormatError: there is none.
        """
        if not self.wrapped_keys:
            raise KeyGone(path, "is erased: its key was revoked, and nothing opens it")
        for generation, wrapped in self.wrapped_keys:
            if generation == self.key_generation:
                return wrapped
        raise FormatError(path, f"identity has no image key of generation {self.key_generation}")

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
        others = [each for each, _ in wrapped if each != key_generation]
        if wrapped and (
            len(wrapped) > WRAPPED_KEYS_MAX
            or len(others) != len(wrapped) - 1
            or others not in ([], [next_generation(key_generation)])
        ):
            found = ", ".join(str(each) for each, _ in wrapped)
            raise FormatError(
                path,
                f"identity: image keys of generations {found}; expected {key_generation}, or the"
                " one that follows it too",
            )
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
