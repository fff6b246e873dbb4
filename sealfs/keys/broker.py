"""The key broker: serves the key service to mounts over a socket.

The server's half of KEYD.md: who may ask, groups of connections, one method for each verb. Knows
nothing of images beyond their uuids, nor of the files that paths name.

Concurrency: a thread for each connection; the thread of `run` accepts. `_lock` holds the tables of
connections and groups together, and is never held while anything waits. The service of a group is
used by the threads of its connections, as a mount's workers use theirs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from sealfs.errors import Busy, KeydUnavailable, KeyServiceError, SealfsError, UsageError
from sealfs.keys import keyd_wire as protocol
from sealfs.keys.hostrecord import UUID_SIZE
from sealfs.keys.keyd_wire import Document
from sealfs.keys.ledger import Ledger, Progress
from sealfs.keys.networks import NetworkKey
from sealfs.keys.registry import ENTRY_COUNT_MAX, Move, Registry, RegistryFile
from sealfs.keys.statedir import ImageLock
from sealfs.keys.vmkey import NewImageKey, wipe

CONNECTIONS_MAX: Final = 512
CONNECTIONS_PER_UID_MAX: Final = 448
SEND_WAIT_S: Final = 10
"""A client that does not take an answer for so long is cut off."""
FAREWELL_S: Final = 15.0
"""Until what is being answered has ended; the state lock is waited for at most 10 s."""

_log = logging.getLogger("sealfs.keyd")


class Networks(Protocol):
    """The networks of one group."""

    def grant(self, network: str, vm_id: str, device: int) -> NetworkKey: ...
    def is_allowed(self, network: str, vm_id: str) -> bool: ...


class Keys(Protocol):
    """The key service of one group; any thread may call it."""

    @property
    def registry(self) -> Registry: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def networks(self) -> Networks: ...
    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray: ...
    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey: ...
    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock: ...
    def unlock(self, vm_id: str, pin: bytearray) -> None: ...
    def lock(self, vm_id: str) -> bool: ...
    @property
    def state_path(self) -> Path: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Group:
    """What the connections of one process share."""

    keys: Keys
    connection_count: int = 0


@dataclass(slots=True)
class Answer:
    """What a verb answers; `descriptor` is closed once it was sent."""

    fields: Document = field(default_factory=dict)
    descriptor: int | None = None


class Broker:
    """The broker of one state directory; `bind`, then `run` until `stop`."""

    def __init__(
        self,
        path: Path,
        open_keys: Callable[[int, int], Keys],
        *,
        allowed: frozenset[int] = frozenset(),
    ) -> None:
        """Prepare it; nothing is touched yet.

        Args:
            path: where the socket is to be.
            open_keys: opens a key service for a new group, of a process and its uid; it takes
                paths as they are.
            allowed: uids that may ask besides root and our own.
        """
        self.path = path
        self._open_keys = open_keys
        self._others = allowed
        self._allowed = allowed | {0, os.geteuid()}
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, tuple[int, threading.Thread]] = {}
        self._groups: dict[tuple[int, bytes], _Group] = {}
        self._refused: set[int] = set()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener: socket.socket | None = None
        self._lock_fd = -1

    def bind(self) -> None:
        """Make the socket, in place of one that a dead broker left.

        Raises:
            Busy: another broker serves it.
            UsageError: it cannot be made there.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock_fd = os.open(f"{self.path}.lock", flags, 0o600)
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(self.path, "is served by another keyd") from None
            self.path.unlink(missing_ok=True)
            previous = os.umask(0o177)
            try:
                listener.bind(str(self.path))
            finally:
                os.umask(previous)
            if self._others:
                self.path.chmod(0o666)  # SO_PEERCRED decides
            listener.listen(64)
        except OSError as error:  # too long a path has no errno's words
            listener.close()
            reason = error.strerror or error
            raise UsageError(self.path, f"cannot be made a socket: {reason}") from error
        except BaseException:
            listener.close()
            raise
        listener.setblocking(False)
        self._listener = listener

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until `stop`; answers under way are finished, then the socket is gone."""
        listener = self._listener
        assert listener is not None, "bind comes first"
        try:
            ready()
            while True:
                readable, _, _ = select.select([listener.fileno(), self._stop_fd], [], [])
                if self._stop_fd in readable:
                    return
                self._accept(listener)
        finally:
            with contextlib.suppress(OSError):
                self.path.unlink()
            listener.close()
            self._end_connections()
            os.close(self._lock_fd)
            os.close(self._stop_fd)

    def stop(self) -> None:
        """Have `run` return; for signal handlers and other threads."""
        with contextlib.suppress(OSError):  # it has returned
            os.eventfd_write(self._stop_fd, 1)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            _log.error("cannot accept a connection: %s", error.strerror)
            time.sleep(0.1)  # out of descriptors: the waiting one stays readable
            return
        connection.setblocking(True)
        protocol.limit_sending(connection, SEND_WAIT_S)
        pid, uid = protocol.peer_of(connection)
        refusal = self._refusal(pid, uid)
        if refusal is not None:
            with connection, contextlib.suppress(OSError):
                connection.send(protocol.encode(_refusal(refusal)), socket.MSG_DONTWAIT)
            return
        thread = threading.Thread(
            target=self._serve, args=(connection, pid, uid), name=f"keyd-{pid}", daemon=True
        )
        with self._lock:
            self._connections[connection] = (uid, thread)
        try:
            thread.start()
        except RuntimeError:
            _log.error("cannot start a thread for another connection")
            with self._lock:
                del self._connections[connection]
            connection.close()

    def _refusal(self, pid: int, uid: int) -> SealfsError | None:
        if uid not in self._allowed:
            if uid not in self._refused:  # once each: a stranger does not fill the log
                self._refused.add(uid)
                _log.warning("refused process %d of uid %d", pid, uid)
            return KeydUnavailable(
                self.path, f"keyd answers root and uids that it was told, not uid {uid}"
            )
        with self._lock:
            uids = [other for other, _ in self._connections.values()]
        if len(uids) >= CONNECTIONS_MAX or uids.count(uid) >= CONNECTIONS_PER_UID_MAX:
            return Busy(self.path, f"keyd has {len(uids)} connections and takes no more")
        return None

    def _serve(self, connection: socket.socket, pid: int, uid: int) -> None:
        client = _Client(self, pid, uid)
        buffer = bytearray(protocol.MESSAGE_SIZE_MAX)
        try:
            greeting = {"version": protocol.PROTOCOL_VERSION, "features": protocol.FEATURES}
            connection.send(protocol.encode({"ok": True, **greeting}))
            while True:
                size, _, flags, _ = connection.recvmsg_into([buffer])
                if not size:
                    return
                # MSG_CTRUNC: descriptors were sent, and dropped by the kernel.
                is_whole = not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
                raw, secret = protocol.split(buffer, size)
                try:
                    answer = client.answer(raw if is_whole else b"", secret)
                finally:
                    wipe(secret)
                _send(connection, answer)
        except OSError:
            pass  # the client is gone, or does not take its answer
        except Exception:
            _log.exception("a connection of process %d failed", pid)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()
            if client.group is not None:
                self._leave(uid, client.group_id)

    def join(self, pid: int, uid: int, group_id: bytes) -> _Group:
        """Return the group, opened now if this is its first connection."""
        key = (uid, group_id)
        with self._lock:
            found = self._groups.get(key)
            if found is not None:
                found.connection_count += 1
                return found
        opened = _Group(self._open_keys(pid, uid))
        with self._lock:
            found = self._groups.setdefault(key, opened)
            found.connection_count += 1
        if found is opened:
            _log.info("serves process %d of uid %d", pid, uid)
        else:
            opened.keys.close()
        return found

    def _leave(self, uid: int, group_id: bytes) -> None:
        with self._lock:
            group = self._groups[uid, group_id]
            group.connection_count -= 1
            if group.connection_count:
                return
            del self._groups[uid, group_id]
        group.keys.close()

    def _end_connections(self) -> None:
        with self._lock:
            left = dict(self._connections)
        for connection in left:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + FAREWELL_S
        for _, thread in left.values():
            thread.join(max(0.0, deadline - time.monotonic()))


class _Client:
    """One connection: what lasts from one request to the next."""

    def __init__(self, broker: Broker, pid: int, uid: int) -> None:
        self._broker = broker
        self._pid = pid
        self._uid = uid
        self.group: _Group | None = None
        self.group_id = b""
        self._moves: list[tuple[Path, Path]] = []
        self._move: Move | None = None

    @property
    def keys(self) -> Keys:
        if self.group is None:
            raise UsageError("keyd message", "join comes first")
        return self.group.keys

    def answer(self, raw: bytes, secret: bytearray) -> Answer:
        """Return the answer to one message, whatever it holds."""
        try:
            verb, fields = protocol.parse(raw)
            if bool(secret) != (verb in protocol.TAKES_SECRET):
                raise UsageError("keyd message", f"{verb} with or without a secret behind it")
            if secret:
                fields["secret"] = secret
            found: Answer | None = getattr(self, f"do_{verb}")(**fields)
            answer = found or Answer()
            return Answer({"ok": True, **answer.fields}, answer.descriptor)
        except SealfsError as error:
            return Answer(_refusal(error))
        except Exception as error:
            _log.exception("a request failed")
            what = f"internal error: {type(error).__name__}; the log of keyd says more"
            return Answer(_refusal(KeyServiceError("keyd", what)))

    # The verbs of `keyd_wire.FIELDS`, with those fields.

    def do_join(self, group: bytes) -> Answer:
        if self.group is not None:
            raise UsageError("keyd message", "joins twice")
        self.group = self._broker.join(self._pid, self._uid, group)
        self.group_id = group
        return Answer({"state": str(self.keys.state_path)})

    def do_unlock(self, vm_id: str, secret: bytearray) -> None:
        self.keys.unlock(vm_id, secret)

    def do_relock(self, vm_id: str) -> Answer:
        return Answer({"was_unlocked": self.keys.lock(vm_id)})

    def do_image_key(self, kmi: str, vm_id: str, image: bytes, wrapped: bytes) -> Answer:
        return _with_key(self.keys.image_key(kmi, vm_id, image, wrapped))

    def do_new_image_key(self, vm_id: str, image: bytes) -> Answer:
        new = self.keys.new_image_key(vm_id, image)
        slots = [slot.hex() for slot in new.recovery_slots]
        fields = {"kmi": new.kmi, "wrapped": new.wrapped.hex(), "recovery_slots": slots}
        return _with_key(new.key, fields)

    def do_lock(self, subject: str, image: bytes, shared: bool) -> Answer:
        return Answer(descriptor=self.keys.lock_image(subject, image, shared=shared).detach())

    def do_entries(self) -> Answer:
        found = RegistryFile(bytes(UUID_SIZE), tuple(self.keys.registry.entries()))
        return Answer(descriptor=protocol.sealed_memory(found.encode()))

    def do_check(self, path: Path, image: bytes, vm_id: str) -> None:
        self.keys.registry.check(path, image, vm_id)

    def do_add(self, path: Path, image: bytes, vm_id: str, replace: bool) -> None:
        self.keys.registry.add(path, image, vm_id, replace=replace)

    def do_remove(self, path: Path) -> None:
        self.keys.registry.remove(path)

    def do_move(self, old: Path, new: Path) -> None:
        if self.group is None or len(self._moves) >= ENTRY_COUNT_MAX:
            raise UsageError("keyd message", f"moves more than {ENTRY_COUNT_MAX} files")
        self._moves.append((old, new))

    def do_move_begin(self) -> None:
        if self._move is not None:
            raise UsageError("keyd message", "begins a move within another")
        moves, self._moves = self._moves, []
        self._move = self.keys.registry.begin_move(moves)
        # A client that is gone from here on leaves both names, as a crash does; `check` settles it.

    def do_move_end(self, done: bool) -> None:
        if self._move is None:
            raise UsageError("keyd message", "ends no move")
        move, self._move = self._move, None
        self.keys.registry.end_move(move, is_done=done)

    def do_find(self, image: bytes) -> Answer:
        found = self.keys.ledger.find(image)
        return Answer({"progress": protocol.progress_document(found)})

    def do_begin(self) -> None:
        self.keys.ledger.begin()

    # A group begins before it writes: it may be a mount that keyd knew before a restart, or one
    # that died and came back (KEYD.md, Groups).

    def do_bump(self) -> None:
        self.keys.ledger.begin()
        self.keys.ledger.bump()

    def do_note(self, images: dict[bytes, Progress]) -> None:
        self.keys.ledger.begin()
        self.keys.ledger.note(images)

    def do_accept(self, image: bytes, progress: Progress | None) -> None:
        self.keys.ledger.begin()
        self.keys.ledger.accept(image, progress)

    def do_network_grant(self, network: str, vm_id: str, device: int) -> Answer:
        found = self.keys.networks.grant(network, vm_id, device)
        return _with_key(found.key, {"sci": found.sci.hex()})

    def do_network_allowed(self, network: str, vm_id: str) -> Answer:
        return Answer({"allowed": self.keys.networks.is_allowed(network, vm_id)})


def _send(connection: socket.socket, answer: Answer) -> None:
    descriptor = answer.descriptor
    try:
        rights: list[tuple[int, int, bytes]] = []
        if descriptor is not None:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", descriptor))]
        connection.sendmsg([protocol.encode(answer.fields)], rights)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _with_key(key: bytearray, fields: Document | None = None) -> Answer:
    try:
        return Answer(fields or {}, protocol.sealed_memory(key))
    finally:
        wipe(key)


def _refusal(error: SealfsError) -> Document:
    return {"ok": False, "error": protocol.error_document(error)}
