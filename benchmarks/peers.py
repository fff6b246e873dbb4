"""The sides of the comparison: each is started, mounted, and taken away again.

Every side shows `disk0` and, a quarter as large, `disk1` to `disk3` in a directory. Each runs with
its defaults, as a child of this process in the foreground and in a session of its own: Ctrl-C is
ours alone, and each is ended by unmounting, else by its pid.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import PYTHON, ROOT, SEALFS, Failed, is_mountpoint, run, version_of, wait_for

sys.path.insert(0, str(ROOT))  # of this checkout, whatever else is installed

from sealfs.mount.control import find_mount

DISKS = ("disk0", "disk1", "disk2", "disk3")
END_WAIT = 60.0  # seconds for a daemon to go after it was unmounted
PASSWORD = "benchmark"
LUKS_TRIES = 50


@dataclass(slots=True)
class Side:
    """One side while it is mounted.

    Attributes:
        directory: where its disks are.
        pid: of its daemon; None where there is none.
        about: version, and how it was started.
        stored: directory of what it keeps; None where no page cache is behind it.
        status: figures of the daemon, where it has any.
        empties: empties its own caches, without touching the kernel's.
        renews: makes disk0 anew, empty, where truncating it will not do.
    """

    name: str
    directory: Path
    pid: int | None
    about: str
    stored: Path | None = None
    status: Callable[[], dict[str, Any]] = field(default=dict)
    empties: Callable[[], None] = field(default=lambda: None)
    renews: Callable[[int], None] | None = None

    def empty_disk(self, size: int) -> None:
        """Make disk0 empty: no block of it is there."""
        if self.renews is not None:
            self.renews(size)
        else:
            os.truncate(self.directory / DISKS[0], 0)
            os.truncate(self.directory / DISKS[0], size)


def _sizes(size: int) -> dict[str, int]:
    return {name: size if name == DISKS[0] else size // 4 for name in DISKS}


@contextlib.contextmanager
def daemon(
    command: Sequence[str | Path],
    mountpoint: Path,
    log: Path,
    *,
    places: Sequence[Path] = (),
    answers: str = "",
    environment: Mapping[str, str] | None = None,
    unmount: Callable[[], object] | None = None,
) -> Iterator[int]:
    """Run a daemon until it has mounted all `places`; on the way out unmount and end it."""
    places = places or (mountpoint,)
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment or {}),
            start_new_session=True,
        )
    try:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(answers.encode())
            process.stdin.close()
        wait_for(
            lambda: all(map(is_mountpoint, places)) or process.poll() is not None,
            f"{Path(command[0]).name} to mount",
        )
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise Failed(f"{Path(command[0]).name} ended at once: {said[-1]}")
        yield process.pid
    finally:
        _end(process, places, unmount)


def _end(
    process: subprocess.Popen[bytes],
    places: Sequence[Path],
    unmount: Callable[[], object] | None,
) -> None:
    if unmount is not None and process.poll() is None and all(map(is_mountpoint, places)):
        with contextlib.suppress(Failed):
            unmount()
    for place in filter(is_mountpoint, places):
        with contextlib.suppress(Failed):
            run("umount", place)
    for insist in (None, process.terminate, process.kill):
        if insist is not None:
            insist()
        elif any(map(is_mountpoint, places)) or unmount is _by_pid:
            continue  # it waits for nothing: it will not go by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_WAIT)
            break
    for place in filter(is_mountpoint, places):
        with contextlib.suppress(Failed):
            run("umount", "-l", place)


def _by_pid() -> None:
    """For what ends by a signal, not by being unmounted."""


def _make_disks(directory: Path, size: int) -> None:
    for name, length in _sizes(size).items():
        with open(directory / name, "xb") as disk:
            disk.truncate(length)


def _directories(scratch: Path, *names: str) -> list[Path]:
    made = [scratch / name for name in names]
    for directory in made:
        directory.mkdir()
    return made


# The sides.


@contextlib.contextmanager
def sealfs(scratch: Path, size: int) -> Iterator[Side]:
    """A mount with default options; the software TPM has no part in what is measured."""
    sealed, plain = _directories(scratch, "sealed", "plain")
    base: list[str | Path] = [SEALFS, "--state", scratch / "state"]
    run(*base, "init", "--tpm", "swtpm", "--no-recovery")
    for name, length in _sizes(size).items():
        run(*base, "create", sealed / f"{name}.sealed", "--size", str(length), "--vm-id", name)

    def status() -> dict[str, Any]:
        found = find_mount(plain)
        return {} if found is None else found.status

    def empties() -> None:
        found = find_mount(plain)
        if found is not None and found.call("close")["in_use"]:
            raise Failed("sealfs: its disks are in use, so their cache cannot be emptied")

    with daemon(
        [*base, "mount", sealed, plain, "--foreground"],
        plain,
        scratch / "log",
        unmount=lambda: run(*base, "umount", plain, timeout=END_WAIT),
    ) as pid:
        wait_for(lambda: bool(status()), "the mount to answer")
        about = version_of(str(SEALFS), "--version")
        yield Side("sealfs", plain, pid, about, sealed, status, empties)


@contextlib.contextmanager
def gocryptfs(scratch: Path, size: int) -> Iterator[Side]:
    """Default options."""
    cipher, plain = _directories(scratch, "cipher", "plain")
    password = scratch / "password"
    password.write_text(PASSWORD + "\n")
    run("gocryptfs", "-q", "-init", "-passfile", password, cipher)
    command = ("gocryptfs", "-q", "-fg", "-passfile", password, cipher, plain)
    with daemon(command, plain, scratch / "log") as pid:
        _make_disks(plain, size)
        yield Side("gocryptfs", plain, pid, version_of("gocryptfs", "-version"), cipher)


@contextlib.contextmanager
def luks(scratch: Path, size: int) -> Iterator[Side]:
    """LUKS1 as qemu-img makes it, each disk a FUSE export of one qemu-storage-daemon."""
    cipher, plain = _directories(scratch, "cipher", "plain")
    password = scratch / "password"
    password.write_text(PASSWORD)
    secret = f"secret,id=key,file={password}"
    command: list[str | Path] = ["qemu-storage-daemon", "--object", secret]
    places = [plain / name for name in DISKS]
    for name, place in zip(DISKS, places, strict=True):
        place.touch()
        _make_luks(cipher / f"{name}.luks", _sizes(size)[name], secret)
        file = f"driver=file,node-name=file-{name},filename={cipher / name}.luks,discard=unmap"
        crypto = f"driver=luks,node-name={name},file=file-{name},key-secret=key,discard=unmap"
        export = f"type=fuse,id=export-{name},node-name={name},mountpoint={place},writable=on"
        command += ["--blockdev", file, "--blockdev", crypto, "--export", export]
    with contextlib.ExitStack() as running:

        def start() -> int:
            log = scratch / "log"
            process = daemon(command, plain, log, places=places, unmount=_by_pid)
            return running.enter_context(process)

        def renew(size: int) -> None:
            """Its export takes no truncate (QEMU 7.2: EOPNOTSUPP): a new container instead."""
            running.close()
            (cipher / f"{DISKS[0]}.luks").unlink()
            _make_luks(cipher / f"{DISKS[0]}.luks", size, secret)
            side.pid = start()

        about = version_of("qemu-storage-daemon", "--version")
        about = f"{about}, default cache and aio"
        side = Side("luks", plain, start(), about, cipher, renews=renew)
        yield side


def _make_luks(container: Path, size: int, secret: str) -> None:
    # The time that the passphrase costs at each opening is not what is measured.
    options = "key-secret=key,iter-time=10"
    command = ("qemu-img", "create", "-q", "-f", "luks", "--object", secret, "-o", options)
    for tries_left in reversed(range(LUKS_TRIES)):
        try:
            run(*command, container, str(size))
        except Failed as exc:
            # QEMU times its key derivation by the thread's CPU clock, which may tick too seldom.
            if "accurate CPU usage" not in str(exc) or not tries_left:
                raise
            container.unlink(missing_ok=True)
        else:
            return


@contextlib.contextmanager
def encfs(scratch: Path, size: int) -> Iterator[Side]:
    """The `--standard` configuration: no MAC for blocks."""
    cipher, plain = _directories(scratch, "cipher", "plain")
    command = ("encfs", "-f", "--standard", "--stdinpass", cipher, plain)
    with daemon(command, plain, scratch / "log", answers=PASSWORD + "\n") as pid:
        _make_disks(plain, size)
        yield Side("encfs", plain, pid, f"{version_of('encfs', '--version')}, --standard", cipher)


@contextlib.contextmanager
def cryfs(scratch: Path, size: int) -> Iterator[Side]:
    """Default options; what it keeps in the home directory goes to the scratch directory."""
    cipher, plain, home = _directories(scratch, "cipher", "plain", "home")
    environment = {
        "CRYFS_FRONTEND": "noninteractive",
        "CRYFS_NO_UPDATE_CHECK": "true",
        "HOME": str(home),
    }
    with daemon(
        ("cryfs", "-f", cipher, plain),
        plain,
        scratch / "log",
        answers=PASSWORD + "\n",
        environment=environment,
    ) as pid:
        _make_disks(plain, size)
        yield Side("cryfs", plain, pid, version_of("cryfs", "--version"), cipher)


@contextlib.contextmanager
def plain(scratch: Path, size: int) -> Iterator[Side]:
    """Plain files on the same file system."""
    (directory,) = _directories(scratch, "plain")
    _make_disks(directory, size)
    yield Side("plain", directory, None, "plain file, no encryption")


@contextlib.contextmanager
def null(scratch: Path, size: int) -> Iterator[Side]:
    """The lane over disks in memory that seal nothing: what Python and FUSE cost alone."""
    source, mounted = _directories(scratch, "source", "plain")
    for name in DISKS:
        (source / f"{name}.sealed").touch()
    command = (
        PYTHON, "-m", "tests.mount_support", source, mounted, "--state", scratch / "state",
        "--run-dir", scratch / "run", "--log", scratch / "lane.log", "--fake", str(size),
    )  # fmt: skip
    with daemon(command, mounted, scratch / "log") as pid:
        wait_for(lambda: (mounted / DISKS[0]).exists(), "the null lane")
        about = "lane over memory, nothing sealed, nothing durable"
        # Memory that was used stays: it is never empty again.
        yield Side("null", mounted, pid, about, renews=lambda size: None)


MAKERS: Mapping[str, Callable[[Path, int], contextlib.AbstractContextManager[Side]]] = {
    "sealfs": sealfs,
    "gocryptfs": gocryptfs,
    "luks": luks,
    "encfs": encfs,
    "cryfs": cryfs,
    "plain": plain,
    "null": null,
}
