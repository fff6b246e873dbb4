"""Keys, nonces and tags: against vectors of NIST and the RFCs, and against misuse.

AES-256-GCM: test cases 14 and 16 of McGrew and Viega's GCM specification, which NIST adopted;
HMAC-SHA-256: RFC 4231, cases 1 and 2; HKDF-SHA-256: RFC 5869, cases 1 and 3. What sealfs makes of
them is compared with the same made from the standard library's HMAC, byte by byte.
"""

from __future__ import annotations

import hmac
import itertools
import struct
from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealfs.errors import BlockDamaged, IntegrityError, NoSpace
from sealfs.image import cipher as module
from sealfs.image.cipher import (
    BlockCipher,
    EpochTable,
    Subkeys,
    TreeMacs,
    epochs_of,
    mac_of,
    same_mac,
)
from sealfs.image.format import EpochRow

PAGE = 4096
KEY = bytes(range(32))
UUID = bytes(range(16))
ROWS = [EpochRow(1, 1, b"\x11" * 32), EpochRow(5, 1, b"\x55" * 32)]


def hexed(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


# -- vectors

GCM = [
    (
        bytes(32), bytes(12), bytes(16), b"",
        hexed("cea7403d4d606b6e074ec5d3baf39d18 d0d1c8a799996bf0265b98b5d48ab919"),
    ),
    (
        hexed("feffe9928665731c6d6a8f9467308308") * 2,
        hexed("cafebabefacedbaddecaf888"),
        hexed(
            "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
            "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
        ),
        hexed("feedfacedeadbeeffeedfacedeadbeefabaddad2"),
        hexed(
            "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
            "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
            "76fc6ece0f4e1768cddf8853bb2d551b"
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "nonce", "plain", "data", "sealed"), GCM)
def test_the_aes_in_use_is_that_of_the_vectors(
    key: bytes, nonce: bytes, plain: bytes, data: bytes, sealed: bytes
) -> None:
    out = bytearray(len(plain) + 16)
    AESGCM(key).encrypt_into(nonce, plain, data, out)
    assert bytes(out) == sealed
    assert AESGCM(key).decrypt(nonce, sealed, data) == plain


@pytest.mark.parametrize(
    ("key", "message", "digest"),
    [
        (
            b"\x0b" * 20, b"Hi There",
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        ),
        (
            b"Jefe", b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
    ],
)  # fmt: skip
def test_a_mac_is_that_of_rfc_4231(key: bytes, message: bytes, digest: str) -> None:
    assert mac_of(key, message) == hexed(digest)
    assert mac_of(key, memoryview(message)) == hexed(digest)


@pytest.mark.parametrize(
    ("ikm", "salt", "info", "okm"),
    [
        (
            b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
        ),
        (
            b"\x0b" * 22, b"", b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
        ),
    ],
)  # fmt: skip
def test_a_derived_key_is_that_of_rfc_5869(ikm: bytes, salt: bytes, info: bytes, okm: str) -> None:
    assert module._derive(ikm, salt, info) == hexed(okm)


# -- the same, made by hand


def hkdf(salt: bytes, info: bytes) -> bytes:
    return hmac.digest(hmac.digest(salt, KEY, "sha256"), info + b"\x01", "sha256")


def test_subkeys_are_those_of_the_document_and_all_differ() -> None:
    keys = Subkeys.derive(KEY, UUID, 3)
    for name in ("tree", "journal", "superblock", "identity"):
        assert getattr(keys, name) == hkdf(UUID, b"sealfs1 " + name.encode() + b"\x03")
    assert len({keys.tree, keys.journal, keys.superblock, keys.identity}) == 4
    assert Subkeys.derive(KEY, UUID, 4).tree != keys.tree
    assert Subkeys.derive(KEY, bytes(16), 3).tree != keys.tree
    assert KEY.hex() not in repr(keys)
    assert keys.tree.hex() not in repr(keys)


def test_macs_of_the_tree_are_those_of_the_document() -> None:
    macs = TreeMacs(b"k" * 32, UUID)

    def expected(prefix: bytes, level: int, index: int, content: bytes) -> bytes:
        message = prefix + bytes([level]) + UUID + struct.pack("<Q", index) + content
        return hmac.digest(b"k" * 32, message, "sha256")[:24]

    assert macs.leaf(7, b"page") == expected(b"SEALLEF", 0, 7, b"page")
    assert macs.node(2, 7, b"page") == expected(b"SEALNOD", 2, 7, b"page")
    assert macs.root(7, b"page") == expected(b"SEALROT", 0, 7, b"page")
    other = TreeMacs(b"k" * 32, bytes(16))
    found = [macs.leaf(7, b"x"), macs.leaf(8, b"x"), macs.node(1, 7, b"x"), macs.node(2, 7, b"x"),
             macs.root(7, b"x"), other.leaf(7, b"x")]  # fmt: skip
    assert len(set(found)) == len(found)


def test_macs_are_compared_whole() -> None:
    assert same_mac(b"abc", bytearray(b"abc"))
    assert not same_mac(b"abc", b"abd")
    assert not same_mac(b"abc", b"ab")


# -- blocks


def cipher(
    rows: list[EpochRow] | None = None, uuid: bytes = UUID, keys: dict[int, bytearray] | None = None
) -> BlockCipher:
    rows = ROWS if rows is None else rows
    made = BlockCipher(keys or {1: bytearray(KEY)}, uuid, "x.sealed", rows)
    made.begin_epoch(rows[-1])
    return made


def sealed_by(made: BlockCipher, *blocks: int) -> tuple[bytearray, bytes]:
    out = bytearray(len(blocks) * PAGE + 16)
    slab = b"".join(bytes([block]) * PAGE for block in blocks)
    entries = made.seal_blocks(blocks, slab, range(len(blocks)), memoryview(out))
    return out, entries


def open_one(made: BlockCipher, block: int, sealed: bytes | bytearray, entry: bytes) -> bytes:
    return made.open_block(
        block, bytearray(sealed[:PAGE]) + bytearray(16), bytes(entry[:12]), bytes(entry[12:28])
    )


def test_a_sealed_block_is_what_the_document_says() -> None:
    out, entries = sealed_by(cipher(), 3, 9)
    key = hkdf(ROWS[1].salt, b"sealfs1 data\x01" + UUID + struct.pack("<I", 5))
    for i, block in enumerate((3, 9)):
        nonce = struct.pack("<IQ", 5, i)
        data = b"SEALBLK1" + UUID + struct.pack("<Q", block)
        expected = AESGCM(key).encrypt(nonce, bytes([block]) * PAGE, data)
        assert out[i * PAGE : (i + 1) * PAGE] == expected[:PAGE]
        assert entries[32 * i : 32 * i + 32] == nonce + expected[PAGE:] + struct.pack("<I", 1)


def test_runs_open_to_what_was_sealed() -> None:
    made = cipher()
    blocks = range(20, 27)
    out, entries = sealed_by(made, *blocks)
    plain = bytearray(out[: 7 * PAGE])
    made.open_blocks(20, memoryview(plain), entries)
    assert plain == b"".join(bytes([block]) * PAGE for block in blocks)
    for i, block in enumerate(blocks):
        found = open_one(made, block, out[i * PAGE :], entries[32 * i : 32 * i + 32])
        assert found == bytes([block]) * PAGE


Change = Callable[[bytearray, bytearray], object]
CHANGES: dict[str, Change] = {
    "ciphertext": lambda sealed, entry: sealed.__setitem__(100, sealed[100] ^ 1),
    "epoch": lambda sealed, entry: entry.__setitem__(0, 1),
    "counter": lambda sealed, entry: entry.__setitem__(4, entry[4] ^ 1),
    "tag": lambda sealed, entry: entry.__setitem__(12, entry[12] ^ 1),
    "end of the tag": lambda sealed, entry: entry.__setitem__(27, entry[27] ^ 128),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_altered_block_or_entry_does_not_open(name: str) -> None:
    made = cipher()
    out, entries = sealed_by(made, 7)
    sealed, entry = bytearray(out[:PAGE]), bytearray(entries)
    CHANGES[name](sealed, entry)
    with pytest.raises(BlockDamaged, match="block 7 does not authenticate") as caught:
        open_one(made, 7, bytes(sealed), bytes(entry))
    assert caught.value.block == 7
    with pytest.raises(BlockDamaged, match="block 7"):
        made.open_blocks(7, memoryview(sealed), bytes(entry))
    assert not any(sealed)


def test_a_block_does_not_open_elsewhere_or_in_another_image() -> None:
    made = cipher()
    out, entries = sealed_by(made, 7, 8)
    with pytest.raises(BlockDamaged):
        open_one(made, 8, out, entries[:32])
    with pytest.raises(BlockDamaged):
        open_one(made, 7, out[PAGE:], entries[32:])
    with pytest.raises(BlockDamaged):
        open_one(cipher(uuid=bytes(16)), 7, out, entries[:32])
    with pytest.raises(BlockDamaged):
        open_one(cipher(keys={1: bytearray(32)}), 7, out, entries[:32])
    assert open_one(cipher(), 7, out, entries[:32]) == b"\x07" * PAGE


def test_the_damaged_block_of_a_run_is_named() -> None:
    made = cipher()
    out, entries = sealed_by(made, 7, 8, 9)
    out[PAGE + 5] ^= 1
    with pytest.raises(BlockDamaged) as caught:
        made.open_blocks(7, memoryview(out)[: 3 * PAGE], entries)
    assert caught.value.block == 8


def test_an_entry_of_an_unknown_epoch_or_key_generation_is_refused() -> None:
    out, entries = sealed_by(cipher(), 7)
    with pytest.raises(BlockDamaged, match="unknown epoch 5"):
        open_one(cipher(ROWS[:1]), 7, out, entries)
    with pytest.raises(IntegrityError, match="needs key generation 2"):
        sealed_by(cipher([EpochRow(1, 2, bytes(32))]), 7)


def test_counters_are_burnt_even_when_sealing_fails() -> None:
    made = cipher()
    with pytest.raises(ValueError, match="sizes do not fit"):
        made.seal_blocks([1, 2, 3], bytes(PAGE), [0], memoryview(bytearray(3 * PAGE + 16)))
    _, entries = sealed_by(made, 4)
    assert struct.unpack("<IQ", entries[:12]) == (5, 3)


def test_no_nonce_comes_twice_under_one_key() -> None:
    seals: list[tuple[bytes, int, int, int]] = []
    made = BlockCipher(
        {1: bytearray(KEY)}, UUID, "x", ROWS, lambda *facts: seals.append(facts)
    )  # fmt: skip
    for row in ROWS:
        made.begin_epoch(row)
        sealed_by(made, 1, 2, 3)
        sealed_by(made, 1)
    assert [block for *_, block in seals] == [1, 2, 3, 1] * 2
    assert len({facts[:3] for facts in seals}) == len(seals)


def test_an_epoch_is_spent_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EPOCH_BLOCKS_MAX", 4)
    monkeypatch.setattr(module, "_ACCEPTED_MAX", 2)
    made = BlockCipher({1: bytearray(KEY)}, UUID, "x", ROWS)
    assert (made.is_spent, made.is_nearly_spent, made.epoch) == (True, True, 0)
    made.begin_epoch(ROWS[1])
    assert (made.is_spent, made.is_nearly_spent, made.epoch) == (False, False, 5)
    sealed_by(made, 1, 2)
    assert (made.is_spent, made.is_nearly_spent) == (False, True)
    sealed_by(made, 1, 2)
    assert made.is_spent


def test_a_forked_process_does_not_seal(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cipher()
    out, entries = sealed_by(made, 1)
    monkeypatch.setattr("sealfs.image.cipher.os.getpid", lambda: -1)
    with pytest.raises(IntegrityError, match="forked"):
        sealed_by(made, 1)
    assert open_one(made, 1, out, entries) == b"\x01" * PAGE


def test_forgetting_wipes_the_key() -> None:
    key = bytearray(KEY)
    made = cipher(keys={1: key})
    made.forget()
    assert key == bytes(32)
    with pytest.raises(IntegrityError):
        sealed_by(made, 1)


# -- the epoch table


def test_epochs_are_numbered_on_and_their_salts_are_fresh() -> None:
    salts = itertools.count()
    table = EpochTable([], 3, "x.sealed")
    for _ in range(3):
        table.draw(1, lambda size: bytes([next(salts)]) * size)
    assert [(row.epoch, row.salt[0]) for row in table.rows] == [(1, 0), (2, 1), (3, 2)]
    with pytest.raises(NoSpace, match="the epoch table is full"):
        table.draw(1, bytes)
    assert len(table.rows) == 3


def test_compacting_keeps_what_is_named_and_the_last_row() -> None:
    table = EpochTable([EpochRow(n, 1, bytes(32)) for n in (1, 4, 6, 9)], 4, "x.sealed")
    assert table.is_nearly_full
    table.compact({4})
    assert [row.epoch for row in table.rows] == [4, 9]
    assert not table.is_nearly_full
    assert table.draw(1, bytes).epoch == 10
    table.check_room(1)
    with pytest.raises(NoSpace):
        table.check_room(2)


def test_the_epochs_of_a_leaf_page_are_those_of_its_present_entries() -> None:
    page = struct.pack("<I28x", 3) + bytes(32) + struct.pack("<I24xI", 7, 1) + bytes(32)
    assert epochs_of(page) == {3, 7}
    assert epochs_of(bytes(PAGE)) == set()
