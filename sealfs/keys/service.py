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
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sealfs.errors import (
    FormatError,
    KeyRefused,
    KeyServiceError,
    SealfsError,
)
from sealfs.keys import names, policy, provision, records, reports, reseal, trial, wire
from sealfs.keys.audit import Actor, AuditLog
from sealfs.keys.enrolment import HostId
from sealfs.keys.host import Host, HostCounter, mixed_random
from sealfs.keys.ledger import RESERVED_IDS, Ledger
from sealfs.keys.making import Making, SlotKind
from sealfs.keys.moving import Moving, host_id
from sealfs.keys.networks import Networks
from sealfs.keys.opening import AskPin, Opening
from sealfs.keys.origins import KeyOrigin, KmiKind
from sealfs.keys.protection import Protection
from sealfs.keys.recovering import Recovering
from sealfs.keys.registry import Registry
from sealfs.keys.reports import InitReport, KeyInfo, SlotReport
from sealfs.keys.rotation import Rotation, changing_key
from sealfs.keys.slots import Slots
from sealfs.keys.statedir import LEDGER_FILE, ImageLock
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import IMAGE_KEY_SIZE, NewImageKey, VmKey


class KeyService:
    """The keys of one host; `open` it, or `initialise` the host first."""

    def __init__(
        self,
        host: Host,
        *,
        actor: Callable[[], Actor] = Actor.here,
        name_of: Callable[[Path], str] | None = None,
    ) -> None:
        self._host = host
        self._state = host.state
        self._vault = Vault(host)
        self.policies = self._vault.policies
        self.ledger = Ledger(
            host.state,
            host.record.host_id,
            counter=HostCounter(host),
            subkey=host.subkey,
            subject=str(host.state.path / LEDGER_FILE),
        )
        self.registry = Registry(
            host.state, host.record.host_id, host.subkey, self.ledger, name_of=name_of
        )
        self.audit = AuditLog(host.state, host.subkey, self.ledger, actor)
        self._opening = Opening(host, self._vault, self.audit)
        self._making = Making(host, self._vault, self._opening)
        self._recovering = Recovering(host, self._vault, self._opening)
        self.moving = Moving(
            host,
            self._vault,
            self._opening,
            self._recovering,
            self.ledger,
            self.registry,
            self.audit,
        )
        self.networks = Networks(
            host, self._vault, self._opening, self._making, self.ledger, self.audit
        )
        self.slots = Slots(host, self._vault, self._opening, self.audit)

    @property
    def ask_pin(self) -> AskPin | None:
        """Asked, by VM id, where a key needs a PIN and none was given; the VM stays unlocked."""
        return self._opening.ask_pin

    @ask_pin.setter
    def ask_pin(self, ask: AskPin | None) -> None:
        self._opening.ask_pin = ask

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
        report = provision.initialise(
            state, tpm=tpm, recovery_to=recovery_to, no_recovery=no_recovery
        )
        if report.created:
            with KeyService.open(state) as keys:
                keys.audit.record("host set up", tpm=report.tpm)
        return report

    @staticmethod
    def replace_tpm(
        state: Path,
        *,
        tpm: str | None,
        recovery_to: Path | None,
        recovery_key: str | None,
        no_recovery: bool,
    ) -> InitReport:
        """Set up the host anew with another TPM, or one that was cleared; see `provision`."""
        report = provision.replace_tpm(
            state,
            tpm=tpm,
            recovery_to=recovery_to,
            recovery_key=recovery_key,
            no_recovery=no_recovery,
        )
        with KeyService.open(state) as keys:
            keys.audit.record("TPM replaced", tpm=report.tpm)
        return report

    @classmethod
    def open(
        cls, state: Path, *, tpm: str | None = None, actor: Callable[[], Actor] = Actor.here
    ) -> KeyService:
        """Open the key service of an initialised host; the TPM is not asked yet.

        Args:
            state: The state directory.
            tpm: Another way to the same TPM than the one recorded.
            actor: Says who asks, for the audit log.

        Raises:
            HostNotInitialised: `initialise` comes first.
            KeyRecordDamaged, FormatError: the host record cannot be read.
        """
        return cls(Host.open(state, tpm=tpm), actor=actor)

    def close(self) -> None:
        """Wipe the host secret and the keys of unlocked VMs kept in memory."""
        self._opening.close()
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
        return self._host.use(lambda tpm: bytes(mixed_random(tpm, size)))

    def create(
        self,
        vm_id: str,
        *,
        kmi: KmiKind = "vm-id",
        pcrs: tuple[int, ...] = (),
        pin: bytearray | None = None,
        signer: bytes = b"",
        origin: KeyOrigin = "mixed",
        handed_in: bytes | bytearray | None = None,
        slot: SlotKind = "tpm",
    ) -> VmKey:
        """Make a VM's key; durable on return.

        Args:
            vm_id: 1 to 255 bytes of UTF-8 without control characters.
            kmi: Find the key by its VM id, or by an identifier made by the service or the TPM.
            pcrs: Have the TPM give the key only while these PCRs are as they are now.
            pin: Have it give the key for this PIN only.
            signer: Have it give the key only while the PCRs are as this key signs them to be.
            origin: Who makes the key.
            handed_in: The key, 64 bytes, where the console made it; the caller wipes it.
            slot: Have the TPM protect it, or the key service, which the TPM protects.

        Raises:
            AlreadyExists: this VM has a key here.
            UsageError: a VM id or PCR list that cannot be used.
            KeyRefused, TpmUnavailable, KeyRecordDamaged: from the TPM and the host record.
        """
        wanted = Protection(policy.check_pcrs(pcrs), pin, signer)
        names.check_vm(vm_id)
        with self.audit.recorded("key made", vm=vm_id, origin=origin) as facts:
            key = self._making.new(vm_id, kmi, wanted, origin, handed_in, slot)
            facts["kmi"] = key.kmi
        return key

    def ensure(
        self,
        vm_id: str,
        *,
        kmi: KmiKind = "vm-id",
        pcrs: tuple[int, ...] = (),
        pin: bytearray | None = None,
        signer: bytes = b"",
    ) -> VmKey:
        """Return the VM's key, made now if it has none: a VM may have several disks.

        `kmi`, `pcrs` and `signer` concern a key that is made now; `pin` opens one that is there
        as well. Raises as `create` and `unseal`.
        """
        wanted = Protection(policy.check_pcrs(pcrs), pin, signer)
        names.check_vm(vm_id)
        try:
            key, is_new = self._opening.asked(
                vm_id,
                lambda: self._making.key_of(
                    vm_id, kmi, wanted, "mixed", None, "tpm", is_existing_fine=True
                ),
            )
        except KeyServiceError as error:
            self.audit.failed("key made or used", error, vm=vm_id)
            raise
        if is_new:
            self.audit.record("key made", vm=vm_id, origin="mixed", kmi=key.kmi)
        else:
            self.audit.record("key used", vm=vm_id, kmi=key.kmi)
        return key

    def unseal(
        self, kmi: str, vm_id: str, *, pin: bytearray | None = None, image_uuid: bytes = b""
    ) -> VmKey:
        """Return the key of a KMI, for its own VM; one that is unlocked without asking the TPM.

        `image_uuid` says what for, in the audit log.

        Raises:
            PinNeeded, WrongPin, LockedOut: it takes a PIN.
            KeyNotFound: no record of this KMI.
            KeyRefused: the TPM or its policy refuses, or the record is another VM's.
            KeyRecordDamaged: the record was altered, swapped or renamed.
            TpmUnavailable: no TPM answers.
        """
        with self.audit.recorded("key used", vm=vm_id, kmi=kmi, image=image_uuid.hex()):
            record = self._vault.read_known(kmi)
            if names.is_network(record.vm_id):
                raise KeyRefused(kmi, "is the key of a network, which opens no image")
            if record.vm_id != vm_id:
                raise KeyRefused(kmi, f"is the key of VM {record.vm_id!r}, not of {vm_id!r}")
            return self._opening.asked(vm_id, lambda: self._opening.open(record, pin))

    def unlock(self, vm_id: str, pin: bytearray) -> None:
        """Open a VM's key with its PIN and keep it until `lock` or `close`.

        Raises:
            As `unseal`; one try is made for each slot that takes a PIN.
        """
        self._opening.unlock(vm_id, pin)

    def lock(self, vm_id: str) -> bool:
        """Wipe the key that `unlock` kept; whether there was one. Image keys are their users'."""
        return self._opening.lock(vm_id)

    def unlocked(self) -> list[str]:
        """Return the VMs that are unlocked."""
        return self._opening.unlocked.names()

    @property
    def state_path(self) -> Path:
        """The state directory, canonical: which host's keys these are."""
        return self._state.path.resolve()

    def reseal(
        self, vm_id: str, wanted: Protection, *, pin: bytearray | None = None, keep: bool = False
    ) -> None:
        """Give a VM's key another policy; see `reseal.reseal`."""
        wire.check_identifier(vm_id, "VM id")

        def work() -> None:
            unlocked = self._opening.unlocked
            reseal.reseal(self._host, self._vault, unlocked, vm_id, wanted, pin=pin, keep=keep)

        with self.audit.recorded("key resealed", vm=vm_id):
            self._opening.asked(vm_id, work)

    def pcr_values(self, pcrs: Sequence[int]) -> tuple[bytes, ...]:
        """Return the SHA-256 values of PCRs, ascending, as this host's TPM has them now."""
        return self._host.use(lambda tpm: tpm.pcr_values(policy.check_pcrs(pcrs)))

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
        if image_uuid in RESERVED_IDS:
            # Noted in the ledger, it would stand for this host's registry or audit log.
            raise KeyRefused(vm_id, "an image of it has a uuid that the ledger keeps for itself")
        with (
            self.unseal(kmi, vm_id, image_uuid=image_uuid) as vm_key,
            contextlib.suppress(KeyRefused),
        ):
            return vm_key.unwrap_image_key(image_uuid, wrapped)
        # The VM's key may be changing: the new one, or what has just become of it.
        with self.audit.recorded("key used", vm=vm_id, kmi=kmi, image=image_uuid.hex()):
            record = self._vault.read_pending(kmi) or self._vault.read_known(kmi)
            with self._opening.asked(vm_id, lambda: self._opening.open(record)) as vm_key:
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
        authenticates under the recovered key, but no PIN and no signer: nobody knows whether
        they would open it. One that this TPM may open another time, and that is not of this key,
        stays: it may be the VM's only one. This host's recipient gets a slot of its own.

        A slot proves who can open it, not who made it: an image from an untrusted place can
        carry a key that somebody else knows, or a slot for somebody who is to get the next key.
        So only the slots that this recovery key opens are kept.

        Raises:
            KeyGone: it was moved to another host, or revoked.
            RecoveryRefused: mistyped, or no slot is for this recovery key.
            KeyRecordDamaged: the slots are of another VM, or altered.
            KeyRefused: this host holds another key for this VM.
            TpmUnavailable: no TPM answers.
        """
        names.check_vm(vm_id)
        wire.check_identifier(kmi, "KMI")
        with self.audit.recorded("key recovered", vm=vm_id, kmi=kmi):
            return self._recovering.recover(vm_id, kmi, recovery_slots, recovery_key)

    @contextlib.contextmanager
    def rotating(self, vm_id: str) -> Iterator[Rotation]:
        """Lend a change of a VM's key, during which no image of it is made; see `Rotation`.

        Raises:
            Busy: an image of the VM is being made, or its key is being changed.
        """
        try:
            with (
                changing_key(self, vm_id),
                contextlib.closing(
                    Rotation(
                        self._host, self._vault, self._opening, self.networks.permissions, vm_id
                    )
                ) as rotation,
            ):
                yield rotation
        except SealfsError as error:
            self.audit.failed("key rotated", error, vm=vm_id)
            raise
        if rotation.is_finished:
            self.audit.record("key rotated", vm=vm_id, kmi=rotation.kmi)

    def host_id(self) -> HostId:
        """Return who this host is, for another one. Raises as `moving.host_id`."""
        return host_id(self._host)

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

    def test(self, kmi: str, *, pin: bytearray | None = None) -> list[SlotReport]:
        """Try every slot for real and foretell trouble; nothing is changed.

        A slot that takes a PIN is tried, once, where one is given.

        Raises:
            KeyNotFound, KeyRecordDamaged, FormatError: there is nothing to try.
            KeyRefused, TpmUnavailable: this TPM is not the one of init, or does not answer.
        """
        with self.audit.recorded("key tested", kmi=kmi) as facts:
            found = self._test(kmi, pin)
            facts["slots"] = ", ".join(slot.detail for slot in found if slot.opens is not None)
        return found

    def _test(self, kmi: str, pin: bytearray | None) -> list[SlotReport]:
        record = self._vault.read_known(kmi)
        if pin is None:
            return self._host.use(lambda tpm: trial.trial(self._vault, record, tpm, None))
        with self._host.tpm() as tpm:
            return trial.trial(self._vault, record, tpm, pin)
