"""The key service as the network service asks it: in this process, or by way of keyd.

Concurrency: its calls block, some of them for a use of the TPM, so each runs in a worker thread;
`_held` is touched in the trio thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from sealfs.keys.networks import NetworkKey, lock_device
from sealfs.keys.statedir import ImageLock
from sealfs.net.grant import Grant

WORKERS_MAX: Final = 4
"""Questions at once; a TPM answers one after the other anyway."""

T = TypeVar("T")


class Networks(Protocol):
    """The networks of a key service."""

    def grant(self, network: str, vm_id: str, device: int) -> NetworkKey: ...
    def is_allowed(self, network: str, vm_id: str) -> bool: ...


class Keys(Protocol):
    """A key service: `KeyService` or `RemoteKeys`."""

    @property
    def networks(self) -> Networks: ...
    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock: ...
    def unlock(self, vm_id: str, pin: bytearray) -> None: ...
    def lock(self, vm_id: str) -> bool: ...
    def close(self) -> None: ...


class KeyServiceGrants:
    """Grants of a key service; each device that was granted is locked on this host."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._held: dict[tuple[str, int], ImageLock] = {}
        self._limiter: trio.CapacityLimiter | None = None

    async def grant(self, network: str, vm: str, device: int) -> Grant:
        """Lock a VM's device and return its grant; see `Grants`."""
        lock = await self._ask(partial(lock_device, self._keys, vm, device))
        try:
            found = await self._ask(partial(self._keys.networks.grant, network, vm, device))
        except BaseException:
            lock.close()
            raise
        self._held[vm, device] = lock
        return Grant(network, vm, device, found.key, found.sci)

    def release(self, vm: str, device: int) -> None:
        """Let go of a device; see `Grants`."""
        lock = self._held.pop((vm, device), None)
        if lock is not None:
            lock.close()

    async def unlock(self, name: str, pin: bytearray) -> None:
        """Open a key by its PIN; see `Grants`."""
        await self._ask(partial(self._keys.unlock, name, pin))

    async def lock(self, name: str) -> None:
        """Forget it; see `Grants`."""
        await self._ask(partial(self._keys.lock, name))

    async def still_allowed(self, network: str, vm: str, device: int) -> bool:
        """Whether `grant` would still be answered; see `Grants`."""
        return await self._ask(partial(self._keys.networks.is_allowed, network, vm))

    async def _ask(self, question: Callable[[], T]) -> T:
        if self._limiter is None:
            self._limiter = trio.CapacityLimiter(WORKERS_MAX)
        return await trio.to_thread.run_sync(question, limiter=self._limiter)
