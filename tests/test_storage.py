"""One conformance suite for `FileStorage` and `SimulatedStorage`: the fake is verified.

After it, what only the simulated disk has: its fault model, rule by rule.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulation import (
    PAGE,
    SECTOR,
    Operation,
    SimulatedDisk,
    SimulatedStorage,
    crash_fates,
    tears,
)

from sealfs.errors import NoSpace, StorageFailed
from sealfs.image import storage as storage_module
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.plan import Step, WritePlan
from sealfs.image.storage import FileStorage, Storage, execute

Maker = Callable[[Path], Storage]

MAKERS: dict[str, Maker] = {
    "file": lambda path: FileStorage.create(path / "x.sealed"),
    "simulated": lambda path: SimulatedStorage(),
}


@pytest.fixture(params=sorted(MAKERS))
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return MAKERS[request.param](tmp_path)


def page(fill: int, count: int = 1) -> bytes:
    return bytes([fill]) * (PAGE * count)


def test_what_is_written_is_read(storage: Storage) -> None:
    storage.write(PAGE, [page(1), b"", bytearray(page(2)), memoryview(page(3))])
    assert storage.size() == 4 * PAGE
    assert storage.read(0, 4 * PAGE) == bytes(PAGE) + page(1) + page(2) + page(3)
    assert storage.read(PAGE + 100, 5000) == (page(1) + page(2))[100:5100]


def test_reads_are_short_only_at_the_end(storage: Storage) -> None:
    storage.write(0, [b"abc"])
    assert storage.size() == 3
    assert storage.read(1, 100) == b"bc"
    assert storage.read(3, 10) == b""
    buffer = bytearray(b"......")
    assert storage.read_into(1, buffer) == 2
    assert buffer == b"bc...."


def test_a_read_without_waiting_fills_the_buffer_or_says_no(storage: Storage) -> None:
    storage.write(0, [page(7)])
    buffer = bytearray(PAGE)
    if storage.read_nowait(0, buffer):
        assert buffer == page(7)
    assert not storage.read_nowait(PAGE, bytearray(PAGE))


def test_a_durable_write_is_a_write(storage: Storage) -> None:
    storage.write(0, [page(1, 2)])
    storage.write_durable(SECTOR, [b"x" * SECTOR, b"y"])
    expected = bytearray(page(1, 2))
    expected[SECTOR : 2 * SECTOR + 1] = b"x" * SECTOR + b"y"
    assert storage.read(0, 2 * PAGE) == expected


def test_direct_reads_see_what_was_written(storage: Storage) -> None:
    storage.write(0, [page(1), page(2)])
    assert storage.read_direct(PAGE, PAGE) == page(2)
    storage.sync()
    assert storage.read_direct(0, 2 * PAGE) == page(1) + page(2)
    assert storage.read_direct(PAGE, 2 * PAGE) == page(2)


def test_truncate_cuts_and_lengthens_with_zeros(storage: Storage) -> None:
    storage.write(0, [page(1, 2)])
    storage.truncate(PAGE + 10)
    assert storage.size() == PAGE + 10
    storage.truncate(3 * PAGE)
    assert storage.read(PAGE, 2 * PAGE) == b"\1" * 10 + bytes(2 * PAGE - 10)


def test_a_punched_range_reads_as_zeros_and_length_stays(storage: Storage) -> None:
    storage.write(0, [page(1, 3)])
    storage.sync()
    storage.punch(PAGE, PAGE)
    assert storage.read(0, 3 * PAGE) == page(1) + page(0) + page(1)
    storage.punch(2 * PAGE, 5 * PAGE)
    assert storage.size() == 3 * PAGE
    assert storage.read(2 * PAGE, PAGE) == page(0)


def test_allocate_changes_neither_length_nor_content(storage: Storage) -> None:
    storage.write(0, [page(1)])
    storage.allocate(0, 5 * PAGE)
    assert storage.size() == PAGE
    assert storage.read(0, PAGE) == page(1)


def test_a_plan_is_carried_out_in_order(storage: Storage) -> None:
    plan: WritePlan = [
        (Step.TRUNCATE, 4 * PAGE),
        (Step.WRITE, 0, [page(1), page(2)]),
        (Step.SYNC,),
        (Step.DURABLE, PAGE, [page(3)]),
        (Step.PUNCH, 0, PAGE),
    ]
    execute(storage, plan)
    assert storage.read(0, 4 * PAGE) == page(0) + page(3) + page(0, 2)


def test_nothing_works_after_close(storage: Storage) -> None:
    storage.write(0, [page(1)])
    storage.close()
    for call in (
        lambda: storage.read(0, 1),
        lambda: storage.write(0, [b"x"]),
        lambda: storage.write_durable(0, [b"x"]),
        storage.sync,
        lambda: storage.truncate(0),
    ):
        with pytest.raises((StorageFailed, ValueError)):
            call()


# -- the fault model


def disk_with(*fills: int) -> SimulatedDisk:
    return SimulatedDisk.of(b"".join(page(fill) for fill in fills))


def test_a_power_cut_loses_what_was_not_synced() -> None:
    storage = SimulatedStorage(disk_with(1, 1))
    storage.write(0, [page(2)])
    storage.sync()
    storage.write(PAGE, [page(3)])
    storage.write(2 * PAGE, [page(4)])
    assert storage.disk.crash(("o", "o")).cached == page(2) + page(1)
    assert storage.disk.crash(("o", "n")).cached == page(2) + page(1) + page(4)


def test_sectors_meet_their_fates_one_by_one() -> None:
    storage = SimulatedStorage(disk_with(1))
    storage.write(SECTOR, [b"\2" * (4 * SECTOR)])
    after = storage.disk.crash(("onzg",)).cached
    assert after[: 3 * SECTOR] == b"\1" * (2 * SECTOR) + b"\2" * SECTOR
    assert after[3 * SECTOR : 4 * SECTOR] == bytes(SECTOR)
    assert after[4 * SECTOR : 5 * SECTOR] not in (b"\1" * SECTOR, b"\2" * SECTOR)
    assert after[5 * SECTOR :] == b"\1" * (3 * SECTOR)


def test_a_durable_write_keeps_its_own_range_only() -> None:
    storage = SimulatedStorage(disk_with(1, 1))
    storage.write(0, [page(2, 2)])
    storage.write_durable(SECTOR, [b"\3" * SECTOR])
    assert len(storage.disk.pending) == 1
    lost = storage.disk.crash(("o",)).cached
    kept = storage.disk.crash(("n",)).cached
    assert lost == b"\1" * SECTOR + b"\3" * SECTOR + b"\1" * (14 * SECTOR)
    assert kept == b"\2" * SECTOR + b"\3" * SECTOR + b"\2" * (14 * SECTOR)


def test_a_change_of_length_is_done_or_not() -> None:
    storage = SimulatedStorage(disk_with(1, 2))
    storage.truncate(PAGE)
    storage.truncate(3 * PAGE)
    assert storage.disk.crash(("n", "n")).cached == page(1) + page(0, 2)
    assert storage.disk.crash(("o", "n")).cached == page(1) + page(2) + page(0)
    assert storage.disk.crash(("n", "o")).cached == page(1)


def test_a_killed_process_leaves_its_cache_and_what_is_pending() -> None:
    storage = SimulatedStorage(disk_with(1))
    storage.write(0, [page(2)])
    after = SimulatedStorage(storage.disk)
    assert after.read(0, PAGE) == page(2)
    assert after.read_direct(0, PAGE) == page(2)
    assert after.disk.crash(("o",)).cached == page(1)


def test_a_failed_sync_leaves_clean_pages_that_no_sync_writes() -> None:
    storage = SimulatedStorage(disk_with(1, 1, 1, 1))
    storage.write(0, [page(2, 4)])
    storage.fail(1)
    with pytest.raises(StorageFailed):
        storage.sync()
    storage.sync()
    assert storage.read(0, 4 * PAGE) == page(2, 4)
    on_disk = storage.read_direct(0, 4 * PAGE)
    assert on_disk == storage.disk.crash(()).cached
    assert b"\1" in on_disk
    assert b"\2" in on_disk
    storage.write(0, [page(5)])
    assert storage.read_direct(0, PAGE) == page(5)
    storage.disk.evict()
    assert storage.read(PAGE, PAGE) == on_disk[PAGE : 2 * PAGE]


def test_the_nth_call_fails_as_asked() -> None:
    storage = SimulatedStorage(disk_with(1))
    storage.fail(2, "short")
    storage.write(0, [b"a"])
    with pytest.raises(StorageFailed):
        storage.write(0, [b"b" * 10])
    assert storage.read(0, 6) == b"b" * 5 + b"\1"
    storage.fail(1)
    with pytest.raises(NoSpace):
        storage.allocate(0, 1)
    assert storage.failed_call == "allocate"
    storage.write(0, [b"c"])


def test_fates_are_distinct_and_capped_and_hold_the_telling_ones() -> None:
    rng = random.Random(1)
    pending = [Operation("w", PAGE * i, PAGE, page(i)) for i in range(3)]
    found = crash_fates(pending, rng, full=True, cap=10_000)
    assert len(set(found)) == len(found)
    assert {("n", "n", "n"), ("o", "o", "o"), ("o", "n", "n"), ("n", "o", "o")} <= set(found)
    assert any("g" in fate for state in found for fate in state)
    assert len(crash_fates(pending, rng, full=True, cap=7)) == 7
    for state in crash_fates(pending, rng, full=False, cap=10_000):
        assert state[-1] != "o"
    assert crash_fates([], rng, full=True, cap=5) == [()]
    assert crash_fates([], rng, full=False, cap=5) == []


def test_tears_cover_one_sector_each_way() -> None:
    found = tears(Operation("w", 0, 2 * SECTOR, bytes(2 * SECTOR)), random.Random(1))
    assert {"no", "on", "zn", "gn", "nz", "ng", "gg"} <= set(found)
    assert {"nn", "oo"}.isdisjoint(found)
    assert tears(Operation("t", 0, 5), random.Random(1)) == []


# One system call that moves less than it was asked for, or fails


def test_reads_and_writes_go_on_after_short_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FileStorage.create(tmp_path / "x")
    real_preadv, real_pwritev = os.preadv, os.pwritev
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset, *flags: real_preadv(
            fd, [memoryview(buffers[0])[:1000]], offset, *flags
        )
    )  # fmt: skip
    monkeypatch.setattr(
        os, "pwritev", lambda fd, buffers, offset, *flags: real_pwritev(
            fd, [memoryview(buffers[0])[:1000]], offset, *flags
        )
    )  # fmt: skip
    content = random.Random(1).randbytes(10_000)
    storage.write(100, [content[:5000], content[5000:]])
    assert storage.read(100, 20_000) == content
    storage.close()


@pytest.fixture(params=["C", "Python"])
def writer(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A storage whose `write_blocks` is the C module's, or its twin's."""
    if request.param == "Python":
        monkeypatch.setattr(storage_module, "_write_blocks", None)
    else:
        assert storage_module._write_blocks is not None, "tools/setup builds it"
    storage = FileStorage.create(tmp_path / "x")
    yield storage
    storage.close()


