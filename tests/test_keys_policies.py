"""PINs and signed policies: the digests, what opens and what does not, tries that are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from pathlib import Path

import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from tpm2_pytss import ESYS_TR
from tpm2_pytss.constants import TPM2_ALG, TPM2_EO, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.types import TPM2B_OPERAND, TPM2B_PUBLIC

from sealfs.errors import (
    FormatError,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    LockedOut,
    NoSpace,
    PinNeeded,
    UsageError,
    WrongPin,
)
from sealfs.keys import labels, policy, signed, statedir, tpm_templates
from sealfs.keys.hostrecord import NV_INDEX_FIRST
from sealfs.keys.pin import authorisation, pin_of
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord, binding
from sealfs.keys.service import KeyService
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


# The key service


@pytest.fixture
def state(tmp_path) -> Path:
    ks.initialised_state(tmp_path / "state")
    return tmp_path / "state"


@pytest.fixture
def service(state) -> KeyService:
    return KeyService.open(state)


@pytest.fixture
def host(standing, tpm, tmp_path):
    """Return a key service whose TPM stays up, and counts wrong PINs."""
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    return KeyService.open(tmp_path / "state")


def pin(text: str = "2468") -> bytearray:
    return pin_of(text)


def add_policy(service, key=SIGNER, *, pcrs=(16, 23), limit=None) -> str:
    made = signed.sign(key, pcrs, service.pcr_values(pcrs), limit)
    return service.policies.add(made.encode(), "policy")


def signer(key=SIGNER) -> bytes:
    return signed.signer_of(key.public_key())


def policies_of(service, vm_id="web1") -> list[str]:
    info = next(info for info in service.records() if info.vm_id == vm_id)
    return [slot.policy for slot in info.slots if slot.kind == "tpm"]


def test_a_key_with_a_pin_opens_with_it_only(host):
    key = ks.key_bytes(host.create("web1", pin=pin()))
    assert policies_of(host) == ["pin"]
    assert ks.key_bytes(host.unseal("web1", "web1", pin=pin())) == key
    assert ks.key_bytes(host.ensure("web1", pin=pin())) == key
    for ask in (host.unseal, lambda kmi, vm_id: host.ensure(vm_id)):
        with pytest.raises(PinNeeded):
            ask("web1", "web1")
    with pytest.raises(WrongPin, match="1 try is left"):
        host.unseal("web1", "web1", pin=pin("1357"))
    trial = host.test("web1")
    assert [slot.opens for slot in trial] == [None, None]
    assert "1 of 3 failures" in trial[0].lockout
    assert [slot.opens for slot in host.test("web1", pin=pin())] == [True, None]
    # One PIN for two VMs is two authorisations.
    host.create("web2", pin=pin()).wipe()
    objects = [r.tpm_slots[0].sealed for r in map(host._vault.read_known, ("web1", "web2"))]
    with (
        host._host.tpm() as opened,
        authorisation(pin(), binding("web1", "web1")) as auth,
        pytest.raises(WrongPin),
    ):
        opened.unseal(objects[1], pin=auth)


def test_what_needs_a_pin_is_refused_without_asking_the_tpm(state):
    service = KeyService.open(state)
    service.create("web1", pin=pin()).wipe()
    log: list[bytes] = []
    tapped = ks.wrapped_service(state, lambda channel: ks.Tap(channel, log))
    tapped.registry.entries()  # unseals the host secret, which the audit log needs too
    log.clear()
    with pytest.raises(PinNeeded):
        tapped.unseal("web1", "web1")
    assert log == []


def test_a_wrong_pin_is_told_also_where_another_slot_opens_without_one(state):
    service = KeyService.open(state)
    service.create("web1").wipe()
    service.reseal("web1", Protection(pin=pin()), keep=True)
    with pytest.raises(WrongPin):
        service.unlock("web1", bytearray(b"wrong"))
    assert service.unlocked() == []
    service.unlock("web1", pin())
    assert service.unlocked() == ["web1"]


def test_an_unlocked_vm_opens_without_its_pin_until_it_is_locked(state):
    log: list[bytes] = []
    service = ks.wrapped_service(state, lambda channel: ks.Tap(channel, log))
    with service.create("web1", pin=pin()) as key:
        wrapped = key.wrap_image_key(bytes(16), b"I" * 32)
    with pytest.raises(PinNeeded):
        service.image_key("web1", "web1", bytes(16), wrapped)
    with pytest.raises(WrongPin):
        service.unlock("web1", pin("1357"))
    assert service.unlocked() == []
    service.unlock("web1", pin())
    service.unlock("web1", pin())
    assert service.unlocked() == ["web1"]
    log.clear()
    assert service.image_key("web1", "web1", bytes(16), wrapped) == b"I" * 32
    assert log == [], "the TPM was asked again"
    new = service.new_image_key("web1", b"u" * 16)
    assert service.image_key("web1", "web1", b"u" * 16, new.wrapped) == new.key
    with pytest.raises(KeyRefused, match="is the key of VM"):
        service.image_key("web1", "web2", bytes(16), wrapped)
    kept = service._opening.unlocked._keys["web1"][0]
    assert service.lock("web1")
    assert not service.lock("web1")
    assert not any(kept._key)
    with pytest.raises(PinNeeded):
        service.image_key("web1", "web1", bytes(16), wrapped)
    service.unlock("web1", pin())
    kept = service._opening.unlocked._keys["web1"][0]
    service.close()
    assert not any(kept._key)
    with pytest.raises(PinNeeded):
        service.new_image_key("web1", b"v" * 16)


def test_a_kept_key_is_of_no_use_for_a_record_that_changed_its_key(state, service):
    service.create("web1", pin=pin()).wipe()
    service.unlock("web1", pin())
    record = ks.record_files(state)[0]
    raw = record.read_bytes()
    record.unlink()
    with pytest.raises(KeyNotFound):
        service.unseal("web1", "web1")
    KeyService.open(state).create("web1", pin=pin("1357")).wipe()
    with pytest.raises(PinNeeded):
        service.unseal("web1", "web1")
    record.write_bytes(raw)
    service.unseal("web1", "web1").wipe()
    # Another policy for the same key changes nothing.
    service.reseal("web1", Protection(pin=pin("1357")), pin=pin())
    service.unseal("web1", "web1").wipe()


def test_wrong_pins_on_the_embedded_tpm_lock_nothing(service):
    service.create("web1", pin=pin()).wipe()
    for _ in range(5):
        with pytest.raises(WrongPin) as caught:
            service.unseal("web1", "web1", pin=pin("1357"))
        assert caught.value.tries_left is None
    service.unseal("web1", "web1", pin=pin()).wipe()


def test_a_signed_policy_must_be_there_before_a_key_is_tied_to_its_signer(standing, host):
    with pytest.raises(KeyRefused, match="none was added"):
        host.create("web1", signer=signer())
    assert host.records() == []
    first = add_policy(host)
    assert add_policy(host, KEYS["RSA-2048"]) != first
    assert len(host.policies.reports()) == 2
    key = ks.key_bytes(host.create("web1", signer=signer(), pin=pin()))
    assert policies_of(host) == ["pin+signed"]
    assert ks.key_bytes(host.unseal("web1", "web1", pin=pin())) == key
    with standing.esapi() as esapi:
        ks.extend(esapi, 23)
    with pytest.raises(KeyRefused, match=f"{first}: PCR 23 is not as it signs"):
        host.unseal("web1", "web1", pin=pin())
    add_policy(host, KEYS["RSA-2048"])
    with pytest.raises(KeyRefused, match="fits this host"):
        host.unseal("web1", "web1", pin=pin())
    add_policy(host)
    assert ks.key_bytes(host.unseal("web1", "web1", pin=pin())) == key
    assert host.test("web1", pin=pin())[0].opens
    problems = [report.problem for report in host.policies.reports()]
    assert problems.count(None) == 2
    assert problems.count("PCR 23 is not as it signs") == 2


def test_revocation_ends_what_was_signed_up_to_then(host):
    assert host.policies.made_counter() == host.policies.made_counter()
    limit = host.policies.made_counter()
    old = add_policy(host, limit=limit)
    forever = add_policy(host, KEYS["RSA-2048"])
    elsewhere = add_policy(host, limit=dataclasses.replace(limit, label=b"x" * 32))
    key = ks.key_bytes(host.create("web1", signer=signer()))
    raw = (host.state_path / "policies" / f"{old}.policy").read_bytes()
    done = host.policies.revoke()
    assert (done.value, done.ended, done.unlimited) == (limit.value + 1, (old,), (forever,))
    with pytest.raises(KeyRefused, match="is for another host"):
        host.unseal("web1", "web1")
    # Put back, it opens nothing.
    assert host.policies.add(raw, "old") == old
    with pytest.raises(KeyRefused, match="was revoked: it held until"):
        host.unseal("web1", "web1")
    assert host.test("web1")[0].opens is False
    add_policy(host, limit=dataclasses.replace(limit, value=limit.value + 1))
    assert ks.key_bytes(host.unseal("web1", "web1")) == key
    assert {report.id: report.problem for report in host.policies.reports()}[
        elsewhere
    ] == "is for another host"


def test_a_bad_policy_file_is_not_taken_and_one_put_there_opens_nothing(state, service, caplog):
    good = signed.sign(SIGNER, (16,), service.pcr_values((16,)), None)
    for wrong, kind in (
        (b"rubbish", FormatError),
        (good.encode()[:-1], KeyRecordDamaged),
        (dataclasses.replace(good, policy_ref=b"x").encode(), KeyRecordDamaged),
    ):
        with pytest.raises(kind):
            service.policies.add(wrong, "file")
    assert not (state / "policies").exists()
    service.policies.add(good.encode(), "file")
    service.create("web1", signer=signer()).wipe()
    (state / "policies/bad.policy").write_bytes(b"rubbish")
    service.unseal("web1", "web1").wipe()
    assert "skipping a signed policy" in caplog.text
    assert (state / "policies").stat().st_mode & 0o777 == 0o700
    for number in range(100):
        (state / f"policies/{number}.policy").write_bytes(b"")
    with pytest.raises(NoSpace):
        service.policies.add(signed.sign(SIGNER, (0,), (bytes(32),), None).encode(), "file")


# Reseal


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        (lambda: Protection(), "none"),
        (lambda: Protection(pcrs=(16,)), "pcrs"),
        (lambda: Protection(pin=pin("1357")), "pin"),
        (lambda: Protection(pcrs=(16,), pin=pin("1357")), "pcrs+pin"),
        (lambda: Protection(signer=signer()), "signed"),
        (lambda: Protection((16,), pin("1357"), signer()), "pcrs+pin+signed"),
    ],
)
def test_reseal_gives_the_same_key_another_policy(service, wanted, word):
    add_policy(service)
    key = ks.key_bytes(service.create("web1", pin=pin()))
    with pytest.raises(PinNeeded):
        service.reseal("web1", wanted())
    with pytest.raises(WrongPin):
        service.reseal("web1", wanted(), pin=pin("9999"))
    service.reseal("web1", wanted(), pin=pin())
    assert policies_of(service) == [word]
    given = pin("1357") if "pin" in word else None
    assert ks.key_bytes(service.unseal("web1", "web1", pin=given)) == key
    with pytest.raises(KeyNotFound):
        service.reseal("web9", wanted())


def test_slots_side_by_side_are_tried_without_burning_pins(standing, host):
    key = ks.key_bytes(host.create("web1", pin=pin()))
    host.reseal("web1", Protection(pcrs=(23,)), pin=pin(), keep=True)
    host.reseal("web1", Protection(pin=pin("1357")), keep=True)
    assert policies_of(host) == ["pin", "pcrs", "pin"]
    for given in (None, pin(), pin("1357"), pin("9999")):
        assert ks.key_bytes(host.unseal("web1", "web1", pin=given)) == key
    with host._host.tpm() as opened:
        assert opened.lockout().failures == 0, "a PIN was tried where none was needed"
    with standing.esapi() as esapi:
        ks.extend(esapi, 23)
    with pytest.raises(PinNeeded):
        host.unseal("web1", "web1")
    assert ks.key_bytes(host.unseal("web1", "web1", pin=pin("1357"))) == key
    # The older PIN: the newer slot is asked first, once.
    assert ks.key_bytes(host.unseal("web1", "web1", pin=pin())) == key
    with host._host.tpm() as opened:
        assert opened.lockout().failures == 1
    host.reseal("web1", Protection(), pin=pin("1357"), keep=True)
    with pytest.raises(UsageError, match="4 tpm slots"):
        host.reseal("web1", Protection(), keep=True)
    host.reseal("web1", Protection(pcrs=(16,)))
    assert policies_of(host) == ["pcrs"]


def test_a_reseal_that_cannot_be_proved_changes_nothing(standing, host):
    add_policy(host)
    host.create("web1").wipe()
    record = ks.record_files(host.state_path)[0]
    before = record.read_bytes()
    with standing.esapi() as esapi:
        ks.extend(esapi, 16)
    with pytest.raises(KeyRefused):
        host.reseal("web1", Protection(signer=signer()))
    assert record.read_bytes() == before


def test_a_record_of_version_1_opens_and_is_resealed_as_version_2(state, service):
    key = ks.key_bytes(service.create("web1"))
    file = ks.record_files(state)[0]
    with service.unseal("web1", "web1") as vm_key, vm_key.record_mac_key() as mac_key:
        record = KeyRecord.decode(file.read_bytes(), "x")
        old = dataclasses.replace(record, version=1).with_mac(mac_key)
    file.write_bytes(old.encode())
    assert ks.key_bytes(service.unseal("web1", "web1")) == key
    service.reseal("web1", Protection(pcrs=(16,)))
    assert KeyRecord.decode(file.read_bytes(), "x").version == 2
    assert ks.key_bytes(service.unseal("web1", "web1")) == key


class Killed(BaseException):
    """The process died."""


class DyingOs:
    """The os module as the state directory sees it; dies after its n-th call that writes."""

    def __init__(self, left: int) -> None:
        self._left = left

    def __getattr__(self, name: str):
        call = getattr(os, name)
        if name not in ("write", "fsync", "replace", "pwrite", "fdatasync", "ftruncate"):
            return call

        def writes(*arguments):
            result = call(*arguments)
            self._left -= 1
            if self._left == 0:
                raise Killed
            return result

        return writes


@pytest.mark.parametrize("keep", [False, True])
def test_a_reseal_killed_after_any_write_leaves_a_key_that_opens(state, monkeypatch, keep):
    key = ks.key_bytes(KeyService.open(state).create("web1", pin=pin()))
    prepared = ks.record_files(state)[0].read_bytes()
    seen = set()
    for count in itertools.count(1):
        ks.record_files(state)[0].write_bytes(prepared)
        service = KeyService.open(state)
        monkeypatch.setattr(statedir, "os", DyingOs(count))
        try:
            service.reseal("web1", Protection(pcrs=(16,)), pin=pin(), keep=keep)
            is_done = True
        except Killed:
            is_done = False
        monkeypatch.setattr(statedir, "os", os)
        found = tuple(policies_of(service))
        seen.add(found)
        given = pin() if found[0] == "pin" else None
        assert ks.key_bytes(KeyService.open(state).unseal("web1", "web1", pin=given)) == key
        if is_done:
            break
        # The next one finishes what this one began.
        KeyService.open(state).reseal("web1", Protection(pcrs=(16,)), pin=pin())
        assert policies_of(service) == ["pcrs"]
    assert count > (4 if keep else 8), "every write was the last one"
    assert seen == {("pin",), ("pin", "pcrs")} | (set() if keep else {("pcrs",)})


def test_recover_gives_back_a_key_whose_pin_is_forgotten(state, tmp_path, caplog):
    report = ks.fresh_state(tmp_path / "own")
    service = KeyService.open(tmp_path / "own")
    key = service.create("web1", pcrs=(16,), pin=pin())
    with service.recover("web1", "web1", key.recovery_slots, report.recovery_key) as found:
        assert ks.key_bytes(found) == ks.key_bytes(key)
    assert policies_of(service) == ["pcrs"]
    assert "opens without pin now" in caplog.text
