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
