"""The host's ledger: how far each image has come, so that an older one is refused.

One file for all images of the host, authenticated under the host secret and bound to the TPM's NV
counter. Its first part holds a counter value and the state of every image; behind it come rows,
appended between two bumps, each MACed together with all before it. A row cut short by a crash ends
the file: what it said was not acknowledged.

What is noted is on the image's storage already, so the ledger never runs ahead of an image and an
honest crash raises no alarm. Whoever holds the images alone can put back a state not older than
the last note; whoever holds the state directory too, one not older than the last bump.

Counter rule (checked exhaustively by tests/test_ledger.py): the file's value is the counter's, or
one more where a crash came between the two. `begin` and `bump` roll forward, then write value + 1
and increment, twice: a file of the first of these values may exist already, made of an older
ledger by a process that died before its increment; of the second there can be none.

Concurrency: any thread, any number of processes: each operation holds the state lock, reads what
others appended, chains on it, and lets go.
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Protocol

from sealfs.errors import FormatError, KeyRecordDamaged, KeyServiceError, RolledBack
from sealfs.keys import labels, wire
from sealfs.keys.hostrecord import MAC_SIZE, UUID_SIZE
from sealfs.keys.statedir import LEDGER_FILE, HeldLock

LEDGER_VERSION: Final = 1
LEDGER_SIZE_MAX: Final = 16 << 20
COMPACT_SIZE: Final = 1 << 20
"""Bytes of rows after which the file is written anew."""
STATE_MAC_SIZE: Final = 16
"""As many bytes of a record's MAC as the image's anchors keep (image/FORMAT.md 4.1)."""
ENTRY_COUNT_MAX: Final = 65_535
REGISTRY_ID: Final = b"sealfs registry\0"
AUDIT_ID: Final = b"sealfs audit log"
NETWORKS_ID: Final = b"sealfs networks\0"
"""No image has these uuids: under them stands how far registry, audit log and the permissions on
networks have come."""
RESERVED_IDS: Final = frozenset({REGISTRY_ID, AUDIT_ID, NETWORKS_ID})
BURNED: Final = 2
"""Values that a bump moves the counter on by."""
_ENTRY_SIZE: Final = UUID_SIZE + 8 + STATE_MAC_SIZE

SubkeyLender = Callable[[bytes], contextlib.AbstractContextManager[bytearray]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an image has come: its last durable record, by sequence and start of its MAC."""

    sequence: int
    mac: bytes


class Counter(Protocol):
    """A counter that only grows; used under the state lock."""

    def read(self, held: HeldLock) -> int: ...
    def increment(self, held: HeldLock) -> None: ...


class Directory(Protocol):
    """Where the file is; the state directory, or a simulated one."""

    def lock(self) -> contextlib.AbstractContextManager[HeldLock]: ...
    def read(self, name: str, size_max: int) -> bytes | None: ...
    def write(self, name: str, content: bytes, held: HeldLock) -> None: ...
    def append(self, name: str, offset: int, content: bytes, held: HeldLock) -> None: ...


