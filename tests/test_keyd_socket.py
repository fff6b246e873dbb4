"""The key broker's protocol and its two ends, over a real socket; the keys need no TPM here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from keyd_support import Running, answer_of, ask, raw_connection, wait_until
from mount_support import TinyKeys

from sealfs.errors import (
    AlreadyExists,
    Busy,
    ForeignImage,
    KeydUnavailable,
    KeyRefused,
    KeyServiceError,
    RolledBack,
    TpmUnavailable,
    UsageError,
)
from sealfs.keys import broker as broker_module
from sealfs.keys import keyd_wire, remote
from sealfs.keys.broker import Broker
from sealfs.keys.ledger import Progress
from sealfs.keys.registry import RegistryEntry
from sealfs.keys.remote import RemoteKeys

NOBODY = 65534
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with Running(tmp_path / "state") as found:
        yield found


@pytest.fixture
def keys(running: Running) -> Iterator[RemoteKeys]:
    found = RemoteKeys.open(running.path)
    yield found
    found.close()


def counter(state: Path) -> int:
    return int((state / "counter").read_text())


# The same as in process.


def test_image_keys_are_those_of_the_key_service(keys: RemoteKeys, tmp_path: Path) -> None:
    ours, image = TinyKeys(tmp_path / "state"), uuid.uuid4().bytes
    made = keys.new_image_key("web1", image)
    assert len(made.key) == 32
    assert made.key == ours.image_key(made.kmi, "web1", image, made.wrapped)
    assert made.key == keys.image_key(made.kmi, "web1", image, made.wrapped)
    (tmp_path / "state" / "refused").write_text("web1")
    with pytest.raises(KeyRefused, match=r'^"web1": revoked$'):
        keys.image_key(made.kmi, "web1", image, made.wrapped)


def test_a_bug_of_the_key_service_is_one_refusal(
    keys: RemoteKeys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state" / "bug").touch()
    with pytest.raises(KeyServiceError, match="internal error: ValueError"):
        keys.new_image_key("web1", bytes(16))
    assert "a bug of the key service" in caplog.text
    (tmp_path / "state" / "bug").unlink()
    keys.new_image_key("web1", bytes(16))


def test_the_registry_is_that_of_the_state_directory(keys: RemoteKeys, tmp_path: Path) -> None:
    ours = TinyKeys(tmp_path / "state").registry
    one, two = uuid.uuid4().bytes, uuid.uuid4().bytes
    (tmp_path / "link").symlink_to(tmp_path)
    plain = tmp_path / os.fsdecode(b"w\xff\xc3\xa4.sealed")
    keys.registry.add(tmp_path / "link" / plain.name, one, "wäb")
    assert keys.registry.entries() == ours.entries() == [RegistryEntry(str(plain), one, "wäb")]
    assert keys.registry.lookup(plain) == ours.lookup(plain)
    assert keys.registry.lookup(tmp_path / "other") is None
    keys.registry.check(plain, one, "wäb")
    for same in (ours, keys.registry):
        with pytest.raises(ForeignImage, match="exchanged by somebody"):
            same.check(plain, two, "wäb")
        with pytest.raises(AlreadyExists, match="is registered as an image of VM 'wäb'"):
            same.add(plain, two, "other")
    keys.registry.add(plain, two, "other", replace=True)
    assert [entry.vm_id for entry in ours.entries()] == ["other"]
    keys.registry.remove(plain)
    assert ours.entries() == []


def test_a_registry_larger_than_a_message(keys: RemoteKeys, tmp_path: Path) -> None:
    from sealfs.keys.registry import RegistryFile
    from sealfs.keys.statedir import REGISTRY_FILE, StateDir

    many = tuple(
        RegistryEntry(f"/srv/{'x' * 200}/{n:05}", uuid.uuid4().bytes, f"vm{n}") for n in range(5000)
    )
    state = StateDir(tmp_path / "state")
    with state.lock() as held:
        whole = RegistryFile(bytes(16), many).with_mac(b"tests" * 8).encode()
        state.write(REGISTRY_FILE, whole, held)
    assert len(whole) > keyd_wire.MESSAGE_SIZE_MAX
    assert tuple(keys.registry.entries()) == many


def test_a_move_holds_both_names_until_it_is_done(keys: RemoteKeys, tmp_path: Path) -> None:
    one, two = uuid.uuid4().bytes, uuid.uuid4().bytes
    old, new = tmp_path / "old", tmp_path / "new"
    keys.registry.add(old, one, "a")
    keys.registry.add(new, two, "b")

    def names() -> list[tuple[str, str]]:
        return [(Path(entry.path).name, entry.vm_id) for entry in keys.registry.entries()]

    with keys.registry.moving([(old, new)]):
        assert sorted(names()) == [("new", "a"), ("new", "b"), ("old", "a")]
    assert names() == [("new", "a")]
    with pytest.raises(OSError, match="no rename"), keys.registry.moving([(new, old)]):
        raise OSError("no rename")
    assert names() == [("new", "a")]
    keys.registry.check(new, one, "a")


def test_who_dies_in_a_move_leaves_both_names(running: Running, tmp_path: Path) -> None:
    image, old, new = uuid.uuid4().bytes, tmp_path / "old", tmp_path / "new"
    mine = TinyKeys(tmp_path / "state").registry
    mine.add(old, image, "a")
    with raw_connection(running.path) as dying:
        assert ask(dying, {"verb": "move", "old": str(old), "new": str(new)})["ok"]
        assert ask(dying, {"verb": "move_begin"})["ok"]
        assert "within another" in ask(dying, {"verb": "move_begin"})["error"]["detail"]
    wait_until(lambda: not running.groups())
    assert [entry.path for entry in mine.entries()] == [str(new), str(old)]
    mine.check(new, image, "a")
    with raw_connection(running.path) as other:
        assert "ends no move" in ask(other, {"verb": "move_end", "done": True})["error"]["detail"]


def test_keyd_that_dies_in_a_move_leaves_both_names(running: Running, tmp_path: Path) -> None:
    keys, image = RemoteKeys.open(running.path), uuid.uuid4().bytes
    old, new = tmp_path / "old", tmp_path / "new"
    keys.registry.add(old, image, "a")
    with pytest.raises(KeydUnavailable), keys.registry.moving([(old, new)]):
        running.stop()
    running.start()
    assert [Path(entry.path).name for entry in keys.registry.entries()] == ["new", "old"]
    keys.registry.check(new, image, "a")
    keys.close()


def test_the_ledger_is_that_of_the_state_directory(keys: RemoteKeys, tmp_path: Path) -> None:
    ours = TinyKeys(tmp_path / "state").ledger
    images = {uuid.uuid4().bytes: Progress(n, os.urandom(16)) for n in range(1, 600)}
    keys.ledger.begin()
    keys.ledger.note(images)
    for image in list(images)[::97]:
        assert keys.ledger.find(image) == ours.find(image) == images[image]
    assert keys.ledger.find(bytes(16)) is None
    image = next(iter(images))
    older = Progress(0, bytes(16))
    keys.ledger.note({image: older})
    assert ours.find(image) == images[image]
    keys.ledger.accept(image, older)
    assert ours.find(image) == older
    keys.ledger.accept(image, None)
    assert ours.find(image) is None
    before = counter(tmp_path / "state")
    keys.ledger.bump()
    assert counter(tmp_path / "state") == before + 2
    (tmp_path / "state" / "counter").write_text(str(before + 9))
    with pytest.raises(RolledBack, match="the TPM's counter"):
        keys.ledger.find(image)


def test_a_group_begins_once_whatever_its_connections(running: Running, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first, second = RemoteKeys.open(running.path), RemoteKeys.open(running.path)
    first.ledger.begin()
    assert counter(state) == 2
    threads = [threading.Thread(target=first.ledger.begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first.ledger.begin()
    assert counter(state) == 2
    second.ledger.begin()
    assert counter(state) == 4
    assert running.groups() == 2
    first.close()
    second.close()
    wait_until(lambda: not running.groups())


@pytest.mark.parametrize("write", ["note", "accept", "bump"])
def test_a_mount_begins_again_after_keyd_was_started_anew(
    running: Running, tmp_path: Path, write: str
) -> None:
    keys, image = RemoteKeys.open(running.path), uuid.uuid4().bytes
    keys.ledger.begin()
    running.stop()
    running.start()
    progress = Progress(1, bytes(16))
    arguments: dict[str, tuple[Any, ...]] = {
        "note": ({image: progress},), "accept": (image, progress), "bump": ()
    }  # fmt: skip
    getattr(keys.ledger, write)(*arguments[write])
    assert counter(tmp_path / "state") == (6 if write == "bump" else 4)
    keys.close()


def test_errors_arrive_with_what_they_carry() -> None:
    for error in (TpmUnavailable("tpm", "no", 0x921), TpmUnavailable("tpm", "no"), Busy("x", "y")):
        found = keyd_wire.error_from(keyd_wire.decode(
            keyd_wire.encode(keyd_wire.error_document(error))
        ))  # fmt: skip
        assert type(found) is type(error)
        assert (str(found), vars(found)) == (str(error), vars(error))
    stranger = keyd_wire.error_from({"type": "OSError", "subject": "s", "detail": "d"})
    assert type(stranger) is KeyServiceError
    # However long the sentence, it fits a message.
    keyd_wire.encode(keyd_wire.error_document(Busy("\U0001f512" * 9999, "\U0001f512" * 9999)))


# What is handed over.


def test_a_key_is_handed_over_in_memory_that_nobody_can_change() -> None:
    descriptor = keyd_wire.sealed_memory(b"k" * 32)
    try:
        for change in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 1),
            lambda: os.ftruncate(descriptor, 4096),
            lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                change()
        assert keyd_wire.read_sealed_memory(descriptor, 32, 32) == b"k" * 32
        for size in (31, 33):
            with pytest.raises(KeydUnavailable, match="no sealed key"):
                keyd_wire.read_sealed_memory(descriptor, size, size)
    finally:
        os.close(descriptor)


def test_keyd_wipes_the_keys_that_it_hands_over(tmp_path: Path) -> None:
    class Kept(TinyKeys):
        def image_key(self, *arguments: Any) -> bytearray:
            given.append(super().image_key(*arguments))
            return given[-1]

        def new_image_key(self, *arguments: Any) -> Any:
            new = super().new_image_key(*arguments)
            given.append(new.key)
            return new

    given: list[bytearray] = []
    with Running(tmp_path / "state", make=lambda: Kept(tmp_path / "state", str)) as running:
        keys = RemoteKeys.open(running.path)
        made = keys.new_image_key("web1", bytes(16))
        assert keys.image_key(made.kmi, "web1", bytes(16), made.wrapped) == made.key != bytes(32)
        assert given == [bytes(32), bytes(32)]
        keys.close()


def test_memory_that_somebody_can_change_is_refused(tmp_path: Path) -> None:
    for descriptor in (
        os.memfd_create("open", os.MFD_ALLOW_SEALING),
        os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT),
    ):
        os.write(descriptor, b"k" * 32)
        with pytest.raises(KeydUnavailable, match="no sealed key"):
            keyd_wire.read_sealed_memory(descriptor, 32, 32)
        os.close(descriptor)


def test_descriptors_do_not_pile_up(keys: RemoteKeys) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    made = keys.new_image_key("web1", bytes(16))
    before = count()
    for _ in range(20):
        keys.image_key(made.kmi, "web1", bytes(16), made.wrapped)
        keys.registry.entries()
        keys.lock_image("x", bytes(16), shared=False).close()
    # The broker closes its copy right after the client has its own.
    wait_until(lambda: count() <= before)


def test_an_image_lock_is_held_until_it_is_closed(running: Running, tmp_path: Path) -> None:
    keys, image = RemoteKeys.open(running.path), uuid.uuid4().bytes
    held = keys.lock_image("a.sealed", image, shared=False)
    for other in (keys, TinyKeys(tmp_path / "state")):
        with pytest.raises(Busy, match=r'"b\.sealed": is in use by another'):
            other.lock_image("b.sealed", image, shared=False)
    running.stop()  # it outlives keyd
    with pytest.raises(Busy):
        TinyKeys(tmp_path / "state").lock_image("b.sealed", image, shared=False)
    held.close()
    TinyKeys(tmp_path / "state").lock_image("b.sealed", image, shared=False).close()
    with Running(tmp_path / "state"):
        shared = [keys.lock_image("a.sealed", image, shared=True) for _ in range(2)]
        for lock in shared:
            lock.close()
        keys.close()


# Keyd away, and back.


def test_nobody_answers_and_then_somebody_does(running: Running) -> None:
    keys = RemoteKeys.open(running.path)
    made = keys.new_image_key("web1", bytes(16))
    running.stop()
    for question in (
        lambda: keys.image_key(made.kmi, "web1", bytes(16), made.wrapped),
        lambda: keys.ledger.note({bytes(16): Progress(1, bytes(16))}),
        lambda: keys.registry.entries(),
        lambda: RemoteKeys.open(running.path),
    ):
        with pytest.raises(KeydUnavailable, match="keyd does not answer: No such file"):
            question()
    running.start()
    assert keys.image_key(made.kmi, "web1", bytes(16), made.wrapped) == made.key
    keys.close()


def test_keyd_that_dies_while_it_is_asked(tmp_path: Path) -> None:
    """The connection ends after the question: it is asked once more, and no more than that."""
    path, asked = tmp_path / "s", []

    def serve(listener: socket.socket) -> None:
        for _ in range(3):
            connection, _ = listener.accept()
            with connection:
                connection.send(keyd_wire.encode({"ok": True, "version": 1}))
                connection.recv(4096)
                connection.send(b'{"ok": true, "state": "/s"}')
                asked.append(connection.recv(4096))

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        keys = RemoteKeys.open(path)
        with pytest.raises(KeydUnavailable, match="ended before it answered"):
            keys.ledger.begin()
        assert asked == [b'{"verb":"begin"}'] * 2
        keys.close()
        with pytest.raises(KeydUnavailable):
            keys.ledger.bump()
        thread.join(10)


def test_keyd_that_is_stopped_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ANSWER_WAIT_S", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(KeydUnavailable, match=r"did not answer for 0\.05 s"):
            RemoteKeys.open(tmp_path / "s")


def test_a_keyd_that_is_behind_with_its_visitors_is_waited_for(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        for visitor in waiting:
            visitor.setblocking(False)
        waiting[0].connect(str(tmp_path / "s"))
        with pytest.raises(BlockingIOError):
            waiting[1].connect(str(tmp_path / "s"))
        errors: list[BaseException] = []

        def ask_for_keys() -> None:
            try:
                RemoteKeys.open(tmp_path / "s")
            except KeydUnavailable as error:
                errors.append(error)

        thread = threading.Thread(target=ask_for_keys)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        for _ in range(2):
            accepted, _ = listener.accept()
            accepted.close()
        thread.join(10)
        for visitor in waiting:
            visitor.close()
    assert "ended before it answered" in str(errors[0])


def test_an_answer_that_comes_too_late_is_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(listener: socket.socket) -> None:
        for late in (True, False):
            connection, _ = listener.accept()
            connections.append(connection)
            connection.send(keyd_wire.encode({"ok": True, "version": 1}))
            connection.recv(4096)
            connection.send(b'{"ok": true, "state": "/s"}')
            connection.recv(4096)
            if late:
                assert go_on.wait(10)
            with contextlib.suppress(OSError):
                connection.send(keyd_wire.encode({"ok": True, "progress": [int(late), "00" * 16]}))

    connections: list[socket.socket] = []
    go_on = threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        keys = RemoteKeys.open(tmp_path / "s")
        monkeypatch.setattr(remote, "ANSWER_WAIT_S", 10)
        assert keys._link._idle is not None
        keys._link._idle._socket.settimeout(0.05)
        with pytest.raises(KeydUnavailable, match="did not answer"):
            keys.ledger.find(bytes(16))
        go_on.set()
        assert keys.ledger.find(bytes(16)) == Progress(0, bytes(16))
        keys.close()
        thread.join(10)
        for connection in connections:
            connection.close()


def test_another_version_is_refused(tmp_path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.send(b'{"ok": true, "version": 2}')

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(KeydUnavailable, match="speaks version 2, this sealfs 1"):
            RemoteKeys.open(tmp_path / "s")
        thread.join(10)


def test_what_is_being_answered_is_answered_before_keyd_ends(tmp_path: Path) -> None:
    class Slow(TinyKeys):
        def image_key(self, *arguments: Any) -> bytearray:
            entered.set()
            assert go_on.wait(10)
            return super().image_key(*arguments)

    entered, go_on = threading.Event(), threading.Event()
    running = Running(tmp_path / "state", make=lambda: Slow(tmp_path / "state"))
    running.start()
    keys = RemoteKeys.open(running.path)
    made = keys.new_image_key("web1", bytes(16))
    found: list[bytearray] = []
    arguments = (made.kmi, "web1", bytes(16), made.wrapped)
    thread = threading.Thread(target=lambda: found.append(keys.image_key(*arguments)))
    thread.start()
    assert entered.wait(10)
    running.broker.stop()
    wait_until(lambda: not running.path.exists())
    running.thread.join(0.2)
    assert running.thread.is_alive()
    go_on.set()
    thread.join(10)
    running.thread.join(10)
    assert found == [made.key]
    assert not running.groups()
    keys.close()


def test_a_second_keyd_is_refused_and_a_dead_ones_socket_replaced(running: Running) -> None:
    second = Broker(running.path, lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(Busy, match="served by another keyd"):
        second.bind()
    RemoteKeys.open(running.path).close()
    running.stop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(running.path))
    running.start()
    RemoteKeys.open(running.path).close()


def test_a_place_where_no_socket_can_be(tmp_path: Path) -> None:
    for path in (tmp_path / "missing" / "s", tmp_path / ("x" * 120)):
        with pytest.raises(UsageError, match="cannot be made a socket"):
            Broker(path, lambda: None).bind()  # type: ignore[arg-type, return-value]
        with pytest.raises(KeydUnavailable):
            RemoteKeys.open(path)


# Who may ask, and how much.


ASK_AS = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
    try:
        s.connect(sys.argv[1])
    except PermissionError:
        sys.exit("not even a connection")
    print(s.recv(4096).decode())
"""


