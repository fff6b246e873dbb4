"""Plaintext in memory: what is dirty is kept, what is clean may go, and nothing gets lost."""

from __future__ import annotations

import mmap
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sealfs.image.cache import BlockCache, ImageCache

PAGE = 4096


def fill(value: int, blocks: int = 1) -> bytes:
    return bytes([value]) * (blocks * PAGE)


def attached(clean: int = 8, dirty: int = 8) -> tuple[BlockCache, ImageCache]:
    cache = BlockCache(clean * PAGE, dirty * PAGE)
    return cache, cache.attach()


def test_the_newest_content_is_the_dirty_one_then_the_one_under_commit() -> None:
    _, image = attached()
    image.put(3, fill(1))
    image.begin_commit()
    assert bytes(image.newest(3) or b"") == fill(1)
    image.put(3, fill(2))
    assert bytes(image.newest(3) or b"") == fill(2)
    assert bytes(image.frame(image.committing[3])) == fill(1)
    image.finish([3])
    assert bytes(image.newest(3) or b"") == fill(2)
    assert image.newest(4) is None


def test_rewriting_a_dirty_block_takes_no_further_frame() -> None:
    cache, image = attached(dirty=4)
    image.put(0, fill(1, 4))
    assert cache.free_count == image.free_count == 0
    assert image.missing(0, 4) == 0
    image.put(1, fill(2, 2))
    assert [bytes(image.newest(i) or b"")[0] for i in range(4)] == [1, 2, 2, 1]


def test_a_write_forgets_the_clean_block() -> None:
    _, image = attached()
    image.put_clean(5, fill(1))
    image.put(5, fill(2))
    image.begin_commit()
    image.finish([5])
    assert image.get_clean(5) is None


def test_the_clean_block_used_longest_ago_makes_room() -> None:
    cache, image = attached(clean=2)
    image.put_clean(1, fill(1))
    image.put_clean(2, fill(2))
    assert image.get_clean(1) == fill(1)
    image.put_clean(3, fill(3))
    assert [image.get_clean(block) is not None for block in (1, 2, 3)] == [True, False, True]
    assert cache.clean_size == 2 * PAGE


def test_a_cache_without_clean_blocks_keeps_none() -> None:
    cache, image = attached(clean=0)
    image.put_clean(1, fill(1))
    assert image.get_clean(1) is None
    assert cache.clean_size == 0


def test_images_do_not_see_each_others_blocks_and_share_the_frames() -> None:
    cache, first = attached(dirty=4)
    second = cache.attach()
    first.put(0, fill(1, 3))
    first.put_clean(7, fill(7))
    assert second.newest(0) is None
    assert second.get_clean(7) is None
    assert second.free_count == 1
    calls = []
    cache.on_room = lambda: calls.append(cache.free_count)
    first.detach()
    assert calls == [4]
    assert (cache.dirty_size, cache.clean_size) == (0, 0)
    second.put(0, fill(2, 4))
    assert second.dirty_size == 4 * PAGE


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_it_is_said_when_fewer_than_half_of_the_frames_are_free(frames: int) -> None:
    cache, image = attached(dirty=frames)
    said: list[int] = []
    cache.on_low = lambda: said.append(cache.free_count)
    for block in range(frames):
        image.put(block, fill(1))
        cache.look()
    assert said == [free for free in range(frames, -1, -1) if free * 2 < frames]


def test_images_opened_at_the_same_time_share_one_slab_and_no_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow = mmap.mmap

    def mapped(*args: int) -> mmap.mmap:
        time.sleep(0.01)
        return slow(*args)

    monkeypatch.setattr("sealfs.image.cache.mmap.mmap", mapped)
    cache = BlockCache(8 * PAGE, 8 * PAGE)
    seen: list[tuple[int, memoryview]] = []

    def attach() -> None:
        image = cache.attach()
        seen.append((image.base, image.slab))

    threads = [threading.Thread(target=attach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({base for base, _ in seen}) == 8
    assert len({id(slab) for _, slab in seen}) == 1


def test_a_part_of_what_is_dirty_can_be_committed_alone() -> None:
    _, image = attached()
    image.put(0, fill(1, 3))
    image.begin_commit([1])
    assert (sorted(image.dirty), sorted(image.committing)) == ([0, 2], [1])
    assert image.dirty_size == 3 * PAGE


def test_limits_are_whole_blocks_and_at_least_one() -> None:
    assert BlockCache(0, 1).dirty_max == PAGE
    assert BlockCache(0, 3 * PAGE + 5).dirty_max == 3 * PAGE


class CacheMachine(RuleBasedStateMachine):
    """Two images in one cache, beside dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = BlockCache(4 * PAGE, 12 * PAGE)
        self.images = [self.cache.attach(), self.cache.attach()]
        self.dirty: list[dict[int, int]] = [{}, {}]
        self.committing: list[dict[int, int]] = [{}, {}]
        self.clean: list[dict[int, int]] = [{}, {}]
        self.value = 0

    which = st.integers(0, 1)

    @rule(i=which, first=st.integers(0, 9), count=st.integers(1, 5))
    def put(self, i: int, first: int, count: int) -> None:
        image = self.images[i]
        missing = image.missing(first, count)
        assert missing == sum(block not in self.dirty[i] for block in range(first, first + count))
        if missing > image.free_count:
            return
        values = []
        for block in range(first, first + count):
            self.value = self.value % 250 + 1
            values.append(self.value)
            self.dirty[i][block] = self.value
            self.clean[i].pop(block, None)
        image.put(first, b"".join(map(fill, values)))

    @precondition(lambda self: not all(self.committing))
    @rule(i=which)
    def begin(self, i: int) -> None:
        if not self.committing[i]:
            self.images[i].begin_commit()
            self.committing[i], self.dirty[i] = self.dirty[i], {}

    @rule(i=which, count=st.integers(1, 12))
    def finish(self, i: int, count: int) -> None:
        blocks = sorted(self.committing[i])[:count]
        self.images[i].finish(blocks)
        for block in blocks:
            del self.committing[i][block]

    @rule(i=which, first=st.integers(0, 9), count=st.integers(1, 20))
    def discard(self, i: int, first: int, count: int) -> None:
        if self.committing[i]:
            return
        self.images[i].discard(first, count)
        for block in range(first, first + count):
            self.dirty[i].pop(block, None)
            self.clean[i].pop(block, None)

    @rule(i=which, block=st.integers(0, 13))
    def keep(self, i: int, block: int) -> None:
        if block in self.dirty[i]:
            return
        self.value = self.value % 250 + 1
        self.clean[i][block] = self.value
        self.images[i].put_clean(block, fill(self.value))

    @invariant()
    def agrees(self) -> None:
        taken = 0
        for i, image in enumerate(self.images):
            taken += len(self.dirty[i]) + len(self.committing[i])
            for block in range(14):
                newest = self.dirty[i].get(block, self.committing[i].get(block))
                found = image.newest(block)
                assert (None if found is None else bytes(found)) == (newest and fill(newest))
                kept = image.get_clean(block)
                assert kept is None or kept == fill(self.clean[i].get(block, 0))
        assert self.cache.free_count == 12 - taken
        assert self.cache.dirty_size == taken * PAGE
        assert self.cache.clean_size <= 4 * PAGE


TestCache = CacheMachine.TestCase
TestCache.settings = settings(
    derandomize=True, deadline=None, max_examples=50, stateful_step_count=30
)
