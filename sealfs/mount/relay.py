"""The way to pyfuse3 and back: requests the lane does not serve, byte for byte.

pyfuse3 is started on one end of a SOCK_SEQPACKET pair as if that were /dev/fuse. Its answers are
written to the device as they come, but for the two the relay improves (INIT, OPEN and CREATE).

pyfuse3 answers with a blocking write in the thread that also empties the pair, so the pair must
never be full: the relay adds up how large the answers to what it has passed on can become, and
holds back further requests beyond a part of the socket's buffer. Nothing is dropped for that, and
nothing is answered twice.

Concurrency: `forward` is called by the lane's task and never waits. The task `run` starts the two
that do: one writes answers to the device, one sends held-back requests when there is room.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import deque

import trio

from sealfs.mount import protocol
from sealfs.mount.protocol import IN_HEADER, NO_REPLY, OUT_HEADER, Opcode

BUFFER_WANTED = 4 << 20  # bytes each way; an ordinary user gets net.core.wmem_max instead
READDIR_SIZE_MAX = 32 << 10  # so that several answers fit an ordinary user's buffer
MESSAGE_MAX = (1 << 20) + (64 << 10)
MAX_BACKGROUND = 128  # a guest's queue depth with room; libfuse's default is 12
INTERRUPT_BIT = 1  # FUSE_INT_REQ_BIT: the number of an INTERRUPT is that of its request plus this
CONGESTION_THRESHOLD = 96  # three quarters, as the kernel's own default

log = logging.getLogger("sealfs.mount")


class Relay:
    """Passes requests to pyfuse3's end of a socket pair and its answers to the device."""

    def __init__(self, device_fd: int) -> None:
        self._device_fd = device_fd
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (ours, theirs):
            _enlarge(end)
        ours.setblocking(False)
        self._socket = ours
        self._pyfuse3_socket = theirs
        # The kernel counts a message with its overhead; a quarter leaves ample room for that.
        self._budget = theirs.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 4
        self._expected = 0
        self._outstanding: dict[int, tuple[int, int]] = {}  # unique: (opcode, bound of the answer)
        self._held_back: deque[bytearray] = deque()
        self._wake = trio.Event()
        self.initialised = trio.Event()
        """Set when the kernel has taken the answer to INIT, and what it says."""

    def hand_over(self) -> int:
        """Give up pyfuse3's end; return its descriptor."""
        return self._pyfuse3_socket.detach()

    def fileno(self) -> int:
        """Our end, to poll for answers."""
        return self._socket.fileno()

    def is_outstanding(self, unique: int) -> bool:
        """Whether pyfuse3 has this request and has not answered it."""
        return unique in self._outstanding

    def forward(self, message: bytearray) -> None:
        """Pass a request on, now or when there is room; takes over the buffer."""
        if self._held_back or not self._send(message):
            self._held_back.append(message)
            self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry answers and held-back requests until pyfuse3 closes its end or cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_held_back)
            task_status.started()
            await self._carry_answers()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Close our end: pyfuse3's loop reads the end of file and returns."""
        self._socket.close()

    def _send(self, message: bytearray) -> bool:
        _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
        bound = protocol.limit_reply(message, opcode, READDIR_SIZE_MAX)
        if self._outstanding and self._expected + bound > self._budget:
            return False
        try:
            self._socket.send(message)
        except BlockingIOError:
            return False
        except OSError as exc:
            # Larger than the buffer can hold, or pyfuse3 is gone: nobody else will answer.
            log.error("request %d of %d bytes not passed on: %s", opcode, len(message), exc)
            if opcode not in NO_REPLY:
                self._answer(protocol.error_reply(unique, errno.EIO))
            return True
        if opcode not in NO_REPLY:
            self._outstanding[unique] = (opcode, bound)
            self._expected += bound
        return True

    async def _send_held_back(self) -> None:
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._held_back and self._send(self._held_back[0]):
                self._held_back.popleft()
            if self._held_back and self._expected < self._budget:
                # The requests' own direction is full: wait for pyfuse3 to read.
                await trio.lowlevel.wait_writable(self._socket)
                self._wake.set()

    async def _carry_answers(self) -> None:
        while True:
            try:
                reply = self._socket.recv(MESSAGE_MAX)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._socket)
                continue
            except ConnectionError:
                return
            if not reply:
                return
            self._carry(reply)

    def _carry(self, reply: bytes) -> None:
        if len(reply) < OUT_HEADER.size:
            log.error("pyfuse3 wrote %d bytes, less than a header", len(reply))
            return
        unique = OUT_HEADER.unpack_from(reply)[2]
        if unique & INTERRUPT_BIT and unique not in self._outstanding:
            return  # EAGAIN: "interrupt it once more"; what was interrupted is answered anyway
        if unique:  # 0: a notification
            opcode, bound = self._outstanding.pop(unique, (0, 0))
            self._expected -= bound
            if opcode == 0:
                log.error("pyfuse3 answered request %d, which it does not have", unique)
                return
            reply = _improved(reply, opcode)
            if self._held_back:
                self._wake.set()
        self._answer(reply)
        if unique and opcode == Opcode.INIT:
            self.initialised.set()

    def _answer(self, reply: bytes) -> None:
        try:
            os.write(self._device_fd, reply)
        except OSError as exc:
            # ENOENT: the request was given up meanwhile, or the notified inode is not cached.
            if exc.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                raise
            log.debug("answer not taken: %s", exc)


def _improved(reply: bytes, opcode: int) -> bytes:
    if opcode not in (Opcode.INIT, Opcode.OPEN, Opcode.CREATE):
        return reply
    changed = bytearray(reply)
    if opcode == Opcode.INIT:
        protocol.improve_init(
            changed, max_background=MAX_BACKGROUND, congestion_threshold=CONGESTION_THRESHOLD
        )
    else:
        protocol.allow_parallel_writes(changed, opcode)
    return bytes(changed)


def _enlarge(end: socket.socket) -> None:
    """Raise both buffers: past net.core.wmem_max, which only root may."""
    for forced, ordinary in (
        (getattr(socket, "SO_SNDBUFFORCE", 32), socket.SO_SNDBUF),
        (getattr(socket, "SO_RCVBUFFORCE", 33), socket.SO_RCVBUF),
    ):
        try:
            end.setsockopt(socket.SOL_SOCKET, forced, BUFFER_WANTED)
        except PermissionError:
            end.setsockopt(socket.SOL_SOCKET, ordinary, BUFFER_WANTED)
