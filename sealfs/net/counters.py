"""What is counted, and how it is told: as a document, and as Prometheus text.

Pure. Bytes are those of the VM's frames on the way in, of sealed frames on the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sealfs.net.frame import Drop

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sealfs.net.association import Association


class Counters:
    """Frames, bytes, and drops by cause."""

    __slots__ = ("bytes_in", "bytes_out", "drops", "frames_in", "frames_out")

    def __init__(self) -> None:
        self.frames_in = self.bytes_in = 0
        self.frames_out = self.bytes_out = 0
        self.drops = dict.fromkeys(Drop, 0)

    def sent(self, count: int, size: int) -> None:
        """Count frames that went to the network."""
        self.frames_out += count
        self.bytes_out += size

    def received(self, count: int, size: int) -> None:
        """Count frames that were opened for the VM."""
        self.frames_in += count
        self.bytes_in += size

    def document(self) -> dict[str, object]:
        """Return what is not zero among the drops, JSON-able."""
        return {"drops": {drop.value: count for drop, count in self.drops.items() if count}}


def describe(
    address: str, association: Association, counters: Counters, now: float
) -> dict[str, object]:
    """Return all there is to say of one peer, JSON-able."""
    current, counts = association.current, association.counts
    return {
        "address": address,
        "sci": association.peer_sci.hex(),
        "state": association.state,
        "handshake_age": round(now - current.made_at, 1) if current else None,
        "association_number": current.association_number if current else None,
        "packet_number": current.sending.next_number - 1 if current else None,
        "handshakes": {
            "completed": counts.completed,
            "begun": counts.begun,
            "answered": counts.answered,
            "refused": counts.refused,
            "repeated": counts.repeated,
            "limited": counts.limited,
        },
        "last_refusal": counts.last_refusal,
        "frames_in": counters.frames_in,
        "bytes_in": counters.bytes_in,
        "frames_out": counters.frames_out,
        "bytes_out": counters.bytes_out,
        **counters.document(),
    }


def prometheus(statuses: Iterable[Mapping[str, object]]) -> str:
    """Return attachments' statuses in Prometheus' text format, version 0.0.4."""
    raise NotImplementedError
