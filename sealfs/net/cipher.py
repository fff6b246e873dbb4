"""Seal and open single frames: GCM-AES-XPN-256 (IEEE 802.1AE-2018 14.8).

A `SendingKey` and a `ReceivingKey` are the two ends of one secure association. Keys are made by a
handshake, live in memory only and are never written down: with a restart, a kill or a restored
disk comes a new handshake and with it a new key.

Concurrency: each key belongs to one trio thread. A process forked from it cannot send.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand

from sealfs.net.frame import (
    ADDRESSES_SIZE,
    HEADER_SIZE,
    ICV_SIZE,
    PACKET_NUMBER_MASK,
    SECTAG,
    SHORT_LENGTH,
    TCI,
    Drop,
    secure_data_size,
)
from sealfs.net.labels import ASSOCIATION_INFO, MACSEC
from sealfs.net.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

KEY_SIZE: Final = 32
SALT_SIZE: Final = 12
NONCE_SIZE: Final = 12
PACKET_NUMBER_MAX: Final = (1 << 64) - 1
_AROUND: Final = HEADER_SIZE + ICV_SIZE


class KeySpent(Exception):
    """This sending key must not be used again: all numbers used, wiped, or in a forked process."""


def derive(secret: bytes | bytearray, info: bytes, size: int = KEY_SIZE) -> bytes:
    """Return a subkey by HKDF-SHA-256 without salt (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=info).derive(bytes(secret))


@dataclass(frozen=True, slots=True, repr=False)
class DirectionKey:
    """The key of one direction, with what its nonces are made of; for a cipher that is not here."""

    key: bytes
    salt: bytes
    ssci: int


def association_key(noise_key: bytes, info: bytes = ASSOCIATION_INFO) -> tuple[bytes, bytes]:
    """Return key and salt of one direction: for frames, or by WORD_INFO for words.

    What Noise's Split gives is used for nothing else, so Noise's own counters and 802.1AE's
    packet numbers never meet under one key. Words have keys of their own, so that those for frames
    can be given away, to the kernel.
    """
    raw = HKDFExpand(algorithm=SHA256(), length=KEY_SIZE + SALT_SIZE, info=info).derive(noise_key)
    return raw[:KEY_SIZE], raw[KEY_SIZE:]


_sending: weakref.WeakSet[SendingKey] = weakref.WeakSet()


def _forget_in_child() -> None:
    # Parent and child would count on from the same number under the same key.
    for key in list(_sending):
        key.wipe()


os.register_at_fork(after_in_child=_forget_in_child)


class SendingKey:
    """Seals the frames of one association, each under the next packet number."""

    __slots__ = (
        "__weakref__", "_aead", "_nonce_base", "_on_seal", "_sci", "_tci", "next_number",
    )  # fmt: skip

    def __init__(
        self,
        key: bytes,
        salt: bytes,
        *,
        sci: bytes,
        ssci: int,
        association_number: int,
        on_seal: Callable[[bytes], None] | None = None,
    ) -> None:
        """Take a fresh key.

        Args:
            key: KEY_SIZE octets, never used for sending before.
            salt: SALT_SIZE octets.
            sci: 8 octets, this end's.
            ssci: this end's short SCI (802.1AE-2018 14.8).
            association_number: 0 to 3.
            on_seal: called with each nonce before its use; tests prove uniqueness with it.
        """
        self._aead: AESGCM | None = AESGCM(key)
        self._nonce_base = int.from_bytes(salt, "big") ^ ssci << 64
        self._sci = int.from_bytes(sci, "big")
        self._tci = TCI | association_number
        self._on_seal = on_seal
        self.next_number = 1  # 802.1AE-2018 10.5.2: 0 is never used
        _sending.add(self)

    def seal_into(self, out: memoryview, at: int, plain: memoryview) -> int:
        """Seal a frame whose addresses are in `out` already; return the sealed frame's size.

        Args:
            out: from `at` on at least ADDRESSES_SIZE + len(plain) + OVERHEAD octets.
            at: where the addresses are.
            plain: EtherType and payload, at least one octet; not in `out`.

        Raises:
            KeySpent: nothing was sealed.
        """
        number, aead = self.next_number, self._aead
        if aead is None or number > PACKET_NUMBER_MAX:
            raise KeySpent
        # Unique: the key is fresh from a handshake, this object is its only user (a fork wipes
        # it in the child), and the number is burnt before it is used: whatever fails from here
        # on, no other frame gets it. Salt and SSCI are constant, so nonces differ as numbers do.
        self.next_number = number + 1
        size = len(plain)
        SECTAG.pack_into(
            out, at + ADDRESSES_SIZE, MACSEC, self._tci, size if size < SHORT_LENGTH else 0,
            number & PACKET_NUMBER_MASK, self._sci,
        )  # fmt: skip
        nonce = (self._nonce_base ^ number).to_bytes(NONCE_SIZE, "big")
        if self._on_seal is not None:
            self._on_seal(nonce)
        data = at + HEADER_SIZE
        aead.encrypt_into(nonce, plain, out[at:data], out[data : data + size + ICV_SIZE])
        return size + _AROUND

    @property
    def is_usable(self) -> bool:
        """Whether `seal_into` would seal."""
        return self._aead is not None and self.next_number <= PACKET_NUMBER_MAX

    def wipe(self) -> None:
        """Let go of the key; nothing is sealed any more."""
        self._aead = None


class ReceivingKey:
    """Opens the frames of one association, each once."""

    __slots__ = ("_aead", "_nonce_base", "window")

    def __init__(self, key: bytes, salt: bytes, *, ssci: int) -> None:
        """Take a key; `ssci` is the short SCI of who sends under it."""
        self._aead: AESGCM | None = AESGCM(key)
        self._nonce_base = int.from_bytes(salt, "big") ^ ssci << 64
        self.window = Window()

    def open_into(
        self, out: memoryview, sealed: memoryview, at: int, end: int, short_length: int, low: int
    ) -> int | Drop:
        """Open a frame; return the size of its secure data, or why it is dropped.

        What `out` holds after a drop is nothing.

        Args:
            out: gets EtherType and payload, from `at` on; as long as `sealed`.
            sealed: has the whole sealed frame, addresses included, from `at` to `end`.
            at: see there.
            end: see there.
            short_length: SL of its tag.
            low: PN of its tag.
        """
        size = end - at - _AROUND
        if short_length or size < SHORT_LENGTH:
            size = secure_data_size(end - at, short_length)
        if size <= 0 or self._aead is None:
            return Drop.MALFORMED
        window = self.window
        number = window.highest + 1
        if number & PACKET_NUMBER_MASK != low:  # it is not simply the next one
            number = window.complete(low)
            refusal = window.check(number)
            if refusal is not None:
                return refusal
        nonce = (self._nonce_base ^ number).to_bytes(NONCE_SIZE, "big")
        data = at + HEADER_SIZE
        try:
            self._aead.decrypt_into(
                nonce, sealed[data : data + size + ICV_SIZE], sealed[at:data], out[at : at + size]
            )
        except InvalidTag:
            return Drop.BAD_ICV
        window.mark(number)
        return size

    def wipe(self) -> None:
        """Let go of the key; nothing is opened any more."""
        self._aead = None
