"""The structures sealfs gives to a TPM, written out: their bytes enter Names, and so the pins.

No convenience constructor of the library is used; what it fills in may change with its version.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpm2_pytss.constants import TPM2_ALG, TPM2_ECC, TPM2_NT, TPMA_NV, TPMA_OBJECT
from tpm2_pytss.types import (
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPML_PCR_SELECTION,
    TPMS_ECC_PARMS,
    TPMS_KEYEDHASH_PARMS,
    TPMS_NV_PUBLIC,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_KEYEDHASH_SCHEME,
    TPMT_PUBLIC,
    TPMT_SIGNATURE,
    TPMT_SYM_DEF,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_PARMS,
    TPMU_SYM_KEY_BITS,
    TPMU_SYM_MODE,
)

from sealfs.keys import policy

COUNTER_SIZE = policy.COUNTER_SIZE


def storage_template() -> Any:
    """The storage root key template (TCG EK profile, H-ECC P-256), written out: it is in the Name.

    Deterministic: TPM2_CreatePrimary gives the same key until the owner seed changes.
    """
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.ECC,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=TPMA_OBJECT.FIXEDTPM
            | TPMA_OBJECT.FIXEDPARENT
            | TPMA_OBJECT.SENSITIVEDATAORIGIN
            | TPMA_OBJECT.USERWITHAUTH
            | TPMA_OBJECT.NODA
            | TPMA_OBJECT.RESTRICTED
            | TPMA_OBJECT.DECRYPT,
            parameters=TPMU_PUBLIC_PARMS(
                eccDetail=TPMS_ECC_PARMS(
                    symmetric=TPMT_SYM_DEF_OBJECT(
                        algorithm=TPM2_ALG.AES,
                        keyBits=TPMU_SYM_KEY_BITS(aes=128),
                        mode=TPMU_SYM_MODE(aes=TPM2_ALG.CFB),
                    ),
                    scheme=TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL),
                    curveID=TPM2_ECC.NIST_P256,
                    kdf=TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL),
                )
            ),
        )
    )


def own_name(public: bytes) -> bytes:
    """Return the Name that this key would have, had it been made from our template."""
    found, _ = TPM2B_PUBLIC.unmarshal(public)
    expected = storage_template()
    if found.publicArea.type == TPM2_ALG.ECC:
        unique = found.publicArea.unique.ecc
        expected.publicArea.unique.ecc.x = bytes(unique.x)
        expected.publicArea.unique.ecc.y = bytes(unique.y)
    return bytes(expected.get_name())


def is_storage_key(public: bytes) -> bool:
    """Whether a public area is one that objects can be sealed under."""
    found, _ = TPM2B_PUBLIC.unmarshal(public)
    wanted = int(TPMA_OBJECT.RESTRICTED | TPMA_OBJECT.DECRYPT | TPMA_OBJECT.FIXEDTPM)
    return int(found.publicArea.objectAttributes) & wanted == wanted


def sealed_template(policy_digest: bytes, *, has_pin: bool = False) -> Any:
    """A KEYEDHASH object that holds data (TPM 2.0 Part 1 §27.6.2).

    Without a policy its (empty) auth value opens it. NODA unless it has a PIN: only a wrong PIN
    may count against the dictionary attack limit.
    """
    attributes = TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT
    if not has_pin:
        attributes |= TPMA_OBJECT.NODA
    if not policy_digest:
        attributes |= TPMA_OBJECT.USERWITHAUTH
    return TPM2B_PUBLIC(
        publicArea=TPMT_PUBLIC(
            type=TPM2_ALG.KEYEDHASH,
            nameAlg=TPM2_ALG.SHA256,
            objectAttributes=attributes,
            authPolicy=policy_digest,
            parameters=TPMU_PUBLIC_PARMS(
                keyedHashDetail=TPMS_KEYEDHASH_PARMS(
                    scheme=TPMT_KEYEDHASH_SCHEME(scheme=TPM2_ALG.NULL)
                )
            ),
        )
    )


def duplicable_template() -> Any:
    """A sealed object that another TPM made, or software; its `unique` is still to be set.

    As `sealed_template` without a policy, but neither FIXEDTPM nor FIXEDPARENT: TPM2_Import
    refuses those. It is opened once, and sealed anew.
    """
    template = sealed_template(b"")
    template.publicArea.objectAttributes = TPMA_OBJECT.NODA | TPMA_OBJECT.USERWITHAUTH
    return template


def null_cipher() -> Any:
    """No inner wrapper, for TPM2_Import."""
    return TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)


def counter_public(index: int, label: bytes = b"") -> Any:
    """An NV counter that only its own authorisation reads and increments.

    Not ORDERLY: that saves wear, but after an unclean stop the value jumps ahead. `label` stands
    where a policy would, and so in its Name; no attribute lets anybody use it as one.
    """
    return TPM2B_NV_PUBLIC(
        nvPublic=TPMS_NV_PUBLIC(
            nvIndex=index,
            nameAlg=TPM2_ALG.SHA256,
            attributes=TPMA_NV.AUTHREAD
            | TPMA_NV.AUTHWRITE
            | TPMA_NV.NO_DA
            | (TPM2_NT.COUNTER << TPMA_NV.TPM2_NT_SHIFT),
            authPolicy=label,
            dataSize=COUNTER_SIZE,
        )
    )


def signer_public(signer: bytes) -> Any:
    """A signer's public area, as TPM2_LoadExternal takes it."""
    return TPM2B_PUBLIC.unmarshal(len(signer).to_bytes(2, "big") + signer)[0]


def signature_of(raw: bytes) -> Any:
    """A marshalled signature."""
    return TPMT_SIGNATURE.unmarshal(raw)[0]


def session_cipher() -> Any:
    """AES-128-CFB for parameter encryption; every TPM 2.0 has it (PC Client profile §4.4)."""
    return TPMT_SYM_DEF(
        algorithm=TPM2_ALG.AES,
        keyBits=TPMU_SYM_KEY_BITS(sym=128),
        mode=TPMU_SYM_MODE(sym=TPM2_ALG.CFB),
    )


def pcr_selection(pcrs: Sequence[int]) -> Any:
    """The PCRs of the SHA-256 bank."""
    selection, _ = TPML_PCR_SELECTION.unmarshal(policy.pcr_selection(pcrs))
    return selection
