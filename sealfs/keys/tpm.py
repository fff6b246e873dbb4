"""Everything sealfs asks of a TPM 2.0: storage key, sealed objects, PCRs, NV counter.

With `tpm_context` and `tpm_templates` the only owner of tpm2_pytss. TPM structures become bytes
and ints before they leave this module, and their parents are held by a name until then: a
sub-object of tpm2_pytss is a view into its parent.

Concurrency: one `Tpm` belongs to one thread at a time and to one use. The GIL is free while the
TPM works. Never abandon a call on cancellation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

from sealfs.keys.tpm_context import Bridge, open_esapi  # isort: skip  # TSS2_LOG first
from sealfs.keys.tpm_policies import TpmPolicies  # isort: skip
from tpm2_pytss import ESYS_TR, TSS2_Exception
from tpm2_pytss.constants import TPM2_SE, TPM2_SU
from tpm2_pytss.types import (
    TPM2_HANDLE,
    TPM2B_DATA,
    TPM2B_ENCRYPTED_SECRET,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_SENSITIVE_CREATE,
)

from sealfs.errors import KeyRefused, TpmUnavailable, UsageError, WrongPin
from sealfs.keys import tpm_errors, tpm_templates
from sealfs.keys.hostrecord import NAME_SIZE, SealedObject, StorageKeyKind, StorageKeyPin
from sealfs.keys.signed import SignedPolicy
from sealfs.keys.swtpm import Channel
from sealfs.keys.tpm_errors import Act

PERSISTENT_HANDLE: Final = 0x81000001
"""TCG TPM v2.0 Provisioning Guidance §7.5.1: the storage root key; systemd uses the same."""
SEALED_SIZE_MAX: Final = 128
"""MAX_SYM_DATA, TPM 2.0 Part 2 §11.1.14."""


@contextlib.contextmanager
def open_tpm(link: Channel | str, subject: str, *, shutdown: bool) -> Iterator[Tpm]:
    """Open a TPM for one use.

    Args:
        link: A channel, or a TCTI string such as `device:/dev/tpmrm0`.
        subject: How messages name this TPM.
        shutdown: Send TPM2_Shutdown(CLEAR) at the end. For the embedded TPM: without it each
            stop after a use of a DA-protected object counts as a failed try. On hardware the
            kernel sends it.

    Raises:
        TpmUnavailable: the TPM cannot be opened.
        UsageError: the string is no TCTI.
    """
    with open_esapi(link, subject) as (esapi, tcti, bridge):
        tpm = Tpm(esapi, tcti, subject, bridge)
        try:
            yield tpm
        finally:
            tpm.close(shutdown=shutdown)


class Tpm(TpmPolicies):
    """One open TPM. `provision` or `attach` comes before everything that needs the storage key."""

    def __init__(self, esapi: Any, tcti: Any, subject: str, bridge: Bridge | None) -> None:
        super().__init__(esapi, tcti, subject, bridge)
        self._pin: StorageKeyPin | None = None

    def close(self, *, shutdown: bool) -> None:
        """Release the transient storage key and the context; never raises."""
        if not self._is_dead:
            self._release_storage_key()
            if shutdown:
                with contextlib.suppress(TSS2_Exception):
                    self._plain("shutdown", TPM2_SU.CLEAR)
        self._esapi.close()

    # Storage key

    def provision(self) -> StorageKeyPin:
        """Find or make the storage key, attach it and return the pin to store.

        A storage key at the persistent handle is used as it is (another tool may have made it,
        with another template); otherwise ours is made there; where the TPM has no room for it,
        or the handle holds something else, it is made anew at each use, which gives the same
        key until TPM2_Clear.

        Raises:
            TpmUnavailable: the owner hierarchy has a password, or the TPM fails.
            KeyRefused: what the TPM says about its key is inconsistent.
        """
        self._release_storage_key()
        return self._run(Act.PROVISION, self._provision)

    def _provision(self) -> StorageKeyPin:
        kind = StorageKeyKind.TRANSIENT
        if self._has_handle(PERSISTENT_HANDLE):
            handle = self._plain("tr_from_tpmpublic", TPM2_HANDLE(PERSISTENT_HANDLE))
            public, name = self._read_public(handle)
            if tpm_templates.is_storage_key(public) and len(name) == NAME_SIZE:
                ours = name == tpm_templates.own_name(public)
                kind = StorageKeyKind.PERSISTENT if ours else StorageKeyKind.FOREIGN
        if kind is StorageKeyKind.TRANSIENT:
            transient, public, name = self._create_primary()
            handle = self._make_persistent(transient)
            if handle is None:
                self._storage_key = transient
                self._pin = StorageKeyPin(kind, name, public, b"")
                return self._pin
            kind = StorageKeyKind.PERSISTENT
        blob = bytes(self._plain("tr_serialize", handle))
        # ESAPI takes the public area of a ReadPublic on trust. The pin must hold the one whose
        # Name was computed here, or every salt would be encrypted to somebody else's key.
        if name not in blob or not blob.endswith(public):
            raise KeyRefused(
                self._subject, "its storage key does not fit its own name: altered on the way"
            )
        self._storage_key = handle
        self._pin = StorageKeyPin(kind, name, public, blob)
        return self._pin

    def _make_persistent(self, transient: Any) -> Any:
        """Return the persistent key's handle, None where the TPM has no place for it."""
        try:
            with self._session(TPM2_SE.HMAC, transient) as session:
                handle = self._secret(
                    session, "evict_control", ESYS_TR.OWNER, transient, PERSISTENT_HANDLE
                )
        except TSS2_Exception as error:
            full = (tpm_errors.NV_SPACE, tpm_errors.NV_DEFINED)
            if tpm_errors.normalised(int(error.rc)) not in full:
                raise
            return None
        self._plain("flush_context", transient)
        return handle

    def attach(self, pin: StorageKeyPin) -> None:
        """Use the pinned storage key.

        Raises:
            KeyRefused: the TPM holds another storage key, or none: cleared, or another TPM.
        """
        self._release_storage_key()
        self._pin = pin
        self._run(Act.OPEN, self._attach)

    def _attach(self) -> None:
        pin = self._pin
        if pin is None:
            raise ValueError("attach or provision comes first")
        if pin.kind is StorageKeyKind.TRANSIENT:
            handle, _, name = self._create_primary()
            if name != pin.name:
                self._plain("flush_context", handle)
                raise self._other_tpm()
            self._storage_key = handle
            return
        # For the message only: that secrets reach nobody else is the deserialised pin's work.
        if not self._has_handle(PERSISTENT_HANDLE):
            raise self._other_tpm()
        try:
            handle = self._plain("tr_deserialize", pin.handle)
        except TSS2_Exception as error:
            raise KeyRefused(self._subject, "the pinned storage key is malformed") from error
        _, name = self._read_public(handle)
        if name != pin.name:
            raise self._other_tpm()
        self._storage_key = handle

    def _other_tpm(self) -> KeyRefused:
        return KeyRefused(
            self._subject,
            "this is not the TPM of init, or it was cleared since: its storage key is another "
            "one. Keys sealed before open only with the recovery key",
        )

    def _release_storage_key(self) -> None:
        if self._storage_key is not None and self._pin is not None:
            transient = self._pin.kind is StorageKeyKind.TRANSIENT
            with contextlib.suppress(TSS2_Exception):
                self._plain("flush_context" if transient else "tr_close", self._storage_key)
        self._storage_key = None

    def _create_primary(self) -> tuple[Any, bytes, bytes]:
        handle, public, _, _, _ = self._plain(
            "create_primary",
            TPM2B_SENSITIVE_CREATE(),
            tpm_templates.storage_template(),
            ESYS_TR.OWNER,
        )
        name = bytes(public.get_name())
        raw = bytes(public.marshal())
        if bytes(self._plain("tr_get_name", handle)) != name:
            raise KeyRefused(self._subject, "its new storage key does not fit its own name")
        return handle, raw, name

    def _read_public(self, handle: Any) -> tuple[bytes, bytes]:
        """Return a loaded key's public area and its Name, computed here."""
        public, _, _ = self._plain("read_public", handle)
        return bytes(public.marshal()), bytes(public.get_name())

    # Secrets

    def seal(
        self,
        payload: bytes | bytearray,
        *,
        policy_digest: bytes = b"",
        pin: bytes | bytearray = b"",
    ) -> SealedObject:
        """Seal at most 128 bytes under the storage key (TPM 2.0 Part 3 TPM2_Create).

        Args:
            payload: What is sealed.
            policy_digest: What it opens by, nothing for an object without a policy.
            pin: Its authValue, where the policy asks for one.
        """
        if not 1 <= len(payload) <= SEALED_SIZE_MAX:
            raise ValueError(f"cannot seal {len(payload)} bytes")
        template = tpm_templates.sealed_template(policy_digest, has_pin=bool(pin))
        sensitive = TPM2B_SENSITIVE_CREATE(
            TPMS_SENSITIVE_CREATE(userAuth=bytes(pin), data=bytes(payload))
        )

        def work() -> SealedObject:
            with self._session(TPM2_SE.HMAC) as session:
                private, public, _, _, _ = self._secret(
                    session, "create", self._storage_key, sensitive, template
                )
                return SealedObject(bytes(public.marshal()), bytes(private.marshal()))

        return self._run(Act.SEAL, work)

    def import_object(
        self, public: bytes, duplicate: bytes, seed: bytes, subject: object
    ) -> SealedObject:
        """Take in an object that was wrapped to this storage key (TPM2_Import); see `unseal`.

        Raises:
            KeyRecordDamaged: altered, or wrapped to another key.
        """

        def work() -> SealedObject:
            with self._session(TPM2_SE.HMAC) as session:
                private = self._secret(
                    session,
                    "import_",
                    self._storage_key,
                    TPM2B_DATA(),
                    TPM2B_PUBLIC.unmarshal(public)[0],
                    TPM2B_PRIVATE.unmarshal(duplicate)[0],
                    TPM2B_ENCRYPTED_SECRET.unmarshal(seed)[0],
                    tpm_templates.null_cipher(),
                )
                return SealedObject(public, bytes(private.marshal()))

        return self._run(Act.IMPORT, work, subject)

    def unseal(
        self,
        sealed: SealedObject,
        *,
        pcrs: Sequence[int] = (),
        pin: bytes | bytearray = b"",
        approval: SignedPolicy | None = None,
        nv_auth: bytes | bytearray = b"",
        subject: object = None,
    ) -> bytearray:
        """Return the payload of a sealed object (TPM2_Load, TPM2_Unseal).

        With a PIN at most one try is made, and none that would lock the TPM if it were wrong.

        Args:
            sealed: As `seal` returned it.
            pcrs: The PCRs of its policy, none for an object without one.
            pin: Its authValue, where its policy asks for one.
            approval: A signed policy, where its policy asks for one.
            nv_auth: The authorisation of the counter that limits `approval`.
            subject: Whose key it is, for messages.

        Raises:
            WrongPin: with the tries that are left.
            LockedOut: no PIN is tried now.
            KeyRefused: the PCRs are not those it was sealed to, or another TPM sealed it.
            KeyRecordDamaged: the object was altered.
        """
        about = self._subject if subject is None else subject

        def load() -> Any:
            try:
                with self._session(TPM2_SE.HMAC) as session:
                    return self._secret(
                        session,
                        "load",
                        self._storage_key,
                        TPM2B_PRIVATE.unmarshal(sealed.private)[0],
                        TPM2B_PUBLIC.unmarshal(sealed.public)[0],
                    )
            except TSS2_Exception as error:
                code = int(error.rc)
                if tpm_errors.may_pass(code):
                    raise
                raise tpm_errors.error_of(code, Act.LOAD, about) from error

        def work() -> bytearray:
            kind = TPM2_SE.POLICY if pcrs or pin or approval else TPM2_SE.HMAC
            # Loaded here: after a reset the TPM has neither object nor session any more.
            handle = load()
            with self._loaded(handle), self._session(kind) as session:
                # In the order of `policy.slot_policy`.
                if approval is not None:
                    self._approve(session, approval, nv_auth)
                if pcrs:
                    # An empty digest: the TPM takes its present values.
                    self._plain("policy_pcr", session, b"", tpm_templates.pcr_selection(pcrs))
                if pin:
                    # Not PolicyPassword: that sends the PIN itself, this proves it by an HMAC.
                    self._plain("tr_set_auth", handle, bytes(pin))
                    self._plain("policy_auth_value", session)
                data = self._secret(session, "unseal", handle)
                return bytearray(bytes(data))

        if pin:
            self._check_tries(about)
        try:
            return self._run(Act.PIN if pin else Act.UNSEAL, work, about)
        except WrongPin:
            raise WrongPin(about, self.lockout().tries_left) from None

    def random(self, size: int) -> bytes:
        """Return random bytes of the TPM, encrypted on the way (TPM2_GetRandom)."""

        def work() -> bytes:
            found = bytearray()
            with self._session(TPM2_SE.HMAC) as session:
                # A call returns at most one digest's worth.
                while len(found) < size:
                    piece = bytes(self._secret(session, "get_random", min(32, size - len(found))))
                    if not piece:
                        raise TpmUnavailable(self._subject, "the TPM returned no random bytes")
                    found += piece
            return bytes(found)

        return self._run(Act.READ, work)

    # Platform state

    def pcr_values(self, pcrs: Sequence[int]) -> tuple[bytes, ...]:
        """Return the SHA-256 PCR values, in ascending order, authenticated by an audit session.

        Raises:
            UsageError: this TPM keeps no SHA-256 value for one of them.
        """

        def work() -> tuple[bytes, ...]:
            found: dict[int, bytes] = {}
            with self._session(TPM2_SE.HMAC) as session:
                # PCR_Read returns at most 8 digests a call.
                while left := [pcr for pcr in pcrs if pcr not in found]:
                    _, chosen, digests = self._secret(
                        session, "pcr_read", tpm_templates.pcr_selection(left)
                    )
                    bitmap = int.from_bytes(bytes(chosen.marshal())[7:10], "little")
                    values = [bytes(digest) for digest in digests.digests]
                    got = [pcr for pcr in left if bitmap >> pcr & 1]
                    if not got or len(got) != len(values):
                        raise UsageError(
                            ",".join(map(str, left)), "PCRs without a SHA-256 value in this TPM"
                        )
                    found.update(zip(got, values, strict=True))
            return tuple(found[pcr] for pcr in sorted(pcrs))

        return self._run(Act.READ, work)

    # NV counter

    def counter_define(self, index: int, auth: bytes | bytearray, label: bytes = b"") -> bool:
        """Define a counter and make its first increment; False when the index is taken."""
        public = tpm_templates.counter_public(index, label)

        def work() -> bool:
            with self._session(TPM2_SE.HMAC) as session:
                try:
                    self._secret(session, "nv_define_space", bytes(auth), public)
                except TSS2_Exception as error:
                    if tpm_errors.normalised(int(error.rc)) == tpm_errors.NV_DEFINED:
                        return False
                    raise
            return True

        if not self._run(Act.PROVISION, work):
            return False
        # A counter cannot be read before its first increment (TPM_RC_NV_UNINITIALIZED).
        self.counter_increment(index, auth)
        return True

    def counter_increment(self, index: int, auth: bytes | bytearray) -> None:
        """Add one (TPM2_NV_Increment)."""

        def work() -> None:
            with self._counter(index, auth) as handle, self._session(TPM2_SE.HMAC) as session:
                self._secret(session, "nv_increment", handle)

        self._run(Act.COUNTER, work)

    def counter_value(self, index: int, auth: bytes | bytearray) -> int:
        """Return the counter (TPM2_NV_Read)."""

        def work() -> int:
            with self._counter(index, auth) as handle, self._session(TPM2_SE.HMAC) as session:
                data = self._secret(session, "nv_read", handle, tpm_templates.COUNTER_SIZE)
                return int.from_bytes(bytes(data), "big")

        return self._run(Act.COUNTER, work)

    def counter_is_ours(self, index: int, auth: bytes | bytearray) -> bool:
        """Whether the index exists and takes this authorisation."""
        try:
            self.counter_value(index, auth)
        except TpmUnavailable as error:
            # Defined, authorised, and its first increment never happened.
            return error.code is not None and (
                tpm_errors.normalised(error.code) == tpm_errors.NV_UNINITIALIZED
            )
        except KeyRefused:
            return False
        return True

    def counter_remove(self, index: int) -> None:
        """Undefine the index, if it is there; the owner may."""

        def work() -> None:
            if not self._has_handle(index):
                return
            handle = self._plain("tr_from_tpmpublic", TPM2_HANDLE(index))
            with self._session(TPM2_SE.HMAC) as session:
                self._secret(session, "nv_undefine_space", handle)

        self._run(Act.COUNTER, work)
