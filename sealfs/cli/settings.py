"""What holds for every command: state directory, TPM, output form, verbosity.

The options may stand before or after the command's name; the later one wins.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sealfs.cli import asked
from sealfs.cli.errors import STATE_DEFAULT, Situation
from sealfs.keys.hardening import harden

if TYPE_CHECKING:
    from sealfs.keys.service import KeyService

STATE_VARIABLE = "SEALFS_STATE"
TPM_VARIABLE = "SEALFS_TPM"

PATH = click.Path(path_type=Path, readable=False)
"""A path argument: whether it can be read is found out where it is read."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(slots=True)
class Settings:
    """The settings of one run; `situation` is what error messages are made from."""

    state: Path = STATE_DEFAULT
    tpm: str | None = None
    json: bool = False
    verbose: int = 0
    pin_file: str | None = None
    pin_option: str = "--pin-file"
    situation: Situation = field(default_factory=Situation)

    @contextmanager
    def keys(self) -> Iterator[KeyService]:
        """Open the key service for a while, in a process that nobody can look into."""
        harden()
        from sealfs.keys.service import KeyService  # slow to load; help and usage need none

        with KeyService.open(self.state, tpm=self.tpm) as keys:
            if self.pin_file is not None or sys.stdin.isatty():
                keys.ask_pin = self.ask_pin
            yield keys

    def ask_pin(self, vm_id: str) -> bytearray:
        """Return the PIN of a VM, as a new buffer; see `asked.pin`."""
        return asked.pin(f"PIN of {vm_id}", self.pin_file, option=self.pin_option)

    def about(self, path: Path) -> Path:
        """Note the path that the user named; return it."""
        self.situation.path = path
        return path


def initial_settings() -> Settings:
    """Return the settings before any option was read."""
    settings = Settings(
        state=Path(os.environ.get(STATE_VARIABLE) or STATE_DEFAULT),
        tpm=os.environ.get(TPM_VARIABLE) or None,
    )
    settings.situation.state = settings.state
    return settings


def common_options(command: F) -> F:
    """Add the common options to a command, which gets them as its first argument, `settings`."""

    @click.option(
        "--state",
        type=PATH,
        metavar="DIR",
        help="State directory; else $SEALFS_STATE, else /var/lib/sealfs.",
    )
    @click.option("--tpm", metavar="SPEC", help="The TPM, where it is not the one of init.")
    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
    @click.option("-v", "--verbose", count=True, help="Say more; -vv for debugging.")
    @functools.wraps(command)
    def wrapper(
        state: Path | None, tpm: str | None, as_json: bool, verbose: int, **arguments: Any
    ) -> Any:
        context = click.get_current_context()
        settings = context.find_object(Settings)
        assert settings is not None
        settings.state = state or settings.state
        settings.tpm = tpm or settings.tpm
        settings.json = settings.json or as_json
        settings.verbose += verbose
        situation = settings.situation
        situation.command = context.command_path.partition(" ")[2]
        situation.state, situation.verbose = settings.state, settings.verbose
        situation.json = settings.json
        for option, given in (("--state", state), ("--tpm", tpm)):
            if given is not None:
                situation.options += (option, str(given))
        _set_up_log(settings.verbose)
        return command(settings, **arguments)

    return wrapper  # type: ignore[return-value]


class _Lines(logging.Handler):
    """Log records in the form of every other message; stderr is looked up at each line."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname.lower()
        print(f"sealfs: {level}: {record.getMessage()}", file=sys.stderr)


def _set_up_log(verbose: int) -> None:
    logger = logging.getLogger("sealfs")
    logger.handlers = [_Lines()]
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logger.propagate = False