def ask_as(uid: int, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS, str(path), str(uid)], capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user can reach."""
    path = Path(tempfile.mkdtemp(prefix="keyd-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@is_root
def test_another_uid_is_refused_unless_it_is_allowed(open_place: Path, tmp_path: Path) -> None:
    path = open_place / "s"
    with Running(tmp_path / "state", path) as running:
        assert "not even a connection" in ask_as(NOBODY, path)
        running.path.chmod(0o666)  # the mode is not what decides
        assert "not uid 65534" in ask_as(NOBODY, path)
        assert '"ok":true' in ask_as(0, path)
    with Running(tmp_path / "state", path, allowed=frozenset({NOBODY})):
        assert '"ok":true' in ask_as(NOBODY, path)
        assert "not uid 1" in ask_as(1, path)
        RemoteKeys.open(path).close()


@is_root
def test_keys_are_taken_from_root_or_ourselves_only(open_place: Path) -> None:
    script = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(sys.argv[1]); s.listen()
print("bound", flush=True); sys.stdin.read()
"""
    open_place.chmod(0o777)
    arguments = [sys.executable, "-c", script, str(open_place / "s")]
    with subprocess.Popen(arguments, stdin=-1, stdout=-1) as stranger:
        assert stranger.stdout is not None
        assert stranger.stdout.readline() == b"bound\n"
        with pytest.raises(KeydUnavailable, match="served by uid 65534"):
            RemoteKeys.open(open_place / "s")
        stranger.communicate()


