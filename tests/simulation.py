"""A simulated disk under the `Storage` protocol: page cache, pending writes, crash states.

The fault model, all of it:

- A write goes to the page cache and is *pending*. `sync` makes all pending operations durable.
  `write_durable` (RWF_DSYNC) makes its own sectors durable and nothing else; older pending
  writes no longer touch those sectors.
- Pending operations reach the disk in any order, or not at all. At a power cut every pending
  operation has a *fate*: done (`n`, new), lost (`o`, old), or, for a write, one letter for each
  512-byte sector: `n` new, `o` old, `z` zeros, `g` garbage. A zero or garbage sector is lost as a
  whole, also where the write covered only a part of it. A punch is done or not for each page,
  a change of length is done or not. Two writes that are pending at once have fates of their own.
- A write past the end lengthens the file when any of its sectors is not `o`.
- Killed process: the page cache lives on; pending operations stay pending, also for the next
  process, and a power cut after that resolves them.
- A failed sync (or RWF_DSYNC) leaves each of its sectors written or not, and *clean*: the cache
  shows what the disk does not have, and no later sync writes it. `evict` lets such pages go.
- `read_direct` gives what the device would: dirty pages are written back before a direct read,
  so pending writes are seen, but nothing becomes durable by it; after a failed sync it shows
  the disk, not the clean pages.
- The n-th call that changes something may fail: EIO with nothing done, a short write, ENOSPC
  of `allocate`.

Not in the model: a disk that lies about a barrier, misdirected writes, decay at rest.
Concurrency: none; a test's one thread.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sealfs.errors import NoSpace, StorageFailed
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.plan import Buffer, Offsets
from sealfs.image.storage import pieces_of

SECTOR = 512
PAGE = 4096
NEW, OLD, ZERO, GARBAGE = "n", "o", "z", "g"

SUBSET_MAX = 6
"""Up to so many pending operations all their subsets are tried, 64 states."""
TEAR_MAX = 16
"""Tears of one write, where it has more they are drawn."""

_GARBAGE = hashlib.shake_256(b"garbage").digest(SECTOR)
_ZEROS = bytes(SECTOR)

Fates = tuple[str, ...]


class ProcessDied(BaseException):
    """Raised by a test's observer in the middle of a call: the process is gone.

    Not an `Exception`: no handler of the code under test may survive it.
    """


@dataclass(slots=True)
class Operation:
    """One pending operation: `w`rite, `p`unch or `t`runcate."""

    kind: str
    offset: int
    size: int
    data: bytes = b""
    settled: frozenset[int] = frozenset()
    """Sectors (by number on the disk) made durable by a later write of their own."""

    @property
    def unit(self) -> int:
        return SECTOR if self.kind == "w" else PAGE

    def units(self) -> range:
        """The sectors or pages that have a fate, by number on the disk."""
        if self.kind == "t":
            return range(0)
        return range(self.offset // self.unit, -(-(self.offset + self.size) // self.unit))

    def apply(self, content: bytearray, fate: str = NEW) -> None:
        """Change `content` as this operation does when it has this fate."""
        if fate == OLD:
            return
        if self.kind == "t":
            _set_length(content, self.size)
            return
        end = self.offset + self.size
        if self.kind == "w":
            if len(content) < end:
                _set_length(content, end)
        else:
            end = min(end, len(content))
        if fate == NEW and not self.settled:
            if end > self.offset:
                content[self.offset : end] = self.data or bytes(end - self.offset)
            return
        whole = fate == NEW
        for position, number in enumerate(self.units()):
            letter = NEW if whole else fate[position]
            if letter != OLD:
                self._apply_unit(content, number, letter, end)

    def _apply_unit(self, content: bytearray, number: int, letter: str, end: int) -> None:
        per_unit = self.unit // SECTOR
        for sector in range(number * per_unit, (number + 1) * per_unit):
            if sector in self.settled:
                continue
            first, last = sector * SECTOR, (sector + 1) * SECTOR
            if letter in (ZERO, GARBAGE):
                last = min(last, len(content))
                source = _ZEROS if letter == ZERO else _GARBAGE
                content[first:last] = source[: max(0, last - first)]
                continue
            first, last = max(first, self.offset), min(last, end)
            if last > first:
                piece = self.data[first - self.offset : last - self.offset]
                content[first:last] = piece or bytes(last - first)


def _set_length(content: bytearray, size: int) -> None:
    if len(content) > size:
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


@dataclass
class SimulatedDisk:
    """What one file is: on the disk, in the page cache, and what lies between the two."""

    durable: bytearray = field(default_factory=bytearray)
    cached: bytearray = field(default_factory=bytearray)
    pending: list[Operation] = field(default_factory=list)
    diverged: bool = False
    """After a failed sync: clean pages of the cache may not be what the disk has."""

    @classmethod
    def of(cls, content: bytes | bytearray) -> SimulatedDisk:
        """Make a disk that holds exactly this, durable."""
        return cls(bytearray(content), bytearray(content))

    def clone(self) -> SimulatedDisk:
        """Copy everything, cache and pending operations too."""
        pending = [
            Operation(op.kind, op.offset, op.size, op.data, op.settled) for op in self.pending
        ]
        return SimulatedDisk(
            bytearray(self.durable), bytearray(self.cached), pending, self.diverged
        )

    def device(self) -> bytearray:
        """Return what the device would give when all dirty pages have been written back."""
        content = bytearray(self.durable)
        for op in self.pending:
            op.apply(content)
        return content

    def crash(self, fates: Fates) -> SimulatedDisk:
        """Cut the power: each pending operation meets its fate, the cache is gone."""
        if len(fates) != len(self.pending):
            raise ValueError(f"{len(fates)} fates for {len(self.pending)} pending operations")
        content = bytearray(self.durable)
        for op, fate in zip(self.pending, fates, strict=True):
            op.apply(content, fate)
        return SimulatedDisk.of(content)

    def evict(self) -> None:
        """Let clean pages go, as memory pressure does; after a failed sync the disk shows."""
        self.cached = self.device()
        self.diverged = False

    def submit(self, op: Operation) -> None:
        """Do it in the page cache."""
        op.apply(self.cached)
        self.pending.append(op)

    def settle_all(self) -> None:
        """Make everything pending durable."""
        for op in self.pending:
            op.apply(self.durable)
        self.pending.clear()

    def settle_last(self) -> None:
        """Make the newest pending write durable, alone."""
        op = self.pending.pop()
        end = op.offset + op.size
        for cut in [old for old in self.pending if old.kind == "t" and old.size < end]:
            # A longer file at this write means that the file system has recorded the cut.
            cut.apply(self.durable)
            self.pending.remove(cut)
        sectors = op.units()
        if len(self.durable) < end:
            _set_length(self.durable, end)
        first, last = sectors.start * SECTOR, min(sectors.stop * SECTOR, len(self.durable))
        # Whole sectors go to the disk; a dirty neighbour in the same sector goes with them.
        self.durable[first:last] = self.cached[first:last].ljust(last - first, b"\0")
        for old in self.pending:
            if old.kind != "t" and old.offset < last and old.offset + old.size > first:
                old.settled = old.settled.union(sectors)

    def fail(self, ops: Sequence[Operation], rng: random.Random) -> None:
        """Let these pending operations fail: each sector written or not, and clean after it."""
        for op in ops:
            letters = "".join(rng.choice((NEW, OLD)) for _ in op.units())
            op.apply(self.durable, letters or rng.choice((NEW, OLD)))
        kept = [op for op in self.pending if not any(op is gone for gone in ops)]
        self.pending[:] = kept
        self.diverged = True


def tears(op: Operation, rng: random.Random) -> list[str]:
    """Return torn fates of one operation: prefixes, suffixes, single zero and garbage sectors."""
    count = len(op.units())
    if count == 0 or (op.kind == "p" and count == 1):
        return []
    found: list[str] = []
    for cut in range(1, count):
        found += [NEW * cut + OLD * (count - cut), OLD * cut + NEW * (count - cut)]
    if op.kind == "w":
        for at in range(count):
            before, after = NEW * at, NEW * (count - at - 1)
            found += [before + ZERO + after, before + GARBAGE + after]
            found.append(OLD * at + GARBAGE + OLD * (count - at - 1))
        found += [GARBAGE * count, ZERO * count]
        found.append("".join(rng.choice((NEW, OLD, ZERO, GARBAGE)) for _ in range(count)))
    found.append("".join(rng.choice((NEW, OLD)) for _ in range(count)))
    unique = sorted(set(found) - {NEW * count, OLD * count})
    return unique if len(unique) <= TEAR_MAX else rng.sample(unique, TEAR_MAX)


def _subsets(count: int, rng: random.Random) -> Iterator[tuple[bool, ...]]:
    """Return which of `count` operations are done: all subsets, or the telling ones."""
    if count <= SUBSET_MAX:
        yield from itertools.product((True, False), repeat=count)
        return
    yield from (tuple(index < cut for index in range(count)) for cut in range(count + 1))
    for drop in range(count):
        yield tuple(index != drop for index in range(count))
        yield tuple(index == drop for index in range(count))
    for _ in range(8):
        yield tuple(rng.random() < 0.5 for _ in range(count))


def crash_fates(
    pending: Sequence[Operation], rng: random.Random, *, full: bool, cap: int
) -> list[Fates]:
    """Return at most `cap` distinct fates of what is pending.

    Args:
        pending: The operations since the last barrier.
        rng: Draws where there are more than `cap`.
        full: All states; else only those in which the last operation left a trace: the others
            were states at the point before it.
        cap: How many at most. That all is done is always among them.
    """
    count = len(pending)
    if count == 0:
        return [()] if full else []
    all_done: Fates = (NEW,) * count
    found: dict[Fates, None] = {}
    for done in _subsets(count, rng):
        if full or done[-1]:
            found[tuple(NEW if flag else OLD for flag in done)] = None
    for index in range(count) if full else (count - 1,):
        for tear in tears(pending[index], rng):
            found[(*all_done[:index], tear, *all_done[index + 1 :])] = None
            others = [rng.choice((NEW, OLD)) for _ in range(count)]
            found[(*others[:index], tear, *others[index + 1 :])] = None
    found.pop(all_done, None)
    rest = list(found)
    if len(rest) >= cap:
        rest = rng.sample(rest, cap - 1)
    return [all_done, *rest]


class SimulatedStorage:
    """A `Storage` over a `SimulatedDisk`; several may follow each other on one disk."""

    def __init__(self, disk: SimulatedDisk | None = None, path: str = "simulated.sealed") -> None:
        self.path = path
        self.disk = disk if disk is not None else SimulatedDisk()
        self.on_call: Callable[[str, int, int], None] | None = None
        """Called before each call that changes something, with (name, offset, size)."""
        self.on_point: Callable[[str], None] | None = None
        """Called when an operation has become pending (`op`) or a barrier is passed (`sync`)."""
        self.on_step: Callable[[], None] | None = None
        """Called before that: what others do at this moment."""
        self.on_read: Callable[[str, int, int], None] | None = None
        self.time = 0.0
        self.rng = random.Random(0)
        """Decides what a failing sync has written."""
        self._fail_after = 0
        self._fail_kind = ""
        self._closed = False
        self.failed_call = ""
        """Name of the call that was made to fail, empty before."""

    def fail(self, call: int, kind: str = "eio") -> None:
        """Let the `call`-th call from now that changes something fail: `eio` or `short`."""
        self._fail_after, self._fail_kind, self.failed_call = call, kind, ""

    def _failing(self, name: str, offset: int, size: int) -> bool:
        if self._closed:
            raise StorageFailed(self.path, f"{name} after close")
        if self.on_call is not None:
            self.on_call(name, offset, size)
        if self._fail_after == 0:
            return False
        self._fail_after -= 1
        if self._fail_after:
            return False
        self.failed_call = name
        return True

    def _point(self, kind: str) -> None:
        if self.on_step is not None:
            self.on_step()
        if self.on_point is not None:
            self.on_point(kind)

    def _noted_read(self, name: str, offset: int, size: int) -> None:
        if self._closed:
            raise StorageFailed(self.path, f"{name} after close")
        if self.on_read is not None:
            self.on_read(name, offset, size)

    def size(self) -> int:
        return len(self.disk.cached)

    def clock(self) -> float:
        return self.time

    def read(self, offset: int, size: int) -> bytes:
        self._noted_read("read", offset, size)
        return bytes(self.disk.cached[offset : offset + size])

    def read_into(self, offset: int, buffer: Buffer) -> int:
        view = memoryview(buffer)
        content = self.read(offset, len(view))
        view[: len(content)] = content
        return len(content)

    def read_nowait(self, offset: int, buffer: Buffer) -> bool:
        return self.read_into(offset, buffer) == len(buffer)

    def fileno(self) -> int:
        return -1

    def read_direct(self, offset: int, size: int) -> bytes:
        self._noted_read("read_direct", offset, size)
        if offset % PAGE or size % PAGE:
            raise StorageFailed(self.path, "direct read is not aligned to a page")
        content = self.disk.device() if self.disk.diverged else self.disk.cached
        return bytes(content[offset : offset + size])

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        failing = self._failing("write", offset, len(data))
        if failing:
            data = data[: len(data) // 2] if self._fail_kind == "short" else b""
        if data:
            self.disk.submit(Operation("w", offset, len(data), data))
            self._point("op")
        if failing:
            raise StorageFailed(self.path, "write failed: simulated")

    def write_blocks(self, offsets: Offsets, content: Buffer) -> None:
        view = memoryview(content)
        for at, first, count in pieces_of(offsets):
            self.write(at, [view[first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]])

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        data = b"".join(buffers)
        failing = self._failing("write_durable", offset, len(data))
        self.disk.submit(Operation("w", offset, len(data), data))
        self._point("op")
        if failing:
            self.disk.fail(self.disk.pending[-1:], self.rng)
            raise StorageFailed(self.path, "durable write failed: simulated")
        self.disk.settle_last()
        self._point("sync")

    def sync(self) -> None:
        if self._failing("sync", 0, 0):
            self.disk.fail(list(self.disk.pending), self.rng)
            raise StorageFailed(self.path, "fdatasync failed: simulated")
        self.disk.settle_all()
        self._point("sync")

    def allocate(self, offset: int, size: int) -> None:
        if self._failing("allocate", offset, size):
            raise NoSpace(self.path, f"no space for {size} bytes: simulated")

    def punch(self, offset: int, size: int) -> None:
        if self._failing("punch", offset, size):
            return  # giving space back may fail and is no error
        self.disk.submit(Operation("p", offset, size))
        self._point("op")

    def truncate(self, size: int) -> None:
        if self._failing("truncate", size, 0):
            raise StorageFailed(self.path, "truncate failed: simulated")
        self.disk.submit(Operation("t", 0, size))
        self._point("op")

    def close(self) -> None:
        self._closed = True

    def reopen(self) -> None:
        """Work again after `close`, as another descriptor of the same file."""
        self._closed = False
