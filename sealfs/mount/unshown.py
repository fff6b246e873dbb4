"""Files of a source directory that a mount of it does not show, for a warning.

A forgotten plain disk beside the sealed ones is exactly what an auditor looks for.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from sealfs.image.format import MAGICS

_SUFFIX = ".sealed"

KINDS = ("not sealed, therefore not shown", "sealed but not named *.sealed, therefore not shown")
"""What each of the two lists of `unshown_files` is, for a message."""


def unshown_files(directory: Path, limit: int) -> tuple[list[str], list[str]]:
    """Return up to `limit` files below a directory that a mount of it does not show.

    Returns:
        Those in clear, and those that are sealed but not named *.sealed.
    """
    plain: list[str] = []
    unnamed: list[str] = []
    for parent, _, names in os.walk(directory):
        for name in names:
            path = Path(parent, name)
            if name.endswith(_SUFFIX) or not _is_regular(path):
                continue
            (unnamed if _is_sealed(path) else plain).append(str(path.relative_to(directory)))
            if len(plain) + len(unnamed) >= limit:
                return plain, unnamed
    return plain, unnamed


def _is_sealed(path: Path) -> bool:
    """Whether a file begins as a sealed image does; one that cannot be read does not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return os.pread(fd, len(MAGICS["superblock"]), 0) == MAGICS["superblock"]
    except OSError:
        return False
    finally:
        os.close(fd)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
