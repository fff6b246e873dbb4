"""The `sealfs` command: finds the command that was named, runs it, reports how it ended.

A command's module is loaded when it is named: `sealfs --help` answers at once, and only `mount`
pays for FUSE. No traceback reaches a user who did not ask for one.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

import sealfs
from sealfs.cli import interrupts
from sealfs.cli.errors import report
from sealfs.cli.output import has_answered, print_json
from sealfs.cli.settings import Settings, common_options, initial_settings

COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("host", "Set up this host: state directory, TPM, recovery key."),
    "create": ("create", "Make a new, empty sealed image."),
    "import": ("create", "Seal an existing disk."),
    "export": ("export", "Write a sealed image out as a plain disk."),
    "resize": ("resize", "Make a disk larger or smaller, also one in use."),
    "rekey": ("rekey", "New data key, every block sealed again, in use or not."),
    "mount": ("mount", "Serve a directory of sealed images as plain files."),
    "umount": ("mount", "Unmount; returns when the images are clean."),
    "list": ("images", "List sealed images."),
    "info": ("images", "Tell what is known of one image."),
    "check": ("check", "Verify an image; names each bad block."),
    "scrub": ("check", "Verify images in the background, at a low rate."),
    "register": ("images", "Accept an image under its present path."),
    "accept-rollback": ("rollback", "Accept an older image, or an older state directory."),
    "host-id": ("key_move", "Tell who this host is, for `key enroll` on another."),
    "key": ("key", "Look at keys, try, change, move, recover and revoke them."),
    "net": ("net_all", "Sealed network links between virtual machines."),
    "unlock": ("unlock", "Give a VM's PIN to the mounts that serve its images."),
    "lock": ("unlock", "Drop the key that unlock gave."),
    "policy": ("policy", "Signed policies: states that an offline key approves."),
    "audit": ("audit", "Show or verify the log of what was done with the keys."),
    "keyd": ("keyd", "Hold the keys for mounts, in a process of its own."),
    "bench": ("bench", "Measure what encryption costs on your storage."),
    "doctor": ("doctor", "Say what this host can do, and what to mend."),
}
"""Command -> (module of this package, its line in `--help`)."""


class _Commands(click.Group):
    """Commands that are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sealfs.cli.{COMMANDS[cmd_name][0]}")
        found = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(sealfs.__version__, prog_name="sealfs")
@common_options
def program(settings: Settings) -> None:
    """Encrypted disks for virtual machines; the keys are held by the host's TPM.

    The state directory is --state, else $SEALFS_STATE, else /var/lib/sealfs; the TPM is --tpm,
    else $SEALFS_TPM, else the one that init recorded.
    """


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code."""
    settings = initial_settings()
    settings.situation.arguments = tuple(arguments)
    interrupts.install()
    try:
        result = program.main(
            _as_command(list(arguments)),
            prog_name="sealfs",
            standalone_mode=False,
            obj=settings,
        )
        if settings.json and not has_answered():
            print_json({})
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        return 2
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing can be said there any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return report(error, settings.situation)


def _as_command(arguments: list[str]) -> list[str]:
    """Turn the form that mount(8) uses, `sealfs SOURCE MOUNTPOINT [-o ...]`, into `mount`."""
    is_path = len(arguments) >= 2 and not any(a.startswith("-") for a in arguments[:2])
    if is_path and arguments[0] not in COMMANDS and Path(arguments[0]).is_absolute():
        return ["mount", *arguments]
    return arguments


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
