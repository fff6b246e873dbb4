"""What the tests of the key room share: state directories, TPMs that stay up, taps on the wire.

Always a real swtpm; a machine without it fails these tests.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tpm2_pytss import ESYS_TR
from tpm2_pytss.constants import TPM2_ALG
from tpm2_pytss.types import TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

from sealfs.keys.host import Host
from sealfs.keys.hostrecord import HOST_SIZE_MAX, HostRecord
from sealfs.keys.reports import InitReport
from sealfs.keys.service import KeyService
from sealfs.keys.statedir import HOST_FILE, HeldLock, StateDir
from sealfs.keys.swtpm import Channel, EmbeddedTpm
from sealfs.keys.tpm import Tpm, open_tpm
from sealfs.keys.tpm_context import open_esapi

ROOT = Path(__file__).parent.parent
CC_READ_PUBLIC = 0x173


@cache
def _initialised() -> tuple[Path, InitReport]:
    # One initialised host for the whole run; tests work on copies. A copy has the same keys,
    # which is what the embedded TPM warns of.
    path = Path(tempfile.mkdtemp(prefix="sealfs-keys-")) / "state"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return path, KeyService.initialise(path, tpm="swtpm", recovery_to=None, no_recovery=False)


def initialised_state(path: Path) -> InitReport:
    """Make an initialised state directory with the embedded TPM; always the same host."""
    source, report = _initialised()
    shutil.copytree(source, path)
    return report


def initialised_recovery_key() -> str:
    """Return the recovery key of that host."""
    key = _initialised()[1].recovery_key
    assert key is not None
    return key


def fresh_state(path: Path, **options: Any) -> InitReport:
    """Make a host of its own."""
    settings: dict[str, Any] = {"tpm": "swtpm", "recovery_to": None, "no_recovery": False}
    return KeyService.initialise(path, **(settings | options))


def key_bytes(key: Any) -> bytes:
    with key.secret() as secret:
        return bytes(secret)


def host_record(path: Path) -> HostRecord:
    raw = StateDir(path).read(HOST_FILE, HOST_SIZE_MAX)
    assert raw is not None
    return HostRecord.decode(raw, "host")


def record_files(path: Path) -> list[Path]:
    return sorted((path / "keys").glob("*.slot"))


def extend(esapi: Any, pcr: int) -> None:
    """Change a PCR, as a new kernel would."""
    digest = TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=b"\x11" * 32))
    esapi.pcr_extend(ESYS_TR(pcr), TPML_DIGEST_VALUES([digest]))


class Tap:
    """A channel that notes every message."""

    def __init__(self, channel: Channel, log: list[bytes]) -> None:
        self._channel = channel
        self.log = log

    def transmit(self, command: bytes) -> None:
        self.log.append(command)
        self._channel.transmit(command)

    def receive(self, wait_s: float | None) -> bytes | None:
        response = self._channel.receive(wait_s)
        if response is not None:
            self.log.append(response)
        return response


class Interposer:
    """A channel that alters responses: `alter(command code, count, response)`."""

    def __init__(self, channel: Channel, alter: Callable[[int, int, bytes], bytes]) -> None:
        self._channel = channel
        self._alter = alter
        self._code = 0
        self._counts: dict[int, int] = {}

    def transmit(self, command: bytes) -> None:
        self._code = int.from_bytes(command[6:10], "big")
        self._counts[self._code] = self._counts.get(self._code, 0) + 1
        self._channel.transmit(command)

    def receive(self, wait_s: float | None) -> bytes | None:
        response = self._channel.receive(wait_s)
        if response is None:
            return None
        return self._alter(self._code, self._counts[self._code], response)


class BusyTpm:
    """A channel whose TPM says TPM_RC_RETRY to the first `times` commands of one kind."""

    def __init__(self, channel: Channel, code: int, times: int) -> None:
        self._channel = channel
        self._code = code
        self._times = times
        self._is_refused = False

    def transmit(self, command: bytes) -> None:
        self._is_refused = self._times > 0 and command[6:10] == self._code.to_bytes(4, "big")
        if self._is_refused:
            self._times -= 1
        else:
            self._channel.transmit(command)

    def receive(self, wait_s: float | None) -> bytes | None:
        if self._is_refused:
            return bytes.fromhex("80010000000a00000922")
        return self._channel.receive(wait_s)


class WrappedAccess:
    """The embedded TPM of a state directory, reached through a wrapped channel."""

    spec = "swtpm"
    is_shared = False

    def __init__(self, state: StateDir, wrap: Callable[[Channel], Channel]) -> None:
        self._embedded = EmbeddedTpm(state.tpm_directory)
        self._wrap = wrap

    @contextlib.contextmanager
    def open(self, held: HeldLock | None, *, manufacture: bool = False) -> Iterator[Tpm]:
        assert held is not None
        with (
            self._embedded.running(held, manufacture=manufacture) as channel,
            open_tpm(self._wrap(channel), "wrapped TPM", shutdown=True) as tpm,
        ):
            yield tpm


def wrapped_service(path: Path, wrap: Callable[[Channel], Channel]) -> KeyService:
    state = StateDir(path)
    return KeyService(Host(state, host_record(path), WrappedAccess(state, wrap)))


@contextlib.contextmanager
def embedded_esapi(path: Path, wrap: Callable[[Channel], Channel] | None = None) -> Iterator[Any]:
    """Raw ESAPI on the embedded TPM of a state directory, without any of our protection."""
    state = StateDir(path)
    with (
        state.lock() as held,
        EmbeddedTpm(state.tpm_directory).running(held, manufacture=True) as channel,
        open_esapi(channel if wrap is None else wrap(channel), "raw") as (esapi, _, _),
    ):
        try:
            yield esapi
        finally:
            esapi.close()


class StandingTpm:
    """A swtpm that stays up behind a Unix socket; PCRs keep their values between uses."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="swtpm-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def spec(self) -> str:
        return f"swtpm:path={self.directory}/s"

    def start(self, flags: str = "not-need-init,startup-clear") -> None:
        for name in ("s", "s.ctrl"):
            (self.directory / name).unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.directory},mode=0600"),
                *("--flags", flags),
                *("--server", f"type=unixio,path={self.directory}/s,mode=0600"),
                *("--ctrl", f"type=unixio,path={self.directory}/s.ctrl,mode=0600"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 10
        while True:
            assert self._process.poll() is None, "swtpm ended"
            if all(_is_listening(self.directory / name) for name in ("s", "s.ctrl")):
                return
            assert time.monotonic() < deadline, "swtpm did not start"
            time.sleep(0.005)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextlib.contextmanager
    def esapi(self) -> Iterator[Any]:
        with open_esapi(self.spec, "raw") as (esapi, _, _):
            try:
                yield esapi
            finally:
                esapi.close()


def _is_listening(path: Path) -> bool:
    """Whether a process listens on a Unix socket; asked without connecting to it."""
    accepts = "00010000"  # __SO_ACCEPTCON, <linux/net.h>
    lines = (line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(line[-1] == str(path) and line[3] == accepts for line in lines)


@contextlib.contextmanager
def standing_tpm() -> Iterator[StandingTpm]:
    tpm = StandingTpm()
    try:
        tpm.start()
        yield tpm
    finally:
        tpm.remove()


def run_python(script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python process that can import sealfs."""
    import sys

    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
