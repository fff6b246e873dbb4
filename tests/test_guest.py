"""The real thing: a Linux guest whose root file system is a sealed disk under a mount.

Every run proves from the guest's own console that / is that disk, mounted read-write
(`guest_support.py`). The TPM is the embedded software TPM; commands are those a user types.
"""

from __future__ import annotations

import json
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
from host_support import Host

pytestmark = [pytest.mark.qemu, pytest.mark.fuse, pytest.mark.tpm, pytest.mark.slow]

VM = "guest-1"
TRIM_MIB = 96


class GuestHost(Host):
    """A host with one VM."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.sealed = self.images / "guest.raw.sealed"
        self.plain = self.mountpoint / "guest.raw"

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
def host(tmp_path: Path) -> Iterator[GuestHost]:
    made = GuestHost(tmp_path)
    yield made
    made.clear()


def seal_guest_disk(host: GuestHost) -> GuestDisk:
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
def test_a_guest_lives_on_a_sealed_disk(host: GuestHost, cache: Cache, options: str) -> None:
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


def test_trim_in_the_guest_gives_the_storage_its_space_back(host: GuestHost) -> None:
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
    host: GuestHost, cache: Cache
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
