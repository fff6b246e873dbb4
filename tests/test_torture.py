"""The torture's batches repeat, count a state once, and go on where they were ended.

Its live jobs, which do not repeat, do a little here, and notice what they are there to notice.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import soak
import torture_batches
from exerciser_files import BLOCK
from kill_writer import ALL_DURABLE, ENTRY, ONE_DURABLE, PUNCH, WRITE
from kills import Lost, Promises, run_batch
from torture_batches import JOBS, Batch, Progress
from torture_record import ROOT, Record

from sealfs.image import committer


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torture_batches, "STATES_IN_BATCH", 150)
    monkeypatch.setattr(torture_batches, "TAMPERS_IN_BATCH", 150)
    # The batch sets the limit for its whole process; here it is put back.
    monkeypatch.setattr(committer, "SMALL_COMMIT_BLOCKS", committer.SMALL_COMMIT_BLOCKS)
    monkeypatch.setattr(torture_batches, "set_limit", small_commits(monkeypatch))


def small_commits(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    def set_limit(name: str, value: int) -> None:
        from crash_support import set_limit as everywhere

        everywhere(name, value, monkeypatch.setattr)

    return set_limit


@pytest.mark.parametrize("job", ["crash", "tamper"])
def test_a_batch_gives_the_same_digest_again(job: str) -> None:
    run, wanted = JOBS[job]
    first, again, other = run(3), run(3), run(4)
    assert first.digest == again.digest
    assert first.digest != other.digest
    assert len(set(first.keys)) > 75
    assert first.figures[wanted] > 50


def test_what_was_reached_is_kept_and_a_state_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "progress.json"
    progress = Progress(path, "crash")
    batch = Batch(0, keys=[1, 2, 3])
    batch.figures.update(states=3)
    progress.add(batch)
    progress.save()
    again = Progress(path, "crash")
    assert next(again.wanted()) == 1
    again.add(Batch(1, keys=[3, 4]))
    assert again.document["distinct"] == 4
    assert again.document["figures"] == {"states": 3}
    with pytest.raises(SystemExit, match="another job"):
        Progress(path, "tamper")


# Kills.


def journal(*entries: tuple[bytes, int, int, int]) -> bytes:
    return b"".join(ENTRY.pack(*entry) for entry in entries)


def left(promises: Promises, block: int) -> list[int]:
    return [version.number for version in promises.versions[block]]


def test_a_block_is_what_was_acknowledged_last_or_a_later_one() -> None:
    promises = Promises(16)
    first = journal((WRITE, 1, 0, 4), (WRITE, 2, 2, 4), (ALL_DURABLE, 2, 0, 0), (WRITE, 3, 3, 1))
    assert promises.take(first) == {"writes": 3, "syncs": 1}
    assert [left(promises, block) for block in (0, 2, 3, 5, 6)] == [[1], [2], [2, 3], [2], [0]]
    # Of a batch one write is durable; the one before it in the same block is not older news.
    promises.take(journal((PUNCH, 4, 3, 2), (WRITE, 5, 4, 1), (ONE_DURABLE, 5, 0, 0)))
    assert [left(promises, block) for block in (3, 4)] == [[2, 3, 4], [5]]
    stamps = promises.stamps
    found = stamps.make(3, 3 * BLOCK, BLOCK)
    assert promises.adopt(3 * BLOCK, found) == 1
    assert left(promises, 3) == [3]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda stamps: stamps.make(1, 0, BLOCK), "ends with:   operation 1,"),
        (lambda stamps: bytes(BLOCK), "begins with: zeros"),
        (lambda stamps: stamps.make(2, BLOCK, BLOCK), "operation 2, written for 0x1000"),
        (lambda stamps: stamps.make(2, 0, 512) + stamps.make(3, 512, 3584), "is none of the 2"),
    ],
    ids=["what was acknowledged is lost", "zeros", "moved", "torn"],
)
def test_a_block_that_nobody_may_have_left_is_noticed(
    content: Callable[[object], bytes], words: str
) -> None:
    promises = Promises(16)
    writes = ((WRITE, 1, 0, 1), (WRITE, 2, 0, 1), (ALL_DURABLE, 2, 0, 0), (WRITE, 3, 0, 1))
    promises.take(journal(*writes))
    with pytest.raises(Lost, match=words):
        promises.adopt(0, content(promises.stamps))


needs_mount = pytest.mark.skipif(
    not os.path.exists("/dev/fuse") or os.geteuid() != 0, reason="needs /dev/fuse and root"
)


@pytest.mark.fuse
@pytest.mark.tpm
@pytest.mark.slow
@needs_mount
def test_three_kills_lose_nothing_and_are_on_record(tmp_path: Path) -> None:
    record = Record(tmp_path / "kills.json", "kills", seed=2)
    run_batch(record, 2, 0, 3, tmp_path)
    record.save()
    kept = Record(tmp_path / "kills.json", "kills", seed=2)
    assert kept.document["batches"]["0"]["failure"] is None
    assert kept.document["figures"]["kills"] == 3
    assert next(kept.wanted()) == 1


@pytest.mark.fuse
@pytest.mark.tpm
@pytest.mark.slow
@needs_mount
def test_a_short_soak_leaves_all_as_it_was(tmp_path: Path) -> None:
    document = soak.soak(tmp_path, seed=1, seconds=20)
    assert document["failures"] == [], document
    assert len(document["resident_kib"]) == 10
    done = document["operations"]
    assert all(done[name] for name in ("fio on a disk", "writers", "resize", "check", "verbs"))


@pytest.mark.parametrize("job", ["kills", "soak", "tamper"])
def test_a_job_says_what_it_takes(job: str) -> None:
    done = subprocess.run(
        [ROOT / "tools" / "torture", job, "--help"], capture_output=True, text=True, check=True
    )
    assert "--summary" in done.stdout
