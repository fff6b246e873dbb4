"""Random operations on a file under a mount and on a plain twin; whatever differs is a bug.

Every operation is drawn from the seed and its own number, is done to both files, and its results
are compared; whole contents from time to time. What is written carries the number of the operation
and its offset, so that a stale, moved or foreign block says where it comes from. After a kill the
file must be what was durable, and each block that was not either old or new as a whole.

Run as a program (`tools/torture exerciser`), it makes mounts of its own and runs for long.

Not tried, because Linux promises nothing: a buffered read while a direct write of the same pages
is under way; bytes beyond the end in a mapping's last page; SEEK_DATA and SEEK_HOLE over pages
written through a mapping and not yet written back (FUSE asks the daemon, which has not seen them:
they are synced first).
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import itertools
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

from exerciser_files import (
    BLOCK,
    KEEP_SIZE,
    PUNCH_HOLE,
    ZERO_RANGE,
    LiveMount,
    MountedSubject,
    Request,
    Subject,
    fallocate,
    populate,
)

T = TypeVar("T")

MIB = 1 << 20
GROUP = 128 * BLOCK
"""What a slot of the sealed file holds: its borders are where mistakes would be."""
REQUEST_MAX = 1 << 20
HISTORY = 20
HANDLES = 4
MAPS = 3
PIECE = 1 << 20
FILE_SEEDS = 1_000_000
"""Between the seeds of files that are exercised at once."""

Windows = tuple[tuple[int, int], ...]

LAYOUTS: dict[str, Windows] = {
    "near": ((0, 8 * MIB),),
    "small": ((0, 2 * MIB),),
    # Where a node page of the sealed file ends (64 MiB), and one of the level above (8 GiB).
    "far": (
        (0, 2 * MIB),
        (64 * MIB - 1 * MIB, 64 * MIB + 1 * MIB),
        (8192 * MIB - 1 * MIB, 8192 * MIB + 1 * MIB),
    ),
}
"""Where bytes other than zero may be."""

KINDS = {
    "buffered": os.O_RDWR,
    "direct": os.O_RDWR | os.O_DIRECT,
    "dsync": os.O_RDWR | os.O_DSYNC,
    "direct dsync": os.O_RDWR | os.O_DIRECT | os.O_DSYNC,
    "append": os.O_RDWR | os.O_APPEND,
    "direct append": os.O_RDWR | os.O_APPEND | os.O_DIRECT,
    "reader": os.O_RDONLY,
    "direct reader": os.O_RDONLY | os.O_DIRECT,
}
EMPHASES: dict[str, tuple[int, ...]] = {
    "mixed": (6, 6, 1, 1, 2, 1, 1, 1),
    "buffered": (12, 1, 1, 0, 2, 0, 1, 0),
    "direct": (1, 12, 0, 1, 0, 1, 0, 1),
}
"""How often each kind of handle is opened."""


class Mismatch(Exception):
    """What differs, without the circumstances."""


class Difference(Exception):
    """The report of a failure: seed, operation, what came before, what differs."""


# Content that tells where it comes from.


class Stamps:
    """Cells of 8 bytes: the number of the operation and the offset, both scrambled.

    Scrambled, so that the bytes of a cell are unlike those of another and hardly ever zero.
    """

    _MASK = 0xFFFFFFFF
    _NUMBER, _CELL = 2654435761, 2246822519

    def __init__(self, windows: Windows) -> None:
        self._cells = [
            (
                start // 8,
                array(
                    "I",
                    [cell * self._CELL & self._MASK for cell in range(start // 8, end // 8 + 1)],
                ),
            )
            for start, end in windows
        ]
        self._unnumber = pow(self._NUMBER, -1, 1 << 32)
        self._uncell = pow(self._CELL, -1, 1 << 32)

    def make(self, number: int, offset: int, size: int) -> bytes:
        """Return what operation `number` writes to a range of one window."""
        first, end = offset // 8, -(-(offset + size) // 8)
        base, cells = next(part for part in reversed(self._cells) if first >= part[0])
        words = array("I", bytes(8 * (end - first)))
        words[0::2] = array("I", [number * self._NUMBER & self._MASK]) * (end - first)
        words[1::2] = cells[first - base : end - base]
        content = words.tobytes()
        return content[offset - 8 * first :][:size]

    def describe(self, content: bytes, offset: int, at: int) -> str:
        """Say what stands at `at` in `content`, which was read from `offset`."""
        if at >= len(content):
            return "nothing"
        cell = at - (offset + at) % 8
        raw = content[max(cell, 0) : cell + 8]
        if not any(raw):
            return "zeros"
        if cell >= 0 and len(raw) == 8:
            number = int.from_bytes(raw[:4], sys.byteorder) * self._unnumber & self._MASK
            place = int.from_bytes(raw[4:], sys.byteorder) * self._uncell & self._MASK
            if number < 1 << 24:
                return f"operation {number}, written for {place * 8:#x} ({raw.hex()})"
        return f"bytes {raw.hex()}"


class Twin:
    """The plain file that shows what ought to be."""

    def __init__(self, path: Path, size: int, windows: Windows) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.windows = windows
        self.stamps = Stamps(windows)
        os.ftruncate(self.fd, size)

    def close(self) -> None:
        os.close(self.fd)

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def content(self, offset: int, size: int) -> bytes:
        """Return a range, zeros beyond the end."""
        return os.pread(self.fd, size, offset).ljust(size, b"\0")

    def spans(self, offset: int, end: int) -> Iterator[tuple[int, int]]:
        """Return the parts (offset, size) of a range that lie in windows."""
        for start, stop in self.windows:
            first, last = max(start, offset), min(stop, end)
            if first < last:
                yield first, last - first

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Return the whole file in parts of moderate size; beyond the windows it is a hole."""
        for offset, size in self.spans(0, self.size):
            for at in range(offset, offset + size, PIECE):
                yield at, min(PIECE, offset + size - at)

    def check(self, offset: int, found: bytes | memoryview, where: str) -> None:
        """Raise Mismatch unless `found` is what stands here from `offset` on."""
        expected = os.pread(self.fd, len(found) + 1, offset)
        self.compare(offset, bytes(found), expected[: len(found)], where)

    def compare(self, offset: int, found: bytes, expected: bytes, where: str) -> None:
        if found == expected:
            return
        shared = min(len(found), len(expected))
        wrong = [at for at in range(shared) if found[at] != expected[at]]
        at = wrong[0] if wrong else shared
        last = wrong[-1] if wrong else shared
        raise Mismatch(
            f"{where}: {offset:#x}+{len(found):#x} (expected +{len(expected):#x}), "
            f"first difference at {offset + at:#x} "
            f"(block {(offset + at) // BLOCK}, byte {(offset + at) % BLOCK}), "
            f"last at {offset + last:#x}, {len(wrong)} bytes\n"
            f"  found:    {self.stamps.describe(found, offset, at)}\n"
            f"  expected: {self.stamps.describe(expected, offset, at)}"
        )


