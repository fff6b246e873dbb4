"""The arithmetic of a sealed image: everything has one place, and no two things share one."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.image.layout import (
    BLOCK_SIZE,
    SIZE_MAX,
    Geometry,
    block_count_of,
    geometry_for,
    group_runs,
    runs_of,
)

MIB = 1 << 20
GIB = 1 << 30

fixed = settings(derandomize=True, deadline=None)
geometries = st.builds(
    Geometry,
    group_blocks=st.integers(1, 200),
    fanout=st.integers(2, 128),
    depth=st.integers(1, 4),
    header_pages=st.integers(3, 300),
    identity_pages=st.just(1),
    journal_pages=st.integers(4, 20_000),
)


@fixed
@given(geometries, st.integers(0, 50))
def test_structures_follow_each_other_without_gap_or_overlap(g: Geometry, slot: int) -> None:
    half = g.header_pages * BLOCK_SIZE
    for copy in (0, 1):
        assert g.superblock_offset(copy) == copy * half
        assert g.identity_offset(copy) == g.superblock_offset(copy) + BLOCK_SIZE
        assert g.table_offset(copy) == g.identity_offset(copy) + g.identity_pages * BLOCK_SIZE
        assert g.table_offset(copy) + g.table_rows_max * 40 <= (copy + 1) * half
    assert g.journal_offset == g.journal_page_offset(0) == 2 * half
    assert g.journal_page_offset(g.journal_pages) == g.slots_offset == g.slot_offset(0)
    assert g.slot_offset(slot + 1) - g.slot_offset(slot) == g.slot_size
    pages = [g.leaf_offset(slot, place) for place in (0, 1)]
    pages += [g.block_offset(slot, index) for index in range(g.group_blocks)]
    expected = range(g.slot_offset(slot), g.slot_offset(slot + 1), BLOCK_SIZE)
    assert pages == list(expected)
    nodes = [g.node_offset(slot, p, place) for p in range(g.chunk_nodes) for place in (0, 1)]
    assert nodes == list(expected)[: 2 * g.chunk_nodes]


@fixed
@given(geometries, st.integers(0, 1000), st.integers(0, 3 * MIB))
def test_a_file_has_the_slots_that_lie_wholly_within_it(g: Geometry, count: int, more: int) -> None:
    size = g.slot_offset(count)
    assert g.slot_count_of(size) == count
    assert g.slot_count_of(size + g.slot_size - 1) == count
    assert g.slot_count_of(max(0, size - 1)) == max(0, count - 1)
    assert g.slot_offset(g.slot_count_of(size + more)) <= size + more
    assert g.slot_count_of(0) == 0


def test_the_figures_of_the_format_document() -> None:
    g = geometry_for(10 * GIB)
    assert (g.group_blocks, g.fanout, g.depth) == (128, 128, 4)
    assert (g.header_pages, g.identity_pages, g.slot_pages) == (256, 15, 130)
    assert g.journal_offset == 2 * MIB
    assert g.slots_offset == 66 * MIB
    assert g.slot_size == 520 * 1024
    assert g.chunk_nodes == 65
    assert g.table_rows_max == 24_576
    assert g.size_max == SIZE_MAX == 128 << 40
    assert block_count_of(10 * GIB) // g.group_blocks == 20_480


@pytest.mark.parametrize(
    ("size", "pages"),
    [(0, 256), (16 * MIB, 256), (16 * MIB + 1, 256), (32 * MIB, 512), (GIB // 4, 4096),
     (GIB, 16384), (GIB - 1, 16383), (SIZE_MAX, 16384)],
)  # fmt: skip
def test_a_journal_is_a_16th_of_the_disk_within_bounds(size: int, pages: int) -> None:
    assert geometry_for(size).journal_pages == pages


@fixed
@given(st.integers(0, 1 << 47))
def test_blocks_hold_the_size_and_no_more(size: int) -> None:
    count = block_count_of(size)
    assert (count - 1) * BLOCK_SIZE < size <= count * BLOCK_SIZE


@fixed
@given(st.integers(0, 10_000), st.integers(0, 2_000), st.integers(1, 130))
def test_runs_cut_at_group_borders_join_to_the_run(first: int, count: int, whole: int) -> None:
    at = first
    for group, index, part in group_runs(first, count, whole):
        assert group * whole + index == at
        assert 0 < part <= whole - index
        at += part
    assert at == first + count


@fixed
@given(st.sets(st.integers(0, 300)))
def test_joined_runs_are_the_blocks_and_none_could_be_longer(blocks: set[int]) -> None:
    runs = list(runs_of(sorted(blocks)))
    assert [block for first, count in runs for block in range(first, first + count)] == sorted(
        blocks
    )
    for (first, count), (later, _) in pairwise(runs):
        assert first + count < later
