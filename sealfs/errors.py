"""Every exception sealfs raises on purpose.

An error carries its facts as attributes and builds its own sentence: what failed, on which
object, what was expected and what was found. It never carries key material. What to do about
it (hints, exit codes, errno) is decided where it is shown: `cli/errors.py`, `mount/errno.py`,
both of which import this module; it imports nothing.
`ValueError` and `AssertionError` mean a bug in sealfs, never bad input.

A class's first sentence is for users: `tools/error-table` puts it into README's table.
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
    """What was asked for makes no sense: a size, a name, an option, a place."""


class FormatError(SealfsError):
    """Not a sealed image or key record, or one of a version or feature this sealfs lacks."""


class IntegrityError(SealfsError):
    """The image does not authenticate: damaged, or altered outside sealfs."""


class BlockDamaged(IntegrityError):
    """A block does not authenticate; the other blocks are not concerned."""

    def __init__(self, subject: object, block: int, detail: str) -> None:
        super().__init__(subject, f"block {block} {detail}")
        self.block = block


class StorageFailed(SealfsError):
    """The storage, or a tool, failed; an image takes nothing more until it is opened again.

    After a failed sync the kernel calls the pages clean and nothing can be concluded from
    reading them, so nothing more is acknowledged; recovery at the next open decides from
    what the disk really holds.
    """


class RolledBack(SealfsError):
    """An older image, or state directory, than this host has seen; or a fork of it."""


class ForeignImage(SealfsError):
    """An authentic image, but not the one that is registered under this path."""


class KeyServiceError(SealfsError):
    """The key service cannot do it; the base of its other errors."""


class KeyNotFound(KeyServiceError):
    """This host has no key for the VM."""


class KeyGone(KeyServiceError):
    """The VM's key was revoked, or moved to another host."""


class KeyRefused(KeyServiceError):
    """The TPM refuses the key: it is another one or was cleared, or a PCR changed."""


class NotAllowed(KeyRefused):
    """The VM is not allowed on the network."""


class PinNeeded(KeyRefused):
    """The VM's key opens with a PIN only, and none was given."""


class WrongPin(KeyRefused):
    """The PIN is wrong; the TPM counts these.

    `tries_left` says how many more are let through, None where nobody counts.
    """

    tries_left: int | None = None

    def __init__(self, subject: object, tries_left: int | None) -> None:
        left = {None: "", 1: "; 1 try is left"}.get(tries_left, f"; {tries_left} tries are left")
        super().__init__(subject, f"the PIN is wrong{left}")
        self.tries_left = tries_left


class LockedOut(KeyRefused):
    """The TPM takes no PIN for now: after wrong ones it waits, and forgives one by one."""


class KeyRecordDamaged(KeyServiceError):
    """A key record, the registry, the ledger or the host record was altered or damaged."""


class RecoveryRefused(KeyServiceError):
    """The recovery key is mistyped, or another one than the image's."""


class TpmUnavailable(KeyServiceError):
    """No TPM answers, or it is in trouble.

    `code` is the TPM return code where there is one.
    """

    def __init__(self, subject: object, detail: str, code: int | None = None) -> None:
        if code is not None:
            detail = f"{detail} (TPM return code {code:#x})"
        super().__init__(subject, detail)
        self.code = code


class KeydUnavailable(KeyServiceError):
    """`sealfs keyd` does not answer, or not to this user."""


class HostNotInitialised(KeyServiceError):
    """This host was not set up: the state directory holds no host record."""


class Busy(SealfsError):
    """Somebody else has the image, the mount point or the state directory."""


class NotFound(SealfsError):
    """No such image, file, directory, mount or tool."""


class AlreadyExists(SealfsError):
    """The name is taken, or the image is registered elsewhere."""


class NoSpace(SealfsError):
    """The storage, or a table of sealfs, is full; the write was not accepted."""


class ReadOnly(SealfsError):
    """A write to what may only be read: permissions, `ro`, an image that is being read."""
