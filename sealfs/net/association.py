"""One peer of one attachment: when keys are agreed on, used, replaced and forgotten.

Nothing here waits or sends: time comes in as `now`, in seconds of any steady clock, and what is to
be sent comes out as whole frames. The states of a session (the keys of one handshake):

    first message ->  answer           the end that began has it `offered`, the other `pending`
    offered        -> current          when a frame of the other end opens under it
    pending        -> current          likewise
    current        -> previous         when the next one becomes current; still opens frames
    previous       -> forgotten        some seconds later

So nothing is sealed for the guest under keys that the other end has not proven to have, and a
first message that somebody repeats or makes up never touches working keys. The end that began
proves it by a word under the new keys, and the other answers it with one.

Both ends may begin at once: the one with the lower SCI ignores the other's first message while its
own may still lead to keys. Neither end forgets keys because the other is silent; it begins again.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from sealfs.net import handshake, labels
from sealfs.net.cipher import DirectionKey, KeySpent, ReceivingKey, SendingKey, association_key
from sealfs.net.frame import ADDRESSES_SIZE, OVERHEAD, TCI, Word
from sealfs.net.handshake import ASSOCIATION_COUNT, Agreement, Offer, Refused, Secrets
from sealfs.net.labels import ASSOCIATION_INFO, WORD_INFO

if TYPE_CHECKING:
    from collections.abc import Callable

REKEY_AGE: Final = 3600.0
REKEY_FRAMES: Final = 1 << 32
REKEY_SLACK: Final = 60.0
"""Seconds after which the end that did not begin last time begins, if the other does not."""
KEY_AGE_MAX: Final = 2 * REKEY_AGE
"""Seconds after which keys are forgotten even where no new ones could be agreed on."""
PREVIOUS_LIFE: Final = 5.0
"""Seconds for frames that were on their way when keys changed."""
OFFER_LIFE: Final = 2.0
"""Seconds in which an answer may come: more than twice round the earth."""
RETRY_MIN: Final = 1.0
RETRY_MAX: Final = 15.0
CONFIRM_INTERVAL: Final = 0.5
CONFIRM_LIFE: Final = 5.0
ANSWER_INTERVAL: Final = 0.5
"""Seconds between two answers at least: two handshakes a second for each peer. Less than the other
end waits before it tries again."""
PENDING_LIFE: Final = 10.0
KEEPALIVE: Final = 10.0
SILENCE: Final = 35.0
"""Seconds without a frame after which a peer is taken for gone: three keepalives and a bit."""
FIRSTS_REMEMBERED: Final = 4096
"""First messages whose repetition is recognised; at one an hour, half a year of them."""


class Table(dict[tuple[int, int], "Session"]):
    """Who sends under which SCI and TCI (see `Session.place`), for all peers of an attachment."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def is_repeated(self, ephemeral: bytes) -> bool:
        """Whether a first message was seen before, from whatever address; it has been now."""
        if ephemeral in self._seen:
            return True
        self._seen[ephemeral] = None
        if len(self._seen) > FIRSTS_REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def numbers_of(self, sci: bytes, besides: Association) -> set[int]:
        """Return the association numbers under which another peer has this SCI."""
        wanted = int.from_bytes(sci, "big")
        return {
            session.association_number
            for (place, _), session in self.items()
            if place == wanted and session.association is not besides
        }


@dataclass(slots=True, repr=False, eq=False)
class Session:
    """The keys of one handshake, both directions."""

    association: Association
    place: tuple[int, int]
    association_number: int
    is_initiator: bool
    made_at: float
    sending: SendingKey
    receiving: ReceivingKey
    words_out: SendingKey
    words_in: ReceivingKey
    kept: DirectionKey | None = None
    """For a keeper: what it seals with once the session is confirmed."""
    is_confirmed: bool = False
    """A frame of the other end has opened under it."""

    def forget(self) -> None:
        """Let go of the keys."""
        self.kept = None
        for key in (self.sending, self.receiving, self.words_out, self.words_in):
            key.wipe()


@dataclass(slots=True)
class HandshakeCounts:
    """What became of handshakes."""

    completed: int = 0
    begun: int = 0
    answered: int = 0
    refused: int = 0
    repeated: int = 0
    limited: int = 0
    last_refusal: str = ""


