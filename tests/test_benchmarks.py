"""The benchmarks' own rules: rows and their jobs, judging, and one tiny run of the real thing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from growth import CURVES, Point, excess, percentiles, table, verdicts
from rows import BEST, ROWS, SIDES, Goal, Row, best_peer, judge, reached

ROOT = Path(__file__).resolve().parent.parent

READ = Row("read", "a read", "iops", (Goal(2.0, BEST), Goal(0.5, "plain")), (Goal(3.0, BEST),))
CPU = Row("cpu", "CPU", "cpu", (Goal(1.0, "gocryptfs"),), (Goal(2.0, "gocryptfs"),))


def test_every_row_has_its_job_and_known_references() -> None:
    jobs = {path.stem for path in (ROOT / "benchmarks" / "jobs").glob("*.fio")}
    assert {row.job_name for row in ROWS} | {"fill", "fill-quarters"} == jobs
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert {goal.against for goal in (*row.must, *row.stretch)} <= {*SIDES, BEST}


def test_rows_with_emptied_caches_come_last() -> None:
    cold = [row.is_cold for row in ROWS]
    assert cold == sorted(cold), "the rows behind one would meet a cold page cache"


def test_a_write_row_counts_its_last_fsync() -> None:
    for path in (ROOT / "benchmarks" / "jobs").glob("*.fio"):
        lines = path.read_text().splitlines()
        if not any(line in ("rw=read", "rw=randread") for line in lines) and "fsync=1" not in lines:
            assert "end_fsync=1" in lines, path


def test_no_run_meets_the_blocks_that_the_one_before_left_in_a_cache() -> None:
    for path in (ROOT / "benchmarks" / "jobs").glob("*.fio"):
        text = path.read_text()
        if "rw=rand" in text:
            # fio ignores the seed while randrepeat, its default, is on.
            assert "randrepeat=0\nrandseed=${SEED}\n" in text, path


def test_the_best_peer_encrypts() -> None:
    runs = {"gocryptfs": [3.0, 1.0, 2.0], "luks": [2.5], "plain": [90.0], "null": [99.0]}
    assert best_peer(READ, runs) == "luks"
    assert best_peer(CPU, runs) == "gocryptfs"
    assert best_peer(READ, {"plain": [1.0]}) is None


def test_ratios_are_of_medians_and_the_worst_pair_is_told() -> None:
    runs = {"sealfs": [10.0, 30.0, 20.0], "luks": [5.0, 20.0, 10.0]}
    found = judge(READ, READ.must[0], runs)
    assert (found.side, found.ratio, found.worst) == ("luks", 2.0, 1.5)
    assert found.verdict == "yes"


def test_of_cpu_fewer_is_better() -> None:
    runs = {"sealfs": [1.0], "gocryptfs": [1.5]}
    assert judge(CPU, CPU.must[0], runs).ratio == 1.5
    assert (reached(CPU, CPU.must, runs), reached(CPU, CPU.stretch, runs)) == ("yes", "no")


def test_what_was_not_measured_is_not_called_reached() -> None:
    runs = {"sealfs": [10.0], "luks": [1.0]}
    assert reached(READ, READ.must, runs) == "not judged"
    assert reached(READ, READ.must, runs | {"plain": [100.0]}) == "no"
    assert reached(READ, READ.must, runs | {"plain": [10.0]}) == "yes"
    assert reached(READ, READ.must, {}) == "not judged"


def points(*values: tuple[float, float]) -> list[Point]:
    return [Point(used, used, {"open, s": cost}) for used, cost in values]


def test_growth_is_compared_with_what_is_in_use() -> None:
    assert excess(points((1, 0.1), (10, 0.1)), "open, s") == (1.0, 1.0)
    assert excess(points((1, 0.1), (10, 0.5)), "open, s") == (1.0, 5.0)
    assert excess(points((1, 0.1), (10, 3.0)), "open, s") == pytest.approx((3.0, 30.0))
    # The worst point counts, not the last one.
    assert excess(points((1, 0.1), (2, 1.0), (10, 1.0)), "open, s")[0] == pytest.approx(5.0)


def test_the_verdict_names_what_outgrows() -> None:
    size = CURVES["size"]
    assert verdicts(size, points((1, 0.1), (10, 0.15)))[0].startswith("open, s: x1.50: flat beside")
    assert verdicts(size, points((1, 0.1), (10, 0.5)))[0].startswith("open, s: x5.00: within")
    assert verdicts(size, points((1, 0.1), (10, 0.5)))[-1].endswith(
        "nothing outgrows the bytes on the storage"
    )
    assert verdicts(size, points((1, 0.1), (2, 9.0)))[-1].endswith("outgrown by open, s")
    assert "not judged" in verdicts(size, points((1, 0.1)))[0]
    assert table(size, points((1, 0.1), (2, 9.0)))[-1] == "| open, s | 0.1 | 9 |"


def test_percentiles_are_of_what_came() -> None:
    found = percentiles({"read": [i / 1000 for i in range(1000)], "write": []})
    assert found == {"read p50, ms": 500.0, "read p99, ms": 990.0, "read p99.9, ms": 999.0}


@pytest.mark.fuse
@pytest.mark.tpm
def test_a_tiny_run_writes_everything_down(tmp_path: Path) -> None:
    command = [ROOT / "benchmarks" / "run", "--size", "16M", "--seconds", "0.2", "--pairs", "1"]
    rows = ["--rows", "randread-1", "fsync-1", "--peers", "plain"]
    places = ["--out", tmp_path / "out", "--scratch", tmp_path, "--name", "tiny"]
    done = subprocess.run([*command, *rows, *places], timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "tiny.json").read_text())
    for job in ("randread-1", "fsync-1"):
        assert found["runs"][job]["sealfs"][0]["iops"] > 0
        assert found["runs"][job]["plain"][0]["iops"] > 0
    text = (tmp_path / "out" / "tiny.md").read_text()
    assert "gocryptfs: not measured: not asked for" in text
    assert text.count("not judged") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "something was left behind"
