"""The host record: what `init` set up here, in one file whose MAC key only this TPM gives.

Pure: no I/O, clock or randomness. Holds the pinned storage key, the sealed host object (host
secret: MAC key and NV authorisation), the NV counter's index and the recovery recipient. The
host record also says that a registry exists, so a removed registry is not an empty one.
"""

from __future__ import annotations

import dataclasses
import hmac
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, Self

from sealfs.errors import FormatError, KeyRecordDamaged
from sealfs.keys import labels, wire

HOST_VERSION: Final = 1
HOST_SIZE_MAX: Final = 16 * 1024
SPEC_SIZE_MAX: Final = 4096
PUBLIC_SIZE_MAX: Final = 512
"""An RSA-2048 storage key that another tool made has 316 bytes; ours has 92."""
PIN_SIZE_MAX: Final = 1024
NAME_SIZE: Final = 34
"""Name with SHA-256 as nameAlg: algorithm (2) and digest (32), TPM 2.0 Part 1 §16."""
SEALED_PUBLIC_SIZE_MAX: Final = 256
SEALED_PRIVATE_SIZE_MAX: Final = 512
UUID_SIZE: Final = 16
MAC_SIZE: Final = 32
RECIPIENT_SIZE: Final = 32
NV_INDEX_FIRST: Final = 0x01800000
NV_INDEX_LAST: Final = 0x01BFFFFF
"""TCG registry of reserved handles: NV indexes of the owner."""
SECRET_SIZE: Final = 32


class SealedObject(NamedTuple):
    """A KEYEDHASH object as TPM2_Create returned it; TPM2B structures, marshalled."""

    public: bytes
    private: bytes


class StorageKeyKind(IntEnum):
    """Where the storage key comes from at each use."""

    TRANSIENT = 1
    """TPM2_CreatePrimary from our template each time."""
    PERSISTENT = 2
    """Ours, at the persistent handle."""
    FOREIGN = 3
    """Found at the persistent handle with another template (systemd, tpm2-tools)."""


class RecoveryKind(IntEnum):
    """Who can open recovery slots made on this host."""

    NONE = 0
    HOST = 1
    ORGANISATION = 2


@dataclass(frozen=True, slots=True)
class StorageKeyPin:
    """The storage key as it was at init. `handle` is the serialised ESYS_TR.

    A use deserialises it instead of asking the TPM: what a ReadPublic says is not
    authenticated, and a salt encrypted to a public key from there may be an attacker's.
    """

    kind: StorageKeyKind
    name: bytes
    public: bytes
    handle: bytes

    def encode(self) -> bytes:
        return (
            wire.number(self.kind, 1)
            + wire.counted(self.name)
            + wire.counted(self.public)
            + wire.counted(self.handle)
        )

    @classmethod
    def read(cls, reader: wire.Reader) -> Self:
        kind = reader.number(1)
        if kind not in list(StorageKeyKind):
            raise FormatError(reader.subject, f"storage key of unknown kind {kind}")
        return cls(
            StorageKeyKind(kind),
            reader.counted(NAME_SIZE, NAME_SIZE),
            reader.counted(PUBLIC_SIZE_MAX, 1),
            reader.counted(PIN_SIZE_MAX),
        )


@dataclass(frozen=True, slots=True)
class HostRecord:
    """STATE/host.record. `mac` stands over everything before it."""

    host_id: bytes
    created: int
    tpm: str
    storage_key: StorageKeyPin
    sealed: SealedObject
    nv_index: int
    recovery: RecoveryKind
    recipient: bytes
    mac: bytes = bytes(MAC_SIZE)

    def _body(self) -> bytes:
        return b"".join(
            (
                labels.HOST_MAGIC,
                wire.number(HOST_VERSION, 2),
                self.host_id,
                wire.number(self.created, 8),
                wire.text(self.tpm),
                self.storage_key.encode(),
                wire.counted(self.sealed.public),
                wire.counted(self.sealed.private),
                wire.number(self.nv_index, 4),
                wire.number(self.recovery, 1),
                wire.counted(self.recipient),
            )
        )

    def encode(self) -> bytes:
        return self._body() + self.mac

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse a host record; its MAC is not checked yet.

        Raises:
            FormatError: not a host record, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.HOST_MAGIC, "host record")
        reader.version(HOST_VERSION, "the host record")
        host_id = reader.take(UUID_SIZE)
        created = reader.number(8)
        tpm = reader.text(SPEC_SIZE_MAX)
        storage_key = StorageKeyPin.read(reader)
        sealed = SealedObject(
            reader.counted(SEALED_PUBLIC_SIZE_MAX, 1), reader.counted(SEALED_PRIVATE_SIZE_MAX, 1)
        )
        nv_index = reader.number(4)
        if not NV_INDEX_FIRST <= nv_index <= NV_INDEX_LAST:
            reader.damaged(f"NV index {nv_index:#x} is not one of the owner's")
        recovery = reader.number(1)
        if recovery not in list(RecoveryKind):
            raise FormatError(subject, f"recovery recipient of unknown kind {recovery}")
        size = 0 if recovery == RecoveryKind.NONE else RECIPIENT_SIZE
        recipient = reader.counted(size, size)
        mac = reader.take(MAC_SIZE)
        reader.finish()
        return cls(
            host_id, created, tpm, storage_key, sealed, nv_index, RecoveryKind(recovery),
            recipient, mac,
        )  # fmt: skip

    def with_mac(self, mac_key: bytes) -> Self:
        """Return the record authenticated under the host's MAC subkey."""
        return dataclasses.replace(self, mac=hmac.digest(mac_key, self._body(), "sha256"))

    def verify(self, mac_key: bytes, subject: str) -> None:
        """Check the MAC.

        Raises:
            KeyRecordDamaged: the record was altered after init.
        """
        if not hmac.compare_digest(self.mac, hmac.digest(mac_key, self._body(), "sha256")):
            raise KeyRecordDamaged(
                subject, "the host record does not authenticate: it was edited, or mixed from two"
            )


def host_payload(host_id: bytes, secret: bytes | bytearray) -> bytearray:
    """Return what is sealed in the host object: magic, host id, MAC key, NV authorisation."""
    return bytearray(labels.HOST_PAYLOAD_MAGIC + host_id) + secret


def open_host_payload(payload: bytearray, host_id: bytes, subject: str) -> bytearray:
    """Return MAC key and NV authorisation (64 bytes), checked to belong to this host record.

    Raises:
        KeyRecordDamaged: the sealed object is another one.
    """
    head = labels.HOST_PAYLOAD_MAGIC + host_id
    if len(payload) != len(head) + 2 * SECRET_SIZE or not hmac.compare_digest(
        payload[: len(head)], head
    ):
        raise KeyRecordDamaged(subject, "its sealed object is not this host's")
    return payload[len(head) :]
