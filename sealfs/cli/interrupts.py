"""Ending on a signal at a moment of our choice.

SIGINT, SIGTERM and SIGHUP raise `Interrupted` in the main thread, so that every `with` takes back
what it began; inside `shielded` they wait for its end. After the first one the others are
ignored: taking back is not to be interrupted again.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from sealfs.cli.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    shields = 0
    pending: int | None = None


_state = _State()


def install() -> None:
    """Take the signals over for this process."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, _on_signal)


def uninstall() -> None:
    """Give the signals back, before a mount takes them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def shielded() -> Iterator[None]:
    """Put signals off until the block has ended."""
    _state.shields += 1
    try:
        yield
    finally:
        _state.shields -= 1
        if not _state.shields and _state.pending is not None:
            _raise(_state.pending)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.shields:
        _state.pending = number
    else:
        _raise(number)


def _raise(number: int) -> None:
    _state.pending = None
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Interrupted(number)
