"""`doctor` on the system: versions, FUSE, limits of ordinary users, tools, log, swap, dumps."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import sealfs
from sealfs.cli.health import FAIL, NOTE, OK, WARN, Check, Health
from sealfs.cli.settings import Settings

FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIGURATION = Path("/etc/fuse.conf")
SYSLOG = "/dev/log"
SWAPS = Path("/proc/swaps")
BLOCK_DEVICES = Path("/sys/class/block")
MAPS = Path("/proc/self/maps")
WMEM_MAX = Path("/proc/sys/net/core/wmem_max")
WMEM_WANTED = 4 << 20
"""What a mount by root takes (mount/relay.py)."""
PACKAGES = ("pyfuse3", "trio", "cryptography", "tpm2-pytss")
PARTS = (
    ("sealfs.mount.session", "mount"),
    ("sealfs.keys.tpm", "TPM"),
    ("sealfs.image.image", "images"),
)
"""Modules whose import shows that the libraries beneath are there."""


def as_root(settings: Settings, command: str) -> str:
    """Return a command that only root may run, as this user runs it."""
    return command if settings.situation.is_root else f"sudo {command}"


def versions(settings: Settings) -> Iterator[Health]:
    """Tell what runs here, for a report; load it, which may fail."""
    broken = []
    for module, what in PARTS:
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:
            broken.append(Health(FAIL, "libraries", f"{what}: {error}", "tools/setup"))
    found = [f"sealfs {sealfs.__version__}", f"Python {platform.python_version()}"]
    found.append(f"Linux {platform.release()}")
    library = re.search(r"/libfuse3[^/\s]*\.so\.(\d+\.\d+\.\d+)", MAPS.read_text(errors="replace"))
    if library:
        found.append(f"libfuse {library[1]}")
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Health(OK, "versions", ", ".join(found))
    yield from broken


def fuse(settings: Settings) -> Iterator[Health]:
    """Whether FUSE can be used."""
    if not FUSE_DEVICE.exists():
        yield Health(FAIL, "fuse", f"there is no {FUSE_DEVICE}", as_root(settings, "modprobe fuse"))
    elif not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        mend = as_root(settings, f"chmod 666 {FUSE_DEVICE}")
        yield Health(FAIL, "fuse", f"{FUSE_DEVICE} may not be opened", mend)
    else:
        yield Health(OK, "fuse", f"{FUSE_DEVICE} can be opened")


def fusermount(settings: Settings) -> Iterator[Health]:
    """What mounts by ordinary users need."""
    is_root = settings.situation.is_root
    bad = NOTE if is_root else FAIL
    subject = "user mounts"
    program = shutil.which("fusermount3")
    if program is None:
        yield Health(bad, subject, "fusermount3 is not installed",
                     as_root(settings, "apt install fuse3"))  # fmt: skip
        return
    status = os.stat(program)
    if not status.st_mode & stat.S_ISUID or status.st_uid != 0:
        yield Health(bad, subject, f"{program} is not setuid root",
                     as_root(settings, "apt install --reinstall fuse3"))  # fmt: skip
        return
    yield Health(OK, subject, f"{program} is setuid root")
    try:
        configured = FUSE_CONFIGURATION.read_text(errors="replace")
        is_allowed = re.search(r"^\s*user_allow_other\b", configured, re.M)
    except OSError:
        is_allowed = None
    if not is_allowed:
        yield Health(
            NOTE if is_root else WARN,
            subject,
            "cannot let other users, libvirt's QEMU say, in: no user_allow_other in "
            f"{FUSE_CONFIGURATION}",
            f"echo user_allow_other | {as_root(settings, f'tee -a {FUSE_CONFIGURATION}')}",
        )
    try:
        size = int(WMEM_MAX.read_text())
    except (OSError, ValueError):
        return
    if size < WMEM_WANTED:
        yield Health(
            NOTE,
            subject,
            f"have {size >> 10} KiB of socket buffer (net.core.wmem_max), a mount by root "
            f"{WMEM_WANTED >> 10}: fewer requests at once where the lane does not serve",
            as_root(settings, f"sysctl net.core.wmem_max={WMEM_WANTED}"),
        )


def qemu(settings: Settings) -> Iterator[Health]:
    """Whether other formats than raw can be read and written."""
    for tool in ("qemu-img", "qemu-nbd"):
        if shutil.which(tool) is None:
            yield Health(WARN, tool, "is not installed: no import or export but of raw disks",
                         as_root(settings, "apt install qemu-utils"))  # fmt: skip
            return
    done = subprocess.run(
        ["qemu-img", "--version"], capture_output=True, text=True, errors="replace", check=False
    )
    version = re.search(r"version ([\w.]+)", done.stdout)
    if version is None:
        yield Health(WARN, "qemu-img", "does not tell its version: it may not run")
    else:
        yield Health(OK, "qemu", f"qemu-img and qemu-nbd {version[1]}")


def log(settings: Settings) -> Iterator[Health]:
    """Where a mount's log goes."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream:
            stream.connect(SYSLOG)
    except OSError:
        from sealfs.control import run_directory  # loads the event loop

        place = run_directory() / "mount.log"
        yield Health(
            NOTE, "log", f"nobody listens on {SYSLOG}: mounts log to {place}, or by --log FILE"
        )
    else:
        yield Health(OK, "log", "mounts log to syslog (daemon)")


def swap(settings: Settings) -> Iterator[Health]:
    """Whether memory, plaintext and keys in it, may be written to a disk in clear."""
    try:
        lines = SWAPS.read_text(errors="surrogateescape").splitlines()[1:]
    except OSError:
        return
    names = [line.split()[0] for line in lines]
    in_clear = [name for name in names if not _is_sealed_swap(Path(name))]
    if in_clear:
        yield Health(
            WARN,
            "swap",
            f"{', '.join(in_clear)} may take keys and plaintext in clear; encrypt it, or",
            as_root(settings, f"swapoff {' '.join(in_clear)}"),
        )
    else:
        yield Health(OK, "swap", "none that keeps anything in clear on a disk")


def _is_sealed_swap(path: Path) -> bool:
    """Whether what is swapped to this device stays in memory or is encrypted by dm-crypt."""
    name = Path(os.path.realpath(path)).name
    if name.startswith("zram"):
        # With a backing device it writes what is idle to a disk.
        backing = BLOCK_DEVICES / name / "backing_dev"
        return not backing.exists() or backing.read_text().strip() == "none"
    try:
        return (BLOCK_DEVICES / name / "dm" / "uuid").read_text().startswith("CRYPT-")
    except OSError:
        return False


CHECKS: tuple[Check, ...] = (versions, fuse, fusermount, qemu, log, swap)
