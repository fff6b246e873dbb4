"""The options that say what a new tpm slot asks for: `--pcrs`, `--pin`, `--signed-policy`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sealfs.cli import asked
from sealfs.cli.arguments import PCRS
from sealfs.cli.settings import PATH
from sealfs.errors import UsageError

if TYPE_CHECKING:
    from sealfs.keys.protection import Protection

KEY_FILE_SIZE_MAX = 16 * 1024

F = TypeVar("F", bound=Callable[..., Any])
Wanted = Callable[[], "Protection"]


def protection_options(command: F) -> F:
    """Add the options; the command gets them as `wanted`, which asks for a PIN when called."""
    for option in (
        click.option(
            "--signed-policy",
            "signer",
            metavar="PUBLIC.pem",
            type=PATH,
            help="Give the key only while the PCRs are as this key's owner signs; see `policy`.",
        ),
        click.option("--pin-file", metavar="FILE", help="Where its PIN is; - is standard input."),
        click.option("--pin", "asks_pin", is_flag=True, help="Give the key for a PIN; asked for."),
        click.option(
            "--pcrs", type=PCRS, default=(), help="Give the key only while these PCRs are as now."
        ),
    ):
        command = option(command)

    @functools.wraps(command)
    def wrapper(
        *settings: Any,
        pcrs: tuple[int, ...],
        asks_pin: bool,
        pin_file: str | None,
        signer: Path | None,
        **arguments: Any,
    ) -> Any:
        def wanted() -> Protection:
            from sealfs.keys.policy import check_pcrs
            from sealfs.keys.protection import Protection

            chosen = check_pcrs(pcrs)
            public = b"" if signer is None else signer_of(signer)
            pin = None
            if asks_pin or pin_file is not None:
                pin = asked.pin("New PIN", pin_file, again=True)
            return Protection(chosen, pin, public)

        return command(*settings, wanted=wanted, **arguments)

    return wrapper  # type: ignore[return-value]


def signer_of(path: Path) -> bytes:
    """Return the public area of a signer's key in a PEM file.

    Raises:
        UsageError: it is none, or not one that every TPM can verify.
    """
    from sealfs.keys.signed import read_public

    return read_public(read_small(path, KEY_FILE_SIZE_MAX), str(path))


def read_small(path: Path, size_max: int) -> bytes:
    """Return a whole file of at most `size_max` bytes.

    Raises:
        UsageError: it has more.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(size_max + 1)
    if len(raw) > size_max:
        raise UsageError(path, f"has more than {size_max} bytes")
    return raw
