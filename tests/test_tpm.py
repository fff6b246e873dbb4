"""What sealfs asks of a TPM, against a real swtpm: secrets on the wire, pins, policies, errors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path

import keys_support as ks
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tpm2_pytss import ESYS_TR, TSS2_Exception
from tpm2_pytss.constants import TPM2_ALG, TPM2_CAP, TPM2_SE, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2_HANDLE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPMS_SENSITIVE_CREATE,
)

from sealfs.errors import (
    Busy,
    KeyRecordDamaged,
    KeyRefused,
    KeyServiceError,
    LockedOut,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys import policy, tpm_errors, tpm_templates
from sealfs.keys.hostrecord import SealedObject, StorageKeyKind
from sealfs.keys.service import KeyService
from sealfs.keys.statedir import StateDir
from sealfs.keys.swtpm import EmbeddedTpm
from sealfs.keys.tpm import PERSISTENT_HANDLE, open_tpm
from sealfs.keys.tpm_errors import Act

pytestmark = pytest.mark.tpm


@pytest.fixture(scope="module")
def standing():
    with ks.standing_tpm() as tpm:
        yield tpm


@pytest.fixture
def tpm(standing):
    with open_tpm(standing.spec, "test", shutdown=False) as opened:
        opened.provision()
        yield opened


def handles(esapi, first: int) -> list[int]:
    _, answer = esapi.get_capability(TPM2_CAP.HANDLES, first, 32)
    listed = answer.data.handles
    return [int(handle) for handle in listed]


def raw_storage_key(esapi):
    return esapi.create_primary(TPM2B_SENSITIVE_CREATE(), tpm_templates.storage_template())[0]


# Sealing


@pytest.mark.parametrize("size", [1, 32, 104, 128])
def test_what_was_sealed_is_unsealed(tpm, size):
    payload = bytes(range(size))
    assert tpm.unseal(tpm.seal(payload)) == payload


def test_more_than_the_tpm_holds_is_our_bug(tpm):
    for size in (0, 129):
        with pytest.raises(ValueError, match="cannot seal"):
            tpm.seal(bytes(size))


def test_a_sealed_object_with_any_part_altered_is_damaged(tpm):
    one, other = tpm.seal(b"one" * 10), tpm.seal(b"two" * 10)
    assert one.private != other.private
    flipped = bytearray(one.private)
    flipped[-1] ^= 1
    for wrong in (
        SealedObject(other.public, one.private),
        SealedObject(one.public, bytes(flipped)),
        SealedObject(one.public, one.private[:-1]),
        SealedObject(b"", one.private),
        SealedObject(b"\xff" * 40, b"\xff" * 40),
    ):
        with pytest.raises(KeyRecordDamaged):
            tpm.unseal(wrong, subject="web1")
    assert tpm.unseal(one) == b"one" * 10


def test_nothing_stays_loaded_after_success_or_failure(standing, tpm):
    sealed = tpm.seal(b"x")
    tpm.unseal(sealed)
    tpm.random(100)
    tpm.pcr_values(range(24))
    with pytest.raises(KeyRecordDamaged):
        tpm.unseal(
            SealedObject(sealed.public, sealed.private[:-1] + bytes([sealed.private[-1] ^ 1]))
        )
    with standing.esapi() as esapi:
        assert handles(esapi, 0x80000000) == []
        assert handles(esapi, 0x02000000) == []


def test_a_sealed_object_is_fixed_to_its_tpm_and_free_of_the_lockout(tpm):
    public = TPM2B_PUBLIC.unmarshal(tpm.seal(b"x").public)[0].publicArea
    wanted = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.NODA
    assert int(public.objectAttributes) == int(wanted | TPMA_OBJECT.USERWITHAUTH)
    with_policy = tpm.seal(b"x", policy_digest=b"p" * 32)
    public = TPM2B_PUBLIC.unmarshal(with_policy.public)[0].publicArea
    assert int(public.objectAttributes) == int(wanted)  # The policy alone opens it.


# PCR policies


@pytest.mark.parametrize("pcrs", [(0,), (0, 2, 4, 7, 11), tuple(range(24))])
def test_the_software_policy_digest_is_what_the_trial_session_says(standing, tpm, pcrs):
    values = tpm.pcr_values(pcrs)
    with standing.esapi() as esapi:
        session = esapi.start_auth_session(
            ESYS_TR.NONE,
            ESYS_TR.NONE,
            TPM2_SE.TRIAL,
            tpm_templates.session_cipher(),
            TPM2_ALG.SHA256,
        )
        esapi.policy_pcr(session, b"", tpm_templates.pcr_selection(pcrs))
        digest = bytes(esapi.policy_get_digest(session))
        esapi.flush_context(session)
    assert policy.pcr_policy(pcrs, values) == digest


def test_more_than_eight_pcrs_are_read_in_order(standing, tpm):
    with standing.esapi() as esapi:
        ks.extend(esapi, 16)
    values = tpm.pcr_values(range(24))
    assert len(values) == 24
    assert values[16] != bytes(32)
    assert values[17] == b"\xff" * 32
    assert values[:16] == (bytes(32),) * 16


def test_a_pcr_policy_refuses_after_extend_and_opens_after_reset(standing, tpm):
    values = tpm.pcr_values((16, 23))
    sealed = tpm.seal(b"secret", policy_digest=policy.pcr_policy((16, 23), values))
    assert tpm.unseal(sealed, pcrs=(16, 23)) == b"secret"
    with standing.esapi() as esapi:
        ks.extend(esapi, 23)
    with pytest.raises(KeyRefused, match="platform state"):
        tpm.unseal(sealed, pcrs=(16, 23), subject="web1")
    with pytest.raises(KeyRefused):
        tpm.unseal(sealed)  # Without its policy neither.
    with standing.esapi() as esapi:
        esapi.pcr_reset(ESYS_TR(23))
    assert tpm.unseal(sealed, pcrs=(16, 23)) == b"secret"


# The wire


def appearances(secret: bytes, log: list[bytes]) -> int:
    return sum(secret in message for message in log)


def test_no_secret_travels_in_clear_and_the_tap_would_see_one(tmp_path):
    ks.fresh_state(tmp_path / "s")
    state = StateDir(tmp_path / "s")
    log: list[bytes] = []
    with (
        state.lock() as held,
        EmbeddedTpm(state.tpm_directory).running(held) as channel,
        open_tpm(ks.Tap(channel, log), "tapped", shutdown=True) as tpm,
    ):
        tpm.attach(ks.host_record(tmp_path / "s").storage_key)
        key, auth = bytes(range(100, 164)), b"nv-authorisation" * 2
        assert tpm.unseal(tpm.seal(key)) == key
        sealed = tpm.seal(key, policy_digest=policy.pcr_policy((7,), tpm.pcr_values((7,))))
        assert tpm.unseal(sealed, pcrs=(7,)) == key
        drawn = tpm.random(48)
        assert tpm.counter_define(0x01800077, auth)
        tpm.counter_increment(0x01800077, auth)
        value = tpm.counter_value(0x01800077, auth)
    assert len(log) > 30
    for secret in (key, key[:32], key[32:], drawn[:32], drawn[32:], auth, auth[:16]):
        assert appearances(secret, log) == 0
    assert appearances(value.to_bytes(8, "big"), log) == 0

    # Positive control: the same calls in the library's default sessions.
    log.clear()
    with ks.embedded_esapi(tmp_path / "s", lambda channel: ks.Tap(channel, log)) as esapi:
        parent = raw_storage_key(esapi)
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(data=key))
        private, public, *_ = esapi.create(parent, sensitive, tpm_templates.sealed_template(b""))
        loaded = esapi.load(parent, private, public)
        assert bytes(esapi.unseal(loaded)) == key
        drawn = bytes(esapi.get_random(32))
    assert appearances(key, log) == 2
    assert appearances(drawn, log) == 1


def test_a_whole_life_of_a_vm_key_shows_no_secret_on_the_wire(tmp_path):
    report = ks.initialised_state(tmp_path / "s")
    log: list[bytes] = []
    service = ks.wrapped_service(tmp_path / "s", lambda channel: ks.Tap(channel, log))
    key = service.create("web1", pcrs=(7,))
    again = service.unseal("web1", "web1")
    drawn = service.random(32)
    service.test("web1")
    secret = ks.key_bytes(key)
    assert ks.key_bytes(again) == secret
    host_secret = bytes(service._host._secret)
    assert len(host_secret) == 64
    assert report.recovery_key is not None
    for part in (secret[:32], secret[32:], host_secret[:32], host_secret[32:], drawn):
        assert appearances(part, log) == 0
    assert len(log) > 60


def test_a_call_that_is_in_no_table_is_refused(tpm):
    for call in ("unseal", "create", "get_random", "hmac"):
        with pytest.raises(ValueError, match="table"):
            tpm._plain(call)
    with pytest.raises(ValueError, match="table"):
        tpm._secret(None, "read_public")


# The storage key and its pin


def attacker_public(response: bytes) -> bytes:
    """Replace the ECC point of a ReadPublic response, and nothing else."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key().public_numbers()
    size = int.from_bytes(response[10:12], "big")
    end = 12 + size
    point = b"\0\x20" + numbers.x.to_bytes(32, "big") + b"\0\x20" + numbers.y.to_bytes(32, "big")
    return response[: end - len(point)] + point + response[end:]


