"""A host for tests that go through everything: commands as a user types them, a software TPM."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path


class Host:
    """A host with its own state directory, one directory of sealed images and a mount point."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.mountpoint = directory / "plain"
        self.state = directory / "state"
        self.log = directory / "mount.log"
        self.images.mkdir()
        self.mountpoint.mkdir()
        self.recovery_key = self.init()

    def init(self) -> str:
        """Set the host up with a software TPM of its own; return the recovery key it printed."""
        printed = self.run("init", "--tpm", "swtpm")
        found = re.search(r"^\s*((?:[a-z]{4,8}[- ]){7,}[a-z]{4,8})\s*$", printed, re.M)
        assert found, printed
        return found[1]

    def run(self, *arguments: str | Path, status: int = 0, stdin: str | None = None) -> str:
        """Run a sealfs command as a user does; return what it prints."""
        command = [sys.executable, "-m", "sealfs.cli.main", "--state", self.state]
        done = subprocess.run(
            [str(part) for part in (*command, *arguments)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            input=stdin,
        )
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout

    def mount(self, options: str = "lane=on") -> None:
        """Serve the images at the mount point."""
        self.run("mount", self.images, self.mountpoint, "-o", options, "--log", self.log)

    def umount(self) -> None:
        """Unmount; the images are clean afterwards, and nothing went wrong unseen."""
        self.run("umount", self.mountpoint)
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def daemon_pid(self) -> int:
        """Return the pid of the process that serves the mount point."""
        from sealfs.mount.control import find_mount

        found = find_mount(self.mountpoint)
        assert found is not None
        return int(found.status["pid"])

    def kill_daemon(self, pid: int | None = None) -> None:
        """kill -9 the daemon, and clear the dead mount point away."""
        pid = pid or self.daemon_pid()
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the killed daemon goes away"
            time.sleep(0.01)
        subprocess.run(["umount", "-l", str(self.mountpoint)], check=True)

    def clear(self) -> None:
        """Leave no mount behind, whatever happened."""
        if os.path.ismount(self.mountpoint):
            subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)
