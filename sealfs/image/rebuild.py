"""Rebuild node pages that are damaged from what they name, where a MAC proves it. Pure.

What such a page held is guessed: of each child, which of its pages that are still in the file was
the newest. A guess is right when it has the MAC that its parent names (for the top page the
superblock); the order of guessing decides only how soon that is found out. A page that no guess
within the limits proves is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cmp_to_key
from itertools import combinations, islice, product
from typing import NamedTuple

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.image.cipher import TAG_SIZE, TreeMacs
from sealfs.image.format import ENTRY_PARTS, NO_MAC
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, Geometry
from sealfs.image.tree import EMPTY_LEAF, NO_SLOT, Node, NodeRef, ReadPage, Tree

SLOTS_MAX = 1 << 14
"""Slots looked into at one open: 8 GiB of disk, some seconds."""
OPENS_MAX = 1 << 19
"""Attempts to open a block, to learn of which group a leaf page is: some seconds."""
ENTRIES_MAX = 4
"""Entries of one leaf page tried for that; others may have been written again since."""
MACS_MAX = 1 << 13
"""Guesses for one node page: half a second."""
MACS_MAX_TOTAL = 1 << 16
"""Guesses at one open: five seconds. After that the likeliest alone are tried of each page."""

OpenBlock = Callable[[int, bytearray, bytes, bytes], bytes]
"""`BlockCipher.open_block`."""


class Child(NamedTuple):
    """What a node page may have said of a child."""

    mac: bytes
    slot: int
    position: int
    place: int


HOLE = Child(NO_MAC, 0, 0, 0)


class Rebuilder:
    """Rebuilds the missing node pages of one tree."""

    def __init__(
        self, tree: Tree, geometry: Geometry, macs: TreeMacs, *, read_page: ReadPage,
        open_block: OpenBlock, slot_count: int, later_slots: Collection[int],
        later_nonces: Collection[bytes],
    ) -> None:  # fmt: skip
        """Take what it works with.

        Args:
            tree: as it was loaded.
            geometry: of the image.
            macs: computes its MACs.
            read_page: reads a page of the file.
            open_block: opens a block.
            slot_count: slots in the file.
            later_slots: those that records name which are newer than the tree.
            later_nonces: of entries in such records.
        """
        self._tree, self._geometry, self._macs = tree, geometry, macs
        self._fanout = geometry.fanout
        self._read_page, self._open_block = read_page, open_block
        self._slot_count = slot_count
        self._later_slots, self._later_nonces = later_slots, later_nonces
        self._opens = 0
        self._tries = 0

    def run(self) -> None:
        """Rebuild what can be proven; what cannot is lost."""
        tree = self._tree
        # From the top: what is below a page is loaded when it is there.
        while upper := [ref for ref in tree.missing if ref.level > 1]:
            ref = max(upper, key=lambda each: each.level)
            if self._is_elsewhere(ref):
                continue
            named = self._named(ref)
            self._settle(
                ref,
                named,
                [self._pages_at(ref.level, ref.index, i, named) for i in range(self._fanout)],
            )
        lowest = {
            ref: self._named(ref) for ref in list(tree.missing) if not self._is_elsewhere(ref)
        }
        found = self._leaves(lowest)
        for ref, named in lowest.items():
            first = ref.index * self._fanout
            leaves = [found.get(first + i, {}) for i in range(self._fanout)]
            self._settle(ref, named, leaves)

    def _settle(self, ref: NodeRef, named: list[Node], found: list[dict[Child, bytes]]) -> None:
        """Take a node page in if the pages found for its children prove it; else it is lost."""
        node = self._proven(
            ref, named, [self._by_age(ref, i, each) for i, each in enumerate(found)]
        )
        if node is None:
            self._tree.lose(ref)
        else:
            self._tree.adopt(ref, node, self._read_page)

    def _is_elsewhere(self, ref: NodeRef) -> bool:
        """Take a node page in from where its parent's other place says that it lies.

        Where pages lie is in no MAC, so that part of a page may be damaged alone.
        """
        parent = self._tree.nodes[ref.level + 1].get(ref.index // self._fanout)
        if parent is None or parent.slot == NO_SLOT:
            return False
        at = self._geometry.node_offset(parent.slot, parent.position, 1 - parent.place)
        page = self._read(at).ljust(BLOCK_SIZE, b"\0")
        i = ref.index % self._fanout
        named = [Node.decode(parent.level, parent.index, self._fanout, page)]
        for found in self._pages_at(parent.level, parent.index, i, named).values():
            node = Node.decode(ref.level, ref.index, self._fanout, found)
            if self._tree.is_proven(ref, node):
                self._tree.adopt(ref, node, self._read_page)
                return True
        return False

    # -- what is in the file

    def _read(self, offset: int) -> bytes:
        try:
            return self._read_page(offset)
        except StorageFailed:
            return b""

    def _named(self, ref: NodeRef) -> list[Node]:
        """Return what is at the two places of a damaged page, the hinted one first."""
        named = []
        for place in (ref.place & 1, 1 - (ref.place & 1)):
            page = b""
            if ref.position < self._geometry.chunk_nodes:
                page = self._read(self._geometry.node_offset(ref.slot, ref.position, place))
            page = page.ljust(BLOCK_SIZE, b"\0")
            named.append(Node.decode(ref.level, ref.index, self._fanout, page))
        return named

    def _pages_at(self, level: int, index: int, i: int, named: list[Node]) -> dict[Child, bytes]:
        """Return the node pages, in both places, to which pages of a node lead for a child."""
        found: dict[Child, bytes] = {}
        places = {(node.slots[i], node.positions[i]) for node in named if node.present[i]}
        for slot, position in sorted(places):
            if slot >= self._slot_count or position >= self._geometry.chunk_nodes:
                continue
            for place in (0, 1):
                page = self._read(self._geometry.node_offset(slot, position, place))
                if len(page) == BLOCK_SIZE and any(page):
                    for mac in self._macs_of(level - 1, index * self._fanout + i, page):
                        found[Child(mac, slot, position, place)] = page
        return found

    def _leaves(self, lowest: dict[NodeRef, list[Node]]) -> dict[int, dict[Child, bytes]]:
        """Return the leaf pages of the groups of these node pages in slots that are nobody's."""
        found: dict[int, dict[Child, bytes]] = {}
        hints: dict[int, set[int]] = {}
        for ref, named in lowest.items():
            for node in named:
                for i in range(self._fanout):
                    if node.present[i]:
                        hints.setdefault(node.slots[i], set()).add(ref.index * self._fanout + i)
        groups = [ref.index * self._fanout + i for ref in lowest for i in range(self._fanout)]
        known = {node.mac(i) for named in lowest.values() for node in named
                 for i in range(self._fanout)}  # fmt: skip
        last = groups[0] if groups else 0
        for slot in islice(self._free_slots(), SLOTS_MAX if lowest else 0):
            for place in (0, 1):
                page = self._read(self._geometry.leaf_offset(slot, place))
                if len(page) < BLOCK_SIZE or self._is_later(page):
                    continue
                # A disk that is filled gets its slots in order.
                likely = [*sorted(hints.get(slot, ())), *range(last, last + 3)]
                group = self._group_of(slot, page, likely, groups, known)
                if group is not None:
                    for mac in self._macs_of(0, group, page):
                        found.setdefault(group, {})[Child(mac, slot, 0, place)] = page
                    last = group
        return found

    def _free_slots(self) -> Iterator[int]:
        """Yield the slots that nothing known names."""
        tree = self._tree
        used = {*tree.chunks(), *map(tree.slot_of, tree.groups()), *self._later_slots}
        return (slot for slot in range(self._slot_count) if slot not in used)

    def _is_later(self, page: bytes) -> bool:
        """Whether a leaf page holds what a record says that is newer than the tree."""
        return bool(self._later_nonces) and any(
            page[at : at + 12] in self._later_nonces for at in range(0, BLOCK_SIZE, ENTRY_SIZE)
        )

    def _group_of(
        self, slot: int, page: bytes, likely: list[int], groups: list[int], known: set[bytes]
    ) -> int | None:
        """Return the group of a leaf page: its MAC stands where it should, or a block opens."""
        for group in likely:
            if any(mac in known for mac in self._macs_of(0, group, page)):
                return group
        if page == EMPTY_LEAF:
            return None
        blocks = self._geometry.group_blocks
        present = [i for i in range(blocks) if page[i * ENTRY_SIZE + 28]]
        oldest = sorted(present, key=lambda i: _age(page[i * ENTRY_SIZE :]))[:ENTRIES_MAX]
        sealed = {i: self._read(self._geometry.block_offset(slot, i)) for i in oldest}
        for few in (likely, groups):
            for index, group in product(oldest, few):
                if self._opens >= OPENS_MAX:
                    return None
                self._opens += 1
                nonce, tag, _ = ENTRY_PARTS.unpack_from(page, index * ENTRY_SIZE)
                content = bytearray(sealed[index].ljust(BLOCK_SIZE + TAG_SIZE, b"\0"))
                try:
                    self._open_block(group * blocks + index, content, nonce, tag)
                except BlockDamaged:
                    continue
                return group
        return None

    # -- in which order

    def _by_age(self, ref: NodeRef, i: int, found: dict[Child, bytes]) -> list[Child]:
        """Return the pages found for a child, the newest first."""
        index = ref.index * self._fanout + i

        def compare(a: Child, b: Child) -> int:
            return -1 if self._is_newer(ref.level - 1, index, found[a], found[b]) else 1

        return sorted(found, key=cmp_to_key(compare))

    def _is_newer(self, level: int, index: int, a: bytes, b: bytes) -> bool:
        """Whether one page of a leaf or node was written after another one of it.

        Nonces grow with time, and an entry once gone never comes back. So of two leaf pages the
        newer has the greatest nonce of what they do not share, unless it differs by discards alone.
        """
        if level == 0:
            entries = [{p[at : at + ENTRY_SIZE] for at in range(0, BLOCK_SIZE, ENTRY_SIZE)
                        if p[at + 28]} for p in (a, b)]  # fmt: skip
            ours, theirs = entries[0] - entries[1], entries[1] - entries[0]
            if not ours or not theirs:
                return not ours
            return max(map(_age, ours)) > max(map(_age, theirs))
        nodes = [Node.decode(level, index, self._fanout, page) for page in (a, b)]
        for i in range(self._fanout):
            if nodes[0].mac(i) == nodes[1].mac(i):
                continue
            page_a, page_b = (self._child_page(node, i) for node in nodes)
            if page_a and page_b:
                return self._is_newer(level - 1, index * self._fanout + i, page_a, page_b)
            if page_a or page_b:
                return bool(page_a)  # what is old is written over some time, or given back
        return False

    def _child_page(self, node: Node, i: int) -> bytes:
        """Return the page of a child that has the MAC which its node names, if it is there."""
        geometry, index = self._geometry, node.index * self._fanout + i
        if node.slots[i] >= self._slot_count or node.positions[i] >= geometry.chunk_nodes:
            return b""
        for place in (0, 1):
            page = self._read(geometry.node_offset(node.slots[i], node.positions[i], place))
            macs = self._macs_of(node.level - 1, index, page)
            if len(page) == BLOCK_SIZE and node.mac(i) in macs:
                return page
        return b""

    def _macs_of(self, level: int, index: int, page: bytes) -> list[bytes]:
        """Return the MACs that a page may be known by: one, or one under each of two keys."""
        if level == 0:
            return [macs.leaf(index, page) for macs in self._macs.accepted]
        columns = Node.decode(level, index, self._fanout, page).columns()
        return [macs.node(level, index, columns) for macs in self._macs.accepted]

    # -- guessing

    def _proven(self, ref: NodeRef, named: list[Node], found: list[list[Child]]) -> Node | None:
        """Return the node that has the MAC it should have, if a guess within the limits does."""
        said = [[self._said(node, i) for i in range(self._fanout)] for node in named]
        options = [
            list(dict.fromkeys((*found[i], *(each[i] for each in said), HOLE)))
            for i in range(self._fanout)
        ]
        bases: list[list[Child]] = []
        for prefer, fallback in product((said[0], None, said[1]), (said[0], None)):
            base = []
            for i, pages in enumerate(found):
                wanted = prefer[i] if prefer is not None else None
                # A page whose MAC the damaged one says is surely one of that child.
                same = [p for p in pages if wanted is not None and p[:3] == wanted[:3]]
                base.append((*same, *pages, fallback[i] if fallback is not None else HOLE)[0])
            if base not in bases:
                bases.append(base)
        limit = min(MACS_MAX, MACS_MAX_TOTAL - self._tries)
        for tries, guess in enumerate(_guesses(bases, options)):
            if tries >= max(limit, len(bases)):
                break
            self._tries += 1
            node = _node_of(ref, self._fanout, guess)
            if self._tree.is_proven(ref, node):
                return node
        return None

    def _said(self, node: Node, i: int) -> Child:
        """Return what a damaged page says of a child, a hole where that cannot be."""
        if not node.present[i] or node.slots[i] >= self._slot_count:
            return HOLE
        return Child(node.mac(i), node.slots[i], node.positions[i], node.places[i])


def _guesses(bases: list[list[Child]], options: list[list[Child]]) -> Iterator[list[Child]]:
    """Yield the bases, then what differs from one of them in one child, in two, and so on."""
    open_ones = [i for i, each in enumerate(options) if len(each) > 1]
    for changed in range(len(open_ones) + 1):
        for base in bases:
            for where in combinations(open_ones, changed):
                for choice in product(*(_without(options[i], base[i]) for i in where)):
                    guess = base.copy()
                    for i, child in zip(where, choice, strict=True):
                        guess[i] = child
                    yield guess


def _without(options: list[Child], child: Child) -> list[Child]:
    return [each for each in options if each != child]


def _node_of(ref: NodeRef, fanout: int, children: Iterable[Child]) -> Node:
    node = Node(ref.level, ref.index, fanout)
    for i, child in enumerate(children):
        if child.mac != NO_MAC:
            node.set_mac(i, child.mac)
            node.slots[i], node.present[i] = child.slot, 1
            node.positions[i], node.places[i] = child.position, child.place
    return node


def _age(entry: bytes) -> tuple[int, int]:
    """Return (epoch, counter) of an entry: they grow with time."""
    return int.from_bytes(entry[:4], "little"), int.from_bytes(entry[4:12], "little")
