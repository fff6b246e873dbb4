"""What goes over the broker's socket: bounded JSON packets, errors, sealed memory (KEYD.md).

Both ends use it. A request either yields its fields, checked for type and size, or is refused
with `UsageError`; nothing of it is trusted before. Blocking, any thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sealfs import errors
from sealfs.errors import KeydUnavailable, KeyServiceError, SealfsError, UsageError
from sealfs.keys import wire
from sealfs.keys.ledger import RESERVED_IDS, STATE_MAC_SIZE, Progress
from sealfs.keys.records import DEVICE_MAX
from sealfs.keys.registry import PATH_SIZE_MAX
from sealfs.keys.vmkey import UUID_SIZE

PROTOCOL_VERSION: Final = 1
MESSAGE_SIZE_MAX: Final = 64 * 1024
"""The longest path twice, each byte escaped as JSON does, fits."""
GROUP_SIZE: Final = 16
NOTED_COUNT_MAX: Final = 256
"""Images in one `note`; 90 bytes each."""
WRAPPED_SIZE_MAX: Final = 1024
ERROR_TEXT_MAX: Final = 2048
"""Letters; JSON may take 12 bytes for each."""
SOCKET_NAME: Final = "keyd.sock"
NETWORKS: Final = "networks"
FEATURES: Final = (NETWORKS,)
"""What this keyd knows beyond the verbs that each of its version knows; it says so first."""

SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid

Document = dict[str, Any]


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the other end, as it was when it connected or listened (unix(7))."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(raw)
    return pid, uid


def limit_sending(connection: socket.socket, wait_s: float) -> None:
    """Have a blocking send or connect give up after a time, as BlockingIOError (socket(7))."""
    value = struct.pack("@ll", int(wait_s), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)


def split(buffer: bytearray, size: int) -> tuple[bytes, bytearray]:
    """Take a request of `size` bytes apart: its JSON, and the secret behind it or nothing.

    The buffer is wiped.
    """
    at = buffer.find(0, 0, size)
    end = size if at < 0 else at
    parts = bytes(buffer[:end]), buffer[end + 1 : size]
    buffer[:size] = bytes(size)
    return parts


def encode(document: Document) -> bytes:
    """Return one message.

    Raises:
        UsageError: too large for one.
    """
    raw = json.dumps(document, separators=(",", ":")).encode()
    if len(raw) > MESSAGE_SIZE_MAX:
        raise _malformed(f"has {len(raw)} bytes, at most {MESSAGE_SIZE_MAX} are allowed")
    return raw


def decode(raw: bytes) -> Document:
    """Return what one message holds.

    Raises:
        UsageError: not one JSON object.
    """
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise _malformed("is not JSON") from None
    if not isinstance(found, dict):
        raise _malformed("is not a JSON object")
    return found


def parse(raw: bytes) -> tuple[str, Document]:
    """Return the verb of a request and its fields, each of the type and size of `FIELDS`.

    Raises:
        UsageError: anything else than such a request.
    """
    document = decode(raw)
    verb = document.pop("verb", None)
    wanted = FIELDS.get(verb) if isinstance(verb, str) else None
    if wanted is None:
        raise _malformed("unknown verb")
    if document.keys() != wanted.keys():
        raise _malformed(f"{verb} has the fields {', '.join(wanted) or '(none)'}")
    try:
        return verb, {name: read(document[name]) for name, read in wanted.items()}
    except ValueError as error:
        raise _malformed(f"{verb}: {error}") from None


# What a field may hold; ValueError says what was expected.


def _text(found: object) -> str:
    if not isinstance(found, str) or not 1 <= len(found) <= PATH_SIZE_MAX or "\0" in found:
        raise ValueError(f"1 to {PATH_SIZE_MAX} letters without NUL are expected")
    return found


def _identifier(found: object) -> str:
    text = _text(found)
    problem = wire.identifier_problem(text)
    if problem is not None:
        raise ValueError(f"an identifier {problem}")
    return text


def _path(found: object) -> Path:
    """An absolute path in the one form that the registry knows; nothing is looked up."""
    text = _text(found)
    size = len(os.fsencode(text))  # UnicodeEncodeError is a ValueError
    is_canonical = text.startswith("/") and os.path.normpath(text) == text
    if not is_canonical or text.startswith("//") or size > PATH_SIZE_MAX:
        raise ValueError("an absolute canonical path is expected")
    return Path(text)


def _flag(found: object) -> bool:
    if not isinstance(found, bool):
        raise ValueError("true or false is expected")
    return found


def _device(found: object) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found <= DEVICE_MAX:
        raise ValueError(f"a device, 0 to {DEVICE_MAX}, is expected")
    return found


def _octets(size_max: int, size_min: int) -> Callable[[object], bytes]:
    def read(found: object) -> bytes:
        raw = b""
        # fromhex passes over white space: the length tells.
        if isinstance(found, str) and 2 * size_min <= len(found) <= 2 * size_max:
            raw = bytes.fromhex(found)
        if not isinstance(found, str) or len(found) != 2 * len(raw):
            raise ValueError(f"{size_min} to {size_max} octets in hexadecimal are expected")
        return raw

    return read


_any_uuid = _octets(UUID_SIZE, UUID_SIZE)
_mac = _octets(STATE_MAC_SIZE, STATE_MAC_SIZE)


def _uuid(found: object) -> bytes:
    uuid = _any_uuid(found)
    if uuid in RESERVED_IDS:
        raise ValueError("the uuid of an image is expected")
    return uuid


def progress_from(found: object) -> Progress | None:
    """Return what `progress_document` described; ValueError if it is something else."""
    match found:
        case None:
            return None
        case [int(sequence), mac] if not isinstance(sequence, bool) and 0 <= sequence < 1 << 64:
            return Progress(sequence, _mac(mac))
    raise ValueError("null, or a sequence number and a MAC are expected")


def _images(found: object) -> dict[bytes, Progress]:
    if not isinstance(found, dict) or len(found) > NOTED_COUNT_MAX:
        raise ValueError(f"at most {NOTED_COUNT_MAX} images are expected")
    noted = {_uuid(uuid): progress_from(value) for uuid, value in found.items()}
    if None in noted.values():
        raise ValueError("an image without progress")
    return {uuid: progress for uuid, progress in noted.items() if progress is not None}


FIELDS: Final[dict[str, dict[str, Callable[[object], object]]]] = {
    "join": {"group": _octets(GROUP_SIZE, GROUP_SIZE)},
    "image_key": {
        "kmi": _identifier,
        "vm_id": _identifier,
        "image": _uuid,
        "wrapped": _octets(WRAPPED_SIZE_MAX, 0),
    },
    "new_image_key": {"vm_id": _identifier, "image": _uuid},
    "lock": {"subject": _text, "image": _uuid, "shared": _flag},
    "entries": {},
    "check": {"path": _path, "image": _uuid, "vm_id": _identifier},
    "add": {"path": _path, "image": _uuid, "vm_id": _identifier, "replace": _flag},
    "remove": {"path": _path},
    "move": {"old": _path, "new": _path},
    "move_begin": {},
    "move_end": {"done": _flag},
    "find": {"image": _uuid},
    "begin": {},
    "bump": {},
    "unlock": {"vm_id": _identifier},
    "relock": {"vm_id": _identifier},
    "note": {"images": _images},
    "accept": {"image": _uuid, "progress": progress_from},
    "network_grant": {"network": _identifier, "vm_id": _identifier, "device": _device},
    "network_allowed": {"network": _identifier, "vm_id": _identifier},
}
"""Verb -> field -> what reads it."""

FEATURE_OF: Final = {"network_grant": NETWORKS, "network_allowed": NETWORKS}
"""Verbs that not every keyd of this version knows."""

TAKES_SECRET: Final = frozenset({"unlock"})
"""Verbs behind whose JSON a NUL and a secret stand (a PIN)."""


def progress_document(progress: Progress | None) -> list[object] | None:
    """Return how far an image has come as JSON-able data."""
    return None if progress is None else [progress.sequence, progress.mac.hex()]


def error_document(error: SealfsError) -> Document:
    """Return an error as JSON-able data; the numbers it carries go with it."""
    numbers = {key: value for key, value in vars(error).items() if isinstance(value, int | None)}
    return {
        "type": type(error).__name__,
        "subject": error.subject[:ERROR_TEXT_MAX],
        "detail": error.detail[:ERROR_TEXT_MAX],
        "numbers": numbers,
    }


def error_from(document: Document) -> SealfsError:
    """Return the error that `error_document` described."""
    kind = getattr(errors, str(document.get("type")), None)
    if not (isinstance(kind, type) and issubclass(kind, SealfsError)):
        kind = KeyServiceError
    error = kind.__new__(kind)
    SealfsError.__init__(error, document.get("subject"), str(document.get("detail")))
    vars(error).update(document.get("numbers") or {})
    return error


def sealed_memory(content: bytes | bytearray) -> int:
    """Return a descriptor of memory that holds `content` and cannot be changed; the caller's."""
    descriptor = os.memfd_create("sealfs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_sealed_memory(descriptor: int, size_max: int, size_min: int = 0) -> bytearray:
    """Return what `sealed_memory` holds, which the caller wipes if it is a key.

    Raises:
        KeydUnavailable: not sealed, or of another size: no answer of keyd.
    """
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    size = os.fstat(descriptor).st_size
    if seals & SEALS != SEALS or not size_min <= size <= size_max:
        raise KeydUnavailable("keyd", f"handed over {size} bytes that are no sealed key")
    content = bytearray(size)
    done = 0
    while done < size:
        count = os.preadv(descriptor, [memoryview(content)[done:]], done)
        if not count:
            raise KeydUnavailable("keyd", "handed over less than it said")
        done += count
    return content


def _malformed(detail: str) -> UsageError:
    return UsageError("keyd message", detail)
