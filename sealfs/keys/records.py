"""Key records: one file for each KMI, holding the ways in which its VM key can be had.

Pure: no I/O, clock or randomness. A record is not secret. Three things keep it in its place: the
digest of VM id and KMI sealed with the key in the TPM (`vm_payload`), the same digest in every
derivation from the key (`binding`), and the MAC under a subkey of the VM key, checked after
unsealing. The file's name is a hash of the KMI that stands inside, compared by the reader.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, Self

from sealfs.errors import FormatError, KeyRecordDamaged
from sealfs.keys import labels, policy, wire
from sealfs.keys.hostrecord import (
    MAC_SIZE,
    NAME_SIZE,
    SEALED_PRIVATE_SIZE_MAX,
    SEALED_PUBLIC_SIZE_MAX,
    SealedObject,
)

RECORD_VERSION: Final = 2
RECORD_VERSION_OLDEST: Final = 1
"""Version 1 knew the policies NONE and PCRS only, and ends without a software slot."""
RECORD_SIZE_MAX: Final = 16 * 1024
"""Four TPM slots with 24 PCR values each and eight recovery slots take about 8 KiB."""
TPM_SLOT_COUNT_MAX: Final = 4
RECOVERY_SLOT_COUNT_MAX: Final = 8
RECOVERY_SLOT_SIZE_MAX: Final = 512
SOFTWARE_SLOT_SIZE_MAX: Final = 512
VM_KEY_SIZE: Final = 64
BINDING_SIZE: Final = 32
PCR_VALUE_SIZE: Final = 32
DEVICE_MAX: Final = 255
"""Network devices of a VM, from 0; QEMU's PCI machines take some thirty."""
SIGNER_SIZE_MAX: Final = 512
"""The public area of an RSA-2048 signer takes 278 bytes, of a P-256 one 86."""
POLICY_REF_SIZE_MAX: Final = 64


class Origin(IntEnum):
    """Where a VM key came from."""

    MIXED = 1
    """HKDF over the TPM's and the kernel's random bytes, on this host."""
    RECOVERED = 2
    """Taken out of a recovery slot; first made elsewhere or earlier."""
    CONSOLE = 3
    """Handed in by the console."""
    SERVICE = 4
    """The kernel's random bytes, on this host."""
    TPM = 5
    """The TPM's random bytes."""
    IMPORTED = 6
    """Came from another host, wrapped to this one's TPM."""


class PolicyKind(IntFlag):
    """What the TPM asks before it unseals; all that are set must hold."""

    NONE = 0
    PCRS = 1
    PIN = 2
    SIGNED = 4
    """PCR values that the owner of an offline key signed (TPM2_PolicyAuthorize)."""


POLICY_BITS: Final = {1: int(PolicyKind.PCRS), 2: sum(PolicyKind)}
"""Those that a record of each version may have."""


