"""Which key record a user means who names a VM or a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sealfs.errors import KeyNotFound, UsageError
from sealfs.keys import names, wire

if TYPE_CHECKING:
    from sealfs.keys.reports import KeyInfo
    from sealfs.keys.service import KeyService


def record_of(keys: KeyService, vm: str) -> KeyInfo:
    """Return the key record of a VM or a network, named by its id or KMI.

    A network may be named `net:NET-ID` as well, and a VM `vm:ID`.

    Raises:
        KeyNotFound, KeyRecordDamaged, FormatError: there is none, or it cannot be read.
        UsageError: a VM and a network are called so.
    """
    found = found_record(keys, vm)
    if found is not None:
        return found
    for name in (vm, names.NETWORK_PREFIX + vm):
        if wire.identifier_problem(name) is None and keys.has(name):
            keys.test(name)  # a record that cannot be read says nothing of its VM; this says why
    raise KeyNotFound(vm, "this host has no key for it")


def found_record(keys: KeyService, vm: str) -> KeyInfo | None:
    """Return what `record_of` does, None where there is none.

    Raises:
        UsageError: a VM and a network are called so.
    """
    known = keys.records()
    exact = [info for info in known if vm in (info.vm_id, info.kmi)]
    network = [info for info in known if info.vm_id == names.NETWORK_PREFIX + vm]
    if exact and network and not names.is_network(exact[0].vm_id):
        raise UsageError(vm, f'a VM and a network are called so: say "vm:{vm}" or "net:{vm}"')
    explicit = [info for info in known if f"vm:{info.vm_id}" == vm]
    return next(iter((*exact, *network, *explicit)), None)
