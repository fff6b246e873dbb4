"""`list`, `info`, `check` and `register`: looking at sealed images that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import sealed, survey
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import hint_of, warn
from sealfs.cli.output import print_facts, print_json, print_table, size_text
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.cli.survey import Facts
from sealfs.errors import AlreadyExists, IntegrityError, KeyServiceError, SealfsError, UsageError
from sealfs.image.recovery import peek, read_identity
from sealfs.image.storage import FileStorage
from sealfs.mount import freshness

if TYPE_CHECKING:
    from sealfs.image.image import SealedImage
    from sealfs.keys.registry import RegistryEntry
    from sealfs.keys.service import KeyService


@click.command("list")
@click.argument("directory", required=False, type=PATH)
@common_options
def list_command(settings: Settings, directory: Path | None) -> None:
    """List the sealed images below DIRECTORY, or all that this host has registered.

    What is shown of an image is what its file says: `info` verifies that, and `check` the whole.
    """
    registry: dict[str, RegistryEntry] | None = None
    with_pin: set[str] = set()
    try:
        with settings.keys() as keys:
            registry = survey.registered(keys)
            with_pin = survey.kmis_with_pin(keys)
    except (KeyServiceError, UsageError) as error:
        if directory is None:
            raise
        warn(f"what is registered is not known: {error}")
    if directory is not None:
        paths = survey.sealed_files(settings.about(directory))
    else:
        paths = [Path(path) for path in sorted(registry or {})]
    found = [_listed(path, registry, with_pin) for path in paths]
    if settings.json:
        print_json([facts.to_json() for facts in found])
        return
    print_table(
        ("PATH", "VM", "DISK", "SIZE", "ALLOCATED", "STATE (unverified)"),
        [
            (
                facts.path,
                facts.vm_id or "?",
                facts.disk or "",
                size_text(facts.size),
                size_text(facts.allocated),
                facts.state_text + (f": {facts.problem}" if facts.problem else ""),
            )
            for facts in found
        ],
    )


def _listed(path: Path, registry: dict[str, RegistryEntry] | None, with_pin: set[str]) -> Facts:
    if not os.path.lexists(path) and registry is not None:
        entry = registry[str(path)]
        return Facts(path=str(path), state="missing", registration="yes", vm_id=entry.vm_id)
    try:
        place = sealed.find(path)
    except (SealfsError, OSError) as error:
        return Facts(path=str(path), state="unreadable", problem=str(error))
    return survey.mark_locked(survey.look(place, registry), place, with_pin)


@click.command("info")
@click.argument("image", type=PATH)
@common_options
@pin_file_option
def info_command(settings: Settings, image: Path) -> None:
    """Tell what is known of one image: a sealed file, or the plain file a mount shows for it.

    Works without the key too; what could not be verified then is marked.
    """
    place = sealed.find(settings.about(image))
    wrong: SealfsError | None = None
    try:
        with settings.keys() as keys:
            if settings.pin_file is None:
                keys.ask_pin = None  # it tells what it can without
            try:
                registry = survey.registered(keys)
            except KeyServiceError:
                registry = None  # verifying meets the same, and says it
            facts = survey.look(place, registry)
            survey.mark_locked(facts, place, survey.kmis_with_pin(keys))
            if facts.vm_id is not None:
                wrong = survey.verify(facts, place, keys)
    except (KeyServiceError, UsageError) as error:
        facts = survey.look(place, None)
        facts.unverified_because = str(error)
        facts.hint = hint_of(error, settings.situation)
    if facts.vm_id is None:
        _raise_problem(place.sealed)
    if settings.json:
        print_json(facts.to_json())
    else:
        print_facts(_info_lines(facts))
    if wrong is not None:
        raise wrong
    if facts.problem is not None:
        raise IntegrityError(place.sealed, facts.problem)


def _raise_problem(path: Path) -> None:
    """Meet again what made the file unreadable, as an error of its own kind."""
    storage = sealed.peek_storage(path)
    try:
        peek(storage)
        read_identity(storage)
    finally:
        storage.close()


def _info_lines(facts: Facts) -> list[tuple[str, str]]:
    def own(name: str, text: str) -> tuple[str, str]:
        mark = " (unverified)" if name in facts.unverified else ""
        return name.replace("_", " "), f"{text}{mark}"

    size, full = facts.size or 0, facts.full_size or 0
    no_key = "not looked at" if (facts.hint or "").startswith("sudo") else "none on this host"
    lines = [
        ("path", facts.path),
        *([("shown as", facts.shown_as)] if facts.shown_as else []),
        own("vm_id", facts.vm_id or ""),
        *([own("disk", facts.disk)] if facts.disk else []),
        own("image_uuid", facts.image_uuid or ""),
        own("created", facts.created or ""),
        own("size", f"{size_text(size)} ({size} bytes)"),
        ("allocated", f"{size_text(facts.allocated)} on the storage"),
        ("when full", f"{size_text(full)}, {full - size} bytes more than the disk"),
        own("state", facts.state_text),
        *([own("kmi", facts.kmi or "")] if facts.kmi != facts.vm_id else []),
        ("key here", survey.key_text(facts.key) if facts.key else no_key),
        ("recovery keys", ", ".join(facts.recovery_keys) or "none"),
    ]
    if facts.live is not None:
        live = facts.live
        lines.append(("unflushed", f"{size_text(int(live['dirty']))}, {live['handles']} handles"))
    if facts.unverified_because is not None:
        lines.append(("unverified", facts.unverified_because))
    if facts.hint is not None:
        lines.append(("to verify", facts.hint))
    return lines


@click.command("register")
@click.argument("image", type=PATH)
@click.option(
    "--replace", is_flag=True, help="Even if another image or path is registered; says what."
)
@common_options
@pin_file_option
def register_command(settings: Settings, image: Path, replace: bool) -> None:
    """Accept an authentic image under its present path, after a move outside sealfs.

    The image is verified with its key first. Registering is saying: this file, in this place, is
    the VM's disk. An older copy of a disk is authentic too.
    """
    place = sealed.find(settings.about(image))
    with settings.keys() as keys:
        storage = FileStorage.open(place.sealed, read_only=True)
        try:
            identity = read_identity(storage)
            known = freshness.newcomer(place.sealed, identity.uuid, keys.ledger)
            opened = sealed.open_with(storage, identity, keys, known)
            with keys.audit.recorded(
                "image registered",
                vm=identity.vm_id,
                image=identity.uuid.hex(),
                path=os.path.realpath(place.sealed),
            ):
                entered = enter(keys, place.sealed, opened, replace=replace)
        finally:
            storage.close()
    if settings.json:
        print_json(entered)


def enter(keys: KeyService, path: Path, opened: SealedImage, *, replace: bool) -> dict[str, object]:
    """Register a verified image under its path; entries of it whose file is gone are dropped.

    What cannot be opened any more by this is warned of. Returns what is registered now, for
    --json.

    Raises:
        AlreadyExists: another image is registered under this path, or this one under another
            path where a file still stands; and `replace` is False.
    """
    here, image = os.path.realpath(path), opened.identity
    before = keys.registry.entries()
    others = [
        entry.path for entry in before if entry.image_uuid == image.uuid and entry.path != here
    ]
    copies = [other for other in others if os.path.exists(other)]
    if copies and not replace:
        raise AlreadyExists(
            path,
            f'this image is registered as "{copies[0]}", which is there too: one of them is a copy',
        )
    # From here on an older copy of it is refused.
    keys.ledger.note({image.uuid: freshness.progress_of(opened.progress)})
    keys.registry.add(path, image.uuid, image.vm_id, replace=replace)
    # Crash here: registered under both paths; it opens here.
    for other in others:
        keys.registry.remove(Path(other))
    for copy in copies:
        warn(f'"{copy}", the same image, is not registered any more and will not open')
    for entry in before:
        if entry.path == here and entry.image_uuid != image.uuid:
            warn(
                f'image {entry.image_uuid.hex()} of VM "{entry.vm_id}" was registered as '
                f'"{path}"; it will not open there any more'
            )
    return {
        "path": here,
        "vm_id": image.vm_id,
        "image_uuid": image.uuid.hex(),
        "no_longer_registered": others,
    }