def test_too_many_connections(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "CONNECTIONS_PER_UID_MAX", 2)
    keys = RemoteKeys.open(running.path)
    with raw_connection(running.path):
        with pytest.raises(Busy, match="has 2 connections"):
            RemoteKeys.open(running.path)
        keys.registry.entries()
    wait_until(lambda: len(running.broker._connections) == 1)
    RemoteKeys.open(running.path).close()
    keys.close()


def test_who_does_not_take_his_answers_harms_nobody(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker_module, "SEND_WAIT_S", 1)
    keys = RemoteKeys.open(running.path)
    with raw_connection(running.path) as deaf:
        deaf.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                deaf.send(b'{"verb":"nothing"}')
        keys.new_image_key("web1", bytes(16))
        wait_until(lambda: running.groups() == 1)
    keys.close()


def test_two_mounts_side_by_side_one_of_which_is_slow(tmp_path: Path) -> None:
    """A TPM that takes its time for one of them holds up neither its notes nor the other."""

    class Slow(TinyKeys):
        def image_key(self, kmi: str, vm_id: str, *arguments: Any) -> bytearray:
            if vm_id == "slow":
                entered.set()
                assert go_on.wait(20)
            return super().image_key(kmi, vm_id, *arguments)

    entered, go_on = threading.Event(), threading.Event()
    with Running(tmp_path / "state", make=lambda: Slow(tmp_path / "state")) as running:
        one, two = RemoteKeys.open(running.path), RemoteKeys.open(running.path)
        slow, fast = (keys.new_image_key(name, bytes(16))
                      for keys, name in ((one, "slow"), (two, "fast")))  # fmt: skip
        arguments = (slow.kmi, "slow", bytes(16), slow.wrapped)
        thread = threading.Thread(target=one.image_key, args=arguments)
        thread.start()
        assert entered.wait(10)
        one.ledger.note({bytes(16): Progress(1, bytes(16))})
        assert two.image_key(fast.kmi, "fast", bytes(16), fast.wrapped) == fast.key
        go_on.set()
        thread.join(10)
        one.close()
        two.close()


