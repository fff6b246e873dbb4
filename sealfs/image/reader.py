"""Read blocks: from the cache, or from the disk verified and opened.

Knows whole blocks only. The parts that wait run in a worker and look at leaf entries while a
commit may change them; an outdated entry never opens the new ciphertext nor the other way round,
so such a read fails, is found outdated, and is repeated: never wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sealfs.errors import BlockDamaged
from sealfs.image.cache import ImageCache
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, group_runs, runs_of
from sealfs.image.outbox import Outbox
from sealfs.image.plan import Buffer
from sealfs.image.steps import Steps
from sealfs.image.tree import NO_SLOT
from sealfs.image.volume import Volume

try:
    from sealfs.image._blockread import Quick
except ImportError:  # it could not be built here; `send_blocks` does the same
    Quick = None  # type: ignore[assignment, misc]

CACHED_READ_BLOCKS_MAX = 16
"""Longer reads leave no clean blocks behind: a scan would only push out what is used."""

SEND_BLOCKS_MAX = 32

KEEP_EVERY = 16
"""Of the blocks met in the page cache one in so many is kept: what is read often soon is, and what
is read once seldom pushes it out. Keeping one costs half of what reading it does."""

SENT = -1
UNSURE = -2

ATTEMPTS_MAX = 16
"""A read that meets a commit again and again gives up in the end, rather than spin."""

_ZEROS = memoryview(bytes(SEND_BLOCKS_MAX * BLOCK_SIZE))

SendBlocks = Callable[[int, int, int, int, Buffer, int, Any, bytes, bool], bytes | bool | None]
"""As `Opener.send`."""

Fetch = Callable[[memoryview, bool], bool]
"""As what `plan_blocks` returns."""

Piece = tuple[int, int, int, int, int, bytes | None, tuple[int, int, bytes]]
"""(position in the answer, group, index, count, slot, entries or None, leaf source)."""


class Reader:
    """Reads the blocks of one image; `version` is raised by whoever changes what a read finds."""

    def __init__(self, volume: Volume, cache: ImageCache) -> None:
        self.version = 0
        """Grows with every accepted write and discard."""
        self._met = 0  # answers that came from the page cache
        self._volume = volume
        self._storage = volume.storage
        self._cipher = volume.cipher
        self._tree = volume.tree
        self._geometry = volume.geometry
        self._cache = cache
        # What the hot path uses, looked up once.
        geometry = volume.geometry
        self._group_blocks, self._fanout = geometry.group_blocks, geometry.fanout
        self._first_home, self._slot_size = geometry.block_offset(0, 0), geometry.slot_size
        self._level1, self._leaves = volume.tree.nodes[1], volume.tree.leaves
        self._lost = volume.tree.lost
        self._descriptor, opener = volume.storage.fileno(), volume.cipher.opener
        has_opener = opener is not None and self._descriptor >= 0
        self._send: SendBlocks = opener.send if opener and has_opener else self._send_plainly

    def quick(self, image: object) -> Quick | None:
        """Return what does the usual case of `send_blocks`; None where that was not built.

        Args:
            image: whose `size` is how long the disk is.
        """
        opener = self._cipher.opener
        if Quick is None or opener is None or self._descriptor < 0:
            return None
        cache = self._cache
        return Quick(
            image=image, volume=self._volume, cache=cache, shared=cache.shared,
            clean=cache.shared.clean, nodes=self._level1, leaves=self._leaves, opener=opener,
            fd=self._descriptor, base=cache.base, group_blocks=self._group_blocks,
            fanout=self._fanout, first_home=self._first_home, slot_size=self._slot_size,
            keep_every=KEEP_EVERY,
        )  # fmt: skip

    def send_blocks(self, first: int, count: int, outbox: Outbox, header: bytes) -> int:
        """Answer with `header` and blocks, if nothing must be waited for.

        The hot path of a busy guest, written out flat: every call and attribute that is not
        here is a tenth of a microsecond saved on each read.

        Args:
            first: index of the first block.
            count: SEND_BLOCKS_MAX at most.
            outbox: takes the answer.
            header: goes before them.

        Returns:
            SENT; or where in the sealed file count * BLOCK_SIZE bytes are to be in the page cache
            first; or UNSURE: it takes another way.

        Raises:
            BlockDamaged: the node page that names them is lost.
        """
        cache = self._cache
        content: Buffer | None
        if count == 1:
            if cache.dirty or cache.committing:
                content = cache.newest(first)
                if content is not None:
                    outbox.put(header, content)
                    return SENT
            content = cache.get_clean(first)
            if content is not None:
                outbox.put(header, content)
                return SENT
        elif cache.has_newer(first, count):
            return UNSURE
        group, index = divmod(first, self._group_blocks)
        node_index, i = divmod(group, self._fanout)
        node = self._level1.get(node_index)
        if index + count > self._group_blocks:
            return UNSURE
        if node is None or not node.present[i]:
            if self._lost:
                self._tree.check_lost(first, count)
            outbox.put(header, _ZEROS[: count * BLOCK_SIZE])
            return SENT
        if self._volume.inline:
            return UNSURE
        leaf = self._leaves.get(group)
        if leaf is None:
            leaf, missing = self.leaf_at_hand(group)
            if leaf is None:
                return missing
        at = index * ENTRY_SIZE
        if not leaf[at + 28]:
            if count > 1:
                return UNSURE
            outbox.put(header, _ZEROS[:BLOCK_SIZE])
            return SENT
        # Another block of a run may be a hole: its entry names epoch 0, which nobody knows.
        offset = self._first_home + node.slots[i] * self._slot_size + index * BLOCK_SIZE
        self._met += 1
        keep = count == 1 and not self._met % KEEP_EVERY
        while True:
            try:
                sent = self._send(
                    self._descriptor, offset, first, count, leaf, at, outbox, header, keep
                )
                break
            except KeyError as exc:
                (epoch,) = exc.args
                if not self._cipher.teach(epoch):
                    return UNSURE
        if not sent:
            # What does not authenticate: blocks_steps tells damage from a commit that came between.
            return UNSURE if sent is False else offset
        if sent is not True:
            cache.put_clean(first, sent)
        return SENT

    def _send_plainly(
        self, fd: int, offset: int, first: int, count: int, leaf: Buffer, at: int, outbox: Any,
        header: bytes, keep: bool,
    ) -> bytes | bool | None:  # fmt: skip
        """As `Opener.send`, where that was not built, or there is no file but a simulated disk."""
        run = memoryview(bytearray(count * BLOCK_SIZE))
        if not self._storage.read_nowait(offset, run):
            return None
        try:
            self._cipher.open_blocks(first, run, leaf[at : at + count * ENTRY_SIZE])
        except BlockDamaged:
            return False
        outbox.put(header, run)
        return bytes(run) if keep else True

    def leaf_at_hand(self, group: int) -> tuple[bytearray | None, int]:
        """Return a group's leaf page if the page cache has it; else what `send_block` returns."""
        slot, hint, mac = self._tree.leaf_source(group)
        offset, page = self._geometry.leaf_offset(slot, hint & 1), bytearray(BLOCK_SIZE)
        if not self._storage.read_nowait(offset, page):
            return None, offset
        if not self._tree.verify_leaf(group, bytes(page), mac):
            return None, UNSURE  # at its other place, or damaged
        return self._tree.admit_leaf(group, bytes(page), hint & 1, mac), UNSURE

    def try_blocks(self, first: int, count: int) -> bytearray | None:
        """Return whole blocks if that needs no waiting for the disk, else None."""
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
                return None  # blocks_steps tells damage from a commit that came between
        return out

    def plan_blocks(self, first: int, count: int) -> Fetch | None:
        """Return what reads a run, in any thread; None where a part of it is in the cache.

        Also where a leaf page would have to be waited for. Called with a buffer of `count` blocks
        and whether it may wait for the disk, it returns whether it needed not to, and the buffer
        holds what was there at some time since this call.

        Raises:
            BlockDamaged, StorageFailed: when it is called; `blocks_steps` can tell damage from a
                commit that came between.
        """
        if self._cache.has_newer(first, count):
            return None
        pieces: list[tuple[Piece, bytes]] = []
        present = 0
        for group, index, part in group_runs(first, count, self._group_blocks):
            if self._tree.slot_of(group) != NO_SLOT and group not in self._leaves:
                leaf, _ = self.leaf_at_hand(group)
                if leaf is None:
                    return None
            position = (group * self._group_blocks + index - first) * BLOCK_SIZE
            for piece in self._pieces(position, group, index, part):
                entries = piece[5]
                assert entries is not None
                pieces.append((piece, entries))
                present += entries[28::ENTRY_SIZE].count(1)

        def fetch(view: memoryview, may_wait: bool) -> bool:
            if present < count:
                view[:] = bytes(len(view))
            read = self._read_whole if may_wait else self._storage.read_nowait
            return all(self._fetch(piece, entries, view, read) for piece, entries in pieces)

        return fetch

    def blocks_steps(self, first: int, count: int) -> Steps[memoryview]:
        """Return whole blocks; on return they are what was there at some time since the call.

        Raises:
            BlockDamaged: a block, or the leaf page that names it, does not authenticate.
            StorageFailed: reading the storage failed.
        """
        view = memoryview(bytearray(count * BLOCK_SIZE))
        for attempt in range(ATTEMPTS_MAX):
            version = self.version
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
                if count <= CACHED_READ_BLOCKS_MAX and version == self.version:
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
            at = position + start * BLOCK_SIZE
            run = view[at : at + length * BLOCK_SIZE]
            offset = self._geometry.block_offset(slot, index + start)
            if inline:
                offset = inline.get(first + start, offset)
            if not read(offset, run):
                return False
            self._cipher.open_blocks(
                first + start, run, entries[start * ENTRY_SIZE : (start + length) * ENTRY_SIZE]
            )
        return True

    def load_leaves_steps(self, groups: list[int]) -> Steps[None]:
        """Have the leaf pages of these groups in memory, where they have a slot."""
        for group in groups:
            failed = None
            while self._tree.slot_of(group) != NO_SLOT and self._tree.leaf(group) is None:
                source = self._tree.leaf_source(group)
                try:
                    page, place = yield partial(self._volume.read_leaf, group, source)
                except BlockDamaged:
                    # Twice the same: damaged. Else a checkpoint came between: look again.
                    if failed == source:
                        raise
                    failed = source
                else:
                    self._tree.admit_leaf(group, page, place, source[2])
