"""Reads answered from memory in one call: it sends what `send_blocks` sends, or nothing at all.

All of it on a real file. What `sent` says of every block, test_blockread.py says of it as well;
here are the cases in which it must not answer, those in which it must, and random ones.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sending import HEADER, TRIES_MAX, quickly_sent, sent, slowly_sent
from test_rebuild import GEOMETRY as SMALL
from test_rebuild import KEY as SMALL_KEY
from test_rebuild import broken, covered

from sealfs.errors import BlockDamaged
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.outbox import ANSWERS_MAX
from sealfs.image.reader import KEEP_EVERY
from sealfs.image.steps import Steps, run
from sealfs.image.storage import FileStorage

_blockread = pytest.importorskip("sealfs.image._blockread", reason="tools/setup builds it")

T = TypeVar("T")

PAGE = 4096
KEY = bytes(range(32))
BLOCKS = 300
GROUP = 128
GEOMETRY = Geometry(journal_pages=256)


def content_of(block: int) -> bytes:
    return random.Random(block).randbytes(PAGE)


def contents_of(first: int, count: int) -> bytes:
    return b"".join(map(content_of, range(first, first + count)))


def opened(path: Path, cache: BlockCache | None = None, **options: Any) -> SealedImage:
    if cache is None:
        cache = BlockCache(64 * PAGE, 512 * PAGE)
    options = {"image_key": KEY, "geometry": GEOMETRY, **options}
    return SealedImage.open(FileStorage.open(path), cache=cache, **options)


def made(path: Path, *, size: int = BLOCKS * PAGE, geometry: Geometry = GEOMETRY) -> Path:
    storage = FileStorage.create(path)
    identity = Identity(uuid=os.urandom(16), vm_id="vm", kmi="vm")
    SealedImage.create(storage, identity=identity, image_key=KEY, size=size, geometry=geometry)
    storage.close()
    return path


@pytest.fixture
def image(tmp_path: Path) -> Iterator[SealedImage]:
    """An image of which each block above 63 is there; its pages and keys are in memory."""
    path = made(tmp_path / "disk.sealed")
    first = opened(path)
    first.write(64 * PAGE, contents_of(64, BLOCKS - 64))
    first.close()
    del first
    found = opened(path)
    for group in (64, GROUP, 2 * GROUP):
        assert slowly_sent(found, group * PAGE) == content_of(group)
    found.write((BLOCKS - 1) * PAGE, content_of(BLOCKS - 1))
    found.flush()  # under the key of a new epoch
    assert slowly_sent(found, (BLOCKS - 1) * PAGE) == content_of(BLOCKS - 1)
    yield found
    found.abandon()


def answered(quick: Any, offset: int, size: int = PAGE) -> bytes | None:
    """As `quickly_sent`, of what it is to answer."""
    return again(lambda: quickly_sent(quick, offset, size))


def again(ask: Callable[[], T]) -> T:
    """Ask again where a page is busy for a moment; return what came of it in the end."""
    for _ in range(TRIES_MAX):
        found = ask()
        if found:
            break
        time.sleep(0.01)
    return found


def offset_of(image: SealedImage, block: int) -> int:
    """Return where a block lies in the file."""
    group, index = divmod(block, GROUP)
    return GEOMETRY.block_offset(image._volume.tree.slot_of(group), index)


@contextlib.contextmanager
def altered(image: SealedImage, block: int, byte: int = PAGE - 1) -> Iterator[None]:
    """Change one bit of a sealed block for as long as this lasts."""
    at = offset_of(image, block)
    good = image._storage.read(at, PAGE)
    bad = bytearray(good)
    bad[byte] ^= 1
    image._storage.write(at, [bad])
    yield
    image._storage.write(at, [good])


# What it answers.


def test_every_run_within_a_group_is_answered(image: SealedImage) -> None:
    quick = image.quick()
    for block in range(64, BLOCKS):
        assert answered(quick, block * PAGE) == content_of(block)
    for count in range(2, 33):
        for first in (64, GROUP - count, GROUP, BLOCKS - count):
            found = answered(quick, first * PAGE, count * PAGE)
            assert found == contents_of(first, count), (first, count)


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (64 * PAGE, 0),
        (64 * PAGE, 33 * PAGE),
        (64 * PAGE, 512),
        (64 * PAGE, PAGE + 512),
        (64 * PAGE + 512, PAGE),
        (64 * PAGE + 1, PAGE - 1),
        (0, PAGE),
        (63 * PAGE, PAGE),
        (63 * PAGE, 2 * PAGE),
        (48 * PAGE, 32 * PAGE),
        ((GROUP - 1) * PAGE, 2 * PAGE),
        ((2 * GROUP - 31) * PAGE, 32 * PAGE),
        (BLOCKS * PAGE, PAGE),
        ((BLOCKS - 1) * PAGE, 2 * PAGE),
        ((BLOCKS - 31) * PAGE, 32 * PAGE),
        (1 << 40, PAGE),
        ((1 << 63) - PAGE, PAGE),
        ((1 << 64) - PAGE, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (64 * PAGE, (1 << 64) - PAGE),
    ],
)
def test_what_is_not_of_the_usual_case_is_left_alone(
    image: SealedImage, offset: int, size: int
) -> None:
    assert quickly_sent(image.quick(), offset, size) is None


def test_the_last_block_of_a_disk_that_ends_within_it_is_left_alone(image: SealedImage) -> None:
    quick = image.quick()
    last = BLOCKS - 1
    assert answered(quick, last * PAGE) == content_of(last)
    image.resize(BLOCKS * PAGE - 512)
    assert quickly_sent(quick, last * PAGE) is None
    assert answered(quick, (last - 1) * PAGE) == content_of(last - 1)
    image.resize(BLOCKS * PAGE)
    image.flush()
    assert quickly_sent(quick, last * PAGE) in (None, content_of(last)[:-512] + bytes(512))
    assert sent(image, last * PAGE) == content_of(last)[:-512] + bytes(512)
    image.resize((BLOCKS + 10) * PAGE)
    assert quickly_sent(quick, BLOCKS * PAGE) is None
    image.write(BLOCKS * PAGE, content_of(BLOCKS))
    image.flush()
    assert answered(quick, BLOCKS * PAGE) == content_of(BLOCKS)


def test_each_change_is_seen_at_once(image: SealedImage) -> None:
    quick = image.quick()
    for round_ in range(3):
        for block in (64, 100, 200):
            new = content_of(1000 * round_ + block)
            assert answered(quick, block * PAGE) is not None
            assert image.try_write(block * PAGE, new)
            assert quickly_sent(quick, block * PAGE) is None
            assert answered(quick, (block + 1) * PAGE) == content_of(block + 1)
            assert quickly_sent(quick, (block - 2) * PAGE, 3 * PAGE) is None
            image.flush()
            assert answered(quick, block * PAGE) == new
    image.discard(100 * PAGE, PAGE)
    assert quickly_sent(quick, 100 * PAGE) is None
    assert sent(image, 100 * PAGE) == bytes(PAGE)
    image.discard(GROUP * PAGE, GROUP * PAGE)
    assert quickly_sent(quick, GROUP * PAGE) is None
    assert answered(quick, 2 * GROUP * PAGE) == content_of(2 * GROUP)
    image.write(GROUP * PAGE, contents_of(3000, GROUP))
    image.checkpoint()
    assert answered(quick, GROUP * PAGE, 32 * PAGE) == contents_of(3000, 32)


@pytest.mark.parametrize(("first", "count"), [(70, 1), (70, 40), (GROUP, GROUP), (64, 200)])
def test_a_block_under_commit_is_never_sent_as_it_was(
    image: SealedImage, first: int, count: int
) -> None:
    """Asked before and after every step of the commit."""
    quick = image.quick()
    new = {block: content_of(5000 + block) for block in range(first, first + count)}
    for block, content in new.items():
        assert image.try_write(block * PAGE, content)
    probes = sorted({first, first + count // 2, first + count - 1})
    committing = 0

    def probe() -> None:
        nonlocal committing
        cache = image._cache
        for block in probes:
            if cache.has_newer(block, 1):
                committing += block in cache.committing
                assert quickly_sent(quick, block * PAGE) is None
            else:
                assert answered(quick, block * PAGE) == new[block]

    watched(image.flush_steps(), probe)
    assert committing, "nothing was under commit at any step"
    for block in probes:
        assert answered(quick, block * PAGE) == new[block]


def watched(steps: Steps[Any], probe: Callable[[], None]) -> None:
    """Drive an operation to its end, with a look before and after each step."""

    def looking() -> Steps[None]:
        with contextlib.suppress(StopIteration):
            work = next(steps)
            while True:
                probe()
                result = yield work
                probe()
                work = steps.send(result)

    run(looking())
    probe()


def test_what_is_in_the_journal_only_is_left_alone(image: SealedImage, tmp_path: Path) -> None:
    """An image that was killed and is opened for reading: nothing is brought home."""
    image.checkpoint()
    before = offset_of(image, 70)
    old = image._storage.read(before, PAGE)
    image.write(70 * PAGE, content_of(7000))
    image.write(200 * PAGE, content_of(7001))
    image.flush()
    path = tmp_path / "copy.sealed"
    path.write_bytes(Path(image._storage.path).read_bytes())
    with open(path, "r+b") as file:  # as if the power went before it came home
        file.seek(before)
        file.write(old)
    killed = opened(path, read_only=True)
    quick = killed.quick()
    assert {70, 200} <= set(killed._volume.inline)
    assert killed.read(70 * PAGE, PAGE) == content_of(7000)
    assert killed.read(200 * PAGE, PAGE) == content_of(7001)
    killed._cache.discard(0, BLOCKS)  # the plaintext cache has them now, by the long way
    for epoch in killed._volume.cipher._rows:
        assert killed._volume.cipher.teach(epoch)
    for block in (70, 71, 200):
        assert quickly_sent(quick, block * PAGE) is None
        assert quickly_sent(quick, block * PAGE, 2 * PAGE) is None
        assert sent(killed, block * PAGE) is None
    killed._volume.inline.clear()  # it is what kept it from it
    assert answered(quick, 71 * PAGE) == content_of(71)
    killed.abandon()


def test_nothing_is_sent_of_what_a_lost_node_page_names(tmp_path: Path) -> None:
    node = (1, 2)
    storage, content = broken(node)
    path = tmp_path / "lost.sealed"
    path.write_bytes(storage.disk.device())
    image = opened(path, image_key=SMALL_KEY, geometry=SMALL)
    quick, usual = image.quick(), 0
    for block in range(len(content) // PAGE):
        if block in covered(node):
            with pytest.raises(BlockDamaged, match="are lost"):
                sent(image, block * PAGE)
        else:
            wanted = content[block * PAGE : (block + 1) * PAGE]
            assert sent(image, block * PAGE) == wanted
            usual += quickly_sent(quick, block * PAGE) == wanted
    assert usual > 50
    image.abandon()


def test_a_leaf_page_that_is_not_in_memory_is_not_waited_for(image: SealedImage) -> None:
    quick = image.quick()
    image._volume.tree.leaves.clear()
    assert quickly_sent(quick, 70 * PAGE) is None
    assert quickly_sent(quick, 200 * PAGE) is None
    assert slowly_sent(image, 70 * PAGE) == content_of(70)
    assert answered(quick, 70 * PAGE) == content_of(70)
    assert quickly_sent(quick, 200 * PAGE) is None


def test_a_group_without_a_slot_is_a_hole_whatever_leaf_page_there_is(image: SealedImage) -> None:
    quick, tree = image.quick(), image._volume.tree
    tree.nodes[1][0].present[0] = 0
    assert quickly_sent(quick, 70 * PAGE) is None
    tree.nodes[1][0].present[0] = 1
    assert answered(quick, 70 * PAGE) == content_of(70)


# Keys.


def test_runs_of_two_epochs_are_answered_once_both_keys_are_known(image: SealedImage) -> None:
    image.write(70 * PAGE, content_of(8000))
    image.flush()
    quick = image.quick()
    assert image._volume.cipher.opener is not None
    image._volume.cipher.opener.forget()
    assert quickly_sent(quick, 69 * PAGE) is None
    assert slowly_sent(image, 69 * PAGE) == content_of(69)
    assert answered(quick, 69 * PAGE) == content_of(69)
    for first in (69, 70):
        assert quickly_sent(quick, first * PAGE, 2 * PAGE) is None
    assert slowly_sent(image, 70 * PAGE) == content_of(8000)
    assert answered(quick, 69 * PAGE, 2 * PAGE) == content_of(69) + content_of(8000)
    assert answered(quick, 70 * PAGE, 2 * PAGE) == content_of(8000) + content_of(71)


def test_after_the_image_was_let_go_of_nothing_is_answered(image: SealedImage) -> None:
    quick, fd, path = image.quick(), image.descriptor, image._storage.path
    for _ in range(2 * KEEP_EVERY):
        assert answered(quick, 70 * PAGE) == content_of(70)
    assert image._cache.get_clean(70) == content_of(70)
    image.abandon()
    assert quickly_sent(quick, 70 * PAGE) is None
    assert quickly_sent(quick, 71 * PAGE) is None
    again = os.open(path, os.O_RDONLY)  # the number of the file that was closed, the same file
    os.dup2(again, fd)
    assert quickly_sent(quick, 71 * PAGE, 2 * PAGE) is None
    os.close(fd)
    if again != fd:
        os.close(again)


# What was altered.


def test_what_was_altered_is_never_sent(image: SealedImage) -> None:
    quick = image.quick()
    for byte in (0, 2000, PAGE - 1):
        with altered(image, 80, byte):
            assert quickly_sent(quick, 80 * PAGE) is None
            for first in (80, 65, 49 + 16):
                assert quickly_sent(quick, first * PAGE, 16 * PAGE) is None
            assert answered(quick, 81 * PAGE, 16 * PAGE) == contents_of(81, 16)
            assert sent(image, 80 * PAGE) is None
            with pytest.raises(BlockDamaged):
                image.read(80 * PAGE, PAGE)
        assert answered(quick, 80 * PAGE) == content_of(80)
    leaf = image._volume.tree.leaves[0]
    for byte in range(28):  # the epoch, the counter, the tag
        leaf[80 * 32 + byte] ^= 1
        assert quickly_sent(quick, 80 * PAGE) is None
        leaf[80 * 32 + byte] ^= 1
    storage = image._storage
    good = storage.read(offset_of(image, 90), PAGE)
    storage.write(offset_of(image, 90), [storage.read(offset_of(image, 91), PAGE)])
    assert quickly_sent(quick, 90 * PAGE) is None
    entries = bytes(leaf[90 * 32 : 92 * 32])
    leaf[90 * 32 : 91 * 32] = entries[32:]  # the other block's entry with it: a good block, moved
    assert quickly_sent(quick, 90 * PAGE) is None
    leaf[90 * 32 : 91 * 32] = entries[:32]
    storage.write(offset_of(image, 90), [good])
    assert answered(quick, 90 * PAGE) == content_of(90)


def test_of_what_does_not_authenticate_nothing_stays_in_memory(image: SealedImage) -> None:
    """GCM has opened all of it before it finds the tag wrong."""
    quick, marks = image.quick(), [content_of(block)[:64] for block in range(80, 96)]
    box = _blockread.Outbox(-1)
    assert quick is not None
    gc.collect()  # the image that wrote them
    with altered(image, 95):
        assert not quick.answer(80 * PAGE, 16 * PAGE, box, HEADER)
    assert not any(mark in memory for memory in secret_memory() for mark in marks)
    assert again(partial(quick.answer, 80 * PAGE, 16 * PAGE, box, HEADER))
    assert all(any(mark in memory for memory in secret_memory()) for mark in marks)


def secret_memory() -> list[bytes]:
    """Return what is in memory that is kept out of dumps, where answers are kept back."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)
    found = []
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        for each in maps:
            place = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", each)
            if place is None or not re.search(r"^VmFlags:.* dd\b", each, re.M):
                continue
            start, stop = (int(number, 16) for number in place.groups())
            if stop - start <= 64 << 20:
                memory.seek(start)
                found.append(memory.read(stop - start))
    return found


