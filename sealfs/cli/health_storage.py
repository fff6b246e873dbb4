"""`doctor` on the storage: file systems beneath images and state, their room, running mounts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from sealfs.cli import survey
from sealfs.cli.errors import quoted
from sealfs.cli.health import FAIL, NOTE, OK, WARN, Check, Health, answered
from sealfs.cli.output import size_text
from sealfs.cli.sealed import Place
from sealfs.cli.settings import Settings
from sealfs.errors import SealfsError
from sealfs.mount.unshown import unshown_files

STATE_ROOM_MIN = 16 << 20  # a record takes 4 KiB, the software TPM some MiB
NAMED_MAX = 5
FILES_MAX = 1000

OURS = frozenset(("ext4", "xfs"))
_COW = "it copies on write: a VM may meet a full disk in room that was promised to it"
_NET = (
    "locks and syncs are the server's: two hosts may get at one image, and what was flushed is "
    "as safe as the server keeps it"
)
WEAKER = {
    "btrfs": _COW,
    "zfs": _COW,
    "bcachefs": _COW,
    "nfs": _NET,
    "nfs4": f"{_NET}; version 4.2 is needed for holes",
    "ceph": _NET,
    "cifs": _NET,
    "smb3": _NET,
    "9p": _NET,
    "virtiofs": _NET,
    "tmpfs": "nothing of it outlives a reboot",
    "overlay": "it may copy a whole image at its first write",
    "vfat": "it has no holes: an image takes its full size at once",
    "exfat": "it has no holes: an image takes its full size at once",
}
"""File system -> what is weaker there."""


@dataclass(slots=True)
class _Device:
    """One file system that holds sealed images."""

    directories: list[str] = field(default_factory=list)
    count: int = 0
    growth: int = 0


def storage(settings: Settings) -> Iterator[Health]:
    """File systems and room of every directory that holds images, and of the state directory."""
    try:
        with settings.keys() as keys:
            paths = [entry.path for entry in keys.registry.entries()]
    except SealfsError:
        paths = []  # said before
    devices: dict[int, _Device] = {}
    for path in paths:
        directory = os.path.dirname(path)
        try:
            status = answered(partial(os.stat, directory))
        except OSError:
            continue
        if status is None:
            yield Health(FAIL, "storage", f"{directory} does not answer")
            return
        device = devices.setdefault(status.st_dev, _Device())
        if directory not in device.directories:
            device.directories.append(directory)
        device.count += 1
        device.growth += _growth(Path(path))
    for number, device in devices.items():
        yield from _kind(device.directories[0], number)
        yield _room(device)
    yield from _state_room(settings)


def _growth(path: Path) -> int:
    """Return the bytes that an image may still take."""
    try:
        facts = survey.look(Place(path), None)
    except OSError:
        return 0
    return max((facts.full_size or 0) - (facts.allocated or 0), 0)


def _kind(directory: str, device: int) -> Iterator[Health]:
    kind = _file_system_of(device)
    if kind in OURS:
        yield Health(OK, "storage", f"{directory} is on {kind}")
    elif kind.startswith("fuse") and kind != "fuseblk":
        yield Health(
            FAIL,
            "storage",
            f"{directory} is on another FUSE file system ({kind}): nothing is promised there",
            "move the images to ext4 or xfs",
        )
    else:
        weaker = WEAKER.get(kind, "sealfs is made for ext4 and xfs, and was never tried here")
        yield Health(WARN, "storage", f"{directory} is on {kind}: {weaker}")


def _file_system_of(device: int) -> str:
    from sealfs.mount.kernel import mounts

    wanted = os.major(device), os.minor(device)
    for there in reversed(mounts()):
        if (there.major, there.minor) == wanted:
            return there.fstype
    # Subvolumes have device numbers of their own that no mount tells.
    return "btrfs or another file system of subvolumes"


def _room(device: _Device) -> Health:
    place = device.directories[0]
    others = len(device.directories) - 1
    where = place + (f" and {others} more directories" if others else "")
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    text = f"{where}: {size_text(free)} free; {device.count} images may grow by "
    text += size_text(device.growth)
    if free < device.growth:
        return Health(
            WARN, "room", f"{text}: VMs would meet a full disk", f"df -h {quoted(Path(place))}"
        )
    return Health(OK, "room", text)


def _state_room(settings: Settings) -> Iterator[Health]:
    try:
        room = os.statvfs(settings.state)
    except OSError:
        return
    free = room.f_bavail * room.f_frsize
    if free < STATE_ROOM_MIN or not room.f_favail:
        yield Health(
            WARN,
            "room",
            f"{settings.state}: {size_text(free)} free; a new key or disk may not be recorded",
            f"df -h {quoted(settings.state)}",
        )


def mounts(settings: Settings) -> Iterator[Health]:
    """Whether every mount has a daemon that answers, and what in its source is not sealed."""
    from sealfs.mount.control import find_mount
    from sealfs.mount.kernel import FSTYPE
    from sealfs.mount.kernel import mounts as all_mounts

    is_root = settings.situation.is_root
    free = "umount -l" if is_root else "fusermount3 -uz"
    for there in all_mounts():
        if there.fstype != FSTYPE:
            continue
        place = there.mountpoint
        try:
            if answered(partial(os.statvfs, place)) is None:
                yield Health(FAIL, "mount", f"{place} hangs: its daemon does not answer",
                             f"{free} {quoted(Path(place))}")  # fmt: skip
                continue
        except PermissionError:
            yield Health(NOTE, "mount", f"{place} is another user's and was not looked at")
            continue
        except OSError:
            yield Health(FAIL, "mount", f"{place} is dead: its daemon is gone",
                         f"{free} {quoted(Path(place))}")  # fmt: skip
            continue
        try:
            found = answered(partial(find_mount, Path(place)))
        except OSError:
            found = None
        if found is None:
            level = WARN if is_root else NOTE
            yield Health(level, "mount", f"{place} does not answer on its socket")
        else:
            yield Health(OK, "mount", f"{place} serves {there.source}")
        yield from _unsealed(Path(there.source))


def _unsealed(source: Path) -> Iterator[Health]:
    plain, unnamed = unshown_files(source, FILES_MAX)
    is_all = len(plain) + len(unnamed) < FILES_MAX
    count = len(plain) if is_all else f"{len(plain)} or more"
    if plain:
        yield Health(
            WARN, "not sealed", f"{count} files in {source} are in clear: {_named(plain)}",
            f"sealfs import FILE NAME.sealed, then destroy FILE, in {quoted(source)}",
        )  # fmt: skip
    if unnamed:
        yield Health(
            WARN, "not shown", f"sealed, but not named *.sealed, in {source}: {_named(unnamed)}",
        )  # fmt: skip


def _named(files: list[str]) -> str:
    return ", ".join(files[:NAMED_MAX]) + (", ..." if len(files) > NAMED_MAX else "")


CHECKS: tuple[Check, ...] = (storage, mounts)
