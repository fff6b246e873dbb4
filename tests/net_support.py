"""What the live tests of network links share: hosts in network namespaces, a tiny key service.

A `LiveHost` is a network namespace with a service process in it. `TinyGrants` stands in for the key
service: keys derived from names, permissions in files of a directory. So these tests need no TPM.
Run as a program, this module serves in the foreground.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sealfs.control import call
from sealfs.errors import KeyRefused
from sealfs.net.grant import Grant
from sealfs.net.service import SOCKET_NAME, Service, _serve

DEADLINE = 30.0
ASK_INTERVAL = 0.2
_numbers = itertools.count(1)


def has_namespaces() -> bool:
    """Whether this user may make network namespaces and TAP devices."""
    return os.geteuid() == 0 and os.path.exists("/dev/net/tun")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.02)


class TinyGrants:
    """A key service whose answers are files: NETWORK@VM says "allowed", or why not."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _verdict(self, network: str, vm: str) -> str:
        try:
            return (self._directory / f"{network}@{vm}").read_text()
        except FileNotFoundError:
            return f"is not allowed on network {network}"

    async def grant(self, network: str, vm: str, device: int) -> Grant:
        verdict = self._verdict(network, vm)
        if verdict != "allowed":
            raise KeyRefused(vm, verdict)
        key = bytearray(hashlib.sha256(b"network " + network.encode()).digest())
        address = hashlib.sha256(f"{vm}/{device}".encode()).digest()[:5]
        return Grant(network, vm, device, key, b"\x02" + address + b"\x00\x01")

    def release(self, vm: str, device: int) -> None:
        pass

    async def unlock(self, name: str, pin: bytearray) -> None:
        raise NotImplementedError

    async def lock(self, name: str) -> None:
        raise NotImplementedError

    async def still_allowed(self, network: str, vm: str, device: int) -> bool:
        return self._verdict(network, vm) == "allowed"


def run(*command: object, status: int | None = 0, timeout: float = DEADLINE) -> str:
    """Run a program that is to end with `status`; return what it prints."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=timeout,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert status is None or done.returncode == status, (words, done.stdout, done.stderr)
    return done.stdout + done.stderr


class LiveHost:
    """A namespace, and the service in it."""

    def __init__(self, directory: Path, permissions: Path) -> None:
        self.number = next(_numbers)
        self.namespace = f"sealfs-{os.getpid()}-{self.number}"
        self.directory, self.permissions = directory / f"host{self.number}", permissions
        self.directory.mkdir()
        self.log = self.directory / "log"
        self.socket_path = self.directory / SOCKET_NAME
        self.service: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[Any]] = []
        run("ip", "netns", "add", self.namespace)
        self.run("ip", "link", "set", "lo", "up")
        # No frames but the test's own.
        self.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        self.run("sysctl", "-qw", "net.ipv6.conf.default.router_solicitations=0")

    def within(self, *command: object) -> list[str]:
        # Not `ip netns exec`: its copy of all mounts would keep those of other tests from ending.
        enter = f"--net=/run/netns/{self.namespace}"
        return ["nsenter", enter, "--", *(str(word) for word in command)]

    def run(self, *command: object, **options: Any) -> str:
        return run(*self.within(*command), **options)

    def address_of(self, device: str) -> str:
        """Return the hardware address of a network device, "02:00:00:00:00:01"."""
        shown = json.loads(self.run("ip", "-json", "link", "show", device))
        return str(shown[0]["address"])

    def start(self, *command: object, **options: Any) -> subprocess.Popen[Any]:
        """Start a program that ends with the host at the latest."""
        process = subprocess.Popen(self.within(*command), stdin=subprocess.DEVNULL, **options)
        self._started.append(process)
        return process

    @contextlib.contextmanager
    def background(self, *command: object) -> Iterator[int]:
        """Run a program in the background, its output thrown away; yield its pid."""
        process = subprocess.Popen(
            self.within(*command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait()

    def serve(self) -> None:
        """Start the service."""
        with self.log.open("ab") as log:
            self.service = subprocess.Popen(
                self.within(sys.executable, __file__, self.directory, self.permissions),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        assert self.service.stdout is not None
        assert self.service.stdout.readline() == b"ready\n", self.log.read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the service."""
        assert self.service is not None
        self.service.send_signal(number)
        self.service.wait(DEADLINE)
        assert self.service.stdout is not None
        self.service.stdout.close()
        self.service = None

    def attach(self, vm: str, *, network: str = "net1", device: int = 0, **where: Any) -> None:
        """Attach a device of a VM; see `Service` for the words."""
        call(self.socket_path, "attach", vm=vm, network=network, device=device, **where)

    def detach(self, vm: str, device: int = 0) -> None:
        """Detach a device of a VM."""
        call(self.socket_path, "detach", name=f"{vm}/{device}")

    def attach_tap(
        self, vm: str, tap: str, address: str, listen: str, *peers: str, **other: Any
    ) -> None:
        """Attach a TAP device and give it an address."""
        self.attach(vm, port={"tap": tap}, link={"listen": listen}, peers=list(peers), **other)
        self.run("ip", "address", "add", address, "dev", tap)

    def status(self, vm: str, device: int = 0) -> dict[str, Any]:
        attachments = call(self.socket_path, "status")["attachments"]
        found: dict[str, Any] = next(
            entry for entry in attachments if entry["name"] == f"{vm}/{device}"
        )
        return found

    def drops(self, vm: str) -> dict[str, int]:
        """Return all drops of a VM's attachment and its peers, by cause."""
        status = self.status(vm)
        found: dict[str, int] = dict(status["drops"])
        for peer in status["peers"]:
            for cause, count in peer["drops"].items():
                found[cause] = found.get(cause, 0) + count
        return found

    def wait_up(self, vm: str) -> None:
        wait_for(
            lambda: all(peer["state"] == "up" for peer in self.status(vm)["peers"]), f"{vm} up"
        )

    def ping(self, address: str, *options: object, count: int = 5) -> int:
        """Return how many of `count` pings were answered."""
        said = self.run(
            "ping",
            "-n",
            "-q",
            "-c",
            count,
            "-i",
            0.02,
            "-W",
            1,
            "-w",
            5,
            *options,
            address,
            status=None,
        )
        return int(said.split(" received")[0].rsplit(" ", 1)[1])

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        if self.service is not None:
            self.kill(signal.SIGTERM)
        run("ip", "netns", "delete", self.namespace)


