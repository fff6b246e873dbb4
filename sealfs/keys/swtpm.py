"""The embedded software TPM: a swtpm process on an inherited socket pair, alive for one use.

Nothing listens: no other process can speak to it, and `--terminate` ends it when our end of the
pair closes, also by kill -9 of its user. Nobody holds it for longer than a use, under the state
lock. One case escapes `--terminate`: when its user dies while a command is being worked on, swtpm
0.7 fails to write the response and then waits for ever. So whoever has the state lock and still
finds a swtpm on this state knows that nobody uses it, and ends it.

Whoever copies its state directory has every key: it is chosen by name, never fallen back to.
Knows no TPM command; `tpm.py` sends TPM2_Shutdown before the process is stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from sealfs.errors import TpmUnavailable
from sealfs.keys.statedir import HeldLock

STATE_FILE: Final = "tpm2-00.permall"
KEPT_FILE: Final = "sealfs-kept.permall"

RESPONSE_WAIT_S: Final = 60.0
"""swtpm answers within milliseconds; a minute is for a host that swaps, not for the TPM."""
STOP_WAIT_S: Final = 1.0
"""swtpm ends within milliseconds of the closing of its channel; after this it is told to."""
LOCK_FILE: Final = ".lock"
"""swtpm's own, below its state directory; a POSIX record lock, which tells its holder."""
RESPONSE_SIZE_MAX: Final = 4096
"""TPM 2.0 PC Client profile: TPM_PT_MAX_RESPONSE_SIZE is at most 4096."""
ORPHAN_POLL_S: Final = 0.005
START_TRIES: Final = 3
START_WAIT_S: Final = 2.0
START_POLL_S: Final = 0.001
FLOCK_STRUCT: Final = struct.Struct("hhqqi4x")
"""struct flock of 64-bit Linux, fcntl(2): type, whence, start, length, holder."""
HEADER_SIZE: Final = 10
"""TPM 2.0 Part 1 §18.1: tag (2), size of the whole response (4), code (4)."""


class Channel(Protocol):
    """Carries TPM commands and responses, whole messages each."""

    def transmit(self, command: bytes) -> None:
        """Send one command."""

    def receive(self, wait_s: float | None) -> bytes | None:
        """Return the response; None when `wait_s` passed first. None as `wait_s`: the default."""


