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
CC_POLICY_NV: Final = 0x00000149
CC_POLICY_AUTHORIZE: Final = 0x0000016A
CC_POLICY_AUTH_VALUE: Final = 0x0000016B
CC_POLICY_PCR: Final = 0x0000017F
"""TPM 2.0 Part 2 §6.5.2."""
EO_UNSIGNED_LE: Final = 0x0009
"""TPM 2.0 Part 2 §6.8: the counter is not larger than what was signed."""
DIGEST_SIZE: Final = 32
EMPTY: Final = bytes(DIGEST_SIZE)
"""The policy digest of a session that was just started."""
COUNTER_SIZE: Final = 8
COUNTER_ATTRIBUTES: Final = 0x02040014
"""TPMA_NV (Part 2 §13.4): NO_DA, AUTHREAD, AUTHWRITE, TPM_NT_COUNTER."""
NV_WRITTEN: Final = 0x20000000
"""TPMA_NV_WRITTEN: set by the first increment, and in the Name from then on."""


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


def name_of(public: bytes) -> bytes:
    """Return the Name of a TPMT_PUBLIC or TPMS_NV_PUBLIC (TPM 2.0 Part 1 §16)."""
    return ALG_SHA256.to_bytes(2, "big") + hashlib.sha256(public).digest()


def counter_public(index: int, label: bytes) -> bytes:
    """Encode the TPMS_NV_PUBLIC of a written counter (TPM 2.0 Part 2 §13.6).

    Args:
        index: Its NV index.
        label: SHA-256 digest in the place of the policy, which no attribute lets anybody use.
    """
    return (
        index.to_bytes(4, "big")
        + ALG_SHA256.to_bytes(2, "big")
        + (COUNTER_ATTRIBUTES | NV_WRITTEN).to_bytes(4, "big")
        + len(label).to_bytes(2, "big")
        + label
        + COUNTER_SIZE.to_bytes(2, "big")
    )


def pcr_policy(pcrs: Sequence[int], values: Sequence[bytes], *, before: bytes = EMPTY) -> bytes:
    """Return the policy digest after PolicyPCR (TPM 2.0 Part 3 TPM2_PolicyPCR).

    Args:
        pcrs: Ascending.
        values: The SHA-256 value of each.
        before: The digest that the session has.
    """
    composite = hashlib.sha256(b"".join(values)).digest()
    return _extended(before, CC_POLICY_PCR, pcr_selection(pcrs) + composite)


def pin_policy(*, before: bytes = EMPTY) -> bytes:
    """Return the policy digest after TPM2_PolicyAuthValue (TPM 2.0 Part 3)."""
    return _extended(before, CC_POLICY_AUTH_VALUE, b"")


def counter_policy(name: bytes, limit: int, *, before: bytes = EMPTY) -> bytes:
    """Return the policy digest after TPM2_PolicyNV: the counter is at most `limit`.

    Args:
        name: The counter's Name, 34 bytes.
        limit: 64-bit unsigned.
        before: The digest that the session has.
    """
    operand = limit.to_bytes(COUNTER_SIZE, "big")
    offset = (0).to_bytes(2, "big")
    arguments = hashlib.sha256(operand + offset + EO_UNSIGNED_LE.to_bytes(2, "big")).digest()
    return _extended(before, CC_POLICY_NV, arguments + name)


def signed_policy(signer_name: bytes, policy_ref: bytes) -> bytes:
    """Return the policy digest after TPM2_PolicyAuthorize, whatever it was before (Part 3)."""
    # PolicyUpdate (Part 1): the reference is extended by a hash of its own.
    digest = _extended(EMPTY, CC_POLICY_AUTHORIZE, signer_name)
    return hashlib.sha256(digest + policy_ref).digest()


def slot_policy(
    *,
    signer_name: bytes = b"",
    policy_ref: bytes = b"",
    pcrs: Sequence[int] = (),
    values: Sequence[bytes] = (),
    pin: bool = False,
) -> bytes:
    """Return the digest that a slot is sealed to, empty where nothing is asked.

    The order is that of `Tpm.unseal`: PolicyAuthorize sets the digest anew, so it comes first.
    """
    digest = EMPTY
    if signer_name:
        digest = signed_policy(signer_name, policy_ref)
    if pcrs:
        digest = pcr_policy(pcrs, values, before=digest)
    if pin:
        digest = pin_policy(before=digest)
    return b"" if digest == EMPTY else digest


def _extended(before: bytes, command: int, arguments: bytes) -> bytes:
    return hashlib.sha256(before + command.to_bytes(4, "big") + arguments).digest()
