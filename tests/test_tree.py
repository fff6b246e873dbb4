"""The tree in memory and on a disk of a dictionary: what is written loads, and never too much.

A checkpoint is `refresh`, `take_changes`, `settle`. Its pages go where the tree that the live
superblock names has none, so that tree must load until the next superblock is written.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.image import tree as module
from sealfs.image.allocator import Allocator
from sealfs.image.cipher import TreeMacs
from sealfs.image.format import NO_MAC
from sealfs.image.layout import Geometry
from sealfs.image.tree import NO_SLOT, Node, Tree

PAGE = 4096
SIZE = 1 << 20
GEOMETRY = Geometry(
    group_blocks=4, fanout=4, depth=3, header_pages=4, identity_pages=1, journal_pages=8
)
MACS = TreeMacs(b"k" * 32, bytes(range(16)))
PATH = "x.sealed"


def entry(value: int) -> bytes:
    return bytes([value]) * 28 + b"\1\0\0\0"


def leaf_of(*values: int) -> bytes:
    return b"".join(map(entry, values)).ljust(PAGE, b"\0")


@dataclass
class Disk:
    """Pages, slots, and the location of the top: what a volume has around a tree."""

    pages: dict[int, bytes] = field(default_factory=dict)
    tree: Tree = field(default_factory=lambda: Tree(GEOMETRY, MACS, PATH))
    allocator: Allocator = field(default_factory=lambda: Allocator(0, GEOMETRY.chunk_nodes))
    root_mac: bytes = b""
    location: tuple[int, int, int] = (0, 0, 0)

    def take_node(self) -> tuple[int, int]:
        if not self.allocator.free_node_count:
            self.allocator.add_chunk(self.allocator.take())
        return self.allocator.take_node()

    def checkpoint(self) -> list[int]:
        """Write what has changed; return where."""
        tree = self.tree
        root_mac = tree.refresh(SIZE)
        for slot, position in tree.gone_nodes:
            self.allocator.free_node(slot, position)
        tree.gone_nodes.clear()
        pages = tree.take_changes(self.take_node)
        self.pages.update((offset, bytes(page)) for offset, page in pages)
        self.root_mac = root_mac
        self.location = (tree.top.slot, tree.top.position, tree.top.place)
        tree.settle()
        self.allocator.release()
        return [offset for offset, _ in pages]

    def load(self) -> Tree:
        return Tree.load(
            GEOMETRY, MACS, PATH, lambda offset: self.pages.get(offset, bytes(PAGE)),
            root_mac=self.root_mac, size=SIZE, location=self.location,
        )  # fmt: skip

    def put(self, group: int, *values: int) -> int:
        slot = self.allocator.take()
        old = self.tree.put_group(group, slot, leaf_of(*values), None)
        if old != NO_SLOT:
            self.allocator.free(old)
        return slot

    def drop(self, group: int) -> None:
        self.allocator.free(self.tree.drop_group(group))

    def leaf(self, tree: Tree, group: int) -> bytes:
        """Read a leaf page as a volume does."""
        slot, place, mac = tree.leaf_source(group)
        for attempt in (place & 1, 1 - (place & 1)):
            page = self.pages.get(GEOMETRY.leaf_offset(slot, attempt), bytes(PAGE))
            if tree.verify_leaf(group, page, mac):
                return page
        raise AssertionError(f"leaf page of group {group} is not there")


def test_an_empty_tree_is_one_page_and_loads() -> None:
    disk = Disk()
    offsets = disk.checkpoint()
    assert len(offsets) == 1
    tree = disk.load()
    assert list(tree.groups()) == []
    assert tree.slot_of(17) == NO_SLOT
    assert not tree.is_changed
    assert tree.refresh(SIZE) == disk.root_mac


def test_groups_and_their_entries_load() -> None:
    disk = Disk()
    slots = {group: disk.put(group, group % 200 + 1) for group in (0, 3, 4, 17, 63)}
    disk.checkpoint()
    tree = disk.load()
    assert list(tree.groups()) == sorted(slots)
    assert list(tree.groups(first=4)) == [4, 17, 63]
    assert {group: tree.slot_of(group) for group in slots} == slots
    for group in slots:
        assert disk.leaf(tree, group) == leaf_of(group % 200 + 1)
    assert sum(map(len, tree.chunks().values())) == sum(map(len, tree.nodes))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.integers(0, 1 << 32))
def test_any_changes_load_and_the_tree_before_them_loads_until_the_superblock(seed: int) -> None:
    rng = random.Random(seed)
    disk = Disk()
    disk.checkpoint()
    model: dict[int, tuple[int, bytes]] = {}
    for _ in range(8):
        before = dict(model)
        for _ in range(rng.randrange(6)):
            group = rng.randrange(64)
            if group in model and rng.random() < 0.4:
                disk.drop(group)
                del model[group]
            elif group in model and rng.random() < 0.6:
                if disk.tree.leaf(group) is None:
                    _, place, mac = disk.tree.leaf_source(group)
                    disk.tree.admit_leaf(group, disk.leaf(disk.tree, group), place, mac)
                disk.tree.set_entries(group, 1, entry(rng.randrange(1, 250)))
                model[group] = (model[group][0], bytes(disk.tree.leaf(group) or b""))
            else:
                value = rng.randrange(1, 250)
                model[group] = (disk.put(group, value), leaf_of(value))
        root_mac, location = disk.root_mac, disk.location
        disk.checkpoint()
        for root, state in ((disk, model), (Disk(disk.pages), before)):
            if root is not disk:
                root.root_mac, root.location = root_mac, location
            tree = root.load()
            assert {group: tree.slot_of(group) for group in tree.groups()} == {
                group: slot for group, (slot, _) in state.items()
            }
            for group, (_, leaf) in state.items():
                assert root.leaf(tree, group) == leaf
        used = [(slot, p) for slot, positions in tree.chunks().items() for p in positions]
        assert len(used) == len(set(used))
        disk.tree = disk.load() if rng.random() < 0.3 else disk.tree


def test_a_checkpoint_writes_the_path_of_what_changed_and_nothing_else() -> None:
    disk = Disk()
    for group in range(0, 64, 3):
        disk.put(group, 1)
    disk.checkpoint()
    assert disk.checkpoint() == []
    disk.tree.set_entries(0, 1, entry(7))
    assert disk.tree.changed_leaf_count == 1
    disk.tree.refresh(SIZE)
    assert disk.tree.is_changed
    assert len(disk.checkpoint()) == 1 + GEOMETRY.depth
    assert not disk.tree.is_changed


def test_a_node_without_children_is_given_up() -> None:
    disk = Disk()
    disk.put(0, 1)
    disk.put(63, 1)
    disk.checkpoint()
    count = sum(map(len, disk.tree.nodes))
    disk.drop(63)
    disk.checkpoint()
    assert sum(map(len, disk.tree.nodes)) == count - 2
    assert sum(map(len, disk.load().nodes)) == count - 2


def test_the_root_depends_on_size_entries_and_slots_of_groups_and_not_on_places() -> None:
    def root(slot: int = 1, value: int = 1, size: int = SIZE, place: int = 0) -> bytes:
        tree = Tree(GEOMETRY, MACS, PATH)
        tree.put_group(5, slot, leaf_of(value), None)
        tree.nodes[1][1].places[1] = place
        return tree.refresh(size)

    assert root() == root(place=1)
    assert len({root(), root(slot=2), root(value=2), root(size=SIZE + 1)}) == 4


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 63), max_size=12), st.lists(st.integers(0, 63), max_size=12))
def test_unplaced_nodes_are_never_more_than_the_bound(first: list[int], later: list[int]) -> None:
    disk = Disk()
    for groups in (first, later):
        for group in groups:
            disk.put(group, 1)
        bound = disk.tree.unplaced_nodes_max()
        placed = {node.slot * 8 + node.position for level in disk.tree.nodes[1:]
                  for node in level.values() if node.slot != NO_SLOT}  # fmt: skip
        disk.checkpoint()
        nodes = sum(map(len, disk.tree.nodes))
        assert nodes - len(placed) <= bound


def test_a_leaf_page_that_the_group_has_moved_on_from_is_not_admitted() -> None:
    disk = Disk()
    disk.put(5, 1)
    disk.checkpoint()
    disk.tree = disk.load()
    _, place, mac = disk.tree.leaf_source(5)
    page = disk.leaf(disk.tree, 5)
    disk.put(5, 2)
    assert bytes(disk.tree.admit_leaf(5, page, place, mac) or b"") == leaf_of(2)
    disk.drop(5)
    assert disk.tree.admit_leaf(5, page, place, mac) is None
    assert disk.tree.leaf(5) is None


def test_clean_leaf_pages_go_and_changed_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVES_MAX", 3)
    disk = Disk()
    for group in range(8):
        disk.put(group, group + 1)
    assert all(disk.tree.leaf(group) for group in range(8))
    disk.checkpoint()
    there = [group for group in range(8) if disk.tree.leaf(group) is not None]
    assert len(there) <= 3
    tree = disk.load()
    for group in range(8):
        _, place, mac = tree.leaf_source(group)
        assert tree.admit_leaf(group, disk.leaf(tree, group), place, mac) is not None
    assert sum(tree.leaf(group) is not None for group in range(8)) <= 3


def test_a_sealed_group_has_its_leaf_page_on_the_disk_at_place_0() -> None:
    disk = Disk()
    slot, leaf = disk.allocator.take(), leaf_of(9)
    disk.pages[GEOMETRY.leaf_offset(slot, 0)] = leaf
    assert disk.tree.put_sealed_group(7, slot, MACS.leaf(7, leaf)) == NO_SLOT
    assert disk.tree.leaf(7) is None
    offsets = disk.checkpoint()
    assert GEOMETRY.leaf_offset(slot, 0) not in offsets
    assert GEOMETRY.leaf_offset(slot, 1) not in offsets
    assert disk.leaf(disk.load(), 7) == leaf


# -- what does not load


def loaded() -> Disk:
    disk = Disk()
    for group in (0, 5, 40):
        disk.put(group, group + 1)
    disk.checkpoint()
    return disk


def missing(disk: Disk) -> list[tuple[int, int]]:
    """Return level and index of the node pages that do not load."""
    return [(ref.level, ref.index) for ref in disk.load().missing]


def test_no_altered_node_page_loads() -> None:
    disk = loaded()
    columns = 28 * GEOMETRY.fanout
    for level in disk.tree.nodes[1:]:
        for node in level.values():
            offset = GEOMETRY.node_offset(node.slot, node.position, node.place)
            page = disk.pages[offset]
            authentic = columns if node.level == 1 else 24 * GEOMETRY.fanout
            for at in range(0, authentic, 7):
                raw = bytearray(page)
                raw[at] ^= 1
                disk.pages[offset] = bytes(raw)
                assert missing(disk) == [(node.level, node.index)]
            disk.pages[offset] = page
    assert missing(disk) == []


def test_a_page_of_another_index_level_or_image_does_not_load() -> None:
    disk = loaded()
    nodes = [disk.tree.nodes[1][0], disk.tree.nodes[1][1]]
    offsets = [GEOMETRY.node_offset(node.slot, node.position, node.place) for node in nodes]
    disk.pages[offsets[0]], disk.pages[offsets[1]] = (
        disk.pages[offsets[1]],
        disk.pages[offsets[0]],
    )
    assert sorted(missing(disk)) == [(1, 0), (1, 1)]
    disk = loaded()
    for macs, size in ((TreeMacs(b"k" * 32, bytes(16)), SIZE), (MACS, SIZE + 1)):
        tree = Tree.load(
            GEOMETRY, macs, PATH, lambda offset: disk.pages.get(offset, b""),
            root_mac=disk.root_mac, size=size, location=disk.location,
        )  # fmt: skip
        assert [(ref.level, ref.index) for ref in tree.missing] == [(3, 0)]


def test_a_wrong_hint_costs_a_read_and_nothing_else() -> None:
    disk = loaded()
    slot, position, place = disk.location
    disk.location = (slot, position, 1 - place)
    assert list(disk.load().groups()) == [0, 5, 40]
    disk.location = (slot, position, place | 0xFE)
    assert list(disk.load().groups()) == [0, 5, 40]


def test_nothing_is_at_a_position_outside_a_chunk_or_used_twice() -> None:
    disk = loaded()
    slot, _, place = disk.location
    disk.location = (slot, GEOMETRY.chunk_nodes, place)
    assert missing(disk) == [(3, 0)]
    # Above level 1 places are not authentic: both children of the top at one position.
    disk = loaded()
    top = disk.tree.top
    top.positions[2] = top.positions[0]
    top.slots[2] = top.slots[0]
    disk.pages[GEOMETRY.node_offset(top.slot, top.position, top.place)] = top.encode()
    assert len(missing(disk)) == 1


# -- node pages


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.binary(max_size=200), st.integers(1, 3))
def test_any_page_decodes_as_a_node_and_encodes_to_what_counts(raw: bytes, level: int) -> None:
    page = raw.ljust(PAGE, b"\0")
    node = Node.decode(level, 3, 4, page)
    assert node.encode()[: 30 * 4] == page[: 30 * 4]
    assert node.encode()[30 * 4 :] == bytes(PAGE - 30 * 4)
    assert node.columns() == page[: (28 if level == 1 else 24) * 4]
    assert [bool(flag) for flag in node.present] == [node.mac(i) != NO_MAC for i in range(4)]


def test_clearing_a_child_leaves_nothing_of_it() -> None:
    node = Node(1, 0, 4)
    node.set_mac(2, b"m" * 24)
    node.slots[2], node.places[2], node.positions[2], node.present[2] = 5, 1, 1, 1
    node.clear(2)
    assert node.encode() == bytes(PAGE)
