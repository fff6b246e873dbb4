"""Setting up a host: storage key, host secret, NV counter, recovery recipient, registry, ledger.

The host record is named last, when everything it speaks of is durable, the TPM's own state
included. Until then it stands as `host.pending`, so that a later init can find and free the NV
index of one that died. A host whose TPM was cleared or replaced is set up anew beside what is left
of it (`replace_tpm`).
"""

from __future__ import annotations

import hmac
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from sealfs.errors import (
    FormatError,
    HostNotInitialised,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys import audit, labels, ledger, recovery
from sealfs.keys.access import AUTO, EMBEDDED, access_of
from sealfs.keys.host import Host, mixed_random, verify_host_record
from sealfs.keys.hostrecord import (
    HOST_SIZE_MAX,
    NV_INDEX_FIRST,
    NV_INDEX_LAST,
    SECRET_SIZE,
    HostRecord,
    RecoveryKind,
    StorageKeyPin,
    host_payload,
    open_host_payload,
)
from sealfs.keys.ledger import RESERVED_IDS, Progress
from sealfs.keys.registry import REGISTRY_SIZE_MAX, RegistryFile
from sealfs.keys.reports import InitReport, init_report
from sealfs.keys.statedir import (
    HOST_FILE,
    HOST_PENDING_FILE,
    LEDGER_FILE,
    NETWORKS_FILE,
    REGISTRY_FILE,
    REPLACED_SUFFIX,
    HeldLock,
    StateDir,
)
from sealfs.keys.vmkey import derived, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

NV_TRIES: Final = 16
"""Of four million indexes at random; a TPM holds a few hundred at most."""
RECOVERY_FILE_SIZE_MAX: Final = 16 * 1024

WARN_EMBEDDED: Final = (
    "the TPM is the embedded software one: whoever copies the state directory has every key"
)
WARN_NO_POLICY: Final = (
    "without a PCR policy, somebody who has this whole host, TPM included, can start it with his "
    "own system and get the keys"
)
WARN_NO_RECOVERY: Final = (
    "no recovery key: when the TPM or the state directory is lost, every VM of this host is lost"
)
WARN_REPLACED: Final = (
    "every key of before opens with its recovery key only: recover each image, which registers it "
    "here as well (sealfs key recover IMAGE...)"
)
WARN_PRINT_ONCE: Final = (
    "the recovery key is shown now and never again; it opens every VM made on this host"
)


def initialise(path: Path, *, tpm: str, recovery_to: Path | None, no_recovery: bool) -> InitReport:
    """Set up this host, or say what is set up already; durable on return.

    Raises:
        UsageError: options that contradict each other or what was set up before.
        TpmUnavailable: no such TPM; `auto` without hardware.
        KeyRecordDamaged: the directory holds parts of a host whose record is gone.
    """
    if recovery_to is not None and no_recovery:
        raise UsageError(recovery_to, "a recovery key to wrap to, and no recovery: choose one")
    recipient = None if recovery_to is None else _read_recipient(recovery_to)
    try:
        host = Host.open(path)
    except HostNotInitialised:
        host = None
    if host is None:
        # `auto` without a TPM fails here, before anything is made.
        spec = access_of(tpm, StateDir(path)).spec
        state = StateDir.create(path)
        with state.lock() as held:
            if state.read(HOST_FILE, HOST_SIZE_MAX) is None:
                return _set_up(state, held, spec, recipient, no_recovery=no_recovery)
        host = Host.open(path)  # Another init was faster.
    return _found(host, tpm=tpm, recipient=recipient, no_recovery=no_recovery)


def replace_tpm(
    path: Path,
    *,
    tpm: str | None,
    recovery_to: Path | None,
    recovery_key: str | None,
    no_recovery: bool,
) -> InitReport:
    """Set this host up anew: its TPM was cleared or is another one. Durable on return.

    Host record, registry and ledger of before are kept as `*.replaced`. Nothing authenticates
    them any more: the registry is not taken over, nor which VM is allowed on which network, and of
    the ledger only that no image may be older than it says, which can refuse too much but never
    too little. Key records stay; each opens with the recovery key only, until the VM is recovered.

    Args:
        path: The state directory.
        tpm: The TPM from now on; None: as before.
        recovery_to: File with an organisation's public recovery key.
        recovery_key: The host's recovery key of before, to be kept; None: a new one is made.
        no_recovery: Do without any recovery key.

    Raises:
        HostNotInitialised: nothing was set up here.
        UsageError: this TPM still gives the host's secret; options that contradict each other.
        RecoveryRefused: mistyped.
        TpmUnavailable: no such TPM.
    """
    if sum((recovery_to is not None, recovery_key is not None, no_recovery)) > 1:
        raise UsageError(path, "a recovery key to keep, one to wrap to, and none: choose one")
    recipient = None if recovery_to is None else _read_recipient(recovery_to)
    kind = RecoveryKind.ORGANISATION
    if recovery_key is not None:
        kind, recipient = (
            RecoveryKind.HOST,
            recovery.public_of(recovery.parse_private(recovery_key)),
        )
    state = StateDir.open_any(path)
    with state.lock() as held:
        old = _host_of_before(state)
        spec = access_of(tpm or (AUTO if old is None else old.tpm), state).spec
        with access_of(spec, state).open(held, manufacture=True) as opened:
            _check_is_replaced(state, old, opened)
        is_repeated = state.read(HOST_PENDING_FILE, HOST_SIZE_MAX) is not None
        if not is_repeated:
            for name in (HOST_FILE, REGISTRY_FILE, LEDGER_FILE):
                content = state.read(name, ledger.LEDGER_SIZE_MAX)
                if content is not None:
                    state.write(name + REPLACED_SUFFIX, content, held)
        for file in (*audit.files(), NETWORKS_FILE):
            # Nothing authenticates what is in them any more.
            if (state.path / file).exists():
                state.rename(file, file + REPLACED_SUFFIX, held)
        # Crash here: nothing happened yet. After the pending record is written the copies are
        # what is left of the old host, and stay as they are when this is repeated.
        return _make_anew(
            state, held, spec, kind, recipient, no_recovery=no_recovery, is_replaced=True
        )


def _host_of_before(state: StateDir) -> HostRecord | None:
    """Return the host record, None where it is damaged or gone."""
    try:
        raw = state.read(HOST_FILE, HOST_SIZE_MAX)
        return None if raw is None else HostRecord.decode(raw, str(state.path / HOST_FILE))
    except (FormatError, KeyRecordDamaged):
        return None


def _check_is_replaced(state: StateDir, old: HostRecord | None, tpm: Tpm) -> None:
    if old is None:
        return
    try:
        tpm.attach(old.storage_key)
        wipe(tpm.unseal(old.sealed))
    except (KeyRefused, KeyRecordDamaged):
        return
    raise UsageError(
        state.path, "its TPM is the one of init and still gives its keys: nothing to replace"
    )


def _images_of_before(state: StateDir) -> dict[bytes, Progress]:
    """Return what the old host's ledger says, unauthenticated; good for refusing only."""
    raw = state.read(LEDGER_FILE + REPLACED_SUFFIX, ledger.LEDGER_SIZE_MAX)
    if raw is None:
        return {}
    try:
        found = ledger.LedgerFile.decode(raw, None, str(state.path / LEDGER_FILE))
    except (FormatError, KeyRecordDamaged):
        return {}
    return {uuid: at for uuid, at in found.images.items() if uuid not in RESERVED_IDS}


def _set_up(
    state: StateDir, held: HeldLock, spec: str, recipient: bytes | None, *, no_recovery: bool
) -> InitReport:
    if state.read(REGISTRY_FILE, REGISTRY_SIZE_MAX) is not None:
        if state.read(HOST_PENDING_FILE, HOST_SIZE_MAX) is None:
            raise KeyRecordDamaged(
                state.path / HOST_FILE,
                "there is a registry but no host record: it was removed",
            )
    elif state.record_names():
        raise KeyRecordDamaged(
            state.path / HOST_FILE, "there are key records but no host record: it was removed"
        )
    return _make_anew(
        state, held, spec, RecoveryKind.ORGANISATION, recipient,
        no_recovery=no_recovery, is_replaced=False,
    )  # fmt: skip


def _make_anew(
    state: StateDir,
    held: HeldLock,
    spec: str,
    kind: RecoveryKind,
    recipient: bytes | None,
    *,
    no_recovery: bool,
    is_replaced: bool,
) -> InitReport:
    """Make the host; `recipient` None: a recovery key is made, unless there is to be none."""
    recovery_key = None
    with access_of(spec, state).open(held, manufacture=True) as tpm:
        _discard_pending(state, held, tpm)
        pin = tpm.provision()
        if no_recovery:
            kind, recipient = RecoveryKind.NONE, b""
        elif recipient is None:
            kind = RecoveryKind.HOST
            private = X25519PrivateKey.from_private_bytes(
                bytes(mixed_random(tpm, recovery.KEY_SIZE))
            )
            recipient, recovery_key = recovery.public_of(private), recovery.format_private(private)
        known = _images_of_before(state) if is_replaced else {}
        record = _make_host(state, held, tpm, spec, pin, kind, recipient, known)
    # The TPM is closed and its state durable. Crash here: the pending record is discarded and
    # its NV index freed by the next init; nobody was told a recovery key of it.
    state.rename(HOST_PENDING_FILE, HOST_FILE, held)
    return init_report(
        record,
        str(state.path),
        created=True,
        recovery_key=recovery_key,
        warnings=_warnings(record)
        + ((WARN_PRINT_ONCE,) if recovery_key else ())
        + ((WARN_REPLACED,) if is_replaced else ()),
    )


def _make_host(
    state: StateDir,
    held: HeldLock,
    tpm: Tpm,
    spec: str,
    pin: StorageKeyPin,
    kind: RecoveryKind,
    recipient: bytes,
    known: Mapping[bytes, Progress],
) -> HostRecord:
    host_id = uuid.uuid4().bytes
    secret = mixed_random(tpm, 2 * SECRET_SIZE)
    mac_key, nv_auth = secret[:SECRET_SIZE], secret[SECRET_SIZE:]
    payload = host_payload(host_id, secret)
    try:
        sealed = tpm.seal(payload)
        proof = tpm.unseal(sealed)
        if not hmac.compare_digest(proof, payload):
            raise TpmUnavailable(spec, "the TPM did not give back what was sealed in it")
        wipe(proof)
        for _ in range(NV_TRIES):
            nv_index = NV_INDEX_FIRST + int.from_bytes(os.urandom(4), "big") % (
                NV_INDEX_LAST - NV_INDEX_FIRST + 1
            )
            record = HostRecord(
                host_id, int(time.time()), spec, pin, sealed, nv_index, kind, recipient
            )
            with derived(mac_key, info=labels.HOST_MAC_INFO, salt=host_id) as subkey:
                record = record.with_mac(bytes(subkey))
            state.write(HOST_PENDING_FILE, record.encode(), held)
            if tpm.counter_define(nv_index, nv_auth):
                break
        else:
            raise TpmUnavailable(spec, f"none of {NV_TRIES} NV indexes drawn was free")
        with derived(mac_key, info=labels.REGISTRY_MAC_INFO, salt=host_id) as subkey:
            state.write(REGISTRY_FILE, RegistryFile(host_id, ()).with_mac(subkey).encode(), held)
        value = tpm.counter_value(nv_index, nv_auth)
        with derived(mac_key, info=labels.LEDGER_MAC_INFO, salt=host_id) as subkey:
            state.write(LEDGER_FILE, ledger.new(host_id, value, known, subkey), held)
    finally:
        for buffer in (secret, mac_key, nv_auth, payload):
            wipe(buffer)
    return record


def _discard_pending(state: StateDir, held: HeldLock, tpm: Tpm) -> None:
    """Free the NV index of an init that died, if its record proves to be this TPM's."""
    raw = state.read(HOST_PENDING_FILE, HOST_SIZE_MAX)
    if raw is None:
        return
    subject = str(state.path / HOST_PENDING_FILE)
    try:
        record = HostRecord.decode(raw, subject)
        tpm.attach(record.storage_key)
        payload = tpm.unseal(record.sealed, subject=subject)
        secret = open_host_payload(payload, record.host_id, subject)
        verify_host_record(record, secret, subject)
        # An index that does not take our authorisation is somebody else's.
        if tpm.counter_is_ours(record.nv_index, secret[SECRET_SIZE:]):
            tpm.counter_remove(record.nv_index)
    except (FormatError, KeyServiceError):
        pass  # It proves nothing, so nothing may be undone on its word.
    state.remove(LEDGER_FILE, held)
    state.remove(REGISTRY_FILE, held)
    # Crash here: the pending record still marks the registry's absence as ours.
    state.remove(HOST_PENDING_FILE, held)


def _found(host: Host, *, tpm: str, recipient: bytes | None, no_recovery: bool) -> InitReport:
    """Check the host that is there and say what it is."""
    record = host.record
    if tpm not in (AUTO, record.tpm):
        raise UsageError(
            host.state.path, f"was initialised with the TPM {record.tpm!r}, not {tpm!r}"
        )
    if recipient is not None and recipient != record.recipient:
        raise UsageError(host.state.path, "was initialised with another recovery recipient")
    if no_recovery and record.recovery is not RecoveryKind.NONE:
        raise UsageError(host.state.path, "was initialised with a recovery recipient")
    try:
        with host.subkey(labels.HOST_MAC_INFO):
            pass  # Unseals the host secret and authenticates the host record.
    finally:
        host.close()
    return init_report(
        record,
        str(host.state.path),
        created=False,
        recovery_key=None,
        warnings=_warnings(record),
    )


def _warnings(record: HostRecord) -> tuple[str, ...]:
    found = [WARN_EMBEDDED] if record.tpm == EMBEDDED else [WARN_NO_POLICY]
    if record.recovery is RecoveryKind.NONE:
        found.append(WARN_NO_RECOVERY)
    return tuple(found)


def _read_recipient(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(RECOVERY_FILE_SIZE_MAX + 1)
    except OSError as error:
        raise UsageError(path, f"cannot be read: {error.strerror}") from error
    return recovery.parse_public(raw, str(path))
