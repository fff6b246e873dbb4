"""What stands in the place of a key that this host gave away or destroyed (`HASH.gone`).

Pure. It says why there is no key, so that nobody takes it for an accident. It is not authenticated:
whoever can write here can destroy the key itself; and whoever removes a tombstone gets what the
host held when it was made. A host that gave a VM away and is not trusted any more loses its key
for good when the new one rotates it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Self

from sealfs.errors import FormatError, KeyGone
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import UUID_SIZE

VERSION: Final = 1
TOMBSTONE_SIZE_MAX: Final = 2048


class Why(IntEnum):
    """What became of the key."""

    MOVED = 1
    REVOKED = 2


@dataclass(frozen=True, slots=True)
class Tombstone:
    """`when` is in seconds since 1970, UTC; `to_host` is zeros for a revoked key."""

    why: Why
    kmi: str
    vm_id: str
    when: int
    to_host: bytes = bytes(UUID_SIZE)

    def encode(self) -> bytes:
        return b"".join(
            (
                labels.TOMBSTONE_MAGIC,
                wire.number(VERSION, 2),
                wire.number(self.why, 1),
                wire.text(self.kmi),
                wire.text(self.vm_id),
                wire.number(self.when, 8),
                self.to_host,
            )
        )

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse.

        Raises:
            FormatError: not a tombstone, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.TOMBSTONE_MAGIC, "key record")
        reader.version(VERSION, "the tombstone")
        why = reader.number(1)
        if why not in list(Why):
            raise FormatError(subject, f"key that is gone for unknown reason {why}")
        found = cls(
            Why(why), reader.identifier(), reader.identifier(), reader.number(8),
            reader.take(UUID_SIZE),
        )  # fmt: skip
        reader.finish()
        return found

    def error(self, when_text: str) -> KeyGone:
        """Return what whoever asks for the key is told."""
        if self.why is Why.MOVED:
            return KeyGone(
                self.vm_id,
                f"was moved to host {self.to_host.hex()} ({when_text}); it comes back by "
                "`key enroll --move` there and `key import` here",
            )
        return KeyGone(self.vm_id, f"its key was revoked ({when_text}): nothing opens it here")