def altering(first: int, last: int):
    def alter(code: int, count: int, response: bytes) -> bytes:
        wanted = code == ks.CC_READ_PUBLIC and first <= count <= last
        return attacker_public(response) if wanted and len(response) > 10 else response

    return alter


def test_a_swapped_public_key_behind_a_true_name_is_not_taken(tmp_path):
    ks.initialised_state(tmp_path / "s")
    pin = ks.host_record(tmp_path / "s").storage_key

    # Positive control: what the library takes on trust. The handle carries the pinned name, by
    # which commands are authorised, and the attacker's public area, to which it would encrypt
    # the salts.
    def interposed(channel):
        return ks.Interposer(channel, altering(1, 99))

    with ks.embedded_esapi(tmp_path / "s", interposed) as esapi:
        handle = esapi.tr_from_tpmpublic(TPM2_HANDLE(PERSISTENT_HANDLE))
        blob = bytes(esapi.tr_serialize(handle))
        assert pin.name in blob
        assert pin.public not in blob
        assert pin.name in pin.handle
        assert pin.public in pin.handle

    service = ks.wrapped_service(tmp_path / "s", interposed)
    with pytest.raises(KeyRefused):
        service.create("web1")
    assert not service.has("web1")


@pytest.mark.parametrize(("first", "last"), [(1, 99), (1, 1), (2, 99)])
def test_init_refuses_a_storage_key_swapped_on_the_way(tmp_path, first, last):
    ks.initialised_state(tmp_path / "s")
    state = StateDir(tmp_path / "s")
    access = ks.WrappedAccess(state, lambda c: ks.Interposer(c, altering(first, last)))
    with (
        state.lock() as held,
        access.open(held) as tpm,
        pytest.raises(KeyRefused, match="fit"),
    ):
        tpm.provision()


