"""`resize`: another size for a disk, whether a mount has it in use or nobody."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sealfs.cli import sealed
from sealfs.cli.arguments import SIZE
from sealfs.cli.asked import pin_file_option
from sealfs.cli.output import print_json
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import UsageError


@click.command("resize")
@click.argument("image", type=PATH)
@click.argument("size", type=SIZE)
@click.option("--shrink", is_flag=True, help="Even if that cuts content off.")
@common_options
@pin_file_option
def resize_command(settings: Settings, image: Path, size: int, shrink: bool) -> None:
    """Set the size of a disk; what is new reads as zeros.

    IMAGE is a sealed file, or the plain file a mount shows for it, in use or not. A running VM
    sees the new size when its hypervisor is told (virsh blockresize, QMP block_resize); those
    resize the file themselves, so that this command is not needed then.
    """
    place = sealed.find(settings.about(image))
    if place.mount is not None:
        path = os.path.realpath(place.sealed)
        place.mount.call("resize", path=path, size=size, shrink=shrink)
    else:
        _resize(settings, place.sealed, size, may_shrink=shrink)
    if settings.json:
        print_json({"path": str(place.sealed), "size": size})


def _resize(settings: Settings, path: Path, size: int, *, may_shrink: bool) -> None:
    from sealfs.mount.opener import Opener

    with settings.keys() as keys:
        opener = Opener(keys, sealed.new_cache(), read_only=False)
        opened = opener.open(path)
        try:
            disk = opened.image
            if size < disk.size and not may_shrink:
                raise UsageError(path, f"has {disk.size} bytes, more than {size}: would be cut off")
            if size != disk.size:
                disk.resize(size)
            disk.close()
            opener.note({disk.uuid: disk.progress})
        finally:
            # Killed before: the old size or the new one, the other bytes as they were.
            opened.image.abandon()
            if opened.lock is not None:
                opened.lock.close()
