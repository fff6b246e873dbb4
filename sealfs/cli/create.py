"""`create` and `import`: new sealed images, empty or from an existing disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sealfs.cli import plain
from sealfs.cli.arguments import SIZE
from sealfs.cli.errors import warn
from sealfs.cli.newkey import NewKeyOf, new_key_options
from sealfs.cli.output import Advance, print_json, progress
from sealfs.cli.sealing import Fill, NewImage, make
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import NotFound, UsageError
from sealfs.image.format import MAGICS
from sealfs.image.image import SealedImage

F = TypeVar("F", bound=Callable[..., Any])


def _new_image_options(command: F) -> F:
    for option in (
        click.option("--disk", "label", metavar="LABEL", default="", help="Which disk of the VM."),
        click.option(
            "--vm-id", metavar="ID", help="Whose disk it is; without, a UUID is made and printed."
        ),
    ):
        command = option(command)
    return new_key_options(command)


@click.command("create")
@click.argument("image", type=PATH)
@click.option("--size", type=SIZE, required=True, help="Bytes, or with K, M, G, T (binary).")
@_new_image_options
@common_options
def create_command(
    settings: Settings,
    image: Path,
    size: int,
    vm_id: str | None,
    label: str,
    new_key: NewKeyOf,
) -> None:
    """Make a new, empty sealed image.

    It is sparse: space is taken as the VM writes. Name it NAME.sealed; a mount shows NAME.
    """
    settings.about(image)
    _make(settings, NewImage(image, size, vm_id, label, new_key()), None)


@click.command("import")
@click.argument("source", type=PATH)
@click.argument("image", type=PATH)
@click.option(
    "--format",
    "disk_format",
    metavar="FORMAT",
    help="Of SOURCE, else found out; name it where a stranger wrote the disk.",
)
@_new_image_options
@common_options
def import_command(
    settings: Settings,
    source: Path,
    image: Path,
    disk_format: str | None,
    vm_id: str | None,
    label: str,
    new_key: NewKeyOf,
) -> None:
    """Seal an existing disk: a file or device in any format that qemu-img reads.

    Holes and zeros stay holes. SOURCE is only read; destroy it afterwards, it is in clear.
    Interrupted, nothing half-made is left behind.
    """
    settings.about(image)
    if not source.exists():
        raise NotFound(source, "no such disk")
    with plain.open_source(source, disk_format, MAGICS["superblock"]) as disk:
        if not disk.size:
            raise UsageError(source, "is empty: a disk has 1 byte or more")
        if disk.backing is not None:
            warn(f'"{source}" is an overlay; the content of "{disk.backing}" is sealed with it')
        wanted = NewImage(image, disk.size, vm_id, label, new_key())
        _make(settings, wanted, lambda sealed: _copy(disk, sealed, source.name))


def _make(settings: Settings, wanted: NewImage, fill: Fill | None) -> None:
    try:
        with settings.keys() as keys:
            vm_id, image_uuid = make(keys, settings.state, wanted, fill)
    finally:
        wanted.key.wipe()
    if settings.json:
        print_json({"path": str(wanted.path), "vm_id": vm_id, "image_uuid": image_uuid.hex()})
    elif wanted.vm_id is None:
        print(vm_id)


def _copy(disk: plain.Source, image: SealedImage, name: str) -> None:
    extents = disk.extents()
    with progress(f"sealing {name}", sum(size for _, size in extents)) as advance:
        for offset, size in extents:
            _copy_extent(disk, image, offset, size, advance)


def _copy_extent(
    disk: plain.Source, image: SealedImage, offset: int, size: int, advance: Advance
) -> None:
    end = offset + size
    while offset < end:
        # To the next multiple of the chunk, so that all but the first begin on a block.
        count = min(end - offset, plain.CHUNK_SIZE - offset % plain.CHUNK_SIZE)
        chunk = disk.read(offset, count)
        for start, length in plain.data_runs(chunk):
            image.write(offset + start, chunk[start : start + length])
        advance(count)
        offset += count
