"""`key rotate`: killed at each write, with images that cannot be reached, beside new images."""

from __future__ import annotations

import contextlib
from pathlib import Path

import host_support
import keys_support as ks
import pytest
from verbs_support import CONTENT, Host, deaths

from sealfs.errors import KeyRefused
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys import records
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def wrapped_of(path: Path) -> bytes:
    with contextlib.closing(FileStorage.peek(path)) as storage:
        return read_identity(storage).wrapped_keys[0][1]


def test_after_a_rotation_only_the_new_key_opens_and_recovery_still_does(host: Host) -> None:
    disk = host.make("a")
    old_record = next(iter(ks.record_files(host.state))).read_bytes()
    old_image, old_key, image_key = disk.read_bytes(), host.vm_key(), host.image_key(disk)
    assert host.json("key", "rotate", "web1")["images"] == [str(disk)]
    assert host.vm_key() != old_key
    assert host.image_key(disk) == image_key, "no data is sealed anew"
    assert host.read(disk) == CONTENT
    assert not list((host.state / "keys").glob("*.next"))
    # The old record does not open the image, and the new one not an image of before.
    next(iter(ks.record_files(host.state))).write_bytes(old_record)
    with pytest.raises(KeyRefused):
        host.image_key(disk)
    (host.state / "keys").joinpath(ks.record_files(host.state)[0].name).unlink()
    host.run("key", "recover", disk, "--recovery-key-file", "-", stdin=host.recovery_key)
    assert host.read(disk) == CONTENT
    disk.write_bytes(old_image)
    with pytest.raises(KeyRefused):
        host.image_key(disk)


def test_killed_at_any_write_the_vm_opens_and_the_next_run_finishes(host: Host) -> None:
    disks = [host.make("a"), host.make("b")]
    before = host.vm_key()
    keys = [host.image_key(disk) for disk in disks]
    seen = set()

    def look(done: list[str]) -> None:
        assert [host.image_key(disk) for disk in disks] == keys
        seen.add(tuple(wrapped_of(disk) for disk in disks))
        host.run("key", "rotate", "web1")
        assert [host.image_key(disk) for disk in disks] == keys
        assert host.vm_key() != before
        assert not list((host.state / "keys").glob("*.next"))

    writes = deaths([host], lambda: host.run("key", "rotate", "web1"), look)
    assert writes == ["write", "_write", "_write", "_write", "_write", "rename"]
    assert len(seen) > 2
    assert host.read(disks[0]) == CONTENT


def test_an_image_that_cannot_be_reached_stops_it_by_name(host: Host) -> None:
    here, away = host.make("a"), host.make("b")
    away.rename(away.with_suffix(".away"))
    text = host.run("key", "rotate", "web1", status=10)
    assert f'"{away}": this image of VM "web1" is not there' in text
    assert f"key rotate web1 --lost {away}" in text
    assert not list((host.state / "keys").glob("*.next")), "nothing was begun"
    # In use by somebody who cannot be asked: stops in the middle, and both open.
    away.with_suffix(".away").rename(away)
    keys = host.image_key(here), host.image_key(away)
    with contextlib.closing(FileStorage.open(away, read_only=True)):
        assert f'"{away}": is in use' in host.run("key", "rotate", "web1", status=9)
    assert (host.image_key(here), host.image_key(away)) == keys
    assert "being rotated" in host.run("key", "list")
    host.run("key", "rotate", "web1")
    assert "being rotated" not in host.run("key", "list")
    # What is lost for good is left out, and opens by its recovery key alone.
    away.rename(away.with_suffix(".away"))
    assert "was left out" in host.run("key", "rotate", "web1", "--lost", away)
    away.with_suffix(".away").rename(away)
    assert host.read(here) == CONTENT
    with pytest.raises(KeyRefused):
        host.image_key(away)


def test_an_image_made_while_a_rotation_is_unfinished_survives_its_end(host: Host) -> None:
    disk = host.make("a")
    with contextlib.closing(FileStorage.open(disk, read_only=True)):
        host.run("key", "rotate", "web1", status=9)
    new = host.make("b")
    host.run("key", "rotate", "web1")
    assert host.read(disk) == host.read(new) == CONTENT


