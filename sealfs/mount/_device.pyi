from collections.abc import Callable, Mapping
from mmap import mmap

from sealfs.image.outbox import Outbox

class Device:
    requests: int
    runs: int
    answered: int
    taken: int
    missing: int
    def __new__(
        cls,
        fd: int,
        buffer: mmap,
        others: tuple[int, ...],
        handles: Mapping[int, object],
        outbox: Outbox,
        not_taken: Callable[[list[int]], None],
        shared: object,
        /,
    ) -> Device: ...
    def next(self, nanoseconds: int, is_lone: bool, /) -> int: ...
