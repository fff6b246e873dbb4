"""The key room's bytes: anything either decodes to itself or is refused with a typed error."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sealfs.errors import (
    FormatError,
    KeyRecordDamaged,
    KeyRefused,
    RecoveryRefused,
    UsageError,
)
from sealfs.keys import labels, pin, policy, records, recovery, reports, signed, wire
from sealfs.keys.enrolment import HostId, Package, PackedImage
from sealfs.keys.hostrecord import (
    HostRecord,
    RecoveryKind,
    SealedObject,
    StorageKeyKind,
    StorageKeyPin,
    host_payload,
    open_host_payload,
)
from sealfs.keys.ledger import AUDIT_ID, REGISTRY_ID, Progress
from sealfs.keys.records import KeyRecord, Origin, PolicyKind, TpmSlot
from sealfs.keys.registry import RegistryEntry, RegistryFile
from sealfs.keys.signed import Limit, SignedPolicy
from sealfs.keys.tombstone import Tombstone, Why
from sealfs.keys.vmkey import VmKey

NAME = bytes(range(34))
SEALED = SealedObject(b"public" * 8, b"private" * 20)
RECORD = KeyRecord(
    kmi="web1",
    vm_id="web1",
    created=1_700_000_000,
    origin=Origin.MIXED,
    tpm_slots=(
        TpmSlot(PolicyKind.NONE, (), (), NAME, SEALED),
        TpmSlot(PolicyKind.PCRS, (0, 7, 23), (b"a" * 32, b"b" * 32, b"c" * 32), NAME, SEALED),
        TpmSlot(
            PolicyKind.PIN | PolicyKind.SIGNED, (), (), NAME, SEALED, b"signer" * 14, b"reference"
        ),
    ),
    recovery_slots=(b"one" * 40, b"two" * 40),
    software_slot=b"software" * 15,
).with_mac(b"k" * 32)
OLD_RECORD = dataclasses.replace(
    RECORD, version=1, tpm_slots=RECORD.tpm_slots[:2], software_slot=b""
).with_mac(b"k" * 32)
VERSION_1 = "3cbf6aab4fd7642c9043fd28430fc25a163c5700cf635d5524daaec23000eabe"
"""SHA-256 of OLD_RECORD as the code of commit 5d5f1a8 encoded it."""
VERSION_2 = "404fa379003fdf02642b12c87721017dff9fda7e1298d1410b55aa659f900d64"
"""SHA-256 of RECORD, with every policy and a software slot."""
SIGNER = ec.derive_private_key(0x1234567, ec.SECP256R1())
RSA_SIGNER = rsa.generate_private_key(65537, 2048)
LIMIT = Limit(0x01800002, b"l" * 32, 17)
SIGNED = signed.sign(SIGNER, (0, 7), (b"a" * 32, b"b" * 32), LIMIT)
PIN = StorageKeyPin(StorageKeyKind.PERSISTENT, NAME, b"p" * 92, b"h" * 136)
HOST = HostRecord(
    bytes(16), 1_700_000_000, "swtpm", PIN, SEALED, 0x01800001, RecoveryKind.HOST, b"r" * 32
).with_mac(b"k" * 32)
REGISTRY = RegistryFile(
    bytes(16),
    (RegistryEntry("/a/\udcff.sealed", b"u" * 16, "web1"), RegistryEntry("/b", b"v" * 16, "ü/..")),
).with_mac(b"k" * 32)
RECIPIENT = X25519PrivateKey.from_private_bytes(b"\x42" * 32)
SLOT = recovery.wrap(bytearray(b"K" * 64), recovery.public_of(RECIPIENT), vm_id="web1", kmi="web1")

PLAIN_RECORD = KeyRecord("k", "web1", 1_700_000_000, Origin.CONSOLE, (), ()).with_mac(b"k" * 32)
HOST_ID = HostId(b"h" * 16, b"p" * 92)
PACKAGE = Package(
    True, b"a" * 16, b"b" * 16, NAME, 1_700_000_000, "k", "web1", b"public" * 8, b"duplicate" * 20,
    b"seed" * 17, (SLOT,), (PackedImage(b"u" * 16, "/a/\udcff.sealed", Progress(7, b"m" * 16)),),
).with_mac(b"k" * 32)  # fmt: skip
TOMBSTONE = Tombstone(Why.MOVED, "k", "web1", 1_700_000_000, b"b" * 16)

DECODERS = {
    "record": (KeyRecord, RECORD.encode()),
    "record of version 1": (KeyRecord, OLD_RECORD.encode()),
    "signed policy": (SignedPolicy, SIGNED.encode()),
    "signed policy without a limit": (
        SignedPolicy,
        signed.sign(RSA_SIGNER, (23,), (b"c" * 32,), None).encode(),
    ),
    "host": (HostRecord, HOST.encode()),
    "registry": (RegistryFile, REGISTRY.encode()),
    "slot": (recovery.RecoverySlot, SLOT),
    "record without a slot": (KeyRecord, PLAIN_RECORD.encode()),
    "host id": (HostId, HOST_ID.encode()),
    "package": (Package, PACKAGE.encode()),
    "tombstone": (Tombstone, TOMBSTONE.encode()),
}


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoded_file_encodes_to_the_same_bytes(name):
    kind, raw = DECODERS[name]
    assert kind.decode(raw, "x").encode() == raw


@pytest.mark.parametrize("name", DECODERS)
def test_every_truncation_and_every_appended_byte_is_refused(name):
    kind, raw = DECODERS[name]
    for size in range(len(raw)):
        with pytest.raises((FormatError, KeyRecordDamaged)):
            kind.decode(raw[:size], "x")
    with pytest.raises(KeyRecordDamaged):
        kind.decode(raw + b"\0", "x")


@pytest.mark.parametrize("name", DECODERS)
def test_an_unknown_version_or_magic_is_a_format_error(name):
    kind, raw = DECODERS[name]
    with pytest.raises(FormatError, match="format version 9"):
        kind.decode(raw[:8] + b"\0\x09" + raw[10:], "x")
    with pytest.raises(FormatError, match="not a"):
        kind.decode(b"X" + raw[1:], "x")


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_bytes_decode_to_themselves_or_are_refused(name, data):
    kind, good = DECODERS[name]
    raw = bytearray(good)
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    candidates = [bytes(raw), bytes(raw[:cut]) + data.draw(st.binary(max_size=64))]
    for candidate in candidates:
        try:
            decoded = kind.decode(candidate, "x")
        except (FormatError, KeyRecordDamaged):
            continue
        assert decoded.encode() == candidate


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=400))
def test_random_bytes_behind_each_magic_are_refused_or_decode(raw):
    for kind, good in DECODERS.values():
        with contextlib.suppress(FormatError, KeyRecordDamaged):
            kind.decode(good[:10] + raw, "x")


def test_the_mac_of_a_record_covers_every_bit():
    raw = RECORD.encode()
    refused = 0
    for position in range(len(raw)):
        altered = bytearray(raw)
        altered[position] ^= 1
        try:
            decoded = KeyRecord.decode(bytes(altered), "x")
        except (FormatError, KeyRecordDamaged):
            refused += 1
            continue
        assert not decoded.is_authentic(b"k" * 32)
    assert refused
    assert KeyRecord.decode(raw, "x").is_authentic(b"k" * 32)


def test_the_mac_of_host_record_and_registry_covers_every_bit():
    for kind, raw in (DECODERS["host"], DECODERS["registry"]):
        for position in range(len(raw)):
            altered = bytearray(raw)
            altered[position] ^= 0x80
            try:
                decoded = kind.decode(bytes(altered), "x")
            except (FormatError, KeyRecordDamaged):
                continue
            if kind is RegistryFile:
                assert not decoded.is_authentic(b"k" * 32)
            else:
                with pytest.raises(KeyRecordDamaged, match="does not authenticate"):
                    decoded.verify(b"k" * 32, "x")


def test_the_mac_of_a_package_covers_every_bit():
    good = PACKAGE.encode()
    assert Package.decode(good, "x").is_authentic(b"k" * 32)
    for bit in range(0, len(good) * 8, 5):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        try:
            decoded = Package.decode(bytes(raw), "x")
        except (FormatError, KeyRecordDamaged):
            continue
        assert not decoded.is_authentic(b"k" * 32)


@pytest.mark.parametrize("reserved", [REGISTRY_ID, AUDIT_ID])
def test_no_package_speaks_for_the_registry_or_the_audit_log(reserved):
    image = dataclasses.replace(PACKAGE.images[0], image_uuid=reserved)
    raw = dataclasses.replace(PACKAGE, images=(image,)).with_mac(b"k" * 32).encode()
    with pytest.raises(KeyRecordDamaged, match="a uuid that no image has"):
        Package.decode(raw, "x")


def test_no_two_labels_are_the_same():
    values = [value for name, value in vars(labels).items() if isinstance(value, bytes)]
    assert len(set(values)) == len(values) > 20


def test_too_many_slots_are_refused():
    many = KeyRecord("a", "a", 0, Origin.MIXED, (), (b"s",) * 9)
    with pytest.raises(KeyRecordDamaged, match="9 recovery slots"):
        KeyRecord.decode(many.encode(), "x")
    many = KeyRecord("a", "a", 0, Origin.MIXED, RECORD.tpm_slots * 2, ())
    with pytest.raises(KeyRecordDamaged, match="6 TPM slots"):
        KeyRecord.decode(many.encode(), "x")


def test_a_full_record_fits_its_limit():
    slot = TpmSlot(
        PolicyKind.PCRS | PolicyKind.PIN | PolicyKind.SIGNED,
        tuple(range(24)),
        (bytes(32),) * 24,
        NAME,
        SealedObject(bytes(256), bytes(512)),
        bytes(512),
        bytes(64),
    )
    full = KeyRecord(
        "k" * 255, "v" * 255, 2**63, Origin.MIXED, (slot,) * 4, (bytes(512),) * 8,
        software_slot=bytes(512),
    )  # fmt: skip
    assert KeyRecord.decode(full.encode(), "x") == full


def test_a_record_of_version_1_is_what_the_first_version_wrote():
    raw = OLD_RECORD.encode()
    # Read otherwise, these bytes would lock people out.
    assert hashlib.sha256(raw).hexdigest() == VERSION_1
    assert KeyRecord.decode(raw, "x") == OLD_RECORD
    assert OLD_RECORD.is_authentic(b"k" * 32)
    position = raw.index(b"a" * 32) - 4
    assert raw[position] == PolicyKind.PCRS
    for later in (PolicyKind.PIN, PolicyKind.SIGNED, 8):
        with pytest.raises(FormatError, match="unknown policy"):
            KeyRecord.decode(raw[:position] + bytes([later]) + raw[position + 1 :], "x")


def test_a_record_of_version_2_has_policies_and_a_software_slot():
    raw = RECORD.encode()
    assert hashlib.sha256(raw).hexdigest() == VERSION_2
    assert KeyRecord.decode(raw, "x") == RECORD
    assert raw.endswith(b"\0\x78" + b"software" * 15 + RECORD.mac)


def test_a_slot_whose_policy_and_fields_do_not_fit_is_refused():
    slot = RECORD.tpm_slots[2]
    for wrong in (
        dataclasses.replace(slot, policy=PolicyKind.PIN),
        dataclasses.replace(slot, policy=PolicyKind.PCRS),
        dataclasses.replace(slot, signer=b""),
    ):
        raw = dataclasses.replace(RECORD, tpm_slots=(wrong,)).encode()
        with pytest.raises((FormatError, KeyRecordDamaged)):
            KeyRecord.decode(raw, "x")


# Signed policies and PINs


def test_a_signed_policy_verifies_and_any_altered_byte_does_not():
    for name in ("signed policy", "signed policy without a limit"):
        kind, raw = DECODERS[name]
        kind.decode(raw, "x").verify("x")
        for position in range(len(raw)):
            altered = bytearray(raw)
            altered[position] ^= 1
            with pytest.raises((FormatError, KeyRecordDamaged)):
                kind.decode(bytes(altered), "x").verify("x")


def pem(key) -> bytes:
    return key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def private_pem(key, passphrase: bytes | None = None) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(passphrase)
        if passphrase
        else serialization.NoEncryption(),
    )


def test_a_signer_is_read_from_pem():
    for key in (SIGNER, RSA_SIGNER):
        public = signed.read_public(pem(key.public_key()), "f")
        assert len(public) == {SIGNER: 86, RSA_SIGNER: 278}[key]
        assert signed.public_key_of(public, "f") == key.public_key()
        assert len(signed.fingerprint(public)) == 32
        again = signed.read_private(private_pem(key), None, "f")
        assert signed.signer_of(again.public_key()) == public
        locked = private_pem(key, b"pass")
        assert signed.read_private(locked, None, "f") is None
        assert signed.read_private(locked, b"pass", "f") is not None
        with pytest.raises(UsageError, match="passphrase is another"):
            signed.read_private(locked, b"word", "f")
        with pytest.raises(UsageError, match="has no passphrase"):
            signed.read_private(private_pem(key), b"pass", "f")
    for weak in (
        ec.generate_private_key(ec.SECP384R1()),
        RECIPIENT,
    ):
        with pytest.raises(UsageError, match="P-256 or RSA-2048"):
            signed.read_public(pem(weak.public_key()), "f")
        with pytest.raises(UsageError, match="P-256 or RSA-2048"):
            signed.read_private(private_pem(weak), None, "f")
    for wrong in (b"", b"rubbish", private_pem(SIGNER)):
        with pytest.raises(UsageError, match="not a public key"):
            signed.read_public(wrong, "f")
    with pytest.raises(UsageError, match="not a private key"):
        signed.read_private(pem(SIGNER.public_key()), None, "f")


def test_pins_are_checked_and_never_repeated_in_a_message():
    assert pin.pin_of("1234\n") == b"1234"
    assert pin.pin_of("u\u0308ber lang\r\n") == "\u00fcber lang".encode()
    for wrong in ("", "123", "9" * 129, "secret\t1", "secret\0", "\ud800" * 4):
        with pytest.raises(UsageError) as caught:
            pin.pin_of(wrong)
        assert "secret" not in str(caught.value)
        assert "999" not in str(caught.value)


def test_one_pin_is_another_authorisation_for_each_vm():
    with (
        pin.authorisation(bytearray(b"1234"), records.binding("a", "a")) as one,
        pin.authorisation(bytearray(b"1234"), records.binding("b", "b")) as other,
    ):
        assert len(one) == 32
        assert one != other
        kept = one
    assert kept == bytes(32)


@pytest.mark.parametrize("text", ["", "a\0b", "a\nb", "x" * 256, "ü" * 128, "\ud800", "a\u2028b"])
def test_identifiers_that_cannot_be_stored_are_a_usage_error(text):
    with pytest.raises(UsageError):
        wire.check_identifier(text, "VM id")


@pytest.mark.parametrize(
    "text", ["a", "../../etc", "-rf", " ", "100/disk", "ü" * 127, "虚拟机", "."]
)
def test_identifiers_that_people_use_are_accepted(text):
    wire.check_identifier(text, "VM id")


def test_no_two_pairs_of_vm_id_and_kmi_share_a_binding():
    pairs = [
        ("a", "bc"),
        ("ab", "c"),
        ("abc", ""),
        ("", "abc"),
        ("bc", "a"),
        ("a", "b"),
        ("b", "a"),
    ]
    assert len({records.binding(*pair) for pair in pairs}) == len(pairs)


def test_a_payload_opens_for_its_own_vm_only():
    payload = records.vm_payload("web1", "web1", b"K" * 64)
    assert len(payload) <= 128
    assert records.open_vm_payload(payload, "web1", "web1") == b"K" * 64
    for vm_id, kmi in (("web2", "web1"), ("web1", "web2")):
        with pytest.raises(KeyRecordDamaged, match="swapped"):
            records.open_vm_payload(payload, vm_id, kmi)
    with pytest.raises(KeyRecordDamaged):
        records.open_vm_payload(payload[:-1], "web1", "web1")


def test_a_host_payload_opens_for_its_own_host_only():
    payload = host_payload(b"h" * 16, b"s" * 64)
    assert len(payload) <= 128
    assert open_host_payload(payload, b"h" * 16, "x") == b"s" * 64
    with pytest.raises(KeyRecordDamaged):
        open_host_payload(payload, b"g" * 16, "x")


def test_labels_are_different_and_none_is_the_start_of_another():
    table = [value for name, value in vars(labels).items() if name.isupper()]
    assert len(table) > 10
    for one in table:
        assert sum(other.startswith(one) for other in table) == 1


def test_pcr_lists_are_checked():
    assert policy.check_pcrs([7, 0]) == (0, 7)
    for wrong in ([24], [-1], [3, 3]):
        with pytest.raises(UsageError):
            policy.check_pcrs(wrong)


# The printed recovery key


def test_a_printed_key_reads_back_whatever_its_case_and_separators():
    text = recovery.format_private(RECIPIENT)
    raw = RECIPIENT.private_bytes_raw()
    assert len(text.split("-")) == 9
    for variant in (
        text,
        text.upper(),
        text.replace("-", ""),
        text.replace("-", " \n "),
        f"  {text}\r\n",
        text.replace("-", "\u2013"),
    ):
        assert recovery.parse_private(variant).private_bytes_raw() == raw


def test_every_single_wrong_letter_and_every_swap_of_neighbours_is_noticed():
    text = recovery.format_private(RECIPIENT).replace("-", "")
    for position, letter in enumerate(text):
        other = "b" if letter != "b" else "c"
        with pytest.raises(RecoveryRefused, match="checksum"):
            recovery.parse_private(text[:position] + other + text[position + 1 :])
    for position in range(len(text) - 1):
        if text[position] == text[position + 1]:
            continue
        swapped = list(text)
        swapped[position : position + 2] = swapped[position + 1], swapped[position]
        with pytest.raises(RecoveryRefused):
            recovery.parse_private("".join(swapped))


def test_the_message_about_a_typo_says_where_and_not_what():
    text = recovery.format_private(RECIPIENT)
    with pytest.raises(RecoveryRefused, match="letter 10 ") as caught:
        recovery.parse_private(text[:10] + "x" + text[11:])
    with pytest.raises(RecoveryRefused, match="71 letters, 72 are expected") as missing:
        recovery.parse_private(text[:-1])
    for error in (caught, missing):
        assert text[:8] not in str(error.value)
    for empty in ("", "   ", "-----BEGIN nonsense"):
        with pytest.raises(RecoveryRefused):
            recovery.parse_private(empty)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=120))
def test_any_text_as_a_recovery_key_is_read_or_refused(text):
    with contextlib.suppress(RecoveryRefused):
        recovery.parse_private(text)


def test_an_organisation_key_is_read_from_pem_or_digits():
    public = RECIPIENT.public_key()
    raw = public.public_bytes_raw()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert recovery.parse_public(pem, "f") == raw
    assert recovery.parse_public(raw.hex().encode() + b"\n", "f") == raw
    private_pem = RECIPIENT.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    assert (
        recovery.parse_private(private_pem.decode()).private_bytes_raw()
        == RECIPIENT.private_bytes_raw()
    )
    bad = [b"", b"zz", raw, bytes(32).hex().encode(), private_pem, raw.hex().encode() + b"00"]
    for wrong in bad:
        with pytest.raises(UsageError):
            recovery.parse_public(wrong, "f")


# Recovery slots


def test_a_slot_opens_for_its_recipient_and_its_vm_only():
    def open_slots(slots, private=RECIPIENT, vm_id="web1", kmi="web1"):
        return recovery.unwrap(slots, private, vm_id=vm_id, kmi=kmi)

    assert open_slots([SLOT]) == b"K" * 64
    assert open_slots([b"rubbish", SLOT]) == b"K" * 64
    with pytest.raises(RecoveryRefused, match="the slots are for"):
        open_slots([SLOT], private=X25519PrivateKey.from_private_bytes(b"\x43" * 32))
    with pytest.raises(KeyRecordDamaged, match="another VM"):
        open_slots([SLOT], vm_id="web2")
    with pytest.raises(KeyRecordDamaged, match="another VM"):
        open_slots([SLOT], kmi="web2")
    for nothing in ([], [b"", b"rubbish"]):
        with pytest.raises(RecoveryRefused, match="no recovery slot"):
            open_slots(nothing)


def test_a_slot_with_any_byte_altered_does_not_open():
    for position in range(len(SLOT)):
        altered = bytearray(SLOT)
        altered[position] ^= 1
        with pytest.raises((RecoveryRefused, KeyRecordDamaged)):
            recovery.unwrap([bytes(altered)], RECIPIENT, vm_id="web1", kmi="web1")


SLOT_VERSION_1 = bytes.fromhex(
    "5345414c465300570001f2c4861971c0e3ca01ff5ab9a26985c71cbcaf9c9c886b92ada0d76c1508e5c0"
    "f25dfc41126ab9f99de268d3c067b59c35bf4eedba852b6c438bc8695369d0e0edc14f8cc4a40c6f0412"
    "0e1cbc4f3c5148506dd8852e62cdebf4b2e4d4855736536444a443a5cf3da9ae42f23a27032165cddda7"
    "7ae83b0a642d68ef9b91331ddd17007fccedbfd001c7f44b1be9e0652c3d91e3c0de2985678fdf4e6bcf3e9a"
)
"""Made by sealfs 5d5f1a8, the last to write version 1, with RECIPIENT and the same key."""


def test_a_slot_of_version_1_still_opens_and_names_no_public_key():
    assert recovery.unwrap([SLOT_VERSION_1], RECIPIENT, vm_id="web1", kmi="web1") == b"K" * 64
    assert recovery.RecoverySlot.decode(SLOT_VERSION_1, "x").encode() == SLOT_VERSION_1
    name = recovery.fingerprint(recovery.public_of(RECIPIENT)).hex()
    assert recovery.recipient_of(SLOT_VERSION_1) == (name, None)
    assert recovery.recipient_of(SLOT) == (name, recovery.public_of(RECIPIENT))
    assert recovery.recipient_of(b"rubbish") == ("?", None)


def test_a_slot_relabelled_for_another_vm_does_not_open():
    forged = recovery.RecoverySlot.decode(SLOT, "x")
    forged = recovery.RecoverySlot(
        forged.recipient_fingerprint,
        records.binding("web2", "web2"),
        forged.wrapped,
        forged.recipient,
    )
    with pytest.raises(KeyRecordDamaged):
        recovery.unwrap([forged.encode()], RECIPIENT, vm_id="web2", kmi="web2")


def test_reports_name_a_slot_by_its_recipient():
    expected = recovery.fingerprint(recovery.public_of(RECIPIENT)).hex()
    assert reports.recipient_text(SLOT) == expected


# The VM key and the image keys under it


def make_key(fill: bytes = b"K", vm_id: str = "web1", kmi: str = "web1") -> VmKey:
    return VmKey(bytearray(fill * 64), vm_id=vm_id, kmi=kmi, recovery_slots=())


def test_an_image_key_opens_for_its_image_and_vm_only():
    uuid, image_key = b"u" * 16, b"I" * 32
    wrapped = make_key().wrap_image_key(uuid, image_key)
    opened = make_key().unwrap_image_key(uuid, wrapped)
    assert isinstance(opened, bytearray)
    assert opened == image_key
    for key, image in (
        (make_key(), b"v" * 16),
        (make_key(b"L"), uuid),
        (make_key(vm_id="web2"), uuid),
        (make_key(kmi="web2"), uuid),
    ):
        with pytest.raises(KeyRefused):
            key.unwrap_image_key(image, wrapped)
    for position in range(len(wrapped)):
        altered = bytearray(wrapped)
        altered[position] ^= 1
        with pytest.raises(KeyRefused):
            make_key().unwrap_image_key(uuid, bytes(altered))
    for wrong in (b"", wrapped[:-1], wrapped + b"\0"):
        with pytest.raises(KeyRefused):
            make_key().unwrap_image_key(uuid, wrong)


def test_wrapping_twice_gives_different_bytes():
    key = make_key()
    assert len({key.wrap_image_key(bytes(16), bytes(32)) for _ in range(100)}) == 100


def test_a_wiped_key_is_zeros_and_of_no_use():
    buffer = bytearray(b"K" * 64)
    with VmKey(buffer, vm_id="a", kmi="a", recovery_slots=()) as key:
        key.wrap_image_key(bytes(16), bytes(32))
    assert buffer == bytes(64)
    with pytest.raises(ValueError, match="wiped"):
        key.wrap_image_key(bytes(16), bytes(32))
    with pytest.raises(ValueError, match="wiped"), key.secret():
        pass


def test_a_forgotten_key_wipes_itself():
    buffer = bytearray(b"K" * 64)
    key = VmKey(buffer, vm_id="a", kmi="a", recovery_slots=())
    del key
    assert buffer == bytes(64)


def test_a_key_is_neither_pickled_nor_copied_nor_shown():
    import copy
    import pickle

    key = make_key()
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError):
            take(key)
    assert "KKKK" not in repr(key) + str(key)
    assert "4b4b" not in repr(key) + str(key)
