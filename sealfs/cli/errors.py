"""What a user sees when something goes wrong: one sentence, a command that helps, an exit code.

The one place of hints and exit codes. Knows the exception types and the operating system's error
numbers; what failed and why is said by the exception itself. Everything goes to stderr, lower
case and without a full stop, after `sealfs: error:`, `sealfs: hint:` or `sealfs: warning:`.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import click

from sealfs import errors


class ExitCode(IntEnum):
    """What a script can rely on; a number is never given another meaning."""

    OK = 0
    INTERNAL = 1
    """A bug in sealfs, or the storage failed to read or write."""
    USAGE = 2
    """Asked for something that makes no sense, or that is not permitted."""
    FINDINGS = 3
    """`check`, `key test` and `doctor` did their work and found something."""
    FORMAT = 4
    INTEGRITY = 5
    ROLLBACK = 6
    """An older image than this host has seen, or another than the registered one."""
    KEY_REFUSED = 7
    TPM_UNAVAILABLE = 8
    BUSY = 9
    EXISTENCE = 10
    """Not found, or there already."""
    NO_SPACE = 11


INTERRUPTED = 128
"""Added to the number of the signal that ended a command, as a shell does."""

_FAMILIES: tuple[tuple[type[BaseException], ExitCode], ...] = (
    (errors.UsageError, ExitCode.USAGE),
    (errors.ReadOnly, ExitCode.USAGE),
    (errors.FormatError, ExitCode.FORMAT),
    (errors.IntegrityError, ExitCode.INTEGRITY),
    (errors.RolledBack, ExitCode.ROLLBACK),
    (errors.ForeignImage, ExitCode.ROLLBACK),
    (errors.TpmUnavailable, ExitCode.TPM_UNAVAILABLE),
    (errors.HostNotInitialised, ExitCode.EXISTENCE),
    (errors.KeyServiceError, ExitCode.KEY_REFUSED),
    (errors.Busy, ExitCode.BUSY),
    (errors.NotFound, ExitCode.EXISTENCE),
    (errors.AlreadyExists, ExitCode.EXISTENCE),
    (errors.NoSpace, ExitCode.NO_SPACE),
    (errors.StorageFailed, ExitCode.INTERNAL),
    (click.UsageError, ExitCode.USAGE),
    (click.ClickException, ExitCode.USAGE),
)

_ERRNO_CODES: dict[int, ExitCode] = {
    errno.ENOSPC: ExitCode.NO_SPACE,
    errno.EDQUOT: ExitCode.NO_SPACE,
    errno.EFBIG: ExitCode.NO_SPACE,
    errno.ENOENT: ExitCode.EXISTENCE,
    errno.ENOTDIR: ExitCode.EXISTENCE,
    errno.EEXIST: ExitCode.EXISTENCE,
    errno.EACCES: ExitCode.USAGE,
    errno.EPERM: ExitCode.USAGE,
    errno.EROFS: ExitCode.USAGE,
    errno.EISDIR: ExitCode.USAGE,
    errno.ENAMETOOLONG: ExitCode.USAGE,
    errno.EBUSY: ExitCode.BUSY,
    errno.ETXTBSY: ExitCode.BUSY,
    errno.ENOTCONN: ExitCode.BUSY,
}
_NO_SPACE_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass(slots=True, kw_only=True)
class Situation:
    """What was being done, in the user's own words: filled in as a command goes on.

    Attributes:
        command: the command as typed, "key recover".
        path: the image or directory that the user named.
        destination: what is being made, where that is another path.
        mountpoint: of the mount that holds the image, where one does.
        state: the state directory.
    """

    command: str = ""
    path: Path | None = None
    destination: Path | None = None
    mountpoint: Path | None = None
    state: Path = Path()
    verbose: int = 0

    @property
    def quoted(self) -> str:
        """The user's path as a shell takes it; empty where there is none."""
        return shlex.quote(str(self.path)) if self.path is not None else ""


Hint = Callable[[BaseException, Situation], str | None]


def _with_path(template: str) -> Hint:
    def hint(error: BaseException, situation: Situation) -> str | None:
        return template.format(path=situation.quoted) if situation.path is not None else None

    return hint


