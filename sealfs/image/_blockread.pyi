from typing import Literal

from sealfs.image.plan import Buffer

class Opener:
    def __new__(cls, key: Buffer, prefix: bytes, /) -> Opener: ...
    def send(
        self, fd: int, offset: int, block: int, leaf: Buffer, at: int, out_fd: int, header: bytes, /
    ) -> bytes | Literal[False] | None: ...
