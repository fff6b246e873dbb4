"""A real Linux guest whose root file system is the disk under test.

`build_guest_disk` makes the disk, `run_guest` boots it in QEMU, runs a shell script in it and
powers it off; `GuestProcess` is the same in steps, for tests that pull the plug. Every run proves
from the guest's own console that / is that disk, mounted read-write.

The kernel and the static busybox in `.scratch/guest` come from `tools/setup --guest`; the
guest's side is in `tests/guest`. Nothing here knows sealfs: a disk is a path to a raw image, a
plain file or one under a mount.
"""

import functools
import io
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

Cache = Literal["none", "writeback", "directsync"]

CHECKOUT = Path(__file__).resolve().parent.parent
GUEST_CACHE = CHECKOUT / ".scratch" / "guest"
GUEST_SOURCES = Path(__file__).resolve().parent / "guest"

GUEST_DISK_SIZE = 512 << 20
GUEST_MEMORY_MIB = 256
# A boot takes under 3 s in software emulation on one idle core; the rest is for busy ones.
GUEST_TIMEOUT_S = 120.0
# Working hardware virtualisation starts the kernel in under 1 s.
KVM_PROBE_TIMEOUT_S = 10.0
CONSOLE_TAIL_LINES = 40


class GuestError(AssertionError):
    """The guest did not do what every guest must; carries the end of its console."""


# The disk


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A raw disk image with a bootable root file system (ext4, no partition table)."""

    path: Path
    size: int
    marker: str  # in /etc/sealfs-marker of this disk and nowhere else


def build_guest_disk(path: Path, *, size: int = GUEST_DISK_SIZE) -> GuestDisk:
    """Create a sparse raw disk at `path`: static busybox, its documents, our init, a new marker.

    Takes some 0.1 s, so nothing is cached and each disk has its own UUID and marker. Needs no
    root and no loop device.
    """
    userland = prepared("userland")
    marker = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="sealfs-guest-disk-") as scratch:
        root = Path(scratch)
        shutil.copytree(userland, root, dirs_exist_ok=True, symlinks=True)
        for name in ("dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp"):
            (root / name).mkdir(exist_ok=True)
        for applet in busybox_applets():
            if applet != "busybox":
                (root / "bin" / applet).symlink_to("busybox")
        (root / "sbin/init").write_bytes((GUEST_SOURCES / "disk_init.sh").read_bytes())
        (root / "sbin/init").chmod(0o755)
        (root / "etc/sealfs-marker").write_text(marker + "\n")
        with path.open("xb") as image:
            image.truncate(size)
        # The 4 KiB blocks and the complete inode tables are what an installer makes of a larger
        # disk; without them the guest's kernel would fill the tables in while the test runs.
        run_tool(
            *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-N", "8192"),
            *("-E", "lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0"),
            *("-d", str(root), str(path)),
        )
    return GuestDisk(path=path, size=size, marker=marker)


def assert_ext4_clean(disk: Path) -> None:
    """Check a whole ext4 file system and change nothing.

    One that lost its machine is not clean before its journal was replayed: boot it once more.
    """
    run_tool("e2fsck", "-f", "-n", str(disk))


@functools.cache
def busybox_applets() -> tuple[str, ...]:
    return tuple(run_tool(str(prepared("userland/bin/busybox")), "--list").split())


# The guest's side


def guest_script(name: str, **variables: str | int) -> str:
    """Return the script `name` of tests/guest with the variables at its top set."""
    settings = [f"{key}={shlex.quote(str(value))}\n" for key, value in variables.items()]
    return "".join(settings) + (GUEST_SOURCES / name).read_text()


def prepared(name: str) -> Path:
    """Return the path of a part of the guest that tools/guest-kernel fetched."""
    if not (GUEST_CACHE / "packages").exists():
        raise GuestError(f'no guest kernel in "{GUEST_CACHE}"; run: tools/setup --guest')
    return GUEST_CACHE / name


def initramfs(script: str) -> bytes:
    """Return a cpio archive ("newc") that hands over to the disk, with the test's script."""
    archive = io.BytesIO()
    for name in ("bin", "dev", "modules", "proc", "root", "sys"):
        add_to_cpio(archive, name, 0o040755)
    add_to_cpio(archive, "bin/busybox", 0o100755, prepared("userland/bin/busybox").read_bytes())
    for applet in ("sh", "mount", "insmod", "grep", "cp", "poweroff", "switch_root"):
        add_to_cpio(archive, f"bin/{applet}", 0o120777, b"busybox")
    for module in sorted(prepared("modules").iterdir()):
        add_to_cpio(archive, f"modules/{module.name}", 0o100644, module.read_bytes())
    add_to_cpio(archive, "init", 0o100755, (GUEST_SOURCES / "initramfs_init.sh").read_bytes())
    add_to_cpio(archive, "script.sh", 0o100644, script.encode())
    add_to_cpio(archive, "TRAILER!!!", 0)
    return archive.getvalue()


