"""Two hosts in network namespaces, real TAP devices between them: what goes over the link."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_support import LiveHost, allow, has_namespaces, link_taps, run, two_hosts, wait_for, wire

from sealfs.control import call
from sealfs.errors import Busy, KeyRefused, NotFound, StorageFailed, UsageError
from sealfs.net import kernel
from sealfs.net.labels import HANDSHAKE, MACSEC

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(not has_namespaces(), reason="needs root and /dev/net/tun"),
]

Hosts = tuple[LiveHost, LiveHost]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("net")) as pair:
        yield pair


@pytest.fixture(scope="module")
def linked(hosts: Hosts) -> Hosts:
    """The two hosts with 10.1.1.1 and 10.1.1.2 linked."""
    link_taps(*hosts, "tap1", 1, 7401)
    return hosts


RECEIVE = """
import hashlib, socket, sys
server = socket.create_server((sys.argv[1], 9000))
print("listening", flush=True)
stream, _ = server.accept()
digest = hashlib.sha256()
while part := stream.recv(1 << 16):
    digest.update(part)
print(digest.hexdigest())
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000)) as stream, open(sys.argv[2], "rb") as file:
    stream.sendfile(file)
"""
FLOOD = """
import os, socket, sys, time
flood = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
frames = [bytes(12) + kind + os.urandom(1400) for kind in (b"\\x88\\xe5", b"\\x08\\x00", b"xx")]
end = time.monotonic() + float(sys.argv[3])
count = 0
while time.monotonic() < end:
    for frame in frames:
        flood.sendto(frame, (sys.argv[1], int(sys.argv[2])))
        count += 1
print(count)
"""


def copy_file(frm: LiveHost, to: LiveHost, address: str, file: Path) -> str:
    """Copy a file over TCP; return the digest of what arrived."""
    receiver = to.start(sys.executable, "-c", RECEIVE, address, stdout=subprocess.PIPE, text=True)
    assert receiver.stdout is not None
    assert receiver.stdout.readline() == "listening\n"
    frm.run(sys.executable, "-c", SEND, address, file)
    return str(receiver.stdout.readline().strip())


def iperf(a: LiveHost, b: LiveHost, address: str, *options: object) -> float:
    """Return Mbit/s of a second of iperf3 from A to B."""
    server = b.start("iperf3", "-s", "-1", "-B", address, stdout=subprocess.DEVNULL)
    listening = f"{address}:5201"
    wait_for(lambda: listening in b.run("ss", "-Hlnt"), "iperf3")
    said = a.run("iperf3", "-c", address, "-t", 1, "-f", "m", *options)
    assert server.wait(10) == 0
    return float(re.findall(r"([\d.]+) Mbits/sec .*receiver", said)[-1])


class Capture:
    """What crosses a host's device, by tcpdump."""

    def __init__(self, host: LiveHost, device: str, *expression: str) -> None:
        self.file = host.directory / f"{device}-{time.monotonic_ns()}.pcap"
        self._process = host.start(
            "tcpdump", "-i", device, "-U", "--immediate-mode", "-B", 65536, "-s", 65535,
            "-w", self.file, *expression,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stderr is not None
        while "listening on" not in self._process.stderr.readline():
            assert self._process.poll() is None

    def frames(self) -> list[bytes]:
        """Return the frames seen so far (pcap-savefile(5))."""
        raw, at, frames = self.file.read_bytes(), 24, []
        while at + 16 <= len(raw):
            size = struct.unpack_from("=I", raw, at + 8)[0]
            frames.append(raw[at + 16 : at + 16 + size])
            at += 16 + size
        return frames

    def stop(self, last: bytes) -> list[bytes]:
        """Return the frames seen, when one that has `last` in it has been."""
        wait_for(lambda: any(last in frame for frame in self.frames()[-200:]), "the capture")
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)
        return self.frames()


def test_ping_iperf3_and_a_file_cross_the_link(linked: Hosts, tmp_path: Path) -> None:
    a, b = linked
    assert a.ping("10.1.1.2", count=50) == 50
    assert b.ping("10.1.1.1", "-s", 1300, count=50) == 50
    for options in ((), ("-R",)):
        assert iperf(a, b, "10.1.1.2", *options) > 20
    file = tmp_path / "file"
    file.write_bytes(os.urandom(20 << 20))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert copy_file(a, b, "10.1.1.2", file) == digest
    assert copy_file(b, a, "10.1.1.1", file) == digest
    assert "bad_icv" not in a.drops("tap1-1")
    status = a.status("tap1-1")
    assert status["peers"][0]["frames_out"] > 10_000
    assert status["mtu"] == 1422
    assert "mtu 1422" in a.run("ip", "link", "show", "tap1")


