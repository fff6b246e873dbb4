"""The initialised host in this process: its record, its secret once unsealed, its TPM for a use.

The host secret (MAC key and NV authorisation) is unsealed once per process, in the first use of
the TPM, and the host record is authenticated under it before anything in that record is relied
on: a recovery recipient that somebody edited would be given every new key.

What this cannot see: somebody who replaces the whole state directory, pinned storage key and all,
by one made with a TPM of his own. Keys of before do not open there; a VM made there is his.

Concurrency: any thread; an object must not be used after a fork.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from sealfs.errors import HostNotInitialised, TpmUnavailable
from sealfs.keys import labels, tpm_errors
from sealfs.keys.access import TpmAccess, access_of
from sealfs.keys.hostrecord import (
    HOST_SIZE_MAX,
    SECRET_SIZE,
    HostRecord,
    open_host_payload,
)
from sealfs.keys.statedir import HOST_FILE, HeldLock, StateDir
from sealfs.keys.vmkey import derived, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

T = TypeVar("T")

REOPEN_WAIT_S: Final = 0.3
"""Before a TPM whose connection broke is asked again: systemd restarts a service after 0.1 s."""
RANDOM_SIZE_MAX: Final = 1024
RANDOM_INPUT_SIZE: Final = 64


class Host:
    """One initialised host; `close` wipes its secret."""

    def __init__(self, state: StateDir, record: HostRecord, access: TpmAccess) -> None:
        self.state = state
        self.record = record
        self.access = access
        self._secret: bytearray | None = None
        # Protects `_secret` against being unsealed by two threads, or wiped under a third.
        self._secret_lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, *, tpm: str | None = None) -> Host:
        """Read the host record; nothing is asked of the TPM yet.

        Raises:
            HostNotInitialised: there is none.
            KeyRecordDamaged, FormatError: it cannot be read.
        """
        state = StateDir.open(path)
        raw = state.read(HOST_FILE, HOST_SIZE_MAX)
        if raw is None:
            raise HostNotInitialised(path, "no host record in this state directory")
        record = HostRecord.decode(raw, str(path / HOST_FILE))
        return cls(state, record, access_of(record.tpm if tpm is None else tpm, state))

    def close(self) -> None:
        """Wipe the host secret; the next use unseals it again."""
        with self._secret_lock:
            if self._secret is not None:
                wipe(self._secret)
            self._secret = None

    @contextlib.contextmanager
    def tpm(self) -> Iterator[Tpm]:
        """Lend the TPM for one use, under the state lock where it has no resource manager."""
        self.state.check_process()
        if self.access.is_shared:
            with self.tpm_under(None) as tpm:
                yield tpm
        else:
            with self.state.lock() as held, self.tpm_under(held) as tpm:
                yield tpm

    @contextlib.contextmanager
    def tpm_under(self, held: HeldLock | None) -> Iterator[Tpm]:
        """Lend the TPM for one use to somebody who holds the state lock already.

        Raises:
            KeyRefused: another TPM than at init, or a cleared one.
            KeyRecordDamaged: the host record was altered.
            TpmUnavailable: no answer.
        """
        with self.access.open(held) as tpm:
            tpm.attach(self.record.storage_key)
            self._unseal_secret(tpm)
            yield tpm

    def use(self, work: Callable[[Tpm], T], held: HeldLock | None = None) -> T:
        """Do `work` in one use of the TPM; once more where the connection broke meanwhile.

        A software TPM or a resource manager that was restarted answers then. So `work` must do no
        harm when it is done twice: it writes nothing, or last, and tries no PIN.

        Args:
            work: what is to be done.
            held: the state lock, of somebody who holds it already.

        Raises:
            As `tpm_under`, and what `work` raises.
        """
        try:
            return self._use(work, held)
        except TpmUnavailable as error:
            if error.code is None or not tpm_errors.is_context_dead(error.code):
                raise
        time.sleep(REOPEN_WAIT_S)
        return self._use(work, held)

    def _use(self, work: Callable[[Tpm], T], held: HeldLock | None) -> T:
        with self.tpm() if held is None else self.tpm_under(held) as tpm:
            return work(tpm)

    @contextlib.contextmanager
    def subkey(self, info: bytes) -> Iterator[bytearray]:
        """Lend a subkey of the host's MAC key. Not to be called while holding the state lock."""
        self.state.check_process()
        # Another thread may wipe the secret by `close` in between; then it is unsealed again.
        while True:
            with self._secret_lock:
                mac_key = None if self._secret is None else self._secret[:SECRET_SIZE]
            if mac_key is not None:
                break
            self.use(lambda tpm: None)
        try:
            with derived(mac_key, info=info, salt=self.record.host_id) as subkey:
                yield subkey
        finally:
            wipe(mac_key)

    @contextlib.contextmanager
    def nv_authorisation(self) -> Iterator[bytearray]:
        """Lend what the NV counter asks for; within a use of the TPM."""
        with self._secret_lock:
            if self._secret is None:
                raise AssertionError("the host secret is unsealed by a use of the TPM")
            auth = self._secret[SECRET_SIZE:]
        try:
            yield auth
        finally:
            wipe(auth)

    @contextlib.contextmanager
    def subkey_in_use(self, info: bytes) -> Iterator[bytearray]:
        """Lend a subkey of the host's MAC key; within a use of the TPM."""
        with self._secret_lock:
            if self._secret is None:
                raise AssertionError("the host secret is unsealed by a use of the TPM")
            mac_key = self._secret[:SECRET_SIZE]
        try:
            with derived(mac_key, info=info, salt=self.record.host_id) as subkey:
                yield subkey
        finally:
            wipe(mac_key)

    def _unseal_secret(self, tpm: Tpm) -> None:
        with self._secret_lock:
            if self._secret is not None:
                return
            subject = str(self.state.path / HOST_FILE)
            payload = tpm.unseal(self.record.sealed, subject=subject)
            try:
                secret = open_host_payload(payload, self.record.host_id, subject)
            finally:
                wipe(payload)
            try:
                verify_host_record(self.record, secret, subject)
            except BaseException:
                wipe(secret)
                raise
            self._secret = secret


