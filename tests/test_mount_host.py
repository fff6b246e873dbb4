"""A mount among everything else on a host: users, mount(8), full directories, endings, tools."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import mmap
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from admin_support import MountNamespace, as_user, mount_namespace, python_for_others, run
from host_support import Host
from mount_support import DEADLINE, ROOT, mounted, open_offline, seal_new, wait_for

from sealfs.cli.errors import Situation, hint_of
from sealfs.control import connection
from sealfs.errors import Busy, StorageFailed, UsageError
from sealfs.mount import daemon, kernel, session
from sealfs.mount.control import find_mount, running_mounts
from sealfs.mount.options import MountOptions
from sealfs.mount.protocol import IN_HEADER, OUT_HEADER, Opcode
from sealfs.mount.relay import CONGESTION_THRESHOLD, MAX_BACKGROUND, Relay

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

SIZE = 4 << 20
NOBODY = 65534  # fusermount3 wants a user with a name
WMEM_MAX = 212_992  # net.core.wmem_max of a host as delivered
MANY = 10_000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    seal_new(tmp_path / "state", directory / "disk.raw.sealed", vm_id="disk", size=SIZE)
    return directory


def errno_of(command: str, path: Path) -> int:
    """Return the errno of a Python expression about `path`, 0 if it went well."""
    try:
        eval(command, {"os": os, "path": path})
    except OSError as exc:
        return exc.errno or -1
    return 0


def fill(directory: Path, template: Path, count: int) -> None:
    """Put `count` files with the head of a sealed one into a directory."""
    head, size = template.read_bytes()[:4096], template.stat().st_size
    for number in range(count):
        fd = os.open(directory / f"{number:05}.sealed", os.O_WRONLY | os.O_CREAT, 0o600)
        os.write(fd, head)
        os.ftruncate(fd, size)
        os.close(fd)


# Users.


class User:
    """Somebody without privileges, with a directory of sealed images and a mount point."""

    def __init__(self, base: Path, python: list[str]) -> None:
        self.base, self._python = base, python
        self.source, self.mountpoint = base / "source", base / "mnt"
        self.runtime, self.state = base / "run", base / "state"
        base.chmod(0o755)
        for directory in (self.source, self.mountpoint, self.runtime, self.state):
            directory.mkdir()
        seal_new(self.state, self.source / "disk.raw.sealed", vm_id="disk", size=SIZE)
        for path in (base, *base.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        self.environment = {"HOME": str(base), "XDG_RUNTIME_DIR": str(self.runtime)}

    def run(
        self, *command: str | Path, status: int | None = 0, inside: MountNamespace | None = None
    ) -> subprocess.CompletedProcess[str]:
        enter = inside.prefix if inside is not None else []
        return run(*enter, *as_user(NOBODY), *command, status=status, env=self.environment)

    def sealfs(
        self, *arguments: str | Path, status: int | None = 0, inside: MountNamespace | None = None
    ) -> subprocess.CompletedProcess[str]:
        program: list[str | Path] = [*self._python, ROOT / "tests" / "admin_support.py"]
        return self.run(*program, *arguments, status=status, inside=inside)

    def mount(
        self,
        *arguments: str | Path,
        status: int | None = 0,
        inside: MountNamespace | None = None,
    ) -> subprocess.CompletedProcess[str]:
        common = ("--state", self.state, "--log", self.base / "mount.log")
        return self.sealfs(
            "mount", self.source, self.mountpoint, *common, *arguments, status=status,
            inside=inside,
        )  # fmt: skip

    def umount(self, *, inside: MountNamespace | None = None) -> None:
        self.sealfs("umount", self.mountpoint, inside=inside)


@pytest.fixture
def user() -> Iterator[User]:
    if shutil.which("fusermount3") is None:
        pytest.fail("fusermount3 is not installed; run: tools/setup")
    python = python_for_others(NOBODY)
    if python is None:
        pytest.skip("no other user may start this Python, or read this checkout")
    base = Path(tempfile.mkdtemp(prefix="sealfs-user-", dir="/var/tmp"))
    try:
        yield User(base, python)
    finally:
        subprocess.run(["umount", "-l", base / "mnt"], check=False, capture_output=True)
        shutil.rmtree(base)


def test_a_user_mounts_his_own_directory_for_himself_alone(user: User) -> None:
    user.mount()
    there = kernel.mounted_at(str(user.mountpoint))
    assert there is not None
    assert (there.fstype, there.source) == (kernel.FSTYPE, str(user.source))
    sockets = list((user.runtime / "sealfs").glob("*.sock"))
    assert [stat.S_IMODE(socket.stat().st_mode) for socket in sockets] == [0o600]
    disk, new = user.mountpoint / "disk.raw", user.mountpoint / "new.raw"
    user.run("sh", "-c", f"echo one > {disk} && echo two >> {disk} && cp {disk} {new}")
    assert user.run("cat", new).stdout == "one\ntwo\n"
    assert user.run("stat", "-c", "%U %a", new).stdout == "nobody 600\n"
    assert user.run("df", "--output=source,target", new).stdout.split()[-2:] == [
        str(user.source),
        str(user.mountpoint),
    ]
    # Private: not even root sees into it.
    assert errno_of("os.listdir(path)", user.mountpoint) == errno.EACCES
    assert errno_of("os.stat(path)", disk) == errno.EACCES
    # In use it stays, and the user is told by whom.
    holder = subprocess.Popen([*as_user(NOBODY), "tail", "-f", disk], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: any("disk.raw" in os.readlink(link) for link in links(holder.pid)), "tail")
        done = user.sealfs("umount", user.mountpoint, status=9)
        assert f"tail ({holder.pid})" in done.stderr
    finally:
        holder.kill()
        holder.wait()
    user.umount()
    assert kernel.mounted_at(str(user.mountpoint)) is None
    assert not list((user.runtime / "sealfs").glob("*.sock"))
    image = open_offline(user.state, user.source / "new.raw.sealed")
    assert (image.status()["journal_used_pages"], bytes(image.read(0, 8))) == (0, b"one\ntwo\n")
    image.close()


def links(pid: int) -> list[str]:
    return [entry.path for entry in os.scandir(f"/proc/{pid}/fd")]


def test_a_user_lists_all_of_a_full_directory(user: User) -> None:
    """His socket buffers are small, and so are the answers to readdir."""
    fill(user.source, user.source / "disk.raw.sealed", MANY)
    subprocess.run(["chown", "-R", str(NOBODY), user.source], check=True)
    user.mount("--buffer", str(WMEM_MAX))
    names = user.run("ls", "-f", user.mountpoint).stdout.split()
    assert sorted(names) == sorted([".", "..", "disk.raw", *(f"{n:05}" for n in range(MANY))])
    sizes = user.run("find", user.mountpoint, "-type", "f", "-printf", "%s\n").stdout.split()
    assert sizes == [str(SIZE)] * (MANY + 1)
    user.umount()


def test_allow_other_is_fuse_conf_s_to_permit(user: User, tmp_path: Path) -> None:
    done = user.mount("-o", "allow_other", status=2)
    assert "'user_allow_other' is set in /etc/fuse.conf" in done.stderr
    assert "hint: add user_allow_other to /etc/fuse.conf" in done.stderr
    assert kernel.mounted_at(str(user.mountpoint)) is None
    configuration = tmp_path / "fuse.conf"
    configuration.write_text("user_allow_other\n")
    configuration.chmod(0o644)
    with mount_namespace() as inside:
        inside.run("mount", "--bind", configuration, "/etc/fuse.conf")
        user.mount("-o", "allow_other,default_permissions", inside=inside)
        disk = user.mountpoint / "disk.raw"
        assert inside.run("stat", "-c", "%s %u", disk).stdout == f"{SIZE} {NOBODY}\n"
        # Owner and mode decide who of the others.
        assert inside.run(*as_user(NOBODY - 1), "cat", disk, status=1).stdout == ""
        user.run("chmod", "644", disk, inside=inside)
        done = inside.run(*as_user(NOBODY - 1), "head", "-c", "4", disk)
        assert done.stdout == "\0\0\0\0"
        user.umount(inside=inside)
        user.mount("-o", "ro,noexec,noatime", inside=inside)
        line = next(
            line
            for line in inside.run("cat", "/proc/self/mountinfo").stdout.splitlines()
            if str(user.mountpoint) in line
        )
        assert line.split()[5] == "ro,nosuid,nodev,noexec,noatime"
        done = user.run("dd", "if=/dev/zero", f"of={disk}", "count=1", status=1, inside=inside)
        assert "Read-only file system" in done.stderr
        user.umount(inside=inside)


def test_labels_are_not_a_user_s(user: User) -> None:
    done = user.mount("-o", 'context="a:b:c:s0:c1,c2"', status=2)
    assert "for root" in done.stderr


def test_a_directory_that_another_user_made_first_is_refused(user: User) -> None:
    """Without XDG_RUNTIME_DIR the sockets are in /tmp, where anybody may make directories."""
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("hides /tmp, and with it this checkout")
    del user.environment["XDG_RUNTIME_DIR"]
    with mount_namespace() as inside:
        inside.run("mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/tmp")
        place = Path(f"/tmp/sealfs-{NOBODY}")
        user.mount(inside=inside)
        assert inside.run("stat", "-c", "%a %u", place).stdout == f"700 {NOBODY}\n"
        user.umount(inside=inside)
        inside.run("rm", "-r", place)
        for made in (["mkdir", "-m", "777"], ["ln", "-s", "/etc"]):
            inside.run(*as_user(NOBODY - 1), *made, place)
            done = user.mount(status=2, inside=inside)
            assert f'"{place}": is not yours alone' in done.stderr
            inside.run("rm", "-rf", place)
        assert inside.run("mountpoint", user.mountpoint, status=None).returncode != 0


def test_a_control_socket_that_cannot_be_made_is_said(user: User) -> None:
    for place, words in (("/proc", "control socket"), (f"{user.base}/{'d' * 90}", "too long")):
        user.environment["XDG_RUNTIME_DIR"] = place
        done = user.mount(status=1)
        assert words in done.stderr, place
        assert "internal error" not in done.stderr
        assert kernel.mounted_at(str(user.mountpoint)) is None


# mount(8) and fstab.


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    made = Host(tmp_path_factory.mktemp("host"))
    made.run("create", made.images / "a.raw.sealed", "--size", "1M", "--vm-id", "a")
    return made


@pytest.mark.tpm
def test_mount_8_and_fstab(host: Host) -> None:
    """The system's helper runs `sealfs SOURCE MOUNTPOINT -o rw,...,dev,suid` by a shell."""
    if shutil.which("mount.fuse3") is None:
        pytest.fail("mount.fuse3 is not installed; run: tools/setup")
    source, mountpoint = host.images, host.mountpoint
    spaced = host.directory / "plain images"
    spaced.mkdir(exist_ok=True)
    bin_directory = host.directory / "bin"
    bin_directory.mkdir(exist_ok=True)
    (bin_directory / "sealfs").symlink_to(Path(sys.executable).parent / "sealfs")
    fstab = host.directory / "fstab"
    # SELinux off, mount(8) itself drops a context; the mount must not mind where it does not.
    fstab.write_text(
        f"{source}  {mountpoint}  fuse.sealfs  defaults,_netdev,noauto,user,cache=32M,"
        'x-systemd.requires-mounts-for=/srv,context="u:r:t:s0:c1,c2"  0  0\n'
        f"{source}  {str(spaced).replace(' ', chr(92) + '040')}  fuse.sealfs  ro,nofail  0  0\n"
    )
    with mount_namespace() as inside:
        inside.run("mount", "--bind", bin_directory, "/usr/local/bin")
        env = {"SEALFS_STATE": str(host.state)}
        mount = partial(inside.run, "mount", env=env)

        mount("-t", "fuse.sealfs", source, mountpoint, "-o", "dirty=8M,x-systemd.automount")
        inside.run("sh", "-c", f"echo by hand > {mountpoint}/a.raw")
        flags, fstype = options_in(inside, mountpoint)
        assert (fstype, set(flags) >= {"rw", "nosuid", "nodev"}) == (kernel.FSTYPE, True)
        assert ended_by(inside, mountpoint, "umount", mountpoint)
        assert "clean" in host.run("list", source)

        # Still being read it stays; lazily unmounted it ends when the reader does.
        mount("-T", fstab, mountpoint)
        assert "noexec" in options_in(inside, mountpoint)[0]  # from "user"
        reader = subprocess.Popen([*inside.prefix, "tail", "-f", mountpoint / "a.raw"],
                                  stdout=subprocess.DEVNULL)  # fmt: skip
        wait_for(lambda: any("a.raw" in os.readlink(link) for link in links(reader.pid)), "tail")
        assert inside.run("umount", mountpoint, status=32).stderr

        def end_reader() -> None:
            reader.kill()
            reader.wait()

        assert ended_by(inside, mountpoint, "umount", "-l", mountpoint, then=end_reader)
        assert "clean" in host.run("list", source)

        # All that is not noauto, one of them with a space.
        mount("-T", fstab, "--all")
        assert options_in(inside, mountpoint) == ([], "")
        assert "ro" in options_in(inside, spaced)[0]
        done = inside.run("cat", spaced / "a.raw")
        assert done.stdout.startswith("by hand\n")
        assert ended_by(inside, spaced, "umount", spaced)

        # What sealfs says reaches the terminal, and the status is not 0.
        for arguments, words in (
            ((source, mountpoint, "-o", "cash=1G"), '"cash=1G": unknown mount option'),
            ((host.directory / "none", mountpoint), "no such directory"),
            ((source, mountpoint / "none"), "no such mount point"),
        ):
            done = mount("-t", "fuse.sealfs", *arguments, status=None)
            assert done.returncode != 0
            assert words in done.stderr
        done = mount("-t", "fuse.sealfs", source, mountpoint, env={"SEALFS_STATE": "/nowhere"},
                     status=None)  # fmt: skip
        assert done.returncode != 0
        assert "sealfs --state /nowhere init" in done.stderr

        # Another kind of mount only anew; but the kernel alone can stop writes.
        mount("-t", "fuse.sealfs", source, mountpoint)
        done = mount("-o", "remount,ro", mountpoint, status=None)
        assert done.returncode != 0
        assert "unmount, and mount it again" in done.stderr
        mount("-i", "-o", "remount,ro", mountpoint)
        done = inside.run("sh", "-c", f"echo > {mountpoint}/a.raw", status=2)
        assert "Read-only file system" in done.stderr
        mount("-i", "-o", "remount,rw", mountpoint)
        inside.run("sh", "-c", f"echo > {mountpoint}/a.raw")
        assert ended_by(inside, mountpoint, "umount", mountpoint)


