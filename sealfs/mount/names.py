"""Names and inodes: which sealed file or directory a number of the kernel's means.

`NAME.sealed` under the source directory appears as `NAME`; directories appear as they are; nothing
else does. The inode number is that of the sealed file, so that it is the same after a remount.

Concurrency: used from the trio thread only, except the functions, which are pure or ask the
file system and may run anywhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sealfs.errors import NotFound, StorageFailed
from sealfs.mount.disk import FileKey, deleted

SUFFIX = ".sealed"
ROOT_INODE = 1
NAME_MAX = 255  # bytes in a name (<limits.h>)
_FOREIGN_INODES = 1 << 62  # numbers for files whose own number is taken


@dataclass(slots=True)
class Node:
    """A sealed file or a directory that the kernel knows."""

    inode: int
    key: FileKey
    path: Path
    is_directory: bool
    lookups: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ownership:
    """Owner and mode of a file to be made."""

    uid: int
    gid: int
    mode: int


class Nodes:
    """The nodes of a mount, by the kernel's number and by the file's identity."""

    def __init__(self, source: Path) -> None:
        status = source.stat()
        self._root = Node(ROOT_INODE, (status.st_dev, status.st_ino), source, True, lookups=1)
        self._by_inode = {ROOT_INODE: self._root}
        self._by_key = {self._root.key: self._root}
        self._next_foreign = _FOREIGN_INODES

    def get(self, inode: int) -> Node:
        """Return a node; `NotFound` if the kernel names one that it was never told of."""
        node = self._by_inode.get(inode)
        if node is None:
            raise NotFound(f"inode {inode}", "is not known")
        return node

    def by_key(self, key: FileKey) -> Node | None:
        """Return the node of a file, None if the kernel does not know it."""
        return self._by_key.get(key)

    def note(self, path: Path, status: os.stat_result) -> Node:
        """Return the node of a file that was found at `path`, new or known."""
        key = (status.st_dev, status.st_ino)
        node = self._by_key.get(key)
        if node is None:
            inode = status.st_ino
            if inode in self._by_inode or inode <= ROOT_INODE:
                # Another file system mounted below, or its root directory's number.
                inode = self._next_foreign
                self._next_foreign += 1
            node = Node(inode, key, path, stat.S_ISDIR(status.st_mode))
            self._by_inode[inode] = self._by_key[key] = node
        elif node is not self._root:
            node.path = path
            node.is_directory = stat.S_ISDIR(status.st_mode)
        return node

    def forget(self, inode: int, lookups: int) -> None:
        """Take back what the kernel was told `lookups` times."""
        node = self._by_inode.get(inode)
        if node is None or node is self._root:
            return
        node.lookups -= lookups
        if node.lookups <= 0:
            del self._by_inode[inode]
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]

    def removed(self, key: FileKey) -> None:
        """Note that a file or directory has no name any more.

        Its number stays taken until the kernel forgets it: a new file to which the file system
        gives the same inode gets another.
        """
        node = self._by_key.pop(key, None)
        if node is not None:
            node.path = deleted(node.path)

    def __len__(self) -> int:
        return len(self._by_inode)

    def moved(self, old: Path, new: Path) -> Iterator[Node]:
        """Follow a rename of a file or directory; yield each node that has a new path."""
        for node in self._by_inode.values():
            if node.path == old:
                node.path = new
                yield node
            elif old in node.path.parents:
                node.path = new / node.path.relative_to(old)
                yield node


def is_shown(name: str, status: os.stat_result) -> bool:
    """Whether a directory entry appears under the mount: no symbolic links, nothing unsealed."""
    if stat.S_ISDIR(status.st_mode):
        return True
    return stat.S_ISREG(status.st_mode) and name.endswith(SUFFIX) and len(name) > len(SUFFIX)


def shown_name(name: str, status: os.stat_result) -> str:
    """Return the name under the mount of an entry that is shown."""
    return name if stat.S_ISDIR(status.st_mode) else name[: -len(SUFFIX)]


def check_directory(directory: Node) -> None:
    """Refuse to work in a place that is not the directory it was.

    Raises:
        NotFound: it was removed or moved outside the mount.
        StorageFailed: the same of the source directory itself, or its file system was unmounted:
            whatever is under that path now is not ours to write to.
    """
    with contextlib.suppress(FileNotFoundError):
        status = directory.path.lstat()
        if (status.st_dev, status.st_ino) == directory.key:
            return
    if directory.inode == ROOT_INODE:
        raise StorageFailed(
            directory.path, "the source directory is gone: removed, or its file system unmounted"
        )
    raise NotFound(directory.path, "no such directory any more")


def find(parent: Node, name: str) -> tuple[Path, os.stat_result]:
    """Return path and status of what appears as `name`; a sealed file before a directory.

    Raises:
        NotFound: nothing appears under that name.
        StorageFailed: the source directory is gone.
    """
    directory = parent.path
    for candidate in (directory / (name + SUFFIX), directory / name):
        try:
            status = candidate.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if is_shown(candidate.name, status) and shown_name(candidate.name, status) == name:
            return candidate, status
    check_directory(parent)
    raise NotFound(directory / name, "no such file")


def entries(directory: Node) -> list[tuple[str, Path]]:
    """Return (name under the mount, path) of what appears in a directory, sorted.

    Raises:
        NotFound, StorageFailed: the directory is gone.
    """
    check_directory(directory)
    found: dict[str, Path] = {}
    with os.scandir(directory.path) as listing:
        for entry in listing:
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if is_shown(entry.name, status):
                name = shown_name(entry.name, status)
                if name not in found or not stat.S_ISDIR(status.st_mode):
                    found[name] = Path(entry.path)
    return sorted(found.items())


def stem(sealed: Path) -> str:
    """Return a sealed file's name without `.sealed` and the last suffix before it."""
    return Path(sealed.name.removesuffix(SUFFIX)).stem


def vm_id_for(path_below: Path, *, from_directory: bool) -> str:
    """Return the VM id of a file made under the mount: its path without the last suffix.

    With `from_directory` it is the directory's path, so that a VM's disks share one key; a file
    at the top has no directory and keeps its own.
    """
    if from_directory and path_below.parent != Path():
        return path_below.parent.as_posix()
    return path_below.with_suffix("").as_posix()


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
