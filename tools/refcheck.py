#!/usr/bin/env python3
"""Independent reader of a sealed image, written from FORMAT.md alone.

Shares no module with sealfs: only the standard library and `cryptography`. It never writes. It
reads what a recovery would find: the live superblock, the tree, the journal replayed in memory;
and verifies every MAC, the place of everything, and (with `data`) every block.

    tools/refcheck.py IMAGE --key-file FILE [--key-file 2=FILE] [--data]

prints what it found; exit status 0, or 3 when something is wrong. The key file holds the image
key: 32 bytes, or 64 hexadecimal digits; of key generation 1, or of the one named. Section numbers
are those of FORMAT.md.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import itertools
import os
import struct
import sys
from collections import Counter, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PAGE = 4096
NO_MAC = bytes(24)
HOLE = bytes(32)
LOST = bytes(28) + b"\1" + bytes(3)  # a block that never opens: there is no epoch 0


class Shape(NamedTuple):
    """Geometry (section 2), in pages; `journal_pages` 0: what the superblock says."""

    group_blocks: int = 128
    fanout: int = 128
    depth: int = 4
    header_pages: int = 256
    identity_pages: int = 15
    journal_pages: int = 0


Geometry = Any  # a Shape, or anything with its attributes


class Refused(Exception):
    """The image as a whole cannot be read."""


@dataclass
class Report:
    """What was found. `errors` empty: the image is good."""

    errors: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: bool = False
    uuid: bytes = b""
    size: int = 0
    generation: int = 0
    sequence: int = 0
    tail_sequence: int = 0
    clean: bool = False
    root: bytes = b""
    epochs: list[int] = field(default_factory=list)
    records: int = 0
    group_count: int = 0
    node_count: int = 0
    block_count: int = 0
    blocks: dict[int, bytes] = field(default_factory=dict)
    nonces: set[tuple[int, int]] = field(default_factory=set)
    vm_id: str = ""
    phase: int = 0
    key_generation: int = 0
    cursor: int = 0
    found: Counter[tuple[int, str]] = field(default_factory=Counter)
    """How much of each kind is under each key generation: superblocks, identities, epochs, nodes,
    leaves, records, blocks. A leaf that records in the journal have changed is not counted."""

    def under(self, generation: int) -> dict[str, int]:
        """Return what is under one key generation, by kind."""
        return {kind: count for (each, kind), count in self.found.items() if each == generation}


SUPERBLOCK_FIELDS = (
    "magic version features uuid generation size group_blocks fanout depth key_generation clean"
    " reserved header_pages journal_pages root_mac root_slot root_position root_place"
    " identity_pages tail_page epoch_count tail_sequence tail_mac table_digest anchors"
    " rekey_phase old_generation reserved2 rekey_cursor reserved3 mac"
)
Superblock = namedtuple("Superblock", SUPERBLOCK_FIELDS)  # section 4.1, in the order of its table
SUPERBLOCK = struct.Struct("<8sII16sQQHHBBB1sII24sIBBHIIQ32s32s192sBB6sQ96s32s")
ROW = struct.Struct("<IB3s32s")
ENTRY = struct.Struct("<IQ16sI")
RECORD = struct.Struct("<8s16sQIIII32s24sQIIIII60s32s32s")


def hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 (RFC 5869) for 32 bytes."""
    return hmac.digest(hmac.digest(salt, key, "sha256"), info + b"\x01", "sha256")


Record = namedtuple(
    "Record",
    "sequence flags page page_count root_mac size mac allocs groups direct inline holes"
    " payload_offset",  # where in the file its payload begins
)


class Reader:
    """Bytes of the image, from memory or from a descriptor."""

    def __init__(self, source: bytes | bytearray | memoryview | int) -> None:
        if isinstance(source, int):
            self._fd: int | None = source
            self.size = os.fstat(source).st_size
        else:
            self._fd = None
            self._bytes = memoryview(source)
            self.size = len(self._bytes)

    def __call__(self, offset: int, size: int) -> bytes:
        if self._fd is None:
            return bytes(self._bytes[offset : offset + size])
        return os.pread(self._fd, size, offset)

    def page(self, number: int) -> bytes:
        """Return one page, filled up with zeros past the end."""
        return self(number * PAGE, PAGE).ljust(PAGE, b"\0")


