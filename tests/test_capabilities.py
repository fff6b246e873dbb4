"""What the system must be able to do, a test for each row: C3 to C8, and C12.

C9 and C11 in process are in test_keys_service.py, C11 apart from the console in test_keyd.py, C2
and C10 on a network in test_net_keys.py, test_net_cli.py and test_net_live.py, the
blocks themselves (C1, C10) in the tests of the mount.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import keys_support as ks
import pytest
from test_keys_service import swap
from verbs_support import CONTENT, Died, Host, dying

from sealfs.errors import (
    FormatError,
    HostNotInitialised,
    KeyGone,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
)
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.keys.records import KeyRecord
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm

UUID = bytes(range(16))
CC_UNSEAL = (0x15E).to_bytes(4, "big")
"""TPM 2.0 Part 2 §6.5.2."""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "host")


def unseals(log: list[bytes]) -> int:
    return sum(message[6:10] == CC_UNSEAL for message in log)


def test_c3_keys_are_protected_by_the_tpm_or_by_the_service_that_the_tpm_protects(
    host: Host,
) -> None:
    log: list[bytes] = []
    service = ks.wrapped_service(host.state, lambda channel: ks.Tap(channel, log))
    hard, soft = service.create("hard"), service.create("soft", slot="software")
    secrets = {key.vm_id: ks.key_bytes(key) for key in (hard, soft)}
    records = [KeyRecord.decode(f.read_bytes(), "x") for f in ks.record_files(host.state)]
    kinds = {r.vm_id: (len(r.tpm_slots), bool(r.software_slot)) for r in records}
    assert kinds == {"hard": (1, False), "soft": (0, True)}
    for file in host.state.rglob("*"):
        if file.is_file() and file.parent.name != "tpm":
            assert not any(secret[:16] in file.read_bytes() for secret in secrets.values())
    for vm_id, count in (("hard", 1), ("soft", 0)):
        log.clear()
        assert ks.key_bytes(service.unseal(vm_id, vm_id)) == secrets[vm_id]
        assert unseals(log) == count
    # The chain: the service's own secret comes out of the TPM, or no software slot opens.
    again = ks.wrapped_service(host.state, lambda channel: ks.Tap(channel, log))
    log.clear()
    assert ks.key_bytes(again.unseal("soft", "soft")) == secrets["soft"]
    assert unseals(log) == 1
    assert not any(secret[:16] in message for secret in secrets.values() for message in log)


def test_c4_a_key_request_by_kmi_is_answered_or_clearly_refused(host: Host) -> None:
    with KeyService.open(host.state) as service:
        key = service.create("web1")
        wrapped = key.wrap_image_key(UUID, b"I" * 32)
        assert service.image_key("web1", "web1", UUID, wrapped) == b"I" * 32
        with pytest.raises(KeyNotFound, match='"web2": this host has no key'):
            service.image_key("web2", "web2", UUID, wrapped)
        with pytest.raises(KeyRefused, match="not of 'web2'"):
            service.image_key("web1", "web2", UUID, wrapped)
        with pytest.raises(KeyRefused, match="another VM"):
            service.image_key("web1", "web1", bytes(16), wrapped)
    host.run("key", "revoke", "web1", "--yes")
    with KeyService.open(host.state) as service, pytest.raises(KeyGone, match="was revoked"):
        service.image_key("web1", "web1", UUID, wrapped)


def test_c5_a_key_is_made_and_protected_before_the_image_is_and_each_block_is_sealed(
    host: Host,
) -> None:
    with dying(1), contextlib.suppress(Died, AssertionError):
        host.make("a")
    assert [KeyRecord.decode(f.read_bytes(), "x").vm_id for f in ks.record_files(host.state)] == [
        "web1"
    ]
    assert not (host.images / "a.sealed").exists()
    disk = host.make("a")
    raw = disk.read_bytes()
    for at in range(0, len(CONTENT), 512):
        assert CONTENT[at : at + 20] not in raw
    assert host.read(disk) == CONTENT


def test_c6_a_kmi_finds_exactly_its_key_and_swapped_records_are_detected(host: Host) -> None:
    with KeyService.open(host.state) as service:
        keys = {f"vm-{number}": service.create(f"vm-{number}") for number in range(3)}
        other = service.create("vm-3", kmi="tpm")
        asked = [*((name, name) for name in keys), (other.kmi, "vm-3")]
        found = [ks.key_bytes(service.unseal(*request)) for request in asked]
        assert found == [ks.key_bytes(key) for key in (*keys.values(), other)]
        assert len(set(found)) == 4
        swap(*ks.record_files(host.state)[:2])
        refused = 0
        for request in asked:
            try:
                service.unseal(*request).wipe()
            except KeyRecordDamaged:
                refused += 1
        assert refused == 2


def test_c7_a_key_is_made_by_the_console_the_service_or_the_tpm(host: Host) -> None:
    handed_in = host.directory / "key"
    handed_in.write_bytes(os.urandom(64))
    makers: dict[str, tuple[object, ...]] = {
        "console": ("--key-file", handed_in),
        "service": (),
        "tpm": (),
        "mixed": (),
    }
    for maker, more in makers.items():
        disk = host.make(maker, "--key-from", maker, *more, vm_id=maker)
        assert host.read(disk) == CONTENT
    with KeyService.open(host.state) as service:
        assert {info.vm_id: info.origin for info in service.records()} == {m: m for m in makers}
        assert ks.key_bytes(service.unseal("console", "console")) == handed_in.read_bytes()


def test_c8_a_kmi_is_made_by_the_console_the_service_or_the_tpm(host: Host) -> None:
    for maker in ("vm-id", "service", "tpm"):
        disk = host.make(maker, "--kmi", maker, vm_id=f"of-{maker}")
        with contextlib.closing(FileStorage.peek(disk)) as storage:
            identity = read_identity(storage)
        # The console keeps VM id and KMI together in the image.
        assert identity.vm_id == f"of-{maker}"
        assert (identity.kmi == identity.vm_id) == (maker == "vm-id")
        with KeyService.open(host.state) as service:
            service.unseal(identity.kmi, identity.vm_id).wipe()
        assert host.read(disk) == CONTENT


def test_c12_the_tpm_protects_what_the_service_keeps(host: Host, tmp_path: Path) -> None:
    """Registry, ledger, host record and software slots; and a measured state, where asked for."""
    disk = host.make("a", "--slot", "software")
    for name in ("host.record", "registry", "ledger"):
        path = host.state / name
        good = path.read_bytes()
        # Not in the ledger's last row, which a crash may have cut short.
        at = 40 if name == "ledger" else len(good) - 40
        for bad in (good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], None):
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises((KeyRecordDamaged, FormatError, HostNotInitialised)):
                host.read(disk)
            path.write_bytes(good)
    assert host.read(disk) == CONTENT
    # A copied state directory, without its TPM, gives nothing.
    other = Host(tmp_path / "other", own=True)
    without_tpm = shutil.ignore_patterns("tpm")
    shutil.copytree(host.state, other.state, dirs_exist_ok=True, ignore=without_tpm)
    with KeyService.open(other.state) as thief, pytest.raises(KeyRefused, match="not the TPM"):
        thief.unseal("web1", "web1")
    # With a policy, the same TPM under other software gives nothing either.
    with ks.standing_tpm() as tpm:
        ks.fresh_state(tmp_path / "measured", tpm=tpm.spec)
        with KeyService.open(tmp_path / "measured") as service:
            service.create("web1", pcrs=(16,)).wipe()
            service.unseal("web1", "web1").wipe()
            with tpm.esapi() as esapi:
                ks.extend(esapi, 16)
            with pytest.raises(KeyRefused, match="platform state"):
                service.unseal("web1", "web1")
