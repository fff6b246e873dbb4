"""A TPM that loses what was loaded, or is restarted: between two uses and in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keys_support as ks
import pytest

from sealfs.errors import TpmUnavailable
from sealfs.keys import host
from sealfs.keys.service import KeyService
from sealfs.keys.swtpm import Channel
from sealfs.keys.tpm import Tpm

pytestmark = pytest.mark.tpm

CC_FLUSH_CONTEXT = 0x165
CC_UNSEAL = 0x15E
CC_POLICY_PCR = 0x17F


class Forgetful:
    """A channel whose TPM loses what a command names, before the `times` first of that kind.

    `at` is where the handle stands in the command: 10 for the first one. TPM2_FlushContext is sent
    for it: to the command that follows it is what a reset does.
    """

    def __init__(self, channel: Channel, code: int, *, times: int = 1, at: int = 10) -> None:
        self._channel = channel
        self._code = code
        self._at = at
        self.left = times

    def transmit(self, command: bytes) -> None:
        if self.left and command[6:10] == self._code.to_bytes(4, "big"):
            self.left -= 1
            handle = command[self._at : self._at + 4]
            self._channel.transmit(
                bytes.fromhex("80010000000e") + CC_FLUSH_CONTEXT.to_bytes(4, "big") + handle
            )
            answer = self._channel.receive(None)
            assert answer is not None
            assert answer[6:10] == bytes(4)
        self._channel.transmit(command)

    def receive(self, wait_s: float | None) -> bytes | None:
        return self._channel.receive(wait_s)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    ks.initialised_state(tmp_path / "state")
    return tmp_path / "state"


def forgetting(state: Path, code: int, **options: Any) -> tuple[KeyService, list[Forgetful]]:
    made: list[Forgetful] = []

    def wrap(channel: Channel) -> Channel:
        made.append(Forgetful(channel, code, **options))
        return made[-1]

    return ks.wrapped_service(state, wrap), made


@pytest.mark.parametrize("pcrs", [(), (16,)])
def test_an_object_lost_between_load_and_unseal_is_loaded_again(state, pcrs):
    with KeyService.open(state) as keys:
        key = ks.key_bytes(keys.create("web1", pcrs=pcrs))
    service, made = forgetting(state, CC_UNSEAL)
    with service:
        assert ks.key_bytes(service.unseal("web1", "web1")) == key
    assert [channel.left for channel in made] == [0]


def test_a_session_lost_before_it_is_used_is_begun_again(state):
    with KeyService.open(state) as keys:
        key = ks.key_bytes(keys.create("web1", pcrs=(16,)))
    service, _ = forgetting(state, CC_POLICY_PCR)
    with service:
        assert ks.key_bytes(service.unseal("web1", "web1")) == key


def test_what_is_lost_every_time_is_said(state):
    with KeyService.open(state) as keys:
        keys.create("web1").wipe()
    service, _ = forgetting(state, CC_UNSEAL, times=9)
    with service, pytest.raises(TpmUnavailable, match="reset while in use") as caught:
        service.unseal("web1", "web1")
    assert caught.value.code == 0x910


@pytest.fixture
def standing() -> Iterator[ks.StandingTpm]:
    with ks.standing_tpm() as tpm:
        yield tpm


class Killing:
    """Kills a TPM before the first `times` calls of a method of `Tpm`; starts it again or not."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, tpm: ks.StandingTpm, method: str, *,
        comes_back: bool = True, times: int = 1,
    ) -> None:  # fmt: skip
        self.left = times
        real = getattr(Tpm, method)

        def call(this: Tpm, *arguments: Any, **options: Any) -> Any:
            if self.left:
                self.left -= 1
                tpm.stop()
                if comes_back:
                    tpm.start()
            return real(this, *arguments, **options)

        monkeypatch.setattr(Tpm, method, call)


def test_a_tpm_restarted_between_two_uses_is_used_again(standing, tmp_path):
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    with KeyService.open(tmp_path / "state") as keys:
        with keys.create("web1") as key:
            wrapped = key.wrap_image_key(bytes(16), b"I" * 32)
        for _ in range(2):
            standing.stop()
            standing.start()
            assert keys.image_key("web1", "web1", bytes(16), wrapped) == b"I" * 32
            keys.ledger.begin()


@pytest.mark.parametrize("method", ["attach", "unseal", "seal", "random", "counter_value"])
def test_a_tpm_restarted_in_the_middle_of_a_use_is_asked_again(
    standing, tmp_path, monkeypatch, method
):
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    with KeyService.open(tmp_path / "state") as keys:
        keys.create("web1").wipe()
        killing = Killing(monkeypatch, standing, method)
        keys.unseal("web1", "web1").wipe()
        new = keys.new_image_key("web1", bytes(16))
        keys.create("web2").wipe()
        keys.ledger.begin()
        assert killing.left == 0
        assert keys.image_key("web1", "web1", bytes(16), new.wrapped) == new.key
        assert keys.audit.verify()[1] == []


@pytest.mark.parametrize("method", ["attach", "unseal", "seal", "random", "counter_value"])
def test_a_use_is_done_once_more_where_its_connection_broke(
    standing, tmp_path, monkeypatch, method
):
    """Away for a moment: what was asked meanwhile is refused by the socket."""
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    waited: list[float] = []

    def come_back(wait_s: float) -> None:
        waited.append(wait_s)
        standing.start()

    monkeypatch.setattr(host, "time", SimpleNamespace(sleep=come_back))
    with KeyService.open(tmp_path / "state") as keys:
        keys.create("web1").wipe()
        Killing(monkeypatch, standing, method, comes_back=False)
        keys.unseal("web1", "web1").wipe()
        keys.create("web2").wipe()
        keys.ledger.begin()
        assert waited == [host.REOPEN_WAIT_S]
        assert keys.audit.verify()[1] == []


def test_a_tpm_that_stays_away_is_said_and_serves_again_later(standing, tmp_path, monkeypatch):
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    monkeypatch.setattr(host, "REOPEN_WAIT_S", 0.01)
    with KeyService.open(tmp_path / "state") as keys:
        keys.create("web1").wipe()
        Killing(monkeypatch, standing, "unseal", comes_back=False)
        for _ in range(2):
            with pytest.raises(TpmUnavailable, match="does not answer"):
                keys.unseal("web1", "web1")
        standing.start()
        keys.unseal("web1", "web1").wipe()


def test_no_pin_is_tried_again_because_a_connection_broke(standing, tmp_path, monkeypatch):
    ks.fresh_state(tmp_path / "state", tpm=standing.spec)
    monkeypatch.setattr(host, "time", SimpleNamespace(sleep=lambda wait_s: pytest.fail("waited")))
    with KeyService.open(tmp_path / "state") as keys:
        keys.create("web1", pin=bytearray(b"2468")).wipe()
        Killing(monkeypatch, standing, "unseal", comes_back=False)
        with pytest.raises(TpmUnavailable, match="does not answer"):
            keys.unlock("web1", bytearray(b"2468"))
        standing.start()
        keys.unlock("web1", bytearray(b"2468"))
        keys.unseal("web1", "web1").wipe()
