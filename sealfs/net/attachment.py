"""One network device of one VM: its frames, sealed to the peers, opened from them.

Two tasks move frames, one a direction: each takes what is there, up to a share, and then lets the
other attachments of the process have their turn. A third looks after keys, a fourth asks whether
the VM is still allowed. All run in the trio thread; between two trio checkpoints nothing else
runs, and none lies between reading a frame and the end of its batch's sealing or opening.

What is dropped is counted by cause (`frame.Drop`). Frames that are not sealed are never passed on
to the VM, nor out of it, whatever state the keys are in.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from sealfs.errors import SealfsError
from sealfs.net.association import Association, Session, Table, Timing
from sealfs.net.cipher import KeySpent
from sealfs.net.counters import Counters, describe
from sealfs.net.frame import (
    ADDRESSES_SIZE,
    FRAME_SIZE_MIN,
    OVERHEAD,
    SEALED_SIZE_MIN,
    SECTAG,
    Drop,
    guest_mtu,
)
from sealfs.net.handshake import Secrets
from sealfs.net.labels import HANDSHAKE, MACSEC
from sealfs.net.learned import Learned
from sealfs.net.link import Address, Link, frame_size_max
from sealfs.net.outbox import Outbox
from sealfs.net.permission import ASK_INTERVAL, Permission

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from sealfs.net.grant import Grant
    from sealfs.net.kernel import KernelKeys
    from sealfs.net.port import Port

BATCH: Final = 64
"""Frames taken before the other attachments have their turn: half a millisecond."""
TICK: Final = 0.2
SLOW_WAIT: Final = 0.001
SLOW_TRIES: Final = 20
"""How long a VM that takes no frames is waited for before one is dropped: 20 ms."""

log = logging.getLogger("sealfs.net")


class Peer:
    """A peer of an attachment: its keys, and what is about to be sent to it."""

    def __init__(self, address: Address, association: Association, outbox: Outbox) -> None:
        self.address = address
        self.association = association
        self.outbox = outbox
        self.counters = Counters()


def boot_clock() -> float:
    """Return seconds since the host started, those of its sleep counted in: keys age in it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Attachment:
    """A device of a VM on a network, between a port and a link."""

    def __init__(
        self,
        name: str,
        grant: Grant,
        port: Port,
        link: Link,
        peers: Sequence[Address],
        *,
        still_allowed: Callable[[], Awaitable[bool]],
        random: Callable[[int], bytes] = os.urandom,
        clock: Callable[[], float] = boot_clock,
        timing: Timing | None = None,
        ask_interval: float = ASK_INTERVAL,
        on_seal: Callable[[bytes, bytes], None] | None = None,
        kernel: KernelKeys | None = None,
    ) -> None:
        """Make it; `run` moves frames. The grant is wiped, port and link are closed by `run`.

        Args:
            name: for logs and status.
            grant: of the key service.
            port: to the VM.
            link: to the peers.
            peers: addresses on that link.
            still_allowed: asks the key service; may raise a `SealfsError`.
            random: fresh random bytes.
            clock: steady seconds.
            timing: when keys are replaced.
            ask_interval: seconds between two calls of `still_allowed`.
            on_seal: called with (key, nonce) for each frame; tests prove uniqueness with it.
            kernel: seals and opens the frames instead; closed by `run`.
        """
        self.name, self.port, self.link = name, port, link
        self.network, self.vm, self.device, self.sci = (
            grant.network, grant.vm, grant.device, grant.sci,
        )  # fmt: skip
        self.state = "running"
        self.counters = Counters()
        self._clock, self._kernel = clock, kernel
        self._frame_size_max = frame_size_max(link)
        self.mtu = guest_mtu(link.mtu, link.encapsulation)
        self._table = Table()
        secrets = Secrets.of(grant)
        grant.wipe()
        self._peers = {
            address: Peer(
                address,
                Association(
                    secrets=secrets,
                    sci=self.sci,
                    addresses=link.addresses(address, self.sci),
                    table=self._table,
                    random=random,
                    timing=timing,
                    on_seal=on_seal,
                    keeper=kernel,
                ),
                Outbox(self._frame_size_max + OVERHEAD),
            )
            for address in peers
        }
        self._all = tuple(self._peers.values())
        self._peer_of = {peer.association: peer for peer in self._all}
        self._learned: Learned[Peer] = Learned(clock())
        self._head = memoryview(bytearray(ADDRESSES_SIZE))
        # One byte more than fits: a frame that fills it is too long.
        self._body = memoryview(bytearray(self._frame_size_max - ADDRESSES_SIZE + 1))
        self._plain = memoryview(bytearray(len(link.buffer)))
        self._is_suspended = False
        self._told: dict[str, float] = {}
        self._permission = Permission(
            still_allowed,
            interval=ask_interval,
            clock=clock,
            tell=partial(self._tell, "key service"),
        )

    async def run(self) -> None:
        """Move frames until cancelled, or until the VM is no longer allowed.

        Whatever ends it, no key is left and port and link are closed. A port or link that fails
        for good is a state too, not an exception.
        """
        try:
            if not self.port.set_mtu(self.mtu):
                log.info("%s: the guest must use an MTU of %d", self.name, self.mtu)
            async with trio.open_nursery() as nursery:
                if self._kernel is None:
                    nursery.start_soon(self._seal_frames)
                nursery.start_soon(self._open_frames)
                nursery.start_soon(self._keep_keys)
                await self._obey()
                nursery.cancel_scope.cancel()
        except* (OSError, SealfsError) as group:
            exc = group.exceptions[0]
            self.state = f"failed: {exc}"
            log.error("%s: stopped: %s", self.name, exc)
        finally:
            if self._kernel is not None:
                with suppress(SealfsError):  # the device may be gone, and its keys with it
                    self._kernel.close()
            for peer in self._all:
                peer.association.forget()
            self._plain[:] = bytes(len(self._plain))
            self._body[:] = bytes(len(self._body))
            self.port.close()
            self.link.close()

    def recheck(self) -> None:
        """Ask now whether the VM is still allowed."""
        self._permission.recheck()

    def status(self) -> dict[str, object]:
        """Return what `sealfs net status` shows, JSON-able."""
        now = self._clock()
        return {
            "name": self.name,
            "network": self.network,
            "vm": self.vm,
            "device": self.device,
            "sci": self.sci.hex(),
            "state": self.state,
            "backend": "userspace" if self._kernel is None else "kernel",
            "port": self.port.name,
            "link": self.link.name,
            "mtu": self.mtu,
            "overhead": OVERHEAD + self.link.encapsulation,
            "learned": len(self._learned),
            **self.counters.document(),
            "peers": [
                describe(str(peer.address), peer.association, peer.counters, now)
                for peer in self._all
            ],
        }

    # From the VM to the peers

    async def _seal_frames(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.port.fd)
            is_more = True
            while is_more:
                is_more = self._seal_batch()
                for peer in self._all:
                    if peer.outbox.runs:
                        await self._send_runs(peer)
                if is_more:
                    await trio.lowlevel.checkpoint()

    def _seal_batch(self) -> bool:
        """Seal frames into the outboxes; False when the port has no more."""
        read, head, body, everyone = self.port.read_into, self._head, self._body, self._all
        buffers, drops, is_single = (head, body), self.counters.drops, len(everyone) == 1
        try:
            for _ in range(BATCH):
                size = read(buffers)
                if size < FRAME_SIZE_MIN:
                    drops[Drop.TOO_SHORT] += 1
                    continue
                if size > self._frame_size_max:
                    drops[Drop.TOO_LONG] += 1
                    self._tell(
                        "too long",
                        f"a frame of {size} or more bytes is too long for the way to the peers and "
                        f"was dropped: the VM must use an MTU of {self.mtu}",
                    )
                    continue
                if self._is_suspended:
                    drops[Drop.NOT_ALLOWED] += 1
                    continue
                plain = body[: size - ADDRESSES_SIZE]
                is_full = False
                for peer in everyone if is_single else self._targets(bytes(head[:6])):
                    session = peer.association.current
                    if session is None:
                        peer.counters.drops[Drop.NO_KEY] += 1
                        continue
                    outbox = peer.outbox
                    at = outbox.at
                    outbox.buffer[at : at + ADDRESSES_SIZE] = head
                    try:
                        sealed_size = session.sending.seal_into(outbox.buffer, at, plain)
                        is_full |= outbox.add(sealed_size)
                    except KeySpent:
                        peer.counters.drops[Drop.NO_KEY] += 1
                if is_full:
                    break
            return True
        except BlockingIOError:
            return False
        finally:
            for peer in everyone:
                peer.outbox.close_run()

    def _targets(self, destination: bytes) -> tuple[Peer, ...]:
        found = self._learned.find(destination)
        return self._all if found is None else (found,)

    async def _send_runs(self, peer: Peer) -> None:
        outbox, counters = peer.outbox, peer.counters
        for start, end, size in outbox.runs:
            frames = outbox.buffer[start:end]
            count = -(-(end - start) // size)
            try:
                while True:
                    try:
                        self.link.send(frames, size, peer.address)
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self.link.fd)
            except OSError as exc:
                counters.drops[Drop.LINK] += count
                self._tell(f"to {peer.address}", f"{peer.address}: {exc.strerror or exc}")
            else:
                counters.sent(count, end - start)
        peer.association.sent = True
        outbox.clear()

    # From the peers to the VM

    async def _open_frames(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self.link.fd)
            is_more = True
            while is_more:
                count = 0
                while count < BATCH:
                    try:
                        size, segment, sender = self.link.receive()
                    except BlockingIOError:
                        is_more = False
                        break
                    except OSError as exc:  # an ICMP error of a frame that was sent
                        self._tell("link", f"{self.link.name}: {exc.strerror or exc}")
                        count += 1
                        continue
                    count += max(1, size // max(1, segment))
                    frames = self._open_run(size, segment, sender)
                    if frames:
                        await self._deliver(frames)
                if is_more:
                    await trio.lowlevel.checkpoint()

    def _open_run(
        self, size: int, segment: int, sender: Address
    ) -> list[tuple[memoryview, memoryview]]:
        """Open what was received at once; return the frames for the VM: addresses, the rest."""
        sealed, plain, table, unpack = (
            self.link.buffer,
            self._plain,
            self._table,
            SECTAG.unpack_from,
        )
        found: list[tuple[memoryview, memoryview]] = []
        is_single, is_suspended = len(self._all) == 1, self._is_suspended
        for at in range(0, size, segment) if size else (0,):
            end = min(at + segment, size)
            if end - at < SEALED_SIZE_MIN:
                self.counters.drops[Drop.MALFORMED] += 1
                continue
            ethertype, tci, short_length, low, sci = unpack(sealed, at + ADDRESSES_SIZE)
            session = table.get((sci, tci))
            if session is None or ethertype != MACSEC:
                self._take_other(ethertype, bytes(sealed[at:end]), sender)
                continue
            association = session.association
            is_word = short_length == 1
            key = session.words_in if is_word else session.receiving
            opened = key.open_into(plain, sealed, at, end, short_length, low)
            if isinstance(opened, Drop):
                self._peer_of[association].counters.drops[opened] += 1
                continue
            association.heard = True
            if not session.is_confirmed:
                self._confirmed(session)
            if is_word:
                word = plain[at]
                self._send_all(self._peer_of[association], association.take_word(session, word))
                continue
            if is_suspended:
                self.counters.drops[Drop.NOT_ALLOWED] += 1
                continue
            counters = self._peer_of[association].counters
            counters.frames_in += 1
            counters.bytes_in += opened + ADDRESSES_SIZE
            if not is_single:
                peer = self._peer_of[association]
                self._learned.heard(bytes(sealed[at + 6 : at + ADDRESSES_SIZE]), peer)
            found.append((sealed[at : at + ADDRESSES_SIZE], plain[at : at + opened]))
        return found

    async def _deliver(self, frames: list[tuple[memoryview, memoryview]]) -> None:
        write = self.port.write
        for frame in frames:
            try:
                write(frame)
            except BlockingIOError:
                if not await self._deliver_slowly(frame):
                    self.counters.drops[Drop.PORT] += 1
            except OSError as exc:
                self.counters.drops[Drop.PORT] += 1
                self._tell("port", f"{self.port.name}: {exc.strerror or exc}")

    async def _deliver_slowly(self, frame: tuple[memoryview, memoryview]) -> bool:
        for _ in range(SLOW_TRIES):
            await trio.sleep(SLOW_WAIT)
            try:
                self.port.write(frame)
            except BlockingIOError:
                continue
            except OSError:
                return False
            return True
        return False

    def _take_other(self, ethertype: int, frame: bytes, sender: Address) -> None:
        """Take what is no sealed frame of a known sender."""
        drops = self.counters.drops
        if ethertype == MACSEC:
            drops[Drop.UNKNOWN_SENDER] += 1
            return
        if ethertype != HANDSHAKE:
            drops[Drop.PLAIN] += 1
            return
        peer = self._peers.get(sender)
        if peer is None:
            drops[Drop.UNKNOWN_SENDER] += 1
            return
        counts = peer.association.counts
        refused = counts.refused
        answers = peer.association.take_handshake(frame[FRAME_SIZE_MIN:], self._clock())
        if counts.refused != refused:
            drops[Drop.HANDSHAKE] += 1
            said = f"{sender}: handshake refused: {counts.last_refusal}"
            self._tell(f"handshake {sender}", said)
        self._send_all(peer, answers)

    # Keys

    async def _keep_keys(self) -> None:
        while True:
            now = self._clock()
            for peer in self._all:
                association = peer.association
                was = association.state
                self._send_all(peer, association.tick(now))
                self._note_state(peer, was)
            self._learned.turn(now)
            self._suspend_or_resume()
            await trio.sleep(TICK)

    def _confirmed(self, session: Session) -> None:
        association = session.association
        peer, was = self._peer_of[association], association.state
        self._send_all(peer, association.opened(session, self._clock()))
        for other in self._all:
            # The VM has moved to another host: what the old one still holds is of no use.
            if other is not peer and other.association.peer_sci == association.peer_sci:
                other.association.forget()
                self._learned.forget(other)
        self._note_state(peer, was)

    def _note_state(self, peer: Peer, was: str) -> None:
        state = peer.association.state
        if state != was:
            log.info("%s: %s: %s", self.name, peer.address, state)
            if state != "up":
                self._learned.forget(peer)

    def _send_all(self, peer: Peer, frames: list[bytes]) -> None:
        """Send frames of the key agreement; one that is lost is sent again by its timer."""
        for frame in frames:
            try:
                self.link.send(memoryview(frame), len(frame), peer.address)
            except OSError as exc:
                peer.counters.drops[Drop.LINK] += 1
                if not isinstance(exc, BlockingIOError):
                    self._tell(f"to {peer.address}", f"{peer.address}: {exc.strerror or exc}")

    # Permission

    async def _obey(self) -> None:
        """Return when the VM is no longer allowed."""
        reason = await self._permission.lost()
        self.state = "revoked"
        log.error(
            "%s: stopped in both directions: VM %s on network %s: %s",
            self.name, self.vm, self.network, reason,
        )  # fmt: skip

    def _suspend_or_resume(self) -> None:
        is_stale = self._permission.is_stale
        if is_stale != self._is_suspended and self.state in ("running", "suspended"):
            self._is_suspended = is_stale
            self.state = "suspended" if is_stale else "running"
            if is_stale:
                log.error("%s: suspended: the key service does not answer", self.name)
            else:
                log.info("%s: running again", self.name)

    def _tell(self, topic: str, text: str) -> None:
        """Log a warning, on one topic at most once a minute: others must not fill the log.

        Topics are few: what comes from outside is in the text, not in the topic.
        """
        now = self._clock()
        if now >= self._told.get(topic, 0.0):
            self._told[topic] = now + 60
            log.warning("%s: %s", self.name, text)
