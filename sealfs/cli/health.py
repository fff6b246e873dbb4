"""What `doctor` looks at: one function a subject, each of which only looks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sealfs.cli.settings import Settings
from sealfs.errors import KeyServiceError, SealfsError

OK, WARN, FAIL = "ok", "warn", "fail"
FUSE_DEVICE = Path("/dev/fuse")
FUSE_CONFIGURATION = Path("/etc/fuse.conf")
SWAPS = Path("/proc/swaps")
MOUNTINFO = Path("/proc/self/mountinfo")
OUR_FILE_SYSTEMS = frozenset(("ext4", "xfs"))
KEPT_IN_MEMORY = frozenset(("zram",))


@dataclass(frozen=True, slots=True)
class Health:
    """One thing looked at. `mend` is a command or a short instruction."""

    level: str
    subject: str
    text: str
    mend: str | None = None

    def to_json(self) -> dict[str, object]:
        """Return everything."""
        return {name: getattr(self, name) for name in self.__slots__}


def examine(settings: Settings) -> list[Health]:
    """Look at everything, in the order in which a first hour needs it."""
    checks: tuple[Callable[[Settings], Iterator[Health]], ...] = (
        _fuse,
        _fusermount,
        _qemu,
        _state_and_tpm,
        _storage,
        _mounts,
        _swap,
    )
    return [finding for check in checks for finding in check(settings)]


def _fuse(settings: Settings) -> Iterator[Health]:
    if not FUSE_DEVICE.exists():
        yield Health(FAIL, "fuse", f"there is no {FUSE_DEVICE}", "modprobe fuse")
    elif not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        yield Health(FAIL, "fuse", f"{FUSE_DEVICE} may not be opened", f"ls -l {FUSE_DEVICE}")
    else:
        yield Health(OK, "fuse", f"{FUSE_DEVICE} can be opened")


def _fusermount(settings: Settings) -> Iterator[Health]:
    if os.geteuid() == 0:
        return
    if shutil.which("fusermount3") is None:
        yield Health(FAIL, "fusermount3", "is not installed", "apt install fuse3")
    try:
        allowed = re.search(r"^\s*user_allow_other\b", FUSE_CONFIGURATION.read_text(), re.M)
    except OSError:
        allowed = None
    if not allowed:
        yield Health(
            WARN,
            "fusermount3",
            "other users (libvirt's) cannot be let into your mounts",
            f"add user_allow_other to {FUSE_CONFIGURATION}, or mount as root",
        )


def _qemu(settings: Settings) -> Iterator[Health]:
    for tool in ("qemu-img", "qemu-nbd"):
        if shutil.which(tool) is None:
            yield Health(WARN, tool, "is not installed: no import of qcow2, vmdk, ...",
                         "apt install qemu-utils")  # fmt: skip
            return
    done = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"version (\S+)", done.stdout)
    yield Health(OK, "qemu-img", f"version {version[1] if version else '?'}")


def _state_and_tpm(settings: Settings) -> Iterator[Health]:
    from sealfs.keys.host import Host  # slow to load, and may fail to: said here then

    try:
        host = Host.open(settings.state, tpm=settings.tpm)
    except SealfsError as error:
        yield Health(FAIL, "state", str(error), f"sealfs --state {settings.state} init")
        return
    yield Health(OK, "state", f"{settings.state}, for the TPM {host.record.tpm}")
    if host.record.tpm == "swtpm":
        yield Health(
            WARN,
            "tpm",
            "is the embedded software one: a copy of the state directory gives up every key",
            "for real protection use a hardware TPM",
        )
        if shutil.which("swtpm") is None:
            yield Health(FAIL, "tpm", "swtpm is not installed", "apt install swtpm")
    try:
        with host.tpm() as tpm:
            lockout = tpm.lockout()
    except KeyServiceError as error:
        yield Health(FAIL, "tpm", str(error))
        return
    finally:
        host.close()
    if lockout.locked:
        yield Health(FAIL, "tpm", "is locked out after too many failures",
                     f"wait; one failure is forgiven each {lockout.recovery_s} s")  # fmt: skip
    else:
        yield Health(OK, "tpm", "answers, and is the one of init")


def _storage(settings: Settings) -> Iterator[Health]:
    try:
        with settings.keys() as keys:
            entries = keys.registry.entries()
    except KeyServiceError as error:
        yield Health(FAIL, "registry", str(error))
        return
    yield Health(OK, "registry", f"{len(entries)} images")
    for directory in sorted({os.path.dirname(entry.path) for entry in entries}):
        if not os.path.isdir(directory):
            continue
        kind = _file_system_of(directory)
        if kind not in OUR_FILE_SYSTEMS:
            yield Health(
                WARN,
                "storage",
                f"{directory} is on {kind}; sealfs is made for ext4 and xfs (locks and space "
                "reservations may be weaker here)",
            )


def _file_system_of(directory: str) -> str:
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in reversed(MOUNTINFO.read_text().splitlines()):
        left, _, right = line.partition(" - ")
        if left.split(" ")[2] == wanted:
            return right.split(" ")[0]
    return "an unknown file system"


def _mounts(settings: Settings) -> Iterator[Health]:
    from sealfs.mount.control import find_mount
    from sealfs.mount.kernel import FSTYPE, mounts

    for there in mounts():
        if there.fstype != FSTYPE:
            continue
        try:
            os.stat(there.mountpoint)
        except OSError:
            yield Health(FAIL, "mount", f"{there.mountpoint} is dead: its daemon is gone",
                         f"umount -l {there.mountpoint}")  # fmt: skip
            continue
        if find_mount(Path(there.mountpoint)) is None:
            yield Health(WARN, "mount", f"{there.mountpoint} does not answer on its socket")
        else:
            yield Health(OK, "mount", f"{there.mountpoint} serves {there.source}")


def _swap(settings: Settings) -> Iterator[Health]:
    try:
        lines = SWAPS.read_text().splitlines()[1:]
    except OSError:
        return
    names = [line.split()[0] for line in lines]
    on_disk = [name for name in names if os.path.basename(name).rstrip("0123456789")
               not in KEPT_IN_MEMORY]  # fmt: skip
    if on_disk:
        yield Health(
            WARN,
            "swap",
            f"{', '.join(on_disk)} may take keys and plaintext in clear",
            "encrypt it, or swapoff -a",
        )
    else:
        yield Health(OK, "swap", "none that keeps anything in clear on a disk")