@dataclass
class Handle:
    fd: int
    kind: str

    @property
    def is_writable(self) -> bool:
        return "reader" not in self.kind

    @property
    def is_positioned(self) -> bool:
        return self.is_writable and "append" not in self.kind

    @property
    def is_direct(self) -> bool:
        return "direct" in self.kind

    @property
    def is_synchronous(self) -> bool:
        return "dsync" in self.kind


@dataclass
class Mapped:
    area: mmap.mmap
    offset: int
    size: int


@dataclass
class Change:
    """One operation since everything was durable: what it did to whole blocks."""

    offset: int
    before: bytes
    after: bytes
    is_loose: bool  # the kernel may have passed on parts of the block by themselves
    is_durable: bool


class Exerciser:
    """One run on one file."""

    def __init__(
        self,
        subject: Subject,
        twin: Twin,
        *,
        seed: int,
        emphasis: str = "mixed",
        crash_weight: float = 0.0,
        heading: str = "",
        trace: IO[str] | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.number = 0
        self._subject = subject
        self._twin = twin
        self._windows = twin.windows
        self._seed = seed
        self._heading = heading or f"seed {seed}"
        self._trace = trace
        self._kinds = EMPHASES[emphasis]
        self._handles: list[Handle] = []
        self._maps: list[Mapped] = []
        self._mapped_dirty = False
        self._recent: deque[int] = deque(maxlen=6)
        self._lines: deque[str] = deque(maxlen=HISTORY)
        self._arena = mmap.mmap(-1, 4 * REQUEST_MAX)
        self._view = memoryview(self._arena)
        self._scratch = os.memfd_create("scratch")
        self._tracks = crash_weight > 0
        self._changes: list[Change] = []
        self._sizes = {twin.size}
        maps = 1.0 if subject.has_maps and emphasis != "direct" else 0.15 * subject.has_maps
        self._table: list[tuple[Callable[[], None], float]] = [
            (self._read, 18),
            (self._read_scattered, 3),
            (self._write, 24),
            (self._write_gathered, 4),
            (self._write_synchronously, 2),
            (self._append, 3),
            (self._truncate, 4),
            (self._allocate, 6),
            (self._seek, 3),
            (self._walk, 1),
            (self._map, 2 * maps),
            (self._map_read, 3 * maps),
            (self._map_write, 6 * maps),
            (self._map_sync, 2 * maps),
            (self._unmap, 1.5 * maps),
            (self._map_privately, 1 * maps),
            (self._reopen, 5),
            (self._sync, 3),
            (self._copy, 3),
            (self._send_out, 1),
            (self._send_in, 1),
            (self._rename, 0.7),
            (self._drop_pages, 2),
            (self._batch, 7 if subject.any_alignment else 3),
            (self._clash, 2),
            (self._flush_image, 0.8),
            (self._close_image, 0.7),
            (self._compare_all, 1),
            (self._stat, 1),
            (self._crash, crash_weight),
        ]

    # The run.

    def run(self, operations: int) -> None:
        """Do that many operations more, and compare everything.

        Raises:
            Difference: the report.
        """
        actions = [action for action, _ in self._table]
        weights = [weight for _, weight in self._table]
        try:
            for _ in range(operations):
                self.number += 1
                self._subject.beat()
                # One generator for each: an operation does not depend on how others were drawn.
                self._rng = random.Random(self._seed << 32 | self.number)
                (action,) = self._rng.choices(actions, weights)
                self.counts[action.__name__.strip("_")] += 1
                action()
            self._note("the end")
            self._compare_all()
            self._close_all()
        except Exception as exc:
            raise Difference(self._report(exc)) from exc

    def verify(self) -> None:
        """Compare with what the subject has on its storage.

        Raises:
            Difference: the report.
        """
        try:
            self._subject.verify(self._twin)
        except Exception as exc:
            raise Difference(self._report(exc)) from exc

    def dispose(self) -> None:
        """Let go of everything, whatever the state."""
        for mapped in self._maps:
            mapped.area.close()
        for handle in self._handles:
            with contextlib.suppress(OSError):
                os.close(handle.fd)
        self._maps.clear()
        self._handles.clear()
        os.close(self._scratch)

    def _report(self, exc: Exception) -> str:
        what = str(exc) if isinstance(exc, Mismatch) else f"{type(exc).__name__}: {exc}"
        return "\n".join(
            (
                f"{self._heading}: operation {self.number}: {what}",
                f"the last {len(self._lines)} operations:",
                *self._lines,
            )
        )

    def _note(self, text: str) -> None:
        line = f"{self.number:8} {text}"
        self._lines.append(line)
        if self._trace is not None:
            self._trace.write(line + "\n")
            self._trace.flush()

    def _append_note(self, text: str) -> None:
        self._lines[-1] += text
        if self._trace is not None:
            self._trace.write(f"{'':8} {text}\n")

    def _same(self, what: str, real: Callable[[], T], ideal: Callable[[], T]) -> T | None:
        """Return what both returned; None if both failed alike."""
        found, expected = _outcome(real), _outcome(ideal)
        if found != expected:
            raise Mismatch(f"{what} gave {found[0]}, expected {expected[0]}")
        return found[1]

    # What to draw.

    def _some_size(self, maximum: int = REQUEST_MAX) -> int:
        rng = self._rng
        chosen = rng.random()
        if chosen < 0.12:
            size = rng.randint(1, 16)
        elif chosen < 0.25:
            size = rng.choice((511, 512, 513, 1024, 2048))
        elif chosen < 0.5:
            size = BLOCK * rng.randint(1, 8)
        elif chosen < 0.6:
            size = BLOCK + rng.choice((-1, 1))
        elif chosen < 0.85:
            size = rng.randint(1, 64 << 10)
        elif chosen < 0.94:
            size = rng.randint(1, 256 << 10)
        else:
            size = rng.choice((GROUP, GROUP + BLOCK, REQUEST_MAX, rng.randint(1, REQUEST_MAX)))
        return min(size, maximum)

    def _some_offset(self, size: int) -> int:
        rng = self._rng
        start, end = rng.choice(self._windows)
        chosen = rng.random()
        if chosen < 0.2:
            offset = rng.randrange(start, end)
        elif chosen < 0.4 and self._recent:
            offset = rng.choice(self._recent) + rng.choice((0, rng.randint(-8192, 8192)))
        elif chosen < 0.6:
            offset = rng.randrange(start, end, BLOCK)
        elif chosen < 0.7:
            offset = rng.randrange(start, end, BLOCK) + rng.choice((-1, 1, 512, -512))
        elif chosen < 0.8:
            offset = rng.randrange(start, end, GROUP) - rng.randint(0, size)
        else:
            offset = self._twin.size + rng.choice(
                (0, 0, -size, -1, 1, -size // 2, -BLOCK, BLOCK, rng.randint(0, 100_000))
            )
        return offset

    def _placed(self, size: int) -> tuple[int, int]:
        """Return a range within one window, near the size asked for."""
        offset = self._some_offset(size)
        start, end = next(
            ((s, e) for s, e in reversed(self._windows) if s <= offset), self._windows[0]
        )
        offset = min(max(offset, start), end - 1)
        self._recent.append(offset)
        return offset, min(size, end - offset)

    def _inside(self, size: int) -> tuple[int, int]:
        """Return a range within one window and within the file; (0, 0) if it is empty."""
        offset, size = self._placed(size)
        total = self._twin.size
        if offset >= total:
            spans = list(self._twin.spans(0, total))
            if not spans:
                return 0, 0
            start, length = self._rng.choice(spans)
            offset = start + self._rng.randrange(length)
            size = min(size, start + length - offset)
        return offset, min(size, total - offset)

    def _handle(self, accepts: Callable[[Handle], bool] = lambda _: True) -> Handle:
        """Return an open handle, opening one if none is of that sort."""
        found = [handle for handle in self._handles if accepts(handle)]
        if found and (len(self._handles) == HANDLES or self._rng.random() < 0.9):
            return self._rng.choice(found)
        kinds = [kind for kind in KINDS if accepts(Handle(-1, kind))]
        weights = [self._kinds[list(KINDS).index(kind)] + 0.01 for kind in kinds]
        (kind,) = self._rng.choices(kinds, weights)
        if len(self._handles) == HANDLES:
            self._close(self._handles[self._rng.randrange(HANDLES)])
        handle = Handle(self._subject.open(KINDS[kind]), kind)
        self._handles.append(handle)
        return handle

    def _close(self, handle: Handle) -> None:
        self._handles.remove(handle)
        os.close(handle.fd)

    def _shift(self) -> int:
        """Return where in a page a buffer begins."""
        return self._rng.choice((0, 0, 0, 512, 1, self._rng.randrange(BLOCK)))

    def _filled(self, data: bytes, shift: int) -> memoryview:
        view = self._view[shift : shift + len(data)]
        view[:] = data
        return view

    def _cut(self, area: memoryview, size: int) -> list[memoryview]:
        """Cut buffers of `size` bytes in all, with gaps between them."""
        views, at, rest = [], self._shift(), size
        count = self._rng.randint(2, 6)
        while rest:
            count -= 1
            part = rest if count <= 0 else self._rng.randint(1, rest)
            views.append(area[at : at + part])
            at += part + self._rng.choice((0, 1, 512, BLOCK))
            rest -= part
        return views

    @contextlib.contextmanager
    def _changing(
        self, offset: int, size: int, *, loose: bool = False, durable: bool = False
    ) -> Iterator[None]:
        """Note what happens to whole blocks, for a crash to come."""
        if not self._tracks:
            yield
            return
        first, end = offset // BLOCK * BLOCK, -(-(offset + size) // BLOCK) * BLOCK
        spans = list(self._twin.spans(first, end))
        before = [self._twin.content(*span) for span in spans]
        yield
        for span, content in zip(spans, before, strict=True):
            after = self._twin.content(*span)
            self._changes.append(Change(span[0], content, after, loose, durable))
        self._sizes = {self._twin.size} if durable else self._sizes | {self._twin.size}

    def _all_durable(self) -> None:
        self._changes.clear()
        self._sizes = {self._twin.size}

    def _check_size(self, fd: int) -> None:
        found, expected = os.fstat(fd).st_size, self._twin.size
        if found != expected:
            raise Mismatch(f"the size is {found:#x}, expected {expected:#x}")

    # Reading and writing.

    def _read(self) -> None:
        handle, size = self._handle(), self._some_size()
        offset, size = self._placed(size)
        shift = self._shift()
        self._note(f"read      {handle.kind:13} {offset:#x}+{size:#x} buffer at {shift}")
        view = self._filled(b"\xee" * size, shift)
        self._check_read([view], offset, self._subject.read(handle.fd, [view], offset))

    def _read_scattered(self) -> None:
        handle, size = self._handle(), self._some_size(256 << 10)
        offset, size = self._placed(size)
        views = self._cut(self._view, size)
        self._note(f"readv     {handle.kind:13} {offset:#x}+{size:#x} {list(map(len, views))}")
        for view in views:
            view[:] = b"\xee" * len(view)
        self._check_read(views, offset, self._subject.read(handle.fd, views, offset))

    def _check_read(self, views: list[memoryview], offset: int, count: int) -> None:
        size = sum(map(len, views))
        expected = os.pread(self._twin.fd, size, offset)
        self._twin.compare(offset, b"".join(views)[:count], expected, f"read {count:#x} bytes")

    def _write(self) -> None:
        handle, size = self._handle(lambda handle: handle.is_positioned), self._some_size()
        offset, size = self._placed(size)
        data = self._twin.stamps.make(self.number, offset, size)
        # A larger one that does not begin with a page would reach the daemon in two parts.
        shift = 0 if size > REQUEST_MAX - BLOCK else self._shift()
        self._note(f"write     {handle.kind:13} {offset:#x}+{size:#x} buffer at {shift}")
        with self._changing(offset, size, durable=handle.is_synchronous):
            self._put(handle, [self._filled(data, shift)], offset, data)
        self._look_again(offset, size)

    def _write_gathered(self) -> None:
        handle = self._handle(lambda handle: handle.is_positioned)
        offset, size = self._placed(self._some_size(256 << 10))
        data = self._twin.stamps.make(self.number, offset, size)
        views = self._cut(self._view, size)
        self._note(f"writev    {handle.kind:13} {offset:#x}+{size:#x} {list(map(len, views))}")
        at = 0
        for view in views:
            view[:] = data[at : at + len(view)]
            at += len(view)
        with self._changing(offset, size, durable=handle.is_synchronous):
            self._put(handle, views, offset, data)
        self._look_again(offset, size)

    def _write_synchronously(self) -> None:
        handle = self._handle(lambda handle: handle.is_positioned)
        offset, size = self._placed(self._some_size(256 << 10))
        data = self._twin.stamps.make(self.number, offset, size)
        shift = self._shift()
        self._note(f"write     {handle.kind:13} {offset:#x}+{size:#x} RWF_DSYNC")
        durable = self._subject.has_sync_flag or handle.is_synchronous
        with self._changing(offset, size, durable=durable):
            self._put(handle, [self._filled(data, shift)], offset, data, os.RWF_DSYNC)

    def _put(
        self, handle: Handle, views: list[memoryview], offset: int, data: bytes, flags: int = 0
    ) -> None:
        self._same(
            "write",
            lambda: self._subject.write(handle.fd, views, offset, flags),
            lambda: os.pwrite(self._twin.fd, data, offset),
        )
        self._check_size(handle.fd)

    def _look_again(self, offset: int, size: int, chance: float = 0.3) -> None:
        """Sometimes read what was just changed, and its neighbours, by another handle."""
        if self._rng.random() < chance:
            handle = self._handle()
            around = self._rng.choice((0, 1, BLOCK))
            start = max(0, offset - around)
            view = self._view[: min(size, REQUEST_MAX) + 2 * around]
            self._append_note(f"; read back by {handle.kind}")
            self._check_read([view], start, self._subject.read(handle.fd, [view], start))

    def _append(self) -> None:
        handle = self._handle(lambda handle: "append" in handle.kind)
        offset = self._twin.size
        end = next(end for _, end in self._windows if offset <= end)
        size = min(self._some_size(), end - offset)
        data = self._twin.stamps.make(self.number, offset, size) if size else b""
        shift = 0 if size > REQUEST_MAX - BLOCK else self._shift()
        self._note(f"append    {handle.kind:13} {offset:#x}+{size:#x}")
        with self._changing(offset, size):
            self._same(
                "append",
                lambda: self._subject.append(handle.fd, self._filled(data, shift)),
                lambda: os.pwrite(self._twin.fd, data, offset),
            )
        self._check_size(handle.fd)

    # Size and space.

    def _truncate(self) -> None:
        rng = self._rng
        handle = None
        if rng.random() < 0.7:
            handle = self._handle(lambda handle: handle.is_writable)
        chosen = rng.random()
        if chosen < 0.1:
            size = rng.choice((0, 1, BLOCK))
        elif chosen < 0.3:
            size = max(0, self._twin.size + rng.choice((-1, 1, -BLOCK, BLOCK, -5000, 5000)))
        else:
            size = self._some_offset(BLOCK)
        size = self._reachable(size)
        old = self._twin.size
        how = "path" if handle is None else handle.kind
        self._note(f"truncate  {how:13} {old:#x} -> {size:#x}")
        with self._changing(min(old, size), abs(old - size)):
            self._same(
                "truncate",
                lambda: self._subject.truncate(None if handle is None else handle.fd, size),
                lambda: os.ftruncate(self._twin.fd, size),
            )
        self._stat_now()
        self._look_again(max(0, min(old, size) - BLOCK), 2 * BLOCK, 0.6)

    def _reachable(self, size: int) -> int:
        """Return a file size in a window that is near."""
        start, end = next(
            ((s, e) for s, e in reversed(self._windows) if s <= size), self._windows[0]
        )
        return min(max(size, start), end)

    def _allocate(self) -> None:
        rng = self._rng
        handle = self._handle(lambda handle: handle.is_writable)
        offset, size = self._placed(self._some_size(rng.choice((REQUEST_MAX, 4 * MIB))))
        name, mode = rng.choice(
            (
                ("punch", PUNCH_HOLE | KEEP_SIZE),
                ("punch", PUNCH_HOLE | KEEP_SIZE),
                ("zero", ZERO_RANGE),
                ("zero, keep", ZERO_RANGE | KEEP_SIZE),
                ("reserve", 0),
                ("reserve, keep", KEEP_SIZE),
            )
        )
        if rng.random() < 0.2 and mode & PUNCH_HOLE:  # several groups at once
            start, end = rng.choice(self._windows)
            offset, size = start, rng.randrange(end - start) + 1
        self._note(f"{name:13} {handle.kind:9} {offset:#x}+{size:#x}")
        with self._changing(offset, size):
            self._same(
                name,
                lambda: self._subject.allocate(handle.fd, mode, offset, size),
                lambda: self._allocate_twin(mode, offset, size),
            )
        self._check_size(handle.fd)
        self._look_again(offset, size, 0.6)

    def _allocate_twin(self, mode: int, offset: int, size: int) -> None:
        if not self._subject.has_space:
            raise OSError(errno.EOPNOTSUPP, "no space management without the lane")
        fallocate(self._twin.fd, mode, offset, size)

    def _seek(self) -> None:
        self._sync_maps()
        handle = self._handle()
        offset, _ = self._placed(1)
        whence, name = self._rng.choice(((os.SEEK_DATA, "data"), (os.SEEK_HOLE, "hole")))
        self._note(f"seek {name} {handle.kind:13} {offset:#x}")
        found = self._subject.seek(handle.fd, offset, whence)
        self._append_note(f" -> {found}")
        self._check_found(offset, whence, found)
        if whence == os.SEEK_HOLE and found is not None:
            # A hole is one: zeros from there to the next data.
            self._check_found(
                found, os.SEEK_DATA, self._subject.seek(handle.fd, found, os.SEEK_DATA)
            )

    def _check_found(self, offset: int, whence: int, found: int | None) -> None:
        size = self._twin.size
        if found is None:
            if offset < size and whence == os.SEEK_HOLE:
                raise Mismatch(f"no hole from {offset:#x} on, not even the end")
        elif not offset <= found <= size or (whence == os.SEEK_DATA and found == size):
            raise Mismatch(f"{found:#x} is not between {offset:#x} and {size:#x}")
        if whence == os.SEEK_DATA:
            for at, count in self._twin.spans(offset, size if found is None else found):
                content = self._twin.content(at, count)
                if content.count(0) != len(content):
                    first = len(content) - len(content.lstrip(b"\0"))
                    what = self._twin.stamps.describe(content, at, first)
                    raise Mismatch(f"{at + first:#x} is called a hole: {what}")

    def _walk(self) -> None:
        """Go through all data and holes of the file."""
        self._sync_maps()
        handle = self._handle()
        self._note(f"walk      {handle.kind:13}")
        at, steps = 0, 0
        while at < self._twin.size:
            data = self._subject.seek(handle.fd, at, os.SEEK_DATA)
            self._check_found(at, os.SEEK_DATA, data)
            if data is None:
                break
            hole = self._subject.seek(handle.fd, data, os.SEEK_HOLE)
            self._check_found(data, os.SEEK_HOLE, hole)
            if hole is None or hole == data:
                raise Mismatch(f"data at {data:#x}, but its end is {hole}")
            at, steps = hole, steps + 1
        self._append_note(f" {steps} runs")

    # Mappings.

    def _map(self) -> None:
        rng = self._rng
        if len(self._maps) == MAPS:
            self._unmap()
            return
        offset, size = self._inside(self._some_size())
        if not size:
            return
        handle = self._handle(lambda handle: handle.is_writable)
        start = offset // BLOCK * BLOCK
        end = min(self._twin.size, next(end for _, end in self._windows if offset < end))
        size = min(size + offset - start + rng.choice((0, 0, 8 * BLOCK)), end - start)
        self._note(f"map       {handle.kind:13} {start:#x}+{size:#x}")
        area = self._subject.map(handle.fd, start, size, shared=True)
        self._maps.append(Mapped(area, start, size))

    def _mapped_range(self) -> tuple[Mapped, int, int] | None:
        """Return a mapping and a range within it that lies before the end of the file."""
        if not self._maps:
            return None
        mapped = self._rng.choice(self._maps)
        limit = min(mapped.size, self._twin.size - mapped.offset)
        if limit <= 0:
            return None
        at = self._rng.randrange(limit)
        if self._rng.random() < 0.5:
            at = at // BLOCK * BLOCK
        return mapped, at, min(self._some_size(256 << 10), limit - at)

    def _map_read(self) -> None:
        found = self._mapped_range()
        if found is None:
            return
        mapped, at, size = found
        offset = mapped.offset + at
        self._note(f"map read                {offset:#x}+{size:#x}")
        populate(mapped.area, at, size, writing=False)
        self._twin.check(offset, mapped.area[at : at + size], "read through a mapping")

    def _map_write(self) -> None:
        found = self._mapped_range()
        if found is None:
            self._map()
            return
        mapped, at, size = found
        offset = mapped.offset + at
        data = self._twin.stamps.make(self.number, offset, size)
        self._note(f"map write               {offset:#x}+{size:#x}")
        with self._changing(offset, size, loose=True):
            populate(mapped.area, at, size, writing=True)
            mapped.area[at : at + size] = data
            os.pwrite(self._twin.fd, data, offset)
        self._mapped_dirty = True

    def _map_sync(self) -> None:
        found = self._mapped_range()
        if found is None:
            return
        mapped, at, size = found
        start = at // BLOCK * BLOCK
        stop = min(-(-(at + size) // BLOCK) * BLOCK, mapped.size)
        offset = mapped.offset + start
        self._note(f"msync                   {offset:#x}+{stop - start:#x}")
        with self._changing(offset, stop - start, durable=True):
            mapped.area.flush(start, stop - start)

    def _sync_maps(self) -> None:
        for mapped in self._maps:
            mapped.area.flush()

    def _unmap(self) -> None:
        if not self._maps:
            return
        mapped = self._maps.pop(self._rng.randrange(len(self._maps)))
        self._note(f"unmap                   {mapped.offset:#x}+{mapped.size:#x}")
        mapped.area.close()

    def _map_privately(self) -> None:
        offset, size = self._inside(self._some_size())
        if not size:
            return
        handle = self._handle()
        start = offset // BLOCK * BLOCK
        self._note(f"private   {handle.kind:13} {offset:#x}+{size:#x}")
        with contextlib.closing(
            self._subject.map(handle.fd, start, offset - start + size, shared=False)
        ) as area:
            at = offset - start
            populate(area, at, size, writing=False)
            self._twin.check(offset, area[at : at + size], "read through a private mapping")
            area[at : at + size] = b"\xdd" * size  # nobody else may see this

    # Handles, durability, names.

    def _reopen(self) -> None:
        rng = self._rng
        while self._handles and (len(self._handles) == HANDLES or rng.random() < 0.4):
            self._close(rng.choice(self._handles))
        (kind,) = rng.choices(list(KINDS), self._kinds)
        self._note(f"open      {kind:13} beside {[handle.kind for handle in self._handles]}")
        self._handles.append(Handle(self._subject.open(KINDS[kind]), kind))
        self._check_size(self._handles[-1].fd)

    def _sync(self) -> None:
        handle, data_only = self._handle(), self._rng.random() < 0.5
        self._note(f"{'fdatasync' if data_only else 'fsync':9} {handle.kind}")
        self._subject.sync(handle.fd, data_only=data_only)
        self._mapped_dirty = False
        self._all_durable()

    def _copy(self) -> None:
        source = self._handle()
        target = self._handle(lambda handle: handle.is_positioned)
        if source not in self._handles:  # it was closed to make room
            source = target
        size = self._some_size(256 << 10)
        offset, _ = self._placed(size)
        to, size = self._placed(size)
        self._note(f"copy      {source.kind} -> {target.kind} {offset:#x}+{size:#x} to {to:#x}")
        twin = self._twin.fd
        with self._changing(to, size, loose=True):
            self._same(
                "copy_file_range",
                partial(_copied, self._subject.copy, source.fd, target.fd, size, offset, to),
                partial(_copied, os.copy_file_range, twin, twin, size, offset, to),
            )
        self._check_size(target.fd)

    def _send_out(self) -> None:
        handle = self._handle()
        offset, size = self._placed(self._some_size(256 << 10))
        self._note(f"sendfile  {handle.kind:13} {offset:#x}+{size:#x} out")
        scratch = self._scratch
        os.ftruncate(scratch, 0)
        os.lseek(scratch, 0, os.SEEK_SET)
        done = 0
        while done < size:
            count = self._subject.send(scratch, handle.fd, offset + done, size - done)
            if not count:
                break
            done += count
        expected = os.pread(self._twin.fd, size, offset)
        self._twin.compare(offset, os.pread(scratch, size + 1, 0), expected, "sendfile")

    def _send_in(self) -> None:
        handle = self._handle(lambda handle: handle.is_positioned)
        offset, size = self._placed(self._some_size(256 << 10))
        data = self._twin.stamps.make(self.number, offset, size)
        scratch = self._scratch
        os.ftruncate(scratch, 0)
        os.pwrite(scratch, data, 0)
        self._note(f"sendfile  {handle.kind:13} {offset:#x}+{size:#x} in")
        with self._changing(offset, size, loose=True):
            os.lseek(handle.fd, offset, os.SEEK_SET)
            done = 0
            while done < size:
                done += self._subject.send(handle.fd, scratch, done, size - done)
            os.pwrite(self._twin.fd, data, offset)
        self._check_size(handle.fd)

    def _rename(self) -> None:
        self._note("rename")
        self._subject.rename()
        self._stat_now()

    def _stat(self) -> None:
        self._note("stat")
        self._stat_now()

    def _stat_now(self) -> None:
        found, expected = os.stat(self._subject.path).st_size, self._twin.size
        if found != expected:
            raise Mismatch(f"the name's size is {found:#x}, expected {expected:#x}")

    def _drop_pages(self) -> None:
        handle = self._handle()
        self._note(f"drop      {handle.kind:13}")
        self._subject.drop_pages(handle.fd)

    def _batch(self, kill: Callable[[], None] | None = None) -> None:
        """Have several direct requests under way on neighbouring ranges that share blocks.

        With `kill`, that happens meanwhile, and nothing is expected of the results.
        """
        rng = self._rng
        area, size = self._inside(rng.choice((16 << 10, 64 << 10, 256 << 10, REQUEST_MAX)))
        step = rng.choice((1, 512, BLOCK))
        if step == BLOCK:
            size += area % BLOCK
            area -= area % BLOCK
        cuts = {
            area + rng.randrange(max(size, 1)) // step * step for _ in range(rng.randint(1, 12))
        }
        requests: list[Request] = []
        idle: list[tuple[int, int]] = []
        shown = []
        at = 0
        for start, end in itertools.pairwise(sorted({area, area + size, *cuts})):
            kind = rng.choices(("read", "write", "idle"), (3, 6, 1))[0]
            if kind == "idle":
                idle.append((start, end - start))
                continue
            whole_page = BLOCK - at % BLOCK
            gap = rng.choice((0, 0, 1, 512, whole_page))
            at += whole_page if end - start > REQUEST_MAX - BLOCK else gap
            view = self._view[at : at + end - start]
            at += end - start
            if kind == "write":
                view[:] = self._twin.stamps.make(self.number, start, end - start)
            is_synchronous = (
                kind == "write" and self._subject.has_asynchronous_sync_flag and rng.random() < 0.15
            )
            requests.append(Request(kind, start, view, is_synchronous))
            shown.append(f"{kind[0]}{'s' * is_synchronous} {start:#x}+{end - start:#x}")
            if rng.random() < 0.08:
                requests.append(Request("fdatasync"))
                shown.append("sync")
        rng.shuffle(requests)
        if not requests and kill is None:
            return
        handle = self._handle(lambda handle: handle.kind == "direct")
        name, meanwhile = self._meanwhile(idle) if kill is None else ("a kill", kill)
        chills = rng.random() < 0.2
        if chills:
            self._subject.chill()
        self._note(f"batch     {', '.join(shown)}; meanwhile {name}{', the storage cold' * chills}")
        # Whole blocks are never torn, not even under way; others are written part by part.
        with self._changing(area, size, loose=step != BLOCK):
            results = self._subject.batch(handle.fd, requests, meanwhile)
            for request in requests:
                if request.kind == "write" and request.view is not None:
                    os.pwrite(self._twin.fd, request.view, request.offset)
        for request, result in zip(requests, results, strict=True):
            wanted = 0 if request.view is None else len(request.view)
            if request.is_synchronous and result == wanted:
                self._is_durable(request.offset, wanted)
            if kill is not None:
                continue
            if result != wanted:
                raise Mismatch(f"{request.kind} at {request.offset:#x} gave {result}, not {wanted}")
            if request.kind == "read" and request.view is not None:
                self._twin.check(request.offset, request.view, "read in a batch")
        if kill is None:
            self._check_size(handle.fd)

    def _clash(self) -> None:
        """Write and, meanwhile, clear or cut the same range; either may come first."""
        if not self._subject.any_alignment:
            return
        rng, twin = self._rng, self._twin
        area, size = self._inside(rng.choice((64 << 10, GROUP, REQUEST_MAX)))
        if not size:
            return
        handle = self._handle(lambda handle: handle.kind == "direct")
        end, total = area + size, twin.size
        step = rng.choice((1, 512, BLOCK))
        cuts = {area + rng.randrange(size) // step * step for _ in range(rng.randint(1, 30))}
        written = [
            (max(start, area), stop)
            for start, stop in itertools.pairwise(sorted({area, end, *cuts}))
            if start >= area and rng.random() < 0.7
        ]
        new = twin.stamps.make(self.number, area, size)
        self._view[:size] = new
        requests = [
            Request("write", start, self._view[start - area : stop - area])
            for start, stop in written
        ]
        rng.shuffle(requests)
        cuts_off = rng.random() < 0.5 or not self._subject.has_space
        low, high = sorted((rng.randrange(area, end), rng.randint(area, end)))
        if rng.random() < 0.5:  # whole groups
            low, high = low // GROUP * GROUP, min(-(-high // GROUP) * GROUP, total)
        high = total if cuts_off else max(high, low + 1)
        self._note(
            f"clash     {len(written)} writes in {area:#x}+{size:#x}, meanwhile "
            f"{'cut to' if cuts_off else 'punch'} {low:#x}+{high - low:#x}"
        )
        before = twin.content(area, size)
        if rng.random() < 0.3:
            self._subject.chill()

        def meanwhile() -> None:
            if cuts_off:
                self._subject.truncate(handle.fd, low)
            else:
                self._subject.allocate(handle.fd, PUNCH_HOLE | KEEP_SIZE, low, high - low)

        first = min(area, low)
        with self._changing(first, max(end, high) - first, loose=True):
            if requests:
                results = self._subject.batch(handle.fd, requests, meanwhile)
                for request, result in zip(requests, results, strict=True):
                    if request.view is not None and result != len(request.view):
                        raise Mismatch(f"write at {request.offset:#x} gave {result}")
            else:
                meanwhile()
            expected = bytearray(before)
            for start, stop in written:
                expected[start - area : stop - area] = new[start - area : stop - area]
            os.pwrite(twin.fd, expected, area)
            if cuts_off:
                # What was written beyond has made the file longer, if it came later.
                self._subject.truncate(handle.fd, low)
                os.ftruncate(twin.fd, low)
            else:
                fallocate(twin.fd, PUNCH_HOLE | KEEP_SIZE, low, high - low)
                self._adopt_clash(handle, written, max(low, area), min(high, end), area, new)
        if self._tracks:
            # In between, all of it may have been zero.
            start, stop = low // BLOCK * BLOCK, -(-max(end, high) // BLOCK) * BLOCK
            for at, count in twin.spans(start, stop):
                self._changes.append(Change(at, bytes(count), bytes(count), True, False))
        self._check_size(handle.fd)
        view = self._view[REQUEST_MAX : REQUEST_MAX + size]
        self._check_read([view], area, self._subject.read(handle.fd, [view], area))

    def _adopt_clash(
        self, handle: Handle, written: list[tuple[int, int]], low: int, high: int,
        area: int, new: bytes,
    ) -> None:  # fmt: skip
        """Take over what is there where a write and a punch met: all of a block, or none."""
        for start, stop in written:
            for block in range(max(start, low) // BLOCK, -(-min(stop, high) // BLOCK)):
                at = max(block * BLOCK, start, low)
                count = min((block + 1) * BLOCK, stop, high) - at
                view = self._view[3 * REQUEST_MAX : 3 * REQUEST_MAX + count]
                self._subject.read(handle.fd, [view], at)
                wanted = new[at - area : at - area + count]
                if view == wanted:
                    os.pwrite(self._twin.fd, wanted, at)
                else:
                    self._twin.check(at, view, "neither written nor punched")

    def _is_durable(self, offset: int, size: int) -> None:
        """Note that the whole blocks of a range are durable; its ends are shared with others."""
        first, end = -(-offset // BLOCK) * BLOCK, (offset + size) // BLOCK * BLOCK
        if self._tracks and first < end:
            content = self._twin.content(first, end - first)
            self._changes.append(Change(first, content, content, False, True))

    def _meanwhile(self, idle: list[tuple[int, int]]) -> tuple[str, Callable[[], None]]:
        """Return something to do beside a batch, in ranges that it leaves alone."""
        rng = self._rng
        handle = self._handle(lambda handle: handle.kind == "direct")
        name = rng.choice(("nothing", "sync", "punch", "zero", "read", "grow", "flush"))
        if name == "sync":
            return name, lambda: self._subject.sync(handle.fd, data_only=True)
        if name == "flush":
            return name, self._subject.flush_image
        if name == "grow":
            size = self._reachable(self._twin.size + rng.choice((1, BLOCK, 5000)))
            if size > self._twin.size:

                def grow() -> None:
                    self._subject.truncate(handle.fd, size)
                    os.ftruncate(self._twin.fd, size)

                return f"grow to {size:#x}", grow
        if idle and name in ("punch", "zero", "read"):
            offset, size = rng.choice(idle)
            text = f"{name} {offset:#x}+{size:#x}"
            if name == "read":

                def read() -> None:
                    view = self._view[2 * REQUEST_MAX : 2 * REQUEST_MAX + size]
                    self._check_read([view], offset, self._subject.read(handle.fd, [view], offset))

                return text, read
            if self._subject.has_space:
                mode = KEEP_SIZE | (PUNCH_HOLE if name == "punch" else ZERO_RANGE)

                def clear() -> None:
                    self._subject.allocate(handle.fd, mode, offset, size)
                    fallocate(self._twin.fd, mode, offset, size)

                return text, clear
        return "nothing", lambda: None

    # The image as a whole.

    def _flush_image(self) -> None:
        self._note("flush the image")
        self._subject.flush_image()
        if not self._mapped_dirty:
            self._all_durable()

    def _close_image(self) -> None:
        self._note("close the image")
        self._close_all()
        self._subject.close_image()
        self._all_durable()
        if self._rng.random() < 0.5:
            self._subject.chill()
            for _ in range(3):
                self._batch()
        self._compare_all()

    def _close_all(self) -> None:
        for mapped in self._maps:
            mapped.area.close()
        self._maps.clear()
        self._mapped_dirty = False
        for handle in list(self._handles):
            self._close(handle)

    def _compare_all(self) -> None:
        handle = self._handle()
        self._note(f"compare   {handle.kind:13} size {self._twin.size:#x}")
        self._check_size(handle.fd)
        for offset, size in self._twin.pieces():
            view = self._view[:size]
            count = self._subject.read(handle.fd, [view], offset)
            self._twin.check(offset, view[:count], f"compared by {handle.kind}")
            if count != size:
                raise Mismatch(f"{count:#x} bytes from {offset:#x}, expected {size:#x}")

    def _crash(self) -> None:
        """Kill whoever serves the file, and see what is left."""
        how = self._rng.choice(("all durable", "not all durable", "requests under way"))
        if how == "all durable":
            self._sync()
        if how == "requests under way" and self._subject.any_alignment:
            delay = self._rng.choice((0.0, 0.001, 0.004))

            def kill() -> None:
                time.sleep(delay)
                self._subject.kill()

            self._batch(kill)
        else:
            self._subject.kill()
        self._note(f"killed, {how}, {len(self._changes)} changes since the last sync")
        for mapped in self._maps:
            mapped.area.close()
        self._maps.clear()
        self._mapped_dirty = False
        for handle in self._handles:
            with contextlib.suppress(OSError):
                os.close(handle.fd)
        self._handles.clear()
        self._subject.revive()
        self._adopt()
        self._all_durable()

    def _adopt(self) -> None:
        """Check what a crash has left, and go on from there."""
        handle = self._handle()
        size = os.fstat(handle.fd).st_size
        if size not in self._sizes:
            raise Mismatch(f"after the crash the size is {size:#x}, not of {sorted(self._sizes)}")
        allowed, loose = self._allowed()
        old_size = self._twin.size
        adopted: list[tuple[int, bytes]] = []
        for start, length in self._twin.spans(0, size):
            for at in range(start, start + length, PIECE):
                view = self._view[: min(PIECE, start + length - at)]
                count = self._subject.read(handle.fd, [view], at)
                found = bytes(view[:count])
                if count != len(view):
                    raise Mismatch(f"after the crash {count} bytes at {at:#x}, not {len(view)}")
                if found != self._twin.content(at, count):
                    self._check_survivors(at, found, allowed, loose)
                    adopted.append((at, found))
        os.ftruncate(self._twin.fd, size)
        for at, found in adopted:
            os.pwrite(self._twin.fd, found, at)
        self._append_note(f"; size {old_size:#x} -> {size:#x}, {len(adopted)} parts differ")

    def _allowed(self) -> tuple[dict[int, list[bytes]], set[int]]:
        """Return what each block may be, where that is not what the twin has; and loose blocks."""
        allowed: dict[int, list[bytes]] = {}
        loose: set[int] = set()
        for change in self._changes:
            for at in range(0, len(change.after), BLOCK):
                block = (change.offset + at) // BLOCK
                after = change.after[at : at + BLOCK]
                if change.is_durable:
                    allowed[block] = [after]
                    loose.discard(block)
                    continue
                allowed.setdefault(block, [change.before[at : at + BLOCK]]).append(after)
                if change.is_loose:
                    loose.add(block)
        return allowed, loose

    def _check_survivors(
        self, offset: int, found: bytes, allowed: dict[int, list[bytes]], loose: set[int]
    ) -> None:
        for at in range(0, len(found), BLOCK):
            block = (offset + at) // BLOCK
            content = found[at : at + BLOCK]
            versions = allowed.get(block) or [self._twin.content(offset + at, BLOCK)]
            versions = [version[: len(content)] for version in versions]
            if content in versions:
                continue
            if block in loose and all(byte in set(of) for byte, *of in zip(content, *versions)):  # noqa: B905
                continue
            self._twin.compare(
                offset + at, content, versions[-1],
                f"after the crash, none of {len(versions)} versions",
            )  # fmt: skip


def _outcome(action: Callable[[], T]) -> tuple[str, T | None]:
    try:
        result = action()
    except OSError as exc:
        return errno.errorcode.get(exc.errno or 0, str(exc)), None
    return str(result), result


def _copied(
    copy: Callable[[int, int, int, int, int], int],
    source: int, target: int, size: int, offset: int, to: int,
) -> int:  # fmt: skip
    done = 0
    while done < size:
        count = copy(source, target, size - done, offset + done, to + done)
        if not count:
            break
        done += count
    return done


# Runs.


@dataclass(frozen=True)
class Setup:
    """Everything about a run that is not drawn for each operation."""

    seed: int
    lane: bool
    layout: str
    emphasis: str
    options: str
    size: int

    @classmethod
    def drawn(cls, seed: int, *, lane: bool, **chosen: str | None) -> Setup:
        """Draw what was not chosen from the seed."""
        rng = random.Random(seed)
        layout = rng.choice(("near", "near", "small", "far"))
        emphasis = rng.choice(tuple(EMPHASES))
        options = rng.choice(
            ("", "cache=4M,dirty=4M,commit=0.2,idle=0.5", "cache=4M,dirty=8M,commit=0.05,idle=0.1",
             "cache=64M,dirty=4M", "cache=4M,dirty=4M,commit=0.2,idle=0.5,direct_io")
        )  # fmt: skip
        layout = chosen.get("layout") or layout
        windows = LAYOUTS[layout]
        size = rng.choice((0, 1, BLOCK * rng.randrange(512), rng.randrange(windows[0][1])))
        given = chosen.get("options")
        return cls(
            seed=seed, lane=lane, layout=layout, emphasis=chosen.get("emphasis") or emphasis,
            options=options if given is None else given, size=size,
        )  # fmt: skip

    def describe(self) -> str:
        return (
            f"seed {self.seed}, lane {'on' if self.lane else 'off'}, {self.layout}, "
            f'{self.emphasis}, options "{self.options}", size {self.size}'
        )


def exercise(
    setup: Setup,
    base: Path,
    operations: int,
    *,
    files: int = 1,
    crash_weight: float = 0.05,
    trace: IO[str] | None = None,
) -> Counter[str]:
    """Do one run under a mount of its own in the empty directory `base`; return what was done.

    Several files are exercised at once, by threads, and share the mount's caches; nothing is
    killed then, and only the first is traced.

    Raises:
        Difference: the report.
    """
    mount = LiveMount(base, lane=setup.lane, options=setup.options)
    with contextlib.ExitStack() as stack:
        stack.callback(mount.abandon)
        exercisers: list[Exerciser] = []
        for index in range(files):
            subject = MountedSubject(mount, f"disk{index}", setup.size)
            twin = Twin(base / f"twin{index}", setup.size, LAYOUTS[setup.layout])
            stack.callback(twin.close)
            exercisers.append(
                Exerciser(
                    subject, twin, seed=setup.seed + FILE_SEEDS * index, emphasis=setup.emphasis,
                    crash_weight=crash_weight if files == 1 else 0.0,
                    heading=f"{setup.describe()}, file {index}", trace=None if index else trace,
                )
            )  # fmt: skip
            stack.callback(exercisers[-1].dispose)
        mount.start()
        if files == 1:
            exercisers[0].run(operations)
        else:
            with ThreadPoolExecutor(files) as pool:
                for done in [pool.submit(one.run, operations) for one in exercisers]:
                    done.result()
        mount.finish()
        counts: Counter[str] = Counter()
        for one in exercisers:
            one.verify()
            counts += one.counts
        return counts


def main() -> int:
    """Run as long as asked for; return 1 at the first difference."""
    faulthandler.enable()  # a mapping's read error is a SIGBUS on an old kernel
    parser = argparse.ArgumentParser(prog="torture exerciser", description=__doc__.splitlines()[0])
    parser.add_argument("--operations", type=int, default=20_000, help="in all, for each lane")
    parser.add_argument("--per-run", type=int, default=5_000, help="then the next seed")
    parser.add_argument("--seed", type=int, default=1, help="of the first run")
    parser.add_argument("--until", type=int, help="stop the first run after this operation")
    parser.add_argument("--lane", choices=("on", "off", "both"), default="both")
    parser.add_argument("--layout", choices=tuple(LAYOUTS))
    parser.add_argument("--emphasis", choices=tuple(EMPHASES))
    parser.add_argument("--options", help="mount options")
    parser.add_argument("--crash-weight", type=float, default=0.05, help="of 100, about")
    parser.add_argument("--trace", type=Path, help="write each operation to this file")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--files", type=int, default=1, help="exercised at once")
    parser.add_argument("--keep-going", action="store_true", help="go on after a difference")
    chosen = parser.parse_args()
    lanes = {"on": (True,), "off": (False,), "both": (True, False)}[chosen.lane]
    total, failed = 0, 0
    started = time.monotonic()
    runs = 1 if chosen.until else -(-chosen.operations // chosen.per_run)
    for seed in range(chosen.seed, chosen.seed + runs):
        for lane in lanes:
            setup = Setup.drawn(
                seed, lane=lane, layout=chosen.layout, emphasis=chosen.emphasis,
                options=chosen.options,
            )  # fmt: skip
            operations = chosen.until or chosen.per_run
            begun = time.monotonic()
            print(f"{setup.describe()}: {operations} operations", flush=True)
            base = Path(tempfile.mkdtemp(prefix="exerciser-", dir=chosen.directory))
            try:
                with contextlib.ExitStack() as stack:
                    trace = stack.enter_context(open(chosen.trace, "w")) if chosen.trace else None
                    counts = exercise(
                        setup,
                        base,
                        operations,
                        files=chosen.files,
                        crash_weight=chosen.crash_weight,
                        trace=trace,
                    )
            except Exception as exc:
                failed += 1
                print(f"FAILED: {exc}", flush=True)
                if not isinstance(exc, Difference):
                    import traceback

                    traceback.print_exc()
                print(f"kept: {base}", flush=True)
                if not chosen.keep_going:
                    return 1
            else:
                total += counts.total()
                shown = ", ".join(f"{name} {count}" for name, count in counts.most_common())
                print(f"  same, {time.monotonic() - begun:.1f} s: {shown}", flush=True)
                shutil.rmtree(base)
    print(f"{total} operations without a difference, {failed} runs with one, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
