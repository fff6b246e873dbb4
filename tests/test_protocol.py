"""The FUSE structures against bytes of a real kernel.

Vectors: recorded with strace from a mount of sealfs on Linux 6.18 (x86-64), libfuse 3.14.0, by a
program that opened a file, read with O_DIRECT, wrote 5 bytes with RWF_DSYNC, synced, punched,
zeroed and sought. Little-endian.
"""

import sys

import pytest

from sealfs.mount import protocol
from sealfs.mount.protocol import BODY, Fallocate, Opcode

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="vectors are little-endian")

HEADER = "0f2422000000000000000000000000007658000000000000"  # node 2237455, root, pid 22646
READ = bytes.fromhex(
    "500000000f0000000a00000000000000" + HEADER + "01000000000000000020000000000000"
    "001000000200000060a9d49a78b4901c02c0000000000000"
)
WRITE = bytes.fromhex(
    "55000000100000001400000000000000" + HEADER + "02000000000000003930000000000000"
    "05000000000000000000000000000000029000000000000068656c6c6f"
)
FDATASYNC = bytes.fromhex(
    "38000000140000001600000000000000" + HEADER + "02000000000000000100000000000000"
)
PUNCH = bytes.fromhex(
    "480000002b0000001c00000000000000" + HEADER + "02000000000000000010000000000000"
    "00200000000000000300000000000000"
)
ZERO = bytes.fromhex(
    "480000002b0000001e00000000000000" + HEADER + "02000000000000000010000000000000"
    "00200000000000001000000000000000"
)
SEEK_DATA = bytes.fromhex(
    "400000002e0000002000000000000000" + HEADER + "020000000000000009030000000000000300000000000000"
)
INIT_REPLY = bytes.fromhex(
    "50000000000000000200000000000000070000001f0000000000020039b04040"
    "0000000000001000010000000001000000000000" + "00" * 28
)
OPEN_REPLY = bytes.fromhex("2000000000000000080000000000000001000000000000000000000000000000")


def test_header_of_every_vector() -> None:
    for message, opcode, unique in (
        (READ, Opcode.READ, 10),
        (WRITE, Opcode.WRITE, 20),
        (FDATASYNC, Opcode.FSYNC, 22),
        (PUNCH, Opcode.FALLOCATE, 28),
        (ZERO, Opcode.FALLOCATE, 30),
        (SEEK_DATA, Opcode.LSEEK, 32),
    ):
        header = protocol.IN_HEADER.unpack_from(message)
        assert header == (len(message), opcode, unique, 2237455, 0, 0, 22646, 0, 0)


def test_read_in() -> None:
    fh, offset, size, read_flags, _, flags, padding = protocol.READ_IN.unpack_from(READ, BODY)
    assert (fh, offset, size, read_flags, padding) == (1, 8192, 4096, 2, 0)
    assert flags & 0o40000  # O_DIRECT
    assert len(READ) == BODY + protocol.READ_IN.size


def test_write_in_carries_the_flags_of_the_call() -> None:
    fh, offset, size, write_flags, _, flags, _ = protocol.WRITE_IN.unpack_from(WRITE, BODY)
    assert (fh, offset, size, write_flags) == (2, 12345, 5, 0)
    assert flags & 0o10000  # RWF_DSYNC arrives as O_DSYNC
    assert WRITE[protocol.WRITE_DATA :] == b"hello"


def test_fsync_fallocate_and_lseek_in() -> None:
    assert protocol.FSYNC_IN.unpack_from(FDATASYNC, BODY) == (2, 1, 0)
    punch = Fallocate.PUNCH_HOLE | Fallocate.KEEP_SIZE
    assert protocol.FALLOCATE_IN.unpack_from(PUNCH, BODY) == (2, 4096, 8192, punch, 0)
    assert protocol.FALLOCATE_IN.unpack_from(ZERO, BODY)[3] == Fallocate.ZERO_RANGE
    assert protocol.LSEEK_IN.unpack_from(SEEK_DATA, BODY) == (2, 777, 3, 0)


def test_init_reply_is_improved_and_nothing_else_of_it_changes() -> None:
    reply = bytearray(INIT_REPLY)
    protocol.improve_init(reply, max_background=128, congestion_threshold=96)
    before = protocol.INIT_OUT.unpack_from(INIT_REPLY, protocol.OUT_HEADER.size)
    after = protocol.INIT_OUT.unpack_from(reply, protocol.OUT_HEADER.size)
    assert before[:3] == after[:3] == (7, 31, 131072)
    assert before[3] & protocol.AUTO_INVAL_DATA
    assert after[3] == before[3] & ~protocol.AUTO_INVAL_DATA
    assert after[4:6] == (128, 96)
    assert before[6:] == after[6:]
    assert after[6] == 1 << 20  # max_write


def test_open_reply_allows_parallel_writes() -> None:
    reply = bytearray(OPEN_REPLY)
    protocol.allow_parallel_writes(reply, Opcode.OPEN)
    assert protocol.OPEN_OUT.unpack_from(reply, 16) == (1, 1 << 6, 0)
    created = bytearray(OPEN_REPLY[:16] + bytes(protocol.ENTRY_OUT_SIZE) + OPEN_REPLY[16:])
    protocol.allow_parallel_writes(created, Opcode.CREATE)
    assert created[:144] == OPEN_REPLY[:16] + bytes(128)
    assert protocol.OPEN_OUT.unpack_from(created, 144) == (1, 1 << 6, 0)


def test_a_refusal_or_a_short_reply_is_left_alone() -> None:
    for raw in (protocol.error_reply(8, 13), OPEN_REPLY[:20], b""):
        reply = bytearray(raw)
        protocol.allow_parallel_writes(reply, Opcode.OPEN)
        protocol.improve_init(reply, max_background=128, congestion_threshold=96)
        assert reply == raw


def test_readdir_is_cut_and_other_requests_are_not() -> None:
    readdir = bytearray(READ)
    assert protocol.limit_reply(readdir, Opcode.READDIRPLUS, 1024) == 4096 + 1024
    assert protocol.READ_IN.unpack_from(readdir, BODY)[2] == 1024
    read = bytearray(READ)
    assert protocol.limit_reply(read, Opcode.READ, 1024) == 4096 + 4096
    assert read == READ
    assert protocol.limit_reply(bytearray(BODY), Opcode.READDIR, 1024) == 4096


def test_error_reply() -> None:
    assert protocol.error_reply(7, 5) == bytes.fromhex("10000000fbffffff0700000000000000")
