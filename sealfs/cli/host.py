"""`init`: the host that keeps the keys."""

from __future__ import annotations

from pathlib import Path

import click

from sealfs.cli.errors import warn
from sealfs.cli.keys import recovery_key_from
from sealfs.cli.output import print_facts, print_json
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import UsageError
from sealfs.keys.access import AUTO
from sealfs.keys.hardening import harden
from sealfs.keys.provision import WARN_NO_POLICY
from sealfs.keys.reports import InitReport
from sealfs.keys.service import KeyService

KEY_ADVICE = """\
Write it down now, on paper, and keep it away from this host: it is shown this once and stored
nowhere. With it and an image alone, every VM made here can be opened again on any host
(`sealfs key recover IMAGE`). Without it, the loss of this host's TPM or state directory is the
loss of its VMs. Whoever else has it can open them too."""


@click.command("init")
@click.option(
    "--recovery-to",
    metavar="FILE",
    type=PATH,
    help="Wrap every key to this public X25519 key of your organisation (PEM or hexadecimal).",
)
@click.option("--no-recovery", is_flag=True, help="Do without a recovery key.")
@click.option(
    "--replace-tpm",
    is_flag=True,
    help="Set this host up anew: its TPM was cleared or is another one (a new board).",
)
@click.option(
    "--recovery-key-file",
    "key_file",
    metavar="FILE",
    help="With --replace-tpm: keep the host's recovery key, which is there; - is standard input.",
)
@common_options
def init_command(
    settings: Settings,
    recovery_to: Path | None,
    no_recovery: bool,
    replace_tpm: bool,
    key_file: str | None,
) -> None:
    """Set up this host: state directory, TPM, recovery key. Safe to repeat.

    --tpm names the TPM: auto (the hardware TPM; the default), swtpm (an embedded software TPM),
    device:/dev/tpmrm0, or another TCTI.

    With --replace-tpm the keys of before open with their recovery key only: recover each image
    afterwards (sealfs key recover IMAGE...). What the host knew of its images is kept as far as
    it refuses older ones.
    """
    harden()
    settings.about(settings.state)
    if replace_tpm:
        report = KeyService.replace_tpm(
            settings.state,
            tpm=settings.tpm,
            recovery_to=recovery_to,
            recovery_key=None if key_file is None else recovery_key_from(key_file),
            no_recovery=no_recovery,
        )
    elif key_file is not None:
        raise UsageError("--recovery-key-file", "goes with --replace-tpm only")
    else:
        report = KeyService.initialise(
            settings.state,
            tpm=settings.tpm or AUTO,
            recovery_to=recovery_to,
            no_recovery=no_recovery,
        )
    if settings.json:
        print_json(report.to_json())
    else:
        _print_report(report)
    warnings = [*report.warnings]
    if report.created and WARN_NO_POLICY not in warnings:
        warnings.append(WARN_NO_POLICY)
    for text in warnings:
        # The advice beside the key says the same at length.
        if "shown now" not in text or settings.json:
            warn(text)


def _print_report(report: InitReport) -> None:
    facts = [
        ("state directory", report.state),
        ("TPM", report.tpm),
        ("storage key", report.storage_key),
        ("recovery", report.recovery),
    ]
    if report.recovery_fingerprint is not None:
        facts.append(("recovery key id", report.recovery_fingerprint))
    print("set up" if report.created else "was set up before; nothing was changed")
    print_facts(facts)
    if report.recovery_key is not None:
        print(f"\nrecovery key\n\n    {report.recovery_key}\n\n{KEY_ADVICE}")
