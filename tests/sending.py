"""Blocks as a guest gets them: written to a descriptor by the hot path of the lane."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from typing import Any

from sealfs.errors import BlockDamaged
from sealfs.image.image import SealedImage
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE
from sealfs.image.outbox import Outbox, outbox
from sealfs.image.reader import SENT

TRIES_MAX = 5
HEADER = b"sixteen bytes..."


def sent(image: SealedImage, offset: int, size: int = BLOCK_SIZE) -> bytes | None:
    """Return what `send_blocks` sends from `offset` on; None where it sends nothing.

    `Quick` is asked before it and after it: it sends the same or nothing, and afterwards, when
    all is in memory, it sends whatever is of the usual case.
    """
    quick = image.quick()
    if quick is None:
        return slowly_sent(image, offset, size)
    before = quickly_sent(quick, offset, size)
    try:
        content = slowly_sent(image, offset, size)
    except BlockDamaged:
        assert before is None, "it sends what is lost"
        assert quickly_sent(quick, offset, size) is None, "it sends what is lost"
        raise
    assert before in (None, content)
    after = quickly_sent(quick, offset, size)
    if after is None and content is not None and is_usual(image, offset, size):
        for _ in range(TRIES_MAX):  # the page cache lost it meanwhile
            assert slowly_sent(image, offset, size) == content
            after = quickly_sent(quick, offset, size)
            if after is not None:
                break
        else:
            raise AssertionError(f"it does not answer {size} bytes at {offset}")
    assert after in (None, content)
    return content


def slowly_sent(image: SealedImage, offset: int, size: int = BLOCK_SIZE) -> bytes | None:
    """As `sent`, of `send_blocks` alone."""

    def answer(box: Outbox) -> bool:
        code = image.send_blocks(offset, size, box, HEADER)
        for _ in range(TRIES_MAX):
            if code < 0 or image.descriptor < 0:
                break
            # The page cache lost it meanwhile: brought back as the lane does.
            os.preadv(image.descriptor, [bytearray(size)], code)
            code = image.send_blocks(offset, size, box, HEADER)
        return code == SENT

    return _caught(answer)


def quickly_sent(quick: Any, offset: int, size: int = BLOCK_SIZE) -> bytes | None:
    """Return what `Quick.answer` sends; None where it says that it does not."""

    def answer(box: Outbox) -> bool:
        is_answered = quick.answer(offset, size, box, HEADER)
        assert isinstance(is_answered, bool)
        return is_answered

    return _caught(answer)


def is_usual(image: SealedImage, offset: int, size: int) -> bool:
    """Whether nothing but the page cache may keep `Quick` from sending what `send_blocks` sent."""
    cache, volume = image._cache, image._volume
    first, count = offset // BLOCK_SIZE, size // BLOCK_SIZE
    if cache.has_newer(first, count):
        return False
    if count == 1 and cache.base + first in cache.shared.clean:
        return True
    group, index = divmod(first, volume.geometry.group_blocks)
    leaf = volume.tree.leaf(group)
    if leaf is None or volume.inline:
        return False
    flags = leaf[index * ENTRY_SIZE + 28 : (index + count) * ENTRY_SIZE : ENTRY_SIZE]
    return flags.count(1) == count


def _caught(answer: Callable[[Outbox], bool]) -> bytes | None:
    """Return what is sent behind the header; None where nothing was to be, and was not."""
    receiving, sending = os.pipe2(os.O_NONBLOCK)
    fcntl.fcntl(sending, fcntl.F_SETPIPE_SZ, 1 << 18)
    try:
        box = outbox(sending)
        is_answered = answer(box)
        assert box.count == is_answered
        assert box.flush() == []
        os.close(sending)
        sending = -1
        found = os.read(receiving, 1 << 20)
    finally:
        for fd in (receiving, sending):
            if fd >= 0:
                os.close(fd)
    if not is_answered:
        assert not found, "something was sent of a block that was not there"
        return None
    assert found[: len(HEADER)] == HEADER
    return found[len(HEADER) :]
