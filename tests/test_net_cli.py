"""Network links as a user makes them: two hosts, two software TPMs, commands and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_hosts import NetHost, two_hosts
from net_support import has_namespaces

from sealfs.net import kernel

pytestmark = [
    pytest.mark.net,
    pytest.mark.tpm,
    pytest.mark.skipif(not has_namespaces(), reason="needs root and /dev/net/tun"),
]

Hosts = tuple[NetHost, NetHost]
README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Hosts a and b that share network prod; web1 is a VM of a, db1 of b, and both are on it."""
    with two_hosts(tmp_path_factory.mktemp("net")) as (a, b):
        a.shell("sealfs net create prod")
        b.shell(f"sealfs host-id -o {a.home}/b.enroll")
        fingerprint = b.json("sealfs --json host-id")["fingerprint"]
        package = f"{b.home}/prod.package"
        a.shell(f"sealfs key enroll prod --to b.enroll -o {package} --fingerprint {fingerprint}")
        b.shell("sealfs key import prod.package")
        for host, vms in ((a, ("web1", "web2")), (b, ("db1",))):
            for vm in vms:
                host.shell(f"sealfs create {vm}.sealed --size 1M --vm-id {vm}")
                host.shell(f"sealfs net allow prod --vm {vm}")
        yield a, b


def attach_line(vm: str, tap: str, number: int, port: int = 7400, **options: object) -> str:
    more = "".join(f" --{name.replace('_', '-')} {value}" for name, value in options.items())
    return (
        f"sealfs net attach --vm {vm} --net prod --tap {tap} --listen 10.0.0.{number}:{port} "
        f"--peer 10.0.0.{3 - number}:{port}{more}"
    )


@pytest.fixture
def linked(hosts: Hosts) -> Iterator[Hosts]:
    """web1 on a, 10.9.0.1, and db1 on b, 10.9.0.2, linked."""
    a, b = hosts
    for number, (host, vm) in enumerate(((a, "web1"), (b, "db1")), start=1):
        host.shell(f"sealfs net allow prod --vm {vm}")
        host.shell(attach_line(vm, "tap0", number))
        host.shell(f"ip address add 10.9.0.{number}/24 dev tap0")
    a.wait_up("web1/0")
    b.wait_up("db1/0")
    yield a, b
    for host, vm in ((a, "web1"), (b, "db1")):
        host.shell(f"sealfs net detach --vm {vm}", status=None)


def reach(host: NetHost, address: str = "10.9.0.2") -> None:
    """Wait until the other VM answers; whatever else the machine has to do meanwhile."""
    host.wait_for(f"{address} to answer", lambda: pings(host, address))


def pings(host: NetHost, address: str = "10.9.0.2") -> bool:
    return " 0% packet loss" in host.shell(f"ping -n -c 3 -i 0.05 -W 1 {address}", status=None)


def test_two_vms_are_linked_and_the_wire_shows_nothing(linked: Hosts) -> None:
    a, b = linked
    capture = b.start("tcpdump -i eth0 -U --immediate-mode -w wire.pcap udp")
    b.wait_for("the capture", (b.home / "wire.pcap").exists)
    reach(a)
    reach(b, "10.9.0.1")
    a.shell("ping -n -c 5 -i 0.05 -p 736563726574 10.9.0.2")
    b.wait_for("frames", lambda: (b.home / "wire.pcap").stat().st_size > 1000)
    capture.send_signal(signal.SIGINT)
    capture.wait(10)
    raw = (b.home / "wire.pcap").read_bytes()
    assert b"\x88\xe5" in raw, "sealed frames"
    assert b"secret" not in raw
    status = a.status("web1/0")
    assert (status["network"], status["state"], status["mtu"]) == ("prod", "running", 1422)
    assert status["peers"][0]["frames_in"] >= 8
    shown = a.shell("sealfs net status")
    assert re.search(r"^web1/0 +prod +running +1 of 1 ", shown, re.M)
    metrics = a.shell("sealfs net status --prometheus")
    assert 'sealfs_net_running{network="prod",vm="web1",device="0"} 1' in metrics


