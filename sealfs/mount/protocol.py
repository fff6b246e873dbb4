"""The few structures of the FUSE kernel protocol that the lane reads or alters.

Names, fields and order are those of <linux/fuse.h> (protocol 7.31, which libfuse 3 negotiates;
all of them are unchanged up to 7.45). Byte order is the host's. Knows no file descriptor and no
sealed image. `parse_*` never trust a length: they return None for what they cannot parse.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

from sealfs.image.plan import Buffer


class Opcode(IntEnum):
    """enum fuse_opcode: those the lane serves, alters, or must know the answer's size of."""

    FORGET = 2
    OPEN = 14
    READ = 15
    WRITE = 16
    FSYNC = 20
    GETXATTR = 22
    LISTXATTR = 23
    INIT = 26
    READDIR = 28
    CREATE = 35
    INTERRUPT = 36
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    LSEEK = 46


class Fallocate(IntFlag):
    """Modes of fallocate(2) that a VM disk meets (<linux/falloc.h>)."""

    KEEP_SIZE = 0x01
    PUNCH_HOLE = 0x02
    ZERO_RANGE = 0x10


NO_REPLY = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))
"""Requests the kernel expects no answer to."""

FOPEN_PARALLEL_DIRECT_WRITES = 1 << 6
WRITE_CACHE = 1 << 0  # FUSE_WRITE_CACHE: from the page cache, the handle is guessed
AUTO_INVAL_DATA = 1 << 12  # FUSE_AUTO_INVAL_DATA

IN_HEADER = struct.Struct("=IIQQIIIHH")
"""fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding."""
OUT_HEADER = struct.Struct("=IiQ")
"""fuse_out_header: len, error (0 or -errno), unique."""
READ_IN = struct.Struct("=QQIIQII")
"""fuse_read_in: fh, offset, size, read_flags, lock_owner, flags, padding."""
WRITE_IN = struct.Struct("=QQIIQII")
"""fuse_write_in: fh, offset, size, write_flags, lock_owner, flags, padding; the data follows."""
WRITE_OUT = struct.Struct("=IiQII")
"""fuse_out_header and fuse_write_out (size, padding) in one."""
FSYNC_IN = struct.Struct("=QII")
"""fuse_fsync_in: fh, fsync_flags, padding."""
FALLOCATE_IN = struct.Struct("=QQQII")
"""fuse_fallocate_in: fh, offset, length, mode, padding."""
LSEEK_IN = struct.Struct("=QQII")
"""fuse_lseek_in: fh, offset, whence, padding."""
LSEEK_OUT = struct.Struct("=Q")
"""fuse_lseek_out: offset."""
INTERRUPT_IN = struct.Struct("=Q")
"""fuse_interrupt_in: unique of the request meant."""
INIT_OUT = struct.Struct("=IIIIHHIIHHI28x")
"""fuse_init_out: major, minor, max_readahead, flags, max_background, congestion_threshold,
max_write, time_gran, max_pages, map_alignment, flags2, unused."""
OPEN_OUT = struct.Struct("=QII")
"""fuse_open_out: fh, open_flags, padding."""
ENTRY_OUT_SIZE = 128  # fuse_entry_out: 40 bytes and fuse_attr (88)

IN_START = struct.Struct("=IIQ")
"""The start of fuse_in_header that the lane looks at: len, opcode, unique."""
READ_START = struct.Struct("=QQI")
"""The start of fuse_read_in: fh, offset, size."""
WRITE_START = struct.Struct("=QQIIQI")
"""fuse_write_in without its padding."""

BODY = IN_HEADER.size
"""Offset of a request's own structure in its message."""
WRITE_DATA = BODY + WRITE_IN.size
"""Offset of the data in a WRITE message."""
OFFSET_MAX = (1 << 63) - 1
"""Largest offset a file can have (loff_t)."""

_BACKGROUND = struct.Struct("=HH")
_BACKGROUND_OFFSET = OUT_HEADER.size + 16
_INIT_FLAGS_OFFSET = OUT_HEADER.size + 12
NOTIFY_INVAL_INODE = 2
WRITE_CACHE = 1  # in write_flags: from the page cache, later, through any handle
_INVAL_INODE_OUT = struct.Struct("=Qqq")  # inode, offset (negative: attributes alone), length
_U32 = struct.Struct("=I")
_REPLY_SMALL = 4096  # entry, attr, statfs, open...: all far below


