"""A block read, opened and sent in one call: the C module and its twin, on a real file."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from native_fuzz import Fuzz
from sending import HEADER, sent, slowly_sent

from sealfs.errors import BlockDamaged
from sealfs.image import cipher
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.outbox import ANSWERS_MAX, PlainOutbox, outbox
from sealfs.image.reader import KEEP_EVERY, SENT, UNSURE
from sealfs.image.storage import FileStorage
from sealfs.mount import fetcher as fetchers
from sealfs.mount.fetcher import Fetcher
from sealfs.mount.workers import Workers

_blockread = pytest.importorskip("sealfs.image._blockread", reason="tools/setup builds it")

PAGE = 4096
KEY = bytes(range(32))
UUID = b"0123456789abcdef"
BLOCKS = 300
GEOMETRY = Geometry(journal_pages=256)


def content_of(block: int) -> bytes:
    return block.to_bytes(8, "little") * (PAGE // 8)


@pytest.fixture(params=["C", "Python"])
def image(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SealedImage]:
    """An image of which every third block is a hole, opened anew: nothing of it in the cache."""
    if request.param == "Python":
        monkeypatch.setattr(cipher, "Opener", None)
    path = tmp_path / "disk.sealed"
    storage = FileStorage.create(path)
    identity = Identity(uuid=UUID, vm_id="vm", kmi="vm")
    SealedImage.create(
        storage, identity=identity, image_key=KEY, size=BLOCKS * PAGE, geometry=GEOMETRY
    )
    first = opened(storage)
    for block in range(BLOCKS):
        if block % 3:
            first.write(block * PAGE, content_of(block))
    first.close()
    found = opened(FileStorage.open(path))
    yield found
    found.abandon()


def opened(storage: FileStorage) -> SealedImage:
    cache = BlockCache(64 * PAGE, 512 * PAGE)
    return SealedImage.open(storage, image_key=KEY, cache=cache, geometry=GEOMETRY)


def expected(block: int) -> bytes:
    return content_of(block) if block % 3 else bytes(PAGE)


def test_this_checkout_uses_the_c_module() -> None:
    assert cipher.Opener is _blockread.Opener
    assert fetchers.Ring is not None


def test_every_block_is_sent_as_it_was_written(image: SealedImage) -> None:
    for _ in range(2):  # from the page cache, then from the plaintext cache
        for block in range(BLOCKS):
            assert sent(image, block * PAGE) == expected(block)
    image.write(PAGE, b"x" * PAGE)
    assert sent(image, PAGE) == b"x" * PAGE
    image.flush()
    assert sent(image, PAGE) == b"x" * PAGE
    image.discard(PAGE, PAGE)
    assert sent(image, PAGE) == bytes(PAGE)


def test_runs_are_sent_whole_or_not_at_all(image: SealedImage) -> None:
    for first, count in ((1, 2), (4, 2), (127, 2), (0, 2), (1, 3), (130, 2), (298, 2), (298, 3)):
        blocks = range(first, first + count)
        found = sent(image, first * PAGE, count * PAGE)
        is_whole = all(block % 3 for block in blocks) and first // 128 == blocks[-1] // 128
        whole = b"".join(map(expected, blocks))
        assert found == (whole if is_whole and blocks[-1] < BLOCKS else None), (first, count)
    for block in range(128, 160):
        image.write(block * PAGE, content_of(1000 + block))
    assert sent(image, 128 * PAGE, 32 * PAGE) is None  # dirty
    image.flush()
    whole = b"".join(content_of(1000 + block) for block in range(128, 160))
    assert sent(image, 128 * PAGE, 32 * PAGE) == whole  # of two epochs' keys with what follows
    image.write(159 * PAGE, b"y" * PAGE)
    assert sent(image, 128 * PAGE, 32 * PAGE) is None
    assert sent(image, 128 * PAGE, 31 * PAGE) == whole[: 31 * PAGE]
    image.discard(0, BLOCKS * PAGE)
    assert sent(image, 0, 32 * PAGE) == bytes(32 * PAGE)


def test_one_bad_block_of_a_run_holds_back_all(image: SealedImage) -> None:
    for block in range(64, 96):
        image.write(block * PAGE, content_of(block))
    image.flush()
    assert sent(image, 64 * PAGE, 32 * PAGE) == b"".join(map(content_of, range(64, 96)))
    for block in (64, 80, 95):
        at = offset_of(image, block)
        good = image._storage.read(at, PAGE)
        image._storage.write(at, [good[:-1] + bytes([good[-1] ^ 1])])
        assert sent(image, 64 * PAGE, 32 * PAGE) is None
        image._storage.write(at, [good])
    assert sent(image, 64 * PAGE, 32 * PAGE) == b"".join(map(content_of, range(64, 96)))


def test_beyond_the_end_nothing_is_sent(image: SealedImage) -> None:
    assert sent(image, BLOCKS * PAGE) is None
    image.resize(BLOCKS * PAGE - 512)
    assert sent(image, (BLOCKS - 1) * PAGE) is None


def offset_of(image: SealedImage, block: int) -> int:
    """Return where a block lies in the file."""
    reader = image._reader
    group, index = divmod(block, GEOMETRY.group_blocks)
    return GEOMETRY.block_offset(reader._tree.slot_of(group), index)


def test_what_was_altered_is_never_sent(image: SealedImage) -> None:
    good = sent(image, 4 * PAGE)
    assert good == content_of(4)
    storage = image._storage
    for block, byte in ((1, 0), (2, PAGE - 1), (5, 2000)):
        at = offset_of(image, block)
        raw = bytearray(storage.read(at, PAGE))
        raw[byte] ^= 1
        storage.write(at, [raw])
        assert image.send_blocks(block * PAGE, PAGE, outbox(-1), HEADER) == UNSURE
        assert sent(image, block * PAGE) is None
        with pytest.raises(BlockDamaged):
            image.read(block * PAGE, PAGE)
    # One block in the place of another, both good.
    storage.write(offset_of(image, 7), [storage.read(offset_of(image, 8), PAGE)])
    assert sent(image, 7 * PAGE) is None
    assert sent(image, 8 * PAGE) == content_of(8)


def test_a_leaf_page_that_was_altered_names_nothing(image: SealedImage) -> None:
    reader = image._reader
    slot, place, _ = reader._tree.leaf_source(1)
    at = GEOMETRY.leaf_offset(slot, place & 1)
    raw = bytearray(image._storage.read(at, PAGE))
    raw[12] ^= 1
    image._storage.write(at, [raw])
    assert sent(image, 130 * PAGE) is None
    with pytest.raises(BlockDamaged):
        image.read(130 * PAGE, PAGE)


def test_what_is_not_in_the_page_cache_is_named_and_read_then(image: SealedImage) -> None:
    fd = image.descriptor
    asked: list[int] = []
    found = None
    for _ in range(5):
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        receiving, sending = os.pipe()
        box = outbox(sending)
        code = image.send_blocks(200 * PAGE, PAGE, box, HEADER)
        while code >= 0:
            asked.append(code)
            os.preadv(fd, [bytearray(PAGE)], code)
            code = image.send_blocks(200 * PAGE, PAGE, box, HEADER)
        assert box.flush() == []
        os.close(sending)
        assert code == SENT
        found = os.read(receiving, 1 << 16)
        os.close(receiving)
        assert found == HEADER + content_of(200)
        image._reader._cache.discard(200, 1)
        image._reader._leaves.clear()
    reader = image._reader
    slot, place, _ = reader._tree.leaf_source(1)
    if not asked:
        pytest.skip("this file system keeps its pages")
    assert set(asked) <= {offset_of(image, 200), GEOMETRY.leaf_offset(slot, place & 1)}


def test_what_is_read_often_is_kept(image: SealedImage) -> None:
    clean = image._reader._cache._clean
    for _ in range(KEEP_EVERY - 1):
        assert slowly_sent(image, PAGE) == content_of(1)
    assert not clean
    assert slowly_sent(image, PAGE) == content_of(1)
    assert len(clean) == 1
    hits = image._reader._cache.shared.hits
    assert slowly_sent(image, PAGE) == content_of(1)
    assert image._reader._cache.shared.hits == hits + 1


def test_keys_are_let_go_of(image: SealedImage) -> None:
    assert sent(image, PAGE) == content_of(1)
    image._reader._cipher.forget()
    if (
        image._reader._cipher.opener is not None
        and image._reader._send != image._reader._send_plainly
    ):
        leaf = image._reader._leaves[0]
        with pytest.raises(KeyError):
            image._reader._cipher.opener.send(
                image.descriptor, 0, 1, 1, leaf, 32, outbox(-1), b"", False
            )


# The C module alone.


def opener_of(keys: dict[int, bytes], prefix: bytes) -> Any:
    opener = _blockread.Opener(prefix)
    for epoch, key in keys.items():
        opener.add(epoch, key)
    return opener


@pytest.mark.parametrize("cut", ["key", "prefix", "leaf"])
def test_sizes_that_do_not_fit_are_refused(cut: str, tmp_path: Path) -> None:
    key, prefix, leaf = bytes(32), b"prefix", bytes(PAGE)
    if cut == "key":
        key = bytes(31)
    elif cut == "prefix":
        prefix = bytes(57)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        box = _blockread.Outbox(fd)
        with pytest.raises(ValueError, match="sizes do not fit"):
            opener_of({0: key}, prefix).send(fd, 0, 0, 1, leaf, PAGE - 31, box, b"", False)
        opener = opener_of({0: bytes(32)}, b"")
        for count, at, header in ((1, -1, b""), (0, 0, b""), (33, 0, b""), (1, 0, bytes(65))):
            with pytest.raises(ValueError, match="sizes do not fit"):
                opener.send(fd, 0, 0, count, leaf, at, box, header, False)
        with pytest.raises(TypeError):
            opener.send(fd, 0, 0, 1, leaf, 0, fd, b"", False)
        with pytest.raises(ValueError, match="sizes do not fit"):
            box.put(b"", bytes(33 * PAGE))
        with pytest.raises(ValueError, match="sizes do not fit"):
            box.put(bytes(65), b"")
        assert box.count == 0
        with pytest.raises(TypeError):
            opener_of({0: bytes(32)}, b"").send(fd, 0)
    finally:
        os.close(fd)


def test_a_short_file_or_no_file_is_one_to_wait_for(tmp_path: Path) -> None:
    opener = opener_of({0: bytes(32)}, b"")
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    fd = os.open(path, os.O_RDONLY)
    assert opener.send(fd, 0, 0, 1, bytes(PAGE), 0, _blockread.Outbox(-1), b"", True) is None
    os.close(fd)
    assert opener.send(fd, 0, 0, 1, bytes(PAGE), 0, _blockread.Outbox(-1), b"", True) is None


def test_the_block_is_opened_by_nonce_tag_index_and_prefix(tmp_path: Path) -> None:
    key, prefix, nonce = os.urandom(32), b"prefix", os.urandom(12)
    block, plain = 0x0102030405060708, os.urandom(PAGE)
    data = prefix + block.to_bytes(8, "little")
    sealed = AESGCM(key).encrypt(nonce, plain, data)
    entry = nonce + sealed[PAGE:] + (1).to_bytes(4, "little")
    path = tmp_path / "file"
    path.write_bytes(sealed[:PAGE])
    fd = os.open(path, os.O_RDONLY)
    os.pread(fd, PAGE, 0)
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    epoch = int.from_bytes(nonce[:4], "little")
    opener = opener_of({epoch ^ 1: os.urandom(32), epoch: key, epoch ^ 2: bytes(32)}, prefix)
    box = _blockread.Outbox(out)
    assert opener.send(fd, 0, block, 1, bytes(64) + entry, 64, box, b"head", True) == plain
    assert opener.send(fd, 0, block + 1, 1, entry, 0, box, b"head", True) is False
    for bit in range(28 * 8):
        wrong = bytearray(entry)
        wrong[bit // 8] ^= 1 << bit % 8
        if bit < 32 and bit not in (0, 1):
            with pytest.raises(KeyError) as unknown:
                opener.send(fd, 0, block, 1, wrong, 0, box, b"head", True)
            assert unknown.value.args == (epoch ^ 1 << bit,)
            continue
        assert opener.send(fd, 0, block, 1, wrong, 0, box, b"head", True) is False
    assert opener.send(fd, 0, block, 1, entry, 0, box, b"head", False) is True
    assert box.count == 2
    assert box.flush() == []
    assert os.pread(out, 1 << 16, 0) == (b"head" + plain) * 2
    os.close(fd)
    os.close(out)


# Bringing blocks into the page cache.


@pytest.mark.parametrize("use_ring", [True, False], ids=["io_uring", "threads"])
def test_a_fetcher_tells_of_each_read_once(use_ring: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(200 * PAGE))
    fd = os.open(path, os.O_RDWR)

    async def main() -> None:
        workers = Workers(3)
        fetcher: Fetcher[int] = Fetcher(workers, use_ring=use_ring)
        assert (fetcher._ring is not None) == use_ring
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for number in range(200):
            # Beyond the end, and of a file that is not there, as well: told all the same.
            at = number * PAGE if number % 50 else 10**9
            assert fetcher.fetch(fd if number % 40 else 10**6, at, PAGE * (1 + number % 32), number)
        assert fetcher.count == 200
        told: list[int] = []
        with trio.fail_after(20):
            while fetcher.count:
                await trio.lowlevel.wait_readable(fetcher.fileno())
                told += fetcher.done()
        assert sorted(told) == list(range(200))
        assert fetcher.done() == []
        fetcher.close()
        workers.close()

    trio.run(main)
    there = 0
    for number in range(200):
        with contextlib.suppress(BlockingIOError):
            os.preadv(fd, [bytearray(PAGE)], number * PAGE, os.RWF_NOWAIT)
            there += 1
    assert there > 100
    os.close(fd)


def test_a_full_ring_says_so_and_a_closed_one_waits_for_what_is_under_way(tmp_path: Path) -> None:
    ring = fetchers._ring()
    if ring is None:
        pytest.skip("the kernel gives no io_uring")
    receiving, sending = os.pipe()
    taken = 0
    while ring.read(receiving, 0, PAGE, taken):
        taken += 1
    assert 64 <= taken <= 1024
    os.write(sending, b"x" * PAGE * 4)
    deadline = time.monotonic() + 10
    told: list[int] = []
    while not told:
        told += ring.done()
        assert time.monotonic() < deadline
    assert ring.read(receiving, 0, PAGE, 5000)
    os.close(sending)  # the others find the end of the file
    ring.close()
    ring.close()
    assert ring.done() == []
    assert not ring.read(receiving, 0, PAGE, 1)
    os.close(receiving)


# Answers.


@pytest.mark.parametrize("kind", [_blockread.Outbox, PlainOutbox], ids=["C", "Python"])
def test_answers_are_kept_back_and_written_each_by_itself(kind: Any) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    box = kind(ours.fileno())
    answers = [(bytes([i]) * 16, bytes([i]) * (i * 100)) for i in range(ANSWERS_MAX)]
    for header, content in answers:
        box.put(header, memoryview(content))
    assert box.count == ANSWERS_MAX
    with pytest.raises(BlockingIOError):
        theirs.recv(1, socket.MSG_DONTWAIT)
    box.put(b"one too many", b"")
    assert box.count == 1
    assert [theirs.recv(4096) for _ in answers] == [header + content for header, content in answers]
    assert box.flush() == []
    assert theirs.recv(4096) == b"one too many"
    assert box.flush() == []
    theirs.close()
    for _ in range(ANSWERS_MAX + 3):
        box.put(b"head", b"")
    assert box.flush() == [errno.EPIPE] * (ANSWERS_MAX + 3)
    assert box.flush() == []
    ours.close()


def test_random_arguments_are_answered_or_refused() -> None:
    """A little of what `tools/sanitize` does for longer, over modules that check themselves."""
    fuzz = Fuzz(20261123)
    for _ in range(60):
        for part in (fuzz.seal_and_open, fuzz.write, fuzz.fetch):
            part()
    fuzz.close()
    for name in (
        "seal_run", "open_run", "send", "put", "write_blocks", "read", "Quick", "answer", "Device",
        "next",
    ):  # fmt: skip
        assert fuzz.calls[f"{name}: answered"]
        assert fuzz.calls[f"{name}: TypeError"]
    assert fuzz.calls["an answer was right"]
