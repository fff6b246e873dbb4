"""The Noise pattern, against the vectors of another implementation, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.net.noise import Initiator, NotAuthentic, Responder

VECTOR = Path(__file__).parent / "vectors" / "noise_nnpsk0.txt"
PSK, PROLOGUE = bytes(range(32)), b"prologue"


def vector() -> dict[str, bytes]:
    lines = (line.split(": ", 1) for line in VECTOR.read_text().splitlines())
    return {name: bytes.fromhex(v) for name, v in lines if name not in ("comment", "expect")}


def run(
    initiator: Initiator, responder: Responder
) -> tuple[tuple[bytes, bytes], tuple[bytes, bytes]]:
    responder.take(initiator.start(b"first"))
    message, theirs = responder.answer(b"second", ephemeral=bytes([7]) * 32)
    payload, ours = initiator.finish(message)
    assert payload == b"second"
    return ours, theirs


def pair(prologue: bytes = PROLOGUE, psk: bytes = PSK) -> tuple[Initiator, Responder]:
    initiator = Initiator(prologue=PROLOGUE, psk=PSK, ephemeral=bytes([5]) * 32)
    return initiator, Responder(prologue=prologue, psk=psk)


def test_the_vector_of_another_implementation() -> None:
    v = vector()
    initiator = Initiator(prologue=v["prologue"], psk=v["psk"], ephemeral=v["initiator ephemeral"])
    responder = Responder(prologue=v["prologue"], psk=v["psk"])
    assert initiator.start(v["payload 1"]) == v["message 1"]
    assert responder.take(v["message 1"]) == v["payload 1"]
    message, theirs = responder.answer(v["payload 2"], ephemeral=v["responder ephemeral"])
    assert message == v["message 2"]
    payload, ours = initiator.finish(message)
    assert payload == v["payload 2"]
    assert ours == theirs[::-1]
    for number, key, count in ((3, 0, 0), (4, 1, 0), (5, 0, 1), (6, 1, 1)):
        nonce = bytes(4) + count.to_bytes(8, "big")  # Noise 12.4
        sealed = AESGCM(ours[key]).encrypt(nonce, v[f"payload {number}"], b"")
        assert sealed == v[f"message {number}"], number


def test_both_ends_agree_and_each_direction_has_its_own_key() -> None:
    ours, theirs = run(*pair())
    assert ours == theirs[::-1]
    assert ours[0] != ours[1]


@pytest.mark.parametrize("other", [{"psk": bytes(32)}, {"prologue": b"other"}])
def test_another_key_or_prologue_is_refused(other: dict[str, bytes]) -> None:
    initiator, responder = pair(**other)
    with pytest.raises(NotAuthentic):
        responder.take(initiator.start(b"first"))


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_authenticate_or_are_refused(data: bytes) -> None:
    initiator, responder = pair()
    with pytest.raises(NotAuthentic):
        responder.take(data)
    message = initiator.start(b"first")
    with pytest.raises(NotAuthentic):
        initiator.finish(data)
    assert responder.take(message) == b"first"  # nothing has changed


@settings(deadline=None)
@given(st.integers(0, 8 * (32 + 5 + 16) - 1))
def test_every_flipped_bit_is_refused_and_changes_nothing(bit: int) -> None:
    initiator, responder = pair()
    message = bytearray(initiator.start(b"first"))
    message[bit // 8] ^= 1 << bit % 8
    # The top bit of a public key is not used by X25519 (RFC 7748 5), but it is hashed.
    with pytest.raises(NotAuthentic):
        responder.take(bytes(message))
    message[bit // 8] ^= 1 << bit % 8
    responder.take(bytes(message))
    answer, _ = responder.answer(b"other", ephemeral=bytes([7]) * 32)
    altered = bytearray(answer)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NotAuthentic):
        initiator.finish(bytes(altered))
    assert initiator.finish(answer)[0] == b"other"


@pytest.mark.parametrize("point", [bytes(32), b"\1" + bytes(31)])
def test_a_public_key_of_low_order_is_refused(point: bytes) -> None:
    class Low(Initiator):
        """Sends a public key that makes the shared secret zero."""

        def start(self, payload: bytes) -> bytes:
            self._symmetric.mix_public(point)
            return point + self._symmetric.encrypt(payload)

    responder = Responder(prologue=PROLOGUE, psk=PSK)
    responder.take(Low(prologue=PROLOGUE, psk=PSK, ephemeral=bytes([5]) * 32).start(b"first"))
    with pytest.raises(NotAuthentic):
        responder.answer(b"second", ephemeral=bytes([7]) * 32)


def test_who_learns_the_psk_later_cannot_make_the_keys() -> None:
    """Forward secrecy: all that was on the wire and the psk, but neither ephemeral key."""
    initiator, responder = pair()
    first = initiator.start(b"first")
    responder.take(first)
    answer, keys = responder.answer(b"second", ephemeral=bytes([7]) * 32)
    eavesdropper = Responder(prologue=PROLOGUE, psk=PSK)
    eavesdropper.take(first)
    own, guessed = eavesdropper.answer(b"second", ephemeral=bytes([8]) * 32)
    assert own != answer
    assert set(keys).isdisjoint(guessed)
    # With the ephemeral key, which is forgotten, it would be all there is to it.
    eavesdropper = Responder(prologue=PROLOGUE, psk=PSK)
    eavesdropper.take(first)
    assert eavesdropper.answer(b"second", ephemeral=bytes([7]) * 32) == (answer, keys)
