"""Blocks sealed again in the background of a mount: another image key, room in the epoch table.

A rekey that was begun goes on by itself whenever its image is open for writing, until it is done or
somebody pauses it; so does making room when an epoch table runs low. How fast is a matter of `rate`
and of what the VM does: no more than a share of the time is spent on it, a smaller one while the
mount answers requests.

Concurrency: one task for each image that has something to do, in the trio thread. It holds
`Disk.exclusive` for one small part at a time, so that a flush of the VM waits for one at most. A
job that a command began holds a handle: the image stays open until it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import trio

from sealfs.control import Document, error_document
from sealfs.errors import Busy, SealfsError
from sealfs.mount.disk import Disk, FileKey
from sealfs.mount.driver import Disks
from sealfs.mount.imagekeys import MakesKeys

RATE = 10 << 20
"""Bytes of the disk a second, as `scrub`: a disk of 1 TiB takes a day, and nobody notices."""
LOOK_INTERVAL = 1.0  # seconds between two looks for images that have something to do
IDLE_SHARE = 4  # times as long as a part took nothing is done, however slow the storage
BUSY_SHARE = 24  # the same while the VM reads and writes: it is to notice less than a tenth
BUSY_REQUESTS = 100  # a second: fewer are an idle guest's
PART_COST_MIN = 256 << 10  # bytes a part counts for that found nothing to seal: it has read as much
ROOM_WAIT = 0.05  # seconds for the VM's writes to leave the cache

log = logging.getLogger("sealfs.mount")


@dataclass(slots=True)
class _Job:
    """Work on one image."""

    disk: Disk
    rate: int
    """Bytes of the disk a second."""
    is_held: bool = False
    """Whether it has a handle of its own."""
    is_forced: bool = False
    """Whether epochs are retired though the table does not run low."""
    is_paused: bool = False
    size: int = 0
    """Bytes of the disk that were sealed again."""
    looked_size: int = 0
    """Bytes of the disk that it got on by, since `began`."""
    began: float = 0.0

    def seconds_left(self, size: int) -> float | None:
        """Return how long the rest will take if it goes on like this, None before it is known."""
        elapsed = time.monotonic() - self.began
        return size * elapsed / self.looked_size if self.looked_size else None


class Sweeper:
    """The background work of one mount."""

    def __init__(
        self, disks: Disks, keys: MakesKeys, served: Callable[[], int] = lambda: 0
    ) -> None:
        """Take what it works with; `served` says how many requests the mount has answered."""
        self._disks = disks
        self._keys = keys
        self._served = served
        self._jobs: dict[FileKey, _Job] = {}
        self._left: dict[FileKey, tuple[object, SealfsError | None]] = {}
        """Images whose work was paused, or failed: with what is open, and why."""
        self._sealed: dict[FileKey, int] = {}
        """Bytes that the last job of an image sealed again."""

    async def run(self) -> None:
        """Start whatever has something to do, until cancelled."""
        while True:
            for disk in self._disks.all():
                if disk.wants_sweep and disk.key not in self._jobs and not self._is_left(disk):
                    self._start(_Job(disk, RATE))
            await trio.sleep(LOOK_INTERVAL)

    async def begin(self, disk: Disk, rate: int, *, retire: bool) -> None:
        """Have an image rekeyed, or go on with that; `retire`: make room in its epoch table.

        Args:
            disk: with a handle that this takes over.
            rate: bytes of the disk a second.
            retire: whether epochs are meant, and not the image key.

        Raises:
            SealfsError: it could not begin; nothing has changed.
        """
        try:
            if not retire:
                await disk.begin_rekey(self._keys)
            elif disk.opened.is_rekeying:
                raise Busy(disk.path, "its image key is being replaced, which makes room as well")
            self._left.pop(disk.key, None)
            job = self._jobs.get(disk.key)
            if job is None:
                self._start(_Job(disk, rate, is_held=True, is_forced=retire))
                return
            job.rate, job.is_paused = rate, False
            if not job.is_held:
                job.is_held = True
                return
        except BaseException:
            self._disks.release(disk)
            raise
        self._disks.release(disk)

    def pause(self, disk: Disk) -> None:
        """Leave an image as it is, until somebody asks again or it is opened anew."""
        self._left[disk.key] = (disk.image, None)
        job = self._jobs.get(disk.key)
        if job is not None:
            job.is_paused = True

    def status(self, disk: Disk) -> Document:
        """Say how far an image is, for people and programs."""
        job = self._jobs.get(disk.key)
        error = self._left[disk.key][1] if self._is_left(disk) else None
        done, total = disk.opened.rekey_sizes
        return {
            "is_rekeying": disk.opened.is_rekeying,
            "is_running": job is not None and not job.is_paused,
            "done": done,
            "total": total,
            "sealed": job.size if job is not None else self._sealed.get(disk.key, 0),
            "rate": job.rate if job is not None else None,
            "seconds_left": job.seconds_left(total - done) if job is not None else None,
            "error": error_document(error) if error is not None else None,
        }

    def _is_left(self, disk: Disk) -> bool:
        left = self._left.get(disk.key)
        if left is not None and left[0] is not disk.image:
            del self._left[disk.key]  # opened anew since
            return False
        return left is not None

    def _start(self, job: _Job) -> None:
        self._jobs[job.disk.key] = job
        job.began = time.monotonic()
        self._disks.start(self._work, job)

    async def _work(self, job: _Job) -> None:
        disk = job.disk
        try:
            if disk.image is not None and disk.image.is_rekeying:
                log.info('image="%s" vm="%s" the rekey goes on', disk.path, disk.vm_id)
            await self._sweep(job)
        except Exception as exc:  # it is in the background: nothing of it ends the mount
            self._left[disk.key] = (disk.image, exc if isinstance(exc, SealfsError) else None)
            self._disks.failures.errno_of(exc, image=str(disk.path), vm_id=disk.vm_id)
        finally:
            del self._jobs[disk.key]
            self._sealed[disk.key] = job.size
            if job.is_held:
                self._disks.release(disk)

    async def _sweep(self, job: _Job) -> None:
        looked_at, served, idle_share = time.monotonic(), self._served(), IDLE_SHARE
        while not job.is_paused:
            began = time.monotonic()
            if began - looked_at >= LOOK_INTERVAL:
                now = self._served()
                is_busy = now - served >= BUSY_REQUESTS * (began - looked_at)
                idle_share = BUSY_SHARE if is_busy else IDLE_SHARE
                looked_at, served = began, now
            swept = await job.disk.sweep_part(is_forced=job.is_forced)
            if swept is None:
                return
            took = time.monotonic() - began
            job.size += swept.size
            job.looked_size += swept.looked_size
            if swept.is_done:
                job.is_forced = False
                log.info('image="%s" vm="%s" %s', job.disk.path, job.disk.vm_id, swept.what)
                continue
            if swept.needs_room:
                await trio.sleep(ROOM_WAIT)
                continue
            due = max(swept.size, PART_COST_MIN) / job.rate - took
            # Who asks for more than the default rate means it.
            idle = took * idle_share if job.rate <= RATE else 0.0
            await trio.sleep(max(due, idle, 0.0))
