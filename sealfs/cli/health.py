"""One thing that `doctor` looked at, and the looking that several of its parts share.

Nothing here or in the parts changes anything. What this user may not look at is a note, not a
failure; what may hang, as a dead file server does, is asked in a thread that is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sealfs.cli.settings import Settings

OK, NOTE, WARN, FAIL = "ok", "note", "warn", "fail"
"""Fine; worth knowing, or not looked at; for you to judge; to be mended."""

ANSWER_WAIT = 3.0
"""Seconds for a mount to answer; one that lives takes milliseconds."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Health:
    """One thing looked at. `mend` is a command, or where none can help a few words."""

    level: str
    subject: str
    text: str
    mend: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return everything."""
        return {name: getattr(self, name) for name in self.__slots__}


Check = Callable[[Settings], Iterator[Health]]


def answered(question: Callable[[], T]) -> T | None:
    """Return what `question` returns, None if it does not within `ANSWER_WAIT`.

    Raises:
        Exception: what it raised.
    """
    results: list[T] = []
    failures: list[Exception] = []

    def ask() -> None:
        try:
            results.append(question())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_WAIT)
    if failures:
        raise failures[0]
    return results[0] if results else None
