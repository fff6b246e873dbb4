"""A payload wrapped in software to another TPM's storage key (TPM 2.0 Part 1, "Duplication").

Only the TPM that holds the private part can import the result. An owner of tpm2_pytss beside `tpm`:
nothing here asks a TPM.
"""

from __future__ import annotations

import hashlib
import os
from typing import Final, NamedTuple

from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC
from tpm2_pytss.types import (
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE,
    TPMT_SENSITIVE,
    TPMU_PUBLIC_ID,
    TPMU_SENSITIVE_COMPOSITE,
)
from tpm2_pytss.utils import wrap

from sealfs.errors import UsageError
from sealfs.keys import tpm_templates

OBFUSCATION_SIZE: Final = 32
"""seedValue of a KEYEDHASH object: as long as the digest of its nameAlg."""


class Duplicate(NamedTuple):
    """What TPM2_Import takes; TPM2B structures, marshalled."""

    public: bytes
    duplicate: bytes
    seed: bytes


def check_storage_key(public: bytes, subject: object) -> None:
    """Refuse a public area that nothing can be wrapped to safely.

    That it lives in a TPM, a person vouches for, by comparing its fingerprint.

    Raises:
        UsageError: not a storage key of ECC P-256 or RSA-2048 with AES-128 or -256 in CFB mode.
    """
    try:
        key, size = TPM2B_PUBLIC.unmarshal(public)
    except Exception as error:  # the library raises its own and Python's, by how it is malformed
        raise UsageError(subject, "its storage key is malformed") from error
    area = key.publicArea
    symmetric = area.parameters.asymDetail.symmetric
    is_ecc = area.type == TPM2_ALG.ECC and area.parameters.eccDetail.curveID == TPM2_ECC.NIST_P256
    is_rsa = area.type == TPM2_ALG.RSA and area.parameters.rsaDetail.keyBits >= 2048
    if not (
        size == len(public)
        and (is_ecc or is_rsa)
        and area.nameAlg == TPM2_ALG.SHA256
        and symmetric.algorithm == TPM2_ALG.AES
        and symmetric.mode.sym == TPM2_ALG.CFB
        and tpm_templates.is_storage_key(public)
    ):
        raise UsageError(subject, "its storage key is not one that a VM key is wrapped to")


def wrap_to(storage_public: bytes, payload: bytes | bytearray) -> Duplicate:
    """Return a payload of at most 128 bytes, wrapped to a storage key (outer wrapper only).

    The seed of the outer wrapper is fresh for each call (ephemeral ECDH or OAEP), so its AES-CFB
    key, derived from that seed and the object's name, encrypts this one message under a zero IV.

    Args:
        storage_public: a TPM2B_PUBLIC that `check_storage_key` has accepted.
        payload: what the other TPM is to seal; the caller wipes it.
    """
    parent, _ = TPM2B_PUBLIC.unmarshal(storage_public)
    obfuscation = os.urandom(OBFUSCATION_SIZE)
    # TPM 2.0 Part 1 §27.5.3.3: unique of a KEYEDHASH object; TPM2_Import checks it.
    unique = hashlib.sha256(obfuscation + payload).digest()
    public = tpm_templates.duplicable_template()
    public.publicArea.unique = TPMU_PUBLIC_ID(keyedHash=unique)
    sensitive = TPM2B_SENSITIVE(
        sensitiveArea=TPMT_SENSITIVE(
            sensitiveType=TPM2_ALG.KEYEDHASH,
            seedValue=obfuscation,
            sensitive=TPMU_SENSITIVE_COMPOSITE(bits=bytes(payload)),
        )
    )
    _, duplicate, seed = wrap(parent.publicArea, public, sensitive)
    return Duplicate(bytes(public.marshal()), bytes(duplicate.marshal()), bytes(seed.marshal()))
