"""`rekey`: every block of an image sealed again under a new key, whether a VM uses it or not.

A mount does it for the images below it, in use or not, in the background of whatever their VMs do;
an image that no mount has is opened here. Either way it can be left at any moment and goes on.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sealfs.cli import sealed
from sealfs.cli.arguments import SIZE
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import Interrupted
from sealfs.cli.interrupts import shielded
from sealfs.cli.output import print_json, printable, progress, size_text
from sealfs.cli.pace import Pace
from sealfs.cli.sealed import Place
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import Busy, UsageError
from sealfs.mount.imagekeys import next_key

if TYPE_CHECKING:
    from sealfs.image.image import SealedImage
    from sealfs.image.sweep import Swept
    from sealfs.mount.control import RunningMount

POLL_INTERVAL = 0.5


@click.command("rekey")
@click.argument("image", type=PATH)
@click.option(
    "--rate",
    type=SIZE,
    help="Bytes a second, at most; without: 10M under a mount, else as fast as it goes.",
)
@click.option("--epochs", is_flag=True, help="Keep the key; make room in a full epoch table.")
@click.option("--detach", is_flag=True, help="Have the mount do it, and return.")
@click.option("--pause", is_flag=True, help="Have the mount leave it as it is for now.")
@click.option("--status", is_flag=True, help="Tell how far the mount is.")
@common_options
@pin_file_option
def rekey_command(settings: Settings, image: Path, rate: int | None, **flags: bool) -> None:
    """New data key, every block sealed again, in use or not.

    Interrupted, killed or unmounted, it goes on where it was: by the same command, or by itself as
    soon as a mount has the image in use. At the end the old key is overwritten in the image. Who
    has a copy of the image made before, and that key, still reads the copy.

    `key rotate` makes a new VM key instead, and rewrites no data.
    """
    chosen = [name for name in ("detach", "pause", "status") if flags[name]]
    if len(chosen) > 1:
        raise UsageError(image, f"--{chosen[0]} and --{chosen[1]} do not go together")
    place = sealed.find(settings.about(image))
    if place.mount is None:
        if chosen:
            raise UsageError(image, f"is under no mount, which --{chosen[0]} is for")
        done = _rekey_alone(settings, place, rate, epochs=flags["epochs"])
    else:
        done = _rekey_live(settings, place, place.mount, rate, **flags)
    if settings.json:
        print_json({"path": str(place.sealed), **done})


# -- nobody has it


def _rekey_alone(
    settings: Settings, place: Place, rate: int | None, *, epochs: bool
) -> dict[str, Any]:
    from sealfs.mount.opener import Opener

    path = place.sealed
    with settings.keys() as keys:
        opener = Opener(keys, sealed.new_cache(), read_only=False)
        opened = opener.open(path)
        disk = opened.image
        try:
            if not (epochs or disk.is_rekeying):
                with shielded(), next_key(keys, disk.identity, path) as new:
                    disk.begin_rekey(new.wrapped, new.key)
            with _closing(disk):
                size = _drive(disk, path, Pace(rate), epochs=epochs)
            opener.note({disk.uuid: disk.progress})
        finally:
            # Killed before: both keys are in the image, and it goes on at the next open.
            disk.abandon()
            if opened.lock is not None:
                opened.lock.close()
    _tell(settings, path, size, epochs=epochs)
    return {"is_rekeying": False, "is_running": False, "sealed": size}


@contextlib.contextmanager
def _closing(disk: SealedImage) -> Iterator[None]:
    """Close an image in order, however the block ends, unless its storage has failed."""
    try:
        yield
    finally:
        if disk.poisoned is None:
            with shielded():
                disk.close()


def _drive(disk: SealedImage, path: Path, pace: Pace, *, epochs: bool) -> int:
    """Seal again what there is; return how many bytes."""
    size = 0
    before, total = disk.rekey_sizes
    with progress(f"rekeying {path.name}", total) as advance:
        advance(before)
        while True:
            with shielded():
                part: Swept = disk.retire_part() if epochs else disk.rekey_part()
            size += part.size
            advance(part.looked_size)
            if part.is_done:
                return size
            pace.after(max(part.size, part.looked_size))


# -- under a mount


def _rekey_live(
    settings: Settings, place: Place, mount: RunningMount, rate: int | None, *,
    epochs: bool, detach: bool, pause: bool, status: bool,
) -> dict[str, Any]:  # fmt: skip
    path = os.path.realpath(place.sealed)

    def ask(action: str, **more: object) -> dict[str, Any]:
        return mount.call("rekey", path=path, action=action, **more)

    if pause or status:
        found = ask("pause" if pause else "status")
        if not settings.json:
            print(f"{printable(str(place.sealed))}: {_text(found)}")
        return found
    found = ask("retire" if epochs else "begin", rate=rate)
    if not detach:
        try:
            found = _follow(place, found, ask, epochs=epochs)
        except Interrupted:
            # As the user sees it: what he has interrupted does not go on.
            with shielded():
                ask("pause")
            raise
        _tell(settings, place.sealed, int(found["sealed"]), epochs=epochs)
    return found


def _follow(place: Place, found: dict[str, Any], ask: Any, *, epochs: bool) -> dict[str, Any]:
    """Show how far the mount is, until it is done."""
    from sealfs.control import error_from

    shown = 0
    with progress(f"rekeying {place.sealed.name}", int(found["total"])) as advance:
        while True:
            advance(max(0, int(found["done"]) - shown))
            shown = max(shown, int(found["done"]))
            if found["error"]:
                raise error_from(found["error"])
            if not found["is_running"]:
                if found["is_rekeying"] and not epochs:
                    raise Busy(place.sealed, "its rekey was paused by somebody: it is not done")
                return found
            time.sleep(POLL_INTERVAL)
            found = ask("status")


def _text(found: dict[str, Any]) -> str:
    if not found["is_rekeying"]:
        return "no rekey under way"
    share = 100 * found["done"] // max(1, found["total"])
    text = f"{share} % of {size_text(found['total'])} rekeyed"
    if not found["is_running"]:
        return f"{text}, paused"
    if found["seconds_left"] is None:
        return text
    minutes = -(-int(found["seconds_left"]) // 60)
    return f"{text}, {minutes // 60} h {minutes % 60} min left"


def _tell(settings: Settings, path: Path, size: int, *, epochs: bool) -> None:
    if settings.json:
        return
    what = "there is room in its epoch table" if epochs else "all of it is under a new key"
    print(f"{printable(str(path))}: {what}; {size_text(size)} sealed again")