def test_the_wire_shows_sealed_frames_and_none_of_the_payload(
    linked: Hosts, tmp_path: Path
) -> None:
    a, b = linked
    marker = b"this is what nobody is to read "
    file = tmp_path / "file"
    file.write_bytes(marker * 20_000)
    inside, outside = Capture(b, "tap1"), Capture(b, "wire")
    assert copy_file(a, b, "10.1.1.2", file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert a.ping("10.1.1.2", "-p", "6e6f626f6479", count=5) == 5
    # ICMP sequence numbers tell the last ping; plain pings of the hosts tell the end outside.
    plain = b"".join(inside.stop(b"nobodynobody"))
    a.ping("10.0.0.2", "-p", "656e64", count=1)
    seen = outside.stop(b"endendend")
    assert plain.count(marker) > 1000  # the capture does see what it could see
    assert b"nobody" * 4 in plain
    on_wire = b"".join(seen)
    assert len(on_wire) > len(marker) * 20_000
    for part in (marker, marker[:12], b"nobody" * 2, bytes([10, 1, 1, 1]) + bytes([10, 1, 1, 2])):
        assert part not in on_wire
    # Everything between the two addresses is a sealed frame or a handshake.
    kinds = {
        int.from_bytes(frame[54:56], "big")
        for frame in seen
        if frame[12:14] == b"\x08\x00" and frame[23] == socket.IPPROTO_UDP
    }
    assert kinds <= {MACSEC, HANDSHAKE}
    assert MACSEC in kinds


def test_after_kill_9_the_link_is_back_and_old_frames_are_not_delivered(hosts: Hosts) -> None:
    a, b = hosts
    link_taps(a, b, "tap2", 2, 7402)
    capture = Capture(b, "wire", "udp port 7402")
    assert a.ping("10.1.2.2", count=50) == 50
    a.run(
        sys.executable, "-c",
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM);"
        "s.sendto(b'end of it', ('10.0.0.2', 7402))",
    )  # fmt: skip
    old = [
        frame[42:] for frame in capture.stop(b"end of it") if frame[26:30] == bytes([10, 0, 0, 1])
    ]
    sealed = [frame for frame in old if frame[12:14] == b"\x88\xe5"]
    assert len(sealed) >= 50
    for _ in range(2):
        a.kill()
        a.serve()
        a.attach_tap("tap2-1", "tap2", "10.1.2.1/24", "10.0.0.1:7402", "10.0.0.2:7402")
        wait_for(lambda: a.ping("10.1.2.2", count=2) == 2, "the link to be back")
    before = b.status("tap2-2")["peers"][0]["frames_in"]
    drops = sum(b.drops("tap2-2").values())
    a.kill()
    # From A's own address and port, all that it ever sent.
    replay = (
        "import socket, sys\n"
        "sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "sender.bind(('10.0.0.1', 7402))\n"
        "for line in sys.argv[1:]: sender.sendto(bytes.fromhex(line), ('10.0.0.2', 7402))\n"
    )
    a.run(sys.executable, "-c", replay, *(frame.hex() for frame in sealed[-50:]))
    wait_for(lambda: sum(b.drops("tap2-2").values()) >= drops + 50, "the frames to be dropped")
    assert b.status("tap2-2")["peers"][0]["frames_in"] == before
    a.serve()
    # What the killed service had is gone; the other tests of this module need it again.
    a.attach_tap("tap1-1", "tap1", "10.1.1.1/24", "10.0.0.1:7401", "10.0.0.2:7401")
    b.wait_up("tap1-2")


def test_a_vm_that_is_not_allowed_gets_no_link(hosts: Hosts) -> None:
    a, _ = hosts
    where = {"port": {"tap": "tapx"}, "link": {"listen": "10.0.0.1:7410"}, "peers": ["10.0.0.2:1"]}
    with pytest.raises(KeyRefused, match=r"stranger.*is not allowed on network net1"):
        a.attach("stranger", **where)
    assert "tapx" not in a.run("ip", "link")
    allow(a, "stranger", "net2")
    with pytest.raises(KeyRefused, match="net1"):
        a.attach("stranger", **where)


