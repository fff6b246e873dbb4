"""What the key service tells about itself: plain data for people and `--json`, never keys."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sealfs.keys import recovery, signed
from sealfs.keys.hostrecord import (
    HostRecord,
    RecoveryKind,
    StorageKeyKind,
)
from sealfs.keys.records import KeyRecord, Origin, PolicyKind, TpmSlot
from sealfs.keys.tombstone import Tombstone, Why

STORAGE_KEY_WORDS: Final = {
    StorageKeyKind.TRANSIENT: "ECC P-256, made at each use",
    StorageKeyKind.PERSISTENT: "ECC P-256, persistent at 0x81000001",
    StorageKeyKind.FOREIGN: "made by another tool, persistent at 0x81000001",
}
RECOVERY_WORDS: Final = {
    RecoveryKind.NONE: "none",
    RecoveryKind.HOST: "host",
    RecoveryKind.ORGANISATION: "organisation",
}
ORIGIN_WORDS: Final = {origin: origin.name.lower() for origin in Origin}
POLICY_WORDS: Final = {
    PolicyKind.PCRS: "pcrs",
    PolicyKind.PIN: "pin",
    PolicyKind.SIGNED: "signed",
}


@dataclass(frozen=True, slots=True)
class InitReport:
    """What `init` made or found. `recovery_key` is the text to print once, or None."""

    created: bool
    state: str
    tpm: str
    host_id: str
    storage_key: str
    storage_key_name: str
    nv_index: str
    recovery: str
    recovery_fingerprint: str | None
    recovery_key: str | None = field(repr=False)
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        """Everything, the recovery key included: this is how it is printed once."""
        return {name: getattr(self, name) for name in self.__slots__}


def init_report(
    record: HostRecord,
    state: str,
    *,
    created: bool,
    recovery_key: str | None,
    warnings: tuple[str, ...],
) -> InitReport:
    """Describe a host record."""
    return InitReport(
        created=created,
        state=state,
        tpm=record.tpm,
        host_id=record.host_id.hex(),
        storage_key=STORAGE_KEY_WORDS[record.storage_key.kind],
        storage_key_name=record.storage_key.name.hex(),
        nv_index=f"{record.nv_index:#010x}",
        recovery=RECOVERY_WORDS[record.recovery],
        recovery_fingerprint=(
            recovery.fingerprint(record.recipient).hex() if record.recipient else None
        ),
        recovery_key=recovery_key,
        warnings=warnings,
    )


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """One way to a key, as its record says; nothing was tried."""

    kind: str
    policy: str
    pcrs: tuple[int, ...]
    is_of_this_tpm: bool
    recipient: str | None
    signer: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "policy": self.policy,
            "pcrs": list(self.pcrs),
            "is_of_this_tpm": self.is_of_this_tpm,
            "recipient": self.recipient,
            "signer": self.signer,
        }


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """One key record; `problem` says why it cannot be read, and then the rest is empty.

    `is_changing`: a `key rotate` was begun and has not ended. `gone`: moved or revoked; a revoked
    key has nothing else.
    """

    file: str
    kmi: str
    vm_id: str
    created: str
    origin: str
    slots: tuple[SlotInfo, ...]
    problem: str | None = None
    is_changing: bool = False
    gone: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "file": self.file,
            "kmi": self.kmi,
            "vm_id": self.vm_id,
            "created": self.created,
            "origin": self.origin,
            "slots": [slot.to_json() for slot in self.slots],
            "problem": self.problem,
            "is_changing": self.is_changing,
            "gone": self.gone,
        }


@dataclass(frozen=True, slots=True)
class SlotReport:
    """A trial of one slot. `opens` is None where it was not tried (recovery slots).

    `trouble` names what will hurt later or hurts now: a changed PCR, a lockout.
    """

    index: int
    kind: str
    opens: bool | None
    detail: str
    trouble: tuple[str, ...] = ()
    lockout: str | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "index": self.index,
            "kind": self.kind,
            "opens": self.opens,
            "detail": self.detail,
            "trouble": list(self.trouble),
            "lockout": self.lockout,
        }


def time_text(seconds: int) -> str:
    """Return UTC in ISO 8601; what no calendar can hold is returned as the number."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def policy_text(kind: PolicyKind) -> str:
    """Return a policy in a word: `none`, `pcrs`, `pcrs+pin` ..."""
    return "+".join(word for bit, word in POLICY_WORDS.items() if kind & bit) or "none"


def recipient_text(slot: bytes) -> str:
    """Return the fingerprint of whoever can open a recovery slot, by what the slot says."""
    return recovery.recipient_of(slot)[0]


def key_info(record: KeyRecord, file: str, storage_key_name: bytes) -> KeyInfo:
    """Describe a record."""
    return KeyInfo(
        file=file,
        kmi=record.kmi,
        vm_id=record.vm_id,
        created=time_text(record.created),
        origin=ORIGIN_WORDS[record.origin],
        slots=tuple(_tpm_slot_info(slot, storage_key_name) for slot in record.tpm_slots)
        + ((SlotInfo("software", "none", (), True, None),) if record.software_slot else ())
        + tuple(
            SlotInfo("recovery", "none", (), False, recipient_text(slot))
            for slot in record.recovery_slots
        ),
    )


def with_tombstones(infos: list[KeyInfo], stones: Mapping[str, Tombstone]) -> list[KeyInfo]:
    """Return the records as they are to be shown beside the tombstones of this host, by file."""
    texts = {stone.kmi: _gone_text(stone) for stone in stones.values()}
    shown = [replace(info, gone=texts.get(info.kmi)) for info in infos]
    there = {info.kmi for info in infos}
    return shown + [
        KeyInfo(file, stone.kmi, stone.vm_id, "", "", (), gone=texts[stone.kmi])
        for file, stone in stones.items()
        if stone.kmi not in there
    ]


def _gone_text(stone: Tombstone) -> str:
    when = time_text(stone.when)
    if stone.why is Why.MOVED:
        return f"moved to host {stone.to_host.hex()} at {when}"
    return f"revoked at {when}"


def _tpm_slot_info(slot: TpmSlot, storage_key_name: bytes) -> SlotInfo:
    return SlotInfo(
        kind="tpm",
        policy=policy_text(slot.policy),
        pcrs=slot.pcrs,
        is_of_this_tpm=slot.storage_key_name == storage_key_name,
        recipient=None,
        signer=signed.fingerprint(slot.signer) if slot.signer else None,
    )
