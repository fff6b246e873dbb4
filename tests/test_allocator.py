"""Slots and node positions: the lowest free one is taken, and what is given up comes back late."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sealfs.image.allocator import Allocator


def test_the_lowest_free_slot_is_taken_then_the_file_grows() -> None:
    allocator = Allocator(4, 3)
    allocator.occupy(0)
    allocator.occupy(2)
    assert [allocator.take() for _ in range(4)] == [1, 3, 4, 5]
    assert allocator.slot_count == allocator.busy_count == 6


def test_a_slot_given_up_is_free_only_after_the_release() -> None:
    allocator = Allocator(0, 3)
    slots = [allocator.take() for _ in range(3)]
    allocator.free(slots[1])
    assert (allocator.freed_count, allocator.freed()) == (1, [1])
    assert allocator.take() == 3
    allocator.release()
    assert allocator.freed_count == 0
    assert allocator.take() == 1


def test_a_slot_put_back_is_free_at_once() -> None:
    allocator = Allocator(0, 3)
    assert [allocator.take(), allocator.take()] == [0, 1]
    allocator.put_back(0)
    assert allocator.free_slots() == [0]
    assert allocator.take() == 0


def test_a_slot_named_twice_is_told() -> None:
    allocator = Allocator(0, 3)
    assert allocator.occupy(5)
    assert not allocator.occupy(5)
    assert allocator.slot_count == 6
    assert allocator.free_slots() == [0, 1, 2, 3, 4]


def test_node_positions_of_a_chunk_are_handed_out_once_and_come_back_late() -> None:
    allocator = Allocator(0, 3)
    slot = allocator.take()
    allocator.add_chunk(slot, used=[1])
    assert allocator.free_node_count == 2
    first, second = allocator.take_node(), allocator.take_node()
    assert {first, second} == {(slot, 0), (slot, 2)}
    allocator.free_node(*first)
    assert allocator.free_node_count == 0
    allocator.release()
    assert allocator.take_node() == first


def test_trimming_forgets_free_slots_at_the_end_only() -> None:
    allocator = Allocator(0, 3)
    for _ in range(6):
        allocator.take()
    for slot in (1, 4, 5):
        allocator.put_back(slot)
    assert allocator.trim() == 4
    assert [allocator.take(), allocator.take()] == [1, 4]


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator beside two sets."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = Allocator(3, 3)
        self.busy: set[int] = set()
        self.freed: set[int] = set()
        self.count = 3

    @rule()
    def take(self) -> None:
        slot = self.allocator.take()
        expected = min(set(range(self.count + 1)) - self.busy)
        assert slot == expected
        self.busy.add(slot)
        self.count = max(self.count, slot + 1)

    @rule(slot=st.integers(0, 12))
    def occupy(self, slot: int) -> None:
        assert self.allocator.occupy(slot) == (slot not in self.busy)
        self.busy.add(slot)
        self.count = max(self.count, slot + 1)

    @precondition(lambda self: self.busy - self.freed)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.busy - self.freed)))
        self.allocator.free(slot)
        self.freed.add(slot)

    @precondition(lambda self: self.busy - self.freed)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.busy - self.freed)))
        self.allocator.put_back(slot)
        self.busy.discard(slot)

    @rule()
    def release(self) -> None:
        self.allocator.release()
        self.busy -= self.freed
        self.freed.clear()

    @rule()
    def trim(self) -> None:
        self.count = max(self.busy, default=-1) + 1
        assert self.allocator.trim() == self.count

    @invariant()
    def agrees(self) -> None:
        assert self.allocator.slot_count == self.count
        assert self.allocator.busy_count == len(self.busy)
        assert self.allocator.free_slots() == sorted(set(range(self.count)) - self.busy)
        assert set(self.allocator.freed()) == self.freed


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(
    derandomize=True, deadline=None, max_examples=60, stateful_step_count=40
)