def test_what_is_not_in_the_page_cache_is_not_waited_for(image: SealedImage) -> None:
    quick, fd, not_there = image.quick(), image.descriptor, 0
    for count in (1, 4, 1, 4):
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        found = quickly_sent(quick, 200 * PAGE, count * PAGE)
        not_there += found is None
        assert found in (None, contents_of(200, count))
        os.pread(fd, count * PAGE, offset_of(image, 200))
        assert answered(quick, 200 * PAGE, count * PAGE) == contents_of(200, count)
    if not not_there:
        pytest.skip("this file system keeps its pages")


def test_of_a_file_that_was_cut_off_nothing_is_sent(image: SealedImage) -> None:
    quick, fd = image.quick(), image.descriptor
    os.truncate(fd, offset_of(image, 299) + PAGE - 1)
    assert quickly_sent(quick, 299 * PAGE) is None
    assert quickly_sent(quick, 298 * PAGE, 2 * PAGE) is None
    assert answered(quick, 298 * PAGE) == content_of(298)


# The plaintext cache.


def test_a_block_of_the_plaintext_cache_is_counted_and_becomes_the_last_used(
    image: SealedImage,
) -> None:
    quick, cache = image.quick(), image._cache
    for block in (70, 71, 72):
        cache.put_clean(block, content_of(9000 + block))  # another content: it comes from here
    hits = cache.shared.hits
    assert answered(quick, 70 * PAGE) == content_of(9070)
    assert cache.shared.hits == hits + 1
    assert [key - cache.base for key in cache.shared.clean] == [71, 72, 70]
    assert answered(quick, 73 * PAGE) == content_of(73)
    assert answered(quick, 71 * PAGE, 2 * PAGE) == contents_of(71, 2)  # runs come from the file
    assert cache.shared.hits == hits + 1
    assert [key - cache.base for key in cache.shared.clean] == [71, 72, 70]
    image.try_write(70 * PAGE, content_of(70))
    assert quickly_sent(quick, 70 * PAGE) is None
    assert cache.shared.hits == hits + 1
    odds: tuple[Any, ...] = (b"", content_of(1)[1:], bytearray(PAGE))
    for odd in odds:
        cache.put_clean(72, odd)
        assert answered(quick, 72 * PAGE) == content_of(72)


