"""`doctor`: what this host can do, and what to mend."""

from __future__ import annotations

import click

from sealfs.cli import health_keys, health_storage, health_system
from sealfs.cli.errors import ExitCode
from sealfs.cli.health import FAIL, WARN, Check, Health
from sealfs.cli.output import print_json, printable
from sealfs.cli.settings import Settings, common_options

CHECKS: tuple[Check, ...] = (
    *health_system.CHECKS,
    *health_keys.CHECKS,
    *health_storage.CHECKS,
)
"""In the order in which a first hour needs them."""


@click.command("doctor")
@common_options
def doctor_command(settings: Settings) -> int:
    """Say what this host can do and what to mend. Only looks; run it as root to have it see all.

    A warning is for you to judge; exit code 3 when something fails.
    """
    findings = examine(settings)
    if settings.json:
        print_json([finding.to_json() for finding in findings])
    else:
        for finding in findings:
            print(f"{finding.level:<4}  {finding.subject:<12}  {printable(finding.text)}")
            if finding.mend:
                print(f"{'':<20}mend: {printable(finding.mend)}")
    has_failed = any(finding.level == FAIL for finding in findings)
    return ExitCode.FINDINGS if has_failed else ExitCode.OK


def examine(settings: Settings) -> list[Health]:
    """Look at everything; a look that fails spoils no other."""
    findings: list[Health] = []
    for check in CHECKS:
        try:
            findings.extend(check(settings))
        except OSError as error:
            name = check.__name__.lstrip("_").replace("_", " ")
            findings.append(Health(WARN, name, f"cannot be looked at: {error}"))
    return findings
