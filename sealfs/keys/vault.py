"""Key records on this host: found, read, opened with the TPM, and made.

The glue between the state directory (files), the records (bytes) and the TPM (keys). Decides
nothing about who may ask; `service` does. Every method that takes a `Tpm` runs in the caller's
use of it; `protect` needs the state lock as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from sealfs.errors import (
    AlreadyExists,
    Busy,
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
from sealfs.keys import labels, policy, records, recovery, reports, software, wire
from sealfs.keys.access import EMBEDDED
from sealfs.keys.gone import Gone
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


class Vault(Gone):
    """The key records of one host."""

    def __init__(self, host: Host) -> None:
        super().__init__(host.state)
        self._host = host
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

    def known_of_vm(self, vm_id: str) -> KeyRecord:
        """Return the record of a VM.

        Raises:
            KeyNotFound: there is none.
            KeyGone: it was moved or revoked.
        """
        self.check_not_gone(vm_id)
        record = self.record_of_vm(vm_id)
        if record is None:
            raise KeyNotFound(vm_id, "this host has no key for it")
        return record

    def changeable(self, vm_id: str) -> KeyRecord:
        """Return the record of a VM whose key is not just changing.

        Raises:
            KeyNotFound, KeyGone: as `known_of_vm`.
            Busy: the key is being rotated.
        """
        record = self.known_of_vm(vm_id)
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

    def drop_lost_pending(self, kmi: str, held: HeldLock) -> None:
        """Remove the record of a key to come that only a TPM of before gave; durable.

        No rotation goes on by it. The images that were rewrapped carry its recovery slots.
        """
        with contextlib.suppress(FormatError, KeyRecordDamaged):
            pending = self.read_pending(kmi)
            if pending is None or self.own_slots(pending):
                return
            if pending.software_slot:
                host_id = self._host.record.host_id
                with contextlib.suppress(KeyRefused):
                    software.salt_of(pending.software_slot, pending.vm_id, host_id)
                    return
            self._state.remove(self._state.pending_file(kmi), held)

    # Opening and making

    def protect(
        self,
        key: VmKey,
        origin: Origin,
        wanted: Sequence[Protection],
        tpm: Tpm,
        held: HeldLock,
        *,
        is_pending: bool = False,
        is_software: bool = False,
    ) -> None:
        """Seal a key, prove that it opens by each of its slots, write its record; durable.

        Args:
            key: what is sealed; its recovery slots go into the record.
            origin: where it came from.
            wanted: what each tpm slot asks for, oldest first; none: no such slot.
            tpm: in use by the caller.
            held: the state lock.
            is_pending: beside the record that stands, as the one to come.
            is_software: with a software slot, which asks for nothing.

        Raises:
            KeyRefused: a slot does not open as the host is now.
        """
        record = KeyRecord(
            key.kmi, key.vm_id, int(time.time()), origin, (), key.recovery_slots,
            software_slot=self._software_slot(key) if is_software else b"",
        )  # fmt: skip
        for protection in wanted:
            slots = (*record.tpm_slots, self.make_slot(key, protection, tpm))
            record = self.proved(dataclasses.replace(record, tpm_slots=slots), key, protection, tpm)
        if is_software:
            with key.record_mac_key() as mac_key:
                record = record.with_mac(mac_key)
            with self.open_software(record) as proof:
                _check_same(key, proof, "its software slot")
        # Crash here: no record, and nothing is sealed under this key yet.
        file = self._state.pending_file if is_pending else self._state.record_file
        self._state.write(file(key.kmi), record.encode(), held)

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

    def own_slots(self, record: KeyRecord) -> list[TpmSlot]:
        """Return the slots of this host's TPM, oldest first."""
        own = self._host.record.storage_key.name
        return [slot for slot in record.tpm_slots if slot.storage_key_name == own]

    def own_protections(self, record: KeyRecord, pin: bytearray | None) -> list[Protection]:
        """Return what this TPM's slots of a record ask for, oldest first, each once.

        `pin` stands for the PIN of all that take one.
        """
        found: list[Protection] = []
        for slot in self.own_slots(record):
            takes_pin = bool(slot.policy & PolicyKind.PIN)
            assert pin is not None or not takes_pin, "a PIN is asked for first"
            wanted = Protection(slot.pcrs, pin if takes_pin else None, slot.signer)
            if wanted not in found:
                found.append(wanted)
        return found

    def proved(self, record: KeyRecord, key: VmKey, wanted: Protection, tpm: Tpm) -> KeyRecord:
        """Return a record with its MAC, after its newest slot gave the key by a real unseal.

        Raises:
            KeyRefused, TpmUnavailable: it did not.
        """
        with key.record_mac_key() as mac_key:
            record = record.with_mac(mac_key)
        with self.open_slot(record, record.tpm_slots[-1], tpm, wanted.pin) as proof:
            _check_same(key, proof, "the TPM")
        return record

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
            # A record of an older version is written in the present one.
            after = dataclasses.replace(
                record, recovery_slots=slots, version=records.RECORD_VERSION
            ).with_mac(mac_key)
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

    def check_pin(self, record: KeyRecord, pin: bytearray | None) -> None:
        """Refuse at once, before any use of the TPM, what needs a PIN and has none.

        Raises:
            PinNeeded: every slot of this TPM asks for a PIN.
        """
        ours = self.own_slots(record)
        is_locked = ours and all(slot.policy & PolicyKind.PIN for slot in ours)
        if pin is None and is_locked and not record.software_slot:
            raise PinNeeded(record.vm_id, "its key opens with its PIN only")

    def open_record(
        self,
        record: KeyRecord,
        tpm: Tpm,
        pin: bytearray | None = None,
        *,
        by_pin: bool = False,
    ) -> VmKey:
        """Return the key from the first slot that opens.

        Slots without a PIN come first, newest first, the software slot behind them; then, where
        a PIN is given, each slot that takes one is tried with it once. `by_pin`: only these, so
        that the PIN is proved to be right.

        Raises:
            WrongPin, LockedOut: from a slot that takes the PIN.
            PinNeeded: there is such a slot, no PIN was given, and no other slot opens.
            KeyServiceError: otherwise the newest slot's own error.
        """
        self.check_pin(record, pin)
        slots = records.opening_order(record.tpm_slots)
        asking = [slot for slot in slots if slot.policy & PolicyKind.PIN]
        ways = [partial(self.open_slot, record, slot, tpm, pin) for slot in asking]
        if not by_pin:
            others = [slot for slot in slots if slot not in asking]
            software_way = [partial(self.open_software, record)] if record.software_slot else []
            ways = [
                *(partial(self.open_slot, record, slot, tpm) for slot in others),
                *software_way,
                *ways,
            ]
        failed: list[KeyServiceError] = []
        for way in ways:
            try:
                return way()
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

    def _counter_authorisation(
        self, approval: SignedPolicy | None
    ) -> contextlib.AbstractContextManager[bytearray]:
        if approval is None or approval.limit is None:
            return contextlib.nullcontext(bytearray())
        return self._host.nv_authorisation()


def _check_same(ours: VmKey, theirs: VmKey, whose: str) -> None:
    with ours.secret() as one, theirs.secret() as other:
        if not hmac.compare_digest(one, other):
            raise TpmUnavailable(ours.vm_id, f"{whose} gave back another key than was sealed")


@contextlib.contextmanager
def _authorisation(pin: bytearray | None, vm_id: str, kmi: str) -> Iterator[bytearray]:
    """Lend the authValue for a PIN, nothing where there is none."""
    if pin is None:
        yield bytearray()
        return
    with authorisation(pin, records.binding(vm_id, kmi)) as auth:
        yield auth
