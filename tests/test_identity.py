"""The identity written anew: power cuts at every write, damage to either copy, a running image."""

from __future__ import annotations

import dataclasses
import random

import pytest
from crash_support import (
    GEOMETRY,
    IDENTITY,
    KEY,
    PAGE,
    Lab,
    Oracle,
    Recipe,
    Session,
    create,
    refcheck,
)
from simulation import SimulatedDisk, SimulatedStorage, crash_fates
from test_crash import run

from sealfs.errors import IntegrityError, StorageFailed
from sealfs.image import identity as identities
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.recovery import read_identity

WANTED = dataclasses.replace(
    IDENTITY, wrapped_keys=((1, b"another key's"),), recovery_slots=(b"slot", b"x" * 900)
)
COPIES = tuple(GEOMETRY.identity_offset(copy) for copy in (0, 1))


def fresh() -> SimulatedStorage:
    storage = SimulatedStorage()
    create(storage)
    return storage


def rewrite(storage: SimulatedStorage, wanted: Identity = WANTED) -> Identity:
    return identities.rewrite(storage, wanted, KEY, GEOMETRY)


def opened(disk: SimulatedDisk) -> Identity:
    """The identity an open finds authentic, the same that a look without a key finds."""
    storage = SimulatedStorage(SimulatedDisk.of(disk.durable))
    image = SealedImage.open(
        storage,
        image_key=KEY,
        cache=BlockCache(clean_max=PAGE, dirty_max=PAGE),
        geometry=GEOMETRY,
        read_only=True,
    )
    assert read_identity(storage, GEOMETRY) == image.identity
    image.abandon()
    report = refcheck.check(disk.durable, KEY, GEOMETRY)
    assert not report.errors
    return image.identity


def copies(disk: SimulatedDisk) -> list[bytes]:
    return [bytes(disk.durable[at : at + PAGE]) for at in COPIES]


def test_a_rewrite_changes_both_copies_and_is_done_once():
    storage = fresh()
    assert rewrite(storage) == dataclasses.replace(WANTED, generation=2)
    first, second = copies(storage.disk)
    assert first == second
    assert opened(storage.disk).wrapped_keys == WANTED.wrapped_keys
    assert identities.rewrite_plan(storage, WANTED, KEY, GEOMETRY).plan == []


def test_a_power_cut_at_any_write_leaves_the_old_or_the_new_identity():
    seen = set()
    for longer in (WANTED, dataclasses.replace(WANTED, recovery_slots=(b"y" * 3000,))):
        before = fresh()
        states: list[SimulatedDisk] = []
        rng = random.Random("identity")

        def draw(kind: str, before=before, states=states, rng=rng) -> None:
            for fates in crash_fates(before.disk.pending, rng, full=True, cap=60):
                states.append(before.disk.crash(fates))

        before.on_point = draw
        rewrite(before, longer)
        assert len(states) > 30
        for disk in states:
            found = opened(disk)
            assert found in (IDENTITY, dataclasses.replace(longer, generation=2))
            seen.add(found.generation)
            again = SimulatedStorage(disk)
            assert rewrite(again, longer).generation <= 3
            first, second = copies(disk)
            assert first == second
            assert opened(disk).wrapped_keys == longer.wrapped_keys
    assert seen == {1, 2}


@pytest.mark.parametrize("good", [0, 1])
def test_the_only_good_copy_is_written_last(good):
    storage = fresh()
    disk = storage.disk
    bad = COPIES[1 - good]
    disk.durable[bad + 20 : bad + 600] = disk.cached[bad + 20 : bad + 600] = bytes(580)
    after, plan = identities.rewrite_plan(storage, WANTED, KEY, GEOMETRY)
    assert after.generation == 2
    assert [step[1] for step in plan] == [bad, COPIES[good]]


def test_no_good_copy_is_no_ground_for_a_rewrite():
    storage = fresh()
    with pytest.raises(IntegrityError, match="no copy"):
        identities.rewrite(storage, WANTED, bytes(32), GEOMETRY)
    with pytest.raises(IntegrityError, match="no copy"):
        rewrite(storage, dataclasses.replace(WANTED, uuid=bytes(16)))
    assert not storage.disk.pending


def test_a_forged_identity_of_a_later_generation_is_not_continued():
    storage = fresh()
    forged = dataclasses.replace(WANTED, generation=99).encode_content()
    raw = identities.encode_identity(forged, bytes(32)).ljust(PAGE, b"\0")
    storage.write_durable(COPIES[1], [raw])
    assert rewrite(storage).generation == 2
    assert opened(storage.disk).generation == 2


@pytest.mark.parametrize("stray", [0, 1, None])
def test_an_erased_image_keeps_no_key_in_either_copy(stray):
    storage = fresh()
    rewrite(storage)
    if stray is not None:  # a copy that a crash has left behind
        old = SimulatedStorage(fresh().disk)
        storage.write_durable(COPIES[stray], [old.read(COPIES[0], PAGE)])
    identities.erase(storage, read_identity(storage, GEOMETRY), GEOMETRY)
    for raw in copies(storage.disk):
        assert b"opaque" not in raw
        assert b"another key's" not in raw
        assert b"xxxx" not in raw
    erased = read_identity(storage, GEOMETRY)
    assert (erased.vm_id, erased.wrapped_keys, erased.recovery_slots) == ("vm", (), ())
    with pytest.raises(IntegrityError, match="identity does not authenticate"):
        opened(storage.disk)


@pytest.mark.parametrize("prefix", ["empty", "flushed", "settled", "full"])
def test_content_survives_crashes_around_a_rewrite_in_a_running_image(prefix):
    lab = Lab(seed=7, cap_point=3)
    for letters in ("i", "wi", "ii", "ri"):
        assert run(lab, Recipe(7, prefix, letters))
    assert lab.figures["states"] > 20


@pytest.mark.parametrize("call", [1, 2])
def test_a_failed_rewrite_poisons_the_image_which_opens_again(call):
    lab = Lab()
    session = Session(lab, Recipe(1, "flushed", "bfi"), lab.fresh(), Oracle())
    for letter in "bf":
        session.do(letter)
    session.storage.fail(call)
    with pytest.raises(StorageFailed):
        session.do("i")
    assert session.image.poisoned
    with pytest.raises(StorageFailed, match="opened again"):
        session.image.write(0, bytes(PAGE))
    session.image.abandon()
    session.disk.evict()
    again = lab.reopened(lab.storage(session.disk), session.recipe, "again", session.oracle.memory)
    assert lab.content(again, session.recipe) == session.oracle.latest()
    assert again.identity.generation in (1, 2)
