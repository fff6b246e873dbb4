"""Loaded by each Python of a transcript: SIGUSR1 has it write where all its threads and tasks are.

For a command that hangs (tests/test_cli.py). `SEALFS_STACKS` is the directory to write to, a file
for each process.
"""

import faulthandler
import os
import signal
import sys
from pathlib import Path


def write(number: int, frame: object) -> None:
    """Add the tasks of the event loop; the threads are there already, whatever they do."""
    context = getattr(sys.modules.get("trio._core._run"), "GLOBAL_RUN_CONTEXT", None)
    runner = getattr(context, "runner", None)
    with open(_path(), "a") as file:
        for task in getattr(runner, "tasks", ()):
            file.write(f"task {task.name}:\n")
            found = task.coro
            while found is not None and (running := getattr(found, "cr_frame", None)) is not None:
                file.write(f"  {running.f_code.co_filename}:{running.f_lineno}\n")
                found = found.cr_await


def _path() -> Path:
    return Path(os.environ["SEALFS_STACKS"], str(os.getpid()))


def _arm() -> None:
    file = open(_path(), "a")  # noqa: SIM115  it is kept for as long as the process lives
    signal.signal(signal.SIGUSR1, write)
    faulthandler.register(signal.SIGUSR1, file=file, chain=True)


if os.environ.get("SEALFS_STACKS"):
    _arm()
    os.register_at_fork(after_in_child=_arm)
