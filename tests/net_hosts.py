"""Two hosts as a user has them, for tests of network links through the command line.

Each is a network and a mount namespace with its own `/var/lib/sealfs`, `/run/sealfs` and home, and
a software TPM of its own; a cable joins them: 10.0.0.1 and 10.0.0.2 on `eth0`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admin_support import unshared

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 180.0
"""Seconds: nothing here takes more than a few, but on a machine that others use as well."""


class NetHost:
    """One host; `name` is what the other one calls it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.home = directory / name
        self.state = directory / f"{name}.state"
        for made in (self.home, self.state):
            made.mkdir(mode=0o700)
        self._started: list[subprocess.Popen[str]] = []
        self._holder = unshared("-m", "-n")
        os.makedirs("/var/lib/sealfs", exist_ok=True)
        os.makedirs("/run/sealfs", exist_ok=True)
        self.shell(
            f"mount --bind {self.state} /var/lib/sealfs && mount -t tmpfs -o mode=755 none "
            "/run/sealfs && ip link set lo up && sysctl -qw net.ipv6.conf.default.disable_ipv6=1"
        )

    @property
    def pid(self) -> int:
        return self._holder.pid

    def within(self, *words: object) -> list[str]:
        enter = f"--mount=/proc/{self.pid}/ns/mnt", f"--net=/proc/{self.pid}/ns/net"
        # A program of another mount namespace starts in its root.
        place = ["env", "-C", str(self.home)]
        return ["nsenter", *enter, "--", *place, *(str(word) for word in words)]

    def environment(self) -> dict[str, str]:
        found = {name: value for name, value in os.environ.items() if name != "SEALFS_STATE"}
        path = f"{self.home}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {**found, "PATH": path, "LC_ALL": "C.UTF-8", "PYTHONPATH": str(ROOT)}

    def shell(self, line: str, *, status: int | None = 0, stdin: str | None = None) -> str:
        """Run a line of shell as root of this host; return stdout, then stderr."""
        done = subprocess.run(
            self.within("bash", "-c", line), capture_output=True, text=True, check=False,
            timeout=DEADLINE, env=self.environment(), input=stdin,
        )  # fmt: skip
        assert status is None or done.returncode == status, (line, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    def start(self, line: str) -> subprocess.Popen[str]:
        """Start a line of shell that ends with the host at the latest."""
        process = subprocess.Popen(
            self.within("bash", "-c", f"exec {line}"), text=True, env=self.environment(),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._started.append(process)
        return process

    def json(self, line: str) -> Any:
        return json.JSONDecoder().raw_decode(self.shell(line))[0]

    def status(self, name: str) -> dict[str, Any]:
        """Return what `net status` says of an attachment."""
        found = self.json("sealfs --json net status")
        attached: dict[str, Any] = next((one for one in found if one["name"] == name), {})
        return attached

    def log(self) -> str:
        return self.shell("cat /run/sealfs/net.log")

    def service_pid(self) -> int:
        """Return the pid of the host's network service."""
        listed = self.shell("ss -xlpH src /run/sealfs/net.sock")
        return int(listed.split("pid=")[1].split(",")[0])

    def wait_for(self, what: str, condition: Any) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, (what, self.log())
            time.sleep(0.05)

    def wait_up(self, name: str) -> None:
        def is_up() -> bool:
            peers = self.status(name).get("peers", [])
            return bool(peers) and all(peer["state"] == "up" for peer in peers)

        self.wait_for(f"{name} up", is_up)

    def close(self) -> None:
        for name in {one["name"] for one in self.json("sealfs --json net status")}:
            vm, _, index = name.rpartition("/")
            self.shell(f"sealfs net detach --vm '{vm}' --device-index {index}", status=None)
        for process in self._started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._holder.kill()
        self._holder.wait()


@contextlib.contextmanager
def two_hosts(directory: Path, *, init: bool = True) -> Iterator[tuple[NetHost, NetHost]]:
    """Two hosts on a cable; initialised unless the test does that."""
    with contextlib.ExitStack() as stack:
        hosts = []
        for name in ("a", "b"):
            host = NetHost(name, directory)
            stack.callback(host.close)
            hosts.append(host)
        a, b = hosts
        subprocess.run(
            ["ip", "link", "add", "eth0", "netns", str(a.pid), "type", "veth",
             "peer", "name", "eth0", "netns", str(b.pid)],
            check=True,
        )  # fmt: skip
        for number, host in enumerate(hosts, start=1):
            host.shell(f"ip address add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up")
            if init:
                host.shell("sealfs init --tpm swtpm --no-recovery")
        yield a, b
