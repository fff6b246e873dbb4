"""The host's registry: which image belongs under which path, authenticated by the host secret.

A path is the canonical path of a sealed file. The registry belongs to the state directory: each
change takes its lock, reads the file again, writes it as a whole; reading takes no lock, because
the file is replaced atomically. A registry that was edited, removed or brought from another host
is refused; so is an older one of this same host: each change counts on the registry's generation
and notes it in the ledger, as the progress of an image is noted.

A path has one entry; two while one image takes the place of another, and after a crash in the
middle of that, so that whichever of the two stands there opens (see `moving` and `check`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from sealfs.errors import (
    AlreadyExists,
    ForeignImage,
    NoSpace,
    UsageError,
)
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import MAC_SIZE, UUID_SIZE
from sealfs.keys.ledger import REGISTRY_ID, STATE_MAC_SIZE, Progress, SubkeyLender
from sealfs.keys.noted import Ledger, NotedFile
from sealfs.keys.statedir import REGISTRY_FILE, StateDir

REGISTRY_VERSION: Final = 2
"""Version 1 has no generation; it is read as generation 0."""
ENTRY_COUNT_MAX: Final = 16_384
REGISTRY_SIZE_MAX: Final = 16 * 1024 * 1024
"""A thousand bytes for each entry; an ordinary path takes a hundred."""
PATH_SIZE_MAX: Final = 4096
"""PATH_MAX, limits.h."""


@dataclass(frozen=True, slots=True)
class RegistryEntry:
    """One sealed file. `path` may hold surrogate escapes (os.fsdecode)."""

    path: str
    image_uuid: bytes
    vm_id: str

    def to_json(self) -> dict[str, object]:
        return {
            "path": os.fsencode(self.path).decode("utf-8", "backslashreplace"),
            "image_uuid": self.image_uuid.hex(),
            "vm_id": self.vm_id,
        }


@dataclass(frozen=True, slots=True)
class RegistryFile:
    """STATE/registry: entries sorted by path and uuid, a MAC over everything before it.

    `generation` counts the changes.
    """

    host_id: bytes
    entries: tuple[RegistryEntry, ...]
    generation: int = 0
    mac: bytes = bytes(MAC_SIZE)
    version: int = REGISTRY_VERSION

    def _body(self) -> bytes:
        parts = [
            labels.REGISTRY_MAGIC,
            wire.number(self.version, 2),
            self.host_id,
            wire.number(self.generation, 8) if self.version > 1 else b"",
            wire.number(len(self.entries), 4),
        ]
        for entry in self.entries:
            parts += [
                wire.counted(os.fsencode(entry.path)),
                entry.image_uuid,
                wire.text(entry.vm_id),
            ]
        return b"".join(parts)

    def encode(self) -> bytes:
        return self._body() + self.mac

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse a registry; its MAC is not checked yet.

        Raises:
            FormatError: not a registry, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.REGISTRY_MAGIC, "registry")
        version = reader.version(REGISTRY_VERSION, "the registry", oldest=1)
        host_id = reader.take(UUID_SIZE)
        generation = reader.number(8) if version > 1 else 0
        count = reader.number(4)
        if count > ENTRY_COUNT_MAX:
            reader.damaged(f"announces {count} entries, at most {ENTRY_COUNT_MAX} are allowed")
        entries = tuple(
            RegistryEntry(
                os.fsdecode(reader.counted(PATH_SIZE_MAX, 1)),
                reader.take(UUID_SIZE),
                reader.identifier(),
            )
            for _ in range(count)
        )
        mac = reader.take(MAC_SIZE)
        reader.finish()
        return cls(host_id, entries, generation, mac, version)

    @property
    def progress(self) -> Progress:
        """How far the registry has come, in the ledger's words."""
        return Progress(self.generation, self.mac[:STATE_MAC_SIZE])

    def with_mac(self, mac_key: bytes | bytearray) -> Self:
        """Return the registry authenticated under the host's registry subkey."""
        return dataclasses.replace(self, mac=hmac.digest(mac_key, self._body(), "sha256"))

    def is_authentic(self, mac_key: bytes | bytearray) -> bool:
        """Whether the MAC fits."""
        return hmac.compare_digest(self.mac, hmac.digest(mac_key, self._body(), "sha256"))


@dataclass(frozen=True, slots=True)
class Move:
    """A move under way: entries by their old paths, by their new ones, and what stood there."""

    sources: frozenset[RegistryEntry]
    targets: frozenset[RegistryEntry]
    replaced: frozenset[RegistryEntry]


