"""Two ends of a network link, or more, in memory: a fast clock and a wire that does its worst.

The wire loses, delays, repeats and reorders frames as its random numbers say, and keeps all that
was ever on it, for replays. An end can be killed: what it knew is gone, as after kill -9, a
restart, or an older state that was restored (nothing is ever stored). The oracle:

- a payload reaches the other end's guest at most once, unaltered, and nobody else's;
- no (key, nonce) is ever used twice, by whatever end in whichever of its lives.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field

from sealfs.net.association import Association, Session, Table, Timing
from sealfs.net.cipher import KeySpent
from sealfs.net.frame import ADDRESSES_SIZE, OVERHEAD, SEALED_SIZE_MIN, SECTAG, Drop
from sealfs.net.grant import Grant
from sealfs.net.handshake import Secrets
from sealfs.net.labels import HANDSHAKE, MACSEC

NETWORK_KEY = bytes(range(100, 132))
TICK = 0.25


class Nonces:
    """Remembers each (key, nonce) and refuses a second use."""

    def __init__(self) -> None:
        self.used: set[tuple[bytes, bytes]] = set()
        self.keys: set[bytes] = set()

    def __call__(self, key: bytes, nonce: bytes) -> None:
        assert (key, nonce) not in self.used, "a nonce was used twice"
        self.used.add((key, nonce))
        self.keys.add(key)


def secrets_of(key: bytes = NETWORK_KEY, network: str = "net1") -> Secrets:
    return Secrets.of(Grant(network, "vm", 0, bytearray(key), bytes(8)))


def sci_of(number: int) -> bytes:
    return bytes([0x02, 0, 0, 0, 0, number, 0, 1])


class End:
    """One end: an association, and what an attachment does around it."""

    def __init__(
        self,
        number: int,
        *,
        rng: random.Random,
        nonces: Nonces,
        secrets: Secrets | None = None,
        timing: Timing | None = None,
        table: Table | None = None,
    ) -> None:
        self.number, self.rng, self.nonces, self.shared = number, rng, nonces, table
        self.secrets, self.timing = secrets or secrets_of(), timing
        self.delivered: list[bytes] = []
        self.drops: list[Drop] = []
        self.lives = 0
        self.revive()

    def revive(self) -> None:
        """Begin a new life, with nothing of the old one."""
        self.lives += 1
        self.table = self.shared if self.shared is not None else Table()
        self.association = Association(
            secrets=self.secrets,
            sci=sci_of(self.number),
            addresses=bytes(6) + sci_of(self.number)[:6],
            table=self.table,
            random=self.rng.randbytes,
            timing=self.timing,
            on_seal=self.nonces,
        )

    def seal(self, payload: bytes, session: Session | None = None) -> bytes | None:
        """Return a guest's frame, sealed; None without keys."""
        session = session or self.association.current
        if session is None:
            return None
        plain = b"\x08\x00" + payload
        out = memoryview(bytearray(ADDRESSES_SIZE + len(plain) + OVERHEAD))
        out[:ADDRESSES_SIZE] = bytes(range(12))
        try:
            session.sending.seal_into(out, 0, memoryview(plain))
        except KeySpent:
            return None
        self.association.sent = True
        return bytes(out)

    def receive(self, frame: bytes, now: float) -> list[bytes]:
        """Take what came from the wire; return frames to send."""
        if len(frame) < SEALED_SIZE_MIN:
            self.drops.append(Drop.MALFORMED)
            return []
        ethertype, tci, short_length, low, sci = SECTAG.unpack_from(frame, ADDRESSES_SIZE)
        if ethertype == HANDSHAKE:
            return self.association.take_handshake(frame[14:], now)
        session = self.table.get((sci, tci))
        if session is None or ethertype != MACSEC:
            self.drops.append(Drop.UNKNOWN_SENDER if ethertype == MACSEC else Drop.PLAIN)
            return []
        plain = memoryview(bytearray(len(frame)))
        key = session.words_in if short_length == 1 else session.receiving
        opened = key.open_into(plain, memoryview(frame), 0, len(frame), short_length, low)
        if isinstance(opened, Drop):
            self.drops.append(opened)
            return []
        self.association.heard = True
        out = [] if session.is_confirmed else self.association.opened(session, now)
        if short_length == 1:
            return out + self.association.take_word(session, plain[0])
        self.delivered.append(bytes(plain[2:opened]))
        return out


@dataclass
class Wire:
    """A pair of ends, the clock, and what is on the way between them."""

    ends: tuple[End, End]
    rng: random.Random
    loss: float = 0.0
    repeat: float = 0.0
    delay_max: float = 0.001
    now: float = 1000.0
    history: list[tuple[int, bytes]] = field(default_factory=list)
    keep_history: bool = True

    def __post_init__(self) -> None:
        self._queue: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._payloads = itertools.count()
        self.sent: list[list[bytes]] = [[], []]

    def put(self, frm: int, frames: list[bytes]) -> None:
        """Send frames of an end."""
        for frame in frames:
            if self.keep_history:
                self.history.append((1 - frm, frame))
            copies = 1 + (self.rng.random() < self.repeat)
            for _ in range(copies):
                if self.rng.random() >= self.loss:
                    at = self.now + self.rng.random() * self.delay_max
                    self.inject(1 - frm, frame, at)

    def inject(self, to: int, frame: bytes, at: float | None = None) -> None:
        """Have a frame arrive."""
        order = next(self._order)
        heapq.heappush(self._queue, (self.now if at is None else at, order, to, frame))

    def talk(self, frm: int) -> bool:
        """Have a guest send a payload like no other; False if there were no keys."""
        payload = b"payload %d of %d " % (next(self._payloads), frm) + bytes(50)
        frame = self.ends[frm].seal(payload)
        if frame is None:
            return False
        self.sent[frm].append(payload)
        self.put(frm, [frame])
        return True

    def run(self, seconds: float, *, step: float = TICK) -> None:
        """Let time pass."""
        end = self.now + seconds
        while self.now < end:
            for index in (0, 1):
                self.put(index, self.ends[index].association.tick(self.now))
            target = min(end, self.now + step)
            self.settle(target)
            self.now = target

    def settle(self, until: float) -> None:
        """Deliver what arrives until then."""
        while self._queue and self._queue[0][0] <= until:
            at, _, to, frame = heapq.heappop(self._queue)
            self.now = max(self.now, at)
            self.put(to, self.ends[to].receive(frame, self.now))

    def check(self) -> None:
        """The oracle; nonces check themselves."""
        for frm in (0, 1):
            got = self.ends[1 - frm].delivered
            assert len(got) == len(set(got)), "a payload was delivered twice"
            assert set(got) <= set(self.sent[frm]), "what was delivered was never sent"

    def both_talk(self) -> None:
        """Both guests reach each other now; the wire must be a good one."""
        for frm in (0, 1):
            before = len(self.ends[1 - frm].delivered)
            assert self.talk(frm), f"end {frm} has no keys"
            self.settle(self.now + self.delay_max)
            assert len(self.ends[1 - frm].delivered) == before + 1, (
                f"end {frm} does not get through"
            )


def linked(seed: int = 1, *, timing: Timing | None = None, keep_history: bool = True) -> Wire:
    """Return two ends on a good wire that have agreed on keys."""
    rng, nonces = random.Random(seed), Nonces()
    ends = (
        End(1, rng=rng, nonces=nonces, timing=timing),
        End(2, rng=rng, nonces=nonces, timing=timing),
    )
    wire = Wire(ends, rng, keep_history=keep_history)
    wire.run(3)
    assert all(end.association.state == "up" for end in ends)
    return wire
