"""The ledger: what it refuses, what a crash leaves of it, and its counter rule, exhaustively.

The model at the end drives the real class over a simulated directory and counter: every order of
the operations of two processes, each cut short before any of its steps, and an attacker who puts
any file back that was ever there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sealfs.errors import FormatError, KeyRecordDamaged, RolledBack
from sealfs.keys import ledger as ledger_module
from sealfs.keys.ledger import Ledger, LedgerFile, Progress, new
from sealfs.keys.statedir import LEDGER_FILE, HeldLock, StateDir

KEY = b"k" * 32
HOST = b"h" * 16
A, B = b"a" * 16, b"b" * 16


def at(sequence: int, fork: int = 0) -> Progress:
    return Progress(sequence, bytes([fork]) * 16)


@contextlib.contextmanager
def lend(info: bytes) -> Iterator[bytearray]:
    yield bytearray(KEY)


class Count:
    def __init__(self, value: int = 7) -> None:
        self.value = value

    def read(self, held: HeldLock) -> int:
        return self.value

    def increment(self, held: HeldLock) -> None:
        self.value += 1


class Place:
    """A state directory with a ledger and a counter; processes come and go."""

    def __init__(self, path: Path) -> None:
        self.path = path / LEDGER_FILE
        self.state = StateDir.create(path)
        self.counter = Count()
        with self.state.lock() as held:
            self.state.write(LEDGER_FILE, new(HOST, self.counter.value, {}, KEY), held)

    def process(self) -> Ledger:
        return Ledger(self.state, HOST, counter=self.counter, subkey=lend, subject="ledger")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "state")


def test_what_was_noted_is_found_by_every_process(place: Place) -> None:
    first, second = place.process(), place.process()
    assert first.find(A) is None
    first.begin()
    first.note({A: at(1), B: at(5)})
    second.begin()
    second.note({A: at(2)})
    first.note({A: at(3)})
    second.note({A: at(1)})  # what is known to be further on stays so
    for ledger in (first, second, place.process()):
        assert ledger.find(A) == at(3)
        assert ledger.find(B) == at(5)
    first.begin()
    assert place.counter.value == 11  # two for each process that began
    first.bump()
    assert place.counter.value == 13
    assert second.find(A) == at(3)


def test_noting_nothing_new_writes_nothing(place: Place) -> None:
    ledger = place.process()
    ledger.note({A: at(3)})
    before = place.path.stat()
    ledger.note({A: at(3)})
    ledger.note({A: at(2)})
    ledger.note({})
    after = place.path.stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)


def test_an_image_is_forgotten_or_accepted_at_an_older_state(place: Place) -> None:
    ledger = place.process()
    ledger.note({A: at(9), B: at(1)})
    ledger.accept(A, at(4))
    assert ledger.find(A) == at(4)
    ledger.accept(A, None)
    assert ledger.find(A) is None
    assert ledger.find(B) == at(1)


def test_a_row_cut_anywhere_leaves_what_was_there_before(place: Place) -> None:
    ledger = place.process()
    ledger.note({A: at(1)})
    before = place.path.read_bytes()
    ledger.note({A: at(2), B: at(1)})
    after = place.path.read_bytes()
    assert after.startswith(before)
    for size in range(len(before), len(after)):
        place.path.write_bytes(after[:size])
        assert place.process().find(A) == at(1)
        place.process().note({A: at(3)})  # over the rest, and found again
        assert place.process().find(A) == at(3)
        assert place.process().find(B) is None


def test_every_flipped_bit_is_damage_or_the_end(place: Place) -> None:
    ledger = place.process()
    ledger.accept(A, at(1))
    base = len(place.path.read_bytes())
    ledger.note({A: at(2)})
    ledger.note({A: at(3)})
    good = place.path.read_bytes()
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        place.path.write_bytes(raw)
        if bit // 8 < base:
            with pytest.raises((KeyRecordDamaged, FormatError)):
                place.process().find(A)
        else:
            # A row that does not chain is an end: an older state, never another one.
            assert place.process().find(A) in (at(1), at(2))


def test_a_removed_foreign_or_emptied_ledger_is_refused(place: Place, tmp_path: Path) -> None:
    good = place.path.read_bytes()
    place.path.unlink()
    with pytest.raises(KeyRecordDamaged, match="it was removed"):
        place.process().find(A)
    with pytest.raises(KeyRecordDamaged, match="it was removed"):
        place.process().note({A: at(1)})
    for raw in (b"", good[:20], b"rubbish" * 20, good[:-1]):
        place.path.write_bytes(raw)
        with pytest.raises((KeyRecordDamaged, FormatError)):
            place.process().begin()
    place.path.write_bytes(new(B, place.counter.value, {}, KEY))
    with pytest.raises(KeyRecordDamaged, match="another host"):
        place.process().find(A)
    place.path.write_bytes(good[:8] + b"\0\2" + good[10:])
    with pytest.raises(FormatError, match="version 2"):
        place.process().find(A)


def test_an_older_ledger_is_refused_and_can_be_accepted(place: Place) -> None:
    ledger = place.process()
    ledger.begin()
    ledger.note({A: at(1)})
    old = place.path.read_bytes()
    ledger.bump()
    ledger.note({A: at(2)})
    place.path.write_bytes(old)
    for action in (lambda: place.process().find(A), place.process().begin, ledger.bump):
        with pytest.raises(RolledBack, match="restored from a backup"):
            action()
    assert place.process().rebase()
    assert place.process().find(A) == at(1)
    assert ledger.find(A) == at(1)
    for lost in (b"", old[:30], new(B, 99, {}, KEY), None):
        place.path.unlink() if lost is None else place.path.write_bytes(lost)
        assert not place.process().rebase()
        assert place.process().find(A) is None
        ledger.begin()


def test_a_counter_behind_is_another_tpm(place: Place) -> None:
    place.process().begin()
    place.counter.value -= 3
    with pytest.raises(KeyRecordDamaged, match="ahead of the TPM's counter"):
        place.process().begin()


def test_the_file_is_written_anew_when_it_has_grown(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "COMPACT_SIZE", 500)
    ledger = place.process()
    sizes = []
    for sequence in range(1, 60):
        ledger.note({A: at(sequence), B: at(2 * sequence)})
        sizes.append(place.path.stat().st_size)
        assert place.process().find(B) == at(2 * sequence)
    assert max(sizes) < 1000
    assert sum(a > b for a, b in itertools.pairwise(sizes)) > 5


def test_more_images_than_can_be_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "ENTRY_COUNT_MAX", 3)
    ledger = place.process()
    ledger.note({bytes([n]) * 16: at(1) for n in range(3)})
    with pytest.raises(Exception, match="3 images at most"):
        ledger.note({A: at(1)})
    with pytest.raises(Exception, match="3 images at most"):
        ledger.accept(A, at(1))


# The model


class Crash(Exception):
    pass


class World:
    """Everything outside the processes, small enough to be copied and compared.

    `budget` is how many steps the running operation may take before its process dies.
    """

    def __init__(self, value: int, file: bytes, budget: int) -> None:
        self.value = value
        self.file = file
        self.budget = budget
        self.written: list[bytes] = []

    def step(self) -> None:
        if self.budget == 0:
            raise Crash
        self.budget -= 1

    # the counter

    def increment(self, held: HeldLock) -> None:
        self.step()
        self.value += 1

    # the directory, and the counter's `read`

    def read(self, *arguments: Any) -> Any:
        return self.value if len(arguments) == 1 else self.file

    @contextlib.contextmanager
    def lock(self) -> Iterator[HeldLock]:
        yield HeldLock(0)

    def write(self, name: str, content: bytes, held: HeldLock) -> None:
        self.step()
        self.file = content
        self.written.append(content)

    def append(self, name: str, offset: int, content: bytes, held: HeldLock) -> None:
        self.write(name, self.file[:offset] + content, held)


def noted(file: bytes) -> int:
    progress = LedgerFile.decode(file, KEY, "model").images.get(A)
    return progress.sequence if progress else 0


class State(NamedTuple):
    counter: int
    file: bytes
    files: frozenset[bytes]  # every file there ever was: the attacker kept copies
    promised: int  # what was noted when the last `begin` or `bump` ended
    begun: tuple[bool, bool]  # which of the two processes runs
    is_attacked: bool


def explore(depth: int, notes_max: int, ledger_class: type[Ledger] = Ledger) -> tuple[int, str]:
    """Return how many states there are, and what is wrong in the first that is; empty if none."""
    first = new(HOST, 1, {}, KEY)
    start = State(1, first, frozenset((first,)), 0, (False, False), False)
    seen, front = {start}, {start}
    for _ in range(depth):
        following: set[State] = set()
        for state in front:
            for after, problem in successors(state, notes_max, ledger_class):
                if problem:
                    return len(seen), problem
                following.add(after)
        front = following - seen
        seen |= front
    return len(seen), ""


def successors(
    state: State, notes_max: int, ledger_class: type[Ledger]
) -> Iterator[tuple[State, str]]:
    for who in (0, 1):
        for act in ("note", "bump") if state.begun[who] else ("begin",):
            if act == "note" and noted(state.file) >= notes_max:
                continue
            # Dying before the first step, the second...; then not at all.
            for budget in itertools.count():
                after, is_alive, problem = attempt(state, who, act, budget, ledger_class)
                yield after, problem
                if is_alive:
                    break
    if not any(state.begun):
        for old in state.files - {state.file}:
            yield state._replace(file=old, is_attacked=True), ""


def attempt(
    state: State, who: int, act: str, budget: int, ledger_class: type[Ledger]
) -> tuple[State, bool, str]:
    """Return the state after an operation, whether its process lives, and what is wrong."""
    world = World(state.counter, state.file, budget)
    ledger = ledger_class(world, HOST, counter=world, subkey=lend, subject="model")
    ledger._has_begun = state.begun[who]
    promised, is_alive, problem = state.promised, True, ""
    try:
        if act == "note":
            ledger.note({A: at(noted(state.file) + 1)})
        else:
            getattr(ledger, act)()
            if noted(state.file) < promised:
                problem = f"{act} took a ledger that knows {noted(state.file)} of {promised}"
            promised = max(promised, noted(world.file))
    except Crash:
        is_alive = False
    except (RolledBack, KeyRecordDamaged) as exc:
        if not state.is_attacked:
            problem = f"honest {act} refused: {exc}"
    begun = list(state.begun)
    begun[who] = is_alive and ledger._has_begun
    files = state.files | set(world.written)
    after = State(world.value, world.file, files, promised, (begun[0], begun[1]), state.is_attacked)
    return after, is_alive, problem


class OneValue(Ledger):
    """One increment: a dead process may have left another file of that value."""

    def _bump(self) -> None:
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            if self._check_value(found, held):
                self._counter.increment(held)
            self._rewrite(dataclasses.replace(found, value=found.value + 1), mac_key, held)
            self._counter.increment(held)


class WithoutBurn(Ledger):
    """The obvious rule: begin by checking alone, bump when there is something to bind."""

    def begin(self) -> None:
        with self._used() as (mac_key, held):
            if self._check_value(self._read(mac_key), held):
                self._counter.increment(held)
        self._has_begun = True


class CounterFirst(Ledger):
    def _bump(self) -> None:
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            if self._check_value(found, held):
                self._counter.increment(held)
            self._counter.increment(held)
            self._rewrite(dataclasses.replace(found, value=found.value + 1), mac_key, held)


class Forgiving(Ledger):
    def _check_value(self, found: LedgerFile, held: HeldLock) -> bool:
        value = self._counter.read(held)
        return found.value > value


def test_no_order_of_operations_crashes_and_replays_breaks_a_promise() -> None:
    count, problem = explore(depth=9, notes_max=3)
    assert problem == ""
    assert count > 10_000


@pytest.mark.parametrize("wrong", [OneValue, WithoutBurn, CounterFirst, Forgiving])
def test_the_model_finds_a_wrong_rule(wrong: type[Ledger]) -> None:
    _, problem = explore(depth=11, notes_max=3, ledger_class=wrong)
    assert problem