def options_in(inside: MountNamespace, mountpoint: Path) -> tuple[list[str], str]:
    """Return a mount's flags and its type, of what is on top."""
    done = inside.run("findmnt", "-rno", "VFS-OPTIONS,FSTYPE", "-M", mountpoint, status=None)
    flags, _, fstype = (done.stdout.splitlines() or [" "])[-1].partition(" ")
    return flags.split(",") if flags else [], fstype


def ended_by(
    inside: MountNamespace,
    mountpoint: Path,
    *command: str | Path,
    then: Callable[[], None] = lambda: None,
) -> bool:
    """Whether the daemon ends by itself after `command`."""
    found = find_mount(mountpoint)
    assert found is not None
    pid = os.pidfd_open(found.status["pid"])
    try:
        inside.run(*command)
        then()
        return bool(select.select([pid], [], [], DEADLINE)[0])
    finally:
        os.close(pid)


# Options.


def flags_of(mountpoint: Path) -> set[str]:
    done = run("findmnt", "-rno", "VFS-OPTIONS", "-M", mountpoint)
    return set(done.stdout.strip().split(","))


def test_read_only_mounts_write_nothing_and_may_be_several(source: Path) -> None:
    """Also after a crash: what the journal holds is shown, and left where it is."""
    sealed = source / "disk.raw.sealed"
    with mounted(source, source.parent / "mnt") as mount:
        with open(mount.mountpoint / "disk.raw", "r+b", buffering=0) as file:
            file.write(b"synced")
            os.fsync(file.fileno())
        mount.kill()
    before, status = sealed.read_bytes(), sealed.stat()
    with (
        mounted(source, source.parent / "one", options="ro") as one,
        mounted(source, source.parent / "two", options="ro,noexec,noatime") as two,
    ):
        assert flags_of(one.mountpoint) >= {"ro", "nosuid", "nodev", "relatime"}
        assert flags_of(two.mountpoint) >= {"ro", "nosuid", "nodev", "noexec", "noatime"}
        for mount in (one, two):
            path = mount.mountpoint / "disk.raw"
            content = path.read_bytes()
            assert (len(content), content[:7]) == (SIZE, b"synced\0")
            for command in (
                "os.open(path, os.O_RDWR)",
                "os.open(path, os.O_RDONLY | os.O_TRUNC)",
                "os.truncate(path, 0)",
                "os.unlink(path)",
                "os.chmod(path, 0o644)",
                "os.utime(path)",
                "os.rename(path, str(path) + '2')",
                "os.mkdir(str(path) + '2')",
                "os.open(str(path) + '2', os.O_CREAT | os.O_WRONLY)",
            ):
                assert errno_of(command, path) == errno.EROFS, command
    after = sealed.stat()
    assert sealed.read_bytes() == before
    assert (after.st_mtime_ns, after.st_ctime_ns) == (status.st_mtime_ns, status.st_ctime_ns)
    assert [path.name for path in source.iterdir()] == ["disk.raw.sealed"]