class HostCounter:
    """The host's NV counter, opened for one use each: durable when that has ended."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def read(self, held: HeldLock) -> int:
        """Return the value (TPM2_NV_Read)."""

        def value(tpm: Tpm) -> int:
            with self._host.nv_authorisation() as auth:
                return tpm.counter_value(self._host.record.nv_index, auth)

        return self._host.use(value, held)

    def increment(self, held: HeldLock) -> None:
        """Add one (TPM2_NV_Increment).

        Never twice: a counter that is two ahead of the ledger is a rollback.
        """
        with self._host.tpm_under(held) as tpm, self._host.nv_authorisation() as auth:
            tpm.counter_increment(self._host.record.nv_index, auth)


def verify_host_record(record: HostRecord, secret: bytearray, subject: str) -> None:
    """Check the record's MAC under the unsealed host secret.

    Raises:
        KeyRecordDamaged: it was altered.
    """
    mac_key = secret[:SECRET_SIZE]
    try:
        with derived(mac_key, info=labels.HOST_MAC_INFO, salt=record.host_id) as subkey:
            record.verify(bytes(subkey), subject)
    finally:
        wipe(mac_key)


def mixed_random(tpm: Tpm, size: int) -> bytearray:
    """Return random bytes that are good when the TPM's or the kernel's are (HKDF over both)."""
    if not 1 <= size <= RANDOM_SIZE_MAX:
        raise ValueError(f"cannot make {size} random bytes at once")
    both = bytearray(tpm.random(RANDOM_INPUT_SIZE) + os.urandom(RANDOM_INPUT_SIZE))
    try:
        with derived(both, info=labels.RANDOM_INFO, size=size) as mixed:
            return bytearray(mixed)
    finally:
        wipe(both)
