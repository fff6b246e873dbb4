"""A VM's key given to another host, and taken from one; see `enrolment` for what travels.

The key leaves wrapped to the other host's storage key, and is sealed anew there, bound to that TPM.
It is never in clear on a disk or a wire; on both hosts it is in memory for a moment.

Given away by a *move*, it leaves a tombstone: this host's record stays, so that the same move can
be made again when its package was lost, but gives the key to nobody until the VM comes back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sealfs.errors import (
    Busy,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    RolledBack,
    UsageError,
)
from sealfs.keys import names, records
from sealfs.keys.audit import AuditLog
from sealfs.keys.enrolment import HostId, Package, PackedImage
from sealfs.keys.host import Host
from sealfs.keys.ledger import RESERVED_IDS, Ledger
from sealfs.keys.opening import Opening
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord, Origin
from sealfs.keys.recovering import Recovering, is_of
from sealfs.keys.registry import Registry
from sealfs.keys.tombstone import Tombstone, Why
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm


def host_id(host: Host) -> HostId:
    """Return this host's id; its record is authenticated by the TPM first.

    Raises:
        KeyRefused, KeyRecordDamaged, TpmUnavailable: this is not the TPM of init, or no answer.
    """
    with host.tpm():
        return HostId(host.record.host_id, host.record.storage_key.public)


class Moving:
    """Giving and taking the keys of VMs; every method blocks, as the service's do."""

    def __init__(
        self,
        host: Host,
        vault: Vault,
        opening: Opening,
        recovering: Recovering,
        ledger: Ledger,
        registry: Registry,
        audit: AuditLog,
    ) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._opening = opening
        self._recovering = recovering
        self._audit = audit
        self._ledger = ledger
        self._registry = registry

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
        with self._audit.recorded("key enrolled", vm=vm_id, to_host=target.host_id.hex()) as facts:
            # Not `asked`: a VM that left already, and leaves again, is not unlocked.
            package = self._opening.with_pin(
                vm_id, lambda pin: self._packed(vm_id, target, images, pin, is_move=is_move)
            )
            facts["kmi"] = package.kmi
        return package.encode()

    def _packed(
        self,
        vm_id: str,
        target: HostId,
        images: Sequence[PackedImage],
        pin: bytearray | None,
        *,
        is_move: bool,
    ) -> Package:
        from sealfs.keys.tpm_duplicate import wrap_to

        if any(image.image_uuid in RESERVED_IDS for image in images):
            raise KeyRefused(vm_id, "an image of it has a uuid that the ledger keeps for itself")
        own = self._host.record.host_id
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            record = self._leaving(vm_id, target)
            with self._opening.open_in(record, tpm, pin) as key:
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
                    return package.with_mac(mac_key)

    def leave(self, vm_id: str, target: HostId) -> None:
        """Put up the tombstone of a move, whose package is durable; durable on return."""
        with (
            self._audit.recorded("key moved", vm=vm_id, to_host=target.host_id.hex()) as facts,
            self._state.lock() as held,
        ):
            record = self._leaving(vm_id, target)
            facts["kmi"] = record.kmi
            stone = Tombstone(Why.MOVED, record.kmi, vm_id, int(time.time()), target.host_id)
            # Crash here: the package is made and this host still opens the VM; move it again.
            self._state.write(self._state.gone_file(record.kmi), stone.encode(), held)

    def take(self, raw: bytes, subject: str, *, replace: bool = False) -> Package:
        """Make the key of a package usable here; durable on return.

        Its images are in the ledger before its key is in a record: an older copy of one never
        opens here. The key is sealed as this host's own record of it was, but without PIN and
        signer; without one, to nothing.

        Args:
            raw: the package.
            subject: names it in messages.
            replace: a network's key that is another one than this host has takes its place; what
                that asked for stays behind.

        Raises:
            FormatError, KeyRecordDamaged: not a package, or altered.
            UsageError: `replace`, of a VM: its images would be lost.
            KeyRefused: made for another host, or this host has another key for that VM.
            KeyGone: the VM was revoked here.
            RolledBack: older than what this host knew when it gave the VM away.
        """
        with self._audit.recorded("key imported", package=subject) as facts:
            package = Package.decode(raw, subject)
            facts |= {
                "vm": package.vm_id,
                "kmi": package.kmi,
                "from_host": package.from_host.hex(),
            }
            if replace and not names.is_network(package.vm_id):
                raise UsageError(subject, "holds a VM's key, which does not replace another one")
            self._take(package, subject, replace=replace)
        return package

    def _take(self, package: Package, subject: str, *, replace: bool) -> None:
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
            self._check_images(package, subject)
            if stone is None and not replace:
                self._opening.asked(key.vm_id, lambda: self._check_same(key))
            self._ledger.note({image.image_uuid: image.progress for image in package.images})
            # Crash here: lines in the ledger of images that this host has no key for.
            self._opening.asked(
                key.vm_id, lambda: self._keep(key, is_back=stone is not None, replace=replace)
            )

    def _check_images(self, package: Package, subject: str) -> None:
        """Refuse a package that speaks of another VM's image: it would be refused from then on."""
        owners = {entry.image_uuid: entry.vm_id for entry in self._registry.entries()}
        for image in package.images:
            owner = owners.get(image.image_uuid, package.vm_id)
            if owner != package.vm_id:
                raise KeyRefused(
                    subject, f'names image "{image.path}", which is registered here as VM "{owner}"'
                )

    def _check_same(self, key: VmKey) -> None:
        """Refuse a key that is not the one this host has, before anything is noted of its images.

        Raises:
            KeyRefused: this host has another one. PinNeeded: only the VM's PIN tells.
        """
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            old = self._vault.record_of_vm(key.vm_id)
            if old is None or is_of(old, key):
                return
            _check_kmi(old, key)
            self._recovering.known(old, key, tpm)

    def _keep(self, key: VmKey, *, is_back: bool, replace: bool) -> None:
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            old = self._vault.record_of_vm(key.vm_id)
            if old is not None:
                _check_kmi(old, key)
            self._vault.drop_lost_pending(key.kmi, held)
            wanted: Protection | None = Protection()
            if old is not None and is_back:
                # Its key may have changed meanwhile.
                wanted = self._recovering.kept_protection(old, key)
            elif old is not None and not replace:
                wanted = self._recovering.known(old, key, tpm)
            if wanted is not None:
                self._vault.add_own_recipient(key)
                self._vault.protect(key, Origin.IMPORTED, (wanted,), tpm, held)
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


def _check_kmi(old: KeyRecord, key: VmKey) -> None:
    if old.kmi != key.kmi:
        raise KeyRefused(key.vm_id, "this host has a key of another KMI for this VM")
