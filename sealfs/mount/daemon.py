"""Becoming a daemon: the forks, and where the log goes.

`detach` forks before any thread or event loop exists. The caller's process returns when the daemon
says it is ready, with the daemon's own error when it fails. Knows nothing of FUSE.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from sealfs.control import error_document, error_from
from sealfs.errors import SealfsError, StorageFailed, UsageError

_REPORT_MAX = 1 << 16
SYSLOG = "/dev/log"

Ready = Callable[[], None]
Serve = Callable[[Ready], int]

log = logging.getLogger("sealfs.mount")


class _OneLine(logging.Formatter):
    """File names may hold anything: no line break forges a second message, no byte is lost."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in record.message
        )
        return super().formatMessage(record)


def set_up_log(
    *, foreground: bool, file: Path | None, verbose: int, fallback: Path | None = None
) -> None:
    """Send the log to stderr in the foreground, else to `file`, else to syslog (daemon).

    Args:
        foreground: whether stderr is somebody's.
        file: asked for by the user.
        verbose: 0 warnings, 1 information, 2 everything.
        fallback: the file to use on a host without syslog.

    Raises:
        UsageError: the file cannot be written.
    """
    handler: logging.Handler
    text = "sealfs[%(process)d]: %(levelname)s: %(message)s"
    if file is not None:
        handler = _file_handler(file)
        text = "%(asctime)s " + text
    elif foreground:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            handler = _syslog_handler()
        except OSError:
            handler = logging.NullHandler() if fallback is None else _file_handler(fallback)
            text = "%(asctime)s " + text
    handler.setFormatter(_OneLine(text))
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    for name in ("sealfs", "pyfuse3"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level if name == "sealfs" else max(level, logging.INFO))
        logger.propagate = False


def _syslog_handler() -> logging.Handler:
    """Return a handler for syslog; OSError if nobody listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        probe.connect(SYSLOG)  # the handler itself says nothing about a connection that failed
    handler = logging.handlers.SysLogHandler(
        SYSLOG, facility=logging.handlers.SysLogHandler.LOG_DAEMON
    )
    handler.append_nul = False
    return handler


def _file_handler(file: Path) -> logging.Handler:
    try:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        return logging.FileHandler(file)
    except OSError as exc:
        raise UsageError(file, f"the log cannot be written: {exc.strerror}") from exc


def detach(subject: object, serve: Serve) -> int:
    """Run `serve` in a daemon; return 0 when it has called its argument.

    Args:
        subject: what the daemon serves, for the message when it dies silently.
        serve: called in the daemon with a function to call once it is ready; returns the daemon's
            exit status.

    Raises:
        SealfsError: what `serve` raised before it was ready.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _become_daemon(writing, serve)
    os.close(writing)
    os.waitpid(child, 0)
    report = b""
    with open(reading, "rb") as pipe:
        report = pipe.read(_REPORT_MAX)
    if not report:
        raise StorageFailed(subject, "the daemon ended before it was ready; its log says why")
    answer = json.loads(report)
    if answer["ok"]:
        return 0
    raise error_from(answer["error"])


def _become_daemon(writing: int, serve: Serve) -> NoReturn:
    """Fork once more, so that no terminal can ever be regained; never returns."""
    status = 1
    try:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.chdir("/")
        reported = False

        def report(document: dict[str, object]) -> None:
            nonlocal reported
            if not reported:
                reported = True
                os.write(writing, json.dumps(document).encode())
                os.close(writing)

        def ready() -> None:
            _close_standard_streams()
            report({"ok": True})

        try:
            status = serve(ready)
        except SealfsError as exc:
            log.error("%s", exc)
            report({"ok": False, "error": error_document(exc)})
        except BaseException as exc:
            log.exception("the daemon failed")
            detail = "".join(traceback.format_exception_only(exc)).strip()
            failure = StorageFailed("daemon", f"internal error: {detail}")
            report({"ok": False, "error": error_document(failure)})
    finally:
        logging.shutdown()
        os._exit(status)


def _close_standard_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
