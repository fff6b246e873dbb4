"""One sealed image as a disk: read, write, flush, discard, resize, at any offset and size.

Dirty blocks are in the cache, committed ones in the volume; this module decides which of the two
answers a read, what a commit takes, and when a write may be accepted.

Concurrency: one owner thread calls everything here. `try_read` and `try_write` never wait for the
disk; whatever may wait is steps (`steps.py`). `read_steps` and `write_steps` may be under way in
any number; of the *exclusive* operations (flush, checkpoint, discard, resize, preallocate, check,
close) one at a time, and it is the caller who sees to that. A worker that reads looks at leaf
entries while a commit may change them: what it finds may be outdated, but an outdated entry never
opens the new ciphertext nor the other way round, so the read is repeated, never wrong.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sealfs.errors import BlockDamaged, NoSpace, ReadOnly, StorageFailed, UsageError
from sealfs.image import check, recovery
from sealfs.image.cache import BlockCache
from sealfs.image.cipher import TAG_SIZE, SealHook
from sealfs.image.format import HOLE, Identity
from sealfs.image.layout import (
    BLOCK_SIZE,
    ENTRY_SIZE,
    Geometry,
    block_count_of,
    group_runs,
    runs_of,
)
from sealfs.image.plan import Buffer
from sealfs.image.steps import Steps, run
from sealfs.image.storage import Storage
from sealfs.image.tree import NO_SLOT
from sealfs.image.volume import RECORD_BLOCKS_MAX, Batch, Volume

SMALL_COMMIT_BLOCKS = 64
"""Up to 256 KiB all goes inline: one device flush instead of two (FORMAT.md 8.1)."""

CACHED_READ_BLOCKS_MAX = 16
"""Longer reads leave no clean blocks behind: a scan would only push out what is used."""

READ_ATTEMPTS_MAX = 16
"""A read that meets a commit again and again gives up in the end, rather than spin."""

HOLES_MAX = 4096
PREALLOCATE_GROUPS = 64

_ZERO_BLOCK = bytes(BLOCK_SIZE)

Piece = tuple[int, int, int, int, int, bytes | None, tuple[int, int, bytes]]
"""(position in the answer, group, index, count, slot, entries or None, leaf source)."""


class SealedImage:
    """A sealed image in use. See the module for who may call what, when."""

    def __init__(
        self, volume: Volume, identity: Identity, cache: BlockCache, *, read_only: bool
    ) -> None:
        self.identity = identity
        self.uuid = identity.uuid
        self.path = volume.path
        self.size = volume.size
        """Bytes of the disk, accepted growth included."""
        self.read_only = read_only
        self.poisoned: str | None = None
        """Why nothing more is accepted or acknowledged, after a failed write or sync."""
        self.oldest_dirty: float | None = None
        """time.monotonic() of the oldest write that no commit has taken."""
        self._volume = volume
        self._storage = volume.storage
        self._cipher = volume.cipher
        self._tree = volume.tree
        self._geometry = volume.geometry
        self._cache = cache.attach()
        self._version = 0
        self._reserved: dict[int, int] = {}
        self._new_nodes: set[int] = set()
        self._scratch = bytearray(BLOCK_SIZE + TAG_SIZE)
        self._scratch_view = memoryview(self._scratch)[:BLOCK_SIZE]
        self._is_closed = False
        volume.keep_space = self._is_dirty_group

    # -- making and opening

    @staticmethod
    def create(
        storage: Storage, *, identity: Identity, image_key: Buffer, size: int, geometry: Geometry
    ) -> None:
        """Write a complete, empty image into an empty file (see `recovery.create`).

        Raises:
            UsageError: the size is not one a disk can have.
        """
        if not 0 <= size <= geometry.size_max:
            raise UsageError(
                storage.path, f"size of {size} bytes, a disk has 0 to {geometry.size_max}"
            )
        recovery.create(
            storage, identity=identity, image_key=image_key, size=size, geometry=geometry
        )

    @classmethod
    def open(
        cls, storage: Storage, *, image_key: Buffer, cache: BlockCache,
        random: Callable[[int], bytes] = os.urandom,
        geometry: Geometry = recovery.DEFAULT_GEOMETRY, read_only: bool = False,
        record_roots: bool = False, on_seal: SealHook | None = None,
    ) -> SealedImage:  # fmt: skip
        """Verify an image, recover it, and open it (see `recovery.open_volume`).

        The storage belongs to the image from now on; when this raises, it is the caller's.
        """
        volume, identity = recovery.open_volume(
            storage,
            image_key=image_key,
            random=random,
            geometry=geometry,
            read_only=read_only,
            record_roots=record_roots,
            on_seal=on_seal,
        )
        return cls(volume, identity, cache, read_only=read_only)

    # -- state

    @property
    def sequence(self) -> int:
        """Sequence of the last durable record."""
        return self._volume.journal.tail.sequence

    @property
    def root_mac(self) -> bytes:
        """Root recorded by the last checkpoint, 24 bytes."""
        return self._volume.superblock.root_mac

    @property
    def dirty_size(self) -> int:
        """Bytes that wait to be committed."""
        return self._cache.dirty_size

    @property
    def is_dirty(self) -> bool:
        """Whether something accepted is not durable yet."""
        return bool(self._cache.dirty or self._cache.committing or self.size != self._volume.size)

    @property
    def needs_checkpoint(self) -> bool:
        """Whether the journal holds something."""
        return not self.read_only and self._volume.needs_checkpoint

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the journal is half full."""
        journal = self._volume.journal
        return not self.read_only and journal.used_pages * 2 >= journal.page_count

    def status(self) -> dict[str, Any]:
        """Return figures for people and programs."""
        volume = self._volume
        return {
            "uuid": self.uuid.hex(),
            "vm_id": self.identity.vm_id,
            "label": self.identity.label,
            "size": self.size,
            "dirty": self.dirty_size,
            "sequence": self.sequence,
            "generation": volume.superblock.generation,
            "journal_pages": volume.journal.page_count,
            "journal_used_pages": volume.journal.used_pages,
            "epochs": len(volume.table.rows),
            "epochs_max": volume.table.rows_max,
            "slots": volume.allocator.slot_count,
            "slots_used": volume.allocator.busy_count,
            "poisoned": self.poisoned,
        }

    def descends_from(self, sequence: int, mac: bytes) -> bool:
        """Whether this image has, among its last anchors, the state (sequence, MAC start)."""
        tail = self._volume.journal.tail
        anchors = self._volume.superblock.anchors
        return (tail.sequence, tail.mac[:16]) == (sequence, mac) or any(
            (anchor.sequence, anchor.mac) == (sequence, mac) for anchor in anchors
        )

    # -- reading

    def try_read(self, offset: int, size: int) -> Buffer | None:
        """Return what is there if that needs no waiting for the disk, else None.

        Fewer bytes than asked for only at the end of the disk. The buffer is the caller's.

        Raises:
            BlockDamaged: a block does not authenticate.
        """
        if size == BLOCK_SIZE and not offset % BLOCK_SIZE and offset + size <= self.size:
            return self._try_read_block(offset // BLOCK_SIZE)
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        first = offset // BLOCK_SIZE
        count = (end - 1) // BLOCK_SIZE - first + 1
        out = bytearray(count * BLOCK_SIZE)
        view = memoryview(out)
        for piece in self._resolve(first, count, view):
            entries = piece[5]
            if entries is None:
                return None
            try:
                if not self._fetch(piece, entries, view, self._storage.read_nowait):
                    return None
            except BlockDamaged:
                return None  # read_steps tells damage from a commit that came between
        if not offset % BLOCK_SIZE and end - offset == len(out):
            return out
        start = offset - first * BLOCK_SIZE
        return view[start : start + end - offset]

    def _try_read_block(self, block: int) -> Buffer | None:
        cache = self._cache
        if cache.dirty or cache.committing:
            newest = cache.newest(block)
            if newest is not None:
                return bytes(newest)
        content = cache.get_clean(block)
        if content is not None:
            return content
        group, index = divmod(block, self._geometry.group_blocks)
        slot = self._tree.slot_of(group)
        if slot == NO_SLOT:
            return _ZERO_BLOCK
        leaf = self._tree.leaf(group)
        if leaf is None or self._volume.inline:
            return None
        entry = leaf[index * ENTRY_SIZE : (index + 1) * ENTRY_SIZE]
        if entry == HOLE:
            return _ZERO_BLOCK
        offset = self._geometry.block_offset(slot, index)
        if not self._storage.read_nowait(offset, self._scratch_view):
            return None
        try:
            content = self._cipher.open_block(block, self._scratch, entry)
        except BlockDamaged:
            return None  # read_steps tells damage from a commit that came between
        cache.put_clean(block, content)
        return content

    def read_steps(self, offset: int, size: int) -> Steps[Buffer]:
        """Return the bytes from `offset` on, fewer than `size` only at the end of the disk.

        Raises:
            BlockDamaged: a block does not authenticate.
            StorageFailed: reading the storage failed.
        """
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        first = offset // BLOCK_SIZE
        count = (end - 1) // BLOCK_SIZE - first + 1
        out = yield from self._read_blocks_steps(first, count)
        start = offset - first * BLOCK_SIZE
        result: Buffer = out[start : start + end - offset]
        return result

    def _read_blocks_steps(self, first: int, count: int) -> Steps[memoryview]:
        """Return whole blocks; on return they are what was there at some time since the call."""
        view = memoryview(bytearray(count * BLOCK_SIZE))
        for attempt in range(READ_ATTEMPTS_MAX):
            version = self._version
            pieces = list(self._resolve(first, count, view))
            if not pieces:
                return view
            loaded: list[tuple[int, bytes, int, bytes]] = []
            failure: BlockDamaged | None = None
            try:
                yield partial(self._fetch_all, pieces, loaded, view)
            except BlockDamaged as exc:
                failure = exc
            for leaf in loaded:
                self._tree.admit_leaf(*leaf)
            if failure is None:
                if count <= CACHED_READ_BLOCKS_MAX and version == self._version:
                    for position, group, index, part, *_ in pieces:
                        block = group * self._geometry.group_blocks + index
                        for i in range(part):
                            at = position + i * BLOCK_SIZE
                            self._cache.put_clean(block + i, bytes(view[at : at + BLOCK_SIZE]))
                return view
            if all(self._is_current(piece) for piece in pieces) and attempt:
                raise failure
            view = memoryview(bytearray(count * BLOCK_SIZE))
        assert failure is not None
        raise failure

    def _is_current(self, piece: Piece) -> bool:
        """Whether a piece still describes what the tree says."""
        _, group, index, count, slot, entries, source = piece
        if self._tree.slot_of(group) != slot:
            return False
        leaf = self._tree.leaf(group)
        if entries is None or leaf is None:
            return self._tree.leaf_source(group)[2] == source[2]
        return leaf[index * ENTRY_SIZE : (index + count) * ENTRY_SIZE] == entries

    def _resolve(self, first: int, count: int, view: memoryview) -> Iterator[Piece]:
        """Fill in what is in memory; yield the pieces that are to be read and opened."""
        cache = self._cache
        in_memory = bool(cache.dirty or cache.committing)
        use_clean = count <= CACHED_READ_BLOCKS_MAX
        for group, index, part in group_runs(first, count, self._geometry.group_blocks):
            block = group * self._geometry.group_blocks + index
            position = (block - first) * BLOCK_SIZE
            if not (in_memory or use_clean):
                yield from self._pieces(position, group, index, part)
                continue
            start = 0
            for i in range(part):
                content: Buffer | None = cache.newest(block + i) if in_memory else None
                if content is None and use_clean:
                    content = cache.get_clean(block + i)
                if content is None:
                    continue
                at = position + i * BLOCK_SIZE
                view[at : at + BLOCK_SIZE] = content
                if i > start:
                    yield from self._pieces(
                        position + start * BLOCK_SIZE, group, index + start, i - start
                    )
                start = i + 1
            if start < part:
                yield from self._pieces(
                    position + start * BLOCK_SIZE, group, index + start, part - start
                )

    def _pieces(self, position: int, group: int, index: int, count: int) -> Iterator[Piece]:
        slot = self._tree.slot_of(group)
        if slot == NO_SLOT:
            return
        source = self._tree.leaf_source(group)
        leaf = self._tree.leaf(group)
        entries = None
        if leaf is not None:
            entries = bytes(leaf[index * ENTRY_SIZE : (index + count) * ENTRY_SIZE])
            if not any(entries[28::ENTRY_SIZE]):
                return
        yield (position, group, index, count, slot, entries, source)

    def _fetch_all(
        self, pieces: list[Piece], loaded: list[tuple[int, bytes, int, bytes]], view: memoryview
    ) -> None:
        """Read and open pieces, loading leaf pages as needed; runs in a worker."""
        leaves: dict[int, bytes] = {}
        for piece in pieces:
            _, group, index, count, _, entries, source = piece
            if entries is None:
                if group not in leaves:
                    page, place = self._volume.read_leaf(group, source)
                    leaves[group] = page
                    loaded.append((group, page, place, source[2]))
                entries = leaves[group][index * ENTRY_SIZE : (index + count) * ENTRY_SIZE]
            self._fetch(piece, entries, view, self._read_whole)

    def _read_whole(self, offset: int, buffer: Buffer) -> bool:
        self._storage.read_into(offset, buffer)  # what a cut-off file lacks does not open
        return True

    def _fetch(
        self, piece: Piece, entries: bytes, view: memoryview,
        read: Callable[[int, Buffer], bool],
    ) -> bool:  # fmt: skip
        """Read and open the present blocks of a piece; False where `read` would wait."""
        position, group, index, count, slot, _, _ = piece
        flags = entries[28::ENTRY_SIZE]
        first = group * self._geometry.group_blocks + index
        inline = self._volume.inline
        if inline:
            runs: Iterator[tuple[int, int]] = iter([(i, 1) for i in range(count) if flags[i]])
        elif flags.count(1) == count:
            runs = iter([(0, count)])
        else:
            runs = runs_of([i for i in range(count) if flags[i]])
        for start, length in runs:
            sealed = memoryview(bytearray(length * BLOCK_SIZE + TAG_SIZE))
            offset = self._geometry.block_offset(slot, index + start)
            if inline:
                offset = inline.get(first + start, offset)
            if not read(offset, sealed[: length * BLOCK_SIZE]):
                return False
            at = position + start * BLOCK_SIZE
            self._cipher.open_blocks(
                first + start,
                sealed,
                entries[start * ENTRY_SIZE : (start + length) * ENTRY_SIZE],
                view[at : at + length * BLOCK_SIZE],
            )
        return True

    # -- writing

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Accept a write into the cache if that needs no waiting; else return False.

        A write beyond the end makes the disk longer. Nothing is durable before a flush.

        Raises:
            NoSpace: the storage is full; nothing was accepted.
            ReadOnly, StorageFailed: the image takes no writes.
            UsageError: beyond what a disk can have.
        """
        self._check_writable()
        size = len(data)
        end = offset + size
        if end > self._geometry.size_max:
            raise UsageError(self.path, f"a disk has at most {self._geometry.size_max} bytes")
        if not size:
            return True
        first, head = divmod(offset, BLOCK_SIZE)
        last = (end - 1) // BLOCK_SIZE
        if head or end % BLOCK_SIZE:
            merged = self._merge_edges(first, last, offset, data)
            if merged is None:
                return False
            data = merged
        if not self._accept(first, data):
            return False
        self.size = max(self.size, end)
        return True

    def _accept(self, first: int, data: Buffer) -> bool:
        """Make whole blocks dirty, their space reserved; False when that must wait."""
        count = len(data) // BLOCK_SIZE
        if self._cache.missing(first, count) > self._cache.free_count:
            return False
        if not self._reserve(first, count):
            return False
        self._cache.put(first, data)
        self._version += 1
        if self.oldest_dirty is None:
            self.oldest_dirty = time.monotonic()
        return True

    def _merge_edges(self, first: int, last: int, offset: int, data: Buffer) -> memoryview | None:
        """Widen a write to whole blocks; None when an old edge would have to be waited for."""
        whole = bytearray((last - first + 1) * BLOCK_SIZE)
        end = offset + len(data)
        # Unaligned head
        edges = {first} if offset % BLOCK_SIZE else set()
        # Unaligned tail
        if end % BLOCK_SIZE and end < self.size:
            edges.add(last)
        for block in edges:
            if block * BLOCK_SIZE >= self.size:
                continue
            old = self.try_read(block * BLOCK_SIZE, BLOCK_SIZE)
            if old is None:
                return None
            at = (block - first) * BLOCK_SIZE
            whole[at : at + len(old)] = old
        # Aligned body
        start = offset - first * BLOCK_SIZE
        whole[start : start + len(data)] = data
        return memoryview(whole)

    def write_steps(self, offset: int, data: Buffer) -> Steps[bool]:
        """Accept a write, reading what it needs first.

        Returns:
            False when the dirty cache is full, or space is just being given back: flush, and
            call again.

        Raises:
            As `try_write`, and BlockDamaged where a block or leaf page that the write needs
            does not authenticate.
        """
        end = offset + len(data)
        for _ in range(READ_ATTEMPTS_MAX):
            if self.try_write(offset, data):
                return True
            first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
            count = last - first + 1
            if self._cache.missing(first, count) > self._cache.free_count:
                return False
            yield from self._load_leaves_steps(self._unknown_groups(first, count))
            for block, is_edge in ((first, offset % BLOCK_SIZE), (last, end % BLOCK_SIZE)):
                if is_edge and block * BLOCK_SIZE < self.size:
                    yield from self._read_blocks_steps(block, 1)
        return False

    def _unknown_groups(self, first: int, count: int) -> list[int]:
        """Groups whose leaf page a write needs and memory lacks.

        A write of a whole group needs none: it heals a leaf page that is damaged.
        """
        return [
            group
            for group, _, part in group_runs(first, count, self._geometry.group_blocks)
            if part < self._geometry.group_blocks
            and self._tree.slot_of(group) != NO_SLOT
            and self._tree.leaf(group) is None
        ]

    def _load_leaves_steps(self, groups: list[int]) -> Steps[None]:
        for group in groups:
            if self._tree.slot_of(group) == NO_SLOT or self._tree.leaf(group) is not None:
                continue
            source = self._tree.leaf_source(group)
            page, place = yield partial(self._volume.read_leaf, group, source)
            self._tree.admit_leaf(group, page, place, source[2])

    def _reserve(self, first: int, count: int) -> bool:
        """Reserve the space that committing these blocks will take; False when it must wait."""
        volume, tree = self._volume, self._tree
        if volume.cipher.is_spent and len(volume.table.rows) >= volume.table.rows_max:
            volume.table.draw(1, os.urandom)  # raises NoSpace, with its reason
        for group, index, part in group_runs(first, count, self._geometry.group_blocks):
            if volume.is_reclaiming(group):
                return False
            slot = tree.slot_of(group)
            if slot == NO_SLOT:
                slot = self._reserved.get(group, NO_SLOT)
                if slot == NO_SLOT:
                    slot = self._reserve_slot(group)
            elif part < self._geometry.group_blocks and tree.leaf(group) is None:
                return False
            volume.reserve(slot, index, part)
        return True

    def _reserve_slot(self, group: int) -> int:
        volume = self._volume
        index = group // self._geometry.fanout
        node = self._tree.nodes[1].get(index)
        if node is None or node.slot == NO_SLOT:
            self._new_nodes.add(index)
            volume.reserve_nodes(len(self._new_nodes) * self._geometry.depth)
        slot = self._reserved[group] = volume.allocator.take()
        return slot

    def _check_writable(self) -> None:
        if self.read_only:
            raise ReadOnly(self.path, "is open for reading only")
        if self.poisoned is not None:
            raise StorageFailed(
                self.path, f"takes no writes until it is opened again: {self.poisoned}"
            )

    def _is_dirty_group(self, group: int) -> bool:
        first = group * self._geometry.group_blocks
        blocks = range(first, first + self._geometry.group_blocks)
        cache = self._cache
        return any(b in cache.dirty or b in cache.committing for b in blocks)

    # -- exclusive operations

    def _guarded(self, steps: Steps[None]) -> Steps[None]:
        """Poison the image when an operation that changes the file does not reach its end."""
        try:
            yield from steps
        except BaseException as exc:
            # After a failed write or sync nobody knows what the disk holds; and an operation
            # that was left in the middle has memory and disk disagree. Only recovery knows.
            self.poisoned = self.poisoned or str(exc) or type(exc).__name__
            raise

    def flush_steps(self) -> Steps[None]:
        """Make everything accepted so far durable, exclusive.

        Raises:
            StorageFailed: it did not; the image is poisoned.
        """
        self._check_flushable()
        if not self.is_dirty:
            return
        yield from self._guarded(self._commit_dirty_steps())

    def _check_flushable(self) -> None:
        if not self.read_only:
            self._check_writable()

    def _commit_dirty_steps(self) -> Steps[None]:
        size, self.oldest_dirty = self.size, None
        cache = self._cache
        cache.begin_commit()
        blocks = sorted(cache.committing)
        if not blocks:
            yield from self._volume.commit_steps(Batch(size=size), self._content)
        is_small = len(blocks) <= SMALL_COMMIT_BLOCKS
        groups: dict[int, list[int]] = {}
        for block in blocks:
            groups.setdefault(block // self._geometry.group_blocks, []).append(block)
        yield from self._load_leaves_steps(
            [g for g, members in groups.items() if len(members) < self._geometry.group_blocks]
        )
        # The first record carries a new size: a block beyond the end that became durable before
        # the size did would come back from the dead when the disk grows over it.
        batch, members_count = Batch(size=size), 0
        for group, members in groups.items():
            trial = self._widen(batch, group, members, is_small)
            if members_count and (
                members_count + len(members) > RECORD_BLOCKS_MAX
                or trial > self._volume.journal.record_pages_max
            ):
                yield from self._commit_batch_steps(batch)
                batch, members_count = Batch(size=size), 0
            self._add(batch, group, members, is_small)
            members_count += len(members)
        if members_count:
            yield from self._commit_batch_steps(batch)
        self._drop_unused_slots()

    def _content(self, block: int) -> memoryview:
        return self._cache.frame(self._cache.committing[block])

    def _commit_batch_steps(self, batch: Batch) -> Steps[None]:
        yield from self._volume.commit_steps(batch, self._content)
        done = [*batch.direct, *batch.inline]
        for group, _ in batch.full_groups:
            first = group * self._geometry.group_blocks
            done.extend(range(first, first + self._geometry.group_blocks))
        # Home is written now: from here on reads go to the disk.
        self._cache.finish(done)

    def _widen(self, batch: Batch, group: int, members: list[int], is_small: bool) -> int:
        """Return the pages of the record if this group's blocks all went inline."""
        inline = 0 if self._is_whole(members) and not is_small else len(members)
        trial = Batch(
            size=batch.size,
            full_groups=[*batch.full_groups, (group, 0)],
            allocs=[*batch.allocs, (group, 0)],
            direct=[*batch.direct, *members],
            inline=[0] * (len(batch.inline) + inline),
        )
        return trial.page_count()

    def _is_whole(self, members: list[int]) -> bool:
        return len(members) == self._geometry.group_blocks

    def _add(self, batch: Batch, group: int, members: list[int], is_small: bool) -> None:
        """Decide how a group's dirty blocks are written (FORMAT.md 8.1)."""
        reserved = self._reserved.pop(group, NO_SLOT)
        live = self._tree.slot_of(group) != NO_SLOT
        if self._is_whole(members) and (not is_small or self._tree.leaf(group) is None):
            slot = reserved if reserved != NO_SLOT else self._take_whole_slot()
            if slot != NO_SLOT:
                batch.full_groups.append((group, slot))
                return
        if not live:
            batch.allocs.append((group, reserved))
            (batch.inline if is_small else batch.direct).extend(members)
            return
        leaf = self._volume.leaf(group)
        for block in members:
            at = block % self._geometry.group_blocks * ENTRY_SIZE
            # A hole has no old copy to lose; a live block goes through the journal.
            is_direct = not is_small and leaf[at + 28] == 0
            (batch.direct if is_direct else batch.inline).append(block)

    def _take_whole_slot(self) -> int:
        """Take a slot to move a group to; NO_SLOT where the storage has no room for that."""
        slot = self._volume.allocator.take()
        try:
            self._volume.reserve(slot, 0, self._geometry.group_blocks)
        except NoSpace:
            self._volume.allocator.put_back(slot)
            return NO_SLOT
        return slot

    def _drop_unused_slots(self) -> None:
        """Put back slots reserved for writes that were discarded before their commit."""
        for group in [g for g in self._reserved if not self._is_dirty_group(g)]:
            self._volume.allocator.put_back(self._reserved.pop(group))
        fanout = self._geometry.fanout
        self._new_nodes &= {g // fanout for g in self._reserved} | {
            i for i in self._new_nodes if i in self._tree.nodes[1]
        }

    def checkpoint_steps(self) -> Steps[None]:
        """Write the tree, free the journal, punch what was discarded, exclusive."""
        self._check_flushable()
        if self.needs_checkpoint:
            yield from self._guarded(self._volume.checkpoint_steps())
            self._drop_unused_slots()

    def discard_steps(self, offset: int, size: int) -> Steps[None]:
        """Make a range read as zeros and give its space back; durable on return, exclusive.

        Blocks that lie in it in part are zeroed there.

        Raises:
            As `write_steps`.
        """
        self._check_writable()
        end = min(offset + size, self.size)
        if offset >= end:
            return
        first = block_count_of(offset)
        last = end // BLOCK_SIZE if end < self.size else block_count_of(end)
        # Unaligned head
        if first * BLOCK_SIZE > offset:
            yield from self._zero_steps(offset, min(end, first * BLOCK_SIZE))
        # Unaligned tail
        if last >= first and last * BLOCK_SIZE < end:
            yield from self._zero_steps(last * BLOCK_SIZE, end)
        # Aligned body
        if last > first:
            yield from self._load_leaves_steps(self._partial_groups(first, last - first))
            yield from self._guarded(self._discard_blocks_steps(first, last - first))
        if self.is_dirty:
            yield from self.flush_steps()

    def _zero_steps(self, offset: int, end: int) -> Steps[None]:
        zeros = bytes(end - offset)
        while not (yield from self.write_steps(offset, zeros)):
            yield from self.flush_steps()

    def _partial_groups(self, first: int, count: int) -> list[int]:
        whole = self._geometry.group_blocks
        return [g for g, _, part in self._volume.live_parts(first, count) if part < whole]

    def _discard_blocks_steps(self, first: int, count: int) -> Steps[None]:
        self._version += 1
        self._cache.discard(first, count)
        holes = self._holes_in(first, count)
        # From here to the record a write into these groups waits: its slot is about to go.
        whole = self._geometry.group_blocks
        self._volume.leaving = {
            group for run in holes for group, _, part in group_runs(*run, whole) if part == whole
        }
        for at in range(0, len(holes), self._holes_max):
            batch = Batch(size=self._volume.size, holes=holes[at : at + self._holes_max])
            yield from self._volume.commit_steps(batch, self._content)
        self._volume.leaving = set()
        self._drop_unused_slots()

    def _holes_in(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the runs that a discard makes holes: what is live in it, groups it empties whole.

        A run never joins parts of two groups, unless it covers both.
        """
        group_blocks = self._geometry.group_blocks
        holes: list[tuple[int, int]] = []
        for group, index, part in self._volume.live_parts(first, count):
            start = group * group_blocks
            if part < group_blocks:
                leaf = self._volume.leaf(group)
                at, end = index * ENTRY_SIZE, (index + part) * ENTRY_SIZE
                if not any(leaf[at:end]):
                    continue
                if any(leaf[:at]) or any(leaf[end:]) or self._is_dirty_group(group):
                    holes.append((start + index, part))
                    continue
            if holes and sum(holes[-1]) == start and not holes[-1][0] % group_blocks:
                holes[-1] = (holes[-1][0], holes[-1][1] + group_blocks)
            else:
                holes.append((start, group_blocks))
        return holes

    @property
    def _holes_max(self) -> int:
        pages = self._volume.journal.record_pages_max
        return min(HOLES_MAX, (pages * BLOCK_SIZE - 256) // 16)

    def resize_steps(self, size: int) -> Steps[None]:
        """Set the size of the disk; durable on return, exclusive.

        What is cut off is gone: growing again shows zeros.

        Raises:
            UsageError: not a size a disk can have.
        """
        self._check_writable()
        if not 0 <= size <= self._geometry.size_max:
            raise UsageError(
                self.path, f"size of {size} bytes, a disk has 0 to {self._geometry.size_max}"
            )
        yield from self.flush_steps()
        if size >= self.size:
            self.size = size
            yield from self.flush_steps()
            return
        tail, kept = block_count_of(size), []
        if size % BLOCK_SIZE:
            # Unaligned tail: its end becomes zero in the same record as the size.
            kept = [tail - 1]
            stop = min(tail * BLOCK_SIZE, self.size)
            yield from self._zero_steps(size, stop)
        yield from self._load_leaves_steps(
            self._partial_groups(tail, block_count_of(self._geometry.size_max) - tail)
        )
        yield from self._guarded(self._shrink_steps(size, tail, kept))

    def _shrink_steps(self, size: int, tail: int, kept: list[int]) -> Steps[None]:
        self._version += 1
        self.size = size
        end = block_count_of(self._geometry.size_max)
        self._cache.discard(tail, end - tail)
        whole = self._geometry.group_blocks
        self._volume.leaving = {
            group for group, _, part in self._volume.live_parts(tail, end - tail) if part == whole
        }
        batch = Batch(size=size)
        self._cache.begin_commit([block for block in kept if block in self._cache.dirty])
        for block in list(self._cache.committing):
            self._add(batch, block // self._geometry.group_blocks, [block], is_small=True)
        yield from self._commit_batch_steps(batch)
        self._volume.leaving = set()
        if not self._cache.dirty:
            self.oldest_dirty = None
        self._drop_unused_slots()

    def preallocate_steps(self, offset: int, size: int) -> Steps[None]:
        """Reserve slots and space for a range, so that writing it cannot fail for want of it.

        Durable on return; changes neither size nor content, exclusive.

        Raises:
            NoSpace: the storage is full.
        """
        self._check_writable()
        end = min(offset + size, self._geometry.size_max)
        group_blocks = self._geometry.group_blocks
        first = offset // BLOCK_SIZE
        pending: list[int] = []
        for group, index, part in group_runs(first, block_count_of(end) - first, group_blocks):
            slot = self._tree.slot_of(group)
            if slot != NO_SLOT:
                yield partial(self._volume.reserve, slot, index, part)
                continue
            if group not in self._reserved:
                self._reserve_slot(group)
            slot = self._reserved[group]
            try:
                yield partial(self._volume.reserve, slot, 0, group_blocks)
            except NoSpace:
                self._drop_unused_slots()
                raise
            pending.append(group)
            if len(pending) >= PREALLOCATE_GROUPS:
                yield from self._guarded(self._alloc_steps(pending))
                pending = []
        if pending:
            yield from self._guarded(self._alloc_steps(pending))

    def _alloc_steps(self, groups: list[int]) -> Steps[None]:
        allocs = [
            (group, self._reserved.pop(group))
            for group in groups
            if group in self._reserved and self._tree.slot_of(group) == NO_SLOT
        ]
        batch = Batch(size=self._volume.size, allocs=allocs)
        yield from self._volume.commit_steps(batch, self._content)

    def seek_steps(self, offset: int, whence: int) -> Steps[int | None]:
        """Return where data (SEEK_DATA) or a hole (SEEK_HOLE) begins from `offset` on.

        None where there is no data any more, or `offset` is beyond the end (ENXIO). Every disk
        ends with a hole.
        """
        if offset >= self.size or offset < 0:
            return None
        wants_data = whence == os.SEEK_DATA
        group_blocks = self._geometry.group_blocks
        block = offset // BLOCK_SIZE
        end = block_count_of(self.size)
        while block < end:
            group = block // group_blocks
            if self._tree.slot_of(group) == NO_SLOT and not self._is_dirty_group(group):
                if not wants_data:
                    return max(offset, block * BLOCK_SIZE)
                block = self._next_group(group) * group_blocks
                continue
            yield from self._load_leaves_steps([group])
            leaf = self._tree.leaf(group)
            stop = min(end, (group + 1) * group_blocks)
            for candidate in range(block, stop):
                at = candidate % group_blocks * ENTRY_SIZE
                is_data = bool(leaf and leaf[at + 28]) or self._cache.newest(candidate) is not None
                if is_data == wants_data:
                    return max(offset, candidate * BLOCK_SIZE)
            block = stop
        return None if wants_data else self.size

    def _next_group(self, group: int) -> int:
        """Return the next group after a hole that holds something, or one beyond the end."""
        beyond = self._geometry.group_count_max
        found = next(self._tree.groups(group + 1), beyond)
        group_blocks = self._geometry.group_blocks
        for blocks in (self._cache.dirty, self._cache.committing):
            found = min(found, min((b // group_blocks for b in blocks
                                    if b // group_blocks > group), default=beyond))  # fmt: skip
        return found

    def check_steps(self, *, data: bool) -> Steps[list[check.Finding]]:
        """Verify every leaf page and, with `data`, every block; return what is wrong.

        Exclusive. What is dirty is flushed first.
        """
        if not self.read_only and self.poisoned is None:
            yield from self.flush_steps()
        return (yield from check.check_steps(self._volume, data=data))

    def close_steps(self) -> Steps[None]:
        """Flush, checkpoint, mark the image clean, and let go of the storage, exclusive.

        Raises:
            StorageFailed: the image could not be brought up to date; it is let go of all the
                same, and the next open recovers what was acknowledged.
        """
        if self._is_closed:
            return
        try:
            if not self.read_only and self.poisoned is None:
                yield from self.flush_steps()
                if self._volume.needs_checkpoint or not self._volume.superblock.clean:
                    yield from self._guarded(self._volume.checkpoint_steps(clean=True))
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Let go of everything without writing, as a process does that is killed."""
        if not self._is_closed:
            self._is_closed = True
            self._cache.detach()
            self._storage.close()

    # -- the same, waiting in place (command line, tests)

    def read(self, offset: int, size: int) -> bytes:
        """As `read_steps`."""
        found = self.try_read(offset, size)
        return bytes(run(self.read_steps(offset, size)) if found is None else found)

    def write(self, offset: int, data: Buffer) -> None:
        """As `write_steps`; flushes when the cache is full."""
        limit = max(BLOCK_SIZE, min(1 << 20, self._cache.capacity // 2))
        view = memoryview(data)
        at = 0
        while at < len(view):
            # Pieces end on block borders, so that only the edges are merged.
            stop = min(len(view), (offset + at + limit) // BLOCK_SIZE * BLOCK_SIZE - offset)
            for _ in range(READ_ATTEMPTS_MAX):
                if run(self.write_steps(offset + at, view[at:stop])):
                    break
                self.flush()
            else:
                raise AssertionError("a flushed cache takes a write")
            at = stop

    def flush(self) -> None:
        """As `flush_steps`."""
        run(self.flush_steps())

    def checkpoint(self) -> None:
        """As `flush_steps` and `checkpoint_steps`."""
        run(self.flush_steps())
        run(self.checkpoint_steps())

    def discard(self, offset: int, size: int) -> None:
        """As `discard_steps`."""
        run(self.discard_steps(offset, size))

    def resize(self, size: int) -> None:
        """As `resize_steps`."""
        run(self.resize_steps(size))

    def preallocate(self, offset: int, size: int) -> None:
        """As `preallocate_steps`."""
        run(self.preallocate_steps(offset, size))

    def seek(self, offset: int, whence: int) -> int | None:
        """As `seek_steps`."""
        return run(self.seek_steps(offset, whence))

    def check(self, *, data: bool) -> list[check.Finding]:
        """As `check_steps`."""
        return run(self.check_steps(data=data))

    def close(self) -> None:
        """As `close_steps`."""
        run(self.close_steps())
