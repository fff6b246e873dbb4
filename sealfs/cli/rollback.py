"""`accept-rollback`: the deliberate way to go on with a restored backup."""

from __future__ import annotations

import logging
from pathlib import Path

import click

from sealfs.cli import sealed
from sealfs.cli.asked import pin_file_option
from sealfs.cli.output import print_json, printable
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.errors import UsageError
from sealfs.image.recovery import read_identity
from sealfs.image.storage import FileStorage
from sealfs.mount import freshness

log = logging.getLogger("sealfs")

_EMPTY = {
    "ledger": "knows no image yet",
    "registry": "knows no image yet",
    "networks": "allows no VM on any",
}


@click.command("accept-rollback")
@click.argument("image", required=False, type=PATH)
@click.option(
    "--ledger", is_flag=True, help="The state directory itself was restored from a backup."
)
@common_options
@pin_file_option
def accept_rollback_command(settings: Settings, image: Path | None, ledger: bool) -> None:
    """Go on with an image that is older than this host has seen it: a restored backup.

    The image is verified with its key; what was written after it was saved is lost, and copies
    newer than it are refused from now on. With --ledger: take the ledger, the registry and
    the permissions on networks in the state directory, which are older than this host has seen
    them, for the present ones; each image is compared with them. Of one that is gone or damaged
    nothing is kept: then `register` each image, and `net allow` each VM.
    """
    if (image is None) != ledger:
        raise UsageError("accept-rollback", "name an image, or --ledger")
    if image is None:
        with settings.keys() as keys:
            tried = {
                "ledger": keys.ledger.rebase(),
                "registry": keys.registry.rebase(),
                "networks": keys.networks.permissions.rebase(),
            }
            kept = {name: is_kept for name, is_kept in tried.items() if is_kept is not None}
            keys.audit.record("state rollback accepted")
        for name, is_kept in kept.items():
            log.warning(
                'the %s in "%s" %s %s', name, settings.state,
                "were" if name == "networks" else "was",
                "accepted as it is" if is_kept else f"unreadable; an empty one {_EMPTY[name]}",
            )  # fmt: skip
        if settings.json:
            print_json({"state": str(settings.state), "kept": kept})
        return
    place = sealed.find(settings.about(image))
    with settings.keys() as keys:
        storage = FileStorage.open(place.sealed, read_only=True)
        try:
            identity = read_identity(storage)
            if keys.registry.lookup(place.sealed) is not None:
                sealed.check_registered(place.sealed, identity, keys)
            opened = sealed.open_with(storage, identity, keys, None)
            before, now = keys.ledger.find(opened.uuid), opened.progress
            keys.ledger.accept(opened.uuid, freshness.progress_of(now))
            keys.audit.record(
                "rollback accepted", vm=identity.vm_id, image=identity.uuid.hex(),
                now=str(now.sequence), known="nothing" if before is None else str(before.sequence),
            )  # fmt: skip
        finally:
            storage.close()
    known = "nothing" if before is None else f"change {before.sequence}"
    if settings.json:
        print_json(
            {
                "path": str(place.sealed),
                "vm_id": identity.vm_id,
                "before": None if before is None else before.sequence,
                "now": now.sequence,
            }
        )
    else:
        print(f"{printable(str(image))}: accepted at change {now.sequence}; known was {known}")
    log.warning(
        'image "%s" of VM "%s" was accepted at change %d; known was %s',
        place.sealed, identity.vm_id, now.sequence, known,
    )  # fmt: skip