def test_moves_are_bounded(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "ENTRY_COUNT_MAX", 2)
    move = {"verb": "move", "old": "/a", "new": "/b"}
    with raw_connection(running.path) as connection:
        assert [ask(connection, move)["ok"] for _ in range(3)] == [True, True, False]


def test_a_group_is_of_one_uid_and_joined_once(running: Running) -> None:
    token = bytes(16)
    mine, same, other = (running.broker.join(1, uid, token) for uid in (0, 0, 7))
    assert mine is same
    assert mine is not other
    for uid in (0, 0, 7):
        running.broker._leave(uid, token)
    assert not running.groups()
    with raw_connection(running.path, joined=False) as connection:
        for verb, fields in (("begin", {}), ("entries", {}), ("find", {"image": "00" * 16})):
            refused = ask(connection, {"verb": verb, **fields})
            assert refused["error"]["detail"] == "join comes first"
        assert ask(connection, {"verb": "join", "group": "11" * 16})["ok"]
        assert ask(connection, {"verb": "join", "group": "22" * 16})["error"]["detail"]
        assert running.groups() == 1
    wait_until(lambda: not running.groups())


def test_every_verb_is_served() -> None:
    served = {name[3:] for name in vars(broker_module._Client) if name.startswith("do_")}
    assert served == set(keyd_wire.FIELDS)
    text = Path(keyd_wire.__file__).with_name("KEYD.md").read_text()
    for verb, fields in keyd_wire.FIELDS.items():
        for word in (verb, *fields):
            assert f"`{word}`" in text, f"KEYD.md has no {word}"


