"""How the host's TPM is named and reached: opened for one use, closed after it.

A specification is `swtpm` (embedded, in the state directory), `device:/dev/tpmrm0`,
`swtpm:path=...` or any other TCTI string. `auto` exists at init only: it takes the hardware TPM
and never falls back to software. tpm2_pytss is imported at the first use, so that commands that
need no TPM start quickly.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from sealfs.errors import TpmUnavailable, UsageError
from sealfs.keys.hostrecord import SPEC_SIZE_MAX
from sealfs.keys.statedir import HeldLock, StateDir
from sealfs.keys.swtpm import EmbeddedTpm

if TYPE_CHECKING:
    from sealfs.keys.tpm import Tpm

EMBEDDED: Final = "swtpm"
AUTO: Final = "auto"
DEVICE: Final = "device:"
RESOURCE_MANAGED: Final = ("device:/dev/tpmrm", "tabrmd")
HARDWARE: Final = ("/dev/tpmrm0", "/dev/tpm0")
"""With the kernel's resource manager first: it keeps clients apart and flushes after them."""


class TpmAccess(Protocol):
    """Opens one TPM for one use."""

    spec: str
    is_shared: bool
    """Whether clients are kept apart by a resource manager, so that no lock is needed."""

    def open(self, held: HeldLock | None, *, manufacture: bool = False) -> TpmUse:
        """Open the TPM; `held` is the state lock, needed unless `is_shared`."""


TpmUse = contextlib.AbstractContextManager["Tpm"]


class EmbeddedAccess:
    """The embedded software TPM of a state directory."""

    spec = EMBEDDED
    is_shared = False

    def __init__(self, state: StateDir) -> None:
        self._embedded = EmbeddedTpm(state.tpm_directory)

    @contextlib.contextmanager
    def open(self, held: HeldLock | None, *, manufacture: bool = False) -> Iterator[Tpm]:
        from sealfs.keys.tpm import open_tpm

        assert held is not None, "the embedded TPM runs under the state lock"
        with (
            self._embedded.running(held, manufacture=manufacture) as channel,
            open_tpm(channel, "embedded TPM", shutdown=True) as tpm,
        ):
            yield tpm


class TctiAccess:
    """A TPM that somebody else runs: hardware, a resource manager, a software TPM that stays up."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.is_shared = spec.startswith(RESOURCE_MANAGED)

    @contextlib.contextmanager
    def open(self, held: HeldLock | None, *, manufacture: bool = False) -> Iterator[Tpm]:
        from sealfs.keys.tpm import open_tpm

        assert self.is_shared or held is not None, "without a resource manager one client a time"
        if self.spec.startswith(DEVICE):
            _check_device(self.spec.removeprefix(DEVICE))
        with open_tpm(self.spec, self.spec, shutdown=False) as tpm:
            yield tpm


def access_of(spec: str, state: StateDir) -> TpmAccess:
    """Return the way to the TPM that `spec` names.

    Raises:
        TpmUnavailable: `auto`, and this host has no hardware TPM.
        UsageError: not a specification.
    """
    if spec == AUTO:
        spec = DEVICE + _hardware_tpm()
    if spec == EMBEDDED:
        return EmbeddedAccess(state)
    if not spec or "\0" in spec or len(spec.encode("utf-8", "replace")) > SPEC_SIZE_MAX:
        raise UsageError(ascii(spec[:64]), "does not name a TPM")
    return TctiAccess(spec)


def _hardware_tpm() -> str:
    for path in HARDWARE:
        if Path(path).exists():
            return path
    raise TpmUnavailable(
        AUTO,
        f"this host has no hardware TPM ({' or '.join(HARDWARE)}); "
        "the embedded software TPM is taken only when asked for: --tpm swtpm",
    )


def _check_device(path: str) -> None:
    # TSS says "I/O error" for all of these.
    if not Path(path).exists():
        raise TpmUnavailable(path, "there is no such TPM device")
    if not os.access(path, os.R_OK | os.W_OK):
        raise TpmUnavailable(path, "no permission to use it; root and the group of the device have")