@dataclass(frozen=True, slots=True)
class LedgerFile:
    """What the bytes say: STATE/ledger, parsed and authenticated."""

    host_id: bytes
    value: int
    images: Mapping[bytes, Progress]
    end: int
    """Bytes that authenticate; what follows was cut short."""
    chain: bytes
    """MAC of the last part, which the next row's covers."""

    @classmethod
    def decode(cls, raw: bytes, mac_key: bytes | bytearray | None, subject: str) -> LedgerFile:
        """Parse and authenticate.

        Without a key nothing is authenticated: for the ledger of a host whose TPM is gone.

        Raises:
            FormatError: not a ledger, or of another version.
            KeyRecordDamaged: its first part was altered.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.LEDGER_MAGIC, "ledger")
        reader.version(LEDGER_VERSION, "the ledger")
        host_id = reader.take(UUID_SIZE)
        value = reader.number(8)
        count = reader.number(2)
        images = dict(_entries(reader.take(count * _ENTRY_SIZE)))
        size = reader.position
        chain = reader.take(MAC_SIZE)
        if not _is_mac(mac_key, raw[:size], chain):
            raise KeyRecordDamaged(subject, "does not authenticate: it was edited or damaged")
        end = reader.position
        while True:
            # A row that is not whole or does not chain is the end: a crash came in its middle.
            count = int.from_bytes(raw[end : end + 2], "big")
            body = raw[end : end + 2 + count * _ENTRY_SIZE]
            mac = raw[end + len(body) : end + len(body) + MAC_SIZE]
            if not count or not _is_mac(mac_key, chain + body, mac):
                return cls(host_id, value, images, end, chain)
            images.update(_entries(body[2:]))
            end += len(body) + MAC_SIZE
            chain = mac

    def encode(self, mac_key: bytes | bytearray) -> bytes:
        """Return the whole as a file without rows."""
        body = b"".join(
            (
                labels.LEDGER_MAGIC,
                wire.number(LEDGER_VERSION, 2),
                self.host_id,
                wire.number(self.value, 8),
                wire.number(len(self.images), 2),
                *_encoded(self.images),
            )
        )
        return body + _mac(mac_key, body)

    def row(self, images: Mapping[bytes, Progress], mac_key: bytes | bytearray) -> bytes:
        """Return a row to append at `end`."""
        body = wire.number(len(images), 2) + b"".join(_encoded(images))
        return body + _mac(mac_key, self.chain + body)


def new(
    host_id: bytes, value: int, images: Mapping[bytes, Progress], mac_key: bytes | bytearray
) -> bytes:
    """Return the bytes of a host's first ledger."""
    return LedgerFile(host_id, value, images, 0, b"").encode(mac_key)


