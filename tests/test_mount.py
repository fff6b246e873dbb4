"""A live mount behaves as a file system for VM disks, with the lane and without it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mount_support import Mounted, mounted, open_offline, seal_new, wait_for

from sealfs.errors import NotFound, UsageError
from sealfs.mount.control import find_mount

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

SIZE = 48 << 20
LANES = ("on", "off")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(fd: int, mode: int, offset: int, size: int) -> int:
    """Return 0 or the errno."""
    return 0 if _libc.fallocate(fd, mode, offset, size) == 0 else ctypes.get_errno()


@pytest.fixture(scope="module", params=LANES)
def mount(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    base = tmp_path_factory.mktemp(f"lane-{request.param}")
    source = base / "source"
    (source / "100").mkdir(parents=True)
    seal_new(base / "state", source / "disk.raw.sealed", vm_id="disk", size=SIZE)
    seal_new(base / "state", source / "100" / "disk.raw.sealed", vm_id="100/disk", size=4096)
    seal_new(base / "state", base / "elsewhere.sealed", vm_id="200/disk", size=4096)
    (source / "forgotten.raw").write_text("plaintext")
    with mounted(source, base / "mnt", options=f"lane={request.param}") as found:
        found.lane = request.param  # type: ignore[attr-defined]
        yield found


@pytest.fixture
def disk(mount: Mounted) -> Path:
    return mount.mountpoint / "disk.raw"


def has_lane(mount: Mounted) -> bool:
    return mount.lane == "on"  # type: ignore[attr-defined]


def test_only_sealed_files_and_directories_are_shown(mount: Mounted) -> None:
    root = mount.mountpoint
    assert {"100", "disk.raw"} <= set(os.listdir(root))
    assert "forgotten.raw" not in os.listdir(root)
    assert not (root / "forgotten.raw").exists()
    assert os.listdir(root / "100") == ["disk.raw"]
    assert (root / "100" / "disk.raw").stat().st_size == 4096
    assert "forgotten.raw" in mount.log_text()


def test_attributes_are_those_of_the_sealed_file_with_the_plain_size(
    mount: Mounted, disk: Path
) -> None:
    sealed = mount.source / "disk.raw.sealed"
    found, beneath = disk.stat(), sealed.stat()
    assert found.st_size == SIZE
    assert found.st_ino == beneath.st_ino
    assert found.st_mode == stat.S_IFREG | 0o600
    os.chmod(disk, 0o640)
    os.chown(disk, 1234, 2345)
    os.utime(disk, ns=(10**18, 2 * 10**18))
    beneath = sealed.stat()
    assert stat.S_IMODE(beneath.st_mode) == 0o640
    assert (beneath.st_uid, beneath.st_gid) == (1234, 2345)
    assert beneath.st_mtime_ns == 2 * 10**18
    assert disk.stat().st_mtime_ns == 2 * 10**18
    os.chown(disk, 0, 0)


def test_odd_offsets_and_sizes(disk: Path) -> None:
    rng = random.Random(1)
    expected = bytearray(SIZE)
    fd = os.open(disk, os.O_RDWR)
    try:
        for _ in range(300):
            size = rng.choice((1, 5, 511, 512, 4095, 4096, 4097, 70_001, 1 << 20))
            offset = rng.randrange(SIZE - size)
            if rng.random() < 0.6:
                data = rng.randbytes(size)
                assert os.pwrite(fd, data, offset) == size
                expected[offset : offset + size] = data
            else:
                assert os.pread(fd, size, offset) == expected[offset : offset + size]
            if rng.random() < 0.05:
                os.fsync(fd)
        assert os.pread(fd, 100, SIZE - 10) == expected[-10:]
        assert os.pread(fd, 100, SIZE + 10) == b""
    finally:
        os.close(fd)
    assert disk.read_bytes() == expected


def test_direct_io_at_any_alignment(disk: Path) -> None:
    rng = random.Random(2)
    expected = bytearray(disk.read_bytes())
    fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
    room = mmap.mmap(-1, 2 << 20)
    try:
        for size, offset in (
            (1, 0),
            (512, 512),
            (777, 33),
            (4096, 4096),
            (1 << 20, 8192),
            (9, 4093),
        ):
            for shift in (0, 3):
                data = rng.randbytes(size)
                view = memoryview(room)[shift : shift + size]
                view[:] = data
                assert os.pwritev(fd, [view], offset) == size
                expected[offset : offset + size] = data
                view[:] = bytes(size)
                assert os.preadv(fd, [view], offset) == size
                assert view == data
                view.release()
    finally:
        os.close(fd)
    assert disk.read_bytes() == expected


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_long_writes_with_all_else_between_them(mount: Mounted, disk: Path, flags: int) -> None:
    """After a long one the next request is received into frames, whatever it is."""
    rng, memory = random.Random(6), mmap.mmap(-1, 1 << 20)
    model = bytearray(disk.read_bytes()[: 8 << 20])
    fd = os.open(disk, os.O_RDWR | flags)
    for _ in range(120):
        size = rng.choice((1 << 20, 1 << 20, 512 << 10, 128 << 10, 64 << 10, 4096, 512))
        offset = rng.randrange(0, len(model) - size, 512)
        if rng.random() < 0.8:
            offset = offset // 4096 * 4096
        memory[:size] = rng.randbytes(size)
        assert os.pwritev(fd, [memoryview(memory)[:size]], offset) == size
        model[offset : offset + size] = memory[:size]
        between = rng.randrange(8)
        if between == 0:
            os.fsync(fd)
        elif between == 1:
            os.stat(disk)
            with contextlib.suppress(OSError):
                os.setxattr(disk, "user.any", os.urandom(3000))
        elif between == 2:
            at = rng.randrange(0, len(model), 4096)
            assert os.preadv(fd, [memoryview(memory)[:4096]], at) == 4096
            assert memory[:4096] == model[at : at + 4096]
        elif between == 3 and has_lane(mount):
            at = rng.randrange(0, len(model) // 2, 4096)
            assert fallocate(fd, 0x03, at, 300_000) == 0
            model[at : at + 300_000] = bytes(300_000)
    os.fsync(fd)
    for at in range(0, len(model), 1 << 20):
        assert os.preadv(fd, [memory], at) == 1 << 20
        assert memory[:] == model[at : at + (1 << 20)]
    os.close(fd)
    assert disk.read_bytes()[: len(model)] == model


def test_shared_and_private_mappings(disk: Path) -> None:
    with open(disk, "r+b") as file:
        with mmap.mmap(file.fileno(), 1 << 20) as shared:
            shared[4090:4100] = b"0123456789"
            shared.flush()
        with mmap.mmap(file.fileno(), 1 << 20, access=mmap.ACCESS_COPY) as private:
            assert private[4090:4100] == b"0123456789"
            private[4090:4100] = b"xxxxxxxxxx"
        assert os.pread(file.fileno(), 10, 4090) == b"0123456789"


def test_a_mapping_is_written_back_through_a_direct_handle(disk: Path) -> None:
    """The kernel writes pages back through any handle, with the pages locked meanwhile."""
    script = """if True:
        import mmap, os, sys
        direct = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
        mapping = mmap.mmap(direct, 8192)
        buffered = os.open(sys.argv[1], os.O_RDONLY)
        for number in range(20):
            mapping[:5] = b"%05d" % number
            mapping.flush()
            assert os.pread(buffered, 5, 0) == b"%05d" % number
    """
    # In a process of its own: where this goes wrong, it cannot even be killed.
    process = subprocess.Popen([sys.executable, "-c", script, disk])
    assert process.wait(timeout=20) == 0


def test_append_truncate_grow_and_shrink(mount: Mounted) -> None:
    path = mount.mountpoint / "grow.raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    assert os.fstat(fd).st_size == 0
    assert os.write(fd, b"a" * 5000) == 5000
    os.close(fd)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"b" * 5000)
    os.close(fd)
    assert path.read_bytes() == b"a" * 5000 + b"b" * 5000
    os.truncate(path, 4097)
    assert path.read_bytes() == b"a" * 4097
    os.truncate(path, 10_001)
    assert path.read_bytes() == b"a" * 4097 + bytes(10_001 - 4097)
    with open(path, "r+b") as file:
        file.truncate(3)
        file.truncate(9)
        assert file.read() == b"aaa" + bytes(6)
        os.pwrite(file.fileno(), b"far", 5 << 20)
        assert os.fstat(file.fileno()).st_size == (5 << 20) + 3
    assert path.read_bytes()[-4:] == b"\0far"
    with open(path, "wb") as file:  # O_TRUNC
        file.write(b"new")
    assert path.read_bytes() == b"new"
    path.unlink()
    assert not path.exists()
    assert not (mount.source / "grow.raw.sealed").exists()


def test_create_rename_and_remove_keep_the_registry_in_step(mount: Mounted) -> None:
    root, source = mount.mountpoint, mount.source
    (root / "vms").mkdir()
    (root / "vms" / "new.qcow2").write_bytes(b"content" * 1000)
    assert (source / "vms" / "new.qcow2.sealed").exists()
    assert stat.S_IMODE((source / "vms" / "new.qcow2.sealed").stat().st_mode) == 0o600
    os.rename(root / "vms" / "new.qcow2", root / "moved.img")
    assert (root / "moved.img").read_bytes() == b"content" * 1000
    os.rename(root / "moved.img", root / "vms" / "again.img")
    os.rename(root / "vms", root / "other")
    assert (root / "other" / "again.img").read_bytes() == b"content" * 1000
    # An open file follows too, and what replaces another removes it.
    with open(root / "other" / "again.img", "r+b") as file:
        os.rename(root / "other" / "again.img", root / "open.img")
        file.write(b"CONTENT")
        file.flush()
        os.fsync(file.fileno())
    (root / "victim.img").write_bytes(b"old")
    os.rename(root / "open.img", root / "victim.img")
    assert (root / "victim.img").read_bytes() == b"CONTENT" + b"content" * 999
    with pytest.raises(OSError, match=r"not empty|Is a directory"):
        os.rename(root / "victim.img", root / "100")
    (root / "victim.img").unlink()
    (root / "other").rmdir()
    with pytest.raises(OSError, match="not empty"):
        (root / "100").rmdir()


def test_names_that_cannot_be(mount: Mounted) -> None:
    root = mount.mountpoint
    with pytest.raises(FileNotFoundError):
        os.stat(root / "nothing")
    with pytest.raises(FileNotFoundError):
        os.stat(root / "disk.raw.sealed")
    with pytest.raises(OSError, match="too long") as caught:
        (root / ("n" * 250)).write_bytes(b"")
    assert caught.value.errno == errno.ENAMETOOLONG
    with pytest.raises(PermissionError):
        os.symlink("disk.raw", root / "link")
    with pytest.raises(PermissionError):
        os.link(root / "disk.raw", root / "link")
    with pytest.raises(FileExistsError):
        os.open(root / "disk.raw", os.O_CREAT | os.O_EXCL | os.O_RDWR)
    # A VM id that another path has: "200/disk" was made by a command, elsewhere.
    (root / "200").mkdir()
    with pytest.raises(FileExistsError):
        (root / "200" / "disk.qcow2").write_bytes(b"x")
    assert 'VM id "200/disk" belongs to' in mount.log_text()
    (root / "200").rmdir()
    # But what differs in the last suffix alone is the same VM's: a snapshot, another format.
    for name in ("disk.qcow2", "disk.snap1", "disk"):
        (root / "100" / name).write_bytes(b"x")
        (root / "100" / name).unlink()
    with pytest.raises(PermissionError):
        os.mkfifo(root / "pipe")
    with pytest.raises(NotADirectoryError):
        (root / "disk.raw").rmdir()
    with pytest.raises(IsADirectoryError):
        (root / "100").unlink()


def test_a_removed_file_lives_until_it_is_closed(mount: Mounted) -> None:
    path = mount.mountpoint / "short-lived.raw"
    sealed = mount.source / "short-lived.raw.sealed"
    path.write_bytes(b"first" * 100_000)
    with open(path, "r+b", buffering=0) as file, open(path, "rb") as reader:
        inode = os.fstat(file.fileno()).st_ino
        path.unlink()
        assert not path.exists()
        assert not sealed.exists()
        found = os.fstat(file.fileno())
        assert (found.st_nlink, found.st_size, found.st_ino) == (0, 500_000, inode)
        # Another file may have the name meanwhile.
        path.write_bytes(b"second")
        assert path.stat().st_ino != inode
        file.write(b"FIRST")
        os.fsync(file.fileno())
        file.truncate(600_000)
        os.fchmod(file.fileno(), 0o640)
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o640
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert reader.read() == b"FIRST" + b"first" * 99_999 + bytes(100_000)
        assert path.read_bytes() == b"second"
        # What an administrator saves it by, who removed a disk in use.
        saved = Path(f"/proc/self/fd/{file.fileno()}").read_bytes()
        assert saved == b"FIRST" + b"first" * 99_999 + bytes(100_000)
    wait_for(lambda: not deleted_files(mount), "the space of the removed file comes back")
    assert path.read_bytes() == b"second"
    path.unlink()


def deleted_files(mount: Mounted) -> list[str]:
    """Return the sealed files without a name that the daemon still has open."""
    found = []
    for fd in Path(f"/proc/{mount.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(fd))
    return [link for link in found if ".sealed (deleted)" in link]


def test_a_replaced_file_lives_until_it_is_closed(mount: Mounted) -> None:
    old, new = mount.mountpoint / "config", mount.mountpoint / "config.new"
    old.write_bytes(b"old")
    with open(old, "r+b", buffering=0) as file:
        for number in range(3):  # as editors do, again and again
            new.write_bytes(b"new %d" % number)
            os.rename(new, old)
            assert old.read_bytes() == b"new %d" % number
            assert file.seek(0) == 0
            assert file.read() == b"old"
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b" and longer")
        assert os.fstat(file.fileno()).st_size == len(b"old and longer")
    assert old.read_bytes() == b"new 2"
    wait_for(lambda: not deleted_files(mount), "the space of the replaced file comes back")
    old.unlink()


def test_a_file_made_without_opening_it(mount: Mounted) -> None:
    path = mount.mountpoint / "node.raw"
    os.mknod(path, stat.S_IFREG | 0o600)
    assert path.stat().st_size == 0
    os.truncate(path, 1 << 30)
    assert path.stat().st_size == 1 << 30
    path.unlink()


def test_resize_by_command_of_a_file_in_use_and_of_one_that_is_not(mount: Mounted) -> None:
    path = mount.mountpoint / "grow.raw"
    sealed = str(mount.source / "grow.raw.sealed")
    control = find_mount(path, mount.run_dir)
    assert control is not None
    with open(path, "w+b", buffering=0) as file:
        file.write(b"x" * 5000)
        assert control.call("resize", path=sealed, size=1 << 24) == {"size": 1 << 24}
        assert os.fstat(file.fileno()).st_size == 1 << 24  # at once, whatever the kernel caches
        assert os.pread(file.fileno(), 9000, 4990) == b"x" * 10 + bytes(8990)
        with pytest.raises(UsageError, match="has 16777216 bytes"):
            control.call("resize", path=sealed, size=100)
        assert control.call("resize", path=sealed, size=100, shrink=True) == {"size": 100}
        assert file.seek(0, os.SEEK_END) == 100
        file.truncate(200)
        assert os.pread(file.fileno(), 300, 0) == b"x" * 100 + bytes(100)
    control.call("close", path=sealed)
    assert sealed not in [image["path"] for image in mount.status()["images"]]
    assert control.call("resize", path=sealed, size=4097) == {"size": 4097}
    assert path.stat().st_size == 4097
    for wrong in ({"size": -1}, {"size": "5"}, {"size": 1 << 60}, {}):
        with pytest.raises(UsageError):
            control.call("resize", path=sealed, **wrong)
    for other in ("/etc/passwd", str(mount.source / "nothing.sealed"), str(mount.source)):
        with pytest.raises(NotFound):
            control.call("resize", path=other, size=5)
    path.unlink()


def test_holes_are_punched_zeroed_and_found(mount: Mounted, disk: Path) -> None:
    fd = os.open(disk, os.O_RDWR)
    try:
        if not has_lane(mount):
            assert fallocate(fd, 0x03, 0, 4096) == errno.EOPNOTSUPP
            return
        os.pwrite(fd, b"x" * (8 << 20), 0)
        os.fsync(fd)
        assert fallocate(fd, 0x03, 1000, 4 << 20) == 0  # PUNCH_HOLE | KEEP_SIZE
        content = os.pread(fd, 8 << 20, 0)
        end = 1000 + (4 << 20)
        assert content == b"x" * 1000 + bytes(4 << 20) + b"x" * ((8 << 20) - end)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 4096
        assert os.lseek(fd, 4096, os.SEEK_DATA) == end // 4096 * 4096
        assert fallocate(fd, 0x10, 5 << 20, 8192) == 0  # ZERO_RANGE
        assert os.pread(fd, 8194, (5 << 20) - 1) == b"x" + bytes(8192) + b"x"
        assert fallocate(fd, 0x11, SIZE - 4096, 8192) == 0  # ZERO_RANGE | KEEP_SIZE
        assert os.fstat(fd).st_size == SIZE
        assert fallocate(fd, 0x01, 20 << 20, 1 << 20) == 0  # KEEP_SIZE
        assert fallocate(fd, 0x01, SIZE, 1 << 20) == 0
        assert os.fstat(fd).st_size == SIZE
        assert fallocate(fd, 0, SIZE, 4096) == 0
        assert os.fstat(fd).st_size == SIZE + 4096
        assert fallocate(fd, 0x08, 0, 4096) == errno.EOPNOTSUPP  # COLLAPSE_RANGE
        os.ftruncate(fd, SIZE)
    finally:
        os.close(fd)


def test_space_comes_back_after_a_punch(mount: Mounted) -> None:
    if not has_lane(mount):
        return
    path = mount.mountpoint / "thin.raw"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(fd, os.urandom(16 << 20), 0)
    os.fsync(fd)
    before = (mount.source / "thin.raw.sealed").stat().st_blocks
    assert (
        subprocess.run(["fallocate", "-p", "-o", "0", "-l", "16M", path], check=False).returncode
        == 0
    )
    os.close(fd)
    found = find_mount(path, mount.run_dir)
    assert found is not None
    assert found.call("flush", path=str(path))["flushed"] == [str(mount.source / "thin.raw.sealed")]
    after = (mount.source / "thin.raw.sealed").stat().st_blocks
    assert (before - after) * 512 > 0.8 * (16 << 20)
    path.unlink()


@pytest.mark.parametrize("how", ["O_DSYNC", "O_SYNC", "O_DIRECT|O_DSYNC", "RWF_DSYNC", "fdatasync"])
def test_a_synchronous_write_is_durable_when_it_is_answered(
    mount: Mounted, disk: Path, how: str, tmp_path: Path
) -> None:
    """The sealed file as it is right after the answer opens elsewhere, with the data."""
    flags = sum(getattr(os, name) for name in how.split("|") if name.startswith("O_"))
    fd = os.open(disk, os.O_RDWR | flags)
    data = mmap.mmap(-1, 4096)
    data[:] = os.urandom(4096)
    try:
        os.pwritev(fd, [data], 12288, os.RWF_DSYNC if how == "RWF_DSYNC" else 0)
        if how == "fdatasync":
            os.fdatasync(fd)
        copy = tmp_path / "copy.sealed"
        shutil.copy(mount.source / "disk.raw.sealed", copy)
    finally:
        os.close(fd)
    image = open_offline(mount.state, copy, mount.source / "disk.raw.sealed")
    try:
        assert bytes(image.read(12288, 4096)) == data[:]
    finally:
        image.close()


def test_parallel_writers_and_readers(disk: Path) -> None:
    part = 2 << 20
    failures: list[str] = []

    def work(index: int) -> None:
        rng = random.Random(index)
        expected = bytearray(part)
        fd = os.open(disk, os.O_RDWR)
        os.pwrite(fd, expected, index * part)
        for _ in range(150):
            size = rng.randrange(1, 20_000)
            offset = rng.randrange(part - size)
            data = rng.randbytes(size)
            os.pwrite(fd, data, index * part + offset)
            expected[offset : offset + size] = data
            if rng.random() < 0.05:
                os.fdatasync(fd)
        if os.pread(fd, part, index * part) != expected:
            failures.append(f"part {index}")
        os.close(fd)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("engine", "direct", "depth"),
    [("psync", 0, 1), ("psync", 1, 1), ("libaio", 1, 16), ("io_uring", 1, 16), ("mmap", 0, 1)],
)
def test_fio_verifies(disk: Path, engine: str, direct: int, depth: int) -> None:
    if shutil.which("fio") is None:
        pytest.fail("fio is not installed; run: tools/setup")
    done = subprocess.run(
        [
            "fio", "--name=verify", f"--filename={disk}", f"--ioengine={engine}",
            f"--direct={direct}", f"--iodepth={depth}", "--rw=randwrite", "--bsrange=4k-64k",
            "--size=24m", "--io_size=24m", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1",
            "--fsync=64", "--randseed=7", "--allow_file_create=0",
        ],
        capture_output=True, text=True, check=False, cwd="/tmp",
    )  # fmt: skip
    if engine == "io_uring" and "Operation not permitted" in done.stderr + done.stdout:
        pytest.skip("io_uring is not permitted here")
    assert done.returncode == 0, done.stdout + done.stderr


def test_image_tools_work_on_it(mount: Mounted) -> None:
    if shutil.which("qemu-img") is None:
        pytest.fail("qemu-img is not installed; run: tools/setup")
    path = mount.mountpoint / "vm.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, "64M"], check=True)
    script = [
        "-c",
        "write -P 7 1M 64k",
        "-c",
        "discard 1M 32k",
        "-c",
        "flush",
        "-c",
        "read -P 7 1056k 32k",
    ]
    subprocess.run(["qemu-io", "-f", "qcow2", *script, path], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "check", "-q", path], check=True)
    path.unlink()


def test_statfs_is_that_of_the_storage(mount: Mounted) -> None:
    found, beneath = os.statvfs(mount.mountpoint), os.statvfs(mount.source)
    assert (found.f_blocks, found.f_bsize) == (beneath.f_blocks, beneath.f_bsize)
    assert found.f_namemax == 255 - len(".sealed")
