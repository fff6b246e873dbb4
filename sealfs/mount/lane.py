"""The data lane: serves the hot requests of /dev/fuse itself, hands every other to the relay.

READ, WRITE, FSYNC, FALLOCATE and LSEEK are answered here; the rest is passed on byte for byte
and answered by pyfuse3. Requests are untrusted input: lengths, handles and offsets are checked,
what cannot be parsed goes on to pyfuse3. Knows images only through `Disk` and `Disks`.

Concurrency: one task, `run`, reads the device and never waits for a disk: it answers at once what
`try_read` and `try_write` can, and starts a task for whatever would wait. The receive buffer
belongs to `run` and is overwritten by the next read, so data for a task is copied. Answers are
written by `run`, by the tasks, and by the one worker that shares in long reads (`_there` is its
buffer while `_is_shared`); each write to the device is one whole answer. `run` lets the
other tasks of the mount run every `YIELD_EVERY` requests, and at once when it started one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import select
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.outbox import outbox
from sealfs.image.plan import Buffer
from sealfs.image.reader import SEND_BLOCKS_MAX, SENT, UNSURE, Fetch
from sealfs.mount import protocol
from sealfs.mount.device import BUSY, IDLE, PlainDevice
from sealfs.mount.disk import Disk
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.fetcher import Fetcher
from sealfs.mount.handles import SYNC_FLAGS, Handle, Handles
from sealfs.mount.protocol import (
    BODY,
    FALLOCATE_IN,
    FSYNC_IN,
    IN_START,
    LSEEK_IN,
    LSEEK_OUT,
    OFFSET_MAX,
    OUT_HEADER,
    READ_IN,
    READ_START,
    WRITE_CACHE,
    WRITE_DATA,
    WRITE_OUT,
    WRITE_START,
    Fallocate,
    Opcode,
)
from sealfs.mount.relay import Relay

try:
    from sealfs.mount._device import Device
except ImportError:  # it could not be built here
    Device = PlainDevice  # type: ignore[assignment, misc]

SPIN_NS = 30_000  # how long to poll before waiting: a wake-up through epoll costs about that
SPIN_OFF_NS = 1_000_000  # no request for so long: the guest is idle, waiting is free
DROP_PAGES_WAIT = 0.1  # seconds that a direct write beside buffered readers may be held up
LONG_READ = 256 << 10  # bytes of a read that a worker may share in
COUNT_NS = 10_000_000  # between two counts of how many requests come at once
RUN_MAX = 2  # requests in a row, on average: a quick guest has asked again before the lane looks
YIELD_EVERY = 64  # requests served in a row
BUFFER_SIZE = (1 << 20) + (64 << 10)  # max_write 1 MiB and headers
REQUEST_SIZE_MAX = 1 << 20
BODY_OUT = OUT_HEADER.size
SEND_SIZE_MAX = SEND_BLOCKS_MAX * BLOCK_SIZE
BLOCK_MASK = BLOCK_SIZE - 1
TRIES_MAX = 3  # a block and its leaf page, and one that went again meanwhile

_pack = OUT_HEADER.pack

log = logging.getLogger("sealfs.mount")


class DeviceGone(Exception):
    """The kernel has ended the connection: unmounted."""


class Lane:
    """Reads /dev/fuse and answers the hot requests."""

    def __init__(
        self,
        device_fd: int,
        *,
        relay: Relay,
        handles: Handles,
        disks: Disks,
        failures: Failures,
        spin_ns: int = SPIN_NS,
    ) -> None:
        self._fd = device_fd
        self._relay = relay
        self._handles = handles.by_number
        self._disks = disks
        self._failures = failures
        self._spin_ns = spin_ns
        self._counted = 0, 0  # requests and runs of them, at the last count
        self._count_until_ns = 0
        self._outbox = outbox(device_fd)  # kept back while more requests wait
        self._is_lone = False  # there is one guest, which waits for each answer
        self._due = False  # another task can go on: yield before spinning
        self._seen = 0  # requests, when it was last asked whether to spin
        self._idle_from_ns = 0  # when the guest is taken for idle, if nothing comes before
        self._buffer = _secret_memory(BUFFER_SIZE)
        self._view = memoryview(self._buffer)
        self._here, self._there = (memoryview(_secret_memory(REQUEST_SIZE_MAX)) for _ in range(2))
        self._is_shared = False  # a worker reads, and answers from `_there`
        self._fetcher: Fetcher[tuple[int, Handle, int, int, int]] = Fetcher(disks.workers)
        """Reads that wait for the disk: (unique, handle, offset, size, tries)."""
        others = (self._fetcher.fileno(), relay.fileno(), disks.workers.wake_fd)
        self._device = Device(
            device_fd,
            self._buffer,
            others,
            handles.by_number,
            self._outbox,
            _none_taken,
            disks.cache,
        )
        self._either = select.epoll(sizehint=2)  # what trio waits for: the device or the fetcher
        for fd in (device_fd, self._fetcher.fileno()):
            self._either.register(fd, select.EPOLLIN)
        self._served = dict.fromkeys(("read", "write", "cold", "waited", "passed_on"), 0)

    @property
    def served(self) -> dict[str, int]:
        """How many requests of each kind there were, since the mount."""
        read, written = self._device.answered, self._device.taken
        served = self._served
        return {**served, "read": served["read"] + read, "write": served["write"] + written}

    async def run(self) -> None:
        """Serve until the file system is unmounted."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await self._loop()
            except DeviceGone:
                log.debug("unmounted: %s", self.served)
            finally:
                # Images are closed next: nothing may be reading one.
                with trio.CancelScope(shield=True):
                    while self._fetcher.count or self._is_shared:
                        for unique, *_ in self._fetcher.done():
                            self._answer_error(unique, errno.EIO)
                        await trio.sleep(0.001)
                self._fetcher.close()
                self._either.close()

    async def _loop(self) -> None:
        unpack, buffer = IN_START.unpack_from, self._buffer
        device, served = self._device, self._served
        read, write = int(Opcode.READ), int(Opcode.WRITE)  # an enum's lookup costs 40 ns
        in_a_row = 0
        while True:
            try:
                count = device.next(self._spin_time(), self._is_lone)
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    raise DeviceGone from None
                if exc.errno in (errno.EINTR, errno.ENOENT):
                    continue  # a signal, or the request was given up before we had it
                raise
            if count < 0:
                in_a_row = 0
                await self._let_others_run(count)
                continue
            if count < BODY:
                if count == 0:
                    raise DeviceGone
                log.error("a request of %d bytes is shorter than its header", count)
                continue
            length, opcode, unique = unpack(buffer)
            try:
                if length != count:
                    self._pass_on(count)
                elif opcode == read:
                    served["read"] += 1
                    self._read(unique, count)
                elif opcode == write:
                    served["write"] += 1
                    self._write(unique, count)
                elif opcode == Opcode.FSYNC:
                    self._fsync(unique, count)
                elif opcode == Opcode.FALLOCATE:
                    self._fallocate(unique, count)
                elif opcode == Opcode.LSEEK:
                    self._lseek(unique, count)
                elif opcode == Opcode.INTERRUPT:
                    self._interrupt(count)
                else:
                    self._pass_on(count)
            except Exception as exc:
                # One failing request never ends the mount.
                self._answer_error(unique, self._failures.errno_of(exc))
            in_a_row += 1
            if in_a_row >= YIELD_EVERY:
                in_a_row = 0
                await self._let_others_run(BUSY)

    def _spin_time(self) -> int:
        """Return for how many nanoseconds it is worth asking again and again for a request."""
        now = time.perf_counter_ns()
        if now > self._count_until_ns:
            self._count(now)
        requests = self._device.requests
        if requests != self._seen:
            self._seen, self._idle_from_ns = requests, now + SPIN_OFF_NS
        # Spinning takes a processor from a worker that seals, and with it the guest's room.
        if self._due or self._disks.workers.busy_count or now > self._idle_from_ns:
            return 0
        return self._spin_ns

    def _count(self, now: int) -> None:
        """Find out what kind of guest it is, from the requests since the last count."""
        counted = self._device.requests, self._device.runs
        requests, runs = (new - old for new, old in zip(counted, self._counted, strict=True))
        self._counted = counted
        self._is_lone = requests <= runs * RUN_MAX
        self._count_until_ns = now + COUNT_NS

    async def _let_others_run(self, why: int) -> None:
        """Wait until there is something to do, or let tasks of the mount run that have."""
        is_due, self._due = self._due, False
        self._send_answers()
        if why == IDLE and not is_due:
            await trio.lowlevel.wait_readable(self._either.fileno())
            self._read_again()
        elif not self._read_again() or is_due or why == BUSY:
            await trio.lowlevel.checkpoint()

    # Requests, served at once or by a task.

    def _read(self, unique: int, count: int) -> None:
        if count < BODY + READ_IN.size:
            self._pass_on(count)
            return
        fh, offset, size = READ_START.unpack_from(self._buffer, BODY)
        handle = self._handles.get(fh)
        if handle is None:
            self._answer_error(unique, errno.EBADF)
        elif offset > OFFSET_MAX - size or size > REQUEST_SIZE_MAX:
            self._answer_error(unique, errno.EINVAL)
        elif 0 < size <= SEND_SIZE_MAX and not (offset | size) & BLOCK_MASK:
            missing = self._device.missing
            try:
                if missing == UNSURE:
                    missing = handle.disk.opened.send_blocks(
                        offset, size, self._outbox, _pack(BODY_OUT + size, 0, unique)
                    )
            except Exception as exc:
                self._fail(unique, handle.disk, exc)
                return
            if missing != SENT:
                self._bring(unique, handle, offset, size, missing)
            elif self._is_lone:
                self._send_answers()
        else:
            self._read_bytes(unique, handle.disk, offset, size)

    def _bring(
        self, unique: int, handle: Handle, offset: int, size: int, missing: int, tries: int = 1
    ) -> None:
        """Have brought into memory what an answer lacks, or go the long way."""
        if missing != UNSURE and tries <= TRIES_MAX:
            self._served["cold"] += 1
            token = (unique, handle, offset, size, tries)
            if self._fetcher.fetch(handle.disk.opened.descriptor, missing, size, token):
                return
        self._read_bytes(unique, handle.disk, offset, size)

    def _read_again(self) -> bool:
        """Go on with the blocks that are in memory now; return whether there were any."""
        found = self._fetcher.done() if self._fetcher.count else []
        for unique, handle, offset, size, tries in found:
            header, quick = _pack(BODY_OUT + size, 0, unique), handle.quick
            try:
                if quick is not None and quick.answer(offset, size, self._outbox, header):
                    continue
                missing = handle.disk.opened.send_blocks(offset, size, self._outbox, header)
                if missing != SENT:
                    self._bring(unique, handle, offset, size, missing, tries + 1)
            except Exception as exc:
                self._fail(unique, handle.disk, exc)
        self._send_answers()
        return bool(found)

    def _read_bytes(self, unique: int, disk: Disk, offset: int, size: int) -> None:
        try:
            if size >= LONG_READ and not (offset | size) & BLOCK_MASK:
                fetch = disk.opened.plan_read(offset, size)
                if fetch is not None and self._read_long(unique, disk, offset, size, fetch):
                    return
            data = disk.opened.try_read(offset, size)
        except Exception as exc:
            self._fail(unique, disk, exc)
            return
        if data is None:
            self._start(unique, disk, self._read_slowly, disk, offset, size)
        else:
            self._answer(unique, data)

    def _read_long(self, unique: int, disk: Disk, offset: int, size: int, fetch: Fetch) -> bool:
        """Read here, or have a worker read and answer; False where the disk must be waited for.

        A guest that reads ahead asks for several of these: the lane and a worker share them.
        """
        if not self._is_lone and not self._is_shared:
            self._is_shared = True
            work = partial(self._read_there, unique, disk, offset, size, fetch)
            self._disks.workers.post(work)
            return True
        try:
            if not fetch(self._here[:size], False):
                return False
        except Exception:
            return False  # `_read_slowly` meets it again, unless a commit came between
        self._answer(unique, self._here[:size])
        return True

    def _read_there(
        self, unique: int, disk: Disk, offset: int, size: int, fetch: Fetch
    ) -> None:  # fmt: skip
        """Read and answer in a worker; what fails is done again by a task."""
        try:
            fetch(self._there[:size], True)
        except Exception:
            self._token.run_sync_soon(self._read_anew, unique, disk, offset, size)
        else:
            self._answer(unique, self._there[:size])
            self._is_shared = False

    def _read_anew(self, unique: int, disk: Disk, offset: int, size: int) -> None:
        self._is_shared = False
        self._start(unique, disk, self._read_slowly, disk, offset, size)

    async def _read_slowly(self, disk: Disk, offset: int, size: int) -> Buffer:
        data: Buffer = await self._disks.workers.drive(disk.opened.read_steps(offset, size))
        return data

    def _write(self, unique: int, count: int) -> None:
        if count < WRITE_DATA:
            self._pass_on(count)
            return
        fh, offset, size, kind, _, flags = WRITE_START.unpack_from(self._buffer, BODY)
        handle = self._handles.get(fh)
        if handle is None or not handle.is_writable:
            self._answer_error(unique, errno.EBADF)
        elif count != WRITE_DATA + size or offset > OFFSET_MAX - size:
            self._answer_error(unique, errno.EINVAL)
        else:
            disk = handle.disk
            data = self._view[WRITE_DATA:count]
            try:
                accepted = disk.opened.try_write(offset, data)
            except Exception as exc:
                self._fail(unique, disk, exc)
                return
            durable = bool(flags & SYNC_FLAGS) or handle.is_synchronous
            if disk.buffered_handles and flags & os.O_DIRECT and not kind & WRITE_CACHE:
                rest = None if accepted else bytearray(data)
                args = (handle, offset, size, rest, durable)
                self._start(unique, disk, self._write_beside_readers, *args)
                return
            if not accepted:
                copy = bytearray(data)
                self._start(unique, disk, self._write_slowly, disk, offset, copy, durable)
                return
            if not durable:
                self._outbox.put(WRITE_OUT.pack(WRITE_OUT.size, 0, unique, size, 0), b"")
                if self._is_lone:
                    self._send_answers()
            elif not self._flushed_here(unique, disk, _written(size)):
                self._start(unique, disk, self._commit, disk, size)

    async def _write_slowly(
        self, disk: Disk, offset: int, data: bytearray, durable: bool
    ) -> Buffer:
        await self._disks.write(disk, offset, data, durable=durable)
        return _written(len(data))

    async def _write_beside_readers(
        self, handle: Handle, offset: int, size: int, data: bytearray | None, durable: bool
    ) -> Buffer:
        """Take a direct write (taken already where `data` is None), then drop the kernel's pages.

        The kernel drops them before an asynchronous direct write, not after it: who reads without
        O_DIRECT in between would see the old content for as long as the file is open.
        """
        if data is not None:
            await self._disks.write(handle.disk, offset, data, durable=durable)
        elif durable:
            await handle.disk.flush()
        await drop_pages(self._fd, handle.inode, offset, size)
        return _written(size)

    async def _commit(self, disk: Disk, size: int) -> Buffer:
        await disk.flush()
        return _written(size)

    def _fsync(self, unique: int, count: int) -> None:
        handle = self._handle_of(unique, count, FSYNC_IN.size)
        if handle is None:
            return
        if handle.disk.is_settled():
            self._answer_error(unique, 0)
        elif not self._flushed_here(unique, handle.disk, b""):
            self._start(unique, handle.disk, self._flush, handle.disk)

    def _flushed_here(self, unique: int, disk: Disk, answer: bytes) -> bool:
        """Flush and answer at once, where nobody else waits; False where it is a task's to do."""
        if not self._is_lone or self._disks.workers.busy_count:
            return False
        try:
            if not disk.flush_here():
                return False
        except Exception as exc:
            self._fail(unique, disk, exc)
        else:
            self._answer(unique, answer)
        return True

    async def _flush(self, disk: Disk) -> Buffer:
        await disk.flush()
        return b""

    def _fallocate(self, unique: int, count: int) -> None:
        handle = self._handle_of(unique, count, FALLOCATE_IN.size)
        if handle is None:
            return
        _, offset, length, mode, _ = FALLOCATE_IN.unpack_from(self._buffer, BODY)
        if not handle.is_writable:
            self._answer_error(unique, errno.EBADF)
        elif length == 0 or offset > OFFSET_MAX or length > OFFSET_MAX - offset:
            self._answer_error(unique, errno.EINVAL)
        elif mode not in (
            0,
            Fallocate.KEEP_SIZE,
            Fallocate.KEEP_SIZE | Fallocate.PUNCH_HOLE,
            Fallocate.ZERO_RANGE,
            Fallocate.ZERO_RANGE | Fallocate.KEEP_SIZE,
        ):
            self._answer_error(unique, errno.EOPNOTSUPP)
        else:
            self._start(unique, handle.disk, self._allocate, handle.disk, offset, length, mode)

    async def _allocate(self, disk: Disk, offset: int, length: int, mode: int) -> Buffer:
        if mode & (Fallocate.PUNCH_HOLE | Fallocate.ZERO_RANGE):
            await disk.discard(offset, length)
        if not mode & Fallocate.KEEP_SIZE:
            await disk.extend(offset + length)
        if not mode & (Fallocate.PUNCH_HOLE | Fallocate.ZERO_RANGE):
            await disk.preallocate(offset, length)
        return b""

    def _lseek(self, unique: int, count: int) -> None:
        handle = self._handle_of(unique, count, LSEEK_IN.size)
        if handle is None:
            return
        _, offset, whence, _ = LSEEK_IN.unpack_from(self._buffer, BODY)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            self._answer_error(unique, errno.EINVAL)
        elif offset > OFFSET_MAX:
            self._answer_error(unique, errno.ENXIO)
        else:
            self._start(unique, handle.disk, self._seek, handle.disk, offset, whence)

    async def _seek(self, disk: Disk, offset: int, whence: int) -> Buffer:
        found = await disk.seek(offset, whence)
        if found is None:
            raise OSError(errno.ENXIO, "nothing beyond")
        return LSEEK_OUT.pack(found)

    def _interrupt(self, count: int) -> None:
        """Pass on an INTERRUPT only for what pyfuse3 holds.

        A request that the lane holds ends by itself soon: it waits for a disk, never for a user.
        One that is answered already is nobody's, and libfuse would remember it for ever.
        """
        unique = protocol.parse_interrupt(self._view[:count])
        if unique is None or self._relay.is_outstanding(unique):
            self._pass_on(count)

    def _handle_of(self, unique: int, count: int, body_size: int) -> Handle | None:
        """Return the handle a request begins with; None if it was answered or passed on."""
        if count < BODY + body_size:
            self._pass_on(count)
            return None
        handle = self._handles.get(LSEEK_OUT.unpack_from(self._buffer, BODY)[0])
        if handle is None:
            self._answer_error(unique, errno.EBADF)
        return handle

    def _pass_on(self, count: int) -> None:
        self._served["passed_on"] += 1
        self._relay.forward(bytearray(self._view[:count]))
        self._due = True

    # Tasks and answers.

    def _start(
        self, unique: int, disk: Disk, serve: Callable[..., Awaitable[Buffer]], *args: object
    ) -> None:
        self._served["waited"] += 1
        self._nursery.start_soon(self._task, unique, disk, serve, args)
        self._due = True

    async def _task(
        self,
        unique: int,
        disk: Disk,
        serve: Callable[..., Awaitable[Buffer]],
        args: tuple[object, ...],
    ) -> None:
        try:
            body = await serve(*args)
        except trio.Cancelled:
            # The mount ends under the request; the kernel must not wait for an answer.
            self._answer_error(unique, errno.EIO)
            raise
        except Exception as exc:
            self._fail(unique, disk, exc)
        else:
            self._answer(unique, body)

    def _fail(self, unique: int, disk: Disk, exc: Exception) -> None:
        code = self._failures.errno_of(exc, image=str(disk.path), vm_id=disk.vm_id)
        self._answer_error(unique, code)

    def _answer(self, unique: int, body: Buffer) -> None:
        size = len(body)
        if not size:
            self._answer_error(unique, 0)
            return
        try:
            os.writev(self._fd, [OUT_HEADER.pack(OUT_HEADER.size + size, 0, unique), body])
        except OSError as exc:
            _not_taken(exc)

    def _answer_error(self, unique: int, code: int) -> None:
        self._send(protocol.error_reply(unique, code))

    def _send_answers(self) -> None:
        """Send what was kept back: who has several answers at once asks several things at once."""
        _none_taken(self._outbox.flush())

    def _send(self, reply: bytes) -> None:
        try:
            os.write(self._fd, reply)
        except OSError as exc:
            _not_taken(exc)