def test_a_clean_block_needs_neither_leaf_page_nor_file(image: SealedImage) -> None:
    quick = image.quick()
    image._cache.put_clean(70, content_of(70))
    image._volume.tree.leaves.clear()
    with altered(image, 70):
        assert answered(quick, 70 * PAGE) == content_of(70)
    image.resize(70 * PAGE)
    assert quickly_sent(quick, 70 * PAGE) is None


def test_one_in_so_many_is_kept(image: SealedImage) -> None:
    quick, clean = image.quick(), image._cache.shared.clean
    base = image._cache.base
    for _ in range(3 * KEEP_EVERY):  # runs leave nothing behind, and do not count
        assert answered(quick, 100 * PAGE, 2 * PAGE) == contents_of(100, 2)
    assert not clean
    for number in range(1, 4 * KEEP_EVERY + 1):
        assert answered(quick, (63 + number) * PAGE) == content_of(63 + number)
        assert len(clean) == number // KEEP_EVERY
    for number in range(KEEP_EVERY, 4 * KEEP_EVERY + 1, KEEP_EVERY):
        assert clean[base + 63 + number] == content_of(63 + number)


def test_what_cannot_be_kept_is_answered_all_the_same(image: SealedImage) -> None:
    quick = image.quick()
    put_clean, tried = type(image._cache).put_clean, []

    def refuse(self: object, block: int, content: bytes) -> None:
        tried.append(block)
        raise MemoryError

    type(image._cache).put_clean = refuse  # type: ignore[method-assign]
    try:
        for _ in range(KEEP_EVERY):
            assert answered(quick, 70 * PAGE) == content_of(70)
    finally:
        type(image._cache).put_clean = put_clean  # type: ignore[method-assign]
    assert tried == [70]


