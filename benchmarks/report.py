"""What was found, as Markdown and as charts. Judges nothing: `rows.py` does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import SIDES, UNITS, Judged, Row, judge, reached

Values = Mapping[str, Sequence[float]]
"""Figures of one row by side, in the order of the pairs."""

SCALE = {"iops": 1.0, "bytes": 1e-6, "cpu": 1.0}
HEAD = ("row", *SIDES, "must", "reached", "stretch", "reached")
COLOURS = {"sealfs": "#1b6ca8", "plain": "#9a9a9a", "null": "#cccccc"}
PEER_COLOURS = ("#d08a3e", "#b5563a", "#7d8f3a", "#8a6aa3")


def markdown(
    about: Mapping[str, str],
    sides: Mapping[str, str],
    rows: Sequence[Row],
    values: Mapping[str, Values],
    gaps: Sequence[str],
) -> str:
    """Return the whole report but for its charts."""
    lines = [f"- {key}: {value}" for key, value in about.items()]
    lines += [f"- side {name}: {value}" for name, value in sides.items()]
    lines += ["", f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    lines += [row_line(row, values[row.name]) for row in rows]
    lines += [
        "",
        "Medians. Goals: ratio of the medians (of the worst pair). CPU: fewer is better, its"
        " ratio is theirs to ours. Best: of gocryptfs, luks, encfs, cryfs."
        " A plain file has no daemon.",
    ]
    if gaps:
        lines += ["", *(f"- {gap}" for gap in gaps)]
    return "\n".join(lines) + "\n"


def row_line(row: Row, values: Values) -> str:
    """Return one row of the table."""
    cells = [f"{row.title}, {UNITS[row.metric]}"]
    for side in SIDES:
        runs = values.get(side)
        cells.append(number(statistics.median(runs) * SCALE[row.metric]) if runs else "-")
    for goals in (row.must, row.stretch):
        cells.append("; ".join(goal_text(judge(row, goal, values)) for goal in goals))
        cells.append(reached(row, goals, values))
    return f"| {' | '.join(cells)} |"


def goal_text(judged: Judged) -> str:
    """Return a goal with what was found: `2.5x best (luks): 2.70 (2.41)`."""
    text = str(judged.goal)
    if judged.side not in (None, judged.goal.against):
        text += f" ({judged.side})"
    if judged.ratio is None:
        return f"{text}: -"
    worst = "" if judged.worst is None else f" ({judged.worst:.2f})"
    return f"{text}: {judged.ratio:.2f}{worst}"


def number(value: float) -> str:
    """Return a figure with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def caches(runs: Mapping[str, Mapping[str, Sequence[Any]]]) -> str:
    """Return what is to be known beside sealfs's figures: its cache, what was dirty, latencies."""
    lines = [
        "",
        "| sealfs | read from the plaintext cache | dirty at the end | p50 / p99 / p99.9, ms |",
        "|---|---|---|---|",
    ]
    for job, sides in runs.items():
        found = sides.get("sealfs")
        if not found:
            continue
        shares = []
        for name in ("hit_rate", "dirty_share"):
            known = [v for v in (getattr(figures, name) for figures in found) if v is not None]
            shares.append(f"{statistics.median(known) * 100:.1f} %" if known else "-")
        times = zip(*(figures.latency_ms for figures in found), strict=True)
        shown = " / ".join(f"{statistics.median(column):.3g}" for column in times)
        lines.append(f"| {job} | {shares[0]} | {shares[1]} | {shown} |")
    return "\n".join(lines) + "\n"


def charts(
    rows: Sequence[Row], values: Mapping[str, Values], out: Path, name: str
) -> list[Path] | str:
    """Draw one chart for each metric; return where they are, or why there are none."""
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed; .venv/bin/pip install -e '.[bench]'"
    matplotlib.use("Agg")
    drawn = []
    for metric, unit in UNITS.items():
        shown = [row for row in rows if row.metric == metric and values[row.name]]
        if shown:
            drawn.append(_chart(shown, values, unit, out / f"{name}-{metric}.png"))
    return drawn


def _chart(rows: Sequence[Row], values: Mapping[str, Values], unit: str, path: Path) -> Path:
    from matplotlib import pyplot

    peers = iter(PEER_COLOURS)
    colours = {side: COLOURS.get(side) or next(peers) for side in SIDES}
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(3.6 * columns, 2.3 * lines), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(rows) :]:
        axes.set_visible(False)
    # Each row has a scale of its own: a null lane beside an fsync would flatten all others.
    for axes, row in zip(grid.flat, rows, strict=False):
        sides = [side for side in SIDES if values[row.name].get(side)]
        runs = [[v * SCALE[row.metric] for v in values[row.name][side]] for side in sides]
        middles = [statistics.median(each) for each in runs]
        spread = [
            [middle - min(each) for middle, each in zip(middles, runs, strict=True)],
            [max(each) - middle for middle, each in zip(middles, runs, strict=True)],
        ]
        axes.barh(sides, middles, xerr=spread, color=[colours[side] for side in sides],
                  error_kw={"linewidth": 0.8, "ecolor": "#333333"})  # fmt: skip
        axes.invert_yaxis()
        axes.set_title(row.title, fontsize=9)
        axes.set_xlabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
