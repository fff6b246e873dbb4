"""pyfuse3 handlers of names and attributes: the tree of sealed files as the kernel sees it.

Translates between the kernel's numbers and sealed files; open files are `files.py`'s. `getxattr`
stays pyfuse3's own ENOSYS, without which the kernel would ask for a security label before every
write.

Concurrency: each request is a task of the trio thread. Whatever asks the file system or the key
service runs in a worker thread; nodes and handles change only between two awaits. `_changing` is
held by whoever makes, removes or renames (waited for by the same only), so that the checks before
such a step hold until it is done.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from sealfs.errors import AlreadyExists, NotFound, UsageError
from sealfs.mount import attributes, names
from sealfs.mount.attributes import Attributes
from sealfs.mount.disk import Disk, FileKey
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.files import Files, guarded
from sealfs.mount.handles import Handles
from sealfs.mount.names import NAME_MAX, SUFFIX, Node, Ownership
from sealfs.mount.options import MountOptions

if TYPE_CHECKING:
    from sealfs.mount.opener import Opener

_LISTED_AT_ONCE = 64  # directory entries looked up in one go

log = logging.getLogger("sealfs.mount")


class Namespace(Files):
    """The tree of sealed files as the kernel sees it."""

    enable_writeback_cache = False  # the kernel would own sizes and delay writes

    def __init__(
        self,
        source: Path,
        *,
        options: MountOptions,
        opener: Opener,
        disks: Disks,
        handles: Handles,
        failures: Failures,
        device_fd: int,
        on_init: Callable[[], None],
    ) -> None:
        super().__init__(
            source,
            options=options,
            opener=opener,
            disks=disks,
            handles=handles,
            failures=failures,
            device_fd=device_fd,
        )
        self._on_init = on_init
        self._attributes = Attributes(opener, disks)
        self._listings: dict[int, tuple[Path, list[tuple[str, Path]]]] = {}
        self._next_listing = 1
        self._changing = trio.Lock()

    @property
    def node_count(self) -> int:
        """Files and directories that the kernel has in mind."""
        return len(self._nodes)

    async def acquire(self, path: Path) -> Disk:
        """Open an image that is to be changed, for a command; the caller gives its handle back.

        Raises:
            SealfsError: it could not be opened, or the mount is read-only.
        """
        self._refuse_read_only()
        try:
            status = await self._run(path.lstat)
        except FileNotFoundError:
            raise NotFound(path, "no such sealed image") from None
        return await self._disks.acquire((status.st_dev, status.st_ino), path)

    async def resize(self, path: Path, size: int, *, may_shrink: bool) -> None:
        """Set the size of a plain file for a command, opening the image if need be.

        Durable on return, and the kernel knows of it.

        Raises:
            UsageError: it would shrink, and may not.
            SealfsError: it could not be opened or resized.
        """
        disk = await self.acquire(path)
        try:
            if size < disk.size and not may_shrink:
                raise UsageError(path, f"has {disk.size} bytes, more than {size}: would be cut off")
            await disk.resize(size)
        finally:
            self._disks.release(disk)
        node = self._nodes.by_key(disk.key)
        if node is not None:
            self.attributes_changed(node.inode)

    def init(self) -> None:
        """Note that the kernel's INIT has come: names are served from now on."""
        self._on_init()

    # Names.

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        """Return the attributes of a name."""
        return await self._entry(*await self._find(parent_inode, name))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take back lookups."""
        for inode, count in inode_list:
            self._nodes.forget(inode, count)

    @guarded
    async def opendir(self, inode: int, ctx: Any) -> int:
        """List a directory once; `readdir` serves from that list."""
        directory = self._nodes.get(inode)
        found = await self._run(partial(names.entries, directory))
        above = directory.path if inode == pyfuse3.ROOT_INODE else directory.path.parent
        found[:0] = [(".", directory.path), ("..", above)]
        number = self._next_listing
        self._next_listing += 1
        self._listings[number] = (directory.path, found)
        return number

    @guarded
    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        """Reply with entries from `start_id` on, with their attributes."""
        _, found = self._listings[fh]
        position = start_id
        while position < len(found):
            part = found[position : position + _LISTED_AT_ONCE]
            statuses = await self._run(
                partial(self._attributes.statuses, [path for _, path in part])
            )
            for (name, path), seen in zip(part, statuses, strict=True):
                position += 1
                if seen is None:
                    continue  # removed since
                node = self._nodes.note(path, seen[0])
                entry = self._attributes.entry(node, *seen)
                if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position):
                    return
                if name not in (".", ".."):  # the kernel does not count these
                    node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        """Drop a listing."""
        self._listings.pop(fh, None)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the names of a directory durable."""
        listing = self._listings.get(fh)
        if listing is not None:
            await self._run(partial(names.sync_directory, listing[0]))

    @guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        """Make a directory, owned by who asked."""
        path = self._new_path(parent_inode, name, "")
        async with self._changing:
            await self._refuse_taken(parent_inode, name)
            status = await self._run(
                partial(attributes.make_directory, path, mode, ctx.uid, ctx.gid)
            )
        return await self._entry(path, status)

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Remove an empty directory (one with hidden files is not empty)."""
        self._refuse_read_only()
        async with self._changing:
            path, status = await self._find(parent_inode, name)
            if not stat.S_ISDIR(status.st_mode):
                raise pyfuse3.FUSEError(errno.ENOTDIR)
            await self._run(path.rmdir)
            self._removed(status)

    @guarded
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: Any) -> Any:
        """Make a sealed image without opening it; of devices, pipes and sockets there are none."""
        if not stat.S_ISREG(mode):
            raise pyfuse3.FUSEError(errno.EPERM)
        return await self._entry(*await self._create(parent_inode, name, mode, ctx))

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[Any, Any]:
        """Make a sealed image and open it."""
        path, status = await self._create(parent_inode, name, mode, ctx)
        entry = await self._entry(path, status)
        info = await self._open(self._nodes.get(entry.st_ino), flags & ~os.O_TRUNC)
        return info, entry

    async def _create(
        self, parent_inode: int, name: bytes, mode: int, ctx: Any
    ) -> tuple[Path, os.stat_result]:
        path = self._new_path(parent_inode, name, SUFFIX)
        if not self._options.create:
            raise pyfuse3.FUSEError(errno.EPERM)
        below = path.relative_to(self._source)
        vm_id = names.vm_id_for(
            below.with_name(below.name[: -len(SUFFIX)]),
            from_directory=self._options.vm_id_from_directory,
        )
        chosen = self._options
        owner = Ownership(
            uid=ctx.uid if chosen.uid is None else chosen.uid,
            gid=ctx.gid if chosen.gid is None else chosen.gid,
            # Private unless the mount says otherwise: what is sealed is meant to be.
            mode=mode & 0o700 if chosen.mode is None else chosen.mode,
        )
        async with self._changing:
            await self._refuse_taken(parent_inode, name)
            try:
                shares = self._options.vm_id_from_directory
                await self._run(
                    partial(self._opener.create, path, vm_id, owner, shares_directory=shares)
                )
            except AlreadyExists as exc:
                log.error('image="%s" vm="%s" not created: %s', path, vm_id, exc.detail)
                raise
            return path, await self._run(path.lstat)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Remove a sealed image; the VM's key stays, and who has it open has it until the end."""
        self._refuse_read_only()
        async with self._changing:
            path, status = await self._find(parent_inode, name)
            if stat.S_ISDIR(status.st_mode):
                raise pyfuse3.FUSEError(errno.EISDIR)
            await self._run(partial(self._opener.remove, path))
            self._removed(status)

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: Any,
    ) -> None:
        """Rename a sealed image, open or not, or a directory; registry and nodes follow."""
        if flags & ~pyfuse3.RENAME_NOREPLACE:
            raise pyfuse3.FUSEError(errno.EINVAL)
        self._refuse_read_only()
        async with self._changing:
            old, status = await self._find(parent_inode_old, name_old)
            is_directory = stat.S_ISDIR(status.st_mode)
            new = self._new_path(parent_inode_new, name_new, "" if is_directory else SUFFIX)
            replaced: os.stat_result | None = None
            with contextlib.suppress(NotFound):
                there, replaced = await self._find(parent_inode_new, name_new)
                if flags & pyfuse3.RENAME_NOREPLACE:
                    raise AlreadyExists(there, "exists")
                if stat.S_ISDIR(replaced.st_mode) != is_directory:
                    raise pyfuse3.FUSEError(errno.ENOTDIR if is_directory else errno.EISDIR)
            if replaced is not None and os.path.samestat(replaced, status):
                return  # rename(2): two names of one file, nothing to do
            await self._run(partial(self._opener.move, old, new))
            if replaced is not None:
                self._removed(replaced)
            for node in self._nodes.moved(old, new):
                disk = self._disks.find(node.key)
                if disk is not None:
                    disk.path = node.path

    @guarded
    async def symlink(self, *args: Any) -> Any:
        """Refuse links: nothing points elsewhere, an image is registered under one path."""
        raise pyfuse3.FUSEError(errno.EPERM)

    link = symlink  # type: ignore[assignment]

    # Attributes.

    @guarded
    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """Return the attributes of the sealed file with the size of the plain one."""
        return await self._attributes.of(self._nodes.get(inode))

    @guarded
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        """Change size, mode, owner or times; all but the size are the sealed file's own."""
        node = self._nodes.get(inode)
        self._refuse_read_only()
        if fields.update_size and node.is_directory:
            raise pyfuse3.FUSEError(errno.EISDIR)
        fd: int | None = None
        async with contextlib.AsyncExitStack() as stack:
            if fields.update_size or self._disks.find(node.key) is not None:
                disk = await self._acquire(node)
                stack.callback(self._disks.release, disk)
                fd = disk.fd
                if fields.update_size:
                    await self._served(disk, disk.resize(attr.st_size))
            await self._run(partial(attributes.change, node.path, fd, attr, fields))
        return await self._attributes.of(node)

    @guarded
    async def statfs(self, ctx: Any) -> Any:
        """Return the figures of the file system that holds the sealed files."""
        found = await self._run(partial(_statvfs, self._nodes.get(pyfuse3.ROOT_INODE)))
        answer = pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail",
        ):  # fmt: skip
            setattr(answer, name, getattr(found, name))
        answer.f_namemax = NAME_MAX - len(SUFFIX)
        return answer

    # Shared by the handlers.

    async def _entry(self, path: Path, status: os.stat_result) -> Any:
        """Return attributes as the answer to a lookup, which the kernel counts."""
        node = self._nodes.note(path, status)
        node.lookups += 1
        try:
            return self._attributes.entry(
                node, *await self._run(partial(self._attributes.status, path))
            )
        except BaseException:
            self._nodes.forget(node.inode, 1)
            raise

    def _new_path(self, parent_inode: int, name: bytes, suffix: str) -> Path:
        self._refuse_read_only()
        if len(name) + len(suffix) > NAME_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        return self._nodes.get(parent_inode).path / (_decoded(name) + suffix)

    async def _find(self, parent_inode: int, name: bytes) -> tuple[Path, os.stat_result]:
        return await self._run(partial(names.find, self._nodes.get(parent_inode), _decoded(name)))

    async def _refuse_taken(self, parent_inode: int, name: bytes) -> None:
        with contextlib.suppress(NotFound):
            path, _ = await self._find(parent_inode, name)
            raise AlreadyExists(path, "exists")

    def _removed(self, status: os.stat_result) -> None:
        key: FileKey = (status.st_dev, status.st_ino)
        self._nodes.removed(key)
        self._disks.unlinked(key)


def _statvfs(root: Node) -> os.statvfs_result:
    names.check_directory(root)
    return os.statvfs(root.path)


def _decoded(name: bytes) -> str:
    text = os.fsdecode(name)
    if text in ("", ".", "..") or "/" in text or "\0" in text:
        raise UsageError(text, "is not a file name")
    return text
