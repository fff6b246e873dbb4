"""The lane and the relay without a kernel: a socket pair stands in for /dev/fuse.

The test writes requests as the kernel would, plays pyfuse3 on the relay's other end, and reads
the answers. So requests that no kernel sends can be tried.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from mount_support import FakeImage
from test_rekey import PAGE, made, opened, value

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.mount import lane as lanes
from sealfs.mount import protocol
from sealfs.mount.device import IDLE, PlainDevice
from sealfs.mount.disk import Disk
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.handles import Handles
from sealfs.mount.lane import LONG_READ, RUN_MAX, SPIN_NS, SPIN_OFF_NS, Lane
from sealfs.mount.protocol import IN_HEADER, OUT_HEADER, Opcode
from sealfs.mount.relay import Relay
from sealfs.mount.workers import Workers

SIZE = 1 << 20


class Image(FakeImage):
    """Counts flushes; can make reads wait, refuse writes until flushed, or fail."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path, size)
        self.flushes = 0
        self.waits = False
        self.full = False
        self.failure: Exception | None = None
        self.plan_failure: Exception | None = None
        self.fetch: Callable[[Any, memoryview, bool], bool] | None = None
        """Called with what a plan does, and with what that is given."""
        self.slow_reads = 0

    def try_read(self, offset: int, size: int) -> Any:
        if self.failure:
            raise self.failure
        return None if self.waits else super().try_read(offset, size)

    def plan_read(self, offset: int, size: int) -> Any:
        if self.plan_failure:
            raise self.plan_failure
        plan = super().plan_read(offset, size)
        return partial(self.fetch, plan) if plan and self.fetch else plan

    def read_steps(self, offset: int, size: int) -> Any:
        self.slow_reads += 1
        if self.failure:
            raise self.failure
        return (yield from super().read_steps(offset, size))

    def try_write(self, offset: int, data: Any) -> bool:
        if self.failure:
            raise self.failure
        if self.waits or self.full:
            return False
        self.is_dirty, self.dirty_size = True, 4096
        return super().try_write(offset, data)

    def write_steps(self, offset: int, data: Any) -> Any:
        yield lambda: None
        if self.full:
            return False
        self.is_dirty = True
        return super().try_write(offset, data)

    def flush_steps(self) -> Any:
        yield lambda: None
        self.flushes += 1
        self.full = self.is_dirty = False


