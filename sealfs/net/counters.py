"""What is counted, and how it is told: as a document, and as Prometheus text.

Pure. Bytes are those of the VM's frames on the way in, of sealed frames on the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

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


def prometheus(statuses: Iterable[Mapping[str, Any]]) -> str:
    """Return attachments' statuses in Prometheus' text exposition format, version 0.0.4."""
    samples: dict[str, list[str]] = {name: [] for name in _METRICS}

    def add(name: str, labels: Mapping[str, object], value: float) -> None:
        text = ",".join(f'{key}="{_escaped(str(word))}"' for key, word in labels.items())
        samples[name].append(f"sealfs_net_{name}{{{text}}} {value}")

    for status in statuses:
        own = {key: status[key] for key in ("network", "vm", "device")}
        add("running", own, int(status["state"] == "running"))
        for cause, count in status["drops"].items():
            add("drops_total", {**own, "peer": "", "cause": cause}, count)
        for peer in status["peers"]:
            one = {**own, "peer": peer["address"]}
            add("peer_up", one, int(peer["state"] == "up"))
            if peer["handshake_age"] is not None:
                add("handshake_age_seconds", one, peer["handshake_age"])
            for what, count in peer["handshakes"].items():
                add("handshakes_total", {**one, "what": what}, count)
            for direction in ("in", "out"):
                for unit in ("frames", "bytes"):
                    labels = {**one, "direction": direction}
                    add(f"{unit}_total", labels, peer[f"{unit}_{direction}"])
            for cause, count in peer["drops"].items():
                add("drops_total", {**one, "cause": cause}, count)
    lines = []
    for name, (kind, says) in _METRICS.items():
        if samples[name]:
            lines += [f"# HELP sealfs_net_{name} {says}", f"# TYPE sealfs_net_{name} {kind}"]
            lines += samples[name]
    return "".join(line + "\n" for line in lines)


_METRICS: Final = {
    "running": ("gauge", "1 while the attachment passes frames."),
    "peer_up": ("gauge", "1 while the peer answers under agreed keys."),
    "handshake_age_seconds": ("gauge", "Age of the keys in use."),
    "handshakes_total": ("counter", "Handshakes by what became of them."),
    "frames_total": ("counter", "Frames passed on."),
    "bytes_total": ("counter", "Bytes of the frames passed on."),
    "drops_total": ("counter", "Frames not passed on, by cause."),
}


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