class Keeper(Protocol):
    """Somebody else who seals and opens frames, with keys that are agreed on here."""

    def installed(self, peer_sci: bytes, number: int, key: DirectionKey) -> None:
        """Open frames that come under a new key."""
        ...

    def confirmed(self, number: int, key: DirectionKey) -> None:
        """Seal frames under this key from now on."""
        ...

    def forgotten(self, peer_sci: bytes, number: int) -> None:
        """Neither seal nor open under this association number any more."""
        ...


@dataclass(slots=True)
class Timing:
    """What tests make shorter."""

    rekey_age: float = REKEY_AGE
    rekey_frames: int = REKEY_FRAMES


class Association:
    """All that one end knows of one peer."""

    def __init__(
        self,
        *,
        secrets: Secrets,
        sci: bytes,
        addresses: bytes,
        table: Table,
        random: Callable[[int], bytes],
        timing: Timing | None = None,
        on_seal: Callable[[bytes, bytes], None] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        """Make an end that has no keys yet; the first `tick` begins.

        Args:
            secrets: of the network.
            sci: this end's.
            addresses: destination and source of this end's handshakes and words, 12 octets.
            table: gets the sessions under which frames may come; shared by an attachment's peers.
            random: returns fresh random octets.
            timing: when keys are replaced.
            on_seal: called with (key, nonce) for each frame; tests prove uniqueness with it.
            keeper: gets the keys for frames, which are not used here then.
        """
        if len(addresses) != ADDRESSES_SIZE:
            raise ValueError(f"addresses have {ADDRESSES_SIZE} octets")
        self._secrets, self._sci, self._addresses = secrets, sci, addresses
        self._table, self._random, self._on_seal = table, random, on_seal
        self._timing, self._keeper = timing or Timing(), keeper
        self.peer_sci = b""
        self.counts = HandshakeCounts()
        self.current: Session | None = None
        self._previous: Session | None = None
        self._previous_until = 0.0
        self._pending: Session | None = None
        self._offered: Session | None = None
        self._confirm_at = 0.0
        self._offer: Offer | None = None
        self._offer_until = 0.0
        self._attempts = 0
        self._attempt_at = 0.0
        self._answer_at = 0.0
        self.heard = False
        """Set by who opens a frame of this peer."""
        self.sent = False
        """Set by who sends a frame to this peer."""
        self.heard_at = 0.0
        self._sent_at = 0.0
        self.is_silent = False

    @property
    def state(self) -> str:
        """One word for people: up, silent or connecting."""
        if self.current is None:
            return "connecting"
        return "silent" if self.is_silent else "up"

    def tick(self, now: float) -> list[bytes]:
        """Do what is due; return frames to send. Called a few times a second."""
        if self.heard:
            self.heard, self.heard_at, self.is_silent = False, now, False
        if self.sent:
            self.sent, self._sent_at = False, now
        self._expire(now)
        out: list[bytes] = []
        offered, current = self._offered, self.current
        if offered is not None and now >= self._confirm_at:
            self._confirm_at = now + CONFIRM_INTERVAL
            out += self._say(offered, Word.CONFIRM)
        if current is not None:
            if now - self.heard_at > SILENCE:
                self.is_silent = True
            if now - self._sent_at >= KEEPALIVE:
                self._sent_at = now
                out += self._say(current, Word.ALIVE)
        if self._wants_keys(now) and not (self._offered or self._pending):
            out += self._begin(now)
        return out

    def take_handshake(self, body: bytes, now: float) -> list[bytes]:
        """Take a handshake message of this peer's address; return frames to send.

        Whatever it is, keys in use stay as they are.
        """
        try:
            if handshake.kind_of(body) == handshake.FIRST:
                return self._take_first(body, now)
            return self._take_answer(body, now)
        except Refused as exc:
            self.counts.refused += 1
            self.counts.last_refusal = str(exc)
            return []

    def opened(self, session: Session, now: float) -> list[bytes]:
        """Note the first frame that opened under a session; return frames to send."""
        session.is_confirmed = True
        if session is not self._pending and session is not self._offered:
            return []
        was_pending = session is self._pending
        self._pending = self._forgotten(self._pending, unless=session)
        self._offered = self._forgotten(self._offered, unless=session)
        self._previous = self._forgotten(self._previous)
        self._previous, self._previous_until = self.current, now + PREVIOUS_LIFE
        self.current = session
        self.peer_sci = session.place[0].to_bytes(len(self._sci), "big")
        if self._keeper is not None and session.kept is not None:
            self._keeper.confirmed(session.association_number, session.kept)
            session.kept = None
        self._offer = None
        self._attempts = 0
        self.counts.completed += 1
        self.heard_at, self.is_silent = now, False
        return self._say(session, Word.ALIVE) if was_pending else []

    def take_word(self, session: Session, word: int) -> list[bytes]:
        """Take a word that came under a session; return frames to send."""
        return self._say(session, Word.ALIVE) if word == Word.CONFIRM else []

    def forget(self) -> None:
        """Forget all keys."""
        self._offer = None
        for name in ("current", "_previous", "_pending", "_offered"):
            setattr(self, name, self._forgotten(getattr(self, name)))

    # Handshakes

    def _wants_keys(self, now: float) -> bool:
        if now < self._attempt_at:
            return False
        current = self.current
        if current is None or self.is_silent:
            return True
        age, timing = now - current.made_at, self._timing
        return (
            age >= timing.rekey_age + (0 if current.is_initiator else REKEY_SLACK)
            or current.sending.next_number > timing.rekey_frames
            or current.receiving.window.highest > timing.rekey_frames
        )

    def _begin(self, now: float) -> list[bytes]:
        self._offer = Offer(
            self._secrets,
            sci=self._sci,
            ephemeral=self._random(32),
            in_use=frozenset(s.association_number for s in (self.current, self._previous) if s),
        )
        self._offer_until = now + OFFER_LIFE
        # Jitter, so that many attachments of two hosts do not keep step.
        wait = min(RETRY_MAX, RETRY_MIN * 2 ** min(self._attempts, 8))
        self._attempt_at = now + wait * (0.75 + self._random(1)[0] / 512)
        self._attempts += 1
        self.counts.begun += 1
        return [self._framed(self._offer.body)]

    def _take_first(self, body: bytes, now: float) -> list[bytes]:
        first = handshake.parse_first(self._secrets, body)
        if first.sci == self._sci:
            raise Refused("the peer has this device's own SCI: attached twice, or a reflection")
        if self._table.is_repeated(first.ephemeral):
            self.counts.repeated += 1
            return []
        is_under_way = self._offered is not None or (
            self._offer is not None and now < self._offer_until
        )
        if is_under_way and self._sci < first.sci:
            return []  # both began: this end's first message counts
        if now < self._answer_at:
            self.counts.limited += 1
            return []
        answer = handshake.Answer(self._secrets, first)
        self._answer_at = now + ANSWER_INTERVAL
        self._pending = self._forgotten(self._pending)
        number = self._free_number(answer.in_use, first.sci)
        message, agreement = answer.agree(
            sci=self._sci, association_number=number, ephemeral=self._random(32)
        )
        self._pending = self._session(agreement, now)
        self.counts.answered += 1
        return [self._framed(message)]

    def _take_answer(self, body: bytes, now: float) -> list[bytes]:
        if self._offer is None or now >= self._offer_until:
            raise Refused("it answers nothing")
        agreement = self._offer.finish(body)
        if self.current and agreement.association_number == self.current.association_number:
            raise Refused("it agrees to an association number that is in use")
        others = self._table.numbers_of(agreement.peer_sci, besides=self)
        if agreement.association_number in others:
            raise Refused("its SCI is in use by another peer")
        self._offer = None
        self._offered = self._forgotten(self._offered)
        self._offered = self._session(agreement, now)
        self._confirm_at = now + CONFIRM_INTERVAL
        return self._say(self._offered, Word.CONFIRM)

    def _free_number(self, in_use: frozenset[int], sci: bytes) -> int:
        """Return an association number that neither end uses for frames of now.

        The other end names at most two, and this end has one more: one of four is free, unless
        another peer has the same SCI. That one's keys are left alone: this message may be old,
        or the VM's host another one now, which will be known when it has proven to have the keys.

        Raises:
            Refused: none is free.
        """
        others = self._table.numbers_of(sci, besides=self)
        begin = self.current.association_number + 1 if self.current else 0
        order = [(begin + step) % ASSOCIATION_COUNT for step in range(ASSOCIATION_COUNT)]
        own = others | ({self.current.association_number} if self.current else set())
        late = {s.association_number for s in (self._previous, self._offered) if s}
        for taken in (in_use | own | late, in_use | own, own):
            free = [number for number in order if number not in taken]
            if free:
                return free[0]
        raise Refused("its SCI is in use by other peers")

    # Sessions

    def _session(self, agreement: Agreement, now: float) -> Session:
        """Make a session that opens frames; those that had its number are forgotten."""
        peer_sci, number = agreement.peer_sci, agreement.association_number
        # The highest SCI has SSCI 1, as MKA would assign them (IEEE 802.1X-2020 9.10).
        ours, theirs = (1, 2) if self._sci > peer_sci else (2, 1)

        def sender(info: bytes) -> SendingKey:
            key, salt = association_key(agreement.sending, info)
            return SendingKey(
                key, salt, sci=self._sci, ssci=ours, association_number=number,
                on_seal=_hooked(self._on_seal, key),
            )  # fmt: skip

        def receiver(info: bytes) -> ReceivingKey:
            return ReceivingKey(*association_key(agreement.receiving, info), ssci=theirs)

        place = (int.from_bytes(peer_sci, "big"), TCI | number)
        for name in ("_previous", "_pending", "_offered"):
            session: Session | None = getattr(self, name)
            if session is not None and session.place == place:
                setattr(self, name, self._forgotten(session))
        session = Session(
            self, place, number, agreement.is_initiator, now,
            sender(ASSOCIATION_INFO), receiver(ASSOCIATION_INFO),
            sender(WORD_INFO), receiver(WORD_INFO),
        )  # fmt: skip
        if self._keeper is not None:
            # The packet numbers of these keys are counted elsewhere: nothing is sealed here.
            session.sending.wipe()
            session.receiving.wipe()
            session.kept = DirectionKey(*association_key(agreement.sending), ours)
            key = DirectionKey(*association_key(agreement.receiving), theirs)
            self._keeper.installed(peer_sci, number, key)
        self._table[place] = session
        return session

    def _expire(self, now: float) -> None:
        if self._offer is not None and now >= self._offer_until:
            self._offer = None
        if self._previous is not None and now >= self._previous_until:
            self._previous = self._forgotten(self._previous)
        if self._pending is not None and now - self._pending.made_at >= PENDING_LIFE:
            self._pending = self._forgotten(self._pending)
        if self._offered is not None and now - self._offered.made_at >= CONFIRM_LIFE:
            self._offered = self._forgotten(self._offered)
        age_max = self._timing.rekey_age + KEY_AGE_MAX - REKEY_AGE
        if self.current is not None and now - self.current.made_at >= age_max:
            self.current = self._forgotten(self.current)

    def _forgotten(self, session: Session | None, unless: Session | None = None) -> Session | None:
        """Forget a session, and return None for its place; `unless` it is this one."""
        if session is not None and session is not unless:
            if self._table.get(session.place) is session:
                del self._table[session.place]
            session.forget()
            if self._keeper is not None:
                peer_sci = session.place[0].to_bytes(len(self._sci), "big")
                self._keeper.forgotten(peer_sci, session.association_number)
        return None

    def _say(self, session: Session, word: Word) -> list[bytes]:
        out = memoryview(bytearray(ADDRESSES_SIZE + 1 + OVERHEAD))
        out[:ADDRESSES_SIZE] = self._addresses
        try:
            session.words_out.seal_into(out, 0, memoryview(bytes([word])))
        except KeySpent:
            return []
        return [bytes(out)]

    def _framed(self, body: bytes) -> bytes:
        return self._addresses + labels.HANDSHAKE.to_bytes(2, "big") + body


def _hooked(
    on_seal: Callable[[bytes, bytes], None] | None, key: bytes
) -> Callable[[bytes], None] | None:
    return None if on_seal is None else lambda nonce: on_seal(key, nonce)
