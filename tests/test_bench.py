"""`sealfs bench` without a mount: the load itself, with fio and without, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sealfs.cli import load
from sealfs.cli.bench import Pair, _document, _row
from sealfs.cli.load import BLOCK, CHUNK, WORKLOADS, Rate
from sealfs.errors import StorageFailed

SIZE = 4 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    return path


@pytest.mark.parametrize("has_fio", [True, False])
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.title)
def test_every_workload_does_something(
    disk: Path, workload: load.Workload, has_fio: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fio:
        monkeypatch.setattr(load, "fio_program", lambda: None)
    elif load.fio_program() is None:
        pytest.skip("needs fio")
    direct = load.takes_direct(disk)
    rate = load.measure(disk, workload, size=SIZE, seconds=0.05, direct=direct)
    assert rate.bytes > 0
    assert rate.operations == pytest.approx(rate.bytes / workload.size)
    assert disk.stat().st_size == SIZE, "it wrote beyond the end"
    assert any(disk.read_bytes()) == workload.is_write


def test_filling_goes_through_the_file_once(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "fio_program", lambda: None)
    assert WORKLOADS[0].fills
    rate = load.measure(disk, WORKLOADS[0], size=SIZE, seconds=60, direct=False)
    assert rate.size == SIZE


def test_without_direct_io_it_works_too(disk: Path) -> None:
    for workload in WORKLOADS:
        rate = load.measure(disk, workload, size=SIZE, seconds=0.02, direct=False)
        assert rate.size > 0


def test_what_fio_says_when_it_fails_is_passed_on(tmp_path: Path) -> None:
    if load.fio_program() is None:
        pytest.skip("needs fio")
    with pytest.raises(StorageFailed, match="fio"):
        load.measure(tmp_path / "none", WORKLOADS[1], size=SIZE, seconds=0.1, direct=False)


def test_rates_are_shown_as_bytes_or_operations() -> None:
    fill, random_read = WORKLOADS[0], WORKLOADS[2]
    pairs = [
        Pair(fill, Rate(400 * CHUNK, 1.0, CHUNK), Rate(100 * CHUNK, 0.5, CHUNK)),
        Pair(random_read, Rate(9000 * BLOCK, 1.0, BLOCK), Rate(6000 * BLOCK, 2.0, BLOCK)),
    ]
    assert _row(pairs[0])[1:] == ("419 MB/s", "210 MB/s", "0.50")
    assert _row(pairs[1])[1:] == ("9,000/s", "3,000/s", "0.33")
    document = _document(Path("dir"), 1 << 20, pairs, ["so"])
    first, second = document["workloads"]
    assert (first["unit"], first["ratio"]) == ("bytes/s", 0.5)
    assert (second["unit"], second["plain"], second["sealed"]) == ("operations/s", 9000, 3000)
