"""tools/refcheck.py against images made by hand: an encoder of its own, from FORMAT.md alone.

Nothing of sealfs is imported: if sealfs and refcheck ever agree on a mistake, these bytes do not.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib.util
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

PROGRAM = Path(__file__).parent.parent / "tools" / "refcheck.py"
PAGE = 4096
KEY, UUID, SALT = bytes(range(32)), bytes(range(16)), b"\x5a" * 32
B, F, D, H, I, J = 4, 4, 2, 4, 1, 8  # noqa: E741 - the letters of FORMAT.md
BLOCKS = 40


def load_refcheck() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refcheck", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["refcheck"] = module
    spec.loader.exec_module(module)
    return module


refcheck = load_refcheck()
SHAPE = refcheck.Shape(B, F, D, H, I, J)


def kdf(salt: bytes, info: bytes) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt, info).derive(KEY)


def mac(label: bytes, content: bytes) -> bytes:
    return hmac.new(kdf(UUID, label + b"\x01"), content, hashlib.sha256).digest()


def tree_mac(kind: bytes, level: int, index: int, content: bytes) -> bytes:
    return mac(b"sealfs1 tree", kind + bytes([level]) + UUID + struct.pack("<Q", index) + content)[
        :24
    ]


def seal(block: int, plain: bytes, counter: int, epoch: int = 1) -> tuple[bytes, bytes]:
    key = kdf(SALT, b"sealfs1 data\x01" + UUID + struct.pack("<I", epoch))
    nonce = struct.pack("<IQ", epoch, counter)
    sealed = AESGCM(key).encrypt(nonce, plain, b"SEALBLK1" + UUID + struct.pack("<Q", block))
    return nonce + sealed[PAGE:] + struct.pack("<I", 1), sealed[:PAGE]


def slot_at(slot: int, page: int = 0) -> int:
    return (2 * H + J + slot * (B + 2) + page) * PAGE


def leaf_page(entries: dict[int, bytes]) -> bytes:
    return b"".join(entries.get(i, bytes(32)) for i in range(B)).ljust(PAGE, b"\0")


def columns(
    macs: dict[int, bytes], slots: dict[int, int], positions: dict[int, int] | None = None
) -> bytes:
    parts = [macs.get(i, bytes(24)) for i in range(F)]
    parts += [struct.pack("<I", slots.get(i, 0)) for i in range(F)]
    parts += [bytes(F), bytes((positions or {}).get(i, 0) for i in range(F))]
    return b"".join(parts).ljust(PAGE, b"\0")


class Image:
    """Slot 0 holds node pages, slot 1 group 0 with blocks 1 and 2, slot 2 is free."""

    def __init__(self) -> None:
        self.raw = bytearray(slot_at(3))
        self.sequence, self.tail_mac, self.tail_page, self.journal_head = 0, bytes(32), 0, 0
        self.put(slot_at(0, 0), columns({}, {}))
        self.top = columns({}, {})
        row = struct.pack("<IB3s32s", 1, 1, b"", SALT)
        self.table = row
        for half in (0, H):
            self.put((half + I + 1) * PAGE, row)
            self.put((half + 1) * PAGE, self.identity())
        self.size = BLOCKS * PAGE
        self.superblock(0, 1)

    def put(self, offset: int, content: bytes) -> None:
        self.raw[offset : offset + len(content)] = content

    def identity(self) -> bytes:
        content = struct.pack("<16sQQBB", UUID, 1, 0, 1, 1)
        content += b"".join(struct.pack("<H", len(t)) + t for t in (b"vm", b"", b"vm"))
        content += b"\x01\x01" + struct.pack("<H", 3) + b"abc" + b"\x00"
        head = struct.pack("<8sII", b"SEALIDN1", 1, len(content))
        digest = hashlib.sha256(content).digest()
        return head + digest + mac(b"sealfs1 identity", head + content) + content

    def root(self, top: bytes, size: int) -> bytes:
        top_mac = tree_mac(b"SEALNOD", D, 0, top[: 24 * F])
        return tree_mac(b"SEALROT", 0, size, top_mac)

    def superblock(self, page: int, generation: int, clean: int = 0) -> None:
        raw = struct.pack("<8sII16sQQ", b"SEALFS1\0", 1, 0, UUID, generation, self.size)
        raw += struct.pack("<HHBBBBII", B, F, D, 1, clean, 0, H, J)
        raw += self.root(self.top, self.size) + struct.pack("<IBBH", 0, 0, 0, I)
        raw += struct.pack("<IIQ", self.tail_page, 1, self.sequence) + self.tail_mac
        raw += hashlib.sha256(self.table).digest()
        raw = raw.ljust(480, b"\0")
        self.put(page * PAGE, raw + mac(b"sealfs1 superblock", raw))

    def content(self) -> None:
        """Put blocks 1 and 2 into the tree."""
        entries = {}
        for block in (1, 2):
            entries[block], sealed = seal(block, bytes([block]) * PAGE, block)
            self.put(slot_at(1, 2 + block), sealed)
        self.put(slot_at(1, 1), leaf_page(entries))  # the place that is not hinted
        node = columns({0: tree_mac(b"SEALLEF", 0, 0, leaf_page(entries))}, {0: 1})
        self.put(slot_at(0, 2), node)
        self.top = columns({0: tree_mac(b"SEALNOD", 1, 0, node[: 28 * F])}, {0: 0}, {0: 1})
        self.put(slot_at(0, 1), self.top)
        self.superblock(H, 2)

    def record(
        self,
        *,
        allocs: tuple[tuple[int, int], ...] = (),
        inline: tuple[tuple[int, bytes, int], ...] = (),
        holes: tuple[tuple[int, int], ...] = (),
        size: int = BLOCKS * PAGE,
    ) -> None:
        sealed = [seal(block, plain, counter) for block, plain, counter in inline]
        body = b"".join(struct.pack("<QI", *each) for each in allocs)
        body += b"".join(struct.pack("<Q", each[0]) for each in inline)
        body += b"".join(entry for entry, _ in sealed)
        body += b"".join(struct.pack("<QQ", *each) for each in holes)
        count = 1 + len(inline)
        self.sequence += 1
        head = (
            b"SEALREC1"
            + UUID
            + struct.pack("<QIIII", self.sequence, 1, 1, self.journal_head, count)
        )
        head += self.tail_mac + bytes(24) + struct.pack("<Q", size)
        head += struct.pack("<IIIII", len(allocs), 0, 0, len(inline), len(holes))
        head = head.ljust(192, b"\0")
        head += mac(b"sealfs1 journal", head)
        body = body.ljust(PAGE - 256, b"\0")
        self.tail_mac = mac(b"sealfs1 journal", head + body)
        at = (2 * H + self.journal_head) * PAGE
        self.put(at, head + self.tail_mac + body + b"".join(cipher for _, cipher in sealed))
        self.journal_head += count


def test_an_empty_image_is_good() -> None:
    image = Image()
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert report.errors == []
    assert (report.size, report.uuid, report.sequence) == (BLOCKS * PAGE, UUID, 0)
    assert report.root == image.root(image.top, image.size)
    assert report.blocks == {}


def test_content_in_the_tree_is_found_at_either_place() -> None:
    image = Image()
    image.content()
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert report.errors == []
    assert report.blocks == {1: b"\x01" * PAGE, 2: b"\x02" * PAGE}
    assert report.nonces == {(1, 1), (1, 2)}


def test_records_are_applied_in_memory() -> None:
    image = Image()
    image.content()
    image.record(inline=((1, b"n" * PAGE, 10), (3, b"m" * PAGE, 11)))
    image.record(allocs=((2, 2),), inline=((9, b"k" * PAGE, 12),), holes=((2, 1),))
    image.record(size=8 * PAGE + 5)
    image.record(size=8 * PAGE)
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert report.errors == []
    assert report.blocks == {1: b"n" * PAGE, 3: b"m" * PAGE}
    assert (report.sequence, report.records, report.size) == (4, 4, 8 * PAGE)
    # Group 2 was emptied, then cut off, and has lost its slot; what is left makes the root.
    entries = {1: seal(1, b"n" * PAGE, 10)[0], 3: seal(3, b"m" * PAGE, 11)[0]}
    node = columns({0: tree_mac(b"SEALLEF", 0, 0, leaf_page(entries))}, {0: 1})
    top = columns({0: tree_mac(b"SEALNOD", 1, 0, node[: 28 * F])}, {})
    assert report.root == image.root(top, 8 * PAGE)


def test_a_torn_last_record_is_not_taken() -> None:
    image = Image()
    image.content()
    image.record(inline=((1, b"n" * PAGE, 10),))
    image.raw[(2 * H + 1) * PAGE + 600] ^= 1
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert report.errors == []
    assert report.blocks[1] == b"\x01" * PAGE


def test_a_record_lost_in_the_middle_is_refused() -> None:
    image = Image()
    image.record(inline=(), allocs=((0, 1),))
    lost = image.journal_head - 1
    image.record(holes=((5, 1),))
    image.record(holes=((6, 1),))
    image.raw[(2 * H + lost) * PAGE + 300] ^= 1
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert report.refused
    assert "lost" in report.errors[0]


DAMAGE: dict[str, tuple[Callable[[Image], int], str]] = {
    "superblocks": (lambda image: 40, "no superblock"),
    "leaf": (lambda image: slot_at(1, 1) + 33, "leaf of group 0"),
    "block": (lambda image: slot_at(1, 3) + 5, "block 1 does not"),
    "node": (lambda image: slot_at(0, 2) + 3, "node 1/0"),
    "top": (lambda image: slot_at(0, 1) + 3, "top node"),
    "table": (lambda image: (H + I + 1) * PAGE + 9, "of the live superblock"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_flipped_bit_is_named(name: str) -> None:
    image = Image()
    image.content()
    where, text = DAMAGE[name]
    image.raw[where(image)] ^= 4
    if name == "superblocks":
        image.raw[H * PAGE + 40] ^= 4
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert any(text in error for error in report.errors), report.errors


def test_two_blocks_under_one_nonce_are_named() -> None:
    image = Image()
    image.content()
    image.record(inline=((3, b"m" * PAGE, 2),))
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert any("was used before" in error for error in report.errors)


def test_a_busy_slot_in_a_record_is_named() -> None:
    image = Image()
    image.content()
    image.record(allocs=((3, 1),))
    report = refcheck.check(bytes(image.raw), KEY, SHAPE)
    assert any("is busy" in error for error in report.errors)
    assert any("used twice" in error for error in report.errors)


def test_another_key_opens_nothing() -> None:
    assert refcheck.check(bytes(Image().raw), bytes(32), SHAPE).refused


@pytest.mark.parametrize(("damage", "status"), [(None, 0), (slot_at(1, 3), 3)])
def test_the_command_line_prints_and_answers(
    tmp_path: Path, damage: int | None, status: int
) -> None:
    image = Image()
    image.content()
    if damage is not None:
        image.raw[damage] ^= 1
    (tmp_path / "x.sealed").write_bytes(image.raw)
    (tmp_path / "key").write_text(KEY.hex())
    arguments = ["--key-file", "key", "--data", "--geometry", f"{B},{F},{D},{H},{I}"]
    done = subprocess.run(
        [sys.executable, PROGRAM, "x.sealed", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    assert "block_count: 2" in done.stdout
    assert UUID.hex() in done.stdout
