"""What `_blockseal.c` does, byte for byte, where that could not be built: slower, one GIL."""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealfs.image.format import PRESENT
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE
from sealfs.image.plan import Buffer

_TAG_SIZE = 16
_FLAGS = struct.pack("<I", PRESENT)
_NONCE = struct.Struct("<IQ")
_INDEX = struct.Struct("<Q")


def seal_run(
    key: Buffer,
    prefix: bytes,
    epoch: int,
    counter: int,
    blocks: Sequence[int],
    slab: Buffer,
    frames: Sequence[int],
    out: memoryview,
) -> bytes:
    """Seal frame frames[i] of the slab as blocks[i] into `out`; see `_blockseal.seal_run`."""
    seal = AESGCM(bytes(key)).encrypt_into
    sealed = bytearray(BLOCK_SIZE + _TAG_SIZE)
    entries = []
    for i, (block, frame) in enumerate(zip(blocks, frames, strict=True)):
        nonce = _NONCE.pack(epoch, counter + i)
        content = memoryview(slab)[frame * BLOCK_SIZE : (frame + 1) * BLOCK_SIZE]
        seal(nonce, content, prefix + _INDEX.pack(block), sealed)
        out[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] = sealed[:BLOCK_SIZE]
        entries.append(nonce + sealed[BLOCK_SIZE:] + _FLAGS)
    return b"".join(entries)


def open_run(
    keys: dict[int, bytearray], prefix: bytes, first: int, entries: Buffer, run: memoryview
) -> int:
    """Open a run in place; see `_blockseal.open_run`."""
    count = len(entries) // ENTRY_SIZE
    if len(entries) % ENTRY_SIZE or len(run) != count * BLOCK_SIZE:
        raise ValueError("open_run: sizes do not fit")
    epochs = [
        int.from_bytes(entries[i * ENTRY_SIZE : i * ENTRY_SIZE + 4], "little") for i in range(count)
    ]
    openers = {epoch: AESGCM(bytes(keys[epoch])).decrypt for epoch in dict.fromkeys(epochs)}
    for i, epoch in enumerate(epochs):
        entry, at = i * ENTRY_SIZE, i * BLOCK_SIZE
        sealed = bytes(run[at : at + BLOCK_SIZE]) + bytes(entries[entry + 12 : entry + 28])
        nonce = bytes(entries[entry : entry + 12])
        try:
            run[at : at + BLOCK_SIZE] = openers[epoch](
                nonce, sealed, prefix + _INDEX.pack(first + i)
            )
        except InvalidTag:
            run[:] = bytes(len(run))
            return i
    return -1


def mac_run(
    key: Buffer, prefix: bytes, indexes: Sequence[int], pages: Sequence[Buffer], size: int
) -> bytes:
    """Return the MACs of pages, joined; see `_blockseal.mac_run`."""
    if len(indexes) != len(pages) or not 1 <= size <= 32:
        raise ValueError("mac_run: sizes do not fit")
    return b"".join(
        hmac.digest(key, b"".join((prefix, _INDEX.pack(index), page)), "sha256")[:size]
        for index, page in zip(indexes, pages, strict=True)
    )
