"""The one Noise pattern that sealfs speaks: Noise_NNpsk0_25519_AESGCM_SHA256 (revision 34).

    -> psk, e
    <- e, ee

Written here over `cryptography` instead of taken from a library: the only one for Python that has
this pattern was last released in 2020, and one pattern of two messages is less to trust and to
read than a framework for all of them. Tested with the vectors of other implementations.

Both ends hold the pre-shared key; each run adds two fresh X25519 keys, so that what is derived is
known to nobody later, also not to who learns the pre-shared key (forward secrecy, Noise 7.7).
Neither end is told which holder of the key the other is.

A message that does not authenticate changes nothing: the same end can take another one.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

PROTOCOL_NAME: Final = b"Noise_NNpsk0_25519_AESGCM_SHA256"  # 32 octets: is h itself (Noise 5.2)
KEY_SIZE: Final = 32
TAG_SIZE: Final = 16


class NotAuthentic(Exception):
    """The message was not made with this pre-shared key, prologue and run; or was altered."""


class _Symmetric:
    """SymmetricState and its CipherState (Noise 5.1, 5.2)."""

    __slots__ = ("_chaining_key", "_hash", "_key", "_nonce")

    def __init__(self, prologue: bytes, psk: bytes) -> None:
        self._chaining_key = PROTOCOL_NAME
        self._hash = PROTOCOL_NAME
        self._key = b""
        self._nonce = 0
        self.mix_hash(prologue)
        # The token "psk" is the first of the pattern.
        self._chaining_key, temporary, self._key = self._hkdf(psk, 3)
        self.mix_hash(temporary)

    def copy(self) -> _Symmetric:
        twin = object.__new__(_Symmetric)
        for name in self.__slots__:
            setattr(twin, name, getattr(self, name))
        return twin

    def mix_hash(self, data: bytes) -> None:
        self._hash = hashlib.sha256(self._hash + data).digest()

    def mix_key(self, material: bytes) -> None:
        self._chaining_key, self._key = self._hkdf(material, 2)
        self._nonce = 0

    def mix_public(self, public: bytes) -> None:
        """Mix in a token "e": with a psk its key is mixed, too (Noise 9.2)."""
        self.mix_hash(public)
        self.mix_key(public)

    def encrypt(self, plain: bytes) -> bytes:
        sealed = AESGCM(self._key).encrypt(self._next_nonce(), plain, self._hash)
        self.mix_hash(sealed)
        return sealed

    def decrypt(self, sealed: bytes) -> bytes:
        try:
            plain = AESGCM(self._key).decrypt(self._next_nonce(), sealed, self._hash)
        except InvalidTag:
            raise NotAuthentic from None
        self.mix_hash(sealed)
        return plain

    def split(self) -> tuple[bytes, bytes]:
        """Return the keys of both directions, the initiator's first (Noise 5.2, Split)."""
        first, second = self._hkdf(b"", 2)
        return first, second

    def _next_nonce(self) -> bytes:
        # Unique: mix_key sets a fresh key with each message, and a message is encrypted once; the
        # counter is 0 for each of the pattern's two payloads (Noise 12.4).
        nonce = bytes(4) + self._nonce.to_bytes(8, "big")
        self._nonce += 1
        return nonce

    def _hkdf(self, material: bytes, count: int) -> list[bytes]:
        """HKDF of Noise 4.3: RFC 5869 with the chaining key as salt and no info."""
        secret = hmac.digest(self._chaining_key, material, "sha256")
        outputs, last = [], b""
        for number in range(1, count + 1):
            last = hmac.digest(secret, last + bytes([number]), "sha256")
            outputs.append(last)
        return outputs


class Initiator:
    """The end that speaks first. `start`, then `finish` with the answer."""

    def __init__(self, *, prologue: bytes, psk: bytes, ephemeral: bytes) -> None:
        self._symmetric = _Symmetric(prologue, psk)
        self._private = X25519PrivateKey.from_private_bytes(ephemeral)

    def start(self, payload: bytes) -> bytes:
        """Return the first message: KEY_SIZE + len(payload) + TAG_SIZE octets."""
        public = self._private.public_key().public_bytes_raw()
        self._symmetric.mix_public(public)
        return public + self._symmetric.encrypt(payload)

    def finish(self, message: bytes) -> tuple[bytes, tuple[bytes, bytes]]:
        """Return the answer's payload, and the keys for sending and for receiving.

        Raises:
            NotAuthentic: not the answer to this `start`; another may still come.
        """
        symmetric = self._symmetric.copy()
        public = message[:KEY_SIZE]
        symmetric.mix_public(public)
        symmetric.mix_key(_exchange(self._private, public))
        payload = symmetric.decrypt(message[KEY_SIZE:])
        return payload, symmetric.split()


class Responder:
    """The end that answers: `take` the first message, then `answer`."""

    def __init__(self, *, prologue: bytes, psk: bytes) -> None:
        self._symmetric = _Symmetric(prologue, psk)
        self._peer = b""

    def take(self, message: bytes) -> bytes:
        """Return the first message's payload. Costs no X25519 operation.

        Raises:
            NotAuthentic: not made with this key and prologue.
        """
        symmetric = self._symmetric.copy()
        public = message[:KEY_SIZE]
        symmetric.mix_public(public)
        payload = symmetric.decrypt(message[KEY_SIZE:])
        self._symmetric, self._peer = symmetric, public
        return payload

    def answer(self, payload: bytes, *, ephemeral: bytes) -> tuple[bytes, tuple[bytes, bytes]]:
        """Return the second message, and the keys for sending and for receiving.

        Raises:
            NotAuthentic: the first message's public key is of low order.
        """
        private = X25519PrivateKey.from_private_bytes(ephemeral)
        public = private.public_key().public_bytes_raw()
        self._symmetric.mix_public(public)
        self._symmetric.mix_key(_exchange(private, self._peer))
        message = public + self._symmetric.encrypt(payload)
        theirs, ours = self._symmetric.split()
        return message, (ours, theirs)


def _exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # too short, or of low order: the shared secret would be zero (RFC 7748 6.1)
        raise NotAuthentic from None
