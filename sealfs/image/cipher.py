"""Seal and open runs of blocks; subkeys, epochs, nonces, associated data (FORMAT.md 3).

Concurrency: opening may happen in any thread. Sealing, and drawing an epoch, belong to the
image's single writer: one commit at a time.
"""

from __future__ import annotations

import hmac
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

try:
    from sealfs.image import _blockseal as runs
except ImportError:  # it could not be built here; the same in Python
    from sealfs.image import blockseal as runs  # type: ignore[no-redef]

try:
    from sealfs.image._blockread import Opener
except ImportError:  # it could not be built here; reader.py does the same
    Opener = None  # type: ignore[assignment, misc]

from sealfs.errors import BlockDamaged, IntegrityError, NoSpace
from sealfs.image.format import (
    HOLE,
    LABELS,
    MAGICS,
    TREE_MAC_SIZE,
    EpochRow,
)
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE
from sealfs.image.plan import Buffer

TAG_SIZE = 16
EPOCH_BLOCKS_MAX = 1 << 31
"""Blocks sealed under one epoch's key (FORMAT.md 3.2): far below GCM's own bounds."""

_ACCEPTED_MAX = 1 << 20
"""Blocks that wait to be committed at most: 4 GiB, far more than any dirty cache."""

_INDEX = struct.Struct("<Q")

SealHook: TypeAlias = Callable[[bytes, int, int, int], None]
"""Called as (salt, epoch, counter, block) for each seal; tests prove uniqueness with it."""


