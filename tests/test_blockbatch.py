"""What a commit does for each block: the C module and its twin in Python do and refuse the same."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.image import blockbatch, committer, volume
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE

_blockbatch = pytest.importorskip("sealfs.image._blockbatch", reason="tools/setup builds it")
BOTH = pytest.mark.parametrize("module", [_blockbatch, blockbatch], ids=["C", "Python"])

GROUP_BLOCKS = st.integers(1, 128)
BLOCKS = st.lists(st.integers(0, 300) | st.integers(0, 2**52), max_size=40)


def entries_of(count: int) -> bytes:
    return b"".join(bytes([i % 250 + 1]) * ENTRY_SIZE for i in range(count))


def answer(function: Any, *args: Any) -> Any:
    try:
        return function(*args)
    except (KeyError, ValueError, OverflowError) as exc:
        return type(exc), exc.args if isinstance(exc, KeyError) else None


def test_this_checkout_uses_the_c_module() -> None:
    assert volume.batches is _blockbatch
    assert committer.batches is _blockbatch


@given(blocks=BLOCKS, group_blocks=GROUP_BLOCKS)
@settings(deadline=None)
def test_both_cut_at_the_same_places(blocks: list[int], group_blocks: int) -> None:
    for given_blocks in (blocks, sorted(blocks)):
        groups, ends = _blockbatch.spans(given_blocks, group_blocks)
        assert (groups, ends) == blockbatch.spans(given_blocks, group_blocks)
        assert [
            group
            for group, start, end in zip(groups, [0, *ends], ends, strict=False)
            for _ in range(start, end)
        ] == [block // group_blocks for block in given_blocks]


@given(
    blocks=BLOCKS, group_blocks=GROUP_BLOCKS, holes=st.sets(st.integers(0, 127)),
    absent=st.sets(st.integers(0, 40)), excess=st.integers(-1, 1),
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_both_look_up_and_set_the_same_entries(
    blocks: list[int], group_blocks: int, holes: set[int], absent: set[int], excess: int
) -> None:
    page = bytearray(b"".join(bytes(28) + bytes([i not in holes, 0, 0, 0]) for i in range(128)))
    groups = {block // group_blocks for block in blocks} - absent
    entries = entries_of(max(0, len(blocks) + (excess if excess < 0 or 39 in absent else 0)))
    results = []
    for module in (_blockbatch, blockbatch):
        leaves = {group: bytearray(page) for group in groups}
        flags = answer(module.flags_of, leaves, blocks, group_blocks)
        done = answer(module.set_entries, leaves, blocks, entries, group_blocks)
        results.append((flags, done, leaves))
    assert results[0] == results[1]
    flags, done, leaves = results[0]
    assert flags == bytes(
        2 if block // group_blocks not in groups else block % group_blocks not in holes
        for block in blocks
    )
    if done is not None:
        assert all(leaf == page for leaf in leaves.values())
        return
    last = {block: i for i, block in enumerate(blocks)}
    for block, i in last.items():
        at = block % group_blocks * ENTRY_SIZE
        found = leaves[block // group_blocks][at : at + ENTRY_SIZE]
        assert found == entries[i * ENTRY_SIZE : (i + 1) * ENTRY_SIZE]


@given(blocks=BLOCKS, group_blocks=GROUP_BLOCKS, excess=st.integers(-1, 1), data=st.data())
@settings(deadline=None)
def test_both_find_the_same_places(
    blocks: list[int], group_blocks: int, excess: int, data: st.DataObject
) -> None:
    groups, ends = blockbatch.spans(blocks, group_blocks)
    count = max(0, len(groups) + excess)
    starts = data.draw(st.lists(st.integers(0, 2**50), min_size=count, max_size=count))
    offsets = answer(_blockbatch.home_offsets, blocks, group_blocks, starts)
    assert offsets == answer(blockbatch.home_offsets, blocks, group_blocks, starts)
    if count != len(groups):
        assert offsets == (ValueError, None)
        return
    expected = array("Q")
    for start, first, end in zip(starts, [0, *ends], ends, strict=False):
        expected.extend(start + b % group_blocks * BLOCK_SIZE for b in blocks[first:end])
    assert offsets == expected.tobytes()


@BOTH
def test_a_missing_leaf_page_is_named_and_nothing_is_changed(module: Any) -> None:
    leaves = {0: bytearray(BLOCK_SIZE), 2: bytearray(BLOCK_SIZE)}
    with pytest.raises(KeyError) as missing:
        module.set_entries(leaves, [0, 300, 128], entries_of(3), 128)
    assert missing.value.args == (1,)
    assert not any(leaves[0] + leaves[2])


def test_sizes_that_do_not_fit_are_our_bug_and_never_a_stray_write() -> None:
    page = bytearray(BLOCK_SIZE)
    for wrong in (
        lambda: _blockbatch.spans([0], 0),
        lambda: _blockbatch.spans([0], 129),
        lambda: _blockbatch.flags_of({0: page}, [0], 129),
        lambda: _blockbatch.flags_of({0: page[:-1]}, [0], 128),
        lambda: _blockbatch.flags_of({0: bytes(page)}, [0], 128),
        lambda: _blockbatch.set_entries({0: page}, [0], entries_of(2), 128),
        lambda: _blockbatch.set_entries({0: page}, [0], entries_of(1)[:-1], 128),
        lambda: _blockbatch.set_entries({0: page}, [0], entries_of(1), 129),
        lambda: _blockbatch.set_entries({0: page[:-1]}, [0], entries_of(1), 128),
        lambda: _blockbatch.set_entries({0: bytes(page)}, [0], entries_of(1), 128),
        lambda: _blockbatch.home_offsets([0], 129, [0]),
        lambda: _blockbatch.home_offsets([0], 128, []),
        lambda: _blockbatch.home_offsets([], 128, [0]),
    ):
        with pytest.raises(ValueError, match="size"):
            wrong()
    for wrong in (
        lambda: _blockbatch.spans(7, 128),
        lambda: _blockbatch.spans([None], 128),
        lambda: _blockbatch.flags_of([], [0], 128),
        lambda: _blockbatch.flags_of({}, ["0"], 128),
        lambda: _blockbatch.set_entries({}, None, b"", 128),
        lambda: _blockbatch.set_entries({}, [0], "x", 128),
        lambda: _blockbatch.home_offsets([0], 128, [None]),
    ):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (
        lambda: _blockbatch.spans([-1], 128),
        lambda: _blockbatch.flags_of({}, [2**64], 128),
        lambda: _blockbatch.set_entries({0: page}, [0, -1], entries_of(2), 128),
        lambda: _blockbatch.home_offsets([0], 128, [-1]),
    ):
        with pytest.raises(OverflowError):
            wrong()
    assert not any(page)
