"""`bench`: what encryption costs on the user's own storage.

Everything it makes lies in one directory below the user's: a plain file, a throw-away host with an
embedded software TPM, a sealed image, its mount. It goes again in every case but kill -9.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from sealfs.cli import load
from sealfs.cli.arguments import SIZE
from sealfs.cli.errors import warn
from sealfs.cli.interrupts import shielded
from sealfs.cli.load import WORKLOADS, Rate, Workload
from sealfs.cli.newkey import NewKey
from sealfs.cli.output import passing, print_json, print_table, size_text
from sealfs.cli.sealed import SUFFIX
from sealfs.cli.sealing import NewImage, make
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import NoSpace, NotFound, SealfsError, StorageFailed, UsageError
from sealfs.keys.protection import Protection
from sealfs.keys.service import KeyService
from sealfs.mount import control, kernel, session

PREFIX = ".sealfs-bench-"
SIZE_DEFAULT = 512 << 20
SIZE_MIN = 16 << 20  # four of the largest requests in the smallest cache, four times
SECONDS_DEFAULT = 20.0
CACHE_MIN = 4 << 20
DIRTY_MAX = 64 << 20  # what a mount has by default
MOUNT_WAIT = 60.0  # seconds

NOT_MEASURED = (
    "the hypervisor and the guest's own caches: both columns are what a VM gets at most",
    "several VMs at once: a mount serves them all by one thread",
    "a hardware TPM: it is asked when an image is opened, not when it is read or written",
    "longer than seconds: storage that slows down when its own cache is full",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One workload on both sides."""

    workload: Workload
    plain: Rate
    sealed: Rate

    @property
    def ratio(self) -> float:
        """Sealed to plain, more is better."""
        return self.sealed.bytes / self.plain.bytes


@dataclass(frozen=True, slots=True)
class Place:
    """What is measured: both files, and what lies behind the sealed one."""

    plain: Path
    sealed: Path
    behind: Path


@click.command("bench")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=SECONDS_DEFAULT,
              show_default=True, help="For all workloads on both files together.")  # fmt: skip
@click.option("--size", type=SIZE, default=SIZE_DEFAULT, metavar="SIZE",
              help="Of each of the two files; the default is 512M.")  # fmt: skip
@common_options
def bench_command(settings: Settings, directory: Path, seconds: float, size: int) -> None:
    """Measure what encryption costs on the storage of DIR.

    A plain file and a sealed image are made in DIR, written and read in turns, and removed again.
    Needs no host that was set up, and touches none: its keys are of a TPM that ends with it.
    """
    settings.about(directory)
    settings.situation.destination = directory / PREFIX  # where space is short, if it is
    size -= size % load.CHUNK
    _check(directory, size)
    with _made(directory, size) as place:
        measured, pairs = _measure(place, size, seconds)
        notes = _notes(place, size, measured)
    if settings.json:
        print_json(_document(directory, measured, pairs, notes))
        return
    print_table(("", "PLAIN", "SEALED", "SEALED/PLAIN"), [_row(pair) for pair in pairs])
    print()
    for note in notes:
        print(note)
    for text in NOT_MEASURED:
        print(f"not measured: {text}")


def _check(directory: Path, size: int) -> None:
    """Refuse what cannot be measured, before anything is made."""
    if not directory.exists():
        raise NotFound(directory, "no such directory")
    if not directory.is_dir():
        raise UsageError(directory, "is not a directory")
    if size < SIZE_MIN:
        raise UsageError("--size", f"at least {SIZE_MIN >> 20}M: less would be measured in memory")
    here = os.path.realpath(directory)
    there = control.find_mount(directory)
    if there is not None and f"{here}/".startswith(f"{there.status['mountpoint']}/"):
        source = there.status["source"]
        raise UsageError(
            directory, f'is under a mount of sealfs; the sealed files are in "{source}"'
        )
    for left in sorted(directory.glob(f"{PREFIX}*")):
        warn(f'"{left}": belongs to a run that goes on, or was killed')
    needed = size + size // 8 * 9 + (64 << 20)  # plain, sealed with its journal, TPM and logs
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise NoSpace(
            directory,
            f"{size_text(needed)} are needed for a while, {size_text(free)} are free; "
            "--size makes it less",
        )


@contextlib.contextmanager
def _made(directory: Path, size: int) -> Iterator[Place]:
    """Make everything, lend it, and remove it."""
    with shielded():
        top = Path(tempfile.mkdtemp(prefix=PREFIX, dir=directory)).resolve()
    try:
        images, mountpoint = top / "images", top / "mount"
        for made in (images, mountpoint):
            made.mkdir()
        with open(top / "plain", "xb") as plain:
            plain.truncate(size)
        passing("setting up a host to throw away")
        state = top / "state"
        KeyService.initialise(state, tpm="swtpm", recovery_to=None, no_recovery=True)
        behind = images / f"disk{SUFFIX}"
        with Settings(state=state).keys() as keys:
            key = NewKey("vm-id", Protection(), "mixed", None, "tpm")
            wanted = NewImage(path=behind, size=size, vm_id="bench", label="", key=key)
            make(keys, state, wanted, None)
        with _mounted(state, images, mountpoint, size, top / "log"):
            yield Place(top / "plain", mountpoint / "disk", behind)
    finally:
        passing("")
        shutil.rmtree(top)


