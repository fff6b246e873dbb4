"""The guest harness on plain raw files: what it says of a sealed disk later, it can tell.

Each check has its control here: a good disk passes, and one that lost or changed something does
not.
"""

import re
from pathlib import Path

import guest_support
import pytest
from guest_support import (
    Cache,
    GuestDisk,
    GuestError,
    GuestProcess,
    assert_ext4_clean,
    build_guest_disk,
    guest_script,
    run_guest,
    run_tool,
)

pytestmark = pytest.mark.qemu


@pytest.fixture
def disk(tmp_path: Path) -> GuestDisk:
    return build_guest_disk(tmp_path / "disk.raw")


def test_new_disk_is_clean_sparse_and_its_own(tmp_path: Path) -> None:
    one = build_guest_disk(tmp_path / "one.raw")
    two = build_guest_disk(tmp_path / "two.raw")
    assert_ext4_clean(one.path)
    assert one.path.stat().st_size == one.size
    assert one.path.stat().st_blocks * 512 < one.size // 8
    for disk in (one, two):
        marker = run_tool("debugfs", "-R", "cat /etc/sealfs-marker", str(disk.path))
        assert marker.strip() == disk.marker
    assert one.marker != two.marker


@pytest.mark.parametrize(
    ("cache", "aio"),
    [("none", "native"), ("writeback", "threads"), ("directsync", "threads")],
)
@pytest.mark.slow
def test_guest_runs_on_the_disk_and_finds_its_files_again(
    disk: GuestDisk, cache: Cache, aio: str
) -> None:
    wrote = run_guest(disk.path, script=guest_script("write.sh"), cache=cache, aio=aio).checked()
    assert wrote.root["marker"] == disk.marker
    assert wrote.root["device_size"] == str(disk.size)
    assert re.match(r"/dev/vda / ext4 rw\b", wrote.root["mount"])
    assert int(wrote.results["bytes"]) > 40 << 20
    assert_ext4_clean(disk.path)

    found = run_guest(disk.path, script=guest_script("verify.sh"), cache=cache, aio=aio).checked()
    assert found.root["marker"] == disk.marker
    assert found.results["files"] == wrote.results["files"]
    assert found.results["manifest"] == wrote.results["manifest"]
    assert_ext4_clean(disk.path)


@pytest.mark.slow
def test_one_changed_byte_fails_the_verification(disk: GuestDisk) -> None:
    change = "printf '\\377' | dd of=/root/data/many/7 bs=1 seek=5 conv=notrunc,fsync 2>/dev/null\n"
    script = guest_script("write.sh", LARGE_MIB=1) + change + guest_script("verify.sh")
    run = run_guest(disk.path, script=script, cache="writeback")
    assert run.status == 1
    assert "many/7: FAILED" in run.console
    with pytest.raises(GuestError, match="many/7: FAILED"):
        run.checked()


@pytest.mark.slow
@pytest.mark.parametrize("discard", [True, False])
def test_trim_gives_space_back_where_the_drive_lets_it(disk: GuestDisk, discard: bool) -> None:
    empty = disk.path.stat().st_blocks * 512
    script = guest_script("trim.sh", SIZE_MIB=64)
    run = run_guest(disk.path, script=script, cache="none", discard=discard).checked()
    written = int(run.results["written"])
    assert written == 64 << 20
    assert int(run.results["trimmed"]) >= written
    kept = disk.path.stat().st_blocks * 512 - empty
    assert kept < 0.05 * written if discard else kept >= written
    assert_ext4_clean(disk.path)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["none", "writeback"])
def test_acknowledged_records_survive_a_killed_machine(disk: GuestDisk, cache: Cache) -> None:
    with GuestProcess(disk.path, script=guest_script("fsync_loop.sh"), cache=cache) as guest:
        guest.wait_for_line("ACK 100")
        guest.kill()
        acknowledged = int(guest.lines(r"ACK (\d+)")[-1][1])
    assert acknowledged >= 100

    check = guest_script("fsync_check.sh", ACKNOWLEDGED=acknowledged)
    checked = run_guest(disk.path, script=check, cache=cache).checked()
    assert checked.root["marker"] == disk.marker
    assert int(checked.results["log"]) >= acknowledged
    assert_ext4_clean(disk.path)