def test_direct_io_keeps_plaintext_out_of_the_page_cache(source: Path) -> None:
    for options, pages in (("", 1), ("direct_io", 0)):
        with mounted(source, source.parent / "mnt", options=options) as mount:
            fd = os.open(mount.mountpoint / "disk.raw", os.O_RDWR)
            data = os.urandom(100_001)
            assert os.pwrite(fd, data, 4095) == len(data)
            assert os.pread(fd, len(data), 4095) == data
            assert os.pread(fd, 3, 4096) == data[1:4]
            served = mount.status()["requests"]["read"]
            assert os.pread(fd, 4096, 4096) == data[1:4097]
            assert (mount.status()["requests"]["read"] == served) == bool(pages)
            with mmap.mmap(fd, 8192, access=mmap.ACCESS_COPY) as private:
                assert private[4095:8192] == data[:4097]
            if pages:
                mmap.mmap(fd, 8192).close()
            else:
                for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                    with pytest.raises(OSError, match="No such device"):
                        mmap.mmap(fd, 8192, flags=mmap.MAP_SHARED, prot=protection)
            os.close(fd)


def test_owner_and_mode_of_files_made(source: Path) -> None:
    options = "uid=1234,gid=2345,mode=640"
    with mounted(source, source.parent / "mnt", options=options) as mount:
        path = mount.mountpoint / "made.raw"
        path.write_bytes(b"made")
        for place in (path, source / "made.raw.sealed"):
            status = place.stat()
            assert (status.st_uid, status.st_gid) == (1234, 2345)
            assert stat.S_IMODE(status.st_mode) == 0o640
        assert (mount.mountpoint / "disk.raw").stat().st_uid == 0
        done = run(*as_user(1234), "head", "-c", "4", path, status=None)
        assert (done.stdout, done.returncode) in (("made", 0), ("", 1))  # 1: base is root's alone


