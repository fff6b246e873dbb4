"""Two QEMU guests on two hosts exchange a file; QEMU's network device is sealed by `-netdev dgram`.

The guests know nothing of sealfs: a virtio network device is all they see.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from guest_support import GuestProcess, build_guest_disk, guest_script
from net_support import allow, has_namespaces, two_hosts
from qemu_support import short_directory

pytestmark = [
    pytest.mark.net,
    pytest.mark.qemu,
    pytest.mark.slow,
    pytest.mark.skipif(not has_namespaces(), reason="needs root and /dev/net/tun"),
]


def device(number: int, directory: Path) -> tuple[str, ...]:
    """Return QEMU's arguments for a network device whose frames go to sealfs."""
    ours, theirs = directory / f"qemu{number}", directory / f"vm{number}"
    return (
        "-netdev",
        f"dgram,id=n0,local.type=unix,local.path={ours},remote.type=unix,remote.path={theirs}",
        "-device", f"virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0{number},romfile=",
    )  # fmt: skip


def test_two_guests_exchange_a_file_through_qemus_datagram_device(tmp_path: Path) -> None:
    with short_directory() as directory, two_hosts(tmp_path) as (a, b):
        for number, host in ((1, a), (2, b)):
            allow(host, f"guest-{number}")
            host.attach(
                f"guest-{number}", port={"qemu": str(directory / f"vm{number}")},
                link={"listen": f"10.0.0.{number}:7400"}, peers=[f"10.0.0.{3 - number}:7400"],
            )  # fmt: skip
        a.wait_up("guest-1")
        mtu = a.status("guest-1")["mtu"]
        assert f"the guest must use an MTU of {mtu}" in a.log.read_text()
        disks = [build_guest_disk(tmp_path / f"guest{number}.raw").path for number in (1, 2)]
        send = guest_script("net_send.sh", ADDRESS="10.5.0.1", MTU=mtu)
        receive = guest_script("net_receive.sh", ADDRESS="10.5.0.2", OTHER="10.5.0.1", MTU=mtu)
        with (
            GuestProcess(
                disks[0], script=send, cache="writeback", extra=device(1, directory)
            ) as sender,
            GuestProcess(
                disks[1], script=receive, cache="writeback", extra=device(2, directory)
            ) as receiver,
        ):
            got, sent = receiver.finished().checked(), sender.finished().checked()
        assert got.results["digest"] == sent.results["digest"] == sent.results["answer"]
        assert got.results["lost"] == "0"
        status = a.status("guest-1")
        assert status["peers"][0]["bytes_out"] > 4 << 20
        assert status["state"] == "running"  # QEMU is gone, the attachment is not
