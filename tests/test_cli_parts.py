"""The parts of the command line that need no host: exit codes, hints, sizes, NBD, start-up."""

from __future__ import annotations

import errno
import importlib
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from sealfs import errors
from sealfs.cli import survey
from sealfs.cli.arguments import SIZE
from sealfs.cli.errors import ExitCode, Situation, exit_code_of, hint_of, sentence_of
from sealfs.cli.main import COMMANDS, _as_command, program
from sealfs.cli.output import printable, size_text, table_lines
from sealfs.cli.plain import data_runs
from sealfs.image.layout import SIZE_MAX, geometry_for

README = Path(__file__).resolve().parent.parent / "README.md"
LOAD_NOTHING = ("trio", "pyfuse3", "tpm2_pytss", "cryptography", "rich")


def error_types() -> list[type[errors.SealfsError]]:
    found = [errors.SealfsError]
    for kind in found:
        found += kind.__subclasses__()
    return found[1:]


def one_of(kind: type[errors.SealfsError]) -> errors.SealfsError:
    error = kind.__new__(kind)
    errors.SealfsError.__init__(error, "web1.sealed", "went wrong")
    return error


@pytest.mark.parametrize("kind", error_types())
def test_every_error_has_an_exit_code_a_sentence_and_a_hint_or_none(kind) -> None:
    error = one_of(kind)
    code = exit_code_of(error)
    assert code is not None
    assert code is not ExitCode.OK
    assert sentence_of(error) == '"web1.sealed": went wrong'
    for command in ("create", "import", "export", "mount", "check", "key recover", "init"):
        for path in (None, Path("x y.sealed")):
            hint = hint_of(error, Situation(command=command, path=path))
            assert hint is None or "\n" not in hint
            assert hint is None or path is None or "x y" not in hint or "'x y" in hint, "unquoted"


def test_a_full_disk_is_told_from_other_failures_of_the_storage() -> None:
    failed = errors.StorageFailed("web1.sealed", "write failed")
    assert exit_code_of(failed) is ExitCode.INTERNAL
    failed.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert exit_code_of(failed) is ExitCode.NO_SPACE


def test_a_bug_is_no_error_of_the_user() -> None:
    assert exit_code_of(ValueError("x")) is None
    assert exit_code_of(AssertionError()) is None


def test_the_readme_lists_every_exit_code() -> None:
    text = README.read_text()
    in_words = {ExitCode.OK: "Exit code 0 is", ExitCode.FINDINGS: "; 3 says"}
    for code in ExitCode:
        assert in_words.get(code, f"| {code.value} |") in text, f"{code!r} is not in README"


def test_a_hint_for_what_only_root_may() -> None:
    user = Situation(command="info", path=Path("a b"), arguments=("info", "a b"), is_root=False)
    refused = errors.UsageError("/var/lib/sealfs", "cannot be read: Permission denied")
    refused.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    assert hint_of(refused, user) == "sudo sealfs info 'a b'"
    assert hint_of(PermissionError(errno.EACCES, "x"), user) == "sudo sealfs info 'a b'"
    user.state = Path("/srv/state")
    assert hint_of(refused, user) == "sudo sealfs --state /srv/state info 'a b'"
    user.is_root = True
    assert hint_of(refused, user) is None


def test_a_hint_goes_where_the_command_went() -> None:
    missing = errors.KeyNotFound("web1", "this host has no key for it")
    situation = Situation(command="check", path=Path("x.sealed"), options=("--state", "a b"))
    assert hint_of(missing, situation) == "sealfs --state 'a b' key recover x.sealed"
    full = errors.NoSpace("/srv/state/keys/x.slot", "no space")
    situation = Situation(command="create", path=Path("y/x.sealed"), state=Path("/srv/state"))
    assert hint_of(full, situation) == "df -h /srv/state"
    assert hint_of(errors.NoSpace("web1", "no space"), situation) == "df -h y"


def test_a_locked_state_directory_is_no_mount_point() -> None:
    busy = errors.Busy("/srv/state", "another sealfs process held the state directory for 10 s")
    assert hint_of(busy, Situation(command="mount", path=Path("/mnt/plain"))) is None


def test_the_list_of_commands_says_what_each_says_itself() -> None:
    for name, (module, line) in COMMANDS.items():
        command = getattr(
            importlib.import_module(f"sealfs.cli.{module}"), f"{name.replace('-', '_')}_command"
        )
        with click.Context(program):
            assert command.get_short_help_str(limit=200).rstrip(".") != ""
        assert line.endswith(".")
        assert len(line) < 60


