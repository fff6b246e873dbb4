"""Secrets that a user types or hands over in a file: never in an argument or the environment."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from sealfs.errors import UsageError
from sealfs.keys.hardening import harden

SECRET_SIZE_MAX = 4 * 1024
STDIN = "-"
PIN_FILE_HELP = "Where the VM's PIN is; - is standard input. Without, it is asked for."

F = TypeVar("F", bound=Callable[..., Any])


def pin_file_option(command: F) -> F:
    """Add `--pin-file` to a command that opens images; stands below `common_options`."""

    @click.option("--pin-file", metavar="FILE", help=PIN_FILE_HELP)
    @functools.wraps(command)
    def wrapper(settings: Any, *, pin_file: str | None, **arguments: Any) -> Any:
        settings.pin_file = pin_file
        return command(settings, **arguments)

    return wrapper  # type: ignore[return-value]


def pin(
    what: str, file: str | None, *, option: str = "--pin-file", again: bool = False
) -> bytearray:
    """Return a PIN from a file or the terminal; the caller wipes it.

    Args:
        what: How the question names it.
        file: Where it is, None to ask for it.
        option: How a file is named, for the message.
        again: Ask twice, for a PIN that is new.

    Raises:
        UsageError: nobody is there to be asked, or it cannot be a PIN.
    """
    from sealfs.keys.pin import pin_of  # slow to load; usage and help need none

    return pin_of(text(what, file, option=option, again=again))


def text(what: str, file: str | None, *, option: str, again: bool = False) -> str:
    """Return a secret as text, its line's end included; see `pin`."""
    harden()
    if file is None:
        if not sys.stdin.isatty():
            raise UsageError(what, f"there is no terminal to ask for it; use {option}")
        typed: str = click.prompt(
            what, hide_input=True, err=True, prompt_suffix=": ", confirmation_prompt=again
        )
        return typed
    try:
        if file == STDIN:
            found = sys.stdin.read(SECRET_SIZE_MAX + 1)
        else:
            with open(file, encoding="utf-8") as opened:
                found = opened.read(SECRET_SIZE_MAX + 1)
    except UnicodeDecodeError:
        raise UsageError(what, "is not text") from None
    if len(found) > SECRET_SIZE_MAX:
        raise UsageError(what, f"has more than {SECRET_SIZE_MAX} letters")
    return found