def test_images_that_share_a_cache_never_get_each_others_blocks(tmp_path: Path) -> None:
    cache = BlockCache(40 * PAGE, 512 * PAGE)
    images, quicks = [], []
    for number in range(3):
        path = made(tmp_path / f"{number}.sealed", size=20 * PAGE)
        image = opened(path, cache)
        image.write(0, contents_of(100 * number, 20))
        image.flush()
        images.append(image)
        quicks.append(image.quick())
    rng = random.Random(7)
    for _ in range(1500):
        number, block = rng.randrange(3), rng.randrange(20)
        found = quickly_sent(quicks[number], block * PAGE)
        if found is None:
            found = slowly_sent(images[number], block * PAGE)
        assert found == content_of(100 * number + block)
    assert cache.hits > 500
    owners = {key - key % (1 << 48) for key in cache.clean}
    assert owners == {image._cache.base for image in images}
    images[0].abandon()
    assert quickly_sent(quicks[0], 0) is None
    assert sent(images[1], 0) == content_of(100)
    for image in images[1:]:
        image.abandon()


# Answers.


def test_a_full_outbox_sends_what_it_has_first(image: SealedImage) -> None:
    quick = image.quick()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    box = _blockread.Outbox(ours.fileno())
    assert quick is not None
    for number in range(ANSWERS_MAX):
        assert again(partial(quick.answer, (70 + number) * PAGE, PAGE, box, bytes([number])))
    assert box.count == ANSWERS_MAX
    with altered(image, 90):
        assert not quick.answer(90 * PAGE, PAGE, box, b"altered")
    assert again(partial(quick.answer, 99 * PAGE, PAGE, box, b"x" * 64))
    assert box.count == 1
    box.flush()
    for number in range(ANSWERS_MAX):
        assert theirs.recv(1 << 16) == bytes([number]) + content_of(70 + number)
    assert theirs.recv(1 << 16) == b"x" * 64 + content_of(99)
    with pytest.raises(ValueError, match="sizes do not fit"):
        quick.answer(99 * PAGE, PAGE, box, b"x" * 65)
    assert box.count == 0
    ours.close()
    theirs.close()


