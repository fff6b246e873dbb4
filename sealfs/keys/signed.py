"""Signed policies: PCR values that the owner of an offline key approves, as a file to hand out.

Pure. A signed policy says: whoever signed it accepts these PCR values, on any TPM, or with a
revocation counter on one host until its counter passes a value. It is public; a slot that trusts
the signer opens by it (TPM 2.0 Part 3 TPM2_PolicyAuthorize). The digest that was signed is not
stored but computed from what stands here, so a file cannot say one thing and approve another.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.hashes import SHA256

from sealfs.errors import KeyRecordDamaged, UsageError
from sealfs.keys import labels, policy, wire
from sealfs.keys.records import PCR_VALUE_SIZE, POLICY_REF_SIZE_MAX, SIGNER_SIZE_MAX

SIGNED_VERSION: Final = 1
SIGNED_SIZE_MAX: Final = 4 * 1024
"""24 PCR values, an RSA-2048 key and its signature take about 1.5 KiB."""
SIGNATURE_SIZE_MAX: Final = 300
LABEL_SIZE: Final = 32
KEY_FILE_SIZE_MAX: Final = 16 * 1024

# TPM 2.0 Part 2 §6.3, §6.4, §8.3
ALG_RSA: Final = 0x0001
ALG_NULL: Final = 0x0010
ALG_RSASSA: Final = 0x0014
ALG_ECDSA: Final = 0x0018
ALG_ECC: Final = 0x0023
CURVE_P256: Final = 0x0003
SIGNER_ATTRIBUTES: Final = 0x00040040
"""TPMA_OBJECT: sign, userWithAuth. They are in the key's Name, and so in every slot's policy."""
RSA_BITS: Final = 2048
"""What every TPM can verify (PC Client profile); the same holds for P-256."""
P256_SIZE: Final = 32

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Limit:
    """Until when a signature holds: a host's counter is at most `value`.

    `label` (32 bytes) is the host's; with `index` it makes the counter's Name, which is signed.
    """

    index: int
    label: bytes
    value: int

    @property
    def name(self) -> bytes:
        """The counter's Name."""
        return policy.name_of(policy.counter_public(self.index, self.label))


