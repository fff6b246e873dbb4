from collections.abc import Sequence

from sealfs.image.plan import Buffer

def seal_run(
    key: Buffer,
    prefix: bytes,
    epoch: int,
    counter: int,
    blocks: Sequence[int],
    slab: Buffer,
    frames: Sequence[int],
    out: memoryview,
) -> bytes: ...
def open_run(
    keys: dict[int, bytearray], prefix: bytes, first: int, entries: Buffer, run: memoryview
) -> int: ...
def mac_run(
    key: Buffer, prefix: bytes, indexes: Sequence[int], pages: Sequence[Buffer], size: int
) -> bytes: ...
