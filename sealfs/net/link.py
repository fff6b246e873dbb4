"""The way to the peers: UDP, or raw Ethernet. Moves sealed frames and knows nothing of them.

On UDP one system call carries many frames: the kernel cuts what is sent into datagrams of one
size (UDP_SEGMENT, <linux/udp.h>) and puts received ones together (UDP_GRO). A frame costs 0.3 us
that way instead of 1.1 and more (measured 2026-11-23, two processes on one machine).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from sealfs.errors import StorageFailed, UsageError
from sealfs.net.frame import OVERHEAD
from sealfs.net.labels import CONTROL_ADDRESS, HANDSHAKE, MACSEC

if TYPE_CHECKING:
    from collections.abc import Sequence

# <linux/udp.h>, <linux/in.h>, <linux/in6.h>, <asm-generic/socket.h>, <linux/if_packet.h>
_UDP_SEGMENT, _UDP_GRO = 103, 104
_IP_MTU_DISCOVER, _IP_MTU, _IPV6_MTU_DISCOVER, _IPV6_MTU, _PMTUDISC_DO = 10, 14, 23, 24, 2
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE, _SO_ATTACH_FILTER = 32, 33, 26
_SOL_PACKET, _PACKET_ADD_MEMBERSHIP, _PACKET_MR_PROMISC, _PACKET_IGNORE_OUTGOING = 263, 1, 1, 23
_ETH_P_ALL: Final = 3
_SIOCGIFMTU: Final = 0x8921

BUFFER_SIZE: Final = 8 << 20
"""Bytes of the socket's buffers: 50 ms at 1 Gbit/s, while another attachment has its turn."""
SEGMENT_COUNT_MAX: Final = 64  # UDP_MAX_SEGMENTS of older kernels
RUN_SIZE_MAX: Final = 65000
"""Bytes sent at once at most: a datagram's length has 16 bits."""
RECEIVE_SIZE_MAX: Final = 1 << 16
_ETHERNET_HEADER: Final = 14
_SEGMENT: Final = struct.Struct("=H")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer is: IP address and UDP port, or an Ethernet address (port 0)."""

    host: str
    port: int = 0

    def __str__(self) -> str:
        if not self.port:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that a text means: 10.0.0.2:7400, [fd00::2]:7400, 52:54:00:1:2:3.

        Raises:
            UsageError: it means none.
        """
        parts = text.split(":")
        if len(parts) == 6 and "[" not in text:
            with contextlib.suppress(ValueError):
                octets = bytes(int(part, 16) for part in parts)
                if not octets[0] & 1:
                    return cls(octets.hex(":"))
            raise UsageError(text, "is no Ethernet address of one device")
        host, _, port = text.rpartition(":")
        if port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16:
            with contextlib.suppress(ValueError):
                if host.startswith("[") and host.endswith("]"):
                    return cls(str(ipaddress.IPv6Address(host[1:-1])), int(port))
                return cls(str(ipaddress.IPv4Address(host)), int(port))
        raise UsageError(text, "is not ADDRESS:PORT, as 10.0.0.2:7400 or [fd00::2]:7400")


class Link(Protocol):
    """A host's side of the way to the peers."""

    name: str
    fd: int
    """Readable when something came."""
    buffer: memoryview
    """What the last `receive` received."""
    mtu: int
    encapsulation: int
    """See `frame.guest_mtu`."""

    def addresses(self, peer: Address, sci: bytes) -> bytes:
        """Return destination and source address of handshakes to a peer, 12 octets."""
        ...

    def send(self, frames: memoryview, size: int, peer: Address) -> None:
        """Send frames that lie one behind the other, each of `size` bytes, the last maybe fewer.

        Raises:
            BlockingIOError: nothing was sent; `fd` will be writable.
            OSError: they were not sent.
        """
        ...

    def receive(self) -> tuple[int, int, Address]:
        """Receive into `buffer`: bytes, size of each frame (the last may be shorter), sender.

        Raises:
            BlockingIOError: nothing came.
        """
        ...

    def close(self) -> None:
        """Give it back."""
        ...


