"""`doctor`: what it says of hosts that are not as this one is."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from sealfs.cli import doctor, health, health_keys, health_storage, health_system
from sealfs.cli.health import FAIL, NOTE, OK, WARN, Health
from sealfs.cli.settings import Settings
from sealfs.mount import unshown


def settings_of(tmp_path: Path, *, is_root: bool = True) -> Settings:
    settings = Settings(state=tmp_path / "state")
    settings.situation.state = settings.state
    settings.situation.is_root = is_root
    settings.situation.arguments = ("doctor",)
    return settings


def levels(findings: list[Health]) -> list[tuple[str, str]]:
    return [(finding.level, finding.subject) for finding in findings]


def program(directory: Path, name: str, mode: int) -> Path:
    path = directory / name
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(("is_root", "bad"), [(True, NOTE), (False, FAIL)])
def test_fusermount_is_needed_by_ordinary_users_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_root: bool, bad: str
) -> None:
    settings = settings_of(tmp_path, is_root=is_root)
    monkeypatch.setenv("PATH", str(tmp_path))
    [missing] = health_system.fusermount(settings)
    sudo = "" if is_root else "sudo "
    assert (missing.level, missing.mend) == (bad, f"{sudo}apt install fuse3")
    path = program(tmp_path, "fusermount3", 0o755)
    [no_setuid] = health_system.fusermount(settings)
    assert no_setuid.level == bad
    assert "not setuid" in no_setuid.text
    path.chmod(0o4755)
    if os.geteuid() == 0:
        assert next(iter(health_system.fusermount(settings))).level == OK


def test_other_users_are_let_in_by_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a program that is setuid root is made")
    program(tmp_path, "fusermount3", 0o4755)
    monkeypatch.setenv("PATH", str(tmp_path))
    configuration = tmp_path / "fuse.conf"
    monkeypatch.setattr(health_system, "FUSE_CONFIGURATION", configuration)
    wmem = tmp_path / "wmem_max"
    monkeypatch.setattr(health_system, "WMEM_MAX", wmem)
    user = settings_of(tmp_path, is_root=False)
    for text, said in (("#user_allow_other\n", True), ("user_allow_other\n", False)):
        configuration.write_text(text)
        found = list(health_system.fusermount(user))
        assert any("user_allow_other" in finding.text for finding in found) is said
    wmem.write_text("212992\n")
    small = list(health_system.fusermount(user))[-1]
    assert (small.level, small.mend) == (NOTE, "sudo sysctl net.core.wmem_max=4194304")
    wmem.write_text("8388608\n")
    assert levels(list(health_system.fusermount(user))) == [(OK, "user mounts")]


def test_swap_that_is_encrypted_or_in_memory_is_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swaps, devices = tmp_path / "swaps", tmp_path / "block"
    monkeypatch.setattr(health_system, "SWAPS", swaps)
    monkeypatch.setattr(health_system, "BLOCK_DEVICES", devices)
    (devices / "dm-3" / "dm").mkdir(parents=True)
    (devices / "dm-3" / "dm" / "uuid").write_text("CRYPT-PLAIN-swap\n")
    (devices / "dm-4" / "dm").mkdir(parents=True)
    (devices / "dm-4" / "dm" / "uuid").write_text("LVM-abc\n")
    (devices / "zram1").mkdir()
    (devices / "zram1" / "backing_dev").write_text("/dev/sdb\n")
    head = "Filename Type Size Used Priority\n"
    for device, level in (
        ("/dev/dm-3", OK),
        ("/dev/zram0", OK),
        ("/dev/zram1", WARN),
        ("/dev/dm-4", WARN),
        ("/swapfile", WARN),
    ):
        swaps.write_text(f"{head}{device} partition 1 0 -2\n")
        [finding] = health_system.swap(settings_of(tmp_path))
        assert finding.level == level, device
        assert finding.mend == (None if level == OK else f"swapoff {device}")


def test_a_host_without_syslog_is_told_where_the_log_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_system, "SYSLOG", str(tmp_path / "log"))
    [finding] = health_system.log(settings_of(tmp_path))
    assert finding.level == NOTE
    assert "mount.log" in finding.text


def test_versions_name_what_a_report_needs(tmp_path: Path) -> None:
    [finding] = health_system.versions(settings_of(tmp_path))
    for word in ("sealfs", "Python", "Linux", "libfuse", "pyfuse3", "cryptography"):
        assert f"{word} " in finding.text


def test_a_library_that_is_missing_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_system, "PARTS", (("sealfs.no_such_module", "mount"),))
    found = list(health_system.versions(settings_of(tmp_path)))
    assert levels(found) == [(OK, "versions"), (FAIL, "libraries")]


@pytest.mark.parametrize(
    ("kind", "level"),
    [("ext4", OK), ("xfs", OK), ("btrfs", WARN), ("zfs", WARN), ("nfs4", WARN), ("ceph", WARN),
     ("fuse.sshfs", FAIL), ("fuse.sealfs", FAIL), ("strange", WARN)],
)  # fmt: skip
def test_file_systems(monkeypatch: pytest.MonkeyPatch, kind: str, level: str) -> None:
    monkeypatch.setattr(health_storage, "_file_system_of", lambda device: kind)
    [finding] = health_storage._kind("/srv/vm", 1)
    assert finding.level == level
    assert kind in finding.text
    if kind in health_storage.WEAKER:
        assert health_storage.WEAKER[kind] in finding.text, "what is weaker is said"


def test_images_that_may_outgrow_their_storage(tmp_path: Path) -> None:
    device = health_storage._Device([str(tmp_path)], 2, 1 << 60)
    finding = health_storage._room(device)
    assert finding.level == WARN
    device.growth = 0
    assert health_storage._room(device).level == OK


def test_what_a_user_may_not_look_at_is_said_and_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    monkeypatch.setattr(health_keys.os, "access", lambda *_: False)
    [finding] = health_keys.state(settings_of(tmp_path, is_root=False))
    assert (finding.level, finding.subject) == (NOTE, "state")
    assert (finding.mend or "").startswith("sudo ")
    assert (finding.mend or "").endswith(f" --state {tmp_path}/state doctor")


def test_a_host_that_was_not_set_up_fails_once(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    found = [*health_keys.state(settings), *health_keys.registry(settings)]
    assert levels(found) == [(FAIL, "state")]


def test_files_that_a_mount_does_not_show(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "plain.raw").write_text("x")
    (tmp_path / "misnamed").write_bytes(health_storage_magic() + bytes(100))
    (tmp_path / "web1.sealed").write_bytes(b"")
    (tmp_path / "link").symlink_to("misnamed")
    os.mkfifo(tmp_path / "fifo")
    assert unshown.unshown_files(tmp_path, 10) == (["sub/plain.raw"], ["misnamed"])
    assert sum(map(len, unshown.unshown_files(tmp_path, 1))) == 1


def health_storage_magic() -> bytes:
    from sealfs.image.format import MAGICS

    return MAGICS["superblock"]


def test_a_question_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "ANSWER_WAIT", 0.01)
    hang = threading.Event()
    assert health.answered(hang.wait) is None
    hang.set()
    assert health.answered(lambda: 7) == 7
    with pytest.raises(FileNotFoundError):
        health.answered(lambda: os.stat("/nonexistent"))


def test_one_look_that_fails_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(settings: Settings):
        yield Health(OK, "first", "")
        raise OSError("no")

    def works(settings: Settings):
        yield Health(OK, "second", "")

    monkeypatch.setattr(doctor, "CHECKS", (fails, works))
    assert levels(doctor.examine(settings_of(tmp_path))) == [
        (OK, "first"), (WARN, "fails"), (OK, "second"),
    ]  # fmt: skip