def test_a_label_goes_to_the_kernel_as_it_is(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without SELinux says EINVAL, which nobody would understand."""
    asked: list[bytes] = []

    class Libc:
        def mount(self, source: bytes, target: bytes, kind: bytes, flags: int, data: bytes) -> int:
            asked.append(data)
            ctypes.set_errno(errno.EINVAL)
            return -1

    mountpoint = source.parent / "mnt"
    mountpoint.mkdir()
    label = 'context="system_u:object_r:virt_image_t:s0:c1,c2"'
    options = MountOptions.parse(f"ro,{label},cache=16M", is_root=True)
    monkeypatch.setattr(kernel, "_libc", Libc())
    with pytest.raises(StorageFailed, match=r"Invalid argument; context=.* SELinux"):
        kernel.mount(source, mountpoint, options)
    assert asked[0].endswith(b"," + label.encode())


def test_options_of_mount_8_in_their_order() -> None:
    parse = partial(MountOptions.parse, is_root=True)
    assert not parse("ro,noexec,noatime,rw,exec,atime").read_only
    assert parse(["defaults", "rw,ro"]).read_only
    for also in ("nodiratime,lazytime,silent,nostrictatime", "x-a=b,comment=c,nofail,_netdev"):
        assert parse(also) == parse("")
    for wrong in ("sync", "remount", "loop", "xyz-a"):
        with pytest.raises(UsageError, match=wrong):
            parse(wrong)


# Endings.

Daemon = subprocess.Popen[bytes]


def served(base: Path, source: Path, mountpoint: Path) -> Daemon:
    """Serve `source` by a process of its own that the test ends itself."""
    mountpoint.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tests.mount_support", source, mountpoint, "--state",
            base / "state", "--run-dir", base / "run", "--log", base / "ending.log",
        ],
        cwd=ROOT, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ending(source: Path, mountpoint: Path) -> contextlib.AbstractContextManager[Daemon]:
    """As `ending_at`, beside the source directory."""
    return ending_at(source.parent, source, mountpoint)


@contextlib.contextmanager
def ending_at(base: Path, source: Path, mountpoint: Path) -> Iterator[Daemon]:
    """As `served`; whatever happens, nothing stays."""
    process = served(base, source, mountpoint)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)


def is_clean(source: Path, name: str = "disk.raw", start: bytes = b"") -> bool:
    """Whether nobody has the image, nothing is left to recover, and it begins so."""
    image = open_offline(source.parent / "state", source / f"{name}.sealed")
    try:
        is_settled = image.status()["journal_used_pages"] == 0
        return is_settled and bytes(image.read(0, len(start))) == start
    finally:
        image.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_a_writer_keeps_all_that_was_synced(
    source: Path, number: signal.Signals
) -> None:
    """As at the host's shutdown."""
    mountpoint = source.parent / "mnt"
    with ending(source, mountpoint) as process:
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, mountpoint / "disk.raw"], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(DEADLINE) == 0
        synced = max(int(line) for line in writer.communicate(timeout=DEADLINE)[0].split())
        assert kernel.mounted_at(str(mountpoint)) is None
    log = (source.parent / "ending.log").read_text()
    assert f"ends on {number.name}" in log
    assert "ERROR" not in log
    image = open_offline(source.parent / "state", source / "disk.raw.sealed")
    assert image.status()["journal_used_pages"] == 0
    found = int.from_bytes(image.read((synced % 100) * 4096, 8), "little")
    assert found % 100 == synced % 100
    assert found >= synced
    image.close()


WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
for number in range(1, 1 << 30):
    try:
        os.pwrite(fd, number.to_bytes(8, "little") * 512, number % 100 * 4096)
        if number % 7 == 0:
            os.fsync(fd)
            print(number, flush=True)
    except OSError:
        break
