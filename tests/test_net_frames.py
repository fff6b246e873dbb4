"""Single frames: against the standard's vectors, against every alteration, and their numbers."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.net.cipher import KeySpent, ReceivingKey, SendingKey
from sealfs.net.frame import (
    ADDRESSES_SIZE,
    OVERHEAD,
    SECTAG,
    Drop,
    guest_mtu,
    secure_data_size,
)
from sealfs.net.window import WINDOW, Window

KEY, SALT, SCI = bytes(range(32)), bytes(range(50, 62)), bytes(range(70, 78))
VECTORS = Path(__file__).parent / "vectors" / "macsec_xpn_256.txt"


class Pair:
    """Two ends of one association."""

    def __init__(self, *, key: bytes = KEY, salt: bytes = SALT, ssci: int = 1) -> None:
        self.nonces: list[bytes] = []
        self.sending = SendingKey(
            KEY, SALT, sci=SCI, ssci=1, association_number=2, on_seal=self.nonces.append
        )
        self.receiving = ReceivingKey(key, salt, ssci=ssci)

    def seal(self, frame: bytes) -> bytes:
        out = memoryview(bytearray(len(frame) + OVERHEAD))
        out[:ADDRESSES_SIZE] = frame[:ADDRESSES_SIZE]
        size = self.sending.seal_into(out, 0, memoryview(frame)[ADDRESSES_SIZE:])
        assert size == len(out)
        return bytes(out)

    def open(self, sealed: bytes) -> bytes | Drop:
        return opened_by(self.receiving, sealed)


def opened_by(key: ReceivingKey, sealed: bytes) -> bytes | Drop:
    _, _, short_length, low, _ = SECTAG.unpack_from(sealed, ADDRESSES_SIZE)
    out = memoryview(bytearray(len(sealed)))
    found = key.open_into(out, memoryview(sealed), 0, len(sealed), short_length, low)
    return found if isinstance(found, Drop) else sealed[:ADDRESSES_SIZE] + bytes(out[:found])


def vector(name: str) -> dict[str, bytes]:
    lines = (line.split(": ", 1) for line in VECTORS.read_text().splitlines())
    return {
        key.removeprefix(f"{name} "): bytes.fromhex(value)
        for key, value in lines
        if key.startswith(name)
    }


@pytest.mark.parametrize("name", ["60", "61"])
def test_the_examples_of_the_standard(name: str) -> None:
    v = vector(name)
    frame, sealed = v["frame"], v["sealed"]
    ssci, number = (int.from_bytes(v[field], "big") for field in ("ssci", "packet number"))
    sending = SendingKey(
        v["key"], v["salt"], sci=sealed[20:28], ssci=ssci, association_number=sealed[14] & 3
    )
    sending.next_number = number
    out = memoryview(bytearray(len(sealed)))
    out[:ADDRESSES_SIZE] = frame[:ADDRESSES_SIZE]
    assert sending.seal_into(out, 0, memoryview(frame)[ADDRESSES_SIZE:]) == len(sealed)
    assert bytes(out) == sealed
    receiving = ReceivingKey(v["key"], v["salt"], ssci=ssci)
    receiving.window.mark(number - 1)  # so that the upper 32 bits are found
    assert opened_by(receiving, sealed) == frame


@settings(deadline=None)
@given(st.binary(min_size=14, max_size=3000))
def test_what_is_sealed_opens_once(frame: bytes) -> None:
    pair = Pair()
    sealed = pair.seal(frame)
    assert len(sealed) == len(frame) + OVERHEAD
    assert sealed[:12] == frame[:12]
    assert pair.open(sealed) == frame
    assert pair.open(sealed) == Drop.REPLAYED


@pytest.mark.parametrize("size", [14, 30, 59, 60, 1514])
def test_padding_of_a_medium_is_no_part_of_a_short_frame(size: int) -> None:
    """Frames with fewer than 48 octets of secure data say so; only those may be padded."""
    pair = Pair()
    frame = os.urandom(size)
    sealed = pair.seal(frame)
    if size - ADDRESSES_SIZE < 48:
        assert pair.open(sealed + bytes(20)) == frame
    else:
        assert pair.open(sealed + bytes(20)) == Drop.BAD_ICV


@pytest.mark.parametrize("size", [30, 100])
def test_every_flipped_bit_is_refused(size: int) -> None:
    pair = Pair()
    sealed = pair.seal(os.urandom(size))
    for bit in range(8 * len(sealed)):
        altered = bytearray(sealed)
        altered[bit // 8] ^= 1 << bit % 8
        assert isinstance(pair.open(bytes(altered)), Drop), bit
    assert isinstance(pair.open(sealed), bytes)


@pytest.mark.parametrize("size", [30, 100])
def test_every_truncation_is_refused(size: int) -> None:
    pair = Pair()
    sealed = pair.seal(os.urandom(size))
    for length in range(28, len(sealed)):
        assert pair.open(sealed[:length]) in (Drop.BAD_ICV, Drop.MALFORMED), length


@pytest.mark.parametrize("other", [{"key": bytes(32)}, {"salt": bytes(12)}, {"ssci": 2}])
def test_other_keys_open_nothing(other: dict[str, bytes | int]) -> None:
    pair = Pair(**other)  # type: ignore[arg-type]
    assert pair.open(pair.seal(os.urandom(100))) == Drop.BAD_ICV


@settings(deadline=None)
@given(st.binary(min_size=28, max_size=200))
def test_any_bytes_are_refused_or_authentic(data: bytes) -> None:
    assert isinstance(Pair().open(data), Drop)


def test_a_forged_frame_moves_no_window() -> None:
    pair = Pair()
    sealed = [pair.seal(os.urandom(60)) for _ in range(3)]
    far = bytearray(sealed[0])
    far[16:20] = b"\x7f\xff\xff\xff"
    assert pair.open(bytes(far)) == Drop.BAD_ICV
    assert all(isinstance(pair.open(frame), bytes) for frame in sealed)


def test_numbers_are_burnt_before_they_are_used() -> None:
    pair = Pair()
    with pytest.raises((ValueError, BufferError, TypeError)):
        pair.sending.seal_into(memoryview(bytearray(40)), 0, memoryview(bytes(100)))
    assert pair.sending.next_number == 2
    pair.seal(bytes(60))
    assert len(set(pair.nonces)) == 2


def test_the_last_number_is_used_once() -> None:
    pair = Pair()
    pair.sending.next_number = (1 << 64) - 1
    pair.seal(bytes(60))
    with pytest.raises(KeySpent):
        pair.seal(bytes(60))
    assert not pair.sending.is_usable


def test_a_wiped_key_seals_and_opens_nothing() -> None:
    pair = Pair()
    sealed = pair.seal(bytes(60))
    pair.sending.wipe()
    pair.receiving.wipe()
    with pytest.raises(KeySpent):
        pair.seal(bytes(60))
    assert pair.open(sealed) == Drop.MALFORMED


def test_a_forked_process_cannot_send() -> None:
    pair = Pair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            pair.seal(bytes(60))
        except KeySpent:
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    pair.seal(bytes(60))  # the parent still can


# The window, against a set of numbers


class Oracle:
    """What a window is to do, with all numbers ever taken."""

    def __init__(self) -> None:
        self.taken: set[int] = set()

    def take(self, number: int) -> Drop | None:
        highest = max(self.taken, default=0)
        if number <= max(0, highest - WINDOW):
            return Drop.LATE
        if number in self.taken:
            return Drop.REPLAYED
        self.taken.add(number)
        return None


@given(
    start=st.sampled_from([1, 60, 2000, (1 << 32) - 3000, (1 << 40) - 7]),
    steps=st.lists(
        st.one_of(
            st.integers(-70, 70),
            st.integers(-WINDOW - 5, -WINDOW + 5),
            st.integers(-5000, 5000),
            st.integers(4000, 200_000),
        ),
        max_size=80,
    ),
)
@settings(max_examples=400, deadline=None)
def test_the_window_does_what_a_set_of_numbers_would(start: int, steps: list[int]) -> None:
    window, oracle = Window(), Oracle()
    highest = start
    numbers = [start]
    for step in steps:
        number = max(1, highest + step)
        highest = max(highest, number)
        numbers.append(number)
    for number in numbers:
        verdict = window.check(number)
        assert verdict == oracle.take(number), number
        if verdict is None:
            window.mark(number)


def test_numbers_that_come_in_blocks_backwards_are_each_taken_once() -> None:
    window = Window()
    for block in range(0, 20_000, 100):
        for number in range(block + 100, block, -1):
            assert window.check(number) is None, number
            window.mark(number)
            assert window.check(number) == Drop.REPLAYED


@given(highest=st.integers(0, 1 << 48), ahead=st.integers(-WINDOW, 1 << 30))
@settings(max_examples=1000, deadline=None)
def test_the_upper_half_of_a_number_is_found(highest: int, ahead: int) -> None:
    """Of every number in the window, and of those up to 2^30 frames ahead."""
    window = Window()
    if highest:
        window.mark(highest)
    number = max(window.lowest, highest + ahead)
    assert window.complete(number & 0xFFFFFFFF) == number


def test_frames_out_of_order_are_each_delivered_once_within_the_window() -> None:
    pair, rng = Pair(), random.Random(1)
    frames = [os.urandom(60) for _ in range(2000)]
    sealed = [pair.seal(frame) for frame in frames]
    order = list(range(2000))
    rng.shuffle(order)
    assert [pair.open(sealed[index]) for index in order] == [frames[index] for index in order]
    assert {pair.open(frame) for frame in sealed} == {Drop.REPLAYED}


def test_a_frame_beyond_the_window_is_late() -> None:
    pair = Pair()
    sealed = [pair.seal(bytes(60)) for _ in range(WINDOW + 1)]
    assert isinstance(pair.open(sealed[-1]), bytes)
    assert pair.open(sealed[0]) == Drop.LATE
    assert isinstance(pair.open(sealed[1]), bytes)


# Sizes


@pytest.mark.parametrize(
    ("sealed", "short", "size"),
    [
        (44, 0, 0), (45, 0, 0), (45, 1, 1), (45, 2, 0), (91, 0, 0), (92, 0, 48), (91, 47, 47),
        (92, 48, 0), (92, 47, 47), (1500, 0, 1456), (1500, 46, 46), (0, 0, 0), (20, 5, 0),
    ],
)  # fmt: skip
def test_the_size_of_secure_data(sealed: int, short: int, size: int) -> None:
    assert secure_data_size(sealed, short) == size


def test_the_guests_mtu_leaves_room_for_all_headers_and_a_vlan_tag() -> None:
    mtu = guest_mtu(1500, 28)
    assert mtu == 1422
    assert 28 + OVERHEAD + 14 + 4 + mtu == 1500