def test_sizes_that_do_not_fit_are_refused() -> None:
    right = arguments()
    _blockread.Quick(**right)
    for name in ("group_blocks", "fanout", "keep_every"):
        with pytest.raises(ValueError, match="sizes do not fit"):
            _blockread.Quick(**{**right, name: 0})
    for name in ("clean", "nodes", "leaves", "opener"):
        with pytest.raises(TypeError):
            _blockread.Quick(**{**right, name: []})
    with pytest.raises(TypeError):
        _blockread.Quick(**{name: right[name] for name in right if name != "fd"})


def arguments() -> dict[str, Any]:
    """Return what makes one that has nothing to answer with."""
    cache = SimpleNamespace(dirty={}, committing={})
    return {
        "image": SimpleNamespace(size=1 << 40), "volume": SimpleNamespace(inline={}),
        "cache": cache, "shared": SimpleNamespace(hits=0), "clean": {}, "nodes": {}, "leaves": {},
        "opener": _blockread.Opener(b""), "fd": -1, "base": 0, "group_blocks": 4, "fanout": 4,
        "first_home": 0, "slot_size": PAGE, "keep_every": 1,
    }  # fmt: skip


def test_an_attribute_that_is_missing_or_odd_is_an_error_and_no_answer() -> None:
    box = _blockread.Outbox(-1)
    for name, attribute in (
        ("image", "size"), ("volume", "inline"), ("cache", "dirty"), ("cache", "committing"),
    ):  # fmt: skip
        odd = arguments()
        delattr(odd[name], attribute)
        with pytest.raises(AttributeError, match=attribute):
            _blockread.Quick(**odd).answer(0, PAGE, box, HEADER)
    odd = arguments()
    odd["cache"].dirty = [0]
    with pytest.raises(TypeError, match="no dictionary"):
        _blockread.Quick(**odd).answer(0, PAGE, box, HEADER)
    odd = arguments()
    odd["image"].size = -1
    with pytest.raises(OverflowError):
        _blockread.Quick(**odd).answer(0, PAGE, box, HEADER)
    for node in (SimpleNamespace(present=b"\1" * 4, slots=b"\0" * 3), SimpleNamespace(present=b"")):
        odd = {**arguments(), "nodes": {0: node}, "leaves": {0: bytes(PAGE)}}
        assert not _blockread.Quick(**odd).answer(0, PAGE, box, HEADER)
    odd = {**arguments(), "nodes": {0: SimpleNamespace(present=None)}}
    with pytest.raises(TypeError):
        _blockread.Quick(**odd).answer(0, PAGE, box, HEADER)
    odd = arguments() | {
        "nodes": {0: SimpleNamespace(present=b"\1" * 4, slots=bytes(16))},
        "leaves": {0: bytearray(127)},
    }
    assert not _blockread.Quick(**odd).answer(3 * PAGE, PAGE, box, HEADER)  # a leaf page too short
    assert box.count == 0


