"""What a mount does for `sealfs unlock` and `sealfs lock`: it keeps a VM's key, or drops it.

Concurrency: each verb is a task of the trio thread; the key service is asked in worker threads.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from sealfs.control import Document, Verb
from sealfs.errors import UsageError
from sealfs.keys.pin import pin_of
from sealfs.keys.vmkey import wipe
from sealfs.mount.driver import Disks
from sealfs.mount.opener import Opener


class KeyVerbs:
    """Verbs that concern the keys of the VMs whose images a mount serves."""

    def __init__(self, source: Path, *, opener: Opener, disks: Disks) -> None:
        self._source = source
        self._opener = opener
        self._disks = disks

    def table(self) -> dict[str, Verb]:
        """Return the verbs by name."""
        return {"unlock": self.unlock, "lock": self.lock}

    def status(self) -> Document:
        """Say whose keys these are, and which VMs are unlocked."""
        keys = self._opener.keys
        return {"state": str(keys.state_path), "unlocked": keys.unlocked()}

    async def unlock(self, request: Document) -> Document:
        """Open a VM's key with its PIN and keep it; one try, and none for a VM not served here.

        Raises:
            WrongPin, LockedOut, KeyServiceError: it does not open.
        """
        vm_id, text = _vm_of(request), request.get("pin")
        if not isinstance(text, str):
            raise UsageError("unlock", "expected a PIN")
        pin = pin_of(text)
        try:
            return {"serves": await self._disks.workers.run(partial(self._unlock, vm_id, pin))}
        finally:
            wipe(pin)

    async def lock(self, request: Document) -> Document:
        """Drop a VM's key, and close its images that nobody has open: theirs are dropped too."""
        vm_id = _vm_of(request)
        was_unlocked = await self._disks.workers.run(partial(self._opener.keys.lock, vm_id))
        in_use: list[str] = []
        if was_unlocked:
            in_use = [
                str(disk.path)
                for disk in self._disks.all()
                if disk.vm_id == vm_id and not await self._disks.close_idle(disk.key)
            ]
        return {"was_unlocked": was_unlocked, "in_use": in_use}

    def _unlock(self, vm_id: str, pin: bytearray) -> bool:
        serves = self._opener.serves(vm_id, self._source)
        if serves:
            self._opener.keys.unlock(vm_id, pin)
        return serves


def _vm_of(request: Document) -> str:
    vm_id = request.get("vm_id")
    if not isinstance(vm_id, str):
        raise UsageError("control request", "expected a VM id")
    return vm_id