def test_a_vm_that_is_revoked_gets_neither_direction(hosts: Hosts) -> None:
    a, b = hosts
    link_taps(a, b, "tap3", 3, 7403)
    assert a.ping("10.1.3.2") == 5
    allow(b, "tap3-2", verdict="was revoked")
    wait_for(lambda: b.status("tap3-2")["state"] == "revoked", "the revocation")
    assert "stopped in both directions: VM tap3-2 on network net1" in b.log.read_text()
    assert a.ping("10.1.3.2", count=2) == 0
    assert "tap3" not in b.run("ip", "link")
    assert not any(peer["handshake_age"] for peer in b.status("tap3-2")["peers"])
    # The other VM of the host goes on.
    assert b.status("tap1-2")["state"] == "running"
    with pytest.raises(KeyRefused, match="was revoked"):
        b.attach_tap("tap3-2", "tap3", "10.1.3.2/24", "10.0.0.2:7403", "10.0.0.1:7403")
    allow(b, "tap3-2")
    b.attach_tap("tap3-2", "tap3", "10.1.3.2/24", "10.0.0.2:7403", "10.0.0.1:7403")
    a.run("ip", "neighbour", "flush", "dev", "tap3")  # the new TAP has another address
    wait_for(lambda: a.ping("10.1.3.2", count=2) == 2, "the VM that is allowed again")


def test_a_device_is_attached_once(linked: Hosts) -> None:
    a, _ = linked
    for port in ("7401", "7409"):
        with pytest.raises(Busy, match="is attached already"):
            a.attach(
                "tap1-1", port={"tap": "tap9"}, link={"listen": f"10.0.0.1:{port}"},
                peers=["10.0.0.2:7401"],
            )  # fmt: skip
    # Another device of the same VM is another matter.
    a.attach(
        "tap1-1", device=1, port={"tap": "tap9"}, link={"listen": "10.0.0.1:7409"},
        peers=["10.0.0.2:7409"],
    )  # fmt: skip
    assert a.status("tap1-1", 1)["sci"] != a.status("tap1-1", 0)["sci"]
    call(a.socket_path, "detach", name="tap1-1/1")
    assert "tap9" not in a.run("ip", "link")
    with pytest.raises(NotFound):
        call(a.socket_path, "detach", name="tap1-1/1")


@pytest.mark.parametrize(
    ("where", "error", "says"),
    [
        ({"port": {"tap": "lo"}}, UsageError, "no TAP"),
        ({"port": {"tap": "a name that is too long"}}, UsageError, "no name of a network device"),
        ({"link": {"listen": "10.0.0.1:7401"}}, StorageFailed, "Address already in use"),
        ({"link": {"listen": "10.9.9.9:7499"}}, StorageFailed, "Cannot assign"),
        ({"link": {"listen": "nonsense"}}, UsageError, "is not ADDRESS:PORT"),
        ({"peers": ["[fd00::1]:1"]}, UsageError, "not an address of the same kind"),
        ({"peers": []}, UsageError, "needs 1 to 64 peers"),
        ({"peers": ["10.0.0.2:1", "10.0.0.2:1"]}, UsageError, "named twice"),
        ({"link": {"device": "wire"}, "peers": ["10.0.0.2:1"]}, UsageError, "Ethernet address"),
        ({"link": {"device": "none0"}, "peers": ["2:0:0:0:0:1"]}, StorageFailed, "No such device"),
        ({"port": {}}, UsageError, "needs a port: tap or qemu"),
    ],
)
def test_what_cannot_be_attached_says_why(
    linked: Hosts, where: dict[str, object], error: type[Exception], says: str
) -> None:
    a, _ = linked
    allow(a, "wrong")
    asked = {
        "port": {"tap": "tap8"}, "link": {"listen": "10.0.0.1:7498"}, "peers": ["10.0.0.2:7498"],
        **where,
    }  # fmt: skip
    with pytest.raises(error, match=says):
        a.attach("wrong", **asked)
    assert "tap8" not in a.run("ip", "link")
    with pytest.raises(StopIteration):
        a.status("wrong")


def test_a_flood_on_one_attachment_does_not_stop_another(linked: Hosts) -> None:
    a, b = linked
    link_taps(a, b, "tap4", 4, 7404)
    flood = a.start(
        sys.executable, "-c", FLOOD, "10.0.0.2", 7404, 4, stdout=subprocess.PIPE, text=True
    )
    time.sleep(0.3)  # so that it runs
    assert a.ping("10.1.1.2", "-i", 0.05, count=40) >= 39
    assert iperf(a, b, "10.1.1.2") > 5
    assert flood.wait(20) == 0
    assert flood.stdout is not None
    count = int(flood.stdout.read())
    assert count > 20_000
    # It cost a counter; what the kernel threw away itself was counted there.
    drops = b.drops("tap4-2")
    assert drops["plain"] > 1000
    assert drops["unknown_sender"] > 1000
    wait_for(lambda: a.ping("10.1.4.2", count=2) == 2, "the flooded link to work again")


