"""Run tests against mutants of sealfs, and tell which tests catch them; see tools/mutants.

The sources are copied once; each mutant gets a copy of that copy, is changed there, and its tests
run there with a limit of time, so that nobody's work on the tree disturbs a run, nor the run the
tree. Before the mutants, their tests must pass on the sources as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from mutants import ACCEPTED, DRAWN_TESTS, NAMED, NOT_RUN, Mutant, StaleMutant
from mutants_drawn import FILES, Site, draw, mutated

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("sealfs", "tests", "tools", "pyproject.toml", "README.md", "LICENSE")
IMAGE = Path("sealfs/image")

NAMED_SECONDS_MAX = 300.0
DRAWN_SECONDS_MAX = 900.0
"""A drawn one may have to pass all tests before it is known to survive."""

CAUGHT, SURVIVES, ACCEPTABLE = "caught", "SURVIVES", "accepted"


@dataclass(frozen=True)
class Job:
    """One mutant, ready to be run."""

    name: str
    rule: str
    edits: tuple[tuple[str, str], ...]
    """(path, its new content)."""
    tests: tuple[str, ...]
    seconds_max: float


@dataclass(frozen=True)
class Result:
    """What became of it."""

    name: str
    rule: str
    outcome: str
    by: str
    """The test that caught it; why it is accepted; or how it survived."""
    seconds: float


def snapshot(destination: Path) -> Path:
    """Copy what a test run needs, its compiled files too, which are still right there."""
    ignored = shutil.ignore_patterns(".*", "*.tmp", "guest-cache")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, destination / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy2(ROOT / name, destination / name)
    return destination


def named_jobs(room: Path, mutants: Iterable[Mutant]) -> list[Job]:
    """Prepare named mutants.

    Raises:
        StaleMutant: one does not fit the source any more.
    """
    return [
        Job(
            mutant.name, mutant.rule, tuple(mutant.applied(room).items()), mutant.tests,
            NAMED_SECONDS_MAX,
        )
        for mutant in mutants
    ]  # fmt: skip


def drawn_jobs(room: Path, seed: int, count: int) -> list[Job]:
    """Draw mutants and prepare them."""
    sources = {file: (room / IMAGE / file).read_text() for file in FILES}

    def job(site: Site) -> Job:
        content = mutated(sources[site.file], site)
        path = str(IMAGE / site.file)
        return Job(site.name, "drawn", ((path, content),), DRAWN_TESTS[site.file],
                   DRAWN_SECONDS_MAX)  # fmt: skip

    return [job(site) for site in draw(room / IMAGE, seed, count)]


def run_job(room: Path, job: Job) -> Result:
    """Change a copy of the sources, run the tests there."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy = Path(name) / "tree"
        shutil.copytree(room, copy, symlinks=True)
        for path, content in job.edits:
            (copy / path).write_text(content)
            if path.endswith((".c", ".h")):
                build(copy, path)
        status, output = run_tests(copy, job.tests, job.seconds_max)
    seconds = time.monotonic() - began
    outcome, by = verdict(status, output)
    if outcome == SURVIVES and job.name in ACCEPTED:
        outcome, by = ACCEPTABLE, ACCEPTED[job.name]
    return Result(job.name, job.rule, outcome, by, round(seconds, 1))


def build(tree: Path, source: str) -> None:
    """Compile a C module, or those that include a header, anew, as pyproject.toml says.

    Raises:
        RuntimeError: it does not compile, which is no fault of the tests.
    """
    settings = tomllib.loads((tree / "pyproject.toml").read_text())
    modules = settings["tool"]["setuptools"]["ext-modules"]
    if source.endswith(".h"):
        for each in modules:
            if source in each.get("depends", ()):
                build(tree, *each["sources"])
        return
    (module,) = (each for each in modules if each["sources"] == [source])
    ask = "from sysconfig import *; print(get_path('include'), get_config_var('EXT_SUFFIX'))"
    asked = subprocess.run([python(), "-c", ask], check=True, capture_output=True, text=True)
    include, suffix = asked.stdout.split()
    command = [
        "cc", "-shared", "-fPIC", f"-I{include}", *module["extra-compile-args"], source,
        "-o", str(Path(source).with_suffix("")) + suffix,
        *(f"-l{name}" for name in module.get("libraries", ())),
    ]  # fmt: skip
    built = subprocess.run(command, cwd=tree, check=False, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"{source} does not compile:\n{built.stderr[-2000:]}")