class Rig:
    """A lane under test, its kernel's end and pyfuse3's end."""

    def __init__(
        self, image: Image, lane: Lane, handles: Handles, kernel: Any, pyfuse3: Any
    ) -> None:
        self.image = image
        self.lane = lane
        self.ended = trio.Event()
        self.handles = handles
        self.kernel = kernel
        self.pyfuse3 = pyfuse3

    async def send(self, opcode: int, unique: int, body: bytes, length: int | None = None) -> None:
        size = IN_HEADER.size + len(body)
        header = IN_HEADER.pack(
            size if length is None else length, opcode, unique, 7, 0, 0, 1, 0, 0
        )
        await self.kernel.send(header + body)

    async def answer(self) -> tuple[int, int, bytes]:
        with trio.fail_after(5):
            raw = await self.kernel.recv(2 << 20)
        length, error, unique = OUT_HEADER.unpack_from(raw)
        assert length == len(raw)
        return unique, -error, raw[OUT_HEADER.size :]

    async def serve(self) -> None:
        await self.lane.run()
        self.ended.set()

    def has_several_guests(self) -> None:
        """Take the guest for one that asks several things at once, from now on."""
        self.lane._is_lone, self.lane._count_until_ns = False, 1 << 62

    async def ask(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        await self.send(opcode, 100, body)
        unique, error, content = await self.answer()
        assert unique == 100
        return error, content


def read_in(fh: int, offset: int, size: int) -> bytes:
    return protocol.READ_IN.pack(fh, offset, size, 0, 0, 0, 0)


def write_in(fh: int, offset: int, data: bytes, *, flags: int = 0, size: int = -1) -> bytes:
    size = len(data) if size < 0 else size
    return protocol.WRITE_IN.pack(fh, offset, size, 0, 0, flags, 0) + data


@asynccontextmanager
async def rig(image: Image) -> AsyncIterator[Rig]:
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    device.setblocking(False)
    device.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)  # for a long answer
    workers, handles, failures = Workers(2), Handles(), Failures()
    cache: Any = SimpleNamespace(
        dirty_max=1 << 20, dirty_size=0, free_count=0, memory=None, free=[]
    )
    opener: Any = SimpleNamespace(
        open=lambda path: (image, "vm", -1, None),
        note=lambda images: None,
        bump=lambda: None,
    )
    disks = Disks(opener=opener, workers=workers, cache=cache, failures=failures)
    relay = Relay(device.fileno())
    pyfuse3 = trio.socket.from_stdlib_socket(socket.socket(fileno=relay.hand_over()))
    lane = Lane(device.fileno(), relay=relay, handles=handles, disks=disks, failures=failures)
    async with trio.open_nursery() as outer:
        outer.start_soon(workers.collect)  # to the end: what waits for a worker cannot be cancelled
        async with trio.open_nursery() as nursery:
            await nursery.start(disks.run)
            disk = await disks.acquire((1, 2), Path("/disk.sealed"))
            assert handles.add(disk, 7, os.O_RDWR) == 1
            assert handles.add(disk, 7, os.O_RDONLY) == 2
            assert handles.add(disk, 7, os.O_RDWR | os.O_SYNC) == 3
            await nursery.start(relay.run)
            made = Rig(image, lane, handles, trio.socket.from_stdlib_socket(kernel), pyfuse3)
            nursery.start_soon(made.serve)
            yield made
            nursery.cancel_scope.cancel()
        outer.cancel_scope.cancel()
    relay.close()
    workers.close()
    for end in (kernel, device, pyfuse3):
        end.close()


Test = Callable[[Rig], Coroutine[Any, Any, None]]


def run(test: Test) -> None:
    async def main() -> None:
        with trio.fail_after(20):
            async with rig(Image(Path("/disk.sealed"), SIZE)) as made:
                await test(made)

    trio.run(main)


def test_write_then_read() -> None:
    async def test(lane: Rig) -> None:
        error, content = await lane.ask(Opcode.WRITE, write_in(1, 12345, b"hello"))
        assert (error, content) == (0, b"\x05\0\0\0\0\0\0\0")
        assert await lane.ask(Opcode.READ, read_in(1, 12344, 7)) == (0, b"\0hello\0")
        assert await lane.ask(Opcode.READ, read_in(1, SIZE - 3, 10)) == (0, bytes(3))
        assert await lane.ask(Opcode.READ, read_in(1, SIZE + 3, 10)) == (0, b"")

    run(test)


def test_what_waits_is_answered_by_a_task_with_its_own_copy() -> None:
    async def test(lane: Rig) -> None:
        lane.image.waits = True
        for number in range(20):  # the receive buffer is overwritten by the next request
            data = bytes([number]) * 100
            await lane.send(Opcode.WRITE, 10 + number, write_in(1, number * 100, data))
        answers = sorted([await lane.answer() for _ in range(20)])
        assert [unique for unique, *_ in answers] == list(range(10, 30))
        error, content = await lane.ask(Opcode.READ, read_in(1, 0, 2000))
        assert content == b"".join(bytes([number]) * 100 for number in range(20))
        assert error == 0

    run(test)


