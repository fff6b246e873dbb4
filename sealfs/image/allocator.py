"""Which slots, and which positions in node chunks, are free, and from when. Pure.

Never stored: it is derived from the tree at open. A slot is busy while the live tree, the tree
of the live superblock or any record since names it (FORMAT.md 8.3), so what is freed becomes
available only when the checkpoint that forgets it is durable.
"""

from __future__ import annotations

from collections.abc import Iterable


class Allocator:
    """Slots of a file and node positions in chunks."""

    def __init__(self, slot_count: int, chunk_nodes: int) -> None:
        self._busy = bytearray(slot_count)
        self._hint = 0
        self._chunk_nodes = chunk_nodes
        self._freed: list[int] = []
        self._free_nodes: list[tuple[int, int]] = []
        self._freed_nodes: list[tuple[int, int]] = []

    @property
    def slot_count(self) -> int:
        """Slots that the file has, free ones included."""
        return len(self._busy)

    @property
    def busy_count(self) -> int:
        """Slots that are not free."""
        return sum(self._busy)

    @property
    def free_node_count(self) -> int:
        """Node positions that can be handed out without a new chunk."""
        return len(self._free_nodes)

    def occupy(self, slot: int) -> bool:
        """Mark a slot busy because something on the disk names it; False if it was already."""
        if slot >= len(self._busy):
            self._busy.extend(bytes(slot + 1 - len(self._busy)))
        was_free = not self._busy[slot]
        self._busy[slot] = 1
        return was_free

    def take(self) -> int:
        """Return the lowest free slot, at the end of the file if there is none within."""
        slot = self._busy.find(0, self._hint)
        if slot < 0:
            slot = len(self._busy)
            self._busy.append(0)
        self._busy[slot] = 1
        self._hint = slot + 1
        return slot

    def free(self, slot: int) -> None:
        """Give up a slot that something durable names; free after the next checkpoint."""
        self._freed.append(slot)

    def freed(self) -> list[int]:
        """Return the slots that the next `release` makes available."""
        return list(self._freed)

    @property
    def freed_count(self) -> int:
        """How many slots the next `release` makes available."""
        return len(self._freed)

    def free_slots(self) -> list[int]:
        """Return the slots that are free, within the file."""
        return [slot for slot, busy in enumerate(self._busy) if not busy]

    def put_back(self, slot: int) -> None:
        """Give back a slot that nothing durable has ever named; free at once."""
        self._busy[slot] = 0
        self._hint = min(self._hint, slot)

    def add_chunk(self, slot: int, used: Iterable[int] = ()) -> None:
        """Use a busy slot as a node chunk, of which the positions `used` are taken."""
        taken = set(used)
        self._free_nodes.extend(
            (slot, position)
            for position in range(self._chunk_nodes - 1, -1, -1)
            if position not in taken
        )

    def take_node(self) -> tuple[int, int]:
        """Return a free (slot, position) for a node page; one must be there."""
        return self._free_nodes.pop()

    def free_node(self, slot: int, position: int) -> None:
        """Give up a node position; free after the next checkpoint."""
        self._freed_nodes.append((slot, position))

    def release(self) -> None:
        """Make available what was freed: the checkpoint is durable."""
        for slot in self._freed:
            self.put_back(slot)
        self._freed.clear()
        self._free_nodes.extend(self._freed_nodes)
        self._freed_nodes.clear()

    def trim(self) -> int:
        """Forget free slots at the end of the file; return how many slots remain."""
        last = self._busy.rfind(1)
        del self._busy[last + 1 :]
        self._hint = min(self._hint, len(self._busy))
        return len(self._busy)
