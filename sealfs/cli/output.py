"""How results are shown: tables, JSON, sizes, progress. Everything here writes to a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[int], None]

PLAIN_WIDTH = 10_000
"""Columns where the output is no terminal: nothing is wrapped or cut."""


def print_json(document: object) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2, ensure_ascii=True))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; nothing at all where there are no rows."""
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout and sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


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
