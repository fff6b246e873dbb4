"""Every command and every error path as a transcript: tests/cli/*.txt.

A transcript holds what a user types and sees: `$` a command for bash, `| ` a line of its stdout,
`! ` a line of its stderr, `= ` its exit code where that is not 0, `#` a remark. Each runs in an
empty directory, as root, with a host that was initialised with the embedded software TPM
(`state/`, its recovery key in `recovery.key`), unless it says `# fresh host`. What differs from run
to run (paths, times, identifiers) is replaced by a word.

    python -m tests.test_cli --update [NAME...]     writes what the commands say now
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRANSCRIPTS = Path(__file__).parent / "cli"
BINARIES = Path(sys.executable).parent
COMMAND_WAIT = 60.0
STACKS_WAIT = 1.0
FRESH = "# fresh host"

NORMAL = (
    (re.compile(r"\b[cbdefghijklnrtuv]{8}(-[cbdefghijklnrtuv]{8}){8}\b"), "RECOVERY-KEY"),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{4}(-[0-9a-f]{4}){7}\b"), "FINGERPRINT"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "HEX"),
    (re.compile(r"recovery [0-9a-f]{8}\b"), "recovery ID"),
    (re.compile(r"signed by [0-9a-f]{8}\b"), "signed by ID"),
    (re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\+00:00)?"), "TIME"),
    (re.compile(r"\(\d+\)"), "(PID)"),
    (re.compile(r"/proc/\d+/"), "/proc/PID/"),
    (re.compile(r"   +"), "  "),
    # What a file takes on the storage is the file system's business.
    (re.compile(r"(allocated\"?:?  ?)[\d.]+[KMGT]?"), r"\1N"),
    (re.compile(r"  [\d.]+[KMGT]?  (?=clean|in use|needs|damaged|unreadable)"), "  N  "),
)


@cache
def prepared_host() -> Path:
    """Return a directory with an initialised host; transcripts work on copies of it."""
    directory = Path(tempfile.mkdtemp(prefix="sealfs-cli-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    done = subprocess.run(
        [BINARIES / "sealfs", "--state", directory / "state", "--json", "init", "--tpm", "swtpm"],
        check=True,
        capture_output=True,
        text=True,
    )
    (directory / "recovery.key").write_text(json.loads(done.stdout)["recovery_key"])
    return directory


def environment(stacks: str | Path = "") -> dict[str, str]:
    return {
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        "HOME": "/nonexistent",
        "LC_ALL": "C.UTF-8",
        "SEALFS_STATE": "state",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/stacks'}",
        "SEALFS_STACKS": str(stacks),
        "KEEP": str(TRANSCRIPTS / "keep"),
        "EDIT": f"{sys.executable} -m tests.cli.edit",
    }


def replay(text: str, directory: Path) -> str:
    """Run the commands of a transcript and return it as it reads now."""
    if FRESH not in text.splitlines():
        shutil.copytree(prepared_host(), directory, dirs_exist_ok=True)
    lines = []
    # One for all lines: the daemon that a line waits for may have been started by another.
    with tempfile.TemporaryDirectory(prefix="sealfs-stacks-") as stacks:
        for line in text.splitlines():
            if line.startswith(("#", "$")) or not line.strip():
                lines.append(line)
            if line.startswith("$ "):
                lines += run(line[2:], directory, Path(stacks))
    return "\n".join(lines) + "\n"


def run(command: str, directory: Path, stacks: Path) -> list[str]:
    try:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=directory,
            env=environment(stacks),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_WAIT,
        )
    except subprocess.TimeoutExpired as exc:
        found = f"{exc.stdout!r}, {exc.stderr!r}\n{standing(stacks)}"
        raise AssertionError(f"{command}: hangs; so far it said {found}") from None
    lines = [f"| {normal(line, directory)}" for line in done.stdout.splitlines()]
    lines += [f"! {normal(line, directory)}" for line in done.stderr.splitlines()]
    if done.returncode:
        lines.append(f"= {done.returncode}")
    return [line.rstrip() for line in lines]


def standing(stacks: Path) -> str:
    """Say where each process is that a command started and that has not ended."""
    there = [path for path in stacks.iterdir() if Path("/proc", path.name).exists()]
    for path in there:
        os.kill(int(path.name), signal.SIGUSR1)
    time.sleep(STACKS_WAIT)
    found = []
    for path in there:
        process = Path("/proc", path.name)
        found.append((process / "cmdline").read_text().replace("\0", " "))
        waits = [(task / "stack").read_text() for task in (process / "task").iterdir()]
        found += [f"{count} threads:\n{wait}" for wait, count in Counter(waits).items()]
        found.append(path.read_text())
    return "\n".join(found)


def normal(line: str, directory: Path) -> str:
    line = line.replace(os.path.realpath(directory), "WORK")
    for pattern, word in NORMAL:
        line = pattern.sub(word, line)
    return line


def unmount_all(directory: Path) -> list[str]:
    """Unmount whatever is mounted below a directory; return what was."""
    prefix = os.path.realpath(directory) + "/"
    found = [
        line.split(" ")[4]
        # Not splitlines: a mount point of another test may hold any other line break.
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").rstrip().split("\n")
        if line.split(" ")[4].startswith(prefix)
    ]
    for mountpoint in reversed(found):
        subprocess.run(["umount", "-l", mountpoint], check=False)
    return found


def names() -> list[str]:
    return sorted(path.stem for path in TRANSCRIPTS.glob("*.txt"))


@pytest.mark.tpm
@pytest.mark.fuse
@pytest.mark.parametrize("name", names())
def test_transcript(name: str, tmp_path: Path) -> None:
    expected = (TRANSCRIPTS / f"{name}.txt").read_text()
    try:
        found = replay(expected, tmp_path)
    finally:
        left = unmount_all(tmp_path)
    assert found == expected, "differs; python -m tests.test_cli --update writes what it is now"
    assert not left, f"left mounted: {left}"


def main() -> None:
    if sys.argv[1:2] != ["--update"]:
        sys.exit(__doc__)
    for name in sys.argv[2:] or names():
        path = TRANSCRIPTS / f"{name}.txt"
        directory = Path(tempfile.mkdtemp(prefix="sealfs-cli-"))
        try:
            path.write_text(replay(path.read_text(), directory))
        finally:
            left = unmount_all(directory)
            shutil.rmtree(directory, ignore_errors=True)
        print(name, "LEFT MOUNTED" if left else "")


if __name__ == "__main__":
    main()