def wire(a: LiveHost, b: LiveHost, name: str, addresses: tuple[str, str], mtu: int = 1500) -> None:
    """Join two hosts by a network cable, `name` at both ends."""
    run(
        "ip", "link", "add", name, "netns", a.namespace, "mtu", mtu, "type", "veth",
        "peer", "name", name, "netns", b.namespace, "mtu", mtu,
    )  # fmt: skip
    for host, address in zip((a, b), addresses, strict=True):
        host.run("ip", "address", "add", address, "dev", name, "nodad")
        host.run("ip", "link", "set", name, "up")


@contextlib.contextmanager
def two_hosts(directory: Path, mtu: int = 1500) -> Iterator[tuple[LiveHost, LiveHost]]:
    """Two hosts, 10.0.0.1 and 10.0.0.2 on a cable `wire`, with a running service each."""
    permissions = directory / "permissions"
    permissions.mkdir()
    with contextlib.ExitStack() as undo:
        hosts = []
        for _ in range(2):
            host = LiveHost(directory, permissions)
            undo.callback(host.close)
            hosts.append(host)
        a, b = hosts
        wire(a, b, "wire", ("10.0.0.1/24", "10.0.0.2/24"), mtu)
        for host in hosts:
            host.serve()
        yield a, b


def allow(host: LiveHost, vm: str, network: str = "net1", verdict: str = "allowed") -> None:
    """Say what the key service answers about a VM on a network."""
    place = host.permissions / f"{network}@{vm}"
    fresh = place.with_suffix(".new")
    fresh.write_text(verdict)
    fresh.rename(place)


def link_taps(
    a: LiveHost, b: LiveHost, name: str, subnet: int, port: int, **other: Any
) -> tuple[str, str]:
    """Attach a VM on each host, 10.1.SUBNET.1 and .2 behind TAP `name`; wait until keys agree."""
    for number, host in ((1, a), (2, b)):
        vm = f"{name}-{number}"
        allow(host, vm, other.get("network", "net1"))
        host.attach_tap(
            vm, name, f"10.1.{subnet}.{number}/24", f"10.0.0.{number}:{port}",
            f"10.0.0.{3 - number}:{port}", **other,
        )  # fmt: skip
    a.wait_up(f"{name}-1")
    b.wait_up(f"{name}-2")
    return f"10.1.{subnet}.1", f"10.1.{subnet}.2"


def main() -> None:
    """Serve until SIGTERM; say "ready" when attachments can be made."""
    import trio

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    service = Service(TinyGrants(Path(sys.argv[2])), Path(sys.argv[1]), ask_interval=ASK_INTERVAL)
    trio.run(_serve, service, partial(print, "ready", flush=True))


if __name__ == "__main__":
    main()
