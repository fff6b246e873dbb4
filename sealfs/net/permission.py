"""Whether a VM is still allowed on its network, as far as the key service says.

A no is final. No answer at all is taken for the last one for some time, so that a key service that
starts anew, or a TPM that is busy, cuts nobody off; after that it is a no until there is an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from sealfs.errors import Busy, KeydUnavailable, SealfsError, TpmUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ASK_INTERVAL: Final = 3.0
"""Seconds between two questions whether the VM is still allowed."""
ASK_GRACE: Final = 60.0
"""Seconds for which a key service that does not answer is taken to have said yes."""


class Permission:
    """Asks, and remembers when it was last told yes."""

    def __init__(
        self,
        ask: Callable[[], Awaitable[bool]],
        *,
        interval: float,
        clock: Callable[[], float],
        tell: Callable[[str], None],
    ) -> None:
        """Begin with the yes that a grant is.

        Args:
            ask: the key service; may raise a `SealfsError`.
            interval: seconds between two questions.
            clock: steady seconds.
            tell: gets a sentence where there is no answer.
        """
        self._ask, self._interval, self._clock, self._tell = ask, interval, clock, tell
        self._told_at = clock()
        self._ask_now = trio.Event()

    @property
    def is_stale(self) -> bool:
        """Whether nobody could tell for too long, also where a question just hangs."""
        return self._clock() - self._told_at >= ASK_GRACE

    def recheck(self) -> None:
        """Ask now."""
        self._ask_now.set()

    async def lost(self) -> str:
        """Return, with the reason, when the VM is no longer allowed."""
        while True:
            with trio.move_on_after(self._interval):
                await self._ask_now.wait()
            self._ask_now = trio.Event()
            try:
                if not await self._ask():
                    return "no longer allowed"
            except (TpmUnavailable, KeydUnavailable, Busy) as exc:
                self._tell(f"cannot ask the key service: {exc}")
            except SealfsError as exc:
                return str(exc)
            else:
                self._told_at = self._clock()