def test_a_run_ends_with_its_group_whatever_its_leaf_page_says(tmp_path: Path) -> None:
    key, nonces = os.urandom(32), [bytes([1, 0, 0, 0, i]).ljust(12, b"\0") for i in range(2)]
    sealed = [
        AESGCM(key).encrypt(nonces[i], content_of(i), (3 + i).to_bytes(8, "little"))
        for i in range(2)
    ]
    entries = [nonces[i] + sealed[i][PAGE:] + b"\1\0\0\0" for i in range(2)]
    path = tmp_path / "slot"
    path.write_bytes(bytes(3 * PAGE) + sealed[0][:PAGE] + sealed[1][:PAGE])
    given = arguments()
    given["opener"].add(1, key)
    node = SimpleNamespace(present=b"\1" * 4, slots=bytes(16))
    given |= {"nodes": {0: node}, "leaves": {0: bytes(3 * 32) + b"".join(entries)}, "keep_every": 9}
    with open(path, "rb") as file:
        given["fd"] = file.fileno()
        file.read()
        quick = _blockread.Quick(**given)
        assert answered(quick, 3 * PAGE) == content_of(0)
        assert quickly_sent(quick, 3 * PAGE, 2 * PAGE) is None
        quick = _blockread.Quick(**{**given, "group_blocks": 5})
        assert answered(quick, 3 * PAGE, 2 * PAGE) == content_of(0) + content_of(1)


