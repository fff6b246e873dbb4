"""A relay without keys: what the same path costs when nothing is sealed.

Frames go between a TAP device and UDP with the ports, links and runs of `sealfs.net`, one process a
host, but plain: no tag, no cipher, no window, no peers to choose from. For the benchmark only.

    net_relay.py TAP LISTEN PEER
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sealfs.net.attachment import BATCH
from sealfs.net.frame import guest_mtu
from sealfs.net.link import Address, UdpLink
from sealfs.net.outbox import Outbox
from sealfs.net.port import TapPort


async def outwards(port: TapPort, link: UdpLink, peer: Address) -> None:
    """Move frames from the TAP device to the peer."""
    outbox, read = Outbox(link.mtu), port.read_into
    while True:
        await trio.lowlevel.wait_readable(port.fd)
        is_more = True
        while is_more:
            try:
                for _ in range(BATCH):
                    if outbox.add(read((outbox.buffer[outbox.at :],))):
                        break
            except BlockingIOError:
                is_more = False
            outbox.close_run()
            for start, end, size in outbox.runs:
                while True:
                    try:
                        link.send(outbox.buffer[start:end], size, peer)
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(link.fd)
            outbox.clear()
            await trio.lowlevel.checkpoint()


async def inwards(port: TapPort, link: UdpLink) -> None:
    """Move frames from the peer to the TAP device."""
    write, buffer = port.write, link.buffer
    while True:
        await trio.lowlevel.wait_readable(link.fd)
        is_more = True
        while is_more:
            count = 0
            while count < BATCH:
                try:
                    size, segment, _ = link.receive()
                except BlockingIOError:
                    is_more = False
                    break
                for at in range(0, size, segment):
                    write((buffer[at : min(at + segment, size)],))
                    count += 1
            await trio.lowlevel.checkpoint()


async def main() -> None:
    """Run both directions until killed."""
    listen, peer = Address.parse(sys.argv[2]), Address.parse(sys.argv[3])
    port, link = TapPort(sys.argv[1]), UdpLink(listen, [peer])
    port.set_mtu(guest_mtu(link.mtu, link.encapsulation))
    print("ready", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outwards, port, link, peer)
        nursery.start_soon(inwards, port, link)


trio.run(main)
