"""pyfuse3 handlers of open files: open and release, and the data too when the lane is off.

Whatever a handler raises becomes an errno (failures.py): one failing request never ends the mount.
Without the lane a write's own flags are not visible (pyfuse3 drops them): O_DSYNC of the handle is
honoured, RWF_DSYNC of an asynchronous direct write is not (with `direct_io` each write is durable);
who reads beside an asynchronous direct writer may see the old content for a moment; fallocate and
lseek do not exist.

Concurrency: each request is a task of the trio thread; whatever asks the file system or the key
service runs in a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import pyfuse3

from sealfs.errors import ReadOnly, SealfsError
from sealfs.mount import protocol
from sealfs.mount.disk import Disk
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.handles import Handle, Handles
from sealfs.mount.lane import drop_pages
from sealfs.mount.names import Node, Nodes
from sealfs.mount.options import MountOptions

if TYPE_CHECKING:
    from sealfs.mount.opener import Opener

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound="Files")


def guarded(
    handler: Callable[Concatenate[F, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[F, P], Coroutine[Any, Any, T]]:
    """Turn whatever a handler raises into the one exception that pyfuse3 survives."""

    @functools.wraps(handler)
    async def wrapper(self: F, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except Exception as exc:
            raise pyfuse3.FUSEError(self.code_of(exc)) from None

    return wrapper


class Files(pyfuse3.Operations):
    """Open files of a mount."""

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
    ) -> None:
        super().__init__()
        self._source = source
        self._options = options
        self._opener = opener
        self._disks = disks
        self._handles = handles
        self._failures = failures
        self._device_fd = device_fd
        self._run = disks.workers.run
        self._nodes = Nodes(source)

    def code_of(self, exc: Exception) -> int:
        """Return the errno for an exception, logging what must be logged."""
        return self._code_of_open(exc, Path(exc.subject if isinstance(exc, SealfsError) else ""))

    @guarded
    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        """Open an image, at the first open from its sealed file."""
        return await self._open(self._nodes.get(inode), flags)

    @guarded
    async def read(self, fh: int, off: int, size: int) -> Any:
        """Return a range."""
        handle = self._handle(fh)
        return await self._served(handle.disk, handle.disk.read(off, size))

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Take a write; durable on return for a synchronous handle."""
        handle = self._handle(fh)
        if not handle.is_writable:
            raise pyfuse3.FUSEError(errno.EBADF)
        # Of a write past the page cache the kernel asks no fsync for RWF_DSYNC, and its flags are
        # not to be seen here.
        durable = handle.is_synchronous or self._options.direct_io
        await self._served(handle.disk, self._disks.write(handle.disk, off, buf, durable=durable))
        if handle.is_direct and handle.disk.buffered_handles:
            # Not before the answer: this may be the page cache's own write, with pages locked.
            self._disks.start(drop_pages, self._device_fd, handle.inode, off, len(buf))
        return len(buf)

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        """Make everything written durable."""
        disk = self._handle(fh).disk
        await self._served(disk, disk.flush())

    @guarded
    async def flush(self, fh: int) -> None:
        """Report, at close(2), an image to which nothing can be written any more."""
        handle = self._handles.get(fh)
        if handle is not None and handle.disk.opened.poisoned:
            raise pyfuse3.FUSEError(errno.EIO)

    @guarded
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
        in_use = self._disks.find(node.key)
        if in_use is None or not in_use.is_unlinked:
            await self._check_in_place(node)
        disk = await self._acquire(node)
        try:
            if flags & os.O_TRUNC:
                await disk.resize(0)
            if in_use is None:
                # Recovery may have found another size than the superblock told.
                self.attributes_changed(node.inode)
        except BaseException:
            self._disks.release(disk)
            raise
        number = self._handles.add(disk, node.inode, flags)
        return pyfuse3.FileInfo(fh=number, direct_io=self._options.direct_io, keep_cache=False)

    async def _check_in_place(self, node: Node) -> None:
        """Refuse to open a file that is not under its name any more."""
        try:
            status = await self._run(node.path.lstat)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        if (status.st_dev, status.st_ino) != node.key:
            # Another file stands there now, a backup put back: the kernel looks the name up
            # again and opens that one, not the unlinked one we may still have in use.
            raise pyfuse3.FUSEError(errno.ESTALE)

    async def _acquire(self, node: Node) -> Disk:
        """Return the open disk of a node with a handle more, which the caller releases."""
        try:
            return await self._disks.acquire(node.key, node.path)
        except Exception as exc:
            raise pyfuse3.FUSEError(self._code_of_open(exc, node.path)) from None

    def attributes_changed(self, inode: int) -> None:
        """Make the kernel ask for a file's attributes again; never blocks (no page is touched)."""
        # Written to the device itself: through pyfuse3 it would go by way of the relay, and the
        # answer to whoever changed something could come before it.
        with contextlib.suppress(OSError):  # the kernel has forgotten it already
            os.write(self._device_fd, protocol.attributes_changed(inode))

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

    def _handle(self, fh: int) -> Handle:
        handle = self._handles.get(fh)
        if handle is None:
            raise pyfuse3.FUSEError(errno.EBADF)
        return handle

    def _refuse_read_only(self) -> None:
        if self._options.read_only:
            raise ReadOnly(self._source, "is mounted read-only")