def frame_size_max(link: Link) -> int:
    """Return the size of the longest frame of a guest, addresses counted in."""
    return link.mtu - link.encapsulation - OVERHEAD


class UdpLink:
    """A UDP socket, bound; any number of peers of its family."""

    def __init__(self, listen: Address, peers: Sequence[Address]) -> None:
        """Bind it, and find the smallest MTU on the way to the peers.

        Raises:
            UsageError: the peers' addresses are of another kind.
            StorageFailed: the address is taken, or not this host's.
        """
        family = _family(listen)
        for peer in peers:
            if _family(peer) != family:
                raise UsageError(peer, f"is not an address of the same kind as {listen}")
        self.name = f"udp {listen}"
        is_ipv6 = family == socket.AF_INET6
        self.encapsulation = 48 if is_ipv6 else 28  # RFC 8200, RFC 791; RFC 768
        self._socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.setblocking(False)
            _enlarge(self._socket)
            _do_not_fragment(self._socket, is_ipv6)
            self._socket.bind((listen.host, listen.port))
            self._gather()
        except OSError as exc:
            self._socket.close()
            raise StorageFailed(listen, f"cannot be listened on: {exc.strerror or exc}") from exc
        self.mtu = min((_path_mtu(family, peer) for peer in peers), default=1500)
        self.fd = self._socket.fileno()
        self.buffer = memoryview(bytearray(RECEIVE_SIZE_MAX))
        self._can_segment = True
        self._known: dict[tuple[object, ...], Address] = {}

    def addresses(self, peer: Address, sci: bytes) -> bytes:
        """Return addresses that mean nothing on UDP."""
        return CONTROL_ADDRESS + sci[:6]

    def send(self, frames: memoryview, size: int, peer: Address) -> None:
        to = (peer.host, peer.port)
        if len(frames) <= size:
            self._socket.sendto(frames, to)
            return
        if self._can_segment:
            try:
                self._socket.sendmsg(
                    (frames,), ((socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(size)),), 0, to
                )
                return
            except OSError as exc:
                # EIO: the device cannot make checksums; EINVAL: the kernel is older than 4.18,
                # or a datagram does not fit the device, which the sends below tell clearly.
                if exc.errno not in (errno.EIO, errno.EINVAL):
                    raise
                self._can_segment = exc.errno != errno.EIO
        for at in range(0, len(frames), size):
            self._socket.sendto(frames[at : at + size], to)

    def receive(self) -> tuple[int, int, Address]:
        size, notes, _, sender = self._socket.recvmsg_into((self.buffer,), 64)
        segment = int.from_bytes(notes[0][2][:2], "little") if notes else size
        # Not more than a few senders are real; what is made up must not fill the memory.
        address = self._known.get(sender)
        if address is None:
            if len(self._known) > 64:
                self._known.clear()
            address = self._known[sender] = Address(sender[0], sender[1])
        return size, segment, address

    def close(self) -> None:
        self._socket.close()

    def _gather(self) -> None:
        with contextlib.suppress(OSError):  # an older kernel gives them one by one
            self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)


