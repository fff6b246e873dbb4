"""Long reads: planned in the owner's thread, done in any; test_lane.py has those who share them."""

from __future__ import annotations

import random
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sending import slowly_sent
from test_quick import (
    BLOCKS,
    GEOMETRY,
    PAGE,
    again,
    altered,
    content_of,
    contents_of,
    opened,
    watched,
)
from test_quick import image as image  # a fixture
from test_rebuild import GEOMETRY as SMALL
from test_rebuild import KEY as SMALL_KEY
from test_rebuild import broken, covered

from sealfs.errors import BlockDamaged
from sealfs.image.image import SealedImage

GROUP = GEOMETRY.group_blocks


def planned(
    image: SealedImage, first: int, count: int = 1, *, may_wait: bool = True
) -> bytes | None:
    """Return what a plan reads; None where there is none, or it would wait."""
    plan = image.plan_read(first * PAGE, count * PAGE)
    if plan is None:
        return None
    buffer = bytearray(b"\xee" * count * PAGE)
    return bytes(buffer) if again(partial(plan, memoryview(buffer), may_wait)) else None


def stored(first: int, count: int) -> bytes:
    """What the image of the fixture holds."""
    blocks = range(first, first + count)
    return b"".join(bytes(PAGE) if block < 64 else content_of(block) for block in blocks)


@pytest.mark.parametrize("may_wait", [False, True])
def test_what_is_there_is_read_and_holes_are_zeros(image: SealedImage, may_wait: bool) -> None:
    image.resize((4 * GROUP + 7) * PAGE)
    image.flush()
    for first, count in (
        (64, 1), (64, 64), (100, 120), (64, BLOCKS - 64), (0, 1), (0, 64), (63, 2), (0, BLOCKS),
        (BLOCKS, 50), (BLOCKS - 1, 2), (3 * GROUP, GROUP), (3 * GROUP - 1, 2), (511, 8),
    ):  # fmt: skip
        wanted = stored(first, max(min(count, BLOCKS - first), 0))
        found = planned(image, first, count, may_wait=may_wait)
        assert found == wanted.ljust(count * PAGE, b"\0"), (first, count)


def test_single_holes_among_blocks_are_zeros(image: SealedImage) -> None:
    rng, content = random.Random(5), bytearray(stored(0, BLOCKS))
    for block in (64, 80, 81, 100, 127, 128, 255, 299, *rng.sample(range(64, BLOCKS), 30)):
        image.discard(block * PAGE, PAGE)
        content[block * PAGE : (block + 1) * PAGE] = bytes(PAGE)
    image.flush()
    for _ in range(100):
        first = rng.randrange(BLOCKS)
        count = rng.randrange(1, BLOCKS - first + 1)
        found = planned(image, first, count, may_wait=rng.random() < 0.5)
        assert found == bytes(content[first * PAGE : (first + count) * PAGE])


def test_of_what_is_in_the_cache_there_is_no_plan(image: SealedImage) -> None:
    new = {70: content_of(1), 200: content_of(2)}
    for block, content in new.items():
        assert image.try_write(block * PAGE, content)
    committing = 0

    def probe() -> None:
        nonlocal committing
        for block in new:
            is_newer = image._cache.has_newer(block, 1)
            committing += block in image._cache.committing
            for first, count in ((block, 1), (block - 6, 7), (block, 40), (64, BLOCKS - 64)):
                found = planned(image, first, count)
                if image._cache.has_newer(first, count):
                    assert found is None
                else:
                    assert found is not None
            assert planned(image, block - 6, 6) == contents_of(block - 6, 6)
            assert planned(image, block + 1, 40) == contents_of(block + 1, 40)
            if not is_newer:
                assert planned(image, block) == new[block]

    probe()
    assert not committing
    watched(image.flush_steps(), probe)
    assert committing
    assert planned(image, 70) == new[70]


def test_beyond_the_end_there_is_no_plan(image: SealedImage) -> None:
    assert planned(image, BLOCKS) is None
    assert planned(image, BLOCKS - 1, 2) is None
    assert planned(image, BLOCKS - 1) == content_of(BLOCKS - 1)
    image.resize(BLOCKS * PAGE - 1)
    assert planned(image, BLOCKS - 1) is None


def test_a_leaf_page_that_must_be_waited_for_leaves_no_plan(
    image: SealedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = image._volume.tree.leaves
    image.checkpoint()
    leaves.clear()
    found = again(lambda: planned(image, 100, 60))  # in the page cache: read at once
    assert found == contents_of(100, 60)
    assert set(leaves) == {0, 1}
    leaves.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(image._storage), "read_nowait", lambda *_: False)
        for first, count in ((70, 1), (100, 60), (200, 1)):
            assert planned(image, first, count) is None
        image.resize(1000 * PAGE)
        assert planned(image, 600, 100) == bytes(100 * PAGE)  # a group that has none needs none
    assert again(lambda: planned(image, 100, 60)) == contents_of(100, 60)


def test_a_leaf_page_that_was_altered_leaves_no_plan(image: SealedImage) -> None:
    image.checkpoint()
    tree, storage = image._volume.tree, image._storage
    tree.leaves.clear()
    slot, place, _ = tree.leaf_source(1)
    at = GEOMETRY.leaf_offset(slot, place & 1)
    page = bytearray(storage.read(at, PAGE))
    page[40] ^= 1
    storage.write(at, [page])
    assert planned(image, 100, 60) is None
    assert planned(image, 200) is None
    assert again(lambda: planned(image, 100, 28)) == contents_of(100, 28)
    with pytest.raises(BlockDamaged):
        image.read(200 * PAGE, PAGE)


