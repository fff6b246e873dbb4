"""`key rotate`: a new VM key, and every image of the VM rewrapped to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import identities
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import warn
from sealfs.cli.keys import key_command
from sealfs.cli.named import record_of
from sealfs.cli.output import print_json, printable
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.cli.unlock import unlock_again
from sealfs.image.format import Identity

if TYPE_CHECKING:
    from sealfs.keys.rotation import Rotation


@key_command.command("rotate", short_help="New VM key, no data rewritten.")
@click.argument("vm")
@click.option(
    "--lost",
    multiple=True,
    type=PATH,
    metavar="IMAGE",
    help="A registered image that is gone for good: go on without it.",
)
@common_options
@pin_file_option
def rotate_key(settings: Settings, vm: str, lost: tuple[Path, ...]) -> None:
    """Make a new VM key, and rewrap the keys of all its images to it, in use or not.

    No data is rewritten. Until the last image is done both keys work; interrupted, the same
    command goes on where it was. Recovery keys, PCRs, signer and PIN stay the same; where the key
    takes a PIN, it is asked for. Copies of the images made before open with nothing but their
    recovery keys.
    """
    with settings.keys() as keys:
        vm_id = record_of(keys, vm).vm_id
        with keys.rotating(vm_id) as rotation:
            disks, left = identities.disks_of(keys, vm_id, without=lost)
            rotation.begin()
            unlock_again(settings, vm_id, rotation.pin)
            for disk in disks:
                settings.about(disk.path)
                # Crash here: images done open by the new key, the others by the old one.
                identities.rewrite(
                    disk,
                    keys,
                    lambda known: _image_key(rotation, known),
                    lambda known: _rewrapped(rotation, known),
                )
                if settings.verbose and not settings.json:
                    print(f"{printable(str(disk.path))}: rewrapped")
            rotation.finish()
            unlock_again(settings, vm_id, rotation.pin)
            dropped = rotation.dropped
    for path in left:
        warn(f'"{path}" was left out: its recovery key opens it on another host, this one not')
    for name in dropped:
        warn(f"recovery key {name} does not open the new key: make another by `key recovery`")
    if settings.json:
        print_json(
            {
                "vm_id": vm_id,
                "images": [str(disk.path) for disk in disks],
                "left_out": [str(path) for path in left],
                "dropped_recovery_keys": list(dropped),
            }
        )


def _image_key(rotation: Rotation, known: Identity) -> bytearray:
    return rotation.image_key(known.uuid, known.wrapped_key(known.vm_id))


def _rewrapped(rotation: Rotation, known: Identity) -> Identity:
    after = identities.with_keys(known, rotation.rewrap)
    return dataclasses.replace(after, recovery_slots=rotation.recovery_slots)
