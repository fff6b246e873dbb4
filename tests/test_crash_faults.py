"""Every n-th system call below an image fails, one kind of failure after the other.

Between the image and the simulated disk stands the real `FileStorage`, over a `Kernel` whose calls
fail as those of Linux do: EIO of any call, reads included; EINTR and ENOSPC of fallocate; reads
and writes that do a part only; a failed fdatasync that leaves its pages clean. The oracle is the
one of crash_support.py, the workloads go further than those of test_crash.py: `WideSession` has the
letters.

ENOSPC has a second half: a storage whose space ends somewhere. Every write that was accepted must
become durable without needing more; commit and checkpoint never fail for want of space.

A failure prints its recipe (crash_support.py), with these kinds: eio, enospc, eintr, unsupported,
short, and full (the room that is left, in pages); it is repeated by

    PYTHONPATH=. python tests/test_crash_faults.py 'RECIPE'
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
from crash_support import (
    BLOCKS_MAX,
    PAGE,
    PREFIXES,
    SMALL_COMMIT_BLOCKS,
    CrashFailure,
    Lab,
    Oracle,
    Recipe,
    Session,
    set_limit,
)
from sending import sent
from simulation import SECTOR, SimulatedDisk, SimulatedStorage
from test_crash import after_death, report, still_refuses
from test_image import slots_named
from test_image_space import FullStorage

from sealfs.errors import NoSpace, SealfsError, StorageFailed
from sealfs.image import storage as storage_module
from sealfs.image.committer import Committer
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry, block_count_of
from sealfs.image.plan import Buffer
from sealfs.image.space import Space
from sealfs.image.steps import run
from sealfs.image.storage import FileStorage

AFTER_SHARE = 0.08
"""How often what follows a failure is looked at closely."""
FAULTS = ("eio", "short", "enospc", "eintr", "unsupported")


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS, monkeypatch.setattr)
    set_limit("PREALLOCATE_GROUPS", 2, monkeypatch.setattr)


# -- system calls that fail


class Kernel:
    """What `FileStorage` finds in the place of `os` and of libc."""

    def __init__(self) -> None:
        self._files: WeakValueDictionary[int, FileOnDisk] = WeakValueDictionary()
        self._numbers = itertools.count(1 << 20, 2)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def number(self, file: FileOnDisk) -> int:
        """Return a descriptor; the one after it is for direct reads."""
        number = next(self._numbers)
        self._files[number] = file
        return number

    def _file(self, number: int) -> FileOnDisk:
        return self._files[number & ~1]

    def open(self, path: str, flags: int) -> int:
        number = int(path.rsplit("/", 1)[1])
        if self._file(number).failing("open") == "eio":
            raise OSError(errno.EINVAL, "no direct reads: simulated")
        return number + 1

    def close(self, number: int) -> None:
        pass

    def fstat(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(st_size=SimulatedStorage.size(self._file(number)))

    def preadv(self, number: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        file, is_direct = self._file(number), number & 1
        name = "preadv direct" if is_direct else "preadv nowait" if flags else "preadv"
        (buffer,) = buffers
        size = len(buffer)
        kind = file.failing(name)
        if kind == "eio":
            raise OSError(errno.EAGAIN if flags else errno.EIO, "simulated")
        if kind == "short":
            size = size // 2
            if is_direct:
                size -= size % PAGE
        if kind == "ragged":
            size = min(size, SECTOR)
        read = SimulatedStorage.read_direct if is_direct else SimulatedStorage.read
        found = read(file, offset, len(buffer))[: size or len(buffer)]
        memoryview(buffer)[: len(found)] = found
        return len(found)

    def pwritev(self, number: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        file = self._file(number)
        data = b"".join(buffers)
        kind = file.failing("pwritev dsync" if flags else "pwritev")
        if kind == "short":
            data = data[: len(data) // 2]
        write = SimulatedStorage.write_durable if flags else SimulatedStorage.write
        file.do(kind, lambda: write(file, offset, [data]))
        return len(data)

    def fdatasync(self, number: int) -> None:
        file = self._file(number)
        file.do(file.failing("fdatasync"), lambda: SimulatedStorage.sync(file))

    def ftruncate(self, number: int, size: int) -> None:
        file = self._file(number)
        file.do(file.failing("ftruncate"), lambda: SimulatedStorage.truncate(file, size))

    def sync_file_range(self, number: int, offset: int, size: int, flags: int) -> int:
        return -1 if self._file(number).failing("sync_file_range") else 0

    def fallocate(self, number: int, mode: int, offset: int, size: int) -> int:
        file = self._file(number)
        is_punch = mode != 1
        code = {
            "eio": errno.EIO,
            "enospc": errno.ENOSPC,
            "eintr": errno.EINTR,
            "unsupported": errno.EOPNOTSUPP,
        }.get(file.failing("punch" if is_punch else "fallocate"), 0)
        if code:
            ctypes.set_errno(code)
            return -1
        call = SimulatedStorage.punch if is_punch else SimulatedStorage.allocate
        call(file, offset, size)
        return 0


KERNEL = Kernel()
MEETS = {
    "short": ("preadv", "preadv nowait", "preadv direct", "pwritev", "pwritev dsync"),
    "enospc": ("fallocate",),
    "eintr": ("fallocate", "punch"),
    "unsupported": ("fallocate", "punch"),
    "ragged": ("preadv direct",),
}
"""Which calls can fail so; EIO meets them all. The interpreter repeats the other calls itself
when they are interrupted (PEP 475)."""
UNREPORTED = ("punch", "sync_file_range", "preadv nowait", "open")
"""Calls whose failure is none of the image's business: there is another way, or no need."""


