"""The identity written anew while the image stays one that opens (FORMAT.md 5).

Which key opens an image, and who may recover it, changes during its life; its content does not
for that. There are two copies: a rewrite makes one durable, then the other, and never begins with
the only good one. Dying anywhere leaves the identity of before or the new one; doing it again
brings the other copy up to date.

Whoever calls this has the image to himself, or drives it as an exclusive operation of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from sealfs.errors import FormatError, IntegrityError
from sealfs.image.cipher import Subkeys, mac_of, same_mac
from sealfs.image.format import (
    MAC_SIZE,
    Identity,
    decode_identity,
    encode_identity,
    identity_header,
)
from sealfs.image.layout import BLOCK_SIZE, Geometry
from sealfs.image.plan import Buffer, Step, WritePlan
from sealfs.image.storage import Storage, execute

DEFAULT_GEOMETRY = Geometry()
ERASED_MAC = bytes(MAC_SIZE)
"""MAC of an identity without keys: nobody is left who could verify one."""


GENERATION_MAX = 2**64 - 1
"""Nobody gets there; one that says so was not written by a rewrite."""


class Rewrite(NamedTuple):
    """What an identity becomes, and the writes that make it so; none if it is that already."""

    identity: Identity
    plan: WritePlan


def rewrite_plan(
    storage: Storage, wanted: Identity, image_key: Buffer, geometry: Geometry = DEFAULT_GEOMETRY
) -> Rewrite:
    """Return the writes after which both copies say what is wanted, under the next generation.

    Args:
        storage: of the image; read only.
        wanted: its generation is not looked at.
        image_key: of the key generation of `wanted`, whose MAC subkey authenticates the copies.
        geometry: of the image; only the header and identity pages matter.

    Raises:
        IntegrityError: no copy authenticates, so there is nothing to go on from.
    """
    mac_key = Subkeys.derive(image_key, wanted.uuid, wanted.key_generation).identity
    return plan_of(storage, wanted, {wanted.key_generation: mac_key}, geometry)


def current(
    storage: Storage, known: Identity, image_key: Buffer, geometry: Geometry = DEFAULT_GEOMETRY
) -> Identity:
    """Return the newest copy that authenticates under the image's key.

    Args:
        storage: of the image.
        known: as read without the key; says whose identity is meant, and its key generation.
        image_key: of that generation.
        geometry: of the image.

    Raises:
        IntegrityError: there is none.
    """
    mac_key = Subkeys.derive(image_key, known.uuid, known.key_generation).identity
    mac_keys = {known.key_generation: mac_key}
    raws = [_read(storage, geometry, index) for index in (0, 1)]
    copies = [_decoded(raw, storage.path, known.uuid, mac_keys) for raw in raws]
    return _newest(copies, storage.path)


def rewrite(
    storage: Storage, wanted: Identity, image_key: Buffer, geometry: Geometry = DEFAULT_GEOMETRY
) -> Identity:
    """Write the identity anew; both copies are durable on return. Raises as `rewrite_plan`."""
    after, plan = rewrite_plan(storage, wanted, image_key, geometry)
    execute(storage, plan)
    return after


def erase(storage: Storage, known: Identity, geometry: Geometry = DEFAULT_GEOMETRY) -> None:
    """Overwrite every wrapped key and recovery slot in both copies; durable on return.

    Needs no key. Afterwards the image says whose it was, and nothing opens it. A copy of the file
    made before is out of reach.

    Raises:
        FormatError, IntegrityError: no copy of the identity is left to go on from.
    """
    without = replace(known, wrapped_keys=(), recovery_slots=())
    _, plan = plan_of(storage, without, None, geometry)
    execute(storage, plan)


def plan_of(
    storage: Storage, wanted: Identity, mac_keys: Mapping[int, bytes] | None, geometry: Geometry
) -> Rewrite:
    """As `rewrite_plan`, of an identity that may get another key generation.

    Args:
        storage: of the image; read only.
        wanted: its generation is not looked at.
        mac_keys: by key generation, that of `wanted` among them; None: the image is erased.
        geometry: of the image.

    Raises:
        IntegrityError: no copy authenticates under one of them.
    """
    raws = [_read(storage, geometry, index) for index in (0, 1)]
    copies = [_decoded(raw, storage.path, wanted.uuid, mac_keys) for raw in raws]
    newest = _newest(copies, storage.path)
    after = replace(wanted, generation=newest.generation)
    if after != newest:
        after = replace(wanted, generation=newest.generation + 1)
    content = after.encode_content()
    mac = ERASED_MAC
    if mac_keys is not None:
        mac = mac_of(mac_keys[wanted.key_generation], identity_header(content) + content)
    raw = encode_identity(content, mac)
    room = geometry.identity_pages * BLOCK_SIZE
    assert len(raw) <= room, "identity fits its pages"
    padded = raw.ljust(room, b"\0")
    # Crash in the first write: the other copy, which is good, counts. Crash after it: the new one
    # counts, and the older is what a reader falls back to only if the new one is damaged.
    order = sorted((0, 1), key=lambda index: copies[index] == newest)
    # Compared with the zeros behind it: a torn write may have left a part of an old slot there.
    plan: WritePlan = [
        (Step.DURABLE, geometry.identity_offset(index), [padded])
        for index in order
        if raws[index] != padded
    ]
    return Rewrite(after, plan)


def _newest(copies: Sequence[Identity | None], path: str) -> Identity:
    newest = max((c for c in copies if c is not None), key=lambda c: c.generation, default=None)
    if newest is None:
        raise IntegrityError(path, "no copy of its identity authenticates")
    return newest


def _read(storage: Storage, geometry: Geometry, index: int) -> bytes:
    # Past the page cache: after a failed write it shows a copy that is not on the disk, and what
    # is there, an old wrapped key perhaps, would stay.
    offset = geometry.identity_offset(index)
    return storage.read_direct(offset, geometry.identity_pages * BLOCK_SIZE)


def _decoded(
    raw: bytes, path: str, uuid: bytes, mac_keys: Mapping[int, bytes] | None
) -> Identity | None:
    """Return a copy of this image's identity, None where it does not authenticate."""
    try:
        identity, content, mac = decode_identity(raw, path)
    except (FormatError, IntegrityError):
        return None
    if identity.generation >= GENERATION_MAX or identity.uuid != uuid:
        return None
    if mac_keys is None:
        return identity
    mac_key = mac_keys.get(identity.key_generation)
    if mac_key is None:
        return None
    expected = mac_of(mac_key, identity_header(content) + content)
    return identity if same_mac(mac, expected) else None
