"""VM keys kept after a PIN was given, so that it is tried once and not at each open.

Concurrency: any thread. What is lent is a copy of its own, so that `lock` can wipe the key at any
moment.
"""

from __future__ import annotations

import threading

from sealfs.keys.records import KeyRecord
from sealfs.keys.vmkey import VmKey


class Unlocked:
    """The keys of the VMs that were unlocked, until they are locked.

    A VM whose key is being changed has two: the old one, and the one to come.
    """

    def __init__(self) -> None:
        self._keys: dict[str, tuple[VmKey, ...]] = {}
        # Protects the keys against being wiped while one is copied; held for microseconds.
        self._lock = threading.Lock()

    def keep(self, *keys: VmKey) -> None:
        """Take over the keys of one VM; those it had are wiped."""
        with self._lock:
            self._wipe(keys[0].vm_id)
            self._keys[keys[0].vm_id] = keys

    def replace(self, key: VmKey) -> None:
        """Keep a copy of another key of a VM that is unlocked, in place of those it had."""
        with self._lock:
            if self._wipe(key.vm_id):
                with key.secret() as secret:
                    copy = VmKey(
                        bytearray(secret),
                        vm_id=key.vm_id,
                        kmi=key.kmi,
                        recovery_slots=key.recovery_slots,
                    )
                self._keys[key.vm_id] = (copy,)

    def copy_of(self, record: KeyRecord) -> VmKey | None:
        """Return the key that a record is for, None where it is locked.

        A record that is authentic under none of the kept keys was edited, or has another key
        since: they are of no use for it.
        """
        with self._lock:
            for kept in self._keys.get(record.vm_id, ()):
                if kept.kmi != record.kmi:
                    continue
                with kept.record_mac_key() as mac_key:
                    if not record.is_authentic(mac_key):
                        continue
                with kept.secret() as secret:
                    return VmKey(
                        bytearray(secret),
                        vm_id=record.vm_id,
                        kmi=record.kmi,
                        recovery_slots=record.recovery_slots,
                    )
            return None

    def names(self) -> list[str]:
        """Return the VM ids whose keys are kept, sorted."""
        with self._lock:
            return sorted(self._keys)

    def lock(self, vm_id: str) -> bool:
        """Wipe a VM's keys; whether there were any."""
        with self._lock:
            return self._wipe(vm_id)

    def close(self) -> None:
        """Wipe all."""
        for vm_id in self.names():
            self.lock(vm_id)

    def _wipe(self, vm_id: str) -> bool:
        keys = self._keys.pop(vm_id, ())
        for key in keys:
            key.wipe()
        return bool(keys)
