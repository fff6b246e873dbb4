"""The key service on a real software TPM: keys, records, registry, recovery, several processes."""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import signal
import threading
import traceback
import uuid
from pathlib import Path

import keys_support as ks
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from tpm2_pytss import ESYS_TR

from sealfs.errors import (
    AlreadyExists,
    FormatError,
    HostNotInitialised,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    RecoveryRefused,
    RolledBack,
    StorageFailed,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys import labels
from sealfs.keys.ledger import RESERVED_IDS
from sealfs.keys.records import KeyRecord
from sealfs.keys.registry import RegistryEntry, RegistryFile
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm

UUID = bytes(range(16))


@pytest.fixture
def state(tmp_path) -> Path:
    ks.initialised_state(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def service(state) -> KeyService:
    return KeyService.open(state)


# Setting up


def test_init_sets_up_once_and_then_says_what_it_found(tmp_path):
    first = ks.fresh_state(tmp_path / "s")
    assert first.created
    assert first.recovery == "host"
    assert first.recovery_key is not None
    before = {path: path.read_bytes() for path in (tmp_path / "s").glob("*") if path.is_file()}
    for tpm in ("swtpm", "auto"):
        again = ks.fresh_state(tmp_path / "s", tpm=tpm)
        assert not again.created
        assert again.recovery_key is None
        assert again.host_id == first.host_id
        assert again.recovery_fingerprint == first.recovery_fingerprint
    after = {path: path.read_bytes() for path in (tmp_path / "s").glob("*") if path.is_file()}
    assert before == after
    assert any("whoever copies" in warning for warning in first.warnings)
    json.dumps(first.to_json())
    assert first.recovery_key not in repr(first)


def test_init_that_contradicts_what_is_there_is_refused(tmp_path):
    ks.fresh_state(tmp_path / "s", no_recovery=True)
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    (tmp_path / "org").write_text(key.hex())
    for options in ({"tpm": "device:/dev/tpmrm0"}, {"recovery_to": tmp_path / "org"}):
        with pytest.raises(UsageError):
            ks.fresh_state(tmp_path / "s", **options)
    ks.fresh_state(tmp_path / "t")
    with pytest.raises(UsageError, match="with a recovery recipient"):
        ks.fresh_state(tmp_path / "t", no_recovery=True)
    with pytest.raises(UsageError, match="choose one"):
        ks.fresh_state(tmp_path / "u", recovery_to=tmp_path / "org", no_recovery=True)
    with pytest.raises(UsageError, match="cannot be read"):
        ks.fresh_state(tmp_path / "u", recovery_to=tmp_path / "missing")
    assert not (tmp_path / "u").exists()


def test_auto_without_a_hardware_tpm_names_the_software_one_and_makes_nothing(tmp_path):
    assert not Path("/dev/tpmrm0").exists(), "this test wants a host without a TPM"
    with pytest.raises(TpmUnavailable, match="--tpm swtpm"):
        ks.fresh_state(tmp_path / "s", tpm="auto")
    assert not (tmp_path / "s").exists()


def test_a_directory_that_was_never_set_up_says_so(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(HostNotInitialised):
            KeyService.open(path)


def test_everything_in_the_state_directory_is_private(state, service):
    service.create("web1")
    service.registry.add(state / "a", UUID, "web1")
    for path in [state, *state.rglob("*")]:
        mode = path.stat().st_mode & 0o777
        if path.name != ".lock":  # swtpm's own lock file, empty.
            assert mode & 0o077 == 0, path
    state.chmod(0o770)
    with pytest.raises(UsageError, match="others may write"):
        KeyService.open(state)


def test_init_does_not_close_a_directory_that_holds_other_files(tmp_path):
    (tmp_path / "shared").mkdir(mode=0o755)
    (tmp_path / "shared/somebody's").touch()
    with pytest.raises(UsageError, match="not empty and open to others"):
        ks.fresh_state(tmp_path / "shared")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o755
    (tmp_path / "empty").mkdir(mode=0o755)
    assert ks.fresh_state(tmp_path / "empty").created
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o700


def test_init_over_the_remains_of_a_host_is_refused(state, service):
    service.create("web1")
    (state / "host.record").unlink()
    with pytest.raises(KeyRecordDamaged, match="no host record"):
        ks.fresh_state(state)
    (state / "registry").unlink()
    with pytest.raises(KeyRecordDamaged, match="key records but no host record"):
        ks.fresh_state(state)


# Keys


def test_a_key_comes_back_the_same_in_another_service(state, service):
    key = service.create("web1")
    assert key.vm_id == key.kmi == "web1"
    assert len(ks.key_bytes(key)) == 64
    wrapped = key.wrap_image_key(UUID, b"I" * 32)
    again = KeyService.open(state).unseal("web1", "web1")
    assert ks.key_bytes(again) == ks.key_bytes(key)
    assert again.unwrap_image_key(UUID, wrapped) == b"I" * 32
    assert again.recovery_slots == key.recovery_slots
    assert len(key.recovery_slots) == 1


def test_keys_of_different_vms_and_hosts_are_different(tmp_path, service):
    ks.fresh_state(tmp_path / "other", no_recovery=True)
    keys = [ks.key_bytes(service.create(name)) for name in ("a", "b")]
    keys.append(ks.key_bytes(KeyService.open(tmp_path / "other").create("a")))
    assert len(set(keys)) == 3
    assert len({service.random(32) for _ in range(3)}) == 3


def test_a_vm_has_one_key(service):
    key = service.create("web1")
    with pytest.raises(AlreadyExists):
        service.create("web1")
    with pytest.raises(AlreadyExists):
        service.create("web1", kmi="opaque")
    assert ks.key_bytes(service.ensure("web1")) == ks.key_bytes(key)
    opaque = service.create("web2", kmi="opaque")
    with pytest.raises(AlreadyExists):
        service.create("web2")
    again = service.ensure("web2")
    assert again.kmi == opaque.kmi
    assert ks.key_bytes(again) == ks.key_bytes(opaque)
    assert len(service.records()) == 2


def test_an_opaque_kmi_says_nothing_and_finds_its_key(service):
    key = service.create("web1", kmi="opaque")
    assert len(key.kmi) == 32
    assert "web1" not in key.kmi
    assert service.has(key.kmi)
    assert not service.has("web1")
    assert ks.key_bytes(service.unseal(key.kmi, "web1")) == ks.key_bytes(key)


ODD_IDS = [
    "../../etc/passwd",
    "/",
    ".",
    "..",
    "-rf",
    " ",
    "a b",
    "虚拟机",
    "x" * 255,
    "a'\";$(id)",
    "%s",
]


def test_odd_vm_ids_work_and_never_reach_a_path(state, service):
    before = {path for path in state.parent.rglob("*") if path.parent != state / "keys"}
    for vm_id in ODD_IDS:
        service.create(vm_id).wipe()
    for vm_id in ODD_IDS:
        assert service.unseal(vm_id, vm_id).vm_id == vm_id
    assert sorted(info.vm_id for info in service.records()) == sorted(ODD_IDS)
    assert len(ks.record_files(state)) == len(ODD_IDS)
    for path in set(state.parent.rglob("*")) - before:
        assert path.parent in (state / "keys", state / "tpm"), path
        assert path.name.removesuffix(".slot").isalnum() or path.parent.name == "tpm"


def test_ids_that_cannot_be_stored_are_a_usage_error(service):
    for wrong in ("", "a\0", "a\n", "x" * 256, "\ud800"):
        with pytest.raises(UsageError):
            service.create(wrong)
        with pytest.raises(UsageError):
            service.ensure(wrong)
        for ask in (service.has, service.test, lambda text: service.unseal(text, text)):
            with pytest.raises(UsageError):
                ask(wrong)
    assert service.records() == []
    with pytest.raises(UsageError):
        service.create("web1", pcrs=(24,))


def test_new_vm_ids_are_uuids():
    assert uuid.UUID(KeyService.new_vm_id()) != uuid.UUID(KeyService.new_vm_id())


def test_many_threads_share_a_service(service):
    service.create("web1")
    expected = ks.key_bytes(service.unseal("web1", "web1"))
    found, errors = [], []

    def work(number: int) -> None:
        try:
            if number % 2:
                found.append(ks.key_bytes(service.unseal("web1", "web1")))
            else:
                service.create(f"vm-{number}")
                service.registry.add(Path(f"/x/{number}"), UUID, f"vm-{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(found) == {expected}
    assert len(service.records()) == 6
    assert len(service.registry.entries()) == 5


def test_a_fork_cannot_use_its_parents_service(service):
    service.create("web1")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (
            lambda: service.unseal("web1", "web1"),
            lambda: service.create("web2"),
            lambda: service.registry.entries(),
            lambda: service.random(8),
        ):
            try:
                use()
            except KeyServiceError as error:
                refused += "fork" in str(error)
            except BaseException:
                os._exit(1)
        os.write(writer, bytes([refused]))
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"\x04"
    os.close(reader)
    os.waitpid(child, 0)
    assert service.unseal("web1", "web1").vm_id == "web1"


def test_closing_the_service_wipes_the_host_secret_and_the_next_use_unseals_again(service):
    service.create("web1")
    secret = service._host._secret
    assert secret is not None
    assert any(secret)
    service.close()
    assert not any(secret)
    assert service.registry.entries() == []


# PCR policies (a TPM that stays up)


def test_a_key_tied_to_pcrs_is_refused_after_they_change_and_recover_keeps_the_policy(tmp_path):
    with ks.standing_tpm() as standing:
        report = ks.fresh_state(tmp_path / "s", tpm=standing.spec)
        service = KeyService.open(tmp_path / "s")
        key = service.create("web1", pcrs=(23, 16))
        assert ks.key_bytes(service.unseal("web1", "web1")) == ks.key_bytes(key)
        free = service.create("web2")
        with standing.esapi() as esapi:
            ks.extend(esapi, 23)
        with pytest.raises(KeyRefused, match="platform state"):
            service.unseal("web1", "web1")
        assert ks.key_bytes(service.unseal("web2", "web2")) == ks.key_bytes(free)
        trial = service.test("web1")
        assert [slot.opens for slot in trial] == [False, None]
        assert trial[0].trouble == ("PCR 23 is not what it was",)
        json.dumps([slot.to_json() for slot in trial])

        recovered = service.recover("web1", "web1", key.recovery_slots, report.recovery_key or "")
        assert ks.key_bytes(recovered) == ks.key_bytes(key)
        assert ks.key_bytes(service.unseal("web1", "web1")) == ks.key_bytes(key)
        info = next(info for info in service.records() if info.vm_id == "web1")
        assert info.slots[0].pcrs == (16, 23)
        assert info.origin == "recovered"
        with standing.esapi() as esapi:
            esapi.pcr_reset(ESYS_TR(23))
        with pytest.raises(KeyRefused):
            service.unseal("web1", "web1")


# Records that were put elsewhere or edited


def swap(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def test_swapped_record_files_are_detected(state, service):
    service.create("web1")
    service.create("web2")
    swap(*ks.record_files(state))
    for vm_id in ("web1", "web2"):
        with pytest.raises(KeyRecordDamaged, match="renamed or swapped"):
            service.unseal(vm_id, vm_id)
    assert [info.problem is not None for info in service.records()] == [True, True]


def test_a_renamed_record_file_is_detected(state, service):
    service.create("web1")
    target = state / service._state.record_file("web2")
    ks.record_files(state)[0].rename(target)
    with pytest.raises(KeyRecordDamaged, match="renamed or swapped"):
        service.unseal("web2", "web2")
    with pytest.raises(KeyNotFound):
        service.unseal("web1", "web1")


def rewrite(path: Path, **changes) -> None:
    import dataclasses

    record = KeyRecord.decode(path.read_bytes(), "x")
    path.write_bytes(dataclasses.replace(record, **changes).encode())


def test_a_sealed_key_moved_into_another_record_is_detected(state, service):
    service.create("web1")
    service.create("web2")
    one, two = (state / service._state.record_file(vm) for vm in ("web1", "web2"))
    other = KeyRecord.decode(two.read_bytes(), "x")
    rewrite(one, tpm_slots=other.tpm_slots, mac=other.mac)
    with pytest.raises(KeyRecordDamaged, match="made for another VM"):
        service.unseal("web1", "web1")


def test_an_edited_record_is_detected(state, service):
    service.create("web1")
    path = ks.record_files(state)[0]
    good = path.read_bytes()
    for changes in ({"created": 1}, {"recovery_slots": ()}, {"origin": 2}):
        rewrite(path, **changes)
        with pytest.raises(KeyRecordDamaged, match="does not authenticate"):
            service.unseal("web1", "web1")
        path.write_bytes(good)
    assert service.unseal("web1", "web1").vm_id == "web1"


def test_a_record_asked_for_another_vm_is_refused(service):
    service.create("web1")
    key = service.create("web2", kmi="opaque")
    with pytest.raises(KeyRefused, match="is the key of VM"):
        service.unseal("web1", "web2")
    with pytest.raises(KeyRefused, match="is the key of VM"):
        service.unseal(key.kmi, "web1")


def test_a_damaged_or_oversized_or_strange_record_is_refused(state, service):
    service.create("web1")
    path = ks.record_files(state)[0]
    good = path.read_bytes()
    for content in (b"", good[:40], good + b"x", bytes(len(good)), good * 100):
        path.write_bytes(content)
        with pytest.raises((KeyRecordDamaged, FormatError)):
            service.unseal("web1", "web1")
        with pytest.raises((KeyRecordDamaged, FormatError)):
            service.create("web1")
    path.unlink()
    path.mkdir()
    with pytest.raises(KeyRecordDamaged):
        service.unseal("web1", "web1")
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(KeyRecordDamaged, match="regular file"):
        service.unseal("web1", "web1")
    path.unlink()
    (state / "elsewhere").write_bytes(good)
    path.symlink_to(state / "elsewhere")
    with pytest.raises(KeyRecordDamaged):
        service.unseal("web1", "web1")


@pytest.mark.slow
def test_no_byte_of_a_record_can_be_altered_unnoticed(state, service):
    secret = ks.key_bytes(service.create("web1"))
    path = ks.record_files(state)[0]
    good = path.read_bytes()
    for position in range(0, len(good), 7):
        altered = bytearray(good)
        altered[position] ^= 0x10
        path.write_bytes(bytes(altered))
        with pytest.raises((KeyRecordDamaged, KeyRefused, FormatError)):
            service.unseal("web1", "web1")
    path.write_bytes(good)
    assert ks.key_bytes(service.unseal("web1", "web1")) == secret


def test_a_damaged_record_does_not_stop_the_others(state, service, caplog):
    service.create("web1")
    service.create("web2")
    (state / service._state.record_file("web1")).write_bytes(b"rubbish")
    assert service.unseal("web2", "web2").vm_id == "web2"
    assert service.create("web3").vm_id == "web3"
    assert "skipping a key record" in caplog.text
    assert [info.vm_id for info in service.records() if not info.problem] == ["web2", "web3"]
    json.dumps([info.to_json() for info in service.records()])


# The host record and the registry


def test_an_edited_host_record_is_refused_before_a_key_is_wrapped_to_a_stranger(state, service):
    import dataclasses

    record = ks.host_record(state)
    stranger = X25519PrivateKey.generate().public_key().public_bytes_raw()
    (state / "host.record").write_bytes(dataclasses.replace(record, recipient=stranger).encode())
    edited = KeyService.open(state)
    with pytest.raises(KeyRecordDamaged, match="does not authenticate"):
        edited.create("web1")
    assert not edited.has("web1")
    with pytest.raises(KeyRecordDamaged):
        ks.fresh_state(state)


def test_the_registry_remembers_renames_and_forgets(state, service, tmp_path):
    registry = service.registry
    assert registry.entries() == []
    assert registry.lookup(tmp_path / "a") is None
    registry.add(tmp_path / "b", UUID, "web2")
    registry.add(tmp_path / "a", UUID, "web1")
    registry.add(tmp_path / "a", UUID, "web1")
    assert [entry.vm_id for entry in registry.entries()] == ["web1", "web2"]
    with pytest.raises(AlreadyExists, match="web1"):
        registry.add(tmp_path / "a", bytes(16), "web1")
    registry.add(tmp_path / "a", bytes(16), "web1", replace=True)
    with registry.moving([(tmp_path / "a", tmp_path / "c"), (tmp_path / "x", tmp_path / "y")]):
        for name in "ac":  # whichever stands there, after a crash
            KeyService.open(state).registry.check(tmp_path / name, bytes(16), "web1")
    assert registry.lookup(tmp_path / "a") is None
    found = KeyService.open(state).registry.lookup(tmp_path / "c")
    assert found is not None
    assert (found.image_uuid, found.vm_id) == (bytes(16), "web1")
    with pytest.raises(RuntimeError), registry.moving([(tmp_path / "c", tmp_path / "b")]):
        raise RuntimeError
    assert [entry.vm_id for entry in registry.entries()] == ["web2", "web1"]
    registry.remove(tmp_path / "c")
    registry.remove(tmp_path / "c")
    assert [entry.vm_id for entry in registry.entries()] == ["web2"]
    json.dumps([entry.to_json() for entry in registry.entries()])


def test_the_registry_knows_a_file_by_its_canonical_path(service, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    service.registry.add(tmp_path / "link/../link/a.sealed", UUID, "web1")
    assert service.registry.lookup(tmp_path / "real/a.sealed") is not None
    odd = tmp_path / os.fsdecode(b"\xff\xfe name")
    service.registry.add(odd, UUID, "web2")
    assert service.registry.lookup(odd) is not None
    with pytest.raises(UsageError):
        service.registry.add(Path("/x" * 3000), UUID, "web3")


def test_an_edited_removed_or_foreign_registry_is_refused(state, service, tmp_path):
    service.registry.add(tmp_path / "a", UUID, "web1")
    path = state / "registry"
    good = path.read_bytes()
    for position in range(0, len(good), 5):
        altered = bytearray(good)
        altered[position] ^= 4
        path.write_bytes(bytes(altered))
        with pytest.raises((KeyRecordDamaged, FormatError)):
            service.registry.entries()
        with pytest.raises((KeyRecordDamaged, FormatError)):
            service.registry.add(tmp_path / "b", UUID, "web2")
    ks.fresh_state(tmp_path / "other")
    shutil.copy(tmp_path / "other/registry", path)
    with pytest.raises(KeyRecordDamaged, match="another host"):
        service.registry.lookup(tmp_path / "a")
    path.unlink()
    with pytest.raises(KeyRecordDamaged, match="removed"):
        service.registry.lookup(tmp_path / "a")
    with pytest.raises(KeyRecordDamaged):
        service.registry.add(tmp_path / "a", UUID, "web1")
    path.write_bytes(good)
    assert service.registry.lookup(tmp_path / "a") is not None


def test_an_older_registry_of_this_host_is_refused(state, service, tmp_path):
    registry = state / "registry"
    empty = registry.read_bytes()
    service.registry.add(tmp_path / "a", UUID, "web1")
    one = registry.read_bytes()
    service.registry.add(tmp_path / "b", UUID, "web1")
    two = registry.read_bytes()
    for old in (empty, one):
        registry.write_bytes(old)
        for use in (
            lambda: service.registry.lookup(tmp_path / "a"),
            lambda: service.registry.check(tmp_path / "a", UUID, "web1"),
            lambda: service.registry.add(tmp_path / "c", UUID, "web1"),
            lambda: service.registry.remove(tmp_path / "c"),
        ):
            with pytest.raises(RolledBack, match="has seen it at change 2"):
                use()
        assert registry.read_bytes() == old
    registry.write_bytes(one)
    assert service.registry.rebase()
    assert service.registry.lookup(tmp_path / "b") is None
    registry.write_bytes(two)  # newer than what was accepted: as after a crash before the note
    assert service.registry.lookup(tmp_path / "b") is not None
    for lost in (b"rubbish", two[:-1], None):
        registry.unlink() if lost is None else registry.write_bytes(lost)
        with pytest.raises((KeyRecordDamaged, FormatError)):
            service.registry.entries()
        assert not service.registry.rebase()
        assert service.registry.entries() == []
        service.registry.add(tmp_path / "b", UUID, "web1")
    registry.write_bytes(two)
    with pytest.raises(RolledBack):
        service.registry.entries()


def test_a_registry_whose_change_was_never_noted_is_taken_and_its_fork_is_not(
    state, service, tmp_path, monkeypatch
):
    registry = state / "registry"
    before = registry.read_bytes()

    def dies(images: object) -> None:
        raise StorageFailed("ledger", "cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(service.ledger, "note", dies)
        with pytest.raises(StorageFailed):
            service.registry.add(tmp_path / "lost", UUID, "web1")
    unnoted = registry.read_bytes()
    assert service.registry.lookup(tmp_path / "lost") is not None
    registry.write_bytes(before)
    service.registry.add(tmp_path / "other", UUID, "web1")
    registry.write_bytes(unnoted)  # as many changes, but not those that were noted
    with pytest.raises(RolledBack, match="at change 1"):
        service.registry.entries()


def test_a_registry_of_format_version_1_is_read_and_written_anew(state, service, tmp_path):
    entries = (RegistryEntry(str(tmp_path / "a"), UUID, "web1"),)
    host_id = ks.host_record(state).host_id
    with service._host.subkey(labels.REGISTRY_MAC_INFO) as mac_key:
        old = RegistryFile(host_id, entries, version=1).with_mac(mac_key).encode()
    assert old[8:10] == b"\0\x01"
    (state / "registry").write_bytes(old)
    assert service.registry.lookup(tmp_path / "a") is not None
    service.registry.add(tmp_path / "b", UUID, "web1")
    assert (state / "registry").read_bytes()[8:10] == b"\0\x02"
    assert len(service.registry.entries()) == 2
    (state / "registry").write_bytes(old)
    with pytest.raises(RolledBack):
        service.registry.entries()


def test_a_state_directory_copied_without_its_tpm_gives_nothing(state, service, tmp_path):
    service.create("web1")
    ks.fresh_state(tmp_path / "thief")
    shutil.copytree(state, tmp_path / "copy", ignore=shutil.ignore_patterns("tpm"))
    shutil.copytree(tmp_path / "thief/tpm", tmp_path / "copy/tpm")
    stolen = KeyService.open(tmp_path / "copy")
    for use in (
        lambda: stolen.unseal("web1", "web1"),
        lambda: stolen.create("web2"),
        lambda: stolen.registry.entries(),
    ):
        with pytest.raises(KeyRefused, match="not the TPM of init"):
            use()


# Recovery


def test_a_fresh_host_opens_a_vm_from_its_slots_and_the_printed_key(tmp_path):
    report = ks.fresh_state(tmp_path / "lost")
    original = KeyService.open(tmp_path / "lost").create("web1")
    wrapped = original.wrap_image_key(UUID, b"I" * 32)
    slots, printed = original.recovery_slots, report.recovery_key or ""
    shutil.rmtree(tmp_path / "lost")

    ks.fresh_state(tmp_path / "new")
    service = KeyService.open(tmp_path / "new")
    with pytest.raises(KeyNotFound):
        service.unseal("web1", "web1")
    recovered = service.recover("web1", "web1", slots, printed.upper().replace("-", " "))
    assert recovered.unwrap_image_key(UUID, wrapped) == b"I" * 32
    again = KeyService.open(tmp_path / "new").unseal("web1", "web1")
    assert ks.key_bytes(again) == ks.key_bytes(original)
    # The old paper and the new one both open it from now on.
    assert again.recovery_slots[0] == slots[0]
    assert len(again.recovery_slots) == 2
    # Repeating changes nothing.
    before = ks.record_files(tmp_path / "new")[0].read_bytes()
    service.recover("web1", "web1", slots, printed)
    assert ks.record_files(tmp_path / "new")[0].read_bytes() == before


def test_a_wrong_or_mistyped_recovery_key_is_refused_and_leaves_nothing(tmp_path, service):
    report = ks.fresh_state(tmp_path / "a", no_recovery=False)
    other = ks.fresh_state(tmp_path / "b")
    slots = KeyService.open(tmp_path / "a").create("web1").recovery_slots
    printed = report.recovery_key or ""
    with pytest.raises(RecoveryRefused, match="the slots are for"):
        service.recover("web1", "web1", slots, other.recovery_key or "")
    typo = ("b" if printed[0] != "b" else "c") + printed[1:]
    with pytest.raises(RecoveryRefused, match="checksum"):
        service.recover("web1", "web1", slots, typo)
    with pytest.raises(RecoveryRefused, match="no recovery slot"):
        service.recover("web1", "web1", [], printed)
    with pytest.raises(KeyRecordDamaged, match="another VM"):
        service.recover("web2", "web2", slots, printed)
    assert service.records() == []
    assert service.recover("web1", "web1", [b"rubbish", *slots], printed).vm_id == "web1"


def test_recover_replaces_a_damaged_record_and_leaves_a_good_one(state, service, caplog):
    report = ks.initialised_state(state.parent / "again")
    printed = report.recovery_key or ""
    key = service.create("web1")
    path = ks.record_files(state)[0]
    good = path.read_bytes()
    for damage in (b"rubbish", good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(damage)
        recovered = service.recover("web1", "web1", key.recovery_slots, printed)
        assert ks.key_bytes(recovered) == ks.key_bytes(key)
        assert ks.key_bytes(service.unseal("web1", "web1")) == ks.key_bytes(key)
    assert "replacing the key record" in caplog.text


def test_recover_does_not_replace_a_working_key_by_another(state, service, tmp_path):
    report = ks.initialised_state(tmp_path / "twin")
    foreign = KeyService.open(tmp_path / "twin").create("web1")
    mine = service.create("web1")
    with pytest.raises(KeyRefused, match="another key for this VM"):
        service.recover("web1", "web1", foreign.recovery_slots, report.recovery_key or "")
    assert ks.key_bytes(service.unseal("web1", "web1")) == ks.key_bytes(mine)


def test_recover_does_not_replace_another_key_that_a_pin_would_open(state, service, tmp_path):
    report = ks.initialised_state(tmp_path / "twin")
    foreign = KeyService.open(tmp_path / "twin").create("web1")
    pin = bytearray(b"correct horse")
    mine = service.create("web1", pin=bytearray(pin))
    with pytest.raises(KeyRefused, match="another key for this VM"):
        service.recover("web1", "web1", foreign.recovery_slots, report.recovery_key or "")
    assert ks.key_bytes(service.unseal("web1", "web1", pin=pin)) == ks.key_bytes(mine)
    # Its own key is, of whoever forgot the PIN.
    recovered = service.recover("web1", "web1", mine.recovery_slots, report.recovery_key or "")
    assert ks.key_bytes(recovered) == ks.key_bytes(mine)


@pytest.mark.parametrize("reserved", sorted(RESERVED_IDS))
def test_an_image_is_not_taken_for_the_registry_or_the_audit_log(service, reserved):
    key = service.create("web1")
    wrapped = key.wrap_image_key(reserved, bytes(32))
    with pytest.raises(KeyRefused, match="keeps for itself"):
        service.image_key("web1", "web1", reserved, wrapped)


def test_an_organisations_key_recovers_and_no_recovery_means_none(tmp_path):
    private = X25519PrivateKey.generate()
    (tmp_path / "org.pem").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    report = ks.fresh_state(tmp_path / "a", recovery_to=tmp_path / "org.pem")
    assert report.recovery_key is None
    assert report.recovery == "organisation"
    key = KeyService.open(tmp_path / "a").create("web1", kmi="opaque")
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()
    report = ks.fresh_state(tmp_path / "b", no_recovery=True)
    assert any("no recovery key" in warning for warning in report.warnings)
    service = KeyService.open(tmp_path / "b")
    assert service.create("bare").recovery_slots == ()
    recovered = service.recover("web1", key.kmi, key.recovery_slots, pem)
    assert ks.key_bytes(recovered) == ks.key_bytes(key)
    assert ks.key_bytes(service.unseal(key.kmi, "web1")) == ks.key_bytes(key)


# Several processes, and processes that die

SIDE_BY_SIDE = """
import sys
from pathlib import Path
from sealfs.keys.service import KeyService
state, name = Path(sys.argv[1]), sys.argv[2]
with KeyService.open(state) as service:
    for number in range(4):
        service.create(f"{name}-{number}").wipe()
        service.registry.add(Path(f"/images/{name}-{number}"), bytes(16), name)
        with service.ensure("shared") as key:
            pass
    with service.ensure("shared") as key, key.secret() as secret:
        print(secret.hex())
"""


def test_processes_side_by_side_share_one_state_directory(state, service):
    children = [ks.run_python(SIDE_BY_SIDE, str(state), name) for name in ("a", "b", "c")]
    said = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    assert all(errors == "" for _, errors in said)
    assert len({output for output, _ in said}) == 1
    assert len(service.records()) == 13
    assert len(service.registry.entries()) == 12
    for info in service.records():
        service.unseal(info.kmi, info.vm_id).wipe()


def killed_after(step: int, work) -> bool:
    """Run `work` in a forked child that is killed at its `step`-th writing call; False if never.

    Every call of the list is a step before and a step after.
    """
    child = os.fork()
    if child == 0:
        left = step

        def one_step() -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        def counted(call):
            def counting(*arguments, **options):
                one_step()
                result = call(*arguments, **options)
                one_step()
                return result

            return counting

        for name in ("write", "fsync", "replace", "link", "unlink", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.slow
def test_create_killed_at_any_step_leaves_a_key_that_opens_or_nothing(state):
    outcomes = set()
    step = 0
    while True:
        vm_id = f"vm-{step}"
        survived = not killed_after(step, lambda name=vm_id: KeyService.open(state).create(name))
        service = KeyService.open(state)
        if service.has(vm_id):
            outcomes.add("opens")
            service.unseal(vm_id, vm_id).wipe()
        else:
            outcomes.add("nothing")
        service.ensure(vm_id).wipe()
        assert [path.name for path in (state / "keys").glob(".new-*")] == []
        assert all(info.problem is None for info in service.records())
        if survived:
            break
        step += 1
    assert step >= 10
    assert outcomes == {"opens", "nothing"}


@pytest.mark.slow
def test_init_killed_at_any_step_can_be_repeated_and_leaks_no_counter(tmp_path):
    with ks.standing_tpm() as standing:
        step = 0
        while True:
            path = tmp_path / f"s{step}"

            def work(target: Path = path) -> None:
                ks.fresh_state(target, tpm=standing.spec)

            survived = not killed_after(step, work)
            report = ks.fresh_state(path, tpm=standing.spec)
            KeyService.open(path).create("web1").wipe()
            if report.created:
                assert report.recovery_key is not None
            with standing.esapi() as esapi:
                _, answer = esapi.get_capability(1, 0x01800000, 64)
                listed = answer.data.handles
                taken = [int(handle) for handle in listed if int(handle) < 0x01C00000]
            assert len(taken) == step + 1
            if survived:
                break
            step += 1
        assert step >= 20


# Nothing shows a key


def forms_of(secret: bytes) -> list[str]:
    return [
        secret.hex(),
        base64.b64encode(secret).decode().rstrip("="),
        repr(secret)[2:-1],
        str(list(secret))[1:-1],
    ]


def test_no_key_appears_in_reprs_errors_or_logs(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    report = ks.fresh_state(tmp_path / "s")
    service = KeyService.open(tmp_path / "s")
    key = service.create("web1")
    secret = ks.key_bytes(key)
    host_secret = bytes(service._host._secret or b"")
    wrapped = key.wrap_image_key(UUID, b"I" * 32)
    shown = [repr(key), str(key), repr(service), repr(service.registry), repr(report)]
    shown += [repr(service.records()), repr(service.test("web1")), repr(service._host.record)]
    shown.append(json.dumps([info.to_json() for info in service.records()]))

    def damage() -> None:
        path = ks.record_files(tmp_path / "s")[0]
        rewrite(path, created=1)
        service.unseal("web1", "web1")

    for fail in (
        lambda: key.unwrap_image_key(bytes(16), wrapped),
        lambda: service.recover("web1", "web1", (), report.recovery_key or ""),
        lambda: service.recover("web1", "web1", (), (report.recovery_key or "")[:-1] + "b"),
        damage,
    ):
        try:
            fail()
        except KeyServiceError as error:
            shown.append("".join(traceback.format_exception(error)))
            shown.append(repr(error) + str(error) + str(vars(error)))
    everything = "\n".join(shown) + caplog.text
    assert len(shown) >= 17
    secrets = [secret[:32], secret[32:], host_secret[:32], host_secret[32:], b"I" * 32]
    for part in secrets:
        assert not any(form in everything for form in forms_of(part))
    assert (report.recovery_key or "")[:17] not in everything
    # Positive control: the same search finds a planted key in each form.
    logging.getLogger("sealfs.test").debug("planted %s", secret[:32].hex())
    assert secret[:32].hex() in caplog.text
    for form in forms_of(secret[:32]):
        assert any(form in everything + form for form in forms_of(secret[:32]))


# The capabilities by name


def test_c9_the_service_makes_a_vm_id_and_the_kmi_follows_from_it(service):
    vm_id = KeyService.new_vm_id()
    key = service.create(vm_id)
    assert key.kmi == vm_id
    assert service.unseal(vm_id, vm_id).vm_id == vm_id


def test_c11_in_process_the_console_asks_the_tpm_directly_and_reaches_it_per_use(state):
    log: list[bytes] = []
    console = ks.wrapped_service(state, lambda channel: ks.Tap(channel, log))
    console.create("web1")
    cc_unseal = (0x15E).to_bytes(4, "big")
    log.clear()
    console.unseal("web1", "web1")
    assert sum(message[6:10] == cc_unseal for message in log) == 1
    with console._state.lock():
        pass  # Nothing of the TPM is held between uses.
