"""The C module and its twin in Python give the same bytes, and refuse the same."""

from __future__ import annotations

import hmac
import os
import threading
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.image import blockseal, cipher
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE

_blockseal = pytest.importorskip("sealfs.image._blockseal", reason="tools/setup builds it")
BOTH = pytest.mark.parametrize("module", [_blockseal, blockseal], ids=["C", "Python"])

PREFIX = b"sealfs block" + bytes(range(16))
KEYS = {epoch: bytearray(bytes([epoch % 251]) * 32) for epoch in (1, 2, 7, 2**32 - 1)}


def sealed(module: Any, epochs: list[int], first: int, counter: int = 0) -> tuple[bytes, bytes]:
    """Return (ciphertext, entries) of blocks in a row, each under its own epoch."""
    out = memoryview(bytearray((len(epochs)) * BLOCK_SIZE + 16))
    entries = b""
    for i, epoch in enumerate(epochs):
        frame = frame_of(first + i)
        entries += module.seal_run(
            KEYS[epoch], PREFIX, epoch, counter + i, [first + i], frame, [0], out[i * BLOCK_SIZE :]
        )
    return bytes(out[: len(epochs) * BLOCK_SIZE]), entries


def frame_of(block: int) -> bytes:
    return (block.to_bytes(8, "little") * (BLOCK_SIZE // 8))[:BLOCK_SIZE]


def test_this_checkout_uses_the_c_module() -> None:
    assert cipher.runs is _blockseal


@given(
    epochs=st.lists(st.sampled_from(sorted(KEYS)), min_size=0, max_size=9),
    first=st.integers(0, 2**52),
    counter=st.integers(0, 2**63),
    flips=st.lists(st.tuples(st.booleans(), st.integers(0, 2**20)), max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_both_give_the_same_bytes_and_the_same_verdict(
    epochs: list[int], first: int, counter: int, flips: list[tuple[bool, int]]
) -> None:
    ciphertext, entries = sealed(_blockseal, epochs, first, counter)
    assert sealed(blockseal, epochs, first, counter) == (ciphertext, entries)
    run, named = bytearray(ciphertext), bytearray(entries)
    for in_entries, at in flips:
        target = named if in_entries else run
        if target:
            target[at // 8 % len(target)] ^= 1 << at % 8
    answers = []
    for module in (_blockseal, blockseal):
        here = bytearray(run)
        try:
            answer = module.open_run(KEYS, PREFIX, first, bytes(named), memoryview(here))
        except KeyError as missing:
            answer = missing.args[0]
        answers.append((answer, bytes(here)))
    assert answers[0] == answers[1]


@BOTH
def test_a_run_is_opened_in_place_under_several_epochs(module: Any) -> None:
    ciphertext, entries = sealed(module, [1, 1, 2, 7, 7, 2**32 - 1, 1], 40)
    run = bytearray(ciphertext)
    assert module.open_run(KEYS, PREFIX, 40, entries, memoryview(run)) == -1
    assert run == b"".join(frame_of(40 + i) for i in range(7))


@BOTH
def test_a_block_is_sealed_as_the_format_says(module: Any) -> None:
    ciphertext, entry = sealed(module, [7], 123, counter=99)
    nonce = (7).to_bytes(4, "little") + (99).to_bytes(8, "little")
    expected = AESGCM(bytes(KEYS[7])).encrypt(
        nonce, frame_of(123), PREFIX + (123).to_bytes(8, "little")
    )
    assert ciphertext + entry[12:28] == expected
    assert entry[:12] + entry[28:] == nonce + (1).to_bytes(4, "little")


@BOTH
def test_one_wrong_block_leaves_nothing_that_could_be_taken_for_plaintext(module: Any) -> None:
    ciphertext, entries = sealed(module, [1] * 5, 0)
    for bad in range(5):
        for where in (bad * BLOCK_SIZE, bad * BLOCK_SIZE + BLOCK_SIZE - 1):
            run = bytearray(ciphertext)
            run[where] ^= 0x80
            assert module.open_run(KEYS, PREFIX, 0, entries, memoryview(run)) == bad
            assert not any(run)
    run = bytearray(ciphertext)
    assert module.open_run(KEYS, PREFIX, 1, entries, memoryview(run)) == 0  # moved by one
    assert not any(run)
    run = bytearray(ciphertext)
    assert module.open_run(KEYS, b"another image", 0, entries, memoryview(run)) == 0


@BOTH
def test_an_epoch_without_a_key_is_named_and_nothing_is_touched(module: Any) -> None:
    ciphertext, entries = sealed(module, [1, 7], 0)
    run = bytearray(ciphertext)
    with pytest.raises(KeyError) as missing:
        module.open_run({1: KEYS[1]}, PREFIX, 0, entries, memoryview(run))
    assert missing.value.args == (7,)
    assert run == ciphertext


@given(
    key=st.binary(min_size=32, max_size=32), prefix=st.binary(max_size=56),
    pages=st.lists(st.binary(max_size=300) | st.just(bytes(BLOCK_SIZE)), max_size=9),
    first=st.integers(0, 2**63), size=st.integers(1, 32),
)  # fmt: skip
@settings(deadline=None)
def test_both_make_the_same_macs(
    key: bytes, prefix: bytes, pages: list[bytes], first: int, size: int
) -> None:
    indexes = range(first, first + len(pages))
    macs = _blockseal.mac_run(key, prefix, indexes, list(map(bytearray, pages)), size)
    assert macs == blockseal.mac_run(key, prefix, indexes, pages, size)
    assert macs == b"".join(
        hmac.digest(key, prefix + index.to_bytes(8, "little") + page, "sha256")[:size]
        for index, page in zip(indexes, pages, strict=True)
    )


def test_macs_of_many_leaf_pages_are_those_of_each() -> None:
    macs = cipher.TreeMacs(os.urandom(32), os.urandom(16))
    groups = [3, 0, 2**40, 7, 8, 9]
    pages = [bytearray(os.urandom(BLOCK_SIZE)) for _ in groups]
    each = [macs.leaf(group, page) for group, page in zip(groups, pages, strict=True)]
    assert macs.leaves(groups, pages) == b"".join(each)
    assert macs.leaves([], []) == b""
    macs.begin(os.urandom(32))
    assert macs.leaves(groups[:1], pages[:1]) == macs.leaf(groups[0], pages[0]) != each[0]


def test_sizes_that_do_not_fit_are_our_bug_and_never_a_stray_write() -> None:
    ciphertext, entries = sealed(_blockseal, [1, 1], 0)
    run = bytearray(ciphertext)
    frame, out, key = bytes(BLOCK_SIZE), memoryview(bytearray(BLOCK_SIZE + 16)), KEYS[1]
    for wrong in (
        lambda: _blockseal.open_run(KEYS, PREFIX, 0, entries[:-1], memoryview(run)),
        lambda: _blockseal.open_run(KEYS, PREFIX, 0, entries, memoryview(run)[:-1]),
        lambda: _blockseal.open_run(KEYS, bytes(57), 0, entries, memoryview(run)),
        lambda: _blockseal.open_run({1: b"short"}, PREFIX, 0, entries, memoryview(run)),
        lambda: _blockseal.seal_run(key[:31], PREFIX, 1, 0, [0], frame, [0], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0], frame[:-1], [0], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0], frame, [1], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0], frame, [-1], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0, 1], frame, [0], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0, 1], frame, [0, 0], out),
        lambda: _blockseal.seal_run(key, PREFIX, 2**32, 0, [0], frame, [0], out),
        lambda: _blockseal.mac_run(key[:31], PREFIX, [0], [frame], 24),
        lambda: _blockseal.mac_run(key, bytes(57), [0], [frame], 24),
        lambda: _blockseal.mac_run(key, PREFIX, [0, 1], [frame], 24),
        lambda: _blockseal.mac_run(key, PREFIX, [0], [frame], 0),
        lambda: _blockseal.mac_run(key, PREFIX, [0], [frame], 33),
        lambda: blockseal.mac_run(key, PREFIX, [0, 1], [frame], 24),
        lambda: blockseal.mac_run(key, PREFIX, [0], [frame], 33),
    ):
        with pytest.raises(ValueError, match="size"):
            wrong()
    for wrong in (
        lambda: _blockseal.open_run(KEYS, PREFIX, 0, entries, ciphertext),  # not writable
        lambda: _blockseal.open_run([], PREFIX, 0, entries, memoryview(run)),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, ["0"], frame, [0], out),
        lambda: _blockseal.seal_run(key, PREFIX, 1, 0, [0], frame, [None], out),
        lambda: _blockseal.mac_run(key, PREFIX, [0, 1], [frame, None], 24),
        lambda: _blockseal.mac_run(key, PREFIX, [None], [frame], 24),
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(OverflowError):
        _blockseal.seal_run(key, PREFIX, 1, 0, [-1], frame, [0], out)
    with pytest.raises(OverflowError):
        _blockseal.mac_run(key, PREFIX, [-1], [frame], 24)
    assert run == ciphertext


