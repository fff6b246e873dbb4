"""One sealed image as a disk: read, write, flush, discard, resize, at any offset and size.

Bytes are turned into whole blocks here; what is dirty is in the cache, what is committed in the
volume; `reader.py` reads from both, `committer.py` brings one to the other.

Concurrency: one owner thread calls everything here. `try_read` and `try_write` never wait for the
disk; whatever may wait is steps (`steps.py`). `read_steps` and `write_steps` may be under way in
any number; of the *exclusive* operations (flush, checkpoint, discard, resize, preallocate, check,
close) one at a time, and it is the caller who sees to that.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sealfs.errors import BlockDamaged, Busy, NoSpace, ReadOnly, StorageFailed, UsageError
from sealfs.image import check, recovery
from sealfs.image import identity as identities
from sealfs.image.cache import BlockCache
from sealfs.image.cipher import SealHook
from sealfs.image.committer import SMALL_COMMIT_BLOCKS, Committer
from sealfs.image.format import Anchor, Identity, RekeyPhase, next_generation
from sealfs.image.layout import (
    BLOCK_SIZE,
    ENTRY_SIZE,
    Geometry,
    block_count_of,
    group_runs,
)
from sealfs.image.outbox import Outbox
from sealfs.image.plan import Buffer
from sealfs.image.reader import ATTEMPTS_MAX, UNSURE, Fetch, Reader
from sealfs.image.recovery import ImageKeys, Witness
from sealfs.image.steps import Steps, run
from sealfs.image.storage import Storage, execute
from sealfs.image.sweep import PART_BLOCKS_MAX, Sweep, Swept
from sealfs.image.tree import NO_SLOT
from sealfs.image.volume import FREED_SLOTS_MAX, Volume

try:
    from sealfs.image._blocktake import Taker
except ImportError:  # it could not be built here; `try_write` does the same
    Taker = None  # type: ignore[assignment, misc]

if TYPE_CHECKING:
    from sealfs.image._blockread import Quick

HEAD_PAGES_MAX = 2  # of the record of a small commit
PREALLOCATE_GROUPS = 64
"""Groups that get their slots in one record."""

ROWS_FOR_RECOVERY = 1
"""Rows of the epoch table that are kept for a recovery: an image must always open."""
ROWS_KEPT = ROWS_FOR_RECOVERY + 2
"""What writes leave: a sweep, which makes room in the table, needs a row to seal under, and one
more where it was cut short and recovered."""

ROOM_WAIT = 0.01
ROOM_ATTEMPTS_MAX = 3000
"""Half a minute for other images to make room in the cache they share."""


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
        self._tree = volume.tree
        self._geometry = volume.geometry
        self._cache = cache.attach()
        self._reader = Reader(volume, self._cache)
        self._committer = Committer(volume, self._cache, self._reader)
        self._sweep = Sweep(volume, self._cache, self._reader, self._committer, self._guarded)
        self._is_closed = False

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
        cls, storage: Storage, *, image_key: ImageKeys, cache: BlockCache,
        random: Callable[[int], bytes] = os.urandom,
        geometry: Geometry = recovery.DEFAULT_GEOMETRY, read_only: bool = False,
        record_roots: bool = False, on_seal: SealHook | None = None,
        witness: Witness | None = None,
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
            witness=witness,
        )
        return cls(volume, identity, cache, read_only=read_only)

    # -- state

    @property
    def sequence(self) -> int:
        """Sequence of the last durable record."""
        return self._volume.journal.tail.sequence

    @property
    def lost_groups(self) -> list[int]:
        """Groups whose leaf page this open found damaged, where the journal had changes of it."""
        return self._volume.lost_groups

    @property
    def lost_ranges(self) -> list[check.Finding]:
        """What is lost because a node page is damaged that could not be rebuilt."""
        return check.lost_findings(self._volume)

    @property
    def rebuilt_nodes(self) -> list[str]:
        """Node pages, LEVEL.INDEX, that this open found damaged and has rebuilt."""
        return [f"{ref.level}.{ref.index}" for ref in self._tree.rebuilt]

    @property
    def slot_size(self) -> int:
        """Bytes of the file that a group takes, its leaf pages included."""
        return self._geometry.slot_size

    @property
    def group_size(self) -> int:
        """Bytes of the disk that a group holds: what one leaf page covers."""
        return self._geometry.group_blocks * BLOCK_SIZE

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
        """Whether the journal is half full, or many slots wait to be free."""
        journal, freed = self._volume.journal, self._volume.allocator.freed_count
        return not self.read_only and (
            journal.used_pages * 2 >= journal.page_count or freed * 2 >= FREED_SLOTS_MAX
        )

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
            "rekey": self.rekey_progress,
            "slots": volume.allocator.slot_count,
            "slots_used": volume.allocator.busy_count,
            "slot_size": volume.geometry.slot_size,
            "poisoned": self.poisoned,
            "lost_groups": list(volume.lost_groups),
        }

    @property
    def progress(self) -> Anchor:
        """How far the image has come: its last durable record."""
        return self._volume.journal.tail.anchor

    def remembering(self, state: Anchor) -> None:
        """Name a state in every superblock from now on: somebody is about to remember it.

        Only `progress` of this moment will do. Without this, a crash after some checkpoints would
        leave an image that cannot show that it continues what was remembered.
        """
        self._volume.pins = (*self._volume.pins[:1], state)

    def remembered(self, state: Anchor) -> None:
        """Name this state alone: it is the one that is remembered now."""
        self._volume.pins = (state,)

    # -- reading

    def try_read(self, offset: int, size: int) -> Buffer | None:
        """Return what is there if that needs no waiting for the disk, else None.

        Fewer bytes than asked for only at the end of the disk. The buffer is the caller's.

        Raises:
            BlockDamaged: a block does not authenticate.
        """
        end = min(offset + size, self.size)
        if end <= offset:
            return b""
        first = offset // BLOCK_SIZE
        count = (end - 1) // BLOCK_SIZE - first + 1
        out = self._reader.try_blocks(first, count)
        if out is None:
            return None
        if not offset % BLOCK_SIZE and end - offset == len(out):
            return out
        start = offset - first * BLOCK_SIZE
        return memoryview(out)[start : start + end - offset]

    def plan_read(self, offset: int, size: int) -> Fetch | None:
        """Return what reads whole blocks into a buffer, in any thread (`Reader.plan_blocks`).

        Args:
            offset: a multiple of BLOCK_SIZE.
            size: another one.
        """
        if offset + size > self.size:
            return None
        return self._reader.plan_blocks(offset // BLOCK_SIZE, size // BLOCK_SIZE)

    def send_blocks(self, offset: int, size: int, outbox: Outbox, header: bytes) -> int:
        """Answer with `header` and whole blocks, if nothing must be waited for.

        Args:
            offset: a multiple of BLOCK_SIZE.
            size: another one, of SEND_BLOCKS_MAX blocks at most.
            outbox: takes the answer.
            header: goes before them.

        Returns:
            SENT; or where in the sealed file `size` bytes are to be brought into the page cache
            before it is tried again; or UNSURE: `try_read` or `read_steps` can tell.

        Raises:
            BlockDamaged: the node page that names the blocks is lost.
        """
        if offset + size > self.size:
            return UNSURE
        return self._reader.send_blocks(offset // BLOCK_SIZE, size // BLOCK_SIZE, outbox, header)

    def quick(self) -> Quick | None:
        """Return what answers reads from memory alone, in one call; None where it was not built.

        As `send_blocks` where that returns SENT; in every other case it does nothing and says so.
        """
        return self._reader.quick(self)

    @property
    def descriptor(self) -> int:
        """The sealed file's, for bringing parts of it into the page cache; nothing else."""
        return self._storage.fileno()

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
        out = yield from self._reader.blocks_steps(first, count)
        start = offset - first * BLOCK_SIZE
        result: Buffer = out[start : start + end - offset]
        return result

    # -- writing

    def try_write(self, offset: int, data: Buffer) -> bool:
        """Accept a write into the cache if that needs no waiting; else return False.

        A write beyond the end makes the disk longer. Nothing is durable before a flush.

        Raises:
            BlockDamaged: the node page that names the blocks is lost.
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
        if (
            not (head or end % BLOCK_SIZE)
            and end <= self.size
            and self._accept_quickly(first, data)
        ):
            return True
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

    def taker(self) -> Taker | None:
        """Return what accepts the usual write in one call; None where that was not built.

        As `try_write`; where that does not return True at once it does nothing and says so.
        """
        if Taker is None:
            return None
        cache, shared, space = self._cache, self._cache.shared, self._volume.space
        assert shared.memory is not None, "it is mapped when an image is opened"
        return Taker(
            image=self, check=self._check_writable, cache=cache, shared=shared, clean=shared.clean,
            free=shared.free, nodes=self._tree.nodes[1], leaves=self._tree.leaves, space=space,
            reader=self._reader, slab=shared.memory, base=cache.base,
            group_blocks=self._geometry.group_blocks, fanout=self._geometry.fanout,
            part_blocks=space.part_blocks,
        )  # fmt: skip

    def _accept_quickly(self, first: int, data: Buffer) -> bool:
        """Make whole blocks dirty; False where that is not as simple as it mostly is."""
        count = len(data) // BLOCK_SIZE
        if not self._committer.has_space(first, count):
            return False
        if count == 1:
            if not self._cache.put_block(first, data):
                return False
        elif self._cache.missing(first, count) > self._cache.free_count:
            return False
        else:
            self._cache.put(first, data)
        self._note_accepted()
        return True

    def _accept(self, first: int, data: Buffer) -> bool:
        """Make whole blocks dirty, their space reserved; False when that must wait."""
        count = len(data) // BLOCK_SIZE
        if self._cache.missing(first, count) > self._cache.free_count:
            return False
        try:
            if not self._committer.reserve(first, count):
                return False
        except (NoSpace, BlockDamaged):
            self._committer.drop_unused_slots()
            raise
        self._cache.put(first, data)
        self._note_accepted()
        return True

    def _note_accepted(self) -> None:
        self._reader.version += 1
        if self.oldest_dirty is None:
            self.oldest_dirty = time.monotonic()
        self._cache.shared.look()

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
        for _ in range(ATTEMPTS_MAX):
            if self.try_write(offset, data):
                return True
            first, last = offset // BLOCK_SIZE, (end - 1) // BLOCK_SIZE
            count = last - first + 1
            if self._cache.missing(first, count) > self._cache.free_count:
                return False
            yield from self._reader.load_leaves_steps(self._unknown_groups(first, count))
            for block, is_edge in ((first, offset % BLOCK_SIZE), (last, end % BLOCK_SIZE)):
                if is_edge and block * BLOCK_SIZE < self.size:
                    yield from self._reader.blocks_steps(block, 1)
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

    def _check_writable(self, rows_kept: int = ROWS_KEPT) -> None:
        self._check_flushable()
        self._volume.table.check_room(rows_kept + self._volume.cipher.is_nearly_spent)
        self._volume.space.reserve_metadata()

    def _check_flushable(self) -> None:
        if self.read_only:
            raise ReadOnly(self.path, "is open for reading only")
        if self._is_closed:
            # What accepts writes may outlive it: nothing would ever flush them.
            raise StorageFailed(self.path, "is closed")
        if self.poisoned is not None:
            raise StorageFailed(
                self.path, f"takes no writes until it is opened again: {self.poisoned}"
            )

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
        if not self.is_dirty and self.poisoned is None:
            self.oldest_dirty = None  # what was written has been discarded
            return
        self._check_flushable()
        self.oldest_dirty = None
        yield from self._guarded(self._committer.commit_dirty_steps(self.size))

    @property
    def is_quick_to_flush(self) -> bool:
        """Whether flushing is one small record, with no checkpoint before it."""
        count = len(self._cache.dirty)
        if count > SMALL_COMMIT_BLOCKS or self.poisoned is not None or self.read_only:
            return False
        return not self._volume.cipher.is_spent and self._volume.has_room(count + HEAD_PAGES_MAX)

    def checkpoint_steps(self) -> Steps[None]:
        """Write the tree, free the journal, punch what was discarded, exclusive."""
        if self.needs_checkpoint:
            self._check_flushable()
            yield from self._guarded(self._volume.checkpoint_steps())
            self._committer.drop_unused_slots()

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
        # The block in which the disk ends is an edge too: it may have grown meanwhile.
        first, last = block_count_of(offset), end // BLOCK_SIZE
        self._tree.check_lost(first, last - first)
        # Unaligned head
        if first * BLOCK_SIZE > offset:
            yield from self._zero_steps(offset, min(end, first * BLOCK_SIZE))
        # Unaligned tail
        if last >= first and last * BLOCK_SIZE < end:
            yield from self._zero_steps(last * BLOCK_SIZE, end)
        # Aligned body
        if last > first:
            cut = self._committer.partial_groups(first, last - first)
            yield from self._reader.load_leaves_steps(cut)
            self._committer.reserve_leaves(cut)
            yield from self._guarded(self._committer.discard_steps(first, last - first))
        if self.is_dirty:
            yield from self.flush_steps()

    def _zero_steps(self, offset: int, end: int) -> Steps[None]:
        zeros = bytes(end - offset)
        for _ in range(ROOM_ATTEMPTS_MAX):
            if (yield from self.write_steps(offset, zeros)):
                return
            yield from self.flush_steps()
            if self._cache.free_count == 0:
                # Other images hold the whole cache: their flushes make room.
                yield partial(time.sleep, ROOM_WAIT)
        raise Busy(self.path, "the dirty cache stays full")

    def resize_steps(self, size: int) -> Steps[None]:
        """Set the size of the disk; durable on return, exclusive.

        What is cut off is gone: growing again shows zeros.

        Raises:
            BlockDamaged: it would cut off a part of what a lost node page covers.
            UsageError: not a size a disk can have.
        """
        self._check_writable()
        if not 0 <= size <= self._geometry.size_max:
            raise UsageError(
                self.path, f"size of {size} bytes, a disk has 0 to {self._geometry.size_max}"
            )
        tail = block_count_of(size)
        self._tree.check_lost(tail, block_count_of(self.size) - tail)
        yield from self.flush_steps()
        if size >= self.size:
            self.size = size
            yield from self.flush_steps()
            return
        if size % BLOCK_SIZE:
            # Unaligned tail: it becomes zero in the same record as the size.
            stop = min(block_count_of(size) * BLOCK_SIZE, self.size)
            yield from self._zero_steps(size, stop)
        end = self._geometry.size_max // BLOCK_SIZE
        cut = self._committer.partial_groups(tail, end - tail)
        yield from self._reader.load_leaves_steps(cut)
        self._committer.reserve_leaves(cut)
        yield from self._guarded(self._committer.shrink_steps(size))
        self.size = size
        if not self._cache.dirty:
            self.oldest_dirty = None

    def preallocate_steps(self, offset: int, size: int) -> Steps[None]:
        """Reserve slots and space for a range, so that writing it cannot fail for want of it.

        Durable on return; changes neither size nor content, exclusive.

        Raises:
            NoSpace: the storage is full.
        """
        self._check_writable()
        try:
            yield from self._allocate_steps(offset, size)
        finally:
            self._committer.allocating.clear()
            self._committer.drop_unused_slots()

    def _allocate_steps(self, offset: int, size: int) -> Steps[None]:
        end = min(offset + size, self._geometry.size_max)
        group_blocks = self._geometry.group_blocks
        first = offset // BLOCK_SIZE
        pending: list[int] = []
        for group, index, part in group_runs(first, block_count_of(end) - first, group_blocks):
            slot = self._tree.slot_of(group)
            if slot != NO_SLOT:
                yield partial(self._volume.space.reserve, slot, index, part)
                continue
            self._committer.allocating.add(group)
            if group not in self._committer.reserved:
                self._committer.reserve_slot(group)
            slot = self._committer.reserved[group]
            yield partial(self._volume.space.reserve, slot, 0, group_blocks)
            pending.append(group)
            if len(pending) >= PREALLOCATE_GROUPS:
                yield from self._guarded(self._committer.alloc_steps(pending))
                pending = []
        if pending:
            yield from self._guarded(self._committer.alloc_steps(pending))

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
            if self._tree.slot_of(group) == NO_SLOT and not self._committer.is_dirty_group(group):
                if not wants_data:
                    return max(offset, block * BLOCK_SIZE)
                block = self._committer.next_group(group) * group_blocks
                continue
            yield from self._reader.load_leaves_steps([group])
            leaf = self._tree.leaf(group)
            stop = min(end, (group + 1) * group_blocks)
            for candidate in range(block, stop):
                at = candidate % group_blocks * ENTRY_SIZE
                is_data = bool(leaf and leaf[at + 28]) or self._cache.newest(candidate) is not None
                if is_data == wants_data:
                    return max(offset, candidate * BLOCK_SIZE)
            block = stop
        return None if wants_data else self.size

    def check_steps(self, *, data: bool) -> Steps[list[check.Finding]]:
        """Verify every leaf page and, with `data`, every block; return what is wrong.

        Exclusive. What is dirty is flushed first.
        """
        if not self.read_only and self.poisoned is None:
            yield from self.flush_steps()
        every = self._geometry.group_count_max
        return (yield from check.check_part_steps(self._volume, 0, every, data=data)).findings

    def check_part_steps(self, start: int, count: int, *, data: bool) -> Steps[check.Part]:
        """Verify `count` groups from the group `start` on, as the device has them; exclusive.

        What waits in the cache is not looked at, and nothing is flushed for it.
        """
        return (yield from check.check_part_steps(self._volume, start, count, data=data))

    # -- another image key, fewer epochs (FORMAT.md 11)

    @property
    def is_rekeying(self) -> bool:
        """Whether the image key is being replaced; `rekey_part_steps` goes on with it."""
        return bool(self.identity.new_generation or self._volume.superblock.rekey.phase)

    @property
    def rekey_sizes(self) -> tuple[int, int]:
        """Bytes of the disk that a rekey is done with, and of all; group by group."""
        done = total = self._tree.group_count()
        if self._volume.superblock.rekey.phase < RekeyPhase.SWEPT:
            done -= self._tree.group_count(self._volume.cursor)
        return done * self.group_size, total * self.group_size

    @property
    def rekey_progress(self) -> dict[str, int] | None:
        """The same for people and programs, None where no rekey is under way."""
        if not self.is_rekeying:
            return None
        return dict(zip(("done", "total"), self.rekey_sizes, strict=True))

    @property
    def wants_retirement(self) -> bool:
        """Whether the epoch table runs low; `retire_part_steps` makes room in it."""
        return not self.read_only and not self.is_rekeying and self._sweep.wants_retirement

    def begin_rekey_steps(self, wrapped: bytes, image_key: Buffer) -> Steps[None]:
        """Put the next image key into the identity, beside the present one; exclusive.

        Durable on return, in both copies. `rekey_part_steps` does the rest.

        Args:
            wrapped: the key as the identity keeps it.
            image_key: 32 fresh random bytes; copied, the caller may wipe them.

        Raises:
            Busy: one is being replaced already.
            BlockDamaged: a node page is lost, what it covers cannot be sealed again.
            NoSpace: the epoch table is full.
        """
        self._check_writable(ROWS_FOR_RECOVERY + 1)
        if self.is_rekeying:
            raise Busy(self.path, "its image key is being replaced already")
        self._tree.check_lost(0, self._geometry.group_count_max * self._geometry.group_blocks)
        known = self.identity
        generation = next_generation(known.key_generation)
        self._volume.cipher.add_image_key(generation, image_key)
        keys = (*known.wrapped_keys, (generation, wrapped))
        yield from self.rewrite_identity_steps(replace(known, wrapped_keys=keys))

    def rekey_part_steps(self, blocks_max: int = PART_BLOCKS_MAX) -> Steps[Swept]:
        """Go on with the replacement of the image key; durable on return, exclusive.

        When the answer says that it is done, nothing in the image is under the old key, which is
        overwritten in both copies of the identity.

        Raises:
            BlockDamaged: what is left does not verify.
            NoSpace: the storage, or the epoch table, is full.
        """
        self._check_writable(ROWS_FOR_RECOVERY)
        volume = self._volume
        if volume.superblock.rekey.phase < RekeyPhase.SWEEPING:
            volume.table.check_room(ROWS_FOR_RECOVERY + 1)
            # Both copies must have the next key before anything is under it.
            yield from self.rewrite_identity_steps(self.identity)
            yield from self._guarded(self._sweep.switch_steps())
            return Swept(0, 0)
        if volume.superblock.rekey.phase is RekeyPhase.SWEEPING:
            swept = yield from self._sweep.rekey_part_steps(blocks_max)
            if not swept.is_done:
                return swept
            yield from self._guarded(volume.checkpoint_steps(phase=RekeyPhase.SWEPT))
        # Both superblocks, or one damaged sector would call for the key that is about to go.
        yield from self._guarded(volume.checkpoint_steps())
        # Crash here: nothing needs the old key; the identity is written again at the next open.
        generation = volume.superblock.key_generation
        keys = tuple(each for each in self.identity.wrapped_keys if each[0] == generation)
        yield from self.rewrite_identity_steps(
            replace(self.identity, key_generation=generation, wrapped_keys=keys)
        )
        # Crash here: both copies have the new key alone, and the superblock says what was done.
        old = volume.superblock.rekey.old_generation
        yield from self._guarded(volume.checkpoint_steps(phase=RekeyPhase.NONE))
        volume.forget_generation(old)
        return Swept(0, 0, is_done=True, what="nothing is under the old image key any more")

    def retire_part_steps(self, blocks_max: int = PART_BLOCKS_MAX) -> Steps[Swept]:
        """Go on to make room in the epoch table; exclusive. See `Sweep.retire_part_steps`.

        Raises:
            NoSpace: the storage, or the epoch table, is full.
        """
        self._check_writable(ROWS_FOR_RECOVERY)
        return (yield from self._sweep.retire_part_steps(blocks_max))

    def rewrite_identity_steps(self, wanted: Identity) -> Steps[None]:
        """Write the identity anew (see `identity.plan_of`); durable on return, exclusive."""
        self._check_flushable()
        cipher = self._volume.cipher
        keys = {each: cipher.subkeys(each).identity for each in cipher.generations}
        after, plan = yield partial(identities.plan_of, self._storage, wanted, keys, self._geometry)

        def write_steps() -> Steps[None]:
            yield partial(execute, self._storage, plan)

        # A failed durable write may have swallowed an error of the data: poisoned as by any other.
        yield from self._guarded(write_steps())
        self.identity = after

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
        run(self.abandon_steps())

    def abandon_steps(self) -> Steps[None]:
        """As `abandon`, exclusive: closing the last of a large file without a name takes long."""
        if not self._is_closed:
            self._is_closed = True
            self._cache.detach()  # not in a worker: frames are given back in the owner's thread
            self._volume.cipher.forget()
            yield self._storage.close

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
            for _ in range(ATTEMPTS_MAX):
                if run(self.write_steps(offset + at, view[at:stop])):
                    break
                self.flush()
            else:
                # Other images hold the whole cache.
                raise Busy(self.path, "the dirty cache stays full")
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

    def rewrite_identity(self, wanted: Identity) -> None:
        """As `rewrite_identity_steps`."""
        run(self.rewrite_identity_steps(wanted))

    def begin_rekey(self, wrapped: bytes, image_key: Buffer) -> None:
        """As `begin_rekey_steps`."""
        run(self.begin_rekey_steps(wrapped, image_key))

    def rekey_part(self, blocks_max: int = PART_BLOCKS_MAX) -> Swept:
        """As `rekey_part_steps`."""
        return run(self.rekey_part_steps(blocks_max))

    def retire_part(self, blocks_max: int = PART_BLOCKS_MAX) -> Swept:
        """As `retire_part_steps`."""
        return run(self.retire_part_steps(blocks_max))

    def close(self) -> None:
        """As `close_steps`."""
        run(self.close_steps())
