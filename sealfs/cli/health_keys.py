"""`doctor` on the keys: hardware TPM, state directory, the TPM that init recorded, registry."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from sealfs.cli.errors import hint_of, quoted
from sealfs.cli.health import FAIL, NOTE, OK, WARN, Check, Health
from sealfs.cli.settings import Settings
from sealfs.errors import (
    FormatError,
    HostNotInitialised,
    KeyServiceError,
    SealfsError,
    TpmUnavailable,
    UsageError,
)

TPM_DEVICE = Path("/dev/tpmrm0")
UNMANAGED_DEVICE = Path("/dev/tpm0")


def hardware(settings: Settings) -> Iterator[Health]:
    """Whether there is a hardware TPM, and whether this user may use it."""
    if not TPM_DEVICE.exists():
        if UNMANAGED_DEVICE.exists():
            yield Health(
                WARN,
                "tpm",
                f"{UNMANAGED_DEVICE} has no resource manager ({TPM_DEVICE}): one program a time",
            )
        else:
            yield Health(
                NOTE,
                "tpm",
                "this host has no hardware TPM; it takes a TPM 2.0 with a SHA-256 PCR bank, "
                f"enabled in the firmware, {TPM_DEVICE}, and no owner password",
            )
        return
    if os.access(TPM_DEVICE, os.R_OK | os.W_OK):
        yield Health(OK, "tpm", f"{TPM_DEVICE} can be opened")
        return
    try:
        group = grp.getgrgid(TPM_DEVICE.stat().st_gid).gr_name
    except KeyError:
        group = "tss"
    mend = f"sudo usermod -aG {group} $USER" if group != "root" else "udev's rules give it to tss"
    yield Health(NOTE, "tpm", f"{TPM_DEVICE} is not for this user; group {group} may", mend)


def state(settings: Settings) -> Iterator[Health]:
    """Whether the state directory is there and nobody else's, and whether its TPM gives keys."""
    directory = settings.state
    try:
        status = directory.stat()
    except OSError:
        status = None
    if status is not None and stat.S_IMODE(status.st_mode) & 0o077:
        yield Health(
            WARN,
            "state",
            f"{directory} is open to others (mode {stat.S_IMODE(status.st_mode):o})",
            f"chmod 700 {quoted(directory)}",
        )
    if status is not None and not os.access(directory, os.R_OK | os.W_OK | os.X_OK):
        yield Health(
            NOTE,
            "state",
            f"{directory} is not for this user: keys, TPM and registry were not looked at",
            hint_of(PermissionError(13, ""), settings.situation),
        )
        return
    try:
        yield from _host(settings)
    except SealfsError as error:
        yield Health(FAIL, "state", str(error), hint_of(error, settings.situation))


def _host(settings: Settings) -> Iterator[Health]:
    from sealfs.keys.host import Host  # slow to load, and may fail to: said here then
    from sealfs.keys.hostrecord import RecoveryKind

    host = Host.open(settings.state, tpm=settings.tpm)
    with contextlib.closing(host):
        yield Health(OK, "state", f"{settings.state}, for the TPM {host.access.spec}")
        if host.record.recovery is RecoveryKind.NONE:
            yield Health(
                WARN,
                "recovery",
                "there is no recovery key: the loss of this TPM or of the state directory is the "
                "loss of every VM; keep plain backups",
            )
        if host.record.tpm == "swtpm":
            yield Health(
                WARN,
                "tpm",
                "is the embedded software one: a copy of the state directory gives up every key",
                "for real protection use a hardware TPM",
            )
            if shutil.which("swtpm") is None:
                yield Health(FAIL, "tpm", "swtpm is not installed", "apt install swtpm")
                return
        try:
            with host.tpm() as tpm:
                lockout = tpm.lockout()
        except KeyServiceError as error:
            yield Health(FAIL, "tpm", str(error))
            return
    if lockout.locked:
        yield Health(FAIL, "tpm", "is locked out after too many failures",
                     f"wait; one failure is forgiven each {lockout.recovery_s} s")  # fmt: skip
    else:
        yield Health(OK, "tpm", "answers, and is the one of init")


def registry(settings: Settings) -> Iterator[Health]:
    """Whether the registry authenticates, and its images are there."""
    try:
        with settings.keys() as keys:
            entries = keys.registry.entries()
    except (UsageError, HostNotInitialised, TpmUnavailable):
        return  # said above
    except (KeyServiceError, FormatError) as error:
        yield Health(FAIL, "registry", str(error), hint_of(error, settings.situation))
        return
    missing = sum(not os.path.lexists(entry.path) for entry in entries)
    text = f"{len(entries)} images"
    if missing:
        mend = settings.situation.sealfs("list")
        yield Health(NOTE, "registry", f"{text}, {missing} of them missing", mend)
    else:
        yield Health(OK, "registry", text)


CHECKS: tuple[Check, ...] = (hardware, state, registry)
