"""The audit log: one JSON line for every key made, used, refused, moved or revoked.

`STATE/audit.log`, with older ones behind it as `audit.log.1` to `.9`. Each line carries its number,
the MAC of the line before it and its own, under a subkey of the host secret; how far the log has
come is noted in the ledger, as an image's progress is. So a line that was edited, removed, or cut
off at the end is found, by whoever has this host's TPM.

A line that cannot be written does not stop what it tells of: a full disk must not stop every VM.
The host's log says so then.

Concurrency: any thread, any number of processes; `record` takes the state lock.
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sealfs.errors import SealfsError
from sealfs.keys import labels
from sealfs.keys.ledger import AUDIT_ID, STATE_MAC_SIZE, Progress, SubkeyLender
from sealfs.keys.statedir import AUDIT_FILE, HeldLock, StateDir

AUDIT_SIZE: Final = 1 << 20
"""Bytes of a file, after which the next one is begun: some three thousand lines."""
AUDIT_SIZE_MAX: Final = AUDIT_SIZE + (64 << 10)
OLDER_MAX: Final = 9
DETAIL_MAX: Final = 300
OK: Final = "ok"
USES: Final = ("key made", "key used", "key unlocked", "key recovered", "network used")
_FIRST: Final = bytes(STATE_MAC_SIZE)
_NOBODY: Final = 2**32 - 1

_log = logging.getLogger(__name__)


class Ledger(Protocol):
    """The host's ledger as the audit log needs it."""

    def noted(self, image_uuid: bytes) -> Progress | None: ...
    def note(self, images: Mapping[bytes, Progress]) -> None: ...


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks: process, user, and the user who logged in, where the kernel knows it."""

    pid: int
    uid: int
    login: int | None
    program: str

    @classmethod
    def here(cls) -> Actor:
        """Return this process."""
        pid = os.getpid()
        return cls(pid, os.getuid(), login_of(pid), os.path.basename(sys.argv[0]) or "python")


def actor_of(pid: int, uid: int) -> Actor:
    """Return another process, which may be gone by now."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            program = file.read().strip()
    except OSError:
        program = "?"
    return Actor(pid, uid, login_of(pid), program)


def login_of(pid: int) -> int | None:
    """Return the user who logged in (/proc/PID/loginuid), None for a service."""
    try:
        with open(f"/proc/{pid}/loginuid", encoding="ascii") as file:
            found = int(file.read())
    except (OSError, ValueError):
        return None
    return None if found == _NOBODY else found


