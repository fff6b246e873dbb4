"""A file of the state directory that nobody can edit, or exchange for an older one, unseen.

It is authenticated under a subkey of the host secret and counts its changes; how far it has come
stands in the ledger, as the progress of an image does. Each change takes the state lock, reads the
file again and writes it as a whole; reading takes no lock, because the file is replaced atomically.

Concurrency: any thread, any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, Self, TypeVar

from sealfs.errors import FormatError, KeyRecordDamaged, RolledBack
from sealfs.keys.ledger import Progress, SubkeyLender
from sealfs.keys.statedir import HeldLock, StateDir


class Ledger(Protocol):
    """The host's ledger as such a file needs it."""

    def noted(self, image_uuid: bytes) -> Progress | None: ...
    def note(self, images: Mapping[bytes, Progress]) -> None: ...
    def accept(self, image_uuid: bytes, progress: Progress | None) -> None: ...


class Content(Protocol):
    """What is in the file."""

    @property
    def host_id(self) -> bytes: ...
    @property
    def progress(self) -> Progress: ...
    def encode(self) -> bytes: ...
    def with_mac(self, mac_key: bytes | bytearray) -> Self: ...
    def is_authentic(self, mac_key: bytes | bytearray) -> bool: ...


C = TypeVar("C", bound=Content)


class NotedFile(Generic[C]):
    """One such file; `what` names it in messages."""

    def __init__(
        self,
        state: StateDir,
        host_id: bytes,
        subkey: SubkeyLender,
        ledger: Ledger,
        *,
        name: str,
        what: str,
        ledger_id: bytes,
        mac_info: bytes,
        size_max: int,
        decode: Callable[[bytes, str], C],
        empty: Callable[[int], C],
        is_made_by_init: bool,
    ) -> None:
        """Prepare it; nothing is read yet.

        Args:
            state: where it is.
            host_id: whose it is.
            subkey: lends a subkey of the host secret.
            ledger: where its progress stands.
            name: of the file.
            what: it is, in a word.
            ledger_id: under which its progress stands.
            mac_info: label of its subkey.
            size_max: bytes it may have.
            decode: parses it; raises FormatError or KeyRecordDamaged.
            empty: makes an empty one of a generation.
            is_made_by_init: whether it cannot be missing.
        """
        self._state = state
        self._host_id = host_id
        self._subkey = subkey
        self._ledger = ledger
        self._name = name
        self._what = what
        self._ledger_id = ledger_id
        self._mac_info = mac_info
        self._size_max = size_max
        self._decode = decode
        self._empty = empty
        self._is_made_by_init = is_made_by_init
        self.subject = str(state.path / name)

    def read(self, noted: Progress | None = None) -> C:
        """Return the content.

        `noted`: what the ledger said of it, where the caller asked already.

        Raises:
            KeyRecordDamaged: edited, removed, or another host's.
            RolledBack: older than this host has seen it.
        """
        # The ledger first: the file found afterwards is at least as new as what it notes.
        noted = noted or self._ledger.noted(self._ledger_id)
        with self._subkey(self._mac_info) as mac_key:
            found = self._read(mac_key, noted)
        self._check(found, noted)
        return found

    def change(self, step: Callable[[C], C]) -> None:
        """Replace the content; durable on return.

        Args:
            step: returns the next content, its progress one further; the same one: no change.

        Raises:
            As `read`, and what `step` raises.
        """
        # The ledger and the subkey first: both take the state lock, which is not reentrant.
        noted = self._ledger.noted(self._ledger_id)
        with self._subkey(self._mac_info) as mac_key, self._state.lock() as held:
            before = self._read(mac_key, noted)
            self._check(before, noted)
            after = step(before)
            if after is before:
                return
            after = after.with_mac(mac_key)
            self._write(after, held)
        # Crash here: the file is one ahead of the ledger, as an image may be.
        self._ledger.note({self._ledger_id: after.progress})

    def rebase(self) -> bool | None:
        """Take the file as it is for the newest, whatever was noted; durable.

        In place of one that is gone, damaged or another host's stands an empty one. If the ledger
        was lost as well, a file of before can be put back unnoticed until then.

        Returns:
            Whether what it held was kept; None where there never was one.
        """
        noted = self._ledger.noted(self._ledger_id)
        with self._subkey(self._mac_info) as mac_key, self._state.lock() as held:
            try:
                found, is_kept = self._read(mac_key, noted), True
                if noted is None and not self._state.has(self._name):
                    return None
            except (KeyRecordDamaged, FormatError):
                found = self._empty(1 if noted is None else noted.sequence + 1).with_mac(mac_key)
                is_kept = False
                self._write(found, held)
        self._ledger.accept(self._ledger_id, found.progress)
        return is_kept

    def _check(self, found: C, noted: Progress | None) -> None:
        at = found.progress
        if noted is None or at.sequence > noted.sequence or at == noted:
            return
        raise RolledBack(
            self.subject,
            f"is at change {at.sequence}, and this host has seen it at change "
            f"{noted.sequence}: restored from a backup, or an older one put back by somebody",
        )

    def _read(self, mac_key: bytearray, noted: Progress | None) -> C:
        raw = self._state.read(self._name, self._size_max)
        if raw is None:
            if noted is None and not self._is_made_by_init:
                return self._empty(0)
            made = "init made one" if self._is_made_by_init else "this host has seen it"
            raise KeyRecordDamaged(
                self.subject, f"the {self._what} is gone, and {made}: it was removed"
            )
        found = self._decode(raw, self.subject)
        if found.host_id != self._host_id:
            raise KeyRecordDamaged(self.subject, f"is the {self._what} of another host")
        if not found.is_authentic(mac_key):
            raise KeyRecordDamaged(self.subject, "does not authenticate: it was edited or damaged")
        return found

    def _write(self, after: C, held: HeldLock) -> None:
        self._state.write(self._name, after.encode(), held)
