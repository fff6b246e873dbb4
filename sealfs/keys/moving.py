"""A VM's key given to another host, and taken from one; see `enrolment` for what travels.

The key leaves wrapped to the other host's storage key, and is sealed anew there, bound to that TPM.
It is never in clear on a disk or a wire; on both hosts it is in memory for a moment.

Given away by a *move*, it leaves a tombstone: this host's record stays, so that the same move can
be made again when its package was lost, but gives the key to nobody until the VM comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sealfs.errors import (
    Busy,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    RolledBack,
)
from sealfs.keys import records
from sealfs.keys.enrolment import HostId, Package, PackedImage
from sealfs.keys.host import Host
from sealfs.keys.ledger import Ledger
from sealfs.keys.records import KeyRecord, Origin
from sealfs.keys.tombstone import Tombstone, Why
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

Known = Callable[[KeyRecord, VmKey, "Tpm"], tuple[bool, tuple[int, ...]]]
"""Says of a record that stands whether it gives this very key, and else which PCRs to keep."""


def host_id(host: Host) -> HostId:
    """Return this host's id; its record is authenticated by the TPM first.

    Raises:
        KeyRefused, KeyRecordDamaged, TpmUnavailable: this is not the TPM of init, or no answer.
    """
    with host.tpm():
        return HostId(host.record.host_id, host.record.storage_key.public)


class Moving:
    """Giving and taking the keys of VMs; every method blocks, as the service's do."""

    def __init__(self, host: Host, vault: Vault, ledger: Ledger) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._ledger = ledger

    def check_may_leave(self, vm_id: str, target: HostId) -> None:
        """Refuse what cannot be given away: moved elsewhere, revoked, being changed.

        Raises:
            KeyNotFound, KeyGone, Busy: as said.
            UsageError: nothing can be wrapped to that host.
        """
        from sealfs.keys.tpm_duplicate import check_storage_key

        check_storage_key(target.public, target.host_id.hex())
        if target.host_id == self._host.record.host_id:
            raise KeyRefused(vm_id, "is on that host already: it is this one")
        self._leaving(vm_id, target)

    def pack(
        self, vm_id: str, target: HostId, images: Sequence[PackedImage], *, is_move: bool
    ) -> bytes:
        """Return the package for a host whose fingerprint was compared; nothing is changed here.

        Args:
            vm_id: whose key.
            target: accepted by `check_may_leave`.
            images: of the VM, as far as this host knows them.
            is_move: whether a tombstone will follow.

        Raises:
            As `check_may_leave` and unsealing.
        """
        from sealfs.keys.tpm_duplicate import wrap_to

        own = self._host.record.host_id
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            record = self._leaving(vm_id, target)
            with self._vault.open_record(record, tpm) as key:
                with key.secret() as secret:
                    payload = records.vm_payload(vm_id, record.kmi, secret)
                try:
                    wrapped = wrap_to(target.public, payload)
                finally:
                    wipe(payload)
                package = Package(
                    is_move, own, target.host_id, target.key_name, int(time.time()), record.kmi,
                    vm_id, *wrapped, record.recovery_slots, tuple(images),
                )  # fmt: skip
                with key.package_mac_key() as mac_key:
                    return package.with_mac(mac_key).encode()

    def leave(self, vm_id: str, target: HostId) -> None:
        """Put up the tombstone of a move, whose package is durable; durable on return."""
        with self._state.lock() as held:
            record = self._leaving(vm_id, target)
            stone = Tombstone(Why.MOVED, record.kmi, vm_id, int(time.time()), target.host_id)
            # Crash here: the package is made and this host still opens the VM; move it again.
            self._state.write(self._state.gone_file(record.kmi), stone.encode(), held)

    def take(self, raw: bytes, subject: str, known: Known) -> Package:
        """Make the key of a package usable here; durable on return.

        Its images are in the ledger before its key is in a record: an older copy of one never
        opens here.

        Args:
            raw: the package.
            subject: names it in messages.
            known: says what a record that stands already is worth.

        Raises:
            FormatError, KeyRecordDamaged: not a package, or altered.
            KeyRefused: made for another host, or this host has another key for that VM.
            KeyGone: the VM was revoked here.
            RolledBack: older than what this host knew when it gave the VM away.
        """
        package = Package.decode(raw, subject)
        own = self._host.record
        if (package.to_host, package.to_key_name) != (own.host_id, own.storage_key.name):
            raise KeyRefused(
                subject, f"was made for host {package.to_host.hex()}, this is {own.host_id.hex()}"
            )
        with self._host.tpm() as tpm:
            key = self._unpacked(package, subject, tpm)
        with key:
            stone = self._vault.tombstone(package.kmi)
            if stone is None:
                self._vault.check_not_gone(package.vm_id)
            elif stone.why is not Why.MOVED:
                self._vault.read_known(package.kmi)
            else:
                self._check_newer(package, subject)
            self._ledger.note({image.image_uuid: image.progress for image in package.images})
            # Crash here: lines in the ledger of images that this host has no key for.
            self._keep(key, is_back=stone is not None, known=known)
        return package

    def _keep(self, key: VmKey, *, is_back: bool, known: Known) -> None:
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            old = self._vault.record_of_vm(key.vm_id)
            if old is not None and old.kmi != key.kmi:
                raise KeyRefused(key.vm_id, "this host has a key of another KMI for this VM")
            is_there, pcrs = (False, ()) if old is None or is_back else known(old, key, tpm)
            if not is_there:
                self._vault.add_own_recipient(key)
                self._vault.protect(key, Origin.IMPORTED, pcrs, tpm, held)
            # Crash here: the key stands, and the tombstone before it; taken again, it opens.
            self._state.remove(self._state.gone_file(key.kmi), held)

    def _leaving(self, vm_id: str, target: HostId) -> KeyRecord:
        """Return the record of a VM that may go to that host, also again."""
        record = self._vault.record_of_vm(vm_id)
        stone = None if record is None else self._vault.tombstone(record.kmi)
        if stone is None or (stone.why, stone.to_host) != (Why.MOVED, target.host_id):
            self._vault.check_not_gone(vm_id)
        if record is None:
            raise KeyNotFound(vm_id, "this host has no key for it")
        if self._vault.read_pending(record.kmi) is not None:
            raise Busy(vm_id, "its key is being rotated: finish that by `key rotate` first")
        return record

    def _unpacked(self, package: Package, subject: str, tpm: Tpm) -> VmKey:
        sealed = tpm.import_object(package.public, package.duplicate, package.seed, subject)
        payload = tpm.unseal(sealed, subject=subject)
        try:
            raw_key = records.open_vm_payload(payload, package.vm_id, package.kmi)
        finally:
            wipe(payload)
        key = VmKey(
            raw_key,
            vm_id=package.vm_id,
            kmi=package.kmi,
            recovery_slots=package.recovery_slots,
        )
        with key.package_mac_key() as mac_key:
            if package.is_authentic(mac_key):
                return key
        key.wipe()
        raise KeyRecordDamaged(subject, "the package does not authenticate: it was altered")

    def _check_newer(self, package: Package, subject: str) -> None:
        """Refuse a package of before the VM left this host."""
        for image in package.images:
            noted = self._ledger.find(image.image_uuid)
            if noted is not None and image.progress.sequence < noted.sequence:
                raise RolledBack(
                    subject,
                    f'knows image "{image.path}" at change {image.progress.sequence}, and this '
                    f"host has seen it at change {noted.sequence}: an older package",
                )