@pytest.mark.parametrize(
    ("opcode", "body", "code"),
    [
        (Opcode.READ, read_in(99, 0, 10), errno.EBADF),
        (Opcode.READ, read_in(1, (1 << 64) - 5, 10), errno.EINVAL),
        (Opcode.READ, read_in(1, 0, (1 << 32) - 1), errno.EINVAL),
        (Opcode.WRITE, write_in(99, 0, b"x"), errno.EBADF),
        (Opcode.WRITE, write_in(2, 0, b"x"), errno.EBADF),
        (Opcode.WRITE, write_in(1, (1 << 63) - 1, b"xx"), errno.EINVAL),
        (Opcode.WRITE, write_in(1, 0, b"xx", size=3), errno.EINVAL),
        (Opcode.WRITE, write_in(1, 0, b"xx", size=1), errno.EINVAL),
        (Opcode.FSYNC, protocol.FSYNC_IN.pack(99, 0, 0), errno.EBADF),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(99, 0, 1, 0, 0), errno.EBADF),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(2, 0, 1, 0, 0), errno.EBADF),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(1, 0, 0, 0, 0), errno.EINVAL),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(1, 1 << 63, 1, 0, 0), errno.EINVAL),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(1, 0, 4096, 0x08, 0), errno.EOPNOTSUPP),
        (Opcode.FALLOCATE, protocol.FALLOCATE_IN.pack(1, 0, 4096, 0x02, 0), errno.EOPNOTSUPP),
        (Opcode.LSEEK, protocol.LSEEK_IN.pack(99, 0, 3, 0), errno.EBADF),
        (Opcode.LSEEK, protocol.LSEEK_IN.pack(1, 0, 7, 0), errno.EINVAL),
        (Opcode.LSEEK, protocol.LSEEK_IN.pack(1, SIZE, os.SEEK_DATA, 0), errno.ENXIO),
        (Opcode.LSEEK, protocol.LSEEK_IN.pack(1, 1 << 63, os.SEEK_DATA, 0), errno.ENXIO),
    ],
)
def test_requests_are_checked(opcode: int, body: bytes, code: int) -> None:
    async def test(lane: Rig) -> None:
        assert await lane.ask(opcode, body) == (code, b"")
        assert (await lane.ask(Opcode.READ, read_in(1, 0, 1)))[0] == 0

    run(test)


def test_what_cannot_be_parsed_goes_on_byte_for_byte() -> None:
    async def test(lane: Rig) -> None:
        for opcode, body, length in (
            (Opcode.READ, b"short", None),
            (Opcode.WRITE, b"short", None),
            (Opcode.FSYNC, b"", None),
            (Opcode.FALLOCATE, b"short", None),
            (Opcode.LSEEK, b"short", None),
            (Opcode.READ, read_in(1, 0, 10), 9),
            (4711, b"unknown", None),
        ):
            await lane.send(opcode, 5, body, length)
            with trio.fail_after(5):
                raw = await lane.pyfuse3.recv(1 << 20)
            assert raw[IN_HEADER.size :] == body
            await lane.pyfuse3.send(protocol.error_reply(5, errno.ENOSYS))
            assert await lane.answer() == (5, errno.ENOSYS, b"")

    run(test)


def test_synchronous_writes_are_flushed_before_the_answer() -> None:
    async def test(lane: Rig) -> None:
        for fh, flags, waits in ((1, os.O_DSYNC, False), (1, os.O_SYNC, True), (3, 0, False)):
            lane.image.waits = waits
            before = lane.image.flushes
            assert (await lane.ask(Opcode.WRITE, write_in(fh, 0, b"x", flags=flags)))[0] == 0
            assert lane.image.flushes == before + 1
        lane.image.waits = False
        before = lane.image.flushes
        await lane.ask(Opcode.WRITE, write_in(1, 0, b"x"))
        assert lane.image.flushes == before
        assert (await lane.ask(Opcode.FSYNC, protocol.FSYNC_IN.pack(1, 1, 0)))[0] == 0
        assert lane.image.flushes == before + 1
        assert (await lane.ask(Opcode.FSYNC, protocol.FSYNC_IN.pack(1, 1, 0)))[0] == 0
        assert lane.image.flushes == before + 1  # nothing to do

    run(test)


