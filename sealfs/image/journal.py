"""The journal: a record to bytes, the journal's bytes to records, and the room in it (FORMAT.md 7).

Pure but for reading: it is given a function that reads journal pages past the page cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sealfs.errors import BlockDamaged, IntegrityError
from sealfs.image.cipher import TAG_SIZE, BlockCipher, mac_of, same_mac
from sealfs.image.format import ENTRY_PARTS, MAGICS, Anchor, anchor_of
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE
from sealfs.image.record import (
    RECORD_HEADER_SIZE,
    Record,
    RecordHeader,
    header_mac_input,
    record_mac_input,
    set_header_mac,
    set_record_mac,
)

_SCAN_SIZE = 1 << 20
"""Bytes read at a time when looking ahead."""

ReadJournal = Callable[[int, int], bytes]
"""Given (page, page count), returns their bytes as the device has them."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the journal goes on: the next page, the last record's sequence and MAC."""

    page: int
    sequence: int
    mac: bytes

    @property
    def anchor(self) -> Anchor:
        """The state that ends here, as others may remember it."""
        return anchor_of(self.sequence, self.mac)


class Journal:
    """The room in a journal, and the chain of its records."""

    def __init__(self, page_count: int, tail: Tail) -> None:
        self.page_count = page_count
        self.tail = tail
        """After the last record written."""
        self.used_pages = 0
        """Pages that no checkpoint has freed yet."""

    @property
    def record_pages_max(self) -> int:
        """The longest record: half the journal."""
        return self.page_count // 2

    def place(self, page_count: int) -> int | None:
        """Return the page where a record of that length may start, or None: checkpoint first."""
        page, gap = self.tail.page, 0
        if page + page_count > self.page_count:
            page, gap = 0, self.page_count - page
        if self.used_pages + gap + page_count > self.page_count:
            return None
        return page

    def advance(self, record: Record, mac: bytes) -> None:
        """Note that a record is durable."""
        gap = self.page_count - self.tail.page if record.page < self.tail.page else 0
        self.used_pages += gap + record.page_count
        page = record.page + record.page_count
        self.tail = Tail(page, record.sequence, mac)

    def release(self) -> None:
        """Free what a durable superblock has made superfluous: every record there is."""
        self.used_pages = 0


def encode_record(record: Record, key: bytes) -> tuple[bytearray, bytes]:
    """Return (header and body with their MACs, the record's MAC)."""
    head = record.encode()
    set_header_mac(head, mac_of(key, header_mac_input(head)))
    mac = mac_of(key, record_mac_input(head))
    set_record_mac(head, mac)
    return head, mac


@dataclass(frozen=True, slots=True)
class Scanned:
    """A record found in the journal, with its MAC and its first payload page."""

    record: Record
    mac: bytes
    payload_page: int


def scan(
    read: ReadJournal, *, page_count: int, tail: Tail, uuid: bytes, epoch: int, key: bytes,
    cipher: BlockCipher, path: str,
) -> list[Scanned]:  # fmt: skip
    """Return the records after `tail` (FORMAT.md 9, step 5).

    Scanning stops at the first one that is not whole and authentic: a torn last record is the
    normal result of a crash and no error.

    Args:
        read: reads journal pages past the page cache.
        page_count: of the journal.
        tail: of the live superblock.
        uuid: of the image.
        epoch: the current one of the live superblock.
        key: the journal subkey.
        cipher: opens payloads, whose tags are their MACs.
        path: for messages.

    Raises:
        IntegrityError: a valid record lies beyond a missing one.
    """
    found: list[Scanned] = []
    position = tail
    pages_found = 0
    while True:
        for page in dict.fromkeys((position.page, 0)):
            scanned = _record_at(read, page, page_count, position, uuid, epoch, key, cipher)
            if scanned is not None:
                break
        else:
            break
        found.append(scanned)
        record = scanned.record
        position = Tail(page + record.page_count, record.sequence, scanned.mac)
        pages_found += record.page_count
        if pages_found > page_count:
            raise IntegrityError(path, "journal: more records than it has room for")
    _look_ahead(read, page_count, position, uuid, epoch, key, path)
    return found


def _record_at(
    read: ReadJournal, page: int, page_count: int, position: Tail, uuid: bytes, epoch: int,
    key: bytes, cipher: BlockCipher,
) -> Scanned | None:  # fmt: skip
    if page >= page_count:
        return None
    first = read(page, 1)
    header = _valid_header(first, uuid, key)
    if (
        header is None
        or header.sequence != position.sequence + 1
        or header.epoch != epoch
        or header.page != page
        or not same_mac(header.previous_mac, position.mac)
        or page + header.page_count > page_count
        or header.page_count > page_count // 2
        or header.page_count != header.head_pages + header.counts[3]
    ):
        return None
    head = first + read(page + 1, header.head_pages - 1) if header.head_pages > 1 else first
    if not same_mac(mac_of(key, record_mac_input(head)), header.mac):
        return None
    record = header.decode_record(head)
    payload_page = page + header.head_pages
    if not _payload_opens(read, record, payload_page, cipher):
        return None
    return Scanned(record, header.mac, payload_page)


def _valid_header(first: bytes, uuid: bytes, key: bytes) -> RecordHeader | None:
    header = RecordHeader.decode(first)
    if header is None or header.uuid != uuid:
        return None
    return header if same_mac(mac_of(key, header_mac_input(first)), header.header_mac) else None


def _payload_opens(
    read: ReadJournal, record: Record, payload_page: int, cipher: BlockCipher
) -> bool:
    for i, block in enumerate(record.inline_blocks):
        sealed = bytearray(read(payload_page + i, 1)) + bytes(TAG_SIZE)
        nonce, tag, _ = ENTRY_PARTS.unpack_from(record.inline_entries, i * ENTRY_SIZE)
        try:
            cipher.open_block(block, sealed, nonce, tag)
        except BlockDamaged:
            return False
    return True


def _look_ahead(
    read: ReadJournal, page_count: int, position: Tail, uuid: bytes, epoch: int, key: bytes,
    path: str,
) -> None:  # fmt: skip
    step = _SCAN_SIZE // BLOCK_SIZE
    magic = MAGICS["record"]
    for start in range(0, page_count, step):
        raw = read(start, min(step, page_count - start))
        for at in range(0, len(raw), BLOCK_SIZE):
            if raw[at : at + 8] != magic:
                continue
            header = _valid_header(raw[at : at + RECORD_HEADER_SIZE], uuid, key)
            if header is None or header.epoch < epoch:
                continue
            if header.epoch > epoch or header.sequence > position.sequence + 1:
                raise IntegrityError(
                    path,
                    f"journal: record {position.sequence + 1} is missing or damaged, but record"
                    f" {header.sequence} is there (damaged, or altered outside sealfs)",
                )
