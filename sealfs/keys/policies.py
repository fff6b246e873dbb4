"""The signed policies of this host: added, listed, chosen for a slot, revoked.

`STATE/policies/ID.policy`, one file each, named by a hash of its bytes. They are public and prove
themselves by their signature; which signer opens which key stands in the key's slot alone. So
whoever writes into this directory can keep a key from opening, and open none.

The revocation counter is an NV counter of the host, made when it is first asked for. Its index is
drawn from the host id, its Name holds the host's label: a signature up to a value of it holds on
this host only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sealfs.errors import FormatError, KeyRefused, KeyServiceError, NoSpace, TpmUnavailable
from sealfs.keys import labels, signed
from sealfs.keys.host import Host
from sealfs.keys.hostrecord import NV_INDEX_FIRST, NV_INDEX_LAST
from sealfs.keys.records import TpmSlot
from sealfs.keys.signed import SIGNED_SIZE_MAX, Limit, SignedPolicy
from sealfs.keys.statedir import POLICIES_DIRECTORY, POLICY_SUFFIX

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

POLICY_COUNT_MAX: Final = 64
"""Each is looked at when a key with a signed policy opens; 1.5 KiB and 0.1 ms each."""
INDEX_TRIES: Final = 16
"""Of four million indexes; a TPM holds a few hundred at most."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """A signed policy that this host has. `problem` says why it does not hold now, if so."""

    id: str
    signer: str
    pcrs: tuple[int, ...]
    valid_until: int | None
    problem: str | None

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Revocation:
    """What a revocation did: the counter's new value, the policies that ended, those that cannot.

    `unlimited` were signed without a counter: nothing ends them but another signer in the slot.
    """

    value: int
    ended: tuple[str, ...]
    unlimited: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


class Policies:
    """The signed policies of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._state = host.state

    def add(self, raw: bytes, subject: str) -> str:
        """Store a signed policy after checking its signature; durable on return.

        Returns:
            Its id; the same for the same file again.

        Raises:
            FormatError, KeyRecordDamaged: no signed policy, or its signature does not verify.
            NoSpace: this host has as many as it takes.
        """
        SignedPolicy.decode(raw, subject).verify(subject)
        name = signed.policy_id(raw)
        with self._state.lock() as held:
            there = self._state.policy_names()
            file = f"{POLICIES_DIRECTORY}/{name}{POLICY_SUFFIX}"
            if len(there) >= POLICY_COUNT_MAX and file not in there:
                raise NoSpace(
                    self._state.path / POLICIES_DIRECTORY,
                    f"has {len(there)} signed policies, the most there may be; remove old ones",
                )
            self._state.make_room(POLICIES_DIRECTORY)
            self._state.write(file, raw, held)
        return name

    def reports(self) -> list[PolicyReport]:
        """Describe every signed policy, as it stands to this host's TPM now."""
        with self._host.tpm() as tpm:
            counter = self.counter(tpm)
            found = [
                PolicyReport(
                    name,
                    signed.fingerprint(policy.signer),
                    policy.pcrs,
                    None if policy.limit is None else policy.limit.value,
                    _problem(policy, counter, tpm),
                )
                for name, policy in self._stored()
            ]
        return sorted(found, key=lambda report: (report.signer, report.id))

    def fitting(self, slot: TpmSlot, tpm: Tpm, subject: str) -> SignedPolicy:
        """Return a signed policy that opens a slot now.

        Raises:
            KeyRefused: none does; says what is wrong with those of its signer.
        """
        problems = []
        counter = self.counter(tpm)
        for name, policy in self._stored():
            if (policy.signer, policy.policy_ref) != (slot.signer, slot.policy_ref):
                continue
            problem = _problem(policy, counter, tpm)
            if problem is None:
                return policy
            problems.append(f"{name}: {problem}")
        raise KeyRefused(
            subject,
            f"no signed policy of {signed.fingerprint(slot.signer)} fits this host as it is"
            + (f" ({'; '.join(problems)})" if problems else "; none was added"),
        )

    def revoke(self) -> Revocation:
        """Add one to the revocation counter and remove the policies that ended by it.

        Crash in between: they have ended; the next revocation removes them.
        """
        with self._state.lock() as held:
            with self._host.tpm_under(held) as tpm:
                limit = self._made_counter(tpm)
                with self._host.nv_authorisation() as auth:
                    tpm.counter_increment(limit.index, auth)
                    value = tpm.counter_value(limit.index, auth)
            ended, unlimited = [], []
            for name, policy in self._stored():
                if policy.limit is None:
                    unlimited.append(name)
                elif policy.limit.name == limit.name and policy.limit.value < value:
                    ended.append(name)
                    self._state.remove(f"{POLICIES_DIRECTORY}/{name}{POLICY_SUFFIX}", held)
        return Revocation(value, tuple(ended), tuple(unlimited))

    def made_counter(self) -> Limit:
        """Return the revocation counter at its present value, made if there is none."""
        with self._state.lock() as held, self._host.tpm_under(held) as tpm:
            return self._made_counter(tpm)

    def counter(self, tpm: Tpm) -> Limit | None:
        """Return the revocation counter at its present value, None where it was never made."""
        for limit in self._places():
            name = tpm.counter_name(limit.index)
            if name is None:
                return None
            if name == limit.name:
                with self._host.nv_authorisation() as auth:
                    return Limit(limit.index, limit.label, tpm.counter_value(limit.index, auth))
        return None

    def _made_counter(self, tpm: Tpm) -> Limit:
        there = self.counter(tpm)
        if there is not None:
            return there
        for limit in self._places():
            with self._host.nv_authorisation() as auth:
                # Its first value is above that of every counter this TPM had and lost.
                if tpm.counter_define(limit.index, auth, limit.label):
                    return Limit(limit.index, limit.label, tpm.counter_value(limit.index, auth))
        raise TpmUnavailable(self._host.record.tpm, f"none of {INDEX_TRIES} NV indexes is free")

    def _places(self) -> Iterator[Limit]:
        """Where the counter may be: the first index that nobody else had."""
        label = hashlib.sha256(labels.REVOCATION_COUNTER + self._host.record.host_id).digest()
        for number in range(INDEX_TRIES):
            drawn = hashlib.sha256(label + bytes([number])).digest()
            spread = NV_INDEX_LAST - NV_INDEX_FIRST + 1
            yield Limit(NV_INDEX_FIRST + int.from_bytes(drawn[:4], "big") % spread, label, 0)

    def _stored(self) -> Sequence[tuple[str, SignedPolicy]]:
        found = []
        for file in self._state.policy_names():
            subject = str(self._state.path / file)
            try:
                raw = self._state.read(file, SIGNED_SIZE_MAX)
                if raw is not None:
                    found.append((signed.policy_id(raw), SignedPolicy.decode(raw, subject)))
            except (FormatError, KeyServiceError) as error:
                _log.warning("skipping a signed policy: %s", error)
        return found


def _problem(policy: SignedPolicy, counter: Limit | None, tpm: Tpm) -> str | None:
    """Say why a signed policy does not hold on this host now, None where it does."""
    limit = policy.limit
    if limit is not None:
        if counter is None or limit.name != counter.name:
            return "is for another host"
        if limit.value < counter.value:
            return f"was revoked: it held until {limit.value}, the counter is at {counter.value}"
    present = tpm.pcr_values(policy.pcrs)
    trio = zip(policy.pcrs, policy.pcr_values, present, strict=True)
    other = [str(pcr) for pcr, signed_value, now in trio if signed_value != now]
    if other:
        return f"PCR {', '.join(other)} {'are' if other[1:] else 'is'} not as it signs"
    return None
