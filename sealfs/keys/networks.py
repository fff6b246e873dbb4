"""Networks: their keys, which VM is allowed on which, and what a VM's device gets on one.

A network's key is kept, found, protected, moved and revoked as a VM's is, under a name of its own
(`names`). What is given out is derived from it: the network's key as the hosts' network services
share it, and the identifier under which one device of one VM sends. It is given for a VM that was
allowed on that network with its own key, and to nobody else.

Concurrency: as `service`; nothing here is kept from one call to the next.
"""

from __future__ import annotations

import hmac
from typing import Final, NamedTuple

from sealfs.errors import Busy, KeyGone, KeyNotFound, NotAllowed, NotFound, UsageError
from sealfs.keys import labels, names, records, wire
from sealfs.keys.audit import AuditLog
from sealfs.keys.host import Host
from sealfs.keys.ledger import Ledger
from sealfs.keys.making import Making, SlotKind
from sealfs.keys.opening import Opening
from sealfs.keys.origins import KeyOrigin, KmiKind
from sealfs.keys.permissions import Permission, Permissions
from sealfs.keys.protection import Protection
from sealfs.keys.records import DEVICE_MAX, KeyRecord
from sealfs.keys.rotation import LocksImages, making_image
from sealfs.keys.statedir import ImageLock
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey

NETWORK_KEY_SIZE: Final = 32
SCI_SIZE: Final = 8
_LOCAL, _GROUP = 0x02, 0x01
"""Bits of an address's first octet (IEEE 802-2014 8.2)."""


class NetworkKey(NamedTuple):
    """What one device of one VM gets on one network. Whoever asked for it wipes `key`."""

    key: bytearray
    sci: bytes