class AuditLog:
    """The audit log of one host, as one process writes and reads it."""

    def __init__(
        self, state: StateDir, subkey: SubkeyLender, ledger: Ledger, actor: Callable[[], Actor]
    ) -> None:
        self._state = state
        self._subkey = subkey
        self._ledger = ledger
        self._actor = actor

    @contextlib.contextmanager
    def recorded(self, event: str, **facts: str) -> Iterator[dict[str, str]]:
        """Record what the body does, with its outcome; facts may be added while it runs.

        Not to be entered while holding the state lock.
        """
        try:
            yield facts
        except SealfsError as error:
            self.failed(event, error, **facts)
            raise
        self.record(event, **facts)

    def failed(self, event: str, error: SealfsError, **facts: str) -> None:
        """Append a line about what was refused; as `record`."""
        self.record(event, outcome=f"{type(error).__name__}: {error.detail}", **facts)

    def record(self, event: str, *, outcome: str = OK, **facts: str) -> None:
        """Append a line; durable on return, unless the host's log says otherwise.

        Args:
            event: `key made`, `key used`, ...
            outcome: `ok`, or the error in words.
            facts: `vm`, `kmi`, `image` and what else there is to say; never key material.
        """
        try:
            self._append(event, outcome, facts)
        except SealfsError as error:
            # What failed is said anyway, and mostly for the same reason.
            level = logging.WARNING if outcome == OK else logging.INFO
            _log.log(level, "the audit log lacks %r of %r: %s", event, facts.get("vm", ""), error)

    def _append(self, event: str, outcome: str, facts: Mapping[str, str]) -> None:
        noted = self._ledger.noted(AUDIT_ID)
        with self._subkey(labels.AUDIT_MAC_INFO) as mac_key, self._state.lock() as held:
            whole, last = self._room(held)
            newest = Progress(0, _FIRST) if last is None else Progress(last["n"], _raw(last["mac"]))
            if noted is not None and noted.sequence > newest.sequence:
                newest = noted  # a log that lost its end goes on behind it: it stays missed
            number = newest.sequence + 1
            actor = self._actor()
            entry: dict[str, Any] = {
                "n": number,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "event": event,
                **{name: fact for name, fact in facts.items() if fact},
                "outcome": outcome[:DETAIL_MAX],
                "program": actor.program,
                "pid": actor.pid,
                "uid": actor.uid,
                **({} if actor.login is None else {"login": actor.login}),
                "previous": newest.mac.hex(),
            }
            mac = _mac(mac_key, entry)
            self._state.append(AUDIT_FILE, whole, _line({**entry, "mac": mac.hex()}), held)
        # Crash here: the log is one ahead of the ledger.
        self._ledger.note({AUDIT_ID: Progress(number, mac)})

    def _room(self, held: HeldLock) -> tuple[int, dict[str, Any] | None]:
        """Return where the next line goes, and the line before it."""
        raw = self._state.read(AUDIT_FILE, AUDIT_SIZE_MAX)
        if raw is None:
            self._state.write(AUDIT_FILE, b"", held)
        whole = (raw or b"").rfind(b"\n") + 1  # what a crash cut short is written over
        if not raw or not whole:
            return 0, _last(self._state.read(f"{AUDIT_FILE}.1", AUDIT_SIZE_MAX) or b"")
        last = _last(raw)
        if whole < AUDIT_SIZE:
            return whole, last
        for older, name in itertools.pairwise(files()):
            if self._state.read(name, AUDIT_SIZE_MAX) is not None:
                self._state.rename(name, older, held)
        self._state.write(AUDIT_FILE, b"", held)
        return 0, last

    # Reading

    def entries(self) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
        """Yield (file, line number, entry) from the oldest on; None for what is no entry."""
        for name in files():
            raw = self._state.read(name, AUDIT_SIZE_MAX)
            if raw is not None:
                for line_number, line in enumerate(raw.split(b"\n")[:-1], start=1):
                    yield name, line_number, _entry(line)

    def last_use(self, kmi: str) -> str | None:
        """Return when a key was given out last, as far as the log goes back; unverified."""
        times = [
            str(entry.get("time"))
            for _, _, entry in self.entries()
            if entry is not None
            and (entry.get("kmi"), entry.get("outcome")) == (kmi, OK)
            and entry.get("event") in USES
        ]
        return times[-1] if times else None

    def _has_dropped(self) -> bool:
        """Whether lines may be missing at the beginning: a tenth file was begun.

        Then all are there and full; somebody who named what he left "the oldest" lacks the others.
        """
        older = [self._state.path / name for name in files()[:-1]]
        return all(path.exists() and path.stat().st_size >= AUDIT_SIZE for path in older)

    def verify(self) -> tuple[int, list[str]]:
        """Return how many lines there are, and what is wrong with them.

        Raises:
            KeyRecordDamaged: the ledger was removed or edited.
            KeyServiceError: the host secret cannot be had.
        """
        noted = self._ledger.noted(AUDIT_ID)
        count, findings = 0, []
        expected, previous = 1, _FIRST.hex()
        noted_mac = None
        has_dropped = self._has_dropped()
        with self._subkey(labels.AUDIT_MAC_INFO) as mac_key:
            for name, line, entry in self.entries():
                count += 1
                where = f"{name}, line {line}"
                if entry is None or not _is_authentic(mac_key, entry):
                    findings.append(f"{where}: was edited or damaged")
                    expected, previous = expected + 1, ""
                    continue
                is_oldest = count == 1 and has_dropped
                if entry["n"] < expected:
                    findings.append(f"{where}: repeats line {entry['n']}")
                elif entry["n"] > expected and not is_oldest:
                    findings.append(f"{where}: {entry['n'] - expected} lines are missing before it")
                elif previous and entry["previous"] != previous and not is_oldest:
                    findings.append(f"{where}: does not follow the line before it")
                expected, previous = entry["n"] + 1, entry["mac"]
                if noted is not None and entry["n"] == noted.sequence:
                    noted_mac = entry["mac"]
        if noted is not None and noted.sequence >= expected:
            findings.append(f"{noted.sequence - expected + 1} lines are missing at the end")
        elif noted is not None and noted_mac not in (None, noted.mac.hex()):
            findings.append(f"line {noted.sequence} is not the one that the ledger knows")
        return count, findings


def files() -> list[str]:
    """Return the names that the log's files may have, the oldest first."""
    return [*(f"{AUDIT_FILE}.{number}" for number in range(OLDER_MAX, 0, -1)), AUDIT_FILE]


def _mac(mac_key: bytearray, entry: Mapping[str, Any]) -> bytes:
    return hmac.digest(mac_key, _line(entry), "sha256")[:STATE_MAC_SIZE]


def _is_authentic(mac_key: bytearray, entry: dict[str, Any]) -> bool:
    body = {name: value for name, value in entry.items() if name != "mac"}
    return hmac.compare_digest(entry["mac"], _mac(mac_key, body).hex())


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode("ascii") + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
        # Only what we would write ourselves: another spelling of it was not written here.
        is_ours = (
            isinstance(found, dict)
            and isinstance(found["n"], int)
            and isinstance(found["mac"], str)
            and isinstance(found["previous"], str)
            and len(_raw(found["mac"])) == STATE_MAC_SIZE
            and _line(found) == line + b"\n"
        )
    except (ValueError, KeyError, RecursionError):
        return None
    return found if is_ours else None


def _last(raw: bytes) -> dict[str, Any] | None:
    """Return the last whole line of a file, None where there is none or it was damaged."""
    lines = raw.split(b"\n")[:-1]
    return _entry(lines[-1]) if lines else None


def _raw(mac: str) -> bytes:
    return bytes.fromhex(mac)
