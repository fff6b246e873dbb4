"""What the tests of keyd share: a broker in a thread, a connection without a client."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mount_support import TinyKeys

from sealfs.keys import keyd_wire
from sealfs.keys.broker import Broker


class Running:
    """A broker in a thread of this process, over TinyKeys or what `make` makes."""

    def __init__(self, state: Path, path: Path | None = None, **options: Any) -> None:
        self.path = path or state.parent / "keyd.sock"
        self.opened: list[Any] = []
        self._make: Callable[[], Any] = options.pop("make", lambda: TinyKeys(state, str))
        self._options = options

    def _open(self, pid: int, uid: int) -> Any:
        keys = self._make()
        self.opened.append(keys)
        return keys

    def start(self) -> None:
        self.broker = Broker(self.path, self._open, **self._options)
        self.broker.bind()
        ready = threading.Event()
        self.thread = threading.Thread(target=self.broker.run, args=(ready.set,), daemon=True)
        self.thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        self.broker.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()

    def __enter__(self) -> Running:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def groups(self) -> int:
        return len(self.broker._groups)


@contextlib.contextmanager
def raw_connection(path: Path, *, joined: bool = True) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as found:
        found.settimeout(20)
        found.connect(str(path))
        assert answer_of(found) == {"ok": True, "version": 1, "features": ["networks"]}
        if joined:
            assert ask(found, {"verb": "join", "group": os.urandom(16).hex()})["ok"]
        yield found


def answer_of(connection: socket.socket) -> dict[str, Any]:
    return keyd_wire.decode(connection.recv(keyd_wire.MESSAGE_SIZE_MAX))


def ask(connection: socket.socket, document: Any) -> dict[str, Any]:
    connection.send(document if isinstance(document, bytes) else keyd_wire.encode(document))
    return answer_of(connection)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
