"""What a new tpm slot is to ask for before it gives its key. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sealfs.keys.records import PolicyKind


@dataclass(frozen=True, slots=True)
class Protection:
    """A slot's policy to be; all that is asked for must hold.

    Attributes:
        pcrs: these PCRs must be as they are when the slot is made; ascending.
        pin: this PIN must be given; whoever made this object wipes it.
        signer: the PCRs must be as this key (TPMT_PUBLIC) signs them to be.
    """

    pcrs: tuple[int, ...] = ()
    pin: bytearray | None = field(default=None, repr=False)
    signer: bytes = b""

    @property
    def policy(self) -> PolicyKind:
        """What the slot's record says of it."""
        asked = (
            (PolicyKind.PCRS, self.pcrs),
            (PolicyKind.PIN, self.pin),
            (PolicyKind.SIGNED, self.signer),
        )
        return PolicyKind(sum(kind for kind, is_asked in asked if is_asked))
