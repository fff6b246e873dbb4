"""Recovery: a VM key wrapped to a recipient's X25519 key, and how that key is printed.

Pure: keys come in as arguments. A slot is HPKE base mode (RFC 9180: DHKEM(X25519), HKDF-SHA256,
AES-256-GCM); its header, with the digest of VM id and KMI, is the `info`, so a slot opens for its
own VM only. Base mode says who can open a slot, never who made it: whoever can alter an image can
put a slot of his own there. What comes out is as trustworthy as where the slot came from.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from sealfs.errors import FormatError, KeyRecordDamaged, RecoveryRefused, UsageError
from sealfs.keys import labels, wire
from sealfs.keys.records import BINDING_SIZE, RECOVERY_SLOT_SIZE_MAX, VM_KEY_SIZE, binding

SLOT_VERSION: Final = 2
"""Version 1 names its recipient by fingerprint alone, so nothing new can be wrapped to him."""
RECIPIENT_SIZE: Final = 32
FINGERPRINT_SIZE: Final = 16
WRAPPED_SIZE: Final = 32 + VM_KEY_SIZE + 16
"""Encapsulated key, ciphertext, tag (RFC 9180 §4.1, §7.1)."""

# The letters of modhex: their keys stay where they are on most keyboard layouts.
ALPHABET: Final = "cbdefghijklnrtuv"
KEY_SIZE: Final = 32
CHECKSUM_SIZE: Final = 4
GROUP_SIZE: Final = 8
TEXT_SIZE: Final = 2 * (KEY_SIZE + CHECKSUM_SIZE)
SEPARATORS: Final = " \t\r\n-_.\u00a0\u2010\u2011\u2012\u2013\u2014"
PEM_START: Final = "-----BEGIN"

_SUBJECT: Final = "recovery key"
_PUBLIC_SIZE_MAX: Final = 16 * 1024


def public_of(private: X25519PrivateKey) -> bytes:
    """Return the 32 bytes of the public key."""
    return private.public_key().public_bytes_raw()


def fingerprint(recipient: bytes) -> bytes:
    """Return the digest by which slots and people name a recipient."""
    return hashlib.sha256(labels.RECOVERY_FINGERPRINT + recipient).digest()[:FINGERPRINT_SIZE]


def format_private(private: X25519PrivateKey) -> str:
    """Return the private key as nine groups of eight letters; the last one is a checksum."""
    raw = private.private_bytes_raw()
    letters = "".join(ALPHABET[byte >> 4] + ALPHABET[byte & 15] for byte in raw + _checksum(raw))
    return "-".join(
        letters[start : start + GROUP_SIZE] for start in range(0, TEXT_SIZE, GROUP_SIZE)
    )


def parse_private(text: str) -> X25519PrivateKey:
    """Read a printed recovery key, or an X25519 private key in PEM.

    Case, spaces, line breaks and dashes do not matter.

    Raises:
        RecoveryRefused: mistyped; the message says where, never what.
    """
    if PEM_START in text:
        return _private_from_pem(text)
    letters = [letter for letter in text.lower() if letter not in SEPARATORS]
    for position, letter in enumerate(letters, start=1):
        if letter not in ALPHABET:
            raise RecoveryRefused(
                _SUBJECT, f'letter {position} is not one of "{ALPHABET}": mistyped'
            )
    if len(letters) != TEXT_SIZE:
        raise RecoveryRefused(
            _SUBJECT, f"has {len(letters)} letters, {TEXT_SIZE} are expected: mistyped"
        )
    digits = [ALPHABET.index(letter) for letter in letters]
    raw = bytes(high << 4 | low for high, low in zip(digits[::2], digits[1::2], strict=True))
    key, checksum = raw[:KEY_SIZE], raw[KEY_SIZE:]
    if not hmac.compare_digest(checksum, _checksum(key)):
        raise RecoveryRefused(_SUBJECT, "its checksum does not fit: at least one letter is wrong")
    return X25519PrivateKey.from_private_bytes(key)


def _private_from_pem(text: str) -> X25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(text.encode("utf-8"), password=None)
    except (ValueError, TypeError, UnicodeEncodeError):
        # The library's message may quote the input, so it is not repeated.
        raise RecoveryRefused(_SUBJECT, "is not a readable PEM private key") from None
    if not isinstance(key, X25519PrivateKey):
        raise RecoveryRefused(_SUBJECT, "is a PEM private key, but not an X25519 one")
    return key


def parse_public(raw: bytes, subject: str) -> bytes:
    """Read an organisation's public recovery key: X25519 in PEM, or 64 hexadecimal digits.

    Raises:
        UsageError: neither, or a point that gives no secret.
    """
    try:
        if len(raw) > _PUBLIC_SIZE_MAX:
            raise ValueError("too long")
        text = raw.decode("ascii")
        if PEM_START in text:
            key = serialization.load_pem_public_key(raw)
            if not isinstance(key, X25519PublicKey):
                raise ValueError("not an X25519 key")
            recipient = key.public_bytes_raw()
        else:
            recipient = bytes.fromhex(text.strip())
        # Proves the point usable (not of small order) before any key depends on it.
        _suite().encrypt(b"", X25519PublicKey.from_public_bytes(recipient))
    except ValueError as error:
        raise UsageError(
            subject, "is not an X25519 public key (PEM, or 64 hexadecimal digits)"
        ) from error
    return recipient


@dataclass(frozen=True, slots=True)
class RecoverySlot:
    """A wrapped VM key; self-describing, may stand anywhere.

    `recipient` is his public key, empty in a slot of version 1. It is as trustworthy as what
    authenticates the slot: a key record under its VM key.
    """

    recipient_fingerprint: bytes
    binding: bytes
    wrapped: bytes
    recipient: bytes = b""

    def header(self) -> bytes:
        """Return what stands before the wrapped key, and in its HPKE info."""
        version = SLOT_VERSION if self.recipient else 1
        return b"".join(
            (
                labels.RECOVERY_SLOT_MAGIC,
                wire.number(version, 2),
                self.recipient or self.recipient_fingerprint,
                self.binding,
            )
        )

    def encode(self) -> bytes:
        raw = self.header() + self.wrapped
        assert len(raw) <= RECOVERY_SLOT_SIZE_MAX
        return raw

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse a slot.

        Raises:
            FormatError: not a recovery slot, or of another version.
            KeyRecordDamaged: of the wrong size.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.RECOVERY_SLOT_MAGIC, "recovery slot")
        version = reader.number(2)
        if version == 1:
            recipient, name = b"", reader.take(FINGERPRINT_SIZE)
        elif version == SLOT_VERSION:
            recipient = reader.take(RECIPIENT_SIZE)
            name = fingerprint(recipient)
        else:
            raise FormatError(
                subject,
                f"the recovery slot has format version {version}, this sealfs reads 1 to "
                f"{SLOT_VERSION}",
            )
        slot = cls(name, reader.take(BINDING_SIZE), reader.take(WRAPPED_SIZE), recipient)
        reader.finish()
        return slot


def wrap(key: bytearray, recipient: bytes, *, vm_id: str, kmi: str) -> bytes:
    """Return a recovery slot: the VM key for whoever holds `recipient`'s private key.

    HPKE draws a new ephemeral key for each call and uses its AEAD key for one message, so the
    nonce (sequence number 0, RFC 9180 §5.2) never meets the same key again.
    """
    slot = RecoverySlot(fingerprint(recipient), binding(vm_id, kmi), b"", recipient)
    wrapped = _suite().encrypt(
        key,
        X25519PublicKey.from_public_bytes(recipient),
        info=labels.RECOVERY_INFO + slot.header(),
    )
    return slot.header() + wrapped


def recipient_of(slot: bytes) -> tuple[str, bytes | None]:
    """Return (fingerprint, public key) of whoever can open a slot, by what it says.

    The key is None in a slot of version 1; the fingerprint is `?` where it cannot be read.
    """
    try:
        found = RecoverySlot.decode(slot, "recovery slot")
    except (FormatError, KeyRecordDamaged):
        return "?", None
    return found.recipient_fingerprint.hex(), found.recipient or None


def slots_of_vm(slots: Iterable[bytes], vm_binding: bytes) -> tuple[bytes, ...]:
    """Return the slots that are of this VM, one for each recipient, in order."""
    found: dict[bytes, bytes] = {}
    for raw in slots:
        try:
            slot = RecoverySlot.decode(raw, "recovery slot")
        except (FormatError, KeyRecordDamaged):
            continue
        if slot.binding == vm_binding:
            found.setdefault(slot.recipient_fingerprint, raw)
    return tuple(found.values())


def slots_for(
    private: X25519PrivateKey, slots: Iterable[bytes], vm_binding: bytes
) -> tuple[bytes, ...]:
    """Return the slots of this VM for one recovery key; what an image carries is not trusted.

    Another slot may have been put there to have the *next* key of the VM wrapped to its recipient.
    """
    own = fingerprint(public_of(private)).hex()
    return slots_of_vm((slot for slot in slots if recipient_of(slot)[0] == own), vm_binding)


def unwrap(slots: list[bytes], private: X25519PrivateKey, *, vm_id: str, kmi: str) -> bytearray:
    """Return the VM key from the first slot that this private key opens.

    Raises:
        RecoveryRefused: no slot is for this key, or it opens none.
        KeyRecordDamaged: the slots for this key belong to another VM or were altered.
    """
    decoded = []
    for raw in slots:
        try:
            decoded.append(RecoverySlot.decode(raw, vm_id))
        except (FormatError, KeyRecordDamaged):
            continue  # One bad slot must not take the others with it.
    if not decoded:
        raise RecoveryRefused(vm_id, "there is no recovery slot")
    own = fingerprint(public_of(private))
    for_us = [slot for slot in decoded if hmac.compare_digest(slot.recipient_fingerprint, own)]
    if not for_us:
        wanted = ", ".join(sorted({slot.recipient_fingerprint.hex() for slot in decoded}))
        raise RecoveryRefused(
            vm_id, f"this is recovery key {own.hex()}; the slots are for {wanted}"
        )
    expected = binding(vm_id, kmi)
    for slot in for_us:
        if slot.binding != expected:
            continue
        info = labels.RECOVERY_INFO + slot.header()
        try:
            key = _suite().decrypt(slot.wrapped, private, info=info)
        except (InvalidTag, ValueError):
            continue
        if len(key) == VM_KEY_SIZE:
            return bytearray(key)
    raise KeyRecordDamaged(
        vm_id, "its recovery slots were made for another VM id or KMI, or were altered"
    )


def _suite() -> hpke.Suite:
    return hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.AES_256_GCM)


def _checksum(raw: bytes) -> bytes:
    return hashlib.sha256(labels.RECOVERY_CHECKSUM + raw).digest()[:CHECKSUM_SIZE]
