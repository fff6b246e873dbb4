"""All sealed images of a mount: opened at the first open, kept in order, closed some time after.

`Disks` holds the disks (disk.py) that have open handles or had them a moment ago; they share one
block cache. It makes room in it, commits what is old, checkpoints what is quiet, has the host
remember how far each image has come, and closes what nobody uses.

Concurrency: everything here runs in the trio thread; see disk.py for what is driven where.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from sealfs.errors import StorageFailed
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.plan import Buffer
from sealfs.mount.disk import LOCK_WAIT, Disk, FileKey, ImageOpener, deleted
from sealfs.mount.failures import Failures
from sealfs.mount.workers import Workers

if TYPE_CHECKING:
    from sealfs.image.cache import BlockCache
    from sealfs.image.image import SealedImage

NOTE_INTERVAL = 1.0  # seconds that an attacker with the images alone can turn back
BUMP_INTERVAL = 1200.0  # seconds that one with the host's disk too can; TPM counters wear out
COMMIT_INTERVAL = 5.0  # seconds after the oldest unflushed write
IDLE_CLOSE = 60.0  # seconds after the last close
QUIET_CHECKPOINT = 10.0  # seconds without a flush after which the journal is emptied


class Disks:
    """All disks of a mount: opening, throttling, the commit timer and closing when idle."""

    def __init__(
        self,
        *,
        opener: ImageOpener,
        workers: Workers,
        cache: BlockCache,
        failures: Failures,
        commit_interval: float = COMMIT_INTERVAL,
        idle_close: float = IDLE_CLOSE,
        lock_wait: float = LOCK_WAIT,
        note_each_flush: bool = False,
        bump_interval: float = BUMP_INTERVAL,
    ) -> None:
        self.workers = workers
        self.cache = cache
        self.failures = failures
        self._opener = opener
        self._commit_interval = commit_interval
        self._idle_close = idle_close
        self._lock_wait = lock_wait
        self._on_durable = self._note_now if note_each_flush else None
        self._bump_interval = bump_interval
        self._bumped_at = time.monotonic()
        self._has_noted = False  # since the last bump
        self._noting = trio.Lock()
        self._disks: dict[FileKey, Disk] = {}
        self._dirty_half = cache.dirty_max // 2
        self._relieving = False
        self._nursery: trio.Nursery | None = None
        self._waiting = 0
        self._room = trio.Event()
        cache.on_room = self._announce_room
        cache.on_low = self._flush_behind

    def find(self, key: FileKey) -> Disk | None:
        """Return the disk of a sealed file if its image is open and stays so for now."""
        disk = self._disks.get(key)
        return disk if disk is not None and disk.image is not None else None

    def all(self) -> list[Disk]:
        """Return the disks whose image is open."""
        return [disk for disk in self._disks.values() if disk.image is not None]

    async def acquire(self, key: FileKey, path: Path) -> Disk:
        """Return the open disk of a sealed file with one handle more; `release` gives it back.

        Raises:
            SealfsError: what the opener says; the next call tries again.
        """
        disk = self._disks.get(key)
        if disk is None:
            for other in [d for d in self._disks.values() if d.path == path and not d.handles]:
                await self.close_idle(other.key)  # replaced from outside: it is in nobody's way
            fresh = Disk(key, path, self.workers, self._on_durable, self._note_at_close)
            disk = self._disks.setdefault(key, fresh)
        disk.handles += 1
        try:
            if disk.image is None or disk.is_closing:
                disk.path = path
                self.failures.forget(str(path))
            await disk.open(self._opener, self._lock_wait)
        except BaseException:
            disk.handles -= 1
            self._drop(disk)
            raise
        return disk

    def release(self, disk: Disk) -> None:
        """Give a handle back; after the last one the image is settled, and closed later."""
        disk.handles -= 1
        if disk.handles == 0:
            disk.idle_since = time.monotonic()
            self.start(self._settle, disk)

    def unlinked(self, key: FileKey) -> None:
        """Note that a sealed file has lost its name; whoever has it open keeps it until closed."""
        disk = self._disks.get(key)
        if disk is not None and disk.image is not None:
            disk.is_unlinked = True
            disk.path = deleted(disk.path)
            if disk.handles == 0:
                self.start(self._settle, disk)

    async def close_idle(self, key: FileKey) -> bool:
        """Close the image of a sealed file now; False if it has open handles."""
        disk = self._disks.get(key)
        if disk is None:
            return True
        if disk.handles:
            return False
        await disk.close()
        self._drop(disk)
        return disk.image is None

    async def write(self, disk: Disk, offset: int, data: Buffer, *, durable: bool) -> None:
        """Take a write, waiting for room in the cache if need be; durable on return if asked.

        `data` must not change until this returns.
        """
        image = disk.opened
        while not await self.workers.drive(image.write_steps(offset, data)):
            if self.cache.free_count * BLOCK_SIZE > len(data) + 2 * BLOCK_SIZE:
                # There is room: space of this disk is being given back. A flush comes after it.
                await disk.flush()
            else:
                await self._make_room()
        if durable:
            await disk.flush()

    def _flush_behind(self) -> None:
        """Over half of the cache is dirty: flush behind the writers."""
        if not self._relieving:
            self._relieving = True
            self.start(self._relieve)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep house until cancelled: commit timer, checkpoints of quiet disks, idle closing."""
        tick = max(0.02, min(1.0, self._commit_interval / 5, self._idle_close / 5))
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._remember)
            task_status.started()
            try:
                while True:
                    await trio.sleep(tick)
                    for disk in self.all():
                        await self._quietly(disk, partial(self._care, disk))
            finally:
                self._nursery = None

    async def close_all(self) -> dict[str, str]:
        """Close every image, also under handles; return what could not be closed cleanly."""
        failed: dict[str, str] = {}
        for disk in list(self._disks.values()):
            try:
                await disk.close_now()
            except Exception as exc:
                self._report(disk, exc)
                failed[str(disk.path)] = str(exc)
        self._disks.clear()
        await self._bump()
        return failed

    async def note(self, disks: list[Disk]) -> None:
        """Have the host remember how far these disks have come; durable on return.

        Raises:
            SealfsError: it could not; what it may or may not remember now is tried again.
        """
        async with self._noting:
            news: dict[Disk, SealedImage] = {}
            for disk in disks:
                image = disk.image
                if image is None or image.read_only or disk.is_unlinked:
                    continue
                if disk.noting is None and image.progress != disk.noted:
                    disk.noting = image.progress
                    image.remembering(disk.noting)
                if disk.noting is not None:
                    news[disk] = image
            if not news:
                return
            states = {image.uuid: disk.noting for disk, image in news.items() if disk.noting}
            await self.workers.run(partial(self._opener.note, states))
            self._has_noted = True
            for disk, image in news.items():
                if disk.image is image and disk.noting is not None:
                    image.remembered(disk.noting)
                    disk.noted, disk.noting = disk.noting, None

    async def _note_now(self, disk: Disk) -> None:
        """Note the state of this moment, also when an older one is still waiting to be."""
        state = disk.opened.progress
        while disk.noted != state and not (disk.opened.read_only or disk.is_unlinked):
            await self.note([disk])

    async def _note_at_close(self, disk: Disk) -> None:
        await self._unharmed(partial(self._note_now, disk))

    async def _remember(self) -> None:
        """Note all disks each second, and bump now and then, until cancelled."""
        while True:
            await trio.sleep(NOTE_INTERVAL)
            await self._unharmed(partial(self.note, self.all()))
            if time.monotonic() - self._bumped_at >= self._bump_interval:
                await self._bump()

    async def _bump(self) -> None:
        if self._has_noted:
            self._bumped_at = time.monotonic()
            self._has_noted = False
            await self._unharmed(self._try_bump)

    async def _try_bump(self) -> None:
        try:
            await self.workers.run(self._opener.bump)
        except Exception:
            self._has_noted = True  # still not bound to the counter: tried again
            raise

    async def _unharmed(self, action: Callable[[], Awaitable[None]]) -> None:
        """Await what no disk depends on: its failure is logged, and everything goes on."""
        try:
            await action()
        except Exception as exc:
            self.failures.errno_of(exc, image="the host's ledger")

    async def _care(self, disk: Disk) -> None:
        image, now = disk.image, time.monotonic()
        if image is None:
            return
        if image.poisoned:
            if disk.handles == 0:
                await disk.close()
                self._drop(disk)
            return
        oldest = image.oldest_dirty
        if oldest is not None and now - oldest >= self._commit_interval:
            await disk.flush()
        elif disk.handles == 0 and now - disk.idle_since >= self._idle_close:
            await disk.close()
            self._drop(disk)
        elif image.wants_checkpoint or (
            image.needs_checkpoint
            and oldest is None
            and now - disk.committed_at >= QUIET_CHECKPOINT
        ):
            await disk.checkpoint()

    async def _settle(self, disk: Disk) -> None:
        async def settle() -> None:
            if disk.image is None or disk.handles or disk.opened.poisoned:
                return
            if disk.is_unlinked:
                await disk.close()
                self._drop(disk)
                return
            if disk.opened.is_dirty:
                await disk.flush()
            if disk.image is not None:
                await disk.checkpoint()

        await self._quietly(disk, settle)

    async def _relieve(self) -> None:
        """Flush behind the writers until less than half of the cache is dirty and nobody waits."""
        try:
            while self.cache.dirty_size > self._dirty_half or self._waiting:
                disk = self._dirtiest()
                if disk is None:
                    return
                await self._quietly(disk, disk.flush)
                self._announce_room()
                await trio.lowlevel.checkpoint()
        finally:
            self._relieving = False
            self._announce_room()

    def _announce_room(self) -> None:
        if self._waiting:
            self._waiting = 0  # whoever finds too little asks again
            self._room.set()
            self._room = trio.Event()

    async def _make_room(self) -> None:
        """Wait until a flush has given frames back, or has failed to; then look again."""
        if self._dirtiest() is None:
            raise StorageFailed(
                "cache", f"{self.cache.dirty_size} dirty bytes belong to images that failed"
            )
        self._waiting += 1
        if not self._relieving:
            self._relieving = True
            self.start(self._relieve)
        await self._room.wait()

    def _dirtiest(self) -> Disk | None:
        candidates = [
            disk for disk in self.all() if not disk.opened.poisoned and disk.opened.dirty_size
        ]
        return max(candidates, key=lambda disk: disk.opened.dirty_size, default=None)

    async def _quietly(self, disk: Disk, action: Callable[[], Awaitable[None]]) -> None:
        """Await an action in the background; its failure is logged and ends nothing."""
        try:
            await action()
        except Exception as exc:
            self._report(disk, exc)

    def _report(self, disk: Disk, exc: Exception) -> None:
        self.failures.errno_of(exc, image=str(disk.path), vm_id=disk.vm_id)

    def start(self, action: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run something in the background, for as long as the mount is served."""
        if self._nursery is not None:
            self._nursery.start_soon(action, *args)

    def _drop(self, disk: Disk) -> None:
        if disk.handles == 0 and disk.image is None and not disk.exclusive.locked():
            self._disks.pop(disk.key, None)
