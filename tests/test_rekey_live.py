"""A rekey on a live mount: killed under fio, and under a writer that knows what was acknowledged.

Also: it goes on by itself, waits for nobody, is paused, is refused on a mount for reading, and the
VM's writes win.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from exerciser_files import _reference
from mount_support import Mounted, TinyKeys, mounted, seal_new, wait_for

from sealfs.errors import NotFound, ReadOnly, UsageError
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.mount import control

pytestmark = pytest.mark.fuse

MIB = 1 << 20
SIZE = 96 * MIB
FIO_SIZE = 88 * MIB
"""What fio has; the writer has the rest."""
KILLS = 20
PAGE = 4096


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    seal_new(tmp_path / "state", tmp_path / "source" / "disk.sealed", vm_id="disk", size=SIZE)
    return tmp_path


@contextlib.contextmanager
def mount_of(place: Path, options: str = "") -> Iterator[Mounted]:
    with mounted(place / "source", place / "plain", options=options) as mount:
        yield mount


def call(mount: Mounted, action: str, **more: Any) -> dict[str, Any]:
    socket = next(iter(sorted(mount.run_dir.glob("*.sock"), key=lambda p: -p.stat().st_mtime)))
    path = str((mount.source / "disk.sealed").resolve())
    return control.call(socket, "rekey", path=path, action=action, **more)


def ended(mount: Mounted) -> bool:
    return not call(mount, "status")["is_rekeying"]


def identity_of(place: Path) -> Any:
    with contextlib.closing(FileStorage.peek(place / "source" / "disk.sealed")) as storage:
        return read_identity(storage)


def fio(mount: Mounted, *more: str) -> subprocess.Popen[str]:
    if shutil.which("fio") is None:
        pytest.fail("fio is not installed; run: tools/setup")
    return subprocess.Popen(
        [
            "fio", "--name=rekey", f"--filename={mount.mountpoint / 'disk'}", "--ioengine=libaio",
            "--direct=1", "--iodepth=8", "--bs=4k", f"--size={FIO_SIZE}", "--verify=crc32c",
            "--verify_fatal=1", "--allow_file_create=0", *more,
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp",
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output


class Writer:
    """Writes stamped blocks, each durable before the next; knows what was acknowledged."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.allowed: dict[int, set[int]] = {}
        """Of each block the number acknowledged last, and one that was under way."""
        self._number = 0
        self.written = 0

    def run(self, path: Path) -> None:
        """Write until the mount is gone."""
        page = mmap.mmap(-1, PAGE)
        fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        with contextlib.suppress(OSError):
            while True:
                block = self._rng.randrange((SIZE - FIO_SIZE) // PAGE)
                self._number += 1
                page[:] = struct.pack("<QQ", block, self._number) * (PAGE // 16)
                self.allowed.setdefault(block, {0}).add(self._number)
                os.pwrite(fd, page, FIO_SIZE + block * PAGE)
                self.allowed[block] = {self._number}
                self.written += 1
        with contextlib.suppress(OSError):
            os.close(fd)

    def check(self, path: Path) -> None:
        """Every block is what was acknowledged last, or what was under way."""
        with path.open("rb", buffering=0) as file:
            for block, allowed in self.allowed.items():
                content = os.pread(file.fileno(), PAGE, FIO_SIZE + block * PAGE)
                found = struct.unpack_from("<QQ", content)
                assert content == content[:16] * (PAGE // 16), f"block {block} is mixed"
                assert found[1] in allowed, f"block {block}: {found[1]}, allowed {allowed}"
                assert found[0] == (block if found[1] else 0)
                self.allowed[block] = {found[1]}


def test_killed_twenty_times_under_fio_nothing_is_lost_and_no_old_key_is_left(place: Path) -> None:
    rng = random.Random(7)
    writer = Writer(rng)
    rekeys = 0
    with mount_of(place) as mount:
        finished(fio(mount, "--rw=write", "--do_verify=0", "--end_fsync=1"))
    for number in range(KILLS):
        with mount_of(place, "dirty=8M,commit=0.2") as mount:
            path = mount.mountpoint / "disk"
            writer.check(path)
            threads = [threading.Thread(target=writer.run, args=(path,))]
            threads[0].start()
            load = fio(mount, "--rw=randrw", "--do_verify=0", "--time_based", "--runtime=60",
                       "--fsync=32", f"--randseed={number}")  # fmt: skip
            if ended(mount):  # else it goes on by itself
                rekeys += 1
                call(mount, "begin", rate=20 * MIB)
            time.sleep(rng.uniform(0.1, 0.9))
            mount.kill()
            load.communicate()
            threads[0].join()
    old = identity_of(place)
    with mount_of(place) as mount:
        path = mount.mountpoint / "disk"
        writer.check(path)
        if not ended(mount):
            call(mount, "begin", rate=1 << 40)
            wait_for(lambda: ended(mount), "the rekey comes to its end")
        finished(fio(mount, "--rw=read", "--verify_only"))
        call(mount, "begin", rate=1 << 40)
        wait_for(lambda: ended(mount), "another rekey comes to its end")
        finished(fio(mount, "--rw=read", "--verify_only"))
        mount.unmount()
    new = identity_of(place)
    assert len(new.wrapped_keys) == 1
    assert new.key_generation > rekeys
    assert new.key_generation != old.key_generation
    with _reference(place / "state", place / "source" / "disk.sealed") as report:
        assert report.errors == []
        # Key generations of all superblocks, identities, epochs, nodes, leaves and blocks.
        assert {generation for generation, _ in report.found} == {new.key_generation}
        assert report.found[new.key_generation, "identities"] == 2
    raw = (place / "source" / "disk.sealed").read_bytes()
    assert not any(wrapped in raw for _, wrapped in old.wrapped_keys)
    assert writer.written > KILLS


def test_a_mount_goes_on_by_itself_once_the_image_is_in_use(place: Path) -> None:
    with mount_of(place) as mount:
        path = mount.mountpoint / "disk"
        path.write_bytes(os.urandom(8 * MIB))
        call(mount, "begin", rate=MIB)
        mount.unmount()
    assert identity_of(place).new_generation == 2
    with mount_of(place) as mount:
        with pytest.raises(NotFound, match="is not in use here"):
            call(mount, "status")
        with path.open("rb"):
            wait_for(lambda: ended(mount), "the rekey goes on and ends")
        assert "the rekey goes on" in mount.log_text()
        assert "nothing is under the old image key any more" in mount.log_text()
        mount.unmount()
    assert identity_of(place).key_generation == 2


def test_a_rekey_is_paused_and_goes_on(place: Path) -> None:
    content = os.urandom(8 * MIB)
    with mount_of(place) as mount:
        path = mount.mountpoint / "disk"
        path.write_bytes(content)
        found = call(mount, "begin", rate=4 * MIB)
        assert found["is_rekeying"]
        wait_for(lambda: call(mount, "status")["done"] > 0, "a part is done")
        assert call(mount, "status")["seconds_left"] is not None
        call(mount, "pause")
        wait_for(lambda: not call(mount, "status")["is_running"], "it stops")
        done = call(mount, "status")["done"]
        time.sleep(1.5)  # as long as the mount takes to look for something to do
        assert call(mount, "status")["done"] == done > 0
        call(mount, "begin", rate=1 << 40)
        wait_for(lambda: ended(mount), "the rekey comes to its end")
        assert path.read_bytes()[: len(content)] == content


def test_an_image_that_is_only_read_is_not_rekeyed(place: Path) -> None:
    with mount_of(place) as mount:
        (mount.mountpoint / "disk").write_bytes(os.urandom(4 * MIB))
        call(mount, "begin", rate=MIB)
        mount.unmount()
    with mount_of(place, "ro") as mount:
        with (mount.mountpoint / "disk").open("rb") as file:
            assert len(file.read(MIB)) == MIB
            time.sleep(1.5)
            assert not call(mount, "status")["is_running"]
        with pytest.raises(ReadOnly):
            call(mount, "begin", rate=MIB)
    assert identity_of(place).new_generation == 2


def test_what_makes_no_sense_is_refused(place: Path) -> None:
    with mount_of(place) as mount, (mount.mountpoint / "disk").open("rb"):
        for action, more in (("begin", {"rate": 0}), ("begin", {"rate": "1"}), ("sing", {})):
            with pytest.raises(UsageError):
                call(mount, action, **more)
        assert ended(mount)


def test_a_key_service_that_says_no_leaves_the_image_as_it_is(place: Path) -> None:
    with mount_of(place) as mount, (mount.mountpoint / "disk").open("rb"):
        (place / "state" / "refused").write_text("disk")
        before = identity_of(place)
        with pytest.raises(Exception, match="revoked"):
            call(mount, "begin", rate=MIB)
        assert identity_of(place) == before
        (place / "state" / "refused").unlink()
        keys = TinyKeys(place / "state")
        with contextlib.closing(keys):
            call(mount, "begin", rate=1 << 40)
        wait_for(lambda: ended(mount), "the rekey comes to its end")
