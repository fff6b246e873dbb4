"""What a user sees when something goes wrong: one sentence, a command that helps, an exit code.

The one place of hints and exit codes. Knows the exception types and the operating system's error
numbers; what failed and why is said by the exception itself. Everything goes to stderr, lower
case and without a full stop, after `sealfs: error:`, `sealfs: hint:` or `sealfs: warning:`; with
--json the error is a document on stdout as well. README's table of errors is made from here
(`tools/error-table`).
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import click

from sealfs import errors
from sealfs.cli.output import has_answered, print_json
from sealfs.keys.names import is_network


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
    (errors.KeydUnavailable, ExitCode.TPM_UNAVAILABLE),
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


STATE_DEFAULT = Path("/var/lib/sealfs")
_ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # sudoers: secure_path
_KEPT_MOUNT = re.compile(r"but [^(]*\((\w+)\).* has it in a mount namespace")
_KEPT_BY_HOST = ("key record", "registry", "ledger", "host")


@dataclass(slots=True, kw_only=True)
class Situation:
    """What was being done, in the user's own words: filled in as a command goes on.

    Attributes:
        command: the command as typed, "key recover".
        arguments: everything that was typed behind `sealfs`.
        options: the common options among it that every other command needs as well.
        path: the image or directory that the user named.
        destination: what is being made, where that is another path.
        mountpoint: of the mount that holds the image, where one does.
        network: the identifier of the network that the user named.
        state: the state directory.
        is_root: whether nothing is forbidden to this user.
    """

    command: str = ""
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    path: Path | None = None
    destination: Path | None = None
    mountpoint: Path | None = None
    network: str | None = None
    state: Path = STATE_DEFAULT
    verbose: int = 0
    json: bool = False
    is_root: bool = field(default_factory=lambda: os.geteuid() == 0)

    @property
    def quoted(self) -> str:
        """The user's path as a shell takes it; empty where there is none."""
        return quoted(self.path) if self.path is not None else ""

    def sealfs(self, words: str) -> str:
        """Return a command of ours that works where this one was typed."""
        options = shlex.join(self.options) + " " if self.options else ""
        return f"sealfs {options}{words}"

    def again(self, *more: str, arguments: tuple[str, ...] | None = None) -> str:
        """Return the user's own command, with more options."""
        return shlex.join(["sealfs", *(self.arguments if arguments is None else arguments), *more])

    def as_root(self, command: str) -> str:
        """Return a command of ours by sudo, which knows neither our $PATH nor our environment."""
        program = sys.argv[0]
        if shutil.which("sealfs", path=_ROOTS_PATH) or os.path.basename(program) != "sealfs":
            program = "sealfs"
        else:
            program = shlex.quote(os.path.abspath(program))
        if self.state != STATE_DEFAULT and "--state" not in command:
            program += f" --state {quoted(self.state)}"
        return f"sudo {program} {command.removeprefix('sealfs ')}"


