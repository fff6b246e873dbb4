"""Write plans: what is to be written, in which order, with which barriers, as plain data.

Whoever decides returns a plan; `storage.execute` alone carries it out. So "a crash after step k"
is a slice of a list, and a test reads what would be written without a disk. Steps are tuples
whose first item is the `Step`; buffers are not copied and must not change until the plan is done.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from enum import IntEnum
from typing import Literal, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

Offsets: TypeAlias = "array[int]"
"""Of typecode Q."""


class Step(IntEnum):
    """What one step of a plan does."""

    WRITE = 1
    """(WRITE, offset, buffers): into the page cache; durable after the next SYNC."""
    SYNC = 2
    """(SYNC,): fdatasync; a barrier for every WRITE, PUNCH and TRUNCATE before it."""
    DURABLE = 3
    """(DURABLE, offset, buffers): RWF_DSYNC; makes its own range durable and nothing else."""
    PUNCH = 4
    """(PUNCH, offset, size): deallocate; reads as zeros."""
    TRUNCATE = 5
    """(TRUNCATE, size): set the length of the file."""
    WRITE_BLOCKS = 6
    """(WRITE_BLOCKS, offsets, content): as WRITE, each block of `content` to its own offset."""


PlanStep: TypeAlias = (
    tuple[Literal[Step.WRITE], int, Sequence[Buffer]]
    | tuple[Literal[Step.SYNC]]
    | tuple[Literal[Step.DURABLE], int, Sequence[Buffer]]
    | tuple[Literal[Step.PUNCH], int, int]
    | tuple[Literal[Step.TRUNCATE], int]
    | tuple[Literal[Step.WRITE_BLOCKS], Offsets, Buffer]
)

WritePlan: TypeAlias = list[PlanStep]
