"""Plaintext blocks in memory: dirty ones in one slab, clean ones in order of use, with limits.

One `BlockCache` serves all images of a mount; each image has its `ImageCache` in it. Dirty blocks
are frames, slices of one anonymous mapping that is kept out of core dumps. A block being
committed keeps its frame until its commit is done; a write that comes meanwhile takes another.

Concurrency: the owner's thread only, but for frames under commit, which a worker may read, and
for `attach`: images are opened in workers. Above all `free` changes in the owner's thread alone:
the device receives into the frames that come next (_device.c) while others have the interpreter.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.plan import Buffer

CLEAN_MAX = 256 << 20
DIRTY_MAX = 64 << 20

_MADV_DONTDUMP = getattr(mmap, "MADV_DONTDUMP", 16)
_SORT_COUNT_MIN = 64
"""Taking that many frames sorts the free ones before: neighbours let a long write be one copy."""
_IMAGE_SHIFT = 48
"""Blocks of an image are below 2^35; the bits above tell images apart."""


class BlockCache:
    """The memory for plaintext of one mount.

    Args:
        clean_max: bytes of blocks kept after reading.
        dirty_max: bytes of blocks that wait to be committed.
    """

    def __init__(self, clean_max: int = CLEAN_MAX, dirty_max: int = DIRTY_MAX) -> None:
        self.clean_max = clean_max
        self.dirty_max = max(dirty_max, BLOCK_SIZE) // BLOCK_SIZE * BLOCK_SIZE
        # Not a dict: taking the first item off one again and again walks over all that are gone.
        self.clean: OrderedDict[int, bytes] = OrderedDict()
        """Clean blocks of all images, the one used longest ago first."""
        self.memory: mmap.mmap | None = None
        """All frames, for who keeps a hold on them: not on `view`, which the garbage collector may
        take apart before who holds it, and Python crashes."""
        self.view = memoryview(b"")
        self.free = list(range(self.dirty_max // BLOCK_SIZE - 1, -1, -1))
        """Frames that can be taken, the next one last."""
        self._frame_count = len(self.free)
        self._image_count = 0
        self._attaching = threading.Lock()
        self.on_room: Callable[[], None] = lambda: None
        """Called when frames were given back."""
        self.on_low: Callable[[], None] = lambda: None
        """Called when blocks became dirty, and fewer than half of the frames are free."""
        self.hits = 0

    @property
    def dirty_size(self) -> int:
        """Bytes in dirty frames, those under commit included."""
        return self.dirty_max - len(self.free) * BLOCK_SIZE

    @property
    def free_count(self) -> int:
        """Frames that can be taken."""
        return len(self.free)

    @property
    def clean_size(self) -> int:
        """Bytes of clean blocks."""
        return len(self.clean) * BLOCK_SIZE

    def attach(self) -> ImageCache:
        """Return a new image's part of the cache."""
        with self._attaching:
            if self.memory is None:
                # Mapped when the first image is opened, so that daemonising does not copy it.
                self.memory = mmap.mmap(-1, self.dirty_max)
                with contextlib.suppress(OSError):
                    self.memory.madvise(_MADV_DONTDUMP)
                self.view = memoryview(self.memory)
            self._image_count += 1
            return ImageCache(self, self._image_count << _IMAGE_SHIFT)

    def take_frames(self, count: int) -> list[int]:
        """Take `count` frames; that many must be free."""
        frames = self.free[-count:]
        del self.free[-count:]
        frames.reverse()
        return frames

    def take_frame(self) -> int:
        """Take one frame; -1 where there is none."""
        return self.free.pop() if self.free else -1

    def give_frames(self, frames: Sequence[int]) -> None:
        """Give frames back."""
        self.free.extend(frames)
        self.on_room()
        if len(frames) >= _SORT_COUNT_MIN:
            self.free.sort(reverse=True)

    def look(self) -> None:
        """Have it said when few frames are free."""
        if len(self.free) * 2 < self._frame_count:
            self.on_low()

    def drop_clean(self, first: int, count: int) -> None:
        """Forget a run of clean blocks."""
        clean = self.clean
        if not clean:
            return
        if count <= len(clean):
            for key in range(first, first + count):
                clean.pop(key, None)
        else:
            for key in [key for key in clean if first <= key < first + count]:
                del clean[key]


