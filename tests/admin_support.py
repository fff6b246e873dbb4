"""What an administrator has around a mount: other users, mount(8), a mount namespace of his own.

Run as a program this module is `sealfs mount` and `sealfs umount` as a user types them, with
`TinyKeys` in the place of the key service.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND_WAIT = 60.0


@cache
def python_for_others(uid: int) -> list[str] | None:
    """Return the command of a Python that another user may start; None if there is none."""
    places = [ROOT, *(Path(place) for place in sys.path if place.endswith("site-packages"))]
    path = "PYTHONPATH=" + ":".join(map(str, places))
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, system):
        command = ["env", path, python]
        # By way of env, which has no rights left to reach an interpreter in root's home.
        probe = [*as_user(uid), *command, "-c", "import sealfs.mount.session"]
        if subprocess.run(probe, capture_output=True, check=False, cwd=ROOT).returncode == 0:
            return command
    return None


def as_user(uid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]


def run(
    *command: str | Path, status: int | None = 0, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command; its status is checked unless that is None."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False,
        timeout=COMMAND_WAIT, cwd=ROOT, stdin=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
    )  # fmt: skip
    assert status in (None, done.returncode), (command, done)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def unshared(*namespaces: str) -> subprocess.Popen[bytes]:
    """Start a process that holds namespaces of its own, until it is killed; `-m` is one of them.

    The mounts of other tests, of which it has a copy, would not end before it does.
    """
    hold = "umount -l -a -t fuse.sealfs; exec sleep 900"
    holder = subprocess.Popen(
        ["unshare", *namespaces, "--propagation", "private", "sh", "-c", hold],
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 10
    while Path(f"/proc/{holder.pid}/comm").read_text() != "sleep\n":
        assert time.monotonic() < end, "unshare"
        time.sleep(0.01)
    return holder


class MountNamespace:
    """A mount namespace of its own: what is mounted over in it stays so elsewhere."""

    def __init__(self) -> None:
        self._holder = unshared("-m")

    @property
    def root(self) -> Path:
        """Its root directory, seen from here."""
        return Path(f"/proc/{self._holder.pid}/root")

    @property
    def prefix(self) -> list[str]:
        """What makes a command run in it."""
        return ["nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--"]

    def run(
        self, *command: str | Path, status: int | None = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return run(*self.prefix, *command, status=status, env=env)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()


@contextlib.contextmanager
def mount_namespace() -> Iterator[MountNamespace]:
    made = MountNamespace()
    try:
        yield made
    finally:
        made.close()


def main() -> int:
    from mount_support import TinyKeys

    from sealfs.cli.errors import Situation, report
    from sealfs.mount import relay, session
    from sealfs.mount.options import MountOptions

    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("mount", "umount"))
    parser.add_argument("places", type=Path, nargs="+")
    parser.add_argument("-o", dest="options", default="")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--buffer", type=int, help="net.core.wmem_max, on a host as delivered")
    chosen = parser.parse_args()
    if chosen.buffer:
        relay.BUFFER_WANTED = chosen.buffer
    try:
        if chosen.command == "umount":
            session.unmount(chosen.places[0])
            return 0
        options = MountOptions.parse(chosen.options, is_root=os.geteuid() == 0)
        return session.mount_directory(
            *chosen.places, options=options, keys=lambda: TinyKeys(chosen.state),
            log_file=chosen.log, verbose=1,
        )  # fmt: skip
    except Exception as error:
        return report(error, Situation(command=chosen.command, path=chosen.places[-1]))


if __name__ == "__main__":
    sys.exit(main())