class SocketChannel:
    """TPM messages over a connected stream socket, swtpm's data channel."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def transmit(self, command: bytes) -> None:
        self._connection.sendall(command)

    def receive(self, wait_s: float | None) -> bytes | None:
        wait = RESPONSE_WAIT_S if wait_s is None else wait_s
        deadline = time.monotonic() + wait
        ready, _, _ = select.select([self._connection], [], [], wait)
        if not ready:
            if wait_s is None:
                raise TimeoutError(f"the TPM did not answer within {RESPONSE_WAIT_S:g} s")
            return None
        header = self._read(HEADER_SIZE, deadline + RESPONSE_WAIT_S)
        size = int.from_bytes(header[2:6], "big")
        if not HEADER_SIZE <= size <= RESPONSE_SIZE_MAX:
            raise ConnectionError(f"the TPM announced a response of {size} bytes")
        return header + self._read(size - HEADER_SIZE, deadline + RESPONSE_WAIT_S)

    def _read(self, size: int, deadline: float) -> bytes:
        piece = bytearray()
        while len(piece) < size:
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            received = self._connection.recv(size - len(piece))
            if not received:
                raise ConnectionError("the TPM closed the connection")
            piece += received
        return bytes(piece)


class EmbeddedTpm:
    """The software TPM whose state lies in `directory`."""

    def __init__(self, directory: Path, *, program: str = "swtpm") -> None:
        self._directory = directory
        self._program = program

    @contextlib.contextmanager
    def running(self, held: HeldLock, *, manufacture: bool = False) -> Iterator[Channel]:
        """Start the TPM, lend its channel, stop it and make its state durable.

        Args:
            held: The state lock.
            manufacture: Accept a directory without TPM state; a new TPM comes into being.

        Raises:
            TpmUnavailable: swtpm is not installed, does not start, or its state is gone.
        """
        assert held.descriptor >= 0
        self._end_orphan()
        self._prepare(manufacture=manufacture)
        program = shutil.which(self._program)
        if program is None:
            raise TpmUnavailable(
                self._program, "this program is not installed; it is the embedded software TPM"
            )
        for tries_left in reversed(range(START_TRIES)):
            process, ours = self._start(program)
            if self._is_ready(process) or not tries_left:
                break
            # It met the swtpm of a user that died a moment ago, too young to be seen before.
            ours.close()
            self._stop(process)
            self._end_orphan()
        try:
            yield _ExplainedChannel(SocketChannel(ours), process)
        finally:
            ours.close()
            self._stop(process)
            self._make_durable()

    def _start(self, program: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        options = (
            ("--tpmstate", "dir=.,mode=0600"),
            ("--flags", "not-need-init,startup-clear"),
            ("--server", f"type=tcp,fd={theirs.fileno()}"),
        )
        with theirs:
            try:
                # No PDEATHSIG: it fires when the *thread* that forked ends. A relative state
                # directory, because swtpm splits its options at commas and paths hold them.
                process = subprocess.Popen(
                    [program, "socket", "--tpm2", "--terminate", *sum(options, ())],
                    cwd=self._directory,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError as error:
                ours.close()
                raise TpmUnavailable(program, f"cannot be started: {error.strerror}") from error
        return process, ours

    def _is_ready(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait until swtpm holds its state (5 to 10 ms); False when it ended instead."""
        deadline = time.monotonic() + START_WAIT_S
        while time.monotonic() < deadline:
            if _lock_holder(self._directory / LOCK_FILE) == process.pid:
                return True
            if process.poll() is not None:
                return False
            time.sleep(START_POLL_S)
        return True  # Slow, or of a kind that takes no lock: the first command will tell.

    def _prepare(self, *, manufacture: bool) -> None:
        # swtpm 0.7 renames its state into place without fsync: a power cut may leave the new
        # name empty on file systems that do not order the two. The link keeps the inode that
        # `_make_durable` synced after the last use; it comes back when the name is empty or gone.
        state, kept = self._directory / STATE_FILE, self._directory / KEPT_FILE
        try:
            if _size(state) > 0:
                kept.unlink(missing_ok=True)
                os.link(state, kept)
            elif _size(kept) > 0:
                os.replace(kept, state)
            elif not manufacture:
                raise TpmUnavailable(
                    self._directory,
                    "the state of the embedded TPM is gone: the state directory was copied "
                    "without it, or it was removed; without it only a recovery key opens a VM",
                )
        except OSError as error:
            raise TpmUnavailable(
                self._directory, f"the state of the embedded TPM: {error.strerror}"
            ) from error

    def _end_orphan(self) -> None:
        deadline = time.monotonic() + STOP_WAIT_S
        while holder := _lock_holder(self._directory / LOCK_FILE):
            if time.monotonic() < deadline:
                time.sleep(ORPHAN_POLL_S)
                continue
            try:
                # A descriptor of the process, and the question once more: no number that was
                # given to somebody else meanwhile is ever signalled.
                process = os.pidfd_open(holder)
            except OSError:
                continue
            try:
                if _lock_holder(self._directory / LOCK_FILE) == holder:
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    select.select([process], [], [], STOP_WAIT_S)
            except OSError as error:
                raise TpmUnavailable(
                    self._directory,
                    f"process {holder} holds the embedded TPM's state and cannot be ended: "
                    f"{error.strerror}",
                ) from error
            finally:
                os.close(process)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        for insist in (process.terminate, process.kill):
            try:
                process.wait(STOP_WAIT_S)
                break
            except subprocess.TimeoutExpired:
                insist()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()

    def _make_durable(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            for path in (self._directory / STATE_FILE, self._directory):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


class _ExplainedChannel:
    """Adds what swtpm said on its way out to the error of a broken channel."""

    def __init__(self, channel: Channel, process: subprocess.Popen[bytes]) -> None:
        self._channel = channel
        self._process = process

    def transmit(self, command: bytes) -> None:
        try:
            self._channel.transmit(command)
        except OSError as error:
            raise self._explained(error) from error

    def receive(self, wait_s: float | None) -> bytes | None:
        try:
            return self._channel.receive(wait_s)
        except TimeoutError:
            raise
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> ConnectionError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)
        if self._process.returncode is None or self._process.stderr is None:
            return ConnectionError(str(error))
        said = os.read(self._process.stderr.fileno(), 4096).decode("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
        return ConnectionError(f"swtpm ended with status {self._process.returncode}: {last}")


def _lock_holder(path: Path) -> int:
    """Return the process that holds a record lock on a file, 0 when nobody does (fcntl F_GETLK)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        asked = FLOCK_STRUCT.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, holder = FLOCK_STRUCT.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    finally:
        os.close(descriptor)
    return 0 if kind == fcntl.F_UNLCK else int(holder)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
