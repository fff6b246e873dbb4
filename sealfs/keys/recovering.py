"""A VM's key that came from elsewhere, by recovery key or package, beside what this host has."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sealfs.errors import (
    FormatError,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    PinNeeded,
    TpmUnavailable,
)
from sealfs.keys import records, recovery, reports
from sealfs.keys.host import Host
from sealfs.keys.opening import Opening
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord, Origin, PolicyKind
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

_log = logging.getLogger(__name__)


class Recovering:
    """What this host's records are worth where a key comes from elsewhere."""

    def __init__(self, host: Host, vault: Vault, opening: Opening) -> None:
        self._host = host
        self._state = host.state
        self._vault = vault
        self._opening = opening

    def recover(
        self, vm_id: str, kmi: str, recovery_slots: Sequence[bytes], recovery_key: str
    ) -> VmKey:
        """Open a recovery slot and make the key usable here; see `KeyService.recover`."""
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
                wanted = Protection()
                self._vault.drop_lost_pending(kmi, held)
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
                    wanted = self.kept_protection(old, recovered)
                self._vault.add_own_recipient(recovered)
                self._vault.protect(recovered, Origin.RECOVERED, (wanted,), tpm, held)
        except BaseException:
            recovered.wipe()
            raise
        return recovered

    def known(self, old: KeyRecord, key: VmKey, tpm: Tpm) -> Protection | None:
        """Return how a key that came in a package is to be sealed here; None: it is already.

        Raises:
            PinNeeded: only the VM's PIN tells whether this host has the same key.
            KeyRefused: this host holds another key for that VM.
        """
        existing = self._existing(old, key, tpm, can_ask=True)
        if existing is None:
            return self.kept_protection(old, key)
        existing.wipe()
        return None

    @staticmethod
    def kept_protection(old: KeyRecord, recovered: VmKey) -> Protection:
        """Return what a recovered key's new slot asks for, by its newest old one.

        Nothing, where that was another key's.
        """
        if not (old.tpm_slots and is_of(old, recovered)):
            return Protection()
        slot = old.tpm_slots[-1]
        lost = slot.policy & ~PolicyKind.PCRS
        if lost:
            _log.warning(
                "the key of %r opens without %s now; `sealfs key reseal` sets it again",
                recovered.vm_id,
                reports.policy_text(lost),
            )
        return Protection(slot.pcrs)

    def _existing(
        self, old: KeyRecord, recovered: VmKey, tpm: Tpm, *, can_ask: bool = False
    ) -> VmKey | None:
        """Return the key that this host's record gives, None where it gives none.

        Raises:
            PinNeeded: `can_ask`, and it takes a PIN.
        """
        if old.vm_id != recovered.vm_id:
            raise KeyRefused(old.kmi, f"this host holds it as the key of VM {old.vm_id!r}")
        try:
            existing = self._opening.open_in(old, tpm)
        except TpmUnavailable:
            raise
        except KeyServiceError as error:
            if can_ask and isinstance(error, PinNeeded):
                raise
            # Its MAC says whose key it holds, where no slot does now. One of a TPM that is gone, or
            # that was edited, gives no key any more; any other may be the VM's only one.
            is_shut = isinstance(error, KeyRefused) and self._vault.own_slots(old)
            if is_shut and not is_of(old, recovered):
                raise KeyRefused(
                    recovered.vm_id,
                    "this host holds another key for this VM than the slot does, which does not "
                    f"open now: {error.detail}",
                ) from error
            _log.warning("replacing the key record of %r: %s", recovered.vm_id, error)
            return None
        if _is_same(existing, recovered):
            return existing
        existing.wipe()
        pending = self._vault.read_pending(old.kmi)
        if pending is not None:
            # The key that the VM is being changed to may be the one.
            existing = self._opening.open_in(pending, tpm)
            if _is_same(existing, recovered):
                return existing
            existing.wipe()
        raise KeyRefused(
            recovered.vm_id, "this host holds another key for this VM than the slot does"
        )


def is_of(record: KeyRecord, key: VmKey) -> bool:
    """Whether a record authenticates under a key."""
    with key.record_mac_key() as mac_key:
        return record.is_authentic(mac_key)


def _is_same(one: VmKey, other: VmKey) -> bool:
    with one.secret() as ours, other.secret() as theirs:
        return hmac.compare_digest(ours, theirs)