class Ledger:
    """The ledger of one host, as one process uses it."""

    def __init__(
        self,
        directory: Directory,
        host_id: bytes,
        *,
        counter: Counter,
        subkey: SubkeyLender,
        subject: str,
    ) -> None:
        self._directory = directory
        self._host_id = host_id
        self._counter = counter
        self._subkey = subkey
        self._subject = subject
        self._has_begun = False

    def find(self, image_uuid: bytes) -> Progress | None:
        """Return how far an image had come when it was last noted, None if it never was.

        Raises:
            KeyRecordDamaged: the ledger was removed, edited, or is another host's.
            RolledBack: the ledger itself is older than the TPM's counter.
        """
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            self._check_value(found, held)
        return found.images.get(image_uuid)

    def noted(self, image_uuid: bytes) -> Progress | None:
        """As `find`, of the file as it is: neither lock nor counter is asked.

        Raises:
            KeyRecordDamaged: the ledger was removed, edited, or is another host's.
        """
        with self._subkey(labels.LEDGER_MAC_INFO) as mac_key:
            return self._read(mac_key).images.get(image_uuid)

    def begin(self) -> None:
        """Start writing, once in a process: as `bump`; later calls do nothing.

        Raises:
            As `bump`.
        """
        if not self._has_begun:
            self._bump()
            self._has_begun = True

    def bump(self) -> None:
        """Bind what was noted so far to new values of the counter; durable on return.

        Raises:
            KeyRecordDamaged, RolledBack: as `find`.
            TpmUnavailable: the counter does not answer; what was noted stays noted.
        """
        self._bump()

    def note(self, images: Mapping[bytes, Progress]) -> None:
        """Note how far images have come; durable on return.

        The record of each must be durable on the image's storage. One that is noted further on
        already stays so.

        Raises:
            KeyRecordDamaged: the ledger was removed, edited, or is another host's.
            StorageFailed, NoSpace: it could not be written.
        """
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            news = {
                uuid: progress
                for uuid, progress in images.items()
                if (old := found.images.get(uuid)) is None or old.sequence < progress.sequence
            }
            if news:
                self._append(found, news, mac_key, held)

    def accept(self, image_uuid: bytes, progress: Progress | None) -> None:
        """Take a state as the newest, whatever was noted; None forgets the image. Durable.

        For an image that is made, and for the audited return to an older one.
        """
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            images = {uuid: kept for uuid, kept in found.images.items() if uuid != image_uuid}
            if progress is not None:
                images[image_uuid] = progress
            if images != found.images:
                self._rewrite(replace(found, images=images), mac_key, held)

    def rebase(self) -> bool:
        """Take the ledger as it is for the newest, whatever the counter says; durable.

        The audited way on after a state directory was restored from a backup: from now on the
        images are compared with what this older ledger knows. In place of one that is gone,
        damaged or another host's stands an empty one, to which each image is to be made known.

        Returns:
            Whether what the ledger knew was kept.
        """
        with self._used() as (mac_key, held):
            try:
                found, is_kept = self._read(mac_key), True
            except (KeyRecordDamaged, FormatError):
                found, is_kept = LedgerFile(self._host_id, 0, {}, 0, b""), False
            self._rewrite(replace(found, value=self._counter.read(held)), mac_key, held)
        self._bump()
        return is_kept

    def _bump(self) -> None:
        with self._used() as (mac_key, held):
            found = self._read(mac_key)
            if self._check_value(found, held):
                # Crashed between the file and the counter; the file's content stays as it is.
                self._counter.increment(held)
            # Crash here: the same as before, rolled forward.
            for _ in range(BURNED):
                found = replace(found, value=found.value + 1)
                self._rewrite(found, mac_key, held)
                # Crash here: the file is one ahead, which the next `begin` takes up.
                self._counter.increment(held)

    def _check_value(self, found: LedgerFile, held: HeldLock) -> bool:
        """Return whether the file is one ahead of the counter."""
        value = self._counter.read(held)
        if found.value in (value, value + 1):
            return found.value != value
        if found.value < value:
            raise RolledBack(
                self._subject,
                f"has the value {found.value}, the TPM's counter {value}: the state directory "
                "was restored from a backup, or somebody put an older one back",
            )
        raise KeyRecordDamaged(
            self._subject, f"has the value {found.value}, ahead of the TPM's counter {value}"
        )

    @contextlib.contextmanager
    def _used(self) -> Iterator[tuple[bytearray, HeldLock]]:
        # The subkey first: unsealing it takes the state lock, which is not reentrant.
        with self._subkey(labels.LEDGER_MAC_INFO) as mac_key, self._directory.lock() as held:
            yield mac_key, held

    def _read(self, mac_key: bytearray) -> LedgerFile:
        raw = self._directory.read(LEDGER_FILE, LEDGER_SIZE_MAX)
        if raw is None:
            raise KeyRecordDamaged(
                self._subject, "the ledger is gone, and init made one: it was removed"
            )
        found = LedgerFile.decode(raw, mac_key, self._subject)
        if found.host_id != self._host_id:
            raise KeyRecordDamaged(self._subject, "is the ledger of another host")
        return found

    def _append(
        self,
        found: LedgerFile,
        news: Mapping[bytes, Progress],
        mac_key: bytearray,
        held: HeldLock,
    ) -> None:
        images = {**found.images, **news}
        if len(images) > ENTRY_COUNT_MAX:
            raise KeyServiceError(self._subject, f"holds {ENTRY_COUNT_MAX} images at most")
        if found.end >= len(found.encode(mac_key)) + COMPACT_SIZE:
            self._rewrite(replace(found, images=images), mac_key, held)
        else:
            self._directory.append(LEDGER_FILE, found.end, found.row(news, mac_key), held)

    def _rewrite(self, after: LedgerFile, mac_key: bytearray, held: HeldLock) -> None:
        if len(after.images) > ENTRY_COUNT_MAX:
            raise KeyServiceError(self._subject, f"holds {ENTRY_COUNT_MAX} images at most")
        self._directory.write(LEDGER_FILE, after.encode(mac_key), held)


def _mac(key: bytes | bytearray, content: bytes) -> bytes:
    return hmac.digest(key, content, "sha256")


def _is_mac(key: bytes | bytearray | None, content: bytes, mac: bytes) -> bool:
    """Whether a MAC fits; without a key whether there is one at all."""
    if key is None:
        return len(mac) == MAC_SIZE
    return hmac.compare_digest(mac, _mac(key, content))


def _encoded(images: Mapping[bytes, Progress]) -> Iterable[bytes]:
    for uuid, progress in sorted(images.items()):
        yield uuid + wire.number(progress.sequence, 8) + progress.mac


def _entries(raw: bytes) -> Iterator[tuple[bytes, Progress]]:
    for at in range(0, len(raw), _ENTRY_SIZE):
        entry = raw[at : at + _ENTRY_SIZE]
        if len(entry) < _ENTRY_SIZE:
            raise FormatError("ledger", "an entry is cut short")
        middle = UUID_SIZE + 8
        yield (
            entry[:UUID_SIZE],
            Progress(int.from_bytes(entry[UUID_SIZE:middle], "big"), entry[middle:]),
        )
