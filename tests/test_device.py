"""Waiting for requests of /dev/fuse; the reads that are answered and writes accepted meanwhile.

A socket pair stands in for the device: each read gives one whole request. What both kinds do is
asked of both; only the C one answers.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import mmap
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sending import quickly_sent
from test_quick import BLOCKS, PAGE, content_of, contents_of
from test_quick import image as image  # a fixture

from sealfs.image.cache import BlockCache
from sealfs.image.image import SealedImage
from sealfs.image.outbox import outbox
from sealfs.mount import protocol
from sealfs.mount.device import BUSY, IDLE, OTHERS, PlainDevice
from sealfs.mount.protocol import (
    IN_HEADER,
    OUT_HEADER,
    READ_IN,
    WRITE_CACHE,
    WRITE_IN,
    WRITE_OUT,
    Opcode,
)

_device = pytest.importorskip("sealfs.mount._device", reason="tools/setup builds it")

SOON = 0.05
CACHE = SimpleNamespace(memory=None, free=[])
LONG = 10**10
A_MOMENT = 3_000_000
ANSWERED_MAX = 64

Kind = Any


class Ends:
    """A device, the kernel's end, what its answers that were not taken failed with."""

    def __init__(
        self, kind: Kind, *, others: tuple[int, ...] = (), size: int = 1 << 17, cache: Any = CACHE
    ) -> None:
        self.kernel, self.own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self.own):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 21)
        self.buffer = mmap.mmap(-1, size)
        self.handles: dict[int, Any] = {}
        self.failed: list[list[int]] = []
        self.box = outbox(self.own.fileno())
        self.device = kind(
            self.own.fileno(),
            self.buffer,
            others,
            self.handles,
            self.box,
            self.failed.append,
            cache,
        )

    def next(self, nanoseconds: int = 0, is_lone: bool = False) -> int:
        found: int = self.device.next(nanoseconds, is_lone)
        return found

    def ask(self, request: bytes) -> None:
        self.kernel.send(request)

    def ask_alone(self, request: bytes) -> None:
        """Ask something of any size, after which the device is at its end."""
        file = os.memfd_create("request")
        os.write(file, request)
        os.lseek(file, 0, os.SEEK_SET)
        os.dup2(file, self.own.fileno())
        os.close(file)

    def answers(self) -> list[bytes]:
        """Return what has arrived at the kernel's end."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.kernel.recv(1 << 20))
        return found

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.device.requests, self.device.runs, self.device.answered

    def close(self) -> None:
        self.kernel.close()
        self.own.close()


@pytest.fixture(params=["C", "Python"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return _device.Device if request.param == "C" else PlainDevice


@pytest.fixture
def ends(kind: Kind) -> Iterator[Ends]:
    made = Ends(kind)
    yield made
    made.close()


@pytest.fixture
def quick_ends() -> Iterator[Ends]:
    """One that answers."""
    made = Ends(_device.Device)
    yield made
    made.close()


class Quick:
    """Answers with what it was asked for; `is_able` whether it does."""

    def __init__(self, is_able: object = True) -> None:
        self.is_able = is_able
        self.asked: list[tuple[int, int]] = []

    def answer(self, offset: int, size: int, box: Any, header: bytes) -> object:
        self.asked.append((offset, size))
        if self.is_able is True:
            box.put(header, offset.to_bytes(8, "little"))
        return self.is_able


def read_request(
    fh: int, offset: int, size: int, *, unique: int = 7, opcode: int = Opcode.READ,
    length: int | None = None, tail: bytes = b"",
) -> bytes:  # fmt: skip
    body = READ_IN.pack(fh, offset, size, 0, 0, 0, 0) + tail
    whole = IN_HEADER.size + len(body) if length is None else length
    return IN_HEADER.pack(whole, opcode, unique, 9, 0, 0, 1, 0, 0) + body


def test_this_checkout_uses_the_c_module() -> None:
    assert importlib.import_module("sealfs.mount.lane").Device is _device.Device


# Waiting.


def test_what_comes_is_taken_with_its_size(ends: Ends) -> None:
    for request in (b"request", b"x", os.urandom(1 << 17), b"more"):
        ends.ask(request)
        assert ends.next(LONG) == len(request)
        assert ends.buffer[: len(request)] == request
    for nanoseconds in (0, LONG):  # there already, and none after it
        ends.ask(b"one")
        ends.ask(b"another")
        assert ends.next(nanoseconds) == 3
        assert ends.next(nanoseconds) == 7
        assert ends.buffer[:7] == b"another"
    assert ends.next() == IDLE


def test_what_comes_while_it_spins_is_taken(ends: Ends) -> None:
    threading.Timer(SOON, ends.ask, (b"request",)).start()
    assert ends.next(LONG) == 7
    assert ends.buffer[:7] == b"request"


def test_it_waits_for_so_long_and_without_nanoseconds_not_at_all(ends: Ends) -> None:
    start = time.monotonic_ns()
    assert ends.next(A_MOMENT) == IDLE
    assert time.monotonic_ns() - start >= A_MOMENT
    start = time.monotonic_ns()
    for nanoseconds in [0, -1, -LONG] * 20:
        assert ends.next(nanoseconds) == IDLE
    assert time.monotonic_ns() - start < 60 * A_MOMENT


def test_others_are_told_of_while_it_spins_alone(kind: Kind) -> None:
    (first, to_first), (second, to_second) = os.pipe(), os.pipe()
    ends = Ends(kind, others=(first, second))
    assert ends.next(A_MOMENT) == IDLE
    for each, to_each in ((second, to_second), (first, to_first)):
        threading.Timer(SOON, os.write, (to_each, b"x")).start()
        assert ends.next(LONG) == OTHERS
        assert ends.next(LONG) == OTHERS  # until it was read
        assert ends.next(0) == IDLE
        ends.ask(b"request")
        assert ends.next(LONG) == 7  # the device comes first
        os.read(each, 1)
        assert ends.next(A_MOMENT) == IDLE
    os.close(to_first)
    assert ends.next(LONG) == OTHERS  # closed by its other end
    for fd in (first, second, to_second):
        os.close(fd)
    ends.close()


def test_the_end_is_a_request_of_no_bytes(ends: Ends) -> None:
    ends.kernel.close()
    assert ends.next(LONG) == 0
    assert ends.next(0) == 0


@pytest.mark.parametrize("nanoseconds", [0, LONG])
def test_a_read_that_fails_is_an_error(ends: Ends, nanoseconds: int) -> None:
    ends.ask(b"request")
    ends.own.close()
    with pytest.raises(OSError, match="Bad file descriptor") as info:
        ends.next(nanoseconds)
    assert info.value.errno == errno.EBADF
    assert ends.counts == (0, 0, 0)


def test_what_fails_or_ends_while_it_spins_is_told(kind: Kind) -> None:
    waiting, writing = os.pipe2(os.O_NONBLOCK)
    device = kind(waiting, mmap.mmap(-1, PAGE), (), {}, outbox(-1), print, CACHE)
    threading.Timer(SOON, os.close, (waiting,)).start()
    with pytest.raises(OSError, match="Bad file descriptor"):
        device.next(LONG, False)
    os.close(writing)
    ends = Ends(kind)
    threading.Timer(SOON, ends.kernel.close).start()
    assert ends.next(LONG) == 0
    ends.close()


# The outbox.


def test_answers_are_sent_when_there_is_nothing_to_read(ends: Ends) -> None:
    ends.ask(b"one")
    ends.ask(b"two")
    assert ends.next() == 3
    ends.box.put(b"answer ", b"1")
    assert ends.next(LONG) == 3  # another request waits: kept back
    assert ends.box.count == 1
    assert ends.answers() == []
    ends.box.put(b"answer ", b"2")
    assert ends.next() == IDLE
    assert ends.answers() == [b"answer 1", b"answer 2"]
    ends.box.put(b"answer ", b"3")
    threading.Timer(SOON, ends.ask, (b"three",)).start()
    assert ends.next(LONG) == 5  # sent before it spins, not after
    assert ends.answers() == [b"answer 3"]
    ends.box.put(b"answer ", b"4")
    assert ends.next(A_MOMENT) == IDLE
    assert ends.answers() == [b"answer 4"]
    assert ends.failed == []


def test_answers_that_are_not_taken_are_told_of_at_once(kind: Kind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    waiting, writing = os.pipe2(os.O_NONBLOCK)
    box = outbox(ours.fileno())
    failed: list[list[int]] = []
    device = kind(waiting, mmap.mmap(-1, PAGE), (), {}, box, failed.append, CACHE)
    theirs.close()
    for nanoseconds in (0, A_MOMENT):
        box.put(b"head", b"1")
        box.put(b"head", b"2")
        assert device.next(nanoseconds, False) == IDLE
        assert device.next(nanoseconds, False) == IDLE
        assert failed.pop() == [errno.EPIPE, errno.EPIPE]
        assert not failed
    for each in (ours, waiting, writing):
        each.close() if isinstance(each, socket.socket) else os.close(each)


def test_what_is_raised_by_who_is_told_is_raised(kind: Kind) -> None:
    def not_taken(codes: list[int]) -> None:
        raise RuntimeError(f"told of {codes}")

    class Refusing:
        def flush(self) -> list[int]:
            raise RuntimeError("does not flush")

    waiting, writing = os.pipe2(os.O_NONBLOCK)
    box = SimpleNamespace(flush=lambda: [errno.EIO])
    with pytest.raises(RuntimeError, match=r"told of \[5\]"):
        kind(waiting, mmap.mmap(-1, PAGE), (), {}, box, not_taken, CACHE).next(0, False)
    with pytest.raises(RuntimeError, match="does not flush"):
        kind(waiting, mmap.mmap(-1, PAGE), (), {}, Refusing(), not_taken, CACHE).next(0, False)
    for fd in (waiting, writing):
        os.close(fd)


# Counting.


def test_requests_and_runs_are_counted(ends: Ends) -> None:
    assert ends.counts == (0, 0, 0)
    assert ends.next() == IDLE
    assert ends.counts == (0, 0, 0)  # none after none is no run
    for length in (3, 1, 2):
        for _ in range(length):
            ends.ask(b"request")
        for _ in range(length):
            assert ends.next(LONG) == 7
    assert ends.counts == (6, 0, 0)  # it was never without one
    for _ in range(3):
        assert ends.next(0) == IDLE
    assert ends.counts == (6, 1, 0)
    for number in range(4):
        threading.Timer(SOON / 10, ends.ask, (b"request",)).start()
        assert ends.next(LONG) == 7
        assert ends.counts == (7 + number, 1 + number, 0)
    ends.kernel.close()
    assert ends.next() == 0
    assert ends.counts == (11, 4, 0)


def test_what_was_counted_cannot_be_changed(quick_ends: Ends) -> None:
    for name in ("requests", "runs", "answered"):
        with pytest.raises(AttributeError):
            setattr(quick_ends.device, name, 1)


# Reads answered here, and those that are not.


def test_a_read_is_answered_and_the_next_request_is_returned(quick_ends: Ends) -> None:
    quick = Quick()
    quick_ends.handles[5] = SimpleNamespace(quick=quick)
    quick_ends.ask(read_request(5, 1 << 40, PAGE, unique=(1 << 64) - 2))
    quick_ends.ask(b"something else")
    assert quick_ends.next(LONG) == 14
    assert quick_ends.buffer[:14] == b"something else"
    assert quick.asked == [(1 << 40, PAGE)]
    assert quick_ends.counts == (2, 0, 1)
    assert quick_ends.box.count == 1
    assert quick_ends.next() == IDLE
    assert quick_ends.counts == (2, 1, 1)
    header = OUT_HEADER.pack(OUT_HEADER.size + PAGE, 0, (1 << 64) - 2)
    assert quick_ends.answers() == [header + (1 << 40).to_bytes(8, "little")]


def test_the_twin_answers_nothing_by_itself() -> None:
    ends, quick = Ends(PlainDevice), Quick()
    ends.handles[5] = SimpleNamespace(quick=quick)
    request = read_request(5, 0, PAGE)
    ends.ask(request)
    assert ends.next(LONG) == len(request)
    assert quick.asked == []
    assert ends.counts == (1, 0, 0)
    ends.close()


def test_a_guest_that_waits_for_each_answer_gets_it_at_once(quick_ends: Ends) -> None:
    quick_ends.handles[5] = SimpleNamespace(quick=Quick())
    for is_lone in (True, False):
        for number in range(3):
            quick_ends.ask(read_request(5, number * PAGE, PAGE, unique=number))
        quick_ends.ask(b"else")
        assert quick_ends.next(LONG, is_lone) == 4
        assert len(quick_ends.answers()) == (3 if is_lone else 0)
    assert quick_ends.next() == IDLE
    assert len(quick_ends.answers()) == 3


def test_who_is_told_while_it_answers_may_raise(quick_ends: Ends) -> None:
    def not_taken(codes: list[int]) -> None:
        raise RuntimeError("told")

    box = SimpleNamespace(flush=lambda: [errno.EIO], put=lambda header, content: None)
    handles = {5: SimpleNamespace(quick=Quick())}
    own, buffer = quick_ends.own.fileno(), quick_ends.buffer
    device = _device.Device(own, buffer, (), handles, box, not_taken, CACHE)
    quick_ends.ask(read_request(5, 0, PAGE))
    with pytest.raises(RuntimeError, match="told"):
        device.next(LONG, True)
    assert device.answered == 1


def test_after_so_many_in_a_row_others_may_run(quick_ends: Ends) -> None:
    quick = Quick()
    quick_ends.handles[5] = SimpleNamespace(quick=quick)
    for number in range(2 * ANSWERED_MAX + 3):
        quick_ends.ask(read_request(5, number * PAGE, PAGE, unique=number))
    assert quick_ends.next(LONG) == BUSY
    assert quick_ends.counts == (ANSWERED_MAX, 0, ANSWERED_MAX)
    assert quick_ends.next(0) == BUSY
    assert quick_ends.next(0) == IDLE
    assert quick_ends.counts == (2 * ANSWERED_MAX + 3, 1, 2 * ANSWERED_MAX + 3)
    uniques = [OUT_HEADER.unpack_from(answer)[2] for answer in quick_ends.answers()]
    assert uniques == list(range(2 * ANSWERED_MAX + 3))
    # One below it, and another request: that is what is returned.
    for number in range(ANSWERED_MAX - 1):
        quick_ends.ask(read_request(5, 0, PAGE, unique=number))
    quick_ends.ask(b"else")
    assert quick_ends.next(LONG) == 4


HANDED_ON = {
    "no request": b"",
    "a stump": b"request",
    "a header alone": IN_HEADER.pack(IN_HEADER.size, Opcode.READ, 7, 9, 0, 0, 1, 0, 0),
    "one byte too short": read_request(5, 0, PAGE, length=79)[:-1],
    "a length that is too small": read_request(5, 0, PAGE, length=79),
    "a length that is too large": read_request(5, 0, PAGE, length=81),
    "a length of nothing": read_request(5, 0, PAGE, length=0),
    "a write": read_request(5, 0, PAGE, opcode=Opcode.WRITE),
    "an opcode of no kind": read_request(5, 0, PAGE, opcode=Opcode.READ | 1 << 31),
    "an offset below zero": read_request(5, 1 << 63, PAGE),
    "the last offset": read_request(5, (1 << 64) - PAGE, PAGE),
    "no such handle": read_request(4, 0, PAGE),
    "a handle of many bits": read_request(5 | 1 << 63, 0, PAGE),
    "a handle that has none": read_request(6, 0, PAGE),
    "a handle without the attribute": read_request(7, 0, PAGE),
    "one that cannot": read_request(8, 0, PAGE),
    "one that says nothing": read_request(9, 0, PAGE),
    "one that says something": read_request(10, 0, PAGE),
    "one that raises": read_request(11, 0, PAGE),
    "one that cannot be called": read_request(12, 0, PAGE),
    "one that is interrupted": read_request(13, 0, PAGE),
}


class Raising:
    def __init__(self, failure: BaseException) -> None:
        self.failure = failure

    def answer(self, *_: object) -> bool:
        raise self.failure


@pytest.mark.parametrize("name", HANDED_ON)
def test_what_is_not_answered_is_handed_on_as_it_was(name: str, ends: Ends) -> None:
    untouched = Quick()
    ends.handles.update({
        5: SimpleNamespace(quick=untouched),
        6: SimpleNamespace(quick=None),
        7: SimpleNamespace(),
        8: SimpleNamespace(quick=Quick(False)),
        9: SimpleNamespace(quick=Quick(None)),
        10: SimpleNamespace(quick=Quick(1)),
        11: SimpleNamespace(quick=Raising(RuntimeError("a bug"))),
        12: SimpleNamespace(quick=5),
        13: SimpleNamespace(quick=Raising(KeyboardInterrupt())),
    })  # fmt: skip
    request = HANDED_ON[name]
    if request:
        ends.ask(request)
    else:
        ends.kernel.close()
    ends.buffer[:128] = b"\xee" * 128
    assert ends.next(LONG, True) == len(request)
    assert ends.buffer[:128] == request.ljust(128, b"\xee")
    assert untouched.asked == []
    assert ends.counts == (1, 0, 0)
    assert ends.box.count == 0
    if request:
        assert ends.answers() == []
        ends.ask(b"the next one")  # nothing of it is left behind
        assert ends.next(LONG) == 12


def test_a_request_that_is_longer_than_it_has_to_be_is_answered(quick_ends: Ends) -> None:
    """A later kernel's, as the long way takes them."""
    quick = Quick()
    quick_ends.handles[5] = SimpleNamespace(quick=quick)
    quick_ends.ask(read_request(5, 0, PAGE, tail=b"of a later version"))
    assert quick_ends.next() == IDLE
    assert quick_ends.counts == (1, 1, 1)


