"""`keyd`: the key broker as a process, in the foreground, as a daemon or under systemd."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import click

from sealfs.cli import interrupts
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.control import run_directory
from sealfs.errors import UsageError
from sealfs.keys.audit import actor_of
from sealfs.keys.broker import Broker
from sealfs.keys.hardening import harden, lock_memory, renounce_privileges
from sealfs.keys.host import Host
from sealfs.keys.keyd_wire import SOCKET_NAME
from sealfs.keys.service import KeyService
from sealfs.mount import daemon

UID_MAX = (1 << 32) - 2
MODULE = "sealfs.cli.main"

log = logging.getLogger("sealfs.keyd")

UNIT = """\
[Unit]
Description=sealfs key broker: holds the keys, and the TPM, for the mounts of this host
RequiresMountsFor={state}
Before=remote-fs-pre.target
Wants=remote-fs-pre.target

[Service]
Type=notify
ExecStart={command}
Restart=on-failure
RestartSec=1
TimeoutStopSec=30
RuntimeDirectory=sealfs
RuntimeDirectoryPreserve=yes
UMask=0077
LimitCORE=0
LimitMEMLOCK=infinity
NoNewPrivileges=yes
# The TPM's device is open to its group; memory is locked.
CapabilityBoundingSet=CAP_DAC_OVERRIDE CAP_IPC_LOCK
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={places}
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
DevicePolicy=closed
DeviceAllow=char-tpm rw
DeviceAllow=/dev/tpm0 rw
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
# The embedded software TPM filters its own calls too.
SystemCallFilter=@system-service seccomp

[Install]
WantedBy=multi-user.target
"""
"""A mount by fstab with `_netdev` comes after it."""


@click.command("keyd")
@click.option("-f", "--foreground", is_flag=True, help="Stay; log to stderr.")
@click.option(
    "--socket", "place", type=PATH, metavar="PATH", help=f"Else {SOCKET_NAME} in the state."
)
@click.option(
    "--allow-uid",
    "uids",
    multiple=True,
    type=click.IntRange(0, UID_MAX),
    metavar="N",
    help="Answer this user too, besides root and its own; may be repeated.",
)
@click.option("--log", "log_file", type=PATH, help="Log to a file.")
@click.option("--print-unit", is_flag=True, help="Print a unit file for systemd, and end.")
@common_options
def keyd_command(
    settings: Settings,
    foreground: bool,
    place: Path | None,
    uids: tuple[int, ...],
    log_file: Path | None,
    print_unit: bool,
) -> int:
    """Hold the keys for mounts, which name it by `-o keyd[=SOCKET]`, in a process of its own.

    The mounts get the keys of the images that they open, and neither the VMs' keys nor the TPM.
    Returns when it answers; ends on SIGTERM. A mount whose keyd is started anew goes on.
    """
    state = settings.state.absolute()
    if uids and place is None:
        raise UsageError("--allow-uid", "the state directory is root's alone: name a --socket")
    path = state / SOCKET_NAME if place is None else place.absolute()
    if print_unit:
        print(_unit(settings, state, path, uids), end="")
        return 0
    KeyService.open(state, tpm=settings.tpm).close()  # told here, not by a daemon
    if log_file is not None:
        log_file = log_file.absolute()

    def open_keys(pid: int, uid: int) -> KeyService:
        actor = actor_of(pid, uid)
        host = Host.open(state, tpm=settings.tpm)
        return KeyService(host, actor=lambda: actor, name_of=str)

    def serve(ready: Callable[[], None]) -> int:
        daemon.set_up_log(
            foreground=foreground,
            file=log_file,
            fallback=run_directory() / "keyd.log",
            verbose=settings.verbose,
        )
        _harden()
        broker = Broker(path, open_keys, allowed=frozenset(uids))
        broker.bind()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: broker.stop())
        log.info('answers at "%s"', path)
        broker.run(ready)
        return 0

    interrupts.uninstall()
    return serve(_notify) if foreground else daemon.detach(path, serve)


def _harden() -> None:
    """Before the first key: none in a core dump, in swap, or in a program that gains privileges."""
    os.umask(0o077)
    harden()
    renounce_privileges()
    if not lock_memory():
        log.warning(
            "memory is not locked, keys may reach swap: encrypt it, or allow it "
            "(LimitMEMLOCK=infinity, or CAP_IPC_LOCK)"
        )


def _notify() -> None:
    """Tell systemd that we answer (sd_notify(3)); nobody where it did not start us."""
    name = os.environ.get("NOTIFY_SOCKET")
    if name:
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stream,
        ):
            stream.connect(f"\0{name[1:]}" if name.startswith("@") else name)
            stream.send(b"READY=1")


def _unit(settings: Settings, state: Path, path: Path, uids: tuple[int, ...]) -> str:
    is_script = os.path.basename(sys.argv[0]) == "sealfs"
    words = [os.path.abspath(sys.argv[0])] if is_script else [sys.executable, "-m", MODULE]
    words += ["--state", str(state)]
    if settings.tpm is not None:
        words += ["--tpm", settings.tpm]
    words += ["keyd", "--foreground", "--socket", str(path)]
    for uid in uids:
        words += ["--allow-uid", str(uid)]
    places = [str(state)] + ([] if path.parent == state else [str(path.parent)])
    return UNIT.format(
        state=_quoted(str(state)),
        command=" ".join(map(_quoted, words)),
        places=" ".join(map(_quoted, places)),
    )


def _quoted(word: str) -> str:
    """Return a word as a unit file takes it (systemd.syntax(7), systemd.service(5))."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if escaped != word or " " in word else word
