"""Commands that are cut short leave nothing half-made, and the next run cleans up."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import BINARIES, environment, prepared_host

DISK_SIZE = 256 << 20
DEADLINE = 30.0

pytestmark = [pytest.mark.tpm, pytest.mark.slow]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("disks")
    unit = os.urandom(1 << 20)
    with open(directory / "disk.raw", "wb") as file:
        for number in range(DISK_SIZE >> 20):
            file.write(number.to_bytes(8, "big") + unit[8:])
    sealfs_free = ["qemu-img", "convert", "-O", "qcow2", "disk.raw", "disk.qcow2"]
    subprocess.run(sealfs_free, cwd=directory, check=True)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    shutil.copytree(prepared_host(), tmp_path, dirs_exist_ok=True)
    return tmp_path


def sealfs(host: Path, *arguments: object) -> str:
    return subprocess.run(
        [BINARIES / "sealfs", *map(str, arguments)],
        cwd=host,
        env=environment(),
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


@contextlib.contextmanager
def importing(host: Path, source: Path) -> Iterator[subprocess.Popen[str]]:
    """An import that has written a part of the image."""
    process = subprocess.Popen(
        [BINARIES / "sealfs", "import", source, "web1.sealed", "--vm-id", "web1"],
        cwd=host,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + DEADLINE
        while not any(path.stat().st_size > DISK_SIZE // 16 for path in leftovers(host)):
            assert process.poll() is None, "it ended before it could be cut short"
            assert time.monotonic() < end
            time.sleep(0.002)
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def leftovers(host: Path) -> list[Path]:
    return [path for path in host.iterdir() if path.name.startswith(".sealfs-")]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_import_leaves_nothing(
    host: Path, disks: Path, kind: str, number: signal.Signals
) -> None:
    with importing(host, disks / f"disk.{kind}") as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 128 + number
    assert errors == "sealfs: error: interrupted; nothing half-made was left behind\n"
    assert sorted(path.name for path in host.iterdir()) == ["recovery.key", "state"]
    assert sealfs(host, "list") == ""
    assert sealfs(host, "key", "list") == "", "a key was made for nothing"


def test_a_key_that_was_there_before_stays(host: Path, disks: Path) -> None:
    sealfs(host, "create", "old.sealed", "--size", "1M", "--vm-id", "web1")
    with importing(host, disks / "disk.raw") as process:
        process.terminate()
        process.wait(DEADLINE)
    sealfs(host, "check", "--data", "old.sealed")


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_killed_import_is_cleaned_up_by_the_next(host: Path, disks: Path, kind: str) -> None:
    with importing(host, disks / f"disk.{kind}") as process:
        process.kill()
        process.wait(DEADLINE)
    assert not (host / "web1.sealed").exists()
    assert sealfs(host, "list") == ""
    assert len(leftovers(host)) == 1
    sealfs(host, "import", disks / f"disk.{kind}", "web1.sealed", "--vm-id", "web1")
    assert leftovers(host) == []
    sealfs(host, "check", "--data", "web1.sealed")
    sealfs(host, "export", "web1.sealed", "out.raw")
    subprocess.run(["cmp", disks / "disk.raw", host / "out.raw"], check=True)


def test_two_imports_of_one_name_do_not_meet(host: Path, disks: Path) -> None:
    with importing(host, disks / "disk.raw") as process:
        second = subprocess.run(
            [BINARIES / "sealfs", "create", "web1.sealed", "--size", "1M", "--vm-id", "other"],
            cwd=host,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert process.wait(DEADLINE) == 0
    assert second.returncode == 9
    assert "being written by another sealfs command" in second.stderr
    sealfs(host, "check", "--data", "web1.sealed")


@pytest.mark.fuse
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [BINARIES / "sealfs", "bench", ".", "--size", "16M", "--seconds", "100"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + DEADLINE
        # It is mounted, and the first row is being measured.
        while not any(path.stat().st_blocks for path in tmp_path.glob(".sealfs-bench-*/mount/d*")):
            assert process.poll() is None, "it ended before it could be cut short"
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 128 + number
    assert errors == "sealfs: error: interrupted; nothing half-made was left behind\n"
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
