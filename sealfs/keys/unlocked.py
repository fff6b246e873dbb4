"""VM keys kept after a PIN was given, so that it is tried once and not at each open.

Concurrency: any thread. What is lent is a copy of its own, so that `lock` can wipe the key at any
moment.
"""

from __future__ import annotations

import threading

from sealfs.keys.records import KeyRecord
from sealfs.keys.vmkey import VmKey


class Unlocked:
    """The keys of the VMs that were unlocked, until they are locked."""

    def __init__(self) -> None:
        self._keys: dict[str, VmKey] = {}
        # Protects the keys against being wiped while one is copied; held for microseconds.
        self._lock = threading.Lock()

    def keep(self, key: VmKey) -> None:
        """Take over a key; an older one of its VM is wiped."""
        with self._lock:
            old = self._keys.pop(key.vm_id, None)
            if old is not None:
                old.wipe()
            self._keys[key.vm_id] = key

    def copy_of(self, record: KeyRecord) -> VmKey | None:
        """Return the key that a record is for, None where it is locked.

        A record that is not authentic under the kept key was edited, or has another key since:
        the kept one is of no use for it.
        """
        with self._lock:
            kept = self._keys.get(record.vm_id)
            if kept is None or kept.kmi != record.kmi:
                return None
            with kept.record_mac_key() as mac_key:
                if not record.is_authentic(mac_key):
                    return None
            with kept.secret() as secret:
                return VmKey(
                    bytearray(secret),
                    vm_id=record.vm_id,
                    kmi=record.kmi,
                    recovery_slots=record.recovery_slots,
                )

    def names(self) -> list[str]:
        """Return the VM ids whose keys are kept, sorted."""
        with self._lock:
            return sorted(self._keys)

    def lock(self, vm_id: str) -> bool:
        """Wipe a VM's key; whether there was one."""
        with self._lock:
            key = self._keys.pop(vm_id, None)
            if key is not None:
                key.wipe()
            return key is not None

    def close(self) -> None:
        """Wipe all."""
        for vm_id in self.names():
            self.lock(vm_id)