def test_an_altered_response_stops_everything(tmp_path):
    ks.initialised_state(tmp_path / "s")
    cc_unseal = 0x15E

    def alter(code: int, count: int, response: bytes) -> bytes:
        if code != cc_unseal:
            return response
        return response[:30] + bytes([response[30] ^ 1]) + response[31:]

    service = ks.wrapped_service(tmp_path / "s", lambda c: ks.Interposer(c, alter))
    with pytest.raises(TpmUnavailable, match="does not authenticate") as caught:
        service.create("web1")
    assert caught.value.code == tpm_errors.RESPONSE_FORGED


def test_a_storage_key_of_another_tool_is_used_and_recorded(tmp_path):
    with ks.standing_tpm() as standing:
        with standing.esapi() as esapi:
            template = TPM2B_PUBLIC(
                publicArea=TPM2B_PUBLIC.parse(
                    "rsa2048:aes128cfb",
                    objectAttributes=TPMA_OBJECT.FIXEDTPM
                    | TPMA_OBJECT.FIXEDPARENT
                    | TPMA_OBJECT.SENSITIVEDATAORIGIN
                    | TPMA_OBJECT.USERWITHAUTH
                    | TPMA_OBJECT.RESTRICTED
                    | TPMA_OBJECT.DECRYPT,
                ).publicArea
            )
            handle = esapi.create_primary(TPM2B_SENSITIVE_CREATE(), template)[0]
            esapi.evict_control(ESYS_TR.OWNER, handle, PERSISTENT_HANDLE)
            esapi.flush_context(handle)
        report = ks.fresh_state(tmp_path / "s", tpm=standing.spec)
        assert "another tool" in report.storage_key
        assert ks.host_record(tmp_path / "s").storage_key.kind is StorageKeyKind.FOREIGN
        service = KeyService.open(tmp_path / "s")
        key = ks.key_bytes(service.create("web1"))
        assert ks.key_bytes(service.unseal("web1", "web1")) == key


