"""Turns every failure of a request into an errno and at most one line in the log.

A damaged block is read again and again by a guest that retries; the log names it once. What is
not a `SealfsError` or an `OSError` is a bug of ours: EIO for that request, a traceback in the log,
and the mount goes on.

Concurrency: used from the trio thread only.
"""

from __future__ import annotations

import logging

from sealfs.errors import AlreadyExists, BlockDamaged, NotFound, ReadOnly, SealfsError, UsageError
from sealfs.mount.errno import errno_of

_REMEMBERED_MAX = 4096  # distinct failures; more than that on one mount is one broken disk
_ORDINARY = (NotFound, AlreadyExists, ReadOnly, UsageError)

log = logging.getLogger("sealfs.mount")


class Failures:
    """Remembers what was logged, so that each failure is named once."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str, str]] = set()
        self._latest: dict[str, str] = {}

    def errno_of(self, exc: BaseException, *, image: str = "", vm_id: str = "") -> int:
        """Return the errno for `exc`; log it unless it is an ordinary refusal or known.

        Args:
            exc: what the request raised.
            image: path of the sealed image concerned, where there is one.
            vm_id: its VM, where it is known.
        """
        if isinstance(exc, SealfsError):
            if not isinstance(exc, _ORDINARY):
                self._log_once(exc, image or exc.subject, vm_id)
        elif not isinstance(exc, OSError):
            log.error("request failed on %r: %s", image, exc, exc_info=exc)
        return errno_of(exc)

    def forget(self, image: str) -> None:
        """Name the failures of `image` again: it was opened anew."""
        self._seen = {entry for entry in self._seen if entry[0] != image}
        self._latest.pop(image, None)

    def latest(self) -> dict[str, str]:
        """Return what went wrong last with each image since it was opened, by its path."""
        return dict(self._latest)

    def _log_once(self, exc: SealfsError, image: str, vm_id: str) -> None:
        entry = (image, type(exc).__name__, exc.detail)
        self._latest[image] = f"{type(exc).__name__}: {exc.detail}"
        if entry in self._seen:
            return
        if len(self._seen) >= _REMEMBERED_MAX:
            self._seen.clear()
            self._latest.clear()
        self._seen.add(entry)
        block = f" block={exc.block}" if isinstance(exc, BlockDamaged) else ""
        log.error(
            'image="%s" vm="%s"%s %s: %s', image, vm_id, block, type(exc).__name__, exc.detail
        )
