"""The software slot: a VM key protected by the key service, which the TPM protects.

For hosts where a sealed object for each VM is not wanted. The VM key is wrapped under a subkey of
the host secret, which the TPM unseals once for each process; so a copied state directory opens
nothing without the TPM, but no policy of the TPM stands between that process and one VM's key.

Pure: the subkey comes in as an argument.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealfs.errors import KeyRecordDamaged, KeyRefused
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import UUID_SIZE
from sealfs.keys.records import VM_KEY_SIZE, binding

SLOT_VERSION: Final = 1
SALT_SIZE: Final = 32
TAG_SIZE: Final = 16
NONCE: Final = bytes(12)
"""Unique: the key is derived with the slot's own 32 random bytes and seals this one message."""


def subkey_info(vm_id: str, kmi: str, salt: bytes) -> bytes:
    """Return the HKDF info of a slot's key, a subkey of the host secret."""
    return labels.SOFTWARE_SLOT_INFO + binding(vm_id, kmi) + salt


def salt_of(slot: bytes, vm_id: str, host_id: bytes) -> bytes:
    """Return the salt of a slot, for `subkey_info`.

    Raises:
        FormatError, KeyRecordDamaged: not a software slot.
        KeyRefused: another host's.
    """
    reader = wire.Reader(slot, vm_id)
    reader.magic(labels.SOFTWARE_SLOT_MAGIC, "software slot")
    reader.version(SLOT_VERSION, "the software slot")
    if reader.take(UUID_SIZE) != host_id:
        raise KeyRefused(vm_id, "its key is protected by another host's software slot")
    salt = reader.take(SALT_SIZE)
    reader.take(VM_KEY_SIZE + TAG_SIZE)
    reader.finish()
    return salt


def wrap(
    key: bytes | bytearray, subkey: bytes | bytearray, *, vm_id: str, kmi: str, host_id: bytes,
    salt: bytes,
) -> bytes:  # fmt: skip
    """Return a slot: header, AES-256-GCM of the VM key.

    Args:
        key: 64 bytes.
        subkey: of the host secret, by `subkey_info` with this salt.
        vm_id: whose key it is.
        kmi: under which it is found.
        host_id: the host's, 16 bytes.
        salt: 32 fresh random bytes.
    """
    header = _header(host_id, salt)
    return header + AESGCM(subkey).encrypt(NONCE, key, header + binding(vm_id, kmi))


def unwrap(slot: bytes, subkey: bytes | bytearray, *, vm_id: str, kmi: str) -> bytearray:
    """Return the VM key, 64 bytes, of a slot that `salt_of` has accepted; the caller wipes it.

    Raises:
        KeyRecordDamaged: altered, or another VM's.
    """
    header, sealed = slot[: -VM_KEY_SIZE - TAG_SIZE], slot[-VM_KEY_SIZE - TAG_SIZE :]
    key = bytearray(VM_KEY_SIZE)
    try:
        AESGCM(subkey).decrypt_into(NONCE, sealed, header + binding(vm_id, kmi), key)
    except InvalidTag:
        raise KeyRecordDamaged(
            vm_id, "its software slot does not authenticate: altered, or another VM's"
        ) from None
    return key


def _header(host_id: bytes, salt: bytes) -> bytes:
    return labels.SOFTWARE_SLOT_MAGIC + wire.number(SLOT_VERSION, 2) + host_id + salt
