"""Attributes: what the kernel is told of a sealed file, and what it may change of it.

Owner, mode, times and blocks are the sealed file's own (there is one owner and mode, not two);
only the size is that of the plain file, from the unverified superblock until the image is open.

Concurrency: `status`, `statuses` and the functions ask the file system and run in worker threads;
`of` and `entry` look at open images and belong to the trio thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyfuse3

from sealfs.errors import SealfsError
from sealfs.mount.driver import Disks
from sealfs.mount.names import Node, sync_directory

if TYPE_CHECKING:
    from sealfs.mount.opener import Opener

ATTRIBUTE_TIMEOUT = 1.0  # seconds; st_blocks and mtime change behind the kernel at each commit

log = logging.getLogger("sealfs.mount")


class Attributes:
    """Finds the attributes of sealed files and directories."""

    def __init__(self, opener: Opener, disks: Disks) -> None:
        self._opener = opener
        self._disks = disks

    async def of(self, node: Node) -> Any:
        """Return a node's attributes; of an open image those of the file it has open."""
        disk = None if node.is_directory else self._disks.find(node.key)
        status = None if disk is None else disk.file_status()
        if status is not None:
            return self.entry(node, status, 0)
        found = await self._disks.workers.run(partial(self.status, node.path))
        return self.entry(node, *found)

    def status(self, path: Path) -> tuple[os.stat_result, int]:
        """Return a file's status and the plain size; in a worker thread."""
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            return status, status.st_size
        try:
            return status, self._opener.size_of(path, status)
        except SealfsError as exc:
            # It is listed, and its open says what is wrong.
            log.debug("size of %s not known: %s", path, exc)
            return status, 0

    def statuses(self, paths: list[Path]) -> list[tuple[os.stat_result, int] | None]:
        """As `status` for several; None for a file that is gone."""
        found: list[tuple[os.stat_result, int] | None] = []
        for path in paths:
            try:
                found.append(self.status(path))
            except FileNotFoundError:
                found.append(None)
        return found

    def entry(self, node: Node, status: os.stat_result, size: int) -> Any:
        """Return a node's attributes for pyfuse3; the size of an open image is its own."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = node.inode
        entry.generation = 0
        entry.attr_timeout = entry.entry_timeout = ATTRIBUTE_TIMEOUT
        for name in (
            "st_mode", "st_uid", "st_gid", "st_blocks", "st_atime_ns", "st_mtime_ns",
            "st_ctime_ns",
        ):  # fmt: skip
            setattr(entry, name, getattr(status, name))
        entry.st_nlink = status.st_nlink if node.is_directory else min(status.st_nlink, 1)
        entry.st_blksize = 4096
        disk = None if node.is_directory else self._disks.find(node.key)
        entry.st_size = size if disk is None or disk.image is None else disk.image.size
        return entry


def make_directory(path: Path, mode: int, uid: int, gid: int) -> os.stat_result:
    """Make a directory with this mode and owner; return its status."""
    path.mkdir(stat.S_IMODE(mode))
    path.chmod(stat.S_IMODE(mode))
    if os.geteuid() == 0:
        os.chown(path, uid, gid)
    sync_directory(path.parent)
    return path.lstat()


def change(path: Path, fd: int | None, attr: Any, fields: Any) -> None:
    """Set what a SETATTR names, but for the size, on the sealed file itself.

    Args:
        path: of the file or directory; whatever stands there now, but never through a link.
        fd: the file's, if it is open: then `path` is not looked at.
        attr: the new values.
        fields: which of them.
    """
    with contextlib.ExitStack() as stack:
        if fd is None:
            fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, fd)
        target = f"/proc/self/fd/{fd}"
        if fields.update_uid or fields.update_gid:
            os.chown(
                target,
                attr.st_uid if fields.update_uid else -1,
                attr.st_gid if fields.update_gid else -1,
            )
        if fields.update_mode:
            os.chmod(target, stat.S_IMODE(attr.st_mode))
        if fields.update_atime or fields.update_mtime:
            now = os.stat(target)
            atime = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            mtime = attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns
            os.utime(target, ns=(atime, mtime))
