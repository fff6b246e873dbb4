"""Which peer a guest's address was last heard behind (as a bridge does, IEEE 802.1Q-2018 8.8).

Pure. Two generations make ageing cheap: an address is looked up in both, heard ones are in the
young one, and every `AGE` seconds the old one is thrown away. So one is forgotten between `AGE`
and twice that after it was last heard.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

P = TypeVar("P")

AGE: Final = 150.0
"""Seconds of a generation; 802.1Q's default ageing time is 300."""
ADDRESSES_MAX: Final = 1024
"""Addresses of one peer in one generation: a guest that makes up addresses fills its own share."""


class Learned(Generic[P]):
    """Addresses, each behind at most one peer."""

    def __init__(self, now: float) -> None:
        self._young: dict[bytes, P] = {}
        self._old: dict[bytes, P] = {}
        self._counts: dict[P, int] = {}
        self._turned_at = now

    def heard(self, address: bytes, peer: P) -> None:
        """Note that a frame with this source address came from a peer."""
        known = self._young.get(address)
        if known == peer or address[0] & 1:  # a group address is nobody's
            return
        count = self._counts.get(peer, 0)
        if count >= ADDRESSES_MAX:
            return
        if known is not None:
            self._counts[known] -= 1
        self._young[address] = peer
        self._counts[peer] = count + 1

    def find(self, address: bytes) -> P | None:
        """Return the peer behind an address; None for a group address and an unknown one."""
        found = self._young.get(address)
        return self._old.get(address) if found is None else found

    def forget(self, peer: P) -> None:
        """Forget all addresses of a peer."""
        for generation in (self._young, self._old):
            for address in [a for a, p in generation.items() if p == peer]:
                del generation[address]
        self._counts.pop(peer, None)

    def turn(self, now: float) -> None:
        """Age; called now and then."""
        if now - self._turned_at >= AGE:
            self._old, self._young, self._counts = self._young, {}, {}
            self._turned_at = now

    def __len__(self) -> int:
        return len(self._young.keys() | self._old.keys())
