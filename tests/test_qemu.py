"""To QEMU a disk under the mount is a plain raw file: its tools, its locks, its block layer."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from guest_support import GuestProcess, assert_ext4_clean, build_guest_disk, prepared, run_guest
from mount_support import Mounted, mounted, open_offline, seal_new, wait_for
from qemu_support import Qmp, qemu_io, qemu_machine, run, short_directory, storage_daemon

from sealfs.image.recovery import peek
from sealfs.image.storage import FileStorage
from sealfs.mount.control import find_mount

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

MIB = 1 << 20
SIZE = 16 * MIB
RAW = ("-f", "raw")
QCOW2 = ("-f", "qcow2")


@dataclass
class Place:
    """A directory of a running mount, for one test."""

    mount: Mounted
    directory: Path
    outside: Path
    """A directory of plain files."""

    def __truediv__(self, name: str) -> Path:
        return self.directory / name

    def sealed(self, path: Path) -> Path:
        below = path.relative_to(self.mount.mountpoint)
        return self.mount.source / below.with_name(below.name + ".sealed")

    def sealed_size(self, path: Path) -> int:
        """Return the size of the disk that the sealed file itself tells, after a flush."""
        self.flush(path)
        with contextlib.closing(FileStorage.peek(self.sealed(path))) as storage:
            return peek(storage).size

    def allocated(self, path: Path) -> int:
        """Return the bytes that the sealed file takes on the storage, after a flush."""
        self.flush(path)
        return self.sealed(path).stat().st_blocks * 512

    def flush(self, path: Path) -> None:
        found = find_mount(path, self.mount.run_dir)
        assert found is not None
        found.call("flush", path=str(path))

    def content(self, path: Path, kind: str = "qcow2") -> bytes:
        """Return what the disk in an image file holds, by way of a plain file."""
        plain = self.outside / "content.raw"
        plain.unlink(missing_ok=True)
        run("qemu-img", "convert", "-f", kind, "-O", "raw", path, plain)
        return plain.read_bytes()


@pytest.fixture(scope="module", params=["on", "off"])
def mount(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    base = tmp_path_factory.mktemp(f"lane-{request.param}")
    (base / "source").mkdir()
    with mounted(base / "source", base / "mnt", options=f"lane={request.param}") as found:
        yield found


@pytest.fixture
def place(mount: Mounted, tmp_path: Path) -> Iterator[Place]:
    directory = mount.mountpoint / "disks"
    directory.mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    yield Place(mount, directory, outside)
    shutil.rmtree(directory)


with_lane = pytest.mark.parametrize("mount", ["on"], indirect=True)
"""Without the lane there is neither fallocate nor SEEK_HOLE."""


def has_lane(place: Place) -> bool:
    return "lane-on" in str(place.mount.mountpoint)


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def write_plain(path: Path, *parts: tuple[int, bytes], size: int = SIZE) -> bytes:
    """Make a raw disk with these parts, holes between them; return its content."""
    content = bytearray(size)
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in parts:
            file.seek(offset)
            file.write(data)
            content[offset : offset + len(data)] = data
    return bytes(content)


def info(path: Path, *options: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("qemu-img", "info", "--output=json", *options, path))
    return found


def qmap(path: Path) -> list[tuple[int, int, bool, bool]]:
    found = json.loads(run("qemu-img", "map", "--output=json", *RAW, path))
    return [(part["start"], part["length"], part["data"], part["zero"]) for part in found]


# qemu-img


@pytest.mark.parametrize("preallocation", ["off", "metadata", "falloc", "full"])
def test_a_qcow2_is_made_snapshotted_and_resized(place: Place, preallocation: str) -> None:
    path, twin = place / "vm.qcow2", place.outside / "twin.qcow2"
    for each in (path, twin):
        run("qemu-img", "create", "-q", *QCOW2, "-o", f"preallocation={preallocation}", each, "16M")
    assert path.stat().st_size == twin.stat().st_size
    assert run("qemu-img", "check", path) == run("qemu-img", "check", twin)
    if preallocation in ("falloc", "full"):
        assert path.stat().st_blocks * 512 >= SIZE
    first, second = bytearray(SIZE), bytearray()
    qemu_io(path, "write -P 17 1M 300k", "write -P 18 4000k 5k", options=QCOW2)
    first[MIB : MIB + (300 << 10)] = bytes([17]) * (300 << 10)
    first[4000 << 10 : 4005 << 10] = bytes([18]) * (5 << 10)
    assert place.content(path) == first

    run("qemu-img", "snapshot", "-c", "first", path)
    qemu_io(path, "write -P 19 1100k 2M", "discard 4000k 64k", "write -z 1M 64k", options=QCOW2)
    second[:] = first
    second[1100 << 10 : (1100 << 10) + 2 * MIB] = bytes([19]) * 2 * MIB
    second[MIB : MIB + (64 << 10)] = bytes(64 << 10)
    second[4000 << 10 : 4064 << 10] = bytes(64 << 10)
    found = bytearray(place.content(path))
    found[4000 << 10 : 4064 << 10] = bytes(64 << 10)  # a discard is a hint
    assert found == second
    run("qemu-img", "snapshot", "-c", "second", path)
    listed = run("qemu-img", "snapshot", "-l", path)
    assert "first" in listed
    assert "second" in listed
    run("qemu-img", "snapshot", "-a", "first", path)
    assert place.content(path) == first
    run("qemu-img", "snapshot", "-d", "first", path)
    run("qemu-img", "snapshot", "-d", "second", path)
    assert "first" not in run("qemu-img", "snapshot", "-l", path)
    assert place.content(path) == first

    run("qemu-img", "resize", "-q", path, "24M")
    qemu_io(path, "write -P 20 23M 1M", options=QCOW2)
    assert place.content(path) == first + bytes(7 * MIB) + bytes([20]) * MIB
    run("qemu-img", "resize", "-q", "--shrink", path, "8M")
    assert place.content(path) == first[: 8 * MIB]
    assert info(path)["virtual-size"] == 8 * MIB
    run("qemu-img", "check", "-q", path)
    assert place.sealed_size(path) == path.stat().st_size


def test_backing_files_commit_and_rebase(place: Place) -> None:
    """A chain of three, all under the mount, named relatively as libvirt does."""
    base, middle, top = (place / f"{name}.qcow2" for name in ("base", "middle", "top"))
    other = place / "other.qcow2"
    run("qemu-img", "create", "-q", *QCOW2, base, "16M")
    run("qemu-img", "create", "-q", *QCOW2, "-b", base.name, "-F", "qcow2", middle)
    run("qemu-img", "create", "-q", *QCOW2, "-b", middle.name, "-F", "qcow2", top)
    expected = bytearray(SIZE)
    for path, byte in ((base, 1), (middle, 2), (top, 3)):
        at = byte * MIB
        qemu_io(path, f"write -P {byte} {at} 1536k", options=QCOW2)
        expected[at : at + (1536 << 10)] = bytes([byte]) * (1536 << 10)
    assert place.content(top) == expected
    chain = json.loads(run("qemu-img", "info", "--output=json", "--backing-chain", top))
    assert [Path(part["filename"]).name for part in chain] == [top.name, middle.name, base.name]

    run("qemu-img", "commit", "-q", top)
    assert place.content(middle) == expected
    assert place.content(top) == expected
    # Onto a backing file with other content: what differs moves into the overlay.
    run("qemu-img", "create", "-q", *QCOW2, other, "16M")
    qemu_io(other, "write -P 99 0 4M", options=QCOW2)
    run("qemu-img", "rebase", "-q", "-b", other.name, "-F", "qcow2", top)
    assert place.content(top) == expected
    run("qemu-img", "rebase", "-q", "-b", "", top)
    for path in (base, middle, other):
        path.unlink()
    assert place.content(top) == expected
    run("qemu-img", "check", "-q", top)


CONVERSIONS = {
    "plain": (),
    "out of order": ("-W", "-m", "8"),
    "direct": ("-t", "none", "-T", "none"),
    "direct, out of order": ("-W", "-t", "none", "-T", "none"),
    "salvage": ("--salvage",),
    "writethrough": ("-t", "writethrough"),
    "sparse": ("-S", "4k"),
    "not sparse": ("-S", "0"),
}


@pytest.mark.parametrize(
    ("mount", "how"),
    [*(("on", how) for how in CONVERSIONS), ("off", "plain"), ("off", "direct, out of order")],
    indirect=["mount"],
)
def test_convert(place: Place, how: str) -> None:
    options = CONVERSIONS[how]
    plain = place.outside / "plain.raw"
    expected = write_plain(
        plain,
        (0, noise(1, 70_000)),
        (3 * MIB, noise(2, 2 * MIB)),
        (9 * MIB + 512, noise(3, 1234)),
        (SIZE - 4096, noise(4, 4096)),
    )
    inner, again, qcow2 = place / "inner.raw", place / "again.raw", place / "inner2.qcow2"
    back = place.outside / "back.raw"
    convert = ("qemu-img", "convert", *options)
    run(*convert, *RAW, "-O", "raw", plain, inner)
    assert inner.read_bytes() == expected
    assert "identical" in run("qemu-img", "compare", *RAW, "-F", "raw", plain, inner)
    run(*convert, *RAW, "-O", "qcow2", inner, qcow2)
    run(*convert, *QCOW2, "-O", "raw", qcow2, again)
    assert again.read_bytes() == expected
    run(*convert, *RAW, "-O", "raw", again, back)
    assert back.read_bytes() == expected
    if how != "not sparse":
        assert place.allocated(again) < place.allocated(inner) + MIB
        journal_and_headers = 20 * MIB
        assert place.allocated(inner) < journal_and_headers + 5 * MIB
    qemu_io(inner, "write -P 77 123456 1", options=RAW)
    differing = run("qemu-img", "compare", *RAW, "-F", "raw", plain, inner, status=1)
    assert "mismatch at offset 123" in differing


@pytest.mark.parametrize("options", [("-n",), ("-n", "-W", "-t", "none", "-T", "none")])
def test_convert_into_a_disk_with_other_content(place: Place, options: tuple[str, ...]) -> None:
    """`-n` must write the zeros too, and on the sealed side they become holes."""
    plain, inner = place.outside / "plain.raw", place / "inner.raw"
    expected = write_plain(plain, (MIB, noise(1, MIB)), (SIZE - 700, noise(2, 700)))
    inner.write_bytes(noise(3, SIZE))
    before = place.allocated(inner)
    run("qemu-img", "convert", *options, *RAW, "-O", "raw", plain, inner)
    assert inner.read_bytes() == expected
    assert inner.stat().st_size == place.sealed_size(inner) == SIZE
    if has_lane(place):
        assert before - place.allocated(inner) > 0.9 * (SIZE - 2 * MIB)


@with_lane
def test_map_shows_the_holes_of_a_plain_file(place: Place) -> None:
    path, twin = place / "map.raw", place.outside / "twin.raw"
    parts = [
        (0, noise(1, 1)),
        (100_000, noise(2, 100)),
        (2 * MIB - 4096, noise(3, 8192)),
        (5 * MIB, noise(4, MIB + 4096)),
        (SIZE - 5000, noise(5, 4000)),
    ]
    for each in (path, twin):
        write_plain(each, *parts, size=SIZE - 1000)
    assert qmap(path) == qmap(twin)
    assert len(qmap(path)) >= 9
    for each in (path, twin):
        qemu_io(each, "discard 5248k 512k", "write -z -u 0 64k", options=(*RAW, "-d", "unmap"))
    assert qmap(path) == qmap(twin)
    assert path.read_bytes() == twin.read_bytes()
    # Also what no flush has seen.
    for each in (path, twin):
        with open(each, "r+b") as file:
            os.pwrite(file.fileno(), b"x", 10 * MIB)
            assert os.lseek(file.fileno(), 9 * MIB, os.SEEK_DATA) == 10 * MIB
            assert os.lseek(file.fileno(), 10 * MIB, os.SEEK_HOLE) == 10 * MIB + 4096
    assert qmap(path) == qmap(twin)
    assert run("qemu-img", "measure", "-O", "qcow2", *RAW, path) == run(
        "qemu-img", "measure", "-O", "qcow2", *RAW, twin
    )


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_a_raw_disk_is_made_and_resized(place: Place, preallocation: str) -> None:
    path, twin = place / "new.raw", place.outside / "twin.raw"
    for each in (path, twin):
        run("qemu-img", "create", "-q", *RAW, "-o", f"preallocation={preallocation}", each, "16M")
        qemu_io(each, "write -P 5 15M 1M", options=RAW)
    assert path.stat().st_size == place.sealed_size(path) == SIZE
    taken = place.allocated(path)
    assert (taken >= SIZE + 16 * MIB) == (preallocation != "off")
    if has_lane(place):
        # Before the twin is read: to ext4 what the page cache has of an unwritten extent is data.
        assert qmap(path) == qmap(twin)
    assert path.read_bytes() == twin.read_bytes()
    for size, options in (
        ("20M", ()),
        ("9000001", ("--shrink",)),
        ("+5M", ()),
        ("24M", ("--preallocation=falloc",)),
        ("28M", ("--preallocation=full",)),
    ):
        for each in (path, twin):
            run("qemu-img", "resize", "-q", *RAW, *options, each, size)
        assert path.stat().st_size == place.sealed_size(path) == twin.stat().st_size
        assert path.read_bytes() == twin.read_bytes()
    assert path.stat().st_size == 28 * MIB
    assert place.allocated(path) >= 16 * MIB + 8 * MIB


# Discard


@with_lane
def test_discard_gives_the_storage_its_space_back(place: Place) -> None:
    path = place / "thin.raw"
    expected = bytearray(noise(1, SIZE))
    path.write_bytes(expected)
    before = place.allocated(path)
    qemu_io(path, "discard 0 8M", options=(*RAW, "-d", "ignore"))
    assert path.read_bytes() == expected
    assert place.allocated(path) >= before - MIB
    qemu_io(path, "discard 0 4M", "discard 5000k 1000k", options=(*RAW, "-d", "unmap"))
    expected[: 4 * MIB] = bytes(4 * MIB)
    expected[5000 << 10 : 6000 << 10] = bytes(1000 << 10)
    assert path.read_bytes() == expected
    freed = before - place.allocated(path)
    assert freed > 0.8 * (4 * MIB + (1000 << 10))
    qemu_io(path, "write -z -u 8M 4M", "write -z 12M 64k", options=(*RAW, "-d", "unmap"))
    expected[8 * MIB : 12 * MIB] = bytes(4 * MIB)
    expected[12 * MIB : 12 * MIB + (64 << 10)] = bytes(64 << 10)
    assert path.read_bytes() == expected
    assert before - place.allocated(path) > freed + 0.8 * 4 * MIB


@with_lane
def test_zeros_from_a_client_of_nbd_become_holes(place: Place) -> None:
    path = place / "zeros.raw"
    expected = bytearray(noise(2, SIZE))
    path.write_bytes(expected)
    before = place.allocated(path)
    with short_directory() as directory, nbd_export(path, directory) as url:
        qemu_io(
            url,
            *("write -P 0 1M 4M", "write -P 0 7000001 5000", "write -P 7 14M 64k", "flush"),
            *("discard 9M 2M", "write -z 12M 1M", "read -P 0 1M 4M", "read -P 7 14M 64k"),
            options=(*RAW, "-d", "unmap"),
        )
        expected[MIB : 5 * MIB] = bytes(4 * MIB)
        expected[7000001:7005001] = bytes(5000)
        expected[14 * MIB : 14 * MIB + (64 << 10)] = bytes([7]) * (64 << 10)
        expected[9 * MIB : 11 * MIB] = bytes(2 * MIB)
        expected[12 * MIB : 13 * MIB] = bytes(MIB)
        # While the daemon has it open, and with the client's promise kept already.
        assert path.read_bytes() == expected
        assert before - place.allocated(path) > 0.8 * 6 * MIB
        found = json.loads(run("qemu-img", "map", "--output=json", *RAW, url))
        holes = sum(part["length"] for part in found if not part["data"])
        assert holes >= 6 * MIB
    assert path.read_bytes() == expected


@contextlib.contextmanager
def nbd_export(path: Path, directory: Path) -> Iterator[str]:
    with storage_daemon(
        *("--blockdev", f"driver=file,node-name=file,filename={path},discard=unmap"),
        *("--blockdev", "driver=raw,node-name=disk,file=file,discard=unmap,detect-zeroes=unmap"),
        *("--nbd-server", f"addr.type=unix,addr.path={directory}/nbd"),
        *("--export", "type=nbd,id=export,node-name=disk,name=disk,writable=on"),
    ):
        yield f"nbd+unix:///disk?socket={directory}/nbd"


@with_lane
@pytest.mark.parametrize("direct", ["on", "off"])
def test_fstrim_of_a_file_system_on_a_loop_device(place: Place, direct: str) -> None:
    path = place / "loop.raw"
    size, count, each = 160 * MIB, 16, 4 * MIB
    with open(path, "xb") as file:
        file.truncate(size)
    contents = [noise(seed, each) for seed in range(count)]
    target = place.outside / "fs"
    target.mkdir()
    with loop_device(path, direct) as device:
        run("mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", device)
        with file_system(device, target):
            for index, content in enumerate(contents):
                (target / str(index)).write_bytes(content)
            run("sync", "-f", target)
            full = place.allocated(path)
            for index in range(count):
                if index % 4:
                    (target / str(index)).unlink()
            run("sync", "-f", target)
            run("fstrim", target)
            freed = full - place.allocated(path)
            assert freed >= 0.8 * each * count * 3 / 4, f"{freed / MIB} MiB"
        # After the page cache of the file system is gone.
        with file_system(device, target):
            for index in range(0, count, 4):
                assert (target / str(index)).read_bytes() == contents[index]
            (target / "later").write_bytes(contents[1] * 3)
        run("e2fsck", "-f", "-n", device)
    assert_ext4_clean(path)
    with loop_device(path, direct) as device, file_system(device, target):
        assert (target / "later").read_bytes() == contents[1] * 3
        assert (target / "0").read_bytes() == contents[0]


@contextlib.contextmanager
def loop_device(path: Path, direct: str) -> Iterator[str]:
    device = run("losetup", f"--direct-io={direct}", "--find", "--show", path).strip()
    try:
        used = run("losetup", "--noheadings", "--output", "DIO", device).strip()
        assert used == {"on": "1", "off": "0"}[direct]
        yield device
    finally:
        run("losetup", "--detach", device)


@contextlib.contextmanager
def file_system(device: object, target: Path, *options: str) -> Iterator[None]:
    run("mount", *options, device, target)
    try:
        yield
    finally:
        run("umount", target)


# Locks


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_second_qemu_is_refused_by_its_lock(place: Place, kind: str) -> None:
    """Everything that meets the lock ends as it does on a plain file, word for word."""
    path, twin, copy = place / "disk", place.outside / "disk", place.outside / "copy"
    outcomes = []
    for each in (path, twin):
        run("qemu-img", "create", "-q", "-f", kind, each, "1M")
        qemu_io(each, "write -P 1 0 1M", options=("-f", kind))
        disk = (*drive(each, kind), "-device", "virtio-blk-pci,drive=disk")
        with qemu_machine(*disk, machine="q35"):
            outcome = [
                outcome_of(each, *command)
                for command in (
                    ("qemu-io", "-f", kind, "-c", "write -P 2 0 4k", each),
                    ("qemu-system-x86_64", "-display", "none", "-nodefaults", *disk),
                    ("qemu-img", "resize", "-f", kind, each, "2M"),
                    ("qemu-img", "convert", "-f", kind, "-O", "raw", each, copy),
                    ("qemu-img", "info", each),
                    ("qemu-img", "check", "-f", kind, each),
                    ("qemu-io", "-r", "-f", kind, "-c", "read -q -P 1 0 1M", each),
                    ("qemu-io", "-r", "-U", "-f", kind, "-c", "read -q -P 1 0 1M", each),
                    ("qemu-img", "convert", "-U", "-f", kind, "-O", "raw", each, copy),
                    ("qemu-img", "map", "-U", "-f", kind, each),
                )
            ]
            assert info(each, "-U")["virtual-size"] == MIB
            assert copy.read_bytes() == bytes([1]) * MIB
            outcomes.append(outcome)
        qemu_io(each, "write -P 2 0 4k", options=("-f", kind))
        assert place.content(each, kind) == bytes([2]) * 4096 + bytes([1]) * (MIB - 4096)
    statuses, words = zip(*outcomes[0], strict=True)
    assert statuses[:4] == (1, 1, 1, 1)
    assert all("Failed to get " in text and '"write" lock' in text for text in words[:4])
    assert statuses[-3:] == (0, 0, 0)
    # That "info" prints how much a raw file takes is no matter of locks.
    if kind == "raw":
        outcomes[0][4], outcomes[1][4] = (statuses[4], ""), (outcomes[1][4][0], "")
    assert outcomes[0] == outcomes[1]


def outcome_of(path: Path, *command: object) -> tuple[int, str]:
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    return done.returncode, (done.stdout + done.stderr).replace(str(path), "DISK")


def test_locks_of_other_programs(place: Place) -> None:
    path = place / "locks.raw"
    path.write_bytes(bytes(MIB))
    command = ("flock", "--nonblock", path, "true")
    with open(path, "rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        run(*command, status=1)
        run("flock", "--nonblock", "--shared", path, "true", status=1)
        fcntl.flock(holder, fcntl.LOCK_SH)
        run("flock", "--nonblock", "--shared", path, "true")
        run(*command, status=1)
    run(*command)
    # OFD locks: two opens in one process meet, ranges count, close ends them.
    with open(path, "r+b") as first, open(path, "r+b") as second:
        assert set_lock(first, fcntl.F_WRLCK, 100, 1) == 0
        assert set_lock(second, fcntl.F_WRLCK, 101, 1) == 0
        assert set_lock(second, fcntl.F_WRLCK, 100, 1) in (errno.EAGAIN, errno.EACCES)
        assert set_lock(second, fcntl.F_RDLCK, 100, 1) in (errno.EAGAIN, errno.EACCES)
        assert set_lock(first, fcntl.F_RDLCK, 100, 1) == 0
        assert set_lock(second, fcntl.F_RDLCK, 100, 1) == 0
        assert set_lock(first, fcntl.F_WRLCK, 100, 1) in (errno.EAGAIN, errno.EACCES)
        second.close()
        assert set_lock(first, fcntl.F_WRLCK, 100, 2) == 0
    # The classic kind, of another process.
    with open(path, "r+b") as holder:
        fcntl.lockf(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | 4)"
        assert "BlockingIOError" in run(sys.executable, "-c", child, path, status=1)
    run(sys.executable, "-c", child, path)


def set_lock(file: Any, kind: int, start: int, length: int) -> int:
    """Set an OFD lock; return 0 or the errno."""
    lock = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
    except OSError as exc:
        return exc.errno or -1
    return 0


def test_a_second_mount_gets_an_image_when_the_first_lets_go(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    seal_new(tmp_path / "state", source / "vm.raw.sealed", vm_id="vm", size=MIB)
    with (
        mounted(source, tmp_path / "one", options="lock=0.2") as one,
        mounted(source, tmp_path / "two", options="lock=0.2") as two,
    ):
        first, second = one.mountpoint / "vm.raw", two.mountpoint / "vm.raw"
        qemu_io(first, "write -P 3 0 64k", options=RAW)
        with storage_daemon("--blockdev", f"driver=file,node-name=disk,filename={first}"):
            with pytest.raises(OSError, match="busy") as caught:
                second.read_bytes()
            assert caught.value.errno == errno.EBUSY
            assert second.stat().st_size == MIB
            qemu_io(first, "read -P 3 0 64k", options=(*RAW, "-r", "-U"))
        let_go(one, first)
        qemu_io(second, "read -P 3 0 64k", "write -P 4 64k 64k", options=RAW)
        let_go(two, second)
        expected = b"\3" * (64 << 10) + b"\4" * (64 << 10) + bytes(MIB - (128 << 10))
        assert first.read_bytes() == expected


def let_go(mount: Mounted, path: Path) -> None:
    """Make a mount close a disk that nobody has open any more."""
    found = find_mount(path, mount.run_dir)
    assert found is not None
    wait_for(lambda: found.call("close", path=str(path))["in_use"] == [], "the disk is let go of")


# QEMU's block layer, over QMP


def drive(path: Path, kind: str = "raw", **options: str) -> tuple[str, str]:
    given = {"file": str(path), "format": kind, "if": "none", "id": "disk", **options}
    # Without it, QEMU 7.2 opens a disk without a device anew around each command, under the feet
    # of a job that reads it: EBADF, on every file system.
    given["auto-read-only"] = "off"
    return ("-drive", ",".join(f"{key}={value}" for key, value in given.items()))


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_block_resize(place: Place, cache: str) -> None:
    path = place / "vm.raw"
    expected = bytearray(write_plain(path, (0, noise(1, 4 * MIB))))
    with qemu_machine(*drive(path, cache=cache)) as qmp:
        for size in (20 * MIB, 20 * MIB + 512, 64 * MIB, 3 * MIB + 4096, 8 * MIB):
            qmp.execute("block_resize", {"device": "disk", "size": size})
            expected = expected[:size].ljust(size, b"\0")
            assert place.sealed_size(path) == path.stat().st_size == size
            qmp.io("disk", f"write -P {size % 251} {size - 8192} 4k")
            expected[size - 8192 : size - 4096] = bytes([size % 251]) * 4096
            qmp.io("disk", f"read -P {size % 251} {size - 8192} 4k", f"read -P 0 {size - 4096} 4k")
            qmp.io("disk", "flush")
        assert qmp.execute("query-block")[0]["inserted"]["image"]["virtual-size"] == 8 * MIB
    assert path.read_bytes() == expected


@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_a_live_snapshot_is_made_and_committed(place: Place, cache: str) -> None:
    path, overlay = place / "base.raw", place / "overlay.qcow2"
    expected = bytearray(write_plain(path, (0, noise(1, 4 * MIB))))
    with qemu_machine(*drive(path, cache=cache)) as qmp:
        qmp.execute(
            "blockdev-snapshot-sync",
            {"device": "disk", "snapshot-file": str(overlay), "format": "qcow2"},
        )
        qmp.io("disk", "write -P 5 1M 300k", "write -P 6 15M 1M", "write -z 0 100k", "flush")
        assert path.read_bytes() == expected
        expected[MIB : MIB + (300 << 10)] = bytes([5]) * (300 << 10)
        expected[15 * MIB :] = bytes([6]) * MIB
        expected[: 100 << 10] = bytes(100 << 10)
        qmp.execute("block-commit", {"device": "disk", "job-id": "commit"})
        qmp.finish_job("commit", from_ready=True)
        assert path.read_bytes() == expected
        qmp.io("disk", "read -P 6 15M 1M", "write -P 7 8M 4k", "flush")
        expected[8 * MIB : 8 * MIB + 4096] = bytes([7]) * 4096
    assert path.read_bytes() == expected
    run("qemu-img", "check", "-q", overlay)
    assert place.content(overlay)[:MIB] == expected[:MIB]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_a_disk_is_mirrored_and_backed_up(place: Place, kind: str) -> None:
    paths = {name: place / name for name in ("source", "first.mirror", "second.mirror", "backup")}
    source = paths["source"]
    expected = bytearray(write_plain(source, (0, noise(1, 5 * MIB)), (12 * MIB, noise(2, MIB))))
    for name in ("second.mirror", "backup"):
        run("qemu-img", "create", "-q", "-f", kind, paths[name], "16M")
    with qemu_machine(*drive(source, cache="none", discard="unmap")) as qmp:
        # A backup is of the moment it began.
        qmp.execute("blockdev-add", target("backup", paths["backup"], kind))
        qmp.execute(
            "blockdev-backup",
            {"device": "disk", "target": "backup", "sync": "full", "job-id": "backup",
             "speed": MIB},
        )  # fmt: skip
        qmp.io("disk", "write -P 9 4M 512k", "write -P 9 12M 64k", "flush")
        qmp.execute("block-job-set-speed", {"device": "backup", "speed": 0})
        qmp.finish_job("backup", from_ready=False)
        qmp.execute("blockdev-del", {"node-name": "backup"})
        assert place.content(paths["backup"], kind) == expected
        for start, size in ((4 * MIB, 512 << 10), (12 * MIB, 64 << 10)):
            expected[start : start + size] = bytes([9]) * size

        qmp.execute(
            "drive-mirror",
            {"device": "disk", "target": str(paths["first.mirror"]), "sync": "full",
             "format": kind, "mode": "absolute-paths", "job-id": "mirror"},
        )  # fmt: skip
        qmp.io("disk", "write -P 10 6M 1M")
        expected[6 * MIB : 7 * MIB] = bytes([10]) * MIB
        qmp.finish_job("mirror", from_ready=True)
        assert source.read_bytes() == expected
        qmp.io("disk", "write -P 11 7M 1M", "flush")  # to the mirror only
        assert source.read_bytes() == expected
        expected[7 * MIB : 8 * MIB] = bytes([11]) * MIB

        qmp.execute("blockdev-add", target("second", paths["second.mirror"], kind))
        qmp.execute(
            "blockdev-mirror",
            {"device": "disk", "target": "second", "sync": "full", "job-id": "mirror",
             "copy-mode": "write-blocking"},
        )  # fmt: skip
        qmp.io("disk", "write -P 12 8M 1M", "discard 0 1M", "write -z -u 1M 1M")
        expected[8 * MIB : 9 * MIB] = bytes([12]) * MIB
        expected[MIB : 2 * MIB] = bytes(MIB)
        qmp.finish_job("mirror", from_ready=True)
    found = (
        place.content(paths["first.mirror"], kind),
        place.content(paths["second.mirror"], kind),
    )
    assert found[1] == found[0]
    assert found[0][MIB:] == expected[MIB:]
    if kind == "raw":
        # The last word of each: the sealed file alone, not the mount's cache.
        place.flush(source)
        for name, path in paths.items():
            assert place.sealed_size(path) == SIZE, name


def target(node: str, path: Path, kind: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": str(path), "discard": "unmap", "cache": {"direct": True}}
    return {"driver": kind, "node-name": node, "discard": "unmap", "file": file}


MODES = [
    (cache, aio)
    for cache in ("none", "directsync", "writeback", "writethrough")
    for aio in ("threads", "native", "io_uring")
    if not (aio == "native" and cache.startswith("write"))  # needs O_DIRECT
]


def test_every_cache_mode_and_way_of_io(place: Place, tmp_path: Path) -> None:
    drives: list[str] = []
    for cache, aio in MODES:
        path = place / f"{cache}-{aio}.raw"
        write_plain(path, (MIB, bytes([1]) * MIB), size=2 * MIB + tail_of(cache))
        drives += drive(path, cache=cache, aio=aio, id=f"{cache}-{aio}")
    with qemu_machine(*drives) as qmp:
        for number, (cache, aio) in enumerate(MODES, start=100):
            name, path = f"{cache}-{aio}", place / f"{cache}-{aio}.raw"
            qmp.io(name, *(f"aio_write -q -P {number} {i * 65536} 64k" for i in range(8)))
            qmp.io(name, "aio_flush", f"write -P {number} 1001k 5k", f"write -P {number} 2M 512")
            qmp.io(name, "read -P 1 1006k 10k", f"read -P {number} 0 512k", "read -P 0 512k 1k")
            # A write that was answered is durable with these: the sealed file alone has it.
            if cache not in ("directsync", "writethrough"):
                qmp.io(name, "flush")
            expected = bytearray(2 * MIB + tail_of(cache))
            expected[MIB : 2 * MIB] = bytes([1]) * MIB
            for start, size in ((0, 512 << 10), (1001 << 10, 5 << 10), (2 * MIB, 512)):
                expected[start : start + size] = bytes([number]) * size
            assert path.read_bytes() == expected, name
            assert sealed_content(place, path, tmp_path / f"{name}.sealed") == expected, name


@with_lane
def test_a_buffered_reader_sees_what_an_asynchronous_direct_writer_wrote(place: Place) -> None:
    """The reader has the disk open all the time; on ext4 it sees every write that is complete."""
    path = place / "vm.raw"
    write_plain(path)
    with (
        qemu_machine(*drive(path, cache="none", aio="io_uring")) as qmp,
        open(path, "rb", buffering=0) as file,
    ):
        is_over = threading.Event()

        def read_the_last_block() -> None:
            while not is_over.is_set():
                os.pread(file.fileno(), 4096, SIZE - 4096)

        reader = threading.Thread(target=read_the_last_block)
        reader.start()
        try:
            for number in range(1, 61):  # one in five is enough to see it
                qmp.io("disk", f"write -P {number} 0 {SIZE}")
                assert os.pread(file.fileno(), 1, SIZE - 4096) == bytes([number])
        finally:
            is_over.set()
            reader.join()


def tail_of(cache: str) -> int:
    """Bytes of a disk's last block: with O_DIRECT, QEMU wants it whole on any file system."""
    return 513 if cache.startswith("write") else 4096


