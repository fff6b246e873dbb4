"""What each TPM return code means for sealfs: which typed error, in words a person can act on.

Pure: works on the integer. Codes are TPM 2.0 Part 2 §6.6 (layer 0), TSS 2.0 Overview §8 (others).
Each row was met in the laboratory against swtpm or is marked (H): hardware, from documentation.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from sealfs.errors import (
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    LockedOut,
    TpmUnavailable,
    WrongPin,
)

ESAPI_LAYER: Final = 7
MARSHAL_LAYER: Final = 9
TCTI_LAYER: Final = 10
RESOURCE_MANAGER_LAYERS: Final = frozenset({11, 12})

FORMAT_ONE: Final = 0x080
INITIALIZE: Final = 0x100
OBJECT_MEMORY: Final = 0x902
SESSION_MEMORY: Final = 0x903
AUTH_FAIL: Final = 0x08E
HANDLE: Final = 0x08B
VALUE: Final = 0x084
SIGNATURE: Final = 0x09B
POLICY_FAIL: Final = 0x09D
BAD_AUTH: Final = 0x0A2
POLICY_NV: Final = 0x126
PCR_CHANGED: Final = 0x128
AUTH_UNAVAILABLE: Final = 0x12F
NV_AUTHORIZATION: Final = 0x149
NV_UNINITIALIZED: Final = 0x14A
NV_SPACE: Final = 0x14B
NV_DEFINED: Final = 0x14C
REFERENCE_H0: Final = 0x910
REFERENCE_S0: Final = 0x918
LOCKOUT: Final = 0x921
TCTI_UNKNOWN: Final = 0xA0015
RESPONSE_FORGED: Final = 0x7001B

WAIT: Final = frozenset({0x908, 0x90A, 0x920, 0x922, 0x923})
"""(H) YIELDED, TESTING, NV_RATE, RETRY, NV_UNAVAILABLE: the TPM asks to come again."""
STRAYS: Final = frozenset({OBJECT_MEMORY, SESSION_MEMORY})
LOST: Final = frozenset({*range(REFERENCE_H0, REFERENCE_H0 + 7), *range(REFERENCE_S0, 0x91F)})
"""An object or session vanished: the TPM was reset under us."""


class Act(Enum):
    """What the TPM was asked for; the same code means different things at different calls."""

    OPEN = "open the TPM"
    PROVISION = "set up the storage key"
    SEAL = "seal a key"
    LOAD = "load a key record"
    IMPORT = "import a key"
    UNSEAL = "unseal a key"
    PIN = "unseal a key with its PIN"
    READ = "read the TPM's state"
    COUNTER = "use the NV counter"


def normalised(code: int) -> int:
    """Drop handle, parameter and session numbers, and the resource manager's layer."""
    layer, low = code >> 16, code & 0xFFFF
    if layer in RESOURCE_MANAGER_LAYERS:
        layer = 0
    if layer == 0 and low & FORMAT_ONE:
        return low & (FORMAT_ONE | 0x3F)
    return layer << 16 | low


def is_context_dead(code: int) -> bool:
    """Whether the ESAPI context must be thrown away: it never recovers from an I/O error."""
    return code >> 16 in (ESAPI_LAYER, TCTI_LAYER)


def may_pass(code: int) -> bool:
    """Whether the same call may do when it is made again, of what was just made anew."""
    return is_context_dead(code) or normalised(code) in WAIT | STRAYS | LOST


