"""Plain disks that are sealed or unsealed: files, block devices, and QEMU's formats.

A source tells where it holds data, so that holes stay holes; a target takes data only. Knows
nothing of sealed images.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from sealfs.cli import nbd
from sealfs.errors import FormatError, NotFound, StorageFailed, UsageError

CHUNK_SIZE = 1 << 20
"""Bytes copied at once: one request of qemu-nbd, and well below the dirty cache."""
ZERO_UNIT = 4096
"""Zeros are looked for in units of one block of a sealed image."""
_ZEROS = bytes(CHUNK_SIZE)
_SEALED_MAGIC_SIZE = 8

Extent = tuple[int, int]
"""(offset, size) of what may hold something else than zeros."""


class Source(Protocol):
    """A plain disk to read."""

    size: int
    backing: str | None
    """The file that the disk is an overlay of."""

    def extents(self) -> list[Extent]:
        """Return where data is, ascending."""

    def read(self, offset: int, size: int) -> memoryview:
        """Return exactly `size` bytes."""


class Target(Protocol):
    """A plain disk to write, all zeros at first."""

    def write(self, offset: int, content: memoryview) -> None:
        """Write all of `content`."""


class RawSource:
    """A file or a block device, byte by byte as it is."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.size = os.lseek(fd, 0, os.SEEK_END)
        self.backing: str | None = None

    def extents(self) -> list[Extent]:
        found: list[Extent] = []
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self._fd, at, os.SEEK_DATA)
                at = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as exc:
                if exc.errno == errno.ENXIO:  # nothing but a hole from here on
                    break
                # A device, or a file system that does not tell: all may be data.
                return [(0, self.size)]
            found.append((start, min(at, self.size) - start))
        return found

    def read(self, offset: int, size: int) -> memoryview:
        view = memoryview(bytearray(size))
        done = 0
        while done < size:
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if not count:
                raise StorageFailed(self._path, f"ends at byte {offset + done}, it became shorter")
            done += count
        return view


class QemuSource:
    """A disk of one of QEMU's formats, read through qemu-nbd."""

    def __init__(self, disk: nbd.NbdDisk, extents: list[Extent], facts: dict[str, Any]) -> None:
        self._extents = extents
        self.size = int(facts["virtual-size"])
        self.backing: str | None = facts.get("full-backing-filename")
        self.read = disk.read

    def extents(self) -> list[Extent]:
        return self._extents


class RawTarget:
    """A new file, sparse where nothing is written."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def write(self, offset: int, content: memoryview) -> None:
        while content:
            try:
                count = os.pwrite(self._fd, content, offset)
            except OSError as exc:
                raise OSError(exc.errno, exc.strerror, str(self._path)) from None
            content, offset = content[count:], offset + count


@contextlib.contextmanager
def open_source(path: Path, disk_format: str | None, sealed_magic: bytes) -> Iterator[Source]:
    """Open a plain disk for reading.

    Args:
        path: a file or a block device.
        disk_format: as QEMU names it; None has it found out.
        sealed_magic: what a sealed image begins with; sealing one again is a mistake.

    Raises:
        NotFound, UsageError, FormatError, Busy, StorageFailed: it cannot be read as a disk.
    """
    with contextlib.ExitStack() as stack:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UsageError(path, "is neither a file nor a block device")
        if os.pread(fd, _SEALED_MAGIC_SIZE, 0) == sealed_magic:
            raise UsageError(path, "is a sealed image already")
        facts: dict[str, Any] = {"format": disk_format}
        if disk_format != "raw":
            facts = _facts(path, disk_format)
        if facts["format"] == "raw":
            yield RawSource(fd, path)
            return
        found = str(facts["format"])
        extents = _extents(path, found)
        disk = stack.enter_context(nbd.served(path, found, read_only=True))
        source = QemuSource(disk, extents, facts)
        if disk.size < source.size:
            raise StorageFailed(path, f"qemu-nbd shows {disk.size} of {source.size} bytes")
        yield source


@contextlib.contextmanager
def open_target(path: Path, disk_format: str, size: int, *, shown_as: Path) -> Iterator[Target]:
    """Make an existing empty file a plain disk of `size` bytes; durable after the block.

    `shown_as` is how messages name it.

    Raises:
        NotFound, StorageFailed: a tool is missing or failed.
    """
    if disk_format == "raw":
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            yield RawTarget(fd, shown_as)
            os.fsync(fd)
        finally:
            os.close(fd)
        return
    _qemu_img(shown_as, "create", "-q", "-f", disk_format, str(path.absolute()), str(size))
    with nbd.served(path, disk_format, read_only=False, shown_as=shown_as) as disk:
        yield disk
        disk.flush()
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def data_runs(chunk: memoryview) -> Iterator[Extent]:
    """Yield (start, size) of what is not zeros, in units of one block."""
    if chunk == _ZEROS[: len(chunk)]:
        return
    start = -1
    for at in range(0, len(chunk), ZERO_UNIT):
        unit = chunk[at : at + ZERO_UNIT]
        if unit == _ZEROS[: len(unit)]:
            if start >= 0:
                yield start, at - start
            start = -1
        elif start < 0:
            start = at
    if start >= 0:
        yield start, len(chunk) - start


def _facts(path: Path, disk_format: str | None) -> dict[str, Any]:
    wanted = ["-f", disk_format] if disk_format else []
    found = json.loads(
        _qemu_img(path, "info", "--output=json", *wanted, "--", str(path.absolute()))
    )
    assert isinstance(found, dict)
    return found


def _extents(path: Path, disk_format: str) -> list[Extent]:
    output = _qemu_img(path, "map", "--output=json", "-f", disk_format, str(path.absolute()))
    return [
        (int(part["start"]), int(part["length"]))
        for part in json.loads(output)
        if part["data"] and not part["zero"]
    ]


def _qemu_img(path: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["qemu-img", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError:
        raise NotFound("qemu-img", "is not installed (package qemu-utils)") from None
    if done.returncode == 0:
        return done.stdout
    if arguments[0] == "create":
        raise StorageFailed(path, f"qemu-img create failed: {done.stderr.strip()}")
    error = nbd.refusal(path, done.stderr, "qemu-img")
    assert isinstance(error, Exception)
    if isinstance(error, FormatError) and "Unknown driver" in done.stderr:
        raise UsageError(arguments[3], "is not a disk format that qemu-img knows")
    raise error
