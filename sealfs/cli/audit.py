"""`audit show` and `audit verify`: what was done with the keys of this host."""

from __future__ import annotations

from typing import Any

import click

from sealfs.cli.errors import ExitCode
from sealfs.cli.output import print_json, print_table, printable
from sealfs.cli.settings import Settings, common_options

SHOWN = 20


@click.group("audit")
def audit_command() -> None:
    """Look at the log of every key made, used, refused, moved or revoked."""


@audit_command.command("show")
@click.option("--vm", metavar="VM", help="Of one virtual machine.")
@click.option("-n", "--lines", metavar="N", type=click.IntRange(1), default=SHOWN,
              show_default=True, help="The last N lines.")  # fmt: skip
@common_options
def show_audit(settings: Settings, vm: str | None, lines: int) -> None:
    """Show the last lines of the audit log. Nothing is verified; `audit verify` does."""
    with settings.keys() as keys:
        found = [entry for _, _, entry in keys.audit.entries() if entry is not None]
    chosen = [entry for entry in found if vm is None or entry.get("vm") == vm][-lines:]
    if settings.json:
        print_json(chosen)
        return
    print_table(("TIME", "EVENT", "VM", "OUTCOME", "BY"), [_row(entry) for entry in chosen])


def _row(entry: dict[str, Any]) -> tuple[str, ...]:
    user = f"uid {entry.get('uid')}"
    if "login" in entry:
        user += f" (login {entry['login']})"
    event = str(entry.get("event"))
    if "network" in entry:
        event += f": {entry['network']}"
    words = (
        str(entry.get("time", ""))[:19].replace("T", " "),
        event,
        str(entry.get("vm", "")),
        str(entry.get("outcome")),
        f"{entry.get('program')} {entry.get('pid')}, {user}",
    )
    return tuple(printable(word) for word in words)


@audit_command.command("verify")
@common_options
def verify_audit(settings: Settings) -> int:
    """Verify the whole audit log: no line edited, none missing, as far as this host's TPM knows.

    Exit code 3 when something is wrong.
    """
    with settings.keys() as keys:
        count, findings = keys.audit.verify()
    if settings.json:
        print_json({"lines": count, "findings": findings})
    elif findings:
        for finding in findings:
            print(finding)
    else:
        print(f"{count} lines, nothing edited, nothing missing")
    return ExitCode.FINDINGS if findings else ExitCode.OK
