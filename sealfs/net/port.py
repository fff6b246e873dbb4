"""Where a VM's frames come from and go to: a TAP device, or QEMU's datagram socket.

A port moves whole Ethernet frames without blocking and decides nothing about them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from sealfs.errors import AlreadyExists, StorageFailed, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Buffers = Sequence[memoryview]

# <linux/if_tun.h>, <linux/sockios.h>, <net/if.h>
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFMTU = 0x8913, 0x8914, 0x8922
_IFF_UP: Final = 1
_NAME_SIZE_MAX: Final = 15
_IFREQ_FLAGS: Final = struct.Struct("16sH22x")
_IFREQ_MTU: Final = struct.Struct("16si20x")

SOCKET_BUFFER_SIZE: Final = 1 << 20
"""Bytes QEMU may have under way to us."""


class Port(Protocol):
    """A VM's side of an attachment."""

    name: str
    fd: int
    """Readable when a frame waits."""
    read_into: Callable[[Buffers], int]
    """Reads one frame, returns its size; `BlockingIOError` when none waits. A frame that is
    longer than the buffers fills them, and the rest is lost."""
    write: Callable[[Buffers], object]
    """Writes one frame. `BlockingIOError`: the VM is slow; another `OSError`: it cannot now."""

    def set_mtu(self, mtu: int) -> bool:
        """Have the VM's side use this MTU; False where only the VM itself can."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class TapPort:
    """A TAP device of this host: made if it is not there, gone after `close` if it was made."""

    def __init__(self, name: str) -> None:
        """Open the device and bring it up.

        Raises:
            UsageError: no name of a device, or of a device that is no TAP.
            StorageFailed: it cannot be opened: another program has it, or not allowed.
        """
        raw = name.encode()
        if not 0 < len(raw) <= _NAME_SIZE_MAX or b"/" in raw:
            raise UsageError(name, "is no name of a network device")
        self.name = name
        try:
            self.fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise StorageFailed("/dev/net/tun", exc.strerror or str(exc)) from exc
        try:
            request = _IFREQ_FLAGS.pack(raw, _IFF_TAP | _IFF_NO_PI)
            fcntl.ioctl(self.fd, _TUNSETIFF, request)
            _set_up(raw)
        except OSError as exc:
            os.close(self.fd)
            if exc.errno == errno.EINVAL:
                raise UsageError(name, "is a network device, but no TAP") from exc
            raise StorageFailed(name, f"cannot be used as a TAP: {exc.strerror}") from exc
        self.read_into: Callable[[Buffers], int] = partial(os.readv, self.fd)
        self.write: Callable[[Buffers], object] = partial(os.writev, self.fd)

    def set_mtu(self, mtu: int) -> bool:
        """Set the device's MTU.

        Raises:
            StorageFailed: the kernel refuses.
        """
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
            try:
                fcntl.ioctl(asker, _SIOCSIFMTU, _IFREQ_MTU.pack(self.name.encode(), mtu))
            except OSError as exc:
                raise StorageFailed(self.name, f"MTU {mtu}: {exc.strerror}") from exc
        return True

    def close(self) -> None:
        """Close it."""
        os.close(self.fd)


class QemuPort:
    """The other end of QEMU's `-netdev dgram,...,remote.type=unix,remote.path=PATH`.

    Who may write to the socket is the VM as far as the network goes, so only root may; give it to
    the user that QEMU runs as. Frames for the VM go to the socket that the last one came from.
    """

    def __init__(self, path: Path) -> None:
        """Make the socket.

        Raises:
            AlreadyExists: something else is there, or a socket that is in use.
            StorageFailed: it cannot be made.
        """
        self.name, self._path = str(path), path
        self._guest: str | bytes | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.fd = self._socket.fileno()
        try:
            _make_way(path)
            previous = os.umask(0o177)
            try:
                self._socket.bind(str(path))
            finally:
                os.umask(previous)
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_SIZE)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_SIZE)
            self._inode = path.stat().st_ino
        except OSError as exc:
            self._socket.close()
            raise StorageFailed(path, f"QEMU's socket: {exc.strerror or exc}") from exc
        except AlreadyExists:
            self._socket.close()
            raise
        self.read_into: Callable[[Buffers], int] = self._read_into
        self.write: Callable[[Buffers], object] = self._write

    def set_mtu(self, mtu: int) -> bool:
        """Tell that only the guest can."""
        return False

    def close(self) -> None:
        """Close it; the path is gone afterwards."""
        self._socket.close()
        with contextlib.suppress(OSError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()

    def _read_into(self, buffers: Buffers) -> int:
        size, _, _, guest = self._socket.recvmsg_into(buffers)
        if guest:
            self._guest = guest
        return size

    def _write(self, buffers: Buffers) -> object:
        if self._guest is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, "QEMU has not sent a frame yet")
        return self._socket.sendmsg(buffers, (), 0, self._guest)


def _set_up(name: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        answer = fcntl.ioctl(asker, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0))
        flags = _IFREQ_FLAGS.unpack(answer)[1]
        fcntl.ioctl(asker, _SIOCSIFFLAGS, _IFREQ_FLAGS.pack(name, flags | _IFF_UP))


def _make_way(path: Path) -> None:
    """Remove the socket of a process that died; refuse anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AlreadyExists(path, "is there and is no socket")
    except FileNotFoundError:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asker:
        try:
            asker.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise AlreadyExists(path, "is the socket of a process that runs")
