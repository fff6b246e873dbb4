"""Leaf and node pages in memory: lookup, verification, batched update (FORMAT.md 6).

All node pages are here from open on; leaf pages are loaded on demand and the clean ones evicted.
A change marks pages *stale* (their MAC is to be computed) and *changed* (they are to be written
at the next checkpoint). Does no I/O: it is given pages and gives pages.

Concurrency: changed only in the owner's thread, except by `refresh` and `take_changes`, which run
in a worker while nothing else may change the tree. Other threads may look leaf entries up: what
they find may be outdated by the time they use it, which the blocks' tags then tell.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.image.cipher import TreeMacs, same_mac
from sealfs.image.format import NO_MAC, TREE_MAC_SIZE
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, Geometry
from sealfs.image.plan import Buffer

LEAVES_MAX = 4096
"""Leaf pages kept in memory for one image, unless more are changed: 16 MiB, 2 GiB of disk."""

NO_SLOT = -1

EMPTY_LEAF = bytes(BLOCK_SIZE)

ReadPage = Callable[[int], bytes]
"""Given an offset in the file, returns BLOCK_SIZE bytes, fewer at its end."""


@dataclass(frozen=True, slots=True)
class NodeRef:
    """What a parent, or for the top page the superblock, says of a node page."""

    level: int
    index: int
    slot: int
    position: int
    place: int
    mac: bytes
    """The root MAC for the top page."""
    cause: str = ""
    """Why the page is not there."""


@dataclass(frozen=True, slots=True)
class LostRange:
    """Blocks that a node page covers which is damaged and could not be rebuilt."""

    level: int
    first: int
    count: int
    cause: str


class Node:
    """One node page: where it lies, and its columns (FORMAT.md 6.2)."""

    __slots__ = ("index", "level", "macs", "place", "places", "position", "positions",
                 "present", "slot", "slots")  # fmt: skip

    def __init__(self, level: int, index: int, fanout: int) -> None:
        self.level, self.index = level, index
        self.slot, self.position, self.place = NO_SLOT, 0, 0
        self.macs = bytearray(TREE_MAC_SIZE * fanout)
        self.slots = array("I", bytes(4 * fanout))
        self.places = bytearray(fanout)
        self.positions = bytearray(fanout)
        self.present = bytearray(fanout)
        """1 where there is a child; its MAC may be yet to be computed."""

    def columns(self) -> bytes:
        """Return what the page's MAC covers."""
        return bytes(self.macs) + self.slots.tobytes() if self.level == 1 else bytes(self.macs)

    def encode(self) -> bytes:
        """Return the page."""
        page = b"".join((self.macs, self.slots.tobytes(), self.places, self.positions))
        return page.ljust(BLOCK_SIZE, b"\0")

    @classmethod
    def decode(cls, level: int, index: int, fanout: int, page: bytes) -> Node:
        """Take a page apart; whether it is authentic is the caller's question."""
        node = cls(level, index, fanout)
        at = TREE_MAC_SIZE * fanout
        node.macs[:] = page[:at]
        node.slots = array("I", page[at : at + 4 * fanout])
        at += 4 * fanout
        node.places[:] = page[at : at + fanout]
        node.positions[:] = page[at + fanout : at + 2 * fanout]
        if NO_MAC not in node.macs:
            node.present[:] = b"\1" * fanout
        else:
            for i in range(fanout):
                node.present[i] = node.mac(i) != NO_MAC
        return node

    def mac(self, i: int) -> bytes:
        """Return the MAC of child i."""
        return bytes(self.macs[TREE_MAC_SIZE * i : TREE_MAC_SIZE * (i + 1)])

    def set_mac(self, i: int, mac: bytes) -> None:
        """Set the MAC of child i."""
        self.macs[TREE_MAC_SIZE * i : TREE_MAC_SIZE * (i + 1)] = mac

    def clear(self, i: int) -> None:
        """Make child i a hole."""
        self.set_mac(i, NO_MAC)
        self.slots[i] = self.places[i] = self.positions[i] = self.present[i] = 0


