"""A bit of every byte that means something is flipped, and some of the others; nothing is wrong.

All bits: `tools/torture tamper --every-bit`.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from tamper_bits import GEOMETRY, PAGE, Map, flip, maps, one_bit_of_each

STRIDES = {
    "journal": {"field": 1, "payload": 256, "rest": 256},
    # The same structures once more, without records after them.
    "clean": {"field": 4, "payload": 256, "rest": 512},
}


@pytest.mark.slow
@pytest.mark.parametrize("which", maps(), ids=lambda each: each.name)
def test_a_flipped_bit_is_noticed_or_does_not_matter(which: Map) -> None:
    rng = random.Random(f"bits {which.name}")
    outcomes: dict[str, Counter[str]] = {
        "field": Counter(),
        "payload": Counter(),
        "rest": Counter(),
    }
    for page in which.pages:
        for part in which.parts(page):
            bits = one_bit_of_each(rng, part, STRIDES[which.name][part.kind])
            outcomes[part.kind] += flip(which, part, bits)
    assert min(outcomes["field"][name] for name in ("right", "damaged")) >= 40
    if which.name == "journal":
        assert outcomes["field"]["refused"] >= 40
    else:
        # Each structure stands twice, or is rebuilt, or is a leaf page and costs its group.
        assert outcomes["field"]["refused"] == 0
    assert outcomes["rest"]["damaged"] > 0, "the padding of a leaf page is authenticated"


def test_every_byte_of_metadata_is_in_one_part() -> None:
    for which in maps():
        for page in which.pages:
            at = page
            for part in which.parts(page):
                assert part.offset == at
                at += part.size
            assert at == page + PAGE
        headers_and_journal = GEOMETRY.slots_offset // PAGE
        trees = {
            offset
            for name in ("node", "node's other place", "leaf", "leaf's other place")
            for offset, _ in which.state.spans[name]
        }
        assert trees <= set(which.pages)
        assert len(which.pages) >= headers_and_journal + len(trees)
