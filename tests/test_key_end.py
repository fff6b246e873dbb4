"""`key recovery` and `key revoke`: printed keys that open, and keys that are destroyed."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from verbs_support import CONTENT, Host, deaths

from sealfs.errors import KeyGone
from sealfs.image.format import Identity
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys import recovery

pytestmark = pytest.mark.tpm

KEY = re.compile(r"\b[cbdefghijklnrtuv]{8}(?:-[cbdefghijklnrtuv]{8}){8}\b")


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def identity_of(path: Path) -> Identity:
    with contextlib.closing(FileStorage.peek(path)) as storage:
        return read_identity(storage)


def new_recovery_key(host: Host, *options: object) -> str:
    found = KEY.search(host.run("key", "recovery", "web1", *options))
    assert found is not None
    return found[0]


def test_a_printed_recovery_key_opens_each_image_of_its_vm_on_a_fresh_host(
    host: Host, tmp_path: Path
) -> None:
    disks = [host.make("a"), host.make("b")]
    key = new_recovery_key(host)
    for file in host.directory.rglob("*"):
        if file.is_file():
            assert key.encode() not in file.read_bytes()
    assert [host.read(disk) for disk in disks] == [CONTENT] * 2
    other = Host(tmp_path / "other", own=True)
    for disk in disks:
        copy = other.images / disk.name
        shutil.copy(disk, copy)
        other.run("key", "recover", copy, "--recovery-key-file", "-", stdin=key)
        assert other.read(copy) == CONTENT
    # The next key of the VM opens by it as well: its public part is known.
    host.run("key", "rotate", "web1")
    again = Host(tmp_path / "again")
    copy = again.images / "a.sealed"
    shutil.copy(disks[0], copy)
    again.run("key", "recover", copy, "--recovery-key-file", "-", stdin=key)
    assert again.read(copy) == CONTENT
    assert len(identity_of(copy).recovery_slots) == 2


def test_a_recovery_key_is_shown_though_an_image_cannot_be_told(host: Host) -> None:
    disk = host.make("a")
    with contextlib.closing(FileStorage.open(disk, read_only=True)):
        text = host.run("--json", "key", "recovery", "web1", status=9)
    key = KEY.search(text)
    assert key is not None
    host.run("key", "recovery", "web1", "--refresh")
    assert recovery.fingerprint(recovery.public_of(recovery.parse_private(key[0]))).hex() in {
        recovery.recipient_of(slot)[0] for slot in identity_of(disk).recovery_slots
    }


def test_an_organisation_is_added_once_and_reaches_new_images(host: Host) -> None:
    disk = host.make("a")
    private = X25519PrivateKey.generate()
    public = host.directory / "org.hex"
    public.write_text(recovery.public_of(private).hex())
    for _ in range(2):
        text = host.run("key", "recovery", "web1", "--to", public)
        assert KEY.search(text) is None
        assert len(identity_of(disk).recovery_slots) == 2
    assert len(identity_of(host.make("b")).recovery_slots) == 2
    public.write_text("rubbish")
    host.run("key", "recovery", "web1", "--to", public, status=2)
    host.run("key", "recovery", "web1", "--to", public, "--refresh", status=2)


def test_killed_at_any_write_of_a_recovery_the_vm_opens_and_refresh_finishes(host: Host) -> None:
    disk = host.make("a")
    key = host.image_key(disk)

    def look(done: list[str]) -> None:
        assert host.image_key(disk) == key
        host.run("key", "recovery", "web1", "--refresh")
        assert host.image_key(disk) == key
        with contextlib.closing(FileStorage.peek(disk)) as storage:
            found = read_identity(storage)
        assert len(found.recovery_slots) == 2

    writes = deaths([host], lambda: host.run("key", "recovery", "web1"), look)
    assert writes == ["write", "_write", "_write"]


def test_a_revoked_vm_opens_by_nothing_and_says_so(host: Host) -> None:
    disks = [host.make("a"), host.make("b", "--disk", "data")]
    other = host.make("other", vm_id="other")
    slots = [*identity_of(disks[0]).recovery_slots, identity_of(disks[0]).wrapped_keys[0][1]]
    (record,) = [f for f in ks.record_files(host.state) if b"web1" in f.read_bytes()]
    text = host.run("key", "revoke", "web1", status=2)
    assert "2 disks" in text
    assert host.read(disks[0]) == CONTENT
    assert "still open" in host.run("key", "revoke", "web1", "--yes")
    assert not record.exists()
    for disk in disks:
        for slot in slots:
            assert slot[-64:] not in disk.read_bytes()
        assert "was revoked" in host.run("check", disk, status=7)
        text = host.run("key", "recover", disk, "--recovery-key-file", "-", stdin=host.recovery_key,
                        status=7)  # fmt: skip
        assert "was revoked" in text
        assert "web1" in host.run("info", disk)
        with pytest.raises(KeyGone):
            host.read(disk)
    assert "revoked at" in host.run("key", "list")
    assert "revoked" in host.run("key", "test", "web1", status=7)
    host.run("key", "test", "--all")
    new = host.images / "c.sealed"
    assert "was revoked" in host.run("create", new, "--size", "1M", "--vm-id", "web1", status=7)
    assert host.read(other) == CONTENT
    host.run("key", "revoke", "web1", "--yes")
    host.run("key", "revoke", "nobody", "--yes", status=7)
    # On a host that never heard of it, the image itself says so.
    (host.state / "keys" / record.with_suffix(".gone").name).unlink()
    with pytest.raises(KeyGone, match="erased"):
        host.read(disks[0])


def test_killed_at_any_write_a_revocation_is_not_begun_or_goes_on(host: Host) -> None:
    disk = host.make("a")
    host.run("key", "recovery", "web1")
    key = host.image_key(disk)

    def look(done: list[str]) -> None:
        assert done[0] == "write", "the tombstone comes first"
        with pytest.raises(KeyGone):
            host.image_key(disk)
        host.run("key", "revoke", "web1", "--yes")
        assert not ks.record_files(host.state)
        assert identity_of(disk).wrapped_keys == ()
        assert identity_of(disk).recovery_slots == ()

    writes = deaths([host], lambda: host.run("key", "revoke", "web1", "--yes"), look)
    assert writes == ["write", "_write", "_write", "append", "remove"]
    assert len(key) == 32


def test_a_vm_in_use_is_not_revoked(host: Host) -> None:
    disk = host.make("a")
    with contextlib.closing(FileStorage.open(disk, read_only=True)):
        assert str(disk) in host.run("key", "revoke", "web1", "--yes", status=9)
    assert host.read(disk) == CONTENT
    disk.rename(disk.with_suffix(".away"))
    assert "is not there" in host.run("key", "revoke", "web1", "--yes", status=10)
    assert "left out" in host.run("key", "revoke", "web1", "--yes", "--lost", disk)


def test_a_vm_whose_key_cannot_be_read_is_revoked_all_the_same(host: Host) -> None:
    disk = host.make("a")
    (record,) = ks.record_files(host.state)
    record.write_bytes(b"rubbish")
    host.run("key", "revoke", "web1", "--yes")
    assert not record.exists()
    assert identity_of(disk).wrapped_keys == ()


def test_a_damaged_tombstone_concerns_its_own_vm_alone(host: Host) -> None:
    host.make("a")
    other = host.make("other", vm_id="other")
    host.run("key", "revoke", "web1", "--yes")
    (stone,) = (host.state / "keys").glob("*.gone")
    stone.write_bytes(b"rubbish")
    assert host.read(other) == CONTENT
    host.run("create", host.images / "n.sealed", "--size", "1M", "--vm-id", "new")
    assert "not a key record" in host.run("key", "test", "web1", status=7)
