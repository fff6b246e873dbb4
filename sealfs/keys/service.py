"""The key service: makes a VM's key, has it protected, and gives it back by its KMI.

What the console and the commands use, in process (C11). A key is found by its key management
information (KMI), one to one: the VM id itself, or an opaque identifier made here that the image
carries. The TPM is opened for each use and closed after it.

Concurrency: methods block (tens of milliseconds with the embedded TPM, up to seconds with
hardware) and may be called from any thread; call them from worker threads and do not abandon them
on cancellation. Changes happen under the lock of the state directory, so other processes may work
side by side. A service must not be used after a fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from sealfs.errors import (
    AlreadyExists,
    FormatError,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys import origins, policy, provision, records, recovery, reports, wire
from sealfs.keys.enrolment import HostId, Package
from sealfs.keys.host import Host, HostCounter, mixed_random
from sealfs.keys.ledger import Ledger
from sealfs.keys.moving import Moving, host_id
from sealfs.keys.origins import KeyOrigin, KmiKind
from sealfs.keys.records import KeyRecord, Origin, TpmSlot
from sealfs.keys.registry import Registry
from sealfs.keys.reports import InitReport, KeyInfo, SlotReport
from sealfs.keys.rotation import Rotation, changing_key
from sealfs.keys.slots import Slots
from sealfs.keys.statedir import LEDGER_FILE, ImageLock
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import IMAGE_KEY_SIZE, NewImageKey, VmKey

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

SlotKind = Literal["tpm", "software"]

_log = logging.getLogger(__name__)


class KeyService:
    """The keys of one host; `open` it, or `initialise` the host first."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._state = host.state
        self._vault = Vault(host)
        self.registry = Registry(host.state, host.record.host_id, host.subkey)
        self.ledger = Ledger(
            host.state,
            host.record.host_id,
            counter=HostCounter(host),
            subkey=host.subkey,
            subject=str(host.state.path / LEDGER_FILE),
        )
        self.moving = Moving(host, self._vault, self.ledger)
        self.slots = Slots(host, self._vault)

    @staticmethod
    def initialise(
        state: Path, *, tpm: str, recovery_to: Path | None, no_recovery: bool
    ) -> InitReport:
        """Set up the host; safe to repeat: then it says what it found and changes nothing.

        Args:
            state: The state directory; made where it is missing.
            tpm: `auto` (hardware), `swtpm` (embedded), `device:...` or another TCTI.
            recovery_to: File with an organisation's public recovery key.
            no_recovery: Do without any recovery key.

        Raises:
            UsageError: options contradict each other or what was set up before.
            TpmUnavailable: no such TPM.
        """
        return provision.initialise(
            state, tpm=tpm, recovery_to=recovery_to, no_recovery=no_recovery
        )

    @classmethod
    def open(cls, state: Path, *, tpm: str | None = None) -> KeyService:
        """Open the key service of an initialised host; the TPM is not asked yet.

        Args:
            state: The state directory.
            tpm: Another way to the same TPM than the one recorded.

        Raises:
            HostNotInitialised: `initialise` comes first.
            KeyRecordDamaged, FormatError: the host record cannot be read.
        """
        return cls(Host.open(state, tpm=tpm))

    def close(self) -> None:
        """Wipe the host secret kept in memory."""
        self._host.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock:
        """Lock an image by its uuid, so that no copy of it is opened beside it.

        Raises:
            Busy: another process has the image, or a copy of it, open.
        """
        return self._state.lock_image(subject, image_uuid, shared=shared)

    # Making and getting keys

    @staticmethod
    def new_vm_id() -> str:
        """Return a VM id for a VM that has no name: a UUID."""
        return str(uuid.uuid4())

    def random(self, size: int) -> bytes:
        """Return random bytes, HKDF over the TPM's and the kernel's."""
        with self._host.tpm() as tpm:
            return bytes(mixed_random(tpm, size))

    def create(
        self, vm_id: str, *, kmi: KmiKind = "vm-id", pcrs: tuple[int, ...] = (),
        origin: KeyOrigin = "mixed", handed_in: bytes | bytearray | None = None,
        slot: SlotKind = "tpm",
    ) -> VmKey:  # fmt: skip
        """Make a VM's key; durable on return.

        Args:
            vm_id: 1 to 255 bytes of UTF-8 without control characters.
            kmi: Find the key by its VM id, or by an identifier made by the service or the TPM.
            pcrs: Have the TPM give the key only while these PCRs are as they are now.
            origin: Who makes the key.
            handed_in: The key, 64 bytes, where the console made it; the caller wipes it.
            slot: Have the TPM protect it, or the key service, which the TPM protects.

        Raises:
            AlreadyExists: this VM has a key here.
            UsageError: a VM id or PCR list that cannot be used.
            KeyRefused, TpmUnavailable, KeyRecordDamaged: from the TPM and the host record.
        """
        if handed_in is not None:
            origins.check_handed_in(handed_in, "VM key")
        if slot == "software" and pcrs:
            raise UsageError(vm_id, "a software slot has no policy: PCRs need a slot of the TPM")
        make = partial(origins.raw_key, origin, handed_in)
        return self._make(vm_id, kmi, pcrs, make, origin, slot, is_existing_fine=False)

    def ensure(self, vm_id: str, *, kmi: KmiKind = "vm-id", pcrs: tuple[int, ...] = ()) -> VmKey:
        """Return the VM's key, made now if it has none: a VM may have several disks.

        `kmi` and `pcrs` concern a key that is made now. Raises as `create` and `unseal`.
        """
        make = partial(origins.raw_key, "mixed", None)
        return self._make(vm_id, kmi, pcrs, make, "mixed", "tpm", is_existing_fine=True)

    def unseal(self, kmi: str, vm_id: str) -> VmKey:
        """Return the key of a KMI, for its own VM.

        Raises:
            KeyNotFound: no record of this KMI.
            KeyRefused: the TPM or its policy refuses, or the record is another VM's.
            KeyRecordDamaged: the record was altered, swapped or renamed.
            TpmUnavailable: no TPM answers.
        """
        record = self._vault.read_known(kmi)
        if record.vm_id != vm_id:
            raise KeyRefused(kmi, f"is the key of VM {record.vm_id!r}, not of {vm_id!r}")
        with self._host.tpm() as tpm:
            return self._vault.open_record(record, tpm)

    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray:
        """Return the key of one image, which the caller wipes; all that a console needs (C4).

        Args:
            kmi: From the image's identity, as the others.
            vm_id: Whose image it is.
            image_uuid: 16 bytes.
            wrapped: The image key as `VmKey.wrap_image_key` returned it.

        Raises:
            As `unseal`; KeyRefused also where the image's key is not wrapped under this VM's.
        """
        with self.unseal(kmi, vm_id) as vm_key, contextlib.suppress(KeyRefused):
            return vm_key.unwrap_image_key(image_uuid, wrapped)
        # The VM's key may be changing: the new one, or what has just become of it.
        record = self._vault.read_pending(kmi) or self._vault.read_known(kmi)
        with self._host.tpm() as tpm, self._vault.open_record(record, tpm) as vm_key:
            return vm_key.unwrap_image_key(image_uuid, wrapped)

    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey:
        """Return the key of a new image of a VM; the VM's own key is made if it has none.

        Raises:
            As `ensure`.
        """
        with self.ensure(vm_id) as vm_key:
            # Crash from here on: a key without an image; the next image of that VM uses it.
            key = bytearray(self.random(IMAGE_KEY_SIZE))
            wrapped = vm_key.wrap_image_key(image_uuid, key)
            return NewImageKey(key, vm_key.kmi, wrapped, vm_key.recovery_slots)

    def has(self, kmi: str) -> bool:
        """Whether there is a record file for this KMI; nothing is verified."""
        wire.check_identifier(kmi, "KMI")
        return self._state.read(self._state.record_file(kmi), records.RECORD_SIZE_MAX) is not None

    def recover(
        self, vm_id: str, kmi: str, recovery_slots: Sequence[bytes], recovery_key: str
    ) -> VmKey:
        """Open a recovery slot and make the key usable on this host; durable on return.

        Works on a fresh host from what an image carries. A record whose key this TPM still
        gives is left alone; one that does not open is replaced, and keeps its PCR list where it
        authenticates under the recovered key. This host's recipient gets a slot of its own.

        A slot proves who can open it, not who made it: an image from an untrusted place can
        carry a key that somebody else knows. Of the slots only those that this recovery key
        opens are kept; the others wait for `Slots.adopt`.

        Raises:
            KeyGone: it was moved to another host, or revoked.
            RecoveryRefused: mistyped, or no slot is for this recovery key.
            KeyRecordDamaged: the slots are of another VM, or altered.
            KeyRefused: this host holds another key for this VM.
            TpmUnavailable: no TPM answers.
        """
        wire.check_identifier(vm_id, "VM id")
        wire.check_identifier(kmi, "KMI")
        private = recovery.parse_private(recovery_key)
        self._vault.check_not_gone(vm_id)
        raw_key = recovery.unwrap(list(recovery_slots), private, vm_id=vm_id, kmi=kmi)
        recovered = VmKey(
            raw_key,
            vm_id=vm_id,
            kmi=kmi,
            recovery_slots=recovery.slots_for(private, recovery_slots, records.binding(vm_id, kmi)),
        )
        try:
            with self._state.lock() as held, self._host.tpm_under(held) as tpm:
                pcrs: tuple[int, ...] = ()
                try:
                    old = self._vault.read(self._state.record_file(kmi), kmi=kmi)
                except (FormatError, KeyRecordDamaged) as error:
                    _log.warning("replacing the key record of %r: %s", vm_id, error)
                    old = None
                if old is not None:
                    existing = self._existing(old, recovered, tpm)
                    if existing is not None:
                        recovered.wipe()
                        return existing
                    pcrs = self._authentic_pcrs(old, recovered)
                self._vault.add_own_recipient(recovered)
                self._vault.protect(recovered, Origin.RECOVERED, pcrs, tpm, held)
        except BaseException:
            recovered.wipe()
            raise
        return recovered

    @contextlib.contextmanager
    def rotating(self, vm_id: str) -> Iterator[Rotation]:
        """Lend a change of a VM's key, during which no image of it is made; see `Rotation`.

        Raises:
            Busy: an image of the VM is being made, or its key is being changed.
        """
        with changing_key(self, vm_id):
            rotation = Rotation(self._host, self._vault, vm_id)
            try:
                yield rotation
            finally:
                rotation.close()

    def host_id(self) -> HostId:
        """Return who this host is, for another one. Raises as `moving.host_id`."""
        return host_id(self._host)

    def import_package(self, raw: bytes, subject: str) -> Package:
        """Make the key of a package usable here; durable on return. Raises as `Moving.take`."""

        def known(old: KeyRecord, key: VmKey, tpm: Tpm) -> tuple[bool, tuple[int, ...]]:
            existing = self._existing(old, key, tpm)
            if existing is None:
                return False, self._authentic_pcrs(old, key)
            existing.wipe()
            return True, ()

        return self.moving.take(raw, subject, known)

    # Looking at keys

    def records(self) -> list[KeyInfo]:
        """Describe every key record; a damaged one is listed with its problem."""
        found = []
        name_of_key = self._host.record.storage_key.name
        for file in self._state.record_names():
            try:
                record = self._vault.read(file)
            except (FormatError, KeyServiceError) as error:
                found.append(KeyInfo(file, "", "", "", "", (), problem=error.detail))
                continue
            if record is not None:
                info = reports.key_info(record, file, name_of_key)
                is_changing = self._state.has(self._state.pending_file(record.kmi))
                found.append(dataclasses.replace(info, is_changing=is_changing))
        found = reports.with_tombstones(found, self._vault.tombstones())
        return sorted(found, key=lambda info: (info.vm_id, info.kmi, info.file))

    def test(self, kmi: str) -> list[SlotReport]:
        """Try every slot for real and foretell trouble; nothing is changed.

        Raises:
            KeyNotFound, KeyRecordDamaged, FormatError: there is nothing to try.
            KeyRefused, TpmUnavailable: this TPM is not the one of init, or does not answer.
        """
        record = self._vault.read_known(kmi)
        found = []
        with self._host.tpm() as tpm:
            state = tpm.lockout()
            lockout = (
                f"{'locked out' if state.locked else 'not locked'}, {state.failures} of "
                f"{state.failures_max} failures, one forgiven each {state.recovery_s} s"
            )
            for index, slot in enumerate(record.tpm_slots):
                trouble = ["the TPM is locked out"] if state.locked else []
                trouble += self._pcr_trouble(slot, tpm)
                try:
                    self._vault.open_slot(record, slot, tpm).wipe()
                    opens, detail = True, "opens"
                except TpmUnavailable:
                    raise
                except KeyServiceError as error:
                    opens, detail = False, error.detail
                found.append(SlotReport(index, "tpm", opens, detail, tuple(trouble), lockout))
            if record.software_slot:
                found.append(self._try_software(record, len(found)))
        for index, raw in enumerate(record.recovery_slots, start=len(found)):
            text = f"opens with recovery key {reports.recipient_text(raw)}; not tried"
            found.append(SlotReport(index, "recovery", None, text))
        return found

    # Inside

    def _make(
        self, vm_id: str, kind: KmiKind, pcrs: tuple[int, ...], make: Callable[[Tpm], bytearray],
        origin: KeyOrigin, slot: SlotKind, *, is_existing_fine: bool,
    ) -> VmKey:  # fmt: skip
        wire.check_identifier(vm_id, "VM id")
        pcrs = policy.check_pcrs(pcrs)
        with self._state.lock() as held:
            self._vault.check_not_gone(vm_id)
            record = self._vault.record_of_vm(vm_id)
            if record is not None and not is_existing_fine:
                raise AlreadyExists(vm_id, "this VM has a key on this host already")
            with self._host.tpm_under(held) as tpm:
                if record is not None:
                    # While the key is changed, images are made under the one to come.
                    record = self._vault.read_pending(record.kmi) or record
                    return self._vault.open_record(record, tpm)
                kmi = origins.new_kmi(kind, vm_id, tpm)
                key = VmKey(make(tpm), vm_id=vm_id, kmi=kmi, recovery_slots=())
                try:
                    self._vault.add_own_recipient(key)
                    is_software = slot == "software"
                    made = origins.ORIGINS[origin]
                    self._vault.protect(key, made, pcrs, tpm, held, is_software=is_software)
                except BaseException:
                    key.wipe()
                    raise
                return key

    def _existing(self, old: KeyRecord, recovered: VmKey, tpm: Tpm) -> VmKey | None:
        """Return the key that this host's record gives, None where it gives none."""
        if old.vm_id != recovered.vm_id:
            raise KeyRefused(old.kmi, f"this host holds it as the key of VM {old.vm_id!r}")
        try:
            existing = self._vault.open_record(old, tpm)
        except TpmUnavailable:
            raise
        except KeyServiceError as error:
            _log.warning("replacing the key record of %r: %s", recovered.vm_id, error)
            return None
        with existing.secret() as ours, recovered.secret() as theirs:
            is_same = hmac.compare_digest(ours, theirs)
        if not is_same:
            existing.wipe()
            pending = self._vault.read_pending(old.kmi)
            if pending is not None:
                return self._existing_pending(pending, recovered, tpm)
            raise KeyRefused(
                recovered.vm_id, "this host holds another key for this VM than the slot does"
            )
        return existing

    def _existing_pending(self, pending: KeyRecord, recovered: VmKey, tpm: Tpm) -> VmKey:
        """Return the key that the VM is being changed to, if it is the recovered one."""
        existing = self._vault.open_record(pending, tpm)
        with existing.secret() as ours, recovered.secret() as theirs:
            if hmac.compare_digest(ours, theirs):
                return existing
        existing.wipe()
        raise KeyRefused(
            recovered.vm_id, "this host holds another key for this VM than the slot does"
        )

    def _authentic_pcrs(self, old: KeyRecord, recovered: VmKey) -> tuple[int, ...]:
        with recovered.record_mac_key() as mac_key:
            if not old.is_authentic(mac_key):
                return ()
        return next((slot.pcrs for slot in old.tpm_slots), ())

    def _try_software(self, record: KeyRecord, index: int) -> SlotReport:
        try:
            self._vault.open_software(record).wipe()
        except (FormatError, KeyServiceError) as error:
            return SlotReport(index, "software", False, error.detail)
        return SlotReport(index, "software", True, "opens")

    def _pcr_trouble(self, slot: TpmSlot, tpm: Tpm) -> list[str]:
        if not slot.pcrs:
            return []
        present = tpm.pcr_values(slot.pcrs)
        trio = zip(slot.pcrs, slot.pcr_values, present, strict=True)
        return [f"PCR {pcr} is not what it was" for pcr, then, now in trio if then != now]
