"""Steps: long operations as generators that yield what has to wait for the disk.

An operation that may wait is a generator. Its code between two yields runs in the owner's thread
and nothing of the image changes under it; what it yields is work, a function without arguments
that may wait and is run in any thread, one at a time. So the image knows no event loop: `run`
drives a generator in place, the mount drives the same generator from trio. A failure of the work
is thrown back into the generator, which decides what it means. A generator that was begun is run
to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")

Work: TypeAlias = Callable[[], Any]
Steps: TypeAlias = Generator[Work, Any, T]
"""Yields work, is sent its result, returns a T."""


def run(steps: Steps[T]) -> T:
    """Drive an operation to its end in the calling thread and return its result."""
    try:
        work = next(steps)
        while True:
            try:
                result = work()
            except BaseException as exc:
                work = steps.throw(exc)
            else:
                work = steps.send(result)
    except StopIteration as stop:
        value: T = stop.value
        return value
