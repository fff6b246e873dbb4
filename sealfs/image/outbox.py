"""Answers on their way to a descriptor, sent together: who asks several things is woken once.

For the owner's thread only.
"""

from __future__ import annotations

import errno
import os
from typing import TypeAlias

from sealfs.image.plan import Buffer

try:
    from sealfs.image import _blockread
except ImportError:  # it could not be built here; the same in Python
    _blockread = None  # type: ignore[assignment]

ANSWERS_MAX = 8
"""Kept back at most: more, and who asks and who answers take turns instead of going on both."""


class PlainOutbox:
    """As `_blockread.Outbox`, where that was not built."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._answers: list[tuple[bytes, bytes]] = []
        self._failed: list[int] = []

    @property
    def count(self) -> int:
        """Answers kept back."""
        return len(self._answers)

    def put(self, header: bytes, content: Buffer) -> None:
        """Keep an answer back, of header and content; one too many sends those before it."""
        if len(self._answers) == ANSWERS_MAX:
            self._send()
        self._answers.append((header, bytes(content)))

    def flush(self) -> list[int]:
        """Send what was kept back; return the errno of those that were not taken."""
        self._send()
        failed, self._failed = self._failed, []
        return failed

    def _send(self) -> None:
        for header, content in self._answers:
            try:
                count = os.writev(self._fd, (header, content))
                if count != len(header) + len(content):
                    self._failed.append(errno.EIO)
            except OSError as exc:
                self._failed.append(exc.errno or errno.EIO)
        self._answers.clear()


Outbox: TypeAlias = "PlainOutbox | _blockread.Outbox"


def outbox(fd: int) -> Outbox:
    """Return an outbox for a descriptor that does not block."""
    return PlainOutbox(fd) if _blockread is None else _blockread.Outbox(fd)
