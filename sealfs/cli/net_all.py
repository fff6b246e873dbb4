"""The `net` command with all its verbs."""

from __future__ import annotations

from sealfs.cli import net_attach as net_attach
from sealfs.cli.net import net_command

__all__ = ["net_command"]