def quoted(path: Path) -> str:
    """Return a path as a shell and a command take it."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


Hint = Callable[[BaseException, Situation], str | None]


def _with_path(words: str) -> Hint:
    def hint(error: BaseException, situation: Situation) -> str | None:
        if situation.path is None:
            return None
        return situation.sealfs(words.format(path=situation.quoted))

    return hint


def _nothing(error: BaseException, situation: Situation) -> None:
    return None


def _senseless(error: BaseException, situation: Situation) -> str | None:
    if "user_allow_other" in str(error):
        return "add user_allow_other to /etc/fuse.conf, or mount without allow_other"
    return situation.again("--shrink") if "would be cut off" in str(error) else None


def _busy(error: BaseException, situation: Situation) -> str | None:
    text = str(error)
    if situation.path is not None and "dead mount" in text:
        return _free(situation.path, situation)
    if "is attached already" in text:
        vm, _, index = getattr(error, "subject", "").rpartition("/")
        again = f"net detach --vm {shlex.quote(vm)}" + (f" --device-index {index}" * (index != "0"))
        return situation.sealfs(again)
    kept = _KEPT_MOUNT.search(text)
    if kept is not None and situation.path is not None:
        return f"nsenter --mount=/proc/{kept[1]}/ns/mnt umount {_absolute(situation.path)}"
    if "already mounted" in text:
        return situation.sealfs(f"umount {situation.quoted}")
    if situation.mountpoint is None:
        if "in use by another sealfs" in text and shutil.which("fuser"):
            return f"fuser -v {quoted(Path(getattr(error, 'subject', '')))}"
        return None
    shown = quoted(situation.mountpoint)
    if situation.command == "export":
        return f"qemu-img convert -f raw -O qcow2 {shown} COPY.qcow2"
    return f"stop the virtual machine that uses {shown}"


def _absolute(path: Path) -> str:
    return shlex.quote(os.path.abspath(path))


def _free(mountpoint: Path, situation: Situation) -> str:
    return f"{'umount -l' if situation.is_root else 'fusermount3 -uz'} {quoted(mountpoint)}"


def _dead_mount(error: BaseException, situation: Situation) -> str | None:
    """Name the mount point on the way to the user's path whose daemon is gone."""
    if situation.path is None:
        return None
    here = Path(os.path.abspath(situation.path))
    for place in (*reversed(here.parents), here):
        try:
            os.stat(place)
        except OSError as found:
            return _free(place, situation) if found.errno == errno.ENOTCONN else None
    return None


