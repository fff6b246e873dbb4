"""Random arguments, right and wrong, for the C modules: they answer or raise, and never crash.

`tools/sanitize` runs it over modules built with the address and undefined-behaviour sanitizers:
    python tests/native_fuzz.py [SECONDS [SEED]]
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from types import SimpleNamespace
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealfs.image import (
    _blockbatch,
    _blockread,
    _blockseal,
    _blocktake,
    _blockwrite,
    blockbatch,
    blockseal,
)
from sealfs.mount import _device, _ring

PAGE = 4096
PREFIX = b"sealfs block" + bytes(16)
DIRECT = b"directly"
QUICK = ("image", "volume", "cache", "shared", "clean", "nodes", "leaves", "opener", "fd", "base",
         "group_blocks", "fanout", "first_home", "slot_size", "keep_every")  # fmt: skip
TAKER = ("image", "check", "cache", "shared", "clean", "free", "nodes", "leaves", "space", "reader",
         "slab", "base", "group_blocks", "fanout", "part_blocks")  # fmt: skip
WRITE_START = 80
LONGEST = 1 << 20


def _make_quick(*values: Any) -> Any:
    """Make one by position: its arguments have names."""
    return _blockread.Quick(**dict(zip(QUICK, values, strict=False)))


def _make_taker(*values: Any) -> Any:
    return _blocktake.Taker(**dict(zip(TAKER, values, strict=False)))


class Fuzz:
    """Calls of one run; `calls` counts how each function ended."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.calls: Counter[str] = Counter()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the run
        self.fd = self.file.fileno()
        self.null = os.open(os.devnull, os.O_RDWR)
        self.device, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.device, self.kernel):
            end.setblocking(False)
        self.ring = _ring.Ring()

    def close(self) -> None:
        """Let go of everything."""
        self.ring.close()
        self.file.close()
        os.close(self.null)
        for end in (self.device, self.kernel):
            end.close()

    def odd(self) -> Any:
        """Return something that is seldom what was asked for."""
        rng = self.rng
        return rng.choice(
            (None, -1, 0, 2**31, 2**32, 2**63, 2**64, -(2**70), 1.5, b"", "x", [], [1], [-1, 2**65],
             {}, {1: b""}, (), bytes(rng.randrange(100)), bytearray(PAGE), memoryview(bytes(33)),
             range(3), self.fd, 2**63 - 1, -(2**63))
        )  # fmt: skip

    def call(self, name: str, function: Any, *args: Any) -> Any:
        """Call, now and then with one argument replaced or missing; return what came, or None."""
        given = list(args)
        if given and self.rng.random() < 0.4:
            given[self.rng.randrange(len(given))] = self.odd()
        if given and self.rng.random() < 0.03:
            given.pop()
        try:
            found = function(*given)
        except (TypeError, ValueError, OverflowError, KeyError, OSError, BufferError) as exc:
            self.calls[f"{name}: {type(exc).__name__}"] += 1
            return None
        except AttributeError as exc:  # of an object that is not what it should be
            if name not in ("answer", "next", "take", "take_landed"):
                raise
            self.calls[f"{name}: {type(exc).__name__}"] += 1
            return None
        self.calls[f"{name}: answered"] += 1
        return found if given == list(args) else None

    def seal_and_open(self) -> None:
        """Seal a run; open it, whole or altered, by run and by block."""
        rng = self.rng
        count, epoch = rng.randrange(0, 9), rng.choice((1, 7, 2**32 - 1))
        key, slab = rng.randbytes(32), rng.randbytes(PAGE * 10)
        first, counter = rng.randrange(2**40), rng.randrange(2**60)
        blocks, frames = list(range(first, first + count)), rng.sample(range(10), count)
        out = memoryview(bytearray(count * PAGE + 16))
        entries = self.call(
            "seal_run", _blockseal.seal_run, key, PREFIX, epoch, counter, blocks, slab, frames, out
        )
        if entries is None:
            return
        assert len(entries) == 32 * count
        run = bytearray(out[: count * PAGE])
        for i in range(count):
            nonce, tag = entries[32 * i : 32 * i + 12], entries[32 * i + 12 : 32 * i + 28]
            data = PREFIX + (first + i).to_bytes(8, "little")
            sealed = bytes(run[i * PAGE : (i + 1) * PAGE]) + tag
            plain = AESGCM(key).decrypt(nonce, sealed, data)
            assert plain == slab[frames[i] * PAGE : (frames[i] + 1) * PAGE]
        os.pwrite(self.fd, run, 0)
        altered = count and rng.random() < 0.4
        if altered:
            run[rng.randrange(len(run))] ^= 1 << rng.randrange(8)
        found = self.call(
            "open_run", _blockseal.open_run, {epoch: bytearray(key)}, PREFIX, first, entries,
            memoryview(run),
        )  # fmt: skip
        if found is not None:
            assert (found >= 0) == bool(altered)
        self.send(key, epoch, first, count, entries, slab, frames)
        self.answer(
            key, epoch, entries, [slab[at * PAGE : (at + 1) * PAGE] for at in frames], first
        )

    def send(
        self, key: bytes, epoch: int, first: int, count: int, entries: bytes, slab: bytes,
        frames: list[int],
    ) -> None:  # fmt: skip
        """Send the run from the file, through an outbox."""
        opener, leaf = _blockread.Opener(PREFIX), entries.ljust(PAGE, b"\0")
        box = _blockread.Outbox(self.null)
        for each in self.rng.sample((epoch, epoch ^ 1, epoch ^ 2), self.rng.randrange(1, 4)):
            self.call("add", opener.add, each, key if each == epoch else bytes(32))
        keep = self.rng.random() < 0.5
        for _ in range(self.rng.randrange(1, 12)):
            found = self.call(
                "send", opener.send, self.fd, 0, first, count, leaf, 0, box, b"head", keep
            )
            if isinstance(found, bytes):
                wanted = [slab[frame * PAGE : (frame + 1) * PAGE] for frame in frames]
                assert found == b"".join(wanted)
            self.call("put", box.put, self.rng.randbytes(16), self.rng.randbytes(100))
            assert 0 <= box.count <= 8
        self.call("forget", opener.forget)
        self.call("flush", box.flush)

    def answer(
        self, key: bytes, epoch: int, entries: bytes, contents: list[bytes], first: int
    ) -> None:  # fmt: skip
        """Answer reads of the run, directly and as requests of a device."""
        rng, count = self.rng, len(contents)
        opener = _blockread.Opener(PREFIX)
        opener.add(epoch, key)
        group, base = count + rng.randrange(3) or 1, rng.choice((0, 1 << 48))
        number, index = divmod(first, group)
        dirty = {rng.randrange(first, first + 9): 0 for _ in range(rng.choice((0, 0, 1)))}
        clean = OrderedDict(
            (base + first + i, contents[i]) for i in range(count) if not rng.randrange(4)
        )
        node = SimpleNamespace(
            present=bytearray(b"\1\1"),
            slots=struct.pack("II", *[rng.choice((0, 0, 2**32 - 1))] * 2),
        )
        leaf = (bytes(index * 32) + entries)[: rng.choice((PAGE, PAGE, 64))]
        owner: Any = SimpleNamespace(
            size=(first + count) * PAGE, inline={}, dirty=dirty, committing={}, hits=0,
            put_clean=clean.__setitem__,
        )  # fmt: skip
        if rng.random() < 0.1:
            setattr(owner, rng.choice(list(vars(owner))), self.odd())
        if rng.random() < 0.1:
            setattr(node, rng.choice(("present", "slots")), self.odd())
        first_home = 2**64 - index * PAGE if index else 0  # the run lies where the file begins
        quick = self.call(
            "Quick", _make_quick, owner, owner, owner, owner, clean, {number // 2: node},
            {number: leaf}, opener, self.fd, base, group, 2, first_home, PAGE, rng.randrange(1, 3),
        )  # fmt: skip
        box = _blockread.Outbox(self.device.fileno())
        handles: dict[int, Any] = {1: SimpleNamespace(quick=quick)}
        device = self.call(
            "Device", _device.Device, self.device.fileno(), bytearray(PAGE), (self.null,), handles,
            box, lambda codes: None, owner,
        )  # fmt: skip
        if quick is None or device is None:
            return
        for _ in range(rng.randrange(1, 12)):
            at, length = rng.randrange(10), rng.randrange(1, 4)
            offset, size = (first + at) * PAGE + rng.choice((0, 0, 0, 1)), length * PAGE
            before = box.count
            found = self.call(
                "answer", quick.answer, offset, size, box, struct.pack("<8sII", DIRECT, at, length)
            )
            if found:
                assert at + length <= count
                assert not any(first + i in owner.dirty for i in range(at, at + length))
            elif found is not None:
                assert box.count in (before, 0)
            self.ask(offset, size, at << 8 | length)
            assert 0 <= box.count <= 8
        for _ in range(rng.randrange(1, 8)):
            self.call("next", device.next, rng.choice((0, 0, 1000)), rng.random() < 0.5)
        box.flush()
        with contextlib.suppress(BlockingIOError):
            while True:
                self.check(self.kernel.recv(1 << 18), contents)

    def check(self, answer: bytes, contents: list[bytes]) -> None:
        """Compare what was answered with what is to be there."""
        direct, at, length = struct.unpack_from("<8sII", answer.ljust(16, b"\0"))
        if direct != DIRECT:
            size, code, unique = struct.unpack_from("<IiQ", answer.ljust(16, b"\0"))
            if size != len(answer) or code:
                return  # by a header that was replaced
            at, length = unique >> 8, unique & 0xFF
        assert answer[16:] == b"".join(contents[at : at + length])
        self.calls["an answer was right"] += 1

    def ask(self, offset: int, size: int, unique: int) -> None:
        """Send a request for a read, or something like it."""
        rng = self.rng
        request = bytearray(
            struct.pack("<IIQQIIIIQQIIQII", 80, 15, unique, 9, 0, 0, 1, 0, rng.choice((1, 1, 1, 2)),
                        offset % 2**64, size, 0, 0, 0, 0)
        )  # fmt: skip
        if rng.random() < 0.2:  # all but by what it is checked
            at = rng.choice((*range(8), *range(16, 48), *range(60, 80)))
            request[at] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            request = request[: rng.randrange(1, 80)]
        with contextlib.suppress(BlockingIOError):
            self.kernel.send(request)

    def take(self) -> None:
        """Accept writes, told of directly and as requests of a device."""
        rng, calls = self.rng, self.calls
        count = rng.choice((8, 40, 300))
        slab, group = bytearray(count * PAGE), rng.choice((4, 8, 100, 128))
        frames = list(range(count - 1, -1, -1))
        if rng.random() < 0.3:
            rng.shuffle(frames)
        base, blocks = rng.choice((0, 1 << 48)), 2 * group
        some = rng.sample(range(blocks), rng.choice((0, 0, 1, 5)))
        dirty = {block: frames.pop() for block in some}
        clean = OrderedDict((base + rng.randrange(blocks), b"") for _ in range(rng.randrange(4)))
        node = SimpleNamespace(
            present=bytearray(b"\1\1"), slots=struct.pack("II", rng.choice((0, 1)), 1)
        )
        owner: Any = SimpleNamespace(
            size=blocks * PAGE, oldest_dirty=rng.choice((None, 1.0)), dirty=dirty, version=0,
            parts=rng.choice((b"\xff\xff", b"\xff\xff", b"\xff", b"\xff\x0f")), is_cutting=False,
            punching=rng.choice((set(), set(), set(), {1})), leaving={}, on_low=lambda: None,
            memory=slab, free=frames, buffered_handles=rng.choice((0, 0, 0, 1)),
        )  # fmt: skip
        is_right = rng.random() < 0.7
        if not is_right:
            for _ in range(rng.randrange(3)):
                setattr(owner, rng.choice(list(vars(owner))), self.odd())
            if rng.random() < 0.3:
                setattr(node, rng.choice(("present", "slots")), self.odd())
            for _ in range(rng.choice((0, 0, 3))):
                frames.insert(rng.randrange(len(frames) + 1), self.odd())
        arguments = (
            owner, lambda: None, owner, owner, clean, frames, {0: node}, {0: b"", 1: b""}, owner,
            owner, slab, base, group, 2, -(-group // 8),
        )  # fmt: skip
        make = self.call if not is_right else lambda name, function, *args: function(*args)
        taker = make("Taker", _make_taker, *arguments)
        buffer = bytearray(rng.choice((WRITE_START + LONGEST, 80 << 10, 2 * LONGEST)))
        box = _blockread.Outbox(self.device.fileno())
        handle = SimpleNamespace(taker=taker, quick=None, disk=owner)
        device = make(
            "Device", _device.Device, self.device.fileno(), buffer, (self.null,), {1: handle}, box,
            lambda codes: None, owner,
        )  # fmt: skip
        if taker is None or device is None:
            return
        model: dict[int, bytes] = {}
        for _ in range(rng.randrange(1, 10)):
            first, length = rng.randrange(blocks), rng.choice((1, 1, 2, 8, 16, 20))
            data = rng.randbytes(length * PAGE - (512 if rng.random() < 0.05 else 0))
            if rng.random() < 0.6:
                found = self.ask_write(device, buffer, first * PAGE, data)
            elif rng.random() < 0.7 or not is_right:
                function = rng.choice((taker.take, taker.take_landed))
                content: Any = data if function == taker.take else len(data)
                made = self.call if not is_right else make
                found = made(function.__name__, function, first * PAGE, content)
                if found and function == taker.take_landed:
                    found = None  # whatever there was
                    for i in range(length):
                        model.pop(first + i, None)
            else:
                continue
            if found:
                for i in range(length):
                    model[first + i] = data[i * PAGE : (i + 1) * PAGE]
                calls["a write was accepted"] += 1
            if is_right:
                held = [*frames, *dirty.values()]
                assert sorted(held) == list(range(count)), "a frame is two things, or none"
                for block, wanted in model.items():
                    at = dirty[block] * PAGE
                    assert slab[at : at + PAGE] == wanted, f"block {block}"
                assert not {block + base for block in model} & set(clean)

    def ask_write(self, device: Any, buffer: bytearray, offset: int, data: bytes) -> bool:
        """Send a request for a write, or something like it; return whether it was accepted."""
        rng = self.rng
        request = bytearray(
            struct.pack("<IIQQIIIIQQIIQII", WRITE_START + len(data), 16, 5, 9, 0, 0, 1, 0,
                        rng.choice((1, 1, 1, 2)), offset, len(data), rng.choice((0, 0, 1)), 0,
                        rng.choice((0, 0, os.O_DIRECT, os.O_DSYNC)), 0)
        )  # fmt: skip
        if rng.random() < 0.2:  # all but the offset
            request[rng.randrange(48)] ^= 1 << rng.randrange(8)
        request += data
        if rng.random() < 0.1:
            request = request[: rng.randrange(1, len(request))]
        if len(request) > len(buffer):
            return False
        self.drain()
        self.kernel.send(request)
        found = device.next(rng.choice((0, 1000)), rng.random() < 0.5)
        if found >= 0:
            assert buffer[:found] == request[:found], "it was handed on otherwise than it came"
            assert found == len(request)
            return False
        device.next(0, False)
        (answer,) = self.drain()
        assert struct.unpack_from("<Ii", answer) == (24, 0)
        return True

    def drain(self) -> list[bytes]:
        """Return what has been answered; nothing is left to be asked."""
        found: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while True:
                self.device.recv(1 << 18)
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.kernel.recv(1 << 18))
        return found

    def write(self) -> None:
        """Write blocks to places of the file."""
        count = self.rng.randrange(0, 12)
        places = [self.rng.randrange(64) * PAGE for _ in range(count)]
        offsets = b"".join(place.to_bytes(8, sys.byteorder) for place in places)
        content = self.rng.randbytes(count * PAGE)
        found = self.call(
            "write_blocks", _blockwrite.write_blocks, self.fd, offsets, content, 1 << 20
        )
        if found == (-1, 0):
            for i, place in enumerate(places):
                if place not in places[i + 1 :]:
                    assert os.pread(self.fd, PAGE, place) == content[i * PAGE : (i + 1) * PAGE]

    def batch(self) -> None:
        """Cut blocks to groups, look their entries up and set them, compute MACs of the pages."""
        rng = self.rng
        group_blocks = rng.choice((1, 7, 128))
        blocks = [rng.randrange(4 * group_blocks) for _ in range(rng.randrange(12))]
        leaves = {group: bytearray(rng.randbytes(PAGE)) for group in range(rng.choice((4, 4, 2)))}
        entries = rng.randbytes(32 * len(blocks))
        spans = self.call("spans", _blockbatch.spans, blocks, group_blocks)
        if spans is not None:
            assert spans == blockbatch.spans(blocks, group_blocks)
        found = self.call("flags_of", _blockbatch.flags_of, leaves, blocks, group_blocks)
        if found is not None:
            assert found == blockbatch.flags_of(leaves, blocks, group_blocks)
        starts = [rng.randrange(2**40) for _ in blockbatch.spans(blocks, group_blocks)[0]]
        found = self.call("home_offsets", _blockbatch.home_offsets, blocks, group_blocks, starts)
        if found is not None:
            assert found == blockbatch.home_offsets(blocks, group_blocks, starts)
        self.call("set_entries", _blockbatch.set_entries, leaves, blocks, entries, group_blocks)
        key, pages = rng.randbytes(32), list(leaves.values())
        macs = self.call("mac_run", _blockseal.mac_run, key, PREFIX, list(leaves), pages, 24)
        if macs is not None:
            assert macs == blockseal.mac_run(key, PREFIX, list(leaves), pages, 24)

    def fetch(self) -> None:
        """Have parts of the file read."""
        for _ in range(self.rng.randrange(20)):
            self.call(
                "read", self.ring.read, self.fd, self.rng.randrange(2**20),
                self.rng.randrange(140 << 10), self.rng.randrange(2**64),
            )  # fmt: skip
        self.call("done", self.ring.done)
        if self.rng.random() < 0.01:
            self.call("close", self.ring.close)
            self.ring = _ring.Ring()


def main() -> None:
    """Fuzz for some seconds and say what was called."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else time.time_ns() % 10**6
    print(f"seed {seed}", flush=True)
    fuzz, end = Fuzz(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        for part in (fuzz.seal_and_open, fuzz.take, fuzz.write, fuzz.batch, fuzz.fetch):
            part()
    for name, count in sorted(fuzz.calls.items()):
        print(f"{count:9,} {name}")


if __name__ == "__main__":
    main()