@pytest.mark.parametrize("may_wait", [False, True])
@pytest.mark.parametrize("block", [64, 99, 127])
def test_what_was_altered_is_an_error_and_leaves_nothing(
    image: SealedImage, block: int, may_wait: bool
) -> None:
    with altered(image, block):
        plan = image.plan_read(64 * PAGE, 64 * PAGE)
        assert plan is not None
        buffer = bytearray(b"\xee" * 64 * PAGE)
        with pytest.raises(BlockDamaged) as info:
            plan(memoryview(buffer), may_wait)
        assert info.value.block == block
        assert buffer == bytes(len(buffer))
    assert planned(image, 64, 64) == contents_of(64, 64)


def test_what_would_have_to_be_waited_for_is_said_and_read_all_the_same(
    image: SealedImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = image.plan_read(100 * PAGE, 60 * PAGE)
    assert plan is not None
    monkeypatch.setattr(type(image._storage), "read_nowait", lambda *_: False)
    buffer = bytearray(60 * PAGE)
    assert not plan(memoryview(buffer), False)
    assert plan(memoryview(buffer), True)
    assert buffer == contents_of(100, 60)


def test_what_is_in_the_journal_only_is_read_there(image: SealedImage, tmp_path: Path) -> None:
    image.write(70 * PAGE, content_of(7000))
    image.flush()
    path = tmp_path / "copy.sealed"
    path.write_bytes(Path(image._storage.path).read_bytes())
    killed = opened(path, read_only=True)
    assert 70 in killed._volume.inline
    home = GEOMETRY.block_offset(killed._volume.tree.slot_of(0), 70)
    with open(path, "r+b") as file:  # as if the power went before it came home
        file.seek(home)
        file.write(bytes(PAGE))
    wanted = contents_of(64, 6) + content_of(7000) + contents_of(71, 100)
    assert planned(killed, 64, 107) == wanted
    killed.abandon()


def test_what_a_lost_node_page_names_is_an_error(tmp_path: Path) -> None:
    node = (1, 2)
    storage, content = broken(node)
    path = tmp_path / "lost.sealed"
    path.write_bytes(storage.disk.device())
    image = opened(path, image_key=SMALL_KEY, geometry=SMALL)
    lost = covered(node)
    for first, count in ((lost.start, 1), (lost.start - 1, 2), (0, len(content) // PAGE)):
        with pytest.raises(BlockDamaged, match="are lost"):
            image.plan_read(first * PAGE, count * PAGE)
    assert planned(image, 0, lost.start) == content[: lost.start * PAGE]
    image.abandon()


def test_a_plan_that_is_outdated_reads_what_was_there_or_fails(image: SealedImage) -> None:
    new = content_of(1)
    for change in ("write", "discard", "write the group"):
        assert slowly_sent(image, 200 * PAGE) is not None
        plan = image.plan_read(192 * PAGE, 16 * PAGE)
        old = image.read(192 * PAGE, 16 * PAGE)
        assert plan is not None
        if change == "write":
            image.write(200 * PAGE, new)
        elif change == "discard":
            image.discard(200 * PAGE, PAGE)
        else:
            image.write(GROUP * PAGE, contents_of(4000, GROUP))
        buffer = bytearray(16 * PAGE)
        assert plan(memoryview(buffer), True)  # not durable yet: nothing has changed on the disk
        assert buffer == old
        image.checkpoint()
        try:
            plan(memoryview(buffer), True)
        except BlockDamaged:
            pass  # done again by the long way
        else:
            assert change != "write"
            assert buffer == old
        assert planned(image, 192, 16) == image.read(192 * PAGE, 16 * PAGE)


def test_read_beside_commits_each_block_is_one_that_was_there(image: SealedImage) -> None:
    """Workers read by plans all the while; each block of what they get was there since the plan."""
    first, count = 128, 64
    versions = [[content_of(first + i)] for i in range(count)]
    todo: list[tuple[Any, list[int]]] = []
    found: list[tuple[list[int], bytes]] = []
    failed: list[BaseException] = []
    ended = threading.Event()
    guard = threading.Condition()

    def read() -> None:
        buffer = bytearray(count * PAGE)
        while True:
            with guard:
                guard.wait_for(lambda: todo or ended.is_set(), 10)
                if not todo:
                    return
                plan, oldest = todo.pop()
            try:
                plan(memoryview(buffer), True)
            except BlockDamaged:
                continue
            except BaseException as exc:
                failed.append(exc)
                return
            found.append((oldest, bytes(buffer)))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    rng = random.Random(9)
    for _ in range(150):
        plan = image.plan_read(first * PAGE, count * PAGE)
        assert plan is not None
        with guard:
            todo.append((plan, [len(each) - 1 for each in versions]))
            guard.notify()
        for i in rng.sample(range(count), 3):
            versions[i].append(rng.randbytes(PAGE))
            image.write((first + i) * PAGE, versions[i][-1])
        image.flush()
    with guard:
        ended.set()
        guard.notify_all()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not failed
    for oldest, content in found:
        for i in range(count):
            assert content[i * PAGE : (i + 1) * PAGE] in versions[i][oldest[i] :]
    assert found, "nothing was read while it was current"