def test_what_it_refers_to_is_held_and_let_go_of() -> None:
    class Handle:
        quick: object
        device: Any

    handle = Handle()
    handle.quick = Quick()
    waiting, writing = os.pipe2(os.O_NONBLOCK)
    box = SimpleNamespace(flush=list)
    handles = {5: handle}
    handle.device = _device.Device(waiting, mmap.mmap(-1, PAGE), (), handles, box, print, CACHE)
    assert handle.device.next(0, False) == IDLE
    gone = weakref.ref(handle)
    del handle, handles
    gc.collect()
    assert gone() is None
    for fd in (waiting, writing):
        os.close(fd)


def test_the_buffer_stays_mapped(quick_ends: Ends) -> None:
    with pytest.raises(BufferError):
        quick_ends.buffer.close()


def test_sizes_that_do_not_fit_are_refused(quick_ends: Ends) -> None:
    fd, buffer = quick_ends.own.fileno(), bytearray(80)
    make = _device.Device
    make(fd, buffer, (fd,) * 8, {}, None, print, CACHE)
    with pytest.raises(ValueError, match="sizes do not fit"):
        make(fd, buffer, (fd,) * 9, {}, None, print, CACHE)
    with pytest.raises(ValueError, match="sizes do not fit"):
        make(fd, bytearray(79), (), {}, None, print, CACHE)
    buffer.append(0)  # whoever was refused holds it no longer
    wrongs: tuple[tuple[Any, ...], ...] = (
        (fd, b"x" * 80, (), {}, None, print, CACHE),
        (fd, buffer, [], {}, None, print, CACHE),
        (fd, buffer, (), [], None, print, CACHE),
        (fd, buffer, ("x",), {}, None, print, CACHE),
        (fd, buffer, (), {}, None, print),
        ("x", buffer, (), {}, None, print, CACHE),
    )
    for wrong in wrongs:
        with pytest.raises((TypeError, BufferError)):
            make(*wrong)
    buffer.append(0)
    for wrong_call in ((), (0,), (0, 0, 0), ("x", 0)):
        with pytest.raises(TypeError):
            quick_ends.device.next(*wrong_call)
    with pytest.raises(OverflowError):
        quick_ends.device.next(1 << 63, False)


