"""`export`: the plain disk out of a sealed image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click

from sealfs.cli import plain, sealed
from sealfs.cli.asked import pin_file_option
from sealfs.cli.newborn import Newborn
from sealfs.cli.output import print_json, progress
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.image.image import SealedImage


@click.command("export")
@click.argument("image", type=PATH)
@click.argument("dest", type=PATH)
@click.option(
    "--format",
    "disk_format",
    type=click.Choice(["raw", "qcow2"]),
    default="raw",
    show_default=True,
    help="Of DEST.",
)
@click.option("--force", is_flag=True, help="Replace DEST, a file, if it exists.")
@common_options
@pin_file_option
def export_command(
    settings: Settings, image: Path, dest: Path, disk_format: str, force: bool
) -> None:
    """Write a sealed image out as a plain disk, holes kept.

    DEST is in clear, readable by its owner only. The image must not be in use: copy a running
    VM's disk through the mount.
    """
    settings.about(image)
    place = sealed.find(image)
    with settings.keys() as keys, sealed.opened(settings, place, keys) as source:
        settings.situation.destination = dest  # from here on what fails is its making
        with Newborn(dest, replace=force) as newborn:
            with plain.open_target(
                newborn.temporary, disk_format, source.size, shown_as=dest
            ) as target:
                _copy(source, target, dest.name)
            newborn.name()
        if settings.json:
            facts = {"path": str(dest), "format": disk_format, "size": source.size}
            print_json({**facts, "image": str(place.sealed)})


def _copy(image: SealedImage, target: plain.Target, name: str) -> None:
    extents = list(_extents(image))
    with progress(f"writing {name}", sum(size for _, size in extents)) as advance:
        for first, size in extents:
            for offset in range(first, first + size, plain.CHUNK_SIZE):
                count = min(plain.CHUNK_SIZE, first + size - offset)
                chunk = memoryview(image.read(offset, count))
                for start, length in plain.data_runs(chunk):
                    target.write(offset + start, chunk[start : start + length])
                advance(count)


def _extents(image: SealedImage) -> Iterator[plain.Extent]:
    at: int | None = 0
    while at is not None and at < image.size:
        start = image.seek(at, os.SEEK_DATA)
        if start is None:
            return
        at = image.seek(start, os.SEEK_HOLE)
        end = image.size if at is None else at
        yield start, end - start
