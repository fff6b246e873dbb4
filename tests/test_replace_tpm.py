"""A host whose TPM was cleared or replaced, set up anew; cut off after every durable step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import keys_support as ks
import pytest
from tpm2_pytss.constants import TPM2_CAP

from sealfs.errors import (
    HostNotInitialised,
    KeyRefused,
    RecoveryRefused,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys.hostrecord import RecoveryKind
from sealfs.keys.ledger import Progress
from sealfs.keys.service import KeyService
from sealfs.keys.statedir import StateDir

pytestmark = pytest.mark.tpm

NV_FIRST = 0x01800000
IMAGE = b"i" * 16
SEEN = Progress(7, b"m" * 16)
DURABLE = ("write", "rename", "remove", "append")


class Died(BaseException):
    """The process ends here."""


def replace(path: Path, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        "tpm": None, "recovery_to": None, "recovery_key": None, "no_recovery": False,
    }  # fmt: skip
    return KeyService.replace_tpm(path, **(chosen | options))


@pytest.fixture
def host(tmp_path) -> tuple[Path, str, bytes]:
    """A host with one VM and one image in its ledger, whose TPM is lost."""
    path = tmp_path / "state"
    text = ks.initialised_state(path).recovery_key
    assert text is not None
    with KeyService.open(path) as keys:
        with keys.create("web1") as key:
            raw = ks.key_bytes(key)
        keys.ledger.note({IMAGE: SEEN})
        keys.registry.add(tmp_path / "a", IMAGE, "web1")
    shutil.rmtree(path / "tpm")
    return path, text, raw


def test_keys_of_before_come_back_by_the_recovery_key(host):
    path, text, raw = host
    report = replace(path, recovery_key=text)
    assert report.created
    assert report.recovery_key is None
    with KeyService.open(path) as keys:
        with pytest.raises(KeyRefused, match="another TPM"):
            keys.unseal("web1", "web1")
        (info,) = keys.records()
        slots = keys._vault.read_known("web1").recovery_slots
        with keys.recover("web1", info.kmi, slots, text) as key:
            assert ks.key_bytes(key) == raw
        with keys.unseal("web1", "web1") as key:
            assert ks.key_bytes(key) == raw
        assert keys.ledger.find(IMAGE) == SEEN
        assert keys.registry.entries() == []  # nothing authenticates the old one any more
        keys.ledger.begin()


@pytest.mark.parametrize("slot", ["tpm", "software"])
def test_a_rotation_that_the_lost_tpm_cut_off_stands_in_nobodys_way(host, slot):
    path, text, _ = host
    shutil.rmtree(path)
    ks.initialised_state(path)
    with KeyService.open(path) as keys:
        keys.create("web1", slot=slot).wipe()
        with keys.rotating("web1") as rotation:
            rotation.begin()
            slots = rotation.recovery_slots
        # It stays as long as it opens.
        keys.recover("web1", "web1", slots, text).wipe()
        assert keys.records()[0].is_changing
    shutil.rmtree(path / "tpm")
    replace(path, recovery_key=text)
    with KeyService.open(path) as keys:
        keys.recover("web1", "web1", slots, text).wipe()
        assert not keys.records()[0].is_changing
        keys.new_image_key("web1", IMAGE)
        with keys.rotating("web1") as rotation:
            rotation.begin()
            rotation.finish()


def test_the_recovery_key_is_kept_changed_or_given_up_as_asked(host):
    path, text, _ = host
    before = ks.host_record(path)
    assert replace(path).recovery_key not in (None, text)
    shutil.rmtree(path / "tpm")
    assert ks.host_record(path).recipient != before.recipient
    replace(path, recovery_key=text)
    assert ks.host_record(path).recipient == before.recipient
    assert ks.host_record(path).recovery is RecoveryKind.HOST
    shutil.rmtree(path / "tpm")
    replace(path, no_recovery=True)
    assert ks.host_record(path).recovery is RecoveryKind.NONE
    shutil.rmtree(path / "tpm")
    with pytest.raises(RecoveryRefused, match="mistyped"):
        replace(path, recovery_key=text[:-1])
    with pytest.raises(UsageError, match="choose one"):
        replace(path, recovery_key=text, no_recovery=True)


def test_nothing_is_replaced_while_the_tpm_still_gives_its_keys(tmp_path):
    ks.initialised_state(tmp_path / "state")
    before = {file: file.read_bytes() for file in (tmp_path / "state").iterdir() if file.is_file()}
    with pytest.raises(UsageError, match="nothing to replace"):
        replace(tmp_path / "state")
    after = {file: file.read_bytes() for file in (tmp_path / "state").iterdir() if file.is_file()}
    assert before == after
    with pytest.raises(HostNotInitialised):
        replace(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_tpm_that_does_not_answer_replaces_nothing(host):
    path, _, _ = host
    before = (path / "host.record").read_bytes()
    with pytest.raises(TpmUnavailable):
        replace(path, tpm="swtpm:path=/nonexistent")
    assert (path / "host.record").read_bytes() == before


def test_a_lost_host_record_is_a_lost_tpm(host):
    path, _, _ = host
    (path / "host.record").unlink()
    replace(path, tpm="swtpm")
    with KeyService.open(path) as keys:
        assert keys.ledger.find(IMAGE) == SEEN
        assert [info.vm_id for info in keys.records()] == ["web1"]


def test_a_ledger_that_somebody_wrote_can_only_refuse(host):
    path, _, _ = host
    (path / "ledger").write_bytes(b"rubbish")
    replace(path)
    with KeyService.open(path) as keys:
        assert keys.ledger.find(IMAGE) is None


def test_cut_off_after_any_durable_step_it_can_be_repeated(host, monkeypatch, tmp_path):
    source, text, _ = host
    steps = 0
    while True:
        path = tmp_path / f"cut{steps}"
        shutil.copytree(source, path)
        left = steps
        with monkeypatch.context() as patch:
            for name in DURABLE:
                real = getattr(StateDir, name)

                def dies(self: StateDir, *args: Any, _real: Any = real) -> Any:
                    nonlocal left
                    if left == 0:
                        raise Died
                    left -= 1
                    return _real(self, *args)

                patch.setattr(StateDir, name, dies)
            try:
                replace(path, recovery_key=text)
                break
            except Died:
                pass
        if (path / "host.record").read_bytes() == (source / "host.record").read_bytes():
            replace(path, recovery_key=text)
        assert not (path / "host.pending").exists()
        with KeyService.open(path) as keys:
            assert keys.ledger.find(IMAGE) == SEEN, f"cut after step {steps}"
            with keys.create("web2"):
                pass
            with keys._host.tpm() as tpm:
                _, found = tpm._plain("get_capability", TPM2_CAP.HANDLES, NV_FIRST, 64)
                assert found.data.handles.count == 1, f"an NV index leaked: cut {steps}"
        steps += 1
    assert steps >= 8