def test_a_write_that_finds_the_cache_full_waits_for_a_flush() -> None:
    async def test(lane: Rig) -> None:
        await lane.ask(Opcode.WRITE, write_in(1, 0, b"dirty"))
        lane.image.full = True
        assert (await lane.ask(Opcode.WRITE, write_in(1, 8, b"x")))[0] == 0
        assert lane.image.flushes == 1

    run(test)


def test_failures_are_answered_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(lane: Rig) -> None:
        lane.image.failure = BlockDamaged("/disk.sealed", 3, "does not authenticate")
        for _ in range(3):
            assert (await lane.ask(Opcode.READ, read_in(1, 0, 10)))[0] == errno.EIO
        lane.image.failure = StorageFailed("/disk.sealed", "no")
        assert (await lane.ask(Opcode.WRITE, write_in(1, 0, b"x")))[0] == errno.EIO
        lane.image.failure = RuntimeError("a bug")
        assert (await lane.ask(Opcode.READ, read_in(1, 0, 10)))[0] == errno.EIO
        lane.image.failure = None
        assert (await lane.ask(Opcode.READ, read_in(1, 0, 1)))[0] == 0

    run(test)
    damaged = [record for record in caplog.records if "block=3" in record.getMessage()]
    assert len(damaged) == 1
    assert 'vm="vm"' in damaged[0].getMessage()
    assert any(record.exc_info for record in caplog.records)


def test_interrupt_goes_on_only_for_what_pyfuse3_holds() -> None:
    async def test(lane: Rig) -> None:
        await lane.send(Opcode.INTERRUPT, 43, protocol.INTERRUPT_IN.pack(42))
        await lane.send(Opcode.OPEN, 44, bytes(8))
        await lane.send(Opcode.INTERRUPT, 45, protocol.INTERRUPT_IN.pack(44))
        with trio.fail_after(5):
            first = await lane.pyfuse3.recv(1 << 20)
            second = await lane.pyfuse3.recv(1 << 20)
        assert IN_HEADER.unpack_from(first)[1:3] == (Opcode.OPEN, 44)
        assert IN_HEADER.unpack_from(second)[1:3] == (Opcode.INTERRUPT, 45)

    run(test)


def test_nothing_is_dropped_when_pyfuse3_lags_and_nothing_answered_twice() -> None:
    """Far more than the pair holds, read only afterwards; then strange answers."""

    async def test(lane: Rig) -> None:
        count = 600
        body = bytes(60_000)

        async def kernel() -> None:
            for number in range(count):
                await lane.send(4711, 1000 + number, body)

        async def pyfuse3() -> None:
            for _ in range(count):
                raw = await lane.pyfuse3.recv(1 << 20)
                assert len(raw) == IN_HEADER.size + len(body)
                unique = IN_HEADER.unpack_from(raw)[2]
                await lane.pyfuse3.send(protocol.error_reply(unique, errno.ENOSYS))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kernel)
            await trio.sleep(0.2)
            nursery.start_soon(pyfuse3)
            seen = [(await lane.answer())[0] for _ in range(count)]
        assert sorted(seen) == list(range(1000, 1000 + count))
        # A second answer to the same request, and a stump, go nowhere.
        await lane.pyfuse3.send(protocol.error_reply(1000, 0))
        await lane.pyfuse3.send(b"stump")
        await lane.send(4711, 77, b"")
        await lane.pyfuse3.recv(1 << 20)
        await lane.pyfuse3.send(protocol.error_reply(77, 0))
        assert await lane.answer() == (77, 0, b"")

    run(test)


