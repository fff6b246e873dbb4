"""Every derivation label and number of the wire, in one table.

Each label is used for one purpose only; that is what separates the keys derived from one secret.
"""

from __future__ import annotations

from typing import Final

# HKDF (RFC 5869) info; the network's identifier follows
PSK_INFO: Final = b"sealfs/v1/net handshake psk\x00"
MAC_INFO: Final = b"sealfs/v1/net handshake mac\x00"
ASSOCIATION_INFO: Final = b"sealfs/v1/net association\x00"
WORD_INFO: Final = b"sealfs/v1/net words\x00"

# Begins the handshake's prologue (Noise 6)
PROLOGUE: Final = b"sealfs/v1/net prologue\x00"

# EtherTypes
MACSEC: Final = 0x88E5
"""IEEE 802.1AE-2018 9.8, table 9-1."""
HANDSHAKE: Final = 0x88B5
"""IEEE 802 local experimental EtherType 1 (IEEE 802-2014 9.2.3): never forwarded to a guest."""
CONTROL_ADDRESS: Final = bytes.fromhex("0180c2000003")
"""Where handshakes go on UDP, whose addresses mean nothing: the port access entity's group
address, which no bridge forwards (IEEE 802.1X-2020 11.1.1)."""
