"""A mount from beginning to end: wires the rooms together, serves, ends cleanly.

`mount_directory` and `unmount` are what the command line calls. Knows the order of things: checks,
fork, hardening, keys, mount(2), pyfuse3, the event loop; and back: unmounted, images flushed and
closed, waiters told, gone.

Concurrency: `Session.run` owns the trio run. In its outer nursery live the collector of the worker
threads and the control socket, until the images are closed; in the inner one whatever serves the
kernel, until the file system is unmounted or a signal comes. Images are closed after the inner
nursery has ended, so nothing is acknowledged any more while they are.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyfuse3
import trio

from sealfs.control import ControlServer, Document, connection, receive, run_directory
from sealfs.errors import Busy, NotFound, SealfsError, StorageFailed, UsageError
from sealfs.image.cache import BlockCache
from sealfs.keys.hardening import harden
from sealfs.mount import daemon, kernel
from sealfs.mount.control import RunningMount, mount_of_device
from sealfs.mount.driver import Disks
from sealfs.mount.failures import Failures
from sealfs.mount.handles import Handles
from sealfs.mount.keyverbs import KeyVerbs
from sealfs.mount.lane import Lane
from sealfs.mount.namespace import Namespace
from sealfs.mount.options import MountOptions
from sealfs.mount.relay import Relay
from sealfs.mount.sweeper import Sweeper
from sealfs.mount.unshown import KINDS, unshown_files
from sealfs.mount.verbs import ImageVerbs
from sealfs.mount.workers import Workers

if TYPE_CHECKING:
    from sealfs.mount.opener import Keys, Opener

UNSHOWN_NAMED_MAX = 20  # files in the warning at mount
FAREWELL = 2.0  # seconds for waiters to read that the mount has ended
KEEPERS_WAIT = 1.0  # seconds until somebody else's copy of the mount may be why it goes on
EXIT_WAIT = 30.0  # seconds for the daemon's process to go after its images are closed

SWITCH_INTERVAL = 0.0005
"""Seconds until a thread that waits for the interpreter gets it. A worker needs it back after each
write to the disk; with Python's 5 ms the lane, when busy, holds a commit up: 1 MiB writes ran at
0.6 of the rate, random ones at 0.75 (2026-11, 2 cores; 0.2 ms and 1 ms made no difference)."""

log = logging.getLogger("sealfs.mount")


class Session:
    """One mount while it is served."""

    def __init__(
        self,
        source: Path,
        mountpoint: Path,
        *,
        options: MountOptions,
        opener: Opener,
        cache: BlockCache,
        device_fd: int,
        run_dir: Path,
    ) -> None:
        self._source = source
        self._mounted = kernel.mounted_at(str(mountpoint))
        self._mountpoint = mountpoint
        self._options = options
        self._device_fd = device_fd
        self._failures = Failures()
        self._handles = Handles()
        self._workers = Workers()
        self._cache = cache
        self._disks = Disks(
            opener=opener,
            workers=self._workers,
            cache=cache,
            failures=self._failures,
            commit_interval=options.commit_interval,
            idle_close=options.idle_close,
            lock_wait=options.lock_wait,
            note_each_flush=options.note_each_flush,
            bump_interval=options.bump_interval,
        )
        self._namespace = Namespace(
            source,
            options=options,
            opener=opener,
            disks=self._disks,
            handles=self._handles,
            failures=self._failures,
            device_fd=device_fd,
            on_init=self._on_init,
        )
        self._sweeper = Sweeper(self._disks, opener.keys, self._served)
        self._verbs = ImageVerbs(
            source,
            mountpoint,
            disks=self._disks,
            namespace=self._namespace,
            sweeper=self._sweeper,
        )
        self._key_verbs = KeyVerbs(source, opener=opener, disks=self._disks)
        there = kernel.mounted_at(str(mountpoint))
        self._id = f"{there.minor if there else 0}"
        self._control = ControlServer(
            run_dir / f"{self._id}.sock",
            {
                **self._verbs.table(),
                **self._key_verbs.table(),
                "status": self._status,
                "wait": self._wait,
            },
        )
        self._lane: Lane | None = None
        self._relay: Relay | None = None
        self._initialised = trio.Event()
        self._ended = trio.Event()
        self._failed: dict[str, str] = {}

    async def run(self, ready: Callable[[], None]) -> int:
        """Serve until unmounted or told to end; return the exit status."""
        bound = self._control.bind()  # its errors are the user's to see: not in a nursery
        async with trio.open_nursery() as outer:
            outer.start_soon(self._workers.collect)
            await outer.start(self._control.run, bound)
            try:
                async with trio.open_nursery() as serving:
                    await serving.start(self._disks.run)
                    serving.start_soon(self._sweeper.run)
                    await serving.start(self._end_on_signals, serving.cancel_scope)
                    serving.start_soon(self._announce, ready)
                    await self._serve(serving)
                    serving.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    self._failed = await self._disks.close_all()
                    self._ended.set()
                    with trio.move_on_after(FAREWELL):
                        await self._control.drained()
            outer.cancel_scope.cancel()
        return 1 if self._failed else 0

    def dispose(self) -> None:
        """End the worker threads and let go of the device."""
        self._workers.close()
        with contextlib.suppress(OSError):
            os.close(self._device_fd)

    async def _serve(self, serving: trio.Nursery) -> None:
        if not self._options.lane:
            os.set_blocking(self._device_fd, True)  # libfuse takes EAGAIN for a failure
            pyfuse3.init(self._namespace, f"/dev/fd/{os.dup(self._device_fd)}", set())
            try:
                await pyfuse3.main()
            finally:
                pyfuse3.close(unmount=False)
            return
        relay = self._relay = Relay(self._device_fd)
        self._lane = Lane(
            self._device_fd,
            relay=relay,
            handles=self._handles,
            disks=self._disks,
            failures=self._failures,
            spin_ns=self._options.spin_ns,
        )
        pyfuse3.init(self._namespace, f"/dev/fd/{relay.hand_over()}", set())
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(relay.run)
                nursery.start_soon(pyfuse3.main)
                await self._lane.run()
                nursery.cancel_scope.cancel()
        finally:
            relay.close()
            pyfuse3.close(unmount=False)

    def _on_init(self) -> None:
        self._initialised.set()

    async def _announce(self, ready: Callable[[], None]) -> None:
        await self._initialised.wait()
        if self._relay is not None:
            # Until the answer is there, the kernel would set the read-ahead back.
            await self._relay.initialised.wait()
        await self._workers.run(partial(kernel.raise_read_ahead, self._mountpoint))
        log.info('"%s" is served at "%s"', self._source, self._mountpoint)
        ready()
        if not self._options.read_only:
            from sealfs.mount.opener import sweep

            swept = await self._workers.run(partial(sweep, self._source))
            if swept:
                log.info("removed %d files that a crash left half-made", swept)
        unshown = await self._workers.run(partial(unshown_files, self._source, UNSHOWN_NAMED_MAX))
        for what, found in zip(KINDS, unshown, strict=True):
            if found:
                log.warning('%s, in "%s": %s', what, self._source, ", ".join(found))

    async def _end_on_signals(
        self,
        scope: trio.CancelScope,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            async for number in signals:
                log.info("ends on %s", signal.Signals(number).name)
                # Lazily: whoever still has files open gets errors from now on, no new ones come.
                await self._workers.run(self._unmount_everywhere)
                scope.cancel()
                return

    def _unmount_everywhere(self) -> None:
        places = kernel.places_of(self._mounted) if self._mounted is not None else []
        for place in places:
            with contextlib.suppress(SealfsError):
                kernel.unmount(Path(place), lazy=True)

    def is_mounted(self) -> bool:
        """Whether what is mounted at the mount point is this mount.

        After 'umount -l' another one may be there, while files of this one are open still.
        """
        there = kernel.mounted_at(str(self._mountpoint))
        return there is not None and there == self._mounted

    # Verbs of the control socket that concern the mount itself.

    async def _status(self, request: Document) -> Document:
        return {
            **await self._verbs.status(request),
            **self._key_verbs.status(),
            "mount": self._id,
            "pid": os.getpid(),
            "is_mounted": self.is_mounted(),
            "options": self._options.describe(),
            "dirty": self._cache.dirty_size,
            "clean": self._cache.clean_size,
            "cache_hits": self._cache.hits,
            "nodes": self._namespace.node_count,
            "requests": dict(self._lane.served) if self._lane is not None else {},
        }

    def _served(self) -> int:
        """How many requests the lane has answered."""
        return sum(self._lane.served.values()) if self._lane is not None else 0

    async def _wait(self, request: Document) -> Document:
        """Answer when the mount has ended and its images are closed."""
        await self._ended.wait()
        return {"failed": self._failed}


def mount_directory(
    source: Path,
    mountpoint: Path,
    *,
    options: MountOptions,
    keys: Callable[[], Keys],
    foreground: bool = False,
    log_file: Path | None = None,
    verbose: int = 0,
    run_dir: Path | None = None,
) -> int:
    """Serve `source` at `mountpoint`; return the exit status.

    In the foreground it returns when the mount has ended; otherwise when its names are served, by
    a daemon. `keys` is called in the process that serves, before it mounts.

    Raises:
        SealfsError: the mount did not come about, with the reason.
    """
    source, mountpoint = check_places(source, mountpoint)
    if log_file is not None:
        log_file = log_file.absolute()

    def serve(ready: Callable[[], None]) -> int:
        from sealfs.mount.opener import Opener

        where = run_dir or run_directory()
        daemon.set_up_log(
            foreground=foreground, file=log_file, fallback=where / "mount.log", verbose=verbose
        )
        harden()
        cache = BlockCache(clean_max=options.cache_size, dirty_max=options.dirty_size)
        opener = Opener(keys(), cache, read_only=options.read_only)
        return serve_mount(
            source,
            mountpoint,
            options=options,
            opener=opener,
            cache=cache,
            run_dir=run_dir or run_directory(),
            ready=ready,
        )

    if foreground:
        return serve(lambda: None)
    return daemon.detach(mountpoint, serve)


def serve_mount(
    source: Path,
    mountpoint: Path,
    *,
    options: MountOptions,
    opener: Opener,
    cache: BlockCache,
    run_dir: Path,
    ready: Callable[[], None],
) -> int:
    """Mount and serve in this process until the mount ends; return the exit status."""
    kernel.give_back_memory()
    # Held open, so that its file system is not unmounted from under us by mistake: new images
    # would then be made in the directory that was mounted over.
    source_fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        device_fd = kernel.mount(source, mountpoint, options)
        ours = kernel.mounted_at(str(mountpoint))
        try:
            session = Session(
                source,
                mountpoint,
                options=options,
                opener=opener,
                cache=cache,
                device_fd=device_fd,
                run_dir=run_dir,
            )
            try:
                sys.setswitchinterval(SWITCH_INTERVAL)
                status: int = trio.run(session.run, ready)
            finally:
                session.dispose()
        except BaseException:
            # Leave no dead mount point behind. After a normal end it is unmounted, and its place
            # and its number may be another's already.
            for place in kernel.places_of(ours) if ours is not None else ():
                with contextlib.suppress(SealfsError):
                    kernel.unmount(Path(place), lazy=True)
            raise
        return status
    finally:
        os.close(source_fd)


def check_places(source: Path, mountpoint: Path) -> tuple[Path, Path]:
    """Return both as canonical absolute paths.

    Raises:
        NotFound, UsageError, Busy: one is missing, no directory, in use, or within the other.
    """
    if not source.exists():
        raise NotFound(source, "no such directory")
    if not source.is_dir():
        raise UsageError(source, "is not a directory")
    kernel.check_mountpoint(mountpoint)
    source, mountpoint = source.resolve(), mountpoint.resolve()
    if source == mountpoint or source in mountpoint.parents or mountpoint in source.parents:
        raise UsageError(
            mountpoint,
            f'the mount point and the source directory "{source}" must not contain one another',
        )
    return source, mountpoint


def unmount(mountpoint: Path, *, run_dir: Path | None = None) -> None:
    """Unmount, and return when the daemon has closed its images and gone.

    Raises:
        Busy: files are open, or it is unmounted here and not everywhere; names the processes.
        NotFound: nothing is mounted there.
        StorageFailed: an image could not be closed cleanly; recovery at its next open decides.
    """
    with contextlib.suppress(OSError):
        mountpoint = mountpoint.resolve()
    there = kernel.mounted_at(str(mountpoint))
    found = None
    if there is not None and there.fstype == kernel.FSTYPE:
        found = mount_of_device(there.minor, run_dir)
    if there is None or found is None:
        # Nobody serves it: a dead mount, or none.
        kernel.unmount(mountpoint)
    else:
        _unmount_running(found, mountpoint, there)


def _unmount_running(found: RunningMount, mountpoint: Path, mounted: kernel.Mounted) -> None:
    pid = int(found.status["pid"])
    with connection(found.socket_path) as stream:
        stream.sendall(b'{"verb": "wait"}\n')
        watcher = _open_pidfd(pid)
        try:
            kernel.unmount(mountpoint)
            while not select.select([stream], [], [], KEEPERS_WAIT)[0]:
                _refuse_keepers(mountpoint, mounted)
            answer: dict[str, Any] = receive(stream, found.socket_path)
            if watcher is not None:
                select.select([watcher], [], [], EXIT_WAIT)
        finally:
            if watcher is not None:
                os.close(watcher)
    failed = answer["failed"]
    if failed:
        path, reason = next(iter(failed.items()))
        raise StorageFailed(path, f"was not closed cleanly: {reason}")


def _refuse_keepers(mountpoint: Path, mounted: kernel.Mounted) -> None:
    """Say who has the mount still, or it would be waited for without a word."""
    keepers = kernel.keepers(mounted)
    if keepers:
        raise Busy(
            mountpoint,
            f"is unmounted here, but {', '.join(keepers)} has it in a mount namespace of its own:"
            " its images are open until it is unmounted there too",
        )


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None  # gone already, or this command runs in the same process
