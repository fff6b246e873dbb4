"""Load on one file: how fast it is written and read, by fio where there is one, else by a loop.

Direct I/O where the file takes it, as a VM with `cache=none` does; the fsync at the end of a write
is counted in its time. Knows nothing of sealed images.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from sealfs.errors import StorageFailed

BLOCK = 4 << 10
CHUNK = 1 << 20
DEPTH = 16
"""Requests at once that fio keeps open in a random workload; a VM's disk has some, too."""
FIO_SLACK = 120.0  # seconds for the fsync at the end, on slow storage
_MARK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of load.

    Attributes:
        flushes_each: a flush after each write, by fdatasync: what QEMU does for a guest's.
        fills: goes through the file once, however much time is left.
    """

    title: str
    is_write: bool
    is_random: bool
    size: int
    flushes_each: bool = False
    fills: bool = False

    @property
    def counts_bytes(self) -> bool:
        """Whether bytes a second are what says most, else operations."""
        return not self.is_random

    @property
    def mode(self) -> str:
        """Fio's word for it."""
        return ("rand" if self.is_random else "") + ("write" if self.is_write else "read")


WORKLOADS = (
    Workload("sequential write, 1 MiB", True, False, CHUNK, fills=True),
    Workload("sequential read, 1 MiB", False, False, CHUNK),
    Workload("random read, 4 KiB", False, True, BLOCK),
    Workload("random write, 4 KiB", True, True, BLOCK),
    Workload("random write, 4 KiB, flushed each", True, True, BLOCK, flushes_each=True),
)


@dataclass(frozen=True, slots=True)
class Rate:
    """What was reached: bytes in a time, in operations of one size."""

    size: int
    seconds: float
    operation_size: int

    @property
    def bytes(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds

    @property
    def operations(self) -> float:
        """Operations a second."""
        return self.bytes / self.operation_size


def fio_program() -> str | None:
    """Return where fio is, if it is there."""
    return shutil.which("fio")


def takes_direct(path: Path) -> bool:
    """Whether a file takes direct I/O: some file systems refuse it."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def forget_pages(path: Path) -> None:
    """Have the kernel drop what it keeps of a file, so that the storage is read."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # only what is clean can be dropped
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def measure(path: Path, workload: Workload, *, size: int, seconds: float, direct: bool) -> Rate:
    """Put one workload on the first `size` bytes of a file.

    Raises:
        StorageFailed: fio failed.
        OSError: the file did, to the loop.
    """
    program = fio_program()
    if program is None:
        return _loop(path, workload, size=size, seconds=seconds, direct=direct)
    return _fio(program, path, workload, size=size, seconds=seconds, direct=direct)


def _fio(
    program: str, path: Path, workload: Workload, *, size: int, seconds: float, direct: bool
) -> Rate:
    is_deep = direct and workload.is_random and not workload.flushes_each
    options = {
        "name": "bench",
        "filename": path.name,  # fio splits paths at colons; ours has none
        "size": size,
        "rw": workload.mode,
        "bs": workload.size,
        "ioengine": "libaio" if direct and not workload.flushes_each else "psync",
        "iodepth": DEPTH if is_deep else 4 if direct and not workload.flushes_each else 1,
        "direct": int(direct),
        "end_fsync": int(workload.is_write),
        "fdatasync": int(workload.flushes_each),
        "time_based": int(not workload.fills),
        "runtime": f"{max(1, int(seconds * 1000))}ms",
        "thread": 1,
        "norandommap": 1,
        "refill_buffers": 1,
        "allow_file_create": 0,
        "output-format": "json",
    }
    command = [program, *(f"--{name}={value}" for name, value in options.items())]
    try:
        done = subprocess.run(
            command,
            cwd=path.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=seconds + FIO_SLACK,
            start_new_session=True,  # Ctrl-C ends us, and we end it
        )
        (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        side = job["write" if workload.is_write else "read"]
        # fio's own rate stops its clock before the final fsync; the job's run time does not.
        elapsed = max(side["runtime"], job["job_runtime"], 1) / 1000
        return Rate(side["io_bytes"], elapsed, workload.size)
    except subprocess.CalledProcessError as exc:
        said = (exc.stderr or exc.stdout).strip().splitlines() or ["no message"]
        raise StorageFailed("fio", f"exit status {exc.returncode}: {said[-1]}") from exc
    except subprocess.TimeoutExpired as exc:
        raise StorageFailed("fio", f"no end {FIO_SLACK:g} s after its time") from exc
    except (ValueError, KeyError) as exc:
        raise StorageFailed("fio", f"its answer cannot be read: {exc}") from exc


def _loop(path: Path, workload: Workload, *, size: int, seconds: float, direct: bool) -> Rate:
    flags = (os.O_RDWR if workload.is_write else os.O_RDONLY) | os.O_CLOEXEC
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
    # Direct I/O wants memory on a page boundary, which a mapping is.
    buffer = mmap.mmap(-1, workload.size)
    try:
        buffer[:] = os.urandom(workload.size)
        places = size // workload.size
        started = time.perf_counter()
        end, done = started + seconds, 0
        while time.perf_counter() < end and not (workload.fills and done >= places):
            place = random.randrange(places) if workload.is_random else done % places
            if workload.is_write:
                buffer[:_MARK_SIZE] = done.to_bytes(_MARK_SIZE, "big")  # no two blocks alike
                os.pwrite(fd, buffer, place * workload.size)
                if workload.flushes_each:
                    os.fdatasync(fd)
            else:
                os.preadv(fd, [buffer], place * workload.size)
            done += 1
        if workload.is_write:
            os.fsync(fd)
        return Rate(done * workload.size, time.perf_counter() - started, workload.size)
    finally:
        with contextlib.suppress(BufferError):
            buffer.close()
        os.close(fd)