def test_blocks_go_each_to_its_own_place(writer: FileStorage) -> None:
    rng = random.Random(2)
    for _ in range(20):
        places = rng.sample(range(200), 60)
        if rng.random() < 0.5:
            places.sort()  # with neighbours that go in one write
        content = rng.randbytes(60 * BLOCK_SIZE)
        before = bytearray(writer.read(0, 200 * BLOCK_SIZE).ljust(200 * BLOCK_SIZE, b"\0"))
        writer.write_blocks(array("Q", [place * BLOCK_SIZE for place in places]), content)
        for i, place in enumerate(places):
            before[place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE] = content[
                i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE
            ]
        assert writer.read(0, 200 * BLOCK_SIZE).ljust(200 * BLOCK_SIZE, b"\0") == before
    writer.write_blocks(array("Q"), b"")


def test_a_write_of_blocks_that_fails_says_where(writer: FileStorage) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK_SIZE, limit[1]))
    try:
        with pytest.raises(StorageFailed, match=f"write at offset {20 * BLOCK_SIZE}"):
            writer.write_blocks(array("Q", [0, 20 * BLOCK_SIZE]), bytes(2 * BLOCK_SIZE))
        # The first part of a write beyond the limit is taken; what is left of it is refused.
        with pytest.raises(StorageFailed, match="File too large"):
            writer.write_blocks(
                array("Q", [9 * BLOCK_SIZE, 10 * BLOCK_SIZE]), bytes(2 * BLOCK_SIZE)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert writer.size() == 10 * BLOCK_SIZE


def test_sizes_that_do_not_fit_are_our_bug() -> None:
    write_blocks = storage_module._write_blocks
    for offsets, content in ((array("Q", [0]), b""), (b"1234567", bytes(BLOCK_SIZE))):
        with pytest.raises(ValueError, match="sizes do not fit"):
            write_blocks(-1, offsets, content, 1)
    assert write_blocks(-1, array("Q", [0]), bytes(BLOCK_SIZE), 1) == (0, errno.EBADF)
