"""A new VM key in place of the old one, while images are rewrapped one by one.

The new key's record stands beside the old one (`HASH.next`) from before the first image is
rewrapped until after the last; as long as it does, an image's key is looked for under both
(`KeyService.image_key`) and new images are made under the new one. Which images there are, and how
their identities are written, is the caller's business: see `Rotation`.

A VM is locked, as `records.vm_lock_name`, by whoever changes its key, so that no image is made
meanwhile under a key that is about to go.

Concurrency: a rotation belongs to one thread; the locks are those of `statedir`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from sealfs.errors import (
    Busy,
    KeyRefused,
    KeyServiceError,
    LockedOut,
    TpmUnavailable,
    WrongPin,
)
from sealfs.keys import records, recovery
from sealfs.keys.host import Host, mixed_random
from sealfs.keys.opening import Opening
from sealfs.keys.permissions import Permissions
from sealfs.keys.records import KeyRecord, Origin, PolicyKind
from sealfs.keys.statedir import HeldLock, ImageLock
from sealfs.keys.vault import Vault
from sealfs.keys.vmkey import VmKey, wipe

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm


class LocksImages(Protocol):
    """Whoever can lock an image by its uuid."""

    def lock_image(self, subject: object, image_uuid: bytes, *, shared: bool) -> ImageLock: ...


@contextlib.contextmanager
def making_image(keys: LocksImages, subject: object, vm_id: str) -> Iterator[None]:
    """Keep a VM's key as it is while an image is made under it, until that is registered.

    Raises:
        Busy: the key is being changed.
    """
    try:
        lock = keys.lock_image(subject, records.vm_lock_name(vm_id), shared=True)
    except Busy:
        raise Busy(subject, f'the key of VM "{vm_id}" is being changed: try again') from None
    try:
        yield
    finally:
        lock.close()


@contextlib.contextmanager
def changing_key(keys: LocksImages, vm_id: str) -> Iterator[None]:
    """Keep images of a VM from being made while its key is changed.

    Raises:
        Busy: an image is being made, or another command changes the key.
    """
    try:
        lock = keys.lock_image(vm_id, records.vm_lock_name(vm_id), shared=False)
    except Busy:
        raise Busy(
            vm_id, "an image of this VM is being made, or its key is being changed: try again"
        ) from None
    try:
        yield
    finally:
        lock.close()


class Rotation:
    """One change of a VM's key: `begin`, `rewrap` for each image, `finish`.

    Killed in between, `begin` takes up the key that was made, and `rewrap` the images that are
    left. Owns both keys and the PIN; `close` wipes them.

    The new key is sealed as the old one was: a slot for each of the old one's on this TPM, to its
    PCRs as they are now, its signer, and the one PIN that is asked for.
    """

    def __init__(
        self, host: Host, vault: Vault, opening: Opening, permissions: Permissions, vm_id: str
    ) -> None:
        self._host = host
        self._vault = vault
        self._opening = opening
        self._permissions = permissions
        self._vm_id = vm_id
        self.pin: bytearray | None = None
        """The VM's, once `begin` has asked for it and the TPM took it; to be lent only."""
        self._old: VmKey | None = None
        self._new: VmKey | None = None
        self._refused: KeyServiceError | None = None
        self.is_finished = False
        self.dropped: tuple[str, ...] = ()
        """Recovery keys, by fingerprint, that the new key is not wrapped to: only their name is
        known (slots of version 1)."""

    def close(self) -> None:
        """Wipe both keys and the PIN."""
        for key in (self._old, self._new):
            if key is not None:
                key.wipe()
        if self.pin is not None:
            wipe(self.pin)

    @property
    def recovery_slots(self) -> tuple[bytes, ...]:
        """The new key's, for the identities of its images."""
        return self._begun.recovery_slots

    @property
    def kmi(self) -> str:
        """The VM's, which stays."""
        return self._begun.kmi

    def begin(self) -> None:
        """Make the new key, or take up the one that was made; its record is durable on return.

        Where a slot takes a PIN, it is asked for first.

        Raises:
            KeyNotFound: the VM has no key here.
            PinNeeded: nobody is there to be asked for its PIN.
            Busy: its policy was changed in this moment.
            WrongPin, LockedOut, KeyRefused, KeyRecordDamaged, TpmUnavailable: as by unsealing;
                KeyRefused also where a slot of the new key would not open as the host is now.
        """
        # Not under the state lock: people take their time.
        if self._takes_pin(self._vault.known_of_vm(self._vm_id)):
            self.pin = self._opening.pin_of(self._vm_id)
        with self._host.state.lock() as held, self._host.tpm_under(held) as tpm:
            record = self._vault.known_of_vm(self._vm_id)
            if self._takes_pin(record) != (self.pin is not None):
                raise Busy(self._vm_id, "its key was resealed just now: try again")
            pending = self._vault.read_pending(record.kmi)
            try:
                self._old = self._open(record, tpm)
            except (TpmUnavailable, WrongPin, LockedOut):
                raise
            except KeyServiceError as error:
                # The new one may do: every image may be rewrapped already.
                if pending is None:
                    raise
                self._refused = error
            if pending is not None:
                self._new = self._open(pending, tpm)
            else:
                self._new = self._successor(record, tpm, held)
        kept = {recovery.recipient_of(slot)[0] for slot in self._new.recovery_slots}
        names = (recovery.recipient_of(slot)[0] for slot in record.recovery_slots)
        self.dropped = tuple(name for name in names if name not in kept)

    def image_key(self, image_uuid: bytes, wrapped: bytes) -> bytearray:
        """Return an image's key, wrapped under the new or the old VM key; the caller wipes it.

        Raises:
            KeyRefused: wrapped under neither.
        """
        try:
            return self._begun.unwrap_image_key(image_uuid, wrapped)
        except KeyRefused:
            if self._old is None:
                raise self._refused or AssertionError("begin comes first") from None
        return self._old.unwrap_image_key(image_uuid, wrapped)

    def rewrap(self, image_uuid: bytes, wrapped: bytes) -> bytes:
        """Return an image's key wrapped under the new VM key; one that is already, as it is.

        Raises:
            KeyRefused: wrapped under neither key.
        """
        with contextlib.suppress(KeyRefused):
            wipe(self._begun.unwrap_image_key(image_uuid, wrapped))
            return wrapped
        key = self.image_key(image_uuid, wrapped)
        try:
            return self._begun.wrap_image_key(image_uuid, key)
        finally:
            wipe(key)

    def finish(self) -> None:
        """Put the new key's record in the place of the old one, which is gone; durable on return.

        Only when every image of the VM is rewrapped. What the VM is allowed stays allowed.
        """
        state, kmi = self._host.state, self._begun.kmi
        self._permissions.rekey(self._old, self._begun)
        # Crash here: both records stand, and what was given with the old key is with each.
        with state.lock() as held:
            # Crash here: both records stand, and every image opens by the new one.
            state.rename(state.pending_file(kmi), state.record_file(kmi), held)
        self._opening.unlocked.replace(self._begun)
        self.is_finished = True
        # Crash here: besides, permissions of a key that nobody has any more.
        self._permissions.settle(self._begun)

    @property
    def _begun(self) -> VmKey:
        if self._new is None:
            raise AssertionError("begin comes first")
        return self._new

    def _takes_pin(self, record: KeyRecord) -> bool:
        return any(slot.policy & PolicyKind.PIN for slot in self._vault.own_slots(record))

    def _open(self, record: KeyRecord, tpm: Tpm) -> VmKey:
        """Return the key of a record; the PIN is proved by it, as it is to seal the new key."""
        return self._vault.open_record(record, tpm, self.pin, by_pin=self.pin is not None)

    def _successor(self, record: KeyRecord, tpm: Tpm, held: HeldLock) -> VmKey:
        """Make a key with the policy and the recovery recipients of an authentic record."""
        own = self._host.record.recipient
        raw_key = mixed_random(tpm, records.VM_KEY_SIZE)
        key = VmKey(raw_key, vm_id=record.vm_id, kmi=record.kmi, recovery_slots=())
        try:
            slots = []
            for slot in record.recovery_slots:
                name, recipient = recovery.recipient_of(slot)
                if recipient is None and own and name == recovery.fingerprint(own).hex():
                    recipient = own
                if recipient is not None:
                    with key.secret() as secret:
                        slots.append(recovery.wrap(secret, recipient, vm_id=key.vm_id, kmi=key.kmi))
            key.recovery_slots = tuple(slots)
            self._vault.add_own_recipient(key)
            # Crash in here: no pending record, and the VM is as it was.
            self._vault.protect(
                key,
                Origin.MIXED,
                self._vault.own_protections(record, self.pin),
                tpm,
                held,
                is_pending=True,
                is_software=bool(record.software_slot),
            )
        except BaseException:
            key.wipe()
            raise
        return key