def _derive(image_key: Buffer, salt: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(bytes(image_key))


@dataclass(frozen=True, slots=True, repr=False)
class Subkeys:
    """The keys of all MACs (FORMAT.md 3.1)."""

    tree: bytes
    journal: bytes
    superblock: bytes
    identity: bytes

    @classmethod
    def derive(cls, image_key: Buffer, uuid: bytes, generation: int) -> Subkeys:
        """Derive them from the image key of a key generation."""
        return cls(
            *(
                _derive(image_key, uuid, LABELS[name] + bytes([generation]))
                for name in ("tree", "journal", "superblock", "identity")
            )
        )


def mac_of(key: bytes, message: Buffer) -> bytes:
    """Return HMAC-SHA-256, 32 bytes (RFC 2104)."""
    return hmac.digest(key, message, "sha256")


def same_mac(found: Buffer, expected: Buffer) -> bool:
    """Compare two MACs in constant time."""
    return hmac.compare_digest(found, expected)


class TreeMacs:
    """MACs of leaf pages, node pages and the root of one image (FORMAT.md 6).

    While the image key is being replaced, pages whose MAC is still one under the old key are as
    authentic as the others (FORMAT.md 11.2); new MACs are made under the new key alone.
    """

    def __init__(self, key: bytes, uuid: bytes, old_key: bytes | None = None) -> None:
        self._key = key
        self._uuid = uuid
        self.accepted: tuple[TreeMacs, ...] = (self,)
        """Those under each key that a page may have its MAC from, the present one's first."""
        if old_key is not None:
            self.accepted = (self, TreeMacs(old_key, uuid))

    def begin(self, key: bytes) -> None:
        """Make MACs under a new key from now on; other threads may verify meanwhile."""
        self.accepted = (self, TreeMacs(self._key, self._uuid))
        self._key = key

    def forget_old(self) -> None:
        """Accept nothing under the old key any more: nothing is left under it."""
        self.accepted = (self,)

    def leaf(self, group: int, page: Buffer) -> bytes:
        """MAC of a group's leaf page."""
        return self._mac(MAGICS["leaf"], 0, group, page)

    def leaves(self, groups: Sequence[int], pages: Sequence[Buffer]) -> bytes:
        """MACs of many groups' leaf pages, joined; the pages must not change meanwhile."""
        return runs.mac_run(
            self._key, self._prefix(MAGICS["leaf"], 0), groups, pages, TREE_MAC_SIZE
        )

    def node(self, level: int, index: int, columns: Buffer) -> bytes:
        """MAC of a node page's authenticated columns."""
        return self._mac(MAGICS["node"], level, index, columns)

    def root(self, size: int, top: bytes) -> bytes:
        """MAC of the whole: the disk's size and the top page's MAC."""
        return self._mac(MAGICS["root"], 0, size, top)

    def _prefix(self, kind: bytes, level: int) -> bytes:
        return kind + bytes((level,)) + self._uuid

    def _mac(self, kind: bytes, level: int, index: int, content: Buffer) -> bytes:
        prefix = self._prefix(kind, level) + _INDEX.pack(index)
        return hmac.digest(self._key, prefix + content, "sha256")[:TREE_MAC_SIZE]


class BlockCipher:
    """AES-256-GCM of blocks under the keys of the epochs (FORMAT.md 3.2, 3.3)."""

    def __init__(
        self,
        image_keys: dict[int, bytearray],
        uuid: bytes,
        path: str,
        rows: Sequence[EpochRow],
        on_seal: SealHook | None = None,
    ) -> None:
        self._image_keys = image_keys
        self._uuid = uuid
        self._path = path
        self._rows = {row.epoch: row for row in rows}
        self._keys: dict[int, bytearray] = {}
        """The key of each epoch that was met."""
        self._decrypts: dict[bytes, Callable[[bytes, Buffer, bytes], bytes]] = {}
        """The decrypt of an epoch's key, by the epoch as it stands in a nonce."""
        self._prefix = MAGICS["block"] + uuid
        self.opener = None if Opener is None else Opener(self._prefix)
        """Opens and sends blocks of the epochs that `teach` was called for; the owner's thread."""
        self._on_seal = on_seal
        self._epoch = 0
        self._counter = 0
        self._pid = os.getpid()

    @property
    def epoch(self) -> int:
        """The epoch that seals; 0 before one is drawn."""
        return self._epoch

    @property
    def is_spent(self) -> bool:
        """Whether a new epoch must be drawn before the next seal."""
        return self._epoch == 0 or self._counter >= EPOCH_BLOCKS_MAX

    @property
    def is_nearly_spent(self) -> bool:
        """Whether what is accepted now may find the epoch spent when it is committed."""
        return self._epoch == 0 or self._counter + _ACCEPTED_MAX >= EPOCH_BLOCKS_MAX

    @property
    def generations(self) -> frozenset[int]:
        """The key generations whose image keys are here."""
        return frozenset(self._image_keys)

    def add_image_key(self, generation: int, image_key: Buffer) -> None:
        """Take a copy of the image key of one generation more."""
        self._image_keys[generation] = bytearray(image_key)

    def subkeys(self, generation: int) -> Subkeys:
        """Return the keys of the MACs of a key generation that is here."""
        return Subkeys.derive(self._image_keys[generation], self._uuid, generation)

    def forget_generation(self, generation: int, rows: Sequence[EpochRow]) -> None:
        """Wipe an image key, and know these epochs alone; whoever reads by another one fails."""
        kept = {row.epoch: row for row in rows}
        self._rows = kept
        for epoch in [epoch for epoch in self._keys if epoch not in kept]:
            self._decrypts.pop(epoch.to_bytes(4, "little"), None)
            key = self._keys.pop(epoch)
            key[:] = bytes(len(key))
        if self.opener is not None:
            self.opener.forget()  # it is taught again what is still to be known
        gone = self._image_keys.pop(generation, None)
        if gone is not None:
            gone[:] = bytes(len(gone))

    def forget(self) -> None:
        """Wipe the image keys and let go of what was derived from them."""
        for key in (*self._image_keys.values(), *self._keys.values()):
            key[:] = bytes(len(key))
        self._image_keys.clear()
        self._keys.clear()
        self._decrypts.clear()
        if self.opener is not None:
            self.opener.forget()

    def begin_epoch(self, row: EpochRow) -> None:
        """Seal under this row from now on; it must be fresh and durable."""
        self._rows[row.epoch] = row
        # The salt is 32 fresh random bytes, so the key is new and counting from 0 repeats no
        # (key, nonce), whatever an older copy of this file was used for.
        self._epoch, self._counter = row.epoch, 0

    def seal_blocks(
        self, blocks: Sequence[int], slab: Buffer, frames: Sequence[int], out: memoryview
    ) -> bytes:
        """Seal `blocks` one after the other into `out`.

        Args:
            blocks: indexes on the VM's disk.
            slab: holds their content, in frames of BLOCK_SIZE bytes.
            frames: the number of each block's frame.
            out: len(blocks) * BLOCK_SIZE + TAG_SIZE bytes; the last 16 may be used as scratch.

        Returns:
            The entries, ENTRY_SIZE bytes each, joined (FORMAT.md 6.1).
        """
        if os.getpid() != self._pid:
            raise IntegrityError(self._path, "refusing to seal in a forked process")
        epoch = self._epoch
        counter = self._counter
        # Burnt before use: whatever happens below, these counters never come again.
        self._counter += len(blocks)
        entries = runs.seal_run(
            self._key(epoch), self._prefix, epoch, counter, blocks, slab, frames, out
        )
        if self._on_seal:
            salt = self._rows[epoch].salt
            for i, block in enumerate(blocks):
                self._on_seal(salt, epoch, counter + i, block)
        return entries

    def open_block(self, block: int, sealed: bytearray, nonce: bytes, tag: bytes) -> bytes:
        """Return the plaintext of one block.

        Args:
            block: its index on the VM's disk.
            sealed: BLOCK_SIZE bytes of ciphertext and room for the tag; overwritten.
            nonce: from its present entry.
            tag: from there too.

        Raises:
            BlockDamaged: it does not authenticate.
        """
        sealed[BLOCK_SIZE:] = tag
        decrypt = self._decrypts.get(nonce[:4])
        if decrypt is None:
            epoch = int.from_bytes(nonce[:4], "little")
            decrypt = self._decrypts[nonce[:4]] = AESGCM(self._key_of_block(block, epoch)).decrypt
        try:
            return decrypt(nonce, sealed, self._prefix + _INDEX.pack(block))
        except InvalidTag:
            raise self._damaged(block) from None

    def teach(self, epoch: int) -> bool:
        """Give `opener` the key of an epoch; return whether the image has that epoch."""
        if self.opener is None or epoch not in self._rows:
            return False
        self.opener.add(epoch, self._key(epoch))
        return True

    def open_blocks(self, first: int, run: memoryview, entries: Buffer) -> None:
        """Open a run of present blocks, in place.

        Args:
            first: index of the first block on the VM's disk.
            run: count * BLOCK_SIZE bytes of ciphertext, which become plaintext.
            entries: count * ENTRY_SIZE bytes.

        Raises:
            BlockDamaged: naming a block that does not authenticate; `run` is then zeros.
        """
        while True:
            try:
                failed = runs.open_run(self._keys, self._prefix, first, entries, run)
                break
            except KeyError as missing:
                (epoch,) = missing.args
                self._key_of_block(first, epoch)
        if failed >= 0:
            raise self._damaged(first + failed)

    def _damaged(self, block: int) -> BlockDamaged:
        return BlockDamaged(
            self._path, block, "does not authenticate (damaged, or altered outside sealfs)"
        )

    def _key_of_block(self, block: int, epoch: int) -> bytearray:
        if epoch not in self._rows:
            raise BlockDamaged(self._path, block, f"names the unknown epoch {epoch}")
        return self._key(epoch)

    def _key(self, epoch: int) -> bytearray:
        key = self._keys.get(epoch)
        if key is None:
            row = self._rows[epoch]
            image_key = self._image_keys.get(row.key_generation)
            if image_key is None:
                raise IntegrityError(
                    self._path, f"epoch {epoch} needs key generation {row.key_generation}"
                )
            info = (
                LABELS["data"]
                + bytes([row.key_generation])
                + self._uuid
                + row.epoch.to_bytes(4, "little")
            )
            key = self._keys[epoch] = bytearray(_derive(image_key, row.salt, info))
        return key


class EpochTable:
    """The rows of the epoch table, and the drawing of new ones (FORMAT.md 4.2)."""

    def __init__(self, rows: list[EpochRow], rows_max: int, path: str) -> None:
        self.rows = rows
        self.rows_max = rows_max
        self._path = path

    @property
    def is_nearly_full(self) -> bool:
        """Whether less than a tenth of the room is left."""
        return len(self.rows) * 10 > self.rows_max * 9

    def draw(self, key_generation: int, random: Callable[[int], bytes]) -> EpochRow:
        """Add and return a new epoch.

        Raises:
            NoSpace: the table is full.
        """
        self.check_room(1)
        epoch = self.rows[-1].epoch + 1 if self.rows else 1
        row = EpochRow(epoch, key_generation, random(32))
        self.rows.append(row)
        return row

    def check_room(self, count: int) -> None:
        """Raise NoSpace when fewer than `count` epochs can be drawn."""
        if len(self.rows) + count > self.rows_max:
            raise NoSpace(
                self._path,
                f"the epoch table is full ({self.rows_max} rows): blocks of so many different"
                " openings are in use that none can be dropped; sealing some again makes room",
            )

    def keep_generation(self, key_generation: int) -> None:
        """Drop the rows of other key generations, which no entry names any more."""
        self.rows = [row for row in self.rows if row.key_generation == key_generation]

    def compact(self, in_use: set[int]) -> None:
        """Drop the rows that no entry names; the last one stays, it numbers the next."""
        self.rows = [
            row for i, row in enumerate(self.rows)
            if row.epoch in in_use or i == len(self.rows) - 1
        ]  # fmt: skip


def epochs_of(page: Buffer) -> set[int]:
    """Return the epochs that the present entries of a leaf page name."""
    return {
        int.from_bytes(page[at : at + 4], "little")
        for at in range(0, len(page), ENTRY_SIZE)
        if page[at : at + ENTRY_SIZE] != HOLE
    }