def error_reply(unique: int, code: int) -> bytes:
    """Return the answer to request `unique` that carries only an errno (0: done)."""
    return OUT_HEADER.pack(OUT_HEADER.size, -code, unique)


def pages_changed(inode: int, offset: int, size: int) -> bytes:
    """Return the notice that makes the kernel drop its pages of a range; waits for their locks."""
    length = OUT_HEADER.size + _INVAL_INODE_OUT.size
    return OUT_HEADER.pack(length, NOTIFY_INVAL_INODE, 0) + _INVAL_INODE_OUT.pack(
        inode, offset, size
    )


def attributes_changed(inode: int) -> bytes:
    """Return the notice that a file's cached attributes are out of date; no page is touched."""
    size = OUT_HEADER.size + _INVAL_INODE_OUT.size
    return OUT_HEADER.pack(size, NOTIFY_INVAL_INODE, 0) + _INVAL_INODE_OUT.pack(inode, -1, 0)


def improve_init(reply: bytearray, *, max_background: int, congestion_threshold: int) -> None:
    """Correct what libfuse chooses in the answer to INIT, in place.

    The two limits, which libfuse leaves at 12 and 9, cap how many asynchronous requests of a
    guest's queue reach us at once. FUSE_AUTO_INVAL_DATA is taken out: it makes the kernel ask for
    the attributes before a read whenever they have expired, and while asynchronous requests
    complete it discards the answers, so that it asks before every read (measured on 6.18: a
    third of the throughput). It serves files that change behind the kernel; these do not.
    """
    if len(reply) < _BACKGROUND_OFFSET + _BACKGROUND.size or _error_of(reply) != 0:
        return
    _BACKGROUND.pack_into(reply, _BACKGROUND_OFFSET, max_background, congestion_threshold)
    flags = _U32.unpack_from(reply, _INIT_FLAGS_OFFSET)[0]
    _U32.pack_into(reply, _INIT_FLAGS_OFFSET, flags & ~AUTO_INVAL_DATA)


def allow_parallel_writes(reply: bytearray, opcode: int) -> None:
    """Set FOPEN_PARALLEL_DIRECT_WRITES in the answer to OPEN or CREATE, in place."""
    where = OUT_HEADER.size + (ENTRY_OUT_SIZE if opcode == Opcode.CREATE else 0)
    if len(reply) < where + OPEN_OUT.size or _error_of(reply) != 0:
        return
    where += 8  # open_flags follows fh
    flags = _U32.unpack_from(reply, where)[0]
    _U32.pack_into(reply, where, flags | FOPEN_PARALLEL_DIRECT_WRITES)


def limit_reply(message: bytearray, opcode: int, size_max: int) -> int:
    """Return how large the answer to a passed-on request can become; cut READDIR to `size_max`.

    A shorter answer to READDIR is legal: the kernel asks on from where it ended.
    """
    if opcode in (Opcode.READDIR, Opcode.READDIRPLUS, Opcode.READ):
        where = BODY + 16  # size follows fh and offset
        if len(message) < where + _U32.size:
            return _REPLY_SMALL
        size: int = _U32.unpack_from(message, where)[0]
        if opcode != Opcode.READ and size > size_max:
            size = size_max
            _U32.pack_into(message, where, size)
        return _REPLY_SMALL + size
    if opcode in (Opcode.GETXATTR, Opcode.LISTXATTR) and len(message) >= BODY + _U32.size:
        size = _U32.unpack_from(message, BODY)[0]
        return _REPLY_SMALL + size
    return _REPLY_SMALL


def parse_interrupt(message: Buffer) -> int | None:
    """Return the unique that an INTERRUPT means."""
    if len(message) < BODY + INTERRUPT_IN.size:
        return None
    unique: int = INTERRUPT_IN.unpack_from(message, BODY)[0]
    return unique


def _error_of(reply: Buffer) -> int:
    error: int = OUT_HEADER.unpack_from(reply)[1]
    return error