def add_to_cpio(archive: io.BytesIO, name: str, mode: int, content: bytes = b"") -> None:
    """Append one member (Linux: Documentation/driver-api/early-userspace/buffer-format.rst)."""
    name_raw = name.encode() + b"\0"
    # inode, mode, uid, gid, nlink, mtime, size, device and its numbers, name's size, checksum
    numbers = (archive.tell(), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name_raw), 0)
    for part in (b"070701" + b"".join(b"%08x" % n for n in numbers) + name_raw, content):
        archive.write(part + bytes(-len(part) % 4))


# The machine


@dataclass(frozen=True, slots=True)
class GuestRun:
    """A guest that has powered itself off."""

    status: int  # exit status of the script
    results: Mapping[str, str]  # of its lines `RESULT name=value`
    root: Mapping[str, str]  # the guest's evidence of where it ran: mount, cmdline, marker, ...
    console: str
    boot_seconds: float  # from QEMU's start until the disk's init ran
    seconds: float  # until QEMU had ended

    def checked(self) -> Self:
        """Return this run if its script succeeded.

        Raises:
            GuestError: it did not.
        """
        if self.status != 0:
            raise GuestError(f"guest script: exit status {self.status}\n{tail(self.console)}")
        return self


def run_guest(
    disk: Path,
    *,
    script: str,
    cache: Cache,
    aio: str = "threads",
    discard: bool = True,
    timeout: float = GUEST_TIMEOUT_S,
    extra: Sequence[str] = (),
) -> GuestRun:
    """Boot the guest on `disk`, run `script` in it, power it off.

    The script's failure is in the result (`GuestRun.checked`). On return QEMU is gone.

    Args:
        disk: From `build_guest_disk`, or the same bytes elsewhere.
        script: Shell, for busybox's sh with -eu -o pipefail; see `guest_script`.
        cache: QEMU's cache mode; "none" and "directsync" open the disk with O_DIRECT.
        aio: QEMU's way to do I/O: threads, native, io_uring.
        discard: Whether the guest's TRIM reaches the disk.
        timeout: Seconds for all of it.
        extra: More arguments for QEMU.

    Raises:
        GuestError: no power-off in time, or / was not this disk, read-write.
    """
    with GuestProcess(
        disk, script=script, cache=cache, aio=aio, discard=discard, extra=extra
    ) as guest:
        return guest.finished(timeout=timeout)


class GuestProcess:
    """A running guest. Leaving the context kills it where it still runs.

    One thread of ours reads the console; the condition guards what it has read.
    """

    def __init__(
        self,
        disk: Path,
        *,
        script: str,
        cache: Cache,
        aio: str = "threads",
        discard: bool = True,
        extra: Sequence[str] = (),
    ) -> None:
        self._disk = disk
        drive = {
            "file": str(disk).replace(",", ",,"),
            "format": "raw",
            "if": "none",
            "id": "disk",
            "cache": cache,
            "aio": aio,
            "discard": "unmap" if discard else "ignore",
        }
        self._script = script
        self._arguments = (
            *("-accel", accelerator()),
            *("-drive", ",".join(f"{key}={value}" for key, value in drive.items())),
            *("-device", "virtio-blk-pci,drive=disk"),
            *extra,
        )
        self._qemu: Qemu | None = None

    def __enter__(self) -> Self:
        self._qemu = Qemu(self._arguments, script=self._script)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.qemu.kill()

    @property
    def qemu(self) -> "Qemu":
        assert self._qemu is not None, "the guest is started by `with`"
        return self._qemu

    @property
    def pid(self) -> int:
        return self.qemu.process.pid

    @property
    def console(self) -> str:
        """All that the guest has printed."""
        return "".join(self.qemu.console_lines())

    def wait_for_line(self, pattern: str, *, timeout: float = GUEST_TIMEOUT_S) -> re.Match[str]:
        """Return the first match of `pattern` in a whole line of the console, waiting for it."""
        return self.qemu.wait_for_line(pattern, timeout=timeout)

    def lines(self, pattern: str) -> list[re.Match[str]]:
        """Return the matches in the console's whole lines so far."""
        return matches(pattern, self.qemu.console_lines())

    def kill(self) -> None:
        """End the guest's world by SIGKILL, in the middle of whatever it does.

        On return QEMU is gone and `lines` has all that the guest got out.
        """
        self.qemu.kill()

    def finished(self, *, timeout: float = GUEST_TIMEOUT_S) -> GuestRun:
        """Wait for the guest to power itself off and say how it went."""
        lines = self.qemu.wait(timeout=timeout)
        console = "".join(lines)
        root = {m[1]: m[2] for m in matches(r"ROOT (\w+)=(.*)", lines)}
        self._check_root(root, console)
        exits = matches(r"EXIT (\d+)", lines)
        if not exits:
            raise GuestError(f"the guest ended before its script did\n{tail(console)}")
        return GuestRun(
            status=int(exits[-1][1]),
            results={m[1]: m[2] for m in matches(r"RESULT (\w+)=(.*)", lines)},
            root=root,
            console=console,
            boot_seconds=self.qemu.seconds_until(r"ROOT "),
            seconds=self.qemu.seconds,
        )

    def _check_root(self, root: Mapping[str, str], console: str) -> None:
        device, target, kind, options = (root.get("mount", "").split() + [""] * 4)[:4]
        if (device, target, kind) != ("/dev/vda", "/", "ext4") or "rw" not in options.split(","):
            raise GuestError(f"/ of the guest is not the disk, read-write\n{tail(console)}")
        size = self._disk.stat().st_size
        if root.get("device_size") != str(size):
            raise GuestError(f"disk of {root.get('device_size')} bytes, expected {size}")


