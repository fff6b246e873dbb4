"""Key agreement between two ends, in memory and on a fast clock: see net_simulation.py."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_simulation import End, Nonces, Wire, linked, sci_of, secrets_of

from sealfs.net import association as rules
from sealfs.net.association import (
    ANSWER_INTERVAL,
    PREVIOUS_LIFE,
    Table,
    Timing,
)
from sealfs.net.frame import SECTAG, Drop
from sealfs.net.handshake import FIRST, Answer, Offer, parse_first
from sealfs.net.labels import HANDSHAKE


def is_first(frame: bytes) -> bool:
    return int.from_bytes(frame[12:14], "big") == HANDSHAKE and frame[15] == FIRST


def is_handshake(frame: bytes) -> bool:
    return int.from_bytes(frame[12:14], "big") == HANDSHAKE


def keys_of(wire: Wire) -> list[object]:
    return [end.association.current for end in wire.ends]


def framed(body: bytes) -> bytes:
    return bytes(12) + HANDSHAKE.to_bytes(2, "big") + body


@pytest.mark.parametrize("seed", range(20))
def test_two_ends_that_begin_at_once_agree_on_one_pair_of_keys(seed: int) -> None:
    wire = linked(seed)
    wire.both_talk()
    wire.run(60)
    wire.both_talk()
    numbers = {end.association.current.association_number for end in wire.ends}  # type: ignore[union-attr]
    assert len(numbers) == 1
    assert [end.association.counts.completed for end in wire.ends] == [1, 1]


def test_a_day_of_rekeying_loses_nothing_and_repeats_no_nonce() -> None:
    """24 hours by a fast clock: a frame a second each way, keys replaced every hour."""
    wire = linked(timing=Timing(rekey_age=3600), keep_history=False)
    numbers: list[set[int]] = [set(), set()]
    frames = 0
    for _ in range(24 * 3600):
        for frm in (0, 1):
            assert wire.talk(frm)
            frames += 1
            current = wire.ends[frm].association.current
            assert current is not None
            numbers[frm].add(current.association_number)
        wire.run(1, step=1)
    wire.check()
    assert sum(len(end.delivered) for end in wire.ends) == frames
    assert numbers == [{0, 1, 2, 3}] * 2  # the association number rotates
    for end in wire.ends:
        # The first, and one an hour; each lives its hour and the moment of the next agreement.
        assert 24 <= end.association.counts.completed <= 25
        assert end.drops == []
    # A key for frames and one for words, in each direction.
    assert len(wire.ends[0].nonces.keys) == 4 * wire.ends[0].association.counts.completed


def test_a_bad_wire_delays_but_repeats_and_mixes_nothing() -> None:
    wire = linked(timing=Timing(rekey_age=120))
    wire.loss, wire.repeat, wire.delay_max = 0.3, 0.2, 0.4
    for _ in range(3600):
        wire.talk(0)
        wire.talk(1)
        wire.run(0.5)
    wire.check()
    got = sum(len(end.delivered) for end in wire.ends)
    assert got > 0.6 * sum(len(sent) for sent in wire.sent)
    assert all(end.association.counts.completed >= 10 for end in wire.ends)
    wire.loss = wire.repeat = 0
    wire.delay_max = 0.001
    wire.run(30)
    wire.both_talk()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("kill"), st.integers(0, 1)),
        st.tuples(st.just("talk"), st.integers(0, 1)),
        st.tuples(st.just("run"), st.integers(1, 40)),
        st.tuples(st.just("replay"), st.integers(0, 1 << 30)),
        st.tuples(st.just("flip"), st.integers(0, 1 << 30)),
        st.tuples(st.just("lose"), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 1 << 30), events=EVENTS)
def test_no_nonce_repeats_whatever_is_killed_replayed_or_altered(
    seed: int, events: list[tuple[str, int]]
) -> None:
    wire = linked(seed, timing=Timing(rekey_age=20))
    for what, number in events:
        if what == "kill":
            wire.ends[number].revive()
        elif what == "talk":
            wire.talk(number)
        elif what == "run":
            wire.run(number / 4)
        elif what == "lose":
            wire.loss = number / 10
        else:
            to, frame = wire.history[number % len(wire.history)]
            altered = bytearray(frame)
            if what == "flip":
                altered[number % len(frame)] ^= 1 << number % 8
            wire.inject(to, bytes(altered))
    wire.check()
    wire.loss = 0
    wire.run(120)  # longer than any timer of a handshake
    wire.both_talk()
    wire.check()


@pytest.mark.parametrize("survivor", [0, 1])
def test_an_end_that_was_killed_gets_new_keys_at_once(survivor: int) -> None:
    wire = linked()
    wire.ends[1 - survivor].revive()
    wire.run(3)
    wire.both_talk()
    wire.check()


def test_first_messages_that_are_replayed_touch_no_working_keys() -> None:
    wire = linked(timing=Timing(rekey_age=60))
    wire.run(600)
    before = keys_of(wire)
    firsts = [(to, frame) for to, frame in wire.history if is_first(frame)]
    assert len(firsts) > 8
    for _ in range(50):
        for to, frame in firsts:
            wire.inject(to, frame)
        wire.run(0.25)
        wire.both_talk()
    assert keys_of(wire) == before
    assert sum(end.association.counts.repeated for end in wire.ends) > 100


def test_after_a_restart_a_replayed_first_message_makes_no_usable_keys() -> None:
    """The one who restarted knows no old message: it answers, and nobody confirms."""
    wire = linked(timing=Timing(rekey_age=60))
    wire.run(600)
    old = [frame for to, frame in wire.history if to == 1 and is_first(frame)]
    wire.ends[1].revive()
    wire.run(3)
    wire.both_talk()
    before = keys_of(wire)
    for frame in old:
        wire.inject(1, frame)
        wire.run(1)
        wire.both_talk()
    wire.run(30)
    assert keys_of(wire) == before
    wire.both_talk()
    wire.check()


def test_the_answering_end_keeps_its_keys_until_the_new_ones_are_confirmed() -> None:
    """A holder of the network key begins with one end, and says nothing more."""
    wire = linked()
    before = keys_of(wire)
    stranger = Offer(secrets_of(), sci=sci_of(1), ephemeral=b"e" * 32, in_use=frozenset())
    answers = wire.ends[1].receive(framed(stranger.body), wire.now)
    assert len(answers) == 1
    wire.both_talk()
    wire.run(30)
    assert keys_of(wire) == before
    wire.both_talk()


def test_forged_first_messages_keep_no_real_one_out_and_change_nothing() -> None:
    wire = linked()
    before = keys_of(wire)
    offer = Offer(secrets_of(), sci=sci_of(1), ephemeral=b"e" * 32, in_use=frozenset())
    refused = wire.ends[1].association.counts.refused
    for bit in range(8 * len(offer.body)):
        forged = bytearray(offer.body)
        forged[bit // 8] ^= 1 << bit % 8
        assert wire.ends[1].receive(framed(bytes(forged)), wire.now) == []
    assert wire.ends[1].association.counts.refused == refused + 8 * len(offer.body)
    assert keys_of(wire) == before
    # The unaltered one is answered all the same.
    assert len(wire.ends[1].receive(framed(offer.body), wire.now)) == 1


def test_first_messages_are_limited_for_each_peer() -> None:
    """Fresh ones, by a holder of the network key that has gone mad; the link goes on."""
    wire = linked()
    wire.run(60)
    before = keys_of(wire)
    answered = 0
    for number in range(1000):
        offer = Offer(
            secrets_of(), sci=sci_of(1), ephemeral=b"%032d" % (number * 1000), in_use=frozenset()
        )
        answered += len(wire.ends[1].receive(framed(offer.body), wire.now))
        wire.run(0.01, step=0.01)
        if number % 100 == 0:
            wire.both_talk()
    assert 1 <= answered <= 10 / ANSWER_INTERVAL + 1
    assert wire.ends[1].association.counts.limited > 900
    assert keys_of(wire) == before


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"key": bytes(32)}, "another network or has another key"),
        ({"network": "net2"}, "another network or has another key"),
    ],
)
def test_another_network_or_key_is_refused_and_says_so(other: dict[str, Any], says: str) -> None:
    rng, nonces = random.Random(1), Nonces()
    ends = (
        End(1, rng=rng, nonces=nonces),
        End(2, rng=rng, nonces=nonces, secrets=secrets_of(**other)),
    )
    wire = Wire(ends, rng)
    wire.run(60)
    for end in ends:
        assert end.association.state == "connecting"
        assert end.association.current is None
        assert says in end.association.counts.last_refusal
        assert end.association.counts.answered == 0
    assert not wire.talk(0)


def test_a_device_that_meets_itself_says_so() -> None:
    rng, nonces = random.Random(1), Nonces()
    ends = (End(1, rng=rng, nonces=nonces), End(1, rng=rng, nonces=nonces))
    wire = Wire(ends, rng)
    wire.run(20)
    for end in ends:
        assert end.association.current is None
        assert "own SCI" in end.association.counts.last_refusal


def test_a_peer_of_another_version_is_named() -> None:
    wire = linked()
    offer = Offer(secrets_of(), sci=sci_of(1), ephemeral=b"e" * 32, in_use=frozenset())
    wire.ends[1].receive(framed(b"\x02" + offer.body[1:]), wire.now)
    assert (
        wire.ends[1].association.counts.last_refusal == "the peer speaks version 2, this sealfs 1"
    )


@given(st.binary(max_size=120))
@settings(deadline=None)
def test_any_bytes_are_a_handshake_message_or_refused(data: bytes) -> None:
    wire = linked()
    before = keys_of(wire)
    for prefix in (b"", b"\1\1", b"\1\2"):
        assert wire.ends[0].receive(framed(prefix + data), wire.now) == []
    assert keys_of(wire) == before


def test_an_old_key_opens_for_some_seconds_and_then_no_more() -> None:
    wire = linked(timing=Timing(rekey_age=100))
    old = wire.ends[0].association.current
    assert old is not None
    late, too_late = (wire.ends[0].seal(b"on the way" + bytes([n])) for n in range(2))
    assert late is not None
    assert too_late is not None
    while wire.ends[1].association.counts.completed < 2:
        wire.run(0.25)
    wire.ends[1].receive(late, wire.now)
    assert wire.ends[1].delivered[-1] == b"on the way\0"
    wire.run(PREVIOUS_LIFE + 1)
    wire.ends[1].receive(too_late, wire.now)
    assert wire.ends[1].drops == [Drop.UNKNOWN_SENDER]
    assert not old.sending.is_usable
    assert wire.ends[0].seal(b"more", old) is None


@pytest.mark.parametrize("low", [(1 << 32) - 5, (1 << 33) - 5])
def test_the_packet_number_goes_on_beyond_32_bits_while_keys_are_replaced(low: int) -> None:
    wire = linked()
    for frm, end in enumerate(wire.ends):
        current = end.association.current
        other = wire.ends[1 - frm].association.current
        assert current is not None
        assert other is not None
        current.sending.next_number = low
        other.receiving.window.mark(low - 1)
    for _ in range(10):
        wire.both_talk()
    assert keys_of(wire)[0].sending.next_number == low + 10  # type: ignore[attr-defined]
    before = keys_of(wire)
    wire.run(3)
    assert all(now is not was for now, was in zip(keys_of(wire), before, strict=True))
    wire.both_talk()
    assert all(end.drops == [] for end in wire.ends)


def test_a_silent_peer_is_told_and_tried_again_and_comes_back() -> None:
    wire = linked()
    wire.loss = 1
    wire.run(120)
    assert [end.association.state for end in wire.ends] == ["silent", "silent"]
    begun = [end.association.counts.begun for end in wire.ends]
    wire.run(120)
    for end, count in zip(wire.ends, begun, strict=True):
        assert 5 <= end.association.counts.begun - count <= 12
    wire.loss = 0
    wire.run(20)
    assert [end.association.state for end in wire.ends] == ["up", "up"]
    wire.both_talk()


def test_keys_are_forgotten_where_the_peer_stays_away() -> None:
    wire = linked()
    old = wire.ends[0].association.current
    assert old is not None
    wire.loss = 1
    wire.run(rules.KEY_AGE_MAX - 10, step=5)
    assert wire.ends[0].association.current is old
    wire.run(20, step=5)
    assert wire.ends[0].association.current is None
    assert not old.sending.is_usable
    assert wire.ends[0].association.state == "connecting"


def test_a_quiet_link_says_that_it_lives_and_a_busy_one_need_not() -> None:
    wire = linked()
    wire.history.clear()
    wire.run(100)
    assert 15 <= len(wire.history) <= 22
    assert all(SECTAG.unpack_from(frame, 12)[2] == 1 for _, frame in wire.history)
    wire.history.clear()
    for _ in range(100):
        wire.both_talk()
        wire.run(1)
    assert len(wire.history) == 200


def three() -> tuple[Wire, Wire]:
    """A host with two peers, B and C: a wire to each, one table."""
    rng, nonces, table = random.Random(7), Nonces(), Table()
    wires = []
    for number in (2, 3):
        ours = End(1, rng=rng, nonces=nonces, table=table, timing=Timing(rekey_age=60))
        theirs = End(number, rng=rng, nonces=nonces, timing=Timing(rekey_age=60))
        wires.append(Wire((ours, theirs), rng))
        wires[-1].run(300 + 61 * len(wires))
    assert len({id(end.association.current) for wire in wires for end in wire.ends}) == 4
    numbers = [
        end.association.current.association_number for end in (wires[0].ends[0], wires[1].ends[0])
    ]
    assert numbers[0] != numbers[1]
    return wires[0], wires[1]


def test_the_number_of_new_keys_is_not_that_of_keys_in_use() -> None:
    """Also where the answering end has begun anew and knows of none."""
    wire = linked()
    for _ in range(6):
        current = wire.ends[0].association.current
        assert current is not None
        wire.ends[1].revive()
        (first,) = wire.ends[0].association._begin(wire.now)
        wire.ends[1].receive(first, wire.now)
        pending = wire.ends[1].association._pending
        assert pending is not None
        assert pending.association_number != current.association_number
        wire.run(3)


def test_first_messages_replayed_from_the_address_of_another_peer_harm_neither() -> None:
    to_b, to_c = three()
    firsts = [frame for to, frame in to_b.history if to == 0 and is_first(frame)]
    before = keys_of(to_b) + keys_of(to_c)
    for frame in firsts:
        assert to_c.ends[0].receive(frame, to_c.now) == []
    # One that is not remembered: recorded before this host began anew. It leaves just the number
    # that B's keys have.
    current = to_b.ends[0].association.current
    assert current is not None
    others = frozenset(range(4)) - {current.association_number}
    fresh = Offer(secrets_of(), sci=sci_of(2), ephemeral=b"e" * 32, in_use=others)
    assert len(to_c.ends[0].receive(framed(fresh.body), to_c.now)) == 1
    to_b.both_talk()
    to_c.both_talk()
    assert keys_of(to_b) + keys_of(to_c) == before
    to_b.run(61)  # new keys with B, which is no reason to forget those with C
    to_b.both_talk()
    to_c.both_talk()
    assert to_c.ends[0].association.peer_sci == sci_of(3)


def test_a_vm_that_moved_to_another_host_is_taken_from_there() -> None:
    to_b, to_c = three()
    moved = End(2, rng=to_c.rng, nonces=to_c.ends[0].nonces)
    to_c.ends = (to_c.ends[0], moved)
    to_c.run(60)
    to_c.both_talk()
    assert to_c.ends[0].association.peer_sci == to_b.ends[0].association.peer_sci == sci_of(2)


def test_an_answer_that_claims_the_sci_of_another_peer_is_refused() -> None:
    """By a host of the same network that lies, and only where it would take a number in use."""
    to_b, to_c = three()
    number = to_b.ends[0].association.current
    assert number is not None
    to_c.ends[0].association.forget()
    (first,) = to_c.ends[0].association._begin(to_c.now)
    answer = Answer(secrets_of(), parse_first(secrets_of(), first[14:]))
    body, _ = answer.agree(
        sci=sci_of(2), association_number=number.association_number, ephemeral=b"e" * 32
    )
    assert to_c.ends[0].receive(framed(body), to_c.now) == []
    assert "in use by another peer" in to_c.ends[0].association.counts.last_refusal
    to_b.both_talk()


def test_forget_leaves_no_key() -> None:
    wire = linked()
    association = wire.ends[0].association
    sessions = list(wire.ends[0].table.values())
    association.forget()
    assert wire.ends[0].table == {}
    assert association.current is None
    assert not any(session.sending.is_usable for session in sessions)
