"""Whether an image is as new as this host knows it: the host's ledger asked at every open.

The one place that puts the image's word (its lineage, authenticated) beside the host's (what the
ledger noted). See keys/ledger.py for who is kept from what, and for how long.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from sealfs.errors import ForeignImage, RolledBack
from sealfs.image.format import Anchor
from sealfs.image.recovery import Lineage, Witness
from sealfs.keys.ledger import Progress

NEWBORN = Progress(0, bytes(16))
"""An image that was made and has no record yet."""


class Ledger(Protocol):
    """The host's ledger as this room needs it; blocking, any thread."""

    def find(self, image_uuid: bytes) -> Progress | None: ...
    def begin(self) -> None: ...
    def bump(self) -> None: ...
    def note(self, images: Mapping[bytes, Progress]) -> None: ...
    def accept(self, image_uuid: bytes, progress: Progress | None) -> None: ...


def witness(path: Path, image_uuid: bytes, ledger: Ledger) -> Witness:
    """Return who is asked when an image opens.

    It raises:
        RolledBack: the image is older than the ledger, or a fork of what the ledger knows.
        ForeignImage: the ledger does not know it.
        KeyServiceError: the ledger cannot be read, or is itself too old.
    """

    def ask(lineage: Lineage) -> Anchor:
        noted = ledger.find(image_uuid)
        if noted is None:
            raise ForeignImage(path, "this host's ledger does not know this image: register it")
        check(path, lineage, noted)
        return Anchor(noted.sequence, noted.mac)

    return ask


def newcomer(path: Path, image_uuid: bytes, ledger: Ledger) -> Witness:
    """Return who is asked when an image opens that the host may not know yet; see `witness`."""

    def ask(lineage: Lineage) -> None:
        noted = ledger.find(image_uuid)
        if noted is not None:
            check(path, lineage, noted)

    return ask


def check(path: Path, lineage: Lineage, noted: Progress) -> None:
    """Refuse an image that does not continue what was noted of it.

    Raises:
        RolledBack: with the innocent and the hostile reason.
    """
    here = lineage.newest.sequence
    if here < noted.sequence:
        raise RolledBack(
            path,
            f"is at change {here}, and this host has seen it at change {noted.sequence}: restored "
            "from a backup, or an old copy put in its place by somebody",
        )
    if not lineage.descends_from(Anchor(noted.sequence, noted.mac)):
        raise RolledBack(
            path,
            f"is at change {here} and does not continue change {noted.sequence} as this host has "
            "seen it: an older copy was used elsewhere (another host, a restored state directory)",
        )


def progress_of(anchor: Anchor) -> Progress:
    """Return an image's own state in the ledger's words."""
    return Progress(anchor.sequence, anchor.mac)
