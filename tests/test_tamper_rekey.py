"""Somebody alters an image that is being rekeyed: the verdicts are those of test_tamper.py."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import test_tamper as tamper
from simulation import SimulatedDisk, SimulatedStorage
from test_tamper import BLOCKS, GEOMETRY, KINDS, PAGE, STRUCTURES, History, State, Verdict

from sealfs.errors import IntegrityError
from sealfs.image import committer, recovery
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity, RekeyPhase
from sealfs.image.image import SealedImage
from sealfs.image.recovery import Witness

KEYS = {1: tamper.KEY, 2: hashlib.sha256(b"the next image key").digest()}
IDENTITY = replace(tamper.IDENTITY, wrapped_keys=((1, b"wrapped"),))
OTHER = replace(tamper.OTHER, wrapped_keys=((1, b"wrapped"),))
TIMES = 24
"""Tampers of one structure in one kind."""
COUNTS = {"refused": 0, "damaged": 0, "right": 0}


def opened(
    storage: SimulatedStorage, *, read_only: bool = False, witness: Witness | None = None
) -> SealedImage:
    """Open as a key service lets one: with the keys that the identity, unverified, names."""
    wrapped = recovery.read_identity(storage, GEOMETRY).wrapped_keys
    return SealedImage.open(
        storage,
        image_key={each: KEYS[each] for each, _ in wrapped if each in KEYS},
        cache=BlockCache(0, 64 * PAGE),
        random=tamper.SALTS.randbytes,
        geometry=GEOMETRY,
        read_only=read_only,
        witness=witness,
    )


@pytest.fixture(autouse=True)
def _two_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tamper, "opened", opened)


@cache
def history(identity: Identity) -> tuple[dict[str, State], list[State]]:
    """Return states in the middle of a rekey and after it, and older snapshots."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committer, "SMALL_COMMIT_BLOCKS", 3)
        patch.setattr(tamper, "opened", opened)
        life = History(identity)
        life.write(*range(8), 12, 13, 22)
        life.checkpoint()
        life.write(*range(24, 28), 30, 31, 38, 23, 16)
        life.checkpoint()
        life.image.begin_rekey(b"wrapped", KEYS[2])
        life.image.rekey_part()
        life.checkpoint()
        while life.image._volume.cursor < 3:
            life.image.rekey_part(3)
        life.image.close()
        half = life.state()
        tamper.locate(half)
        life.reopen()
        life.write(12)
        life.checkpoint()
        journal = State(b"", [])
        steps: tuple[Callable[[], set[int]], ...] = (
            lambda: life.write(1, 30),
            lambda: (life.image.rekey_part(1), set())[1],
            lambda: life.discard(16, 4),
            lambda: life.write(23, 34, 37),
            lambda: life.write(2, 33),
        )
        for step in steps:
            before = list(life.content)
            sequence = life.image.sequence + 1
            changed = step()
            assert life.image.sequence == sequence, "one record for each step"
            journal.before[sequence] = before
            # What was sealed again is at home: with its record gone, it does not open.
            journal.changed[sequence] = changed or set(range(BLOCKS))
        tree = life.image._volume.tree
        for group in tree.groups():
            journal.slots.setdefault(group, set()).add(tree.slot_of(group))
        assert life.image.is_rekeying
        assert life.image._volume.superblock.rekey.phase is RekeyPhase.SWEEPING
        life.image.abandon()
        journal.raw, journal.content = bytes(life.storage.disk.cached), list(life.content)
        tamper.locate(journal)
        snapshots = [*life.snapshots, half]
        life.reopen()
        while not life.image.rekey_part().is_done:
            pass
        life.image.close()
        done = life.state()
        tamper.locate(done)
    return {"half": half, "journal": journal, "done": done}, snapshots


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_tampered_structure_is_noticed_or_does_not_matter(structure: str) -> None:
    states, older = history(IDENTITY)
    others, _ = history(OTHER)
    for kind in KINDS:
        rng = random.Random(f"rekey {structure} {kind}")
        for number in range(TIMES):
            names = ("journal",) if structure.startswith("record") else tuple(states)
            name = names[number % len(names)]
            for _ in range(20):
                raw = tamper.tampered(
                    rng, states[name], structure, kind, others=others[name], older=older
                )
                if raw is not None:
                    right = tamper.verdict(states[name], raw)
                    label = f"{structure}, {kind}, {number}, {name}"
                    COUNTS[tamper.judge(raw, right, label=label)] += 1
                    break


def test_so_many_tampers_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    if not any(COUNTS.values()):
        pytest.skip("counts the tampers of the tests before it")
    with capsys.disabled():
        print(f" {sum(COUNTS.values())} tampers: {COUNTS} ", end="")
    assert sum(COUNTS.values()) >= 2400
    assert min(COUNTS.values()) > 200


def test_the_states_that_are_tampered_with_are_right() -> None:
    for identity in (IDENTITY, OTHER):
        states, older = history(identity)
        for state in (*states.values(), *older):
            right = Verdict(state.content, set())
            assert tamper.judge(bytearray(state.raw), right, label="") == "right"


@pytest.mark.parametrize("name", ["half", "journal", "done"])
@pytest.mark.parametrize("structures", tamper.CLASSES)
def test_a_whole_class_of_structures_of_before_is_noticed(name: str, structures: str) -> None:
    states, older = history(IDENTITY)
    state = states[name]
    for other in older:
        raw = bytearray(state.raw)
        for structure in tamper.CLASSES[structures]:
            for at, size in state.spans[structure]:
                raw[at : at + size] = other.raw[at : at + size].ljust(size, b"\0")
        tamper.judge(raw, tamper.verdict(state, raw), label=f"{name} {structures}")


def test_headers_of_before_the_rekey_do_not_bring_the_old_key_back() -> None:
    states, older = history(IDENTITY)
    raw = bytearray(states["done"].raw)
    first = older[0].raw
    for copy in (0, 1):
        at, size = GEOMETRY.identity_offset(copy), GEOMETRY.identity_pages * PAGE
        raw[at : at + size] = first[at : at + size]
    assert tamper.judge(raw, Verdict([], set(), must_refuse=True), label="identities") == "refused"
    storage = SimulatedStorage(SimulatedDisk.of(raw))
    with pytest.raises(IntegrityError, match="no superblock authenticates"):
        opened(storage)