def test_attach_says_what_the_hypervisor_is_to_be_told(hosts: Hosts) -> None:
    a, _ = hosts
    found = a.json(attach_line("web1", "tap0", 1).replace("sealfs net", "sealfs --json net"))
    sci = bytes.fromhex(found["attachment"]["sci"])
    assert f"<mac address='{sci[:6].hex(':')}'/>" in found["hypervisor"][0]
    assert "dev='tap0'" in found["hypervisor"][0]
    qemu = "--qemu unix:web1.sock"
    line = attach_line("web1", "-", 1, 7401, device_index=1).replace("--tap -", qemu)
    text = a.shell(line)
    sock = a.home / "web1.sock"
    assert 'web1/1 on "prod": the guest\'s MTU is 1422' in text
    assert f"local.path={sock}.qemu,remote.type=unix,remote.path={sock}" in text
    assert "host_mtu=1422" in text
    assert stat.S_ISSOCK(sock.stat().st_mode)
    assert sock.stat().st_mode & 0o077 == 0
    a.shell("sealfs net detach --vm web1 --device-index 1")
    assert not sock.exists()
    a.shell("sealfs net detach --vm web1")
    assert "tap0" not in a.shell("ip link")


def test_c2_a_device_is_attached_once_also_by_another_service(linked: Hosts) -> None:
    a, _ = linked
    text = a.shell(attach_line("web1", "tap1", 1, 7409), status=9)
    assert '"web1/0": is attached already' in text
    assert "hint: sealfs net detach --vm web1" in text
    # Another process, by another directory of sockets, meets the lock in the state directory.
    text = a.shell(attach_line("web1", "tap1", 1, 7409, run_dir="other"), status=9)
    assert "its network device 0 is attached already" in text
    assert not (a.home / "other" / "net.sock").exists(), "it ended, as nothing was attached"
    reach(a)


def test_c10_who_is_not_allowed_is_refused_with_the_command_that_allows(hosts: Hosts) -> None:
    a, b = hosts
    a.shell("sealfs create db2.sealed --size 1M --vm-id db2")
    text = a.shell(attach_line("db2", "tapx", 1), status=7)
    assert 'error: "db2": is not allowed on network "prod"' in text
    assert "hint: sealfs net allow prod --vm db2" in text
    text = a.shell(attach_line("web1", "tapx", 1).replace("prod", "prid"), status=7)
    assert 'error: "prid": this host has no such network' in text
    assert "hint: sealfs net list" in text
    text = b.shell(attach_line("web1", "tapx", 2), status=7)
    assert 'error: "web1": this host has no key for it' in text
    for host in hosts:
        assert "tapx" not in host.shell("ip link")
        assert host.shell("sealfs net status") == ""
        assert not Path(f"/proc/{host.pid}/root/run/sealfs/net.sock").exists()


@pytest.mark.parametrize("how", ["deny", "revoke"])
def test_c10_who_is_denied_or_revoked_is_cut_off_at_once_in_both_directions(
    linked: Hosts, how: str
) -> None:
    a, b = linked
    reach(a)
    if how == "deny":
        b.shell("sealfs net deny prod --vm db1")
    else:
        b.shell("sealfs create db9.sealed --size 1M --vm-id db9; sealfs net allow prod --vm db9")
        line = attach_line("db9", "tap9", 2, 7409, device_index=3)
        b.shell(line)
        b.shell("sealfs key revoke db9 --yes")
    gone = "db1/0" if how == "deny" else "db9/3"
    b.wait_for("the end", lambda: b.status(gone)["state"] == "revoked")
    assert "stopped in both directions" in b.log()
    if how == "revoke":
        reach(a)  # the other VM goes on
    else:
        assert not pings(a)
    again = attach_line("db1", "tap0", 2) if how == "deny" else line
    b.shell(again, status=7)
    vm, index = gone.split("/")
    b.shell(f"sealfs net detach --vm {vm} --device-index {index}")


