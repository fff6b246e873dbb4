"""Where a VM key and its KMI come from: the console, the key service, the TPM, or both of these.

Whoever makes the key, it is 64 bytes and protected in the same way afterwards.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Literal

from sealfs.errors import UsageError
from sealfs.keys.host import mixed_random
from sealfs.keys.records import VM_KEY_SIZE, Origin

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

KeyOrigin = Literal["mixed", "console", "service", "tpm"]
KmiKind = Literal["vm-id", "service", "tpm", "opaque"]
"""`opaque` is an older name of `service`."""

RANDOM_KMI_SIZE: Final = 16
DISTINCT_MIN: Final = 24
"""Of 64 random bytes fewer different values than this come about less than once in 2^80."""

ORIGINS: Final[dict[KeyOrigin, Origin]] = {
    "mixed": Origin.MIXED,
    "console": Origin.CONSOLE,
    "service": Origin.SERVICE,
    "tpm": Origin.TPM,
}


def check_handed_in(key: bytes | bytearray, subject: object) -> None:
    """Refuse what cannot be a key of a console's; the message says nothing of its content.

    Raises:
        UsageError: not 64 bytes, or plainly not random.
    """
    if len(key) != VM_KEY_SIZE:
        raise UsageError(subject, f"has {len(key)} bytes, a VM key has {VM_KEY_SIZE}")
    if len(set(key)) < DISTINCT_MIN:
        raise UsageError(subject, "is not random: its bytes repeat")


def raw_key(origin: KeyOrigin, handed_in: bytes | bytearray | None, tpm: Tpm) -> bytearray:
    """Return the 64 bytes of a new VM key; the caller wipes them.

    Args:
        origin: `mixed` (good when the TPM's or the kernel's random bytes are), `service` (the
            kernel's alone), `tpm` (TPM2_GetRandom alone), `console` (handed in).
        handed_in: for `console`, checked by `check_handed_in`.
        tpm: in use by the caller.
    """
    if (origin == "console") != (handed_in is not None):
        raise ValueError("a key is handed in by the console, and only by it")
    if handed_in is not None:
        return bytearray(handed_in)
    if origin == "service":
        return bytearray(os.urandom(VM_KEY_SIZE))
    if origin == "tpm":
        return bytearray(tpm.random(VM_KEY_SIZE))
    return mixed_random(tpm, VM_KEY_SIZE)


def new_kmi(kind: KmiKind, vm_id: str, tpm: Tpm) -> str:
    """Return the KMI of a new key: the VM id itself, or 32 random hexadecimal digits.

    Where it is not the VM id, the console keeps VM id and KMI in the image's identity.
    """
    if kind == "vm-id":
        return vm_id
    if kind == "tpm":
        return tpm.random(RANDOM_KMI_SIZE).hex()
    return mixed_random(tpm, RANDOM_KMI_SIZE).hex()