"""


def test_lazily_unmounted_it_serves_who_has_files_open(source: Path) -> None:
    mountpoint = source.parent / "mnt"
    with ending(source, mountpoint) as process:
        with open(mountpoint / "disk.raw", "r+b", buffering=0) as file:
            with pytest.raises(Busy, match=rf"\({os.getpid()}\)"):
                kernel.unmount(mountpoint)
            kernel.unmount(mountpoint, lazy=True)
            assert not (mountpoint / "disk.raw").exists()
            file.write(b"still served")
            os.fsync(file.fileno())
            assert os.pread(file.fileno(), 5, 0) == b"still"
            assert process.poll() is None
        assert process.wait(DEADLINE) == 0
    assert is_clean(source, start=b"still served")


def test_what_is_no_process_is_named_too(source: Path) -> None:
    """A loop device on a disk, a file system mounted below."""
    with mounted(source, source.parent / "mnt") as mount:
        done = run("losetup", "--find", "--show", mount.mountpoint / "disk.raw")
        device = done.stdout.strip()
        try:
            with pytest.raises(Busy, match=device):
                kernel.unmount(mount.mountpoint)
        finally:
            run("losetup", "--detach", device)
        below = mount.mountpoint / "below"
        below.mkdir()
        run("mount", "-t", "tmpfs", "none", below)
        try:
            with pytest.raises(Busy, match=f'the mount "{below}"'):
                kernel.unmount(mount.mountpoint)
        finally:
            run("umount", below)
        wait_for(lambda: unmounts(mount.mountpoint), "the loop device lets go")


def unmounts(mountpoint: Path) -> bool:
    try:
        kernel.unmount(mountpoint)
    except Busy:
        return False
    return True


def test_a_mount_point_that_another_namespace_removes(source: Path) -> None:
    mountpoint = source.parent / "mnt"
    with ending(source, mountpoint) as process:
        with open(mountpoint / "disk.raw", "r+b", buffering=0) as file:
            file.write(b"kept")
            with mount_namespace() as inside:
                inside.run("rmdir", mountpoint)
            assert kernel.mounted_at(str(mountpoint)) is None
            assert os.pread(file.fileno(), 4, 0) == b"kept"
        assert process.wait(DEADLINE) == 0
    assert is_clean(source, start=b"kept")


def test_a_mount_point_that_is_renamed_leaves_no_dead_mount(source: Path) -> None:
    parent, renamed = source.parent / "old", source.parent / "new"
    parent.mkdir()
    with ending(source, parent / "mnt") as process:
        parent.rename(renamed)
        (renamed / "mnt" / "disk.raw").write_bytes(b"kept")
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE) == 0
        left = kernel.mounted_at(str(renamed / "mnt"))
        subprocess.run(["umount", "-l", renamed / "mnt"], check=False, capture_output=True)
    assert left is None
    assert is_clean(source, start=b"kept")


def test_a_new_mount_in_the_place_of_one_that_still_closes(source: Path) -> None:
    """Device number, place and source are the same: the old daemon touches nothing of the new."""
    mountpoint, run_dir = source.parent / "mnt", source.parent / "run"
    with ending(source, mountpoint) as old:
        (mountpoint / "disk.raw").write_bytes(os.urandom(SIZE))
        before = kernel.mounted_at(str(mountpoint))
        kernel.unmount(mountpoint)
        old.send_signal(signal.SIGSTOP)
        with ending(source, mountpoint) as new:
            is_same = kernel.mounted_at(str(mountpoint)) == before
            old.send_signal(signal.SIGCONT)
            assert old.wait(DEADLINE) == 0
            time.sleep(0.2)
            assert new.poll() is None
            assert os.listdir(mountpoint) == ["disk.raw"]
            assert find_mount(mountpoint, run_dir) is not None
            session.unmount(mountpoint, run_dir=run_dir)
            assert new.wait(DEADLINE) == 0
    if not is_same:
        pytest.skip("other mounts of this host took the number")


def test_a_mount_that_another_namespace_has_too_is_said_to_be_there_still(source: Path) -> None:
    mountpoint, run_dir = source.parent / "mnt", source.parent / "run"
    with ending(source, mountpoint) as process, contextlib.ExitStack() as stack:
        (mountpoint / "disk.raw").write_bytes(b"kept")
        keeper = subprocess.Popen([ROOT / "tests/cli/keep", mountpoint])
        stack.callback(keeper.wait)
        stack.callback(keeper.kill)
        wait_for(lambda: Path(f"/proc/{keeper.pid}/comm").read_text() == "sleep\n", "unshare")
        with pytest.raises(Busy, match=rf"but sleep \({keeper.pid}\) has it in") as caught:
            session.unmount(mountpoint, run_dir=run_dir)
        assert process.poll() is None
        assert kernel.mounted_at(str(mountpoint)) is None
        hint = hint_of(caught.value, Situation(command="umount", path=mountpoint))
        assert hint == f"nsenter --mount=/proc/{keeper.pid}/ns/mnt umount {mountpoint}"
        run(*shlex.split(hint))
        assert process.wait(DEADLINE) == 0
        assert keeper.poll() is None
    assert is_clean(source, start=b"kept")


def test_a_daemon_with_which_many_wait_already_does_not_answer(tmp_path: Path) -> None:
    place = tmp_path / "7.sock"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(place))
        listener.listen(0)
        stack.enter_context(connection(place))
        began = time.monotonic()
        with pytest.raises(Busy, match="does not answer"):
            stack.enter_context(connection(place))
        assert time.monotonic() - began > 1
        assert list(running_mounts(tmp_path)) == []


def test_a_stopped_daemon_holds_up_its_own_mount_only(source: Path) -> None:
    run_dir = source.parent / "run"
    umount = partial(session.unmount, run_dir=run_dir)
    with ending(source, source.parent / "two") as two, ending(source, source.parent / "one") as one:
        fd = os.open(source.parent / "one" / "disk.raw", os.O_RDWR)
        one.send_signal(signal.SIGSTOP)
        # No process may be started now: its copy of the descriptor would not close.
        writer = threading.Thread(target=os.pwrite, args=(fd, b"late", 0))
        other = threading.Thread(target=umount, args=(source.parent / "two",))
        writer.start()
        other.start()
        other.join(10)
        is_held_up = other.is_alive()
        if not is_held_up:
            with pytest.raises(Busy, match="does not answer"):
                umount(source.parent / "one")
        assert writer.is_alive()
        one.send_signal(signal.SIGCONT)
        writer.join(DEADLINE)
        other.join(DEADLINE)
        os.fsync(fd)
        assert os.pread(fd, 4, 0) == b"late"
        os.close(fd)
        umount(source.parent / "one")
        assert (one.wait(DEADLINE), two.wait(DEADLINE)) == (0, 0)
    assert is_clean(source, start=b"late")
    assert not is_held_up


def test_the_source_directory_is_removed(source: Path) -> None:
    """Open files go on; everything else is told so at once, and the log once."""
    with mounted(source, source.parent / "mnt") as mount:
        path = mount.mountpoint / "disk.raw"
        fd = os.open(path, os.O_RDWR)
        os.pwrite(fd, b"before", 0)
        shutil.rmtree(source)
        assert os.pwrite(fd, b"after!", 8192) == 6
        os.fsync(fd)
        assert (os.pread(fd, 6, 0), os.pread(fd, 6, 8192)) == (b"before", b"after!")
        gone = (errno.ENOENT, errno.EIO)
        time.sleep(1.1)  # what the kernel remembers ends
        for command in 2 * (
            "os.stat(path)",
            "os.listdir(path.parent)",
            "os.open(str(path) + '2', os.O_CREAT | os.O_WRONLY)",
            "os.mkdir(str(path) + '2')",
            "os.statvfs(path.parent)",
        ):
            assert errno_of(command, path) in gone, command
        os.close(fd)
        mount.unmount()
        assert mount.log_text().count("the source directory is gone") == 1


def test_the_file_system_below_is_unmounted_lazily(tmp_path: Path) -> None:
    disk, below = tmp_path / "disk.img", tmp_path / "below"
    with open(disk, "wb") as file:
        file.truncate(64 << 20)
    below.mkdir()
    run("mkfs.ext4", "-q", disk)
    run("mount", "-o", "loop", disk, below)
    source = below / "source"
    try:
        source.mkdir()
        seal_new(tmp_path / "state", source / "disk.raw.sealed", vm_id="disk", size=SIZE)
        mountpoint = tmp_path / "mnt"
        with ending_at(tmp_path, source, mountpoint) as process:
            with open(mountpoint / "disk.raw", "r+b", buffering=0) as opened:
                opened.write(b"before")
                run("umount", below, status=32)
                run("umount", "-l", below)
                opened.write(b", after")
                os.fsync(opened.fileno())
                assert os.pread(opened.fileno(), 13, 0) == b"before, after"
                assert errno_of("os.stat(path)", mountpoint / "other") in (
                    errno.ENOENT,
                    errno.EIO,
                )
            session.unmount(mountpoint, run_dir=tmp_path / "run")
            assert process.wait(DEADLINE) == 0
        run("mount", "-o", "loop", disk, below)
        image = open_offline(tmp_path / "state", source / "disk.raw.sealed")
        assert image.status()["journal_used_pages"] == 0
        assert bytes(image.read(0, 13)) == b"before, after"
        image.close()
    finally:
        subprocess.run(["umount", "-l", below], check=False, capture_output=True)


def test_a_sealed_file_is_taken_away_while_it_is_open(source: Path) -> None:
    """Deleted, it is served to the end as any open file; the others are as before."""
    seal_new(source.parent / "state", source / "other.raw.sealed", vm_id="other", size=SIZE)
    with mounted(source, source.parent / "mnt", options="idle=0.2") as mount:
        fd = os.open(mount.mountpoint / "disk.raw", os.O_RDWR)
        os.pwrite(fd, b"here", 0)
        (source / "disk.raw.sealed").unlink()
        os.pwrite(fd, b"still", 4096)
        os.fsync(fd)
        assert (os.pread(fd, 4, 0), os.pread(fd, 5, 4096)) == (b"here", b"still")
        time.sleep(1.1)
        assert errno_of("os.stat(path)", mount.mountpoint / "disk.raw") == errno.ENOENT
        os.close(fd)
        (mount.mountpoint / "other.raw").write_bytes(b"fine")
        assert os.listdir(mount.mountpoint) == ["other.raw"]
        wait_for(lambda: not mount.status()["images"], "both are closed")
        mount.unmount()


@pytest.mark.tpm
def test_a_dead_mount_point_is_explained_and_works_again(host: Host) -> None:
    host.mount()
    os.kill(host.daemon_pid(), signal.SIGKILL)
    wait_for(lambda: errno_of("os.statvfs(path)", host.mountpoint) == errno.ENOTCONN, "death")
    program: list[str | Path] = [Path(sys.executable).parent / "sealfs", "--state", host.state]
    done = run(*program, "mount", host.images, host.mountpoint, status=9)
    assert "is a dead mount: its daemon ended without unmounting" in done.stderr
    assert f"sealfs: hint: umount -l {host.mountpoint}\n" in done.stderr
    run("umount", "-l", host.mountpoint)
    host.mount()
    assert "a.raw" in os.listdir(host.mountpoint)
    host.umount()


# The log, and names.


@pytest.fixture
def loggers() -> Iterator[None]:
    """The program's loggers as they were, afterwards."""
    all_of_them = [logging.getLogger(name) for name in ("sealfs", "pyfuse3")]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in all_of_them]
    yield
    for logger, handlers, level, propagate in before:
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.mark.usefixtures("loggers")
@pytest.mark.parametrize("has_syslog", [False, True])
def test_without_syslog_the_log_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_syslog: bool
) -> None:
    fallback, log = tmp_path / "run" / "mount.log", logging.getLogger("sealfs.mount.test")
    monkeypatch.setattr(daemon, "SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslog:
        if has_syslog:
            syslog.bind(daemon.SYSLOG)
        daemon.set_up_log(foreground=False, file=None, verbose=0, fallback=fallback)
        log.error('image="%s" is gone', "a\nb\udcff")
        text = syslog.recv(1000).decode() if has_syslog else fallback.read_text()
    assert re.search(r'sealfs\[\d+\]: ERROR: image="a\\nb\\udcff" is gone\n?$', text)
    assert text.count("\n") == (0 if has_syslog else 1)
    assert text.startswith("<27>") == has_syslog
    assert fallback.exists() != has_syslog


def test_names_of_any_bytes(tmp_path: Path) -> None:
    """In the table of mounts, of a sealed file, of the mount point; and in the log."""
    odd = os.fsdecode(b" a#\\b,\xff\n\x0c\xe2\x80\xa8")
    other = tmp_path / f"other{odd}"
    other.mkdir()
    run("mount", "-t", "tmpfs", "with#hash", other)
    try:
        there = kernel.mounted_at(str(other))
        assert there is not None
        assert there.source == "with#hash"
        source, mountpoint = tmp_path / f"source{odd}", tmp_path / f"mnt{odd}"
        source.mkdir()
        (source / "plain\nname").write_bytes(b"")
        sealed = source / f"disk{odd}.sealed"
        seal_new(tmp_path / "state", sealed, vm_id="odd", size=SIZE)
        for helper in (False, True):
            with mounted(source, mountpoint, helper=helper) as mount:
                there = kernel.mounted_at(str(mountpoint))
                assert there is not None
                assert there.source == str(source)
                assert os.listdir(mountpoint) == [f"disk{odd}"]
                with open(mountpoint / f"disk{odd}", "r+b") as file:
                    file.write(b"odd")
                    file.flush()
                    assert mount.status()["images"][0]["path"] == str(sealed)
                    with pytest.raises(Busy, match=str(os.getpid())):
                        kernel.unmount(mountpoint)
                wait_for(lambda: "plain\\nname" in mount.log.read_text(), "the log")
                mount.unmount()
    finally:
        run("umount", other)


# Scale.


def resident_mb(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) >> 10


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def test_a_full_directory_is_listed_fast_and_forgotten(source: Path) -> None:
    fill(source, source / "disk.raw.sealed", MANY)
    with mounted(source, source.parent / "mnt") as mount:
        begun = time.monotonic()
        lines = run("ls", "-l", mount.mountpoint).stdout.splitlines()[1:]
        took = time.monotonic() - begun
        assert took < 10, took
        assert len(lines) == MANY + 1
        assert {line.split()[4] for line in lines} == {str(SIZE)}
        before = resident_mb(mount.process.pid)
        for round_ in range(2):
            names = os.listdir(mount.mountpoint)
            for name in names[round_::10]:
                os.stat(mount.mountpoint / name)
            drop_caches()
        # The kernel gives a name back by a FORGET, and may take more than one try.
        for _ in range(20):
            drop_caches()
            if mount.status()["nodes"] < MANY / 10:
                break
            time.sleep(0.1)
        assert mount.status()["nodes"] < MANY / 10
        assert resident_mb(mount.process.pid) - before < 32
        (mount.mountpoint / "disk.raw").write_bytes(b"at work")


def test_names_are_forgotten_while_their_files_are_used(source: Path) -> None:
    """FORGET, open, write and rename of the same names at the same time."""
    names = [f"vm{number}" for number in range(12)]
    for name in names:
        seal_new(source.parent / "state", source / f"{name}.sealed", vm_id=name, size=1 << 16)
    stop = time.monotonic() + 1.5
    failures: list[object] = []

    def use(number: int) -> None:
        path, count = mount.mountpoint / names[number], 0
        moved = path.with_suffix(".x")
        try:
            while time.monotonic() < stop:
                count += 1
                with open(path, "r+b", buffering=0) as file:
                    file.write(count.to_bytes(8, "little"))
                    os.stat(path)
                    path.rename(moved)
                    assert os.fstat(file.fileno()).st_size == 1 << 16
                    assert int.from_bytes(moved.read_bytes()[:8], "little") == count
                    moved.rename(path)
        except Exception as exc:
            failures.append((names[number], count, exc))

    with mounted(source, source.parent / "mnt", options="idle=0.05") as mount:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(len(names))]
        for thread in threads:
            thread.start()
        while time.monotonic() < stop:
            drop_caches()
            time.sleep(0.01)
        for thread in threads:
            thread.join(DEADLINE)
        assert not failures
        assert sorted(os.listdir(mount.mountpoint)) == sorted(["disk.raw", *names])


