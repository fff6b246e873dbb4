"""sealfs and scapy open what the other sealed; scapy runs as its own process (net_scapy.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_net_frames import KEY, SALT, SCI, Pair

from sealfs.net.frame import Drop

PROGRAM = Path(__file__).parent / "net_scapy.py"


class Scapy:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, do: str, frame: bytes, number: int, **other: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {
            "do": do, "key": KEY.hex(), "salt": SALT.hex(), "sci": SCI.hex(), "ssci": 1, "an": 2,
            "pn": number, "frame": frame.hex(), **other,
        }  # fmt: skip
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found


@pytest.fixture(scope="module")
def scapy() -> Iterator[Scapy]:
    peer = Scapy()
    yield peer
    assert peer.process.stdin is not None
    assert peer.process.stdout is not None
    peer.process.stdin.close()
    peer.process.stdout.close()
    assert peer.process.wait(20) == 0


def frame_of(size: int) -> bytes:
    # A local experimental EtherType, so that scapy reads nothing into the payload.
    return bytes.fromhex("02000000000102000000000288b6") + os.urandom(size - 14)


NUMBERS = [1, 2, 77, (1 << 32) - 1, (1 << 32) + 5, (7 << 32) + 9]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("size", [15, 59, 60, 61, 1422, 8900])
def test_scapy_opens_what_sealfs_sealed(scapy: Scapy, size: int, number: int) -> None:
    pair, frame = Pair(), frame_of(size)
    pair.sending.next_number = number
    found = scapy.ask("open", pair.seal(frame), number)
    assert bytes.fromhex(found["frame"]) == frame
    tag = found["tag"]
    assert (tag["SC"], tag["E"], tag["C"], tag["AN"]) == (1, 1, 1, 2)
    assert tag["PN"] == number & 0xFFFFFFFF
    assert tag["SL"] == (size - 12 if size - 12 < 48 else 0)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("size", [15, 59, 60, 61, 1422, 8900])
def test_sealfs_opens_what_scapy_sealed(scapy: Scapy, size: int, number: int) -> None:
    pair, frame = Pair(), frame_of(size)
    if number > 1:
        pair.receiving.window.mark(number - 1)
    sealed = bytes.fromhex(scapy.ask("seal", frame, number)["frame"])
    assert pair.open(sealed) == frame
    pair.sending.next_number = number
    assert pair.seal(frame) == sealed  # byte by byte the same


def test_both_refuse_an_altered_frame_and_another_key(scapy: Scapy) -> None:
    pair, frame = Pair(), frame_of(100)
    sealed = pair.seal(frame)
    altered = sealed[:-1] + bytes([sealed[-1] ^ 1])
    assert scapy.ask("open", altered, 1)["error"] == "InvalidTag"
    assert scapy.ask("open", sealed, 1, key=bytes(32).hex())["error"] == "InvalidTag"
    theirs = bytes.fromhex(scapy.ask("seal", frame, 1, key=bytes(32).hex())["frame"])
    assert pair.open(theirs) == Drop.BAD_ICV
