"""Writes to one file under a mount until the daemon dies, and keeps a journal of what was promised.

A program of its own, which `kills` starts: it outlives the daemon, and so does its journal. Each
line on its standard input is a life: it opens the file, says `ready`, writes, and says `gone` and
its next number when the daemon is dead. Several may work on one file: each has stripes of its own.

An entry stands in the journal before its write is issued, and is acknowledged there after the
call that promised it has returned.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import mmap
import os
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from exerciser import Stamps
from exerciser_files import BLOCK, KEEP_SIZE, PUNCH_HOLE, Queue, Request, fallocate

ENTRY = struct.Struct("<cIII")
WRITE, PUNCH, ONE_DURABLE, ALL_DURABLE = b"w", b"p", b"d", b"a"
"""What an entry says of its number: first block and count follow for the first two."""

COUNTS = (1, 1, 1, 2, 3, 8, 32, 128)
REQUESTS_MAX = 8
GONE = (errno.ENOTCONN, errno.ECONNABORTED)
NUMBER_BITS = 20
"""Numbers of one writer; those above them are the writer's own."""

HANDLES = {
    "buffered": os.O_RDWR,
    "direct": os.O_RDWR | os.O_DIRECT,
    "dsync": os.O_RDWR | os.O_DSYNC,
    "direct dsync": os.O_RDWR | os.O_DIRECT | os.O_DSYNC,
}


@dataclass(frozen=True)
class Share:
    """The blocks of one of several writers: every `of`-th stripe."""

    blocks: int
    stripe: int
    index: int
    of: int

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Return the first block and the count of a range that is all ours."""
        stripes = range(self.index, self.blocks // self.stripe, self.of)
        hot = stripes[: max(1, len(stripes) // 8)]
        stripe = rng.choice(hot if rng.random() < 0.5 else stripes)
        at = 0 if rng.random() < 0.3 else rng.randrange(self.stripe)
        return stripe * self.stripe + at, min(rng.choice(COUNTS), self.stripe - at)


class Writer:
    """One life under one daemon."""

    def __init__(
        self, path: Path, journal: int, *, share: Share, number: int, rng: random.Random
    ) -> None:
        self.number = number
        self._journal = journal
        self._share = share
        self._rng = rng
        self._stamps = Stamps(((0, share.blocks * BLOCK),))
        self._area = mmap.mmap(-1, REQUESTS_MAX * max(COUNTS) * BLOCK)
        self._view = memoryview(self._area)
        self._queue = Queue() if Queue.is_known() else None
        self._handles = {
            kind: os.open(path, flags | os.O_CLOEXEC) for kind, flags in HANDLES.items()
        }

    def run(self, *, punches: bool) -> Iterator[None]:
        """Write without an end; each step is one call, or one batch of them."""
        actions = [self._write, self._sync, self._batch, self._punch]
        weights = [20, 4, 3 if self._queue else 0, 2 if punches else 0]
        while True:
            self._rng.choices(actions, weights)[0]()
            yield

    def close(self) -> None:
        for fd in self._handles.values():
            with contextlib.suppress(OSError):
                os.close(fd)

    def _note(self, kind: bytes, number: int, first: int = 0, count: int = 0) -> None:
        os.write(self._journal, ENTRY.pack(kind, number, first, count))

    def _planned(self, first: int, count: int, at: int = 0) -> memoryview:
        """Note a write that comes, and return its content."""
        self.number += 1
        self._note(WRITE, self.number, first, count)
        view = self._view[at * BLOCK : (at + count) * BLOCK]
        view[:] = self._stamps.make(self.number, first * BLOCK, count * BLOCK)
        return view

    def _write(self) -> None:
        kind = self._rng.choice(list(HANDLES))
        first, count = self._share.draw(self._rng)
        self._put(self._handles[kind], self._planned(first, count), first * BLOCK)
        if "dsync" in kind:
            self._note(ONE_DURABLE, self.number)

    def _put(self, fd: int, view: memoryview, offset: int) -> None:
        """Write all of it; a daemon that dies may have taken a part."""
        while view:
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def _sync(self) -> None:
        sync = self._rng.choice((os.fsync, os.fdatasync))
        sync(self._handles[self._rng.choice(list(HANDLES))])
        self._note(ALL_DURABLE, self.number)

    def _batch(self) -> None:
        """Have several direct writes under way at once, durable by their handle or not at all."""
        assert self._queue is not None
        kind = self._rng.choice(("direct", "direct dsync"))
        taken: set[int] = set()
        requests: list[Request] = []
        at = 0
        numbers: list[int] = []
        for _ in range(self._rng.randint(2, REQUESTS_MAX)):
            first, count = self._share.draw(self._rng)
            blocks = range(first, first + count)
            if taken.isdisjoint(blocks):
                taken.update(blocks)
                requests.append(Request("write", first * BLOCK, self._planned(first, count, at)))
                numbers.append(self.number)
                at += count
        self._queue.submit(self._handles[kind], requests)
        for result, request, number in zip(
            self._queue.wait(len(requests)), requests, numbers, strict=True
        ):
            assert request.view is not None
            if result < 0:
                raise OSError(-result, os.strerror(-result))
            self._put(self._handles[kind], request.view[result:], request.offset + result)
            if "dsync" in kind:
                self._note(ONE_DURABLE, number)

    def _punch(self) -> None:
        first, count = self._share.draw(self._rng)
        self.number += 1
        self._note(PUNCH, self.number, first, count)
        kind = self._rng.choice(("buffered", "direct"))
        mode = KEEP_SIZE | PUNCH_HOLE
        fallocate(self._handles[kind], mode, first * BLOCK, count * BLOCK)


def main() -> int:
    """Live until there is no more input; 1 when something failed that is not the daemon's death."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--stripe", type=int, required=True)
    parser.add_argument("--index", type=int, required=True, help="among the writers of the file")
    parser.add_argument("--of", type=int, required=True)
    parser.add_argument("--owner", type=int, required=True, help="among all writers")
    chosen = parser.parse_args()
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    journal = os.open(chosen.journal, flags, 0o600)
    share = Share(chosen.blocks, chosen.stripe, chosen.index, chosen.of)
    number = chosen.owner << NUMBER_BITS
    for line in sys.stdin:
        life = json.loads(line)
        steps = 0
        rng = random.Random(life["seed"])
        writer = Writer(chosen.path, journal, share=share, number=number, rng=rng)
        print("ready", flush=True)
        try:
            for _ in writer.run(punches=life["punches"]):
                steps += 1
                if steps == life.get("steps"):
                    break
        except OSError as exc:
            if exc.errno not in GONE:
                raise
        finally:
            writer.close()
        number = writer.number
        print(f"gone {steps}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