class Registry:
    """The registry of one host. Any thread, any number of processes.

    `name_of` is `canonical`, unless names come from a process that made them canonical already.
    """

    def __init__(
        self,
        state: StateDir,
        host_id: bytes,
        subkey: SubkeyLender,
        ledger: Ledger,
        *,
        name_of: Callable[[Path], str] | None = None,
    ) -> None:
        self._name_of = canonical if name_of is None else name_of
        self._file = NotedFile(
            state,
            host_id,
            subkey,
            ledger,
            name=REGISTRY_FILE,
            what="registry",
            ledger_id=REGISTRY_ID,
            mac_info=labels.REGISTRY_MAC_INFO,
            size_max=REGISTRY_SIZE_MAX,
            decode=RegistryFile.decode,
            empty=lambda generation: RegistryFile(host_id, (), generation),
            is_made_by_init=True,
        )

    def entries(self) -> list[RegistryEntry]:
        """Return all entries, sorted by path.

        Raises:
            KeyRecordDamaged: edited, removed, or another host's.
            RolledBack: older than this host has seen it.
        """
        return list(self._file.read().entries)

    def rebase(self) -> bool:
        """Take the registry as it is for the newest, whatever was noted; durable.

        In place of one that is gone, damaged or another host's stands an empty one, in which each
        image is to be registered. If the ledger was lost as well, a registry of before can be put
        back until that is noticed by its images.

        Returns:
            Whether what the registry knew was kept.
        """
        return bool(self._file.rebase())

    def lookup(self, path: Path) -> RegistryEntry | None:
        """Return the entry of a sealed file, None where it is not registered."""
        wanted = self._name_of(path)
        return next((entry for entry in self.entries() if entry.path == wanted), None)

    def check(self, path: Path, image_uuid: bytes, vm_id: str) -> None:
        """Refuse an image that is not the one registered under its path.

        Raises:
            ForeignImage: with the innocent and the hostile reason.
        """
        wanted = self._name_of(path)
        here = [entry for entry in self.entries() if entry.path == wanted]
        if not here:
            raise ForeignImage(
                path,
                f'this image of VM "{vm_id}" is not registered under this path: it was moved '
                "or copied outside sealfs, or comes from another host",
            )
        found = RegistryEntry(wanted, image_uuid, vm_id)
        if found not in here:
            raise ForeignImage(
                path,
                f'image {image_uuid.hex()} of VM "{vm_id}" stands where '
                f'{here[0].image_uuid.hex()} of VM "{here[0].vm_id}" is registered: moved outside '
                "sealfs, or exchanged by somebody",
            )
        if len(here) > 1:
            # A crash left both: what stands there is the one from now on.
            self._change(lambda entries: entries.difference(here) | {found})

    def add(self, path: Path, image_uuid: bytes, vm_id: str, *, replace: bool = False) -> None:
        """Register a sealed file; durable on return. The same entry again changes nothing.

        Raises:
            AlreadyExists: another image is registered under this path and `replace` is False.
            UsageError: a VM id or path that cannot be stored.
            NoSpace: the registry is full.
        """
        wire.check_identifier(vm_id, "VM id")
        if len(image_uuid) != UUID_SIZE:
            raise ValueError("an image uuid has 16 bytes")
        new = RegistryEntry(self._name_of(path), image_uuid, vm_id)

        def change(found: set[RegistryEntry]) -> set[RegistryEntry]:
            others = {entry for entry in found if entry.path == new.path and entry != new}
            if others and not replace:
                vm_ids = ", ".join(repr(entry.vm_id) for entry in others)
                raise AlreadyExists(new.path, f"is registered as an image of VM {vm_ids}")
            return found - others | {new}

        self._change(change)

    @contextlib.contextmanager
    def moving(self, moves: Iterable[tuple[Path, Path]]) -> Iterator[None]:
        """Move entries, around the renaming of their files by the body; durable on return.

        Before the body each image is registered under its new path as well, beside what is there;
        after it under its new path alone. A crash between any two steps leaves both registered,
        and `check` finds out. A body that raises leaves the entries as they were. What is not
        registered is left out.

        Args:
            moves: (old path, new path) of sealed files.
        """
        move = self.begin_move(moves)
        # Crash here: each image opens under its old path.
        try:
            yield
        except BaseException:
            self.end_move(move, is_done=False)
            raise
        # Crash here: each image opens under its new path; the old entries name no file.
        self.end_move(move, is_done=True)

    def begin_move(self, moves: Iterable[tuple[Path, Path]]) -> Move:
        """Register each image under its new path as well; what `moving` does before its body."""
        paths = {self._name_of(old): self._name_of(new) for old, new in moves}
        before = self.entries()
        sources = {entry for entry in before if entry.path in paths}
        targets = {dataclasses.replace(entry, path=paths[entry.path]) for entry in sources}
        replaced = {entry for entry in before if entry.path in {t.path for t in targets}}
        self._change(lambda found: found | targets)
        return Move(frozenset(sources), frozenset(targets), frozenset(replaced))

    def end_move(self, move: Move, *, is_done: bool) -> None:
        """Register each image under its one path; what `moving` does after its body."""
        if is_done:
            self._change(lambda found: (found - move.sources - move.replaced) | move.targets)
        else:
            self._change(lambda found: found - move.targets | move.replaced | move.sources)

    def remove(self, path: Path) -> None:
        """Forget a sealed file; durable on return. One that is not registered is no error."""
        wanted = self._name_of(path)
        self._change(lambda found: {entry for entry in found if entry.path != wanted})

    def _change(self, change: Callable[[set[RegistryEntry]], set[RegistryEntry]]) -> None:
        def step(before: RegistryFile) -> RegistryFile:
            entries = _sorted(change(set(before.entries)))
            if entries == before.entries:
                return before
            after = RegistryFile(before.host_id, entries, before.generation + 1)
            if len(entries) > ENTRY_COUNT_MAX or len(after.encode()) > REGISTRY_SIZE_MAX:
                raise NoSpace(self._file.subject, f"holds {ENTRY_COUNT_MAX} images at most")
            return after

        self._file.change(step)


def canonical(path: Path) -> str:
    """Return the path by which the registry knows a file; the file need not exist.

    Raises:
        UsageError: longer than any path of this system.
    """
    found = os.path.realpath(path)
    if len(os.fsencode(found)) > PATH_SIZE_MAX:
        raise UsageError(ascii(found[:64]), f"the path is longer than {PATH_SIZE_MAX} bytes")
    return found


def _sorted(entries: Iterable[RegistryEntry]) -> tuple[RegistryEntry, ...]:
    return tuple(sorted(entries, key=lambda entry: (os.fsencode(entry.path), entry.image_uuid)))
