"""A PIN for a mounted VM, by commands alone: refused at once, given once, kept nowhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import keys_support as ks
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from host_support import Host

from sealfs.control import call
from sealfs.errors import LockedOut, NotFound, UsageError, WrongPin
from sealfs.keys.signed import SignedPolicy
from sealfs.mount.control import find_mount

pytestmark = [pytest.mark.fuse, pytest.mark.tpm]

PIN = "turn left at 97531"


@pytest.fixture(scope="module")
def standing():
    with ks.standing_tpm() as tpm:
        yield tpm


class StandingHost(Host):
    """A host whose TPM stays up and counts wrong PINs."""

    def __init__(self, directory: Path, spec: str) -> None:
        self.spec = spec
        super().__init__(directory)

    def init(self) -> str:
        return str(ks.fresh_state(self.state, tpm=self.spec).recovery_key)


@pytest.fixture
def host(tmp_path: Path, standing) -> Iterator[StandingHost]:
    made = StandingHost(tmp_path, standing.spec)
    yield made
    made.clear()


def seal(host: Host, name: str, pin: str | None) -> Path:
    options = () if pin is None else ("--pin-file", "-")
    host.run(
        "create", host.images / f"{name}.sealed", "--size", "1M", "--vm-id", name, *options,
        stdin=pin,
    )  # fmt: skip
    return host.mountpoint / name


def refused(path: Path) -> int | None:
    try:
        path.read_bytes()
    except OSError as error:
        return error.errno
    return None


def test_a_locked_vm_fails_alone_and_at_once_and_opens_after_unlock(host):
    web, free = seal(host, "web", PIN), seal(host, "free", None)
    host.mount()
    started = time.monotonic()
    assert refused(web) == errno.EACCES
    assert time.monotonic() - started < 2, "milliseconds on an idle machine"
    assert refused(free) is None
    assert 'vm="web" PinNeeded' in host.log.read_text()
    locked = [line.split()[1] for line in host.run("list").splitlines() if "locked: " in line]
    assert locked == ["web"]
    host.run("unlock", "web", "--pin-file", "-", stdin=PIN + "\n")
    mount = find_mount(host.mountpoint)
    for _ in range(3):
        assert refused(web) is None
        assert mount.call("lock", vm_id="web") == {"was_unlocked": True, "in_use": []}
        assert refused(web) == errno.EACCES
        assert mount.call("unlock", vm_id="web", pin=PIN) == {"serves": True}
    with web.open("r+b", buffering=0) as file:
        file.write(b"x" * 4096)
        os.fsync(file.fileno())
        host.run("lock", "web")
        file.seek(0)
        assert file.read(4096) == b"x" * 4096, "who has it open keeps it"
    host.umount()
    host.mount()
    assert refused(web) == errno.EACCES, "a new mount knows no PIN"
    host.umount()


def test_a_wrong_pin_is_tried_once_for_all_mounts_and_never_the_last_time(host, standing):
    with standing.esapi() as esapi:
        esapi.dictionary_attack_lock_reset()
    web = seal(host, "web", PIN)
    host.mount()
    mount = find_mount(host.mountpoint)
    assert mount is not None
    for left in (1, 0):
        with pytest.raises(WrongPin, match=f"{left} tr.* left"):
            mount.call("unlock", vm_id="web", pin="wrong")
        assert refused(web) == errno.EACCES
    for pin in ("wrong", PIN):
        with pytest.raises(LockedOut, match="forgiven each"):
            mount.call("unlock", vm_id="web", pin=pin)
    host.run("unlock", "web", "--pin-file", "-", stdin=PIN, status=7)
    with standing.esapi() as esapi:
        esapi.dictionary_attack_lock_reset()
    assert mount.call("unlock", vm_id="other", pin=PIN) == {"serves": False}
    for wrong in ({}, {"vm_id": 3, "pin": PIN}, {"vm_id": "web"}, {"vm_id": "web", "pin": 3}):
        with pytest.raises(UsageError):
            call(mount.socket_path, "unlock", **wrong)
    mount.call("unlock", vm_id="web", pin=PIN)
    assert refused(web) is None
    with ks.KeyService.open(host.state) as keys:
        assert keys.test("web")[0].lockout.startswith("not locked, 0 of 3")
    host.umount()
    with pytest.raises(NotFound):
        mount.call("unlock", vm_id="web", pin=PIN)


def appearances(secret: bytes, host: Host, pid: int) -> list[str]:
    """Return where a secret stands: files of the host, log, arguments, environment."""
    places = [path for path in host.directory.rglob("*") if path.is_file()]
    places += [Path(f"/proc/{pid}/{name}") for name in ("cmdline", "environ", "comm")]
    return [
        path.name
        for path in places
        if host.mountpoint not in path.parents and secret in path.read_bytes()
    ]


def test_the_pin_is_written_nowhere(host):
    secret = PIN.encode()
    seal(host, "web", PIN)
    command = ("mount", host.images, host.mountpoint, "--log", host.log, "-vv")
    host.run(*command)
    pid = host.daemon_pid()
    host.run("-v", "unlock", "web", "--pin-file", "-", stdin="x" + PIN, status=7)
    assert refused(host.mountpoint / "web") == errno.EACCES
    host.run("-vv", "unlock", "web", "--pin-file", "-", stdin=PIN)
    assert refused(host.mountpoint / "web") is None
    host.run("-vv", "key", "test", "web", "--pin-file", "-", stdin=PIN)
    assert appearances(secret, host, pid) == []
    status = find_mount(host.mountpoint).status
    assert status["unlocked"] == ["web"]
    assert PIN not in str(status)
    (host.directory / "planted").write_text(f"pin={PIN}")
    assert appearances(secret, host, pid) == ["planted"], "the search finds what is there"
    host.umount()


def typed(host: Host, *arguments: str | Path, answers: tuple[str, ...]) -> tuple[int, str]:
    """Run a command on a terminal and type each answer when it is asked for."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "sealfs.cli.main", "--state", host.state, *arguments]
    with subprocess.Popen(
        [str(part) for part in command], stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        shown = b""
        waiting = list(answers)
        try:
            while part := os.read(ours, 4096):
                shown += part
                if waiting and shown.endswith(b": "):
                    os.write(ours, waiting.pop(0).encode() + b"\n")
        except OSError:
            pass  # EIO: everybody on the other side is gone
        os.close(ours)
    return process.returncode, shown.decode()


def test_a_pin_is_asked_for_on_a_terminal_and_not_shown(host):
    image = host.images / "web.sealed"
    create = ("create", image, "--size", "1M", "--vm-id", "web", "--pin")
    # The two do not agree, then they do.
    status, shown = typed(host, *create, answers=("9999", "8888", PIN, PIN))
    assert status == 0, shown
    assert shown.count("New PIN: ") == 2
    assert PIN not in shown
    status, shown = typed(host, "check", image, answers=(PIN,))
    assert (status, "clean" in shown, PIN in shown) == (0, True, False), shown
    status, shown = typed(host, "key", "test", "web", "--pin", answers=(PIN,))
    assert (status, "opens" in shown) == (0, True), shown
    status, shown = typed(host, "key", "reseal", "web", "--no-policy", answers=(PIN,))
    assert status == 0, shown
    host.run("check", image)


def test_signing_needs_no_tpm_and_no_state_directory(tmp_path):
    key = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    # As `tpm2_pcrread sha1:7+sha256:0,7` prints them.
    (tmp_path / "values").write_text(
        f"  sha1:\n    7 : 0x{'11' * 20}\n  sha256:\n    0 : 0x{'AA' * 32}\n    7 : 0x{'bb' * 32}\n"
    )
    script = (
        "import sys; sys.modules['tpm2_pytss'] = None; "
        "from sealfs.cli.main import run; sys.exit(run(sys.argv[1:]))"
    )
    process = ks.run_python(
        script, "--state", "/nonexistent", "policy", "sign", "--key", str(tmp_path / "key"),
        "--pcrs", "7,0", "--values", str(tmp_path / "values"), "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert process.communicate(timeout=60) == ("", "")
    made = SignedPolicy.decode((tmp_path / "out").read_bytes(), "out")
    made.verify("out")
    assert (made.pcrs, made.pcr_values) == ((0, 7), (b"\xaa" * 32, b"\xbb" * 32))
    assert made.limit is None
