"""Who can open a VM's key besides this host, and that nobody can any more.

Recovery slots are kept in the key record, authenticated under the VM key, and copied into the
identities of the VM's images by the caller. A revoked key leaves a tombstone.

Every method blocks, as the service's do, and takes the state lock.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sealfs.keys import records, recovery, reports
from sealfs.keys.audit import AuditLog
from sealfs.keys.host import Host, mixed_random
from sealfs.keys.opening import Opening
from sealfs.keys.tombstone import Tombstone, Why
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import wipe


class RecoveryMade(NamedTuple):
    """A VM's recovery slots, and the one made last: its name, and its key to print once."""

    slots: tuple[bytes, ...]
    fingerprint: str | None
    recovery_key: str | None

    def __repr__(self) -> str:
        return f"<RecoveryMade {self.fingerprint}>"


class Slots:
    """Changes of the recovery slots of VM keys, and the end of VM keys."""

    def __init__(self, host: Host, vault: Vault, opening: Opening, audit: AuditLog) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._opening = opening
        self._audit = audit

    def recovery(
        self, vm_id: str, *, is_new: bool, recipient: bytes | None, subject: str
    ) -> RecoveryMade:
        """Return a VM's recovery slots, with a new one where that is asked for; durable on return.

        Args:
            vm_id: whose key.
            is_new: wrap it to one recipient more.
            recipient: his public key, as `recovery.parse_public` reads it; None: a key is made.
            subject: names the recipient's file in messages.

        Raises:
            KeyNotFound, KeyGone, KeyRefused, KeyRecordDamaged, TpmUnavailable: as by unsealing.
            Busy: the VM's key is being rotated.
            UsageError: not a public key.
        """
        public = None if recipient is None else recovery.parse_public(recipient, subject)
        if not is_new:
            return self._opening.asked(vm_id, lambda: self._recovery(vm_id, None, is_new=False))
        with self._audit.recorded("key recovery changed", vm=vm_id) as facts:
            made = self._opening.asked(vm_id, lambda: self._recovery(vm_id, public, is_new=True))
            facts["recipients"] = made.fingerprint or ""
        return made

    def _recovery(self, vm_id: str, public: bytes | None, *, is_new: bool) -> RecoveryMade:
        text = None
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            record = self._vault.changeable(vm_id)
            slots = record.recovery_slots
            with self._opening.open_in(record, tpm) as key:
                if is_new and public is None:
                    raw = mixed_random(tpm, recovery.KEY_SIZE)
                    private = X25519PrivateKey.from_private_bytes(bytes(raw))
                    wipe(raw)
                    public, text = recovery.public_of(private), recovery.format_private(private)
                if public is not None:
                    with key.secret() as secret:
                        new = recovery.wrap(secret, public, vm_id=vm_id, kmi=key.kmi)
                    slots = recovery.slots_of_vm((*slots, new), records.binding(vm_id, key.kmi))
                    self._vault.keep_slots(record, key, slots, held)
        name = None if public is None else recovery.fingerprint(public).hex()
        return RecoveryMade(slots, name, text)

    def revoke(self, vm_id: str) -> None:
        """Put up the tombstone of a VM whose key is destroyed; durable on return.

        From here on its key is given to nobody. Asks no TPM. Once more does no harm.

        Raises:
            KeyNotFound: the VM has no key here.
            KeyGone: it was moved; its images may be in use there.
        """
        with self._audit.recorded("key revoked", vm=vm_id) as facts, self._state.lock() as held:
            kmi = facts["kmi"] = self._vault.kmi_to_revoke(vm_id)
            stone = self._vault.tombstone(kmi)
            if stone is not None and stone.why is Why.MOVED:
                raise stone.error(reports.time_text(stone.when))
            if stone is None:
                stone = Tombstone(Why.REVOKED, kmi, vm_id, int(time.time()))
                self._state.write(self._state.gone_file(kmi), stone.encode(), held)

    def destroy(self, vm_id: str) -> None:
        """Overwrite and remove what gave the key of a revoked VM; durable on return."""
        with self._state.lock() as held:
            kmi = self._vault.kmi_to_revoke(vm_id)
            stone = self._vault.tombstone(kmi)
            if stone is None or stone.why is not Why.REVOKED:
                raise AssertionError("revoke comes first")
            for file in (self._state.pending_file(kmi), self._state.record_file(kmi)):
                if self._state.has(file):
                    # In place: the slots of a removed file could be read from the disk. What a
                    # copy-on-write file system keeps besides, the TPM alone could open.
                    self._state.append(file, 0, bytes(records.RECORD_SIZE_MAX), held)
                    # Crash here: a record that cannot be read, behind its tombstone.
                    self._state.remove(file, held)
