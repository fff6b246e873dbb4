"""The packet numbers already seen under one receiving key (RFC 6479), and how they are completed.

A number is checked before its frame is opened and marked once it has been: a forged frame moves
nothing. Pure; one receiver uses it.
"""

from __future__ import annotations

from typing import Final

from sealfs.net.frame import Drop

WINDOW: Final = 2048
"""Numbers below the highest seen that are still taken, each once."""

_WORD_BITS: Final = 64
_WORD_COUNT: Final = 64  # a ring of twice the window: a word is cleared long before its reuse
_HALF: Final = 0x80000000
_HIGH: Final = ~0xFFFFFFFF


class Window:
    """Accepts each packet number once, from 1 up, if it is not too far behind the highest."""

    __slots__ = ("_words", "highest", "lowest")

    def __init__(self) -> None:
        self.highest = 0
        self.lowest = 1
        """The lowest acceptable packet number."""
        self._words = [0] * _WORD_COUNT

    def complete(self, low: int) -> int:
        """Return the packet number whose low 32 bits are these (802.1AE-2018 10.6.2).

        The upper bits are those of the lowest acceptable number, one more if the low bits have
        gone round since. A wrong guess makes a wrong nonce: the frame does not authenticate.
        """
        number = (self.lowest & _HIGH) | low
        if self.lowest & _HALF and not low & _HALF:
            number += 1 << 32
        return number

    def check(self, number: int) -> Drop | None:
        """Return why a frame with this number is not to be opened, None if it may be."""
        if number > self.highest:
            return None
        if number < self.lowest:
            return Drop.LATE
        if self._words[number >> 6 & 63] >> (number & 63) & 1:
            return Drop.REPLAYED
        return None

    def mark(self, number: int) -> None:
        """Take a number that `check` let pass, and whose frame was authentic."""
        words, highest = self._words, self.highest
        if number > highest:
            word, last = highest >> 6, number >> 6
            if last - word >= _WORD_COUNT:
                words[:] = [0] * _WORD_COUNT
            else:
                while word < last:
                    word += 1
                    words[word & 63] = 0
            self.highest = number
            if number > WINDOW:
                self.lowest = number - WINDOW + 1
        words[number >> 6 & 63] |= 1 << (number & 63)
