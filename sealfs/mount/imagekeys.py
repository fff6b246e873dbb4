"""The keys of an image, by what its identity says: one, or two while the image key is replaced."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from sealfs.errors import KeyRefused
from sealfs.image.format import Identity
from sealfs.keys.rotation import LocksImages, making_image
from sealfs.keys.vmkey import NewImageKey, wipe


class UnwrapsKeys(Protocol):
    """The key service as far as images are opened by it."""

    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray: ...


class MakesKeys(LocksImages, Protocol):
    """The key service as far as it makes image keys."""

    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey: ...


@contextlib.contextmanager
def lent_keys(
    keys: UnwrapsKeys, identity: Identity, subject: object
) -> Iterator[dict[int, bytearray]]:
    """Lend an image's keys by key generation; they are wiped afterwards.

    Raises:
        KeyGone: the image was erased.
        KeyServiceError: a key is missing, revoked or refused.
    """
    identity.wrapped_key(str(subject))  # raises where it has none
    lent: dict[int, bytearray] = {}
    try:
        for generation, wrapped in identity.wrapped_keys:
            lent[generation] = keys.image_key(identity.kmi, identity.vm_id, identity.uuid, wrapped)
        yield lent
    finally:
        for key in lent.values():
            wipe(key)


@contextlib.contextmanager
def next_key(keys: MakesKeys, identity: Identity, path: Path) -> Iterator[NewImageKey]:
    """Lend the next key of an image, wrapped under its VM's key, which stays as it is meanwhile.

    Raises:
        Busy: the VM's key is being changed.
        KeyRefused: this host's key of the VM is not the one that the image is under.
        KeyServiceError: the VM's key cannot be had.
    """
    with making_image(keys, path, identity.vm_id):
        new = keys.new_image_key(identity.vm_id, identity.uuid)
        try:
            if new.kmi != identity.kmi:
                raise KeyRefused(
                    path,
                    f'is under KMI "{identity.kmi}", and this host has VM "{identity.vm_id}" under'
                    f' "{new.kmi}"',
                )
            yield new
        finally:
            wipe(new.key)
