"""The names under which keys are kept: a VM's id as it is, a network's behind a prefix.

Pure. Records, packages, tombstones and every derivation from a key hold such a name, so that a
network's key is never taken for a VM's, nor the other way round, even where both are called alike.
"""

from __future__ import annotations

from typing import Final

from sealfs.errors import UsageError
from sealfs.keys import wire

NETWORK_PREFIX: Final = "net:"


def key_name_of(network: str) -> str:
    """Return the name under which a network's key is kept.

    Raises:
        UsageError: the identifier cannot be stored.
    """
    wire.check_identifier(NETWORK_PREFIX + network, "network identifier")
    if not network:
        raise UsageError(network, "a network identifier has at least one letter")
    return NETWORK_PREFIX + network


def network_of(name: str) -> str | None:
    """Return the network whose key is kept under a name, None for a VM's."""
    return name.removeprefix(NETWORK_PREFIX) if is_network(name) else None


def is_network(name: str) -> bool:
    """Whether a name is a network's."""
    return name.startswith(NETWORK_PREFIX)


def namesake(name: str) -> str:
    """Return the name of the VM that is called as this network, or of the network as this VM."""
    return name.removeprefix(NETWORK_PREFIX) if is_network(name) else NETWORK_PREFIX + name


def kind_of(name: str) -> str:
    """Return what a name names, in a word."""
    return "network" if is_network(name) else "VM"


def check_vm(vm_id: str) -> None:
    """Refuse a VM id that cannot be stored, or that names a network's key.

    Raises:
        UsageError: as said.
    """
    wire.check_identifier(vm_id, "VM id")
    if is_network(vm_id):
        raise UsageError(vm_id, f'VM ids do not begin with "{NETWORK_PREFIX}": networks do')