def test_a_frame_that_does_not_fit_is_told_and_counted(hosts: Hosts) -> None:
    a, b = hosts
    link_taps(a, b, "tap5", 5, 7405)
    assert a.ping("10.1.5.2", "-M", "do", "-s", 1422 - 28, count=3) == 3
    a.run("ip", "link", "set", "tap5", "mtu", 1500)
    assert a.ping("10.1.5.2", "-M", "do", "-s", 1500 - 28, count=3) == 0
    too_long = a.drops("tap5-1")["too_long"]
    assert too_long >= 3
    assert "the VM must use an MTU of 1422" in a.log.read_text()
    # A VLAN tag of the guest's own fits into what is left for it.
    a.run("ip", "link", "set", "tap5", "mtu", 1422)
    before = b.status("tap5-2")["peers"][0]["frames_in"]
    tagged = (
        "import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(('tap5', 0));"
        "s.send(bytes(11) + b'\\2' + b'\\x81\\0\\0\\7\\x88\\xb6' + bytes(1422))"
    )
    a.run(sys.executable, "-c", tagged)
    wait_for(lambda: b.status("tap5-2")["peers"][0]["frames_in"] > before, "the tagged frame")
    assert a.drops("tap5-1")["too_long"] == too_long


def test_ipv6_between_the_hosts(hosts: Hosts) -> None:
    a, b = hosts
    wire(a, b, "wire6", ("fd00::1/64", "fd00::2/64"))
    for number, host in ((1, a), (2, b)):
        allow(host, f"six-{number}")
        host.attach_tap(
            f"six-{number}", "six", f"10.1.6.{number}/24", f"[fd00::{number}]:7406",
            f"[fd00::{3 - number}]:7406",
        )  # fmt: skip
    b.wait_up("six-2")
    a.wait_up("six-1")
    assert a.status("six-1")["mtu"] == 1402
    assert a.ping("10.1.6.2", "-M", "do", "-s", 1402 - 28) == 5