class Tree:
    """The authenticated tree of one image."""

    def __init__(self, geometry: Geometry, macs: TreeMacs, path: str) -> None:
        self._geometry = geometry
        self._fanout = geometry.fanout
        self._macs = macs
        self._path = path
        self.nodes: list[dict[int, Node]] = [{} for _ in range(geometry.depth + 2)]
        """nodes[level][index]; level 0 is not used, and nothing is above the top."""
        self.leaves: dict[int, bytearray] = {}
        """Group to leaf page, of those in memory."""
        self._stale_leaves: set[int] = set()
        self._changed_leaves: set[int] = set()
        self._stale_nodes: list[set[int]] = [set() for _ in range(geometry.depth + 1)]
        self._changed_nodes: list[set[int]] = [set() for _ in range(geometry.depth + 1)]
        self.gone_nodes: list[tuple[int, int]] = []
        """(slot, position) of node pages that were given up, for the allocator."""
        self.missing: list[NodeRef] = []
        """Node pages that do not authenticate, until they are rebuilt or count as lost."""
        self.rebuilt: list[NodeRef] = []
        """Those that were rebuilt: the next checkpoint writes them, to positions of their own."""
        self.lost: list[LostRange] = []
        """Nothing in here is a hole, and nothing in here changes."""
        self._size = 0
        self._positions: set[tuple[int, int]] = set()
        top = Node(geometry.depth, 0, self._fanout)
        self.nodes[geometry.depth][0] = top
        self._mark_node(top)

    # -- loading

    @classmethod
    def load(
        cls, geometry: Geometry, macs: TreeMacs, path: str, read_page: ReadPage, *,
        root_mac: bytes, size: int, location: tuple[int, int, int],
    ) -> Tree:  # fmt: skip
        """Load and verify all node pages; those that do not authenticate are `missing`.

        Args:
            geometry: of the image.
            macs: computes its MACs.
            path: for messages.
            read_page: reads a page of the file.
            root_mac: from the live superblock.
            size: of the disk, from there too.
            location: (slot, position, place) of the top page.
        """
        tree = cls(geometry, macs, path)
        tree._stale_nodes[geometry.depth].clear()
        tree._changed_nodes[geometry.depth].clear()
        tree._size = size
        tree._load([NodeRef(geometry.depth, 0, *location, root_mac)], read_page)
        return tree

    def _load(self, pending: list[NodeRef], read_page: ReadPage) -> None:
        """Load node pages and what is below them."""
        while pending:
            ref = pending.pop()
            node, cause = self._find(ref, read_page)
            if node is None:
                self.missing.append(replace(ref, cause=cause))
            else:
                self._positions.add((node.slot, node.position))
                pending.extend(self._add(node))

    def _find(self, ref: NodeRef, read_page: ReadPage) -> tuple[Node | None, str]:
        """Return the node that is referred to, or why it is not there."""
        geometry = self._geometry
        cause = "does not authenticate: damaged, or altered outside sealfs"
        # Where pages lie is in no MAC: the reference may lead to where another one lies.
        if ref.position >= geometry.chunk_nodes or (ref.slot, ref.position) in self._positions:
            return None, cause
        for place in (ref.place & 1, 1 - (ref.place & 1)):
            try:
                page = read_page(geometry.node_offset(ref.slot, ref.position, place))
            except StorageFailed as exc:
                cause = f"cannot be read: {exc.detail}"
                continue
            if len(page) == BLOCK_SIZE:
                node = Node.decode(ref.level, ref.index, geometry.fanout, page)
                if self.is_proven(ref, node):
                    node.slot, node.position, node.place = ref.slot, ref.position, place
                    return node, ""
        return None, cause

    def is_proven(self, ref: NodeRef, node: Node) -> bool:
        """Whether a node is the one that is referred to."""
        return any(same_mac(self._mac_of(ref, node, macs), ref.mac) for macs in self._macs.accepted)

    def _mac_of(self, ref: NodeRef, node: Node, macs: TreeMacs) -> bytes:
        mac = macs.node(ref.level, ref.index, node.columns())
        return macs.root(self._size, mac) if ref.level == self._geometry.depth else mac

    def _add(self, node: Node) -> list[NodeRef]:
        """Take in a node that is proven; return what it refers to."""
        self.nodes[node.level][node.index] = node
        if node.level == 1:
            return []
        return [
            NodeRef(node.level - 1, node.index * self._fanout + i, node.slots[i],
                    node.positions[i], node.places[i], node.mac(i))
            for i in range(self._fanout) if node.present[i]
        ]  # fmt: skip

    def adopt(self, ref: NodeRef, node: Node, read_page: ReadPage) -> None:
        """Take in a node that was rebuilt, and load what is below it."""
        self.missing.remove(ref)
        self.rebuilt.append(ref)
        # Where it lay is in no MAC: the checkpoint writes it where nothing is.
        self._changed_nodes[ref.level].add(ref.index)
        self._load(self._add(node), read_page)

    def lose(self, ref: NodeRef) -> None:
        """Give a missing node page up: what it covers is lost, its MAC stays in its parent."""
        count = self._fanout**ref.level * self._geometry.group_blocks
        cause = f"node page {ref.level}.{ref.index} {ref.cause}"
        self.missing.remove(ref)
        self.lost.append(LostRange(ref.level, ref.index * count, count, cause))

    def check_lost(self, first: int, count: int) -> None:
        """Raise BlockDamaged where a run of blocks meets one that is lost."""
        for lost in self.lost:
            if first < lost.first + lost.count and lost.first < first + count:
                raise BlockDamaged(
                    self._path, lost.first, f"and the {lost.count - 1} after it are lost:"
                    f" {lost.cause}",
                )  # fmt: skip

    # -- groups

    def slot_of(self, group: int) -> int:
        """Return the slot of a group, NO_SLOT where it is a hole.

        Raises:
            BlockDamaged: the node page that would tell is lost.
        """
        node = self.nodes[1].get(group // self._fanout)
        if node is None:
            self.check_lost(group * self._geometry.group_blocks, 1)
            return NO_SLOT
        i = group % self._fanout
        return node.slots[i] if node.present[i] else NO_SLOT

    def groups(self, first: int = 0) -> Iterator[int]:
        """Yield the groups that have a slot, ascending, from `first` on; none that are lost."""
        nodes = self.nodes[1].copy()  # a worker may take emptied ones out meanwhile
        for index in sorted(nodes):
            if (index + 1) * self._fanout <= first:
                continue
            node = nodes[index]
            for i in range(max(0, first - index * self._fanout), self._fanout):
                if node.present[i]:
                    yield index * self._fanout + i

    def group_count(self, first: int = 0) -> int:
        """Return how many groups have a slot, from `first` on."""
        count = 0
        for index, node in self.nodes[1].copy().items():
            start = min(max(first - index * self._fanout, 0), self._fanout)
            count += node.present.count(1, start)
        return count

    def chunks(self) -> dict[int, list[int]]:
        """Return the node chunks in use: slot to positions."""
        chunks: dict[int, list[int]] = {}
        for level in self.nodes[1:]:
            for node in level.values():
                if node.slot != NO_SLOT:
                    chunks.setdefault(node.slot, []).append(node.position)
        return chunks

    def leaf(self, group: int) -> bytearray | None:
        """Return the leaf page of a group if it is in memory."""
        return self.leaves.get(group)

    def leaf_source(self, group: int) -> tuple[int, int, bytes]:
        """Return (slot, place hint, MAC) of a group that has a slot."""
        node, i = self.nodes[1][group // self._fanout], group % self._fanout
        return node.slots[i], node.places[i], node.mac(i)

    def verify_leaf(self, group: int, page: bytes, mac: bytes) -> bool:
        """Whether a page read from the disk is the leaf page with that MAC."""
        return len(page) == BLOCK_SIZE and any(
            same_mac(macs.leaf(group, page), mac) for macs in self._macs.accepted
        )

    def is_under_new_key(self, group: int, page: Buffer) -> bool:
        """Whether a leaf page's MAC is one under the present key, or will be: it is changed."""
        mac = self.leaf_source(group)[2]
        return group in self._stale_leaves or same_mac(self._macs.leaf(group, page), mac)

    def renew_nodes(self) -> bool:
        """Have the next `refresh` compute every node's MAC that is under an old key.

        Call after a checkpoint; the root is the superblock's business. Returns whether there was
        one.
        """
        old = [
            node
            for level in self.nodes[1 : self._geometry.depth]
            for node in level.values()
            if not self._is_node_under_new_key(node)
        ]
        for node in old:
            self._mark_node(node)
        return bool(old)

    def _is_node_under_new_key(self, node: Node) -> bool:
        parent = self.nodes[node.level + 1][node.index // self._fanout]
        mac = self._macs.node(node.level, node.index, node.columns())
        return same_mac(mac, parent.mac(node.index % self._fanout))

    def forget_leaf(self, group: int) -> None:
        """Let a leaf page go that came into memory in passing, unless it is changed."""
        if group not in self._changed_leaves:
            self.leaves.pop(group, None)

    def admit_leaf(self, group: int, page: bytes, place: int, mac: bytes) -> bytearray | None:
        """Keep a verified leaf page, unless the group has moved on since it was read."""
        leaf = self.leaves.get(group)
        if leaf is not None:
            return leaf
        node, i = self.nodes[1].get(group // self._fanout), group % self._fanout
        if node is None or not node.present[i] or node.mac(i) != mac:
            return None
        node.places[i] = place
        leaf = self.leaves[group] = bytearray(page)
        if len(self.leaves) > LEAVES_MAX:
            self._evict()
        return leaf

    def _evict(self) -> None:
        # First in, first out: cheap, and nothing on the read path has to keep an order.
        for group in list(islice(self.leaves, len(self.leaves) - LEAVES_MAX + LEAVES_MAX // 64)):
            if group not in self._changed_leaves:
                del self.leaves[group]

    # -- changes

    def put_group(self, group: int, slot: int, leaf: bytes, mac: bytes | None) -> int:
        """Give a group a slot and a leaf page; return the slot it had, or NO_SLOT.

        With a MAC the leaf page is on the disk already, at place 0; without, a checkpoint
        writes it there.
        """
        node, i = self._node_for(group), group % self._fanout
        old = node.slots[i] if node.present[i] else NO_SLOT
        node.slots[i], node.present[i] = slot, 1
        node.places[i] = 0 if mac else 1  # the next write of a new leaf goes to place 0
        self.leaves[group] = bytearray(leaf)
        self._mark_node(node)
        if mac:
            node.set_mac(i, mac)
            self._stale_leaves.discard(group)
            self._changed_leaves.discard(group)
        else:
            self._stale_leaves.add(group)
            self._changed_leaves.add(group)
        return old

    def put_sealed_group(self, group: int, slot: int, mac: bytes) -> int:
        """As `put_group` for a leaf page that is at place 0 and not in memory."""
        old = self.put_group(group, slot, b"", mac)
        del self.leaves[group]
        return old

    def drop_group(self, group: int) -> int:
        """Make a whole group a hole; return the slot it had."""
        index, i = divmod(group, self._fanout)
        node = self.nodes[1][index]
        slot = node.slots[i]
        node.clear(i)
        self._mark_node(node)
        self.leaves.pop(group, None)
        self._stale_leaves.discard(group)
        self._changed_leaves.discard(group)
        return slot

    def set_entries(self, group: int, index: int, entries: bytes) -> None:
        """Set entries of a group whose leaf page is in memory, from `index` on."""
        at = index * ENTRY_SIZE
        self.change_leaf(group)[at : at + len(entries)] = entries

    def change_leaf(self, group: int) -> bytearray:
        """Return the leaf page of a group, which is in memory, to be changed now."""
        self._stale_leaves.add(group)
        self._changed_leaves.add(group)
        return self.leaves[group]

    @property
    def changed_leaf_count(self) -> int:
        """Leaf pages that wait for a checkpoint."""
        return len(self._changed_leaves)

    @property
    def is_changed(self) -> bool:
        """Whether a checkpoint would write a page of the tree."""
        return bool(self._changed_leaves or any(self._changed_nodes))

    def _node_for(self, group: int) -> Node:
        index = group // self._fanout
        node = self.nodes[1].get(index)
        if node is None:
            node = self.nodes[1][index] = Node(1, index, self._fanout)
        return node

    def _mark_node(self, node: Node) -> None:
        self._stale_nodes[node.level].add(node.index)

    def unplaced_nodes_max(self) -> int:
        """Return an upper bound of the node pages that have no place on the disk yet."""
        indexes = {
            *self._stale_nodes[1],
            *self._changed_nodes[1],
            *(group // self._fanout for group in self._stale_leaves),
        }
        depth = self._geometry.depth
        unplaced = {(depth, 0)} if self.top.slot == NO_SLOT else set()
        unplaced.update(
            (ref.level, ref.index)
            for ref in self.rebuilt
            if not self._is_placed(ref.level, ref.index)
        )
        for index in indexes:
            level = 1
            while level < depth and not self._is_placed(level, index):
                unplaced.add((level, index))
                level, index = level + 1, index // self._fanout
        return len(unplaced)

    def _is_placed(self, level: int, index: int) -> bool:
        node = self.nodes[level].get(index)
        return node is not None and node.slot != NO_SLOT

    # -- MACs and checkpoint

    def refresh(self, size: int) -> bytes:
        """Compute the MACs of everything stale, bottom up, and return the root MAC."""
        nodes, fanout = self.nodes[1], self._fanout
        groups = list(self._stale_leaves)
        macs = self._macs.leaves(groups, [self.leaves[group] for group in groups])
        for at, group in enumerate(groups):
            mac = macs[TREE_MAC_SIZE * at : TREE_MAC_SIZE * (at + 1)]
            nodes[group // fanout].set_mac(group % fanout, mac)
        self._stale_nodes[1].update({group // fanout for group in groups})
        self._stale_leaves.clear()
        top = b""
        for level in range(1, self._geometry.depth + 1):
            for index in sorted(self._stale_nodes[level]):
                top = self._refresh_node(level, index)
            self._stale_nodes[level].clear()
        if not top:
            top = self._macs.node(
                self._geometry.depth, 0, self.nodes[self._geometry.depth][0].columns()
            )
        return self._macs.root(size, top)

    def _refresh_node(self, level: int, index: int) -> bytes:
        node = self.nodes[level][index]
        self._changed_nodes[level].add(index)
        mac = self._macs.node(level, index, node.columns())
        if level == self._geometry.depth:
            return mac
        parent_index, i = divmod(index, self._fanout)
        parent = self.nodes[level + 1].get(parent_index)
        if parent is None:
            parent = self.nodes[level + 1][parent_index] = Node(
                level + 1, parent_index, self._fanout
            )
        if any(node.present):
            parent.set_mac(i, mac)
            parent.present[i] = 1
        else:
            parent.clear(i)
            del self.nodes[level][index]
            self._changed_nodes[level].discard(index)
            if node.slot != NO_SLOT:
                self.gone_nodes.append((node.slot, node.position))
        self._mark_node(parent)
        return mac

    def take_changes(self, take_node: Callable[[], tuple[int, int]]) -> list[tuple[int, Buffer]]:
        """Return what a checkpoint writes, (offset, page), and flip the places.

        Never over a page that the live superblock's tree may need: leaf and node pages go to
        their other place, new node pages to a free position. Call after `refresh`, and `settle`
        when the pages are written. Leaf pages are not copied: they change with the next change.
        """
        geometry, fanout = self._geometry, self._fanout
        pages: list[tuple[int, Buffer]] = []
        nodes, leaf_offset = self.nodes[1], geometry.leaf_offset
        for group in self._changed_leaves:
            node, i = nodes[group // fanout], group % fanout
            node.places[i] ^= 1
            pages.append((leaf_offset(node.slots[i], node.places[i]), self.leaves[group]))
        # The place is outside every MAC, but the page that hints at it is to be written.
        self._changed_nodes[1].update({group // fanout for group in self._changed_leaves})
        for level in range(1, geometry.depth + 1):
            for index in sorted(self._changed_nodes[level]):
                node = self.nodes[level][index]
                if node.slot == NO_SLOT:
                    node.slot, node.position = take_node()
                    node.place = 0
                else:
                    node.place ^= 1
                if level < geometry.depth:
                    parent = self.nodes[level + 1][index // self._fanout]
                    i = index % self._fanout
                    parent.slots[i], parent.positions[i] = node.slot, node.position
                    parent.places[i] = node.place
                    self._changed_nodes[level + 1].add(parent.index)
                offset = geometry.node_offset(node.slot, node.position, node.place)
                pages.append((offset, node.encode()))
            self._changed_nodes[level].clear()
        return pages

    def settle(self) -> None:
        """Note that what `take_changes` gave is on the disk: leaf pages may be evicted again."""
        self._changed_leaves.clear()
        if len(self.leaves) > LEAVES_MAX:
            self._evict()

    @property
    def top(self) -> Node:
        """The top node page."""
        return self.nodes[self._geometry.depth][0]
