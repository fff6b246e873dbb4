"""The kernel backend: what `ip` is told, when, and that the two ends are told the same.

The kernel here need not have MACsec: `Kernel` takes the lines as `ip -batch` would and keeps what
the kernel would have. Where the kernel has it, test_net_live.py has a live one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from net_simulation import End, Nonces, Wire, sci_of

from sealfs.errors import StorageFailed, UsageError
from sealfs.net import kernel
from sealfs.net.association import PREVIOUS_LIFE, Timing
from sealfs.net.cipher import DirectionKey, KeySpent
from sealfs.net.kernel import KernelKeys
from sealfs.net.service import Request

KEY = (
    r"xpn 1 salt (?P<salt>[0-9a-f]{24}) ssci (?P<ssci>[12]) on "
    r"key [0-9a-f]{32} (?P<key>[0-9a-f]{64})"
)


class Kernel:
    """A MACsec device as `ip` would make it; refuses what the kernel would."""

    def __init__(self) -> None:
        self.sending: dict[int, tuple[str, ...]] = {}
        self.receiving: dict[tuple[str, int], tuple[str, ...]] = {}
        self.channels: set[str] = set()
        self.encoding: int | None = None
        self.is_there = False
        self.sealed_under: set[tuple[str, ...]] = set()

    def __call__(self, lines: Sequence[str]) -> None:
        for line in lines:
            assert "\n" not in line
            self.take(line)

    def take(self, line: str) -> None:
        if found := re.fullmatch(rf"macsec add ms0 tx sa (\d) {KEY}", line):
            number = int(found[1])
            assert number not in self.sending, "the kernel has a key there: EBUSY"
            fresh = found.group("salt", "ssci", "key")
            assert fresh not in self.sealed_under, "packet numbers would begin again"
            self.sealed_under.add(fresh)
            self.sending[number] = fresh
        elif found := re.fullmatch(rf"macsec add ms0 rx sci (\w{{16}}) sa (\d) {KEY}", line):
            assert found[1] in self.channels
            place = (found[1], int(found[2]))
            assert place not in self.receiving, "the kernel has a key there: EBUSY"
            self.receiving[place] = found.group("salt", "ssci", "key")
        elif found := re.fullmatch(r"macsec add ms0 rx sci (\w{16}) on", line):
            assert found[1] not in self.channels
            self.channels.add(found[1])
        elif found := re.fullmatch(r"link set ms0 type macsec encodingsa (\d)", line):
            self.encoding = int(found[1])
            assert self.encoding in self.sending
        elif found := re.fullmatch(r"macsec del ms0 tx sa (\d)", line):
            del self.sending[int(found[1])]
        elif found := re.fullmatch(r"macsec del ms0 rx sci (\w{16}) sa (\d)", line):
            del self.receiving[found[1], int(found[2])]
        elif line == "link delete ms0":
            assert self.is_there
            self.is_there = False
        else:
            assert re.fullmatch(
                r"link add link eth1 name ms0 type macsec sci \w{16} cipher gcm-aes-xpn-256 icvlen "
                r"16 encrypt on send_sci on protect on validate strict replay on window 2048"
                r"|link set ms0 (up|mtu \d+)",
                line,
            ), line
            self.is_there = True

    @property
    def current(self) -> tuple[str, ...] | None:
        return None if self.encoding is None else self.sending[self.encoding]


def kernel_ends(timing: Timing | None = None) -> tuple[Wire, list[Kernel]]:
    rng, nonces, kernels, ends = random.Random(1), Nonces(), [], []
    for number in (1, 2):
        there = Kernel()
        kernels.append(there)
        end = End(number, rng=rng, nonces=nonces, timing=timing)
        end.association._keeper = KernelKeys("ms0", "eth1", sci_of(number), there)
        ends.append(end)
    return Wire((ends[0], ends[1]), rng), kernels


def meet(wire: Wire, kernels: list[Kernel]) -> None:
    """What one kernel seals under now the other opens."""
    for ours, theirs, number in ((*kernels, 1), (*kernels[::-1], 2)):
        place = (sci_of(number).hex(), ours.encoding)
        assert ours.current is not None
        assert theirs.receiving[place] == ours.current  # type: ignore[index]


def test_both_kernels_get_the_same_keys_and_this_process_seals_nothing() -> None:
    wire, kernels = kernel_ends()
    wire.run(3)
    meet(wire, kernels)
    assert len({there.current for there in kernels}) == 2
    for end in wire.ends:
        current = end.association.current
        assert current is not None
        assert current.kept is None
        with pytest.raises(KeySpent):
            current.sending.seal_into(memoryview(bytearray(100)), 0, memoryview(bytes(20)))
        assert end.association.state == "up"


def test_a_day_of_rekeying_in_the_kernel() -> None:
    wire, kernels = kernel_ends()
    for _ in range(24):
        wire.run(3600, step=2)
        meet(wire, kernels)
    wire.run(PREVIOUS_LIFE + 1)
    for there in kernels:
        assert 24 <= len(there.sealed_under) <= 26
        assert len(there.sending) == len(there.receiving) == 1


def test_kernels_meet_again_after_one_end_was_killed() -> None:
    wire, kernels = kernel_ends()
    wire.run(3)
    kernels[0] = Kernel()
    wire.ends[0].revive()
    wire.ends[0].association._keeper = KernelKeys("ms0", "eth1", sci_of(1), kernels[0])
    wire.run(3)
    meet(wire, kernels)


def test_frames_are_opened_before_the_other_end_seals_them() -> None:
    """On both ends the receiving key is there before the other end has proven to have the keys."""
    wire, kernels = kernel_ends(Timing(rekey_age=100))
    for _ in range(4000):
        wire.run(0.1, step=0.1)
        if all(there.current for there in kernels):
            meet(wire, kernels)


def test_the_device_goes_with_its_keys() -> None:
    there = Kernel()
    keys = KernelKeys("ms0", "eth1", sci_of(1), there)
    key = DirectionKey(b"k" * 32, b"s" * 12, 1)
    keys.installed(sci_of(2), 0, key)
    keys.confirmed(0, DirectionKey(b"l" * 32, b"s" * 12, 2))
    keys.close()
    assert not there.is_there
    keys.forgotten(sci_of(2), 0)  # says nothing: all is gone


def fake_ip(directory: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Path:
    """Put an `ip` into PATH that writes down its arguments and input."""
    program = directory / "ip"
    program.write_text(
        f'#!/bin/sh\necho "$@" >>{directory}/arguments\ncat >>{directory}/input\n{script}\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory


def test_keys_are_no_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = fake_ip(tmp_path, monkeypatch, "")
    keys = KernelKeys("ms0", "eth1", sci_of(1))
    keys.installed(sci_of(2), 0, DirectionKey(b"k" * 32, b"s" * 12, 1))
    assert set((where / "arguments").read_text().split("\n")) == {"-batch -", ""}
    assert (b"k" * 32).hex() in (where / "input").read_text()


def test_a_failure_names_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = DirectionKey(b"k" * 32, b"s" * 12, 1)
    says = f"RTNETLINK answers: no such thing as {key.key.hex()}"
    fake_ip(tmp_path, monkeypatch, f'echo "{says}" >&2; echo "Command failed -:1" >&2; exit 1')
    with pytest.raises(StorageFailed) as caught:
        kernel.run_ip(kernel.sending("ms0", 0, key))
    assert str(caught.value) == '"ip macsec": RTNETLINK answers: no such thing as ...'
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("says", "is_there"),
    [("Error: Unknown device type.", False), ("RTNETLINK answers: Invalid argument", True)],
)
def test_whether_the_kernel_has_macsec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str, is_there: bool
) -> None:
    fake_ip(tmp_path, monkeypatch, f'echo "{says}" >&2; exit 2')
    assert kernel.is_there() is is_there
    if is_there:
        kernel.require()
    else:
        with pytest.raises(UsageError, match="this kernel has no MACsec; the userspace backend"):
            kernel.require()


def test_the_kernel_backend_needs_raw_ethernet() -> None:
    asked: dict[str, Any] = {
        "vm": "web1", "network": "net1", "device": 0, "port": {"tap": "ms0"},
        "link": {"device": "eth1"}, "peers": ["52:54:00:00:00:01"], "backend": "kernel",
    }  # fmt: skip
    assert Request.parse(asked).backend == "kernel"
    for change in (
        {"link": {"listen": "10.0.0.1:1"}}, {"port": {"qemu": "/x"}}, {"backend": "other"},
    ):  # fmt: skip
        with pytest.raises(UsageError):
            Request.parse({**asked, **change})
