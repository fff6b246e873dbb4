"""What a TPM asks beside PCRs: signed policies and PINs, and how it counts wrong ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sealfs.keys.tpm_context import TpmContext  # isort: skip  # TSS2_LOG first
from tpm2_pytss import ESYS_TR, TSS2_Exception
from tpm2_pytss.constants import TPM2_CAP, TPM2_EO, TPM2_SE
from tpm2_pytss.types import TPM2_HANDLE, TPM2B_OPERAND

from sealfs.errors import LockedOut
from sealfs.keys import policy, tpm_templates
from sealfs.keys.signed import SignedPolicy
from sealfs.keys.tpm_errors import Act


@dataclass(frozen=True, slots=True)
class Lockout:
    """The TPM's dictionary attack state (TPM 2.0 Part 1 §19.8)."""

    locked: bool
    failures: int
    failures_max: int
    recovery_s: int

    @property
    def tries_left(self) -> int | None:
        """How many wrong PINs are let through, None where nobody counts.

        The one that would lock the TPM is never tried: it may hold other programs' keys too.
        """
        if not self.recovery_s:
            return None  # TPM 2.0 Part 3 TPM2_DictionaryAttackParameters: 0 is no protection
        return 0 if self.locked else max(0, self.failures_max - 1 - self.failures)


class TpmPolicies(TpmContext):
    """The part of `Tpm` that knows of policies, the dictionary attack state and NV counters."""

    def _approve(self, session: Any, approval: SignedPolicy, nv_auth: bytes | bytearray) -> None:
        """Bring a policy session from a signed policy to PolicyAuthorize's digest.

        TPM 2.0 Part 3: TPM2_PolicyPCR, TPM2_PolicyNV, TPM2_LoadExternal, TPM2_VerifySignature,
        TPM2_PolicyAuthorize.
        """
        self._plain("policy_pcr", session, b"", tpm_templates.pcr_selection(approval.pcrs))
        limit = approval.limit
        if limit is not None:
            operand = TPM2B_OPERAND(limit.value.to_bytes(policy.COUNTER_SIZE, "big"))
            with self._counter(limit.index, nv_auth) as counter, self._session(TPM2_SE.HMAC) as own:
                self._secret(
                    own, "policy_nv", counter, counter, session, operand, TPM2_EO.UNSIGNED_LE
                )
        # A ticket of the owner hierarchy: PolicyAuthorize takes none of the null hierarchy.
        public = tpm_templates.signer_public(approval.signer)
        signer = self._plain("load_external", public, None, ESYS_TR.OWNER)
        with self._loaded(signer):
            digest = hashlib.sha256(approval.approved + approval.policy_ref).digest()
            signature = tpm_templates.signature_of(approval.signature)
            ticket = self._plain("verify_signature", signer, digest, signature)
        self._plain(
            "policy_authorize",
            session,
            approval.approved,
            policy.name_of(approval.signer),
            ticket,
            approval.policy_ref,
        )

    def _check_tries(self, subject: object) -> None:
        state = self.lockout()
        if state.tries_left == 0:
            raise LockedOut(
                subject,
                f"no PIN is tried now: {state.failures} of {state.failures_max} wrong ones are "
                "counted, and the last would lock the TPM; one is forgiven each "
                f"{state.recovery_s} s",
            )

    def lockout(self) -> Lockout:
        """Return the dictionary attack state."""

        def work() -> Lockout:
            # TPM 2.0 Part 2 §6.13: TPM_PT_PERMANENT and TPM_PT_LOCKOUT_COUNTER and after.
            _, answer = self._plain("get_capability", TPM2_CAP.TPM_PROPERTIES, 0x200, 32)
            listed = answer.data.tpmProperties
            found = {int(item.property): int(item.value) for item in listed}
            return Lockout(
                locked=bool(found.get(0x200, 0) & 1 << 9),
                failures=found.get(0x20E, 0),
                failures_max=found.get(0x20F, 0),
                recovery_s=found.get(0x210, 0),
            )

        return self._run(Act.READ, work)

    def stop_counting(self) -> None:
        """Have the TPM count no wrong PINs (TPM2_DictionaryAttackParameters).

        For the embedded TPM: it runs for moments only, so that its clock would never forgive one;
        and whoever has its state can try there as often as he likes.
        """

        def work() -> None:
            with self._session(TPM2_SE.HMAC) as session:
                self._secret(session, "dictionary_attack_parameters", 32, 0, 0)

        if self.lockout().recovery_s:
            self._run(Act.PROVISION, work)

    def counter_name(self, index: int) -> bytes | None:
        """Return the Name of an NV index, computed here; None where there is none."""

        def work() -> bytes | None:
            if not self._has_handle(index):
                return None
            handle = self._plain("tr_from_tpmpublic", TPM2_HANDLE(index))
            try:
                public, _ = self._plain("nv_read_public", handle)
            finally:
                self._plain("tr_close", handle)
            return policy.name_of(bytes(public.nvPublic.marshal()))

        return self._run(Act.COUNTER, work)

    @contextlib.contextmanager
    def _counter(self, index: int, auth: bytes | bytearray) -> Iterator[Any]:
        handle = self._plain("tr_from_tpmpublic", TPM2_HANDLE(index))
        try:
            self._plain("tr_set_auth", handle, bytes(auth))
            yield handle
        finally:
            with contextlib.suppress(TSS2_Exception):
                self._plain("tr_close", handle)