def test_a_transient_storage_key_is_the_same_at_each_use(standing, tpm):
    import dataclasses

    sealed = tpm.seal(b"secret")
    pin = dataclasses.replace(tpm._pin, kind=StorageKeyKind.TRANSIENT, handle=b"")
    with open_tpm(standing.spec, "test", shutdown=False) as other:
        other.attach(pin)
        assert other.unseal(sealed) == b"secret"
    with (
        open_tpm(standing.spec, "test", shutdown=False) as other,
        pytest.raises(KeyRefused, match="cleared"),
    ):
        other.attach(dataclasses.replace(pin, name=b"\0\x0b" + bytes(32)))
    with standing.esapi() as esapi:
        assert handles(esapi, 0x80000000) == []


def test_a_tpm_with_an_owner_password_says_so_at_init(tmp_path):
    with ks.standing_tpm() as standing:
        with standing.esapi() as esapi:
            esapi.hierarchy_change_auth(ESYS_TR.OWNER, b"password")
        with pytest.raises(TpmUnavailable, match="owner hierarchy has a password"):
            ks.fresh_state(tmp_path / "s", tpm=standing.spec)


# Lockout


def test_many_restarts_do_not_lock_the_tpm(tmp_path):
    ks.initialised_state(tmp_path / "s")
    service = KeyService.open(tmp_path / "s")
    service.create("web1", pcrs=(7,))
    for _ in range(6):
        service.unseal("web1", "web1")
    report = service.test("web1")[0]
    assert report.opens
    assert "not locked, 0 of" in (report.lockout or "")


@pytest.mark.parametrize(("shutdown", "counted"), [(True, 0), (False, 1)])
def test_it_is_the_shutdown_that_keeps_the_lockout_counter_still(tmp_path, shutdown, counted):
    ks.initialised_state(tmp_path / "s")
    state = StateDir(tmp_path / "s")
    with ks.embedded_esapi(tmp_path / "s") as esapi:
        # An object that takes part in dictionary attack protection, used once.
        parent = raw_storage_key(esapi)
        template = tpm_templates.sealed_template(b"")
        attributes = int(template.publicArea.objectAttributes) & ~int(TPMA_OBJECT.NODA)
        template.publicArea.objectAttributes = attributes
        sensitive = TPM2B_SENSITIVE_CREATE(TPMS_SENSITIVE_CREATE(userAuth=b"pin", data=b"x"))
        private, public, *_ = esapi.create(parent, sensitive, template)
        loaded = esapi.load(parent, private, public)
        esapi.tr_set_auth(loaded, b"pin")
        esapi.unseal(loaded)
        if shutdown:
            esapi.shutdown(0)
    with (
        state.lock() as held,
        EmbeddedTpm(state.tpm_directory).running(held) as channel,
        open_tpm(channel, "test", shutdown=True) as tpm,
    ):
        assert tpm.lockout().failures == counted


# The counter


def test_a_counter_counts_and_only_for_its_authorisation(tpm):
    index, auth = 0x01800042, b"a" * 32
    assert tpm.counter_define(index, auth)
    assert not tpm.counter_define(index, auth)
    first = tpm.counter_value(index, auth)
    tpm.counter_increment(index, auth)
    assert tpm.counter_value(index, auth) == first + 1
    with pytest.raises(KeyRefused, match="not this host's"):
        tpm.counter_increment(index, b"b" * 32)
    assert tpm.counter_is_ours(index, auth)
    assert not tpm.counter_is_ours(index, b"b" * 32)
    assert tpm.lockout().failures == 0
    tpm.counter_remove(index)
    tpm.counter_remove(index)
    assert not tpm.counter_is_ours(index, auth)
    with pytest.raises(KeyRefused):
        tpm.counter_value(index, auth)