def test_a_killed_service_is_started_again_by_the_next_attach(linked: Hosts) -> None:
    a, b = linked
    os.kill(a.service_pid(), signal.SIGKILL)
    a.wait_for("its end", lambda: a.shell("sealfs net status") == "")
    assert "is not attached" in a.shell("sealfs net detach --vm web1", status=10)
    a.shell(attach_line("web1", "tap0", 1))
    a.shell("ip address add 10.9.0.1/24 dev tap0")
    reach(a)
    b.wait_up("db1/0")


def test_the_service_ends_with_its_last_attachment(hosts: Hosts) -> None:
    a, _ = hosts
    a.shell(attach_line("web1", "tap0", 1))
    a.shell(attach_line("web2", "tap2", 1, 7402))
    pid = a.service_pid()
    a.shell("sealfs net detach --vm web1")
    assert a.service_pid() == pid
    a.shell("sealfs net detach --vm web2")
    a.wait_for("its end", lambda: not Path(f"/proc/{pid}").exists())
    assert a.shell("ls /run/sealfs") == "net.lock\nnet.log\n"


def test_two_attaches_at_once_start_one_service(hosts: Hosts) -> None:
    a, _ = hosts
    lines = [
        attach_line(vm, f"tap{number}", 1, 7400 + number)
        for number, vm in enumerate(("web1", "web2"))
    ]
    running = [a.start(line) for line in lines]
    for process in running:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
    attached = {one["name"] for one in a.json("sealfs --json net status")}
    assert attached == {"web1/0", "web2/0"}
    for vm in ("web1", "web2"):
        a.shell(f"sealfs net detach --vm {vm}")


def test_an_attach_while_the_service_ends_is_done_by_another_one(hosts: Hosts) -> None:
    a, _ = hosts
    for _ in range(5):
        a.shell(attach_line("web1", "tap0", 1))
        ending = a.start("sealfs net detach --vm web1")
        a.shell(attach_line("web2", "tap2", 1, 7402))
        said, _ = ending.communicate(timeout=60)
        assert ending.returncode == 0, said
        assert a.status("web2/0")["state"] == "running"
        a.shell("sealfs net detach --vm web2")


