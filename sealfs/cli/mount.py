"""`mount` and `umount`."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sealfs.cli import interrupts
from sealfs.cli.errors import warn
from sealfs.cli.settings import Settings, common_options
from sealfs.mount import session
from sealfs.mount.options import MountOptions
from sealfs.mount.unshown import KINDS, unshown_files

if TYPE_CHECKING:
    from sealfs.mount.opener import Keys

LOOKED_AT_MAX = 1000
NAMED_MAX = 5
"""Files named in the warning; the mount's log names more."""


@click.command("mount")
@click.argument("source", metavar="SOURCE_DIR", type=click.Path(path_type=Path))
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Comma-separated; see below.")
@click.option("-f", "--foreground", is_flag=True, help="Stay; log to stderr.")
@click.option("--log", "log_file", type=click.Path(path_type=Path), help="Log to a file.")
@common_options
def mount_command(
    settings: Settings,
    source: Path,
    mountpoint: Path,
    options: tuple[str, ...],
    foreground: bool,
    log_file: Path | None,
) -> int:
    """Serve every NAME.sealed under SOURCE_DIR as the plain file MOUNTPOINT/NAME.

    Returns when the names are served; each image is unsealed at its first open. Files made under
    the mount are sealed images. The log goes to syslog.

    Options: ro, cache=256M, dirty=64M, allow_other, noallow_other, uid=N, gid=N, mode=OCTAL,
    create=yes|no, vm-id=path|dir, freshness=interval|flush, direct_io, lane=on|off, noexec,
    noatime, context=..., keyd[=SOCKET]
    """
    settings.about(mountpoint)
    chosen = MountOptions.parse(options, is_root=os.geteuid() == 0)
    source, mountpoint = session.check_places(source, mountpoint)
    keys = _keys(settings, chosen.keyd)
    if not foreground:
        _warn_of_unshown_files(source)
        _warn_of_hidden_files(mountpoint)
    interrupts.uninstall()
    return session.mount_directory(
        source,
        mountpoint,
        options=chosen,
        keys=keys,
        foreground=foreground,
        log_file=log_file,
        verbose=settings.verbose,
    )


def _keys(settings: Settings, keyd: str | None) -> Callable[[], Keys]:
    """Return what opens the mount's key service: its own, or keyd.

    Opened and closed once: a host that is not set up is told here, not by a daemon. The module of
    the other way is not even loaded.
    """
    state = settings.state.absolute()  # a daemon's working directory is the root
    if keyd is None:
        from sealfs.keys.service import KeyService

        KeyService.open(state, tpm=settings.tpm).close()
        return partial(KeyService.open, state, tpm=settings.tpm)
    from sealfs.keys.keyd_wire import SOCKET_NAME
    from sealfs.keys.remote import RemoteKeys

    socket = Path(keyd).absolute() if keyd else state / SOCKET_NAME
    RemoteKeys.open(socket).close()
    return partial(RemoteKeys.open, socket)


@click.command("umount")
@click.argument("mountpoint", type=click.Path(path_type=Path))
@common_options
def umount_command(settings: Settings, mountpoint: Path) -> None:
    """Unmount; returns when every image is flushed and clean."""
    session.unmount(settings.about(mountpoint))


def _warn_of_hidden_files(mountpoint: Path) -> None:
    """Whatever lies in a mount point is in clear, and out of sight while it is mounted over."""
    count = len(os.listdir(mountpoint))
    if count:
        warn(f'"{mountpoint}" is not empty: {count} files in it are hidden, and not sealed')


def _warn_of_unshown_files(source: Path) -> None:
    for what, found in zip(KINDS, unshown_files(source, LOOKED_AT_MAX), strict=True):
        if found:
            listed = ", ".join(f'"{name}"' for name in found[:NAMED_MAX])
            more = ", and more" if len(found) > NAMED_MAX else ""
            warn(f'{what}, in "{source}": {listed}{more}')
