"""The bytes of a sealed frame: security tag, sizes, and what makes a frame malformed.

A sealed frame is that of IEEE 802.1AE-2018 clause 9 with cipher suite GCM-AES-XPN-256:

    offset  size  field
    0       12    destination and source address, in clear
    12      2     EtherType 88-E5
    14      1     TCI and AN: version 0, SC, E and C set, ES and SCB clear; association number
    15      1     SL: octets of secure data if fewer than 48, else 0
    16      4     the low 32 bits of the packet number
    20      8     SCI
    28      n     secure data: the frame's EtherType and payload, enciphered
    28+n    16    ICV

Everything before the secure data is authenticated. One octet of secure data is no frame (an
EtherType has two): it is a word between the two ends, under keys of its own, see `Word`.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

ADDRESSES_SIZE: Final = 12
TAG_SIZE: Final = 16
"""SecTAG with SCI, EtherType counted in."""
ICV_SIZE: Final = 16
HEADER_SIZE: Final = ADDRESSES_SIZE + TAG_SIZE
OVERHEAD: Final = TAG_SIZE + ICV_SIZE
"""How much longer a sealed frame is."""

FRAME_SIZE_MIN: Final = 14
"""Addresses and EtherType: what a guest sends has at least these."""
SEALED_SIZE_MIN: Final = HEADER_SIZE + 1 + ICV_SIZE

SECTAG: Final = struct.Struct(">HBBIQ")
"""EtherType, TCI and AN, SL, PN, SCI; from ADDRESSES_SIZE on."""
TCI: Final = 0x2C
"""SC, E and C (802.1AE-2018 9.5); the low two bits are the association number."""
SHORT_LENGTH: Final = 48
"""802.1AE-2018 9.7: below it, SL tells the length, for media that pad."""

VLAN_TAG_SIZE: Final = 4
PACKET_NUMBER_MASK: Final = 0xFFFFFFFF


class Word(enum.IntEnum):
    """What the two ends say to each other under agreed keys; nothing of it reaches a guest."""

    CONFIRM = 1
    """I have these keys: say that you have them."""
    ALIVE = 2
    """I have these keys, and am here."""


class Drop(enum.Enum):
    """Why a frame was not passed on; the value is the name of its counter."""

    # From the network
    BAD_ICV = "bad_icv"
    REPLAYED = "replayed"
    LATE = "late"
    UNKNOWN_SENDER = "unknown_sender"
    PLAIN = "plain"
    MALFORMED = "malformed"
    HANDSHAKE = "handshake_refused"
    # To the VM
    PORT = "port_refused"
    # From the VM
    NO_KEY = "no_key"
    TOO_LONG = "too_long"
    TOO_SHORT = "too_short"
    LINK = "link_refused"
    # Both ways
    NOT_ALLOWED = "not_allowed"


def secure_data_size(sealed_size: int, short_length: int) -> int:
    """Return the octets of secure data of a sealed frame; 0 if it is malformed.

    What follows the ICV of a short frame is padding (802.1AE-2018 9.7, 10.6.1).
    """
    size = sealed_size - HEADER_SIZE - ICV_SIZE
    if short_length:
        return short_length if short_length < SHORT_LENGTH and short_length <= size else 0
    return size if size >= SHORT_LENGTH else 0


def guest_mtu(link_mtu: int, encapsulation: int) -> int:
    """Return the MTU for the guest's device.

    A VLAN tag of the guest's own still fits: 4 octets are kept for it.

    Args:
        link_mtu: of the way to the peer, in octets.
        encapsulation: octets between that and the sealed frame (IP and UDP headers; on raw
            Ethernet minus the sealed frame's own addresses and EtherType).
    """
    return link_mtu - encapsulation - OVERHEAD - FRAME_SIZE_MIN - VLAN_TAG_SIZE
