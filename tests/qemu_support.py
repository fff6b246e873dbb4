"""Drives QEMU's programs from tests: its command-line tools, and its daemons over QMP."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DEADLINE = 60.0  # seconds for whatever should take a moment


def run(*command: object, status: int = 0) -> str:
    """Run a program that is to end with `status`; return what it prints."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=DEADLINE,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise AssertionError(f"no {words[0]}; run: tools/setup --guest") from exc
    assert done.returncode == status, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def qemu_io(path: object, *commands: str, options: Sequence[str] = (), status: int = 0) -> str:
    """Run qemu-io's commands on a disk; `options` say its format ("-f", "raw") and more."""
    script = [word for command in commands for word in ("-c", command)]
    return run("qemu-io", *options, *script, path, status=status)


class QmpError(Exception):
    """QEMU refused a command, or a job ended with an error."""


class Qmp:
    """A connection to a QMP server on a Unix socket. One thread uses it."""

    def __init__(self, path: Path, process: subprocess.Popen[str] | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(DEADLINE)
        end = time.monotonic() + DEADLINE
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                if time.monotonic() > end or (process is not None and process.poll() is not None):
                    self._socket.close()
                    raise
                time.sleep(0.01)
        self._file = self._socket.makefile("r", encoding="utf-8")
        self.events: list[dict[str, Any]] = []
        self._next()  # the greeting
        self.execute("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """Return a command's result; events that come before it are kept.

        Raises:
            QmpError: it was refused.
        """
        request = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(request).encode())
        while True:
            answer = self._next()
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
            self.events.append(answer)

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the data of the first event of that name not yet taken, waiting for it."""
        while True:
            for event in self.events:
                if event["event"] == name:
                    self.events.remove(event)
                    found: dict[str, Any] = event.get("data", {})
                    return found
            self.events.append(self._next())

    def io(self, device: str, *commands: str) -> str:
        """Run commands of qemu-io on a block device or node inside QEMU; return their output."""
        printed = ""
        for command in commands:
            line = f'qemu-io {device} "{command}"'
            answer = self.execute("human-monitor-command", {"command-line": line})
            # What succeeds says so, or says nothing where it was asked to be quiet.
            assert "bytes at offset" in answer or not answer.strip(), (command, answer)
            assert "failed" not in answer, (command, answer)
            printed += answer
        return printed

    def finish_job(self, job: str, *, from_ready: bool) -> None:
        """Wait for a block job's end; one that is ready to pivot is told to.

        Raises:
            QmpError: it failed.
        """
        if from_ready:
            assert self.wait_event("BLOCK_JOB_READY")["device"] == job
            self.execute("block-job-complete", {"device": job})
        ended = self.wait_event("BLOCK_JOB_COMPLETED")
        assert ended["device"] == job
        if "error" in ended:
            raise QmpError(f"{job}: {ended['error']}")

    def _next(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise QmpError("QEMU has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def qemu_machine(*arguments: object, machine: str = "none") -> Iterator[Qmp]:
    """Run a QEMU without a guest, for its block layer and its devices."""
    with _daemon(
        *("qemu-system-x86_64", "-machine", machine, "-nodefaults", "-no-user-config", "-S"),
        *("-display", "none", "-chardev", "socket,id=qmp,server=on,wait=off,path={socket}"),
        *("-mon", "chardev=qmp,mode=control"),
        *arguments,
    ) as qmp:
        yield qmp


@contextlib.contextmanager
def storage_daemon(*arguments: object) -> Iterator[Qmp]:
    """Run a qemu-storage-daemon."""
    with _daemon(
        *("qemu-storage-daemon", "--chardev", "socket,id=qmp,server=on,wait=off,path={socket}"),
        *("--monitor", "chardev=qmp"),
        *arguments,
    ) as qmp:
        yield qmp


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Make a directory for sockets: their paths have at most 107 bytes, those of tests more."""
    with tempfile.TemporaryDirectory(prefix="sealfs-qemu-") as name:
        yield Path(name)


@contextlib.contextmanager
def _daemon(*command: object) -> Iterator[Qmp]:
    with short_directory() as directory, tempfile.TemporaryFile("w+") as output:
        path = directory / "qmp"
        words = [str(word).replace("{socket}", str(path)) for word in command]
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
        )
        try:
            try:
                qmp = Qmp(path, process)
            except OSError as exc:
                output.seek(0)
                raise AssertionError(f"{words}: {output.read()}") from exc
            with contextlib.closing(qmp):
                yield qmp
                qmp.execute("quit")
                assert process.wait(DEADLINE) == 0
        finally:
            process.kill()  # does nothing to a process already waited for
            process.wait()
