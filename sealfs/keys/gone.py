"""The tombstones of one host: which keys were moved or revoked."""

from __future__ import annotations

import logging

from sealfs.errors import FormatError, KeyRecordDamaged
from sealfs.keys import reports
from sealfs.keys.statedir import GONE_SUFFIX, StateDir
from sealfs.keys.tombstone import TOMBSTONE_SIZE_MAX, Tombstone

_log = logging.getLogger(__name__)


class Gone:
    """The keys that this host gave away or destroyed."""

    def __init__(self, state: StateDir) -> None:
        self._state = state

    def tombstone(self, kmi: str) -> Tombstone | None:
        """Return why a KMI has no key here any more, None where it was not taken away."""
        raw = self._state.read(self._state.gone_file(kmi), TOMBSTONE_SIZE_MAX)
        return None if raw is None else Tombstone.decode(raw, kmi)

    def check_not_gone(self, vm_id: str) -> None:
        """Refuse a VM whose key was moved or revoked, whatever its KMI.

        Raises:
            KeyGone: it was.
        """
        for stone in self.tombstones().values():
            if stone.vm_id == vm_id:
                raise stone.error(reports.time_text(stone.when))

    def tombstones(self) -> dict[str, Tombstone]:
        """Return the keys that were moved or revoked, by file."""
        found = {}
        for file in self._state.record_names(GONE_SUFFIX):
            raw = self._state.read(file, TOMBSTONE_SIZE_MAX)
            if raw is None:
                continue
            try:
                found[file] = Tombstone.decode(raw, file)
            except (FormatError, KeyRecordDamaged) as error:
                # Its own VM is refused by `tombstone`; the others are not concerned.
                _log.warning("skipping a key record: %s", error)
        return found