class ImageCache:
    """One image's blocks in the cache. Block numbers are indexes on its disk."""

    def __init__(self, cache: BlockCache, base: int) -> None:
        self.shared = cache
        """The memory of all images."""
        self.base = base
        """Added to the number of a block it is its key among all clean ones."""
        self._clean = cache.clean
        self._clean_count_max = cache.clean_max // BLOCK_SIZE
        self.dirty: dict[int, int] = {}
        """Block to frame: accepted, not yet taken by a commit."""
        self.committing: dict[int, int] = {}
        """Block to frame: taken by the commit that is running."""

    @property
    def dirty_size(self) -> int:
        """Bytes of this image that wait to be committed, or are being committed."""
        return (len(self.dirty) + len(self.committing)) * BLOCK_SIZE

    @property
    def capacity(self) -> int:
        """Bytes that can be dirty, of all images together."""
        return self.shared.dirty_max

    @property
    def free_count(self) -> int:
        """Frames that can be taken, by any image."""
        return self.shared.free_count

    @property
    def slab(self) -> memoryview:
        """All frames, of every image."""
        return self.shared.view

    def frame(self, frame: int) -> memoryview:
        """Return the content of a frame."""
        return self.shared.view[frame * BLOCK_SIZE : (frame + 1) * BLOCK_SIZE]

    def newest(self, block: int) -> memoryview | None:
        """Return the content of a block that is dirty or being committed."""
        frame = self.dirty.get(block)
        if frame is None:
            frame = self.committing.get(block)
            if frame is None:
                return None
        return self.frame(frame)

    def has_newer(self, first: int, count: int) -> bool:
        """Whether a block of a run is dirty or being committed."""
        blocks = range(first, first + count)
        return any(
            any(map(each.__contains__, blocks)) for each in (self.dirty, self.committing) if each
        )

    def missing(self, first: int, count: int) -> int:
        """Return how many frames writing this run would take."""
        dirty = self.dirty
        if not dirty:
            return count
        return count - sum(map(dirty.__contains__, range(first, first + count)))

    def put_block(self, block: int, content: Buffer) -> bool:
        """Make one block dirty; False where there is no frame for it."""
        frame = self.dirty.get(block)
        if frame is None:
            frame = self.shared.take_frame()
            if frame < 0:
                return False
            self.dirty[block] = frame
        at = frame * BLOCK_SIZE
        self.shared.view[at : at + BLOCK_SIZE] = content
        self._clean.pop(self.base + block, None)
        return True

    def put(self, first: int, content: Buffer) -> None:
        """Make whole blocks dirty; their frames must be free (`missing`)."""
        view, dirty = self.shared.view, self.dirty
        count = len(content) // BLOCK_SIZE
        if count > 1 and self.missing(first, count) == count:
            frames = self.shared.take_frames(count)
            dirty.update(zip(range(first, first + count), frames, strict=True))
            if frames == list(range(frames[0], frames[0] + count)):
                at = frames[0] * BLOCK_SIZE
                view[at : at + len(content)] = content
            else:
                for i, frame in enumerate(frames):
                    at = frame * BLOCK_SIZE
                    view[at : at + BLOCK_SIZE] = content[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        else:
            for i in range(count):
                frame = dirty.get(first + i, -1)
                if frame < 0:
                    frame = dirty[first + i] = self.shared.take_frames(1)[0]
                at = frame * BLOCK_SIZE
                view[at : at + BLOCK_SIZE] = content[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        self.shared.drop_clean(self.base + first, count)

    def begin_commit(self, blocks: Sequence[int] | None = None) -> None:
        """Hand dirty blocks (all, or these) to the commit that is beginning."""
        assert not self.committing, "one commit runs at a time"
        if blocks is None:
            self.committing, self.dirty = self.dirty, {}
        else:
            self.committing = {block: self.dirty.pop(block) for block in blocks}

    def begin_again(self, blocks: Sequence[int], content: Buffer) -> None:
        """Hand blocks that are committed already to a commit that seals them again.

        As many frames must be free. A newer, dirty block of that number stays what it is.
        """
        assert not self.committing, "one commit runs at a time"
        frames = self.shared.take_frames(len(blocks))
        for i, frame in enumerate(frames):
            self.frame(frame)[:] = content[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        self.committing = dict(zip(blocks, frames, strict=True))

    def finish(self, blocks: Iterable[int]) -> None:
        """Let go of blocks whose commit is durable and home."""
        self.shared.give_frames(list(map(self.committing.pop, blocks)))

    def discard(self, first: int, count: int) -> None:
        """Forget dirty and clean blocks of a run; none of them may be under commit."""
        dirty = self.dirty
        if count > len(dirty):
            gone = [block for block in dirty if first <= block < first + count]
        else:
            gone = [block for block in range(first, first + count) if block in dirty]
        self.shared.give_frames([dirty.pop(block) for block in gone])
        self.shared.drop_clean(self.base + first, count)

    def get_clean(self, block: int) -> bytes | None:
        """Return a clean block, if it is kept, and remember that it was used."""
        key = self.base + block
        content = self._clean.get(key)
        if content is not None:
            self._clean.move_to_end(key)
            self.shared.hits += 1
        return content

    def put_clean(self, block: int, content: bytes) -> None:
        """Keep a block that has been read; the one used longest ago makes room."""
        clean = self._clean
        clean[self.base + block] = content
        if len(clean) > self._clean_count_max:
            clean.popitem(last=False)

    def detach(self) -> None:
        """Give everything back; what was dirty is lost."""
        self.shared.give_frames([*self.dirty.values(), *self.committing.values()])
        self.dirty.clear()
        self.committing.clear()
        self.shared.drop_clean(self.base, 1 << _IMAGE_SHIFT)
