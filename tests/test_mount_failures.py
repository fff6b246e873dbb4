"""What goes wrong with one image or the daemon harms nothing else and loses nothing."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from exerciser_files import LiveMount
from kills import besiege, seal_all
from mount_support import ROOT, mounted, open_offline, seal_new, wait_for

from sealfs.control import call
from sealfs.errors import Busy, NotFound, StorageFailed, UsageError
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.recovery import peek
from sealfs.image.storage import FileStorage
from sealfs.image.volume import FENCE_AGE
from sealfs.mount import daemon, kernel, session
from sealfs.mount.control import find_mount
from sealfs.mount.options import MountOptions

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

SIZE = 8 << 20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    for name in ("good", "bad"):
        seal_new(tmp_path / "state", directory / f"{name}.raw.sealed", vm_id=name, size=SIZE)
    return directory


def errno_of_open(path: Path, flags: int = os.O_RDWR) -> int:
    try:
        os.close(os.open(path, flags))
    except OSError as exc:
        return exc.errno or -1
    return 0


def damage(source: Path) -> None:
    with open(source / "bad.raw.sealed", "r+b") as file:
        for offset in (0, 256 * BLOCK_SIZE):
            file.seek(offset)
            file.write(bytes(512))


def truncate(source: Path) -> None:
    os.truncate(source / "bad.raw.sealed", 100_000)


def write_rubbish(source: Path) -> None:
    (source / "bad.raw.sealed").write_bytes(b"no image at all" * 1000)


def exchange(source: Path) -> None:
    other = source.parent / "elsewhere.sealed"
    seal_new(source.parent / "state", other, vm_id="elsewhere", size=SIZE)
    other.rename(source / "bad.raw.sealed")


def move(source: Path) -> None:
    seal_new(source.parent / "state", source / "was.sealed", vm_id="was", size=SIZE)
    (source / "was.sealed").rename(source / "bad.raw.sealed")


def refuse_key(source: Path) -> None:
    (source.parent / "state" / "refused").write_text("bad")


@pytest.mark.parametrize("lane", ["on", "off"])
@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        (damage, errno.EIO, "FormatError"),
        (truncate, errno.EIO, ""),
        (write_rubbish, errno.EIO, "FormatError"),
        (exchange, errno.ESTALE, "ForeignImage"),
        (move, errno.ESTALE, "ForeignImage"),
        (refuse_key, errno.EACCES, "KeyRefused: revoked"),
    ],
)
def test_an_image_that_cannot_be_opened_fails_alone(
    source: Path, harm: Callable[[Path], None], code: int, words: str, lane: str
) -> None:
    whole = (source / "bad.raw.sealed").read_bytes()
    harm(source)
    with mounted(source, source.parent / "mnt", options=f"lane={lane}") as mount:
        bad, good = mount.mountpoint / "bad.raw", mount.mountpoint / "good.raw"
        assert errno_of_open(bad) == code
        good.write_bytes(b"fine")
        assert sorted(os.listdir(mount.mountpoint)) == ["bad.raw", "good.raw"]
        assert f'image="{source}/bad.raw.sealed"' in mount.log_text()
        assert words in mount.log_text()
        # Mended, it opens at the next try.
        (source.parent / "state" / "refused").unlink(missing_ok=True)
        (source / "bad.raw.sealed").write_bytes(whole)
        assert errno_of_open(bad) == 0
        assert good.read_bytes()[:4] == b"fine"


def test_a_path_nobody_registered_is_foreign(source: Path) -> None:
    (source / "bad.raw.sealed").rename(source / "new.raw.sealed")
    with mounted(source, source.parent / "mnt") as mount:
        assert errno_of_open(mount.mountpoint / "new.raw") == errno.ESTALE
        assert "is not registered under this path: it was moved" in mount.log_text()
        assert 'vm="bad"' in mount.log_text()


@pytest.mark.parametrize("lane", ["on", "off"])
def test_a_damaged_block_is_eio_once_in_the_log_and_the_others_are_fine(
    source: Path, lane: str
) -> None:
    image = open_offline(source.parent / "state", source / "bad.raw.sealed")
    image.write(0, b"w" * (3 * BLOCK_SIZE))
    image.close()
    storage = FileStorage.peek(source / "bad.raw.sealed")
    geometry = peek(storage).geometry
    storage.close()
    with open(source / "bad.raw.sealed", "r+b") as file:
        count = geometry.slot_count_of(os.fstat(file.fileno()).st_size)
        for slot in range(count):
            file.seek(geometry.block_offset(slot, 1))
            damaged = bytes(byte ^ 1 for byte in file.read(8))
            file.seek(geometry.block_offset(slot, 1))
            file.write(damaged)
    with mounted(source, source.parent / "mnt", options=f"lane={lane}") as mount:
        fd = os.open(mount.mountpoint / "bad.raw", os.O_RDWR | os.O_DIRECT)
        for _ in range(3):
            with pytest.raises(OSError, match="Input/output"):
                os.pread(fd, BLOCK_SIZE, BLOCK_SIZE)
        assert os.pread(fd, 10, 0) == os.pread(fd, 10, 2 * BLOCK_SIZE) == b"w" * 10
        assert os.pwrite(fd, b"n" * BLOCK_SIZE, BLOCK_SIZE) == BLOCK_SIZE  # overwritten: mended
        os.fsync(fd)
        assert os.pread(fd, 4, BLOCK_SIZE) == b"nnnn"
        os.close(fd)
        assert mount.log_text().count("block=1 BlockDamaged") == 1
        assert 'vm="bad"' in mount.log_text()


def test_the_second_opener_gets_ebusy_and_its_mount_goes_on(source: Path) -> None:
    with (
        mounted(source, source.parent / "first", options="idle=0.2") as first,
        mounted(source, source.parent / "second", options="lock=0.3") as second,
    ):
        with open(first.mountpoint / "bad.raw", "rb"):
            start = time.monotonic()
            assert errno_of_open(second.mountpoint / "bad.raw") == errno.EBUSY
            assert time.monotonic() - start >= 0.3
            assert errno_of_open(second.mountpoint / "good.raw") == 0
        # Closed when idle, keys dropped: the other may have it.
        wait_for(lambda: not first.status()["images"], "the first mount closes the idle image")
        assert errno_of_open(second.mountpoint / "bad.raw") == 0


def test_an_image_that_another_process_lets_go_of_is_waited_for(source: Path) -> None:
    """`umount` returns before the daemon has closed its images; the next mount opens them."""
    with mounted(source, source.parent / "mnt", options="lock=20") as mount:
        with contextlib.closing(FileStorage.open(source / "good.raw.sealed")):
            opening = threading.Thread(target=errno_of_open, args=(mount.mountpoint / "good.raw",))
            opening.start()
            # The other VM's disk is not held up.
            assert errno_of_open(mount.mountpoint / "bad.raw") == 0
            time.sleep(0.2)
            assert opening.is_alive()
        opening.join(10)
        assert errno_of_open(mount.mountpoint / "good.raw") == 0
        assert "in use" not in mount.log_text()


@pytest.mark.parametrize("lane", ["on", "off"])
def test_a_bug_in_one_request_does_not_end_the_mount(source: Path, lane: str) -> None:
    options = f"lane={lane}"
    bug = source.parent / "state" / "bug"
    with mounted(source, source.parent / "mnt", options=options, traceback_expected=True) as mount:
        bug.touch()  # the stand-in for the key service raises ValueError
        assert errno_of_open(mount.mountpoint / "good.raw") == errno.EIO
        bug.unlink()
        assert errno_of_open(mount.mountpoint / "good.raw") == 0


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    """Writers are cut short; each block is its last acknowledged version or a later one."""
    mount = LiveMount(tmp_path, lane=True, options="")
    seal_all(mount.state, mount.source, 1)
    figures = besiege(mount, random.Random(4), 6, images=1)
    assert figures["kills"] == 6
    assert min(figures[name] for name in ("writes", "syncs", "synchronous writes")) > 20


@pytest.mark.parametrize("lane", ["on", "off"])
@pytest.mark.parametrize("ending", ["close", "abandon"])
def test_a_daemon_that_slept_while_another_wrote_stops_at_the_fence(
    source: Path, monkeypatch: pytest.MonkeyPatch, ending: str, lane: str
) -> None:
    """Its lock is gone when it wakes, as on a network file system after an outage."""
    unlocked = classmethod(lambda cls, fd, path, kind: cls(fd, path))
    monkeypatch.setattr(FileStorage, "_locked", unlocked)  # this process's alone
    sealed = source / "good.raw.sealed"
    with mounted(source, source.parent / "mnt", options=f"lane={lane},commit=60") as mount:
        fd = os.open(mount.mountpoint / "good.raw", os.O_RDWR)
        os.pwrite(fd, b"first", 0)
        os.fsync(fd)
        os.pwrite(fd, b"first", BLOCK_SIZE)
        mount.process.send_signal(signal.SIGSTOP)
        try:
            second = open_offline(mount.state, sealed)
            second.write(0, b"second")
            second.write(5 * BLOCK_SIZE, b"second")
            second.flush()
            getattr(second, ending)()
            before = sealed.read_bytes()
            time.sleep(2 * FENCE_AGE)
        finally:
            mount.process.send_signal(signal.SIGCONT)
        try:
            with pytest.raises(OSError, match="Input/output error"):
                os.fsync(fd)
            with pytest.raises(OSError, match="Input/output error"):
                os.pwrite(fd, b"again", 2 * BLOCK_SIZE)
        finally:
            with contextlib.suppress(OSError):
                os.close(fd)
        said = "StorageFailed: somebody else has opened and written this image"
        assert mount.log_text().count(said) == 1
        mount.unmount()
    assert sealed.read_bytes() == before, "nothing is written over what the second wrote"
    image = open_offline(source.parent / "state", sealed)
    assert [bytes(image.read(block * BLOCK_SIZE, 6)) for block in (0, 5)] == [b"second"] * 2
    assert image.check(data=True) == []
    image.close()


def test_opening_again_and_again_keeps_no_memory(source: Path) -> None:
    """Each open reads a journal of 16 MiB; what it took goes back to the system."""
    with mounted(source, source.parent / "mnt") as mount:
        (mount.mountpoint / "made.raw").write_bytes(bytes(100_000))
        (control,) = mount.run_dir.glob("*.sock")

        def resident() -> int:
            (line,) = (
                line
                for line in Path(f"/proc/{mount.process.pid}/status").read_text().splitlines()
                if line.startswith("VmRSS:")
            )
            return int(line.split()[1]) << 10

        sizes = []
        for _ in range(40):
            with open(mount.mountpoint / "made.raw", "rb") as file:
                file.read(1)
            call(control, "close")
            sizes.append(resident())
        assert sizes[-1] < sizes[4] + (32 << 20), sizes


def drop_page_cache(path: Path) -> None:
    """Have the kernel forget the ciphertext it has in memory."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_blocks_that_are_in_no_memory_are_read_by_many_at_once(source: Path) -> None:
    """Workers answer them; meanwhile others write, and one block is damaged."""
    count, sealed = 4096, source / "good.raw.sealed"
    with mounted(source, source.parent / "mnt", options="cache=4M") as mount:
        path = mount.mountpoint / "good.raw"
        content = random.Random(7).randbytes(count * BLOCK_SIZE)
        path.write_bytes(content)
        (control,) = mount.run_dir.glob("*.sock")
        call(control, "flush")
        drop_page_cache(sealed)
        wrong: list[int] = []

        def read_all(seed: int) -> None:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            buffer = mmap.mmap(-1, BLOCK_SIZE)
            for block in random.Random(seed).sample(range(count), count):
                os.preadv(fd, [buffer], block * BLOCK_SIZE)
                if buffer[:] != content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]:
                    wrong.append(block)
            buffer.close()
            os.close(fd)

        readers = [threading.Thread(target=read_all, args=(seed,)) for seed in range(8)]
        for reader in readers:
            reader.start()
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
        page = mmap.mmap(-1, BLOCK_SIZE)
        for round_ in range(6):  # the same content again: new ciphertext under old entries
            for block in range(round_, count, 37):
                page[:] = content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
                os.pwritev(fd, [page], block * BLOCK_SIZE)
            os.fsync(fd)
            drop_page_cache(sealed)
        os.close(fd)
        for reader in readers:
            reader.join()
        assert wrong == []
        assert "ERROR" not in mount.log_text().upper()