class Networks:
    """The networks of one host."""

    def __init__(
        self, host: Host, vault: Vault, opening: Opening, making: Making, ledger: Ledger,
        audit: AuditLog,
    ) -> None:  # fmt: skip
        self._host = host
        self._vault = vault
        self._opening = opening
        self._making = making
        self._ledger = ledger
        self._audit = audit
        self.permissions = Permissions(host.state, host.record.host_id, host.subkey, ledger)

    def create(
        self,
        network: str,
        *,
        kmi: KmiKind = "vm-id",
        wanted: Protection | None = None,
        origin: KeyOrigin = "mixed",
        handed_in: bytes | bytearray | None = None,
        slot: SlotKind = "tpm",
    ) -> None:
        """Make a network's key; durable on return.

        Args:
            network: 1 to 251 bytes of UTF-8 without control characters.
            kmi: Find the key by the identifier, or by a random one of the service's or the TPM's.
            wanted: What the TPM is to ask for.
            origin: Who makes the key.
            handed_in: The key, 64 bytes, where the console made it; the caller wipes it.
            slot: Have the TPM protect it, or the key service, which the TPM protects.

        Raises:
            AlreadyExists: this host has a network, or a VM, of that name.
            UsageError: an identifier that cannot be used.
            KeyRefused, TpmUnavailable, KeyRecordDamaged: from the TPM and the host record.
        """
        name = names.key_name_of(network)
        with self._audit.recorded("network made", network=network, origin=origin) as facts:
            key = self._making.new(name, kmi, wanted or Protection(), origin, handed_in, slot)
            with key:
                facts["kmi"] = key.kmi

    def allow(self, network: str, vm_id: str) -> None:
        """Allow a VM on a network; durable on return. Once more changes nothing.

        Takes the VM's key, and so its PIN where it has one.

        Raises:
            KeyNotFound, KeyGone: this host has no key for the network or the VM.
            Busy: the VM's key is being changed.
            KeyServiceError: the VM's key does not open.
        """
        with self._audit.recorded("network allowed", network=network, vm=vm_id):
            self._known(network)
            names.check_vm(vm_id)
            # A key that changed meanwhile would leave a permission of the old one.
            with making_image(self._host.state, vm_id, vm_id):
                with self._opened(self._vault.known_of_vm(vm_id)) as key:
                    given = Permission(network, vm_id).under(key)
                self.permissions.change(
                    lambda found: {one for one in found if one.pair != given.pair} | {given}
                )

    def deny(self, network: str, vm_id: str) -> None:
        """Take a permission away, also that of a VM or network that is gone; durable on return.

        The ledger is bound to new values of the TPM's counter, so that not even the whole state
        directory can be put back as it was.

        Raises:
            NotFound: there is none.
            TpmUnavailable: it is taken away, and the counter did not answer.
        """
        with self._audit.recorded("network denied", network=network, vm=vm_id):

            def without(found: set[Permission]) -> set[Permission]:
                left = {one for one in found if one.pair != (network, vm_id)}
                if left == found:
                    raise NotFound(vm_id, f'was not allowed on network "{network}" before')
                return left

            self.permissions.change(without)
        # Crash here: denied; what the ledger says of it is bound to the counter by the next bump.
        self._ledger.bump()

    def allowed(self) -> list[tuple[str, str]]:
        """Return (network, VM) of all permissions, sorted; the VMs' keys are not asked.

        Raises:
            As `Permissions.read`.
        """
        return sorted({one.pair for one in self.permissions.read(counted=False)})

    def grant(self, network: str, vm_id: str, device: int) -> NetworkKey:
        """Return what a VM's device gets on a network.

        Raises:
            KeyNotFound, KeyGone: this host has no key for the network or the VM.
            NotAllowed: the VM was not allowed on it, or with another key.
            KeyServiceError: one of both keys does not open.
            RolledBack, KeyRecordDamaged: the permissions are not what this host wrote last.
        """
        facts = {"network": network, "vm": vm_id, "device": str(device)}
        with self._audit.recorded("network used", **facts) as more:
            if not 0 <= device <= DEVICE_MAX:
                raise UsageError(vm_id, f"has devices 0 to {DEVICE_MAX}, not {device}")
            record = self._known(network)
            more["kmi"] = record.kmi
            names.check_vm(vm_id)
            vm_record = self._vault.known_of_vm(vm_id)
            found = self.permissions.read(counted=True)
            given = [one for one in found if one.pair == (network, vm_id)]
            if not given:
                raise NotAllowed(vm_id, f'is not allowed on network "{network}"')
            with self._opened(vm_record) as vm_key:
                if not any(one.is_of(vm_key) for one in given):
                    raise NotAllowed(
                        vm_id, f'was allowed on network "{network}" with another key than it has'
                    )
            with self._opened(record) as key:
                return _network_key(key, vm_id, device)

    def is_allowed(self, network: str, vm_id: str) -> bool:
        """Whether a VM that got something on a network would get it still; asks no TPM.

        Raises:
            RolledBack, KeyRecordDamaged: as `grant`.
        """
        try:
            self._known(network)
            self._vault.known_of_vm(vm_id)
        except (KeyNotFound, KeyGone):
            return False
        found = self.permissions.read(counted=False)
        return any(one.pair == (network, vm_id) for one in found)

    def _known(self, network: str) -> KeyRecord:
        name = names.key_name_of(network)
        self._vault.check_not_gone(name)
        record = self._vault.record_of_vm(name)
        if record is None:
            raise KeyNotFound(network, "this host has no such network")
        return record

    def _opened(self, record: KeyRecord) -> VmKey:
        return self._opening.asked(record.vm_id, lambda: self._opening.open(record))


def lock_device(keys: LocksImages, vm_id: str, device: int) -> ImageLock:
    """Lock a VM's device, so that it is attached once on this host.

    Raises:
        Busy: it is attached already.
    """
    try:
        return keys.lock_image(vm_id, records.device_lock_name(vm_id, device), shared=False)
    except Busy:
        raise Busy(vm_id, f"its network device {device} is attached already") from None


def _network_key(key: VmKey, vm_id: str, device: int) -> NetworkKey:
    """Derive what a device gets.

    The identifier (SCI, IEEE 802.1AE-2018 9.9) is a locally administered unicast address, 46 bits
    by VM and device under the network's key, and the device's number as the port: on another host
    the same VM's device has the same, and who has not the key learns nothing of the VM by it.
    """
    what = wire.text(vm_id) + wire.number(device, 2)
    with key.subkey(labels.SCI_INFO) as sci_key:
        address = bytearray(hmac.digest(sci_key, what, "sha256")[: SCI_SIZE - 2])
    address[0] = (address[0] | _LOCAL) & ~_GROUP
    with key.subkey(labels.NETWORK_KEY_INFO) as subkey:
        assert len(subkey) == NETWORK_KEY_SIZE
        return NetworkKey(bytearray(subkey), bytes(address) + wire.number(device + 1, 2))
