"""A process that holds keys or plaintext leaves no core dump and lets nobody look into it."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>
_PR_SET_NO_NEW_PRIVS = 38
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4  # <bits/mman-linux.h>
_CAP_IPC_LOCK = 14  # <linux/capability.h>


def harden() -> None:
    """No core dumps and no ptrace by others, from now on; before the first key is unsealed."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")


def renounce_privileges() -> None:
    """No program started from now on gains privileges (setuid, file capabilities)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")


def lock_memory() -> bool:
    """Keep this process out of swap, from now on; False where it is not allowed.

    A page is locked when it is touched. Under a finite RLIMIT_MEMLOCK nothing is locked: what is
    allocated beyond it would fail.
    """
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY:
        status = Path("/proc/self/status").read_text()
        held = int(next(line for line in status.splitlines() if line.startswith("CapEff"))[7:], 16)
        if not held >> _CAP_IPC_LOCK & 1:
            return False
    libc = ctypes.CDLL(None, use_errno=True)
    locked: int = libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    return locked == 0
