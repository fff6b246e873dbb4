"""What the tests of the key verbs share: hosts with images, commands in this process, deaths.

A death comes after a durable write, counted over the state directory and the images. A dead process
writes nothing more, whatever its handlers try.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keys_support as ks
import pytest

from sealfs.cli import sealed
from sealfs.cli.main import run
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys.service import KeyService
from sealfs.keys.statedir import AUDIT_FILE, LEDGER_FILE, StateDir

logger = logging.getLogger("sealfs")

CONTENT = b"the disk of this VM " * 300
RUNS_MAX = 60


class Died(BaseException):
    """The process is gone."""


class Host:
    """One host: a state directory with an embedded TPM, and a directory of images."""

    def __init__(self, directory: Path, *, own: bool = False) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.images = directory / "images"
        self.images.mkdir(parents=True)
        make = ks.fresh_state if own else ks.initialised_state
        self.recovery_key = make(self.state).recovery_key or ""

    def run(self, *arguments: object, status: int = 0, stdin: str = "") -> str:
        """Run a command in this process; return what it said, stdout before stderr."""
        out, err = io.StringIO(), io.StringIO()
        words = ["--state", self.state, *arguments]
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("sys.stdin", io.StringIO(stdin))
            # What a command does to its own process is not for that of the tests.
            patch.setattr("sealfs.cli.interrupts.install", lambda: None)
            for module in ("settings", "asked", "host"):
                patch.setattr(f"sealfs.cli.{module}.harden", lambda: None)
            kept = logger.handlers, logger.level, logger.propagate
            try:
                code = run([str(word) for word in words])
            finally:
                logger.handlers, logger.propagate = kept[0], kept[2]
                logger.setLevel(kept[1])
        text = out.getvalue() + err.getvalue()
        assert code == status, text
        assert "Traceback" not in text, text
        return text

    def json(self, *arguments: object) -> Any:
        text = self.run("--json", *arguments)
        return json.JSONDecoder().raw_decode(text)[0]

    def make(self, name: str, *options: object, vm_id: str = "web1") -> Path:
        """Seal a small disk with CONTENT."""
        source = self.directory / f"{name}.raw"
        source.write_bytes(CONTENT)
        path = self.images / f"{name}.sealed"
        self.run("import", source, path, "--vm-id", vm_id, *options)
        source.unlink()
        return path

    def read(self, path: Path) -> bytes:
        """Return what a console gets, by registry, ledger and key service."""
        from sealfs.cli.settings import Settings

        with KeyService.open(self.state) as keys:
            place = sealed.Place(path)
            with sealed.opened(Settings(state=self.state), place, keys) as image:
                return image.read(0, len(CONTENT))

    def image_key(self, path: Path) -> bytes:
        """Return the image's key, unwrapped as a console has it done; nothing else is asked."""
        with contextlib.closing(FileStorage.peek(path)) as storage:
            known = read_identity(storage)
        wrapped = known.wrapped_key(str(path))
        with KeyService.open(self.state) as keys:
            return bytes(keys.image_key(known.kmi, known.vm_id, known.uuid, wrapped))

    def vm_key(self, vm_id: str = "web1") -> bytes:
        with KeyService.open(self.state) as keys:
            kmi = next(info.kmi for info in keys.records() if info.vm_id == vm_id)
            return ks.key_bytes(keys.unseal(kmi, vm_id))

    def saved(self) -> Path:
        """Copy everything aside; `restore` brings it back."""
        place = self.directory.with_name(f"{self.directory.name}.saved")
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.directory, place)
        return place

    def restore(self, place: Path) -> None:
        shutil.rmtree(self.directory)
        shutil.copytree(place, self.directory)


@contextlib.contextmanager
def dying(at: int) -> Iterator[list[str]]:
    """Die after the `at`-th durable write (from 1); lends the names of those that were done.

    What tells of the verb afterwards, audit log and ledger, is written by the living only.
    """
    done: list[str] = []
    count = 0

    def mortal(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            if count < at and name == "append" and arguments[1] in (AUDIT_FILE, LEDGER_FILE):
                return real(*arguments, **options)
            count += 1
            if count > at:
                raise Died
            result = real(*arguments, **options)
            done.append(name)
            if count == at:
                raise Died
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in (
            (StateDir, ("write", "append", "remove", "rename")),
            (FileStorage, ("_write",)),
        ):
            for name in names:
                patch.setattr(owner, name, mortal(name, getattr(owner, name)))
        yield done


def deaths(
    hosts: list[Host], act: Callable[[], object], look: Callable[[list[str]], None]
) -> list[str]:
    """Let `act` die after each of its writes; `look` at what is left each time.

    Returns the names of all its writes.
    """
    saved = [host.saved() for host in hosts]
    for at in range(1, RUNS_MAX):
        for host, place in zip(hosts, saved, strict=True):
            host.restore(place)
        with dying(at) as done:
            try:
                act()
            except (Died, AssertionError):
                is_dead = True
            else:
                is_dead = False
        if not is_dead:
            return done
        look(done)
    raise AssertionError(f"more than {RUNS_MAX} writes")
