"""The system calls around a mount: mount(2), fusermount3, umount, what /proc and /sys tell of it.

Everything here blocks; a daemon calls it before its event loop runs or in a worker thread. Knows
nothing of images.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import os
import re
import socket
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path

from sealfs.errors import Busy, NotFound, StorageFailed, UsageError
from sealfs.mount.options import MountOptions

FSTYPE = "fuse.sealfs"
READ_AHEAD_KB = 2048  # two FUSE requests of the largest size; the default is 128

# <sys/mount.h>
_MS_RDONLY = 1
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_NOEXEC = 8
_MS_NOATIME = 1024
_MNT_DETACH = 2
_HOLDERS_MAX = 20  # processes named in a message

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGE = 4 << 20  # bytes; the buffers of requests are smaller, and stay in the heap

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = [ctypes.c_char_p] * 3 + [ctypes.c_ulong, ctypes.c_char_p]
_libc.umount2.argtypes = [ctypes.c_char_p, ctypes.c_int]


@dataclass(frozen=True, slots=True)
class Mounted:
    """One line of /proc/self/mountinfo."""

    mountpoint: str
    major: int
    minor: int
    fstype: str
    source: str


def mounts(process: Path = Path("/proc/self")) -> list[Mounted]:
    """Return all mounts of a process' mount namespace, the newest last."""
    found = []
    # Paths may hold any byte; lines end at a newline only.
    for line in os.fsdecode((process / "mountinfo").read_bytes()).rstrip("\n").split("\n"):
        left, _, right = line.partition(" - ")
        fields, rest = left.split(" "), right.split(" ")
        major, _, minor = fields[2].partition(":")
        found.append(
            Mounted(_unescape(fields[4]), int(major), int(minor), rest[0], _unescape(rest[1]))
        )
    return found


def mounted_at(mountpoint: str) -> Mounted | None:
    """Return the mount on top at exactly this path; asks no file system anything."""
    return next((m for m in reversed(mounts()) if m.mountpoint == mountpoint), None)


def places_of(mounted: Mounted, process: Path = Path("/proc/self")) -> list[str]:
    """Return where this mount is now, the newest first: its directory may have been renamed."""
    same = (mounted.major, mounted.minor, mounted.fstype)
    found = [m.mountpoint for m in mounts(process) if (m.major, m.minor, m.fstype) == same]
    return found[::-1]


def keepers(mounted: Mounted) -> list[str]:
    """Return "name (pid)" of a process in each other mount namespace that has this mount too.

    Such a namespace began with a copy of everything that was mounted; unless its mounts follow
    those of the host, what is unmounted here stays there, and is served until the last one goes.
    """
    seen = {os.readlink("/proc/self/ns/mnt")}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone, or not ours to look at
            namespace = os.readlink(process / "ns/mnt")
            if namespace not in seen and places_of(mounted, process):
                found.append(f"{_name_of(process)} ({process.name})")
            seen.add(namespace)
    return found[:_HOLDERS_MAX]


def check_mountpoint(mountpoint: Path) -> None:
    """Refuse a mount point that is dead, in use by sealfs, missing or no directory.

    Raises:
        Busy, NotFound, UsageError: with the reason.
    """
    try:
        mode = mountpoint.stat().st_mode
        # The kernel may remember the attributes of a dead mount; statfs always asks.
        os.statvfs(mountpoint)
    except FileNotFoundError:
        raise NotFound(mountpoint, "no such mount point") from None
    except OSError as exc:
        if exc.errno == errno.ENOTCONN:
            raise Busy(
                mountpoint,
                "is a dead mount: its daemon ended without unmounting; "
                f"'umount -l {mountpoint}' frees it",
            ) from exc
        raise StorageFailed(mountpoint, f"cannot be used: {exc.strerror}") from exc
    if not stat.S_ISDIR(mode):
        raise UsageError(mountpoint, "is not a directory")
    there = mounted_at(os.path.realpath(mountpoint))
    if there is not None and there.fstype == FSTYPE:
        raise Busy(mountpoint, f'is already mounted by sealfs, from "{there.source}"')


def mount(source: Path, mountpoint: Path, options: MountOptions) -> int:
    """Mount, as root by the system call, else by fusermount3; return the descriptor.

    Raises:
        StorageFailed: no /dev/fuse, or the kernel or fusermount3 refused.
    """
    if os.geteuid() == 0:
        return _mount_as_root(source, mountpoint, options)
    return mount_by_helper(source, mountpoint, options)


def _mount_as_root(source: Path, mountpoint: Path, options: MountOptions) -> int:
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise StorageFailed("/dev/fuse", f"cannot be opened: {exc.strerror}") from exc
    data = [
        f"fd={fd}",
        f"rootmode={stat.S_IFMT(mountpoint.stat().st_mode):o}",
        f"user_id={os.geteuid()}",
        f"group_id={os.getegid()}",
        *_kernel_options(options),
        *options.labels,
    ]
    flags = _MS_NOSUID | _MS_NODEV
    flags |= _MS_RDONLY if options.read_only else 0
    flags |= _MS_NOEXEC if options.noexec else 0
    flags |= _MS_NOATIME if options.noatime else 0
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(mountpoint),
        FSTYPE.encode(),
        flags,
        os.fsencode(",".join(data)),
    )
    if result != 0:
        code = ctypes.get_errno()
        os.close(fd)
        because = ""
        if code == errno.EINVAL and options.labels:
            because = f"; {', '.join(options.labels)} is for a kernel with SELinux on"
        raise StorageFailed(mountpoint, f"mount failed: {os.strerror(code)}{because}")
    return fd