LOAD = """
import mmap, os, random, sys
direct = os.O_DIRECT if sys.argv[2] == "direct" else 0
fd = os.open(sys.argv[1], os.O_RDWR | direct)
room = mmap.mmap(-1, 1 << 16)
print("ready", flush=True)
while True:
    offset = random.randrange(60) << 16
    room[:8] = offset.to_bytes(8, "little")
    os.pwritev(fd, [room], offset)
    os.preadv(fd, [room], random.randrange(60) << 16)
    if random.random() < 0.2:
        os.fsync(fd)
"""


def test_a_process_killed_in_a_request_dies_at_once_and_harms_nothing(source: Path) -> None:
    """Its request is interrupted, or answered to nobody."""
    with mounted(source, source.parent / "mnt", options="dirty=4M,cache=4M") as mount:
        path = mount.mountpoint / "disk.raw"
        slowest = 0.0
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT) * 2:
            processes = [
                subprocess.Popen(
                    [sys.executable, "-c", LOAD, path, how],
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )
                for how in ("direct", "buffered")
            ]  # fmt: skip
            for process in processes:
                assert process.stdout is not None
                process.stdout.readline()
            time.sleep(0.1)
            begun = time.monotonic()
            for process in processes:
                process.send_signal(number)
            for process in processes:
                process.wait(DEADLINE)
                assert process.stdout is not None
                process.stdout.close()
            slowest = max(slowest, time.monotonic() - begun)
        assert slowest < 10  # of a request, not of the kill
        content = path.read_bytes()
        for offset in range(0, 60 << 16, 1 << 16):
            assert int.from_bytes(content[offset : offset + 8], "little") in (0, offset)
        unclear = [line for line in mount.log_text().splitlines() if "ERROR" in line]
        assert not [line for line in unclear if "answered request" not in line]
    assert is_clean(source)


