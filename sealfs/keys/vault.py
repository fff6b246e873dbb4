"""Key records on this host: found, read, opened with the TPM, and made.

The glue between the state directory (files), the records (bytes) and the TPM (keys). Decides
nothing about who may ask; `service` does. Every method that takes a `Tpm` runs in the caller's
use of it; `protect` needs the state lock as well.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import os
import time
from typing import TYPE_CHECKING

from sealfs.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    TpmUnavailable,
)
from sealfs.keys import policy, records, recovery, reports, software, wire
from sealfs.keys.host import Host
from sealfs.keys.hostrecord import RecoveryKind
from sealfs.keys.records import KeyRecord, Origin, PolicyKind, TpmSlot
from sealfs.keys.statedir import GONE_SUFFIX, HeldLock
from sealfs.keys.tombstone import TOMBSTONE_SIZE_MAX, Tombstone
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

_log = logging.getLogger(__name__)


class Vault:
    """The key records of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._state = host.state

    # Finding and reading

    def tombstone(self, kmi: str) -> Tombstone | None:
        """Return why a KMI has no key here any more, None where it was not taken away."""
        raw = self._state.read(self._state.gone_file(kmi), TOMBSTONE_SIZE_MAX)
        return None if raw is None else Tombstone.decode(raw, kmi)

    def check_not_gone(self, vm_id: str) -> None:
        """Refuse a VM whose key was moved or revoked, whatever its KMI.

        Raises:
            KeyGone: it was.
        """
        for stone in self.tombstones().values():
            if stone.vm_id == vm_id:
                raise stone.error(reports.time_text(stone.when))

    def tombstones(self) -> dict[str, Tombstone]:
        """Return the keys that were moved or revoked, by file."""
        found = {}
        for file in self._state.record_names(GONE_SUFFIX):
            raw = self._state.read(file, TOMBSTONE_SIZE_MAX)
            if raw is None:
                continue
            try:
                found[file] = Tombstone.decode(raw, file)
            except (FormatError, KeyRecordDamaged) as error:
                # Its own VM is refused by `tombstone`; the others are not concerned.
                _log.warning("skipping a key record: %s", error)
        return found

    def record_of_vm(self, vm_id: str) -> KeyRecord | None:
        """Find a VM's record: under its own name, else among the opaque ones."""
        record = self.read(self._state.record_file(vm_id), kmi=vm_id)
        if record is not None:
            if record.vm_id != vm_id:
                raise AlreadyExists(vm_id, f"is the KMI of VM {record.vm_id!r}")
            return record
        for file in self._state.record_names():
            try:
                record = self.read(file)
            except (FormatError, KeyServiceError) as error:
                _log.warning("skipping a key record: %s", error)
                continue
            if record is not None and record.vm_id == vm_id:
                return record
        return None

    def changeable(self, vm_id: str) -> KeyRecord:
        """Return the record of a VM whose key is not just changing.

        Raises:
            KeyNotFound: there is none.
            KeyGone: it was moved or revoked.
            Busy: the key is being rotated.
        """
        self.check_not_gone(vm_id)
        record = self.record_of_vm(vm_id)
        if record is None:
            raise KeyNotFound(vm_id, "this host has no key for it")
        if self._state.has(self._state.pending_file(record.kmi)):
            raise Busy(vm_id, "its key is being rotated: finish that by `key rotate` first")
        return record

    def kmi_to_revoke(self, vm_id: str) -> str:
        """Return the KMI of a VM's key, also of one that cannot be read or was revoked.

        Raises:
            KeyNotFound: the VM never had a key here.
        """
        for stone in self.tombstones().values():
            if stone.vm_id == vm_id:
                return stone.kmi
        try:
            record = self.record_of_vm(vm_id)
        except (FormatError, KeyRecordDamaged):
            return vm_id  # its own record, found by that name
        if record is None:
            raise KeyNotFound(vm_id, "this host has no key for it")
        return record.kmi

    def read_known(self, kmi: str) -> KeyRecord:
        """Return the record of a KMI.

        Raises:
            KeyNotFound: there is none.
            KeyGone: it was moved or revoked.
            KeyRecordDamaged, FormatError: it cannot be read, or is another VM's.
        """
        wire.check_identifier(kmi, "KMI")
        stone = self.tombstone(kmi)
        if stone is not None:
            raise stone.error(reports.time_text(stone.when))
        record = self.read(self._state.record_file(kmi), kmi=kmi)
        if record is None:
            raise KeyNotFound(kmi, "this host has no key for it")
        return record

    def read(self, file: str, *, kmi: str | None = None) -> KeyRecord | None:
        """Read a record and check that it stands under its own name."""
        subject = str(self._state.path / file) if kmi is None else kmi
        raw = self._state.read(file, records.RECORD_SIZE_MAX)
        if raw is None:
            return None
        record = KeyRecord.decode(raw, subject)
        if file not in (self._state.record_file(record.kmi), self._state.pending_file(record.kmi)):
            raise KeyRecordDamaged(
                subject, "the record in its file is another VM's: files were renamed or swapped"
            )
        return record

    def read_pending(self, kmi: str) -> KeyRecord | None:
        """Return the record of the key that a KMI's images are being rewrapped to, if any."""
        return self.read(self._state.pending_file(kmi), kmi=kmi)

    # Opening and making

    def protect(
        self,
        key: VmKey,
        origin: Origin,
        pcrs: tuple[int, ...],
        tpm: Tpm,
        held: HeldLock,
        *,
        is_pending: bool = False,
        is_software: bool = False,
    ) -> None:
        """Seal a key, prove that it opens, write its record; durable on return.

        `is_pending`: beside the record that stands, as the one to come. `is_software`: in a
        software slot, which has no policy.
        """
        tpm_slots = () if is_software else (self._tpm_slot(key, pcrs, tpm),)
        software_slot = self._software_slot(key) if is_software else b""
        record = KeyRecord(
            key.kmi, key.vm_id, int(time.time()), origin, tpm_slots, key.recovery_slots,
            software_slot=software_slot,
        )  # fmt: skip
        with key.record_mac_key() as mac_key:
            record = record.with_mac(mac_key)
        with (
            self.open_record(record, tpm) as proof,
            key.secret() as ours,
            proof.secret() as theirs,
        ):
            if not hmac.compare_digest(ours, theirs):
                raise TpmUnavailable(key.vm_id, "the TPM gave back another key than was sealed")
        # Crash here: no record, and nothing is sealed under this key yet.
        file = self._state.pending_file if is_pending else self._state.record_file
        self._state.write(file(key.kmi), record.encode(), held)

    def _tpm_slot(self, key: VmKey, pcrs: tuple[int, ...], tpm: Tpm) -> TpmSlot:
        values = tpm.pcr_values(pcrs) if pcrs else ()
        digest = policy.pcr_policy(pcrs, values) if pcrs else b""
        with key.secret() as secret:
            payload = records.vm_payload(key.vm_id, key.kmi, secret)
        try:
            sealed = tpm.seal(payload, policy_digest=digest)
        finally:
            wipe(payload)
        return TpmSlot(
            PolicyKind.PCRS if pcrs else PolicyKind.NONE,
            pcrs,
            values,
            self._host.record.storage_key.name,
            sealed,
        )

    def _software_slot(self, key: VmKey) -> bytes:
        salt = os.urandom(software.SALT_SIZE)
        info = software.subkey_info(key.vm_id, key.kmi, salt)
        with self._host.subkey_in_use(info) as subkey, key.secret() as secret:
            return software.wrap(
                secret, subkey, vm_id=key.vm_id, kmi=key.kmi,
                host_id=self._host.record.host_id, salt=salt,
            )  # fmt: skip

    def keep_slots(
        self, record: KeyRecord, key: VmKey, slots: tuple[bytes, ...], held: HeldLock
    ) -> None:
        """Give an authentic record these recovery slots; durable on return.

        Raises:
            KeyServiceError: they are more than a record holds.
        """
        if len(slots) > records.RECOVERY_SLOT_COUNT_MAX:
            raise KeyServiceError(
                record.vm_id, f"has {records.RECOVERY_SLOT_COUNT_MAX} recovery keys, the most"
            )
        key.recovery_slots = slots
        if slots == record.recovery_slots:
            return
        with key.record_mac_key() as mac_key:
            after = dataclasses.replace(record, recovery_slots=slots).with_mac(mac_key)
        # Crash here: the record as it was.
        self._state.write(self._state.record_file(record.kmi), after.encode(), held)

    def add_own_recipient(self, key: VmKey) -> None:
        """Wrap the key to this host's recovery recipient, unless a slot of it is there."""
        host = self._host.record
        if host.recovery is RecoveryKind.NONE:
            return
        own = recovery.fingerprint(host.recipient).hex()
        if own in map(reports.recipient_text, key.recovery_slots):
            return
        if len(key.recovery_slots) >= records.RECOVERY_SLOT_COUNT_MAX:
            _log.warning("%r has no room for this host's recovery slot", key.vm_id)
            return
        with key.secret() as secret:
            slot = recovery.wrap(secret, host.recipient, vm_id=key.vm_id, kmi=key.kmi)
        key.recovery_slots = (*key.recovery_slots, slot)

    def open_record(self, record: KeyRecord, tpm: Tpm) -> VmKey:
        """Return the key from the first slot that opens; raise the first slot's error."""
        first: KeyServiceError | None = None
        for slot in record.tpm_slots:
            try:
                return self.open_slot(record, slot, tpm)
            except TpmUnavailable:
                raise
            except KeyServiceError as error:
                first = first or error
        if record.software_slot:
            return self.open_software(record)
        raise first or KeyRefused(record.vm_id, "its record has no slot for a TPM")

    def open_slot(self, record: KeyRecord, slot: TpmSlot, tpm: Tpm) -> VmKey:
        """Return the key of one slot: unsealed, bound to this VM, the record authentic under it.

        Raises:
            KeyRefused: another TPM sealed it, or its policy refuses.
            KeyRecordDamaged: swapped, edited or damaged.
        """
        if slot.storage_key_name != self._host.record.storage_key.name:
            raise KeyRefused(
                record.vm_id,
                "its key was sealed by another TPM than this host's; the recovery key opens it",
            )
        payload = tpm.unseal(slot.sealed, pcrs=slot.pcrs, subject=record.vm_id)
        try:
            raw_key = records.open_vm_payload(payload, record.vm_id, record.kmi)
        finally:
            wipe(payload)
        return self._authentic(raw_key, record)

    def open_software(self, record: KeyRecord) -> VmKey:
        """Return the key of the software slot, as `open_slot`; within a use of the TPM."""
        salt = software.salt_of(record.software_slot, record.vm_id, self._host.record.host_id)
        info = software.subkey_info(record.vm_id, record.kmi, salt)
        with self._host.subkey_in_use(info) as subkey:
            raw_key = software.unwrap(
                record.software_slot, subkey, vm_id=record.vm_id, kmi=record.kmi
            )
        return self._authentic(raw_key, record)

    def _authentic(self, raw_key: bytearray, record: KeyRecord) -> VmKey:
        """Return the key of a record that authenticates under it."""
        key = VmKey(
            raw_key, vm_id=record.vm_id, kmi=record.kmi, recovery_slots=record.recovery_slots
        )
        with key.record_mac_key() as mac_key:
            if record.is_authentic(mac_key):
                return key
        key.wipe()
        raise KeyRecordDamaged(record.vm_id, "its key record does not authenticate: it was edited")
