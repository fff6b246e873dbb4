"""A key, of a VM or a network, found or made, and protected for the first time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from sealfs.errors import AlreadyExists, UsageError
from sealfs.keys import names, origins, wire
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
    """Makes the keys of one host's VMs and networks."""

    def __init__(self, host: Host, vault: Vault, opening: Opening) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._opening = opening

    def new(
        self,
        name: str,
        kind: KmiKind,
        wanted: Protection,
        origin: KeyOrigin,
        handed_in: bytes | bytearray | None,
        slot: SlotKind,
    ) -> VmKey:
        """Return a key that is made for a VM or network that has none; as `key_of`.

        Raises:
            AlreadyExists: it has one, or its namesake.
            UsageError: what was asked for does not go together.
        """
        if handed_in is not None:
            origins.check_handed_in(handed_in, f"{names.kind_of(name)} key")
        if slot == "software" and wanted.policy:
            raise UsageError(
                name,
                "a software slot asks for nothing: PCRs, PIN and signer are for a slot of the TPM",
            )
        return self.key_of(name, kind, wanted, origin, handed_in, slot, is_existing_fine=False)[0]

    def key_of(
        self,
        name: str,
        kind: KmiKind,
        wanted: Protection,
        origin: KeyOrigin,
        handed_in: bytes | bytearray | None,
        slot: SlotKind,
        *,
        is_existing_fine: bool,
    ) -> tuple[VmKey, bool]:
        """Return the key of a VM or network, and whether it was made; durable on return.

        Args:
            name: whose, as in `names`.
            kind: how a new one is found.
            wanted: what a new one asks for; its PIN opens one that is there as well.
            origin: who makes a new one.
            handed_in: it, where the console made it.
            slot: what protects a new one; `software` asks for nothing.
            is_existing_fine: whether one that is there is returned.

        Raises:
            As `KeyService.create` and `KeyService.unseal`.
        """
        wire.check_identifier(name, "name")
        with self._state.lock() as held:
            self._vault.check_not_gone(name)
            record = self._vault.record_of_vm(name)
            if record is not None and not is_existing_fine:
                raise AlreadyExists(
                    names.network_of(name) or name,
                    f"this {names.kind_of(name)} has a key on this host already",
                )
            if record is not None:
                # While the key is changed, images are made under the one to come.
                record = self._vault.read_pending(record.kmi) or record
                return self._opening.open(record, wanted.pin, held), False
            self._check_namesake(name)

            def make(tpm: Tpm) -> VmKey:
                kmi = origins.new_kmi(kind, name, tpm)
                raw_key = origins.raw_key(origin, handed_in, tpm)
                key = VmKey(raw_key, vm_id=name, kmi=kmi, recovery_slots=())
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

    def _check_namesake(self, name: str) -> None:
        """Refuse a name that people could take for another one's."""
        other = names.namesake(name)
        if self._vault.record_of_vm(other) is not None:
            raise AlreadyExists(
                names.network_of(name) or name,
                f"is the name of a {names.kind_of(other)} on this host",
            )
