"""One sealed image in use: the operations a file under the mount is made of.

Knows neither FUSE nor names: a disk is found by the identity of its file (device and inode), so
renaming does not concern it.

Concurrency: everything here runs in the trio thread; only the work of the image's steps and the
opener run in worker threads. `try_read` and `try_write` of an image may be called by anybody at any
time. `Disk.exclusive` is held by whoever drives an operation that the image wants alone (flush,
checkpoint, discard, resize, preallocate, check, close) and while the image is being opened; waiters
are tasks of requests, the housekeeping task and the background flush. Between two trio checkpoints
nothing changes: `handles` and `image` are tested and acted on without an await in between.
What is driven is never cancelled (see workers.py).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import trio

from sealfs.errors import Busy, NotFound, ReadOnly
from sealfs.image.plan import Buffer
from sealfs.image.steps import run
from sealfs.mount.imagekeys import next_key
from sealfs.mount.workers import Workers

if TYPE_CHECKING:
    from sealfs.image.check import Part
    from sealfs.image.format import Anchor
    from sealfs.image.image import SealedImage
    from sealfs.image.sweep import Swept
    from sealfs.keys.statedir import ImageLock
    from sealfs.mount.imagekeys import MakesKeys

CHECK_GROUPS = 4  # verified in one go: 2 MiB, some milliseconds in which no flush begins
SWEEP_BLOCKS = 128  # sealed again in one go: a group, some milliseconds
LOCK_WAIT = 5.0  # seconds for another process to let go of an image
LOCK_RETRY = 0.05  # seconds between two tries
FLUSH_HERE_MAX = 0.002  # seconds that a flush may hold up the lane
SLOW_PAUSE = 1.0  # seconds without one after it took longer

FileKey = tuple[int, int]
"""Device and inode number of a sealed file."""


def deleted(path: Path) -> Path:
    """Return what stands for the path of a file without a name, as in /proc/PID/fd."""
    return Path(f"{path} (deleted)")


class Opened(NamedTuple):
    """An image just opened.

    `fd` is the sealed file's, the image's own: good for fstat and the like as long as it is open.
    `lock` keeps copies of the image from being opened; let go of after closing.
    """

    image: SealedImage
    vm_id: str
    fd: int
    lock: ImageLock | None = None


class ImageOpener(Protocol):
    """Opens sealed files, and remembers them; blocking, called in worker threads."""

    def open(self, path: Path) -> Opened:
        """Return the open image and its VM id; see opener.py for what it raises."""

    def note(self, images: Mapping[bytes, Anchor]) -> None:
        """Have the host remember how far images have come, by uuid; durable on return."""

    def bump(self) -> None:
        """Have the host bind what it remembers to its TPM; durable on return."""


class _Flush:
    """One flush that several callers may wait for, and how it ended."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class Disk:
    """One sealed image in use. `image` is set as long as `handles` is above zero."""

    def __init__(
        self,
        key: FileKey,
        path: Path,
        workers: Workers,
        on_durable: Callable[[Disk], Awaitable[None]] | None = None,
        on_closing: Callable[[Disk], Awaitable[None]] | None = None,
    ) -> None:
        self.key = key
        self.path = path
        self.vm_id = ""
        self.image: SealedImage | None = None
        self.handles = 0
        self.buffered_handles = 0  # of those, without O_DIRECT: the kernel may have pages of it
        self.idle_since = 0.0
        self.exclusive = trio.Lock()
        self.is_closing = False
        self.is_unlinked = False  # the file has no name any more: nothing of it need be kept
        self.fd = -1
        self._slow_until = 0.0  # time.monotonic() when `flush_here` may be tried again
        self.committed_at = 0.0  # time.monotonic() of the last commit
        self.noted: Anchor | None = None  # what the host remembers of it since this open
        self.noting: Anchor | None = None  # what it is about to remember
        self._workers = workers
        self._on_durable = on_durable
        self._on_closing = on_closing
        self._lock: ImageLock | None = None
        self._next_flush: _Flush | None = None

    @property
    def opened(self) -> SealedImage:
        """The image; only for whoever holds a handle."""
        image = self.image
        if image is None:
            raise AssertionError(f"{self.path} is not open")
        return image

    @property
    def size(self) -> int:
        """Bytes of the plain file."""
        return self.opened.size

    def file_status(self) -> os.stat_result | None:
        """Return the status of the sealed file, with a name or without; None unless it is open."""
        if self.image is None or self.is_closing:
            return None
        return os.fstat(self.fd)

    async def read(self, offset: int, size: int) -> Buffer:
        """Return the bytes of a range, fewer at the end of the file."""
        data = self.opened.try_read(offset, size)
        if data is None:
            data = await self._workers.drive(self.opened.read_steps(offset, size))
        return data

    async def flush(self) -> None:
        """Make durable whatever was accepted before; concurrent callers share one flush.

        A caller joins the flush that has not begun. One that has begun may have passed the
        caller's write already, so it does not count for it.
        """
        flush = self._next_flush
        if flush is not None:
            await flush.done.wait()
        else:
            flush = self._next_flush = _Flush()
            with trio.CancelScope(shield=True):
                async with self.exclusive:
                    # From here on newcomers need the flush after this one.
                    self._next_flush = None
                    try:
                        # Closed meanwhile: the close has flushed it.
                        if self.image is not None:
                            await self._workers.drive(self.image.flush_steps())
                            await self._durable()
                    except Exception as exc:
                        flush.error = exc
                    self.committed_at = time.monotonic()
                    flush.done.set()
        if flush.error is not None:
            raise flush.error

    def flush_here(self) -> bool:
        """Make everything accepted durable in the calling thread, if that is short; else False.

        For a mount where nobody else asks for anything: handing a small record to a worker and
        back takes as long as the device needs for it.

        Raises:
            SealfsError: as `flush`.
        """
        image, now = self.opened, time.monotonic()
        if (
            self._next_flush is not None
            or self._on_durable is not None
            or self.exclusive.locked()
            or now < self._slow_until
            or not image.is_quick_to_flush
        ):
            return False
        self.exclusive.acquire_nowait()
        try:
            run(image.flush_steps())
        finally:
            self.exclusive.release()
            self.committed_at = time.monotonic()
            if self.committed_at - now > FLUSH_HERE_MAX:
                self._slow_until = self.committed_at + SLOW_PAUSE
        return True

    async def _durable(self) -> None:
        """Something is durable; before that is said, the host may want to remember it."""
        self.committed_at = time.monotonic()
        if self._on_durable is not None:
            await self._on_durable(self)

    def is_settled(self) -> bool:
        """Whether a flush has nothing to do and nothing to report."""
        image = self.opened
        return not (image.is_dirty or image.poisoned or self.exclusive.locked())

    async def checkpoint(self) -> None:
        """Empty the journal."""
        async with self.exclusive:
            if self.image is not None and self.image.needs_checkpoint:
                await self._workers.drive(self.image.checkpoint_steps())

    async def discard(self, offset: int, size: int) -> None:
        """Turn a range into zeros, whole blocks into holes; durable on return."""
        async with self.exclusive:
            size = min(size, self.size - offset)
            if size > 0:
                await self._workers.drive(self.opened.discard_steps(offset, size))
                await self._durable()

    async def resize(self, size: int) -> None:
        """Set the size; durable on return."""
        async with self.exclusive:
            if size != self.size:
                await self._workers.drive(self.opened.resize_steps(size))
                await self._durable()

    async def extend(self, size: int) -> None:
        """Make the file at least `size` bytes long."""
        async with self.exclusive:
            if size > self.size:
                await self._workers.drive(self.opened.resize_steps(size))
                await self._durable()

    async def preallocate(self, offset: int, size: int) -> None:
        """Reserve space for a range, as far as it lies within the file."""
        async with self.exclusive:
            size = min(size, self.size - offset)
            if size > 0:
                await self._workers.drive(self.opened.preallocate_steps(offset, size))

    async def check_part(self, start: int, *, data: bool) -> Part:
        """Verify some groups from the group `start` on; the VM hardly notices."""
        async with self.exclusive:
            if self.image is None:
                raise NotFound(self.path, "is not in use any more")
            part: Part = await self._workers.drive(
                self.opened.check_part_steps(start, CHECK_GROUPS, data=data)
            )
        return part

    @property
    def wants_sweep(self) -> bool:
        """Whether blocks are to be sealed again: a rekey goes on, or the epoch table runs low."""
        image = self.image
        if image is None or self.is_closing or self.is_unlinked:
            return False
        if image.read_only or image.poisoned:
            return False
        return image.is_rekeying or image.wants_retirement

    async def begin_rekey(self, keys: MakesKeys) -> None:
        """Give the image its next key, unless it has it already; durable on return.

        Raises:
            ReadOnly: the image is open for reading.
            SealfsError: whatever the key service or the image says; nothing has changed.
        """
        async with self.exclusive:
            image = self.opened
            if image.read_only:
                raise ReadOnly(self.path, "is open for reading only")
            if image.is_rekeying:
                return
            lending = next_key(keys, image.identity, self.path)
            with contextlib.ExitStack() as stack:
                new = await self._workers.run(partial(stack.enter_context, lending))
                await self._workers.drive(image.begin_rekey_steps(new.wrapped, new.key))

    async def sweep_part(self, *, is_forced: bool = False) -> Swept | None:
        """Seal a few blocks again, if there is any reason to; None where there is none.

        Args:
            is_forced: make room in the epoch table though it does not run low.
        """
        async with self.exclusive:
            image = self.image
            if image is None or not (self.wants_sweep or is_forced):
                return None
            if image.is_rekeying:
                steps = image.rekey_part_steps(SWEEP_BLOCKS)
            else:
                steps = image.retire_part_steps(SWEEP_BLOCKS)
            # Mostly it waits for syncs: where the lane did not spin meanwhile, reads one by one ran
            # at 0.69 of their rate.
            swept: Swept = await self._workers.drive(steps, is_background=True)
            self.committed_at = time.monotonic()
        return swept

    async def rewrite_identity(
        self,
        generation: int,
        wrapped: tuple[tuple[int, bytes], ...] | None,
        slots: tuple[bytes, ...],
    ) -> bool:
        """Write other wrapped keys and recovery slots into the identity; durable on return.

        False when the image is not open any more.

        Raises:
            Busy: the identity is not the one that was asked about.
            ReadOnly: the image is open for reading.
        """
        async with self.exclusive:
            if self.image is None:
                return False
            known = self.opened.identity
            if known.generation != generation:
                raise Busy(self.path, "its identity was changed meanwhile: try again")
            wanted = replace(
                known,
                wrapped_keys=known.wrapped_keys if wrapped is None else wrapped,
                recovery_slots=slots,
            )
            await self._workers.drive(self.opened.rewrite_identity_steps(wanted))
        return True

    async def seek(self, offset: int, whence: int) -> int | None:
        """Return the next data or hole (os.SEEK_DATA, os.SEEK_HOLE); None past the last."""
        found: int | None = await self._workers.drive(self.opened.seek_steps(offset, whence))
        return found

    async def open(self, opener: ImageOpener, lock_wait: float) -> None:
        """Open the image unless it is open; a close under way is waited for.

        One that another process has is waited for as well, `lock_wait` seconds: the daemon of a
        mount that was unmounted a moment ago still closes its images.
        """
        if self.image is not None and not self.is_closing:
            return
        async with self.exclusive:
            deadline = trio.current_time() + lock_wait
            while self.image is None:
                try:
                    opened = await self._workers.run(partial(opener.open, self.path))
                except Busy:
                    if trio.current_time() >= deadline:
                        raise
                    await trio.sleep(LOCK_RETRY)
                else:
                    self.image, self.vm_id, self.fd, self._lock = opened
                    self.noted = self.noting = None
                    self.is_unlinked = False

    async def close(self) -> None:
        """Flush, checkpoint and close; the keys are gone afterwards, whatever happens."""
        async with self.exclusive:
            if self.image is None or self.handles:
                return
            await self._close()

    async def close_now(self) -> None:
        """Close even under open handles: the mount has ended."""
        async with self.exclusive:
            if self.image is not None:
                await self._close()

    async def _close(self) -> None:
        image = self.opened
        self.is_closing = True
        try:
            if image.poisoned or self.is_unlinked:
                # Nothing more can be promised, and recovery at the next open decides; or there
                # is no next open.
                await self._workers.drive(image.abandon_steps())
            else:
                try:
                    await self._workers.drive(image.flush_steps())
                    if self._on_closing is not None:
                        await self._on_closing(self)
                    await self._workers.drive(image.close_steps())
                except Exception:
                    await self._workers.drive(image.abandon_steps())
                    raise
        finally:
            self.image = None
            self.fd = -1
            self.is_closing = False
            if self._lock is not None:
                self._lock.close()
