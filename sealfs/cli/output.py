"""How results are shown: tables, JSON, sizes, progress. Everything here writes to a terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[int], None]

GAP = "   "
"""Between two columns."""
INDENT = "    "


class _State:
    has_answered = False


_state = _State()


def print_json(document: object) -> None:
    """Print the one JSON document of this run."""
    _state.has_answered = True
    print(json.dumps(document, indent=2, ensure_ascii=True))


def has_answered() -> bool:
    """Whether this run printed its JSON document."""
    return _state.has_answered


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; nothing at all where there are no rows."""
    is_terminal = sys.stdout and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    for line in table_lines(heads, rows, width):
        print(line)


def table_lines(
    heads: Sequence[str], rows: Sequence[Sequence[str]], width: int | None
) -> list[str]:
    """Return the lines of a table of at most `width` columns, of any width without.

    Where that is too narrow each row becomes a paragraph: its first cell, then the others, each
    with its head. A path or a VM id is never broken.
    """
    if not rows:
        return []
    from rich.cells import cell_len

    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(cell_len(line[i]) for line in (heads, *shown)) for i in range(len(heads))]
    if width is None or sum(widths) + len(GAP) * (len(heads) - 1) <= width:
        return [
            GAP.join(
                cell + " " * (room - cell_len(cell))
                for cell, room in zip(line, widths, strict=True)
            ).rstrip()
            for line in (heads, *shown)
        ]
    lines = []
    for first, *rest in shown:
        if first:  # else the row goes on with the one above
            lines.append(first)
        pairs = [f"{head} {cell}" for head, cell in zip(heads[1:], rest, strict=True) if cell]
        line = INDENT
        for pair in pairs:
            if line != INDENT and cell_len(line) + len(pair) > width:
                lines.append(line.rstrip())
                line = INDENT
            line += pair + GAP
        lines.append(line.rstrip())
    return lines


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print name and value, one pair a line, aligned."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {printable(value)}".rstrip())


def printable(text: str) -> str:
    """Return text that can be printed anywhere: file names may hold any bytes."""
    raw = os.fsencode(text) if any("\udc80" <= c <= "\udcff" for c in text) else None
    shown = raw.decode("utf-8", "backslashreplace") if raw is not None else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def size_text(size: int | None) -> str:
    """Return a size for people: exact where it is a round number of units, else one decimal."""
    if size is None:
        return "?"
    value, unit = float(size), ""
    for candidate in ("K", "M", "G", "T"):
        if value < 1024:
            break
        value, unit = value / 1024, candidate
    number = f"{value:.0f}" if value == int(value) else f"{value:.1f}"
    return f"{number}{unit}" if unit else str(size)


def passing(text: str) -> None:
    """Show what is being done, on a terminal only, in place of what was shown before."""
    if sys.stderr and sys.stderr.isatty():
        print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Show a bar with rate and time left while the block runs, on a terminal only."""
    if not sys.stderr or not sys.stderr.isatty() or not total:
        yield lambda count: None
        return
    # rich.progress takes a quarter of a second to load.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