def test_an_interrupt_that_libfuse_wants_again_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It answers EAGAIN under the INTERRUPT's own number when it has not met the request yet."""
    device, kernel_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def scenario() -> None:
        relay = Relay(device.fileno())
        try:
            with socket.socket(fileno=relay.hand_over()) as libfuse:
                async with trio.open_nursery() as nursery:
                    await nursery.start(relay.run)
                    getattr_, number = 3, 818
                    relay.forward(message(getattr_, number, b""))
                    relay.forward(
                        message(Opcode.INTERRUPT, number + 1, number.to_bytes(8, "little"))
                    )
                    libfuse.send(OUT_HEADER.pack(16, -errno.EAGAIN, number + 1))
                    libfuse.send(OUT_HEADER.pack(16, 0, number))
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    nursery.cancel_scope.cancel()
        finally:
            relay.close()

    def message(opcode: int, number: int, body: bytes) -> bytearray:
        size = IN_HEADER.size + len(body)
        return bytearray(IN_HEADER.pack(size, opcode, number, 1, 0, 0, 0, 0, 0) + body)

    with device, kernel_end:
        trio.run(scenario)
        kernel_end.setblocking(False)
        answers = [OUT_HEADER.unpack(kernel_end.recv(100))]
        with contextlib.suppress(BlockingIOError):
            answers.append(OUT_HEADER.unpack(kernel_end.recv(100)))
    assert (16, 0, 818) in answers
    assert not caplog.records


PART = 1 << 20
WRITE_PART = """
import hashlib, mmap, os, random, sys
path, number, part, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
fd = os.open(path, os.O_RDWR | (os.O_DIRECT if how == "direct" else 0))
rng, room = random.Random(number), mmap.mmap(-1, part)
os.preadv(fd, [room], number * part)
for _ in range(60):
    offset = rng.randrange(part // 4096 - 16) * 4096
    size = rng.randrange(1, 16) * 4096
    room[offset : offset + size] = rng.randbytes(size)
    os.pwritev(fd, [memoryview(room)[offset : offset + size]], number * part + offset)
    if rng.random() < 0.1:
        os.fsync(fd)
os.fsync(fd)
print(hashlib.sha256(room).hexdigest())
"""


def test_eight_writing_processes_of_two_kinds(source: Path) -> None:
    seal_new(source.parent / "state", source / "big.raw.sealed", vm_id="big", size=8 * PART)
    with mounted(source, source.parent / "mnt", options="dirty=4M,cache=4M") as mount:
        path = mount.mountpoint / "big.raw"
        processes = [
            subprocess.Popen(
                [
                    sys.executable, "-c", WRITE_PART, path, str(number), str(PART),
                    "direct" if number % 2 else "buffered",
                ],
                stdout=subprocess.PIPE, text=True,
            )
            for number in range(8)
        ]  # fmt: skip
        sums = [process.communicate(timeout=DEADLINE)[0].strip() for process in processes]
        content = path.read_bytes()
    expected = [
        hashlib.sha256(content[start : start + PART]).hexdigest()
        for start in range(0, 8 * PART, PART)
    ]
    assert sums == expected
    with mounted(source, source.parent / "mnt") as mount:
        assert (mount.mountpoint / "big.raw").read_bytes() == content


def test_queue_depth_and_read_ahead_are_raised(source: Path, tmp_path: Path) -> None:
    control = tmp_path / "connections"
    control.mkdir()
    run("mount", "-t", "fusectl", "none", control)
    try:
        with mounted(source, source.parent / "mnt") as mount:
            there = kernel.mounted_at(str(mount.mountpoint))
            assert there is not None
            knobs = control / str(there.minor)
            assert int((knobs / "max_background").read_text()) == MAX_BACKGROUND
            assert int((knobs / "congestion_threshold").read_text()) == CONGESTION_THRESHOLD
            bdi = Path(f"/sys/class/bdi/{there.major}:{there.minor}/read_ahead_kb")
            assert int(bdi.read_text()) == kernel.READ_AHEAD_KB
    finally:
        run("umount", control)


# Tools.


