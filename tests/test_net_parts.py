"""The pure parts around an attachment: learned addresses, runs of frames, requests, metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.errors import UsageError
from sealfs.net.counters import prometheus
from sealfs.net.grant import Grant
from sealfs.net.learned import ADDRESSES_MAX, AGE, Learned
from sealfs.net.link import RUN_SIZE_MAX, SEGMENT_COUNT_MAX, Address
from sealfs.net.outbox import Outbox
from sealfs.net.service import PEERS_MAX, Request


def address(number: int) -> bytes:
    return b"\x02" + number.to_bytes(5, "big")


# Learned addresses


def test_an_address_is_found_where_it_was_last_heard() -> None:
    learned: Learned[str] = Learned(0.0)
    assert learned.find(address(1)) is None
    learned.heard(address(1), "b")
    learned.heard(address(2), "c")
    assert [learned.find(address(n)) for n in (1, 2, 3)] == ["b", "c", None]
    learned.heard(address(1), "c")
    assert learned.find(address(1)) == "c"
    assert len(learned) == 2


def test_an_address_that_is_not_heard_is_forgotten() -> None:
    learned: Learned[str] = Learned(0.0)
    learned.heard(address(1), "b")
    learned.heard(address(2), "b")
    learned.turn(AGE - 1)
    learned.turn(AGE)
    assert learned.find(address(1)) == "b"
    learned.heard(address(1), "b")
    learned.turn(2 * AGE)
    assert learned.find(address(1)) == "b"
    assert learned.find(address(2)) is None


def test_one_peer_cannot_fill_the_table_of_another() -> None:
    learned: Learned[str] = Learned(0.0)
    for number in range(3 * ADDRESSES_MAX):
        learned.heard(address(number), "flood")
    assert len(learned) == ADDRESSES_MAX
    learned.heard(address(1 << 30), "b")
    assert learned.find(address(1 << 30)) == "b"
    learned.forget("flood")
    assert len(learned) == 1
    learned.heard(address(5), "flood")
    assert learned.find(address(5)) == "flood"


def test_an_address_that_moves_frees_its_place() -> None:
    learned: Learned[str] = Learned(0.0)
    for number in range(ADDRESSES_MAX):
        learned.heard(address(number), "b")
    learned.heard(address(0), "c")
    learned.heard(address(ADDRESSES_MAX), "b")
    assert learned.find(address(ADDRESSES_MAX)) == "b"


def test_a_group_address_is_nobodys() -> None:
    learned: Learned[str] = Learned(0.0)
    learned.heard(b"\xff" * 6, "b")
    assert learned.find(b"\xff" * 6) is None


# Runs


@settings(deadline=None)
@given(st.lists(st.integers(45, 9000), max_size=400))
def test_runs_cover_all_frames_in_order_and_are_what_the_kernel_takes(sizes: list[int]) -> None:
    outbox, laid = Outbox(9100), []
    for size in sizes:
        laid.append((outbox.at, size))
        if outbox.add(size):
            break
    outbox.close_run()
    found = []
    for start, end, size in outbox.runs:
        assert end - start <= max(RUN_SIZE_MAX, size)
        frames = [(at, min(size, end - at)) for at in range(start, end, size)]
        assert len(frames) <= SEGMENT_COUNT_MAX
        found += frames
    assert found == laid
    outbox.clear()
    assert (outbox.at, outbox.runs) == (0, [])


def test_equal_frames_go_out_with_one_call() -> None:
    outbox = Outbox(1500)
    for size in [1468] * 40 + [80] + [1468] * 2:
        outbox.add(size)
    outbox.close_run()
    assert [(end - start) // size for start, end, size in outbox.runs] == [40, 2]


def test_a_run_has_no_more_frames_than_the_kernel_takes() -> None:
    outbox = Outbox(1500)
    for _ in range(100):
        outbox.add(92)
    outbox.close_run()
    assert [(end - start) // size for start, end, size in outbox.runs] == [64, 36]


def test_an_outbox_says_when_it_is_full() -> None:
    outbox = Outbox(9100)
    count = 1
    while not outbox.add(9000):
        count += 1
    assert outbox.at + 9100 <= len(outbox.buffer) + 9000
    assert count < 20


# Requests


@pytest.mark.parametrize(
    ("text", "host", "port", "shown"),
    [
        ("10.0.0.2:7400", "10.0.0.2", 7400, "10.0.0.2:7400"),
        ("[fd00::0:2]:7400", "fd00::2", 7400, "[fd00::2]:7400"),
        ("52:54:0:1:2:A", "52:54:00:01:02:0a", 0, "52:54:00:01:02:0a"),
    ],
)
def test_addresses(text: str, host: str, port: int, shown: str) -> None:
    found = Address.parse(text)
    assert (found.host, found.port, str(found)) == (host, port, shown)
    assert Address.parse(shown) == found


@pytest.mark.parametrize(
    "text",
    [
        "", "10.0.0.2", "10.0.0.2:0", "10.0.0.2:65536", "10.0.0:1", "host:1", "fd00::2:7400", ":1",
        "[fd00::2]", "[10.0.0.1]:1", "01:00:5e:00:00:01", "1:2:3:4:5:g", "10.0.0.2:７",
    ],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text)


GOOD: dict[str, Any] = {
    "vm": "web1", "network": "net1", "device": 0, "port": {"tap": "tap0"},
    "link": {"listen": "0.0.0.0:7400"}, "peers": ["10.0.0.2:7400"],
}  # fmt: skip


def test_requests() -> None:
    found = Request.parse(GOOD)
    assert (found.name, found.tap, found.qemu) == ("web1/0", "tap0", None)
    found = Request.parse({**GOOD, "port": {"qemu": "/run/x"}, "link": {"device": "eth1"}})
    assert (found.qemu, found.ethernet, found.listen) == (Path("/run/x"), "eth1", None)


@pytest.mark.parametrize(
    "change",
    [
        {"vm": ""}, {"vm": 1}, {"network": None}, {"device": "0"}, {"device": -1}, {"device": 256},
        {"port": None}, {"port": {"tap": "a", "qemu": "b"}}, {"port": {"tap": ""}}, {"link": {}},
        {"link": {"other": "x"}}, {"peers": []}, {"peers": "10.0.0.2:7400"},
        {"peers": ["10.0.0.2:7400"] * 2}, {"peers": [f"10.0.0.2:{n}" for n in range(1, 80)]},
    ],
)  # fmt: skip
def test_requests_that_mean_nothing(change: dict[str, Any]) -> None:
    assert PEERS_MAX < 79
    with pytest.raises(UsageError):
        Request.parse({**GOOD, **change})


# Grants and metrics


def test_a_grant_shows_no_key_and_can_be_wiped() -> None:
    grant = Grant("net1", "web1", 0, bytearray(b"k" * 32), bytes(8))
    assert "kkk" not in repr(grant)
    grant.wipe()
    assert grant.network_key == bytes(32)
    with pytest.raises(ValueError, match="32 bytes"):
        Grant("net1", "web1", 0, bytearray(31), bytes(8))
    with pytest.raises(ValueError, match="8 bytes"):
        Grant("net1", "web1", 0, bytearray(32), bytes(7))


def test_metrics_are_prometheus_text() -> None:
    peer = {
        "address": "10.0.0.2:7400", "state": "up", "handshake_age": 12.5,
        "handshakes": {"completed": 3}, "frames_in": 1, "frames_out": 2, "bytes_in": 3,
        "bytes_out": 4, "drops": {"bad_icv": 7},
    }  # fmt: skip
    status = {
        "network": 'a"b\\c\nd', "vm": "web1", "device": 0, "state": "revoked",
        "drops": {"plain": 5}, "peers": [peer, {**peer, "handshake_age": None, "state": "silent"}],
    }  # fmt: skip
    lines = prometheus([status]).splitlines()
    own = r'network="a\"b\\c\nd",vm="web1",device="0"'
    assert f"sealfs_net_running{{{own}}} 0" in lines
    assert f'sealfs_net_drops_total{{{own},peer="",cause="plain"}} 5' in lines
    one = f'{own},peer="10.0.0.2:7400"'
    assert f"sealfs_net_handshake_age_seconds{{{one}}} 12.5" in lines
    assert f'sealfs_net_bytes_total{{{one},direction="out"}} 4' in lines
    assert [line.rsplit(" ", 1)[1] for line in lines if "_peer_up{" in line] == ["1", "0"]
    # Each metric is described once, before its samples, which stand together.
    names = [line.split("{")[0] for line in lines if not line.startswith("#")]
    changes = sum(name != before for name, before in zip(names[1:], names[:-1], strict=True))
    assert changes == len(set(names)) - 1
    for name in dict.fromkeys(names):
        assert lines.count(f"# TYPE {name} counter") + lines.count(f"# TYPE {name} gauge") == 1
    assert prometheus([]) == ""
