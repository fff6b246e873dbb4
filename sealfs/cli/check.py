"""`check` and `scrub`: verify images, in use or not, and save what verifies from a damaged one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sealfs.cli import plain, sealed, survey
from sealfs.cli.arguments import SIZE
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import ExitCode, hint_of, sentence_of, warn
from sealfs.cli.newborn import Newborn
from sealfs.cli.output import print_json, printable, progress
from sealfs.cli.pace import Pace
from sealfs.cli.sealed import Place
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import BlockDamaged, Busy, NotFound, SealfsError, StorageFailed
from sealfs.image.check import Finding, Part
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.steps import run

if TYPE_CHECKING:
    from sealfs.image.image import SealedImage
    from sealfs.keys.service import KeyService
    from sealfs.mount.control import RunningMount

SCRUB_RATE = 10 << 20
"""Bytes a second: a disk of 1 TiB takes a day, and nobody notices."""
GROUPS_AT_ONCE = 4


@click.command("check")
@click.argument("image", type=PATH)
@click.option("--data", is_flag=True, help="Verify every block too, not the tree alone.")
@click.option("--rate", type=SIZE, help="Bytes a second, at most; without: as fast as it goes.")
@click.option(
    "--salvage", type=PATH, metavar="DEST", help="Write what verifies to DEST, a plain raw disk."
)
@common_options
@pin_file_option
def check_command(
    settings: Settings, image: Path, data: bool, rate: int | None, salvage: Path | None
) -> int:
    """Verify an image, in use or not; nothing in it is changed.

    Names each bad block: its number, its place on the VM's disk, what differs. Exit code 3 when
    blocks are bad, 5 when the structure is.

    With --salvage every block that verifies is written to DEST, which is in clear; what does not
    is a hole there, and named. The image must not be in use.
    """
    place = sealed.find(settings.about(image))
    if salvage is not None:
        findings, size = _salvaged(settings, place, salvage)
        data = True
    else:
        findings, size = _checked(settings, place, data=data, rate=rate)
    if settings.json:
        print_json(_json(place, findings, size, data))
        return ExitCode.FINDINGS if findings else ExitCode.OK
    _print(image, findings)
    if not findings:
        what = "structure and data" if data else "structure; --data verifies the content too"
        print(f"{printable(str(image))}: clean ({what})")
    return ExitCode.FINDINGS if findings else ExitCode.OK


@click.command("scrub")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=PATH)
@click.option(
    "--rate", type=SIZE, default=SCRUB_RATE, show_default="10M", help="Bytes a second, at most."
)
@common_options
def scrub_command(settings: Settings, paths: tuple[Path, ...], rate: int) -> int:
    """Verify every block of images in the background, in use or not, and say what is bad.

    PATH is an image, a directory of them, or a mount point. For cron or a systemd timer: silent
    where all is well. An image that cannot be opened is named, and the others go on.
    """
    found: list[dict[str, Any]] = []
    for image in [image for path in paths for image in _images(path)]:
        settings.about(image)
        try:
            place = sealed.find(image)
            findings, size = _checked(settings, place, data=True, rate=rate)
        except SealfsError as error:
            warn(sentence_of(error))
            hint = hint_of(error, settings.situation)
            found.append({"path": str(image), "error": str(error), "hint": hint})
            continue
        if not settings.json:
            _print(image, findings)
        found.append(_json(place, findings, size, data=True))
    if settings.json:
        print_json(found)
    is_bad = any("error" in each or each["findings"] for each in found)
    return ExitCode.FINDINGS if is_bad else ExitCode.OK


def _images(path: Path) -> list[Path]:
    """Return the images that a path means."""
    if not path.is_dir():
        return [path]
    from sealfs.mount.control import find_mount

    there = find_mount(path)
    if there is not None and there.status["mountpoint"] == os.path.realpath(path):
        path = Path(there.status["source"])
    return survey.sealed_files(path)


def _checked(
    settings: Settings, place: Place, *, data: bool, rate: int | None
) -> tuple[list[Finding], int]:
    """Return what is wrong with an image, and the size of its disk."""
    pace = Pace(rate)
    with settings.keys() as keys:
        while True:
            try:
                return _checked_offline(settings, place, keys, data, pace)
            except Busy:
                if place.mount is None:
                    raise
                try:
                    return _checked_live(place, place.mount, data, pace)
                except NotFound:
                    continue  # the VM has ended meanwhile


def _checked_offline(
    settings: Settings, place: Place, keys: KeyService, data: bool, pace: Pace
) -> tuple[list[Finding], int]:
    with sealed.opened(settings, place, keys) as image:

        def part(start: int) -> Part:
            found: Part = run(image.check_part_steps(start, GROUPS_AT_ONCE, data=data))
            return found

        total = int(image.status()["slots_used"])
        return _collect(place, part, total * image.slot_size, pace), image.size


def _checked_live(
    place: Place, mount: RunningMount, data: bool, pace: Pace
) -> tuple[list[Finding], int]:
    path = os.path.realpath(place.sealed)

    def part(start: int) -> Part:
        answer = mount.call("check", path=path, start=start, data=data)
        findings = [Finding(*each) for each in answer["findings"]]
        return Part(findings, answer["checked"], answer["next"])

    found = survey.live_status(mount, path)
    if found is None:
        raise NotFound(path, "is not in use any more")
    size = int(found["size"])
    return _collect(place, part, int(found["slots_used"]) * int(found["slot_size"]), pace), size


def _collect(place: Place, part: Callable[[int], Part], total: int, pace: Pace) -> list[Finding]:
    """Drive a check from its first part to its last."""
    findings: list[Finding] = []
    start: int | None = 0
    with progress(f"checking {place.sealed.name}", total) as advance:
        while start is not None:
            done = part(start)
            findings += done.findings
            start = done.next_group
            advance(done.size)
            pace.after(done.size)
    return findings


def _salvaged(settings: Settings, place: Place, dest: Path) -> tuple[list[Finding], int]:
    """Write what verifies to a new raw disk; return what does not, and the size."""
    with settings.keys() as keys, sealed.opened(settings, place, keys) as image:
        settings.situation.destination = dest
        findings: list[Finding] = []
        with Newborn(dest, replace=False) as newborn:
            with (
                plain.open_target(newborn.temporary, "raw", image.size, shown_as=dest) as target,
                progress(f"writing {dest.name}", image.size) as advance,
            ):
                at = 0
                while at < image.size:
                    end = _save_group(image, at, target, findings)
                    advance(end - at)
                    at = end
            newborn.name()
        return findings, image.size


def _save_group(image: SealedImage, at: int, target: plain.Target, findings: list[Finding]) -> int:
    """Save the next group with data from `at` on; return where to go on."""
    try:
        start = image.seek(at, os.SEEK_DATA)
    except BlockDamaged as damaged:
        start = max(at, damaged.block * BLOCK_SIZE)
    if start is None:
        return image.size
    for lost in image.lost_ranges:
        if lost.offset <= start < lost.offset + lost.size:
            findings.append(lost)
            return min(lost.offset + lost.size, image.size)
    size = image.group_size
    end = min(start // size * size + size, image.size)
    try:
        _save(image, start, end, target)
    except (BlockDamaged, StorageFailed):
        for each in range(start // BLOCK_SIZE * BLOCK_SIZE, end, BLOCK_SIZE):
            try:
                _save(image, each, min(each + BLOCK_SIZE, end), target)
            except (BlockDamaged, StorageFailed) as bad:
                _add(findings, each // BLOCK_SIZE, bad.detail)
    return end


def _save(image: SealedImage, start: int, end: int, target: plain.Target) -> None:
    content = memoryview(image.read(start, end - start))
    for offset, length in plain.data_runs(content):
        target.write(start + offset, content[offset : offset + length])


def _add(findings: list[Finding], block: int, detail: str) -> None:
    cause = "is lost: it does not verify"
    last = findings[-1] if findings else None
    if last and last.cause == cause and last.first_block + last.block_count == block:
        findings[-1] = Finding(last.first_block, last.block_count + 1, cause)
    else:
        findings.append(Finding(block, 1, cause))


def _print(image: Path, findings: list[Finding]) -> None:
    for finding in findings:
        print(_text(finding))
    if findings:
        blocks = sum(finding.block_count for finding in findings)
        where = "1 place" if len(findings) == 1 else f"{len(findings)} places"
        print(f"{printable(str(image))}: {blocks} bad blocks in {where}")


def _text(finding: Finding) -> str:
    last = finding.first_block + finding.block_count - 1
    blocks = f"block {last}" if finding.block_count == 1 else f"blocks {finding.first_block}-{last}"
    end = finding.offset + finding.size - 1
    return f"{blocks}, bytes {finding.offset}-{end} of the disk: {finding.cause}"


def _json(place: Place, findings: list[Finding], size: int, data: bool) -> dict[str, Any]:
    return {
        "path": str(place.sealed),
        "data": data,
        "size": size,
        "findings": [
            {
                "first_block": finding.first_block,
                "block_count": finding.block_count,
                "offset": finding.offset,
                "size": finding.size,
                "cause": finding.cause,
            }
            for finding in findings
        ],
    }