def error_of(code: int, act: Act, subject: object, cause: str | None = None) -> KeyServiceError:
    """Return the typed error for a return code.

    Args:
        code: As the TSS gave it.
        act: The call that failed.
        subject: What it was about: a VM id, a TPM.
        cause: What the channel said, where it failed.
    """
    known = normalised(code)
    layer = known >> 16
    if layer in (TCTI_LAYER, ESAPI_LAYER):
        return _transport_error(code, act, subject, cause)
    is_about_object = known & FORMAT_ONE or layer == MARSHAL_LAYER
    if act is Act.LOAD and is_about_object and known not in (BAD_AUTH, HANDLE):
        # The storage key was compared with its pin before, so another TPM is excluded.
        return KeyRecordDamaged(
            subject, f"its sealed object is not one this TPM made, or was altered ({code:#x})"
        )
    if known == LOCKOUT:
        return LockedOut(subject, f"{_LOCKED_OUT} ({code:#x})")
    if act is Act.PIN and known == AUTH_FAIL:
        return WrongPin(subject, None)
    if act is Act.IMPORT and is_about_object and known not in (BAD_AUTH, HANDLE):
        return KeyRecordDamaged(
            subject, f"its package was altered, or wrapped to another TPM ({code:#x})"
        )
    sentence = _REFUSALS.get(known)
    if sentence is None and act in (Act.UNSEAL, Act.PIN):
        sentence = _UNAPPROVED.get(known)
    if sentence is not None:
        return KeyRefused(subject, f"{sentence} ({code:#x})")
    if known in (AUTH_FAIL, BAD_AUTH):
        return _authorisation_error(code, act, subject)
    return TpmUnavailable(
        subject, _TROUBLES.get(known, f"the TPM could not {act.value}"), code=code
    )


_LOCKED_OUT: Final = (
    "the TPM is locked out after failed authorisations; it recovers by itself, one try for each "
    "recovery interval"
)

_UNAPPROVED: Final = {
    VALUE: "the signed policy is not for the present state of this host",
    SIGNATURE: "the signature of the signed policy does not verify: it was altered",
    POLICY_NV: "the signed policy was revoked",
}

_REFUSALS: Final = {
    POLICY_FAIL: "the platform state (PCRs) is not the one this key was sealed to: firmware, boot "
    "loader or kernel changed, or somebody else's did; the recovery key opens it",
    PCR_CHANGED: "a PCR changed while the key was being opened; try again",
    AUTH_UNAVAILABLE: "this key opens by its policy only, and its record names none: it was edited",
    HANDLE: "the TPM does not hold what was set up at init: it was cleared or is another one",
}

_TROUBLES: Final = {
    INITIALIZE: "the TPM was not started: TPM2_Startup is missing (firmware, or swtpm without "
    "--flags startup-clear)",
    OBJECT_MEMORY: "the TPM has no room for another object; other programs hold them",
    SESSION_MEMORY: "the TPM has no room for another session; other programs hold them",
    NV_SPACE: "the TPM's non-volatile memory is full",
    NV_DEFINED: "the NV index or the persistent handle is taken",
    NV_UNINITIALIZED: "the NV counter was never written",
    NV_AUTHORIZATION: "the NV counter does not accept this host's authorisation",
    **dict.fromkeys(WAIT, "the TPM stays busy"),
    **dict.fromkeys(LOST, "the TPM was reset while in use"),
}


def _transport_error(code: int, act: Act, subject: object, cause: str | None) -> KeyServiceError:
    if code == RESPONSE_FORGED:
        return TpmUnavailable(
            subject,
            "a response does not authenticate: something between sealfs and the TPM altered it",
            code=code,
        )
    if code == TCTI_UNKNOWN:
        return TpmUnavailable(subject, "no such kind of TPM connection is installed", code=code)
    reason = f": {cause}" if cause else ""
    return TpmUnavailable(subject, f"the TPM does not answer ({act.value}){reason}", code=code)


def _authorisation_error(code: int, act: Act, subject: object) -> KeyServiceError:
    if act is Act.PROVISION:
        return TpmUnavailable(
            subject, "the TPM's owner hierarchy has a password; init needs it empty", code=code
        )
    if act is Act.COUNTER:
        return KeyRefused(subject, f"the NV counter is not this host's ({code:#x})")
    return KeyRefused(
        subject,
        "the TPM does not hold the storage key pinned at init: it was cleared, is another one, "
        f"or something stands between ({code:#x})",
    )