def test_in_the_foreground_it_lasts_as_long_as_its_attachment(hosts: Hosts) -> None:
    a, _ = hosts
    line = attach_line("web1", "tap0", 1) + " -f"
    for end, status in (("term", 0), ("detach", 0), ("deny", 7), ("kill", 1)):
        process = a.start(line)
        a.wait_for("attached", lambda: a.status("web1/0").get("state") == "running")
        assert process.poll() is None
        match end:
            case "term":
                process.terminate()
            case "detach":
                a.shell("sealfs net detach --vm web1")
            case "deny":
                a.shell("sealfs net deny prod --vm web1")
            case "kill":
                os.kill(a.service_pid(), signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
        assert process.returncode == status, (end, said)
        assert ("is no longer allowed" in said) == (end == "deny"), said
        assert ("network service died" in said) == (end == "kill"), said
        a.wait_for("detached", lambda: a.status("web1/0") == {})
        if end == "deny":
            a.shell("sealfs net allow prod --vm web1")


def test_keys_come_from_keyd_where_it_is_asked_for(hosts: Hosts) -> None:
    a, _ = hosts
    a.shell("sealfs keyd --log keyd.log -v")
    try:
        a.shell(attach_line("web1", "tap0", 1) + " --keyd")
        pid = a.service_pid()
        held = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
        assert not any("host.record" in name or "/tpm" in name for name in held)
        assert "serves process" in (a.home / "keyd.log").read_text()
        assert a.status("web1/0")["state"] == "running"
        a.shell("sealfs net deny prod --vm web1")
        a.wait_for("the end", lambda: a.status("web1/0")["state"] == "revoked")
        a.shell("sealfs net detach --vm web1; sealfs net allow prod --vm web1")
    finally:
        a.shell("kill $(ss -xlpH src /var/lib/sealfs/keyd.sock | grep -o 'pid=[0-9]*' | cut -c5-)")
    a.wait_for("its end", lambda: not (a.state / "keyd.sock").exists())
    text = a.shell(attach_line("web1", "tap0", 1) + " --keyd", status=8)
    assert "keyd does not answer" in text


def test_a_vm_with_a_pin_is_attached_by_it_and_the_pin_is_kept_by_nobody(hosts: Hosts) -> None:
    a, _ = hosts
    (a.home / "pin").write_text("2468013579\n")
    (a.home / "wrong").write_text("1111111111\n")
    a.shell("sealfs create pin.sealed --size 1M --vm-id pin --pin-file pin")
    a.shell("sealfs net allow prod --vm pin --pin-file pin")
    line = attach_line("pin", "tap5", 1, 7405)
    text = a.shell(line, status=7)
    assert "its key opens with its PIN only" in text
    assert "--pin-file FILE" in text
    assert "the PIN is wrong" in a.shell(f"{line} --pin-file wrong", status=7)
    a.shell(f"{line} --pin-file pin")
    pid = a.service_pid()
    for name in ("environ", "cmdline"):
        assert b"2468013579" not in Path(f"/proc/{pid}/{name}").read_bytes()
    assert "2468013579" not in a.log()
    assert "key locked" in a.shell("sealfs audit show --vm pin")
    a.shell("sealfs net detach --vm pin")
    a.shell(line, status=7)


def test_a_service_of_another_state_directory_is_not_joined(hosts: Hosts) -> None:
    a, _ = hosts
    a.shell("sealfs --state second init --tpm swtpm --no-recovery")
    a.shell("sealfs --state second net create prod")
    a.shell("sealfs --state second create o.sealed --size 1M --vm-id web1")
    a.shell("sealfs --state second net allow prod --vm web1")
    a.shell(attach_line("web1", "tap0", 1))
    other = attach_line("web1", "tap1", 1, 7401).replace("sealfs net", "sealfs --state second net")
    assert 'serves the state directory "/var/lib/sealfs"' in a.shell(other, status=9)
    a.shell("sealfs net detach --vm web1")


def test_another_network_of_the_same_name_does_not_meet(hosts: Hosts) -> None:
    a, b = hosts
    for host in hosts:
        host.shell("sealfs net create alike")
    for number, (host, vm) in enumerate(((a, "web1"), (b, "db1")), start=1):
        host.shell(f"sealfs net allow alike --vm {vm}")
        host.shell(attach_line(vm, "tap0", number).replace("prod", "alike"))
        host.shell(f"ip address add 10.9.0.{number}/24 dev tap0")
    refusal = "the peer is on another network or has another key"
    a.wait_for("the refusal", lambda: refusal in a.status("web1/0")["peers"][0]["last_refusal"])
    assert not pings(a)
    for host, vm in ((a, "web1"), (b, "db1")):
        host.shell(f"sealfs net detach --vm {vm}")


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ("--tap t0 --listen 10.0.0.1:1", 2, "peer is missing"),
        ("--listen 10.0.0.1:1 --peer 10.0.0.2:1", 2, "takes --qemu or --tap"),
        ("--tap t0 --qemu unix:x --listen 10.0.0.1:1 --peer 10.0.0.2:1", 2, "one of them"),
        ("--qemu x --listen 10.0.0.1:1 --peer 10.0.0.2:1", 2, '"unix:" and a path'),
        ("--tap t0 --peer 10.0.0.2:1", 2, "takes --listen or --device"),
        ("--tap t0 --listen nonsense --peer 10.0.0.2:1", 2, "is not ADDRESS:PORT"),
        ("--tap lo --listen 10.0.0.1:1 --peer 10.0.0.2:1", 2, "but no TAP"),
        ("--tap t0 --device none0 --peer 2:0:0:0:0:1", 1, "No such device"),
        ("--tap t0 --listen 10.0.0.9:1 --peer 10.0.0.2:1", 1, "Cannot assign"),
        ("--tap t0 --listen 10.0.0.1:1 --peer 10.0.0.2:1 --device-index 256", 2, "256"),
        ("--tap t0 --listen 10.0.0.1:1 --peer 10.0.0.2:1 --backend kernel", 2, "raw Ethernet"),
    ],
)
def test_what_makes_no_sense_is_said_and_nothing_stays(
    hosts: Hosts, options: str, status: int, says: str
) -> None:
    a, _ = hosts
    text = a.shell(f"sealfs net attach --vm web1 --net prod {options}", status=status)
    assert says in text
    document = a.json(f"sealfs --json net attach --vm web1 --net prod {options} || true")
    assert document["error"]["exit_code"] == status
    assert a.shell("sealfs net status") == ""
    assert "t0" not in a.shell("ip -br link")