@pytest.mark.slow
def test_loss_of_an_acknowledged_record_is_noticed(disk: GuestDisk) -> None:
    losses = {
        "dd if=/dev/null of=log bs=4096 seek=99": "LOST log after 99",
        "printf 9 | dd of=log bs=4096 seek=41 conv=notrunc": "LOST log record 42",
        # Slot 36 holds record 100; one round of the ring earlier it held record 36.
        "printf '%-4095d\\n' 36 | dd of=ring bs=4096 seek=36 conv=notrunc": "LOST ring slot 36",
        "head -c 100 /dev/zero | dd of=ring bs=4096 seek=8 conv=notrunc": "LOST ring slot 8",
    }
    loop = guest_script("fsync_loop.sh", COUNT=100)
    check = guest_script("fsync_check.sh", ACKNOWLEDGED=100)
    run_check = "sh -eu -o pipefail /run/check.sh"
    steps = [
        f"cat >/run/check.sh <<'CHECK'\n{check}CHECK\n",
        f"( {loop} )\n{run_check}\ncp -r acknowledged good\n",
    ]
    for index, loss in enumerate(losses):
        steps.append(
            f"rm -r acknowledged; cp -r good acknowledged\n( cd acknowledged; {loss} )\n"
            f"if {run_check}; then echo RESULT loss_{index}=missed; exit 1; fi\n"
        )
    run = run_guest(disk.path, script="".join(steps), cache="writeback").checked()
    assert run.results == {"log": "100"}
    lines = re.findall(r"^LOST .*\b(?=:|\n)", run.console, re.M)
    assert [line.split(":")[0] for line in lines] == list(losses.values())


def test_exit_status_of_the_script_is_handed_over(disk: GuestDisk) -> None:
    run = run_guest(disk.path, script="echo RESULT answer=42\nexit 7\n", cache="writeback")
    assert (run.status, run.results) == (7, {"answer": "42"})


def test_guest_that_does_not_end_is_killed_in_time(disk: GuestDisk) -> None:
    script = "echo waiting\nsleep 1000\n"
    with GuestProcess(disk.path, script=script, cache="writeback") as guest:
        guest.wait_for_line("waiting")
        with pytest.raises(GuestError, match=r"still ran after 1 s(.*\n)*waiting"):
            guest.finished(timeout=1)
        assert guest.qemu.process.returncode == -9


def test_leaving_the_context_ends_the_guest(disk: GuestDisk) -> None:
    with GuestProcess(disk.path, script="sleep 1000\n", cache="writeback") as guest:
        process = guest.qemu.process
        assert process.poll() is None
    assert process.returncode == -9


def test_console_tells_why_a_guest_did_not_come_up(tmp_path: Path) -> None:
    empty = tmp_path / "empty, without a system.raw"
    empty.touch()
    with empty.open("r+b") as file:
        file.truncate(16 << 20)
    with pytest.raises(GuestError, match="FAIL initramfs: cannot mount /dev/vda"):
        run_guest(empty, script="", cache="writeback")


def test_missing_disk_is_qemus_error(tmp_path: Path) -> None:
    with pytest.raises(GuestError, match="No such file or directory"):
        run_guest(tmp_path / "none.raw", script="", cache="writeback")


def test_damaged_file_system_is_not_clean(disk: GuestDisk) -> None:
    with disk.path.open("r+b") as file:
        file.seek(4096)  # the group descriptors
        file.write(b"\xa5" * 64)
    with pytest.raises(GuestError, match="e2fsck"):
        assert_ext4_clean(disk.path)


def test_missing_kernel_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_support, "GUEST_CACHE", tmp_path / "nothing")
    with pytest.raises(GuestError, match="run: tools/setup --guest"):
        build_guest_disk(tmp_path / "disk.raw")