def sealed_content(place: Place, path: Path, copy: Path) -> bytes:
    """Return what a copy of the sealed file holds, opened elsewhere, with recovery."""
    shutil.copy(place.sealed(path), copy)
    image = open_offline(place.mount.state, copy, place.sealed(path))
    try:
        found: bytes = image.read(0, image.size)
        assert not image.check(data=True)
        return found
    finally:
        image.close()


# A full storage


STORAGE = 80 * MIB
DISK = 48 * MIB
CHUNK = MIB


@contextlib.contextmanager
def small_storage(base: Path, *, free: int) -> Iterator[Path]:
    """Mount a file system with that many free bytes at `base`/source; "ballast" holds the rest."""
    backing, source = base / "storage.img", base / "source"
    with open(backing, "xb") as file:
        file.truncate(STORAGE)
    run("mkfs.ext4", "-q", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", backing)
    source.mkdir()
    with file_system(backing, source, "-o", "loop"):
        found = os.statvfs(source)
        with open(source / "ballast", "xb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_bsize - free)
        yield source


def drop_ballast(source: Path) -> None:
    (source / "ballast").unlink()
    run("sync", "-f", source)


def fill(source: Path) -> None:
    """Take all space that is left, so that nobody finds a block."""
    with open(source / "filler", "xb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (MIB, 4096):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    os.fsync(file.fileno())
    assert os.statvfs(source).f_bavail * 4096 < MIB


@pytest.mark.parametrize("lane", ["on", "off"])
@pytest.mark.parametrize("direct", [False, True])
def test_what_was_accepted_before_enospc_becomes_durable(
    tmp_path: Path, lane: str, direct: bool
) -> None:
    flags = os.O_RDWR | (os.O_DIRECT if direct else 0)
    with small_storage(tmp_path, free=40 * MIB) as source:
        sealed = source / "vm.raw.sealed"
        seal_new(tmp_path / "state", sealed, vm_id="vm", size=DISK)
        with (
            mounted(source, tmp_path / "mnt", options=f"lane={lane}") as mount,
            opened(mount.mountpoint / "vm.raw", flags) as fd,
        ):
            disk = Model(fd, DISK, seed=1)
            # Accepted, and then the space of all others is gone: the commit has its own.
            for index in range(16):
                assert disk.write(index * CHUNK, CHUNK)
            fill(source)
            os.fsync(fd)
            disk.check()
            (source / "filler").unlink()
            run("sync", "-f", source)
            # Until the storage is full, in steps that become finer.
            refused = []
            for size in (CHUNK, 64 << 10, 4096):
                at = disk.end
                while disk.write(at, size):
                    at += size
                refused.append((at, size))
                os.fsync(fd)
            disk.check()
            # What is there can be written again, and so can what has space.
            for index in range(0, 16, 3):
                assert disk.write(index * CHUNK + 8192, 256 << 10)
            os.fsync(fd)
            assert not disk.write(DISK - CHUNK, CHUNK)
            disk.check()
            if lane == "on":
                # A discard needs no space, and gives some.
                where = ("--offset", MIB, "--length", 4 * MIB)
                run("fallocate", "--punch-hole", *where, mount.mountpoint / "vm.raw")
                disk.content[MIB : 5 * MIB] = bytes(4 * MIB)
                disk.check()
                found = find_mount(mount.mountpoint, mount.run_dir)
                assert found is not None
                found.call("flush")
                for at in range(DISK - 2 * MIB, DISK, CHUNK):
                    assert disk.write(at, CHUNK)
                os.fsync(fd)
            drop_ballast(source)
            for at, size in refused:
                assert disk.write(at, size)
            for at in range(disk.end // CHUNK * CHUNK, DISK - 2 * MIB, CHUNK):
                if at < disk.end + 20 * MIB:
                    assert disk.write(at, CHUNK)
            disk.check()
            os.fsync(fd)
        assert "NoSpace" in mount.log_text()
        image = open_offline(tmp_path / "state", sealed)
        assert not image.check(data=True)
        assert image.read(0, DISK) == disk.content
        image.close()


@pytest.mark.parametrize("lane", ["on", "off"])
def test_a_full_storage_refuses_what_is_new_and_keeps_what_is_there(
    tmp_path: Path, lane: str
) -> None:
    size, options = 16 * MIB, f"lane={lane}"
    with small_storage(tmp_path, free=60 * MIB) as source:
        sealed = source / "vm.raw.sealed"
        with mounted(source, tmp_path / "mnt", options=options) as mount:
            path, large = mount.mountpoint / "vm.raw", mount.mountpoint / "large.raw"
            create = ("qemu-img", "create", "-q", *RAW, "-o", "preallocation=full")
            run(*create, path, size)
            assert "No space left on device" in run(*create, large, "200M", status=1)
            assert large.stat().st_size == 0  # what a plain file system leaves of it
            large.unlink()
            assert set(os.listdir(source)) - {"lost+found"} == {sealed.name, "ballast"}
            let_go(mount, path)
            fill(source)
            # All of a preallocated disk can be written, again and again.
            with open(path, "r+b", buffering=0) as file:
                disk = Model(file.fileno(), size, seed=2)
                for _ in range(2):
                    for at in range(0, size, CHUNK):
                        assert disk.write(at, CHUNK)
                    assert disk.write(8 * MIB + 4096, 8192)
                    os.fsync(file)
                # It can be made longer, and that part has no space.
                file.truncate(size + 8 * MIB)
                assert not disk.write(size + 4 * MIB, 4096)
                refused = qemu_io(path, f"write {size} 1M", options=RAW, status=1)
                assert "No space left on device" in refused
                os.fsync(file)
                disk.check()
            # Nothing new begins, and no half of it is left behind.
            for name in ("new.raw", "new.qcow2"):
                with pytest.raises(OSError, match="No space left") as caught:
                    (mount.mountpoint / name).write_bytes(b"")
                assert caught.value.errno == errno.ENOSPC
            assert sorted(os.listdir(mount.mountpoint)) == ["lost+found", "vm.raw"]
            mount.kill()
        # A crash on a full storage: recovery needs no space either.
        with mounted(source, tmp_path / "mnt", options=options):
            assert path.read_bytes() == disk.content + bytes(8 * MIB)
            qemu_io(path, "write -P 7 0 1M", "flush", options=RAW)
            drop_ballast(source)
            qemu_io(path, f"write -P 8 {size} 1M", "flush", options=RAW)
            (source / "filler").unlink()
            run("sync", "-f", source)
            (path.parent / "new.qcow2").write_bytes(b"now it can be made")
            assert (path.parent / "new.qcow2").read_bytes() == b"now it can be made"
        expected = bytes([7]) * MIB + disk.content[MIB:] + bytes([8]) * MIB + bytes(7 * MIB)
        image = open_offline(tmp_path / "state", sealed)
        assert not image.check(data=True)
        assert image.read(0, image.size) == expected
        image.close()


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


class Model:
    """A disk that is written at random, and what it must hold."""

    def __init__(self, fd: int, size: int, seed: int) -> None:
        self.fd = fd
        self.content = bytearray(size)
        self.end = 0
        """End of what was written before the first refusal, in one run from 0."""
        self._random = random.Random(seed)
        self._room = mmap.mmap(-1, CHUNK)

    def write(self, offset: int, size: int) -> bool:
        """Write noise; False if there was no space for it, and nothing was taken."""
        data = self._random.randbytes(size)
        self._room[:size] = data
        with memoryview(self._room)[:size] as view:
            try:
                assert os.pwritev(self.fd, [view], offset) == size
            except OSError as exc:
                if exc.errno != errno.ENOSPC:
                    raise
                return False
        self.content[offset : offset + size] = data
        if offset == self.end:
            self.end += size
        return True

    def check(self) -> None:
        for offset in range(0, len(self.content), CHUNK):
            with memoryview(self._room)[:CHUNK] as view:
                assert os.preadv(self.fd, [view], offset) == CHUNK
                assert view == self.content[offset : offset + CHUNK], offset


# A guest


WRITER = """
chunk() { printf "chunk %%09d\\n" $1; head -c 1048560 /bin/busybox; }
for index in $(seq 0 %(last)d); do
    chunk $index | dd of=/dev/vdb bs=1M seek=$index iflag=fullblock oflag=direct conv=notrunc,fsync
    echo "ACK $index"
done 2>/dev/null
echo "RESULT whole=$(dd if=/dev/vdb bs=1M count=%(count)d iflag=direct 2>/dev/null | md5sum)"
"""


def chunk_of(index: int) -> bytes:
    """Return what the guest's script writes at that MiB of its second disk."""
    return (b"chunk %09d\n" % index + prepared("userland/bin/busybox").read_bytes())[:MIB]


def second_disk(path: Path, **options: str) -> tuple[str, ...]:
    given = {"id": "second", "cache": "none", **options}
    return (*drive(path, **given), "-device", "virtio-blk-pci,drive=second")


@pytest.mark.qemu
@pytest.mark.slow
def test_a_guest_is_stopped_by_enospc_and_goes_on(tmp_path: Path) -> None:
    count = 20
    root = build_guest_disk(tmp_path / "root.raw")
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(small_storage(tmp_path, free=32 * MIB))
        sealed = source / "data.raw.sealed"
        seal_new(tmp_path / "state", sealed, vm_id="data", size=DISK)
        mount = stack.enter_context(mounted(source, tmp_path / "mnt"))
        disk = mount.mountpoint / "data.raw"
        sockets = stack.enter_context(short_directory())
        arguments = (
            *second_disk(disk, werror="enospc", discard="unmap"),
            *("-qmp", f"unix:{sockets}/qmp,server=on,wait=off"),
        )
        script = WRITER % {"count": count, "last": count - 1}
        guest = stack.enter_context(
            GuestProcess(root.path, script=script, cache="writeback", extra=arguments)
        )
        qmp = stack.enter_context(contextlib.closing(Qmp(sockets / "qmp")))
        for attempt in range(2):
            stopped = qmp.wait_event("BLOCK_IO_ERROR")
            assert stopped["device"] == "second"
            assert stopped["operation"] == "write"
            assert stopped["nospace"] is True
            assert stopped["action"] == "stop"
            qmp.wait_event("STOP")
            assert qmp.execute("query-status")["status"] == "io-error"
            # What the guest was told it has is there, for all to see.
            acknowledged = len(guest.lines(r"ACK (\d+)"))
            assert 8 <= acknowledged < count
            with open(disk, "rb") as file:
                for index in range(acknowledged):
                    assert file.read(MIB) == chunk_of(index), index
            if attempt == 0:
                qmp.execute("cont")  # nothing has changed: it stops again
        drop_ballast(source)
        qmp.execute("cont")
        found = guest.finished().checked()
        expected = b"".join(map(chunk_of, range(count)))
        assert found.results["whole"].split()[0] == hashlib.md5(expected).hexdigest()
        assert disk.read_bytes() == expected.ljust(DISK, b"\0")
        mount.unmount()
        assert "NoSpace" in mount.log_text()
        image = open_offline(tmp_path / "state", sealed)
        assert not image.check(data=True)
        assert image.read(0, len(expected)) == expected
        image.close()


@pytest.mark.qemu
@pytest.mark.slow
def test_a_guest_on_disks_with_directsync_native_and_io_uring(tmp_path: Path) -> None:
    """The first disk is built where it stays, under the mount."""
    count = 6
    source = tmp_path / "source"
    source.mkdir()
    with mounted(source, tmp_path / "mnt") as mount:
        root = build_guest_disk(mount.mountpoint / "root.raw", size=128 * MIB)
        second = mount.mountpoint / "second.raw"
        run("qemu-img", "create", "-q", *RAW, second, "32M")
        script = (
            WRITER % {"count": count, "last": count - 1}
            + "dd if=/dev/vdb of=/root/copy bs=1M count=4 conv=fsync 2>/dev/null\n"
        )
        found = run_guest(
            root.path,
            script=script,
            cache="directsync",
            aio="native",
            extra=second_disk(second, aio="io_uring"),
        ).checked()
        assert found.root["marker"] == root.marker
        expected = b"".join(map(chunk_of, range(count)))
        assert found.results["whole"].split()[0] == hashlib.md5(expected).hexdigest()
        assert second.read_bytes() == expected.ljust(32 * MIB, b"\0")
        assert_ext4_clean(root.path)
        copy = tmp_path / "copy"
        run("debugfs", "-R", f"dump /root/copy {copy}", root.path)
        assert copy.read_bytes() == expected[: 4 * MIB]
