"""Every magic number and derivation label of the key room, in one table.

Each label is used for one purpose only; that is what separates the keys derived from one secret.
"""

from __future__ import annotations

from typing import Final

# Files of the state directory
HOST_MAGIC: Final = b"SEALFS\x00H"
REGISTRY_MAGIC: Final = b"SEALFS\x00R"
LEDGER_MAGIC: Final = b"SEALFS\x00L"
NETWORKS_MAGIC: Final = b"SEALFS\x00N"
RECORD_MAGIC: Final = b"SEALFS\x00K"
HOST_ID_MAGIC: Final = b"SEALFS\x00I"
PACKAGE_MAGIC: Final = b"SEALFS\x00E"
TOMBSTONE_MAGIC: Final = b"SEALFS\x00G"
RECOVERY_SLOT_MAGIC: Final = b"SEALFS\x00W"
SIGNED_POLICY_MAGIC: Final = b"SEALFS\x00P"
SOFTWARE_SLOT_MAGIC: Final = b"SEALFS\x00S"

# Payloads sealed in the TPM
VM_PAYLOAD_MAGIC: Final = b"SFVMKEY\x01"
HOST_PAYLOAD_MAGIC: Final = b"SFHOST\x00\x01"

# Digests
BINDING_DIGEST: Final = b"sealfs/v1/vm binding\x00"
VM_LOCK_NAME: Final = b"sealfs/v1/vm lock\x00"
DEVICE_LOCK_NAME: Final = b"sealfs/v1/network device lock\x00"
RECORD_NAME: Final = b"sealfs/v1/record name\x00"
HOST_FINGERPRINT: Final = b"sealfs/v1/host fingerprint\x00"
RECOVERY_FINGERPRINT: Final = b"sealfs/v1/recovery fingerprint\x00"
RECOVERY_CHECKSUM: Final = b"sealfs/v1/recovery checksum\x00"
REVOCATION_COUNTER: Final = b"sealfs/v1/revocation counter\x00"

# What a signed policy is signed for (TPM 2.0 Part 1, policyRef)
SIGNED_POLICY_REF: Final = b"sealfs/v1/signed PCR policy\x00"

# HKDF (RFC 5869) and HPKE (RFC 9180) info
RANDOM_INFO: Final = b"sealfs/v1/mixed random\x00"
RECORD_MAC_INFO: Final = b"sealfs/v1/record mac\x00"
PACKAGE_MAC_INFO: Final = b"sealfs/v1/package mac\x00"
IMAGE_WRAP_INFO: Final = b"sealfs/v1/image key wrap\x00"
NETWORK_KEY_INFO: Final = b"sealfs/v1/network key\x00"
SCI_INFO: Final = b"sealfs/v1/network sci\x00"
PERMISSION_MAC_INFO: Final = b"sealfs/v1/network permission\x00"
SOFTWARE_SLOT_INFO: Final = b"sealfs/v1/software slot\x00"
RECOVERY_INFO: Final = b"sealfs/v1/recovery slot\x00"
PIN_INFO: Final = b"sealfs/v1/PIN\x00"
HOST_MAC_INFO: Final = b"sealfs/v1/host record mac\x00"
REGISTRY_MAC_INFO: Final = b"sealfs/v1/registry mac\x00"
NETWORKS_MAC_INFO: Final = b"sealfs/v1/networks mac\x00"
LEDGER_MAC_INFO: Final = b"sealfs/v1/ledger mac\x00"
AUDIT_MAC_INFO: Final = b"sealfs/v1/audit mac\x00"
