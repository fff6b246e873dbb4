"""The lane and the relay without a kernel: a socket pair stands in for /dev/fuse.

The test writes requests as the kernel would, plays pyfuse3 on the relay's other end, and reads
the answers. So requests that no kernel sends can be tried.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from mount_support import FakeImage

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.mount import protocol
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.handles import Handles
from sealfs.mount.lane import Lane
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

    def try_read(self, offset: int, size: int) -> Any:
        if self.failure:
            raise self.failure
        return None if self.waits else super().try_read(offset, size)

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

    def __init__(self, image: Image, handles: Handles, kernel: Any, pyfuse3: Any) -> None:
        self.image = image
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
    workers, handles, failures = Workers(2), Handles(), Failures()
    cache: Any = SimpleNamespace(dirty_max=1 << 20, dirty_size=0, free_count=0)
    opener: Any = SimpleNamespace(
        open=lambda path: (image, "vm", -1, None),
        note=lambda images: None,
        bump=lambda: None,
    )
    disks = Disks(opener=opener, workers=workers, cache=cache, failures=failures)
    relay = Relay(device.fileno())
    pyfuse3 = trio.socket.from_stdlib_socket(socket.socket(fileno=relay.hand_over()))
    lane = Lane(device.fileno(), relay=relay, handles=handles, disks=disks, failures=failures)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(workers.collect)
        await nursery.start(disks.run)
        disk = await disks.acquire((1, 2), Path("/disk.sealed"))
        assert handles.add(disk, 7, os.O_RDWR) == 1
        assert handles.add(disk, 7, os.O_RDONLY) == 2
        assert handles.add(disk, 7, os.O_RDWR | os.O_SYNC) == 3
        await nursery.start(relay.run)
        nursery.start_soon(lane.run)
        yield Rig(image, handles, trio.socket.from_stdlib_socket(kernel), pyfuse3)
        nursery.cancel_scope.cancel()
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
        seen = []
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
