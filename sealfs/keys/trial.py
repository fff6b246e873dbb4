"""A trial of every slot of a key, for real, and the trouble that can be foretold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sealfs.errors import FormatError, KeyServiceError, PinNeeded, TpmUnavailable
from sealfs.keys import reports
from sealfs.keys.records import KeyRecord, PolicyKind, TpmSlot
from sealfs.keys.reports import SlotReport
from sealfs.keys.vault import Vault

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm


def trial(vault: Vault, record: KeyRecord, tpm: Tpm, pin: bytearray | None) -> list[SlotReport]:
    """Try every slot, one that takes a PIN where one is given; nothing is changed.

    Raises:
        TpmUnavailable: the TPM does not answer.
    """
    found = []
    for index, slot in enumerate(record.tpm_slots):
        state = tpm.lockout()  # another one after each wrong PIN
        lockout = (
            f"{'locked out' if state.locked else 'not locked'}, {state.failures} of "
            f"{state.failures_max} failures, one forgiven each {state.recovery_s} s"
            if state.recovery_s
            else "not counted"
        )
        trouble = ["the TPM is locked out"] if state.locked else []
        if slot.policy & PolicyKind.PIN and not state.locked and state.tries_left == 0:
            trouble.append(f"no PIN is tried before one is forgiven: {lockout}")
        trouble += _pcr_trouble(slot, tpm)
        opens: bool | None
        try:
            vault.open_slot(record, slot, tpm, pin).wipe()
            opens, detail = True, "opens"
        except PinNeeded:
            opens, detail = None, "takes a PIN; not tried"
        except TpmUnavailable:
            raise
        except KeyServiceError as error:
            opens, detail = False, error.detail
        found.append(SlotReport(index, "tpm", opens, detail, tuple(trouble), lockout))
    if record.software_slot:
        found.append(_software(vault, record, len(found)))
    for index, raw in enumerate(record.recovery_slots, start=len(found)):
        text = f"opens with recovery key {reports.recipient_text(raw)}; not tried"
        found.append(SlotReport(index, "recovery", None, text))
    return found


def _software(vault: Vault, record: KeyRecord, index: int) -> SlotReport:
    try:
        vault.open_software(record).wipe()
    except (FormatError, KeyServiceError) as error:
        return SlotReport(index, "software", False, error.detail)
    return SlotReport(index, "software", True, "opens")


def _pcr_trouble(slot: TpmSlot, tpm: Tpm) -> list[str]:
    if not slot.pcrs:
        return []
    present = tpm.pcr_values(slot.pcrs)
    trio = zip(slot.pcrs, slot.pcr_values, present, strict=True)
    return [f"PCR {pcr} is not what it was" for pcr, then, now in trio if then != now]