def test_help_loads_nothing_heavy_and_answers_at_once() -> None:
    script = (
        "import sys; from sealfs.cli.main import run; status = run(['--help']); "
        f"print([m for m in {LOAD_NOTHING!r} if m in sys.modules], file=sys.stderr); "
        "sys.exit(status)"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
    assert time.monotonic() - before < 2, "0.1 s on an idle machine"


def test_mount_takes_the_form_of_the_mount_helper() -> None:
    assert _as_command(["/a", "/b", "-o", "ro"]) == ["mount", "/a", "/b", "-o", "ro"]
    assert _as_command(["list", "/b"]) == ["list", "/b"]
    assert _as_command(["nonsense", "x"]) == ["nonsense", "x"]


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("512", 512), ("1000001", 1000001), ("10K", 10240), ("3m", 3 << 20),
     ("2GiB", 2 << 30), ("128T", SIZE_MAX)],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1.5G", "10X", "129T", "1e3", "٣", "9" * 30, "0x10", " 1", "1 G"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        SIZE.convert(text, None, None)


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 10 << 30, None)] == [
        "0", "1023", "1K", "1.5K", "10G", "?",
    ]  # fmt: skip


def test_a_table_that_fits_is_a_table() -> None:
    lines = table_lines(("PATH", "VM", "STATE"), [("a.sealed", "web1", "clean")], 80)
    assert lines == ["PATH       VM     STATE", "a.sealed   web1   clean"]


def test_a_table_that_does_not_fit_breaks_no_path_and_no_vm_id() -> None:
    path, vm_id = "/srv/vm/" + "long/" * 40 + "disk.sealed", "v" * 255
    rows = [(path, vm_id, "", "10G", "clean"), ("", "b", "", "1G", "clean")]
    lines = table_lines(("PATH", "VM", "DISK", "SIZE", "STATE"), rows, 80)
    assert lines == [
        path,
        f"    VM {vm_id}",
        "    SIZE 10G   STATE clean",
        "    VM b   SIZE 1G   STATE clean",
    ]
    wide = table_lines(("PATH", "VM", "DISK", "SIZE", "STATE"), rows, None)
    assert len(wide) == 3, "not a terminal: a line for each row"
    assert table_lines(("PATH",), [], 80) == []


def test_wide_letters_are_two_columns() -> None:
    lines = table_lines(("A", "B"), [("漢字", "x"), ("abcd", "y")], 80)
    assert lines == ["A      B", "漢字   x", "abcd   y"]


def test_keys_are_in_no_core_dump() -> None:
    script = (
        "import resource, pathlib; from sealfs.cli.settings import Settings\n"
        "try:\n    Settings(state=pathlib.Path('/nonexistent')).keys().__enter__()\n"
        "except Exception: pass\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "(0, 0)\n", done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("init", "--replace-tpm", "--recovery-key-file", "-"),
        ("key", "reseal", "web1", "--pin-file", "-"),
    ],
)
def test_nor_is_a_secret_that_is_typed_before_the_key_service_opens(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "sealfs.cli.main", "--state", str(tmp_path / "s"), *words]
    hardened = re.compile("^Max core file size +0 +0 ", re.M)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as waiting:
        assert waiting.stdin is not None
        for _ in range(100):
            limits = Path(f"/proc/{waiting.pid}/limits").read_text()
            if hardened.search(limits):
                break
            time.sleep(0.05)
        waiting.stdin.close()
    assert hardened.search(limits)


def test_names_of_any_bytes_can_be_printed() -> None:
    assert printable("a\nb\x1b[31m") == r"a\nb\x1b[31m"
    assert printable("\udcff\udcfe") == r"\xff\xfe"


def test_zeros_are_left_out() -> None:
    data, zero = b"x" * 4096, bytes(4096)
    assert list(data_runs(memoryview(zero * 3))) == []
    assert list(data_runs(memoryview(data))) == [(0, 4096)]
    assert list(data_runs(memoryview(zero + data + data + zero + data + b"\0"))) == [
        (4096, 8192), (16384, 4096),
    ]  # fmt: skip
    assert list(data_runs(memoryview(zero + b"\0\1"))) == [(4096, 2)]
    assert list(data_runs(memoryview(b""))) == []


@pytest.mark.parametrize("size", [1, 4096, 1 << 20, (1 << 30) + 5, 1 << 40])
def test_a_full_image_takes_what_the_formula_says(size: int) -> None:
    geometry = geometry_for(size)
    full = survey.full_size(geometry, size)
    fixed = geometry.slots_offset + 2 * geometry.slot_size
    assert full <= fixed + size * 130 / 128 * 1.001 + geometry.slot_size
    assert full >= size
