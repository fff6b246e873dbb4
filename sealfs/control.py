"""The control socket of a daemon: how commands ask it, and how it answers.

A Unix socket (mode 0600; the peer must be root or the daemon's own user), one JSON document a line
each way: `{"verb": ...}` gets `{"ok": true, ...}` or `{"ok": false, "error": {"type", "subject",
"detail"}}`. The server's verbs are a table, so that others can be added.

Concurrency: the server's tasks run in the daemon's trio thread, one for each connection. The client
functions block and belong to another process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from sealfs import errors
from sealfs.errors import Busy, NotFound, SealfsError, StorageFailed, UsageError

Document = dict[str, Any]
Verb = Callable[[Document], Awaitable[Document]]

LINE_MAX = 1 << 20  # bytes of a request or an answer
CONNECTIONS_MAX = 64
_CONNECT_WAIT = struct.pack("@ll", 3, 0)  # struct timeval: for ever, unless it is said
_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

log = logging.getLogger("sealfs.control")


def run_directory() -> Path:
    """Return where the sockets of this user's daemons are.

    Raises:
        UsageError: somebody else made the directory, or may write to it.
    """
    if os.geteuid() == 0:
        return Path("/run/sealfs")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "sealfs"
    directory = Path(f"/tmp/sealfs-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    # Anybody may have made it, with sockets that lie, or as a link to where a log would do harm.
    if (status.st_uid, status.st_mode & ~0o755) != (os.geteuid(), stat.S_IFDIR):
        raise UsageError(directory, "is not yours alone; remove it, or set XDG_RUNTIME_DIR")
    return directory


class ControlServer:
    """Serves the verbs of one daemon on its socket."""

    def __init__(self, path: Path, verbs: dict[str, Verb]) -> None:
        self.path = path
        self._verbs = verbs
        self._places = trio.CapacityLimiter(CONNECTIONS_MAX)
        self._answering = 0
        self._inode = 0  # of the socket
        self._drained = trio.Event()

    def bind(self) -> socket.socket:
        """Make the socket before anything is served; blocking, only touches the directory."""
        try:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)  # of a daemon that died; its name is ours now
        except OSError as exc:
            raise StorageFailed(self.path, f"control socket: {exc.strerror or exc}") from exc
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        previous = os.umask(0o177)
        try:
            listener.bind(str(self.path))
        except OSError as exc:
            listener.close()
            raise StorageFailed(self.path, f"control socket: {exc.strerror or exc}") from exc
        finally:
            os.umask(previous)
        self._inode = self.path.stat().st_ino
        listener.listen(16)
        return listener

    async def run(
        self,
        bound: socket.socket,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept connections until cancelled; the socket is gone afterwards."""
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(_non_blocking(bound)))
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    stream = await listener.accept()
                    nursery.start_soon(self._serve, stream)
        finally:
            bound.close()
            with contextlib.suppress(OSError):
                # Once a mount is gone its id may be another's, and the socket too.
                if self.path.stat().st_ino == self._inode:
                    self.path.unlink()

    async def drained(self) -> None:
        """Return when no request is being answered."""
        while self._answering:
            self._drained = trio.Event()
            await self._drained.wait()

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with self._places, stream:
            if not _is_allowed(stream):
                return
            buffer = bytearray()
            try:
                while True:
                    line, newline, rest = buffer.partition(b"\n")
                    if newline:
                        buffer = rest
                        self._answering += 1
                        try:
                            await stream.send_all(_line(await self._answer(bytes(line))))
                        finally:
                            self._answering -= 1
                            self._drained.set()
                        continue
                    part = await stream.receive_some(65536)
                    if not part or len(buffer) + len(part) > LINE_MAX:
                        return
                    buffer += part
            except trio.BrokenResourceError:
                return

    async def _answer(self, line: bytes) -> Document:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UsageError("control request", "is not a JSON object")
            verb = self._verbs.get(str(request.get("verb")))
            if verb is None:
                raise UsageError(request.get("verb"), "unknown verb")
            return {"ok": True, **await verb(request)}
        except (ValueError, RecursionError) as exc:
            return _refusal(UsageError("control request", f"is not JSON: {exc}"))
        except SealfsError as exc:
            return _refusal(exc)
        except Exception as exc:
            log.exception("control request failed")
            return _refusal(StorageFailed("control request", f"internal error: {exc}"))


def error_document(exc: SealfsError) -> dict[str, str]:
    """Return an error as JSON-able data, for `error_from`."""
    return {"type": type(exc).__name__, "subject": exc.subject, "detail": exc.detail}


def error_from(document: dict[str, str]) -> SealfsError:
    """Return the exception that `error_document` described."""
    kind = getattr(errors, document["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, SealfsError)):
        kind = SealfsError
    exc = kind.__new__(kind)
    SealfsError.__init__(exc, document["subject"], document["detail"])
    return exc


def call(socket_path: Path, verb: str, **arguments: object) -> Document:
    """Send one request and return the answer.

    Raises:
        NotFound: nobody listens there.
        SealfsError: the daemon refused; its own error.
    """
    with connection(socket_path) as stream:
        send(stream, {"verb": verb, **arguments})
        return receive(stream, socket_path)


@contextlib.contextmanager
def connection(socket_path: Path) -> Iterator[socket.socket]:
    """Connect to a daemon's socket.

    Raises:
        Busy: as many as may wait for its daemon do so already.
        NotFound: nobody listens there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _CONNECT_WAIT)
        try:
            stream.connect(str(socket_path))
        except BlockingIOError:
            raise Busy(socket_path, "the daemon does not answer") from None
        except OSError as exc:
            raise NotFound(socket_path, f"nobody answers: {exc.strerror}") from exc
        yield stream


def send(stream: socket.socket, request: Document) -> None:
    """Send one request; `receive` gets the answer."""
    stream.sendall(_line(request))


def receive(stream: socket.socket, socket_path: Path) -> Document:
    """Return the next answer; `StorageFailed` if the daemon ended without one."""
    line = bytearray()
    while not line.endswith(b"\n"):
        try:
            part = stream.recv(65536)
        except TimeoutError:
            raise Busy(socket_path, "the daemon does not answer") from None
        except ConnectionError:
            part = b""
        if not part:
            raise StorageFailed(socket_path, "the daemon ended without an answer")
        line += part
    answer: Document = json.loads(line)
    if not answer.pop("ok"):
        raise error_from(answer["error"])
    return answer


def _line(document: Document) -> bytes:
    return json.dumps(document, default=str).encode() + b"\n"


def _refusal(exc: SealfsError) -> Document:
    return {"ok": False, "error": error_document(exc)}


def _is_allowed(stream: trio.SocketStream) -> bool:
    raw = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return _UCRED.unpack(raw)[1] in (0, os.geteuid())


def _non_blocking(bound: socket.socket) -> socket.socket:
    bound.setblocking(False)
    return bound
