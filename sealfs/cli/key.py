"""The `key` command with all its verbs."""

from __future__ import annotations

from sealfs.cli import key_end as key_end
from sealfs.cli import key_move as key_move
from sealfs.cli import key_rotate as key_rotate
from sealfs.cli.keys import key_command

__all__ = ["key_command"]