class Checker:
    """One pass over one image."""

    def __init__(self, read: Reader, keys: Mapping[int, bytes], shape: Geometry) -> None:
        self.read, self.keys, self.shape = read, keys, shape
        self.report = Report()
        self.blocks_per_group = shape.group_blocks
        self.fanout, self.depth = shape.fanout, shape.depth
        self.slot_pages = shape.group_blocks + 2
        self.capacity = shape.group_blocks * shape.fanout**shape.depth
        self.journal_pages = shape.journal_pages
        self.rows: dict[int, tuple[int, bytes]] = {}
        self.epoch = 0
        self._ciphers: dict[int, AESGCM] = {}
        # The tree: columns of each node that is there, as it stands now.
        self.macs: dict[tuple[int, int], bytearray] = {}
        self.slots: dict[int, bytearray] = {}
        self.has_lost = False  # a node page, or a leaf page that a record needs, is damaged
        self.lost: list[range] = []  # groups that damaged node pages cover
        self.places: dict[int, int] = {}  # group -> hinted place of its leaf
        self.leaf_generations: dict[int, int] = {}  # group -> generation of its leaf's MAC
        self.stale: set[int] = set()  # level-1 nodes to be computed again
        self.leaves: dict[int, bytearray] = {}  # leaves that records have touched
        self.inline: dict[int, int] = {}  # block -> where its payload lies in the file
        self.used_positions: set[tuple[int, int]] = set()
        self.node_slots: set[int] = set()
        self.record_slots: set[int] = set()  # may lie past the end of the file (section 9, 6)
        self.record_nonces: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.seen_nonces: dict[tuple[int, int], bytearray] = {}

    # -- keys (section 3)

    def use(self, block: Superblock) -> None:
        self.uuid, self.generation_of_keys = block.uuid, block.key_generation
        self.phase = block.rekey_phase
        # Section 11.2: new MACs under the first, live pages under any of them.
        self.tree_keys = {block.key_generation: self.subkey(b"sealfs1 tree", block.key_generation)}
        if self.phase == 1:
            old = block.old_generation
            self.tree_keys[old] = self.subkey(b"sealfs1 tree", old)
        self.journal_key = self.subkey(b"sealfs1 journal", block.key_generation)

    def subkey(self, label: bytes, generation: int, uuid: bytes | None = None) -> bytes:
        if generation not in self.keys:
            raise Refused(f"no image key of generation {generation}")
        info = label + bytes([generation])
        return hkdf(self.keys[generation], self.uuid if uuid is None else uuid, info)

    def cipher(self, epoch: int) -> AESGCM:
        if epoch not in self._ciphers:
            generation, salt = self.rows[epoch]
            info = b"sealfs1 data" + bytes([generation]) + self.uuid + struct.pack("<I", epoch)
            self._ciphers[epoch] = AESGCM(hkdf(self.keys[generation], salt, info))
        return self._ciphers[epoch]

    def open_block(self, block: int, entry: bytes, ciphertext: bytes) -> bytes | None:
        """Return the plaintext, or None when it does not authenticate."""
        epoch, _, tag, flags = ENTRY.unpack(entry)
        if epoch not in self.rows or flags != 1 or len(ciphertext) != PAGE:
            return None
        data = b"SEALBLK1" + self.uuid + struct.pack("<Q", block)
        try:
            return self.cipher(epoch).decrypt(entry[:12], ciphertext + tag, data)
        except InvalidTag:
            return None

    # -- superblock, table, identity (sections 4 and 5)

    def superblocks(self) -> Superblock:
        found = []
        for name, page in (("A", 0), ("B", self.shape.header_pages)):
            raw = self.read(page * PAGE, 512)
            block = self.superblock(raw)
            if block is None:
                self.report.notes.append(f"superblock {name} is not valid")
            else:
                found.append((block.generation, name, block))
                self.report.found[block.key_generation, "superblocks"] += 1
        if not found:
            raise Refused("no superblock with a valid MAC")
        if len({generation for generation, _, _ in found}) < len(found):
            raise Refused("both superblocks have the same generation")
        if len({block.uuid for _, _, block in found}) > 1:
            raise Refused("the superblocks are of two images")
        _, self.live_name, block = max(found)
        self.verify_superblock(block)
        return block

    def superblock(self, raw: bytes) -> Superblock | None:
        if len(raw) < SUPERBLOCK.size or raw[:8] != b"SEALFS1\0":
            return None
        block = Superblock._make(SUPERBLOCK.unpack(raw[: SUPERBLOCK.size]))
        if block.key_generation not in self.keys:
            return None
        key = self.subkey(b"sealfs1 superblock", block.key_generation, block.uuid)
        return block if hmac.digest(key, raw[:480], "sha256") == block.mac else None

    def verify_superblock(self, block: Superblock) -> None:
        shape = self.shape
        if block.version != 1 or block.features != (block.rekey_phase > 0):
            raise Refused(f"version {block.version}, features {block.features:#x}")
        has_old = block.rekey_phase > 0
        follows = block.old_generation % 255 + 1 == block.key_generation
        if (
            block.rekey_phase > 2
            or has_old != (block.old_generation > 0)
            or (has_old and not follows)
            or (block.rekey_cursor > 0 and block.rekey_phase != 1)
        ):
            raise Refused(f"phase {block.rekey_phase} of a rekey: its fields do not fit")
        names = ("group_blocks", "fanout", "depth", "header_pages", "identity_pages")
        for name in names:
            if getattr(block, name) != getattr(shape, name):
                raise Refused(f"geometry: {name} is {getattr(block, name)}")
        self.journal_pages = shape.journal_pages or block.journal_pages
        if block.journal_pages != self.journal_pages:
            raise Refused(f"geometry: journal_pages is {block.journal_pages}")
        if (
            any(block.reserved + block.reserved2 + block.reserved3)
            or block.clean > 1
            or block.root_place > 1
        ):
            self.error("superblock: a reserved field or a flag is out of range")
        if block.size > self.capacity * PAGE:
            raise Refused("size beyond what the tree can hold")
        if block.tail_page > self.journal_pages:
            raise Refused("tail_page outside the journal")
        if block.tail_sequence == 0 and any(block.tail_mac):
            self.error("superblock: a tail MAC before the first record")
        tails = list(struct.iter_unpack("<Q16s", block.anchors))
        numbers = [sequence for sequence, mac in tails if sequence or any(mac)]
        if any(a < b for a, b in itertools.pairwise(numbers)):
            self.error("superblock: anchors are not newest first")

    def table(self, block: Superblock) -> None:
        h, i = self.shape.header_pages, self.shape.identity_pages
        size = block.epoch_count * ROW.size
        if size > (h - 1 - i) * PAGE:
            raise Refused(f"epoch table of {block.epoch_count} rows")
        copies = {"A": (i + 1) * PAGE, "B": (h + i + 1) * PAGE}
        order = [self.live_name, "B" if self.live_name == "A" else "A"]
        raws = {name: self.read(copies[name], size) for name in order}
        good = [n for n in order if hashlib.sha256(raws[n]).digest() == block.table_digest]
        if not good:
            raise Refused("no copy of the epoch table has the rows the superblock vouches for")
        if good[0] != self.live_name:
            self.error(f"epoch table {self.live_name}, of the live superblock, is damaged")
        previous = 0
        for epoch, generation, reserved, salt in ROW.iter_unpack(raws[good[0]]):
            allowed = {block.key_generation}
            if block.rekey_phase == 1:
                allowed.add(block.old_generation)
            if epoch <= previous or any(reserved) or generation not in allowed:
                raise Refused(f"epoch table: row of epoch {epoch}")
            if generation not in self.keys:
                raise Refused(f"no image key of generation {generation}")
            self.report.found[generation, "epochs"] += 1
            self.rows[epoch] = (generation, salt)
            previous = epoch
        self.epoch = previous
        self.report.epochs = list(self.rows)

    def identity(self, block: Superblock) -> None:
        now, old = block.key_generation, block.old_generation
        self.identity_generations = {1: {old}, 2: {old, now}}.get(block.rekey_phase, {now})
        h, i = self.shape.header_pages, self.shape.identity_pages
        found = []
        for name, page in (("A", 1), ("B", h + 1)):
            try:
                found.append(self.identity_copy(self.read(page * PAGE, i * PAGE)))
            except (Refused, ValueError, struct.error) as exc:
                self.report.notes.append(f"identity {name}: {exc}")
        if not found:
            self.error("no identity authenticates")
            return
        _, self.report.vm_id = max(found)

    def identity_copy(self, raw: bytes) -> tuple[int, str]:
        magic, version, size, checksum, mac = struct.unpack_from("<8sII32s32s", raw)
        if magic != b"SEALIDN1" or version != 1 or size > len(raw) - 80:
            raise Refused("not an identity")
        content = raw[80 : 80 + size]
        if hashlib.sha256(content).digest() != checksum:
            raise Refused("checksum does not match")
        uuid, generation, _, suite, keys = struct.unpack_from("<16sQQBB", content)
        if keys not in self.identity_generations:
            raise Refused(f"key generation {keys}")
        key = self.subkey(b"sealfs1 identity", keys)
        if hmac.digest(key, raw[:16] + content, "sha256") != mac:
            raise Refused("MAC does not match")
        at = 34
        texts = []
        for _ in range(3):
            text, at = _counted(content, at)
            texts.append(text.decode())
        wrapped = []
        for with_generation in (1, 0):
            count, at = content[at], at + 1
            for _ in range(count):
                wrapped += [content[at]] * with_generation
                _, at = _counted(content, at + with_generation)
        if wrapped not in ([], [keys]) and sorted(wrapped) != sorted([keys, keys % 255 + 1]):
            raise Refused(f"wrapped keys of generations {wrapped}")
        self.report.found[keys, "identities"] += 1
        for generation in wrapped:
            self.report.found[generation, "wrapped keys"] += 1
        if at != size or uuid != self.uuid or suite != 1:
            raise Refused("bytes left over, another uuid or another suite")
        return generation, texts[0]

    # -- tree (section 6)

    def slot_offset(self, slot: int) -> int:
        page = 2 * self.shape.header_pages + self.journal_pages + slot * self.slot_pages
        return page * PAGE

    def tree(self, block: Superblock) -> None:
        self.place(block.root_slot, block.root_position, "top node")
        wanted = block.root_mac
        for place in (block.root_place, 1 - block.root_place):
            page = self.node_page(block.root_slot, block.root_position, place)
            if self.root_of(self.node_mac(self.depth, 0, page), block.size) == wanted:
                self.report.found[self.generation_of_keys, "nodes"] += 1
                break
        else:
            raise Refused("the top node does not match the root")
        todo = [(self.depth, 0, page)]
        while todo:
            level, index, page = todo.pop()
            self.report.node_count += 1
            f = self.fanout
            self.macs[level, index] = bytearray(page[: 24 * f])
            slots = struct.unpack_from(f"<{f}I", page, 24 * f)
            if level == 1:
                self.slots[index] = bytearray(page[24 * f : 28 * f])
            for child in range(f):
                mac = page[24 * child : 24 * child + 24]
                if mac == NO_MAC:
                    continue
                number, place = index * f + child, page[28 * f + child]
                if level == 1:
                    self.inside(slots[child], f"group {number}")
                    self.places[number] = place & 1
                    continue
                position = page[29 * f + child]
                self.place(slots[child], position, f"node {level - 1}/{number}")
                for turn in (place & 1, 1 - (place & 1)):
                    below = self.node_page(slots[child], position, turn)
                    under = self.node_generation(level - 1, number, below, mac)
                    if under:
                        todo.append((level - 1, number, below))
                        self.report.found[under, "nodes"] += 1
                        break
                else:
                    self.lose(level - 1, number)
        if self.compute_root(block.size) != wanted:
            self.error("the tree of the superblock is not in its canonical form")

    def lose(self, level: int, number: int) -> None:
        """Take what a damaged node page covers for lost; it is not rebuilt here (section 6.4)."""
        count = self.fanout**level
        self.has_lost = True
        self.lost.append(range(number * count, (number + 1) * count))
        size = count * self.blocks_per_group * PAGE
        self.error(
            f"node {level}/{number} does not authenticate: bytes {number * size} to"
            f" {(number + 1) * size - 1} of the disk are lost"
        )

    def is_lost(self, group: int) -> bool:
        return any(group in groups for groups in self.lost)

    def inside(self, slot: int, what: str) -> None:
        if self.slot_offset(slot + 1) > self.read.size:
            self.error(f"{what}: slot {slot} lies past the end of the file")

    def place(self, slot: int, position: int, what: str) -> None:
        self.inside(slot, what)
        if position >= self.slot_pages // 2:
            self.error(f"{what}: position {position} is outside a chunk")
        if (slot, position) in self.used_positions:
            self.error(f"{what}: position {position} of slot {slot} is used twice")
        self.used_positions.add((slot, position))
        self.node_slots.add(slot)

    def node_page(self, slot: int, position: int, place: int) -> bytes:
        return self.read.page(self.slot_offset(slot) // PAGE + 2 * position + place)

    def mac24(
        self, label: bytes, level: int, number: int, content: bytes | bytearray, generation: int = 0
    ) -> bytes:
        head = label + bytes([level]) + self.uuid + struct.pack("<Q", number)
        key = self.tree_keys[generation or self.generation_of_keys]
        return hmac.digest(key, head + content, "sha256")[:24]

    def node_mac(self, level: int, index: int, page: bytes, generation: int = 0) -> bytes:
        columns = page[: (28 if level == 1 else 24) * self.fanout]
        return self.mac24(b"SEALNOD", level, index, columns, generation)

    def node_generation(self, level: int, index: int, page: bytes, mac: bytes) -> int:
        """Return the key generation under which a page has this MAC, 0 for none."""
        under = (g for g in self.tree_keys if self.node_mac(level, index, page, g) == mac)
        return next(under, 0)

    def root_of(self, top: bytes, size: int) -> bytes:
        return self.mac24(b"SEALROT", 0, size, top)

    def compute_root(self, size: int) -> bytes:
        """Return the root of the tree as it stands in memory, from the changed nodes upwards."""
        touched = self.stale
        if not self.report.root and self.phase == 1:
            touched = set()  # what is there has been verified, under either key
        elif not self.report.root:
            touched = {index for level, index in self.macs if level == 1}
        for level in range(1, self.depth):
            above = set()
            for index in touched:
                columns = self.macs.get((level, index))
                mac = NO_MAC
                if columns is not None and any(columns):
                    slots = self.slots[index] if level == 1 else b""
                    mac = self.mac24(b"SEALNOD", level, index, columns + slots)
                parent, child = divmod(index, self.fanout)
                self.node(level + 1, parent)[24 * child : 24 * child + 24] = mac
                above.add(parent)
            touched = above
        self.stale = set()
        top = bytes(self.node(self.depth, 0))
        if self.depth == 1:
            top += bytes(self.slots[0])
        self.report.root = self.root_of(self.mac24(b"SEALNOD", self.depth, 0, top), size)
        return self.report.root

    def node(self, level: int, index: int) -> bytearray:
        if (level, index) not in self.macs:
            self.macs[level, index] = bytearray(24 * self.fanout)
            if level == 1:
                self.slots[index] = bytearray(4 * self.fanout)
        return self.macs[level, index]

    def group(self, number: int) -> tuple[bytes, int] | None:
        """Return leaf MAC and slot of a group, None for a hole."""
        index, child = divmod(number, self.fanout)
        columns = self.macs.get((1, index))
        if columns is None or columns[24 * child : 24 * child + 24] == NO_MAC:
            return None
        return bytes(columns[24 * child : 24 * child + 24]), struct.unpack_from(
            "<I", self.slots[index], 4 * child
        )[0]

    def set_group(self, number: int, mac: bytes, slot: int) -> None:
        index, child = divmod(number, self.fanout)
        self.node(1, index)[24 * child : 24 * child + 24] = mac
        struct.pack_into("<I", self.slots[index], 4 * child, slot)
        self.stale.add(index)

    def leaf(self, number: int) -> bytearray | None:
        """Return the leaf page of a group, verified; None, with an error, when it is not."""
        if number in self.leaves:
            return self.leaves[number]
        found = self.group(number)
        if found is None:
            return None
        mac, slot = found
        hint = self.places.get(number, 0)
        for place in (hint, 1 - hint):
            page = self.read.page(self.slot_offset(slot) // PAGE + place)
            for generation in self.tree_keys:
                if self.mac24(b"SEALLEF", 0, number, page, generation) == mac:
                    self.leaf_generations[number] = generation
                    return bytearray(page)
        self.error(f"leaf of group {number}, slot {slot}, does not authenticate")
        return None

    def error(self, text: str) -> None:
        self.report.errors.append(text)


def _counted(content: bytes, at: int) -> tuple[bytes, int]:
    (size,) = struct.unpack_from("<H", content, at)
    if at + 2 + size > len(content):
        raise Refused("a length beyond the content")
    return content[at + 2 : at + 2 + size], at + 2 + size


class Replay(Checker):
    """The journal, applied in memory (sections 7 and 9)."""

    def records(self, block: Superblock) -> list[Record]:
        at, sequence, previous = block.tail_page, block.tail_sequence, block.tail_mac
        taken: list[Record] = []
        while True:
            for page in dict.fromkeys((at, 0)):
                record = self.record(page, sequence + 1, previous)
                if record is not None:
                    break
            else:
                break
            taken.append(record)
            at, sequence, previous = page + record.page_count, record.sequence, record.mac
            if sum(each.page_count for each in taken) > self.journal_pages:
                raise Refused("the records do not fit into the journal")
        self.look_ahead(sequence)
        if block.clean and taken:
            self.error("records after a superblock that was closed in order")
        self.report.records, self.report.sequence = len(taken), sequence
        if taken:
            self.report.found[block.key_generation, "records"] = len(taken)
        return taken

    def journal_page(self, page: int) -> int:
        return (2 * self.shape.header_pages + page) * PAGE

    def header(self, page: int) -> tuple[bytes, tuple[Any, ...]] | None:
        raw = self.read(self.journal_page(page), RECORD.size)
        if raw[:8] != b"SEALREC1" or len(raw) < RECORD.size or raw[8:24] != self.uuid:
            return None
        if hmac.digest(self.journal_key, raw[:192], "sha256") != raw[192:224]:
            return None
        return raw, RECORD.unpack(raw)

    def look_ahead(self, sequence: int) -> None:
        for page in range(self.journal_pages):
            found = self.header(page)
            if found is None:
                continue
            number, epoch = struct.unpack_from("<QI", found[0], 24)
            if epoch > self.epoch or (epoch == self.epoch and number > sequence + 1):
                raise Refused(f"record {sequence + 1} is lost, record {number} is there")

    def record(self, page: int, sequence: int, previous: bytes) -> Record | None:
        """Return the record at a journal page if it is the next one, whole and authentic."""
        found = self.header(page) if page < self.journal_pages else None
        if found is None:
            return None
        fields = found[1]
        number, epoch, flags, own_page, page_count, before, root, size = fields[2:10]
        allocs, groups, direct, inline, holes, reserved, _, mac = fields[10:]
        if (number, epoch, own_page, before) != (sequence, self.epoch, page, previous):
            return None
        body = allocs * 12 + groups * 36 + (direct + inline) * 40 + holes * 16
        head_pages = -(-(RECORD.size + body) // PAGE)
        if (
            page_count != head_pages + inline
            or page + page_count > self.journal_pages
            or page_count > self.journal_pages // 2
            or any(reserved)
            or flags > 3
            or bool(flags & 2) != (root != NO_MAC)
        ):
            raise Refused(f"record {number}: authentic header, impossible fields")
        head = self.read(self.journal_page(page), head_pages * PAGE)
        if hmac.digest(self.journal_key, head[:224] + head[256:], "sha256") != mac:
            return None
        if any(head[RECORD.size + body :]):
            self.error(f"record {number}: padding is not zero")
        at = RECORD.size

        def take(form: str, count: int) -> list[tuple[int, ...]]:
            nonlocal at
            size = struct.calcsize(form) * count
            at += size
            return list(struct.iter_unpack(form, head[at - size : at]))

        def entries(count: int) -> list[tuple[int, bytes]]:
            numbers = [row[0] for row in take("<Q", count)]
            return list(zip(numbers, [row[0] for row in take("<32s", count)], strict=True))

        record = Record(
            number, flags, page, page_count, root, size, mac,
            take("<QI", allocs), take("<QI24s", groups), entries(direct), entries(inline),
            take("<QQ", holes), self.journal_page(page + head_pages),
        )  # fmt: skip
        for index, (block, entry) in enumerate(record.inline):
            payload = self.read(record.payload_offset + index * PAGE, PAGE)
            if self.open_block(block, entry, payload) is None:
                return None
        return record

    def apply(self, record: Record, old_size: int, busy: set[int]) -> None:
        name = f"record {record.sequence}"
        b = self.blocks_per_group
        touched: set[int] = set()
        for group, slot, *_ in (*record.allocs, *record.groups):
            if slot in busy:
                self.error(f"{name}: slot {slot} for group {group} is busy")
            busy.add(slot)
            self.record_slots.add(slot)
        for group, slot in record.allocs:
            if self.is_lost(group):
                continue
            if self.group(group) is not None:
                self.error(f"{name}: group {group} has a slot already")
            self.leaves[group] = bytearray(PAGE)
            self.set_group(group, b"\xff" * 24, slot)
            touched.add(group)
        for group, slot, mac in record.groups:
            if self.is_lost(group):
                continue
            self.leaves.pop(group, None)
            self.places[group] = 0
            self.set_group(group, mac, slot)
            for block in range(group * b, group * b + b):
                self.inline.pop(block, None)
        for index, (block, entry) in enumerate((*record.direct, *record.inline)):
            position = index - len(record.direct)
            self.note_nonce(name, block, entry)
            if self.is_lost(block // b):
                continue
            touched.add(self.set_entry(block, entry, name, old_size))
            self.inline.pop(block, None)
            if position >= 0:
                self.inline[block] = record.payload_offset + position * PAGE
        ranges = [(first, first + count) for first, count in record.holes]
        if record.size < old_size:
            ranges.insert(0, (-(-record.size // PAGE), self.capacity))
        for first, end in ranges:
            touched |= self.make_holes(first, min(end, self.capacity), old_size)
        for group in touched:
            leaf, found = self.leaves.get(group), self.group(group)
            if leaf is not None and found is not None:
                self.set_group(group, self.mac24(b"SEALLEF", 0, group, leaf), found[1])
        if (
            record.flags & 2
            and not self.has_lost
            and self.compute_root(record.size) != record.root_mac
        ):
            self.error(f"{name}: the tree after it does not match its root")

    def set_entry(self, block: int, entry: bytes, name: str, size: int) -> int:
        group, index = divmod(block, self.blocks_per_group)
        leaf = self.leaf_or_lost(group, size) if block < self.capacity else None
        if leaf is None:
            raise Refused(f"{name}: block {block} has no readable leaf")
        leaf[32 * index : 32 * index + 32] = entry
        self.leaves[group] = leaf
        return group

    def leaf_or_lost(self, group: int, size: int) -> bytearray | None:
        """Return a group's leaf; one that is damaged becomes one of lost blocks (section 9, 6)."""
        leaf = self.leaf(group)
        if leaf is None and self.group(group) is not None:
            b = self.blocks_per_group
            count = min(max(-(-size // PAGE) - group * b, 0), b)
            self.has_lost = True
            leaf = bytearray((LOST * count).ljust(PAGE, b"\0"))
        return leaf

    def make_holes(self, first: int, end: int, size: int) -> set[int]:
        """Make one run holes: groups wholly in it lose their slot; return the others."""
        b = self.blocks_per_group
        groups = set()
        for _, group in list(self.present(first // b, -(-end // b))):
            low, high = max(first - group * b, 0), min(end - group * b, b)
            for block in range(group * b + low, group * b + high):
                self.inline.pop(block, None)
            if high - low == b:
                self.set_group(group, NO_MAC, 0)
                self.leaves.pop(group, None)
                continue
            leaf = self.leaf_or_lost(group, size)
            if leaf is None:
                raise Refused(f"leaf of group {group} is needed to make holes")
            leaf[32 * low : 32 * high] = bytes(32 * (high - low))
            self.leaves[group] = leaf
            groups.add(group)
        return groups

    def present(self, first: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield (slot, group) of every group there is, ascending, within a range of groups."""
        low, high = first // self.fanout, (self.capacity if end is None else end) // self.fanout
        for index in sorted(i for level, i in self.macs if level == 1 and low <= i <= high):
            for group in range(index * self.fanout, (index + 1) * self.fanout):
                if group < first or (end is not None and group >= end):
                    continue
                found = self.group(group)
                if found is not None:
                    yield found[1], group

    def note_nonce(self, name: str, block: int, entry: bytes) -> None:
        epoch, counter, tag, flags = ENTRY.unpack(entry)
        if flags != 1:
            self.error(f"{name}: entry of block {block} has flags {flags:#x}")
        if (epoch, counter) in self.record_nonces:
            self.error(f"{name}: nonce {epoch}/{counter} of block {block} was used before")
        self.record_nonces[epoch, counter] = (block, tag)

    # -- everything that is there at the end

    def walk(self, *, data: bool, keep: bool) -> None:
        used: dict[int, int] = {}
        for slot, group in self.present():
            self.report.group_count += 1
            if slot in used or slot in self.node_slots:
                self.error(f"slot {slot} of group {group} is used twice")
            used[slot] = group
            if slot not in self.record_slots:
                self.inside(slot, f"group {group}")
            leaf = self.leaf(group)
            if group not in self.leaves and group in self.leaf_generations:
                generation = self.leaf_generations[group]
                self.report.found[generation, "leaves"] += 1
                self.check_cursor(group, generation)
            if leaf is not None:
                self.walk_leaf(group, slot, leaf, data=data, keep=keep)

    def check_cursor(self, group: int, generation: int) -> None:
        """Section 4.1: before the cursor nothing is under the old key."""
        if group < self.report.cursor and generation != self.generation_of_keys:
            self.error(f"group {group} is before the cursor and has something under the old key")

    def walk_leaf(self, group: int, slot: int, leaf: bytearray, *, data: bool, keep: bool) -> None:
        b = self.blocks_per_group
        if any(leaf[32 * b :]):
            self.error(f"leaf of group {group}: bytes after its entries")
        for index in range(b):
            entry = bytes(leaf[32 * index : 32 * index + 32])
            block = group * b + index
            if entry == HOLE:
                continue
            self.report.block_count += 1
            if block * PAGE >= self.report.size:
                self.error(f"block {block} lies beyond the size of the disk")
            self.unique_nonce(block, entry, keep=keep)
            if not data:
                continue
            home = self.slot_offset(slot) + (2 + index) * PAGE
            plain = self.open_block(block, entry, self.read(self.inline.get(block, home), PAGE))
            if plain is None:
                self.error(f"block {block} does not authenticate")
            elif keep:
                self.report.blocks[block] = plain

    def unique_nonce(self, block: int, entry: bytes, *, keep: bool) -> None:
        if entry == LOST:
            self.error(f"block {block} is lost: its leaf page was damaged")
            return
        epoch, counter, tag, flags = ENTRY.unpack(entry)
        if flags != 1 or epoch not in self.rows:
            self.error(f"entry of block {block}: flags {flags:#x}, epoch {epoch}")
        else:
            self.report.found[self.rows[epoch][0], "blocks"] += 1
            self.check_cursor(block // self.blocks_per_group, self.rows[epoch][0])
        chunk = self.seen_nonces.setdefault((epoch, counter >> 16), bytearray(8192))
        at, bit = (counter & 0xFFFF) >> 3, 1 << (counter & 7)
        if chunk[at] & bit or self.record_nonces.get((epoch, counter), (block, tag)) != (
            block,
            tag,
        ):
            self.error(f"nonce {epoch}/{counter} of block {block} was used before")
        chunk[at] |= bit
        if keep:
            self.report.nonces.add((epoch, counter))


def check(
    source: bytes | bytearray | memoryview | int,
    image_key: bytes | Mapping[int, bytes],
    geometry: Geometry | None = None,
    *,
    data: bool = True,
    keep: bool = True,
) -> Report:
    """Read a whole image as a recovery would, and report.

    Args:
        source: The bytes of the image, or a descriptor (read with pread, never loaded whole).
        image_key: The image key, or one for each key generation.
        geometry: What the image was made with; without it that of every real image.
        data: Decrypt every block.
        keep: Keep plaintexts and nonces in the report; not for large images.
    """
    keys = {1: image_key} if isinstance(image_key, bytes) else image_key
    checker = Replay(Reader(source), keys, geometry if geometry is not None else Shape())
    report = checker.report
    try:
        block = checker.superblocks()
        checker.use(block)
        report.uuid, report.generation, report.size = block.uuid, block.generation, block.size
        report.tail_sequence, report.clean = block.tail_sequence, bool(block.clean)
        report.phase, report.key_generation = block.rekey_phase, block.key_generation
        report.cursor = block.rekey_cursor
        checker.table(block)
        checker.identity(block)
        checker.tree(block)
        records = checker.records(block)
        busy = {slot for slot, _ in checker.present()} | checker.node_slots
        for record in records:
            checker.apply(record, report.size, busy)
            report.size = record.size
        checker.compute_root(report.size)
        checker.walk(data=data, keep=keep)
    except Refused as exc:
        report.refused = True
        report.errors.append(str(exc))
    return report


def _key_of(text: str) -> tuple[int, bytes]:
    """Read one `[GENERATION=]FILE`."""
    generation, equals, path = text.partition("=")
    if not (equals and generation.isdigit()):
        generation, path = "1", text
    key = Path(path).read_bytes()
    return int(generation), key if len(key) == 32 else bytes.fromhex(key.decode())


def main() -> int:
    """Check one image and print what was found."""
    parser = argparse.ArgumentParser(description="independent check of a sealed image")
    parser.add_argument("image", type=Path)
    parser.add_argument("--key-file", action="append", required=True, metavar="[GENERATION=]FILE")
    parser.add_argument("--data", action="store_true", help="decrypt every block")
    parser.add_argument("--geometry", help="B,F,D,H,I of a test image")
    arguments = parser.parse_args()
    keys = dict(map(_key_of, arguments.key_file))
    shape = Shape(*map(int, arguments.geometry.split(","))) if arguments.geometry else None
    fd = os.open(arguments.image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        report = check(fd, keys, shape, data=arguments.data, keep=False)
    finally:
        os.close(fd)
    names = ("uuid", "vm_id", "size", "generation", "clean", "tail_sequence", "sequence", "records",
             "root", "epochs", "node_count", "group_count", "block_count", "phase",
             "key_generation")  # fmt: skip
    for name in names:
        value = getattr(report, name)
        print(f"{name}: {value.hex() if isinstance(value, bytes) else value}")
    for generation in sorted({each for each, _ in report.found}):
        under = report.under(generation)
        texts = (f"{count} {kind}" for kind, count in sorted(under.items()))
        print(f"under key generation {generation}: {', '.join(texts)}")
    for note in report.notes:
        print(f"note: {note}")
    for error in report.errors:
        print(f"error: {error}")
    return 3 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
