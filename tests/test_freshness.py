"""How far back an attacker can turn an image, measured on a live mount.

Snapshots are taken while a writer works; the daemon is killed; each snapshot is put back and
opened as a mount would. Once with the images alone, once with the state directory too (all but
the counter, which is the TPM's).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from mount_support import Mounted, TinyKeys, mounted, open_offline, seal_new, wait_for

from sealfs.errors import ForeignImage, RolledBack, TpmUnavailable
from sealfs.mount.driver import BUMP_INTERVAL, NOTE_INTERVAL, Disks
from sealfs.mount.failures import Failures
from sealfs.mount.workers import Workers

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(
        not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
    ),
]

SNAPSHOTS_MIN = 4
BUSY = 1.5
"""Seconds that a loaded machine may add to an interval."""


@dataclass
class Snapshot:
    """What an attacker has kept."""

    taken: float
    value: bytes
    image: Path
    state: Path


class Victim:
    """One image under a mount, a writer, and copies of everything."""

    def __init__(self, directory: Path, options: str) -> None:
        self.directory = directory
        self.source, self.state = directory / "source", directory / "state"
        self.source.mkdir()
        self.sealed = self.source / "vm.raw.sealed"
        seal_new(self.state, self.sealed, vm_id="vm", size=1 << 20)
        self.options = options
        self.snapshots: list[Snapshot] = []

    def mounted(self) -> contextlib.AbstractContextManager[Mounted]:
        return mounted(self.source, self.directory / "mnt", options=self.options)

    def work(self, mount: Mounted, seconds: float, pause: float) -> None:
        """Write and flush a number again and again; copy everything after each."""
        fd = os.open(mount.mountpoint / "vm.raw", os.O_RDWR)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end or len(self.snapshots) < SNAPSHOTS_MIN:
                value = b"%08d" % len(self.snapshots)
                os.pwrite(fd, value, 0)
                os.fsync(fd)
                self.keep(value)
                time.sleep(pause)
        finally:
            os.close(fd)

    def keep(self, value: bytes) -> None:
        number = len(self.snapshots)
        image, state = self.directory / f"image-{number}", self.directory / f"state-{number}"
        taken = time.monotonic()
        shutil.copy(self.sealed, image)
        shutil.copytree(self.state, state)
        self.snapshots.append(Snapshot(taken, value, image, state))

    def accepts(self, snapshot: Snapshot, *, with_state: bool) -> bool:
        """Put a snapshot back and open it; whatever opens shows the snapshot's value."""
        place = self.directory / "replay"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(snapshot.state if with_state else self.state, place)
        shutil.copy(self.state / "counter", place)
        kept = self.sealed.read_bytes()
        shutil.copy(snapshot.image, self.sealed)
        try:
            image = open_offline(place, self.sealed)
        except (RolledBack, ForeignImage):
            return False
        else:
            assert image.read(0, 8) == snapshot.value
            image.abandon()
            return True
        finally:
            self.sealed.write_bytes(kept)

    def window(self, killed: float, *, with_state: bool) -> float:
        """Return the age of the oldest snapshot that still opens."""
        found = [self.accepts(each, with_state=with_state) for each in self.snapshots]
        assert found[-1], "what is there is accepted"
        assert found == sorted(found), "the oldest are refused, not others"
        return killed - self.snapshots[found.index(True)].taken


def killed_at_work(victim: Victim, seconds: float, pause: float) -> float:
    with victim.mounted() as mount:
        victim.work(mount, seconds, pause)
        killed = time.monotonic()
        mount.kill()
    victim.keep(victim.snapshots[-1].value)
    return killed


def test_with_the_images_alone_one_second_can_be_turned_back(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "")
    killed = killed_at_work(victim, 4.5, 0.25)
    window = victim.window(killed, with_state=False)
    print(f"\nimages alone, noted each {NOTE_INTERVAL} s: {window:.2f} s")
    assert window <= NOTE_INTERVAL + BUSY


def test_with_freshness_flush_nothing_that_was_flushed_can_be_turned_back(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "freshness=flush")
    killed_at_work(victim, 0.5, 0.02)
    accepted = [victim.accepts(each, with_state=False) for each in victim.snapshots]
    # The last was copied twice: before the daemon died, and after.
    assert accepted == [False] * (len(accepted) - 2) + [True, True]


def test_with_the_state_directory_too_the_bump_interval_can_be_turned_back(
    tmp_path: Path,
) -> None:
    victim = Victim(tmp_path, "bump=1")
    killed = killed_at_work(victim, 5.0, 0.2)
    window = victim.window(killed, with_state=True)
    print(f"\nimages and state directory, bump each 1 s: {window:.2f} s")
    # A bump is tried at a note; two of each may lie between.
    assert window <= 1 + NOTE_INTERVAL + BUSY
    assert BUMP_INTERVAL >= 600, "a TPM's counter wears out"


