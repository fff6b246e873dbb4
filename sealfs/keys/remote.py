"""The key service of a process that has none of its own: asked of `sealfs keyd` (KEYD.md).

What a mount takes in place of `KeyService`: image keys, the registry, the ledger and locks, and no
VM key, TPM, or file of the state directory.

Concurrency: any thread; each question has a connection of its own while it is asked, of at most
CONNECTIONS_MAX. Not to be used after a fork.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

from sealfs.errors import KeydUnavailable, SealfsError
from sealfs.keys import keyd_wire as protocol
from sealfs.keys.keyd_wire import Document
from sealfs.keys.ledger import Progress
from sealfs.keys.networks import NETWORK_KEY_SIZE, NetworkKey
from sealfs.keys.registry import REGISTRY_SIZE_MAX, RegistryEntry, RegistryFile, canonical
from sealfs.keys.statedir import ImageLock
from sealfs.keys.vmkey import IMAGE_KEY_SIZE, NewImageKey

CONNECTIONS_MAX: Final = 16
"""As many as a mount has workers: nothing waits for an unseal that it does not need."""
ANSWER_WAIT_S: Final = 60.0
"""Several uses of a slow TPM, and the wait for the state lock before each."""


class _Lost(Exception):
    """The connection ended before an answer came."""


class _Answer(NamedTuple):
    fields: Document
    descriptor: int
    """-1, or the caller's to close."""

    def memory(self, size_max: int, size_min: int = 0) -> bytearray:
        """Return what was handed over, and let go of it."""
        try:
            return protocol.read_sealed_memory(self.descriptor, size_max, size_min)
        finally:
            os.close(self.descriptor)


