"""What `-o` may say: parsed once, refused by name when unknown.

Defaults are those of the command line's contract; `parse` needs to know whether root mounts,
because a mount by root is for everybody, with the sealed files' own owners and modes deciding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from sealfs.errors import UsageError
from sealfs.mount.disk import LOCK_WAIT
from sealfs.mount.driver import BUMP_INTERVAL, COMMIT_INTERVAL, IDLE_CLOSE
from sealfs.mount.lane import SPIN_NS

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+)([KMGT]?)(?:i?B)?", re.IGNORECASE)

# What mount(8) and fstab add, and what holds for this file system anyway.
_ACCEPTED = frozenset(
    (
        "_netdev", "async", "auto", "defaults", "dev", "diratime", "group", "lazytime", "noauto",
        "nodev", "nodiratime", "nofail", "nolazytime", "norelatime", "nostrictatime", "nosuid",
        "nouser", "owner", "relatime", "silent", "strictatime", "suid", "user", "users",
    )
)  # fmt: skip
_CACHE_MIN = 4 << 20  # four of the largest requests

LABELS = ("context", "fscontext", "defcontext", "rootcontext")
"""SELinux options, passed to the kernel as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """One mount's options. Sizes in bytes, times in seconds."""

    allow_other: bool = False
    default_permissions: bool = False
    read_only: bool = False
    direct_io: bool = False
    noexec: bool = False
    noatime: bool = False
    cache_size: int = 256 << 20
    dirty_size: int = 64 << 20
    lane: bool = True
    create: bool = True
    vm_id_from_directory: bool = False
    uid: int | None = None
    gid: int | None = None
    mode: int | None = None
    commit_interval: float = COMMIT_INTERVAL
    idle_close: float = IDLE_CLOSE
    lock_wait: float = LOCK_WAIT
    note_each_flush: bool = False
    bump_interval: float = BUMP_INTERVAL
    spin_ns: int = SPIN_NS
    labels: tuple[str, ...] = ()
    keyd: str | None = None
    """Socket of the broker that is asked for keys; empty for that of the state directory."""

    @classmethod
    def parse(cls, texts: str | tuple[str, ...] | list[str] = (), *, is_root: bool) -> MountOptions:
        """Parse the arguments of `-o`, each a comma-separated list.

        Raises:
            UsageError: an option that is unknown, lacks its value or has a wrong one.
        """
        if isinstance(texts, str):
            texts = [texts]
        options = cls(allow_other=is_root, default_permissions=is_root)
        for text in texts:
            for item in _split(text):
                options = _apply(options, item)
        if options.dirty_size < _CACHE_MIN or options.cache_size < _CACHE_MIN:
            raise UsageError("cache=, dirty=", f"at least {_CACHE_MIN >> 20}M each")
        return options

    def describe(self) -> dict[str, object]:
        """Return the options as JSON-able data, for `status`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


_FLAGS: dict[str, tuple[str, bool]] = {
    "allow_other": ("allow_other", True),
    "noallow_other": ("allow_other", False),
    "default_permissions": ("default_permissions", True),
    "nodefault_permissions": ("default_permissions", False),
    "ro": ("read_only", True),
    "rw": ("read_only", False),
    "direct_io": ("direct_io", True),
    "noexec": ("noexec", True),
    "exec": ("noexec", False),
    "noatime": ("noatime", True),
    "atime": ("noatime", False),
}


def _apply(options: MountOptions, item: str) -> MountOptions:
    name, equals, value = item.partition("=")
    if not equals:
        if name in _FLAGS:
            field, flag = _FLAGS[name]
            return replace(options, **{field: flag})  # type: ignore[arg-type]
        if name in _ACCEPTED or name.startswith("x-"):
            return options
        if name == "keyd":
            return replace(options, keyd="")
        if name == "remount":
            raise UsageError(item, "not while it is served: unmount, and mount it again")
        raise UsageError(item, "unknown mount option")
    match name:
        case "cache":
            return replace(options, cache_size=_size(item, value))
        case "dirty":
            return replace(options, dirty_size=_size(item, value))
        case "lane":
            return replace(options, lane=_choice(item, value, "on", "off"))
        case "create":
            return replace(options, create=_choice(item, value, "yes", "no"))
        case "vm-id":
            return replace(options, vm_id_from_directory=_choice(item, value, "dir", "path"))
        case "uid":
            return replace(options, uid=_number(item, value))
        case "gid":
            return replace(options, gid=_number(item, value))
        case "mode":
            return replace(options, mode=_number(item, value, base=8, maximum=0o777))
        case "commit":
            return replace(options, commit_interval=_seconds(item, value))
        case "idle":
            return replace(options, idle_close=_seconds(item, value))
        case "freshness":
            return replace(options, note_each_flush=_choice(item, value, "flush", "interval"))
        case "bump":
            return replace(options, bump_interval=_seconds(item, value))
        case "lock":
            return replace(options, lock_wait=_seconds(item, value))
        case "spin":
            return replace(options, spin_ns=1000 * _number(item, value, maximum=1000))
        case "keyd":
            if not value:
                raise UsageError(item, "expected the path of a socket")
            return replace(options, keyd=value)
        case "fsname" | "subtype" | "comment":
            return options
        case _ if name in LABELS:
            return replace(options, labels=(*options.labels, item))
        case _ if name.startswith("x-"):
            return options
    raise UsageError(item, "unknown mount option")


def _split(text: str) -> Iterator[str]:
    """Cut at commas, but not within the quotes that an SELinux context may have."""
    for item in re.findall(r'(?:[^,"]|"[^"]*")+', text):
        yield item.strip()


def _size(item: str, value: str) -> int:
    match = _SIZE.fullmatch(value)
    if match is None:
        raise UsageError(item, "expected a size such as 256M")
    return int(match[1]) * _UNITS[match[2].upper()]


def _choice(item: str, value: str, true: str, false: str) -> bool:
    if value not in (true, false):
        raise UsageError(item, f"expected {true} or {false}")
    return value == true


def _number(item: str, value: str, *, base: int = 10, maximum: int = (1 << 32) - 2) -> int:
    try:
        number = int(value, base)
    except ValueError:
        number = -1
    if not 0 <= number <= maximum:
        limit = f"{maximum:o}, octal" if base == 8 else str(maximum)
        raise UsageError(item, f"expected a number from 0 to {limit}")
    return number


def _seconds(item: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise UsageError(item, "expected seconds")
    return seconds