def test_other_threads_run_while_a_run_is_opened() -> None:
    count = 4096
    ciphertext, entries = sealed(_blockseal, [1] * count, 0)
    ticks, is_done = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not is_done.is_set():
            ticks += 1
            time.sleep(0)

    thread = threading.Thread(target=tick)
    run = memoryview(bytearray(ciphertext))
    thread.start()
    try:
        for _ in range(20):
            before = ticks
            run[:] = ciphertext
            _blockseal.open_run(KEYS, PREFIX, 0, entries, run)
            if ticks > before + 2:
                break
        else:
            pytest.fail("nothing else ran")
    finally:
        is_done.set()
        thread.join()


def test_forgetting_wipes_the_keys_of_the_epochs() -> None:
    from sealfs.image.format import EpochRow

    rows = [EpochRow(1, 1, os.urandom(32))]
    one = cipher.BlockCipher({1: bytearray(os.urandom(32))}, bytes(16), "x", rows)
    one.begin_epoch(rows[0])
    one.seal_blocks([0], bytes(BLOCK_SIZE), [0], memoryview(bytearray(BLOCK_SIZE + 16)))
    (key,) = one._keys.values()
    assert any(key)
    one.forget()
    assert not any(key)
    assert len(one._keys) == 0
    assert ENTRY_SIZE == 32