class _Connection:
    """One connection of a group; one question at a time."""

    def __init__(self, path: Path, group: bytes) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            try:
                # Blocking: with a time limit of Python's, a queue that is full fails at once.
                protocol.limit_sending(self._socket, ANSWER_WAIT_S)
                self._socket.connect(str(path))
            except OSError as error:
                reason = error.strerror or error
                raise KeydUnavailable(path, f"keyd does not answer: {reason}") from None
            self._socket.settimeout(ANSWER_WAIT_S)
            _, uid = protocol.peer_of(self._socket)
            if uid not in (0, os.geteuid()):
                raise KeydUnavailable(path, f"is served by uid {uid}, neither root nor ours")
            greeting = self._receive(False).fields
            version = greeting.get("version")
            if version != protocol.PROTOCOL_VERSION:
                raise KeydUnavailable(
                    path,
                    f"speaks version {version}, this sealfs {protocol.PROTOCOL_VERSION}: "
                    "restart keyd, or this mount",
                )
            self._features = frozenset(map(str, greeting.get("features", ())))
            self.state_path = Path(self.ask("join", {"group": group.hex()}).fields["state"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def ask(
        self,
        verb: str,
        fields: Document,
        *,
        hands_over: bool = False,
        secret: bytes | bytearray = b"",
    ) -> _Answer:
        """Return the answer; with a descriptor if and only if the verb hands one over.

        `secret` goes behind the question, and nowhere else.

        Raises:
            _Lost: the connection ended. KeydUnavailable: no answer in time.
            SealfsError: what the key service raised.
        """
        feature = protocol.FEATURE_OF.get(verb)
        if feature is not None and feature not in self._features:
            raise KeydUnavailable(
                self._path, f"is older than this sealfs and knows no {feature}: restart keyd"
            )
        try:
            question = protocol.encode({"verb": verb, **fields})
            self._socket.sendmsg([question, b"\0", secret] if secret else [question])
        except TimeoutError:
            raise self._silent() from None
        except OSError:
            raise _Lost from None
        return self._receive(hands_over)

    def _receive(self, hands_over: bool) -> _Answer:
        try:
            raw, descriptors, _, _ = socket.recv_fds(
                self._socket, protocol.MESSAGE_SIZE_MAX, 1, socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError:
            raise self._silent() from None
        except OSError:
            raise _Lost from None
        with contextlib.ExitStack() as undo:
            for descriptor in descriptors:
                undo.callback(os.close, descriptor)
            if not raw:
                raise _Lost
            fields = protocol.decode(raw)
            if not fields.pop("ok", False):
                raise protocol.error_from(fields["error"])
            if len(descriptors) != hands_over:
                raise KeydUnavailable(self._path, f"handed over {len(descriptors)} descriptors")
            undo.pop_all()
        return _Answer(fields, descriptors[0] if descriptors else -1)

    def _silent(self) -> KeydUnavailable:
        return KeydUnavailable(self._path, f"keyd did not answer for {ANSWER_WAIT_S:g} s")


class _Link:
    """The connections of one process to its keyd; made anew when keyd was restarted."""

    def __init__(self, path: Path, on_lost: Callable[[], object]) -> None:
        self._path = path
        self._on_lost = on_lost
        self._group = secrets.token_bytes(protocol.GROUP_SIZE)
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._lock = threading.Lock()
        self._idle: _Connection | None = None
        """Kept open, so that the group lasts."""

    def ask(self, verb: str, *, hands_over: bool = False, **fields: object) -> _Answer:
        """Ask one thing, once more where keyd went away meanwhile (KEYD.md, Ends).

        Raises:
            KeydUnavailable: it is away.
            SealfsError: what the key service raised.
        """
        with self._places:
            with self._lock:
                connection, self._idle = self._idle, None
            if connection is not None:
                with contextlib.suppress(_Lost), self._kept(connection):
                    return connection.ask(verb, fields, hands_over=hands_over)
                self._on_lost()
            with self.connection() as connection:
                return connection.ask(verb, fields, hands_over=hands_over)

    @contextlib.contextmanager
    def connection(self) -> Iterator[_Connection]:
        """Lend a new connection, for questions that belong together."""
        try:
            connection = _Connection(self._path, self._group)
            with self._kept(connection):
                yield connection
        except _Lost:
            raise KeydUnavailable(self._path, "keyd ended before it answered") from None

    def close(self) -> None:
        """End the group, unless something is being asked still."""
        with self._lock:
            connection, self._idle = self._idle, None
        if connection is not None:
            connection.close()

    @contextlib.contextmanager
    def _kept(self, connection: _Connection) -> Iterator[None]:
        """Keep a connection for the next question, but for one that was lost or given up."""
        try:
            yield
        except BaseException as error:
            # Anything else may have come between a question and its answer, which must not be
            # taken for the next one's.
            if not isinstance(error, SealfsError) or isinstance(error, KeydUnavailable):
                connection.close()
                raise
            self._keep(connection)
            raise
        self._keep(connection)

    def _keep(self, connection: _Connection) -> None:
        with self._lock:
            surplus, self._idle = self._idle, connection
        if surplus is not None:
            surplus.close()


class RemoteRegistry:
    """The host's registry, as `Registry` has it; names are made canonical here."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def entries(self) -> list[RegistryEntry]:
        raw = bytes(self._link.ask("entries", hands_over=True).memory(REGISTRY_SIZE_MAX))
        return list(RegistryFile.decode(raw, "keyd").entries)

    def lookup(self, path: Path) -> RegistryEntry | None:
        wanted = canonical(path)
        return next((entry for entry in self.entries() if entry.path == wanted), None)

    def check(self, path: Path, image_uuid: bytes, vm_id: str) -> None:
        self._link.ask("check", path=canonical(path), image=image_uuid.hex(), vm_id=vm_id)

    def add(self, path: Path, image_uuid: bytes, vm_id: str, *, replace: bool = False) -> None:
        image = image_uuid.hex()
        self._link.ask("add", path=canonical(path), image=image, vm_id=vm_id, replace=replace)

    def remove(self, path: Path) -> None:
        self._link.ask("remove", path=canonical(path))

    @contextlib.contextmanager
    def moving(self, moves: Iterable[tuple[Path, Path]]) -> Iterator[None]:
        with self._link.connection() as connection:
            for old, new in moves:
                connection.ask("move", {"old": canonical(old), "new": canonical(new)})
            connection.ask("move_begin", {})
            try:
                yield
            except BaseException:
                connection.ask("move_end", {"done": False})
                raise
            connection.ask("move_end", {"done": True})


class RemoteLedger:
    """The host's ledger, as `Ledger` has it."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def find(self, image_uuid: bytes) -> Progress | None:
        answer = self._link.ask("find", image=image_uuid.hex())
        return protocol.progress_from(answer.fields["progress"])

    def begin(self) -> None:
        self._link.ask("begin")

    def bump(self) -> None:
        self._link.ask("bump")

    def note(self, images: Mapping[bytes, Progress]) -> None:
        rest = iter(images.items())
        while part := dict(islice(rest, protocol.NOTED_COUNT_MAX)):
            noted = {uuid.hex(): protocol.progress_document(at) for uuid, at in part.items()}
            self._link.ask("note", images=noted)

    def accept(self, image_uuid: bytes, progress: Progress | None) -> None:
        document = protocol.progress_document(progress)
        self._link.ask("accept", image=image_uuid.hex(), progress=document)


class RemoteNetworks:
    """The host's networks, as `Networks` has them for an attachment."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def grant(self, network: str, vm_id: str, device: int) -> NetworkKey:
        answer = self._link.ask(
            "network_grant", hands_over=True, network=network, vm_id=vm_id, device=device
        )
        key = answer.memory(NETWORK_KEY_SIZE, NETWORK_KEY_SIZE)
        return NetworkKey(key, bytes.fromhex(answer.fields["sci"]))

    def is_allowed(self, network: str, vm_id: str) -> bool:
        answer = self._link.ask("network_allowed", network=network, vm_id=vm_id)
        return answer.fields["allowed"] is True


class RemoteKeys:
    """The key service of a mount beside `sealfs keyd`; `KeyService` says what each call does.

    Everything raises KeydUnavailable too: keyd is away, or refuses this user.
    """

    def __init__(self, path: Path) -> None:
        self._unlocked: set[str] = set()
        """What keyd keeps for us; as it ends, it forgets."""
        self._link = _Link(path, self._unlocked.clear)
        self.state_path = Path()
        self.registry = RemoteRegistry(self._link)
        self.ledger = RemoteLedger(self._link)
        self.networks = RemoteNetworks(self._link)

    @classmethod
    def open(cls, path: Path) -> RemoteKeys:
        """Connect to the keyd that serves this socket.

        Raises:
            KeydUnavailable: none does, or it refuses this user.
            KeyServiceError: what is wrong with its host.
        """
        keys = cls(path)
        with keys._link.connection() as connection:
            keys.state_path = connection.state_path
            return keys

    def close(self) -> None:
        """Let go of keyd; what it held for this process is wiped there."""
        self._link.close()

    def unlock(self, vm_id: str, pin: bytearray) -> None:
        with self._link.connection() as connection:
            # Once only: the TPM counts wrong ones.
            connection.ask("unlock", {"vm_id": vm_id}, secret=pin)
        self._unlocked.add(vm_id)

    def lock(self, vm_id: str) -> bool:
        self._unlocked.discard(vm_id)
        return bool(self._link.ask("relock", vm_id=vm_id).fields["was_unlocked"])

    def unlocked(self) -> list[str]:
        return sorted(self._unlocked)

    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray:
        answer = self._link.ask(
            "image_key",
            hands_over=True,
            kmi=kmi,
            vm_id=vm_id,
            image=image_uuid.hex(),
            wrapped=wrapped.hex(),
        )
        return answer.memory(IMAGE_KEY_SIZE, IMAGE_KEY_SIZE)

    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey:
        answer = self._link.ask(
            "new_image_key", hands_over=True, vm_id=vm_id, image=image_uuid.hex()
        )
        key = answer.memory(IMAGE_KEY_SIZE, IMAGE_KEY_SIZE)
        fields = answer.fields
        slots = tuple(bytes.fromhex(slot) for slot in fields["recovery_slots"])
        return NewImageKey(key, str(fields["kmi"]), bytes.fromhex(fields["wrapped"]), slots)

    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock:
        answer = self._link.ask(
            "lock",
            hands_over=True,
            subject=str(subject),
            image=image_uuid.hex(),
            shared=shared,
        )
        return ImageLock(answer.descriptor)
