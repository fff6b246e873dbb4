"""pyfuse3 handlers: names, attributes and handles, and the data too when the lane is off.

Translates between the kernel's numbers and sealed files. Whatever a handler raises becomes an
errno (failures.py): one failing request never ends the mount. `getxattr` stays pyfuse3's own
ENOSYS, without which the kernel would ask for a security label before every write. Without the
lane a write's own flags are not visible (pyfuse3 drops them): O_DSYNC of the handle is honoured,
RWF_DSYNC of an asynchronous direct write is not; fallocate and lseek do not exist.

Concurrency: each request is a task of the trio thread. Whatever asks the file system or the key
service runs in a worker thread; nodes and handles change only between two awaits. `_changing` is
held by whoever makes, removes or renames (waited for by the same only), so that the checks before
such a step hold until it is done.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from sealfs.errors import AlreadyExists, Busy, NotFound, ReadOnly, SealfsError, UsageError
from sealfs.mount import attributes, names
from sealfs.mount.attributes import Attributes
from sealfs.mount.driver import Disk, Disks
from sealfs.mount.failures import Failures
from sealfs.mount.handles import Handle, Handles
from sealfs.mount.names import NAME_MAX, SUFFIX, Node, Nodes, Ownership
from sealfs.mount.options import MountOptions

if TYPE_CHECKING:
    from sealfs.mount.opener import Opener

_LISTED_AT_ONCE = 64  # directory entries looked up in one go

log = logging.getLogger("sealfs.mount")

P = ParamSpec("P")
T = TypeVar("T")


def _guarded(
    handler: Callable[Concatenate[Namespace, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Namespace, P], Coroutine[Any, Any, T]]:
    """Turn whatever a handler raises into the one exception that pyfuse3 survives."""

    @functools.wraps(handler)
    async def wrapper(self: Namespace, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            raise pyfuse3.FUSEError(self.code_of(exc)) from None

    return wrapper


class Namespace(pyfuse3.Operations):
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
        on_init: Callable[[], None],
    ) -> None:
        super().__init__()
        self._source = source
        self._options = options
        self._opener = opener
        self._disks = disks
        self._handles = handles
        self._failures = failures
        self._on_init = on_init
        self._run = disks.workers.run
        self._nodes = Nodes(source)
        self._attributes = Attributes(opener, disks)
        self._listings: dict[int, tuple[Path, list[tuple[str, Path]]]] = {}
        self._next_listing = 1
        self._changing = trio.Lock()

    def code_of(self, exc: Exception) -> int:
        """Return the errno for an exception, logging what must be logged."""
        return self._code_of_open(exc, Path(exc.subject if isinstance(exc, SealfsError) else ""))

    def init(self) -> None:
        """Note that the kernel's INIT has come: names are served from now on."""
        self._on_init()

    # Names.

    @_guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        """Return the attributes of a name."""
        path, status = await self._run(
            partial(names.find, self._nodes.get(parent_inode).path, _decoded(name))
        )
        return await self._entry(path, status)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """Take back lookups."""
        for inode, count in inode_list:
            self._nodes.forget(inode, count)

    @_guarded
    async def opendir(self, inode: int, ctx: Any) -> int:
        """List a directory once; `readdir` serves from that list."""
        directory = self._nodes.get(inode).path
        found = await self._run(partial(names.entries, directory))
        number = self._next_listing
        self._next_listing += 1
        self._listings[number] = (directory, found)
        return number

    @_guarded
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
                node.lookups += 1

    async def releasedir(self, fh: int) -> None:
        """Drop a listing."""
        self._listings.pop(fh, None)

    @_guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """Make the names of a directory durable."""
        listing = self._listings.get(fh)
        if listing is not None:
            await self._run(partial(names.sync_directory, listing[0]))

    @_guarded
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: Any) -> Any:
        """Make a directory, owned by who asked."""
        path = self._new_path(parent_inode, name, "")
        async with self._changing:
            await self._refuse_taken(path.parent, _decoded(name))
            status = await self._run(
                partial(attributes.make_directory, path, mode, ctx.uid, ctx.gid)
            )
        return await self._entry(path, status)

    @_guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Remove an empty directory (one with hidden files is not empty)."""
        self._refuse_read_only()
        path = self._nodes.get(parent_inode).path / _decoded(name)
        async with self._changing:
            await self._run(path.rmdir)

    @_guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any
    ) -> tuple[Any, Any]:
        """Make a sealed image and open it."""
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
            await self._refuse_taken(path.parent, _decoded(name))
            try:
                shares = self._options.vm_id_from_directory
                await self._run(
                    partial(self._opener.create, path, vm_id, owner, shares_directory=shares)
                )
            except AlreadyExists as exc:
                log.error('image="%s" vm="%s" not created: %s', path, vm_id, exc.detail)
                raise
            status = await self._run(path.lstat)
        entry = await self._entry(path, status)
        info = await self._open(self._nodes.get(entry.st_ino), flags & ~os.O_TRUNC)
        return info, entry

    @_guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        """Remove a sealed image that nobody has open; the VM's key stays."""
        self._refuse_read_only()
        directory = self._nodes.get(parent_inode).path
        async with self._changing:
            path, status = await self._run(partial(names.find, directory, _decoded(name)))
            if stat.S_ISDIR(status.st_mode):
                raise pyfuse3.FUSEError(errno.EISDIR)
            await self._close_idle(path, status)
            await self._run(partial(self._opener.remove, path))

    @_guarded
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
        source_directory = self._nodes.get(parent_inode_old).path
        async with self._changing:
            old, status = await self._run(partial(names.find, source_directory, _decoded(name_old)))
            is_directory = stat.S_ISDIR(status.st_mode)
            new = self._new_path(parent_inode_new, name_new, "" if is_directory else SUFFIX)
            try:
                there, status_there = await self._run(
                    partial(names.find, new.parent, _decoded(name_new))
                )
            except NotFound:
                pass
            else:
                if flags & pyfuse3.RENAME_NOREPLACE:
                    raise AlreadyExists(there, "exists")
                if stat.S_ISDIR(status_there.st_mode) != is_directory:
                    raise pyfuse3.FUSEError(errno.ENOTDIR if is_directory else errno.EISDIR)
                if not is_directory:
                    await self._close_idle(there, status_there)
            await self._run(partial(self._opener.move, old, new))
            for node in self._nodes.moved(old, new):
                disk = self._disks.find(node.key)
                if disk is not None:
                    disk.path = node.path

    @_guarded
    async def symlink(self, *args: Any) -> Any:
        """Refuse links: nothing points elsewhere, an image is registered under one path."""
        raise pyfuse3.FUSEError(errno.EPERM)

    link = symlink  # type: ignore[assignment]

    # Attributes.

    @_guarded
    async def getattr(self, inode: int, ctx: Any = None) -> Any:
        """Return the attributes of the sealed file with the size of the plain one."""
        node = self._nodes.get(inode)
        return self._attributes.entry(
            node, *await self._run(partial(self._attributes.status, node.path))
        )

    @_guarded
    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        """Change size, mode, owner or times; all but the size are the sealed file's own."""
        node = self._nodes.get(inode)
        self._refuse_read_only()
        if fields.update_size:
            if node.is_directory:
                raise pyfuse3.FUSEError(errno.EISDIR)
            handle = None if fh is None else self._handles.get(fh)
            if handle is not None:
                await self._served(handle.disk, handle.disk.resize(attr.st_size))
            else:
                try:
                    disk = await self._disks.acquire(node.key, node.path)
                except Exception as exc:
                    raise pyfuse3.FUSEError(self._code_of_open(exc, node.path)) from None
                try:
                    await self._served(disk, disk.resize(attr.st_size))
                finally:
                    self._disks.release(disk)
        await self._run(partial(attributes.change, node.path, attr, fields))
        return self._attributes.entry(
            node, *await self._run(partial(self._attributes.status, node.path))
        )

    @_guarded
    async def statfs(self, ctx: Any) -> Any:
        """Return the figures of the file system that holds the sealed files."""
        found = await self._run(partial(os.statvfs, self._source))
        answer = pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail",
        ):  # fmt: skip
            setattr(answer, name, getattr(found, name))
        answer.f_namemax = NAME_MAX - len(SUFFIX)
        return answer

    # Data, when the lane does not stand in front.

    @_guarded
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """Open an image, at the first open from its sealed file."""
        return await self._open(self._nodes.get(inode), flags)

    @_guarded
    async def read(self, fh: int, off: int, size: int) -> Any:
        """Return a range."""
        handle = self._handle(fh)
        return await self._served(handle.disk, handle.disk.read(off, size))

    @_guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Take a write; durable on return for a synchronous handle."""
        handle = self._handle(fh)
        if not handle.is_writable:
            raise pyfuse3.FUSEError(errno.EBADF)
        await self._served(
            handle.disk,
            self._disks.write(handle.disk, off, buf, durable=handle.is_synchronous),
        )
        return len(buf)

    @_guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make everything written durable."""
        disk = self._handle(fh).disk
        await self._served(disk, disk.flush())

    @_guarded
    async def flush(self, fh: int) -> None:
        """Report, at close(2), an image to which nothing can be written any more."""
        handle = self._handles.get(fh)
        if handle is not None and handle.disk.opened.poisoned:
            raise pyfuse3.FUSEError(errno.EIO)

    @_guarded
    async def release(self, fh: int) -> None:
        """End a handle."""
        handle = self._handles.remove(fh)
        if handle is not None:
            self._disks.release(handle.disk)

    # Shared by the handlers.

    async def _open(self, node: Node, flags: int) -> Any:
        if node.is_directory:
            raise pyfuse3.FUSEError(errno.EISDIR)
        is_writing = (flags & os.O_ACCMODE) != os.O_RDONLY or bool(flags & os.O_TRUNC)
        if is_writing:
            self._refuse_read_only()
        is_first = self._disks.find(node.key) is None
        try:
            status = await self._run(node.path.lstat)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        if (status.st_dev, status.st_ino) != node.key:
            # Another file stands there now, a backup put back: the kernel looks the name up
            # again and opens that one, not the unlinked one we may still have in use.
            raise pyfuse3.FUSEError(errno.ESTALE)
        try:
            disk = await self._disks.acquire(node.key, node.path)
        except Exception as exc:
            raise pyfuse3.FUSEError(self._code_of_open(exc, node.path)) from None
        try:
            if flags & os.O_TRUNC:
                await disk.resize(0)
            if is_first:
                # Recovery may have found another size than the superblock told.
                self.attributes_changed(node.inode)
        except BaseException:
            self._disks.release(disk)
            raise
        number = self._handles.add(disk, node.inode, flags)
        return pyfuse3.FileInfo(fh=number, direct_io=self._options.direct_io, keep_cache=False)

    def attributes_changed(self, inode: int) -> None:
        """Make the kernel ask for a file's attributes again; never blocks (no page is touched)."""
        with contextlib.suppress(OSError):  # the kernel has forgotten it already
            pyfuse3.invalidate_inode(inode, attr_only=True)

    def _code_of_open(self, exc: Exception, path: Path) -> int:
        """Return the errno of a failed open; logged with the image, whatever the error is about."""
        return self._failures.errno_of(exc, image=str(path), vm_id=self._opener.vm_id_of(path))

    async def _served(self, disk: Disk, operation: Awaitable[T]) -> T:
        """Await an operation on a disk; a failure is logged with its image and VM."""
        try:
            return await operation
        except Exception as exc:
            code = self._failures.errno_of(exc, image=str(disk.path), vm_id=disk.vm_id)
            raise pyfuse3.FUSEError(code) from None

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

    def _handle(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return handle

    def _new_path(self, parent_inode: int, name: bytes, suffix: str) -> Path:
        self._refuse_read_only()
        if len(name) + len(suffix) > NAME_MAX:
            raise pyfuse3.FUSEError(errno.ENAMETOOLONG)
        return self._nodes.get(parent_inode).path / (_decoded(name) + suffix)

    def _refuse_read_only(self) -> None:
        if self._options.read_only:
            raise ReadOnly(self._source, "is mounted read-only")

    async def _refuse_taken(self, directory: Path, name: str) -> None:
        try:
            path, _ = await self._run(partial(names.find, directory, name))
        except NotFound:
            return
        raise AlreadyExists(path, "exists")

    async def _close_idle(self, path: Path, status: os.stat_result) -> None:
        if not await self._disks.close_idle((status.st_dev, status.st_ino)):
            raise Busy(path, "is open; it is removed or replaced only when nobody uses it")


def _decoded(name: bytes) -> str:
    text = os.fsdecode(name)
    if text in ("", ".", "..") or "/" in text or "\0" in text:
        raise UsageError(text, "is not a file name")
    return text