@dataclass(frozen=True, slots=True)
class TpmSlot:
    """A VM key sealed by one TPM.

    `pcr_values` are those it was sealed to, beside `pcrs` in order: the TPM enforces the policy
    digest in `sealed.public`; the values only tell a person which PCR changed. `signer`
    (TPMT_PUBLIC) and `policy_ref` are what a signed policy must be signed by and for; empty
    without SIGNED.
    """

    policy: PolicyKind
    pcrs: tuple[int, ...]
    pcr_values: tuple[bytes, ...]
    storage_key_name: bytes
    sealed: SealedObject
    signer: bytes = b""
    policy_ref: bytes = b""

    def encode(self) -> bytes:
        bitmap = sum(1 << pcr for pcr in self.pcrs)
        return b"".join(
            (
                wire.number(self.policy, 1),
                wire.number(bitmap, 3),
                *self.pcr_values,
                *map(wire.counted, (self.signer, self.policy_ref) if self.signer else ()),
                wire.counted(self.storage_key_name),
                wire.counted(self.sealed.public),
                wire.counted(self.sealed.private),
            )
        )

    @classmethod
    def read(cls, reader: wire.Reader, version: int) -> Self:
        kind = reader.number(1)
        if kind & ~POLICY_BITS[version]:
            raise FormatError(reader.subject, f"slot with unknown policy {kind}")
        bitmap = reader.number(3)
        if bool(kind & PolicyKind.PCRS) != (bitmap != 0):
            reader.damaged("its policy and its PCR list do not fit")
        pcrs = tuple(pcr for pcr in range(policy.PCR_COUNT) if bitmap >> pcr & 1)
        values = tuple(reader.take(PCR_VALUE_SIZE) for _ in pcrs)
        signer = policy_ref = b""
        if kind & PolicyKind.SIGNED:
            signer = reader.counted(SIGNER_SIZE_MAX, 1)
            policy_ref = reader.counted(POLICY_REF_SIZE_MAX)
        return cls(
            PolicyKind(kind),
            pcrs,
            values,
            reader.counted(NAME_SIZE, NAME_SIZE),
            SealedObject(
                reader.counted(SEALED_PUBLIC_SIZE_MAX, 1),
                reader.counted(SEALED_PRIVATE_SIZE_MAX, 1),
            ),
            signer,
            policy_ref,
        )


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """STATE/keys/HASH.slot. `created` is in seconds since 1970, UTC; TPM slots oldest first.

    `software_slot` is empty where there is none. `version` is that of the bytes it was read from:
    its MAC stands over them.
    """

    kmi: str
    vm_id: str
    created: int
    origin: Origin
    tpm_slots: tuple[TpmSlot, ...]
    recovery_slots: tuple[bytes, ...]
    mac: bytes = bytes(MAC_SIZE)
    software_slot: bytes = b""
    version: int = RECORD_VERSION

    def _body(self) -> bytes:
        assert self.version > 1 or not self.software_slot
        return b"".join(
            (
                labels.RECORD_MAGIC,
                wire.number(self.version, 2),
                wire.text(self.kmi),
                wire.text(self.vm_id),
                wire.number(self.created, 8),
                wire.number(self.origin, 1),
                wire.number(len(self.tpm_slots), 1),
                *(slot.encode() for slot in self.tpm_slots),
                wire.number(len(self.recovery_slots), 1),
                *(wire.counted(slot) for slot in self.recovery_slots),
                wire.counted(self.software_slot) if self.version > 1 else b"",
            )
        )

    def encode(self) -> bytes:
        raw = self._body() + self.mac
        assert len(raw) <= RECORD_SIZE_MAX
        return raw

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse a record; nothing in it is authenticated yet.

        Raises:
            FormatError: not a key record, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        if len(raw) > RECORD_SIZE_MAX:
            raise KeyRecordDamaged(subject, f"has more than {RECORD_SIZE_MAX} bytes")
        reader = wire.Reader(raw, subject)
        reader.magic(labels.RECORD_MAGIC, "key record")
        version = reader.version(RECORD_VERSION, "the key record", oldest=RECORD_VERSION_OLDEST)
        kmi, vm_id = reader.identifier(), reader.identifier()
        created = reader.number(8)
        origin = reader.number(1)
        if origin not in list(Origin):
            raise FormatError(subject, f"key of unknown origin {origin}")
        tpm_slot_count = reader.number(1)
        if tpm_slot_count > TPM_SLOT_COUNT_MAX:
            reader.damaged(f"has {tpm_slot_count} TPM slots, at most {TPM_SLOT_COUNT_MAX}")
        tpm_slots = tuple(TpmSlot.read(reader, version) for _ in range(tpm_slot_count))
        recovery_count = reader.number(1)
        if recovery_count > RECOVERY_SLOT_COUNT_MAX:
            reader.damaged(
                f"has {recovery_count} recovery slots, at most {RECOVERY_SLOT_COUNT_MAX}"
            )
        recovery = tuple(reader.counted(RECOVERY_SLOT_SIZE_MAX, 1) for _ in range(recovery_count))
        software = reader.counted(SOFTWARE_SLOT_SIZE_MAX) if version > 1 else b""
        mac = reader.take(MAC_SIZE)
        reader.finish()
        return cls(kmi, vm_id, created, Origin(origin), tpm_slots, recovery, mac, software, version)

    def with_mac(self, mac_key: bytes | bytearray) -> Self:
        """Return the record authenticated under the VM key's MAC subkey."""
        return dataclasses.replace(self, mac=hmac.digest(mac_key, self._body(), "sha256"))

    def is_authentic(self, mac_key: bytes | bytearray) -> bool:
        """Whether the MAC fits."""
        return hmac.compare_digest(self.mac, hmac.digest(mac_key, self._body(), "sha256"))


def opening_order(slots: Sequence[TpmSlot]) -> list[TpmSlot]:
    """Return slots in the order to try them: newest first, those that take a PIN last."""
    newest_first = slots[::-1]
    return sorted(newest_first, key=lambda slot: bool(slot.policy & PolicyKind.PIN))


def binding(vm_id: str, kmi: str) -> bytes:
    """Return the digest that ties a key to its VM id and KMI."""
    return hashlib.sha256(labels.BINDING_DIGEST + wire.text(vm_id) + wire.text(kmi)).digest()


def vm_lock_name(vm_id: str) -> bytes:
    """Return what is locked, as if it were an image (16 bytes), while a VM's key is at stake.

    Shared: an image under that key is being made. Exclusive: the key is being changed.
    """
    return hashlib.sha256(labels.VM_LOCK_NAME + wire.text(vm_id)).digest()[:16]


def device_lock_name(vm_id: str, device: int) -> bytes:
    """Return what is locked, as if it were an image, while a VM's network device is attached."""
    body = labels.DEVICE_LOCK_NAME + wire.text(vm_id) + wire.number(device, 2)
    return hashlib.sha256(body).digest()[:16]


def vm_payload(vm_id: str, kmi: str, key: bytes | bytearray) -> bytearray:
    """Return what is sealed in the TPM: magic, binding digest, VM key (104 of 128 bytes)."""
    assert len(key) == VM_KEY_SIZE
    return bytearray(labels.VM_PAYLOAD_MAGIC + binding(vm_id, kmi)) + key


def open_vm_payload(payload: bytearray, vm_id: str, kmi: str) -> bytearray:
    """Return the VM key of an unsealed payload.

    Raises:
        KeyRecordDamaged: the sealed object is another VM's, put into this record.
    """
    head = labels.VM_PAYLOAD_MAGIC + binding(vm_id, kmi)
    if len(payload) != len(head) + VM_KEY_SIZE or not hmac.compare_digest(
        payload[: len(head)], head
    ):
        raise KeyRecordDamaged(
            vm_id, "the sealed key in its record was made for another VM: records were swapped"
        )
    return payload[len(head) :]
