"""The background of a mount without a mount: what it starts by itself, and what it gives up."""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from crash_support import KEY, PAGE
from simulation import SimulatedStorage
from test_rekey import TABLE, full_table, is_right, value

from sealfs.errors import Busy
from sealfs.image.cache import BlockCache
from sealfs.image.image import SealedImage
from sealfs.keys.vmkey import NewImageKey
from sealfs.mount import sweeper
from sealfs.mount.disk import Disk, Opened
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.sweeper import Sweeper
from sealfs.mount.workers import Workers

NEW = bytes(range(32))


class OneImage:
    """Opens the one image there is; gives it its next key."""

    def __init__(self, storage: SimulatedStorage, cache: BlockCache) -> None:
        self.storage, self.cache = storage, cache

    def open(self, path: Path) -> Opened:
        image = SealedImage.open(self.storage, image_key=KEY, cache=self.cache, geometry=TABLE)
        return Opened(image, "vm", os.open("/dev/null", os.O_RDONLY))

    def note(self, images: Any) -> None:
        pass

    def bump(self) -> None:
        pass

    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey:
        return NewImageKey(bytearray(NEW), "vm", b"wrapped", ())

    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> Any:
        return self

    def close(self) -> None:
        pass


def in_a_mount(
    storage: SimulatedStorage, act: Callable[[Sweeper, Disks, Disk], Awaitable[None]]
) -> None:
    """Run `act` beside what keeps house in a mount."""

    async def main() -> None:
        cache = BlockCache(0, 64 * PAGE)
        opener = OneImage(storage, cache)
        workers = Workers(2)
        disks = Disks(opener=opener, workers=workers, cache=cache, failures=Failures())
        job = Sweeper(disks, opener)
        try:
            async with trio.open_nursery() as outer:
                outer.start_soon(workers.collect)
                async with trio.open_nursery() as nursery:
                    await nursery.start(disks.run)
                    nursery.start_soon(job.run)
                    disk = await disks.acquire((1, 1), Path("/images/disk.sealed"))
                    with trio.fail_after(30):
                        await act(job, disks, disk)
                    nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await disks.close_all()
                outer.cancel_scope.cancel()
        finally:
            workers.close()

    trio.run(main)


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeper, "LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(sweeper, "RATE", 1 << 40)


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what it waits for tells nobody
        await trio.sleep(0.01)


def test_a_table_that_runs_low_is_made_room_in_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    storage, written = full_table(is_killed=False)

    async def act(job: Sweeper, disks: Disks, disk: Disk) -> None:
        assert disk.wants_sweep
        await until(lambda: not disk.wants_sweep)
        await disks.write(disk, 255 * PAGE, value(5), durable=True)
        written[255] = 5
        assert not job.status(disk)["is_running"] or not disk.wants_sweep

    with caplog.at_level(logging.INFO, "sealfs.mount"):
        in_a_mount(storage, act)
    assert "there is room in its epoch table" in caplog.text
    storage.reopen()
    image = SealedImage.open(storage, image_key=KEY, cache=BlockCache(0, 64 * PAGE), geometry=TABLE)
    assert is_right(image, written)


def test_a_rekey_makes_room_as_well_and_neither_is_begun_beside_the_other() -> None:
    storage, _ = full_table(is_killed=False)

    async def act(job: Sweeper, disks: Disks, disk: Disk) -> None:
        disk.handles += 2  # those that `begin` takes over
        job.pause(disk)
        await until(lambda: not job.status(disk)["is_running"])
        await job.begin(disk, 1 << 40, retire=False)
        assert job.status(disk)["is_rekeying"]
        with pytest.raises(Busy, match="which makes room as well"):
            await job.begin(disk, 1 << 40, retire=True)
        await until(lambda: not disk.opened.is_rekeying)
        assert disk.opened.status()["epochs"] <= 2
        await until(lambda: not job.status(disk)["is_running"])
        assert job.status(disk)["sealed"] > 0
        assert disk.handles == 1

    in_a_mount(storage, act)


def test_damage_is_reported_once_and_tried_again_when_asked(
    caplog: pytest.LogCaptureFixture,
) -> None:
    storage, _ = full_table(is_killed=False)
    image = SealedImage.open(storage, image_key=KEY, cache=BlockCache(0, 64 * PAGE), geometry=TABLE)
    offset = TABLE.block_offset(image._tree.slot_of(1), 1)
    image.abandon()
    storage.reopen()
    storage.disk.cached[offset] ^= 1
    storage.disk.durable[offset] ^= 1

    async def act(job: Sweeper, disks: Disks, disk: Disk) -> None:
        disk.handles += 1
        await job.begin(disk, 1 << 40, retire=False)
        await until(lambda: job.status(disk)["error"])
        assert job.status(disk)["error"]["type"] == "BlockDamaged"
        await trio.sleep(0.1)
        assert not job.status(disk)["is_running"], "not again and again"
        await disks.write(disk, 5 * PAGE, value(5), durable=True)
        disk.handles += 1
        await job.begin(disk, 1 << 40, retire=False)
        await until(lambda: not disk.opened.is_rekeying)
        await until(lambda: not job.status(disk)["is_running"])
        assert job.status(disk)["error"] is None
        assert disk.handles == 1

    with caplog.at_level(logging.CRITICAL):
        in_a_mount(storage, act)


def test_a_fault_in_the_background_ends_that_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, _ = full_table(is_killed=False)

    async def broken(disk: Disk, *, is_forced: bool = False) -> None:
        raise RuntimeError("nobody expected this")

    async def act(job: Sweeper, disks: Disks, disk: Disk) -> None:
        disk.handles += 1  # that which `begin` takes over
        job.pause(disk)
        await until(lambda: not job.status(disk)["is_running"])
        await job.begin(disk, 1 << 40, retire=False)
        await until(lambda: not job.status(disk)["is_running"])
        assert disk.opened.is_rekeying
        await disk.flush()
        assert disk.handles == 1

    monkeypatch.setattr(Disk, "sweep_part", broken)
    in_a_mount(storage, act)