@dataclass(frozen=True, slots=True)
class SignedPolicy:
    """One approved state. `signer` is a TPMT_PUBLIC, `signature` a TPMT_SIGNATURE."""

    signer: bytes
    policy_ref: bytes
    pcrs: tuple[int, ...]
    pcr_values: tuple[bytes, ...]
    limit: Limit | None
    signature: bytes

    @property
    def approved(self) -> bytes:
        """The policy digest that is approved: PolicyPCR, then PolicyNV where there is a limit."""
        return approved_digest(self.pcrs, self.pcr_values, self.limit)

    def encode(self) -> bytes:
        limit = self.limit
        return b"".join(
            (
                labels.SIGNED_POLICY_MAGIC,
                wire.number(SIGNED_VERSION, 2),
                wire.counted(self.signer),
                wire.counted(self.policy_ref),
                wire.number(sum(1 << pcr for pcr in self.pcrs), 3),
                *self.pcr_values,
                wire.number(limit is not None, 1),
                *(
                    (wire.number(limit.index, 4), limit.label, wire.number(limit.value, 8))
                    if limit is not None
                    else ()
                ),
                wire.counted(self.signature),
            )
        )

    @classmethod
    def decode(cls, raw: bytes, subject: str) -> Self:
        """Parse a signed policy; its signature is not checked yet.

        Raises:
            FormatError: not a signed policy, or of another version.
            KeyRecordDamaged: anything else that is wrong with the bytes.
        """
        reader = wire.Reader(raw, subject)
        reader.magic(labels.SIGNED_POLICY_MAGIC, "signed policy")
        reader.version(SIGNED_VERSION, "the signed policy")
        signer = reader.counted(SIGNER_SIZE_MAX, 1)
        policy_ref = reader.counted(POLICY_REF_SIZE_MAX)
        bitmap = reader.number(3)
        if not bitmap:
            reader.damaged("it names no PCR")
        pcrs = tuple(pcr for pcr in range(policy.PCR_COUNT) if bitmap >> pcr & 1)
        values = tuple(reader.take(PCR_VALUE_SIZE) for _ in pcrs)
        has_limit = reader.number(1)
        if has_limit > 1:
            reader.damaged("a flag that is neither yes nor no")
        limit = None
        if has_limit:
            limit = Limit(reader.number(4), reader.take(LABEL_SIZE), reader.number(8))
        signature = reader.counted(SIGNATURE_SIZE_MAX, 1)
        reader.finish()
        return cls(signer, policy_ref, pcrs, values, limit, signature)

    def verify(self, subject: str) -> None:
        """Check the signature under the key that stands in the policy itself.

        Raises:
            KeyRecordDamaged: it does not verify, or key or signature have no known form.
        """
        message = self.approved + self.policy_ref
        key = public_key_of(self.signer, subject)
        reader = wire.Reader(self.signature, subject)
        scheme, digest = reader.number(2), reader.number(2)
        expected = ALG_RSASSA if isinstance(key, rsa.RSAPublicKey) else ALG_ECDSA
        if (scheme, digest) != (expected, policy.ALG_SHA256):
            reader.damaged("its signature has an unknown form")
        try:
            if isinstance(key, rsa.RSAPublicKey):
                made = reader.counted(RSA_BITS // 8, RSA_BITS // 8)
                reader.finish()
                key.verify(made, message, padding.PKCS1v15(), SHA256())
            else:
                r, s = (
                    int.from_bytes(reader.counted(P256_SIZE, P256_SIZE), "big") for _ in range(2)
                )
                reader.finish()
                key.verify(encode_dss_signature(r, s), message, ec.ECDSA(SHA256()))
        except InvalidSignature:
            raise KeyRecordDamaged(
                subject, "its signature does not verify: it was altered, or signed by another key"
            ) from None


def approved_digest(pcrs: Sequence[int], values: Sequence[bytes], limit: Limit | None) -> bytes:
    """Return the policy digest that a signer approves."""
    digest = policy.pcr_policy(pcrs, values)
    if limit is not None:
        digest = policy.counter_policy(limit.name, limit.value, before=digest)
    return digest


def sign(
    key: PrivateKey, pcrs: tuple[int, ...], values: tuple[bytes, ...], limit: Limit | None
) -> SignedPolicy:
    """Sign PCR values, ascending (TPM 2.0 Part 3 TPM2_PolicyAuthorize: aHash, then signed)."""
    policy_ref = labels.SIGNED_POLICY_REF
    message = approved_digest(pcrs, values, limit) + policy_ref
    if isinstance(key, rsa.RSAPrivateKey):
        made = key.sign(message, padding.PKCS1v15(), SHA256())
        signature = _numbers(ALG_RSASSA, policy.ALG_SHA256, len(made)) + made
    else:
        r, s = decode_dss_signature(key.sign(message, ec.ECDSA(SHA256())))
        signature = (
            _numbers(ALG_ECDSA, policy.ALG_SHA256, P256_SIZE)
            + r.to_bytes(P256_SIZE, "big")
            + _numbers(P256_SIZE)
            + s.to_bytes(P256_SIZE, "big")
        )
    return SignedPolicy(signer_of(key.public_key()), policy_ref, pcrs, values, limit, signature)


def signer_of(key: PublicKey) -> bytes:
    """Return the public area of a signer (TPMT_PUBLIC, TPM 2.0 Part 2 §12.2.4), written out."""
    kind = ALG_RSA if isinstance(key, rsa.RSAPublicKey) else ALG_ECC
    head = (
        _numbers(kind, policy.ALG_SHA256)
        + SIGNER_ATTRIBUTES.to_bytes(4, "big")
        + _numbers(0)  # no policy of its own
        + _numbers(ALG_NULL, ALG_NULL)  # symmetric, scheme
    )
    if isinstance(key, rsa.RSAPublicKey):
        modulus = key.public_numbers().n.to_bytes(RSA_BITS // 8, "big")
        # An exponent of 0 stands for 65537 (Part 2 §12.2.3.5).
        return head + _numbers(RSA_BITS) + bytes(4) + wire.counted(modulus)
    numbers = key.public_numbers()
    return (
        head
        + _numbers(CURVE_P256, ALG_NULL)  # curve, key derivation
        + wire.counted(numbers.x.to_bytes(P256_SIZE, "big"))
        + wire.counted(numbers.y.to_bytes(P256_SIZE, "big"))
    )


def public_key_of(signer: bytes, subject: str) -> PublicKey:
    """Return the key of a public area that `signer_of` wrote.

    Raises:
        KeyRecordDamaged: it is none.
    """
    key: PublicKey | None = None
    if signer[:2] == _numbers(ALG_RSA):
        modulus = int.from_bytes(signer[-RSA_BITS // 8 :], "big")
        with contextlib.suppress(ValueError):  # no modulus
            key = rsa.RSAPublicNumbers(65537, modulus).public_key()
    else:
        x, y = signer[-2 * P256_SIZE - 2 : -P256_SIZE - 2], signer[-P256_SIZE:]
        numbers = ec.EllipticCurvePublicNumbers(
            int.from_bytes(x, "big"), int.from_bytes(y, "big"), ec.SECP256R1()
        )
        with contextlib.suppress(ValueError):  # not on the curve
            key = numbers.public_key()
    if key is None or not _is_usable(key) or signer_of(key) != signer:
        raise KeyRecordDamaged(subject, "its signer is no key that sealfs knows")
    return key


def fingerprint(signer: bytes) -> str:
    """Return what people compare a signer by: 32 hexadecimal digits of its Name."""
    return policy.name_of(signer)[2:18].hex()


def read_public(raw: bytes, subject: str) -> bytes:
    """Return the public area of a signer's key in PEM.

    Raises:
        UsageError: no public key, or not P-256 or RSA-2048.
    """
    try:
        key = serialization.load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(subject, "is not a public key in PEM") from None
    if not _is_usable(key):
        raise UsageError(subject, "is not a P-256 or RSA-2048 key, which every TPM can verify")
    assert isinstance(key, PublicKey)
    return signer_of(key)


def read_private(raw: bytes, passphrase: bytes | None, subject: str) -> PrivateKey | None:
    """Return a signer's private key in PEM, None where it wants a passphrase.

    Raises:
        UsageError: no private key, a wrong passphrase, or not P-256 or RSA-2048.
    """
    try:
        key = serialization.load_pem_private_key(raw, passphrase)
    except TypeError:
        if passphrase is None:
            return None
        raise UsageError(subject, "has no passphrase, and one was given") from None
    except (ValueError, UnsupportedAlgorithm):
        wrong = "is not a private key in PEM" + (
            ", or its passphrase is another" if passphrase else ""
        )
        raise UsageError(subject, wrong) from None
    if not isinstance(key, PrivateKey) or not _is_usable(key.public_key()):
        raise UsageError(subject, "is not a P-256 or RSA-2048 key, which every TPM can verify")
    return key


def policy_id(raw: bytes) -> str:
    """Return what a signed policy is stored and named by."""
    return hashlib.sha256(raw).hexdigest()[:32]


def _is_usable(key: object) -> bool:
    if isinstance(key, rsa.RSAPublicKey):
        return key.key_size == RSA_BITS and key.public_numbers().e == 65537
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def _numbers(*values: int) -> bytes:
    return b"".join(value.to_bytes(2, "big") for value in values)
