from collections.abc import Mapping
from typing import Any

from sealfs.image.plan import Buffer

class Outbox:
    count: int
    def __new__(cls, fd: int, /) -> Outbox: ...
    def put(self, header: bytes, content: Buffer, /) -> None: ...
    def flush(self) -> list[int]: ...

class Opener:
    def __new__(cls, prefix: Buffer, /) -> Opener: ...
    def add(self, epoch: int, key: Buffer, /) -> None: ...
    def forget(self) -> None: ...
    def send(
        self,
        fd: int,
        offset: int,
        block: int,
        count: int,
        leaf: Buffer,
        at: int,
        outbox: Outbox,
        header: bytes,
        keep: bool,
        /,
    ) -> bytes | bool | None: ...

class Quick:
    missing: int
    def __new__(
        cls,
        *,
        image: object,
        volume: object,
        cache: object,
        shared: object,
        clean: dict[int, bytes],
        nodes: Mapping[int, object],
        leaves: Mapping[int, bytearray],
        opener: Opener,
        fd: int,
        base: int,
        group_blocks: int,
        fanout: int,
        first_home: int,
        slot_size: int,
        keep_every: int,
    ) -> Quick: ...
    def answer(self, offset: int, size: int, outbox: Any, header: bytes, /) -> bool: ...
