"""Damaged node pages: rebuilt where a MAC proves it, else lost, alone and for good."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from crash_support import set_limit
from sending import sent
from simulation import SimulatedDisk, SimulatedStorage
from test_refcheck import refcheck

from sealfs.errors import BlockDamaged, IntegrityError, StorageFailed
from sealfs.image import rebuild
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.steps import run

PAGE = 4096
GROUP = 4
BLOCKS = 150
GEOMETRY = Geometry(
    group_blocks=GROUP, fanout=4, depth=3, header_pages=6, identity_pages=2, journal_pages=40
)
KEY = hashlib.sha256(b"image key").digest()
IDENTITY = Identity(uuid=bytes(range(16)), vm_id="vm", kmi="vm")
SALTS = random.Random(0)

Node = tuple[int, int]
"""(level, index)."""


@pytest.fixture(autouse=True)
def _small_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limit("SMALL_COMMIT_BLOCKS", 3, monkeypatch.setattr)


def opened(
    storage: SimulatedStorage, *, read_only: bool = False, geometry: Geometry = GEOMETRY
) -> SealedImage:
    return SealedImage.open(
        storage,
        image_key=KEY,
        cache=BlockCache(0, 256 * PAGE),
        random=SALTS.randbytes,
        geometry=geometry,
        read_only=read_only,
    )


def fill(value: int, count: int = 1) -> bytes:
    return bytes([value]) * (count * PAGE)


class Life:
    """An image and what is right about it."""

    def __init__(self) -> None:
        self.storage = SimulatedStorage()
        self.content = bytearray(BLOCKS * PAGE)
        SealedImage.create(
            self.storage, identity=IDENTITY, image_key=KEY, size=BLOCKS * PAGE, geometry=GEOMETRY
        )
        self.image = opened(self.storage)

    def write(self, block: int, value: int, count: int = 1) -> None:
        self.content[block * PAGE : (block + count) * PAGE] = fill(value, count)
        self.image.write(block * PAGE, fill(value, count))
        self.image.flush()

    def discard(self, block: int, count: int) -> None:
        self.content[block * PAGE : (block + count) * PAGE] = bytes(count * PAGE)
        self.image.discard(block * PAGE, count * PAGE)

    def raw(self) -> bytearray:
        return bytearray(self.storage.disk.device())


@cache
def story(*, crashed: bool) -> tuple[bytes, bytes]:
    """Return (file, content): groups moved, changed in part and discarded; closed, or not."""
    life = Life()
    for block in range(0, BLOCKS - 10, 10):
        life.write(block, block + 1, 7)
    life.image.checkpoint()
    life.write(8, 200, 8)  # two groups get other slots
    life.write(65, 201)
    life.discard(20, 2)
    life.image.checkpoint()
    life.write(66, 202)
    life.write(133, 208)
    life.write(24, 203, 4)
    life.discard(0, 1)
    life.image.checkpoint()
    if crashed:
        life.write(67, 204)
        life.write(24, 205, 4)
        life.write(100, 206, 12)
        life.write(11, 207)
        life.discard(30, 2)
        life.image.abandon()
    else:
        life.image.close()
    return bytes(life.raw()), bytes(life.content)


@cache
def nodes_of(raw: bytes) -> dict[Node, tuple[int, int]]:
    """Return the node pages that the live superblock names, to where they are: both places."""
    image = opened(SimulatedStorage(SimulatedDisk.of(raw)), read_only=True)
    return {
        (node.level, node.index): (
            GEOMETRY.node_offset(node.slot, node.position, node.place),
            GEOMETRY.node_offset(node.slot, node.position, 1 - node.place),
        )
        for level in image._volume.tree.nodes
        for node in level.values()
        if node.slot >= 0
    }


def leaves_of(raw: bytes) -> dict[int, int]:
    """Return the groups of the live superblock, to where both places of their leaf pages are."""
    image = opened(SimulatedStorage(SimulatedDisk.of(raw)), read_only=True)
    tree = image._volume.tree
    return {group: GEOMETRY.leaf_offset(tree.slot_of(group), 0) for group in tree.groups()}


def covered(node: Node) -> range:
    count = GEOMETRY.fanout ** node[0] * GROUP
    return range(node[1] * count, min((node[1] + 1) * count, BLOCKS))


KINDS: dict[str, Callable[[bytes], bytes]] = {
    "flip": lambda page: bytes([page[0] ^ 1]) + page[1:],
    "zero": lambda page: bytes(PAGE),
    "garbage": lambda page: random.Random(5).randbytes(PAGE),
    "sector": lambda page: page[:512].replace(page[24:300], bytes(276)) + page[512:],
}


def damage(raw: bytearray, offset: int, kind: str) -> None:
    raw[offset : offset + PAGE] = KINDS[kind](bytes(raw[offset : offset + PAGE]))


def lose(raw: bytearray, node: Node) -> None:
    """Damage a node page so that nothing proves it: both places, and pages of its children."""
    pristine = bytes(raw)
    for offset in nodes_of(pristine)[node]:
        damage(raw, offset, "zero")
    if node[0] == 1:
        group = min(g for g in leaves_of(pristine) if g // GEOMETRY.fanout == node[1])
        offset = leaves_of(pristine)[group]
        for at in (offset, offset + PAGE):
            damage(raw, at, "garbage")


def broken(node: Node, *, crashed: bool = False) -> tuple[SimulatedStorage, bytes]:
    raw, content = story(crashed=crashed)
    altered = bytearray(raw)
    lose(altered, node)
    return SimulatedStorage(SimulatedDisk.of(altered)), content


def found_in(image: SealedImage) -> dict[int, bytes | None]:
    """Return what each block reads as, None where it is damaged."""
    found: dict[int, bytes | None] = {}
    for block in range(BLOCKS):
        try:
            found[block] = image.read(block * PAGE, PAGE)
        except BlockDamaged:
            found[block] = None
    return found


def is_right(image: SealedImage, content: bytes) -> bool:
    return image.read(0, BLOCKS * PAGE) == content and image.check(data=True) == []


ALL_NODES = [(3, 0), (2, 0), (2, 1), (2, 2), *((1, i) for i in range(10) if i != 9)]


def test_the_story_has_these_nodes() -> None:
    for crashed in (False, True):
        assert sorted(nodes_of(story(crashed=crashed)[0])) == sorted(ALL_NODES)


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("node", ALL_NODES, ids=str)
def test_a_damaged_node_page_is_rebuilt(node: Node, kind: str, crashed: bool) -> None:
    raw, content = story(crashed=crashed)
    altered = bytearray(raw)
    damage(altered, nodes_of(raw)[node][0], kind)
    storage = SimulatedStorage(SimulatedDisk.of(altered))
    image = opened(storage, read_only=True)
    # A sector may say only where the children lie, which is in no MAC: one of them is not found.
    wanted = {f"{node[0]}.{node[1]}"} if kind != "sector" else set(image.rebuilt_nodes) or {""}
    assert set(image.rebuilt_nodes) == wanted
    assert is_right(image, content)
    image.close()
    assert storage.disk.cached == altered
    storage.reopen()
    image = opened(storage)
    assert is_right(image, content)
    assert refcheck.check(storage.disk.device(), KEY, GEOMETRY).errors == []
    image.write(5 * PAGE, fill(77))
    image.close()
    storage.reopen()
    image = opened(storage)
    assert (image.rebuilt_nodes, image.lost_ranges) == ([], [])
    assert is_right(image, content[: 5 * PAGE] + fill(77) + content[6 * PAGE :])


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("index", range(9))
def test_a_lowest_node_page_is_rebuilt_without_any_trace_of_it(index: int, crashed: bool) -> None:
    raw, content = story(crashed=crashed)
    altered = bytearray(raw)
    for offset, kind in zip(nodes_of(raw)[1, index], ("zero", "garbage"), strict=True):
        damage(altered, offset, kind)
    assert is_right(opened(SimulatedStorage(SimulatedDisk.of(altered))), content)


def test_all_lowest_node_pages_are_rebuilt_at_once() -> None:
    raw, content = story(crashed=True)
    altered = bytearray(raw)
    for index in range(9):
        for offset in nodes_of(raw)[1, index]:
            damage(altered, offset, "zero")
    image = opened(SimulatedStorage(SimulatedDisk.of(altered)))
    assert len(image.rebuilt_nodes) == 9
    assert is_right(image, content)


def test_of_many_children_the_newest_pages_are_found() -> None:
    geometry = replace(GEOMETRY, fanout=32, depth=2)
    count = 2 * 32 * GROUP + 40
    storage = SimulatedStorage()
    SealedImage.create(
        storage, identity=IDENTITY, image_key=KEY, size=count * PAGE, geometry=geometry
    )
    image = opened(storage, geometry=geometry)
    image.write(0, fill(1, count))
    image.checkpoint()
    for block in range(0, count, GROUP):  # a version of each leaf page; some groups move
        image.write((block + 1) * PAGE, fill(2))
        if block % 7 == 0:
            image.write(block * PAGE, fill(3, GROUP))
            image.flush()
    image.checkpoint()
    for block in range(0, count, 4 * GROUP):
        image.discard((block + 2) * PAGE, PAGE)
    image.close()
    raw, tree = bytes(storage.disk.device()), image._volume.tree
    storage.reopen()
    expected = opened(storage, geometry=geometry).read(0, count * PAGE)
    for node in [node for level in tree.nodes for node in level.values()]:
        for places in ((node.place,), (0, 1)) if node.level == 1 else ((node.place,),):
            altered = bytearray(raw)
            for place in places:
                damage(altered, geometry.node_offset(node.slot, node.position, place), "zero")
            again = opened(SimulatedStorage(SimulatedDisk.of(altered)), geometry=geometry)
            assert again.rebuilt_nodes == [f"{node.level}.{node.index}"]
            assert again.read(0, count * PAGE) == expected


def test_a_node_page_that_cannot_be_read_is_rebuilt_or_lost() -> None:
    raw, content = story(crashed=False)
    for node, is_lost in (((1, 2), False), ((2, 1), True)):
        storage = SimulatedStorage(SimulatedDisk.of(raw))
        bad = nodes_of(raw)[node]

        def on_read(name: str, offset: int, size: int, bad: tuple[int, int] = bad) -> None:
            if offset in bad:
                raise StorageFailed("x", "read failed: Input/output error")

        storage.on_read = on_read
        image = opened(storage)
        if not is_lost:
            assert is_right(image, content)
            continue
        [lost] = image.lost_ranges
        assert lost.cause == "node page 2.1 cannot be read: read failed: Input/output error"
        assert (lost.first_block, lost.block_count) == (64, 64)


def test_a_page_is_found_where_the_other_place_of_its_parent_says() -> None:
    raw, content = story(crashed=False)
    for node in ((3, 0), (2, 0), (2, 1)):
        for kind in (bytes(8), bytes([255]) * 8):
            altered = bytearray(raw)
            at = nodes_of(raw)[node][0] + 24 * GEOMETRY.fanout
            altered[at : at + 16] = kind * 2
            altered[at + 20 : at + 24] = kind[:4]
            image = opened(SimulatedStorage(SimulatedDisk.of(altered)))
            assert image.rebuilt_nodes
            assert is_right(image, content)


def test_the_top_page_is_rebuilt_or_the_image_is_refused() -> None:
    raw, content = story(crashed=True)
    altered = bytearray(raw)
    damage(altered, nodes_of(raw)[3, 0][0], "zero")
    assert is_right(opened(SimulatedStorage(SimulatedDisk.of(altered)), read_only=True), content)
    damage(altered, nodes_of(raw)[3, 0][1], "zero")
    storage = SimulatedStorage(SimulatedDisk.of(altered))
    with pytest.raises(IntegrityError, match=r"node page 3\.0 does not authenticate"):
        opened(storage)
    assert storage.disk.cached == altered


# -- which pages may be taken for it


def test_older_node_pages_and_leaf_pages_are_not_taken_for_newer_ones() -> None:
    life = Life()
    life.write(0, 1, 8)
    life.image.checkpoint()
    life.write(1, 2)
    life.image.checkpoint()
    before = life.raw()
    life.write(2, 3)
    life.write(5, 4)
    life.image.close()
    raw = life.raw()
    node, other = nodes_of(bytes(raw))[1, 0]
    for at in (node, other):
        raw[at : at + PAGE] = before[at : at + PAGE]
    assert is_right(opened(SimulatedStorage(SimulatedDisk.of(raw))), bytes(life.content))
    for leaf in leaves_of(bytes(life.raw())).values():  # all of an older image
        raw[leaf : leaf + 2 * PAGE] = before[leaf : leaf + 2 * PAGE]
    image = opened(SimulatedStorage(SimulatedDisk.of(raw)))
    assert [(each.first_block, each.block_count) for each in image.lost_ranges] == [(0, 16)]
    assert all(found_in(image)[block] is None for block in range(16))
    assert found_in(image)[16] == bytes(PAGE)


def test_pages_of_a_commit_that_was_cut_off_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life()
    life.write(0, 1, 16)
    life.image.checkpoint()
    life.image.write(0, fill(9, 16))

    def fail(*_: object) -> None:
        raise StorageFailed("x", "write failed")

    monkeypatch.setattr(life.storage, "write_durable", fail)
    with pytest.raises(StorageFailed):
        life.image.flush()  # newer leaf pages of all four groups are there, and no record
    for kinds in (("flip", "flip"), ("zero", "flip"), ("zero", "zero")):
        raw = life.raw()
        for offset, kind in zip(nodes_of(bytes(life.raw()))[1, 0], kinds, strict=True):
            damage(raw, offset, kind)
        assert is_right(opened(SimulatedStorage(SimulatedDisk.of(raw))), bytes(life.content))


@pytest.mark.parametrize("limit", ["SLOTS_MAX", "OPENS_MAX", "MACS_MAX_TOTAL"])
def test_beyond_the_limits_a_page_is_lost(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, content = story(crashed=True)
    altered = bytearray(raw)
    for offset in nodes_of(raw)[1, 2]:
        damage(altered, offset, "zero")
    assert is_right(opened(SimulatedStorage(SimulatedDisk.of(altered)), read_only=True), content)
    if limit == "MACS_MAX_TOTAL":
        # One child must be guessed otherwise than first.
        monkeypatch.setattr(rebuild.Rebuilder, "_is_newer", lambda *_: False)
        monkeypatch.setattr(
            rebuild.Rebuilder, "_by_age", lambda _, ref, i, found: sorted(found, reverse=True)
        )
    monkeypatch.setattr(rebuild, limit, 0)
    image = opened(SimulatedStorage(SimulatedDisk.of(altered)))
    found = found_in(image)
    for block in range(BLOCKS):
        if block in covered((1, 2)) and image.lost_ranges:
            assert found[block] is None
        else:
            assert found[block] == content[block * PAGE : (block + 1) * PAGE]
    assert bool(image.lost_ranges) or limit == "MACS_MAX_TOTAL"


def test_guesses_go_from_the_likely_to_the_unlikely_and_cover_all() -> None:
    a, b, c = (rebuild.Child(bytes([i]) * 24, i, 0, 0) for i in (1, 2, 3))
    options = [[a, b, rebuild.HOLE], [c, rebuild.HOLE], [rebuild.HOLE]]
    base = [a, c, rebuild.HOLE]
    guesses = list(rebuild._guesses([base], options))
    assert guesses[0] == base
    changes = [sum(x != y for x, y in zip(g, base, strict=True)) for g in guesses]
    assert changes == sorted(changes)
    assert len(guesses) == len({tuple(g) for g in guesses}) == 6


# -- crashes


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("kind", ["flip", "zero"])
@pytest.mark.parametrize("node", [(3, 0), (2, 1), (1, 0), (1, 1), (1, 4)], ids=str)
def test_a_crash_in_the_checkpoint_after_a_rebuild_is_recovered(
    node: Node, kind: str, crashed: bool
) -> None:
    raw, content = story(crashed=crashed)
    altered = bytearray(raw)
    damage(altered, nodes_of(raw)[node][0], kind)
    storage = SimulatedStorage(SimulatedDisk.of(altered))
    disks: list[SimulatedDisk] = []

    def on_point(_: str) -> None:
        count = len(storage.disk.pending)
        last = ("o",) * (count - 1) + ("n",) * (count > 0)
        disks.extend(map(storage.disk.crash, (("n",) * count, ("o",) * count, last)))

    storage.on_point = on_point
    opened(storage)
    assert len(disks) > 5
    for disk in disks:
        again = SimulatedStorage(disk)
        image = opened(again)
        assert is_right(image, content)
        image.abandon()
        again.reopen()
        assert opened(again).rebuilt_nodes == []


def test_pages_of_a_recovery_that_was_cut_off_are_not_taken() -> None:
    geometry = replace(GEOMETRY, fanout=32, depth=2, journal_pages=120)
    count = 32 * GROUP
    storage = SimulatedStorage()
    SealedImage.create(
        storage, identity=IDENTITY, image_key=KEY, size=count * PAGE, geometry=geometry
    )
    image = opened(storage, geometry=geometry)
    image.write(0, fill(1, count))
    image.checkpoint()
    for block in range(0, count, GROUP):
        image.write(block * PAGE, fill(2))
    image.flush()
    expected = image.read(0, count * PAGE)
    image.abandon()
    storage.reopen()
    disks: list[SimulatedDisk] = []

    def on_point(_: str) -> None:
        disks.append(SimulatedDisk.of(storage.disk.device()))

    storage.on_point = on_point
    opened(storage, geometry=geometry)
    assert len(disks) > 30
    for disk in disks[::4] + disks[-6:]:
        before = opened(SimulatedStorage(disk), read_only=True, geometry=geometry)
        node = before._volume.tree.nodes[1][0]
        altered = bytearray(disk.durable)
        for place in (0, 1):
            damage(altered, geometry.node_offset(node.slot, node.position, place), "zero")
        again = opened(SimulatedStorage(SimulatedDisk.of(altered)), geometry=geometry)
        assert again.rebuilt_nodes == ["1.0"]
        assert again.read(0, count * PAGE) == expected


# -- lost


LOST = [(1, 0), (1, 1), (1, 6), (1, 8), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("crashed", [False, True])
@pytest.mark.parametrize("node", LOST, ids=str)
def test_a_lost_node_page_costs_what_it_covers_and_for_good(node: Node, crashed: bool) -> None:
    storage, content = broken(node, crashed=crashed)
    blocks = covered(node)
    right = {
        block: None if block in blocks else content[block * PAGE : (block + 1) * PAGE]
        for block in range(BLOCKS)
    }
    for read_only in (True, False, False):
        image = opened(storage, read_only=read_only)
        [lost] = image.lost_ranges
        assert (lost.first_block, lost.block_count) == (blocks.start, len(blocks))
        assert lost.cause.startswith(f"node page {node[0]}.{node[1]} does not authenticate")
        assert found_in(image) == right
        for start in (0, 3, 9):  # in parts, each range is named once
            findings, at = [], start
            while at is not None:
                part = run(image.check_part_steps(at, 2, data=False))
                findings, at = findings + part.findings, part.next_group
            assert findings == ([lost] if start * GROUP <= blocks.start else [])
        assert image.check(data=True) == [lost]
        image.abandon()
        storage.reopen()
    # The rest goes on: whole groups, parts, discards; and survives a crash and a clean end.
    report = refcheck.check(storage.disk.device(), KEY, GEOMETRY)
    assert not report.refused
    assert any(f"node {node[0]}/{node[1]} does not auth" in error for error in report.errors)
    image = opened(storage)
    assert image._volume.allocator.free_node_count == 0
    before = bytes(storage.disk.device())
    busy = _busy_slots(image)
    written: list[int] = []
    storage.on_call = lambda name, offset, size: written.append(offset) if "write" in name else None
    for block in (2, 12, 66, 101, 130, 140):
        if block not in blocks:
            image.write(block * PAGE, fill(block))
            right[block] = fill(block)
    other = 100 if blocks.start < 64 else 8
    image.write(other * PAGE, fill(99, 8))
    image.discard((other + 8) * PAGE, 2 * PAGE)
    right |= {other + i: fill(99) for i in range(8)} | {other + 8 + i: fill(0) for i in range(2)}
    image.flush()
    image.abandon()
    for offset in written:
        slot = (offset - GEOMETRY.slots_offset) // GEOMETRY.slot_size
        assert slot < 0 or slot in busy or offset >= len(before), (
            "a slot that may be the lost one's"
        )
    storage = SimulatedStorage(SimulatedDisk.of(storage.disk.durable))
    for _ in range(2):
        image = opened(storage)
        assert found_in(image) == right
        assert image.lost_ranges == [lost]
        image.close()
        storage.reopen()


def _busy_slots(image: SealedImage) -> set[int]:
    tree = image._volume.tree
    return {*tree.chunks(), *map(tree.slot_of, tree.groups())}


@pytest.mark.parametrize("node", LOST, ids=str)
def test_nothing_changes_what_a_lost_node_page_covers(node: Node) -> None:
    storage, _ = broken(node)
    image = opened(storage)
    first, last = covered(node).start * PAGE, covered(node).stop * PAGE
    whole = min(GROUP * PAGE, last - first)
    attempts: list[Callable[[], object]] = [
        lambda: image.write(first, fill(1)),
        lambda: image.write(first + 100, b"x"),
        lambda: image.write(first, fill(1, whole // PAGE)),
        lambda: image.discard(first, whole),
        lambda: image.discard(0, BLOCKS * PAGE),
        lambda: image.discard(first + 5, 100),
        lambda: image.preallocate(first, PAGE),
        lambda: image.resize(last - PAGE),
        lambda: image.resize(first + 100),
        lambda: image.seek(first, os.SEEK_DATA),
        lambda: image.seek(first, os.SEEK_HOLE),
        lambda: image.read(0, BLOCKS * PAGE),
        lambda: image.try_read(first, PAGE),
        lambda: sent(image, first),
    ]
    for attempt in attempts:
        with pytest.raises(BlockDamaged, match="are lost: node page") as info:
            attempt()
        assert info.value.block == covered(node).start
        assert image.poisoned is None
    assert image.size == BLOCKS * PAGE
    image.close()
    storage.reopen()
    image = opened(storage)
    assert {b for b, each in found_in(image).items() if each is None} == set(covered(node))


def test_a_search_for_data_does_not_pass_over_what_is_lost() -> None:
    storage, _ = broken((1, 3))
    image = opened(storage)
    begin = covered((1, 3)).start * PAGE
    image.discard(36 * PAGE, 12 * PAGE)
    for block in range(36, 48):
        assert image.seek(block * PAGE, os.SEEK_HOLE) == block * PAGE
        with pytest.raises(BlockDamaged, match=r"node page 1\.3"):
            image.seek(block * PAGE, os.SEEK_DATA)
    image.write(begin - 12 * PAGE, fill(1, 12))
    with pytest.raises(BlockDamaged, match=r"node page 1\.3"):
        image.seek(begin - 12 * PAGE, os.SEEK_HOLE)


def test_beside_what_is_lost_the_disk_grows_and_shrinks() -> None:
    storage, content = broken((1, 3))
    image = opened(storage)
    image.resize(70 * PAGE)
    image.resize(200 * PAGE)
    image.write(190 * PAGE, fill(8))
    image.close()
    storage.reopen()
    image = opened(storage)
    assert image.read(64 * PAGE, 6 * PAGE) == content[64 * PAGE : 70 * PAGE]
    assert image.read(70 * PAGE, 121 * PAGE) == bytes(120 * PAGE) + fill(8)
    assert [each.first_block for each in image.lost_ranges] == [48]


def test_the_end_of_the_disk_may_be_lost() -> None:
    storage, _ = broken((1, 8))
    image = opened(storage)
    image.resize(160 * PAGE)  # the node page covers these blocks: holes or not, nobody knows
    with pytest.raises(BlockDamaged):
        image.read(143 * PAGE, PAGE)
    assert image.read(144 * PAGE, 16 * PAGE) == bytes(16 * PAGE)
    image.close()
    storage.reopen()
    assert opened(storage).size == 160 * PAGE


def test_what_was_lost_for_want_of_a_page_is_there_when_the_page_is() -> None:
    """Nothing that a lost node page names was touched meanwhile: its page, put back, is right."""
    raw, content = story(crashed=False)
    storage, _ = broken((1, 1))
    for _ in range(3):
        image = opened(storage)
        for block in (2, 66, 101):
            image.write(block * PAGE, fill(block))
        image.write(108 * PAGE, fill(1, 8))
        image.close()
        storage.reopen()
    mended = storage.disk.device()
    offset = nodes_of(raw)[1, 1][0]
    leaf = leaves_of(raw)[min(g for g in leaves_of(raw) if g // 4 == 1)]
    for at, count in ((offset, 1), (leaf, 2)):
        mended[at : at + count * PAGE] = raw[at : at + count * PAGE]
    image = opened(SimulatedStorage(SimulatedDisk.of(mended)))
    assert image.lost_ranges == image.check(data=True) == []
    assert image.read(16 * PAGE, 16 * PAGE) == content[16 * PAGE : 32 * PAGE]