def test_init_leaves_a_counter_that_was_incremented_once(tmp_path):
    ks.initialised_state(tmp_path / "s")
    service = KeyService.open(tmp_path / "s")
    with service._host.tpm() as tpm:
        secret = service._host._secret
        assert secret is not None
        index = service._host.record.nv_index
        value = tpm.counter_value(index, secret[32:])
        assert value >= 1
        tpm.counter_increment(index, secret[32:])
        assert tpm.counter_value(index, secret[32:]) == value + 1


# Trouble


def test_objects_and_sessions_left_by_others_are_flushed(standing):
    with standing.esapi() as esapi:
        for _ in range(3):
            raw_storage_key(esapi)
        for _ in range(3):
            esapi.start_auth_session(
                ESYS_TR.NONE,
                ESYS_TR.NONE,
                TPM2_SE.HMAC,
                tpm_templates.session_cipher(),
                TPM2_ALG.SHA256,
            )
        with pytest.raises(TSS2_Exception):  # Positive control: the TPM is full.
            raw_storage_key(esapi)
        assert len(handles(esapi, 0x80000000)) == 3
    with open_tpm(standing.spec, "test", shutdown=False) as tpm:
        tpm.provision()
        assert tpm.unseal(tpm.seal(b"x")) == b"x"


def test_a_tpm_that_was_not_started_says_so(tmp_path):
    tpm = ks.StandingTpm()
    try:
        tpm.start(flags="not-need-init")
        with pytest.raises(TpmUnavailable, match="not started") as caught:
            ks.fresh_state(tmp_path / "s", tpm=tpm.spec)
        assert caught.value.code == 0x100
    finally:
        tpm.remove()


def test_a_tpm_that_dies_in_the_middle_is_unavailable_and_the_context_dead(tmp_path):
    with ks.standing_tpm() as standing:
        with open_tpm(standing.spec, "test", shutdown=False) as tpm:
            tpm.provision()
            standing.stop()
            with pytest.raises(TpmUnavailable):
                tpm.seal(b"x")
            standing.start()
            with pytest.raises(TpmUnavailable, match="reopened"):
                tpm.seal(b"x")
        with open_tpm(standing.spec, "test", shutdown=False) as tpm:
            tpm.provision()
            assert tpm.unseal(tpm.seal(b"x")) == b"x"


def test_an_embedded_tpm_that_fails_is_unavailable_with_its_own_words(tmp_path):
    ks.initialised_state(tmp_path / "s")
    (tmp_path / "s/tpm/tpm2-00.permall").write_bytes(b"rubbish" * 100)
    service = KeyService.open(tmp_path / "s")
    with pytest.raises(TpmUnavailable, match=r"swtpm ended with status|does not answer|could not"):
        service.create("web1")


def test_a_missing_swtpm_is_named(tmp_path):
    ks.initialised_state(tmp_path / "s")
    state = StateDir(tmp_path / "s")
    embedded = EmbeddedTpm(state.tpm_directory, program="swtpm-is-not-here")
    with (
        state.lock() as held,
        pytest.raises(TpmUnavailable, match="not installed"),
        embedded.running(held),
    ):
        pass


def test_an_emptied_tpm_state_comes_back_from_the_kept_link(tmp_path):
    ks.initialised_state(tmp_path / "s")
    service = KeyService.open(tmp_path / "s")
    key = ks.key_bytes(service.create("web1"))
    service.unseal("web1", "web1")
    state_file = tmp_path / "s/tpm/tpm2-00.permall"
    state_file.unlink()
    state_file.touch()  # What a power cut may leave of a rename without fsync.
    assert ks.key_bytes(service.unseal("web1", "web1")) == key