async def drop_pages(device_fd: int, inode: int, offset: int, size: int) -> None:
    """Make the kernel forget its pages of a range."""
    notice = protocol.pages_changed(inode, offset, size)

    def write() -> None:
        # ENOENT: the kernel knows no such inode. ENODEV: unmounted.
        with contextlib.suppress(OSError):
            os.write(device_fd, notice)

    # In no worker of ours: it waits for pages that are being read, and those reads may need one.
    # And not for ever: the pages may be locked by a write that waits for this very answer, or the
    # mount ends and nobody answers. Then they are dropped a moment later.
    with trio.move_on_after(DROP_PAGES_WAIT):
        await trio.to_thread.run_sync(write, abandon_on_cancel=True)


def _secret_memory(size: int) -> mmap.mmap:
    """Return memory that plaintext passes through: kept out of dumps."""
    memory = mmap.mmap(-1, size)
    memory.madvise(mmap.MADV_DONTDUMP)
    return memory


def _written(size: int) -> bytes:
    return WRITE_OUT.pack(0, 0, 0, size, 0)[OUT_HEADER.size :]


def _none_taken(codes: list[int]) -> None:
    for code in codes:
        _not_taken(OSError(code, os.strerror(code)))


def _not_taken(exc: OSError) -> None:
    # ENOENT: the request was given up. ENODEV, EPERM: unmounted; the next read says so.
    if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.EPERM):
        log.error("an answer was not taken: %s", exc)
