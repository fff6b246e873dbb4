"""README against the code: its table of errors, its commands and options, its links."""

from __future__ import annotations

import ast
import errno
import importlib.machinery
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import click
import pytest

from sealfs import errors
from sealfs.cli.errors import HINTS, exit_code_of
from sealfs.cli.main import COMMANDS, program
from sealfs.mount.errno import TABLE, errno_of

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
TRANSCRIPT = ROOT / "tests" / "cli" / "21-errors.txt"

NOT_FROM_A_COMMAND = {
    "LockedOut": "the embedded TPM of the transcripts counts no wrong PINs; test_keys_policies.py",
    "KeyServiceError": "its own sentence is for a key service used after a fork; no command does",
}
"""Rows that no transcript can end with, and why."""


def load(path: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(path.name.replace("-", "_"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


error_table = load(ROOT / "tools" / "error-table")


def all_classes() -> list[type[errors.SealfsError]]:
    found: list[type[errors.SealfsError]] = [errors.SealfsError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found[1:] if kind.__module__ == errors.__name__]


def rows() -> dict[str, list[str]]:
    """The cells of README's table of errors, by the class that each is for."""
    between = README.split(error_table.BEGIN)[1].split(error_table.END)[0]
    lines = [line.strip("| ").split(" | ") for line in between.strip().splitlines()]
    return {cells[0]: cells for cells in lines[2:]}


def shown_in_transcript() -> list[dict[str, object]]:
    """Every error document of the transcript, with the paths as README writes them."""
    lines = [line[2:] for line in TRANSCRIPT.read_text().splitlines() if line.startswith("| ")]
    text = "\n".join(lines).replace("WORK/", "")
    return [
        json.loads(document)["error"] for document in re.findall(r"^\{$.*?^\}$", text, re.M | re.S)
    ]


def test_the_table_of_errors_is_as_the_code_says() -> None:
    assert error_table.with_table(README) == README, "run tools/error-table --write"


def test_every_class_has_a_row() -> None:
    assert sorted(rows()) == sorted(kind.__name__ for kind in all_classes())
    for cells in rows().values():
        assert len(cells) == len(error_table.HEAD)
        assert all(cell.strip() for cell in cells), cells


def test_a_difference_is_seen() -> None:
    assert error_table.with_table(README.replace("| EACCES |", "| EIO |")) == README
    assert README.replace("| EACCES |", "| EIO |") != README


@pytest.mark.parametrize("kind", all_classes(), ids=lambda kind: kind.__name__)
def test_every_class_has_an_exit_code_an_errno_and_advice(kind) -> None:
    error = error_table.example(kind, "went wrong")
    cells = rows()[kind.__name__]
    assert cells[2] == str(int(exit_code_of(error) or 0)) != "0"
    assert any(issubclass(kind, known) for known, _ in TABLE), "not in mount/errno.py's table"
    assert cells[3] == errno.errorcode[errno_of(error)]
    assert any(issubclass(kind, known) for known, _, _ in HINTS), "not in cli/errors.py's HINTS"


def test_nobody_raises_the_base_class() -> None:
    for path in (ROOT / "sealfs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func)
                assert name.split(".")[-1] != "SealfsError", f"{path}:{node.lineno}"


def test_every_row_has_a_transcript_or_a_reason() -> None:
    ended = {str(document["type"]) for document in shown_in_transcript()}
    assert ended.isdisjoint(NOT_FROM_A_COMMAND), "it can be shown, so it is no exception"
    assert ended | set(NOT_FROM_A_COMMAND) == set(rows())


def test_what_to_do_is_what_the_command_prints() -> None:
    printed: dict[str, set[str]] = {}
    for document in shown_in_transcript():
        kind, hint = str(document["type"]), document["hint"]
        assert str(document["exit_code"]) == rows()[kind][2]
        if hint is not None:
            printed.setdefault(kind, set()).add(str(hint).replace(" --json", ""))
    for kind in all_classes():
        name = kind.__name__
        if name in NOT_FROM_A_COMMAND:
            continue
        promised = set(error_table.hints(kind))
        assert promised == printed.get(name, set()), f"{name}: README promises other hints"
        for hint in promised:
            assert hint in rows()[name][4]


def commands_in_readme() -> dict[str, str]:
    """The first cells of README's table of commands, by command."""
    section = README.split("## Commands")[1].split("## ")[0]
    cells = re.findall(r"^\| (`.*?) \| ", section.replace(r"\|", "/"), re.M)
    groups = {name.split()[0] for name in all_commands() if " " in name}
    found: dict[str, str] = {}
    for cell in cells:
        for text in re.findall(r"`([^`]+)`", cell):
            words = text.split()
            name = " ".join(words[:2]) if words[0] in groups else words[0]
            found[name] = text
    return found


def all_commands() -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    with click.Context(program) as context:
        for name in COMMANDS:
            command = program.get_command(context, name)
            assert command is not None
            if isinstance(command, click.Group):
                found |= {f"{name} {sub}": part for sub, part in command.commands.items()}
            else:
                found[name] = command
    return found


def test_readme_names_every_command() -> None:
    assert sorted(commands_in_readme()) == sorted(all_commands())


def test_readme_names_no_option_that_is_not_there() -> None:
    commands = all_commands()
    common = {"--state", "--tpm", "--json"}
    for name, text in commands_in_readme().items():
        there = {option for parameter in commands[name].params for option in parameter.opts}
        for option in re.findall(r"--[a-z-]+", text):
            assert option in there | common, f"{name} has no {option}"
    for name, command in commands.items():
        text = commands_in_readme()[name]
        if "[as create]" in text:
            text += commands_in_readme()["create"]
        for parameter in command.params:
            longest = max(parameter.opts, key=len)
            if longest.startswith("--") and longest not in (*common, "--verbose", "--help"):
                assert longest in text, f"README's {name} lacks {longest}"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        assert (ROOT / target).exists(), target
    for target in re.findall(r"`(benchmarks/[\w./]+|tools/[\w-]+)`", README):
        assert (ROOT / target).exists(), target