def test_no_image_is_made_under_a_key_that_is_being_changed(host: Host) -> None:
    host.make("a")
    with KeyService.open(host.state) as keys:
        with keys.rotating("web1"):
            text = host.run(
                "create", host.images / "b.sealed", "--size", "1M", "--vm-id", "web1", status=9
            )
            assert 'the key of VM "web1" is being changed' in text
            assert "try again" in host.run("key", "rotate", "web1", status=9)
        with contextlib.closing(keys.lock_image("b", records.vm_lock_name("web1"), shared=True)):
            assert "being made" in host.run("key", "rotate", "web1", status=9)


def test_the_policy_stays_and_a_recipient_of_old_is_named(host: Host) -> None:
    disk = host.make("a", "--pcrs", "7")
    host.run("key", "rotate", "web1")
    with KeyService.open(host.state) as keys:
        info = keys.records()[0]
    assert [slot.pcrs for slot in info.slots if slot.kind == "tpm"] == [(7,)]
    assert host.read(disk) == CONTENT


def test_a_forged_identity_is_not_authenticated_by_a_rotation(host: Host) -> None:
    import dataclasses

    from sealfs.image.format import encode_identity
    from sealfs.image.layout import Geometry

    disk = host.make("a")
    with contextlib.closing(FileStorage.open(disk)) as storage:
        known = read_identity(storage)
        forged = dataclasses.replace(known, generation=50, label="forged").encode_content()
        storage.write_durable(Geometry().identity_offset(1), [encode_identity(forged, bytes(32))])
    host.run("key", "rotate", "web1")
    with contextlib.closing(FileStorage.peek(disk)) as storage:
        assert (read_identity(storage).label, read_identity(storage).generation) == ("", 2)
    assert host.read(disk) == CONTENT


def test_a_slot_smuggled_into_an_image_is_no_recipient_of_the_next_key(host: Host) -> None:
    """What the image says of recipients counts only once the image is verified."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from sealfs.keys import recovery

    host.make("a")
    stranger = recovery.public_of(X25519PrivateKey.generate())
    key = bytearray(64)
    slot = recovery.wrap(key, stranger, vm_id="web1", kmi="web1")
    with KeyService.open(host.state) as keys:
        own = keys.create("other").recovery_slots
        with keys.unseal("web1", "web1") as vm_key:
            own = vm_key.recovery_slots
    ks.record_files(host.state)
    for file in ks.record_files(host.state):
        file.unlink()
    with KeyService.open(host.state) as keys:
        recovered = keys.recover("web1", "web1", [slot, *own], host.recovery_key)
        assert recovered.recovery_slots == own


@pytest.mark.fuse
def test_a_running_vm_notices_nothing(tmp_path: Path) -> None:
    host = host_support.Host(tmp_path)
    try:
        disk = host.images / "web1.raw.sealed"
        idle = host.images / "idle.raw.sealed"
        for path in (disk, idle):
            host.run("create", path, "--size", "4M", "--vm-id", "web1")
        host.mount()
        with open(host.mountpoint / "web1.raw", "r+b", buffering=0) as file:
            file.write(CONTENT)
            before = wrapped_of(disk), wrapped_of(idle)
            host.run("key", "rotate", "web1")
            assert all(
                new != old
                for new, old in zip((wrapped_of(disk), wrapped_of(idle)), before, strict=True)
            )
            file.write(CONTENT)
            host.run("key", "recovery", "web1")
            for path in (disk, idle):
                with contextlib.closing(FileStorage.peek(path)) as storage:
                    assert len(read_identity(storage).recovery_slots) == 2
            host.run("key", "revoke", "web1", "--yes", status=9)
        host.umount()
        host.run("check", "--data", disk)
        host.mount("ro")
        plain = host.mountpoint / "web1.raw"
        assert plain.read_bytes()[: 2 * len(CONTENT)] == CONTENT * 2
        host.run("key", "rotate", "web1", status=2)  # held for reading
    finally:
        host.clear()