def test_answers_expected_are_bounded_by_the_buffer() -> None:
    """Large answers are asked for a few at a time: pyfuse3's blocking write always finds room."""

    async def test(lane: Rig) -> None:
        size = 1 << 20
        for number in range(40):
            await lane.send(Opcode.GETXATTR, 1000 + number, size.to_bytes(4, "little") + bytes(4))
        await trio.sleep(0.2)
        asked = 0
        room = 1 << 23
        seen: list[int] = []
        while len(seen) < 40:
            waiting = []
            with trio.move_on_after(0.05):
                while True:
                    waiting.append(IN_HEADER.unpack_from(await lane.pyfuse3.recv(1 << 16))[2])
            assert waiting
            asked = max(asked, len(waiting))
            for unique in waiting:
                await lane.pyfuse3.send(OUT_HEADER.pack(16, 0, unique))
                seen.append((await lane.answer())[0])
        assert asked * size <= room
        assert len(set(seen)) == 40

    run(test)


# Reads answered by the device, and long ones.


@pytest.mark.parametrize("is_plain", [False, True])
def test_reads_are_counted_whoever_answers_them(
    is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_plain:
        monkeypatch.setattr(lanes, "Device", PlainDevice)
    else:
        pytest.importorskip("sealfs.mount._device", reason="tools/setup builds it")

    async def test(lane: Rig) -> None:
        for number in range(5):
            assert await lane.ask(Opcode.READ, read_in(1, number * 4096, 4096)) == (0, bytes(4096))
        for _ in range(3):
            assert await lane.ask(Opcode.READ, read_in(1, 1, 10)) == (0, bytes(10))
        assert lane.lane.served["read"] == 8
        assert lane.lane._device.answered == (0 if is_plain else 5)

    run(test)


@pytest.mark.parametrize("is_plain", [False, True])
def test_writes_are_counted_whoever_accepts_them(
    is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_plain:
        monkeypatch.setattr(lanes, "Device", PlainDevice)
    else:
        pytest.importorskip("sealfs.mount._device", reason="tools/setup builds it")

    async def test(lane: Rig) -> None:
        class Taker:
            def take(self, offset: int, content: memoryview) -> bool:
                return offset < 5 * PAGE and lane.image.try_write(offset, content)

        handles = lane.handles.by_number
        handles[1] = replace(handles[1], taker=Taker())  # type: ignore[arg-type]
        for number in range(8):
            data = bytes([number + 1]) * PAGE
            answer = await lane.ask(Opcode.WRITE, write_in(1, number * PAGE, data))
            assert answer == (0, protocol.WRITE_OUT.pack(0, 0, 0, PAGE, 0)[OUT_HEADER.size :])
        assert lane.lane.served["write"] == 8
        assert lane.lane._device.taken == (0 if is_plain else 5)
        before = lane.image.flushes
        answer = await lane.ask(Opcode.WRITE, write_in(1, 0, b"x" * PAGE, flags=os.O_DSYNC))
        assert answer[0] == 0
        assert lane.image.flushes == before + 1
        assert lane.lane._device.taken == (0 if is_plain else 5)
        assert lane.lane.served["write"] == 9
        wanted = b"x" * PAGE + b"".join(bytes([number + 1]) * PAGE for number in range(1, 8))
        assert await lane.ask(Opcode.READ, read_in(1, 0, 8 * PAGE)) == (0, wanted)
        lane.handles.remove(1)
        assert await lane.ask(Opcode.WRITE, write_in(1, 0, b"y" * PAGE)) == (errno.EBADF, b"")
        assert await lane.ask(Opcode.READ, read_in(2, 0, 8 * PAGE)) == (0, wanted)

    run(test)


def test_only_what_is_written_to_and_need_not_be_durable_at_once_is_accepted_in_one_call() -> None:
    async def test(lane: Rig) -> None:
        disk = lane.handles.by_number[1].disk
        lane.image.taker = lambda: lane  # type: ignore[assignment, return-value, method-assign]
        kinds = (
            (os.O_RDWR, True), (os.O_WRONLY, True), (os.O_RDONLY, False),
            (os.O_RDWR | os.O_DIRECT, True), (os.O_RDWR | os.O_DSYNC, False),
            (os.O_WRONLY | os.O_SYNC, False), (os.O_RDWR | os.O_APPEND, True),
        )  # fmt: skip
        for flags, is_taker in kinds:
            handle = lane.handles.by_number[lane.handles.add(disk, 7, flags)]
            assert (handle.taker is not None) is is_taker, flags

    run(test)


def test_of_a_handle_that_was_closed_nothing_is_read() -> None:
    async def test(lane: Rig) -> None:
        assert await lane.ask(Opcode.READ, read_in(2, 0, 4096)) == (0, bytes(4096))
        lane.handles.remove(2)
        assert await lane.ask(Opcode.READ, read_in(2, 0, 4096)) == (errno.EBADF, b"")
        assert await lane.ask(Opcode.READ, read_in(1, 0, 4096)) == (0, bytes(4096))

    run(test)


def filled(image: Image) -> bytes:
    """Fill an image with what is nowhere the same; return that."""
    content = random.Random(1).randbytes(SIZE)
    image.try_write(0, content)
    return content


def part(content: bytes, number: int) -> bytes:
    return content[number * LONG_READ : (number + 1) * LONG_READ]


def long_read(number: int) -> bytes:
    return read_in(1, number * LONG_READ, LONG_READ)


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await trio.sleep(0.001)


Seen = tuple[bool, bool]
"""Whether it was the lane's thread that read, and whether it might wait."""


class Fetches:
    """How long reads were done; `held` keeps workers from going on until it is set."""

    def __init__(self, image: Image, failure: Exception | None = None) -> None:
        self.seen: list[Seen] = []
        self.held = threading.Event()
        self._failure = failure
        self._lane = threading.get_ident()
        image.fetch = self.fetch

    def fetch(self, plan: Any, view: memoryview, may_wait: bool) -> bool:
        is_lane = threading.get_ident() == self._lane
        self.seen.append((is_lane, may_wait))
        view[:] = b"\xee" * len(view)
        if not is_lane:
            assert self.held.wait(10)
            if self._failure is not None:
                raise self._failure
        done: bool = plan(view, may_wait)
        return done


def test_a_lone_guest_gets_long_reads_from_the_lane() -> None:
    async def test(lane: Rig) -> None:
        content, fetches = filled(lane.image), Fetches(lane.image)
        for number in (0, 1, 3):
            assert await lane.ask(Opcode.READ, long_read(number)) == (0, part(content, number))
        assert fetches.seen == [(True, False)] * 3
        assert lane.image.slow_reads == 0

    run(test)


def test_what_is_not_of_whole_blocks_is_not_planned() -> None:
    async def test(lane: Rig) -> None:
        content, fetches = filled(lane.image), Fetches(lane.image)
        for offset, size in (
            (0, LONG_READ - 4096), (512, LONG_READ), (0, LONG_READ + 1), (SIZE - 4096, LONG_READ),
        ):  # fmt: skip
            found = await lane.ask(Opcode.READ, read_in(1, offset, size))
            assert found == (0, content[offset : offset + size])
        assert fetches.seen == []

    run(test)


def test_long_reads_are_shared_by_a_worker_and_the_lane() -> None:
    async def test(lane: Rig) -> None:
        content, fetches = filled(lane.image), Fetches(lane.image)
        lane.has_several_guests()
        for round_ in range(1, 4):
            await lane.send(Opcode.READ, 50, long_read(0))
            for number in (1, 2, 3):  # while the worker has the first
                assert await lane.ask(Opcode.READ, long_read(number)) == (0, part(content, number))
            fetches.held.set()
            assert await lane.answer() == (50, 0, part(content, 0))
            await until(lambda: not lane.lane._is_shared)
            fetches.held.clear()
            assert sorted(fetches.seen) == [(False, True)] * round_ + [(True, False)] * 3 * round_
        assert lane.image.slow_reads == 0

    run(test)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_what_a_worker_fails_at_is_answered_once_the_slow_way(is_damaged: bool) -> None:
    failure = BlockDamaged("/disk.sealed", 3, "does not authenticate")

    async def test(lane: Rig) -> None:
        content, fetches = filled(lane.image), Fetches(lane.image, failure)
        lane.has_several_guests()
        fetches.held.set()
        lane.image.failure = failure if is_damaged else None
        wanted = (errno.EIO, b"") if is_damaged else (0, part(content, 1))
        for round_ in range(1, 4):  # the one after it is a worker's again
            assert await lane.ask(Opcode.READ, long_read(1)) == wanted
            assert lane.image.slow_reads == round_
            assert fetches.seen == [(False, True)] * round_
        lane.image.failure = None
        assert await lane.ask(Opcode.READ, read_in(1, 1, 2)) == (0, content[1:3])  # nothing twice

    run(test)


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_what_the_lane_cannot_read_at_once_is_answered_once_the_slow_way(
    fails: bool, is_damaged: bool
) -> None:
    failure = BlockDamaged("/disk.sealed", 3, "does not authenticate")

    def fetch(plan: Any, view: memoryview, may_wait: bool) -> bool:
        view[:] = b"\xee" * len(view)
        if fails:
            raise failure
        return False

    async def test(lane: Rig) -> None:
        content = filled(lane.image)
        lane.image.fetch, lane.image.waits = fetch, True
        lane.image.failure = failure if is_damaged else None
        wanted = (errno.EIO, b"") if is_damaged else (0, part(content, 1))
        for _ in range(3):
            assert await lane.ask(Opcode.READ, long_read(1)) == wanted
        assert lane.image.slow_reads == (0 if is_damaged else 3)
        lane.image.failure, lane.image.waits = None, False
        assert await lane.ask(Opcode.READ, read_in(1, 1, 2)) == (0, content[1:3])

    run(test)


def test_a_plan_that_fails_is_answered_and_logged_with_its_image(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(lane: Rig) -> None:
        lane.image.plan_failure = BlockDamaged("/disk.sealed", 3, "and 3 after it are lost")
        for _ in range(3):
            assert await lane.ask(Opcode.READ, long_read(0)) == (errno.EIO, b"")

    run(test)
    (record,) = (each for each in caplog.records if each.levelno >= logging.ERROR)
    assert 'image="/disk.sealed" vm="vm" block=3' in record.getMessage()


@pytest.mark.parametrize("fails", [False, True])
def test_the_lane_ends_only_after_the_worker_that_reads(fails: bool) -> None:
    failure = BlockDamaged("/disk.sealed", 3, "does not authenticate") if fails else None

    async def test(lane: Rig) -> None:
        fetches = Fetches(lane.image, failure)
        lane.has_several_guests()
        await lane.send(Opcode.READ, 50, long_read(0))
        await until(lambda: bool(fetches.seen))
        lane.kernel.close()  # unmounted
        await trio.sleep(0.1)
        assert not lane.ended.is_set()
        fetches.held.set()
        with trio.fail_after(5):
            await lane.ended.wait()
        assert not lane.lane._is_shared
        assert lane.image.slow_reads == fails

    run(test)


# What kind of guest it is.


def test_a_guest_is_lone_while_its_requests_come_one_by_one() -> None:
    async def test(lane: Rig) -> None:
        own, device = lane.lane, lane.lane._device
        counted: Any = SimpleNamespace(requests=0, runs=0)
        own._device, own._counted = counted, (0, 0)
        try:
            for requests, runs, is_lone in (
                (0, 0, True), (1, 1, True), (100, 100, True), (100 * RUN_MAX, 100, True),
                (100 * RUN_MAX + 1, 100, False), (1, 0, False), (64, 1, False), (0, 0, True),
                (10_000, 1, False), (2, 1, True),
            ):  # fmt: skip
                counted.requests += requests
                counted.runs += runs
                own._count(time.perf_counter_ns())
                assert own._is_lone is is_lone, (requests, runs)
        finally:
            own._device = device

    run(test)


def test_it_spins_while_requests_come_and_nobody_else_wants_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(lane: Rig) -> None:
        own, device = lane.lane, lane.lane._device
        clock = SimpleNamespace(now=10**18)
        counted: Any = SimpleNamespace(requests=1000, runs=0)
        own._device = counted
        own._due = False
        with monkeypatch.context() as patch:
            patch.setattr(lanes, "time", SimpleNamespace(perf_counter_ns=lambda: clock.now))
            assert own._spin_time() == SPIN_NS
            clock.now += SPIN_OFF_NS
            assert own._spin_time() == SPIN_NS
            clock.now += 1
            assert own._spin_time() == 0  # idle
            counted.requests += 1
            assert own._spin_time() == SPIN_NS
            own._due = True
            assert own._spin_time() == 0
            own._due = False
            own._disks.workers.busy_count += 1
            assert own._spin_time() == 0
            own._disks.workers.busy_count -= 1
            assert own._spin_time() == SPIN_NS
        own._device, own._count_until_ns = device, 0

    run(test)


def test_a_task_that_can_go_on_is_not_made_to_wait_for_a_request() -> None:
    async def test(lane: Rig) -> None:
        own = lane.lane
        own._outbox.put(protocol.error_reply(77, 0), b"")
        own._due = True
        with trio.fail_after(5):
            await own._let_others_run(IDLE)
        assert not own._due
        assert await lane.answer() == (77, 0, b"")

    run(test)


def test_workers_run_many_and_carry_exceptions() -> None:
    async def main() -> None:
        workers = Workers(4)

        def fail() -> None:
            raise StorageFailed("x", "no")

        def steps() -> Any:
            first = yield lambda: 20
            try:
                yield fail
            except StorageFailed:
                second = yield lambda: 22
            return first + second

        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.collect)
            results: list[int] = []

            async def one(number: int) -> None:
                results.append(await workers.run(lambda: number * 2))

            async with trio.open_nursery() as many:
                for number in range(500):
                    many.start_soon(partial(one, number))
            assert sorted(results) == [number * 2 for number in range(500)]
            assert await workers.drive(steps()) == 42
            with pytest.raises(StorageFailed):
                await workers.run(fail)
            # Cancelled while work is running: the work is finished all the same.
            with trio.move_on_after(0):
                assert await workers.drive(steps()) == 42
            nursery.cancel_scope.cancel()
        workers.close()

    trio.run(main)


@pytest.mark.parametrize("why", ["it failed", "it has no name", "it fails now"])
def test_frames_are_given_back_in_the_thread_of_the_lane(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device may be receiving into those that come next, without the interpreter."""
    image, threads, here = opened(made()), [], threading.get_ident()
    cache, close = image._cache.shared, image._storage.close
    cache.on_room = lambda: threads.append(("room", threading.get_ident() == here))
    for block in range(3):
        assert image.try_write(block * PAGE, value(block))

    def closing() -> None:
        threads.append(("closed", threading.get_ident() == here))
        close()

    def failing(*_: object) -> Any:
        raise StorageFailed("/disk.sealed", "no")
        yield

    monkeypatch.setattr(image._storage, "close", closing)

    async def main() -> None:
        workers = Workers(1)
        disk = Disk((1, 2), Path("/disk.sealed"), workers)
        disk.image = image
        disk.is_unlinked = why == "it has no name"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.collect)
            if why == "it fails now":
                monkeypatch.setattr(image._volume, "commit_steps", failing)
                with pytest.raises(StorageFailed):
                    await disk.close()
            else:
                image.poisoned = "it failed" if why == "it failed" else None
                await disk.close()
            nursery.cancel_scope.cancel()
        workers.close()
        assert disk.image is None

    trio.run(main)
    assert threads == [("room", True), ("closed", False)]
    assert cache.dirty_size == 0
