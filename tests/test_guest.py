"""The real thing: a Linux guest whose root file system is a sealed disk under a mount.

Every run proves from the guest's own console that / is that disk, mounted read-write
(`guest_support.py`). The TPM is the embedded software TPM; commands are those a user types.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from guest_support import (
    Cache,
    GuestDisk,
    GuestProcess,
    assert_ext4_clean,
    build_guest_disk,
    guest_script,
    run_guest,
)

pytestmark = [pytest.mark.qemu, pytest.mark.fuse, pytest.mark.tpm, pytest.mark.slow]

VM = "guest-1"
TRIM_MIB = 96


class Host:
    """A host with its own state directory, one directory of sealed images and a mount point."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.mountpoint = directory / "plain"
        self.sealed = self.images / "guest.raw.sealed"
        self.plain = self.mountpoint / "guest.raw"
        self.images.mkdir()
        self.mountpoint.mkdir()
        self.run("init", "--tpm", "swtpm")

    def run(self, *arguments: str | Path, status: int = 0) -> str:
        """Run a sealfs command as a user does; return what it prints."""
        command = [sys.executable, "-m", "sealfs.cli.main", "--state", self.directory / "state"]
        done = subprocess.run(
            [str(part) for part in (*command, *arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def mount(self, options: str = "lane=on") -> None:
        log = self.directory / "mount.log"
        self.run("mount", self.images, self.mountpoint, "-o", options, "--log", log)

    def umount(self) -> None:
        self.run("umount", self.mountpoint)

    def daemon_pid(self) -> int:
        """Return the pid of the process that serves the mount point."""
        from sealfs.mount.control import find_mount

        found = find_mount(self.mountpoint)
        assert found is not None
        return int(found.status["pid"])

    def kill_daemon(self) -> None:
        """kill -9 the daemon, and clear the dead mount point away."""
        pid = self.daemon_pid()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the killed daemon goes away"
            time.sleep(0.01)
        subprocess.run(["umount", "-l", str(self.mountpoint)], check=True)

    def allocated(self) -> int:
        """Bytes that the sealed file takes on the storage."""
        return self.sealed.stat().st_blocks * 512

    def check_everything(self) -> None:
        """`check --data` is clean, and so is the guest's file system in the exported disk."""
        report = json.loads(self.run("--json", "check", "--data", self.sealed))
        assert not report["findings"], report
        exported = self.directory / "exported.raw"
        self.run("export", self.sealed, exported, "--force")
        assert_ext4_clean(exported)
        exported.unlink()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    if os.path.ismount(made.mountpoint):
        subprocess.run(["umount", "-l", str(made.mountpoint)], check=False)


def seal_guest_disk(host: Host) -> GuestDisk:
    """Import a bootable disk; nothing of it stays in clear."""
    disk = build_guest_disk(host.directory / "guest.raw")
    host.run("import", disk.path, host.sealed, "--vm-id", VM)
    marker = disk.marker.encode()
    assert marker in disk.path.read_bytes()
    assert marker not in host.sealed.read_bytes()
    disk.path.unlink()
    return GuestDisk(path=host.plain, size=disk.size, marker=disk.marker)


@pytest.mark.parametrize(
    ("cache", "options"),
    [("none", "lane=on"), ("writeback", "lane=on"), ("none", "lane=off")],
)
def test_a_guest_lives_on_a_sealed_disk(host: Host, cache: Cache, options: str) -> None:
    disk = seal_guest_disk(host)
    host.mount(options)
    written = run_guest(host.plain, script=guest_script("write.sh"), cache=cache).checked()
    assert written.root["marker"] == disk.marker
    assert written.root["device_size"] == str(disk.size)
    assert int(written.results["bytes"]) > 40 << 20
    host.umount()
    assert b"a line of text that is on the disk in clear" not in host.sealed.read_bytes()

    host.mount(options)
    found = run_guest(host.plain, script=guest_script("verify.sh"), cache=cache).checked()
    assert found.root["marker"] == disk.marker
    host.umount()
    host.check_everything()


def test_trim_in_the_guest_gives_the_storage_its_space_back(host: Host) -> None:
    seal_guest_disk(host)
    host.mount()
    write = guest_script("trim.sh", STAGE="write", SIZE_MIB=TRIM_MIB)
    run_guest(host.plain, script=write, cache="none").checked()
    host.umount()
    before = host.allocated()

    host.mount()
    trim = guest_script("trim.sh", STAGE="trim", SIZE_MIB=TRIM_MIB)
    trimmed = run_guest(host.plain, script=trim, cache="none").checked()
    assert int(trimmed.results["trimmed"]) >= TRIM_MIB << 20
    host.umount()
    freed = before - host.allocated()
    assert freed >= 0.8 * (TRIM_MIB << 20), f"{freed >> 20} MiB of {TRIM_MIB} MiB"
    host.check_everything()


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_what_the_guest_was_promised_survives_the_end_of_everything(
    host: Host, cache: Cache
) -> None:
    disk = seal_guest_disk(host)
    host.mount()
    with GuestProcess(host.plain, script=guest_script("fsync_loop.sh"), cache=cache) as guest:
        guest.wait_for_line("ACK 60")
        # The daemon first, so that QEMU cannot hand it anything more.
        host.kill_daemon()
        guest.kill()
        acknowledged = int(guest.lines(r"ACK (\d+)")[-1][1])
    assert acknowledged >= 60

    host.mount()
    check = guest_script("fsync_check.sh", ACKNOWLEDGED=acknowledged)
    found = run_guest(host.plain, script=check, cache=cache).checked()
    assert found.root["marker"] == disk.marker
    assert int(found.results["log"]) >= acknowledged
    host.umount()
    host.check_everything()
