"""PINs and signed policies: the digests, what opens and what does not, tries that are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tpm2_pytss import ESYS_TR
from tpm2_pytss.constants import TPM2_ALG, TPM2_EO, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_OPERAND, TPM2B_PUBLIC

from sealfs.errors import KeyRecordDamaged, KeyRefused, LockedOut, WrongPin
from sealfs.keys import labels, policy, signed, tpm_templates
from sealfs.keys.hostrecord import NV_INDEX_FIRST
from sealfs.keys.signed import Limit, SignedPolicy
from sealfs.keys.tpm import open_tpm

pytestmark = pytest.mark.tpm

KEYS = {
    "P-256": ec.derive_private_key(0x1234567, ec.SECP256R1()),
    "RSA-2048": rsa.generate_private_key(65537, 2048),
}
SIGNER = KEYS["P-256"]
PIN = b"p" * 32
NV_AUTH = b"n" * 32
LABEL = hashlib.sha256(b"this host").digest()


@pytest.fixture(scope="module")
def standing():
    with ks.standing_tpm() as tpm:
        yield tpm


@pytest.fixture
def tpm(standing):
    with standing.esapi() as esapi:
        esapi.pcr_reset(ESYS_TR(16))
        esapi.pcr_reset(ESYS_TR(23))
        esapi.dictionary_attack_lock_reset(ESYS_TR.LOCKOUT)
    with open_tpm(standing.spec, "test", shutdown=False) as opened:
        opened.provision()
        yield opened


@pytest.fixture
def limit(tpm):
    """Return a counter that limits signed policies, at its present value."""
    for index in itertools.count(NV_INDEX_FIRST + 0x500):
        if tpm.counter_define(index, NV_AUTH, LABEL):
            yield Limit(index, LABEL, tpm.counter_value(index, NV_AUTH))
            tpm.counter_remove(index)
            return


def trial(standing, steps) -> bytes:
    """Return what a trial session of the TPM says."""
    with standing.esapi() as esapi:
        session = esapi.start_auth_session(
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.TRIAL,
            tpm_templates.session_cipher(),
            TPM2_ALG.SHA256,
        )
        try:
            steps(esapi, session)
            return bytes(esapi.policy_get_digest(session))
        finally:
            esapi.flush_context(session)


# Digests


@pytest.mark.parametrize("pcrs", [(), (0, 7, 23)])
@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("signer", [None, *KEYS])
def test_every_slot_policy_is_what_the_trial_session_says(standing, tpm, pcrs, pin, signer):
    public = signed.signer_of(KEYS[signer].public_key()) if signer else b""
    ref = labels.SIGNED_POLICY_REF

    def steps(esapi, session) -> None:
        if signer:
            approval = signed.sign(KEYS[signer], (0,), (bytes(32),), None)
            digest = hashlib.sha256(approval.approved + ref).digest()
            loaded = esapi.load_external(tpm_templates.signer_public(public), None, ESYS_TR.OWNER)
            name = esapi.tr_get_name(loaded)
            ticket = esapi.verify_signature(
                loaded, digest, tpm_templates.signature_of(approval.signature)
            )
            esapi.flush_context(loaded)
            esapi.policy_authorize(session, approval.approved, name, ticket, ref)
        if pcrs:
            esapi.policy_pcr(session, b"", tpm_templates.pcr_selection(pcrs))
        if pin:
            esapi.policy_auth_value(session)

    ours = policy.slot_policy(
        signer_name=policy.name_of(public) if signer else b"",
        policy_ref=ref,
        pcrs=pcrs,
        values=tpm.pcr_values(pcrs),
        pin=pin,
    )
    assert (ours or bytes(32)) == trial(standing, steps)


def test_the_counter_policy_is_what_the_trial_session_says(standing, tpm, limit):
    assert tpm.counter_name(limit.index) == limit.name

    def steps(esapi, session) -> None:
        esapi.policy_pcr(session, b"", tpm_templates.pcr_selection((16,)))
        handle = esapi.tr_from_tpmpublic(limit.index)
        esapi.tr_set_auth(handle, NV_AUTH)
        operand = TPM2B_OPERAND(limit.value.to_bytes(8, "big"))
        esapi.policy_nv(handle, handle, session, operand, TPM2_EO.UNSIGNED_LE)

    ours = signed.approved_digest((16,), tpm.pcr_values((16,)), limit)
    assert ours == trial(standing, steps)


# PINs


def with_pin(tpm, pcrs=()) -> object:
    digest = policy.slot_policy(pcrs=pcrs, values=tpm.pcr_values(pcrs), pin=True)
    return tpm.seal(b"secret", policy_digest=digest, pin=PIN)


def test_a_pin_object_counts_wrong_pins_and_no_other_object_does(tpm):
    wanted = int(TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT)
    public = TPM2B_PUBLIC.unmarshal(with_pin(tpm).public)[0].publicArea
    assert int(public.objectAttributes) == wanted
    public = TPM2B_PUBLIC.unmarshal(tpm.seal(b"x", policy_digest=b"p" * 32).public)[0].publicArea
    assert int(public.objectAttributes) == wanted | int(TPMA_OBJECT.NODA)


@pytest.mark.parametrize("pcrs", [(), (16,)])
def test_the_right_pin_opens_and_a_wrong_one_says_how_many_are_left(tpm, pcrs):
    sealed = with_pin(tpm, pcrs)
    assert tpm.unseal(sealed, pcrs=pcrs, pin=PIN) == b"secret"
    with pytest.raises(WrongPin, match="1 try is left") as caught:
        tpm.unseal(sealed, pcrs=pcrs, pin=b"q" * 32, subject="web1")
    assert caught.value.tries_left == 1
    assert tpm.lockout().failures == 1
    assert tpm.unseal(sealed, pcrs=pcrs, pin=PIN) == b"secret"
    with pytest.raises(KeyRefused):
        tpm.unseal(sealed, pcrs=pcrs)  # Nor without one, and that is no try.
    assert tpm.lockout().failures == 1


def test_no_try_is_made_that_could_lock_the_tpm(tpm):
    sealed = with_pin(tpm)
    for left in (1, 0):
        with pytest.raises(WrongPin) as caught:
            tpm.unseal(sealed, pin=b"q" * 32)
        assert caught.value.tries_left == left
    for pin in (b"q" * 32, PIN):
        with pytest.raises(LockedOut, match="would lock the TPM"):
            tpm.unseal(sealed, pin=pin)
    state = tpm.lockout()
    assert (state.locked, state.failures) == (False, 2)


def test_a_locked_out_tpm_is_asked_for_no_pin_and_opens_everything_else(standing, tpm):
    free, sealed = tpm.seal(b"free"), with_pin(tpm)
    with standing.esapi() as esapi:
        # Somebody else's tries: with no more than this allowed, the TPM is locked.
        esapi.dictionary_attack_parameters(0, 1000, 1000)
    try:
        with pytest.raises(LockedOut):
            tpm.unseal(sealed, pin=PIN)
        assert tpm.unseal(free) == b"free"
    finally:
        with standing.esapi() as esapi:
            esapi.dictionary_attack_parameters(3, 1000, 1000)


def test_where_nobody_counts_every_try_is_made(standing, tpm):
    sealed = with_pin(tpm)
    tpm.stop_counting()
    try:
        for _ in range(5):
            with pytest.raises(WrongPin) as caught:
                tpm.unseal(sealed, pin=b"q" * 32)
            assert caught.value.tries_left is None
        assert tpm.unseal(sealed, pin=PIN) == b"secret"
    finally:
        with standing.esapi() as esapi:
            esapi.dictionary_attack_parameters(3, 1000, 1000)


# Signed policies


def for_signer(tpm, *, key=SIGNER, pin=b"") -> object:
    digest = policy.slot_policy(
        signer_name=policy.name_of(signed.signer_of(key.public_key())),
        policy_ref=labels.SIGNED_POLICY_REF,
        pin=bool(pin),
    )
    return tpm.seal(b"secret", policy_digest=digest, pin=pin)


def signed_now(tpm, *, key=SIGNER, limit=None) -> SignedPolicy:
    return signed.sign(key, (16, 23), tpm.pcr_values((16, 23)), limit)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("pin", [b"", PIN])
def test_a_changed_pcr_is_survived_by_a_new_signature_only(standing, tpm, key, pin):
    sealed = for_signer(tpm, key=key, pin=pin)
    before = signed_now(tpm, key=key)
    before.verify("policy")
    assert tpm.unseal(sealed, approval=before, pin=pin) == b"secret"
    with standing.esapi() as esapi:
        ks.extend(esapi, 16)
    with pytest.raises(KeyRefused, match="not for the present state"):
        tpm.unseal(sealed, approval=before, pin=pin)
    assert tpm.unseal(sealed, approval=signed_now(tpm, key=key), pin=pin) == b"secret"
    assert tpm.lockout().failures == 0


def test_another_signer_or_an_altered_signature_opens_nothing(tpm):
    sealed, good = for_signer(tpm), signed_now(tpm)
    with pytest.raises(KeyRefused, match="platform state"):
        tpm.unseal(sealed, approval=signed_now(tpm, key=KEYS["RSA-2048"]))
    altered = dataclasses.replace(good, signature=good.signature[:-1] + b"\0")
    with pytest.raises(KeyRecordDamaged, match="does not verify"):
        altered.verify("policy")
    with pytest.raises(KeyRefused, match="does not verify"):
        tpm.unseal(sealed, approval=altered)
    for other in (
        dataclasses.replace(good, policy_ref=b"another use"),
        dataclasses.replace(good, pcr_values=(bytes(32), b"\1" * 32)),
        dataclasses.replace(good, limit=Limit(NV_INDEX_FIRST, LABEL, 7)),
    ):
        with pytest.raises(KeyRecordDamaged, match="does not verify"):
            other.verify("policy")
    assert tpm.unseal(sealed, approval=good) == b"secret"


def test_a_signature_up_to_a_counter_ends_with_it(tpm, limit):
    sealed = for_signer(tpm)
    old = signed_now(tpm, limit=limit)
    assert tpm.unseal(sealed, approval=old, nv_auth=NV_AUTH) == b"secret"
    tpm.counter_increment(limit.index, NV_AUTH)
    with pytest.raises(KeyRefused, match="revoked"):
        tpm.unseal(sealed, approval=old, nv_auth=NV_AUTH)
    later = signed_now(tpm, limit=dataclasses.replace(limit, value=limit.value + 1))
    assert tpm.unseal(sealed, approval=later, nv_auth=NV_AUTH) == b"secret"
    # A counter that was made anew, or another host's, has another Name.
    other = signed_now(tpm, limit=dataclasses.replace(limit, label=bytes(32)))
    with pytest.raises(KeyRefused):
        tpm.unseal(sealed, approval=other, nv_auth=NV_AUTH)


def test_no_pin_and_no_authorisation_travels_in_clear(tmp_path):
    ks.initialised_state(tmp_path / "s")
    log: list[bytes] = []
    service = ks.wrapped_service(tmp_path / "s", lambda channel: ks.Tap(channel, log))
    with service._host.tpm() as tpm:
        index = NV_INDEX_FIRST + 0x600
        assert tpm.counter_define(index, NV_AUTH, LABEL)
        limit = Limit(index, LABEL, tpm.counter_value(index, NV_AUTH))
        sealed = for_signer(tpm, pin=PIN)
        approval = signed_now(tpm, limit=limit)
        assert tpm.unseal(sealed, approval=approval, pin=PIN, nv_auth=NV_AUTH) == b"secret"
    assert len(log) > 30
    for part in (PIN, PIN[:16], NV_AUTH, NV_AUTH[:16], b"secret"):
        assert not any(part in message for message in log)
    assert any(approval.approved in message for message in log), "the tap sees what is public"
