"""Structures on the disk: what is encoded decodes to itself, and any other bytes are refused.

The invariant of every decoder: any bytes decode or raise FormatError or IntegrityError, nothing
else. Whether they are authentic is the question of whoever holds the key.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.errors import FormatError, IntegrityError
from sealfs.image import format as fmt
from sealfs.image import record as rec
from sealfs.image.format import (
    Anchor,
    EpochRow,
    Identity,
    Rekey,
    RekeyPhase,
    Superblock,
    decode_identity,
    decode_table,
    encode_identity,
    encode_table,
    next_generation,
)
from sealfs.image.layout import BLOCK_SIZE, Geometry
from sealfs.image.record import Record, RecordHeader, head_pages_of

fixed = settings(derandomize=True, deadline=None, max_examples=150)
U8, U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
PATH = "/images/x.sealed"


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


geometries = st.builds(
    Geometry,
    group_blocks=U16,
    fanout=U16,
    depth=U8,
    header_pages=U32,
    identity_pages=U16,
    journal_pages=U32,
)
generations = st.integers(1, 255)
whole_superblocks = st.builds(
    Superblock,
    uuid=exactly(16), generation=U64, size=U64, geometry=geometries, root_mac=exactly(24),
    root_slot=U32, root_position=U8, root_place=U8, tail_page=U32, tail_sequence=U64,
    tail_mac=exactly(32), epoch_count=U32, table_digest=exactly(32), key_generation=generations,
    clean=st.booleans(),
    anchors=st.lists(
        st.builds(Anchor, st.integers(1, (1 << 64) - 1), exactly(16)), max_size=8
    ).map(tuple),
)  # fmt: skip


@st.composite
def superblocks_at(draw: st.DrawFn) -> Superblock:
    superblock = draw(whole_superblocks)
    phase = draw(st.sampled_from(RekeyPhase))
    cursor = draw(U64) if phase is RekeyPhase.SWEEPING else 0
    old = draw(generations) if phase >= RekeyPhase.SWEEPING else 0
    key_generation = next_generation(old) if old else superblock.key_generation
    return replace(superblock, key_generation=key_generation, rekey=Rekey(phase, old, cursor))


superblocks = superblocks_at()


@st.composite
def identities_at(draw: st.DrawFn) -> Identity:
    """One or two keys, or none."""
    identity = draw(whole_identities)
    keys = draw(st.lists(st.binary(max_size=60), max_size=2))
    own = identity.key_generation
    wrapped = tuple(zip((own, next_generation(own)), keys, strict=False))
    return replace(identity, wrapped_keys=wrapped)


whole_identities = st.builds(
    Identity,
    uuid=exactly(16), vm_id=st.text(max_size=40), kmi=st.text(max_size=40),
    label=st.text(max_size=40), generation=U64, created=U64, suite=st.just(1),
    key_generation=generations,
    recovery_slots=st.lists(st.binary(max_size=60), max_size=4).map(tuple),
)  # fmt: skip
identities = identities_at()


@st.composite
def records(draw: st.DrawFn) -> Record:
    direct = draw(st.lists(U64, max_size=5))
    inline = draw(st.lists(U64, max_size=5))
    return Record(
        uuid=draw(exactly(16)), sequence=draw(U64), epoch=draw(U32), page=draw(U32),
        previous_mac=draw(exactly(32)), size=draw(U64), barrier=draw(st.booleans()),
        root_mac=draw(st.none() | exactly(24)),
        allocs=draw(st.lists(st.tuples(U64, U32), max_size=5)),
        groups=draw(st.lists(st.tuples(U64, U32, exactly(24)), max_size=200)),
        direct_blocks=direct, direct_entries=draw(exactly(32 * len(direct))),
        inline_blocks=inline, inline_entries=draw(exactly(32 * len(inline))),
        holes=draw(st.lists(st.tuples(U64, U64), max_size=5)),
    )  # fmt: skip


def padded(superblock: Superblock) -> bytes:
    return superblock.encode() + bytes(32)


# -- there and back


@fixed
@given(superblocks)
def test_a_superblock_decodes_to_itself(superblock: Superblock) -> None:
    raw = padded(superblock)
    assert len(raw) == fmt.SUPERBLOCK_SIZE == 512
    assert Superblock.decode(raw, PATH) == superblock


@fixed
@given(st.lists(st.builds(EpochRow, U32, U8, exactly(32)), unique_by=lambda row: row.epoch))
def test_an_epoch_table_decodes_to_itself(rows: list[EpochRow]) -> None:
    rows.sort(key=lambda row: row.epoch)
    raw = encode_table(rows)
    assert len(raw) == 40 * len(rows)
    assert decode_table(raw, PATH) == rows


@fixed
@given(identities, exactly(32), st.integers(0, 100))
def test_an_identity_decodes_to_itself(identity: Identity, mac: bytes, padding: int) -> None:
    content = identity.encode_content()
    raw = encode_identity(content, mac) + bytes(padding)
    assert decode_identity(raw, PATH) == (identity, content, mac)
    assert raw[:16] == fmt.identity_header(content)


@fixed
@given(records())
def test_a_record_decodes_to_itself(record: Record) -> None:
    head = record.encode()
    assert len(head) == record.head_pages * BLOCK_SIZE
    header = RecordHeader.decode(bytes(head))
    assert header is not None
    assert header.page_count == record.page_count == header.head_pages + len(record.inline_blocks)
    assert header.decode_record(bytes(head)) == record


@fixed
@given(st.lists(st.integers(0, 1000), min_size=5, max_size=5))
def test_the_pages_of_a_record_hold_its_body_and_no_page_is_wasted(counts: list[int]) -> None:
    a, g, d, i, h = counts
    body = 256 + 12 * a + 36 * g + 40 * (d + i) + 16 * h
    pages = head_pages_of(*counts)
    assert (pages - 1) * BLOCK_SIZE < body <= pages * BLOCK_SIZE


# -- bytes of the document, by hand


def test_the_bytes_of_a_superblock_are_those_of_the_document() -> None:
    raw = padded(
        Superblock(
            uuid=b"u" * 16, generation=7, size=99, geometry=Geometry(journal_pages=300),
            root_mac=b"r" * 24, root_slot=5, root_position=6, root_place=1, tail_page=8,
            tail_sequence=9, tail_mac=b"t" * 32, epoch_count=10, table_digest=b"d" * 32,
            key_generation=2, clean=True, anchors=(Anchor(9, b"a" * 16),),
        )
    )  # fmt: skip
    expected = struct.pack("<8sII16sQQ", b"SEALFS1\0", 1, 0, b"u" * 16, 7, 99)
    expected += struct.pack("<HHBBBBII", 128, 128, 4, 2, 1, 0, 256, 300)
    expected += struct.pack("<24sIBBH", b"r" * 24, 5, 6, 1, 15)
    expected += struct.pack("<IIQ32s32s", 8, 10, 9, b"t" * 32, b"d" * 32)
    expected += struct.pack("<Q16s", 9, b"a" * 16)
    assert raw == expected.ljust(512, b"\0")


def test_the_macs_of_a_record_cover_what_the_document_says() -> None:
    record = Record(b"u" * 16, 1, 2, 3, b"p" * 32, 4, inline_blocks=[7], inline_entries=b"e" * 32)
    head = record.encode()
    assert rec.header_mac_input(head) == head[:192]
    rec.set_header_mac(head, b"h" * 32)
    rec.set_record_mac(head, b"m" * 32)
    assert head[192:256] == b"h" * 32 + b"m" * 32
    assert rec.record_mac_input(head) == bytes(head[:224] + head[256:])
    assert head[256:296] == struct.pack("<Q", 7) + b"e" * 32


# -- what is refused

SUPERBLOCK = Superblock(
    uuid=bytes(16), generation=1, size=1, geometry=Geometry(), root_mac=bytes(24), root_slot=0,
    root_position=0, root_place=0, tail_page=0, tail_sequence=0, tail_mac=bytes(32),
    epoch_count=0, table_digest=bytes(32),
)  # fmt: skip
IDENTITY = Identity(uuid=bytes(16), vm_id="vm", kmi="kmi", wrapped_keys=((1, b"key"),))


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [(0, b"X", "is not a sealed image"), (8, b"\2", "format version 2"),
     (12, b"\2", "unknown feature bits 0x2"), (55, b"\1", "reserved"), (370, b"\1", "reserved"),
     (479, b"\1", "reserved"), (53, b"\0", "key generation 0"),
     (12, b"\1", "do not fit"), (368, b"\1", "do not fit"), (369, b"\1", "do not fit"),
     (376, b"\1", "do not fit"), (368, b"\4", "do not fit"), (54, b"\2", "reserved")],
)  # fmt: skip
def test_a_superblock_says_what_it_cannot_be(at: int, value: bytes, text: str) -> None:
    raw = bytearray(padded(SUPERBLOCK))
    raw[at : at + 1] = value
    with pytest.raises(FormatError, match=text) as caught:
        Superblock.decode(bytes(raw), PATH)
    assert PATH in str(caught.value)


def test_a_short_superblock_is_refused() -> None:
    with pytest.raises(FormatError, match="511 bytes, expected 512"):
        Superblock.decode(padded(SUPERBLOCK)[:-1], PATH)


def test_rows_out_of_order_or_with_reserved_bytes_are_refused() -> None:
    rows = [EpochRow(number, 1, bytes(32)) for number in (2, 1)]
    with pytest.raises(FormatError, match="row 1 is malformed"):
        decode_table(encode_table(rows), PATH)
    with pytest.raises(FormatError, match="row 1 is malformed"):
        decode_table(encode_table([rows[0], rows[0]]), PATH)
    raw = bytearray(encode_table(rows[:1]))
    raw[6] = 1
    with pytest.raises(FormatError, match="row 0 is malformed"):
        decode_table(bytes(raw), PATH)


def test_an_identity_with_bytes_left_over_or_missing_is_refused() -> None:
    content = IDENTITY.encode_content()
    with pytest.raises(FormatError, match="1 bytes left over"):
        Identity.decode_content(content + b"\0", PATH)
    for size in range(len(content)):
        with pytest.raises(FormatError, match="cut off"):
            Identity.decode_content(content[:size], PATH)


def test_an_identity_of_another_suite_version_or_checksum_is_refused() -> None:
    content = replace(IDENTITY, suite=2).encode_content()
    with pytest.raises(FormatError, match="cipher suite 2"):
        Identity.decode_content(content, PATH)
    raw = bytearray(encode_identity(IDENTITY.encode_content(), bytes(32)))
    raw[8] = 2
    with pytest.raises(FormatError, match="version 2"):
        decode_identity(bytes(raw), PATH)
    raw[8] = 1
    raw[-1] ^= 1
    with pytest.raises(IntegrityError, match="checksum"):
        decode_identity(bytes(raw), PATH)
    raw[12:16] = struct.pack("<I", 1 << 31)
    with pytest.raises(FormatError, match="longer than its room"):
        decode_identity(bytes(raw), PATH)


def test_text_that_is_not_utf_8_is_refused() -> None:
    content = IDENTITY.encode_content().replace(b"vm", b"\xff\xfe")
    with pytest.raises(FormatError, match="UTF-8"):
        Identity.decode_content(content, PATH)


# -- any bytes


def refuses_or_decodes(decode: Callable[[bytes], object], raw: bytes) -> None:
    with contextlib.suppress(FormatError, IntegrityError):
        decode(raw)


def decode_record(raw: bytes) -> None:
    """As the journal does, which takes no more pages than the counts call for."""
    header = RecordHeader.decode(raw)
    if header is not None and header.head_pages * BLOCK_SIZE <= len(raw):
        record = header.decode_record(raw)
        assert len(record.inline_entries) == 32 * len(record.inline_blocks)


def identity_of(content: bytes) -> bytes:
    """An identity whose checksum is right: what is behind it is met too."""
    return struct.pack(
        "<8sII32s32s", b"SEALIDN1", 1, len(content), hashlib.sha256(content).digest(), bytes(32)
    ) + content  # fmt: skip


RECORD = bytes(
    Record(
        bytes(16), 1, 1, 0, bytes(32), 9, allocs=[(1, 2)], groups=[(3, 4, bytes(24))],
        inline_blocks=[5], inline_entries=bytes(32), holes=[(6, 7)],
    ).encode()
)  # fmt: skip

DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "superblock": (lambda raw: Superblock.decode(raw, PATH), padded(SUPERBLOCK)),
    "identity": (
        lambda raw: decode_identity(raw, PATH),
        encode_identity(IDENTITY.encode_content(), bytes(32)),
    ),
    "identity content": (
        lambda raw: decode_identity(identity_of(raw), PATH),
        IDENTITY.encode_content(),
    ),
    "table": (
        lambda raw: decode_table(raw[: len(raw) // 40 * 40], PATH),
        encode_table([EpochRow(1, 1, bytes(32)), EpochRow(2, 1, bytes(32))]),
    ),
    "record": (decode_record, RECORD),
}


@pytest.mark.parametrize("name", DECODERS)
@fixed
@given(raw=st.binary(max_size=700))
def test_any_bytes_decode_or_are_refused(name: str, raw: bytes) -> None:
    decode, good = DECODERS[name]
    refuses_or_decodes(decode, raw)
    refuses_or_decodes(decode, good[:16] + raw)


@pytest.mark.parametrize("name", DECODERS)
@fixed
@given(
    changes=st.lists(st.tuples(st.integers(0, 700), U8), min_size=1, max_size=6),
    cut=st.integers(0, 700),
)
def test_altered_bytes_decode_or_are_refused(
    name: str, changes: list[tuple[int, int]], cut: int
) -> None:
    decode, good = DECODERS[name]
    raw = bytearray(good)
    for at, value in changes:
        raw[at % len(raw)] = value
    refuses_or_decodes(decode, bytes(raw))
    refuses_or_decodes(decode, bytes(raw[: cut % len(raw)]))


def test_the_fuzzed_samples_decode_as_they_are() -> None:
    for decode, good in DECODERS.values():
        decode(good)