class EthernetLink:
    """A network device of this host that has the one peer on the same segment.

    What goes out are the sealed frames themselves, under the guests' own addresses, so the device
    takes all frames of the segment and the kernel hands on those of the two EtherTypes only.
    """

    def __init__(self, device: str, peers: Sequence[Address], *, has_frames: bool = True) -> None:
        """Open the device.

        Args:
            device: its name.
            peers: the one peer.
            has_frames: False where the kernel itself takes the frames: words alone come then.

        Raises:
            UsageError: more than one peer: each would get what was sealed for another.
            StorageFailed: no such device, or not allowed.
        """
        if len(peers) != 1 or peers[0].port:
            raise UsageError(device, "raw Ethernet takes one peer, given by its Ethernet address")
        self.name, self._peer = f"ethernet {device}", peers[0]
        self.encapsulation = -_ETHERNET_HEADER
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self._socket.setblocking(False)
            _enlarge(self._socket)
            _filter(self._socket, has_frames)
            self._socket.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            self._socket.bind((device, _ETH_P_ALL))
            index = socket.if_nametoindex(device)
            self._socket.setsockopt(
                _SOL_PACKET, _PACKET_ADD_MEMBERSHIP,
                struct.pack("iHH8s", index, _PACKET_MR_PROMISC, 0, bytes(8)),
            )  # fmt: skip
            request = fcntl.ioctl(self._socket, _SIOCGIFMTU, struct.pack("16s24x", device.encode()))
        except OSError as exc:
            self._socket.close()
            raise StorageFailed(device, f"cannot be used: {exc.strerror or exc}") from exc
        self.mtu = int(struct.unpack("16si20x", request)[1])
        self._own: bytes = self._socket.getsockname()[4]
        self.fd = self._socket.fileno()
        self.buffer = memoryview(bytearray(RECEIVE_SIZE_MAX))

    def addresses(self, peer: Address, sci: bytes) -> bytes:
        """Return the two devices' own addresses."""
        return bytes.fromhex(peer.host.replace(":", "")) + self._own

    def send(self, frames: memoryview, size: int, peer: Address) -> None:
        for at in range(0, len(frames), size):
            self._socket.send(frames[at : at + size])

    def receive(self) -> tuple[int, int, Address]:
        size = self._socket.recv_into(self.buffer)
        return size, size, self._peer  # a handshake is proven by its content, not by an address

    def close(self) -> None:
        self._socket.close()


def _family(address: Address) -> int:
    if not address.port:
        raise UsageError(address, "is not ADDRESS:PORT")
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def _enlarge(asked: socket.socket) -> None:
    for forced, plain in (
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
    ):
        try:
            asked.setsockopt(socket.SOL_SOCKET, forced, BUFFER_SIZE)
        except PermissionError:
            asked.setsockopt(socket.SOL_SOCKET, plain, BUFFER_SIZE)


def _do_not_fragment(asked: socket.socket, is_ipv6: bool) -> None:
    """A frame that does not fit is refused and counted, never cut into fragments in silence."""
    if is_ipv6:
        asked.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        asked.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
    else:
        asked.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)


def _path_mtu(family: int, peer: Address) -> int:
    """Return what the kernel knows of the MTU on the way; 1500 where it knows no way yet."""
    with socket.socket(family, socket.SOCK_DGRAM) as asker:
        try:
            asker.connect((peer.host, peer.port))
            if family == socket.AF_INET6:
                return asker.getsockopt(socket.IPPROTO_IPV6, _IPV6_MTU)
            return asker.getsockopt(socket.IPPROTO_IP, _IP_MTU)
        except OSError:
            return 1500


def _filter(asked: socket.socket, has_frames: bool) -> None:
    """Have the kernel hand on frames of the two EtherTypes only (classic BPF, packet(7))."""
    program = [
        (0x28, 0, 0, 12),  # load the half-word at 12, the EtherType
        (0x15, 3, 0, HANDSHAKE),  # equal: accept
        (0x15, 0, 3, MACSEC),  # different: drop
        (0x30, 0, 0, 15),  # load the byte at 15, SL
        (0x15, 0, 0 if has_frames else 1, 1),  # different from a word's: drop where asked to
        (0x06, 0, 0, 0x40000),  # accept
        (0x06, 0, 0, 0),  # drop
    ]
    code = array.array("B", b"".join(struct.pack("HBBI", *line) for line in program))
    # The kernel copies the program before setsockopt returns; `code` lives until then.
    pointer = struct.pack("HP", len(program), code.buffer_info()[0])
    asked.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, pointer)