def mount_by_helper(source: Path, mountpoint: Path, options: MountOptions) -> int:
    """Mount by fusermount3, which hands the descriptor back over a socket (_FUSE_COMMFD)."""
    if options.labels:
        raise UsageError(", ".join(options.labels), "is for root: fusermount3 passes no labels on")
    name = str(source).replace("\\", r"\\").replace(",", r"\,")
    wanted = [
        *_kernel_options(options),
        f"fsname={name}",
        "subtype=sealfs",
        "nosuid",
        "nodev",
        *(["ro"] if options.read_only else []),
        *(["noexec"] if options.noexec else []),
        *(["noatime"] if options.noatime else []),
    ]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(wanted), "--", str(mountpoint)],
                env={**os.environ, "LC_ALL": "C", "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            raise StorageFailed("fusermount3", "is not installed (package fuse3)") from None
        if done.returncode != 0:
            reason = done.stderr.strip().removeprefix("fusermount3: ")
            if "user_allow_other" in reason:
                raise UsageError(mountpoint, f"fusermount3 refused: {reason}")
            raise StorageFailed(mountpoint, f"fusermount3 failed: {reason}")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4))
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not fds:
            raise StorageFailed(mountpoint, "fusermount3 handed no descriptor over")
    os.set_inheritable(fds[0], False)
    os.set_blocking(fds[0], False)
    return fds[0]


def _kernel_options(options: MountOptions) -> list[str]:
    chosen = {
        "allow_other": options.allow_other,
        "default_permissions": options.default_permissions,
    }
    return [name for name, is_on in chosen.items() if is_on]


def give_back_memory() -> None:
    """Have the allocator give large buffers back to the system when they are freed.

    By default glibc keeps what was freed for the thread that had it, also the 16 MiB of a journal
    that each worker reads once. A C library without mallopt is left as it is.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE)


def raise_read_ahead(mountpoint: Path) -> None:
    """Let buffered readers send large requests; only root may, others keep the default."""
    there = mounted_at(str(mountpoint))
    if there is not None:
        knob = Path(f"/sys/class/bdi/{there.major}:{there.minor}/read_ahead_kb")
        with contextlib.suppress(OSError):
            knob.write_text(str(READ_AHEAD_KB))


def unmount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount; with `lazy` even while files are open.

    Raises:
        Busy: files are open; names what holds them.
        NotFound: nothing is mounted there.
        StorageFailed: refused for another reason.
    """
    if os.geteuid() == 0:
        if _libc.umount2(os.fsencode(mountpoint), _MNT_DETACH if lazy else 0) == 0:
            return
        code = ctypes.get_errno()
        detail = os.strerror(code)
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mountpoint)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"}
        )
        if done.returncode == 0:
            return
        detail = done.stderr.strip()
        code = errno.EBUSY if "busy" in detail.lower() else errno.EPERM
        if mounted_at(str(mountpoint)) is None:
            code = errno.EINVAL
        elif code == errno.EPERM:
            raise UsageError(mountpoint, f"is not yours to unmount: {detail}")
    if code == errno.EBUSY:
        below = _used_by_kernel(str(mountpoint))
        if below:
            raise Busy(mountpoint, f"is in use by {', '.join(below)}; detach it first")
        held = holders(str(mountpoint))
        by = f" by {', '.join(held)}" if held else ""
        raise Busy(mountpoint, f"files are open{by}; stop the virtual machines first")
    if code in (errno.EINVAL, errno.ENOENT):
        raise NotFound(mountpoint, "nothing is mounted there")
    raise StorageFailed(mountpoint, f"umount failed: {detail}")


def holders(mountpoint: str) -> list[str]:
    """Return "name (pid)" of processes with files, maps or directories under the mount point."""
    prefix = mountpoint.rstrip("/") + "/"
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if _is_holder(process, mountpoint, prefix):
                found.append(f"{_name_of(process)} ({process.name})")
        except OSError:
            continue  # gone, or not ours to look at
        if len(found) >= _HOLDERS_MAX:
            break
    return found


def _name_of(process: Path) -> str:
    return (process / "comm").read_text(errors="replace").strip()


def _is_holder(process: Path, mountpoint: str, prefix: str) -> bool:
    links = [process / "cwd", process / "root", *(process / "fd").iterdir()]
    for link in links:
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target == mountpoint or target.startswith(prefix):
                return True
    return os.fsencode(prefix) in (process / "maps").read_bytes()


def _used_by_kernel(mountpoint: str) -> list[str]:
    """Return the mounts below a mount point and the loop devices on its files."""
    prefix = mountpoint.rstrip("/") + "/"
    found = [
        f'the mount "{there.mountpoint}"'
        for there in mounts()
        if there.mountpoint.startswith(prefix)
    ]
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if os.fsdecode(backing.read_bytes()).startswith(prefix):
                found.append(f"/dev/{backing.parent.parent.name}")
    return found[:_HOLDERS_MAX]


def _unescape(text: str) -> str:
    """Undo the octal escapes of /proc/self/mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
