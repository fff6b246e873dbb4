"""What two hosts exchange when a VM goes from one to the other: host ids and packages.

Pure. A *host id* is public: who a host is and the public part of its storage key. Nothing in it
proves that; a person compares its fingerprint with what the other host shows. A *package* holds the
VM key wrapped to that storage key (TPM 2.0 Part 1, "Duplication"), so that only that TPM gives it,
and what this host knows of the VM's images: where they were registered, how far they had come. It
is authenticated under a subkey of the VM key, which says that whoever made it had that key.

Both travel as text: base64 between two lines that name what it is.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import hmac
import os.path
from dataclasses import dataclass
from typing import Final, Self

from sealfs.errors import FormatError, KeyRecordDamaged
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import (
    MAC_SIZE,
    NAME_SIZE,
    PUBLIC_SIZE_MAX,
    SEALED_PRIVATE_SIZE_MAX,
    SEALED_PUBLIC_SIZE_MAX,
    UUID_SIZE,
)
from sealfs.keys.ledger import RESERVED_IDS, STATE_MAC_SIZE, Progress
from sealfs.keys.records import RECOVERY_SLOT_COUNT_MAX, RECOVERY_SLOT_SIZE_MAX
from sealfs.keys.registry import PATH_SIZE_MAX

VERSION: Final = 1
TEXT_SIZE_MAX: Final = 1 << 20
IMAGE_COUNT_MAX: Final = 256
SEED_SIZE_MAX: Final = 512
"""An encrypted secret: a point of P-256 has 68 bytes, RSA-2048 258."""
FINGERPRINT_SIZE: Final = 16
HOST_KIND: Final = "SEALFS HOST"
PACKAGE_KIND: Final = "SEALFS VM KEY"
_LINE: Final = 64
_MOVE: Final = 1


@dataclass(frozen=True, slots=True)
class HostId:
    """A host, as another one is told of it. `public` is its storage key, a TPM2B_PUBLIC."""

    host_id: bytes
    public: bytes

    def encode(self) -> bytes:
        return b"".join(
            (labels.HOST_ID_MAGIC, wire.number(VERSION, 2), self.host_id, wire.counted(self.public))
        )

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse; nothing in it is authenticated.

        Raises:
            FormatError: not a host id, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.HOST_ID_MAGIC, "host id")
        reader.version(VERSION, "the host id")
        found = cls(reader.take(UUID_SIZE), reader.counted(PUBLIC_SIZE_MAX, 1))
        reader.finish()
        return found

    @property
    def key_name(self) -> bytes:
        """Name of the storage key, SHA-256 as nameAlg (TPM 2.0 Part 1 §16), computed here."""
        return b"\x00\x0b" + hashlib.sha256(self.public[2:]).digest()

    @property
    def fingerprint(self) -> str:
        """Eight groups of four digits, for people to compare; covers everything."""
        digest = hashlib.sha256(labels.HOST_FINGERPRINT + self.encode()).hexdigest()
        return "-".join(digest[at : at + 4] for at in range(0, 2 * FINGERPRINT_SIZE, 4))


@dataclass(frozen=True, slots=True)
class PackedImage:
    """An image of the VM: its registered path there, and how far it had come when it was noted."""

    image_uuid: bytes
    path: str
    progress: Progress


@dataclass(frozen=True, slots=True)
class Package:
    """A VM key on its way to another host. `created` is in seconds since 1970, UTC."""

    is_move: bool
    from_host: bytes
    to_host: bytes
    to_key_name: bytes
    created: int
    kmi: str
    vm_id: str
    public: bytes
    duplicate: bytes
    seed: bytes
    recovery_slots: tuple[bytes, ...]
    images: tuple[PackedImage, ...]
    mac: bytes = bytes(MAC_SIZE)

    def _body(self) -> bytes:
        parts = [
            labels.PACKAGE_MAGIC,
            wire.number(VERSION, 2),
            wire.number(_MOVE if self.is_move else 0, 1),
            self.from_host,
            self.to_host,
            wire.counted(self.to_key_name),
            wire.number(self.created, 8),
            wire.text(self.kmi),
            wire.text(self.vm_id),
            wire.counted(self.public),
            wire.counted(self.duplicate),
            wire.counted(self.seed),
            wire.number(len(self.recovery_slots), 1),
            *(wire.counted(slot) for slot in self.recovery_slots),
            wire.number(len(self.images), 2),
        ]
        for image in self.images:
            parts += [
                image.image_uuid,
                wire.counted(os.fsencode(image.path)),
                wire.number(image.progress.sequence, 8),
                image.progress.mac,
            ]
        return b"".join(parts)

    def encode(self) -> bytes:
        return self._body() + self.mac

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse; its MAC is not checked yet.

        Raises:
            FormatError: not a package, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.PACKAGE_MAGIC, "VM key package")
        reader.version(VERSION, "the package")
        flags = reader.number(1)
        if flags & ~_MOVE:
            raise FormatError(subject, f"package with unknown flags {flags:#x}")
        from_host, to_host = reader.take(UUID_SIZE), reader.take(UUID_SIZE)
        to_key_name = reader.counted(NAME_SIZE, NAME_SIZE)
        created = reader.number(8)
        kmi, vm_id = reader.identifier(), reader.identifier()
        public = reader.counted(SEALED_PUBLIC_SIZE_MAX, 1)
        duplicate = reader.counted(SEALED_PRIVATE_SIZE_MAX, 1)
        seed = reader.counted(SEED_SIZE_MAX, 1)
        slot_count = reader.number(1)
        if slot_count > RECOVERY_SLOT_COUNT_MAX:
            reader.damaged(f"has {slot_count} recovery slots, at most {RECOVERY_SLOT_COUNT_MAX}")
        slots = tuple(reader.counted(RECOVERY_SLOT_SIZE_MAX, 1) for _ in range(slot_count))
        image_count = reader.number(2)
        if image_count > IMAGE_COUNT_MAX:
            reader.damaged(f"has {image_count} images, at most {IMAGE_COUNT_MAX}")
        images = tuple(
            PackedImage(
                reader.take(UUID_SIZE),
                os.fsdecode(reader.counted(PATH_SIZE_MAX, 1)),
                Progress(reader.number(8), reader.take(STATE_MAC_SIZE)),
            )
            for _ in range(image_count)
        )
        if any(image.image_uuid in RESERVED_IDS for image in images):
            # Noted in the ledger here, it would stand for this host's registry or audit log.
            reader.damaged("names an image by a uuid that no image has")
        mac = reader.take(MAC_SIZE)
        reader.finish()
        return cls(
            flags == _MOVE, from_host, to_host, to_key_name, created, kmi, vm_id, public,
            duplicate, seed, slots, images, mac,
        )  # fmt: skip

    def with_mac(self, mac_key: bytes | bytearray) -> Self:
        """Return the package authenticated under the VM key's package subkey."""
        return dataclasses.replace(self, mac=hmac.digest(mac_key, self._body(), "sha256"))

    def is_authentic(self, mac_key: bytes | bytearray) -> bool:
        """Whether the MAC fits."""
        return hmac.compare_digest(self.mac, hmac.digest(mac_key, self._body(), "sha256"))


def same_fingerprint(one: str, other: str) -> bool:
    """Whether two fingerprints are the same, however their groups are set apart."""
    return _digits(one) == _digits(other)


def to_text(kind: str, raw: bytes) -> str:
    """Return what is written to a file or printed."""
    lines = base64.b64encode(raw).decode()
    body = "\n".join(lines[at : at + _LINE] for at in range(0, len(lines), _LINE))
    return f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n"


def from_text(kind: str, text: bytes, subject: str) -> bytes:
    """Return the bytes of what `to_text` wrote; what stands around it is not looked at.

    Raises:
        FormatError: there is no such text.
    """
    begin, end = f"-----BEGIN {kind}-----".encode(), f"-----END {kind}-----".encode()
    _, found, rest = text[: TEXT_SIZE_MAX + 1].partition(begin)
    body, ended, _ = rest.partition(end)
    if not (found and ended) or len(text) > TEXT_SIZE_MAX:
        what = "host id" if kind == HOST_KIND else "VM key package"
        raise FormatError(subject, f"this is not a {what} (no {kind})")
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error:
        raise KeyRecordDamaged(subject, "its base64 is damaged") from None


def _digits(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())
