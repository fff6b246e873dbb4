"""Whole stories, by commands alone: a lost host, a killed daemon under fio."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_support import Host

pytestmark = [pytest.mark.fuse, pytest.mark.tpm]

SIZE = 32 << 20


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.clear()


@pytest.mark.parametrize("way", ["imported", "made through the mount"])
def test_image_and_recovery_key_alone_open_on_a_new_host(host: Host, way: str) -> None:
    content = os.urandom(1 << 20) * (SIZE >> 20)
    sealed = host.images / "web1.raw.sealed"
    if way == "imported":
        source = host.directory / "web1.raw"
        source.write_bytes(content)
        host.run("import", source, sealed, "--vm-id", "web1")
        source.unlink()
    else:
        host.mount()
        plain = host.mountpoint / "web1.raw"
        subprocess.run(["qemu-img", "create", "-q", "-f", "raw", plain, str(SIZE)], check=True)
        with open(plain, "r+b") as file:
            file.write(content)
            os.fsync(file.fileno())
        host.umount()
    assert content[: 1 << 12] not in sealed.read_bytes()

    # The state directory is gone, and the TPM with it.
    shutil.rmtree(host.state)
    old_key = host.recovery_key
    new_key = host.init()
    assert new_key != old_key
    host.mount()
    with pytest.raises(OSError, match=r"(?i)permission|stale"):
        (host.mountpoint / "web1.raw").read_bytes()
    host.umount()
    # Not by the new host's recovery key, not by a mistyped one; then by the right one.
    recover = ("key", "recover", sealed, "--recovery-key-file", "-")
    host.run(*recover, status=7, stdin=new_key + "\n")
    host.run(*recover, stdin=old_key + "\n")
    host.mount()
    assert (host.mountpoint / "web1.raw").read_bytes() == content
    host.umount()
    host.run("check", "--data", sealed)
    for file in host.directory.rglob("*"):
        if file.is_file():
            assert old_key.encode() not in file.read_bytes(), file


def fio(target: Path, *options: str) -> subprocess.Popen[str]:
    common = ("--name=kill", f"--filename={target}", "--bs=4k", "--size=16m", "--randseed=7",
              "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
              "--minimal")  # fmt: skip
    return subprocess.Popen(["fio", *common, *options], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out + err


@pytest.mark.parametrize("options", ["lane=on", "lane=off"])
@pytest.mark.parametrize("direct", [0, 1])
def test_fio_verifies_after_the_daemon_was_killed_under_it(
    host: Host, options: str, direct: int
) -> None:
    host.run("create", host.images / "disk.sealed", "--size", "32M", "--vm-id", "disk")
    disk = host.mountpoint / "disk"
    host.mount(options)
    # The first half is written and synced to its end, the second half then rewritten with an
    # fsync every 8 writes until the daemon dies.
    first, second = "--offset=0", "--offset=16m"
    how = f"--direct={direct}"
    for half in (first, second):
        assert finish(fio(disk, half, how, "--rw=write", "--end_fsync=1"))[0] == 0
    before = disk.stat().st_mtime_ns
    rewriting = fio(disk, second, how, "--rw=randwrite", "--fsync=8", "--time_based",
                    "--runtime=60", "--do_verify=0")  # fmt: skip
    deadline = time.monotonic() + 30
    while disk.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "fio writes"
        time.sleep(0.01)
    time.sleep(0.5)  # not a wait for anything: the moment of death
    host.kill_daemon()
    assert finish(rewriting)[0] != 0

    host.mount(options)
    # What was acknowledged is there; what was not is wholly old or wholly new.
    for half in (first, second):
        status, text = finish(fio(disk, half, how, "--rw=read"))
        assert status == 0, text
    # The verification bites: a few bytes that fio did not write are found.
    with open(disk, "r+b") as file:
        file.seek((16 << 20) + 5 * 4096 + 1000)
        file.write(b"not from fio")
    assert finish(fio(disk, second, how, "--rw=read"))[0] != 0
    host.umount()
    host.run("check", "--data", host.images / "disk.sealed")


def test_an_old_daemon_leaves_the_mount_after_it_alone(host: Host) -> None:
    host.run("create", host.images / "disk.sealed", "--size", "4M", "--vm-id", "disk")
    host.run("create", host.images / "other.sealed", "--size", "4M", "--vm-id", "other")
    host.mount()
    old = host.daemon_pid()
    with open(host.mountpoint / "disk", "rb"):
        subprocess.run(["umount", "-l", host.mountpoint], check=True)
        host.mount()
        assert host.daemon_pid() != old
    deadline = time.monotonic() + 30
    while Path(f"/proc/{old}").exists():
        assert time.monotonic() < deadline, "the old daemon ends with its last file"
        time.sleep(0.01)
    assert os.path.ismount(host.mountpoint)
    assert sorted(os.listdir(host.mountpoint)) == ["disk", "other"]
    host.umount()


def test_an_image_put_back_under_a_mount_is_the_one_that_opens(host: Host) -> None:
    sealed, plain = host.images / "disk.sealed", host.mountpoint / "disk"
    host.run("create", sealed, "--size", "4M", "--vm-id", "disk")
    backup = host.images / "backup"
    shutil.copy(sealed, backup)
    host.mount()
    with open(plain, "r+b") as file:
        file.write(b"newer")
        os.fsync(file.fileno())
    os.replace(backup, sealed)
    with pytest.raises(OSError, match="Stale file handle"):
        plain.read_bytes()
    host.run("accept-rollback", plain)
    with open(plain, "r+b") as file:
        assert file.read(5) == bytes(5)
        file.seek(0)
        file.write(b"after")
        os.fsync(file.fileno())
    host.umount()
    host.run("export", sealed, host.directory / "out.raw")
    assert (host.directory / "out.raw").read_bytes()[:5] == b"after"
