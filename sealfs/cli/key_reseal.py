"""`key reseal`: another policy for a VM's key."""

from __future__ import annotations

import click

from sealfs.cli.named import record_of
from sealfs.cli.protecting import Wanted, protection_options
from sealfs.cli.settings import Settings, common_options
from sealfs.errors import UsageError
from sealfs.keys.vmkey import wipe


@click.command("reseal", short_help="Give a VM's key another policy: PCRs, a PIN, a signer.")
@click.argument("vm")
@protection_options
@click.option("--no-policy", is_flag=True, help="Ask for nothing: whoever has this host.")
@click.option(
    "--old-pin-file",
    metavar="FILE",
    help="Where the PIN is that it opens with now; without, it is asked for.",
)
@click.option("--keep", is_flag=True, help="Leave the old slots beside the new one.")
@common_options
def reseal_key(
    settings: Settings,
    vm: str,
    wanted: Wanted,
    no_policy: bool,
    old_pin_file: str | None,
    keep: bool,
) -> None:
    """Seal a VM's key anew; what is asked for must all hold then. No image changes.

    The new slot is made and proved by a real unseal before the old ones go. Do it before an
    upgrade that changes PCRs, with --keep and a policy that will hold after it. A slot that was
    replaced may still stand in a backup of the state directory, and opens by its old policy.
    """
    protection = wanted()
    try:
        if no_policy == bool(protection.policy):
            raise UsageError(
                vm, "say what its key is to ask for: --pcrs, --pin, --signed-policy, or --no-policy"
            )
        settings.pin_file, settings.pin_option = old_pin_file, "--old-pin-file"
        with settings.keys() as keys:
            keys.reseal(record_of(keys, vm).vm_id, protection, keep=keep)
    finally:
        if protection.pin is not None:
            wipe(protection.pin)
