"""The files that the exerciser works on: one under a live mount, a plain one, and its faulty kin.

`Subject` is a plain file with everything the exerciser does to one, each as the system call that
it is. `MountedSubject` is a sealed image under a live mount, which can also be closed, killed and
verified off line. `Planted` is a plain file that misbehaves once: what must be noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.util
import mmap
import os
import platform
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mount_support import DEADLINE, Mounted, TinyKeys, mounted, open_offline, seal_new

BLOCK = 4096
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
_POPULATE_READ, _POPULATE_WRITE = 22, 23  # madvise, since Linux 5.14
REFCHECK = Path(__file__).resolve().parent.parent / "tools" / "refcheck.py"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.syscall.restype = ctypes.c_long


# Asynchronous I/O: several requests of one process under way at once, as a hypervisor has them.

_IOCB = struct.Struct("=QIIHhIQQqQII")  # struct iocb of <linux/aio_abi.h>
_EVENT = struct.Struct("=QQqq")
_CALLS = {"x86_64": (206, 208, 209), "aarch64": (0, 4, 2)}  # io_setup, io_getevents, io_submit
_OPCODES = {"read": 0, "write": 1, "fsync": 2, "fdatasync": 3}


@dataclass(frozen=True)
class Request:
    """One request of a batch; `view` is read into or written from, durably by RWF_DSYNC."""

    kind: str
    offset: int = 0
    view: memoryview | None = None
    is_synchronous: bool = False


class Queue:
    """An asynchronous I/O context; on a machine whose calls are unknown there is none."""

    DEPTH = 32

    def __init__(self) -> None:
        self._setup, self._getevents, self._submit = _CALLS[platform.machine()]
        self._context = ctypes.c_ulong(0)
        _checked(_libc.syscall(self._setup, self.DEPTH, ctypes.byref(self._context)))

    @staticmethod
    def is_known() -> bool:
        return platform.machine() in _CALLS

    def submit(self, fd: int, requests: Sequence[Request]) -> None:
        blocks, held = [], []
        for number, request in enumerate(requests):
            address = size = 0
            if request.view is not None:
                held.append((ctypes.c_char * len(request.view)).from_buffer(request.view))
                address, size = ctypes.addressof(held[-1]), len(request.view)
            flags = os.RWF_DSYNC if request.is_synchronous else 0
            packed = _IOCB.pack(
                number, 0, flags, _OPCODES[request.kind], 0, fd, address, size, request.offset,
                0, 0, 0,
            )  # fmt: skip
            blocks.append(ctypes.create_string_buffer(packed, _IOCB.size))
        pointers = (ctypes.c_void_p * len(blocks))(*map(ctypes.addressof, blocks))
        done = 0
        while done < len(blocks):
            rest = ctypes.byref(pointers, done * ctypes.sizeof(ctypes.c_void_p))
            done += _checked(
                _libc.syscall(self._submit, self._context, ctypes.c_long(len(blocks) - done), rest)
            )

    def wait(self, count: int) -> list[int]:
        """Return the results of `count` requests, in the order of their submission."""
        events = ctypes.create_string_buffer(_EVENT.size * count)
        results = [0] * count
        done = 0
        while done < count:
            got = _checked(
                _libc.syscall(
                    self._getevents, self._context, ctypes.c_long(1),
                    ctypes.c_long(count - done), events, None,
                )
            )  # fmt: skip
            for at in range(got):
                number, _, result, _ = _EVENT.unpack_from(events, at * _EVENT.size)
                results[number] = result
            done += got
        return results


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    _checked(_libc.fallocate(fd, mode, offset, size))


def populate(area: mmap.mmap, at: int, size: int, *, writing: bool) -> None:
    """Have the pages of a range: what would be a SIGBUS on touching them is an error here."""
    start = at // BLOCK * BLOCK
    try:
        area.madvise(_POPULATE_WRITE if writing else _POPULATE_READ, start, at + size - start)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise


# The file, and what is done to it.


class Subject:
    """A plain file; `path` is its present name."""

    any_alignment = False
    """Whether O_DIRECT takes every offset, size and buffer."""
    has_space = True
    """Whether fallocate works."""
    has_maps = True
    """Whether shared mappings work."""
    has_sync_flag = True
    """Whether RWF_DSYNC makes a write durable."""
    has_asynchronous_sync_flag = False
    """Whether it does so in a batch."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.touch()
        os.truncate(path, size)

    def open(self, flags: int) -> int:
        if not self.any_alignment:
            flags &= ~os.O_DIRECT
        return os.open(self.path, flags | os.O_CLOEXEC)

    def read(self, fd: int, views: list[memoryview], offset: int) -> int:
        return os.preadv(fd, views, offset)

    def write(self, fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        return os.pwritev(fd, views, offset, flags)

    def append(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def truncate(self, fd: int | None, size: int) -> None:
        os.truncate(self.path if fd is None else fd, size)

    def allocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        fallocate(fd, mode, offset, size)

    def seek(self, fd: int, offset: int, whence: int) -> int | None:
        """Return where data or a hole begins; None for ENXIO."""
        try:
            return os.lseek(fd, offset, whence)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return None
            raise

    def copy(self, source: int, target: int, size: int, offset: int, to: int) -> int:
        return os.copy_file_range(source, target, size, offset, to)

    def send(self, target: int, source: int, offset: int, size: int) -> int:
        return os.sendfile(target, source, offset, size)

    def sync(self, fd: int, *, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(fd)

    def map(self, fd: int, offset: int, size: int, *, shared: bool) -> mmap.mmap:
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        return mmap.mmap(fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def batch(self, fd: int, requests: Sequence[Request], meanwhile: Any) -> list[int]:
        """Do requests in any order; `meanwhile` is called while they are under way."""
        results = []
        for request in requests:
            if request.kind == "read":
                assert request.view is not None
                results.append(self.read(fd, [request.view], request.offset))
            elif request.kind == "write":
                assert request.view is not None
                results.append(self.write(fd, [request.view], request.offset))
            else:
                self.sync(fd, data_only=request.kind == "fdatasync")
                results.append(0)
        meanwhile()
        return results

    def drop_pages(self, fd: int) -> None:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def rename(self) -> None:
        name = self.path.name
        other = name.removesuffix(".moved") if name.endswith(".moved") else f"{name}.moved"
        os.rename(self.path, self.path.with_name(other))
        self.path = self.path.with_name(other)

    def beat(self) -> None:
        """Note that an operation begins."""

    def chill(self) -> None:
        """Have the storage's content in no memory, so that reading it takes a while."""

    def flush_image(self) -> None:
        """Bring everything to the storage and empty the journal."""

    def close_image(self) -> None:
        """Let go of everything in memory; nobody has the file open."""

    def kill(self) -> None:
        """Lose what is not durable; every open descriptor is dead afterwards."""

    def revive(self) -> None:
        """Serve the file again."""

    def verify(self, expected: Any) -> None:
        """Look at the storage; `expected` is the twin."""


# A process, since what hangs may hang with the interpreter's lock. Forced, an unmount ends the
# connection: whoever waits gets an error. It also cleans up after an exerciser that was killed.
_WATCH = """
trap '' TERM INT
while read -r -t "$2" line; do [ "$line" != end ] || exit 0; done
umount -f "$1"
"""
HANG_AFTER = 60  # seconds for one operation


class Watch:
    """Ends a mount under which nothing moves any more."""

    def __init__(self, mountpoint: Path) -> None:
        self._process = subprocess.Popen(
            ["bash", "-c", _WATCH, "watch", str(mountpoint), str(HANG_AFTER)],
            stdin=subprocess.PIPE,
        )
        self._beat_at = time.monotonic()

    def beat(self) -> None:
        """Tell that nothing hangs."""
        if time.monotonic() - self._beat_at > 1:
            self._beat_at = time.monotonic()
            self._tell(b"\n")

    def end(self) -> None:
        self._tell(b"end\n")
        self._process.communicate()

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()


class LiveMount:
    """A mount of its own below an empty directory."""

    def __init__(self, base: Path, *, lane: bool, options: str) -> None:
        self.base = base
        self.source = base / "source"
        self.state = base / "state"
        self.mountpoint = base / "mnt"
        self.lane = lane
        self.options = options
        self.source.mkdir()
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        from sealfs.mount.control import find_mount

        options = ",".join(filter(None, (f"lane={'on' if self.lane else 'off'}", self.options)))
        self._running: Mounted = self._stack.enter_context(
            mounted(self.source, self.mountpoint, options=options)
        )
        found = find_mount(self._running.mountpoint, self._running.run_dir)
        assert found is not None
        self.call = found.call
        self._watch = Watch(self._running.mountpoint)
        self._stack.callback(self._watch.end)

    def beat(self) -> None:
        """Tell that nothing hangs."""
        self._watch.beat()

    def kill(self) -> None:
        self._running.kill()
        self._stack.close()

    def log_text(self) -> str:
        """Return what this daemon has logged."""
        return self._running.log_text()

    def finish(self) -> None:
        """Unmount as the command does, which tells whether the images were closed cleanly."""
        self._running.unmount()
        self._stack.close()

    def abandon(self) -> None:
        """Unmount whatever the state."""
        self._stack.close()


class MountedSubject(Subject):
    """A sealed image under a live mount."""

    any_alignment = True

    def __init__(self, mount: LiveMount, name: str, size: int) -> None:
        self.has_space = mount.lane
        self.has_maps = "direct_io" not in mount.options
        # The flag is in the request, which pyfuse3 does not show. Of a synchronous write the
        # kernel makes an FSYNC as well, but for direct_io.
        self.has_sync_flag = mount.lane or "direct_io" not in mount.options
        self.has_asynchronous_sync_flag = mount.lane and Queue.is_known()
        self.path = mount.base / "mnt" / name
        self._mount = mount
        self._queue = Queue() if Queue.is_known() else None
        seal_new(mount.state, mount.source / f"{name}.sealed", vm_id=name, size=size)

    def batch(self, fd: int, requests: Sequence[Request], meanwhile: Any) -> list[int]:
        if self._queue is None:
            return super().batch(fd, requests, meanwhile)
        self._queue.submit(fd, requests)
        try:
            meanwhile()
        finally:
            results = self._queue.wait(len(requests))
        return results

    def beat(self) -> None:
        self._mount.beat()

    @property
    def sealed(self) -> Path:
        return self._mount.source / f"{self.path.name}.sealed"

    def chill(self) -> None:
        fd = os.open(self.sealed, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fdatasync(fd)  # dirty pages would stay
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def flush_image(self) -> None:
        self._mount.call("flush", path=str(self.path))

    def close_image(self) -> None:
        end = time.monotonic() + DEADLINE
        # The kernel's RELEASE comes a little later than the last close.
        while self._mount.call("close", path=str(self.path))["in_use"]:
            assert time.monotonic() < end, "the image stays in use"
            time.sleep(0.002)

    def kill(self) -> None:
        self._mount.kill()

    def revive(self) -> None:
        self._mount.start()

    def verify(self, expected: Any) -> None:
        """Read the storage by sealfs, and by the reader that knows the format's text alone."""
        state, sealed = self._mount.state, self.sealed
        image = open_offline(state, sealed)
        try:
            findings = image.check(data=True)
            assert not findings, findings
            assert image.size == expected.size, (image.size, expected.size)
            for offset, size in expected.pieces():
                expected.check(offset, image.read(offset, size), "off line")
        finally:
            image.close()
        with _reference(state, sealed) as report:
            assert not report.errors, report.errors
            assert report.size == expected.size, (report.size, expected.size)
            blocks = dict(report.blocks)
            for offset, size in expected.pieces():
                content = b"".join(
                    bytes(blocks.pop(block, bytes(BLOCK)))
                    for block in range(offset // BLOCK, -(-(offset + size) // BLOCK))
                )
                expected.check(offset, content[:size], "by the reference reader")
            assert not any(map(any, blocks.values())), f"data in blocks {sorted(blocks)}"


@contextlib.contextmanager
def _reference(state: Path, sealed: Path) -> Iterator[Any]:
    """Yield the report of the reference reader on a sealed file."""
    from sealfs.image.recovery import read_identity
    from sealfs.image.storage import FileStorage

    spec = importlib.util.spec_from_file_location("refcheck", REFCHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("refcheck", module)
    spec.loader.exec_module(module)
    with contextlib.closing(FileStorage.open(sealed, read_only=True)) as storage:
        identity = read_identity(storage)
        with TinyKeys(state).unseal(identity.kmi, identity.vm_id) as vm_key:
            keys = {
                generation: bytes(vm_key.unwrap_image_key(identity.uuid, wrapped))
                for generation, wrapped in identity.wrapped_keys
            }
        yield module.check(storage.fileno(), keys, data=True, keep=True)


# Faults that must be found.


class Planted(Subject):
    """A plain file that does wrong what `fault` names, at the `at`-th chance."""

    any_alignment = False

    def __init__(self, path: Path, size: int, *, fault: str, at: int) -> None:
        super().__init__(path, size)
        self._fault = fault
        self._chances = at
        self.struck = False
        self._durable = b""

    def _strikes(self, *faults: str) -> bool:
        if self._fault not in faults or self.struck:
            return False
        self._chances -= 1
        self.struck = self._chances <= 0
        return self.struck

    def write(self, fd: int, views: list[memoryview], offset: int, flags: int = 0) -> int:
        size = sum(map(len, views))
        is_large = size >= 64  # a single byte may be the same by accident
        if is_large and self._strikes("write dropped"):
            return size
        if is_large and self._strikes("write shifted by a byte"):
            offset += 1
        if is_large and self._strikes("write shifted by a block"):
            offset += BLOCK
        if is_large and self._strikes("write cut short"):
            super().write(fd, [memoryview(b"".join(views))[:-8]], offset, flags)
            return size
        return super().write(fd, views, offset, flags)

    def truncate(self, fd: int | None, size: int) -> None:
        before = self.path.stat().st_size
        super().truncate(fd, size)
        if size > before + 64 and self._strikes("growth is not zero"):
            self._put(before, b"old content")

    def allocate(self, fd: int, mode: int, offset: int, size: int) -> None:
        is_punch = mode & PUNCH_HOLE and any(os.pread(fd, min(size, BLOCK), offset))
        if is_punch and self._strikes("punch forgotten"):
            return
        super().allocate(fd, mode, offset, size)

    def seek(self, fd: int, offset: int, whence: int) -> int | None:
        found = super().seek(fd, offset, whence)
        if whence == os.SEEK_DATA and found is not None and self._strikes("data called a hole"):
            return min(found + BLOCK, self.path.stat().st_size - 1)
        return found

    def sync(self, fd: int, *, data_only: bool) -> None:
        super().sync(fd, data_only=data_only)
        if self._fault == "old block after a close":
            self._durable = self.path.read_bytes()

    def close_image(self) -> None:
        if self._fault != "old block after a close":
            return
        content, old = self.path.read_bytes(), self._durable
        for at in range(0, min(len(content), len(old)), BLOCK):
            if content[at : at + BLOCK] != old[at : at + BLOCK] and self._strikes(self._fault):
                self._put(at, old[at : at + min(BLOCK, len(content) - at)])
                return

    def kill(self) -> None:
        content = self.path.read_bytes()
        used = [at for at in range(0, len(content), BLOCK) if any(content[at : at + 64])]
        if used and self._strikes("durable write lost in a crash"):
            self._put(used[0], bytes(min(BLOCK, len(content) - used[0])))
        elif used and self._strikes("block torn in a crash"):
            self._put(used[-1], bytes(32))

    def _put(self, offset: int, content: bytes) -> None:
        with open(self.path, "rb+") as file:
            file.seek(offset)
            file.write(content)


PLANTS = (
    "write dropped",
    "write shifted by a byte",
    "write shifted by a block",
    "write cut short",
    "growth is not zero",
    "punch forgotten",
    "data called a hole",
    "old block after a close",
    "durable write lost in a crash",
    "block torn in a crash",
)