def test_what_it_looks_at_may_go_while_it_looks() -> None:
    nodes: dict[int, object] = {}

    class Node:
        @property
        def present(self) -> bytes:
            nodes.clear()
            return b"\1" * 4

        slots = bytes(16)

    nodes[0] = Node()
    quick = _blockread.Quick(**{**arguments(), "nodes": nodes})
    assert not quick.answer(0, PAGE, _blockread.Outbox(-1), HEADER)
    assert not nodes


def test_one_that_refers_to_itself_is_collected() -> None:
    class Image:
        quick: object

    image = Image()
    image.quick = _blockread.Quick(**{**arguments(), "image": image})
    gone = weakref.ref(image)
    del image
    gc.collect()
    assert gone() is None


# Random ones.


TINY = Geometry(
    group_blocks=8, fanout=4, depth=3, header_pages=6, identity_pages=2, journal_pages=64
)
DISK_MAX = 90 * PAGE


class Guest:
    """Random requests for an image and a plain copy of what is to be in it; all reads compared."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.path = made(path, size=60 * PAGE, geometry=TINY)
        self.model = bytearray(self.rng.randbytes(60 * PAGE))
        self.answered = 0
        self.open()
        self.image.write(0, self.model)

    def open(self) -> None:
        """Open it; what answers is made once, as a handle has it."""
        cache = BlockCache(self.rng.choice((0, 8, 200)) * PAGE, 256 * PAGE)
        self.image = opened(self.path, cache, geometry=TINY)
        self.quick = self.image.quick()

    def read(self) -> None:
        """Read blocks, somewhere."""
        count = self.rng.choice((1, 1, 1, 2, 3, 8))
        block = self.rng.randrange(DISK_MAX // PAGE + 2)
        offset, size = block * PAGE, count * PAGE
        found = quickly_sent(self.quick, offset, size)
        if found is not None:
            self.answered += 1
            assert found == self.model[offset : offset + size]
        elif self.rng.random() < 0.8:
            found = sent(self.image, offset, size)
            assert found in (None, self.model[offset : offset + size])
        plan = self.image.plan_read(offset, size)
        assert plan is None or offset + size <= len(self.model)
        if plan is not None:
            buffer = bytearray(b"\xff" * size)
            assert plan(memoryview(buffer), True)
            assert buffer == self.model[offset : offset + size]

    def write(self) -> None:
        """Write bytes or blocks, within the disk."""
        offset, size = self.rng.randrange(len(self.model)), self.rng.randrange(1, 3 * PAGE)
        if self.rng.random() < 0.7:
            offset, size = offset // PAGE * PAGE, self.rng.choice((1, 2, 8, 16)) * PAGE
        data = self.rng.randbytes(min(size, len(self.model) - offset))
        if not self.image.try_write(offset, data):
            assert run(self.image.write_steps(offset, data))
        self.model[offset : offset + len(data)] = data

    def flush(self) -> None:
        """Flush, reading and now and then writing beside it."""

        def beside() -> None:
            self.read()
            if self.rng.random() < 0.1:
                block = self.rng.randrange(len(self.model) // PAGE)
                data = self.rng.randbytes(PAGE)
                if self.image.try_write(block * PAGE, data):
                    self.model[block * PAGE : (block + 1) * PAGE] = data

        watched(self.image.flush_steps(), beside)

    def discard(self) -> None:
        """Punch a hole."""
        offset, size = self.rng.randrange(len(self.model)), self.rng.randrange(20 * PAGE)
        size = min(size, len(self.model) - offset)
        self.image.discard(offset, size)
        self.model[offset : offset + size] = bytes(size)

    def resize(self) -> None:
        """Make the disk larger or smaller, seldom by whole blocks."""
        size = self.rng.randrange(20 * PAGE, DISK_MAX) // 512 * 512
        self.image.resize(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def forget(self) -> None:
        """Let go of what is in memory only to be quick."""
        volume, choice = self.image._volume, self.rng.randrange(4)
        if choice == 0:
            self.image.checkpoint()
            volume.tree.leaves.clear()
        elif choice == 1:
            assert volume.cipher.opener is not None
            volume.cipher.opener.forget()
        elif choice == 2:
            self.image.flush()
            os.posix_fadvise(self.image.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            self.image.close()
            self.open()

    def live(self, requests: int) -> None:
        """Do so much, and compare all of it in the end."""
        kinds = {
            self.read: 60, self.write: 10, self.flush: 10, self.discard: 2, self.resize: 2,
            self.forget: 2,
        }  # fmt: skip
        for kind in self.rng.choices(list(kinds), list(kinds.values()), k=requests):
            kind()
        self.image.flush()
        assert self.image.read(0, DISK_MAX) == self.model
        self.image.abandon()


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_find_what_a_plain_copy_has(seed: int, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "disk.sealed", seed)
    guest.live(500)
    assert guest.answered > 20
