"""`unlock` and `lock`: the PIN of a virtual machine, for the mounts that serve its images."""

from __future__ import annotations

import os

import click

from sealfs.cli import asked
from sealfs.cli.errors import warn
from sealfs.cli.output import print_json
from sealfs.cli.settings import Settings, common_options
from sealfs.errors import NotFound, SealfsError
from sealfs.keys.hardening import harden
from sealfs.keys.vmkey import wipe
from sealfs.mount.control import RunningMount, running_mounts


@click.command("unlock")
@click.argument("vm")
@click.option("--pin-file", metavar="FILE", help=asked.PIN_FILE_HELP)
@common_options
def unlock_command(settings: Settings, vm: str, pin_file: str | None) -> None:
    """Give a VM's PIN to the mounts that serve its images, once, before the VM starts.

    They keep the key until `sealfs lock` or until they are unmounted; without it an open fails
    with EACCES. A wrong PIN counts as one try.
    """
    harden()
    mounts = _mounts(settings, vm)
    pin = asked.pin(f"PIN of {vm}", pin_file)
    try:
        # The first refusal ends it: no second try with the same PIN.
        served = [
            mount.status["mountpoint"]
            for mount in mounts
            if mount.call("unlock", vm_id=vm, pin=pin.decode())["serves"]
        ]
    finally:
        wipe(pin)
    if not served:
        raise NotFound(vm, "no mount of this state directory serves an image of this VM")
    if settings.json:
        print_json({"vm_id": vm, "unlocked_at": served})


@click.command("lock")
@click.argument("vm")
@common_options
def lock_command(settings: Settings, vm: str) -> None:
    """Drop the key that `sealfs unlock` gave; the next open of an image needs the PIN again.

    An image that is in use stays open until its user closes it.
    """
    locked, in_use = [], []
    for mount in _mounts(settings, vm):
        answer = mount.call("lock", vm_id=vm)
        in_use += answer["in_use"]
        if answer["was_unlocked"]:
            locked.append(mount.status["mountpoint"])
    for path in in_use:
        warn(f'"{path}" is in use and stays open until it is closed')
    if settings.json:
        print_json({"vm_id": vm, "locked_at": locked, "in_use": in_use})


def unlock_again(settings: Settings, vm_id: str, pin: bytearray | None) -> None:
    """Have the mounts that keep a VM's key fetch it anew, while it changes and afterwards.

    `pin` is known to be right; None: no mount keeps it.
    """
    if pin is None:
        return
    for mount in _of_state(settings):
        if vm_id in mount.status.get("unlocked", ()):
            try:
                mount.call("unlock", vm_id=vm_id, pin=pin.decode())
            except SealfsError as error:
                warn(f'"{mount.status["mountpoint"]}" needs `sealfs unlock` again: {error}')


def _of_state(settings: Settings) -> list[RunningMount]:
    state = os.path.realpath(settings.state)
    return [mount for mount in running_mounts() if mount.status.get("state") == state]


def _mounts(settings: Settings, vm: str) -> list[RunningMount]:
    """Return the mounts of this state directory.

    Raises:
        NotFound: there is none.
    """
    found = _of_state(settings)
    if not found:
        raise NotFound(vm, f'no mount of the state directory "{settings.state}" is there')
    return found
