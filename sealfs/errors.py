"""Every exception sealfs raises on purpose.

An error carries its facts as attributes and builds its own sentence: what failed, on which
object, what was expected and what was found. It never carries key material. What to do about
it (hints, exit codes, errno) is decided where it is shown: `cli/errors.py`, `mount/errno.py`.
`ValueError` and `AssertionError` mean a bug in sealfs, never bad input.
"""

from __future__ import annotations


class SealfsError(Exception):
    """Base of all; `subject` is the object concerned (a path, a VM id), `detail` the sentence."""

    def __init__(self, subject: object, detail: str) -> None:
        super().__init__(subject, detail)
        self.subject = str(subject)
        self.detail = detail

    def __str__(self) -> str:
        return f'"{self.subject}": {self.detail}'


class UsageError(SealfsError):
    """The caller asked for something that makes no sense: a size, a name, an option."""


class FormatError(SealfsError):
    """Bytes that are not a sealed image, a key record..., or a version this sealfs cannot read."""


class IntegrityError(SealfsError):
    """Bytes that do not authenticate: damaged, or altered outside sealfs."""


class BlockDamaged(IntegrityError):
    """One block of an image does not authenticate; the others are not concerned."""

    def __init__(self, subject: object, block: int, detail: str) -> None:
        super().__init__(subject, f"block {block} {detail}")
        self.block = block


class StorageFailed(SealfsError):
    """A write or a sync of the storage failed; the image is poisoned until it is reopened.

    After a failed sync the kernel calls the pages clean and nothing can be concluded from
    reading them, so nothing more is acknowledged; recovery at the next open decides from
    what the disk really holds.
    """


class RolledBack(SealfsError):
    """An image older than what this host has seen of it."""


class ForeignImage(SealfsError):
    """An authentic image that is not the one registered under this path."""


class KeyServiceError(SealfsError):
    """Base of what the key service refuses."""


class KeyNotFound(KeyServiceError):
    """No key record for this VM on this host."""


class KeyRefused(KeyServiceError):
    """The TPM or the record's policy refuses to give the key (PCR, other TPM, revoked)."""


class KeyRecordDamaged(KeyServiceError):
    """A key record, the registry or the host record was altered, swapped or damaged."""


class RecoveryRefused(KeyServiceError):
    """The recovery key does not open this slot, or is mistyped."""


class TpmUnavailable(KeyServiceError):
    """No TPM answers; `code` is the TPM return code where there is one."""

    def __init__(self, subject: object, detail: str, code: int | None = None) -> None:
        if code is not None:
            detail = f"{detail} (TPM return code {code:#x})"
        super().__init__(subject, detail)
        self.code = code


class HostNotInitialised(KeyServiceError):
    """The state directory holds no host record."""


class Busy(SealfsError):
    """Somebody else holds the image, the mount point or the state directory."""


class NotFound(SealfsError):
    """No such image, VM file or mount."""


class AlreadyExists(SealfsError):
    """The name is taken."""


class NoSpace(SealfsError):
    """The storage, or a table of the image, is full; the write was not accepted."""


class ReadOnly(SealfsError):
    """A write to an image or mount that was opened for reading."""