def test_the_longest_time_is_no_overflow(kind: Kind) -> None:
    other, writing = os.pipe()
    ends = Ends(kind, others=(other,))
    threading.Timer(SOON, os.write, (writing, b"x")).start()
    assert ends.next((1 << 63) - 1) == OTHERS
    ends.close()
    for fd in (other, writing):
        os.close(fd)


# With an image.


def served(ends: Ends, nanoseconds: int, *, is_lone: bool = False) -> list[bytes]:
    """Have all that was asked answered; a request for a page that is busy is asked again."""
    while (count := ends.next(nanoseconds, is_lone)) >= 0:
        ends.ask(ends.buffer[:count])
        time.sleep(0.01)
    assert count == IDLE
    return ends.answers()


def test_a_guest_that_reads_at_random_gets_each_block(quick_ends: Ends, image: SealedImage) -> None:
    rng, wanted = random.Random(3), {}
    quick_ends.handles[1] = SimpleNamespace(quick=image.quick())
    for unique in range(400):
        block = rng.randrange(64, BLOCKS - 32)
        count = rng.choice((1, 1, 4, 32))
        if block // 128 != (block + count - 1) // 128:
            count = 1
        wanted[unique] = contents_of(block, count)
        quick_ends.ask(read_request(1, block * PAGE, count * PAGE, unique=unique))
        if unique == 399 or rng.random() < 0.3 or count == 32:  # more is not taken by a socket
            for answer in served(quick_ends, A_MOMENT, is_lone=rng.random() < 0.5):
                length, code, number = OUT_HEADER.unpack_from(answer)
                assert (length, code) == (len(answer), 0)
                assert answer[OUT_HEADER.size :] == wanted.pop(number)
    assert not wanted
    assert quick_ends.failed == []
    assert quick_ends.device.answered == 400


