"""The audit log: what is in it, and that an edited, removed or added line is found."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import keys_support as ks
import pytest

from sealfs.errors import KeyNotFound, KeyRefused
from sealfs.keys import audit
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm


@pytest.fixture
def service(tmp_path) -> KeyService:
    ks.initialised_state(tmp_path / "state")
    return KeyService.open(tmp_path / "state")


@pytest.fixture
def log(service) -> Path:
    """A log of six lines."""
    for number in range(6):
        service.audit.record("key used", vm=f"web{number}")
    path: Path = service._state.path / "audit.log"
    path.write_bytes(path.read_bytes())
    assert service.audit.verify()[1] == []
    return path


def entries(service: KeyService) -> list[dict[str, Any]]:
    return [entry for _, _, entry in service.audit.entries() if entry is not None]


def findings(service: KeyService) -> list[str]:
    return service.audit.verify()[1]


def test_everything_done_with_a_key_is_a_line_and_no_key_is_in_it(service):
    with service.create("web1", kmi="opaque") as key:
        kmi, slots, secret = key.kmi, key.recovery_slots, ks.key_bytes(key)
    service.unseal(kmi, "web1", image_uuid=b"u" * 16).wipe()
    service.ensure("web1").wipe()
    service.ensure("web2").wipe()
    service.test(kmi)
    with pytest.raises(KeyNotFound):
        service.unseal("web9", "web9")
    with pytest.raises(KeyRefused):
        service.unseal(kmi, "web2")
    service.recover("web1", kmi, slots, ks.initialised_recovery_key()).wipe()
    found = [(e["event"], e.get("vm"), e["outcome"].partition(":")[0]) for e in entries(service)][
        1:
    ]
    assert found == [
        ("key made", "web1", "ok"),
        ("key used", "web1", "ok"),
        ("key used", "web1", "ok"),
        ("key made", "web2", "ok"),
        ("key tested", None, "ok"),
        ("key used", "web9", "KeyNotFound"),
        ("key used", "web2", "KeyRefused"),
        ("key recovered", "web1", "ok"),
    ]
    assert entries(service)[0]["event"] == "host set up"
    assert entries(service)[2]["image"] == (b"u" * 16).hex()
    assert findings(service) == []
    raw = (service._state.path / "audit.log").read_bytes()
    for piece in (secret, secret[:8]):
        assert piece not in raw
        assert piece.hex().encode() not in raw


def test_any_byte_of_any_line_that_is_changed_is_found(service, log):
    good = log.read_bytes()
    for at in range(0, len(good), 7):
        log.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert findings(service), f"byte {at}"
    log.write_bytes(good)
    assert findings(service) == []


def test_a_line_that_is_removed_repeated_or_moved_is_found(service, log):
    lines = log.read_bytes().splitlines(keepends=True)
    for at in range(len(lines)):
        log.write_bytes(b"".join(lines[:at] + lines[at + 1 :]))
        (finding,) = findings(service)
        assert "1 lines are missing" in finding
        log.write_bytes(b"".join([*lines[: at + 1], *lines[at:]]))
        assert "repeats" in findings(service)[0]
    log.write_bytes(b"".join([lines[1], lines[0], *lines[2:]]))
    assert findings(service)
    log.unlink()
    assert findings(service) == [f"{len(lines)} lines are missing at the end"]


def test_what_is_left_under_the_name_of_the_oldest_file_is_not_the_whole_log(service, log):
    lines = log.read_bytes().splitlines(keepends=True)
    for kept in (lines[-1:], lines[2:]):
        log.with_name("audit.log.9").write_bytes(b"".join(kept))
        log.unlink(missing_ok=True)
        assert any("missing before it" in finding for finding in findings(service))


def test_what_is_missing_at_the_end_stays_missed_when_the_log_goes_on(service, log):
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:-2]))
    service.audit.record("key used", vm="later")
    assert "2 lines are missing before it" in findings(service)[0]
    log.write_bytes(b"rubbish\n")
    service.audit.record("key used", vm="latest")
    assert json.loads(log.read_bytes().splitlines()[-1])["n"] == len(lines) + 2
    assert any("was edited" in finding for finding in findings(service))


def test_a_line_of_another_key_is_found(service, log, tmp_path):
    ks.fresh_state(tmp_path / "other")
    with KeyService.open(tmp_path / "other") as other:
        other.audit.record("key used", vm="evil")
    foreign = (tmp_path / "other/audit.log").read_bytes().splitlines(keepends=True)[-1]
    log.write_bytes(log.read_bytes() + foreign)
    assert any("was edited" in finding for finding in findings(service))


def test_a_line_cut_short_by_a_crash_is_written_over(service, log):
    good = log.read_bytes()
    log.write_bytes(good + b'{"n":8,"time":"20')
    assert findings(service) == []
    service.audit.record("key used", vm="next")
    assert findings(service) == []
    assert log.read_bytes().startswith(good)


def test_a_line_that_the_ledger_never_heard_of_is_taken(service, log, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(service.ledger, "note", lambda images: None)  # a crash between the two
        service.audit.record("key used", vm="last")
    assert findings(service) == []
    service.audit.record("key used", vm="next")
    assert findings(service) == []


def test_full_files_are_kept_and_the_chain_goes_through_them(service, monkeypatch):
    monkeypatch.setattr(audit, "AUDIT_SIZE", 2000)
    for number in range(30):
        service.audit.record("key used", vm=f"web{number}")
    names = sorted(path.name for path in service._state.path.glob("audit.log*"))
    assert len(names) > 3
    assert findings(service) == []
    assert [e["n"] for e in entries(service)] == list(range(1, 32))
    middle = service._state.path / "audit.log.2"
    kept = middle.read_bytes()
    middle.unlink()
    assert "lines are missing before it" in findings(service)[0]
    middle.write_bytes(kept)
    for number in range(110):
        service.audit.record("key used", vm=f"web{number}")
    assert findings(service) == []
    assert entries(service)[0]["n"] > 1  # the oldest file was dropped
    assert not (service._state.path / "audit.log.10").exists()
    oldest = service._state.path / "audit.log.9"
    oldest.unlink()
    assert "lines are missing before it" in findings(service)[0]


def test_a_log_that_cannot_be_written_stops_nothing_and_says_so(service, caplog):
    (service._state.path / "audit.log").unlink(missing_ok=True)
    (service._state.path / "audit.log").mkdir()
    service.create("web1").wipe()
    assert "the audit log lacks 'key made' of 'web1'" in caplog.text


def _write_many(state: Path) -> None:
    with KeyService.open(state) as keys:
        for number in range(20):
            keys.audit.record("key used", vm=f"web{number}")


def test_several_processes_write_one_chain(service):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_many, args=(service._state.path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert service.audit.verify() == (61, [])
