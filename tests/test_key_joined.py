"""Key verbs of VMs whose keys ask for something, what they leave in the audit log, and keyd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_support
import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from test_keyd import Keyd
from verbs_support import CONTENT, Host

from sealfs.errors import KeyGone, KeyNotFound, PinNeeded, WrongPin
from sealfs.keys import policy, signed
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord, PolicyKind
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm

PIN = "turn left at 97531"
SIGNER = ec.derive_private_key(0x1234567, ec.SECP256R1())
PUBLIC = signed.signer_of(SIGNER.public_key())


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


@pytest.fixture
def pin_file(tmp_path: Path) -> Path:
    path = tmp_path / "pin"
    path.write_text(PIN + "\n")
    return path


def pin() -> bytearray:
    return bytearray(PIN.encode())


def record_of(host: Host) -> KeyRecord:
    (file,) = ks.record_files(host.state)
    return KeyRecord.decode(file.read_bytes(), "record")


def lines(host: Host, *events: str) -> list[dict[str, Any]]:
    """Return what the audit log says of these events, and that nothing is wrong with it."""
    with KeyService.open(host.state) as keys:
        assert keys.audit.verify()[1] == []
        found = [entry for _, _, entry in keys.audit.entries() if entry is not None]
    return [entry for entry in found if entry["event"] in events]


# Rotation keeps what a key asks for


def test_a_rotation_keeps_every_slot_and_its_pin(host: Host, pin_file: Path) -> None:
    disk = host.make("a", "--pin-file", pin_file, "--pcrs", "16")
    zeros = signed.sign(SIGNER, (23,), (bytes(policy.DIGEST_SIZE),), None)
    with KeyService.open(host.state) as keys:
        keys.policies.add(zeros.encode(), "f")
        keys.reseal("web1", Protection(signer=PUBLIC), pin=pin(), keep=True)
        old = ks.key_bytes(keys.unseal("web1", "web1"))
    host.run("key", "rotate", "web1", "--pin-file", pin_file)
    slots = record_of(host).tpm_slots
    assert [(slot.policy, slot.pcrs, slot.signer) for slot in slots] == [
        (PolicyKind.PCRS | PolicyKind.PIN, (16,), b""),
        (PolicyKind.SIGNED, (), PUBLIC),
    ]
    with KeyService.open(host.state) as keys:
        assert [slot.opens for slot in keys.test("web1", pin=pin())[:2]] == [True, True]
        assert ks.key_bytes(keys.unseal("web1", "web1")) != old
    assert host.read(disk) == CONTENT


def test_a_wrong_pin_or_none_changes_nothing(host: Host, pin_file: Path, tmp_path: Path) -> None:
    host.make("a", "--pin-file", pin_file)
    before = ks.record_files(host.state)[0].read_bytes()
    text = host.run("key", "rotate", "web1", status=7)
    assert "opens with its PIN only" in text
    assert "key rotate web1 --pin-file FILE" in text
    wrong = tmp_path / "wrong"
    wrong.write_text("turn right")
    assert "the PIN is wrong" in host.run("key", "rotate", "web1", "--pin-file", wrong, status=7)
    assert ks.record_files(host.state)[0].read_bytes() == before
    assert not list((host.state / "keys").glob("*.next"))
    outcomes = [line["outcome"] for line in lines(host, "key rotated")]
    assert [outcome.partition(":")[0] for outcome in outcomes] == ["PinNeeded", "WrongPin"]


def test_a_pin_beside_an_open_slot_is_proved_before_it_seals_anything(host: Host) -> None:
    """A mistyped PIN that nobody noticed would be the new key's."""
    host.make("a")
    with KeyService.open(host.state) as keys:
        keys.reseal("web1", Protection(pin=pin()), keep=True)
        keys.ask_pin = lambda vm_id: bytearray(b"mistyped")
        with keys.rotating("web1") as rotation, pytest.raises(WrongPin):
            rotation.begin()


def test_an_unlocked_vm_stays_usable_while_its_key_changes_and_afterwards(host: Host) -> None:
    with KeyService.open(host.state) as mount, KeyService.open(host.state) as command:
        with mount.create("web1", pin=pin()) as key:
            wrapped = key.wrap_image_key(bytes(16), b"I" * 32)
        with pytest.raises(PinNeeded):
            mount.image_key("web1", "web1", bytes(16), wrapped)
        mount.unlock("web1", pin())
        command.ask_pin = lambda vm_id: pin()
        with command.rotating("web1") as rotation:
            rotation.begin()
            mount.unlock("web1", pin())
            news = rotation.rewrap(bytes(16), wrapped)
            for one in (wrapped, news):
                assert mount.image_key("web1", "web1", bytes(16), one) == b"I" * 32
            made = mount.new_image_key("web1", b"u" * 16)
            rotation.finish()
        assert mount.image_key("web1", "web1", bytes(16), news) == b"I" * 32
        assert mount.image_key("web1", "web1", b"u" * 16, made.wrapped) == made.key
        assert mount.lock("web1")
        with pytest.raises(PinNeeded):
            mount.image_key("web1", "web1", bytes(16), news)