def test_what_the_image_cannot_answer_is_handed_on(quick_ends: Ends, image: SealedImage) -> None:
    quick = image.quick()
    quick_ends.handles[1] = SimpleNamespace(quick=quick)
    assert image.try_write(70 * PAGE, content_of(1))
    for number, (offset, size) in enumerate((
        (0, PAGE), (70 * PAGE, PAGE), (BLOCKS * PAGE, PAGE), (80 * PAGE + 1, PAGE),
        (80 * PAGE, 0), (80 * PAGE, 33 * PAGE), (80 * PAGE, (1 << 32) - PAGE),
    )):  # fmt: skip
        request = read_request(1, offset, size)
        quick_ends.ask(request)
        assert quick_ends.next(LONG) == len(request)
        assert quick_ends.buffer[: len(request)] == request
        assert quick_ends.counts == (number + 1, 0, 0)
    assert quick_ends.box.count == 0
    quick_ends.ask(read_request(1, 80 * PAGE, PAGE))
    assert served(quick_ends, 0) == [
        protocol.OUT_HEADER.pack(16 + PAGE, 0, 7) + content_of(80)
    ]  # fmt: skip
    image.abandon()
    request = read_request(1, 80 * PAGE, PAGE)
    quick_ends.ask(request)
    assert quick_ends.next(LONG) == len(request)
    assert quickly_sent(quick, 80 * PAGE) is None


