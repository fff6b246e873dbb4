"""One ESAPI context: protected calls, salted sessions, retries, and the end after an I/O error.

Invariants:
- A call that carries or returns a secret runs in an HMAC or policy session salted to the pinned
  storage key, with parameter encryption (TPM 2.0 Part 1 §21). ESAPI is reached through `_secret`
  and `_plain` alone; a call that stands in neither table is refused, so none can forget it.
- Objects and sessions are flushed in `finally`.
- After an I/O error the context is dead (ESAPI never recovers): nothing more is sent.

Concurrency: a context belongs to one thread at a time; ESAPI contexts are not thread-safe.
"""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

# TSS reads this when its libraries are loaded, and would print every error to stderr.
os.environ.setdefault("TSS2_LOG", "all+none")

from tpm2_pytss import ESAPI, ESYS_TR, TSS2_Exception
from tpm2_pytss.constants import TPM2_ALG, TPM2_CAP, TPMA_SESSION
from tpm2_pytss.TCTI import PyTCTI
from tpm2_pytss.TCTILdr import TCTILdr

from sealfs.errors import KeyRefused, TpmUnavailable, UsageError
from sealfs.keys import tpm_errors, tpm_templates
from sealfs.keys.swtpm import RESPONSE_SIZE_MAX, Channel
from sealfs.keys.tpm_errors import Act

T = TypeVar("T")

WAIT_TRIES: Final = 6
WAIT_FIRST_S: Final = 0.05
"""Doubled at each try: 1.6 s in all, for a TPM that asks to come again."""

_IN: Final = int(TPMA_SESSION.DECRYPT)
"""The command's first parameter travels encrypted; the TPM decrypts it."""
_OUT: Final = int(TPMA_SESSION.ENCRYPT)
"""The response's first parameter travels encrypted."""

# Which direction each call can encrypt (its first parameter must be a TPM2B, TPM 2.0 Part 1
# §21.1). A call with 0 or AUDIT still has both directions authenticated by the session's HMAC.
_SECRET_CALLS: Final = {
    "create": _IN | _OUT,
    "load": _IN | _OUT,
    "import_": _IN | _OUT,
    "unseal": _OUT,
    "get_random": _OUT,
    "pcr_read": int(TPMA_SESSION.AUDIT),
    "evict_control": 0,
    "nv_define_space": _IN,
    "nv_undefine_space": 0,
    "nv_increment": 0,
    "nv_read": _OUT,
    "policy_nv": _IN,
    "dictionary_attack_parameters": 0,
}
# Calls that neither carry nor return a secret, or that come before a storage key exists.
_PLAIN_CALLS: Final = frozenset(
    {
        "create_primary",
        "flush_context",
        "get_capability",
        "load_external",
        "nv_read_public",
        "policy_auth_value",
        "policy_authorize",
        "policy_pcr",
        "read_public",
        "shutdown",
        "start_auth_session",
        "tr_close",
        "tr_deserialize",
        "tr_from_tpmpublic",
        "tr_get_name",
        "tr_serialize",
        "tr_set_auth",
        "trsess_set_attributes",
        "verify_signature",
    }
)