class FileOnDisk(SimulatedStorage):
    """`FileStorage`, over a simulated disk; the n-th of its system calls may fail."""

    def __init__(self, disk: SimulatedDisk | None = None) -> None:
        super().__init__(disk)
        self._left, self._kind = 0, ""
        self.reopen()

    def reopen(self) -> None:
        super().reopen()
        self._file = FileStorage(KERNEL.number(self), self.path)

    def fail(self, call: int, kind: str = "eio") -> None:
        self._left, self._kind, self.failed_call = call, kind, ""

    def disarm(self) -> None:
        """Let no call fail any more."""
        self._left = 0

    def failing(self, name: str) -> str:
        """Return how this call is to fail, empty if it is not."""
        if not self._left or name not in MEETS.get(self._kind, (name,)):
            return ""
        self._left -= 1
        if self._left:
            return ""
        self.failed_call = name
        return self._kind

    def do(self, kind: str, call: Callable[[], None]) -> None:
        """Do it on the simulated disk, which knows what a failing call leaves behind."""
        name = self.failed_call
        if kind == "eio":
            super().fail(1)
        try:
            call()
        except StorageFailed as exc:
            raise OSError(errno.EIO, exc.detail) from None
        finally:
            self.failed_call = name

    def size(self) -> int:
        return self._file.size()

    def read(self, offset: int, size: int) -> bytes:
        return self._file.read(offset, size)

    def read_into(self, offset: int, buffer: Buffer) -> int:
        return self._file.read_into(offset, buffer)

    def read_nowait(self, offset: int, buffer: Buffer) -> bool:
        return self._file.read_nowait(offset, buffer)

    def read_direct(self, offset: int, size: int) -> bytes:
        return self._file.read_direct(offset, size)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._file.write(offset, buffers)

    def write_durable(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._file.write_durable(offset, buffers)

    def sync(self) -> None:
        self._file.sync()

    def allocate(self, offset: int, size: int) -> None:
        self._file.allocate(offset, size)

    def punch(self, offset: int, size: int) -> None:
        self._file.punch(offset, size)

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def close(self) -> None:
        super().close()
        self._file.close()


@pytest.fixture
def system_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("os", "_libc"):
        monkeypatch.setattr(storage_module, name, KERNEL)


# -- workloads


class WideSession(Session):
    """A session with all that an image can do, one letter each."""

    refused = 0
    """How often something was refused for want of space."""

    def _do(self, letter: str) -> None:
        try:
            self._do_wide(letter)
        except NoSpace as exc:
            if letter in "fckr":
                raise self.lab.fail(self.recipe, f"{letter} fails for want of space") from exc
            self.refused += 1
            raise

    def _do_wide(self, letter: str) -> None:
        image = self.image
        match letter:
            case "p":  # the end of a live group, and groups that are holes
                image.preallocate(13 * PAGE + 5, 23 * PAGE)
            case "h":
                self.seek_everything()
            case "t":
                self.try_everything()
            case "m":  # more than a small cache holds
                self.write_in_steps(10 * PAGE + 9, 8 * PAGE)
            case "e":  # beyond the end, with a gap, unaligned
                self.write_beyond(self.oracle.size + PAGE + 50, PAGE)
            case "D":  # parts of one group, then of two, then of none that is live
                self.discard(5, 2)
                self.discard(10, 4)
                self.discard(38, 2)
            case "q":  # no whole block; within one; up to the end of one
                self.discard_bytes(PAGE + 100, PAGE)
                self.discard_bytes(5 * PAGE + 100, 200)
                self.discard_bytes(2 * PAGE + 50, 4 * PAGE)
            case "A":
                self.resize(6 * PAGE)
            case "Z":
                self.resize(0)
            case "k":
                self.check_everything()
            case "n":
                memory = self.oracle.memory
                memory[:] = [memory[0], image.progress]
                image.remembering(memory[1])
                self._do("f")
                self._do("c")
                del memory[:-1]
                image.remembered(memory[0])
            case _:
                super()._do(letter)

    def check_everything(self) -> None:
        """What cannot be read is named, nothing else."""
        image = self.image
        found = image.check(data=True)
        self.acknowledged()
        start: int | None = 0
        looked_at = 0
        while start is not None:
            part = run(image.check_part_steps(start, 2, data=False))
            found += part.findings
            looked_at += part.size // image.slot_size
            start = part.next_group
        if any("cannot be read" not in finding.cause for finding in found):
            raise self.lab.fail(self.recipe, f"check finds {found}")
        if found and not self.storage.failed_call:
            raise self.lab.fail(self.recipe, f"without a failure, check finds {found}")
        if looked_at > block_count_of(self.oracle.size) * PAGE // image.group_size + 1:
            raise self.lab.fail(self.recipe, f"check looks at {looked_at} groups")

    def discard_bytes(self, offset: int, size: int) -> None:
        end = min(offset + size, self.oracle.size)
        if offset < end:
            self.oracle.write(offset, bytes(end - offset))
        self.image.discard(offset, size)
        self.acknowledged(range(offset // PAGE, block_count_of(end)), size=False)

    def write_beyond(self, offset: int, size: int) -> None:
        size = min(size, BLOCKS_MAX * PAGE - offset)
        if size <= 0:
            return
        data = b"beyond  " * (size // 8 + 1)
        self.oracle.sizes.append(offset + size)
        self.oracle.write(offset, data[:size])
        self.image.write(offset, data[:size])

    def write_in_steps(self, offset: int, size: int) -> None:
        """As a mount does: what is not accepted waits for a flush."""
        size = min(size, self.oracle.size - offset)
        for at in range(0, size, PAGE):
            data = b"stepwise" * (min(PAGE, size - at) // 8)
            self.oracle.write(offset + at, data)
            while not run(self.image.write_steps(offset + at, data)):
                run(self.image.flush_steps())

    def try_everything(self) -> None:
        """What needs no waiting, done without it; what does, in steps."""
        image = self.image
        for offset, size in ((3 * PAGE, PAGE), (PAGE + 8, 3 * PAGE - 24), (9 * PAGE - 8, 16)):
            size = min(size, self.oracle.size - offset)
            if size <= 0:
                continue
            data = b"directly" * (size // 8 + 1)
            self.oracle.write(offset, data[:size])
            if not image.try_write(offset, data[:size]):
                assert run(image.write_steps(offset, data[:size]))
            self.reads(offset, size)
        for offset in range(0, self.oracle.size, 7 * PAGE + 300):
            self.reads(offset, 5 * PAGE)

    def reads(self, offset: int, size: int) -> None:
        found = self.image.try_read(offset, size)
        if found is None:
            found = run(self.image.read_steps(offset, size))
        if bytes(found) != self.oracle.latest()[offset : offset + size]:
            raise self.lab.fail(self.recipe, f"other bytes at {offset}")
        block = offset // PAGE * PAGE
        length = PAGE * (1 + offset // PAGE % 3)
        content = sent(self.image, block, length)
        if content is not None and content != self.oracle.latest()[block : block + length]:
            raise self.lab.fail(self.recipe, f"other bytes sent of the block at {block}")

    def seek_everything(self) -> None:
        """What is called a hole reads as zeros; the walk over data and holes comes to the end."""
        latest = self.oracle.latest()
        at = 0
        while at < len(latest):
            data = self.image.seek(at, os.SEEK_DATA)
            stop = len(latest) if data is None else data
            if any(latest[at:stop]):
                raise self.lab.fail(self.recipe, f"data within the hole {at} to {stop}")
            if data is None:
                break
            hole = self.image.seek(data, os.SEEK_HOLE)
            if hole is None or not data < hole <= len(latest):
                raise self.lab.fail(self.recipe, f"after the data at {data} the hole is {hole}")
            at = hole
        if self.image.seek(len(latest), os.SEEK_HOLE) is not None:
            raise self.lab.fail(self.recipe, "something is beyond the end")


@dataclass
class FaultLab(Lab):
    """A lab whose recipes are for this module."""

    def fail(self, recipe: Recipe, text: str) -> CrashFailure:
        command = f"PYTHONPATH=. python tests/test_crash_faults.py '{recipe}'"
        return CrashFailure(f"{text}\nrecipe: {recipe}\nagain: {command}")


def begin(lab: Lab, recipe: Recipe) -> WideSession:
    """Open an image and do everything up to the last letter."""
    session = WideSession(lab, recipe, lab.fresh(), Oracle())
    for letter in PREFIXES[recipe.prefix] + recipe.letters[:-1]:
        session.do(letter)
    return session


def run_fault(lab: Lab, recipe: Recipe) -> bool:
    """Let one call fail; False when the workload has not so many."""
    session = begin(lab, recipe)
    storage, letter = session.storage, recipe.letters[-1]
    storage.fail(recipe.fault_at, recipe.fault)
    try:
        session.do(letter)
        session.do("f")
    except StorageFailed as exc:
        failed = storage.failed_call
        if recipe.fault != "eio" or failed in UNREPORTED:
            raise lab.fail(recipe, f"a failing {failed} is no reason to fail: {exc}") from exc
        after_failure(lab, recipe, session)
    except SealfsError as exc:
        raise lab.fail(recipe, f"{storage.failed_call} failed, and then {exc!r}") from exc
    else:
        if not storage.failed_call:
            session.image.abandon()
            return False
        is_told = letter == "k" and storage.failed_call in ("preadv", "preadv direct")
        # An open that cannot read a node page makes it anew, and says so.
        is_told = is_told or (letter == "r" and bool(session.image.rebuilt_nodes))
        if recipe.fault == "eio" and storage.failed_call not in UNREPORTED and not is_told:
            raise lab.fail(recipe, f"a failed {storage.failed_call} was not reported")
        if recipe.fault == "enospc":
            session.do(letter)  # there is space again
            session.do("f")
    lab.figures["failed calls"] += 1
    lab.figures[f"{recipe.fault} of {storage.failed_call}"] += 1
    aftermath(lab, recipe, session)
    return True


def aftermath(lab: Lab, recipe: Recipe, session: WideSession) -> None:
    """Another process opens what is left; sometimes its recovery is cut, or life goes on."""
    rng = lab.rng(f"{recipe}|aftermath")
    if rng.random() < 0.5:
        session.disk.evict()
    if rng.random() < AFTER_SHARE:
        after_death(lab, recipe, session)
        return
    with contextlib.suppress(SealfsError):
        session.image.abandon()
    memory = list(session.oracle.memory)
    rng.shuffle(memory)
    told, _ = lab.refcheck(SimulatedDisk.of(session.disk.device()), recipe, "after the failure")
    image = lab.reopened(lab.storage(session.disk), recipe, "after the failure", memory)
    content = lab.content(image, recipe)
    if complaint := session.oracle.complaint(content):
        raise lab.fail(recipe, f"after {recipe.fault}: {complaint}")
    if content != told:
        raise lab.fail(recipe, "sealfs and refcheck read different content")
    image.abandon()


def after_failure(lab: Lab, recipe: Recipe, session: WideSession) -> None:
    """A failed write or sync poisons; a failed read, or fallocate, has done nothing."""
    if recipe.letters[-1] == "r":
        return
    image, failed = session.image, session.storage.failed_call
    if image.poisoned is not None:
        if image.status()["poisoned"] != image.poisoned:
            raise lab.fail(recipe, "the status does not tell")
        still_refuses(lab, recipe, session)
        image.check(data=False)
        image.close()
        image.close()
        return
    if failed not in ("preadv", "preadv direct", "fallocate"):
        raise lab.fail(recipe, f"a failed {failed} does not poison")
    content = image.read(0, image.size)
    if complaint := session.oracle.complaint(content):
        raise lab.fail(recipe, f"after a failed {failed}: {complaint}")
    session.oracle.adopt(content)
    session.do("f")


SINGLE = "wsxgbdGScrfphtmeDqAZkn"
PAIRS = "pg gD Dw pZ Ze eA tf mq qk Ab kh nw he hp sr Gp Sx dh wr br pr Dr"


def wide_workloads() -> Iterator[tuple[str, str]]:
    """All letters after two prefixes, and pairs that have something to do with each other."""
    for letter in SINGLE:
        yield "settled", letter
        yield "full", letter
    yield from (("empty", letter) for letter in "pbhe")
    yield from (("settled", pair) for pair in PAIRS.split())


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize("kind", FAULTS)
def test_a_failing_system_call_is_survived_or_stops_everything(kind: str) -> None:
    lab = FaultLab(seed=21, cap_point=1, inner=0.0, again=0.02, later=0.0, storage=FileOnDisk)
    began = time.perf_counter()
    for prefix, letters in wide_workloads():
        for number in itertools.count(1):
            if not run_fault(lab, Recipe(lab.seed, prefix, letters, kind, number)):
                break
    report(lab, began)


# -- every call of an open


def left_behind(lab: Lab, letters: str) -> tuple[SimulatedDisk, Oracle]:
    """Return a disk whose process was killed, with records in its journal."""
    recipe = Recipe(lab.seed, "settled", letters)
    session = begin(lab, recipe)
    session.do(letters[-1])
    session.image.abandon()
    oracle = session.oracle.remembering(session.oracle.memory[0])
    return session.disk, oracle


def run_failing_open(lab: Lab, recipe: Recipe, disk: SimulatedDisk, oracle: Oracle) -> bool:
    """Let one call of an open fail, and open again; False when it has not so many."""
    storage = FileOnDisk(disk.clone())
    storage.rng = lab.rng(recipe)
    storage.fail(recipe.fault_at, recipe.fault)
    try:
        image = lab.open(storage, recipe, "failing", list(oracle.memory))
        storage.disarm()
        if complaint := oracle.complaint(lab.content(image, recipe)):
            raise lab.fail(
                recipe, f"a failed {storage.failed_call}, and it opens with: {complaint}"
            )
        is_told = bool(image.rebuilt_nodes)  # a node page that cannot be read is made anew
        image.abandon()
    except SealfsError as exc:
        is_due = isinstance(exc, NoSpace if recipe.fault == "enospc" else StorageFailed)
        if recipe.fault == "short" or not is_due:
            raise lab.fail(recipe, f"{storage.failed_call} failed: {exc!r}") from exc
    else:
        if recipe.fault == "eio" and storage.failed_call not in ("", *UNREPORTED) and not is_told:
            raise lab.fail(recipe, f"a failed {storage.failed_call} was not reported")
    if not storage.failed_call:
        return False
    lab.figures["failing opens"] += 1
    if recipe.fault_at % 2:
        storage.disk.evict()
    told, _ = lab.refcheck(SimulatedDisk.of(storage.disk.device()), recipe, "after it")
    image = lab.reopened(FileOnDisk(storage.disk), recipe, "again", list(oracle.memory))
    content = lab.content(image, recipe)
    image.abandon()
    if content != told or oracle.complaint(content):
        raise lab.fail(recipe, f"after the open that failed: {oracle.complaint(content)}")
    return True


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize("letters", ["wxf", "bdgf", "xSGbf", "Zpef"])
def test_an_open_that_fails_at_any_system_call_has_lost_nothing(letters: str) -> None:
    lab = FaultLab(seed=22, storage=FileOnDisk)
    disk, oracle = left_behind(lab, letters)
    for kind in ("eio", "short", "enospc"):
        for number in itertools.count(1):
            recipe = Recipe(lab.seed, "settled", letters, kind, number)
            if not run_failing_open(lab, recipe, disk, oracle):
                break
    assert lab.figures["failing opens"] > 30


@pytest.mark.usefixtures("system_calls")
def test_a_direct_read_that_stops_within_a_page_is_not_the_end_of_the_file() -> None:
    lab = FaultLab(seed=27, storage=FileOnDisk)
    disk, oracle = left_behind(lab, "wfwfwf")
    for number in itertools.count(1):
        recipe = Recipe(lab.seed, "settled", "wfwfwf", "ragged", number)
        if not run_failing_open(lab, recipe, disk, oracle):
            break
    assert lab.figures["failing opens"] > 3


# -- a storage whose space ends


class Bounded(FullStorage):
    """A storage with so much room; what an image has had so far is counted."""

    def __init__(self, disk: SimulatedDisk | None = None) -> None:
        super().__init__(disk)
        self.used = set(range(self.size() // PAGE))


def run_full(lab: Lab, recipe: Recipe) -> int:
    """Work with so many pages left; what was accepted is there after a power cut."""
    session = WideSession(lab, recipe, lab.fresh(), Oracle())
    storage = session.storage
    assert isinstance(storage, Bounded)
    for letter in PREFIXES[recipe.prefix]:
        session.do(letter)
    storage.room = len(storage.used) + recipe.fault_at
    point = itertools.count(1)
    refused = session.refused
    try:
        for letter in f"{recipe.letters}fc":
            session.do(letter)
            if letter in "fc" or session.refused > refused:
                bare = Recipe(recipe.seed, recipe.prefix, recipe.letters, "full", recipe.fault_at)
                lab.at_point(session.disk, session.oracle, bare, next(point), full=True)
            refused = session.refused
    except SealfsError as exc:
        raise lab.fail(recipe, f"not the write that needs the space: {exc!r}") from exc
    if session.image.poisoned is not None:
        raise lab.fail(recipe, f"poisoned: {session.image.poisoned}")
    if session.image.status()["slots_used"] != slots_named(session.image):
        raise lab.fail(recipe, "slots are busy that nothing names")
    session.image.abandon()
    lab.figures["refused"] += session.refused
    return session.refused


def test_a_full_storage_refuses_writes_and_loses_none_that_was_accepted() -> None:
    lab = FaultLab(seed=23, cap_point=1, inner=0.02, again=0.1, later=0.0, storage=Bounded)
    began = time.perf_counter()
    for prefix in ("empty", "settled", "full"):
        for letters in (
            "bpg",
            "pwb",
            "gbx",
            "tGeD",
            "bdxg",
            "xZbw",
            "dgAb",
            "wgkb",
            "mqbn",
            "gSGb",
        ):
            for room in (0, 1, 3, 6, 9, 14, 22):
                run_full(lab, Recipe(lab.seed, prefix, letters, "full", room))
    report(lab, began)
    assert lab.figures["refused"] > 100


# -- power cuts


def run_power_cuts(lab: Lab, recipe: Recipe) -> None:
    session = begin(lab, recipe)
    session.on_acknowledge = lab.watch(session.storage, session.oracle, recipe, None)
    for letter in f"{recipe.letters[-1]}f":
        session.do(letter)
    if session.image.read(0, session.image.size) != session.oracle.latest():
        raise lab.fail(recipe, "the running image reads other bytes than were written")
    session.image.abandon()


@pytest.mark.parametrize("cache_blocks", [BLOCKS_MAX, 5])
def test_wide_workloads_survive_power_cuts(cache_blocks: int) -> None:
    lab = FaultLab(
        seed=24, cap_point=1, inner=0.01, again=0.05, later=0.0, cache_blocks=cache_blocks
    )
    began = time.perf_counter()
    for prefix, letters in wide_workloads():
        run_power_cuts(lab, Recipe(lab.seed, prefix, letters))
    report(lab, began)
    assert lab.figures["states"] >= 300


def test_a_full_epoch_table_refuses_writes_and_opens_after_every_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Geometry, "table_rows_max", 12)
    lab = FaultLab(seed=25, cap_point=1, inner=0.1, again=0.2, later=0.0)
    disk, oracle = lab.fresh(), Oracle()
    for number in range(13):
        # Each of these processes is killed; its block names an epoch of its own.
        recipe = Recipe(lab.seed, "table", f"row{number}")
        session = WideSession(lab, recipe, disk, oracle)
        session.on_acknowledge = lab.watch(session.storage, oracle, recipe, None)
        try:
            session.write(number * PAGE, PAGE)
        except NoSpace:
            oracle.adopt(session.image.read(0, oracle.size))
            break
        session.do("f")
        session.image.abandon()
    else:
        pytest.fail("the table never filled up")
    for letter in "fck":
        session.do(letter)
    session.image.close()
    storage = Bounded(disk)
    image = lab.reopened(storage, recipe, "full", oracle.memory)
    assert lab.content(image, recipe) == oracle.latest()
    image.abandon()


# -- do these tests bite? Each mutant does without something that a failing call calls for.


def swallowing_sync(self: FileStorage) -> None:
    with contextlib.suppress(OSError):
        KERNEL.fdatasync(self._fd)


def single_write(self: FileStorage, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
    try:
        KERNEL.pwritev(self._fd, buffers, offset, flags)
    except OSError as exc:
        raise StorageFailed(self.path, str(exc)) from exc


def single_fallocate(fd: int, mode: int, offset: int, size: int) -> None:
    if KERNEL.fallocate(fd, mode, offset, size) != 0:
        raise OSError(ctypes.get_errno(), "simulated")


MUTANTS: dict[str, tuple[object, str, object]] = {
    "takes a failed sync for a good one": (FileStorage, "sync", swallowing_sync),
    "does not go on after a short write": (FileStorage, "_write", single_write),
    "gives up when it is interrupted": (storage_module, "_fallocate", single_fallocate),
    "goes on after a failure": (SealedImage, "_guarded", lambda self, steps: steps),
    "reserves no space": (Space, "reserve", lambda self, slot, index, count: None),
    "keeps what it reserved for a write it refused": (
        Committer, "drop_unused_slots", lambda self: None,
    ),
}  # fmt: skip


def bitten() -> str:
    """Return what notices a mutant, empty if nothing does."""
    full = FaultLab(seed=26, cap_point=1, inner=0.0, again=0.0, later=0.0, storage=Bounded)
    lab = dataclasses.replace(full, storage=FileOnDisk, figures=Counter(), seen=set(), base=None)
    words = ("w", "g", "b", "p", "r", "t", "x", "gw", "bS", "gd")
    try:
        for letters, room in itertools.product(("bpg", "gbx", "tGeD", "bdxg"), (3, 6, 14)):
            run_full(full, Recipe(full.seed, "empty", letters, "full", room))
        for letters, kind in itertools.product(words, FAULTS):
            for number in range(1, 30):
                if not run_fault(lab, Recipe(lab.seed, "settled", letters, kind, number)):
                    break
    except (CrashFailure, StorageFailed) as exc:
        return str(exc).splitlines()[0]
    return ""


@pytest.mark.usefixtures("system_calls")
@pytest.mark.parametrize("name", MUTANTS)
def test_an_image_is_caught_that(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, replacement = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, replacement)
    caught = bitten()
    assert caught
    print(f"\n{name}: {caught}")


def repeat(asked: Recipe) -> None:
    """Run what a failure has printed."""
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS)
    set_limit("PREALLOCATE_GROUPS", 2)
    for name in ("os", "_libc"):
        setattr(storage_module, name, KERNEL)
    bare = dataclasses.replace(asked, choices=())
    lab = FaultLab(seed=asked.seed, only=asked if asked.choices else None)
    if asked.fault == "full":
        run_full(dataclasses.replace(lab, storage=Bounded), bare)
    elif asked.fault:
        run_fault(dataclasses.replace(lab, storage=FileOnDisk), bare)
    else:
        for cache_blocks in (BLOCKS_MAX, 5):
            fresh = FaultLab(seed=asked.seed, only=lab.only, cache_blocks=cache_blocks)
            run_power_cuts(fresh, bare)
    print(f"{asked}: survived")


if __name__ == "__main__":
    repeat(Recipe.parse(sys.argv[1]))