@dataclass(slots=True)
class Qemu:
    """The process, and its console as lines."""

    arguments: Sequence[str]
    script: str
    kernel_arguments: str = ""
    process: subprocess.Popen[str] = field(init=False)
    seconds: float = field(init=False, default=0.0)
    _lines: list[tuple[float, str]] = field(init=False, default_factory=list)
    _ended: bool = field(init=False, default=False)
    _changed: threading.Condition = field(init=False, default_factory=threading.Condition)
    _scratch: tempfile.TemporaryDirectory[str] = field(init=False)
    _started: float = field(init=False)
    _reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        kernel = prepared("vmlinuz")
        self._scratch = tempfile.TemporaryDirectory(prefix="sealfs-guest-")
        initrd = Path(self._scratch.name) / "initramfs.cpio"
        initrd.write_bytes(initramfs(self.script))
        command = [
            *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"),
            *("-machine", "q35", "-cpu", "max", "-smp", "1", "-m", str(GUEST_MEMORY_MIB)),
            *("-display", "none", "-monitor", "none", "-serial", "stdio"),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", f"console=ttyS0 quiet panic=-1 {self.kernel_arguments}".strip()),
            *self.arguments,
        ]
        self._started = time.monotonic()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
        except FileNotFoundError as exc:
            self._scratch.cleanup()
            raise GuestError("no qemu-system-x86_64; run: tools/setup --guest") from exc
        self._reader = threading.Thread(target=self._read, name="guest console", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append((time.monotonic() - self._started, line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def console_lines(self) -> list[str]:
        with self._changed:
            return [line for _, line in self._lines]

    def seconds_until(self, pattern: str) -> float:
        with self._changed:
            return next(at for at, line in self._lines if re.match(pattern, line))

    def wait_for_line(self, pattern: str, *, timeout: float) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        seen = 0
        with self._changed:
            while True:
                new = [line for _, line in self._lines[seen:]]
                seen += len(new)
                if found := matches(pattern, new):
                    return found[0]
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    break
                self._changed.wait(left)
            why = "the guest ended" if self._ended else f"{timeout:.0f} s passed"
        raise GuestError(f'{why} without a line "{pattern}"\n{tail("".join(self.console_lines()))}')

    def wait(self, *, timeout: float) -> list[str]:
        """Wait for the end of QEMU by itself and return the console's lines."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._ended, timeout)
        if not in_time:
            self.kill()
            console = tail("".join(self.console_lines()))
            raise GuestError(f"the guest still ran after {timeout:.0f} s\n{console}")
        status = self.process.wait()
        self._close()
        lines = self.console_lines()
        if status != 0:
            raise GuestError(f"QEMU: exit status {status}\n{tail(''.join(lines))}")
        return lines

    def kill(self) -> None:
        """End QEMU if it still runs; all it printed is in the console's lines then."""
        self.process.kill()  # does nothing to a process already waited for
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self._reader.join()
        if not self.seconds:
            self.seconds = time.monotonic() - self._started
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._scratch.cleanup()


@functools.cache
def accelerator() -> str:
    """Return "kvm" where this kernel really boots under it, else "tcg".

    /dev/kvm alone says little: on a processor without the extensions it can be there, and slower
    than emulation or unable to run a kernel. So it is tried, where it can be worth it.
    """
    if not re.search(r"^flags\s*:.*\b(vmx|svm)\b", Path("/proc/cpuinfo").read_text(), re.M):
        return "tcg"
    qemu = Qemu(("-accel", "kvm"), script="", kernel_arguments="sealfs.probe")
    try:
        qemu.wait_for_line("RESULT probe=alive", timeout=KVM_PROBE_TIMEOUT_S)
    except GuestError:
        return "tcg"
    finally:
        qemu.kill()
    return "kvm"


def matches(pattern: str, lines: Sequence[str]) -> list[re.Match[str]]:
    """Match whole lines only: of one cut short by a kill, "ACK 1" may have been "ACK 12"."""
    whole = (line.rstrip("\r\n") for line in lines if line.endswith("\n"))
    return [match for line in whole if (match := re.fullmatch(pattern, line))]


def tail(console: str) -> str:
    lines = console.splitlines()[-CONSOLE_TAIL_LINES:]
    return "\n".join(["--- end of the guest's console:", *lines])


def run_tool(*command: str) -> str:
    """Run a program of this machine and return its output; its failure carries that."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as exc:
        raise GuestError(f"no {command[0]}; run: tools/setup --guest") from exc
    if done.returncode != 0:
        raise GuestError(
            f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout
