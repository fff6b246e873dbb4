"""`net create`, `net list`, `net show`, `net allow` and `net deny`: networks and who is on them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import click

from sealfs.cli import survey
from sealfs.cli.asked import pin_file_option
from sealfs.cli.newkey import NewKeyOf, console_key, new_key_options
from sealfs.cli.output import print_facts, print_json, print_table
from sealfs.cli.settings import Settings, common_options
from sealfs.control import call, run_directory
from sealfs.errors import KeyNotFound, SealfsError
from sealfs.keys import names
from sealfs.keys.vmkey import wipe

if TYPE_CHECKING:
    from sealfs.keys.reports import KeyInfo
    from sealfs.keys.service import KeyService

SOCKET: Final = "net.sock"
"""The network service's, in the directory of sockets."""
VM = click.option("--vm", required=True, metavar="ID", help="The virtual machine.")


@click.group("net")
def net_command() -> None:
    """Sealed network links between virtual machines.

    What leaves a VM by its network device is sealed on the way. A network is a key that hosts
    share: `sealfs key enroll NET-ID` gives it to another host's TPM, `sealfs key revoke NET-ID`
    destroys it here. On each host, the VMs of that host are allowed on it one by one.
    """


@net_command.command("create")
@click.argument("network", metavar="NET-ID")
@new_key_options
@common_options
def create_network(settings: Settings, network: str, new_key: NewKeyOf) -> None:
    """Make a network: its key, protected as a VM's is. No VM is allowed on it yet."""
    settings.situation.network = network
    with settings.keys() as keys:
        wanted = new_key()
        try:
            handed_in = console_key(wanted)
            try:
                keys.networks.create(
                    network,
                    kmi=wanted.kmi,
                    wanted=wanted.protection,
                    origin=wanted.origin,
                    handed_in=handed_in,
                    slot=wanted.slot,
                )
            finally:
                if handed_in is not None:
                    wipe(handed_in)
        finally:
            wanted.wipe()
        if settings.json:
            print_json(_document(_known(keys, network), []))


@net_command.command("list")
@common_options
def list_networks(settings: Settings) -> None:
    """List the networks of this host, and the VMs allowed on them. Nothing is unsealed."""
    with settings.keys() as keys:
        known = [info for info in keys.records() if names.is_network(info.vm_id)]
        pairs = keys.networks.allowed()
    if settings.json:
        print_json([_document(info, _vms(info, pairs)) for info in known])
        return
    print_table(
        ("NETWORK", "CREATED", "KEY", "ALLOWED"),
        [
            (
                names.network_of(info.vm_id) or "",
                info.created[:19].replace("T", " "),
                survey.key_text(info),
                ", ".join(_vms(info, pairs)) or "no VM",
            )
            for info in known
        ],
    )


@net_command.command("show")
@click.argument("network", metavar="NET-ID")
@common_options
def show_network(settings: Settings, network: str) -> None:
    """Show one network: its key's slots, and the VMs allowed on it. Nothing is unsealed."""
    settings.situation.network = network
    with settings.keys() as keys:
        info = _known(keys, network)
        vms = _vms(info, keys.networks.allowed())
        last_use = keys.audit.last_use(info.kmi)
    if settings.json:
        print_json({**_document(info, vms), "last_used": last_use})
        return
    slots = [
        (f"slot {index}", survey.slot_text(slot.to_json())) for index, slot in enumerate(info.slots)
    ]
    print_facts(
        [
            ("network", network),
            ("kmi", info.kmi),
            ("created", info.created),
            ("origin", info.origin),
            ("last used", last_use or "not known"),
            ("record", str(settings.state / info.file)),
            *([("gone", info.gone)] if info.gone else []),
            *slots,
            ("allowed", ", ".join(vms) or "no VM"),
        ]
    )


@net_command.command("allow")
@click.argument("network", metavar="NET-ID")
@VM
@common_options
@pin_file_option
def allow_vm(settings: Settings, network: str, vm: str) -> None:
    """Allow a VM of this host on a network, with the VM's own key.

    It stays allowed until `net deny`, or until one of both keys is revoked.
    """
    settings.situation.network = network
    with settings.keys() as keys:
        keys.networks.allow(network, vm)
    if settings.json:
        print_json({"network": network, "vm_id": vm, "allowed": True})


@net_command.command("deny")
@click.argument("network", metavar="NET-ID")
@VM
@common_options
def deny_vm(settings: Settings, network: str, vm: str) -> None:
    """Allow a VM no more on a network. One that is attached is cut off at once."""
    settings.situation.network = network
    with settings.keys() as keys:
        keys.networks.deny(network, vm)
    recheck()
    if settings.json:
        print_json({"network": network, "vm_id": vm, "allowed": False})


def recheck() -> None:
    """Have the network service ask now who is still allowed; it asks every few seconds anyway."""
    with contextlib.suppress(SealfsError, OSError):
        call(run_directory() / SOCKET, "recheck")


def _known(keys: KeyService, network: str) -> KeyInfo:
    name = names.key_name_of(network)
    for info in keys.records():
        if info.vm_id == name:
            return info
    raise KeyNotFound(network, "this host has no such network")


def _vms(info: KeyInfo, pairs: list[tuple[str, str]]) -> list[str]:
    return [vm for network, vm in pairs if network == names.network_of(info.vm_id)]


def _document(info: KeyInfo, vms: list[str]) -> dict[str, object]:
    document = info.to_json()
    del document["vm_id"]
    return {"network": names.network_of(info.vm_id), **document, "allowed": vms}
