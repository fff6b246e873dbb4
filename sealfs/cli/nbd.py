"""A client of qemu-nbd over a Unix socket: how disks of QEMU's formats are read and written.

So no plain copy of a disk ever lies in a temporary file. The server is a child process that ends
with the connection, however this process ends. Only what one client needs of the protocol
(NetworkBlockDevice/nbd, doc/proto.md): export name, read, write, flush, disconnect.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sealfs.errors import Busy, FormatError, NotFound, StorageFailed

START_WAIT = 20.0
"""Seconds for qemu-nbd to open the disk; long chains of backing files take a while."""
START_POLL = 0.01
END_WAIT = 60.0
"""Seconds for qemu-nbd to write its own metadata out."""

_HELLO = struct.Struct(">8s8sH")
_OPTION = struct.Struct(">8sII")
_EXPORT = struct.Struct(">QH")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_IHAVEOPT = b"IHAVEOPT"
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_EXPORT_NAME = 1
_READ, _WRITE, _DISCONNECT, _FLUSH = 0, 1, 2, 3


class NbdDisk:
    """A disk behind a connected socket. Offsets and sizes in bytes."""

    def __init__(self, stream: socket.socket, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._cookie = 0
        self.size = self._greet()

    def read(self, offset: int, size: int) -> memoryview:
        """Return exactly `size` bytes."""
        self._request(_READ, offset, size)
        return self._answer(size)

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of `content`; durable after `flush`."""
        self._request(_WRITE, offset, len(content), content)
        self._answer(0)

    def flush(self) -> None:
        """Make what was written durable."""
        self._request(_FLUSH, 0, 0)
        self._answer(0)

    def disconnect(self) -> None:
        """End the session; the server ends too."""
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))

    def _greet(self) -> int:
        magic, option_magic, _ = _HELLO.unpack(self._receive(_HELLO.size))
        if (bytes(magic), bytes(option_magic)) != (b"NBDMAGIC", _IHAVEOPT):
            raise StorageFailed(self._path, "qemu-nbd speaks another protocol")
        self._send(struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES))
        self._send(_OPTION.pack(_IHAVEOPT, _EXPORT_NAME, 0))
        size, _ = _EXPORT.unpack(self._receive(_EXPORT.size))
        return int(size)

    def _request(
        self, kind: int, offset: int, size: int, content: bytes | memoryview = b""
    ) -> None:
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, kind, self._cookie, offset, size))
        if content:
            self._send(content)

    def _answer(self, size: int) -> memoryview:
        magic, code, cookie = _REPLY.unpack(self._receive(_REPLY.size))
        if magic != _REPLY_MAGIC or cookie != self._cookie:
            raise StorageFailed(self._path, "qemu-nbd speaks another protocol")
        if code:
            # The protocol's error numbers are those of Linux.
            raise OSError(code, os.strerror(code), str(self._path))
        return self._receive(size)

    def _send(self, content: bytes | memoryview) -> None:
        try:
            self._stream.sendall(content)
        except ConnectionError as exc:
            raise StorageFailed(self._path, f"qemu-nbd ended: {exc.strerror}") from exc

    def _receive(self, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        done = 0
        while done < size:
            try:
                count = self._stream.recv_into(view[done:])
            except ConnectionError:
                count = 0
            if not count:
                raise StorageFailed(self._path, "qemu-nbd ended in the middle")
            done += count
        return view


@contextlib.contextmanager
def served(
    path: Path, disk_format: str, *, read_only: bool, shown_as: Path | None = None
) -> Iterator[NbdDisk]:
    """Serve a disk by qemu-nbd while the block runs; what was flushed is durable after it.

    `shown_as` is how messages name the disk, where not by its path.

    Raises:
        NotFound: no qemu-nbd.
        Busy: another process has the disk open.
        FormatError: qemu-nbd cannot open it.
        StorageFailed: it failed later.
    """
    with tempfile.TemporaryDirectory(prefix="sealfs-", ignore_cleanup_errors=True) as directory:
        place = Path(directory) / "nbd.sock"
        command = [
            *_dies_with_us(),
            "qemu-nbd",
            f"--format={disk_format}",
            f"--socket={place}",
            *(["--read-only"] if read_only else []),
            "--",
            str(path.absolute()),
        ]
        try:
            # A session of its own: Ctrl-C is for us, the server ends when we let go of it.
            server = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError:
            raise NotFound("qemu-nbd", "is not installed (package qemu-utils)") from None
        with server:
            try:
                with contextlib.closing(_connect(server, place, path)) as stream:
                    # Connected: nothing is left behind from here on, whoever is killed.
                    shutil.rmtree(directory, ignore_errors=True)
                    disk = NbdDisk(stream, shown_as or path)
                    yield disk
                    disk.disconnect()
                _finish(server, path)
            except BaseException:
                server.kill()
                raise


def _dies_with_us() -> list[str]:
    """Return a prefix by which the server ends with us even before we have connected."""
    return ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []


def _connect(server: subprocess.Popen[bytes], place: Path, path: Path) -> socket.socket:
    deadline = time.monotonic() + START_WAIT
    while server.poll() is None:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(str(place))
        except (FileNotFoundError, ConnectionRefusedError):
            stream.close()
        else:
            return stream
        if time.monotonic() > deadline:
            raise StorageFailed(path, f"qemu-nbd did not answer for {START_WAIT:g} s")
        time.sleep(START_POLL)
    raise refusal(path, _errors_of(server), "qemu-nbd")


def _finish(server: subprocess.Popen[bytes], path: Path) -> None:
    try:
        status = server.wait(END_WAIT)
    except subprocess.TimeoutExpired:
        raise StorageFailed(path, f"qemu-nbd did not end within {END_WAIT:g} s") from None
    if status != 0:
        raise StorageFailed(path, f"qemu-nbd failed: {_errors_of(server)}")


def _errors_of(server: subprocess.Popen[bytes]) -> str:
    assert server.stderr is not None
    return server.stderr.read().decode(errors="replace")


def refusal(path: Path, output: str, tool: str) -> Exception:
    """Return the error for a QEMU tool that could not open a disk, in its own words."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = lines[-1] if lines else "no reason given"
    reason = last.removeprefix(f"{tool}: ")
    if "lock" in output and "another process" in output:
        return Busy(path, "is in use by another process, a running virtual machine perhaps")
    for prefix in (f"Could not open '{path.absolute()}': ", "Failed to blk_new_open "):
        reason = reason.removeprefix(prefix)
    return FormatError(path, f"{tool} cannot open it: {reason}")
