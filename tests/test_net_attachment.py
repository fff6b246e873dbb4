"""Two attachments in this process: real UDP sockets on the loopback, a test in the middle.

The VMs are sockets of this test. Between the two attachments stands `Middle`, which owns the
addresses that each takes for the other's: it sees, keeps, alters and repeats whatever it likes.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial, wraps
from typing import Any

import pytest
import trio
from net_simulation import NETWORK_KEY, Nonces, sci_of

from sealfs.errors import KeydUnavailable, KeyGone
from sealfs.net.association import Timing
from sealfs.net.attachment import Attachment, boot_clock
from sealfs.net.frame import OVERHEAD, Drop
from sealfs.net.grant import Grant
from sealfs.net.link import Address, UdpLink
from sealfs.net.permission import ASK_GRACE
from sealfs.net.window import WINDOW


def in_trio(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in trio; its fixtures are pytest's."""

    @wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        trio.run(partial(test, *args, **fixtures))

    return run


MACS = [bytes([2, 0, 0, 0, 1, n]) for n in range(8)]
EVERYBODY = b"\xff" * 6


class SocketPort:
    """A port whose VM is the other end of a socket pair."""

    def __init__(self) -> None:
        ours, self.vm = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in (ours, self.vm):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.name, self.fd, self._ours = "socket pair", ours.fileno(), ours
        self.read_into = partial(os.readv, self.fd)
        self.write = partial(os.writev, self.fd)
        self.mtu = 0

    def set_mtu(self, mtu: int) -> bool:
        self.mtu = mtu
        return True

    def close(self) -> None:
        self._ours.close()


class Host:
    """An attachment, its VM, and whether it is allowed."""

    def __init__(self, number: int, peers: list[Address], listen: Address, **other: Any) -> None:
        self.port = SocketPort()
        self.verdict: Callable[[], bool] = lambda: True
        self.link = UdpLink(listen, peers)
        self.address = listen
        self.has_ended = self.hangs = False
        grant = Grant("net1", f"vm{number}", 0, bytearray(NETWORK_KEY), sci_of(number))
        self.grant = grant
        self.attachment = Attachment(
            f"vm{number}/0", grant, self.port, self.link, peers,
            still_allowed=self._still_allowed, ask_interval=0.02, **other,
        )  # fmt: skip

    async def run(self) -> None:
        await self.attachment.run()
        self.has_ended = True

    async def _still_allowed(self) -> bool:
        if self.hangs:
            await trio.sleep_forever()
        return self.verdict()

    @property
    def drops(self) -> dict[str, int]:
        """All drops of the attachment and its peers, by cause."""
        status: Any = self.attachment.status()
        found: dict[str, int] = dict(status["drops"])
        for peer in status["peers"]:
            for cause, count in peer["drops"].items():
                found[cause] = found.get(cause, 0) + count
        return found

    def say(self, payload: bytes, to: bytes = EVERYBODY, frm: bytes = MACS[0]) -> None:
        self.port.vm.send(to + frm + b"\x88\xb6" + payload)

    def heard(self) -> list[bytes]:
        """Return the payloads that reached the VM."""
        found = []
        while True:
            try:
                found.append(self.port.vm.recv(1 << 16)[14:])
            except BlockingIOError:
                return found

    async def hears(self, count: int, seconds: float = 20) -> list[bytes]:
        """Wait for so many payloads."""
        found: list[bytes] = []
        with trio.move_on_after(seconds):
            while len(found) < count:
                found += self.heard()
                await trio.sleep(0.002)
        return found


def free_address() -> Address:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        asker.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", asker.getsockname()[1])


