"""PINs: what one may look like, and what the TPM is given in its place.

The TPM compares, counts and waits; nothing on disk can tell a right PIN from a wrong one.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sealfs.errors import UsageError
from sealfs.keys import labels
from sealfs.keys.vmkey import derived, wipe

PIN_SIZE_MIN: Final = 4
PIN_SIZE_MAX: Final = 128
"""Bytes. A TPM allows some ten tries a day or so; four digits are a chance of one in a thousand."""
SUBJECT: Final = "PIN"


def pin_of(text: str) -> bytearray:
    """Return a PIN as typed or read from a file, without the line's end; the caller wipes it.

    Raises:
        UsageError: too short, too long, or with a control character; never says which one.
    """
    typed = unicodedata.normalize("NFC", text.rstrip("\r\n"))
    try:
        pin = bytearray(typed, "utf-8")
    except UnicodeEncodeError:
        raise UsageError(SUBJECT, "is not text") from None
    if not PIN_SIZE_MIN <= len(pin) <= PIN_SIZE_MAX:
        size = len(pin)
        wipe(pin)
        raise UsageError(SUBJECT, f"has {size} bytes, {PIN_SIZE_MIN} to {PIN_SIZE_MAX} are allowed")
    if any(unicodedata.category(letter) == "Cc" for letter in typed):
        wipe(pin)
        raise UsageError(SUBJECT, "contains a control character")
    return pin


@contextmanager
def authorisation(pin: bytearray, binding: bytes) -> Iterator[bytearray]:
    """Lend the authValue of a sealed object: 32 bytes, the most that SHA-256 objects take.

    `binding` is the VM's: two VMs with one PIN have different ones.
    """
    with derived(pin, info=labels.PIN_INFO + binding) as auth:
        yield auth
