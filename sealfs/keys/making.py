"""A VM's key found or made, and protected for the first time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sealfs.errors import AlreadyExists
from sealfs.keys import origins, wire
from sealfs.keys.host import Host
from sealfs.keys.opening import Opening
from sealfs.keys.origins import KeyOrigin, KmiKind
from sealfs.keys.protection import Protection
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

SlotKind = Literal["tpm", "software"]


class Making:
    """Makes the keys of one host's VMs."""

    def __init__(self, host: Host, vault: Vault, opening: Opening) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._opening = opening

    def key_of(
        self,
        vm_id: str,
        kind: KmiKind,
        wanted: Protection,
        origin: KeyOrigin,
        handed_in: bytes | bytearray | None,
        slot: SlotKind,
        *,
        is_existing_fine: bool,
    ) -> tuple[VmKey, bool]:
        """Return the key of a VM, and whether it was made; durable on return.

        Args:
            vm_id: whose.
            kind: how a new one is found.
            wanted: what a new one asks for; its PIN opens one that is there as well.
            origin: who makes a new one.
            handed_in: it, where the console made it.
            slot: what protects a new one; `software` asks for nothing.
            is_existing_fine: whether one that is there is returned.

        Raises:
            As `KeyService.create` and `KeyService.unseal`.
        """
        wire.check_identifier(vm_id, "VM id")
        with self._state.lock() as held:
            self._vault.check_not_gone(vm_id)
            record = self._vault.record_of_vm(vm_id)
            if record is not None and not is_existing_fine:
                raise AlreadyExists(vm_id, "this VM has a key on this host already")
            if record is not None:
                # While the key is changed, images are made under the one to come.
                record = self._vault.read_pending(record.kmi) or record
                return self._opening.open(record, wanted.pin, held), False

            def make(tpm: Tpm) -> VmKey:
                kmi = origins.new_kmi(kind, vm_id, tpm)
                raw_key = origins.raw_key(origin, handed_in, tpm)
                key = VmKey(raw_key, vm_id=vm_id, kmi=kmi, recovery_slots=())
                try:
                    self._vault.add_own_recipient(key)
                    is_software = slot == "software"
                    self._vault.protect(
                        key,
                        origins.ORIGINS[origin],
                        () if is_software else (wanted,),
                        tpm,
                        held,
                        is_software=is_software,
                    )
                except BaseException:
                    key.wipe()
                    raise
                return key

            return self._host.use(make, held), True
