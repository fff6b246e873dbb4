"""Which VM is allowed on which network: `STATE/networks`, for all networks of this host.

Each permission carries a MAC under a subkey of its VM's key, so that nobody gives one who does not
have that key; the file as a whole is one of `noted`. While a VM's key is changed it has a
permission under each of both keys.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Self

from sealfs.errors import NoSpace
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import MAC_SIZE, UUID_SIZE
from sealfs.keys.ledger import NETWORKS_ID, STATE_MAC_SIZE, Ledger, Progress, SubkeyLender
from sealfs.keys.noted import NotedFile
from sealfs.keys.statedir import NETWORKS_FILE, StateDir
from sealfs.keys.vmkey import VmKey

VERSION: Final = 1
PERMISSION_COUNT_MAX: Final = 16_384
"""As many as the registry has images."""
NETWORKS_SIZE_MAX: Final = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True, order=True)
class Permission:
    """One VM on one network; `mac` is under the VM's key."""

    network: str
    vm_id: str
    mac: bytes = bytes(MAC_SIZE)

    @property
    def pair(self) -> tuple[str, str]:
        return self.network, self.vm_id

    def under(self, vm_key: VmKey) -> Permission:
        """Return it with the MAC of a VM's key."""
        body = wire.text(self.network) + wire.text(self.vm_id)
        with vm_key.subkey(labels.PERMISSION_MAC_INFO) as mac_key:
            return dataclasses.replace(self, mac=hmac.digest(mac_key, body, "sha256"))

    def is_of(self, vm_key: VmKey) -> bool:
        """Whether it was given with that key."""
        return hmac.compare_digest(self.mac, self.under(vm_key).mac)


@dataclass(frozen=True, slots=True)
class PermissionFile:
    """The file: permissions in order, a MAC over everything before it; changes are counted."""

    host_id: bytes
    permissions: tuple[Permission, ...]
    generation: int
    mac: bytes = bytes(MAC_SIZE)

    def _body(self) -> bytes:
        parts = [
            labels.NETWORKS_MAGIC,
            wire.number(VERSION, 2),
            self.host_id,
            wire.number(self.generation, 8),
            wire.number(len(self.permissions), 4),
        ]
        for one in self.permissions:
            parts += [wire.text(one.network), wire.text(one.vm_id), one.mac]
        return b"".join(parts)

    def encode(self) -> bytes:
        return self._body() + self.mac

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse; its MAC is not checked yet.

        Raises:
            FormatError: not a table of permissions, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.NETWORKS_MAGIC, "table of networks")
        reader.version(VERSION, "the table of networks")
        host_id = reader.take(UUID_SIZE)
        generation = reader.number(8)
        count = reader.number(4)
        if count > PERMISSION_COUNT_MAX:
            reader.damaged(f"announces {count} entries, at most {PERMISSION_COUNT_MAX} are allowed")
        found = tuple(
            Permission(reader.identifier(), reader.identifier(), reader.take(MAC_SIZE))
            for _ in range(count)
        )
        mac = reader.take(MAC_SIZE)
        reader.finish()
        return cls(host_id, found, generation, mac)

    @property
    def progress(self) -> Progress:
        """How far the file has come, in the ledger's words."""
        return Progress(self.generation, self.mac[:STATE_MAC_SIZE])

    def with_mac(self, mac_key: bytes | bytearray) -> Self:
        """Return the file authenticated under the host's subkey."""
        return dataclasses.replace(self, mac=hmac.digest(mac_key, self._body(), "sha256"))

    def is_authentic(self, mac_key: bytes | bytearray) -> bool:
        """Whether the MAC fits."""
        return hmac.compare_digest(self.mac, hmac.digest(mac_key, self._body(), "sha256"))


class Permissions:
    """The permissions of one host. Any thread, any number of processes."""

    def __init__(
        self, state: StateDir, host_id: bytes, subkey: SubkeyLender, ledger: Ledger
    ) -> None:
        self._ledger = ledger
        self._file = NotedFile(
            state,
            host_id,
            subkey,
            ledger,
            name=NETWORKS_FILE,
            what="table of networks",
            ledger_id=NETWORKS_ID,
            mac_info=labels.NETWORKS_MAC_INFO,
            size_max=NETWORKS_SIZE_MAX,
            decode=PermissionFile.decode,
            empty=lambda generation: PermissionFile(host_id, (), generation),
            is_made_by_init=False,
        )

    def read(self, *, counted: bool) -> tuple[Permission, ...]:
        """Return all permissions in order; their own MACs are not checked.

        Args:
            counted: compare the ledger with the TPM's counter, too: nobody has put back an older
                state directory as a whole. Takes the state lock and a use of the TPM.

        Raises:
            KeyRecordDamaged: edited, removed, or another host's.
            RolledBack: older than this host has seen it.
        """
        noted = self._ledger.find(NETWORKS_ID) if counted else None
        return self._file.read(noted).permissions

    def change(self, step: Callable[[set[Permission]], Iterable[Permission]]) -> None:
        """Replace the permissions by those that `step` returns; durable on return.

        Raises:
            As `read`, and what `step` raises.
            NoSpace: they are too many.
        """

        def after(before: PermissionFile) -> PermissionFile:
            wanted = tuple(sorted(step(set(before.permissions))))
            if wanted == before.permissions:
                return before
            if len(wanted) > PERMISSION_COUNT_MAX:
                raise NoSpace(self._file.subject, f"holds {PERMISSION_COUNT_MAX} entries at most")
            return PermissionFile(before.host_id, wanted, before.generation + 1)

        self._file.change(after)

    def rebase(self) -> bool | None:
        """Take the table as it is for the newest; see `NotedFile.rebase`."""
        return self._file.rebase()

    def rekey(self, old: VmKey | None, new: VmKey) -> None:
        """Give what was given with a VM's old key under its new one as well; durable on return.

        `old` is None where it does not open any more: then only what the new one has stays.
        """

        def step(found: set[Permission]) -> set[Permission]:
            ours = [one for one in found if one.vm_id == new.vm_id]
            good = [one for one in ours if old is not None and one.is_of(old)]
            return found | {one.under(new) for one in good}

        self.change(step)

    def settle(self, key: VmKey) -> None:
        """Forget what was given with another key than this, which is the VM's from now on."""
        self.change(
            lambda found: {one for one in found if one.vm_id != key.vm_id or one.is_of(key)}
        )
