"""The torture's batches repeat, count a state once, and go on where they were ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torture_batches
from torture_batches import JOBS, Batch, Progress

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


@pytest.mark.parametrize("job", JOBS)
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
