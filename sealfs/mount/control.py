"""Which mount holds what: the client half of a mount's control socket (`sealfs/control.py`).

The socket is `RUN_DIR/MOUNT-ID.sock`. Finds the mount that holds an image, a mount point or a file
under it. Blocks, and belongs to another process than the mount's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sealfs.control import Document, call, connection, receive, run_directory, send
from sealfs.errors import NotFound, SealfsError

STATUS_WAIT = 3.0  # seconds until a daemon is taken for stopped; `status` waits for nothing


@dataclass(frozen=True, slots=True)
class RunningMount:
    """A mount that answered: where to ask, and what it said."""

    socket_path: Path
    status: Document

    def call(self, verb: str, **arguments: object) -> Document:
        """Ask it one thing; see `call`."""
        return call(self.socket_path, verb, **arguments)


def mount_of_device(minor: int, run_dir: Path | None = None) -> RunningMount | None:
    """Return the mount whose files have this device number, None if its daemon is gone.

    Raises:
        Busy: its daemon does not answer.
    """
    socket_path = (run_dir or run_directory()) / f"{minor}.sock"
    try:
        return RunningMount(socket_path, _status_of(socket_path))
    except NotFound:
        return None


def find_mount(path: Path, run_dir: Path | None = None) -> RunningMount | None:
    """Return the mount that holds `path`, or None.

    `path` may be a mount point, a file under one, a source directory, or a sealed file below one.
    A mount whose daemon is gone does not answer and is not found.
    """
    wanted = os.path.realpath(path)
    best: tuple[tuple[int, bool], RunningMount] | None = None
    for mount in running_mounts(run_dir):
        for place in (mount.status["mountpoint"], mount.status["source"]):
            # The deepest place wins: mounts may lie below one another's directories. Of two at
            # one place the one that is on top, not the one that was unmounted lazily.
            rank = (len(place), mount.status["is_mounted"])
            if _is_at_or_below(wanted, place) and (best is None or rank > best[0]):
                best = (rank, mount)
    return None if best is None else best[1]


def running_mounts(run_dir: Path | None = None) -> Iterator[RunningMount]:
    """Find this user's mounts; one whose daemon is gone or does not answer is left out."""
    for socket_path in sorted((run_dir or run_directory()).glob("*.sock")):
        with contextlib.suppress(SealfsError):
            status = _status_of(socket_path)
            if "mountpoint" in status:  # not another daemon of sealfs
                yield RunningMount(socket_path, status)


def _status_of(socket_path: Path) -> Document:
    with connection(socket_path) as stream:
        stream.settimeout(STATUS_WAIT)
        send(stream, {"verb": "status"})
        return receive(stream, socket_path)


def _is_at_or_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
