"""Every bit of an image's metadata, flipped one at a time.

The images, and what is right to find in them, are those of `test_tamper`. A page of metadata is in
one of two kinds of parts: *fields*, which the format gives a meaning, and the rest: padding,
journal pages of the past, node pages of no node. Where the format says that something is not read,
or another copy stands beside it, a flip must not matter at all.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import test_tamper
from test_tamper import GEOMETRY, GROUP, PAGE, Span, State

NODE_COLUMNS = 30 * GEOMETRY.fanout
ENTRIES = 32 * GROUP

Kind = Literal["field", "payload", "rest"]


@dataclass(frozen=True)
class Part:
    """A run of bytes in one page."""

    structure: str
    kind: Kind
    offset: int
    size: int
    must_be_right: bool
    """Whether a flip in it must change nothing."""


def number(raw: bytes, offset: int, size: int) -> int:
    return int.from_bytes(raw[offset : offset + size], "little")


class Map:
    """What is where in one state's file."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = test_tamper.history(test_tamper.IDENTITY)[0][name]
        self._raw = self.state.raw
        self._parts: dict[int, list[Part]] = {}
        self._headers()
        self._journal()
        self._nodes()
        self._leaves()

    @property
    def pages(self) -> list[int]:
        """Return the offsets of all pages of metadata."""
        return sorted(self._parts)

    def parts(self, page: int) -> list[Part]:
        return self._parts[page]

    def _page(self, structure: str, page: int, *fields: tuple[Span, bool], rest: bool) -> None:
        """Divide a page: fields, each with whether it must be right, and the rest of the page."""
        parts, at = [], page
        for (offset, size), must_be_right in fields:
            if offset > at:
                parts.append(Part(structure, "rest", at, offset - at, rest))
            parts.append(Part(structure, "field", offset, size, must_be_right))
            at = offset + size
        if at < page + PAGE:
            parts.append(Part(structure, "rest", at, page + PAGE - at, rest))
        self._parts[page] = parts

    def _headers(self) -> None:
        g, raw = GEOMETRY, self._raw
        superblocks = [g.superblock_offset(copy) for copy in (0, 1)]
        live = max((0, 1), key=lambda copy: number(raw, superblocks[copy] + 32, 8))
        rows = 40 * number(raw, superblocks[live] + 100, 4)
        pages = dict.fromkeys(range(0, g.journal_offset, PAGE), "header")
        for copy, at in enumerate(superblocks):
            self._page("superblock", at, ((at, 512), copy != live), rest=True)
            identity = g.identity_offset(copy)
            size = 80 + number(raw, identity + 12, 4)
            self._page("identity", identity, ((identity, size), True), rest=True)
            table = g.table_offset(copy)
            self._page("epoch table", table, ((table, rows), copy != live), rest=True)
        for page in pages.keys() - self._parts.keys():
            self._page("header", page, rest=True)

    def _journal(self) -> None:
        g = GEOMETRY
        for index in range(g.journal_pages):
            self._page("past record", g.journal_page_offset(index), rest=True)
        for at, size in self.state.records.values():
            inline = number(self._raw, at + 124, 4)
            counts = [number(self._raw, at + place, 4) for place in (112, 116, 120, 124, 128)]
            body = sum(
                count * each for count, each in zip(counts, (12, 36, 40, 40, 16), strict=True)
            )
            self._page("record", at, ((at, 256 + body), False), rest=False)
            for page in range(at + size - inline * PAGE, at + size, PAGE):
                self._parts[page] = [Part("payload", "payload", page, PAGE, False)]

    def _nodes(self) -> None:
        g = GEOMETRY
        spans = self.state.spans
        used = {offset: False for offset, _ in spans["node"]}
        used.update({offset: True for offset, _ in spans["node's other place"]})
        chunks = {(at - g.slots_offset) // g.slot_size for at in used}
        for chunk in chunks:
            first = g.slot_offset(chunk)
            for page in range(first, first + 2 * g.chunk_nodes * PAGE, PAGE):
                if page in used:
                    columns = (page, NODE_COLUMNS)
                    self._page("node", page, (columns, used[page]), rest=True)
                else:
                    self._page("no node", page, rest=True)

    def _leaves(self) -> None:
        # A record may need the leaf page that was live before it, and all of the page is read.
        for structure in ("leaf", "leaf's other place"):
            is_spare = structure != "leaf" and not self.state.records
            for page, _ in self.state.spans[structure]:
                self._page("leaf", page, ((page, ENTRIES), is_spare), rest=is_spare)


@cache
def maps() -> tuple[Map, ...]:
    """Return the images that are tampered with."""
    return tuple(Map(name) for name in test_tamper.history(test_tamper.IDENTITY)[0])


def flip(which: Map, part: Part, bits: Iterable[int]) -> Counter[str]:
    """Flip bits of a part, one at a time, and judge what comes of each; return the outcomes."""
    outcomes: Counter[str] = Counter()
    for bit in bits:
        raw = bytearray(which.state.raw)
        raw[part.offset + bit // 8] ^= 1 << bit % 8
        label = f"{which.name}: {part.structure} at {part.offset}, byte {bit // 8}, bit {bit % 8}"
        outcome = test_tamper.judge(raw, test_tamper.verdict(which.state, raw), label=label)
        assert outcome == "right" or not part.must_be_right, f"{label}: {outcome}"
        outcomes[outcome] += 1
    return outcomes


def one_bit_of_each(rng: random.Random, part: Part, stride: int) -> Iterator[int]:
    """Draw one bit of each `stride` bytes of a part."""
    for first in range(0, part.size, stride):
        yield rng.randrange(8 * first, 8 * min(first + stride, part.size))


def bit_count() -> int:
    return sum(8 * PAGE * len(each.pages) for each in maps())


def whole_page(index: int) -> Counter[str]:
    """Flip every bit of one page of one image; return the outcomes; none beyond the last page."""
    pages = [(each, page) for each in maps() for page in each.pages]
    figures: Counter[str] = Counter()
    for which, page in pages[index : index + 1]:
        for part in which.parts(page):
            figures += flip(which, part, range(8 * part.size))
            figures[f"bits of {part.kind}"] += 8 * part.size
        figures["bits"] = 8 * PAGE
    return figures