UUID = "00" * 16
REFUSED: tuple[tuple[str, Any], ...] = (
    ("not JSON", b"\xff"),
    ("nothing but depth", b"[" * 60_000),
    ("a huge number", b'{"verb":"begin","x":' + b"9" * 9000 + b"}"),
    ("no object", b"[1]"),
    ("no verb", {}),
    ("a verb of another kind", {"verb": ["begin"]}),
    ("an unknown verb", {"verb": "__init__"}),
    ("a field too many", {"verb": "begin", "x": 1}),
    ("a field too few", {"verb": "find"}),
    ("null for octets", {"verb": "find", "image": None}),
    ("octets too long", {"verb": "find", "image": UUID + "00"}),
    ("octets with spaces", {"verb": "find", "image": "00 " * 10 + "00"}),
    ("no octets", {"verb": "find", "image": "g" * 32}),
    ("a relative path", {"verb": "remove", "path": "etc"}),
    ("a path with a way back", {"verb": "remove", "path": "/a/../b"}),
    ("a path with two slashes", {"verb": "remove", "path": "//a"}),
    ("a path too long", {"verb": "remove", "path": "/" + "ä" * 2048}),
    ("a path with NUL", {"verb": "remove", "path": "/a\0b"}),
    ("a path of another half", {"verb": "remove", "path": "/\ud800"}),
    ("a VM id with a line", {"verb": "new_image_key", "image": UUID, "vm_id": "a\nb"}),
    ("an empty VM id", {"verb": "new_image_key", "image": UUID, "vm_id": ""}),
    ("1 for true", {"verb": "lock", "subject": "x", "image": UUID, "shared": 1}),
    ("a sequence below 0", {"verb": "accept", "image": UUID, "progress": [-1, UUID]}),
    ("a sequence too large", {"verb": "accept", "image": UUID, "progress": [1 << 64, UUID]}),
    ("true for a sequence", {"verb": "accept", "image": UUID, "progress": [True, UUID]}),
    ("half a progress", {"verb": "accept", "image": UUID, "progress": [1]}),
    ("an image without progress", {"verb": "note", "images": {UUID: None}}),
    ("too many images", {"verb": "note", "images": {f"{n:032x}": [1, UUID] for n in range(257)}}),
    ("too large, but for blanks", b'{"verb":"entries"}' + b" " * 70_000),
    ("too large", {"verb": "x" * 70_000}),
)


@pytest.mark.parametrize(("what", "message"), REFUSED, ids=[what for what, _ in REFUSED])
def test_a_request_that_makes_no_sense_is_refused(
    running: Running, what: str, message: Any
) -> None:
    import json

    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    with raw_connection(running.path) as connection:
        refused = ask(connection, raw)
        assert refused["error"]["type"] == "UsageError", refused
        assert ask(connection, {"verb": "entries"})["ok"]


def test_descriptors_that_are_sent_to_keyd_are_dropped(running: Running) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with raw_connection(running.path) as connection:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@3i", 0, 1, 2))
        connection.sendmsg([b'{"verb":"begin"}'], [rights])
        assert answer_of(connection)["error"]["type"] == "UsageError"
        assert ask(connection, {"verb": "begin"})["ok"]
    wait_until(lambda: not running.groups())
    assert len(os.listdir("/proc/self/fd")) == before
