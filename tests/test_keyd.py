"""`sealfs keyd` as a process beside mounts: what it holds, what it gives away, what it survives."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from host_support import Host
from keyd_support import Running, raw_connection, wait_until
from keys_support import key_bytes
from mount_support import Mounted, TinyKeys, mounted, seal_new
from test_mount import (  # the mount's own tests, here on a mount whose keys are keyd's
    SIZE,
    test_a_file_made_without_opening_it,
    test_a_removed_file_lives_until_it_is_closed,
    test_a_replaced_file_lives_until_it_is_closed,
    test_attributes_are_those_of_the_sealed_file_with_the_plain_size,
    test_create_rename_and_remove_keep_the_registry_in_step,
    test_names_that_cannot_be,
    test_odd_offsets_and_sizes,
    test_only_sealed_files_and_directories_are_shown,
    test_resize_by_command_of_a_file_in_use_and_of_one_that_is_not,
)

from sealfs.errors import WrongPin
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys import keyd_wire, labels
from sealfs.keys.ledger import AUDIT_ID, REGISTRY_ID
from sealfs.keys.remote import RemoteKeys
from sealfs.keys.service import KeyService

__all__ = (
    "test_a_file_made_without_opening_it",
    "test_a_removed_file_lives_until_it_is_closed",
    "test_a_replaced_file_lives_until_it_is_closed",
    "test_attributes_are_those_of_the_sealed_file_with_the_plain_size",
    "test_create_rename_and_remove_keep_the_registry_in_step",
    "test_names_that_cannot_be",
    "test_odd_offsets_and_sizes",
    "test_only_sealed_files_and_directories_are_shown",
    "test_resize_by_command_of_a_file_in_use_and_of_one_that_is_not",
)

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.tpm,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

FUZZED = 100_000
FUZZED_WITH_KEYS = 500
"""Messages on connections that joined, whose sensible ones make the TPM work."""
GROWTH_MAX = 8 << 20  # bytes; the arenas of a few threads


# A mount as in test_mount, with a broker in this process.


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    base = tmp_path_factory.mktemp("keyd")
    source = base / "source"
    (source / "100").mkdir(parents=True)
    seal_new(base / "state", source / "disk.raw.sealed", vm_id="disk", size=SIZE)
    seal_new(base / "state", source / "100" / "disk.raw.sealed", vm_id="100/disk", size=4096)
    seal_new(base / "state", base / "elsewhere.sealed", vm_id="200/disk", size=4096)
    (source / "forgotten.raw").write_text("plaintext")
    options = f"keyd={base / 'keyd.sock'}"
    with (
        Running(base / "state") as running,
        mounted(source, base / "mnt", options=options) as found,
    ):
        found.lane = "on"  # type: ignore[attr-defined]
        found.running = running  # type: ignore[attr-defined]
        yield found


@pytest.fixture
def disk(mount: Mounted) -> Path:
    return mount.mountpoint / "disk.raw"


def test_a_mount_goes_on_while_keyd_is_away(mount: Mounted, disk: Path) -> None:
    running: Running = mount.running  # type: ignore[attr-defined]
    content, other = os.urandom(1 << 20), mount.mountpoint / "100" / "disk.raw"
    with open(disk, "r+b") as file:
        running.stop()
        file.write(content)
        os.fsync(file.fileno())
        for refused in (lambda: (mount.mountpoint / "new.raw").touch(), disk.unlink):
            with pytest.raises(PermissionError):
                refused()
        assert "KeydUnavailable: keyd does not answer" in mount.log_text()
        running.start()
        assert len(other.read_bytes()) == 4096
        (mount.mountpoint / "new.raw").touch()
        (mount.mountpoint / "new.raw").unlink()
        file.seek(0)
        assert file.read(1 << 20) == content


# keyd as a process of its own, with a TPM.


class Keyd:
    """`sealfs keyd` in the foreground."""

    def __init__(self, host: Host, *, under: tuple[str, ...] = ()) -> None:
        self.host = host
        self.path = host.state / "keyd.sock"
        self.log = host.directory / "keyd.log"
        self._under = under
        self.start()

    def start(self) -> None:
        command = [*self._under, sys.executable, "-m", "sealfs.cli.main",
                   "--state", self.host.state, "keyd", "-v", "--foreground",
                   "--log", self.log]  # fmt: skip
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=self.host.directory,
            preexec_fn=_start_as_anybody,
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), raw_connection(self.path, joined=False):
            return True
        return False

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def size(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


def _start_as_anybody() -> None:
    """Cores allowed, locked memory limited: keyd sees to both itself."""
    _allow_core()
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))


def _allow_core() -> None:
    limit = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.clear()


@pytest.fixture
def keyd(host: Host) -> Iterator[Keyd]:
    made = Keyd(host)
    yield made
    if made.process.poll() is None:
        assert made.end() == 0, made.log.read_text()
    assert "Traceback" not in made.log.read_text(), made.log.read_text()


class Secrets:
    """What is secret on a host with one image, found in process."""

    def __init__(self, host: Host, sealed: Path) -> None:
        storage = FileStorage.open(sealed, read_only=True)
        with contextlib.closing(storage):
            identity = read_identity(storage)
        _, wrapped = identity.wrapped_keys[0]
        with KeyService.open(host.state) as keys:
            with keys.unseal(identity.kmi, identity.vm_id) as vm_key:
                self.vm_key = key_bytes(vm_key)
            arguments = (identity.kmi, identity.vm_id, identity.uuid, wrapped)
            self.image_key = bytes(keys.image_key(*arguments))
            with keys._host.subkey(labels.REGISTRY_MAC_INFO) as registry_key:
                self.registry_key = bytes(registry_key)
            with keys._host.subkey(labels.LEDGER_MAC_INFO) as ledger_key:
                self.ledger_key = bytes(ledger_key)
            assert keys._host._secret is not None
            self.host_secret = bytes(keys._host._secret)

    def of_keyd(self) -> dict[str, bytes]:
        """What no mount may have, by name."""
        return {name: value for name, value in vars(self).items() if name != "image_key"}


def forms(secret: bytes) -> list[bytes]:
    """A secret as bytes, and as text that somebody might print; half of it is enough."""
    half = secret[: len(secret) // 2]
    return [half, half.hex().encode(), half.hex().upper().encode(),
            base64.b64encode(half)[:-4], repr(half)[2:-1].encode()]  # fmt: skip


def found_in(content: bytes, secrets: dict[str, bytes]) -> set[str]:
    return {
        name for name, value in secrets.items() if any(form in content for form in forms(value))
    }


def memory_of(pid: int) -> bytes:
    """Everything that a process has in memory; root may read it."""
    found = []
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if match is None:
                continue
            start, end = (int(number, 16) for number in match.groups())
            with contextlib.suppress(OSError, OverflowError, ValueError):
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


def said_by(pid: int) -> bytes:
    """What /proc tells about a process, its memory left out."""
    names = ("cmdline", "environ", "comm", "status", "maps", "stat")
    found = [Path(f"/proc/{pid}/{name}").read_bytes() for name in names]
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.fsencode(os.readlink(file)))
    return b"\n".join(found)


def make_disk(host: Host, name: str, size: str = "4M") -> Path:
    sealed = host.images / f"{name}.sealed"
    host.run("create", sealed, "--size", size, "--vm-id", name)
    return sealed


@pytest.mark.parametrize("way", ["in process", "keyd"])
def test_c11_the_console_holds_the_key_service_or_asks_a_process_of_its_own(
    host: Host, way: str
) -> None:
    """One image, opened in both ways; apart, the mount has image keys and nothing else."""
    sealed = make_disk(host, "web1")
    secrets = Secrets(host, sealed)
    keyd = Keyd(host) if way == "keyd" else None
    small = "cache=4M,dirty=4M"
    if keyd is None:
        host.mount(small)
    else:
        # Not even the state directory's name: all that it knows is the socket.
        nowhere = ("--state", "/nonexistent", "--tpm", "device:/nonexistent")
        host.run(*nowhere, "mount", host.images, host.mountpoint, "--log", host.log,
                 "-o", f"{small},keyd={keyd.path}")  # fmt: skip
    with open(host.mountpoint / "web1", "r+b") as file:
        file.write(b"sealed by either")
        os.fsync(file.fileno())
        pid = host.daemon_pid()
        memory, maps = memory_of(pid), Path(f"/proc/{pid}/maps").read_text()
        files = [os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()]
    assert found_in(memory, {"image_key": secrets.image_key})
    if keyd is None:
        assert "host_secret" in found_in(memory, secrets.of_keyd())
        assert "libtss2" in maps
    else:
        assert not found_in(memory, secrets.of_keyd())
        assert "libtss2" not in maps
        # Of the state directory the lock of the image alone; of the key's memory nothing is left.
        of_state = [name for name in files if name.startswith(str(host.state))]
        assert all(name.startswith(str(host.state / "images")) for name in of_state)
        assert not [name for name in files if "memfd" in name]
        assert found_in(memory_of(keyd.process.pid), secrets.of_keyd())
    host.umount()
    if keyd is not None:
        assert keyd.end() == 0
        assert not keyd.path.exists()
        # The same image, by the key service in the console's own process.
        host.mount()
        assert (host.mountpoint / "web1").read_bytes()[:16] == b"sealed by either"
        host.umount()
    host.run("check", "--data", sealed)


def test_no_key_is_where_somebody_may_look(host: Host, keyd: Keyd, tmp_path: Path) -> None:
    sealed = make_disk(host, "web1")
    secrets = vars(Secrets(host, sealed))
    host.mount(f"keyd={keyd.path}")
    with open(host.mountpoint / "web1", "rb") as file:
        file.read()
        mount_pid = host.daemon_pid()
        looked_at = {f"/proc/{pid}": said_by(pid) for pid in (mount_pid, keyd.process.pid)}
    host.umount()
    # A core is allowed by whoever started it, and yet there is none.
    status = keyd.end(signal.SIGABRT)
    assert status == -signal.SIGABRT
    for place in (tmp_path, Path(f"/proc/{os.getpid()}/cwd")):
        assert not [path for path in place.glob("core*") if path.is_file()]
    for path in tmp_path.rglob("*"):
        if path.is_file() and not path.is_relative_to(host.state / "tpm"):
            looked_at[str(path)] = path.read_bytes()
    assert {str(host.log), str(keyd.log)} <= looked_at.keys()
    for place, content in looked_at.items():
        assert not found_in(content, secrets), place


def test_a_planted_key_is_found(tmp_path: Path) -> None:
    """The look of the test before finds what is there: in a log, an argument, a core dump."""
    secret = os.urandom(64)
    secrets = {"planted": secret}
    for form in forms(secret):
        assert found_in(b"a log line: " + form + b" and more", secrets)
    assert not found_in(os.urandom(1 << 16), secrets)
    script = "import sys, ctypes, os; key = bytes.fromhex(sys.stdin.readline()); print(flush=True)"
    arguments = [sys.executable, "-c", script + "; sys.stdin.read(); os.abort()", secret.hex()]
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdin=-1, stdout=-1, preexec_fn=_allow_core, text=True,
        env={**os.environ, "KEY": base64.b64encode(secret).decode()},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(secret.hex() + "\n")
        process.stdin.flush()
        process.stdout.readline()
        environ = Path(f"/proc/{process.pid}/environ").read_bytes()
        cmdline = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        memory = memory_of(process.pid)
        process.stdin.close()
        assert process.wait(30) == -signal.SIGABRT
    for content in (environ, cmdline, memory, said_by_line(arguments)):
        assert found_in(content, secrets)
    cores = [path for path in tmp_path.iterdir() if path.name.startswith("core")]
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() == "core" and _core_limit():
        assert cores
    for core in cores:
        assert found_in(core.read_bytes(), secrets)


def said_by_line(arguments: list[str]) -> bytes:
    return " ".join(arguments).encode()


def _core_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_CORE)[1]


def test_keyd_cannot_be_looked_into(keyd: Keyd) -> None:
    status = Path(f"/proc/{keyd.process.pid}/status").read_text()
    assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
    assert re.search(r"^Umask:\t0077$", status, re.M)
    limits = Path(f"/proc/{keyd.process.pid}/limits").read_text()
    assert re.search(r"^Max core file size +0 +0 ", limits, re.M)
    assert Path(f"/proc/{keyd.process.pid}/mem").stat().st_uid == 0
    may_lock = int(re.findall(r"^CapEff:\t(\w+)$", status, re.M)[0], 16) >> 14 & 1
    locked = int(re.findall(r"^VmLck:\s+(\d+) kB$", status, re.M)[0])
    assert bool(locked) == bool(may_lock) == ("memory is not locked" not in keyd.log.read_text())


def test_memory_that_may_not_be_locked_is_spoken_of(host: Host) -> None:
    keyd = Keyd(host, under=("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"))
    status = Path(f"/proc/{keyd.process.pid}/status").read_text()
    assert re.search(r"^VmLck:\s+0 kB$", status, re.M)
    assert "WARNING: memory is not locked, keys may reach swap" in keyd.log.read_text()
    assert keyd.end() == 0


def test_keyd_dies_and_comes_back_under_a_mount(host: Host, keyd: Keyd) -> None:
    first = make_disk(host, "first")
    make_disk(host, "second")
    host.mount(f"keyd={keyd.path}")
    with open(host.mountpoint / "first", "r+b") as file:
        file.write(b"before")
        os.fsync(file.fileno())
        keyd.end(signal.SIGKILL)
        file.write(b" during")
        os.fsync(file.fileno())
        with pytest.raises(PermissionError):
            (host.mountpoint / "second").read_bytes()
        assert re.search(
            r'second\.sealed" vm=".*" KeydUnavailable: keyd does not answer', host.log.read_text()
        )
        keyd.start()
        assert (host.mountpoint / "second").read_bytes() == bytes(4 << 20)
        file.write(b" after")
    host.umount()
    host.run("export", first, host.directory / "out")
    assert (host.directory / "out").read_bytes()[:19] == b"before during after"


def test_a_flush_that_keyd_is_to_remember_fails_without_it(host: Host, keyd: Keyd) -> None:
    make_disk(host, "web1")
    host.mount(f"keyd={keyd.path},freshness=flush")
    with open(host.mountpoint / "web1", "r+b", buffering=0) as file:
        file.write(b"1")
        os.fsync(file.fileno())
        keyd.end(signal.SIGKILL)
        file.write(b"2")
        with pytest.raises(PermissionError):
            os.fsync(file.fileno())
        keyd.start()
        file.write(b"3")
        os.fsync(file.fileno())
    host.umount()


def test_two_consoles_at_once(host: Host, keyd: Keyd) -> None:
    """Two mounts of one keyd; one is killed in the middle, and the other one notices nothing."""
    other = host.directory / "other"
    (other / "images").mkdir(parents=True)
    (other / "plain").mkdir()
    for number in range(2):
        make_disk(host, f"a{number}", "1M")
        host.run("create", other / "images" / f"b{number}.sealed", "--size", "1M")
    option = ("-o", f"keyd={keyd.path},bump=0.5")
    log = other / "log"
    host.run("mount", host.images, host.mountpoint, *option, "--log", host.log)
    host.run("mount", other / "images", other / "plain", *option, "--log", log)
    failed: list[BaseException] = []

    def work(plain: Path, names: list[str]) -> None:
        try:
            for round_number in range(2):
                for name in names:
                    with open(plain / name, "r+b") as file:
                        file.write(name.encode() * 100)
                        os.fsync(file.fileno())
                (plain / f"new-{names[0]}{round_number}.raw").touch()
                (plain / f"new-{names[0]}{round_number}.raw").rename(
                    plain / f"kept-{names[0]}{round_number}.raw"
                )
        except BaseException as error:
            failed.append(error)

    try:
        threads = [
            threading.Thread(target=work, args=(host.mountpoint, [f"a{n}" for n in range(2)])),
            threading.Thread(target=work, args=(other / "plain", [f"b{n}" for n in range(2)])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not failed, failed
        host.kill_daemon()
        with open(other / "plain" / "b0", "r+b") as file:
            file.write(b"goes on")
            os.fsync(file.fileno())
        host.mount(f"keyd={keyd.path}")
        assert (host.mountpoint / "a1").read_bytes()[:4] == b"a1a1"
        host.umount()
    finally:
        host.run("umount", other / "plain")
    assert "ERROR" not in log.read_text(), log.read_text()
    host.run("scrub", host.images, other / "images", "--rate", "1G")


def test_the_unit_is_one_that_systemd_takes(host: Host) -> None:
    unit = host.directory / "sealfs-keyd.service"
    unit.write_text(host.run("keyd", "--print-unit", "--allow-uid", "64055", "--socket",
                             "/run/sealfs/a b%.sock"))  # fmt: skip
    text = unit.read_text()
    assert '--socket "/run/sealfs/a b%%.sock" --allow-uid 64055' in text
    analyse = shutil.which("systemd-analyze")
    if analyse is not None:
        done = subprocess.run([analyse, "verify", unit], capture_output=True, text=True)
        about_us = [line for line in done.stderr.splitlines() if unit.name in line]
        assert not about_us, about_us


def test_systemd_is_told_when_keyd_answers(host: Host) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(host.directory / "notify"))
        listener.settimeout(30)
        os.environ["NOTIFY_SOCKET"] = str(host.directory / "notify")
        try:
            keyd = Keyd(host)
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert listener.recv(100) == b"READY=1"
    assert keyd.end(signal.SIGINT) == 0


# Rubbish.


def seeds(host: Host) -> list[bytes]:
    """One sensible request for each verb."""
    image, path = "5a" * 16, str(host.images / "x.sealed")
    fields: dict[str, dict[str, object]] = {
        "join": {"group": "77" * 16},
        "image_key": {"kmi": "web1", "vm_id": "web1", "image": image, "wrapped": "01" * 61},
        "new_image_key": {"vm_id": "web1", "image": image},
        "lock": {"subject": path, "image": image, "shared": True},
        "check": {"path": path, "image": image, "vm_id": "web1"},
        "add": {"path": path, "image": image, "vm_id": "web1", "replace": False},
        "remove": {"path": path},
        "move": {"old": path, "new": path + "x"},
        "move_end": {"done": True},
        "find": {"image": image},
        "note": {"images": {image: [1, image], "00" * 16: [1 << 40, image]}},
        "accept": {"image": image, "progress": [3, image]},
        "network_grant": {"network": "prod", "vm_id": "web1", "device": 1},
        "network_allowed": {"network": "prod", "vm_id": "web1"},
    }
    return [keyd_wire.encode({"verb": verb, **fields.get(verb, {})}) for verb in keyd_wire.FIELDS]


def mutated(rng: random.Random, messages: list[bytes]) -> bytes:
    """Return a message with bytes flipped, cut, put in, doubled, or parts of two joined."""
    raw = bytearray(rng.choice(messages))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(7):
            case 0:
                raw[at : at + 1] = rng.randbytes(1)
            case 1:
                del raw[at : at + rng.randrange(1, 9)]
            case 2:
                raw[at:at] = rng.choice((b"null", b"[", b"{", b'"', b"-1", b"1e999", b"\\ud800"))
            case 3:
                raw[at:at] = raw[at : at + 40] * rng.randrange(1, 5)
            case 4:
                raw[at:] = rng.choice(messages)[at:]
            case 5:
                raw[at : at + 4] = rng.choice((b"true", b"9999", b"\0\0\0\0", b"\xff\xfe\xfd\xfc"))
            case 6 if rng.random() < 0.002:
                raw += rng.choice((b"[", b"9", b" ")) * rng.choice((1000, 65_000, 70_000))
    return bytes(raw) or b"\0"


def test_100000_mutated_messages(host: Host, keyd: Keyd) -> None:
    """No death, no growth, and then a good request is answered."""
    sealed = make_disk(host, "web1", "1M")
    host.run("net", "create", "prod")
    host.run("net", "allow", "prod", "--vm", "web1")
    secrets = Secrets(host, sealed)
    rng, messages = random.Random(5), seeds(host)
    kinds: set[str] = set()

    def send(count: int, *, joined: bool) -> None:
        with raw_connection(keyd.path, joined=joined) as connection:
            for first in range(0, count, 50):
                some = [mutated(rng, messages) for _ in range(first, min(first + 50, count))]
                if not joined:
                    # One that joins would make the rest sensible.
                    some = [raw for raw in some if b'"join"' not in raw or rng.random() < 0.001]
                for raw in some:
                    connection.send(raw)
                for _ in some:
                    answer, descriptors, _, _ = socket.recv_fds(connection, 65_536, 1)
                    for descriptor in descriptors:
                        os.close(descriptor)
                    document = json.loads(answer)
                    kinds.add("" if document["ok"] else document["error"]["type"])
                sent.append(len(some))

    sent: list[int] = []
    send(2000, joined=False)
    send(50, joined=True)
    before = keyd.size()
    while sum(sent) < FUZZED:
        send(5000, joined=False)
    for _ in range(5):
        send(FUZZED_WITH_KEYS // 5, joined=True)
    for _ in range(500):  # comes, says half a word or nothing, and goes
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as visitor:
            visitor.connect(str(keyd.path))
            if rng.random() < 0.5:
                visitor.send(mutated(rng, messages))
    assert keyd.process.poll() is None
    assert keyd.size() - before < GROWTH_MAX, (before, keyd.size())
    assert {"", "UsageError"} < kinds
    print(f"{sum(sent)} messages, {keyd.size() - before} bytes more")
    assert "KeyServiceError" not in kinds, keyd.log.read_text()  # an internal error

    keys = RemoteKeys.open(keyd.path)
    storage = FileStorage.open(sealed, read_only=True)
    with contextlib.closing(storage):
        identity = read_identity(storage)
    arguments = (identity.kmi, identity.vm_id, identity.uuid, identity.wrapped_keys[0][1])
    assert keys.image_key(*arguments) == secrets.image_key
    keys.registry.check(sealed, identity.uuid, "web1")
    assert keys.networks.is_allowed("prod", "web1")
    keys.close()
    descriptors = Path(f"/proc/{keyd.process.pid}/fd")
    wait_until(lambda: not [1 for fd in descriptors.iterdir() if "memfd" in os.readlink(fd)])


# PINs


def test_a_pin_reaches_keyd_and_is_asked_for_once(tmp_path: Path) -> None:
    with Running(tmp_path / "state") as running:
        keys = RemoteKeys.open(running.path)
        assert keys.state_path == (tmp_path / "state").resolve()
        assert keys.unlocked() == []
        keys.unlock("web1", bytearray(b"1234\0\xff"))
        (behind,) = [opened for opened in running.opened if opened.unlocked()]
        assert behind._pins == {"web1": b"1234\0\xff"}
        assert keys.unlocked() == ["web1"]
        assert keys.lock("web1")
        assert not keys.lock("web1")
        assert keys.unlocked() == behind.unlocked() == []
        keys.close()


def test_an_unlock_ends_with_keyd_and_a_refused_one_never_was(tmp_path: Path) -> None:
    class Refusing(TinyKeys):
        def unlock(self, vm_id: str, pin: bytearray) -> None:
            if pin != b"right":
                raise WrongPin(vm_id, 2)
            super().unlock(vm_id, pin)

    running = Running(tmp_path / "state", make=lambda: Refusing(tmp_path / "state", str))
    running.start()
    keys = RemoteKeys.open(running.path)
    with pytest.raises(WrongPin) as refused:
        keys.unlock("web1", bytearray(b"wrong"))
    assert refused.value.tries_left == 2
    assert keys.unlocked() == []
    keys.unlock("web1", bytearray(b"right"))
    running.stop()
    running.start()
    keys.ledger.find(bytes(16))
    assert keys.unlocked() == []
    keys.close()
    running.stop()


def test_a_secret_stands_behind_the_verb_that_takes_one_and_no_other(tmp_path: Path) -> None:
    with Running(tmp_path / "state") as running, raw_connection(running.path) as connection:
        for message in (b'{"verb":"unlock","vm_id":"web1"}', b'{"verb":"begin"}\x00secret'):
            connection.send(message)
            answer = json.loads(connection.recv(65536))
            assert answer["error"]["type"] == "UsageError"
            assert "secret behind it" in answer["error"]["detail"]


def test_what_the_ledger_keeps_of_registry_and_audit_log_is_no_consoles(tmp_path: Path) -> None:
    with Running(tmp_path / "state") as running, raw_connection(running.path) as connection:
        for uuid in (REGISTRY_ID.hex(), AUDIT_ID.hex()):
            for fields in (
                {"verb": "accept", "image": uuid, "progress": None},
                {"verb": "note", "images": {uuid: [9, "00" * 16]}},
                {"verb": "find", "image": uuid},
            ):
                connection.send(json.dumps(fields).encode())
                answer = json.loads(connection.recv(65536))
                assert "uuid of an image is expected" in answer["error"]["detail"]
