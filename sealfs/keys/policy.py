"""TPM policy digests computed in software, equal to what a TPM's trial session returns.

Pure. SHA-256 bank and SHA-256 policies only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

from sealfs.errors import UsageError

PCR_COUNT: Final = 24
"""TPM 2.0 PC Client profile: PCR 0 to 23."""
SELECT_SIZE: Final = 3
ALG_SHA256: Final = 0x000B
"""TPM 2.0 Part 2 §6.3."""
CC_POLICY_PCR: Final = 0x0000017F
"""TPM 2.0 Part 2 §6.5.2."""


def check_pcrs(pcrs: Sequence[int]) -> tuple[int, ...]:
    """Return the PCR list sorted.

    Raises:
        UsageError: a number outside 0 to 23, or twice.
    """
    wrong = [pcr for pcr in pcrs if not 0 <= pcr < PCR_COUNT]
    if wrong:
        raise UsageError(wrong[0], f"is not a PCR; 0 to {PCR_COUNT - 1} are")
    if len(set(pcrs)) != len(pcrs):
        raise UsageError(",".join(map(str, pcrs)), "names a PCR twice")
    return tuple(sorted(pcrs))


def pcr_selection(pcrs: Sequence[int]) -> bytes:
    """Encode TPML_PCR_SELECTION with one SHA-256 bank (TPM 2.0 Part 2 §10.9.7)."""
    bitmap = sum(1 << pcr for pcr in pcrs)
    return (
        (1).to_bytes(4, "big")
        + ALG_SHA256.to_bytes(2, "big")
        + bytes([SELECT_SIZE])
        + bitmap.to_bytes(SELECT_SIZE, "little")
    )


def pcr_policy(pcrs: Sequence[int], values: Sequence[bytes]) -> bytes:
    """Return the policy digest of one PolicyPCR (TPM 2.0 Part 3 TPM2_PolicyPCR).

    Args:
        pcrs: Ascending.
        values: The SHA-256 value of each.
    """
    composite = hashlib.sha256(b"".join(values)).digest()
    return hashlib.sha256(
        bytes(32) + CC_POLICY_PCR.to_bytes(4, "big") + pcr_selection(pcrs) + composite
    ).digest()