def contents(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_copies_by_an_administrator_s_tools_are_whole_and_stay_sparse(
    source: Path, tmp_path: Path
) -> None:
    (source / "vms").mkdir()
    seal_new(tmp_path / "state", source / "vms" / "thin.sealed", vm_id="thin", size=64 << 20)
    with mounted(source, tmp_path / "mnt") as mount:
        thin = mount.mountpoint / "vms" / "thin"
        for offset in (0, 10 << 20, (64 << 20) - 5000):
            run("dd", "if=/dev/urandom", f"of={thin}", "bs=5000", "count=1", "conv=notrunc,fsync",
                "oflag=seek_bytes", f"seek={offset}")  # fmt: skip
        (mount.mountpoint / "disk.raw").write_bytes(os.urandom(SIZE))
        expected = contents(mount.mountpoint)

        ways: list[tuple[str, list[str | Path]]] = [
            ("cp", ["cp", "-a", "--sparse=always", f"{mount.mountpoint}/.", "TO"]),
            ("auto", ["cp", "-a", f"{mount.mountpoint}/.", "TO"]),
            ("tar", ["sh", "-c", f"tar -C {mount.mountpoint} -S -c . | tar -C TO -x"]),
        ]
        for name, command in ways:
            target = tmp_path / name
            target.mkdir()
            run(*(str(part).replace("TO", str(target)) for part in command))
            assert contents(target) == expected, name
            assert (target / "vms" / "thin").stat().st_blocks * 512 < 1 << 20, name
            assert (target / "vms").stat().st_mode == thin.parent.stat().st_mode
            shutil.rmtree(target)

        # And back in: what comes in is sealed, and as sparse.
        plain = tmp_path / "plain"
        plain.mkdir()
        run("cp", "--sparse=always", thin, plain / "new1")
        run("cp", "-a", "--sparse=always", plain / "new1", mount.mountpoint)
        run("install", "-m", "640", plain / "new1", mount.mountpoint / "new2")
        run("tar", "-C", mount.mountpoint, "-xSf", tarball(plain))
        for name, mode in (("new1", 0o600), ("new2", 0o640), ("new3", 0o600)):
            made = mount.mountpoint / name
            assert contents(mount.mountpoint)[name] == expected["vms/thin"], name
            assert stat.S_IMODE(made.stat().st_mode) == mode, name
        allocated = int(run("ls", "-lsk", mount.mountpoint / "new1").stdout.split()[0])
        assert allocated < 24 << 10  # the journal, and little of the 64 MiB
        assert int(run("du", "-k", thin).stdout.split()[0]) < 24 << 10
        assert run("du", "-kb", thin).stdout.split()[0] == str(64 << 20)


def tarball(plain: Path) -> Path:
    (plain / "new1").rename(plain / "new3")
    archive = plain.parent / "plain.tar"
    run("tar", "-C", plain, "-cSf", archive, "new3")
    return archive


def test_everyday_commands(source: Path, tmp_path: Path) -> None:
    (source / "vms").mkdir()
    with mounted(source, tmp_path / "mnt") as mount:
        root = mount.mountpoint
        disk = root / "disk.raw"
        run("dd", "if=/dev/zero", f"of={disk}", "bs=512", "count=3", "seek=5", "conv=notrunc",
            "oflag=direct")  # fmt: skip
        assert disk.stat().st_size == SIZE
        run("sh", "-c", f"printf abc > {root}/log && printf def >> {root}/log")
        assert (root / "log").read_bytes() == b"abcdef"
        run("touch", root / "empty", root / "log")
        run("touch", "-d", "2020-01-02 03:04:05 UTC", root / "log")
        assert (root / "log").stat().st_mtime == 1577934245
        run("truncate", "-s", "1G", root / "empty")
        run("truncate", "-s", "-512M", root / "empty")
        assert (root / "empty").stat().st_size == 512 << 20
        run("mv", root / "log", root / "vms" / "log2")
        run("mv", root / "vms" / "log2", root / "log")
        run("mv", root / "vms", root / "vms2")
        run("mv", tmp_path / "mnt.log", tmp_path / "moved.log")
        run("mv", "-n", root / "log", root / "empty")
        assert (root / "log").exists()
        # From another file system and to it: copied, then removed.
        (tmp_path / "outside").write_bytes(b"outside")
        run("mv", tmp_path / "outside", root / "vms2" / "inside")
        run("mv", root / "vms2" / "inside", tmp_path / "outside")
        assert (tmp_path / "outside").read_bytes() == b"outside"
        run("mv", tmp_path / "moved.log", tmp_path / "mnt.log")
        found = run("find", root, "-type", "f", "-name", "*o*", "-newermt", "2019-01-01").stdout
        assert found == f"{root}/log\n"
        assert run("df", "--output=fstype", root).stdout.split()[-1] == kernel.FSTYPE
        with open(disk, "rb") as opened:
            assert str(os.getpid()) in " ".join(kernel.holders(str(root)))
            assert opened.read(1) == b"\0"
        run("rm", "-r", root / "vms2", root / "empty", root / "log")
        assert os.listdir(root) == ["disk.raw"]


def test_what_a_disk_file_cannot_have_is_refused_politely(source: Path) -> None:
    unsupported = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS)
    with mounted(source, source.parent / "mnt") as mount:
        disk = mount.mountpoint / "disk.raw"
        assert errno_of("os.setxattr(path, 'user.a', b'b')", disk) in unsupported
        assert errno_of("os.getxattr(path, 'user.a')", disk) in unsupported
        assert errno_of("os.removexattr(path, 'user.a')", disk) in unsupported
        assert errno_of("os.listxattr(path)", disk) in (0, *unsupported)
        for command in (["lsattr"], ["chattr", "+i"]):
            done = run(*command, disk, status=None)
            assert done.returncode != 0
            assert re.search("not supported|Inappropriate ioctl|not implemented", done.stderr)
        assert errno_of("os.mkfifo(str(path) + '.fifo')", disk) in (errno.EPERM, errno.ENOSYS)
        done = run("mknod", f"{disk}.null", "c", "1", "3", status=None)
        assert done.returncode != 0
        assert os.listdir(mount.mountpoint) == ["disk.raw"]
        disk.write_bytes(b"at work")


def test_watches_see_what_happens_through_the_mount(source: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with mounted(source, source.parent / "mnt") as mount:
        watch = libc.inotify_init1(os.O_CLOEXEC)
        everything = 0xFFF  # IN_ALL_EVENTS
        assert libc.inotify_add_watch(watch, os.fsencode(mount.mountpoint), everything) > 0
        (mount.mountpoint / "new.raw").write_bytes(b"new")
        (mount.mountpoint / "new.raw").rename(mount.mountpoint / "renamed.raw")
        (mount.mountpoint / "renamed.raw").unlink()
        seen = 0
        events = os.read(watch, 1 << 16)
        os.close(watch)
        while events:
            _, mask, _, size = struct.unpack_from("iIII", events)
            seen |= mask
            events = events[16 + size :]
    # IN_CREATE, IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO, IN_DELETE
    for bit in (0x100, 0x2, 0x8, 0x40, 0x80, 0x200):
        assert seen & bit, hex(bit)
