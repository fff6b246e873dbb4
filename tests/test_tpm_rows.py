"""The table of TPM errors (README: what to do), each row caused for real where software can.

A row brings a swtpm into the situation; asserted are the return code that came from the TPM or the
TSS, the typed error, and that the command line says what to do. What passes by itself is asserted
to have passed. HARDWARE lists what cannot be caused, and why.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from test_tpm_restart import CC_UNSEAL, Forgetful
from tpm2_pytss import ESYS_TR, TSS2_Exception
from tpm2_pytss.constants import TPM2_ALG, TPM2_SE, TPMA_NV

from sealfs.cli.errors import Situation, hint_of
from sealfs.errors import (
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    LockedOut,
    SealfsError,
    TpmUnavailable,
    WrongPin,
)
from sealfs.keys import labels, policy, signed, tpm_errors, tpm_templates
from sealfs.keys.hostrecord import SealedObject
from sealfs.keys.service import KeyService
from sealfs.keys.signed import Limit
from sealfs.keys.swtpm import Channel
from sealfs.keys.tpm import Tpm, open_tpm
from sealfs.keys.tpm_duplicate import wrap_to
from sealfs.keys.tpm_errors import Act

pytestmark = pytest.mark.tpm

ROOT = Path(__file__).parent.parent
SIGNER = ec.derive_private_key(0x1234567, ec.SECP256R1())
PUBLIC = signed.signer_of(SIGNER.public_key())
CC_GET_RANDOM = 0x17B
INDEX, AUTH, LABEL = 0x01800A00, b"n" * 32, b"l" * 32


class Place:
    """A TPM of its own and a directory."""

    def __init__(self, directory: Path, tpm: ks.StandingTpm) -> None:
        self.state = directory / "state"
        self.tpm = tpm

    def service(self) -> KeyService:
        ks.fresh_state(self.state, tpm=self.tpm.spec)
        return KeyService.open(self.state)

    def opened(self, use: Callable[[Tpm], object]) -> None:
        with open_tpm(self.tpm.spec, "test", shutdown=False) as tpm:
            tpm.provision()
            use(tpm)


def wrapped(place: Place, wrap: Callable[[Channel], Channel]) -> KeyService:
    ks.initialised_state(place.state)
    return ks.wrapped_service(place.state, wrap)


# The situations


def changed_pcr(place: Place) -> None:
    with place.service() as keys:
        keys.create("web1", pcrs=(16,)).wipe()
        with place.tpm.esapi() as esapi:
            ks.extend(esapi, 16)
        keys.unseal("web1", "web1")


def _approval(tpm: Tpm, limit: Limit | None = None) -> signed.SignedPolicy:
    return signed.sign(SIGNER, (16,), tpm.pcr_values((16,)), limit)


def signed_for_another_state(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        sealed = _signed_object(tpm)
        before = _approval(tpm)
        with place.tpm.esapi() as esapi:
            ks.extend(esapi, 16)
        tpm.unseal(sealed, approval=before)

    place.opened(use)


def _signed_object(tpm: Tpm) -> SealedObject:
    digest = policy.slot_policy(
        signer_name=policy.name_of(PUBLIC), policy_ref=labels.SIGNED_POLICY_REF,
        pcrs=(), values=(), pin=False,
    )  # fmt: skip
    return tpm.seal(b"secret", policy_digest=digest)


def altered_signature(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        good = _approval(tpm)
        bad = dataclasses.replace(good, signature=good.signature[:-1] + b"\0")
        tpm.unseal(_signed_object(tpm), approval=bad)

    place.opened(use)


def revoked_signature(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        assert tpm.counter_define(INDEX, AUTH, LABEL)
        limit = Limit(INDEX, LABEL, tpm.counter_value(INDEX, AUTH))
        sealed, approval = _signed_object(tpm), _approval(tpm, limit)
        tpm.counter_increment(INDEX, AUTH)
        tpm.unseal(sealed, approval=approval, nv_auth=AUTH)

    place.opened(use)


def wrong_pin(place: Place) -> None:
    with place.service() as keys:
        keys.create("web1", pin=bytearray(b"2468")).wipe()
        keys.unlock("web1", bytearray(b"1357"))


def locked_out(place: Place) -> None:
    with place.service() as keys, pytest.MonkeyPatch.context() as patch:
        keys.create("web1", pin=bytearray(b"2468")).wipe()
        # We stop one try before; somebody else does not.
        patch.setattr(Tpm, "_check_tries", lambda *_: None)
        for _ in range(3):
            with pytest.raises((WrongPin, LockedOut)):
                keys.unlock("web1", bytearray(b"1357"))
        keys.unlock("web1", bytearray(b"2468"))


def owner_password(place: Place) -> None:
    with place.tpm.esapi() as esapi:
        esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"password")
    place.service()


def anothers_counter(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        assert tpm.counter_define(INDEX, AUTH)
        tpm.counter_value(INDEX, b"other")

    place.opened(use)


def sealed_by_another_tpm(place: Place) -> None:
    made = []
    place.opened(lambda tpm: made.append(tpm.seal(b"secret")))
    with ks.standing_tpm() as other:
        Place(place.state, other).opened(lambda tpm: tpm.unseal(made[0], subject="web1"))


def altered_package(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        public, duplicate, seed = wrap_to(tpm.provision().public, b"s" * 64)
        bad = duplicate[:-1] + bytes([duplicate[-1] ^ 1])
        tpm.import_object(public, bad, seed, "package")

    place.opened(use)


def garbage(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        public = tpm.seal(b"secret").public
        tpm.unseal(SealedObject(public, b"\0\x04abcd"), subject="web1")

    place.opened(use)


def full_of_objects(place: Place) -> None:
    with place.service() as keys:
        keys.create("web1").wipe()
        with place.tpm.esapi() as esapi:
            for _ in range(3):
                esapi.create_primary(None, tpm_templates.storage_template(), ESYS_TR.OWNER)
        keys.unseal("web1", "web1").wipe()


def full_of_sessions(place: Place) -> None:
    with place.service() as keys:
        keys.create("web1").wipe()
        with place.tpm.esapi() as esapi:
            for _ in range(3):
                esapi.start_auth_session(
                    ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.HMAC, tpm_templates.session_cipher(),
                    TPM2_ALG.SHA256,
                )  # fmt: skip
        keys.unseal("web1", "web1").wipe()


def lost_object(place: Place) -> None:
    with wrapped(place, lambda channel: Forgetful(channel, CC_UNSEAL)) as keys:
        keys.create("web1").wipe()


def lost_session(place: Place) -> None:
    # Behind header and size of the authorisations: the session that encrypts.
    with wrapped(place, lambda channel: Forgetful(channel, CC_GET_RANDOM, at=14)) as keys:
        keys.create("web1").wipe()


def lost_every_time(place: Place) -> None:
    with wrapped(place, lambda channel: Forgetful(channel, CC_UNSEAL, times=99)) as keys:
        keys.create("web1")


def not_started(place: Place) -> None:
    place.tpm.stop()
    place.tpm.start(flags="not-need-init")
    place.service()


def missing_counter(place: Place) -> None:
    with place.service() as keys:
        index = ks.host_record(place.state).nv_index
        place.opened(lambda tpm: tpm.counter_remove(index))
        keys.ledger.begin()


def counter_never_written(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        with place.tpm.esapi() as esapi:
            esapi.nv_define_space(AUTH, tpm_templates.counter_public(INDEX))
        tpm.counter_value(INDEX, AUTH)

    place.opened(use)


def full_memory(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        public = tpm_templates.counter_public(INDEX)
        public.nvPublic.attributes = TPMA_NV.AUTHREAD | TPMA_NV.AUTHWRITE | TPMA_NV.NO_DA
        with place.tpm.esapi() as esapi:
            for public.nvPublic.dataSize in (2048, 64):
                with contextlib.suppress(TSS2_Exception):
                    while True:
                        public.nvPublic.nvIndex += 1
                        esapi.nv_define_space(AUTH, public)
        for number in range(400):
            tpm.counter_define(INDEX - 1 - number, AUTH)

    place.opened(use)


def counter_taken(place: Place) -> None:
    def use(tpm: Tpm) -> None:
        assert tpm.counter_define(INDEX, AUTH)
        assert not tpm.counter_define(INDEX, AUTH), "the next index is tried"

    place.opened(use)


def gone(place: Place) -> None:
    with place.service() as keys:
        keys.create("web1").wipe()
        place.tpm.stop()
        keys.unseal("web1", "web1")


def unknown_connection(place: Place) -> None:
    ks.fresh_state(place.state, tpm="nonsense:x")


def altered_response(place: Place) -> None:
    def alter(code: int, count: int, response: bytes) -> bytes:
        if code != CC_UNSEAL:
            return response
        return response[:30] + bytes([response[30] ^ 1]) + response[31:]

    with wrapped(place, lambda channel: ks.Interposer(channel, alter)) as keys:
        keys.create("web1")


@dataclass(frozen=True)
class Row:
    """A situation, the code seen in it, and the error it becomes; None: it passes."""

    cause: Callable[[Place], None]
    code: int
    kind: type[SealfsError] | None
    words: str = ""


ROWS = (
    Row(changed_pcr, 0x99D, KeyRefused, "platform state"),
    Row(signed_for_another_state, 0x1C4, KeyRefused, "not for the present state"),
    Row(altered_signature, 0x2DB, KeyRefused, "does not verify"),
    Row(revoked_signature, 0x126, KeyRefused, "revoked"),
    Row(wrong_pin, 0x98E, WrongPin, "1 try is left"),
    Row(locked_out, 0x921, LockedOut, "locked out"),
    Row(owner_password, 0x9A2, TpmUnavailable, "owner hierarchy has a password"),
    Row(anothers_counter, 0x9A2, KeyRefused, "not this host's"),
    Row(sealed_by_another_tpm, 0x1DF, KeyRecordDamaged, "not one this TPM made"),
    Row(altered_package, 0x3DF, KeyRecordDamaged, "package was altered"),
    Row(garbage, 0x1D5, KeyRecordDamaged, "altered"),
    Row(full_of_objects, 0x902, None),
    Row(full_of_sessions, 0x903, None),
    Row(lost_object, 0x910, None),
    Row(lost_session, 0x918, None),
    Row(lost_every_time, 0x910, TpmUnavailable, "reset while in use"),
    Row(not_started, 0x100, TpmUnavailable, "not started"),
    Row(missing_counter, 0x18B, KeyRefused, "cleared"),
    Row(counter_never_written, 0x14A, TpmUnavailable, "never written"),
    Row(full_memory, 0x14B, TpmUnavailable, "non-volatile memory is full"),
    Row(counter_taken, 0x14C, None),
    Row(gone, 0xA000A, TpmUnavailable, "does not answer"),
    Row(unknown_connection, 0xA0015, TpmUnavailable, "no such kind"),
    Row(altered_response, 0x7001B, TpmUnavailable, "does not authenticate"),
)

HARDWARE = {
    # code: (act, error, why a software TPM does not say it)
    0x922: (Act.SEAL, TpmUnavailable, "swtpm never asks to come again; emulated in test_tpm"),
    0x908: (Act.SEAL, TpmUnavailable, "yields at long commands of a real chip only"),
    0x90A: (Act.SEAL, TpmUnavailable, "swtpm has tested itself before it answers"),
    0x920: (Act.COUNTER, TpmUnavailable, "a file does not wear out"),
    0x923: (Act.COUNTER, TpmUnavailable, "a file is always there"),
    0xB0902: (Act.LOAD, TpmUnavailable, "the kernel's resource manager, over /dev/tpmrm0"),
}


def codes_of(error: BaseException | None) -> set[int]:
    """Return the return codes along a chain of exceptions."""
    found: set[int] = set()
    while error is not None:
        if isinstance(error, TSS2_Exception):
            found.add(int(error.rc))
        code = getattr(error, "code", None)
        if isinstance(code, int):
            found.add(code)
        error = error.__cause__ or error.__context__
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every return code that was looked at, also one that passed."""
    found: set[int] = set()
    real = tpm_errors.normalised

    def noted(code: int) -> int:
        found.add(code)
        return real(code)

    monkeypatch.setattr(tpm_errors, "normalised", noted)
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.cause.__name__)
def test_each_row_of_the_table(row: Row, tmp_path: Path, seen: set[int]) -> None:
    with ks.standing_tpm() as tpm:
        place = Place(tmp_path, tpm)
        if row.kind is None:
            row.cause(place)
            assert row.code in seen
            return
        with pytest.raises(SealfsError) as caught:
            row.cause(place)
    assert type(caught.value) is row.kind, caught.value
    assert row.words in str(caught.value)
    assert row.code in codes_of(caught.value), [hex(code) for code in codes_of(caught.value)]
    assert_somebody_says_what_to_do(caught.value)


@pytest.mark.parametrize("code", HARDWARE, ids=hex)
def test_what_only_hardware_says_has_its_error(code: int) -> None:
    act, kind, _ = HARDWARE[code]
    error = tpm_errors.error_of(code, act, "web1")
    assert type(error) is kind
    assert f"{code:#x}" in str(error)
    assert_somebody_says_what_to_do(error)


def assert_somebody_says_what_to_do(error: BaseException) -> None:
    assert isinstance(error, KeyServiceError)
    hint = hint_of(error, Situation(command="check", path=Path("IMAGE")))
    assert hint or readme_row(type(error)), error


def readme_row(kind: type[Any]) -> str:
    """Return what README's table of errors says to do about a class."""
    (line,) = (
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith(f"| {kind.__name__} |")
    )
    return line.split("|")[-2].strip()