def _tpm(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "init":
        return situation.sealfs("init --tpm swtpm") if "hardware TPM" in str(error) else None
    if "embedded TPM is gone" in str(error):
        return situation.sealfs("init --replace-tpm")
    return situation.sealfs("doctor")


def _no_key(error: BaseException, situation: Situation) -> str | None:
    if situation.network is not None and getattr(error, "subject", "") == situation.network:
        return situation.sealfs("net list")
    if situation.command.startswith(("key ", "net ")):
        return situation.sealfs("key list")
    return _key_refused(error, situation)


def _key_refused(error: BaseException, situation: Situation) -> str | None:
    text = str(error)
    if situation.command.startswith("policy "):
        return None
    if "no signed policy" in text:
        return situation.sealfs("policy list")
    if text.endswith("try again"):
        return situation.again()
    lost = Path(getattr(error, "subject", ""))
    if lost in [situation.state / name for name in ("ledger", "registry", "networks")]:
        return situation.sealfs("accept-rollback --ledger")
    if lost == situation.state / "host.record":
        return (
            f"restore {quoted(lost)} from a backup; without one: "
            f"{situation.sealfs('init --replace-tpm')}"
        )
    if "TPM of init" in text or "embedded TPM is gone" in text:
        return situation.sealfs("init --replace-tpm")
    if situation.command == "key import" and is_network(getattr(error, "subject", "")):
        return situation.again("--replace") if "holds another key" in text else None
    if situation.command in ("key recover", "key import", "key enroll"):
        return None
    if situation.network is not None:
        return situation.sealfs(f"key test {shlex.quote(getattr(error, 'subject', ''))}")
    if situation.path is None:
        return situation.sealfs("key recover IMAGE") + ", any image of this VM"
    return situation.sealfs(f"key recover {situation.quoted}")


def _not_allowed(error: BaseException, situation: Situation) -> str | None:
    if situation.network is None:
        return None
    network, vm = shlex.quote(situation.network), shlex.quote(getattr(error, "subject", ""))
    return situation.sealfs(f"net allow {network} --vm {vm}")


def _pin_needed(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "scrub":
        return None  # it takes the PINs of many VMs on a terminal only
    old = situation.command == "key reseal"
    return situation.again("--old-pin-file" if old else "--pin-file", "FILE")


def _locked_out(error: BaseException, situation: Situation) -> str:
    return situation.sealfs(f"key test {shlex.quote(getattr(error, 'subject', ''))}")


def _malformed(error: BaseException, situation: Situation) -> str | None:
    path = situation.path
    if any(f"this is not a {what}" in str(error) for what in _KEPT_BY_HOST):
        return _key_refused(error, situation)
    if path is None or path.suffix == ".sealed" or "not a sealed image" not in str(error):
        return None
    return situation.sealfs(f"import {situation.quoted} {quoted(Path(f'{path}.sealed'))}")


def _damaged(error: BaseException, situation: Situation) -> str:
    return "restore the image from a backup"


def _storage_failed(error: BaseException, situation: Situation) -> str | None:
    subject = getattr(error, "subject", "")
    if subject in ("/dev/fuse", "fusermount3"):
        return situation.sealfs("doctor")
    return "dmesg | tail" if _cause_errno(error) == errno.EIO else None


def _not_found(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "net deny" and situation.network is not None:
        return situation.sealfs(f"net show {shlex.quote(situation.network)}")
    if "package qemu-utils" in str(error):
        return f"{'' if situation.is_root else 'sudo '}apt install qemu-utils"
    if situation.command == "key rotate" and "is not there" in str(error):
        again = situation.again("--lost", getattr(error, "subject", ""))
        return f"{again}, but only if it is gone for good"
    return situation.sealfs("list") if "no such sealed image" in str(error) else None


def _exists(error: BaseException, situation: Situation) -> str | None:
    path, made = situation.path, situation.destination
    if "is the name of a network" in str(error):
        return situation.sealfs("net list")
    match situation.command:
        case "net create" if situation.network is not None and "network has" in str(error):
            return situation.sealfs(f"net show {shlex.quote(situation.network)}")
        case "export" if made is not None and path is not None:
            if not made.is_dir():
                return situation.again("--force")
            inside = str(made / f"{path.name.removesuffix('.sealed')}.raw")
            words = tuple(inside if word == str(made) else word for word in situation.arguments)
            return situation.again(arguments=words)
        case "register" | "key recover":
            return _with_path("register --replace {path}")(error, situation)
        case "create" | "import" if path is not None and not path.is_dir():
            return _with_path("info {path}")(error, situation)
    return None


def _block_damaged(error: BaseException, situation: Situation) -> str | None:
    if situation.command == "rekey":
        return f"{_check(error, situation)}; write or discard those blocks, then the same again"
    return _check(error, situation)


_check = _with_path("check --data {path}")


def _no_space(error: BaseException, situation: Situation) -> str | None:
    if "epoch table" in str(error):
        return _with_path("rekey --epochs {path}")(error, situation)
    full = Path(getattr(error, "subject", ""))
    if situation.state in full.parents:
        return f"df -h {quoted(situation.state)}"
    place = situation.destination or situation.path
    return f"df -h {quoted(place.parent)}" if place is not None else None


def _no_host(error: BaseException, situation: Situation) -> str:
    if not situation.is_root and situation.state == STATE_DEFAULT:
        return situation.as_root("init")
    if situation.state == STATE_DEFAULT or "--state" in situation.options:
        return situation.sealfs("init")
    return f"sealfs --state {quoted(situation.state)} init"


def _no_keyd(error: BaseException, situation: Situation) -> str | None:
    if "uid" in getattr(error, "detail", ""):
        return None
    path = Path(getattr(error, "subject", ""))
    is_usual = not path.is_absolute() or path == situation.state.absolute() / "keyd.sock"
    return situation.sealfs("keyd" if is_usual else f"keyd --socket {quoted(path)}")


def _rolled_back(error: BaseException, situation: Situation) -> str | None:
    if Path(getattr(error, "subject", "")).parent == situation.state:
        return situation.sealfs("accept-rollback --ledger")
    return _with_path("accept-rollback {path}")(error, situation)


def _usage(error: BaseException, situation: Situation) -> str | None:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.ctx.command_path} --help"
    return None


HINTS: tuple[tuple[type[BaseException], Hint, str], ...] = (
    (errors.UsageError, _senseless, "the message says what is possible; `--help`"),
    (errors.HostNotInitialised, _no_host, ""),
    (errors.TpmUnavailable, _tpm, ""),
    (errors.KeydUnavailable, _no_keyd, "under systemd `systemctl start sealfs-keyd`"),
    (errors.RecoveryRefused, _nothing, "type it again; `sealfs info IMAGE` names the right one"),
    (errors.KeyNotFound, _no_key, ""),
    (errors.KeyGone, _nothing, "moved: `key enroll --move` there, `key import` here"),
    (errors.PinNeeded, _pin_needed, "under a mount: `sealfs unlock VM`, once"),
    (errors.WrongPin, _nothing, "type it again; forgotten: `sealfs key recover IMAGE`"),
    (errors.LockedOut, _locked_out, "wait; the recovery key opens meanwhile"),
    (errors.NotAllowed, _not_allowed, ""),
    (errors.KeyRefused, _key_refused, ""),
    (errors.KeyRecordDamaged, _key_refused, "of the host itself: a backup of the state"),
    (errors.KeyServiceError, _nothing, "`-v` shows more"),
    (errors.RolledBack, _rolled_back, "only if you restored it yourself"),
    (errors.ForeignImage, _with_path("register {path}"), "only if you moved it yourself"),
    (errors.Busy, _busy, ""),
    (errors.FormatError, _malformed, "another file, or a newer sealfs"),
    (errors.BlockDamaged, _block_damaged, "then a backup"),
    (errors.IntegrityError, _damaged, ""),
    (errors.StorageFailed, _storage_failed, "the kernel's log (`dmesg`)"),
    (errors.NotFound, _not_found, "look at the path"),
    (errors.AlreadyExists, _exists, ""),
    (errors.NoSpace, _no_space, ""),
    (errors.ReadOnly, _nothing, "mend permissions; mount without `ro`"),
    (click.UsageError, _usage, ""),
)
"""First match wins: what a command prints, or None, and what README says besides.

A hint is a command to run with the user's own path in it, or where none can help a few words.
"""


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
        sentence, hint = "interrupted; nothing half-made was left behind", None
        if situation.command == "rekey":
            sentence, hint = "interrupted; the image is in order, and not done", situation.again()
        status = INTERRUPTED + error.number
    else:
        code = exit_code_of(error)
        status = ExitCode.INTERNAL if code is None else code
        sentence, hint = sentence_of(error), hint_of(error, situation)
        if code is None:
            sentence = f"internal error: {type(error).__name__}: {_one_line(str(error))}"
            hint = None if situation.verbose else "run it again with -v and report what it prints"
        if situation.verbose > (0 if code is None else 1):
            traceback.print_exception(error)
    print(f"sealfs: error: {_printable(sentence)}", file=sys.stderr)
    if hint:
        print(f"sealfs: hint: {_printable(hint)}", file=sys.stderr)
    if situation.json and not has_answered():
        # What stderr says, and which of the classes of `sealfs.errors` it is.
        kind = type(error).__name__
        document = {"type": kind, "message": sentence, "hint": hint, "exit_code": int(status)}
        print_json({"error": document})
    return status


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
    if not situation.is_root and _cause_errno(error) in (errno.EACCES, errno.EPERM):
        return situation.as_root(situation.again())
    if isinstance(error, OSError) and error.errno == errno.ENOTCONN:
        # A FUSE file system whose daemon is gone.
        return _dead_mount(error, situation)
    for kind, hint, _ in HINTS:
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


def _printable(text: str) -> str:
    """Return what any terminal takes: file names may hold anything."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe.encode("utf-8", "backslashreplace").decode("utf-8")
