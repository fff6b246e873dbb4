"""Another policy for a VM's key: a new tpm slot, and the old ones go when it is proved.

The VM key stays the same, so no image changes.
"""

from __future__ import annotations

import dataclasses

from sealfs.errors import KeyRecordDamaged, UsageError
from sealfs.keys.host import Host
from sealfs.keys.protection import Protection
from sealfs.keys.records import RECORD_VERSION, TPM_SLOT_COUNT_MAX, KeyRecord, TpmSlot
from sealfs.keys.unlocked import Unlocked
from sealfs.keys.vault import Vault


def steps(record: KeyRecord, slot: TpmSlot, *, keep: bool) -> list[KeyRecord]:
    """Return the record after each write, still without its MAC, in the present version.

    The new slot stands beside the old ones, and beside a software slot, before they go. In a full
    record the oldest gives way at once: the new one was proved before.

    Raises:
        UsageError: `keep`, and there is no room for one more.
    """
    old = record.tpm_slots
    if keep and len(old) >= TPM_SLOT_COUNT_MAX:
        raise UsageError(record.vm_id, f"has {len(old)} tpm slots, the most there may be")
    slots = (*old[max(0, len(old) - TPM_SLOT_COUNT_MAX + 1) :], slot)
    beside = dataclasses.replace(record, tpm_slots=slots, version=RECORD_VERSION)
    if keep:
        return [beside]
    return [beside, dataclasses.replace(beside, tpm_slots=(slot,), software_slot=b"")]


def reseal(
    host: Host,
    vault: Vault,
    unlocked: Unlocked,
    vm_id: str,
    wanted: Protection,
    *,
    pin: bytearray | None,
    keep: bool,
) -> None:
    """Give a VM's key a new tpm slot; durable on return.

    Args:
        host: Whose TPM seals it.
        vault: Its key records.
        unlocked: Keys that are open already.
        vm_id: Whose key.
        wanted: What the new slot asks for.
        pin: What opens the key as it is now, where it takes a PIN.
        keep: Leave the old slots beside the new one, a software slot as well.

    Raises:
        KeyNotFound, KeyGone: the VM has no key here.
        Busy: its key is being rotated.
        UsageError: no room for one more slot.
        KeyServiceError: the key does not open as it is, or not by the new slot; nothing changed.
    """
    with host.state.lock() as held, host.tpm_under(held) as tpm:
        record = vault.changeable(vm_id)
        file = host.state.record_file(record.kmi)
        with unlocked.copy_of(record) or vault.open_record(record, tpm, pin) as key:
            for step in steps(record, vault.make_slot(key, wanted, tpm), keep=keep):
                news = vault.proved(step, key, wanted, tpm)
                host.state.write(file, news.encode(), held)
                # Crash here, the first time: old and new slots stand, each opens as it says.
                if vault.read(file, kmi=record.kmi) != news:
                    raise KeyRecordDamaged(vm_id, "its new record does not read back as written")
