"""Key records on this host: found, read, opened with the TPM, and made.

The glue between the state directory (files), the records (bytes) and the TPM (keys). Decides
nothing about who may ask; `service` does. Every method that takes a `Tpm` runs in the caller's
use of it; `protect` needs the state lock as well.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sealfs.errors import (
    AlreadyExists,
    FormatError,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    LockedOut,
    PinNeeded,
    TpmUnavailable,
    WrongPin,
)
from sealfs.keys import labels, policy, records, recovery, reports, wire
from sealfs.keys.access import EMBEDDED
from sealfs.keys.host import Host
from sealfs.keys.hostrecord import RecoveryKind
from sealfs.keys.pin import authorisation
from sealfs.keys.policies import Policies
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord, Origin, PolicyKind, TpmSlot
from sealfs.keys.signed import SignedPolicy
from sealfs.keys.statedir import HeldLock
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

_log = logging.getLogger(__name__)


class Vault:
    """The key records of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._state = host.state
        self.policies = Policies(host)

    # Finding and reading

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

    def read_known(self, kmi: str) -> KeyRecord:
        """Return the record of a KMI.

        Raises:
            KeyNotFound: there is none.
            KeyRecordDamaged, FormatError: it cannot be read, or is another VM's.
        """
        wire.check_identifier(kmi, "KMI")
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
        if self._state.record_file(record.kmi) != file:
            raise KeyRecordDamaged(
                subject, "the record in its file is another VM's: files were renamed or swapped"
            )
        return record

    # Opening and making

    def protect(
        self, key: VmKey, origin: Origin, wanted: Protection, tpm: Tpm, held: HeldLock
    ) -> None:
        """Seal a key, prove that it opens, write its record; durable on return."""
        slot = self.make_slot(key, wanted, tpm)
        record = KeyRecord(
            key.kmi, key.vm_id, int(time.time()), origin, (slot,), key.recovery_slots
        )
        record = self.proved(record, key, wanted, tpm)
        # Crash here: no record, and nothing is sealed under this key yet.
        self._state.write(self._state.record_file(key.kmi), record.encode(), held)

    def make_slot(self, key: VmKey, wanted: Protection, tpm: Tpm) -> TpmSlot:
        """Seal a key as it is wanted; nothing is proved or written."""
        values = tpm.pcr_values(wanted.pcrs) if wanted.pcrs else ()
        ref = labels.SIGNED_POLICY_REF if wanted.signer else b""
        digest = policy.slot_policy(
            signer_name=policy.name_of(wanted.signer) if wanted.signer else b"",
            policy_ref=ref,
            pcrs=wanted.pcrs,
            values=values,
            pin=wanted.pin is not None,
        )
        if wanted.pin is not None and self._host.access.spec == EMBEDDED:
            tpm.stop_counting()
        with (
            key.secret() as secret,
            _authorisation(wanted.pin, key.vm_id, key.kmi) as auth,
        ):
            payload = records.vm_payload(key.vm_id, key.kmi, secret)
            try:
                sealed = tpm.seal(payload, policy_digest=digest, pin=auth)
            finally:
                wipe(payload)
        name = self._host.record.storage_key.name
        return TpmSlot(wanted.policy, wanted.pcrs, values, name, sealed, wanted.signer, ref)

    def proved(self, record: KeyRecord, key: VmKey, wanted: Protection, tpm: Tpm) -> KeyRecord:
        """Return a record with its MAC, after its newest slot gave the key by a real unseal.

        Raises:
            KeyRefused, TpmUnavailable: it did not.
        """
        with key.record_mac_key() as mac_key:
            record = record.with_mac(mac_key)
        with (
            self.open_slot(record, record.tpm_slots[-1], tpm, wanted.pin) as proof,
            key.secret() as ours,
            proof.secret() as theirs,
        ):
            if not hmac.compare_digest(ours, theirs):
                raise TpmUnavailable(key.vm_id, "the TPM gave back another key than was sealed")
        return record

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

    def check_pin(self, record: KeyRecord, pin: bytearray | None) -> None:
        """Refuse at once, before any use of the TPM, what needs a PIN and has none.

        Raises:
            PinNeeded: every slot of this TPM asks for a PIN.
        """
        own = self._host.record.storage_key.name
        ours = [slot for slot in record.tpm_slots if slot.storage_key_name == own]
        if pin is None and ours and all(slot.policy & PolicyKind.PIN for slot in ours):
            raise PinNeeded(record.vm_id, "its key opens with its PIN only")

    def open_record(self, record: KeyRecord, tpm: Tpm, pin: bytearray | None = None) -> VmKey:
        """Return the key from the first slot that opens.

        Slots without a PIN come first, newest first; then, where a PIN is given, each slot that
        takes one is tried with it once.

        Raises:
            WrongPin, LockedOut: from a slot that takes the PIN.
            PinNeeded: there is such a slot, no PIN was given, and no other slot opens.
            KeyServiceError: otherwise the newest slot's own error.
        """
        self.check_pin(record, pin)
        failed: list[KeyServiceError] = []
        for slot in records.opening_order(record.tpm_slots):
            try:
                return self.open_slot(record, slot, tpm, pin)
            except TpmUnavailable:
                raise
            except KeyServiceError as error:
                failed.append(error)
        # What the user can do something about says more than what he knows.
        for kind in (LockedOut, WrongPin, PinNeeded, KeyServiceError):
            found = next((one for one in failed if isinstance(one, kind)), None)
            if found is not None:
                raise found
        raise KeyRefused(record.vm_id, "its record has no slot for a TPM")

    def open_slot(
        self, record: KeyRecord, slot: TpmSlot, tpm: Tpm, pin: bytearray | None = None
    ) -> VmKey:
        """Return the key of one slot: unsealed, bound to this VM, the record authentic under it.

        Raises:
            PinNeeded: it takes a PIN, and none was given; it was not tried.
            WrongPin, LockedOut: see `Tpm.unseal`.
            KeyRefused: another TPM sealed it, or its policy refuses.
            KeyRecordDamaged: swapped, edited or damaged.
        """
        vm_id = record.vm_id
        if slot.storage_key_name != self._host.record.storage_key.name:
            raise KeyRefused(
                vm_id,
                "its key was sealed by another TPM than this host's; the recovery key opens it",
            )
        takes_pin = bool(slot.policy & PolicyKind.PIN)
        if takes_pin and pin is None:
            raise PinNeeded(vm_id, "its key opens with its PIN only")
        approval = self.policies.fitting(slot, tpm, vm_id) if slot.signer else None
        with (
            _authorisation(pin if takes_pin else None, vm_id, record.kmi) as auth,
            self._counter_authorisation(approval) as nv_auth,
        ):
            payload = tpm.unseal(
                slot.sealed,
                pcrs=slot.pcrs,
                pin=auth,
                approval=approval,
                nv_auth=nv_auth,
                subject=vm_id,
            )
        try:
            raw_key = records.open_vm_payload(payload, vm_id, record.kmi)
        finally:
            wipe(payload)
        key = VmKey(raw_key, vm_id=vm_id, kmi=record.kmi, recovery_slots=record.recovery_slots)
        with key.record_mac_key() as mac_key:
            if record.is_authentic(mac_key):
                return key
        key.wipe()
        raise KeyRecordDamaged(vm_id, "its key record does not authenticate: it was edited")

    def _counter_authorisation(
        self, approval: SignedPolicy | None
    ) -> contextlib.AbstractContextManager[bytearray]:
        if approval is None or approval.limit is None:
            return contextlib.nullcontext(bytearray())
        return self._host.nv_authorisation()


@contextlib.contextmanager
def _authorisation(pin: bytearray | None, vm_id: str, kmi: str) -> Iterator[bytearray]:
    """Lend the authValue for a PIN, nothing where there is none."""
    if pin is None:
        yield bytearray()
        return
    with authorisation(pin, records.binding(vm_id, kmi)) as auth:
        yield auth