def python() -> str:
    """Return the interpreter that has pytest: the checkout's own, where there is one."""
    own = ROOT / ".venv/bin/python"
    return str(own) if own.exists() else sys.executable


def run_tests(tree: Path, tests: Sequence[str], seconds_max: float) -> tuple[int | None, str]:
    """Return (exit status of pytest or None after the limit, what it printed)."""
    command = [
        python(), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "mutants_alarm",
        "--tb=line", "-k", NOT_RUN, "-m", "not fuse and not tpm and not qemu",
        f"--basetemp={tree.parent / 'tmp'}", *tests,
    ]  # fmt: skip
    path = f"{tree}{os.pathsep}{tree / 'tests'}"
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": path}
    with subprocess.Popen(
        command, cwd=tree, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=seconds_max)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None, ""
        return process.returncode, output


def verdict(status: int | None, output: str) -> tuple[str, str]:
    """Return (outcome, by what) of a run of pytest."""
    if status is None:
        return SURVIVES, "the limit of time"
    if status == 0:
        return SURVIVES, output.strip().splitlines()[-1]
    for line in output.splitlines():
        kind, _, rest = line.partition(" ")
        if kind in ("FAILED", "ERROR"):
            test, _, why = rest.partition(" - ")
            return CAUGHT, f"{test.removeprefix('tests/')} - {why[:120]}"
    if status > 0 and "Hangs" in output:
        return CAUGHT, "a test that hangs"
    if status in (1, 2, 3) or status < 0:
        last = output.strip().splitlines()[-1:] or [""]
        return CAUGHT, f"pytest ended with {status}: {last[0][:120]}"
    raise RuntimeError(f"pytest did not run (exit status {status}):\n{output[-2000:]}")


def check_sources(room: Path, jobs: Sequence[Job], workers: int) -> None:
    """Raise RuntimeError unless all tests pass on the sources as they are."""
    tests = dict.fromkeys(test for job in jobs for test in job.tests)
    parts = [tuple(tests)[at::workers] for at in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        plain = [Job("sources", "", (), part, DRAWN_SECONDS_MAX) for part in parts if part]
        for result in pool.map(lambda job: run_job(room, job), plain):
            if not result.by.split()[:1] or result.outcome != SURVIVES or "passed" not in result.by:
                raise RuntimeError(f"the tests do not pass without a mutant: {result.by}")


def run_all(
    room: Path, jobs: Sequence[Job], workers: int, report: Path | None, seed: int
) -> list[Result]:
    """Run the mutants, print what becomes of each as soon as it is known."""
    results: list[Result] = []
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run_job, room, job) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            result = future.result()
            results.append(result)
            print(
                f"{number:3}/{len(jobs)} {result.outcome:8} {result.seconds:6.1f} s"
                f"  {result.name}  [{result.rule}]\n{'':23} {result.by}",
                flush=True,
            )
            if report is not None:
                content = {"seed": seed, "results": [asdict(each) for each in results]}
                report.write_text(json.dumps(content, indent=1) + "\n")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="tools/mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--named", action="store_true", help="all named mutants (the default)")
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="N drawn ones")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the drawn ones")
    parser.add_argument("--only", metavar="NAME", help="those of this name; * and ? are patterns")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="at the same time")
    parser.add_argument("--unchecked", action="store_true",
                        help="do not run the tests without a mutant first")  # fmt: skip
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    os.nice(10)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        room = snapshot(Path(name))
        try:
            jobs = named_jobs(room, NAMED) if asked.named or not asked.drawn else []
        except StaleMutant as exc:
            print(f"mutants: error: {exc}", file=sys.stderr)
            return 2
        jobs += drawn_jobs(room, asked.seed, asked.drawn)
        if asked.only is not None:
            jobs = [job for job in jobs if asked.only == job.name or fnmatch(job.name, asked.only)]
        if not jobs:
            print("mutants: error: no such mutant", file=sys.stderr)
            return 2
        try:
            if not asked.unchecked:
                check_sources(room, jobs, asked.jobs)
            results = run_all(room, jobs, asked.jobs, asked.json, asked.seed)
        except RuntimeError as exc:
            print(f"mutants: error: {exc}", file=sys.stderr)
            return 2
    counts = [sum(each.outcome == kind for each in results)
              for kind in (CAUGHT, ACCEPTABLE, SURVIVES)]  # fmt: skip
    print(
        f"mutants: {len(results)}, seed {asked.seed}: {counts[0]} caught,"
        f" {counts[1]} accepted survivors, {counts[2]} SURVIVE; {time.monotonic() - began:.0f} s"
    )
    return 1 if counts[2] else 0