def test_a_service_that_rotates_an_unlocked_vm_keeps_the_new_key(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        keys.create("web1", pin=pin()).wipe()
        keys.unlock("web1", pin())
        keys.ask_pin = lambda vm_id: pin()
        with keys.rotating("web1") as rotation:
            rotation.begin()
            rotation.finish()
        keys.ask_pin = None
        keys.unseal("web1", "web1").wipe()


# The other verbs ask for the PIN, once


def test_recovery_and_a_move_take_the_pin(host: Host, pin_file: Path, tmp_path: Path) -> None:
    disk = host.make("a", "--pin-file", pin_file)
    host.run("key", "recovery", "web1", status=7)
    made = host.json("key", "recovery", "web1", "--pin-file", pin_file)
    assert len(record_of(host).recovery_slots) == 2
    other = Host(tmp_path / "other", own=True)
    there = other.images / disk.name
    other.run("host-id", "-o", tmp_path / "other.enroll")
    fingerprint = other.json("host-id")["fingerprint"]
    words = ("key", "enroll", "web1", "--to", tmp_path / "other.enroll", "-o", tmp_path / "p",
             "--move", "--fingerprint", fingerprint)  # fmt: skip
    host.run(*words, status=7)
    host.run(*words, "--pin-file", pin_file)
    (tmp_path / "p").unlink()  # lost: the same move again
    host.run(*words, "--pin-file", pin_file)
    there.write_bytes(disk.read_bytes())
    other.run("key", "import", tmp_path / "p", there)
    assert other.read(there) == CONTENT, "the PIN stayed behind"
    with pytest.raises(KeyGone):
        host.read(disk)
    other.run("key", "rotate", "web1")

    target = other.json("host-id")["host_id"]
    (recovery_line,) = [x for x in lines(host, "key recovery changed") if x["outcome"] == "ok"]
    assert recovery_line["recipients"] == made["fingerprint"]
    enrolled = lines(host, "key enrolled")
    assert [x["outcome"].partition(":")[0] for x in enrolled] == ["ok", "ok"]
    assert {(x["vm"], x["kmi"], x["to_host"]) for x in enrolled} == {("web1", "web1", target)}
    assert [x["to_host"] for x in lines(host, "key moved")] == [target, target]
    (imported,) = lines(other, "key imported")
    assert (imported["vm"], imported["from_host"]) == ("web1", host.json("host-id")["host_id"])
    (rotated,) = lines(other, "key rotated")
    assert (rotated["vm"], rotated["kmi"], rotated["outcome"]) == ("web1", "web1", "ok")


def test_the_audit_log_tells_origins_and_the_end_of_a_key(host: Host, tmp_path: Path) -> None:
    host.make("a", "--key-from", "service", "--slot", "software")
    (made,) = lines(host, "key made")
    assert (made["vm"], made["origin"], made["outcome"]) == ("web1", "service", "ok")
    host.run("key", "revoke", "nobody", "--yes", status=7)
    host.run("key", "revoke", "web1", "--yes")
    nobody, revoked = lines(host, "key revoked")
    assert nobody["outcome"].startswith(KeyNotFound.__name__)
    assert (revoked["vm"], revoked["kmi"], revoked["outcome"]) == ("web1", "web1", "ok")
    rubbish = tmp_path / "rubbish"
    rubbish.write_text("-----BEGIN SEALFS VM KEY-----\nAAAA\n-----END SEALFS VM KEY-----\n")
    host.run("key", "import", rubbish, status=4)
    (refused,) = lines(host, "key imported")
    assert refused["outcome"].startswith("FormatError")


# A software slot beside policies


def test_reseal_takes_a_software_slot_away_unless_it_is_kept(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        keys.create("web1", slot="software").wipe()
        keys.reseal("web1", Protection((16,)), keep=True)
        assert record_of(host).software_slot
        assert [info.kind for info in keys.records()[0].slots] == ["tpm", "software", "recovery"]
        assert [slot.opens for slot in keys.test("web1")] == [True, True, None]
        with keys.rotating("web1") as rotation:
            rotation.begin()
            rotation.finish()
        record = record_of(host)
        assert record.software_slot
        assert [slot.policy for slot in record.tpm_slots] == [PolicyKind.PCRS]
        keys.reseal("web1", Protection(pin=pin()))
        assert not record_of(host).software_slot
        with pytest.raises(PinNeeded):
            keys.unseal("web1", "web1")


# Beside keyd


@pytest.fixture
def live(tmp_path: Path) -> Iterator[host_support.Host]:
    (tmp_path / "live").mkdir()
    made = host_support.Host(tmp_path / "live")
    yield made
    made.clear()


@pytest.mark.fuse
def test_a_key_is_rotated_under_a_mount_whose_keys_keyd_holds(
    live: host_support.Host, pin_file: Path
) -> None:
    busy, idle = (live.images / f"{name}.raw.sealed" for name in ("busy", "idle"))
    for path in (busy, idle):
        live.run("create", path, "--size", "1M", "--vm-id", "web1", "--pin-file", "-", stdin=PIN)
    keyd = Keyd(live)
    try:
        live.mount(f"keyd={keyd.path}")
        live.run("unlock", "web1", "--pin-file", pin_file)
        with open(live.mountpoint / "busy.raw", "r+b", buffering=0) as file:
            file.write(CONTENT)
            live.run("key", "rotate", "web1", "--pin-file", pin_file)
            file.write(CONTENT)
            # Closed and opened again, and for the first time: by what keyd keeps.
            (live.mountpoint / "idle.raw").write_bytes(CONTENT)
        live.run("key", "recovery", "web1", "--pin-file", pin_file)
        live.run("lock", "web1")
        with pytest.raises(PermissionError):
            (live.mountpoint / "idle.raw").read_bytes()
        live.run("unlock", "web1", "--pin-file", pin_file)
        made = live.mountpoint / "new.raw"
        assert made.write_bytes(CONTENT) == len(CONTENT)
        assert (live.mountpoint / "idle.raw").read_bytes()[: len(CONTENT)] == CONTENT
        assert (live.mountpoint / "busy.raw").read_bytes()[: 2 * len(CONTENT)] == CONTENT * 2
        live.umount()
    finally:
        live.clear()
        assert keyd.end() == 0, keyd.log.read_text()
    assert "Traceback" not in keyd.log.read_text()
    live.run("check", "--data", busy, "--pin-file", pin_file)
