"""The mutants fit the source; six quick ones of the day are caught (`tools/mutants` runs all)."""

from __future__ import annotations

import ast
import random
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import pytest
from mutants import ACCEPTED, DRAWN_TESTS, NAMED, Mutant, StaleMutant
from mutants_drawn import FILES, draw, mutated, sites_of
from mutants_run import CAUGHT, ROOT, SURVIVES, named_jobs, run_job, snapshot, verdict

try:
    from sealfs.image import _blockread
    from sealfs.mount import _device
except ImportError:  # not built here: their mutants neither
    _blockread = _device = None  # type: ignore[assignment]

ROOM = ROOT / "sealfs" / "image"
OF_THE_DAY = 6


def sites() -> Iterator[str]:
    for file in FILES:
        yield from (site.name for site in sites_of(file, (ROOM / file).read_text()))


@pytest.mark.parametrize("mutant", NAMED, ids=lambda mutant: mutant.name)
def test_a_named_mutant_fits_the_source(mutant: Mutant) -> None:
    for path, content in mutant.applied(ROOT).items():
        assert content != (ROOT / path).read_text()
        if path.endswith(".py"):
            ast.parse(content)


def test_a_mutant_that_does_not_fit_is_an_error() -> None:
    for old in ("nowhere to be found", "self"):
        with pytest.raises(StaleMutant, match="times in"):
            Mutant("x", "x", NAMED[0].path, ((old, "y"),), ()).applied(ROOT)


def test_names_are_unique_and_rules_and_reasons_stand_at_them() -> None:
    names = [mutant.name for mutant in NAMED]
    assert len(set(names)) == len(names)
    assert all(mutant.rule and mutant.tests for mutant in NAMED)
    assert not set(ACCEPTED) - {*names, *sites()}, "accepted, but not there any more"
    assert all(len(reason) > 20 for reason in ACCEPTED.values())


def test_each_step_of_commit_checkpoint_and_recovery_has_a_mutant() -> None:
    rules = " ".join(f"; {mutant.rule}" for mutant in NAMED)
    told = {
        (section, int(number))
        for section, numbers in re.findall(r"; (8\.2|8\.3|9) steps? (\d+(?: and \d+)*)", rules)
        for number in numbers.split(" and ")
    }
    wanted = {("8.2", 6), ("8.3", 5), ("9", 10)}
    assert told >= {(each, n) for each, last in wanted for n in range(1, last + 1)}


def test_the_tests_that_are_to_catch_them_are_there() -> None:
    named = {test for mutant in NAMED for test in mutant.tests}
    for test in named.union(*DRAWN_TESTS.values()):
        path, _, function = test.partition("::")
        source = (ROOT / path).read_text()
        assert not function or f"def {function}(" in source, test


def test_drawing_is_deterministic_and_every_site_is_a_change(tmp_path: Path) -> None:
    assert draw(ROOM, 7, 50) == draw(ROOM, 7, 50) or [site.name for site in draw(ROOM, 7, 50)] == [
        site.name for site in draw(ROOM, 7, 50)
    ]
    assert len(set(sites())) == len(list(sites())) > 1000
    for site in draw(ROOM, 7, 50):
        source = (ROOM / site.file).read_text()
        content = mutated(source, site)
        assert content != ast.unparse(ast.parse(source)) + "\n", site.name
        compile(content, site.file, "exec")


def test_what_cannot_be_wrong_is_no_site() -> None:
    source = '''
def f(a: int = 1, b: "list[int] | None" = None) -> int:
    """Text."""
    assert a > 0, f"{a + 1}"
    try:
        x: int
        return a + 1
    except (ValueError, KeyError):
        raise TypeError(f"{a - 2} of {3}") from None
'''
    assert [site.name for site in sites_of("x.py", source)] == [
        "x.py f: return a + 1 => return None",
        "x.py f: a + 1 => a - 1",
        "x.py f: 1 => 2",
        "x.py f: 1 => 0",
        "x.py f: raise TypeError(f'{a - 2} of {3}') from None => pass",
    ]


@pytest.mark.parametrize(
    ("status", "output", "outcome", "by"),
    [
        (0, "3 passed in 1 s\n", SURVIVES, "3 passed in 1 s"),
        (None, "", SURVIVES, "the limit of time"),
        (1, "..F\nFAILED tests/a.py::b - assert 1\n1 failed\n", CAUGHT, "a.py::b - assert 1"),
        (2, "ERROR tests/a.py - NameError\n1 error\n", CAUGHT, "a.py - NameError"),
        (-11, "", CAUGHT, "pytest ended with -11: "),
    ],
)
def test_what_pytest_says_is_understood(
    status: int | None, output: str, outcome: str, by: str
) -> None:
    assert verdict(status, output) == (outcome, by)


def test_tests_that_could_not_be_run_have_caught_nothing() -> None:
    for status in (4, 5):
        with pytest.raises(RuntimeError, match="did not run"):
            verdict(status, "no tests ran")


@pytest.mark.slow
def test_six_mutants_of_the_day_are_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    day = date.today().isoformat()
    quick = [mutant for mutant in NAMED if mutant.is_quick and mutant.name not in ACCEPTED]
    if _blockread is None or _device is None or shutil.which("cc") is None:
        quick = [mutant for mutant in quick if not mutant.path.endswith((".c", ".h"))]
    chosen = random.Random(day).sample(quick, OF_THE_DAY)
    room = snapshot(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda job: run_job(room, job), named_jobs(room, chosen)))
    with capsys.disabled():
        print(f"\nmutants of {day}:")
        for each in results:
            print(f"  {each.outcome} in {each.seconds} s: {each.name} ({each.by[:80]})")
    assert [each.name for each in results if each.outcome != CAUGHT] == []