class Middle:
    """Stands between two hosts; `on_frame` decides what becomes of a frame."""

    def __init__(self) -> None:
        self.sockets: list[socket.socket] = []
        for _ in range(2):
            end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            end.bind(("127.0.0.1", 0))
            end.setblocking(False)
            with suppress(PermissionError):
                end.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
            self.sockets.append(end)
        self.addresses = [Address("127.0.0.1", end.getsockname()[1]) for end in self.sockets]
        self.hosts: list[Host] = []
        self.on_frame: Callable[[int, bytes], list[bytes]] = lambda frm, frame: [frame]
        self.seen: list[tuple[int, bytes]] = []

    def send(self, to: int, frame: bytes) -> None:
        address = self.hosts[to].address
        self.sockets[to].sendto(frame, (address.host, address.port))

    async def run(self, frm: int) -> None:
        """Forward what a host sends."""
        source = self.sockets[frm]
        while True:
            await trio.lowlevel.wait_readable(source)
            with suppress(BlockingIOError):
                while True:
                    frame = source.recv(1 << 16)
                    self.seen.append((frm, frame))
                    for out in self.on_frame(frm, frame):
                        self.send(1 - frm, out)

    def close(self) -> None:
        for end in self.sockets:
            end.close()


async def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for knows nothing of tests
            await trio.sleep(0.002)


def is_up(host: Host) -> bool:
    peers: Any = host.attachment.status()["peers"]
    return all(peer["state"] == "up" for peer in peers)


@asynccontextmanager
async def two_hosts(**other: Any) -> AsyncIterator[tuple[Host, Host, Middle]]:
    """Two hosts that have agreed on keys, through the middle."""
    middle = Middle()
    # What a host takes for its peer is the middle's socket that receives from it.
    hosts = [
        Host(number + 1, [middle.addresses[number]], free_address(), **other) for number in (0, 1)
    ]
    middle.hosts = hosts

    # Forwarding to host N leaves from the socket that host N knows as its peer.
    try:
        async with trio.open_nursery() as nursery:
            for number in (0, 1):
                nursery.start_soon(middle.run, number)
                nursery.start_soon(hosts[number].run)
            await wait_until(lambda: is_up(hosts[0]) and is_up(hosts[1]))
            yield hosts[0], hosts[1], middle
            nursery.cancel_scope.cancel()
    finally:
        middle.close()
        for host in hosts:
            host.port.vm.close()


def is_data(frame: bytes) -> bool:
    """Whether it is a sealed frame of a VM: neither a handshake nor a word."""
    return frame[12:14] == b"\x88\xe5" and frame[15] != 1


def payloads(count: int, size: int = 60) -> list[bytes]:
    return [b"payload %06d " % number + os.urandom(size) for number in range(count)]


async def captured(a: Host, middle: Middle, count: int) -> tuple[list[bytes], list[bytes]]:
    """Have host A send payloads that do not arrive; return them and their frames."""
    frames: list[bytes] = []

    def keep(frm: int, frame: bytes) -> list[bytes]:
        if frm == 0 and is_data(frame):
            frames.append(frame)
            return []
        return [frame]

    middle.on_frame = keep
    said = payloads(count)
    for at in range(0, count, 100):
        for payload in said[at : at + 100]:
            a.say(payload)
        await wait_until(lambda at=at: len(frames) >= min(count, at + 100))  # type: ignore[misc]
    middle.on_frame = lambda frm, frame: [frame]
    return said, frames


async def inject(b: Host, middle: Middle, frames: list[bytes]) -> list[bytes]:
    """Send frames to host B as from its peer; return what its VM hears."""
    heard: list[bytes] = []
    for at in range(0, len(frames), 50):
        for frame in frames[at : at + 50]:
            middle.send(1, frame)
        await trio.sleep(0.005)
        heard += b.heard()
    await trio.sleep(0.05)
    return heard + b.heard()


COUNT = 2000


@in_trio
async def test_payloads_cross_both_ways_and_none_is_seen_in_the_middle() -> None:
    async with two_hosts() as (a, b, middle):
        there, back = payloads(500, 1000), payloads(500, 1000)
        for host, said in ((a, there), (b, back)):
            for payload in said:
                host.say(payload)
        assert await b.hears(500) == there
        assert await a.hears(500) == back
        wire = b"".join(frame for _, frame in middle.seen)
        assert not any(payload[:16] in wire or payload[20:40] in wire for payload in there + back)
        assert a.drops == b.drops == {}
        assert a.grant.network_key == bytes(32)
        assert a.port.mtu == a.attachment.mtu