def test_a_bump_that_fails_is_tried_again() -> None:
    answers = [TpmUnavailable("tpm", "does not answer"), None]
    bumps = 0

    def bump() -> None:
        nonlocal bumps
        bumps += 1
        answer = answers.pop(0)
        if answer is not None:
            raise answer

    async def main() -> None:
        workers = Workers(1)
        opener: Any = SimpleNamespace(bump=bump)
        cache: Any = SimpleNamespace(dirty_max=1 << 20)
        disks = Disks(opener=opener, workers=workers, cache=cache, failures=Failures())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.collect)
            disks._has_noted = True
            for _ in range(4):
                await disks._bump()
            nursery.cancel_scope.cancel()
        workers.close()

    trio.run(main)
    assert bumps == 2, "once in vain, once more, and not again"


def test_after_a_clean_end_nothing_can_be_turned_back(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "")
    with victim.mounted() as mount:
        victim.work(mount, 0.5, 0.1)
        mount.unmount()
    victim.keep(victim.snapshots[-1].value)
    for snapshot in victim.snapshots[:-2]:
        assert not victim.accepts(snapshot, with_state=False)
        assert not victim.accepts(snapshot, with_state=True)
    assert victim.accepts(victim.snapshots[-1], with_state=True)


def test_a_mount_refuses_what_is_older_and_serves_the_others(tmp_path: Path) -> None:
    victim = Victim(tmp_path, "")
    seal_new(victim.state, victim.source / "other.sealed", vm_id="other", size=4096)
    with victim.mounted() as mount:
        victim.work(mount, 0.2, 0.1)
        mount.unmount()
    shutil.copy(victim.snapshots[0].image, victim.sealed)
    before = victim.sealed.read_bytes()
    with victim.mounted() as mount:
        with pytest.raises(OSError, match="Stale"):
            (mount.mountpoint / "vm.raw").read_bytes()
        assert (mount.mountpoint / "other").read_bytes() == bytes(4096)
        assert "RolledBack: is at change" in mount.log_text()
    assert victim.sealed.read_bytes() == before, "what is refused is not written"


def test_a_fork_is_refused_though_it_is_newer(tmp_path: Path) -> None:
    """An older copy is used on a host whose state directory was restored, then comes back here."""
    victim = Victim(tmp_path, "freshness=flush")
    with victim.mounted() as mount:
        victim.work(mount, 0.3, 0.1)
        mount.unmount()
    early = victim.snapshots[0]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(early.state, elsewhere)
    present = victim.sealed.read_bytes()
    shutil.copy(early.image, victim.sealed)
    TinyKeys(elsewhere).ledger.rebase()
    image = open_offline(elsewhere, victim.sealed)
    for number in range(40):
        image.write(0, b"%08d" % number)
        image.flush()
    image.close()
    with pytest.raises(RolledBack, match="does not continue"):
        open_offline(victim.state, victim.sealed)
    victim.sealed.write_bytes(present)
    open_offline(victim.state, victim.sealed).abandon()


@pytest.mark.parametrize("freshness", ["interval", "flush"])
def test_a_ledger_that_cannot_be_written_harms_no_disk(tmp_path: Path, freshness: str) -> None:
    victim = Victim(tmp_path, f"freshness={freshness},commit=0.2")
    with victim.mounted() as mount:
        fd = os.open(mount.mountpoint / "vm.raw", os.O_RDWR)
        os.pwrite(fd, b"before", 0)
        os.fsync(fd)
        ledger = victim.state / "ledger"
        kept = ledger.read_bytes()
        ledger.unlink()
        os.pwrite(fd, b"during", 0)
        if freshness == "flush":
            # What was promised cannot be kept: the flush fails, and can be tried again.
            with pytest.raises(OSError, match="Permission denied"):
                os.fsync(fd)
        else:
            os.fsync(fd)
            wait_for(lambda: "ledger is gone" in mount.log_text(), "it is said in the log")
        assert mount.log_text().count("ledger is gone") <= 2
        ledger.write_bytes(kept)
        os.pwrite(fd, b"after!", 0)
        os.fsync(fd)
        assert os.pread(fd, 6, 0) == b"after!"
        os.close(fd)
        keys: Any = TinyKeys(victim.state)
        uuid = keys.registry.lookup(victim.sealed).image_uuid
        sequence = mount.status()["images"][0]["sequence"]
        wait_for(lambda: keys.ledger.find(uuid).sequence == sequence, "it is noted again")
        mount.kill()
    image = open_offline(victim.state, victim.sealed)
    assert image.read(0, 6) == b"after!"
    assert image.progress.sequence == sequence
    image.abandon()