def test_a_missing_tpm_state_is_not_silently_made_anew(tmp_path):
    ks.initialised_state(tmp_path / "s")
    for file in (tmp_path / "s/tpm").iterdir():
        file.unlink()
    with pytest.raises(TpmUnavailable, match="state of the embedded TPM is gone"):
        KeyService.open(tmp_path / "s").create("web1")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("device:/dev/no-such-tpm", TpmUnavailable),
        ("swtpm:path=/nowhere/at/all", TpmUnavailable),
        ("nonsense:x", TpmUnavailable),
        ("nonsense", (TpmUnavailable, UsageError)),
        ("", UsageError),
    ],
)
def test_a_tpm_that_is_not_there_is_refused_and_leaves_no_host(tmp_path, spec, kind):
    with pytest.raises(kind):
        ks.fresh_state(tmp_path / "s", tpm=spec)
    assert not (tmp_path / "s/host.record").exists()


def test_nothing_listens_and_no_swtpm_outlives_its_use(tmp_path):
    import subprocess

    ks.initialised_state(tmp_path / "s")
    state = StateDir(tmp_path / "s")
    with (
        state.lock() as held,
        EmbeddedTpm(state.tpm_directory).running(held) as channel,
        open_tpm(channel, "test", shutdown=True) as tpm,
    ):
        tpm.lockout()
        sockets = [path for path in (tmp_path / "s").rglob("*") if path.is_socket()]
        assert sockets == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in running.stdout
    with state.lock():
        pass


def test_the_lock_has_an_end_to_its_patience(tmp_path):
    ks.initialised_state(tmp_path / "s")
    impatient = StateDir(tmp_path / "s", lock_wait_s=0.05)
    with (
        StateDir(tmp_path / "s").lock(),
        pytest.raises(Busy, match="held the state directory"),
        impatient.lock(),
    ):
        pass


# The table of return codes


@pytest.mark.parametrize(
    ("code", "act", "kind", "words"),
    [
        (0x99D, Act.UNSEAL, KeyRefused, "platform state"),
        (0x128, Act.UNSEAL, KeyRefused, "PCR changed"),
        (0x921, Act.PIN, LockedOut, "locked out"),
        (0x921, Act.UNSEAL, LockedOut, "locked out"),
        (0x98E, Act.UNSEAL, KeyRefused, "storage key pinned"),
        (0x1C4, Act.UNSEAL, KeyRefused, "present state"),
        (0x2DB, Act.UNSEAL, KeyRefused, "does not verify"),
        (0x126, Act.PIN, KeyRefused, "revoked"),
        (0x9A2, Act.UNSEAL, KeyRefused, "storage key pinned"),
        (0x9A2, Act.LOAD, KeyRefused, "storage key pinned"),
        (0x9A2, Act.PROVISION, TpmUnavailable, "owner hierarchy"),
        (0x9A2, Act.COUNTER, KeyRefused, "NV counter"),
        (0x1DF, Act.LOAD, KeyRecordDamaged, "altered"),
        (0x1D5, Act.LOAD, KeyRecordDamaged, "altered"),
        (0x902, Act.LOAD, TpmUnavailable, "no room for another object"),
        (0x903, Act.SEAL, TpmUnavailable, "no room for another session"),
        (0x910, Act.UNSEAL, TpmUnavailable, "reset"),
        (0x918, Act.UNSEAL, TpmUnavailable, "reset"),
        (0x100, Act.OPEN, TpmUnavailable, "not started"),
        (0x18B, Act.COUNTER, KeyRefused, "cleared"),
        (0x14A, Act.COUNTER, TpmUnavailable, "never written"),
        (0x14B, Act.PROVISION, TpmUnavailable, "full"),
        (0x14C, Act.PROVISION, TpmUnavailable, "taken"),
        (0xA000A, Act.OPEN, TpmUnavailable, "does not answer"),
        (0xA0015, Act.OPEN, TpmUnavailable, "no such kind"),
        (0x70007, Act.SEAL, TpmUnavailable, "does not answer"),
        (0x7001B, Act.UNSEAL, TpmUnavailable, "altered"),
        (0x922, Act.SEAL, TpmUnavailable, "busy"),
        (0x90A, Act.SEAL, TpmUnavailable, "busy"),
        (0x920, Act.COUNTER, TpmUnavailable, "busy"),
        (0xB0902, Act.LOAD, TpmUnavailable, "no room"),
        (0x12345, Act.SEAL, TpmUnavailable, "could not seal"),
    ],
)
def test_each_return_code_has_its_error(code, act, kind, words):
    error = tpm_errors.error_of(code, act, "web1")
    assert type(error) is kind
    assert words in str(error)
    assert f"{code:#x}" in str(error)
    assert isinstance(error, KeyServiceError)