def test_raw_ethernet_between_the_hosts(hosts: Hosts, tmp_path: Path) -> None:
    a, b = hosts
    wire(a, b, "bare", ("10.0.7.1/24", "10.0.7.2/24"))
    addresses = [host.address_of("bare") for host in (a, b)]
    for number, host in ((1, a), (2, b)):
        allow(host, f"raw-{number}")
        host.attach(
            f"raw-{number}", port={"tap": "raw"}, link={"device": "bare"},
            peers=[addresses[2 - number]],
        )  # fmt: skip
        host.run("ip", "address", "add", f"10.1.7.{number}/24", "dev", "raw")
    a.wait_up("raw-1")
    b.wait_up("raw-2")
    assert a.status("raw-1")["mtu"] == 1500 + 14 - 32 - 14 - 4
    capture = Capture(b, "bare", "ether proto 0x88e5")
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1 << 20))
    assert copy_file(a, b, "10.1.7.2", file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert a.ping("10.1.7.2", "-M", "do", "-s", 1464 - 28) == 5
    wait_for(lambda: len(capture.frames()) > 750, "the capture")
    frames = capture.stop(b"\x88\xe5")
    # The guests' own addresses, and our SCI in the tag.
    tap = bytes.fromhex(a.address_of("raw").replace(":", ""))
    sci = bytes.fromhex(a.status("raw-1")["sci"])
    assert sum(frame[6:12] == tap and frame[20:28] == sci for frame in frames) > 500
    # Plain frames on the segment reach no VM: this ping is for the host's own address.
    before = b.status("raw-2")["peers"][0]["frames_in"]
    assert a.ping("10.0.7.2") == 5
    assert b.status("raw-2")["peers"][0]["frames_in"] <= before + 1


def test_the_kernels_macsec_is_used_or_it_is_said_why_not(hosts: Hosts) -> None:
    a, b = hosts
    wire(a, b, "lower", ("10.0.9.1/24", "10.0.9.2/24"))
    addresses = [host.address_of("lower") for host in (a, b)]
    where = [
        {
            "port": {"tap": "ms0"}, "link": {"device": "lower"}, "peers": [addresses[2 - number]],
            "backend": "kernel",
        }
        for number in (1, 2)
    ]  # fmt: skip
    for number, host in ((1, a), (2, b)):
        allow(host, f"kernel-{number}")
    if not kernel.is_there():
        with pytest.raises(UsageError, match="this kernel has no MACsec; the userspace backend"):
            a.attach("kernel-1", **where[0])
        with pytest.raises(StopIteration):
            a.status("kernel-1")
        return
    for number, host in ((1, a), (2, b)):
        host.attach(f"kernel-{number}", **where[number - 1])
        host.run("ip", "address", "add", f"10.1.9.{number}/24", "dev", "ms0")
    a.wait_up("kernel-1")
    assert a.ping("10.1.9.2") == 5
    # The kernel of one end with this process of the other: it is a standard frame.
    b.detach("kernel-2")
    b.attach("kernel-2", **{**where[1], "backend": "userspace"})
    b.run("ip", "address", "add", "10.1.9.2/24", "dev", "ms0")
    a.run("ip", "neighbour", "flush", "dev", "ms0")
    wait_for(lambda: a.ping("10.1.9.2", count=2) == 2, "the kernel and userspace to meet")


def test_jumbo_frames(tmp_path: Path) -> None:
    with two_hosts(tmp_path, mtu=9000) as (a, b):
        link_taps(a, b, "tap0", 1, 7400)
        assert a.status("tap0-1")["mtu"] == 8922
        assert a.ping("10.1.1.2", "-M", "do", "-s", 8922 - 28) == 5
        assert iperf(a, b, "10.1.1.2") > 50


def test_another_network_does_not_meet(hosts: Hosts) -> None:
    a, b = hosts
    for number, host, network in ((1, a, "net1"), (2, b, "net2")):
        allow(host, f"other-{number}", network)
        host.attach_tap(
            f"other-{number}", "other", f"10.1.8.{number}/24", f"10.0.0.{number}:7408",
            f"10.0.0.{3 - number}:7408", network=network,
        )  # fmt: skip
    says = "the peer is on another network or has another key"
    wait_for(lambda: says in a.status("other-1")["peers"][0]["last_refusal"], "the refusal")
    assert a.ping("10.1.8.2", count=2) == 0
    assert a.status("other-1")["peers"][0]["state"] == "connecting"
    assert f"handshake refused: it does not authenticate: {says}" in a.log.read_text()


def test_the_service_tells_prometheus_and_is_alone(linked: Hosts) -> None:
    a, _ = linked
    text = call(a.socket_path, "metrics")["text"]
    own = 'network="net1",vm="tap1-1",device="0"'
    assert f"sealfs_net_running{{{own}}} 1\n" in text
    assert re.search(
        rf'sealfs_net_frames_total{{{own},peer="10.0.0.2:7401",direction="in"}} \d+\n', text
    )
    assert a.socket_path.stat().st_mode & 0o777 == 0o600
    second = subprocess.run(
        a.within(sys.executable, Path(__file__).parent / "net_support.py", a.directory, "/"),
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert second.returncode != 0
    assert "another process serves it" in second.stderr


def test_who_is_not_root_is_not_answered(linked: Hosts) -> None:
    a, _ = linked
    script = (
        "import socket, sys\n"
        "stream = socket.socket(socket.AF_UNIX)\n"
        "stream.connect(sys.argv[1])\n"
        'stream.sendall(b\'{"verb": "status"}\\n\')\n'
        "print(len(stream.recv(10)))\n"
    )
    a.socket_path.chmod(0o666)
    for directory in a.directory.resolve().parents:
        if directory.stat().st_uid == 0 and directory != Path("/") and "pytest" in str(directory):
            directory.chmod(0o755)
    a.directory.chmod(0o755)
    nobody = ("setpriv", "--reuid=65534", "--clear-groups", sys.executable)
    said = run(*nobody, "-c", script, a.socket_path, status=None)
    a.socket_path.chmod(0o600)
    assert said == "0\n" or "ConnectionReset" in said or "BrokenPipe" in said


def test_a_stopped_service_leaves_nothing(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (a, b):
        link_taps(a, b, "tap0", 1, 7400)
        qemu = tmp_path / "qemu.sock"
        allow(a, "q")
        a.attach("q", port={"qemu": str(qemu)}, link={"listen": "10.0.0.1:1"}, peers=["10.0.0.2:1"])
        assert qemu.stat().st_mode & 0o777 == 0o600
        a.kill(signal.SIGTERM)
        assert "tap0" not in a.run("ip", "link")
        assert not qemu.exists()
        assert not a.socket_path.exists()
        assert "Traceback" not in a.log.read_text()
