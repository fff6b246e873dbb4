"""Where figures come from: programs that are run, the machine they run on, its caches."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SEALFS = ROOT / ".venv" / "bin" / "sealfs"
PYTHON = ROOT / ".venv" / "bin" / "python"
POLL = 0.02  # seconds
VM_FLAGS = re.compile(r"^flags\s*:.*\b(vmx|svm)\b", re.M)


class Failed(Exception):
    """A program, or something that was waited for, failed; says what."""


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Raises:
        Failed: it is not there or its status is not 0; with what it said last.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, check=False, **options
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Failed(f"{command[0]}: {exc}") from exc
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Failed(
            f"{Path(command[0]).name}: exit status {done.returncode}"
            + (f": {said[-1]}" if said else "")
        )
    return done


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait until a condition holds.

    Raises:
        Failed: it does not within `seconds`.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"waited {seconds:g} s in vain for {what}")
        time.sleep(POLL)


def is_mountpoint(path: Path) -> bool:
    """Whether something is mounted there; a file may be a mount point too."""
    octal = str(path).replace("\\", "\\134").replace(" ", "\\040")
    mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    return any(line.split(" ")[4] == octal for line in mounts)


def cpu_seconds(pid: int) -> float:
    """Return the user and system time of a process and its threads (proc(5), utime and stime)."""
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """Return a memory figure of /proc/PID/status in MiB: VmRSS now, VmHWM its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def drop_caches() -> None:
    """Empty the kernel's page cache of what is clean; everything is, afterwards.

    Raises:
        Failed: not as root.
    """
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError as exc:
        raise Failed(f"drop_caches: {exc.strerror}") from exc


def version_of(*command: str) -> str:
    """Return the first line that a program says of its version, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except OSError as exc:
        return f"not installed ({exc.strerror})"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[0].split(";")[0].strip() if lines else "?"


def guest_level() -> str:
    """Return what the report says of guests: emulation would level all sides."""
    has_flags = VM_FLAGS.search(Path("/proc/cpuinfo").read_text())
    if not has_flags or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "not measured: no kvm"
    return "not measured: no guest job yet, though there is kvm"


def environment(scratch: Path | None = None) -> dict[str, str]:
    """Return what the figures are measured on."""
    info = Path("/proc/cpuinfo").read_text()
    cpu = next((ln.split(":")[1].strip() for ln in info.splitlines() if "model name" in ln), "?")
    try:
        commit = run("git", "-C", HERE, "rev-parse", "--short", "HEAD").stdout.strip()
        # Results of earlier runs are no change of what is measured.
        changed = run("git", "-C", ROOT, "status", "--porcelain", "--", "sealfs").stdout.strip()
    except Failed:
        commit, changed = "?", ""
    memory = next(ln for ln in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in ln)
    return {
        "commit": commit + ("+" if changed else ""),
        "kernel": platform.release(),
        "cpu": f"{os.cpu_count()} x {cpu}",
        "memory": f"{int(memory.split()[1]) >> 10} MiB",
        "disk": disk_of(scratch or HERE),
        "load": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def disk_of(path: Path) -> str:
    """Return file system, device and kind of disk below a path."""
    found = run("findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", "-T", path).stdout.split()
    device = Path(f"/sys/class/block/{Path(found[1]).name}")
    size = ""
    if (device / "size").exists():
        whole = device if (device / "queue").exists() else device.resolve().parent
        kind = "rotating" if (whole / "queue/rotational").read_text().strip() == "1" else "flash"
        size = f", {int((device / 'size').read_text()) >> 21} GiB, {kind} by its own account"
    return f"{found[0]} on {found[1]} ({found[2]}){size}"