@pytest.mark.skipif(kernel.is_there(), reason="this kernel has MACsec")
def test_a_kernel_without_macsec_is_told_as_that(hosts: Hosts) -> None:
    a, _ = hosts
    line = "--tap t0 --device eth0 --peer 2:0:0:0:0:1 --backend kernel"
    text = a.shell(f"sealfs net attach --vm web1 --net prod {line}", status=2)
    assert "this kernel has no MACsec" in text


def test_no_key_is_in_what_others_can_see(linked: Hosts) -> None:
    """Nor in a core dump of the service, which the kernel is told not to make."""
    a, _ = linked
    pid = a.service_pid()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(r"Max core file size +0 +0 ", limits)
    text = a.log() + a.shell("sealfs --json net status") + a.shell("sealfs --json audit show")
    assert not re.search(r"\b[0-9a-f]{64}\b", text), "32 bytes in hexadecimal"
    assert json.loads(a.shell("sealfs --json net status"))


def example() -> list[tuple[str, str]]:
    """README's worked example: (host, what is typed there)."""
    section = README.read_text().split("## Network links")[1].split("\n## ")[0]
    return re.findall(r"^    ([ab])# (.*?)(?: +#.*)?$", section, re.M)


def test_the_worked_example_of_readme_works(tmp_path: Path) -> None:
    with two_hosts(tmp_path) as (a, b):
        hosts = {"a": a, "b": b}
        for host, vm in ((a, "web1"), (b, "db1")):
            host.shell(f"sealfs create {vm}.sealed --size 1M --vm-id {vm}")
            (host.home / "bin").mkdir()
            scp = host.home / "bin" / "scp"  # the two homes are on one disk
            scp.write_text(f'#!/bin/sh\ncp "$1" "{tmp_path}/${{2%:}}/"\n')
            scp.chmod(0o755)
        lines = example()
        said = {}
        assert {name for name, _ in lines} == set(hosts)
        for name, line in lines:
            if "FINGERPRINT" in line:
                line = line.replace("FINGERPRINT", b.json("sealfs --json host-id")["fingerprint"])
            said[line.split(" --")[0]] = hosts[name].shell(line)
            if "ip address add" in line:
                a.wait_up("web1/0")
        assert " 0% packet loss" in said["ping -c 3 192.168.7.2"]
        assert "the guest's MTU is 1422" in said["sealfs net attach"]
        assert re.search(r"web1/0 +prod +running +1 of 1", said["sealfs net status"])
        b.wait_for("the end", lambda: b.status("db1/0")["state"] == "revoked")
        assert "100% packet loss" in a.shell("ping -c 2 -W 1 192.168.7.2", status=None)
        for name in ("a", "b"):
            hosts[name].shell("sealfs audit verify")
