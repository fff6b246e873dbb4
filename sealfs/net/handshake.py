"""The two messages by which two ends agree on fresh keys: their bytes and what they prove.

A message is the payload of an Ethernet frame with EtherType `labels.HANDSHAKE`:

    offset  size  field
    0       1     version, 1
    1       1     1 for the first message, 2 for the answer
    2       8     SCI of the end that speaks first
    10      n     Noise message (noise.py): public key 32, payload enciphered, tag 16
    10+n    16    BLAKE2s of all before, under a key derived from the network key

Payload of the first: which association numbers its sender still uses, as bits. Of the answer: the
association number of the new keys, and the SCI of its sender. The prologue binds network and
header; so all of both messages is authenticated, and a message of another network, or one that
was altered, proves nothing.

The last field costs a microsecond to check: noise from outside is thrown away for that.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sealfs.net import labels, noise
from sealfs.net.cipher import derive

if TYPE_CHECKING:
    from sealfs.net.grant import Grant

VERSION: Final = 1
FIRST: Final = 1
ANSWER: Final = 2
MAC_SIZE: Final = 16
SCI_SIZE: Final = 8
ASSOCIATION_COUNT: Final = 4  # AN has two bits (802.1AE-2018 9.5)

_HEADER: Final = struct.Struct(">BB8s")
_NOISE_SIZE: Final = noise.KEY_SIZE + noise.TAG_SIZE
FIRST_SIZE: Final = _HEADER.size + _NOISE_SIZE + 1 + MAC_SIZE
ANSWER_SIZE: Final = _HEADER.size + _NOISE_SIZE + 1 + SCI_SIZE + MAC_SIZE


class Refused(Exception):
    """A handshake message that is not taken; says why, in words for the log."""


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """What both ends of a network derive from its key, for handshakes only."""

    network: bytes
    psk: bytes
    mac_key: bytes

    @classmethod
    def of(cls, grant: Grant) -> Secrets:
        """Derive them; the grant can be wiped afterwards."""
        network = grant.network.encode()
        return cls(
            network,
            derive(grant.network_key, labels.PSK_INFO + network),
            derive(grant.network_key, labels.MAC_INFO + network),
        )

    def prologue(self, header: bytes) -> bytes:
        """Return what both ends must agree on before they begin (Noise 6)."""
        return labels.PROLOGUE + struct.pack(">H", len(self.network)) + self.network + header

    def mac(self, message: bytes) -> bytes:
        """Return the last field of a message, given what comes before it."""
        return hashlib.blake2s(message, key=self.mac_key, digest_size=MAC_SIZE).digest()


@dataclass(frozen=True, slots=True, repr=False)
class Agreement:
    """What a handshake gives one end."""

    peer_sci: bytes
    association_number: int
    is_initiator: bool
    sending: bytes
    """Noise's key for this end's frames; see `cipher.association_key`."""
    receiving: bytes


@dataclass(frozen=True, slots=True)
class First:
    """A first message whose last field is right; not yet proven to be fresh."""

    sci: bytes
    header: bytes
    noise: bytes

    @property
    def ephemeral(self) -> bytes:
        """The sender's public key: never the same in two messages that were not replayed."""
        return self.noise[: noise.KEY_SIZE]


def kind_of(body: bytes) -> int:
    """Return FIRST or ANSWER.

    Raises:
        Refused: it is neither, or of another version.
    """
    if len(body) < _HEADER.size:
        raise Refused(f"a message of {len(body)} bytes is too short")
    version, kind = body[0], body[1]
    if version != VERSION:
        raise Refused(f"the peer speaks version {version}, this sealfs {VERSION}")
    if (kind, len(body)) not in ((FIRST, FIRST_SIZE), (ANSWER, ANSWER_SIZE)):
        raise Refused(f"a message of kind {kind} and {len(body)} bytes is none")
    return kind


def _checked(secrets: Secrets, body: bytes) -> bytes:
    message, mac = body[:-MAC_SIZE], body[-MAC_SIZE:]
    if not hmac.compare_digest(secrets.mac(message), mac):
        raise Refused("it does not authenticate: the peer is on another network or has another key")
    return message


class Offer:
    """A handshake this end began; kept until it is answered or given up."""

    def __init__(
        self, secrets: Secrets, *, sci: bytes, ephemeral: bytes, in_use: frozenset[int]
    ) -> None:
        """Make the first message.

        Args:
            secrets: of the network.
            sci: this end's.
            ephemeral: 32 fresh random octets.
            in_use: association numbers this end still uses.
        """
        header = _HEADER.pack(VERSION, FIRST, sci)
        self._secrets, self._sci = secrets, sci
        self._noise = noise.Initiator(
            prologue=secrets.prologue(header), psk=secrets.psk, ephemeral=ephemeral
        )
        message = header + self._noise.start(bytes([sum(1 << number for number in in_use)]))
        self.body = message + secrets.mac(message)

    def finish(self, body: bytes) -> Agreement:
        """Return what was agreed, given the answer.

        Raises:
            Refused: not the answer to this offer; another may still come.
        """
        message = _checked(self._secrets, body)
        if _HEADER.unpack_from(message)[2] != self._sci:
            raise Refused("it answers somebody else")
        try:
            payload, (sending, receiving) = self._noise.finish(message[_HEADER.size :])
        except noise.NotAuthentic:
            raise Refused("it answers another offer than the last") from None
        number, peer_sci = payload[0], payload[1:]
        if number >= ASSOCIATION_COUNT or peer_sci == self._sci:
            raise Refused("what it agrees to makes no sense")
        return Agreement(peer_sci, number, True, sending, receiving)


def parse_first(secrets: Secrets, body: bytes) -> First:
    """Return a first message; cheap.

    Raises:
        Refused: it was not made by a holder of the network key.
    """
    message = _checked(secrets, body)
    header = message[: _HEADER.size]
    return First(header[2:], header, message[_HEADER.size :])


class Answer:
    """A handshake the other end began, from its first message to the answer."""

    def __init__(self, secrets: Secrets, first: First) -> None:
        """Check the first message.

        Raises:
            Refused: it does not authenticate.
        """
        self._secrets, self._first = secrets, first
        self._noise = noise.Responder(prologue=secrets.prologue(first.header), psk=secrets.psk)
        try:
            bits = self._noise.take(first.noise)[0]
        except noise.NotAuthentic:
            raise Refused("its content does not authenticate") from None
        self.in_use = frozenset(n for n in range(ASSOCIATION_COUNT) if bits >> n & 1)
        """Association numbers that the other end still uses."""

    def agree(
        self, *, sci: bytes, association_number: int, ephemeral: bytes
    ) -> tuple[bytes, Agreement]:
        """Return the answering message and what is agreed if it arrives.

        Args:
            sci: this end's.
            association_number: of the new keys.
            ephemeral: 32 fresh random octets.

        Raises:
            Refused: the first message's public key is of low order.
        """
        header = _HEADER.pack(VERSION, ANSWER, self._first.sci)
        try:
            sealed, (sending, receiving) = self._noise.answer(
                bytes([association_number]) + sci, ephemeral=ephemeral
            )
        except noise.NotAuthentic:
            raise Refused("its public key is none") from None
        message = header + sealed
        agreement = Agreement(self._first.sci, association_number, False, sending, receiving)
        return message + self._secrets.mac(message), agreement