def test_a_damaged_block_that_is_in_no_memory_is_an_error_and_its_neighbours_are_not(
    source: Path,
) -> None:
    sealed = source / "good.raw.sealed"
    content = random.Random(8).randbytes(64 * BLOCK_SIZE)
    with mounted(source, source.parent / "mnt") as mount:
        (mount.mountpoint / "good.raw").write_bytes(content)
    raw = bytearray(sealed.read_bytes())
    image = open_offline(source.parent / "state", sealed)
    home = image._volume.geometry.block_offset(image._volume.tree.slot_of(0), 33)
    image.abandon()
    raw[home + 5] ^= 1
    sealed.write_bytes(raw)
    with mounted(source, source.parent / "mnt", options="cache=4M") as mount:
        fd = os.open(mount.mountpoint / "good.raw", os.O_RDONLY | os.O_DIRECT)
        page = mmap.mmap(-1, BLOCK_SIZE)
        os.preadv(fd, [page], 0)  # the leaf page is in memory from here on
        drop_page_cache(sealed)
        for block in (32, 34):
            os.preadv(fd, [page], block * BLOCK_SIZE)
            assert page[:] == content[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
        with pytest.raises(OSError, match="Input/output error"):
            os.preadv(fd, [page], 33 * BLOCK_SIZE)
        os.close(fd)
        assert "block=33" in mount.log_text()


def test_unmount_returns_when_the_images_are_clean(source: Path) -> None:
    with mounted(source, source.parent / "mnt") as mount:
        data = os.urandom(4 << 20)
        with open(mount.mountpoint / "good.raw", "r+b") as file:
            file.write(data)
            with pytest.raises(Busy, match=rf"\({os.getpid()}\)"):
                session.unmount(mount.mountpoint, run_dir=mount.run_dir)
        session.unmount(mount.mountpoint, run_dir=mount.run_dir)
        image = open_offline(mount.state, source / "good.raw.sealed")  # not Busy
        assert image.status()["journal_used_pages"] == 0
        assert bytes(image.read(0, len(data))) == data
        image.close()
        assert mount.process.wait(10) == 0
        assert not list(mount.run_dir.glob("*.sock"))
    with pytest.raises(NotFound):
        session.unmount(source.parent / "mnt", run_dir=source.parent / "run")


@pytest.mark.parametrize("lane", ["on", "off"])
def test_a_signal_ends_the_mount_cleanly_even_under_open_files(source: Path, lane: str) -> None:
    with mounted(source, source.parent / "mnt", options=f"lane={lane}") as mount:
        fd = os.open(mount.mountpoint / "good.raw", os.O_RDWR)
        os.pwrite(fd, b"kept", 0)
        mount.process.send_signal(signal.SIGTERM)
        assert mount.process.wait(20) == 0
        with pytest.raises(OSError, match=r"not connected|abort"):
            os.pread(fd, 10, 0)
        with contextlib.suppress(OSError):
            os.close(fd)
        assert kernel.mounted_at(str(mount.mountpoint)) is None
    image = open_offline(source.parent / "state", source / "good.raw.sealed")
    assert bytes(image.read(0, 4)) == b"kept"
    image.close()


def test_the_control_socket(source: Path) -> None:
    with mounted(source, source.parent / "mnt") as mount:
        path = mount.mountpoint / "good.raw"
        for place in (mount.mountpoint, path, source, source / "good.raw.sealed"):
            found = find_mount(place, mount.run_dir)
            assert found is not None
            assert found.status["pid"] == mount.process.pid
        assert find_mount(source.parent, mount.run_dir) is None
        assert found is not None
        assert found.socket_path.stat().st_mode & 0o777 == 0o600
        with open(path, "r+b") as file:
            file.write(b"x")
            file.flush()
            (image,) = mount.status()["images"]
            assert (image["vm_id"], image["handles"]) == ("good", 1)
            assert image["dirty"] > 0
            assert found.call("flush", path=str(path))["flushed"]
            assert mount.status()["images"][0]["dirty"] == 0
            assert found.call("close")["in_use"] == [str(source / "good.raw.sealed")]
        wait_for(lambda: found.call("close")["closed"] or not mount.status()["images"], "close")
        assert mount.status()["images"] == []
        with pytest.raises(UsageError, match="unknown verb"):
            found.call("explode")
        with pytest.raises(NotFound):
            call(mount.run_dir / "none.sock", "status")


def test_unflushed_writes_are_committed_by_the_timer(source: Path) -> None:
    with mounted(source, source.parent / "mnt", options="commit=0.3") as mount:
        fd = os.open(mount.mountpoint / "good.raw", os.O_RDWR)
        os.pwrite(fd, b"timer", 0)
        time.sleep(0.05)
        wait_for(lambda: mount.status()["images"][0]["dirty"] == 0, "commit by the timer")
        copy = source.parent / "copy.sealed"
        shutil.copy(source / "good.raw.sealed", copy)
        os.close(fd)
    image = open_offline(source.parent / "state", copy, source / "good.raw.sealed")
    assert bytes(image.read(0, 5)) == b"timer"
    image.close()


def test_a_small_dirty_cache_throttles_and_loses_nothing(source: Path) -> None:
    data = os.urandom(SIZE)
    with mounted(source, source.parent / "mnt", options="dirty=4M,cache=4M") as mount:
        for name in ("good.raw", "bad.raw"):
            with open(mount.mountpoint / name, "r+b", buffering=0) as file:
                for offset in range(0, SIZE, 1 << 20):
                    file.write(data[offset : offset + (1 << 20)])
        assert mount.status()["dirty"] <= 4 << 20
        for name in ("good.raw", "bad.raw"):
            assert (mount.mountpoint / name).read_bytes() == data


def test_read_only_and_create_no(source: Path) -> None:
    with mounted(source, source.parent / "mnt", options="ro") as mount:
        assert errno_of_open(mount.mountpoint / "good.raw", os.O_RDONLY) == 0
        assert errno_of_open(mount.mountpoint / "good.raw", os.O_RDWR) == errno.EROFS
        assert errno_of_open(mount.mountpoint / "n", os.O_RDWR | os.O_CREAT) == errno.EROFS
        assert (mount.mountpoint / "good.raw").read_bytes() == bytes(SIZE)
    with mounted(source, source.parent / "mnt", options="create=no") as mount:
        assert errno_of_open(mount.mountpoint / "n", os.O_RDWR | os.O_CREAT) == errno.EPERM


def test_no_core_dump_and_not_traceable(source: Path) -> None:
    with mounted(source, source.parent / "mnt") as mount:
        limits = Path(f"/proc/{mount.process.pid}/limits").read_text()
        assert "Max core file size        0                    0" in limits
        mount.process.send_signal(signal.SIGSEGV)
        _, status = os.waitpid(mount.process.pid, 0)
        mount.process.returncode = -os.WTERMSIG(status)
        assert not os.WCOREDUMP(status)
        subprocess.run(["umount", "-l", mount.mountpoint], check=True)
    program = (
        "import ctypes; from sealfs.keys import hardening; hardening.harden();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout == b"0\n"


def test_places_that_cannot_be_mounted(source: Path, tmp_path: Path) -> None:
    inside = source / "inside"
    inside.mkdir()
    for mountpoint in (source, inside, tmp_path):
        with pytest.raises(UsageError, match="contain"):
            session.check_places(source, mountpoint)
    with pytest.raises(NotFound):
        session.check_places(source, tmp_path / "none")
    with pytest.raises(NotFound):
        session.check_places(tmp_path / "none", source)
    with pytest.raises(UsageError, match="directory"):
        session.check_places(source, source / "good.raw.sealed")
    with mounted(source, tmp_path / "mnt") as mount, pytest.raises(Busy, match="already mounted"):
        session.check_places(source, mount.mountpoint)


def test_daemon_reports_ready_and_its_own_error(source: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    mountpoint.mkdir()
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from mount_support import TinyKeys
from sealfs.errors import HostNotInitialised
from sealfs.mount.options import MountOptions
from sealfs.mount.session import mount_directory
def keys():
    if "fail" in sys.argv:
        raise HostNotInitialised("state", "run init first")
    return TinyKeys(Path({str(tmp_path / "state")!r}))
try:
    status = mount_directory(Path({str(source)!r}), Path({str(mountpoint)!r}), keys=keys,
        options=MountOptions.parse("", is_root=True), log_file=Path({str(tmp_path / "log")!r}),
        run_dir=Path({str(tmp_path / "run")!r}))
except Exception as exc:
    print(type(exc).__name__, exc)
    status = 7
sys.exit(status)
"""
    arguments = [sys.executable, "-c", program]
    failed = subprocess.run(
        [*arguments, "fail"], cwd=ROOT, capture_output=True, timeout=30, check=False
    )
    assert failed.returncode == 7
    assert failed.stdout == b'HostNotInitialised "state": run init first\n'
    assert kernel.mounted_at(str(mountpoint)) is None
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=30, check=False)
    assert done.returncode == 0, done
    try:
        assert (mountpoint / "good.raw").read_bytes() == bytes(SIZE)
        found = find_mount(mountpoint, tmp_path / "run")
        assert found is not None
        pid = found.status["pid"]
        assert os.readlink(f"/proc/{pid}/fd/1") == "/dev/null"
        assert os.getsid(pid) != os.getsid(0)
    finally:
        session.unmount(mountpoint, run_dir=tmp_path / "run")
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the daemon's end")


def test_options_are_parsed_and_unknown_ones_named() -> None:
    options = MountOptions.parse(
        ["cache=1G,dirty=8M", 'lane=off,context="a:b:c:s0,c1",ro,nosuid,x-systemd.automount'],
        is_root=True,
    )
    assert (options.cache_size, options.dirty_size) == (1 << 30, 8 << 20)
    assert (options.lane, options.read_only, options.allow_other) == (False, True, True)
    assert options.labels == ('context="a:b:c:s0,c1"',)
    assert not MountOptions.parse("noallow_other", is_root=True).allow_other
    assert not MountOptions.parse("", is_root=False).allow_other
    for wrong in (
        "cash=1G",
        "cache=much",
        "lane=perhaps",
        "dirty=1K",
        "mode=999",
        "cache",
        "idle=x",
    ):
        with pytest.raises(UsageError, match=wrong.partition("=")[0]):
            MountOptions.parse(wrong, is_root=True)


def test_mounting_by_fusermount3_as_an_ordinary_user_does(source: Path) -> None:
    if shutil.which("fusermount3") is None:
        pytest.fail("fusermount3 is not installed; run: tools/setup")
    with mounted(source, source.parent / "mnt", helper=True) as mount:
        there = kernel.mounted_at(str(mount.mountpoint))
        assert there is not None
        assert there.fstype == kernel.FSTYPE
        (mount.mountpoint / "good.raw").write_bytes(b"user")
        assert (mount.mountpoint / "good.raw").read_bytes() == b"user"
        subprocess.run(["fusermount3", "-u", mount.mountpoint], check=True)
        assert mount.process.wait(20) == 0


def test_a_daemon_that_dies_silently_is_an_error() -> None:
    with pytest.raises(StorageFailed, match="before it was ready"):
        daemon.detach("/mnt", lambda ready: 3)