# Writes accepted here, and those that are not.


FRAMES = 600
LONGEST = 256 * PAGE
LONG_WRITE = 64 << 10
ROOM = LONGEST + (64 << 10)  # what the lane has
WRITE_START = IN_HEADER.size + WRITE_IN.size


class Taker:
    """Accepts what it is told to; `taken`: offset, content and whether that was in the frames."""

    def __init__(self, cache: Any = None, is_able: object = True) -> None:
        self.cache, self.is_able = cache, is_able
        self.taken: list[tuple[int, bytes, bool]] = []

    def take(self, offset: int, content: memoryview) -> object:
        if self.is_able is not True:
            return self.is_able
        self.taken.append((offset, bytes(content), False))
        return True

    def take_landed(self, offset: int, size: int) -> object:
        if self.is_able is not True:
            return self.is_able
        frames = self.cache.free[: -1 - -(-size // PAGE) : -1]
        content = b"".join(self.cache.view[at * PAGE : (at + 1) * PAGE] for at in frames)
        self.taken.append((offset, content[:size], True))
        return True


class TakerRaising:
    def __init__(self, failure: BaseException) -> None:
        self.failure = failure

    def take(self, *_: object) -> bool:
        raise self.failure

    take_landed = take


def handle_of(taker: object, buffered: object = 0) -> SimpleNamespace:
    return SimpleNamespace(quick=None, taker=taker, disk=SimpleNamespace(buffered_handles=buffered))


def write_request(
    fh: int, offset: int, data: bytes, *, unique: int = 7, flags: int = 0, kind: int = 0,
    opcode: int = Opcode.WRITE, length: int | None = None, size: int | None = None,
) -> bytes:  # fmt: skip
    size = len(data) if size is None else size
    body = WRITE_IN.pack(fh, offset, size, kind, 0, flags, 0) + data
    whole = IN_HEADER.size + len(body) if length is None else length
    return IN_HEADER.pack(whole, opcode, unique, 9, 0, 0, 1, 0, 0) + body


def written(size: int, unique: int = 7) -> bytes:
    return WRITE_OUT.pack(WRITE_OUT.size, 0, unique, size, 0)


def cached(frames: int = FRAMES) -> BlockCache:
    cache = BlockCache(0, frames * PAGE)
    cache.attach()
    return cache


class Writes(Ends):
    """One whose buffer is as large as the lane's, beside a cache."""

    def __init__(self, kind: Kind, cache: Any = None) -> None:
        self.cache = cached() if cache is None else cache
        super().__init__(kind, size=ROOM, cache=self.cache)
        self.taker = Taker(self.cache)
        self.handles[5] = handle_of(self.taker)

    def expect_long(self) -> None:
        """Have it expect a long write: one was, which nobody accepted."""
        request = write_request(4, 0, bytes(LONG_WRITE))
        self.ask(request)
        assert self.next(LONG) == len(request)

    @property
    def taken(self) -> int:
        found: int = self.device.taken
        return found


@pytest.fixture
def writes() -> Iterator[Writes]:
    """One that accepts."""
    made = Writes(_device.Device)
    yield made
    made.close()


@pytest.fixture
def any_writes(kind: Kind) -> Iterator[Writes]:
    made = Writes(kind)
    yield made
    made.close()


def test_a_write_is_accepted_and_the_next_request_is_returned(writes: Writes) -> None:
    data = os.urandom(PAGE)
    writes.ask(write_request(5, 1 << 40, data, unique=(1 << 64) - 2))
    writes.ask(b"something else")
    assert writes.next(LONG) == 14
    assert writes.buffer[:14] == b"something else"
    assert writes.taker.taken == [(1 << 40, data, False)]
    assert (writes.taken, writes.counts) == (1, (2, 0, 0))
    assert writes.box.count == 1
    assert writes.next() == IDLE
    assert writes.answers() == [written(PAGE, (1 << 64) - 2)]
    with pytest.raises(AttributeError):
        writes.device.taken = 0


def test_the_twin_accepts_nothing_by_itself() -> None:
    writes = Writes(PlainDevice)
    request = write_request(5, 0, bytes(PAGE))
    writes.ask(request)
    assert writes.next(LONG) == len(request)
    assert writes.taker.taken == []
    assert writes.taken == 0
    writes.close()


def test_a_guest_that_waits_for_each_write_gets_its_answer_at_once(writes: Writes) -> None:
    for is_lone in (True, False):
        for number in range(3):
            writes.ask(write_request(5, number * PAGE, bytes(PAGE), unique=number))
        writes.ask(b"else")
        assert writes.next(LONG, is_lone) == 4
        assert writes.answers() == [written(PAGE, number) for number in range(3)] * is_lone
    assert writes.next() == IDLE
    assert len(writes.answers()) == 3


def test_after_so_many_writes_others_may_run(writes: Writes) -> None:
    for number in range(ANSWERED_MAX + 1):
        request = write_request if number % 2 else read_request
        content: Any = bytes(PAGE) if number % 2 else PAGE
        writes.ask(request(5, 0, content, unique=number))
        writes.handles[5].quick = Quick()
    assert writes.next(LONG) == BUSY
    assert writes.taken == ANSWERED_MAX // 2
    assert writes.next(0) == IDLE
    assert len(writes.answers()) == ANSWERED_MAX + 1


@pytest.mark.parametrize("is_long", [False, True])
@pytest.mark.parametrize(
    ("flags", "kind_", "buffered", "is_accepted"),
    [
        (os.O_RDWR, 0, 3, True),
        (os.O_DIRECT, 0, 0, True),
        (os.O_DIRECT, WRITE_CACHE, 3, True),
        (os.O_DIRECT, 0, 1, False),
        (os.O_DIRECT, 2, 1, False),
        (os.O_DIRECT, 0, None, True),
        (os.O_DSYNC, 0, 0, False),
        (os.O_SYNC, 0, 0, False),
        (os.O_SYNC & ~os.O_DSYNC, 0, 0, True),  # no open file has that
        (os.O_DSYNC | os.O_DIRECT, WRITE_CACHE, 0, False),
    ],
)
def test_what_a_task_has_to_look_after_is_handed_on(
    flags: int, kind_: int, buffered: object, is_accepted: bool, is_long: bool, writes: Writes
) -> None:
    if is_long:
        writes.expect_long()
    writes.handles[5].disk.buffered_handles = buffered
    data = os.urandom(2 * PAGE)
    request = write_request(5, PAGE, data, flags=flags, kind=kind_)
    writes.ask(request)
    if is_accepted:
        assert writes.next() == IDLE
        assert writes.taker.taken == [(PAGE, data, is_long)]
        assert writes.answers() == [written(2 * PAGE)]
    else:
        assert writes.next() == len(request)
        assert writes.buffer[: len(request)] == request
        assert writes.taker.taken == []
        assert writes.answers() == []


DATA = random.Random(1).randbytes(3 * PAGE)
NOT_ACCEPTED = {
    "a header alone": IN_HEADER.pack(IN_HEADER.size, Opcode.WRITE, 7, 9, 0, 0, 1, 0, 0),
    "one byte too short": write_request(5, 0, b"")[:-1],
    "a length that is too small": write_request(5, 0, DATA, length=WRITE_START + len(DATA) - 1),
    "a length that is too large": write_request(5, 0, DATA, length=WRITE_START + len(DATA) + 1),
    "a length of nothing": write_request(5, 0, DATA, length=0),
    "a size that is too small": write_request(5, 0, DATA, size=len(DATA) - PAGE),
    "a size that is too large": write_request(5, 0, DATA, size=len(DATA) + PAGE),
    "a size that is far too large": write_request(5, 0, DATA, size=(1 << 32) - WRITE_START),
    "a read": write_request(5, 0, DATA, opcode=Opcode.READ),
    "an opcode of no kind": write_request(5, 0, DATA, opcode=Opcode.WRITE | 1 << 31),
    "an offset below zero": write_request(5, 1 << 63, DATA),
    "the last offset": write_request(5, (1 << 64) - PAGE, DATA),
    "no such handle": write_request(4, 0, DATA),
    "a handle of many bits": write_request(5 | 1 << 63, 0, DATA),
    "a handle that has none": write_request(6, 0, DATA),
    "a handle without the attribute": write_request(7, 0, DATA),
    "one that cannot": write_request(8, 0, DATA),
    "one that says nothing": write_request(9, 0, DATA),
    "one that says something": write_request(10, 0, DATA),
    "one that raises": write_request(11, 0, DATA),
    "one that cannot be called": write_request(12, 0, DATA),
    "one that is interrupted": write_request(13, 0, DATA),
    "one without a disk": write_request(14, 0, DATA, flags=os.O_DIRECT),
    "one whose disk does not count": write_request(15, 0, DATA, flags=os.O_DIRECT),
}


@pytest.mark.parametrize("name", NOT_ACCEPTED)
def test_a_write_that_is_not_accepted_is_handed_on_as_it_was(name: str, any_writes: Writes) -> None:
    writes, untouched = any_writes, any_writes.taker
    writes.handles.update({
        6: handle_of(None), 7: SimpleNamespace(), 8: handle_of(Taker(None, False)),
        9: handle_of(Taker(None, None)), 10: handle_of(Taker(None, 1)),
        11: handle_of(TakerRaising(RuntimeError("a bug"))), 12: handle_of(5),
        13: handle_of(TakerRaising(KeyboardInterrupt())), 14: SimpleNamespace(taker=untouched),
        15: SimpleNamespace(taker=untouched, disk=None),
    })  # fmt: skip
    request = NOT_ACCEPTED[name]
    for is_long in (False, True):
        if is_long:
            writes.expect_long()
        writes.buffer[: 5 * PAGE] = b"\xee" * 5 * PAGE
        writes.ask(request)
        assert writes.next(LONG, True) == len(request)
        assert writes.buffer[: 5 * PAGE] == request.ljust(5 * PAGE, b"\xee")
    assert untouched.taken == []
    assert writes.taken == 0
    assert writes.answers() == []
    assert sorted(writes.cache.free) == list(range(FRAMES))
    writes.ask(b"the next one")  # nothing of it is left behind
    assert writes.next(LONG) == 12


def test_whatever_comes_after_a_long_write_is_handed_on_as_it_was(any_writes: Writes) -> None:
    writes, rng = any_writes, random.Random(5)
    lengths = [1, 7, 8, 15, 16, 39, 40, 79, 80, 81, 80 + PAGE - 1, 80 + PAGE, 80 + PAGE + 1, 70_000]
    asked = [(opcode, rng.choice(lengths)) for opcode in range(60)]
    asked += [
        (opcode, length) for opcode in (Opcode.READ, Opcode.WRITE, 4096) for length in lengths
    ]
    for opcode, length in asked:
        request = bytearray(rng.randbytes(length))
        request[4:8] = opcode.to_bytes(4, "little")[: max(0, length - 4)]
        writes.expect_long()
        writes.buffer[: length + 9] = b"\xee" * (length + 9)
        writes.ask(request[:length])
        assert writes.next(LONG) == length, (opcode, length)
        assert writes.buffer[: length + 9] == request[:length] + b"\xee" * 9, (opcode, length)
    for length in (LONGEST - 1, LONGEST + 79, LONGEST + 80, LONGEST + 81, LONGEST + 5000, ROOM):
        for opcode in (Opcode.WRITE, 21):
            request = bytearray(rng.randbytes(length))
            request[4:8] = opcode.to_bytes(4, "little")
            ends = Writes(type(writes.device))
            ends.expect_long()
            ends.buffer[:] = b"\xee" * ROOM
            ends.ask_alone(request)
            assert ends.next(LONG) == length
            assert ends.buffer[:] == request.ljust(ROOM, b"\xee")
            ends.close()


@pytest.mark.parametrize(
    ("size", "is_landed"),
    [(LONG_WRITE - 1, False), (LONG_WRITE, True), (LONG_WRITE + 1, True)],
)
def test_after_a_long_write_the_next_one_goes_into_frames(
    size: int, is_landed: bool, writes: Writes
) -> None:
    datas = [os.urandom(each) for each in (size, PAGE, PAGE)]
    for number, data in enumerate(datas):
        writes.ask(write_request(5, number, data))
    assert writes.next() == IDLE
    wanted = [(0, datas[0], False), (1, datas[1], is_landed), (2, datas[2], False)]
    assert writes.taker.taken == wanted
    assert writes.answers() == [written(len(data)) for data in datas]


def test_after_another_request_a_write_goes_into_the_buffer(writes: Writes) -> None:
    for between in (read_request(4, 0, PAGE), b"x" * 40, b"x"):
        writes.expect_long()
        writes.ask(between)
        assert writes.next(LONG) == len(between)
        writes.ask(write_request(5, 0, DATA))
        assert writes.next() == IDLE
        assert writes.taker.taken.pop() == (0, DATA, False)
    writes.expect_long()
    assert writes.next() == IDLE  # nothing is no other request
    writes.ask(write_request(5, 0, DATA))
    assert writes.next() == IDLE
    assert writes.taker.taken.pop() == (0, DATA, True)


@pytest.mark.parametrize("size", [PAGE, 255 * PAGE, LONGEST, LONGEST + PAGE])
def test_the_longest_write_goes_into_frames_and_a_longer_one_is_whole(
    size: int, writes: Writes
) -> None:
    data = os.urandom(size)
    writes.expect_long()
    writes.taker.is_able = size <= LONGEST
    request = write_request(5, 0, data)
    writes.ask_alone(request)
    if size <= LONGEST:
        assert writes.next(LONG) == 0
        assert writes.taker.taken == [(0, data, True)]
    else:
        assert writes.next(LONG) == len(request)
        assert writes.buffer[: len(request)] == request


@pytest.mark.parametrize(
    ("free", "is_landed"),
    [
        (list(range(255, -1, -1)), True),
        (list(range(254, -1, -1)), False),
        (list(range(599, -1, -1)), True),
        (list(range(256)), False),
        # 64 pieces: 63 single frames, and a run
        ([*range(599, 406, -1), *range(126, 0, -2)], True),
        ([*range(599, 407, -1), *range(128, 0, -2)], False),
        ([*range(599, 300, -1), -1], False),
        ([*range(599, 300, -1), 600], False),
        ([*range(599, 300, -1), "x"], False),
        ([600, *range(599, 344, -1), 3], True),
        ([600, *range(599, 345, -1), 3], False),
    ],
)
def test_only_frames_that_are_there_and_near_each_other_are_received_into(
    free: list[Any], is_landed: bool, writes: Writes
) -> None:
    writes.cache.free[:] = free
    data = os.urandom(20 * PAGE)
    writes.expect_long()
    writes.ask(write_request(5, 0, data))
    assert writes.next() == IDLE
    assert writes.taker.taken == [(0, data, is_landed)]
    assert writes.cache.free == free


def test_before_there_is_a_slab_nothing_goes_into_frames() -> None:
    cache = BlockCache(0, FRAMES * PAGE)
    writes = Writes(_device.Device, cache)
    for is_there in (False, False, True, True):
        if is_there and cache.memory is None:
            cache.attach()
        writes.expect_long()
        writes.ask(write_request(5, 0, DATA))
        assert writes.next() == IDLE
        assert writes.taker.taken.pop() == (0, DATA, is_there)
    writes.close()
    for odd in (
        SimpleNamespace(),
        SimpleNamespace(memory=b"x" * 600 * PAGE, free=list(range(600))),
    ):
        writes = Writes(_device.Device, odd)
        for _ in range(2):
            writes.expect_long()
            writes.ask(write_request(5, 0, DATA))
            assert writes.next() == IDLE
            assert writes.taker.taken.pop() == (0, DATA, False)
        writes.close()


def test_a_device_and_its_cache_may_go_together() -> None:
    for _ in range(3):
        writes: Any = Writes(_device.Device)
        writes.expect_long()
        writes.ask(write_request(5, 0, DATA))
        assert writes.next() == IDLE
        assert writes.taker.taken == [(0, DATA, True)]
        writes.cache.known = writes
        gone = weakref.ref(writes)
        writes.close()
        del writes
        gc.collect()
        assert gone() is None
    frames = list(range(599, -1, -1))
    writes = Writes(_device.Device, SimpleNamespace(memory=None, free=frames))
    writes.cache.memory = memoryview(bytearray(600 * PAGE))
    for _ in range(2):
        writes.expect_long()
        writes.ask(write_request(5, 0, DATA))
        assert writes.next() == IDLE
        assert writes.taker.taken.pop() == (0, DATA, False)
    writes.close()


def test_what_is_accepted_but_cannot_be_answered_is_handed_on(
    writes: Writes, image: SealedImage
) -> None:
    """Who takes the long way accepts it again."""

    class Refusing:
        def put(self, *_: object) -> None:
            raise RuntimeError("no")

        def flush(self) -> list[int]:
            return []

    image.write(64 * PAGE, contents_of(64, 64))
    image.flush()
    own, shared = writes.own.fileno(), image._cache.shared
    device = _device.Device(own, writes.buffer, (), writes.handles, Refusing(), print, shared)
    writes.handles[1] = handle_of(image.taker())
    new = contents_of(5000, 20)
    for is_long in (False, True):
        if is_long:
            writes.ask(write_request(4, 0, bytes(LONG_WRITE)))
            assert device.next(LONG, False) == WRITE_START + LONG_WRITE
        request = write_request(1, 70 * PAGE, new)
        writes.ask(request)
        assert device.next(LONG, False) == len(request)
        assert writes.buffer[: len(request)] == request
        assert device.taken == 0
        assert image.try_write(70 * PAGE, writes.buffer[WRITE_START : len(request)])
        assert image.try_read(70 * PAGE, len(new)) == new


def test_a_guest_that_writes_at_random_finds_each_block(writes: Writes, image: SealedImage) -> None:
    rng, shared = random.Random(9), image._cache.shared
    ends = Ends(_device.Device, size=ROOM, cache=shared)
    ends.handles[1] = SimpleNamespace(
        quick=image.quick(), taker=image.taker(), disk=SimpleNamespace(buffered_handles=0)
    )
    model = bytearray(64 * PAGE) + contents_of(64, BLOCKS - 64)
    image.write(0, model)
    image.flush()
    handed_on = 0
    for unique in range(500):
        count = rng.choice((1, 1, 2, 16, 20, 30))
        block, odd = rng.randrange(BLOCKS - count + 2), rng.random() < 0.05
        offset, size = block * PAGE + 512 * odd, count * PAGE - 512 * (rng.random() < 0.05)
        data = rng.randbytes(size)
        request = write_request(1, offset, data, unique=unique)
        ends.ask(request)
        found = ends.next(rng.choice((0, 1000)), rng.random() < 0.5)
        if found >= 0:
            handed_on += 1
            assert ends.buffer[:found] == request
            data = data[: max(0, len(model) - offset)]
            if not image.try_write(offset, data):
                image.write(offset, data)
            ends.answers()
        else:
            ends.next()
            assert ends.answers() == [written(size, unique)]
        model[offset : offset + len(data)] = data
        at = rng.randrange(BLOCKS)
        assert image.read(at * PAGE, PAGE) == model[at * PAGE : (at + 1) * PAGE]
        if rng.random() < 0.05:
            image.flush()
    assert image.read(0, image.size) == model
    image.flush()
    assert image.read(0, image.size) == model
    assert len(set(shared.free)) == len(shared.free) == 512
    assert handed_on > 10
    assert ends.device.taken == 500 - handed_on
    ends.close()
