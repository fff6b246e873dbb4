"""The key of a VM whose first image is made: the options that say how, and its making."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sealfs.cli.errors import warn
from sealfs.cli.protecting import Wanted, protection_options
from sealfs.errors import AlreadyExists, UsageError
from sealfs.keys.records import VM_KEY_SIZE, PolicyKind
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.making import SlotKind
    from sealfs.keys.origins import KeyOrigin, KmiKind
    from sealfs.keys.protection import Protection
    from sealfs.keys.service import KeyService

STDIN = "-"

F = TypeVar("F", bound=Callable[..., Any])
NewKeyOf = Callable[[], "NewKey"]


@dataclass(frozen=True, slots=True)
class NewKey:
    """How a VM's key is made if it has none. `file`: where the console's is, `-` for stdin."""

    kmi: KmiKind
    protection: Protection
    origin: KeyOrigin
    file: str | None
    slot: SlotKind

    @property
    def is_special(self) -> bool:
        """Whether anything but a PIN was asked for that concerns new keys only."""
        asked = self.protection.policy & ~PolicyKind.PIN
        return bool(asked) or (self.kmi, self.origin, self.slot) != ("vm-id", "mixed", "tpm")

    def wipe(self) -> None:
        """Forget the PIN."""
        if self.protection.pin is not None:
            wipe(self.protection.pin)


def new_key_options(command: F) -> F:
    """Add the options; the command gets `new_key`, which asks for a PIN when called."""
    for option in (
        click.option(
            "--slot",
            type=click.Choice(["tpm", "software"]),
            default="tpm",
            show_default=True,
            help="For a new key: protected by the TPM, or by this service, which the TPM protects.",
        ),
        click.option(
            "--key-file",
            metavar="FILE",
            help="With --key-from console: 64 bytes; - is standard input.",
        ),
        click.option(
            "--key-from",
            "key_origin",
            type=click.Choice(["mixed", "console", "service", "tpm"]),
            default="mixed",
            show_default=True,
            help="For a new key: who makes it; mixed is TPM and kernel together.",
        ),
        click.option(
            "--kmi",
            type=click.Choice(["vm-id", "service", "tpm", "opaque"]),
            default="vm-id",
            show_default=True,
            help="For a new key: find it by the VM id, or by a random identifier made by the "
            "service (opaque is the same) or the TPM.",
        ),
    ):
        command = option(command)

    @functools.wraps(command)
    def wrapper(
        *settings: Any,
        kmi: KmiKind,
        wanted: Wanted,
        key_origin: KeyOrigin,
        key_file: str | None,
        slot: SlotKind,
        **arguments: Any,
    ) -> Any:
        def new_key() -> NewKey:
            return NewKey(kmi, wanted(), key_origin, key_file, slot)

        return command(*settings, new_key=new_key, **arguments)

    return protection_options(wrapper)  # type: ignore[return-value]


def key_for(keys: KeyService, vm_id: str, wanted: NewKey) -> tuple[VmKey, bool]:
    """Return the VM's key, and whether it was made now.

    Raises:
        AlreadyExists: the console hands in a key for a VM that has one.
        UsageError, KeyServiceError: from the key service.
    """
    try:
        return _create(keys, vm_id, wanted), True
    except AlreadyExists:
        if wanted.origin == "console":
            raise
    pin = wanted.protection.pin
    vm_key = keys.ensure(vm_id, pin=pin)
    if wanted.is_special:
        warn(
            f'VM "{vm_id}" has a key already, which stays as it is; --pcrs, --signed-policy, '
            "--kmi, --key-from and --slot are for new keys"
        )
    elif pin is not None and _opens_without_pin(keys, vm_id):
        warn(
            f'VM "{vm_id}" has a key already, which opens without a PIN; '
            "`sealfs key reseal` gives it one"
        )
    return vm_key, False


def _create(keys: KeyService, vm_id: str, wanted: NewKey) -> VmKey:
    handed_in = console_key(wanted)
    asks = wanted.protection
    try:
        return keys.create(
            vm_id, kmi=wanted.kmi, pcrs=asks.pcrs, pin=asks.pin, signer=asks.signer,
            origin=wanted.origin, handed_in=handed_in, slot=wanted.slot,
        )  # fmt: skip
    finally:
        if handed_in is not None:
            wipe(handed_in)


def console_key(wanted: NewKey) -> bytearray | None:
    """Read the key that the console hands in; it never stands in an argument.

    Raises:
        UsageError: `--key-file` without the console's key, or the other way round.
    """
    if (wanted.origin == "console") != (wanted.file is not None):
        raise UsageError("--key-file", "goes with --key-from console, and that needs it")
    if wanted.file is None:
        return None
    key, size = bytearray(VM_KEY_SIZE + 1), 0
    source = sys.stdin.fileno() if wanted.file == STDIN else wanted.file
    # Unbuffered, into a buffer that is wiped.
    with open(source, "rb", buffering=0, closefd=wanted.file != STDIN) as file:
        while size < len(key) and (count := file.readinto(memoryview(key)[size:])):
            size += count
    return key[:size]


def _opens_without_pin(keys: KeyService, vm_id: str) -> bool:
    return any(
        slot.kind != "recovery" and "pin" not in slot.policy
        for record in keys.records()
        if record.vm_id == vm_id
        for slot in record.slots
    )
