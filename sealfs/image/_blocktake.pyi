from collections import OrderedDict
from collections.abc import Callable, Mapping
from mmap import mmap

from sealfs.image.plan import Buffer

class Taker:
    def __new__(
        cls,
        *,
        image: object,
        check: Callable[[], None],
        cache: object,
        shared: object,
        clean: OrderedDict[int, bytes],
        free: list[int],
        nodes: Mapping[int, object],
        leaves: Mapping[int, bytearray],
        space: object,
        reader: object,
        slab: mmap | bytearray,
        base: int,
        group_blocks: int,
        fanout: int,
        part_blocks: int,
    ) -> Taker: ...
    def take(self, offset: int, content: Buffer, /) -> bool: ...
    def take_landed(self, offset: int, size: int, /) -> bool: ...