@in_trio
async def test_altered_frames_are_not_delivered() -> None:
    rng = random.Random(1)
    async with two_hosts() as (a, b, middle):
        said, frames = await captured(a, middle, COUNT)
        altered = []
        for frame in frames:
            copy = bytearray(frame)
            bit = rng.randrange(8 * len(copy))
            copy[bit // 8] ^= 1 << bit % 8
            altered.append(bytes(copy))
        assert await inject(b, middle, altered) == []
        assert sum(b.drops.values()) == COUNT
        assert b.drops[Drop.BAD_ICV.value] > COUNT // 2
        # And what was not altered still is.
        assert await inject(b, middle, frames) == said


@in_trio
async def test_replayed_frames_are_not_delivered() -> None:
    async with two_hosts() as (a, b, middle):
        said, frames = await captured(a, middle, COUNT)
        assert await inject(b, middle, frames) == said
        assert await inject(b, middle, frames) == []
        assert b.drops == {Drop.REPLAYED.value: COUNT}


@in_trio
async def test_truncated_frames_are_not_delivered() -> None:
    rng = random.Random(2)
    async with two_hosts() as (a, b, middle):
        said, frames = await captured(a, middle, COUNT)
        cut = [frame[: rng.randrange(len(frame))] for frame in frames]
        assert await inject(b, middle, cut) == []
        assert sum(b.drops.values()) == COUNT
        assert await inject(b, middle, frames) == said


@in_trio
async def test_foreign_frames_are_not_delivered() -> None:
    """Of another pair of hosts on the same network: right network key, other association."""
    async with two_hosts() as (_, b, middle):
        async with two_hosts() as (c, _, other):
            _, frames = await captured(c, other, COUNT // 2)
            # The same SCI, association number and packet number as A would use.
            assert await inject(b, middle, frames) == []
            assert sum(b.drops.values()) == COUNT // 2
        # Of a device that this host does not know at all.
        strange = [frame[:20] + sci_of(9) + frame[28:] for frame in frames]
        assert await inject(b, middle, strange) == []
        assert b.drops[Drop.UNKNOWN_SENDER.value] == COUNT // 2


@in_trio
async def test_frames_late_beyond_the_window_are_not_delivered() -> None:
    async with two_hosts() as (a, b, middle):
        said, frames = await captured(a, middle, COUNT + WINDOW)
        assert await inject(b, middle, frames[-1:]) == said[-1:]
        assert await inject(b, middle, frames[:COUNT]) == []
        assert b.drops == {Drop.LATE.value: COUNT}
        assert len(await inject(b, middle, frames[COUNT:])) == WINDOW - 1


@in_trio
async def test_reordered_frames_are_each_delivered_exactly_once() -> None:
    rng = random.Random(3)
    async with two_hosts() as (a, b, middle):
        said, frames = await captured(a, middle, COUNT)
        order = list(range(COUNT))
        rng.shuffle(order)
        assert await inject(b, middle, [frames[n] for n in order]) == [said[n] for n in order]
        assert b.drops == {}


@in_trio
async def test_plain_frames_and_garbage_cost_a_counter() -> None:
    rng = random.Random(4)
    async with two_hosts() as (a, b, middle):
        plain = [EVERYBODY + MACS[0] + b"\x08\x00" + rng.randbytes(60) for _ in range(500)]
        garbage = [rng.randbytes(rng.randrange(1500)) for _ in range(1500)]
        handshakes = [bytes(12) + b"\x88\xb5\1\1" + rng.randbytes(73) for _ in range(500)]
        assert await inject(b, middle, plain + garbage + handshakes) == []
        drops = b.drops
        assert drops[Drop.PLAIN.value] >= 500
        assert drops[Drop.HANDSHAKE.value] == 500
        assert sum(drops.values()) == 2500
        a.say(b"still there")
        assert await b.hears(1) == [b"still there"]


@in_trio
async def test_garbage_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with two_hosts() as (_, b, middle):
        frames = [
            bytes(12) + b"\x88\xb5" + bytes([version, kind]) + bytes(73)
            for version in range(20)
            for kind in range(20)
        ]
        caplog.clear()
        assert await inject(b, middle, frames) == []
        assert b.drops[Drop.HANDSHAKE.value] == 400
        assert len(caplog.records) == 1
        assert "handshake refused: the peer speaks version 0, this sealfs 1" in caplog.text


@in_trio
async def test_garbage_from_addresses_that_are_no_peers() -> None:
    async with two_hosts() as (a, b, _):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            for number in range(200):
                frame = bytes(12) + b"\x88\xb5\1\1" + os.urandom(73)
                stranger.sendto(frame, (b.address.host, b.address.port))
                if number % 50 == 0:
                    await trio.sleep(0.005)
        await wait_until(lambda: b.drops == {Drop.UNKNOWN_SENDER.value: 200})
        a.say(b"still there")
        assert await b.hears(1) == [b"still there"]


@in_trio
async def test_too_long_and_too_short_frames_of_the_vm_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with two_hosts() as (a, b, _):
        longest = a.attachment._frame_size_max
        a.port.vm.send(EVERYBODY + MACS[0] + bytes(longest - 12))
        a.port.vm.send(EVERYBODY + MACS[0] + bytes(longest - 11))
        a.port.vm.send(EVERYBODY + MACS[0] + bytes(longest + 1000))
        a.port.vm.send(b"short")
        await wait_until(lambda: sum(a.drops.values()) == 3)
        assert a.drops == {Drop.TOO_LONG.value: 2, Drop.TOO_SHORT.value: 1}
        assert [len(payload) for payload in await b.hears(1)] == [longest - 14]
        assert f"must use an MTU of {a.attachment.mtu}" in caplog.text


@in_trio
async def test_an_hour_of_rekeying_in_seconds_loses_nothing() -> None:
    """Keys replaced every 0.4 s under traffic; each nonce is used once."""
    nonces = Nonces()
    async with two_hosts(timing=Timing(rekey_age=0.4), on_seal=nonces) as (a, b, _):
        said = payloads(1500)
        heard = []
        for number, payload in enumerate(said):
            a.say(payload)
            if number % 10 == 0:
                await trio.sleep(0.02)
                heard += b.heard()
        heard += await b.hears(1500 - len(heard), 5)
        assert heard == said
        assert len(nonces.keys) >= 6
        assert a.drops == b.drops == {}


@in_trio
async def test_a_lost_permission_stops_both_directions(caplog: pytest.LogCaptureFixture) -> None:
    async with two_hosts() as (a, b, middle):
        a.say(b"before")
        assert await b.hears(1) == [b"before"]
        _, frames = await captured(a, middle, 10)
        b.verdict = lambda: False
        await wait_until(lambda: b.has_ended)
        assert (
            "stopped in both directions: VM vm2 on network net1: no longer allowed" in caplog.text
        )
        assert b.attachment.status()["state"] == "revoked"
        with pytest.raises(ConnectionError):
            b.say(b"out")
        assert await inject(b, middle, frames) == []
        assert b.attachment._table == {}


@in_trio
async def test_a_revoked_key_stops_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> bool:
        raise KeyGone("vm1", "the key was revoked on 2026-11-23")

    async with two_hosts() as (a, _, _middle):
        a.verdict = gone
        await wait_until(lambda: a.has_ended)
        assert a.attachment.state == "revoked"
        assert "the key was revoked on 2026-11-23" in caplog.text


@in_trio
async def test_a_key_service_that_does_not_answer_suspends_after_a_while() -> None:
    now = 0.0

    def unknown() -> bool:
        raise KeydUnavailable("/run/sealfs/keyd.sock", "nobody answers")

    async with two_hosts(clock=lambda: boot_clock() + now) as (a, b, _):
        a.verdict = unknown
        await trio.sleep(0.1)
        a.say(b"in the time of grace")
        assert await b.hears(1) == [b"in the time of grace"]
        now = ASK_GRACE
        await wait_until(lambda: a.attachment.state == "suspended")
        a.say(b"not out")
        b.say(b"not in")
        await wait_until(lambda: a.drops.get(Drop.NOT_ALLOWED.value) == 2)
        assert a.heard() == b.heard() == []
        a.verdict = lambda: True
        await wait_until(lambda: a.attachment.state == "running")
        a.say(b"again")
        assert (await b.hears(1))[-1:] == [b"again"]


@in_trio
async def test_a_key_service_that_hangs_is_one_that_does_not_answer() -> None:
    now = 0.0
    async with two_hosts(clock=lambda: boot_clock() + now) as (a, _b, _):
        a.hangs = True
        await trio.sleep(0.1)
        assert a.attachment.state == "running"
        now = ASK_GRACE
        await wait_until(lambda: a.attachment.state == "suspended")


@in_trio
async def test_a_port_that_fails_is_a_state_and_no_exception() -> None:
    async with two_hosts() as (a, b, _):

        def broken(_: object) -> int:
            raise OSError(77, "File descriptor in bad state")

        a.attachment.port.read_into = broken
        a.port.vm.send(bytes(60))
        await wait_until(lambda: a.attachment.state.startswith("failed"))
        assert "bad state" in a.attachment.state
        assert b.attachment.state == "running"


@in_trio
async def test_a_vm_that_takes_no_frames_does_not_stop_what_it_sends() -> None:
    async with two_hosts() as (a, b, _):
        b.port._ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(100):
            a.say(bytes(1000))
        await wait_until(lambda: b.drops.get(Drop.PORT.value, 0) > 5)
        b.say(b"out")
        assert await a.hears(1) == [b"out"]


@in_trio
async def test_three_hosts_learn_where_addresses_are() -> None:
    addresses = [free_address() for _ in range(3)]
    hosts = [
        Host(n + 1, [a for a in addresses if a != addresses[n]], addresses[n]) for n in range(3)
    ]
    async with trio.open_nursery() as nursery:
        for host in hosts:
            nursery.start_soon(host.run)
        await wait_until(lambda: all(is_up(host) for host in hosts))
        # Unknown and broadcast: to both.
        hosts[0].say(b"who", EVERYBODY, MACS[0])
        for host in hosts[1:]:
            assert await host.hears(1) == [b"who"]
        # Known by now: to the one.
        hosts[1].say(b"me", MACS[0], MACS[1])
        assert await hosts[0].hears(1) == [b"me"]
        hosts[0].say(b"you", MACS[1], MACS[0])
        assert await hosts[1].hears(1) == [b"you"]
        await trio.sleep(0.1)
        assert hosts[2].heard() == []
        # Nothing is passed on between peers: what one sends the other gets from it alone.
        status: Any = hosts[0].attachment.status()
        assert status["learned"] == 1
        nursery.cancel_scope.cancel()
    for host in hosts:
        host.port.vm.close()


@in_trio
async def test_after_the_end_no_key_is_left_and_all_is_closed() -> None:
    async with two_hosts() as (a, _b, _):
        table = a.attachment._table
        sessions = list(table.values())
        assert sessions
    assert a.attachment._table == {}
    assert not any(session.sending.is_usable for session in sessions)
    for fd in (a.port.fd, a.link.fd):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@in_trio
async def test_the_status_tells_what_happened() -> None:
    async with two_hosts() as (a, b, _):
        for _ in range(10):
            a.say(bytes(100))
        await b.hears(10)
        sent: Any = a.attachment.status()
        got: Any = b.attachment.status()
        peer = sent["peers"][0]
        assert peer["frames_out"] == 10
        assert peer["bytes_out"] == 10 * (114 + OVERHEAD)
        assert got["peers"][0]["frames_in"] == 10
        assert got["peers"][0]["bytes_in"] == 10 * 114
        assert peer["sci"] == sci_of(2).hex()
        assert peer["packet_number"] >= 10
        assert 0 <= peer["handshake_age"] < 20
        assert peer["association_number"] in range(4)
        assert sent["overhead"] == 60
