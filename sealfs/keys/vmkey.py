"""The VM key in memory: what may be derived from it, and how it is wiped.

The key lives in one bytearray. Python and the TPM library may hold copies that nobody can reach
to wipe; what can be wiped is. Derived keys go into buffers that are wiped after use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Final, NamedTuple, NoReturn, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sealfs.errors import KeyRefused
from sealfs.keys import labels
from sealfs.keys.records import VM_KEY_SIZE, binding

IMAGE_KEY_SIZE: Final = 32
UUID_SIZE: Final = 16
WRAP_VERSION: Final = 1
NONCE_SIZE: Final = 12
TAG_SIZE: Final = 16
WRAPPED_IMAGE_KEY_SIZE: Final = 1 + NONCE_SIZE + IMAGE_KEY_SIZE + TAG_SIZE


def wipe(buffer: bytearray) -> None:
    """Overwrite a buffer with zeros, in place."""
    buffer[:] = bytes(len(buffer))


@contextmanager
def derived(
    secret: bytearray, *, info: bytes, size: int = 32, salt: bytes | None = None
) -> Iterator[bytearray]:
    """Lend a subkey (HKDF-SHA256, RFC 5869), wiped afterwards."""
    subkey = bytearray(size)
    try:
        HKDF(SHA256(), size, salt, info).derive_into(secret, subkey)
        yield subkey
    finally:
        wipe(subkey)


class NewImageKey(NamedTuple):
    """An image key that was made, and what the image's identity says of it.

    Whoever asked for it wipes `key`.
    """

    key: bytearray
    kmi: str
    wrapped: bytes
    recovery_slots: tuple[bytes, ...]


class VmKey:
    """The key of one VM. Owns `key` (64 bytes) and wipes it; a context manager.

    Use from several threads is safe as long as nobody wipes it meanwhile.
    """

    def __init__(
        self, key: bytearray, *, vm_id: str, kmi: str, recovery_slots: tuple[bytes, ...]
    ) -> None:
        assert len(key) == VM_KEY_SIZE
        self._key = key
        self._is_wiped = False
        self.vm_id = vm_id
        self.kmi = kmi
        self.recovery_slots = recovery_slots

    def __repr__(self) -> str:
        return f"<VmKey vm_id={self.vm_id!r} kmi={self.kmi!r}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a VmKey is neither copied nor pickled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.wipe()

    def __del__(self) -> None:
        # A backstop; also runs for an object whose __init__ failed.
        if hasattr(self, "_key"):
            self.wipe()

    def wipe(self) -> None:
        """Overwrite the key; the object is of no use afterwards."""
        wipe(self._key)
        self._is_wiped = True

    def wrap_image_key(self, image_uuid: bytes, image_key: bytes | bytearray) -> bytes:
        """Return an image key wrapped for the image's identity.

        Args:
            image_uuid: 16 bytes; in key, salt and associated data.
            image_key: 32 bytes.
        """
        if len(image_uuid) != UUID_SIZE or len(image_key) != IMAGE_KEY_SIZE:
            raise ValueError("an image uuid has 16 bytes and an image key 32")
        # Unique: 96 random bits under a key that belongs to one image and wraps only when that
        # image is made or re-keyed; NIST SP 800-38D §8.3 allows 2^32 of them.
        nonce = os.urandom(NONCE_SIZE)
        with self._wrapping_key(image_uuid) as wrapping_key:
            sealed = AESGCM(wrapping_key).encrypt(
                nonce, image_key, self._associated_data(image_uuid)
            )
        return bytes([WRAP_VERSION]) + nonce + sealed

    def unwrap_image_key(self, image_uuid: bytes, wrapped: bytes) -> bytearray:
        """Return the image key; the caller wipes it.

        Raises:
            KeyRefused: not wrapped under this VM's key for this image, or altered.
        """
        if len(image_uuid) != UUID_SIZE:
            raise ValueError("an image uuid has 16 bytes")
        if len(wrapped) != WRAPPED_IMAGE_KEY_SIZE or wrapped[0] != WRAP_VERSION:
            raise KeyRefused(self.vm_id, "the image's wrapped key has an unknown form")
        image_key = bytearray(IMAGE_KEY_SIZE)
        nonce, sealed = wrapped[1 : 1 + NONCE_SIZE], wrapped[1 + NONCE_SIZE :]
        with self._wrapping_key(image_uuid) as wrapping_key:
            try:
                AESGCM(wrapping_key).decrypt_into(
                    nonce, sealed, self._associated_data(image_uuid), image_key
                )
            except InvalidTag:
                wipe(image_key)
                raise KeyRefused(
                    self.vm_id,
                    "the VM key does not open this image's key: the image belongs to another VM, "
                    "the VM's key was made anew, or the image's identity was altered",
                ) from None
        return image_key

    @contextmanager
    def record_mac_key(self) -> Iterator[bytearray]:
        """Lend the subkey that authenticates this key's record."""
        with self.subkey(labels.RECORD_MAC_INFO) as subkey:
            yield subkey

    @contextmanager
    def package_mac_key(self) -> Iterator[bytearray]:
        """Lend the subkey that authenticates a package with this key."""
        with self.subkey(labels.PACKAGE_MAC_INFO) as subkey:
            yield subkey

    @contextmanager
    def subkey(self, label: bytes) -> Iterator[bytearray]:
        """Lend the subkey of a label, bound to this key's VM id and KMI; 32 bytes."""
        self._check_alive()
        with derived(self._key, info=label + binding(self.vm_id, self.kmi)) as subkey:
            yield subkey

    @contextmanager
    def secret(self) -> Iterator[bytearray]:
        """Lend the key itself, to seal it or wrap it for recovery; not to be kept."""
        self._check_alive()
        yield self._key

    @contextmanager
    def _wrapping_key(self, image_uuid: bytes) -> Iterator[bytearray]:
        self._check_alive()
        info = labels.IMAGE_WRAP_INFO + binding(self.vm_id, self.kmi)
        with derived(self._key, info=info, salt=image_uuid) as subkey:
            yield subkey

    def _associated_data(self, image_uuid: bytes) -> bytes:
        return bytes([WRAP_VERSION]) + image_uuid + binding(self.vm_id, self.kmi)

    def _check_alive(self) -> None:
        if self._is_wiped:
            raise ValueError("this VM key was wiped")
