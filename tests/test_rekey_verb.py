"""`sealfs rekey` of an image nobody has: killed at each write, interrupted, beside key verbs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from verbs_support import CONTENT, Host, deaths

from sealfs.cli import rekey
from sealfs.cli.errors import Interrupted
from sealfs.cli.pace import Pace
from sealfs.image.format import Identity
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage

pytestmark = pytest.mark.tpm


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def identity_of(path: Path) -> Identity:
    with contextlib.closing(FileStorage.peek(path)) as storage:
        return read_identity(storage)


def test_killed_at_any_write_the_image_opens_and_the_next_run_finishes(host: Host) -> None:
    disk = host.make("a")
    before = identity_of(disk)
    seen = set()

    def look(done: list[str]) -> None:
        assert host.read(disk) == CONTENT
        wrapped = [generation for generation, _ in identity_of(disk).wrapped_keys]
        seen.add((identity_of(disk).key_generation, *wrapped))
        host.run("rekey", disk)
        # Begun once more where it was done already, or had not begun.
        assert identity_of(disk).key_generation in (2, 3)
        assert len(identity_of(disk).wrapped_keys) == 1
        assert host.read(disk) == CONTENT
        assert before.wrapped_keys[0][1] not in disk.read_bytes()

    deaths([host], lambda: host.run("rekey", disk), look)
    assert seen >= {(1, 1), (1, 1, 2), (2, 2)}


def test_interrupted_it_is_in_order_and_goes_on(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = host.make("a")
    old = host.image_key(disk)

    class Stopped(Pace):
        def after(self, size: int) -> None:
            raise Interrupted(2)

    monkeypatch.setattr(rekey, "Pace", Stopped)
    text = host.run("rekey", disk, status=130)
    assert "interrupted; the image is in order, and not done" in text
    assert f"hint: sealfs --state {host.state} rekey {disk}" in text
    assert host.json("info", disk)["rekey"] is not None
    assert host.json("info", disk)["state"] == "clean"
    monkeypatch.undo()
    host.run("rekey", disk)
    assert host.json("info", disk)["rekey"] is None
    assert host.image_key(disk) != old
    assert host.read(disk) == CONTENT


def test_key_verbs_work_in_the_middle_of_a_rekey(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = host.make("a")

    class Stopped(Pace):
        def after(self, size: int) -> None:
            raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(rekey, "Pace", Stopped)
        host.run("rekey", disk, status=130)
    assert len(identity_of(disk).wrapped_keys) == 2
    wrapped = identity_of(disk).wrapped_keys
    host.run("key", "rotate", "web1")
    assert [g for g, _ in identity_of(disk).wrapped_keys] == [g for g, _ in wrapped]
    assert not {raw for _, raw in wrapped} & {raw for _, raw in identity_of(disk).wrapped_keys}
    assert host.read(disk) == CONTENT
    host.run("key", "recovery", "web1")
    # With nothing but the recovery key, on a host that has lost its record.
    next((host.state / "keys").glob("*")).unlink()
    host.run("key", "recover", disk, "--recovery-key-file", "-", stdin=host.recovery_key)
    assert host.read(disk) == CONTENT
    plain = disk.with_suffix(".raw")
    host.run("export", disk, plain)
    assert plain.read_bytes()[: len(CONTENT)] == CONTENT
    host.run("rekey", disk)
    assert [g for g, _ in identity_of(disk).wrapped_keys] == [2]
    host.run("check", "--data", disk)
    host.run("rekey", disk)
    host.run("key", "revoke", "web1", "--yes")
    assert identity_of(disk).wrapped_keys == ()


def test_a_copy_with_the_old_key_does_not_open_once_the_vm_key_is_rotated(host: Host) -> None:
    disk = host.make("a")
    old = disk.read_bytes()
    host.run("rekey", disk)
    host.run("key", "rotate", "web1")
    disk.write_bytes(old)
    assert "does not open this image's key" in host.run("check", disk, status=7)
