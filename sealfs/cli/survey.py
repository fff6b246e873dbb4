"""What can be told of a sealed file, with its key and without.

Without the key a file's own words are all there is, and they may be a lie: such fields are named
in `unverified`. Looking takes no lock, so that no virtual machine is kept from starting.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sealfs.cli import sealed
from sealfs.cli.sealed import Place
from sealfs.errors import (
    FormatError,
    IntegrityError,
    KeyServiceError,
    RolledBack,
    SealfsError,
    StorageFailed,
)
from sealfs.image.format import Identity, Superblock
from sealfs.image.layout import Geometry, block_count_of
from sealfs.image.recovery import peek, read_identity
from sealfs.keys.reports import KeyInfo, recipient_text
from sealfs.mount import freshness

if TYPE_CHECKING:
    from sealfs.keys.registry import RegistryEntry
    from sealfs.keys.service import KeyService
    from sealfs.mount.control import RunningMount

ST_BLOCK = 512  # bytes in a unit of st_blocks (<sys/stat.h>)
OWN_WORDS = ("vm_id", "disk", "image_uuid", "kmi", "created", "size", "state")
"""Fields that come from the file itself."""

Registered = Mapping[str, "RegistryEntry"]


@dataclass(slots=True)
class Facts:
    """One sealed file.

    `registration` is yes, no, other (another image is registered) or ?; `failure` is what went
    wrong last with it under its mount, as the mount tells.
    """

    path: str
    state: str
    registration: str = "?"
    vm_id: str | None = None
    disk: str | None = None
    image_uuid: str | None = None
    kmi: str | None = None
    created: str | None = None
    size: int | None = None
    allocated: int | None = None
    full_size: int | None = None
    shown_as: str | None = None
    failure: str | None = None
    recovery_keys: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=lambda: list(OWN_WORDS))
    unverified_because: str | None = None
    hint: str | None = None
    problem: str | None = None
    is_locked: bool = False
    rekey: dict[str, int] | None = None
    key: dict[str, object] | None = None
    live: dict[str, Any] | None = None

    def to_json(self) -> dict[str, object]:
        """Return everything."""
        return {name: getattr(self, name) for name in self.__slots__}

    @property
    def state_text(self) -> str:
        """The state in a few words."""
        words = [self.state]
        if self.shown_as is not None and self.state == "in use":
            words[0] = f"in use at {self.shown_as}"
        if self.registration == "no":
            words.append("not registered")
        elif self.registration == "other":
            words.append("another image is registered here")
        if self.rekey is not None:
            words.append(self._rekey_text)
        if self.is_locked:
            words.append("locked: it opens with its PIN")
        elif self.failure is not None:
            words.append(self.failure)
        return ", ".join(words)

    @property
    def _rekey_text(self) -> str:
        assert self.rekey is not None
        if "total" not in self.rekey:
            return "being rekeyed"
        done, total = self.rekey["done"], self.rekey["total"]
        return f"being rekeyed, {100 * done // max(1, total)} % done"


def registered(keys: KeyService) -> dict[str, RegistryEntry]:
    """Return the registry by path."""
    return {entry.path: entry for entry in keys.registry.entries()}


def look(place: Place, registry: Registered | None) -> Facts:
    """Return what a file says of itself; one that is no sealed image has a `problem`."""
    facts = Facts(path=str(place.sealed), state="unreadable")
    try:
        status = os.stat(place.sealed)
        facts.allocated = status.st_blocks * ST_BLOCK
        with_storage = sealed.peek_storage(place.sealed)
        try:
            superblock, identity = peek(with_storage), read_identity(with_storage)
            length = with_storage.size()
        finally:
            with_storage.close()
        in_use = sealed.is_in_use(place.sealed)
    except (FormatError, IntegrityError) as error:
        facts.state, facts.problem = "damaged", error.detail
        return facts
    except (SealfsError, OSError) as error:
        facts.problem = error.detail if isinstance(error, SealfsError) else error.strerror
        return facts
    _take(facts, superblock, identity)
    facts.state = "in use" if in_use else "clean" if superblock.clean else "needs recovery"
    wanted = superblock.geometry.slot_offset(superblock.root_slot + 1)
    if length < wanted and not in_use:
        # What else is cut off only its tree tells: `info` and `check` look there.
        facts.state, facts.problem = "damaged", f"is cut off: {length} bytes of {wanted} or more"
    facts.shown_as = str(place.shown) if place.shown is not None else None
    if place.mount is not None:
        facts.failure = place.mount.status.get("failures", {}).get(os.path.realpath(place.sealed))
    if registry is not None:
        entry = registry.get(os.path.realpath(place.sealed))
        facts.registration = (
            "no"
            if entry is None
            else "yes"
            if (entry.image_uuid, entry.vm_id) == (identity.uuid, identity.vm_id)
            else "other"
        )
    return facts


def kmis_with_pin(keys: KeyService) -> set[str]:
    """Return the KMIs whose keys open on this host with a PIN only, as their records say."""
    return {info.kmi for info in keys.records() if _takes_pin(info)}


def mark_locked(facts: Facts, place: Place, with_pin: set[str]) -> Facts:
    """Note whether an image waits for a PIN that nobody gave to the mount that shows it."""
    mount = place.mount
    is_unlocked = mount is not None and facts.vm_id in mount.status.get("unlocked", ())
    facts.is_locked = facts.kmi in with_pin and not is_unlocked
    return facts


def _takes_pin(record: KeyInfo) -> bool:
    ours = [slot for slot in record.slots if slot.is_of_this_tpm]
    return bool(ours) and all("pin" in slot.policy for slot in ours)


def verify(facts: Facts, place: Place, keys: KeyService) -> SealfsError | None:
    """Verify what the file says, and add what its key record says.

    Returns:
        What is wrong with the image itself; a key that cannot be had is only noted.
    """
    assert facts.vm_id is not None
    record = next((info for info in keys.records() if info.kmi == facts.kmi), None)
    facts.key = record.to_json() if record is not None else None
    live = _live(place)
    if live is not None:
        facts.live = live
        facts.rekey = live["rekey"]
        facts.size = int(live["size"])
        facts.unverified = ["kmi", "created"]  # the mount verified the rest at its first open
        facts.unverified_because = "the image is in use; its mount tells the rest"
        return None
    if facts.state == "in use":
        facts.unverified_because = "another process has the image open"
        return None
    try:
        storage = sealed.peek_storage(place.sealed)
        try:
            identity = read_identity(storage)
            known = freshness.newcomer(place.sealed, identity.uuid, keys.ledger)
            image = sealed.open_with(storage, identity, keys, known)
            _take_identity(facts, image.identity)
            facts.size = image.size
            facts.rekey = image.rekey_progress
            image.abandon()
        finally:
            storage.close()
    except RolledBack as error:
        facts.state = "rolled back"
        facts.unverified_because = error.detail
        return error
    except (KeyServiceError, OSError) as error:
        facts.unverified_because = str(error)
        return None
    except (FormatError, IntegrityError, StorageFailed) as error:
        if sealed.is_in_use(place.sealed):
            facts.state = "in use"
            facts.unverified_because = "somebody began to use the image just now"
            return None
        facts.state, facts.problem = "damaged", error.detail
        facts.unverified_because = error.detail
        return error
    facts.unverified = []
    return None


def key_text(record: KeyInfo | Mapping[str, Any]) -> str:
    """Return the slots of a key record in a few words."""
    found = record if isinstance(record, Mapping) else record.to_json()
    if found["problem"]:
        return str(found["problem"])
    if found["gone"]:
        return str(found["gone"])
    slots: Any = found["slots"]
    texts = [slot_text(slot) for slot in slots]
    if found["is_changing"]:
        texts.append("being rotated")
    return ", ".join(texts)


def slot_text(slot: Mapping[str, Any]) -> str:
    """Return one slot in a few words."""
    if slot["kind"] == "recovery":
        return f"recovery {str(slot['recipient'])[:8]}"
    where = "" if slot["is_of_this_tpm"] else " of another TPM"
    pcrs = f" PCR {','.join(map(str, slot['pcrs']))}" if slot["pcrs"] else ""
    pin = " PIN" if "pin" in slot["policy"] else ""
    signer = f" signed by {slot['signer'][:8]}" if slot["signer"] else ""
    return f"{slot['kind']}{where}{pcrs}{signer}{pin}"


def full_size(geometry: Geometry, size: int) -> int:
    """Return the bytes that an image takes when every block of its disk is written."""
    groups = -(-block_count_of(size) // geometry.group_blocks)
    nodes, level = 0, groups
    for _ in range(geometry.depth):
        level = -(-level // geometry.fanout)
        nodes += level
    chunks = -(-nodes // geometry.chunk_nodes)
    return geometry.slot_offset(groups + chunks)


def _take(facts: Facts, superblock: Superblock, identity: Identity) -> None:
    _take_identity(facts, identity)
    facts.size = superblock.size
    if superblock.rekey.phase or identity.new_generation:
        facts.rekey = {}
    facts.full_size = full_size(superblock.geometry, superblock.size)


def _take_identity(facts: Facts, identity: Identity) -> None:
    facts.vm_id, facts.disk, facts.kmi = identity.vm_id, identity.label, identity.kmi
    facts.image_uuid = identity.uuid.hex()
    try:
        created = datetime.datetime.fromtimestamp(identity.created, datetime.UTC)
        facts.created = created.isoformat()
    except (OverflowError, ValueError, OSError):
        facts.created = str(identity.created)
    facts.recovery_keys = [recipient_text(slot) for slot in identity.recovery_slots]


def _live(place: Place) -> dict[str, Any] | None:
    """Return what the mount that has the image open says of it."""
    if place.mount is None:
        return None
    return live_status(place.mount, os.path.realpath(place.sealed))


def live_status(mount: RunningMount, wanted: str) -> dict[str, Any] | None:
    """Return what a mount says of an image by its canonical path, None if it is not open."""
    for image in mount.call("status")["images"]:
        if image["path"] == wanted:
            found: dict[str, Any] = image
            return found
    return None


def sealed_files(directory: Path) -> list[Path]:
    """Return the sealed files below a directory, sorted.

    Raises:
        OSError: the directory itself cannot be read.
    """
    with os.scandir(directory):
        pass
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(directory)
        for name in names
        if name.endswith(sealed.SUFFIX) and not name.startswith(".")
    )
