"""The journal: records in, the same records out; a torn last one is not there, a lost one is told.

`Writer` keeps a journal of bytes as a volume does: it places a record, writes it, advances, and
releases at a checkpoint, which moves the superblock's tail.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.errors import IntegrityError
from sealfs.image import record as rec
from sealfs.image.cipher import BlockCipher, mac_of
from sealfs.image.format import EpochRow
from sealfs.image.journal import Journal, Scanned, Tail, encode_record, scan
from sealfs.image.record import Record

PAGE = 4096
UUID = bytes(range(16))
KEY = b"j" * 32
ROWS = [EpochRow(3, 1, b"s" * 32)]
START = Tail(0, 0, bytes(32))


def cipher() -> BlockCipher:
    made = BlockCipher({1: bytearray(32)}, UUID, "x.sealed", ROWS)
    made.begin_epoch(ROWS[-1])
    return made


@dataclass
class Writer:
    """A journal in memory."""

    page_count: int = 16
    raw: bytearray = field(default_factory=bytearray)
    cipher: BlockCipher = field(default_factory=cipher)
    live: Tail = START
    """Of the live superblock."""
    records: list[tuple[Record, bytes]] = field(default_factory=list)
    """After it."""

    def __post_init__(self) -> None:
        self.raw = bytearray(self.page_count * PAGE)
        self.journal = Journal(self.page_count, START)

    def add(self, inline: int = 0, allocs: int = 0, **changes: Any) -> Record:
        blocks = list(range(100, 100 + inline))
        sealed = bytearray(inline * PAGE + 16)
        slab = b"".join(bytes([block]) * PAGE for block in blocks)
        entries = self.cipher.seal_blocks(blocks, slab, range(inline), memoryview(sealed))
        record = Record(
            uuid=UUID, sequence=self.journal.tail.sequence + 1, epoch=3, page=0,
            previous_mac=self.journal.tail.mac, size=1 << 20, inline_blocks=blocks,
            inline_entries=entries, allocs=[(n, n) for n in range(allocs)],
        )  # fmt: skip
        page = self.journal.place(record.page_count)
        if page is None:
            self.checkpoint()
            page = self.journal.place(record.page_count)
        assert page is not None
        record.page = page
        for name, value in changes.items():
            setattr(record, name, value)
        head, mac = encode_record(record, KEY)
        at = page * PAGE
        whole = head + sealed[: inline * PAGE]
        self.raw[at : at + len(whole)] = whole
        self.journal.advance(record, mac)
        self.records.append((record, mac))
        return record

    def checkpoint(self) -> None:
        self.live = self.journal.tail
        self.journal.release()
        self.records.clear()

    def scan(self, raw: bytes | None = None, *, epoch: int = 3) -> list[Scanned]:
        raw = bytes(self.raw) if raw is None else raw
        return scan(
            lambda page, count: raw[page * PAGE : (page + count) * PAGE],
            page_count=self.page_count, tail=self.live, uuid=UUID, epoch=epoch, key=KEY,
            cipher=self.cipher, path="x.sealed",
        )  # fmt: skip

    def spans(self) -> list[range]:
        return [range(r.page, r.page + r.page_count) for r, _ in self.records]


def test_an_empty_journal_has_no_records() -> None:
    assert Writer().scan() == []


def test_records_are_found_in_their_order_with_their_payload() -> None:
    writer = Writer()
    for inline, allocs in ((1, 0), (0, 3), (2, 400)):
        writer.add(inline, allocs)
    found = writer.scan()
    assert [(item.record, item.mac) for item in found] == writer.records
    assert [item.payload_page for item in found] == [1, 3, 5]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.integers(0, 1 << 32))
def test_records_are_found_round_the_end_and_after_checkpoints(seed: int) -> None:
    rng = random.Random(seed)
    writer = Writer(rng.choice((8, 16, 23)))
    for _ in range(rng.randrange(1, 40)):
        most = writer.journal.record_pages_max - 1
        writer.add(rng.randrange(min(most, 6) + 1), rng.choice((0, 1, 5)))
        if rng.random() < 0.15:
            writer.checkpoint()
        used = [page for span in writer.spans() for page in span]
        assert len(used) == len(set(used)) <= writer.journal.used_pages <= writer.page_count
    found = writer.scan()
    assert [(item.record, item.mac) for item in found] == writer.records
    tail = writer.journal.tail
    if writer.records:
        assert (tail.sequence, tail.mac) == (found[-1].record.sequence, found[-1].mac)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.integers(0, 1 << 32))
def test_a_torn_last_record_is_not_there_and_any_other_is_told(seed: int) -> None:
    rng = random.Random(seed)
    writer = Writer(16)
    for _ in range(rng.randrange(2, 12)):
        writer.add(rng.randrange(4), rng.choice((0, 5)))
    if not writer.records:
        return
    hit = rng.randrange(len(writer.records))
    record = writer.records[hit][0]
    raw = bytearray(writer.raw)
    at = rng.randrange(record.page * PAGE, (record.page + record.page_count) * PAGE)
    if rng.random() < 0.5:
        raw[at] ^= 1 << rng.randrange(8)
    else:
        first = at // 512 * 512
        raw[first : first + 512] = rng.randbytes(512)
    if hit == len(writer.records) - 1:
        assert [item.record for item in writer.scan(bytes(raw))] == [
            each for each, _ in writer.records[:-1]
        ]
        return
    missing = f"record {record.sequence} is missing or damaged"
    with pytest.raises(IntegrityError, match=missing):
        writer.scan(bytes(raw))


def test_older_records_that_were_not_overwritten_yet_do_not_count() -> None:
    writer = Writer(16)
    for _ in range(5):
        writer.add(1)
    writer.checkpoint()
    assert writer.scan() == []
    writer.add(1)
    assert [item.record.sequence for item in writer.scan()] == [6]


@pytest.mark.parametrize(
    "changes",
    [{"uuid": bytes(16)}, {"epoch": 2}, {"sequence": 5}, {"page": 3},
     {"previous_mac": b"x" * 32}],
)  # fmt: skip
def test_an_authentic_record_that_does_not_follow_is_not_taken(
    changes: dict[str, Any],
) -> None:
    writer = Writer()
    writer.add(1)
    writer.add(1, **changes)
    if "sequence" in changes:
        with pytest.raises(IntegrityError, match="record 2 is missing"):
            writer.scan()
    else:
        assert len(writer.scan()) == 1


def test_a_record_of_a_newer_epoch_than_the_superblocks_is_told() -> None:
    writer = Writer()
    writer.add(1)
    with pytest.raises(IntegrityError, match="record 1 is missing"):
        writer.scan(epoch=2)
    assert writer.scan(epoch=4) == []


def test_a_record_under_another_key_is_not_one() -> None:
    writer = Writer()
    record = writer.add(1)
    head, _ = encode_record(record, b"x" * 32)
    writer.raw[:PAGE] = head
    assert writer.scan() == []


@pytest.mark.parametrize("page_count", [0, 1, 3, 9, 17, 1 << 31])
def test_an_authentic_length_that_is_wrong_is_not_followed(page_count: int) -> None:
    writer = Writer()
    record = writer.add(1)
    head = record.encode()
    struct.pack_into("<I", head, 44, page_count)
    writer.raw[:PAGE] = authentic(head)
    assert writer.scan() == []


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.integers(0, (1 << 32) - 1), min_size=5, max_size=5), st.integers(0, 20))
def test_authentic_counts_that_do_not_fit_are_not_followed(counts: list[int], pages: int) -> None:
    writer = Writer()
    record = writer.add(1)
    head = record.encode()
    struct.pack_into("<I", head, 44, pages)
    struct.pack_into("<5I", head, 112, *counts)
    writer.raw[:PAGE] = authentic(head)
    assert writer.scan() == []


def authentic(head: bytearray) -> bytes:
    """Give a header and body MACs that are right."""
    rec.set_header_mac(head, mac_of(KEY, rec.header_mac_input(head)))
    rec.set_record_mac(head, mac_of(KEY, rec.record_mac_input(head)))
    return bytes(head)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 1 << 32))
def test_any_bytes_are_a_journal_of_no_records_or_refused(seed: int) -> None:
    rng = random.Random(seed)
    writer = Writer(8)
    writer.add(1)
    raw = bytearray(writer.raw)
    for _ in range(rng.randrange(1, 8)):
        at = rng.randrange(300)
        raw[at] = rng.randrange(256)
    raw[4 * PAGE : 5 * PAGE] = raw[:PAGE]
    found = writer.scan(bytes(raw))
    assert found == [] or bytes(raw[:PAGE]) == bytes(writer.raw[:PAGE])


# -- room


def test_a_record_that_does_not_fit_before_the_end_starts_at_the_beginning() -> None:
    journal = Journal(10, Tail(8, 4, bytes(32)))
    assert journal.place(2) == 8
    assert journal.place(3) == 0
    record = Record(UUID, 5, 3, 0, bytes(32), 0, inline_blocks=[1, 2], inline_entries=bytes(64))
    journal.advance(record, b"m" * 32)
    assert journal.tail == Tail(3, 5, b"m" * 32)
    assert journal.used_pages == 5  # the two pages that were left over count
    assert journal.place(5) == 3
    assert journal.place(6) is None
    journal.release()
    assert journal.used_pages == 0
    assert journal.place(6) == 3


def test_the_end_of_the_journal_may_be_its_tail() -> None:
    journal = Journal(10, Tail(10, 4, bytes(32)))
    assert journal.place(1) == 0
    assert journal.record_pages_max == 5
