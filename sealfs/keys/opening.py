"""VM keys opened by whatever may open them: kept ones, the TPM, a PIN that somebody is asked for.

Concurrency: any thread. Whoever is asked for a PIN takes his time: no lock is held meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from sealfs.errors import PinNeeded
from sealfs.keys.audit import AuditLog
from sealfs.keys.host import Host
from sealfs.keys.records import KeyRecord, PolicyKind
from sealfs.keys.statedir import HeldLock
from sealfs.keys.unlocked import Unlocked
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

AskPin = Callable[[str], bytearray]
T = TypeVar("T")


class Opening:
    """The ways to the keys of one host's VMs; `close` wipes those that were kept."""

    def __init__(self, host: Host, vault: Vault, audit: AuditLog) -> None:
        self._host = host
        self._vault = vault
        self._audit = audit
        self.unlocked = Unlocked()
        self.ask_pin: AskPin | None = None
        """Asked, by VM id, where a key needs a PIN and none was given."""

    def close(self) -> None:
        """Wipe the keys of unlocked VMs."""
        self.unlocked.close()

    def asked(self, vm_id: str, use: Callable[[], T]) -> T:
        """Do `use`; where it lacks a PIN, have the VM unlocked by whoever can be asked, again."""

        def unlocked(pin: bytearray | None) -> T:
            if pin is not None:
                self.unlock(vm_id, pin)
            return use()

        return self.with_pin(vm_id, unlocked)

    def with_pin(self, vm_id: str, use: Callable[[bytearray | None], T]) -> T:
        """Do `use` with nothing; where it lacks a PIN, again with that of whoever can be asked."""
        try:
            return use(None)
        except PinNeeded:
            pin = self.pin_of(vm_id)
        try:
            return use(pin)
        finally:
            wipe(pin)

    def pin_of(self, vm_id: str) -> bytearray:
        """Return a VM's PIN, of whoever can be asked; the caller wipes it.

        Raises:
            PinNeeded: nobody can.
        """
        if self.ask_pin is None:
            raise PinNeeded(vm_id, "its key opens with its PIN only")
        return self.ask_pin(vm_id)

    def unlock(self, vm_id: str, pin: bytearray) -> None:
        """Open a VM's key with its PIN and keep it until `lock` or `close`.

        While the key is being changed, the one to come is kept as well: it has the same PIN.

        Raises:
            As `Vault.open_record`; one try is made for each slot that takes a PIN.
        """
        with self._audit.recorded("key unlocked", vm=vm_id):
            with self._host.tpm() as tpm:
                record = self._vault.known_of_vm(vm_id)
                found = [self._prove(record, tpm, pin)]
                try:
                    pending = self._vault.read_pending(record.kmi)
                    if pending is not None:
                        found.append(self._prove(pending, tpm, pin))
                except BaseException:
                    found[0].wipe()
                    raise
            self.unlocked.keep(*found)

    def _prove(self, record: KeyRecord, tpm: Tpm, pin: bytearray) -> VmKey:
        """Open a record by its PIN where it has one: a wrong one is told, not passed over."""
        by_pin = any(slot.policy & PolicyKind.PIN for slot in record.tpm_slots)
        return self._vault.open_record(record, tpm, pin, by_pin=by_pin)

    def lock(self, vm_id: str) -> bool:
        """Wipe the key that `unlock` kept; whether there was one."""
        was_unlocked = self.unlocked.lock(vm_id)
        if was_unlocked:
            self._audit.record("key locked", vm=vm_id)
        return was_unlocked

    def open(
        self, record: KeyRecord, pin: bytearray | None = None, held: HeldLock | None = None
    ) -> VmKey:
        """Return the key of a record, of a VM that is unlocked without asking the TPM.

        `held` is the state lock, of somebody who holds it already.
        """
        kept = self.kept(record)
        if kept is not None:
            return kept
        self._vault.check_pin(record, pin)
        if pin is None:
            return self._host.use(lambda tpm: self._vault.open_record(record, tpm), held)
        # Once: the TPM counts wrong ones.
        with self._host.tpm() if held is None else self._host.tpm_under(held) as tpm:
            return self._vault.open_record(record, tpm, pin)

    def open_in(self, record: KeyRecord, tpm: Tpm, pin: bytearray | None = None) -> VmKey:
        """Return the key of a record, as `open`, within a use of the TPM."""
        return self.kept(record) or self._vault.open_record(record, tpm, pin)

    def kept(self, record: KeyRecord) -> VmKey | None:
        """Return the key of a VM that is unlocked."""
        self._host.state.check_process()
        return self.unlocked.copy_of(record)