def _busy(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "mount":
        if "dead mount" in str(error):
            return f"umount -l {situation.quoted}"
        return f"sealfs umount {situation.quoted}"
    if situation.mountpoint is None or situation.path is None:
        return None
    if situation.command == "export":
        shown = situation.mountpoint
        return f"qemu-img convert -f raw -O qcow2 {shlex.quote(str(shown))} COPY.qcow2"
    return f"stop the virtual machine that uses {shlex.quote(str(situation.mountpoint))}"


def _tpm(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "init":
        return "sealfs init --tpm swtpm"
    return "sealfs doctor"


def _key_refused(error: BaseException, situation: Situation) -> str | None:
    if situation.command.startswith("key"):
        return None
    return f"sealfs key recover {situation.quoted}" if situation.path else "sealfs key test --all"


def _malformed(error: BaseException, situation: Situation) -> str | None:
    path = situation.path
    if "key record" in str(error):
        return _key_refused(error, situation)
    if path is None or path.suffix == ".sealed" or "not a sealed image" not in str(error):
        return None
    return f"sealfs import {situation.quoted} {shlex.quote(f'{situation.path}.sealed')}"


def _damaged(error: BaseException, situation: Situation) -> str:
    return "restore the image from a backup"


def _exists(error: BaseException, situation: Situation) -> str | None:
    match situation.command:
        case "export":
            return "add --force to replace it"
        case "register" | "key recover":
            return _with_path("sealfs register --replace {path}")(error, situation)
        case "create" | "import":
            return _with_path("sealfs info {path}")(error, situation)
    return None


def _no_space(error: BaseException, situation: Situation) -> str | None:
    full = situation.destination or situation.path
    return f"df -h {shlex.quote(str(full.parent))}" if full is not None else None


def _no_host(error: BaseException, situation: Situation) -> str:
    return f"sealfs --state {shlex.quote(str(situation.state))} init"


def _usage(error: BaseException, situation: Situation) -> str | None:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.ctx.command_path} --help"
    return None


HINTS: tuple[tuple[type[BaseException], Hint], ...] = (
    (errors.HostNotInitialised, _no_host),
    (errors.TpmUnavailable, _tpm),
    (errors.ForeignImage, _with_path("sealfs register {path}")),
    (errors.RecoveryRefused, lambda error, situation: None),
    (errors.KeyNotFound, _key_refused),
    (errors.KeyRefused, _key_refused),
    (errors.KeyRecordDamaged, _key_refused),
    (errors.Busy, _busy),
    (errors.FormatError, _malformed),
    (errors.BlockDamaged, _with_path("sealfs check --data {path}")),
    (errors.IntegrityError, _damaged),
    (errors.AlreadyExists, _exists),
    (errors.NoSpace, _no_space),
    (click.UsageError, _usage),
)
"""First match wins; each gives a command to run, with the user's own path in it, or nothing."""


class Interrupted(BaseException):
    """A signal asked the command to end; everything half-made is taken back on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def warn(text: str) -> None:
    """Tell the user something that does not stop the command."""
    print(f"sealfs: warning: {text}", file=sys.stderr)


def report(error: BaseException, situation: Situation) -> int:
    """Print what went wrong and return the exit code."""
    if isinstance(error, Interrupted):
        _print_error("interrupted; nothing half-made was left behind")
        return INTERRUPTED + error.number
    code = exit_code_of(error)
    if code is None:
        _print_error(f"internal error: {type(error).__name__}: {_one_line(str(error))}")
        if situation.verbose:
            traceback.print_exception(error)
        else:
            _print_hint("run it again with -v and report what it prints")
        return ExitCode.INTERNAL
    _print_error(sentence_of(error))
    hint = hint_of(error, situation)
    if hint:
        _print_hint(hint)
    if situation.verbose > 1:
        traceback.print_exception(error)
    return code


def exit_code_of(error: BaseException) -> ExitCode | None:
    """Return the exit code of an error that is not a bug, None for a bug."""
    if isinstance(error, errors.StorageFailed) and _cause_errno(error) in _NO_SPACE_ERRNOS:
        return ExitCode.NO_SPACE
    for kind, code in _FAMILIES:
        if isinstance(error, kind):
            return code
    if isinstance(error, OSError) and error.errno is not None:
        return _ERRNO_CODES.get(error.errno, ExitCode.INTERNAL)
    return None


def hint_of(error: BaseException, situation: Situation) -> str | None:
    """Return what to do about it, None where nothing can be said."""
    if exit_code_of(error) is ExitCode.NO_SPACE:
        return _no_space(error, situation)
    if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
        # A FUSE file system whose daemon is gone.
        return f"umount -l MOUNTPOINT, where {situation.quoted} lies"
    for kind, hint in HINTS:
        if isinstance(error, kind):
            return hint(error, situation)
    return None


def sentence_of(error: BaseException) -> str:
    """Return the error's one line."""
    if isinstance(error, click.BadParameter):
        name = "/".join(error.param.opts) if error.param is not None else ""
        if isinstance(error, click.MissingParameter):
            what = error.param.human_readable_name if error.param is not None else ""
            given = name if name.startswith("-") else what
            return f"{given} is missing"
        if isinstance(error.param, click.Argument):
            name = error.param.human_readable_name
        return f"{name}: {_plain(error.message)}" if name else _plain(error.message)
    if isinstance(error, click.ClickException):
        return _plain(error.format_message())
    if isinstance(error, errors.SealfsError):
        return _one_line(str(error))
    if isinstance(error, OSError):
        reason = (error.strerror or str(error)).lower()
        if error.filename is None:
            return reason
        return f'"{os.fsdecode(error.filename)}": {reason}'
    return _one_line(str(error))


def _cause_errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        error = error.__cause__
    return None


def _plain(message: str) -> str:
    """Put click's words into ours: lower case, no full stop."""
    text = _one_line(message).rstrip(".")
    return text[:1].lower() + text[1:]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _print_error(text: str) -> None:
    print(f"sealfs: error: {_printable(text)}", file=sys.stderr)


def _print_hint(text: str) -> None:
    print(f"sealfs: hint: {_printable(text)}", file=sys.stderr)


def _printable(text: str) -> str:
    """Return what any terminal takes: file names may hold anything."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe.encode("utf-8", "backslashreplace").decode("utf-8")
