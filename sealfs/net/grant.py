"""What the key service gives for one device of one VM on one network, and how it is asked for.

Knows no TPM, no socket and no frame: the key room makes grants, attachments use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

NETWORK_KEY_SIZE: Final = 32
SCI_SIZE: Final = 8


@dataclass(frozen=True, slots=True, repr=False)
class Grant:
    """What the key service gives one device of one VM on one network.

    The network key is never used itself: the handshake's secrets are derived from it by HKDF
    (handshake.py). Who holds a grant wipes it.
    """

    network: str
    """The network's identifier, NET-ID."""
    vm: str
    """The VM's identifier."""
    device: int
    """Which network device of the VM, from 0."""
    network_key: bytearray
    """NETWORK_KEY_SIZE bytes."""
    sci: bytes
    """Secure channel identifier (IEEE 802.1AE-2018 9.9): 6 bytes of a locally administered
    address made for this device of this VM, 2 bytes of port."""

    def __post_init__(self) -> None:
        if len(self.network_key) != NETWORK_KEY_SIZE:
            raise ValueError(f"a network key has {NETWORK_KEY_SIZE} bytes")
        if len(self.sci) != SCI_SIZE:
            raise ValueError(f"an SCI has {SCI_SIZE} bytes")

    def wipe(self) -> None:
        """Overwrite the network key."""
        self.network_key[:] = bytes(len(self.network_key))


class Grants(Protocol):
    """The key service, as the network service sees it."""

    async def grant(self, network: str, vm: str, device: int) -> Grant:
        """Return the grant of a VM's device on a network; the caller wipes it.

        The device is the caller's until `release`, on this host.

        Raises:
            SealfsError: no such network or VM, not allowed, revoked, or no key service.
            Busy: the device is attached by another process.
        """
        ...

    def release(self, vm: str, device: int) -> None:
        """Give a device back that `grant` was answered for; once more does no harm."""
        ...

    async def unlock(self, name: str, pin: bytearray) -> None:
        """Open the key of a VM or network by its PIN, until `lock`.

        Raises:
            SealfsError: a wrong PIN, or no such key.
        """
        ...

    async def lock(self, name: str) -> None:
        """Forget what `unlock` opened."""
        ...

    async def still_allowed(self, network: str, vm: str, device: int) -> bool:
        """Whether `grant` would still be answered; asked every few seconds.

        Raises:
            SealfsError: it cannot be told now (the key service or the TPM does not answer).
        """
        ...
