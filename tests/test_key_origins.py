"""Who makes a key, who makes its KMI, and what protects it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keys_support as ks
import pytest
from verbs_support import CONTENT, Host

from sealfs.errors import FormatError, KeyRecordDamaged, KeyRefused, UsageError
from sealfs.keys import labels, origins, records, software
from sealfs.keys.records import KeyRecord
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def record_of(host: Host) -> KeyRecord:
    (file,) = ks.record_files(host.state)
    return KeyRecord.decode(file.read_bytes(), "x")


@pytest.mark.parametrize("origin", ["mixed", "service", "tpm"])
def test_the_origin_of_a_key_is_where_its_bytes_come_from(
    host: Host, origin: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says zeros, or the TPM does: only the key that does not ask there is good."""
    from sealfs.keys.tpm import Tpm

    if origin == "service":
        monkeypatch.setattr(Tpm, "random", lambda self, size: bytes(size))
    else:
        monkeypatch.setattr("sealfs.keys.origins.os.urandom", bytes)
    disk = host.make("a", "--key-from", origin)
    assert len(set(host.vm_key())) > origins.DISTINCT_MIN
    assert origin in host.run("key", "show", "web1")
    assert host.read(disk) == CONTENT


def test_a_console_hands_its_key_in_by_file_or_stdin(host: Host) -> None:
    key = os.urandom(64)
    file = host.directory / "key"
    file.write_bytes(key)
    disk = host.make("a", "--key-from", "console", "--key-file", file)
    assert host.vm_key() == key
    assert host.read(disk) == CONTENT
    assert "console" in host.run("key", "list")
    # Another key for a VM that has one is not taken in silence.
    other = host.images / "b.sealed"
    create = ("create", other, "--size", "1M", "--vm-id")
    console = ("--key-from", "console", "--key-file", file)
    assert "has a key on this host" in host.run(*create, "web1", *console, status=10)
    for content, why in ((key[:63], "63 bytes"), (key + b"x", "65 bytes"), (bytes(64), "repeat")):
        file.write_bytes(content)
        text = host.run(*create, "web2", *console, status=2)
        assert why in text
        assert content.hex() not in text
    host.run(*create, "web2", "--key-from", "console", status=2)
    host.run(*create, "web2", "--key-file", file, status=2)
    assert not other.exists()
    command = [sys.executable, "-m", "sealfs.cli.main", "--state", host.state, *create, "web2"]
    done = subprocess.run(
        [str(word) for word in (*command, "--key-from", "console", "--key-file", "-")],
        input=key[::-1],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert host.vm_key("web2") == key[::-1]


@pytest.mark.parametrize("kind", ["service", "tpm", "opaque"])
def test_a_random_kmi_finds_its_key_and_says_nothing(
    host: Host, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "tpm":
        monkeypatch.setattr("sealfs.keys.host.os.urandom", bytes)
    disk = host.make("a", "--kmi", kind)
    kmi = record_of(host).kmi
    assert len(bytes.fromhex(kmi)) == origins.RANDOM_KMI_SIZE
    assert kmi in host.run("info", disk)
    assert host.read(disk) == CONTENT


# The software slot


def test_a_software_slot_opens_on_its_host_by_its_tpm_only(host: Host, tmp_path: Path) -> None:
    disk = host.make("a", "--slot", "software")
    assert "software" in host.run("key", "list")
    assert not record_of(host).tpm_slots
    assert "opens" in host.run("key", "test", "web1")
    assert host.read(disk) == CONTENT
    key = host.vm_key()
    for file in host.state.rglob("*"):
        if file.is_file() and file.parent.name != "tpm":
            assert key[:16] not in file.read_bytes()
    stranger = Host(tmp_path / "stranger", own=True)
    (name,) = ks.record_files(host.state)
    (stranger.state / "keys" / name.name).write_bytes(name.read_bytes())
    with KeyService.open(stranger.state) as keys, pytest.raises(KeyRefused, match="another host"):
        keys.unseal("web1", "web1")
    (host.state / "keys" / name.name).unlink()
    host.run("key", "recover", disk, "--recovery-key-file", "-", stdin=host.recovery_key)
    assert host.vm_key() == key


def test_a_rotated_software_slot_stays_one(host: Host) -> None:
    disk = host.make("a", "--slot", "software")
    host.run("key", "rotate", "web1")
    assert record_of(host).software_slot
    assert host.read(disk) == CONTENT


def test_a_software_slot_has_no_policy(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        for asked in ({"pcrs": (7,)}, {"pin": bytearray(b"2468")}, {"signer": b"s"}):
            with pytest.raises(UsageError, match="asks for nothing"):
                keys.create("web1", slot="software", **asked)


SALT, HOST_ID, SUBKEY = bytes(range(32)), b"h" * 16, bytes(reversed(range(32)))
SLOT = software.wrap(b"K" * 64, SUBKEY, vm_id="web1", kmi="k", host_id=HOST_ID, salt=SALT)


def test_a_software_slot_is_what_its_description_says() -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    header = b"SEALFS\0S" + b"\0\1" + HOST_ID + SALT
    data = header + records.binding("web1", "k")
    assert header + AESGCM(SUBKEY).encrypt(bytes(12), b"K" * 64, data) == SLOT
    assert software.salt_of(SLOT, "web1", HOST_ID) == SALT
    assert software.unwrap(SLOT, SUBKEY, vm_id="web1", kmi="k") == b"K" * 64


def test_an_altered_or_swapped_software_slot_does_not_open() -> None:
    def opened(slot: bytes, vm_id: str = "web1", kmi: str = "k") -> bytearray:
        assert software.salt_of(slot, vm_id, HOST_ID) == SALT
        return software.unwrap(slot, SUBKEY, vm_id=vm_id, kmi=kmi)

    for position in range(len(SLOT)):
        altered = bytearray(SLOT)
        altered[position] ^= 1
        with pytest.raises((KeyRecordDamaged, FormatError, KeyRefused, AssertionError)):
            opened(bytes(altered))
    for size in range(len(SLOT)):
        with pytest.raises((KeyRecordDamaged, FormatError)):
            opened(SLOT[:size])
    for vm_id, kmi in (("web2", "k"), ("web1", "l")):
        with pytest.raises(KeyRecordDamaged, match="another VM"):
            opened(SLOT, vm_id, kmi)


def test_every_slot_has_a_key_of_its_own(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        for name in ("a", "b"):
            keys.create(name, slot="software").wipe()
    slots = [
        KeyRecord.decode(file.read_bytes(), "x").software_slot
        for file in ks.record_files(host.state)
    ]
    salts = {slot[26:58] for slot in slots}
    assert len(salts) == 2
    assert all(slot.startswith(labels.SOFTWARE_SLOT_MAGIC) for slot in slots)
