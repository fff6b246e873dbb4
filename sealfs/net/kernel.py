"""Hand the keys for frames to the kernel's own MACsec, where it has it (ip-macsec(8)).

The handshake, the words and the question whether the VM is still allowed stay here; frames go
through a MACsec device of the kernel on a raw Ethernet link, at its speed, and never through this
process. To the VM the device is what else a TAP would be: a bridge joins the two.

What is to be done is decided as lines of `ip`, and one place runs them: by its standard input, so
that no key is ever an argument that others could read. The keys for frames are never used here
once the kernel has them: it counts their packet numbers, and begins with 1 as for any fresh key.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from sealfs.errors import NotFound, StorageFailed, UsageError
from sealfs.net.window import WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sealfs.net.cipher import DirectionKey

IP_WAIT: Final = 10.0
"""Seconds after which `ip` is taken for stuck."""
_UNKNOWN: Final = "Unknown device type"


def creation(device: str, lower: str, sci: bytes) -> list[str]:
    """Return what makes a MACsec device on top of another; it has no keys yet."""
    return [
        f"link add link {lower} name {device} type macsec sci {sci.hex()} "
        "cipher gcm-aes-xpn-256 icvlen 16 encrypt on send_sci on protect on validate strict "
        f"replay on window {WINDOW}",
        f"link set {device} up",
    ]


def mtu_of(device: str, mtu: int) -> list[str]:
    """Return what sets the device's MTU."""
    return [f"link set {device} mtu {mtu}"]


def removal(device: str) -> list[str]:
    """Return what takes the device away, and its keys with it."""
    return [f"link delete {device}"]


def channel(device: str, peer_sci: bytes) -> list[str]:
    """Return what lets a peer's secure channel in."""
    return [f"macsec add {device} rx sci {peer_sci.hex()} on"]


def receiving(device: str, peer_sci: bytes, number: int, key: DirectionKey) -> list[str]:
    """Return what has a peer's frames opened under an association number."""
    return [f"macsec add {device} rx sci {peer_sci.hex()} sa {number} {_key(number, key)}"]


def sending(device: str, number: int, key: DirectionKey) -> list[str]:
    """Return what has frames sealed under an association number from now on."""
    return [
        f"macsec add {device} tx sa {number} {_key(number, key)}",
        f"link set {device} type macsec encodingsa {number}",
    ]


def no_sending(device: str, number: int) -> list[str]:
    """Return what takes a sending key away."""
    return [f"macsec del {device} tx sa {number}"]


def no_receiving(device: str, peer_sci: bytes, number: int) -> list[str]:
    """Return what takes a receiving key away."""
    return [f"macsec del {device} rx sci {peer_sci.hex()} sa {number}"]


def _key(number: int, key: DirectionKey) -> str:
    # The identifier is for MKA, which is not spoken here; the kernel only shows it.
    return f"xpn 1 salt {key.salt.hex()} ssci {key.ssci} on key {number:032x} {key.key.hex()}"


def run_ip(lines: Sequence[str]) -> None:
    """Run lines of `ip`, all of them or up to the first that fails.

    Raises:
        NotFound: there is no `ip`.
        StorageFailed: what the kernel said; a key is never in it.
    """
    done = _ip("-batch", "-", text="".join(line + "\n" for line in lines))
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reason = next((line for line in said if "Command failed" not in line), "failed")
        raise StorageFailed("ip macsec", _without_keys(reason, lines))


def is_there() -> bool:
    """Whether this kernel has MACsec.

    It is asked for a device on the loopback, which MACsec refuses for another reason than a
    kernel that does not know it; so nothing is made either way.
    """
    done = _ip("link", "add", "link", "lo", "name", "sealfs-probe", "type", "macsec")
    return _UNKNOWN not in done.stderr


def _ip(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["ip", *words], input=text, capture_output=True, text=True, check=False,
            timeout=IP_WAIT,
        )  # fmt: skip
    except FileNotFoundError as exc:
        raise NotFound("ip", "is not installed; the package is iproute2") from exc
    except subprocess.TimeoutExpired:
        # Not `from exc`: it would carry the input.
        raise StorageFailed("ip macsec", f"no answer in {IP_WAIT:g} s") from None


def _without_keys(reason: str, lines: Sequence[str]) -> str:
    for line in lines:
        for word in line.split():
            if len(word) >= 24:  # a salt, or a key
                reason = reason.replace(word, "...")
    return reason


class KernelKeys:
    """The keys of one attachment in the kernel: what an `Association` tells, done."""

    def __init__(
        self,
        device: str,
        lower: str,
        sci: bytes,
        run: Callable[[Sequence[str]], None] = run_ip,
    ) -> None:
        """Make the device.

        Raises:
            StorageFailed: the kernel refuses.
        """
        self._device, self._run = device, run
        self._channels: set[bytes] = set()
        self._is_closed = False
        self._sending: set[int] = set()
        run(creation(device, lower, sci))

    def installed(self, peer_sci: bytes, number: int, key: DirectionKey) -> None:
        """Have frames opened that come under a new key."""
        lines = [] if peer_sci in self._channels else channel(self._device, peer_sci)
        self._run(lines + receiving(self._device, peer_sci, number, key))
        self._channels.add(peer_sci)

    def confirmed(self, number: int, key: DirectionKey) -> None:
        """Have frames sealed under a key that the peer has proven to have."""
        self._run(sending(self._device, number, key))
        self._sending.add(number)

    def forgotten(self, peer_sci: bytes, number: int) -> None:
        """Have no frame sealed or opened under a key any more."""
        if self._is_closed:
            return
        lines = no_receiving(self._device, peer_sci, number)
        if number in self._sending:
            self._sending.discard(number)
            lines = no_sending(self._device, number) + lines
        self._run(lines)

    def close(self) -> None:
        """Take the device away, and all keys with it."""
        self._is_closed = True
        self._run(removal(self._device))


def _refuse(buffers: Sequence[memoryview]) -> int:
    raise BlockingIOError  # frames are not for this process


class KernelPort:
    """The VM's side of an attachment whose frames the kernel moves: nothing to read or write."""

    def __init__(self, device: str, run: Callable[[Sequence[str]], None] = run_ip) -> None:
        self.name, self.fd, self._run = device, -1, run
        self.read_into: Callable[[Sequence[memoryview]], int] = _refuse
        self.write: Callable[[Sequence[memoryview]], object] = _refuse

    def set_mtu(self, mtu: int) -> bool:
        """Set the MACsec device's MTU."""
        self._run(mtu_of(self.name, mtu))
        return True

    def close(self) -> None:
        """Do nothing: the device belongs to `KernelKeys`."""


def require() -> None:
    """Make sure that this kernel has MACsec.

    Raises:
        UsageError: it has not.
    """
    if not is_there():
        raise UsageError("kernel backend", "this kernel has no MACsec; the userspace backend has")
