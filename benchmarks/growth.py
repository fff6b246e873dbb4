"""Curves of cost: points, percentiles, and the verdict that nothing outgrows what is in use.

Pure, but for the chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SLACK_TIME = 2.0
"""Times of one run differ by that much on a shared machine, percentiles of the tail most of all."""
SLACK_MEMORY = 1.25
PERCENTILES = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))


@dataclass(frozen=True, slots=True)
class Curve:
    """What grows, and what is in use meanwhile."""

    name: str
    title: str
    unit: str
    in_use: str


CURVES: Mapping[str, Curve] = {
    curve.name: curve
    for curve in (
        Curve("size", "An image grows, its data do not", "size, GiB", "bytes on the storage"),
        Curve("images", "Images on one mount", "images", "images"),
        Curve("dirty", "Data that wait to be committed", "dirty, MiB", "dirty bytes"),
    )
}


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a curve: `x` as it is shown, what is in use, and what it costs."""

    x: float
    in_use: float
    costs: Mapping[str, float]

    def shown(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.costs.items())


def percentiles(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return percentiles in ms by kind, `read p99, ms`; a kind that never came has none."""
    found = {}
    for kind, each in times.items():
        ordered = sorted(each)
        for name, share in PERCENTILES if ordered else ():
            index = min(len(ordered) - 1, int(len(ordered) * share))
            found[f"{kind} {name}, ms"] = ordered[index] * 1000
    return found


def excess(points: Sequence[Point], cost: str) -> tuple[float, float]:
    """Return how often over a cost grew beyond what is in use, at worst; and how it grew itself.

    Both are compared with the first point. What is in use never counts as having shrunk.
    """
    first = points[0]
    worst = growth = 1.0
    for point in points[1:]:
        grown = point.costs[cost] / first.costs[cost] if first.costs[cost] else 1.0
        used = max(1.0, point.in_use / first.in_use)
        worst, growth = max(worst, grown / used), max(growth, grown)
    return worst, growth


def verdicts(curve: Curve, points: Sequence[Point]) -> list[str]:
    """Return a line for each cost, and one for the curve."""
    if len(points) < 2:
        return [f"{curve.title}: not judged: one point is no curve"]
    lines = []
    bad = []
    used = max(point.in_use for point in points) / points[0].in_use
    for cost in points[0].costs:
        if any(cost not in point.costs for point in points):
            lines.append(f"{cost}: not judged: a point lacks it")
            continue
        worst, grown = excess(points, cost)
        slack = SLACK_MEMORY if cost.startswith("memory") else SLACK_TIME
        if worst > slack:
            bad.append(cost)
        word = "OUTGROWS" if worst > slack else "flat beside" if grown <= slack else "within"
        lines.append(f"{cost}: x{grown:.2f}: {word} what is in use (x{used:.2f}; slack x{slack:g})")
    verdict = f"outgrown by {', '.join(bad)}" if bad else f"nothing outgrows the {curve.in_use}"
    return [*lines, f"{curve.title}: {verdict}"]


def table(curve: Curve, points: Sequence[Point]) -> list[str]:
    """Return the points as a Markdown table, costs downwards."""
    if not points:
        return []
    lines = [f"| {curve.unit} | {' | '.join(f'{point.x:,.4g}' for point in points)} |"]
    lines.append("|---" * (len(points) + 1) + "|")
    for cost in points[0].costs:
        cells = (f"{p.costs[cost]:.3g}" if cost in p.costs else "-" for p in points)
        lines.append(f"| {cost} | {' | '.join(cells)} |")
    return lines


def chart(curve: Curve, points: Sequence[Point], path: Path) -> Path | str:
    """Draw a curve; return where it is, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        return "chart: not drawn: matplotlib is not installed; .venv/bin/pip install -e '.[bench]'"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    units: dict[str, list[str]] = {}
    for cost in points[0].costs:
        units.setdefault(cost.rpartition(", ")[2], []).append(cost)
    figure, grid = pyplot.subplots(
        1, len(units), figsize=(4.4 * len(units), 3.2), squeeze=False, layout="constrained"
    )
    for axes, (unit, costs) in zip(grid.flat, units.items(), strict=True):
        for cost in costs:
            shown = [(point.x, point.costs[cost]) for point in points if cost in point.costs]
            axes.plot(*zip(*shown, strict=True), marker="o", markersize=3, linewidth=1.2,
                      label=cost.rpartition(", ")[0])  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log" if unit == "ms" else "linear")
        if unit != "ms":
            axes.set_ylim(bottom=0)
        axes.set_xlabel(curve.unit, fontsize=8)
        axes.set_ylabel(unit, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(curve.title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
