"""Bounded strict encoding of the key room's files: big-endian integers, counted byte strings.

Pure. A reader either returns a value inside its limits or raises `KeyRecordDamaged`; it never
reads past the end, and `finish` refuses bytes that nobody asked for.
"""

from __future__ import annotations

import unicodedata
from typing import Final, NoReturn

from sealfs.errors import FormatError, KeyRecordDamaged, UsageError

IDENTIFIER_SIZE_MAX: Final = 255
"""Bytes of a VM id or KMI: what a directory entry allows, so any name people use fits."""

# Controls, line and paragraph separators: they would break a log line or a terminal.
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Zl", "Zp"})


def identifier_problem(text: str) -> str | None:
    """Say what is wrong with a VM id or KMI, or None."""
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if not 1 <= size <= IDENTIFIER_SIZE_MAX:
        return f"has {size} bytes, 1 to {IDENTIFIER_SIZE_MAX} are allowed"
    if any(unicodedata.category(letter) in _REFUSED_CATEGORIES for letter in text):
        return "contains a control character or a line separator"
    return None


def check_identifier(text: str, what: str) -> None:
    """Refuse a VM id or KMI that cannot be stored; anything a person may type is fine.

    Raises:
        UsageError: too long, empty, not UTF-8, or with control characters.
    """
    problem = identifier_problem(text)
    if problem is not None:
        raise UsageError(ascii(text[:64]), f"the {what} {problem}")


class Reader:
    """Walks over the bytes of one file; `subject` names it in errors."""

    def __init__(self, raw: bytes, subject: str) -> None:
        self._raw = raw
        self._position = 0
        self.subject = subject

    @property
    def position(self) -> int:
        """Bytes read so far."""
        return self._position

    def damaged(self, detail: str) -> NoReturn:
        raise KeyRecordDamaged(self.subject, detail)

    def magic(self, expected: bytes, what: str) -> None:
        if self._raw[: len(expected)] != expected:
            raise FormatError(self.subject, f"this is not a {what}")
        self._position = len(expected)

    def version(self, supported: int, what: str, *, oldest: int | None = None) -> int:
        """Return the version: `supported`, or one from `oldest` on where older ones are read."""
        found = self.number(2)
        first = supported if oldest is None else oldest
        if not first <= found <= supported:
            reads = f"{supported}" if first == supported else f"{first} to {supported}"
            raise FormatError(
                self.subject, f"{what} has format version {found}, this sealfs reads {reads}"
            )
        return found

    def take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._raw):
            self.damaged(f"is cut short at byte {len(self._raw)}")
        piece = self._raw[self._position : end]
        self._position = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def counted(self, size_max: int, size_min: int = 0) -> bytes:
        size = self.number(2)
        if not size_min <= size <= size_max:
            self.damaged(f"a field of {size} bytes where {size_min} to {size_max} are allowed")
        return self.take(size)

    def text(self, size_max: int) -> str:
        try:
            return self.counted(size_max).decode("utf-8")
        except UnicodeDecodeError:
            self.damaged("a text field is not UTF-8")

    def identifier(self) -> str:
        text = self.text(IDENTIFIER_SIZE_MAX)
        problem = identifier_problem(text)
        if problem is not None:
            self.damaged(f"an identifier {problem}")
        return text

    def finish(self) -> None:
        if self._position != len(self._raw):
            self.damaged(f"has {len(self._raw) - self._position} bytes too many")


def number(value: int, size: int) -> bytes:
    """Encode an unsigned integer; too large is a bug."""
    return value.to_bytes(size, "big")


def counted(raw: bytes) -> bytes:
    """Encode a byte string behind its size."""
    return number(len(raw), 2) + raw


def text(value: str) -> bytes:
    """Encode text as counted UTF-8."""
    return counted(value.encode("utf-8"))