class Bridge:
    """Gives ESAPI a `Channel` and keeps the cause of a failure, which the C side drops.

    What is no `Exception` (Ctrl-C) must not pass through C either: it would be printed and lost.
    It is kept as `interrupt` and raised again by `TpmContext._run`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self.cause: str | None = None
        self.interrupt: BaseException | None = None

    def transmit(self, command: bytes) -> None:
        with self._kept():
            self._channel.transmit(bytes(command))

    def receive(self, timeout_ms: int) -> bytes:
        with self._kept():
            response = self._channel.receive(None if timeout_ms < 0 else timeout_ms / 1000)
        if response is None:
            raise TSS2_Exception(0x000A0009)  # TSS2_TCTI_RC_TRY_AGAIN
        return response

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.cause = str(error)
            raise
        except BaseException as error:
            self.interrupt = error
            raise ConnectionError("interrupted") from error


@contextlib.contextmanager
def open_esapi(link: Channel | str, subject: str) -> Iterator[tuple[Any, Any, Bridge | None]]:
    """Lend an ESAPI context, its TCTI, and the bridge where Python carries the messages.

    The borrower closes the ESAPI context.

    Args:
        link: A channel, or a TCTI string such as `device:/dev/tpmrm0`.
        subject: How messages name this TPM.

    Raises:
        TpmUnavailable: the TPM cannot be opened.
        UsageError: the string is no TCTI.
    """
    bridge = None if isinstance(link, str) else Bridge(link)
    try:
        if bridge is None:
            tcti = TCTILdr.parse(link)
        else:
            tcti = PyTCTI(max_size=RESPONSE_SIZE_MAX, magic=b"SEALFS\0\0")
            tcti.do_transmit, tcti.do_receive = bridge.transmit, bridge.receive
    except TSS2_Exception as error:
        raise tpm_errors.error_of(int(error.rc), Act.OPEN, subject) from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise UsageError(subject, f"cannot be understood as a TPM: {error}") from error
    try:
        try:
            esapi = ESAPI(tcti)
        except TSS2_Exception as error:
            raise tpm_errors.error_of(int(error.rc), Act.OPEN, subject) from error
        yield esapi, tcti, bridge
    finally:
        if bridge is None:
            tcti.close()


class TpmContext(abc.ABC):
    """The machinery below `Tpm`. `_storage_key` is what sessions are salted to."""

    def __init__(self, esapi: Any, tcti: Any, subject: str, bridge: Bridge | None) -> None:
        self._esapi = esapi
        self._tcti = tcti
        self._subject = subject
        self._bridge = bridge
        self._storage_key: Any = None
        self._is_dead = False

    @abc.abstractmethod
    def _attach(self) -> None:
        """Fetch the pinned storage key again."""

    # The only ways to ESAPI

    def _secret(self, session: Any, call: str, *arguments: Any) -> Any:
        if call not in _SECRET_CALLS:
            raise ValueError(f"{call} is not in the table of protected calls")
        self._plain(
            "trsess_set_attributes",
            session,
            int(TPMA_SESSION.CONTINUESESSION) | _SECRET_CALLS[call],
        )
        return getattr(self._esapi, call)(*arguments, session1=session)

    def _plain(self, call: str, *arguments: Any) -> Any:
        if call not in _PLAIN_CALLS:
            raise ValueError(f"{call} is not in the table of unprotected calls")
        return getattr(self._esapi, call)(*arguments)

    @contextlib.contextmanager
    def _session(self, kind: Any, key: Any = None) -> Iterator[Any]:
        """A session salted to the storage key (ECDH or OAEP), AES-128-CFB, always flushed."""
        salted_to = self._storage_key if key is None else key
        if salted_to is None:
            raise ValueError("attach or provision comes first")
        symmetric = tpm_templates.session_cipher()
        session = self._plain(
            "start_auth_session", salted_to, ESYS_TR.NONE, kind, symmetric, TPM2_ALG.SHA256
        )
        with self._loaded(session):
            yield session

    @contextlib.contextmanager
    def _loaded(self, handle: Any) -> Iterator[None]:
        try:
            yield
        finally:
            with contextlib.suppress(TSS2_Exception):
                self._plain("flush_context", handle)

    def _has_handle(self, handle: int) -> bool:
        _, answer = self._plain("get_capability", TPM2_CAP.HANDLES, handle, 1)
        listed = answer.data.handles
        return handle in [int(item) for item in listed]

    def _run(self, act: Act, work: Callable[[], T], subject: object = None) -> T:
        """Do `work`, whole again after what passes by itself; map what does not to our errors."""
        wait_s = WAIT_FIRST_S
        mended = False
        tries = 0
        while True:
            if self._is_dead:
                raise TpmUnavailable(self._subject, "the TPM connection broke and must be reopened")
            try:
                return work()
            except TSS2_Exception as error:
                if self._bridge is not None and self._bridge.interrupt is not None:
                    self._is_dead = True
                    raise self._bridge.interrupt from None
                code = int(error.rc)
                known = tpm_errors.normalised(code)
                if known in tpm_errors.WAIT and tries < WAIT_TRIES:
                    tries += 1
                    time.sleep(wait_s)
                    wait_s *= 2
                    continue
                if known in tpm_errors.STRAYS | tpm_errors.LOST and not mended:
                    mended = True
                    if self._mend():
                        continue
                self._is_dead = self._is_dead or tpm_errors.is_context_dead(code)
                cause = self._bridge.cause if self._bridge is not None else None
                about = self._subject if subject is None else subject
                raise tpm_errors.error_of(code, act, about, cause) from error

    def _mend(self) -> bool:
        """Flush what others left (no resource manager in between) and fetch the key again."""
        had_storage_key = self._storage_key is not None
        try:
            # TPM 2.0 Part 2 §7.4: transient objects, loaded sessions.
            for first in (0x80000000, 0x02000000):
                _, answer = self._plain("get_capability", TPM2_CAP.HANDLES, first, 32)
                listed = answer.data.handles
                for handle in [int(item) for item in listed]:
                    self._flush_raw(handle)
            self._storage_key = None
            if had_storage_key:
                self._attach()
        except (TSS2_Exception, KeyRefused):
            return False
        return True

    def _flush_raw(self, handle: int) -> None:
        # ESAPI has no object for a handle it did not make, so TPM2_FlushContext goes by hand:
        # tag TPM_ST_NO_SESSIONS, size 14, TPM_CC_FlushContext (TPM 2.0 Part 3 §28.4).
        command = bytes.fromhex("80010000000e00000165") + handle.to_bytes(4, "big")
        self._tcti.transmit(command)
        self._tcti.receive()
