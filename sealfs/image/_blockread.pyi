from sealfs.image.plan import Buffer

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
        out_fd: int,
        header: bytes,
        /,
    ) -> bytes | bool | None: ...
