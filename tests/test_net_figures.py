"""The figures of the network links: how they are summed up; the last ones reach the goals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from net import ROWS, SIDES, summary, table

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def figures(**values: list[float]) -> list[dict[str, Any]]:
    """The same for every row: each side's values, a round each."""
    return [
        {"round": number, "row": row.name, "side": side, "value": value}
        for row in ROWS
        for side, found in values.items()
        for number, value in enumerate(found)
    ]


def test_ratios_are_of_one_round_and_the_middle_one_counts() -> None:
    found = summary(
        figures(
            cable=[1.0, 1.0, 1.0], relay=[10.0, 20.0, 40.0], openvpn=[5.0, 5.0, 5.0],
            sealfs=[5.0, 20.0, 10.0],
        )
    )  # fmt: skip
    assert found["tcp"]["medians"]["sealfs"] == 10.0
    assert found["tcp"]["ratios"]["relay"] == 0.5
    assert found["tcp"]["ratios"]["openvpn"] == 2.0
    # Of a round trip less is better.
    assert found["latency"]["ratios"]["openvpn"] == 0.5


def test_the_report_has_every_row_and_side() -> None:
    found = summary(figures(**{side: [1.0] for side in SIDES}))
    text = table({"commit": "abc"}, {"1500": found})
    assert all(row.title in text for row in ROWS)
    assert "- commit: abc" in text


@pytest.mark.parametrize(("against", "must"), [("relay", 0.4), ("openvpn", 0.5)])
def test_the_last_figures_reach_what_must_be(against: str, must: float) -> None:
    last = max(RESULTS.glob("net-*.json"))
    document = json.loads(last.read_text())
    assert document["about"]["rounds"] >= 3
    ratios = [row["ratios"][against] for name, row in document["summary"]["1500"].items()
              if name != "latency"]  # fmt: skip
    assert min(ratios) >= must