def _cache_size(size: int) -> int:
    """Return a cache that is to the disk as a real one is: most of it does not fit in."""
    return max(CACHE_MIN, size // 16)


@contextlib.contextmanager
def _mounted(state: Path, images: Path, mountpoint: Path, size: int, log: Path) -> Iterator[None]:
    """Serve the image by a daemon of its own; unmounted and gone afterwards."""
    dirty = min(DIRTY_MAX, max(CACHE_MIN, size // 8))
    command = [
        sys.executable, "-m", "sealfs.cli.main", "--state", str(state), "mount",
        "-o", f"cache={_cache_size(size)},dirty={dirty}", "--log", str(log),
        str(images), str(mountpoint),
    ]  # fmt: skip
    environment = {name: v for name, v in os.environ.items() if not name.startswith("SEALFS_")}
    try:
        with shielded():
            done = subprocess.run(
                command,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=MOUNT_WAIT,
                start_new_session=True,
            )
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise StorageFailed(mountpoint, said[0].removeprefix("sealfs: error: "))
        yield
    finally:
        with shielded():
            _unmount(mountpoint)


def _unmount(mountpoint: Path) -> None:
    """Unmount by all means: what is below goes next."""
    there = kernel.mounted_at(str(mountpoint))
    if there is None:
        return
    daemon = control.mount_of_device(there.minor)
    try:
        session.unmount(mountpoint)
    except SealfsError:
        # Nothing in it is wanted any more.
        if daemon is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(daemon.status["pid"]), signal.SIGKILL)
        if kernel.mounted_at(str(mountpoint)) is not None:
            kernel.unmount(mountpoint, lazy=True)


def _measure(place: Place, size: int, seconds: float) -> tuple[int, list[Pair]]:
    """Put every workload on both files in turns; return the size that was used, and what came.

    What the first workload does not get written in its time is left out by the others.
    """
    pairs: list[Pair] = []
    share = seconds / (2 * len(WORKLOADS))
    for workload in WORKLOADS:
        rates = []
        for path, what in ((place.plain, "plain"), (place.sealed, "sealed")):
            passing(f"{workload.title}: {what}")
            if not workload.is_write:
                load.forget_pages(place.plain)
                load.forget_pages(place.behind)
            direct = load.takes_direct(path)
            rates.append(load.measure(path, workload, size=size, seconds=share, direct=direct))
        pairs.append(Pair(workload, *rates))
        if workload.fills:
            written = min(rate.size for rate in rates)
            size = max(load.CHUNK, written - written % load.CHUNK)
    return size, pairs


def _notes(place: Place, size: int, measured: int) -> list[str]:
    """Say how it was measured."""
    notes = []
    if load.fio_program() is None:
        notes.append(
            f"by a loop, one request at a time: with fio installed, {load.DEPTH} at a time"
        )
    else:
        notes.append(f"by fio; random: {load.DEPTH} requests at a time, one where each is flushed")
    if measured < size:
        notes.append(
            f"on {size_text(measured)} of {size_text(size)}: no more was written in the time; "
            "--seconds gives it more"
        )
    else:
        notes.append(f"on files of {size_text(size)}")
    if not load.takes_direct(place.plain):
        notes.append("the plain file takes no direct I/O here: it was measured through memory")
    notes.append(f"one run each; a flush at the end counted; cache={size_text(_cache_size(size))}")
    return notes


def _text(rate: Rate, workload: Workload) -> str:
    if workload.counts_bytes:
        return f"{rate.bytes / 1e6:,.0f} MB/s"
    return f"{rate.operations:,.0f}/s"


def _row(pair: Pair) -> tuple[str, str, str, str]:
    return (
        pair.workload.title,
        _text(pair.plain, pair.workload),
        _text(pair.sealed, pair.workload),
        f"{pair.ratio:.2f}",
    )


def _document(
    directory: Path, measured: int, pairs: list[Pair], notes: list[str]
) -> Mapping[str, object]:
    return {
        "path": str(directory),
        "size": measured,
        "workloads": [
            {
                "title": pair.workload.title,
                "unit": "bytes/s" if pair.workload.counts_bytes else "operations/s",
                **{
                    name: round(rate.bytes if pair.workload.counts_bytes else rate.operations, 1)
                    for name, rate in (("plain", pair.plain), ("sealed", pair.sealed))
                },
                "ratio": round(pair.ratio, 3),
            }
            for pair in pairs
        ],
        "notes": notes,
        "not_measured": list(NOT_MEASURED),
    }