def test_a_busy_tpm_is_asked_again(tmp_path):
    ks.initialised_state(tmp_path / "s")
    cc_create = 0x153
    # ESAPI itself submits five times, so this takes a second try of ours.
    service = ks.wrapped_service(tmp_path / "s", lambda c: ks.BusyTpm(c, cc_create, times=8))
    assert service.create("web1").vm_id == "web1"


def test_a_cleared_tpm_is_called_that(tmp_path):
    with ks.standing_tpm() as standing:
        ks.fresh_state(tmp_path / "s", tpm=standing.spec)
        service = KeyService.open(tmp_path / "s")
        service.create("web1")
        with standing.esapi() as esapi:
            esapi.clear(ESYS_TR.LOCKOUT)
        for use in (
            lambda: service.unseal("web1", "web1"),
            lambda: KeyService.open(tmp_path / "s").unseal("web1", "web1"),
            lambda: service.create("web2"),
        ):
            with pytest.raises(KeyRefused, match="was cleared since") as caught:
                use()
            assert "recovery key" in str(caught.value)


def test_another_tpm_is_called_that(tmp_path):
    with ks.standing_tpm() as one, ks.standing_tpm() as two:
        ks.fresh_state(tmp_path / "s", tpm=one.spec)
        ks.fresh_state(tmp_path / "t", tpm=two.spec)
        KeyService.open(tmp_path / "s").create("web1")
        with pytest.raises(KeyRefused, match="not the TPM of init"):
            KeyService.open(tmp_path / "s", tpm=two.spec).unseal("web1", "web1")
        assert KeyService.open(tmp_path / "s").unseal("web1", "web1").vm_id == "web1"


def test_the_trace_helpers_can_see_encoded_keys():
    # Positive control for `appearances`, so that an empty log cannot pass for a clean one.
    key = hashlib.sha256(b"k").digest()
    assert appearances(key, [b"..." + key + b"..."]) == 1
    assert appearances(key, [base64.b64encode(key)]) == 0


class FatalChannel:
    """Kill -9 of the TPM's user while the TPM works on the n-th command."""

    def __init__(self, channel, at: int) -> None:
        self._channel = channel
        self._left = at

    def transmit(self, command: bytes) -> None:
        self._left -= 1
        self._channel.transmit(command)
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def receive(self, wait_s):
        return self._channel.receive(wait_s)


@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_user_killed_in_the_middle_of_a_command_does_not_block_the_next(tmp_path, at):
    ks.initialised_state(tmp_path / "s")
    child = os.fork()
    if child == 0:
        ks.wrapped_service(tmp_path / "s", lambda c: FatalChannel(c, at)).create("web1")
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    started = time.monotonic()
    KeyService.open(tmp_path / "s").create("web2").wipe()
    assert time.monotonic() - started < 5
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            assert (process / "cwd").readlink() != tmp_path / "s/tpm"


class InterruptedChannel:
    """Ctrl-C while the TPM works on the n-th command."""

    def __init__(self, channel, at: int) -> None:
        self._channel = channel
        self._left = at

    def transmit(self, command: bytes) -> None:
        self._channel.transmit(command)

    def receive(self, wait_s):
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt
        return self._channel.receive(wait_s)


@pytest.mark.parametrize("at", [1, 5, 12])
def test_an_interrupt_ends_the_use_and_is_not_lost_in_the_library(tmp_path, capfd, at):
    ks.initialised_state(tmp_path / "s")
    service = ks.wrapped_service(tmp_path / "s", lambda c: InterruptedChannel(c, at))
    with pytest.raises(KeyboardInterrupt):
        service.create("web1")
    assert not service.has("web1")
    KeyService.open(tmp_path / "s").create("web1").wipe()
    assert capfd.readouterr() == ("", "")
