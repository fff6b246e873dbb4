"""Networks in the key service: whose device gets a network's key, and who does not.

Whatever is done to the state directory: edited, put back, taken from a dead process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import keys_support as ks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keyd_support import Running, ask, raw_connection
from test_key_move import introduced
from verbs_support import Host, deaths

from sealfs.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    KeydUnavailable,
    KeyGone,
    KeyNotFound,
    KeyRecordDamaged,
    KeyRefused,
    NotAllowed,
    NotFound,
    PinNeeded,
    RolledBack,
    SealfsError,
    UsageError,
    WrongPin,
)
from sealfs.keys import keyd_wire, labels, names, networks
from sealfs.keys.ledger import NETWORKS_ID
from sealfs.keys.permissions import Permission, PermissionFile
from sealfs.keys.protection import Protection
from sealfs.keys.records import KeyRecord
from sealfs.keys.remote import RemoteKeys
from sealfs.keys.rotation import changing_key
from sealfs.keys.service import KeyService

pytestmark = pytest.mark.tpm

UUID = bytes(range(16))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A host with the VMs web1 and web2, and the networks prod and test; web1 is on prod."""
    host = Host(tmp_path / "host")
    with KeyService.open(host.state) as keys:
        for vm in ("web1", "web2"):
            keys.create(vm).wipe()
        for network in ("prod", "test"):
            keys.networks.create(network)
        keys.networks.allow("prod", "web1")
    return host


def given_key(host: Host, network: str = "prod", vm: str = "web1", device: int = 0) -> bytes:
    """Return what a device gets: the network's key and the SCI."""
    with KeyService.open(host.state) as keys:
        found = keys.networks.grant(network, vm, device)
        return bytes(found.key) + found.sci


def is_allowed(host: Host, network: str = "prod", vm: str = "web1") -> bool:
    with KeyService.open(host.state) as keys:
        return keys.networks.is_allowed(network, vm)


def audit(host: Host) -> list[tuple[str, str]]:
    with KeyService.open(host.state) as keys:
        assert keys.audit.verify()[1] == []
        return [
            (str(entry["event"]), str(entry["outcome"]).partition(":")[0])
            for _, _, entry in keys.audit.entries()
            if entry is not None and "network" in entry
        ]


def test_c2_a_network_is_keyed_for_one_device_of_one_vm(host: Host) -> None:
    """Each device of each VM sends under an identifier of its own; the network's key is one."""
    with KeyService.open(host.state) as keys:
        keys.networks.allow("test", "web1")
        keys.networks.allow("prod", "web2")
    devices = [("web1", 0), ("web1", 1), ("web2", 0), ("web1", 255)]
    found = [given_key(host, "prod", *device) for device in devices]
    assert len({key[:32] for key in found}) == 1
    assert len({key[32:] for key in found}) == len(found)
    for key, (_, device) in zip(found, devices, strict=True):
        address, port = key[32:38], key[38:40]
        assert address[0] & 3 == 2, "locally administered, of one station"
        assert int.from_bytes(port, "big") == device + 1
    assert found[0] == given_key(host), "the same each time"
    other = given_key(host, "test")
    assert other[:32] != found[0][:32]
    assert other[32:] != found[0][32:]
    for bad in (-1, 256):
        with pytest.raises(UsageError, match="devices 0 to 255"):
            given_key(host, device=bad)


def test_c10_a_vm_that_is_not_allowed_gets_nothing(host: Host) -> None:
    """Other VM, other network, no VM, no network: each is refused in words, and in the log."""
    refusals: list[tuple[tuple[str, str], type[SealfsError], str]] = [
        (("prod", "web2"), NotAllowed, '"web2": is not allowed on network "prod"'),
        (("test", "web1"), NotAllowed, '"web1": is not allowed on network "test"'),
        (("prod", "web3"), KeyNotFound, '"web3": this host has no key for it'),
        (("dev", "web1"), KeyNotFound, '"dev": this host has no such network'),
        (("prod", "net:prod"), UsageError, "VM ids do not begin"),
        (("web1", "web1"), KeyNotFound, '"web1": this host has no such network'),
    ]
    for (network, vm), kind, text in refusals:
        with pytest.raises(kind, match=text):
            given_key(host, network, vm)
        with contextlib.suppress(UsageError):
            assert not is_allowed(host, network, vm)
    outcomes = [outcome for event, outcome in audit(host) if event == "network used"]
    assert outcomes == [kind.__name__ for _, kind, _ in refusals]
    assert is_allowed(host)
    assert given_key(host)
    assert audit(host)[-1] == ("network used", "ok")


def test_c10_a_vm_that_is_denied_gets_nothing_from_then_on(host: Host) -> None:
    with KeyService.open(host.state) as running:
        assert running.networks.is_allowed("prod", "web1")
        host.run("net", "deny", "prod", "--vm", "web1")
        assert not running.networks.is_allowed("prod", "web1"), "told to whoever is running"
    with pytest.raises(NotAllowed):
        given_key(host)
    assert "was not allowed" in host.run("net", "deny", "prod", "--vm", "web1", status=10)
    host.run("net", "allow", "prod", "--vm", "web1")
    host.run("net", "allow", "prod", "--vm", "web1")
    assert given_key(host)
    assert [pair for pair in audit(host) if pair[0] != "network used"] == [
        ("network made", "ok"), ("network made", "ok"), ("network allowed", "ok"),
        ("network denied", "ok"), ("network denied", "NotFound"),
        ("network allowed", "ok"), ("network allowed", "ok"),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["web1", "prod"])
def test_c10_a_revoked_vm_or_network_gets_nothing_at_once(host: Host, which: str) -> None:
    with KeyService.open(host.state) as running:
        assert running.networks.is_allowed("prod", "web1")
        host.run("key", "revoke", which, "--yes")
        assert not running.networks.is_allowed("prod", "web1")
        with pytest.raises(KeyGone, match="revoked"):
            running.networks.grant("prod", "web1", 0)
        with pytest.raises(KeyGone, match="revoked"):
            running.networks.allow("prod", "web1")
    assert "revoked" in host.run("net", "show", "prod") or which == "web1"
    host.run("net", "deny", "prod", "--vm", "web1")


def test_a_networks_key_opens_no_image_and_an_images_no_network(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        with keys.unseal("web1", "web1") as key:
            wrapped = key.wrap_image_key(UUID, bytes(range(32)))
        for kmi, vm in (("net:prod", "net:prod"), ("net:prod", "web1"), ("net:prod", "prod")):
            with pytest.raises(KeyRefused, match="a network, which opens no image"):
                keys.image_key(kmi, vm, UUID, wrapped)
        for make in (keys.create, keys.ensure, lambda vm: keys.new_image_key(vm, UUID)):
            with pytest.raises(UsageError, match="do not begin"):
                make("net:prod")
        with pytest.raises(UsageError, match="do not begin"):
            keys.recover("net:prod", "net:prod", (), host.recovery_key)
    # Records put in each other's place: what is sealed in them says whose it is.
    state = ks.StateDir(host.state)
    vm_file, network_file = (host.state / state.record_file(kmi) for kmi in ("web1", "net:prod"))
    good = vm_file.read_bytes(), network_file.read_bytes()
    for there, name, kmi in ((vm_file, "web1", "web1"), (network_file, "net:prod", "net:prod")):
        other = KeyRecord.decode(good[there == vm_file], "x")
        there.write_bytes(dataclasses.replace(other, kmi=kmi, vm_id=name).encode())
        with pytest.raises(KeyRecordDamaged, match="made for another VM"):
            given_key(host)
        vm_file.write_bytes(good[0])
        network_file.write_bytes(good[1])
    assert given_key(host)


def test_names_of_vms_and_networks_do_not_collide(host: Host) -> None:
    with KeyService.open(host.state) as keys:
        with pytest.raises(AlreadyExists, match='"web1": is the name of a VM'):
            keys.networks.create("web1")
        for make in (keys.create, keys.ensure):
            with pytest.raises(AlreadyExists, match='"prod": is the name of a network'):
                make("prod")
        with pytest.raises(AlreadyExists, match="this network has a key"):
            keys.networks.create("prod")
        for bad in ("", "a\nb", "x" * 252):
            with pytest.raises(UsageError):
                keys.networks.create(bad)
        keys.networks.create("x" * 251)
    assert names.namesake(names.namesake("prod")) == "prod"
    assert names.network_of("prod") is None
    assert names.network_of("net:prod") == "prod"


def test_an_edited_table_of_permissions_is_refused(host: Host) -> None:
    path = host.state / "networks"
    good = path.read_bytes()
    for at in range(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises((KeyRecordDamaged, FormatError)):
            is_allowed(host)
    for bad in (b"", good[:-1], good + b"\0"):
        path.write_bytes(bad)
        with pytest.raises((KeyRecordDamaged, FormatError)):
            given_key(host)
    path.unlink()
    with pytest.raises(KeyRecordDamaged, match="it was removed"):
        given_key(host)
    assert "it was removed" in host.run("net", "list", status=7)
    path.write_bytes(good)
    assert given_key(host)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_table_of_permissions_or_refused(raw: bytes) -> None:
    for one in (raw, labels.NETWORKS_MAGIC + b"\0\1" + raw):
        with contextlib.suppress(FormatError, KeyRecordDamaged):
            assert PermissionFile.decode(one, "x").encode() == one


def test_an_older_table_put_back_is_refused(host: Host) -> None:
    path = host.state / "networks"
    allowed = path.read_bytes()
    host.run("net", "deny", "prod", "--vm", "web1")
    path.write_bytes(allowed)
    for look in (given_key, is_allowed):
        with pytest.raises(RolledBack, match="older one put back"):
            look(host)
    hint = host.run("net", "list", status=6)
    assert "accept-rollback --ledger" in hint
    # Knowingly: then what it says holds.
    text = host.run("accept-rollback", "--ledger")
    assert "the networks" in text
    assert given_key(host)


def test_an_older_state_directory_put_back_is_refused(host: Host) -> None:
    """All of it, but for the TPM's own: the counter there has gone on when the VM was denied."""
    before = host.directory / "before"
    shutil.copytree(host.state, before, ignore=shutil.ignore_patterns("tpm"))
    host.run("net", "deny", "prod", "--vm", "web1")
    shutil.copytree(before, host.state, dirs_exist_ok=True)
    with pytest.raises(RolledBack, match="the TPM's counter"):
        given_key(host)


def test_a_lost_table_is_given_up_knowingly_and_allows_nobody(host: Host) -> None:
    (host.state / "networks").unlink()
    assert "allows no VM" in host.run("accept-rollback", "--ledger")
    with pytest.raises(NotAllowed):
        given_key(host)
    host.run("net", "allow", "prod", "--vm", "web1")
    assert given_key(host)


def forged(host: Host, change: Callable[[PermissionFile], PermissionFile]) -> None:
    """Write a table as somebody could who has the host's secret and no VM's key."""
    path = host.state / "networks"
    table = change(PermissionFile.decode(path.read_bytes(), "x"))
    with (
        KeyService.open(host.state) as keys,
        keys._host.subkey(labels.NETWORKS_MAC_INFO) as mac_key,
    ):
        table = dataclasses.replace(table, generation=table.generation + 1).with_mac(mac_key)
        path.write_bytes(table.encode())
        keys.ledger.note({NETWORKS_ID: table.progress})


def test_a_permission_is_given_by_the_vms_key_alone(host: Host) -> None:
    def with_another(vm: str, network: str) -> Callable[[PermissionFile], PermissionFile]:
        def change(table: PermissionFile) -> PermissionFile:
            mac = table.permissions[0].mac
            return dataclasses.replace(table, permissions=(Permission(network, vm, mac),))

        return change

    for vm, network in (("web2", "prod"), ("web1", "test")):
        forged(host, with_another(vm, network))
        with pytest.raises(NotAllowed, match="with another key"):
            given_key(host, network, vm)
    # What is not allowed on any network is allowed again by its own key.
    forged(host, lambda table: dataclasses.replace(table, permissions=()))
    with pytest.raises(NotAllowed):
        given_key(host)
    host.run("net", "allow", "prod", "--vm", "web1")
    assert given_key(host)


def test_a_rotated_vm_stays_allowed_wherever_it_was_killed(host: Host) -> None:
    before = given_key(host)
    host.make("a", vm_id="web1")

    def look(done: list[str]) -> None:
        assert given_key(host) == before
        host.run("key", "rotate", "web1")
        assert given_key(host) == before
        assert len(host.json("net", "show", "prod")["allowed"]) == 1

    old = host.vm_key()
    writes = deaths([host], lambda: host.run("key", "rotate", "web1"), look)
    assert host.vm_key() != old
    assert given_key(host) == before
    table = PermissionFile.decode((host.state / "networks").read_bytes(), "x")
    assert len(table.permissions) == 1, "the old key's is gone"
    assert writes


def test_a_network_that_is_rotated_has_another_key(host: Host) -> None:
    before = given_key(host)
    host.run("key", "rotate", "prod")
    after = given_key(host)
    assert after[:32] != before[:32]
    assert after[32:] != before[32:]


def test_killed_at_any_write_create_allow_and_deny_are_done_or_not(host: Host) -> None:
    def made(done: list[str]) -> None:
        listed = [found["network"] for found in host.json("net", "list")]
        assert listed == ["prod", "test", *(["third"] if done else [])]
        host.run("net", "allow", "prod", "--vm", "web1")

    deaths([host], lambda: host.run("net", "create", "third"), made)

    def allowed(done: list[str]) -> None:
        assert is_allowed(host, "prod", "web2") == bool(done)
        host.run("net", "allow", "prod", "--vm", "web2")
        assert given_key(host, "prod", "web2")

    deaths([host], lambda: host.run("net", "allow", "prod", "--vm", "web2"), allowed)

    def denied(done: list[str]) -> None:
        assert is_allowed(host, "prod", "web2") != bool(done)
        assert given_key(host), "the other VM is not concerned"
        if not done:
            host.run("net", "deny", "prod", "--vm", "web2")
        with pytest.raises(NotAllowed):
            given_key(host, "prod", "web2")

    deaths([host], lambda: host.run("net", "deny", "prod", "--vm", "web2"), denied)


def test_a_networks_key_is_made_and_protected_as_a_vms_is(host: Host) -> None:
    """By each maker, found by each identifier, in each kind of slot."""
    key_file = host.directory / "key"
    key_file.write_bytes(os.urandom(64))
    ways = {
        "a": ("--kmi", "service"),
        "b": ("--kmi", "tpm", "--key-from", "tpm"),
        "c": ("--slot", "software", "--key-from", "service"),
        "d": ("--key-from", "console", "--key-file", key_file),
        "e": ("--pcrs", "7"),
    }
    for network, options in ways.items():
        host.run("net", "create", network, *options)
        host.run("net", "allow", network, "--vm", "web1")
    shown = {found["network"]: found for found in host.json("net", "list")}
    assert [len(shown[network]["kmi"]) for network in "abcd"] == [32, 32, 5, 5]
    assert [shown[network]["origin"] for network in "abcde"] == [
        "mixed", "tpm", "service", "console", "mixed",
    ]  # fmt: skip
    assert shown["c"]["slots"][0]["kind"] == "software"
    assert shown["e"]["slots"][0]["pcrs"] == [7]
    found = [given_key(host, network) for network in ways]
    assert len({key[:32] for key in found}) == len({key[32:] for key in found}) == len(ways)
    assert host.json("net", "show", "a")["last_used"]
    host.run("key", "recovery", "a")
    assert given_key(host, "a") == found[0]
    assert "goes with --key-from" in host.run("net", "create", "x", "--key-file", "-", status=2)


def test_a_permission_waits_for_a_key_that_is_changing(host: Host) -> None:
    with (
        KeyService.open(host.state) as keys,
        changing_key(keys, "web2"),
        pytest.raises(Busy, match="is being changed"),
    ):
        keys.networks.allow("prod", "web2")


def test_keys_with_policies(host: Host, tmp_path: Path) -> None:
    """A VM's PIN is asked for by allow and grant; a network may have one of its own."""
    pin_file = tmp_path / "pin"
    pin_file.write_text("1234567\n")
    with KeyService.open(host.state) as keys:
        keys.create("shut", pin=bytearray(b"1234567")).wipe()
        with pytest.raises(PinNeeded):
            keys.networks.allow("prod", "shut")
    assert "--pin-file FILE" in host.run("net", "allow", "prod", "--vm", "shut", status=7)
    host.run("net", "allow", "prod", "--vm", "shut", "--pin-file", pin_file)
    with KeyService.open(host.state) as keys:
        with pytest.raises(PinNeeded):
            keys.networks.grant("prod", "shut", 0)
        with pytest.raises(WrongPin):
            keys.unlock("shut", bytearray(b"7654321"))
        keys.unlock("shut", bytearray(b"1234567"))
        assert keys.networks.grant("prod", "shut", 0).key
        keys.networks.create("closed", wanted=Protection((), bytearray(b"2345678"), b""))
        keys.networks.allow("closed", "web1")
        with pytest.raises(PinNeeded):
            keys.networks.grant("closed", "web1", 0)
        keys.unlock("net:closed", bytearray(b"2345678"))
        assert keys.networks.grant("closed", "web1", 0).key


def test_a_vms_device_is_locked_once_on_a_host(host: Host) -> None:
    with KeyService.open(host.state) as keys, KeyService.open(host.state) as others:
        lock = networks.lock_device(keys, "web1", 0)
        with pytest.raises(Busy, match='"web1": its network device 0 is attached already'):
            networks.lock_device(others, "web1", 0)
        for free in (("web1", 1), ("web2", 0)):
            networks.lock_device(others, *free).close()
        lock.close()
        networks.lock_device(others, "web1", 0).close()


def test_no_key_of_a_network_is_written_or_logged(host: Host) -> None:
    key = given_key(host)
    state = ks.StateDir(host.state)
    raw = (host.state / state.record_file("net:prod")).read_bytes()
    assert KeyRecord.decode(raw, "x").vm_id == "net:prod"
    for file in host.state.rglob("*"):
        if file.is_file() and file.parent.name != "tpm":
            assert key[:16] not in file.read_bytes()
    with KeyService.open(host.state) as keys:
        found = keys.networks.grant("prod", "web1", 0)
        assert hashlib.sha256(found.key).digest() != bytes(32)


# By way of keyd.


@pytest.fixture
def keyd(host: Host) -> Iterator[Running]:
    with Running(host.state, make=lambda: KeyService.open(host.state)) as running:
        yield running


def test_keyd_gives_a_networks_key_as_the_key_service_does(host: Host, keyd: Running) -> None:
    expected = given_key(host, device=3)
    keys = RemoteKeys.open(keyd.path)
    found = keys.networks.grant("prod", "web1", 3)
    assert bytes(found.key) + found.sci == expected
    assert isinstance(found.key, bytearray), "the caller wipes it"
    assert keys.networks.is_allowed("prod", "web1")
    for network, vm, kind in (("prod", "web2", NotAllowed), ("dev", "web1", KeyNotFound)):
        with pytest.raises(kind) as here, KeyService.open(host.state) as direct:
            direct.networks.grant(network, vm, 0)
        with pytest.raises(kind) as there:
            keys.networks.grant(network, vm, 0)
        assert str(there.value) == str(here.value)
    lock = networks.lock_device(keys, "web1", 0)
    with pytest.raises(Busy, match="attached already"):
        networks.lock_device(keys, "web1", 0)
    lock.close()
    host.run("net", "deny", "prod", "--vm", "web1")
    assert not keys.networks.is_allowed("prod", "web1")
    with pytest.raises(NotAllowed):
        keys.networks.grant("prod", "web1", 3)
    keys.close()
    keyd.stop()
    with pytest.raises(KeydUnavailable):
        keys.networks.is_allowed("prod", "web1")
    keyd.start()


def test_keyd_hands_the_key_over_in_sealed_memory_and_in_no_message(
    host: Host, keyd: Running
) -> None:
    expected = given_key(host)
    question = {"verb": "network_grant", "network": "prod", "vm_id": "web1", "device": 0}
    with raw_connection(keyd.path) as connection:
        connection.send(keyd_wire.encode(question))
        raw, (descriptor,), _, _ = socket.recv_fds(connection, 65536, 1)
        assert keyd_wire.decode(raw) == {"ok": True, "sci": expected[32:].hex()}
        assert keyd_wire.read_sealed_memory(descriptor, 32, 32) == expected[:32]
        os.close(descriptor)
        for device in (True, -1, 256, "0", None, 1.0):
            answer = ask(connection, {**question, "device": device})
            assert answer["error"]["type"] == "UsageError"
            assert "a device, 0 to 255, is expected" in answer["error"]["detail"]


def test_an_older_keyd_is_told_from_one_that_refuses(tmp_path: Path) -> None:
    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.send(b'{"ok": true, "version": 1}')
            connection.recv(65536)
            connection.send(b'{"ok": true, "state": "/state"}')
            assert connection.recv(65536) == b"", "nothing is asked that it does not know"

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        keys = RemoteKeys.open(tmp_path / "s")
        with pytest.raises(KeydUnavailable, match="older than this sealfs and knows no networks"):
            keys.networks.grant("prod", "web1", 0)
        keys.close()
        thread.join(10)


# Two hosts.


def test_another_host_gets_the_network_and_the_same_vm_id_there_is_another_vm(
    host: Host, tmp_path: Path
) -> None:
    there = Host(tmp_path / "there", own=True)
    package = host.directory / "prod.package"
    host.run("key", "enroll", "prod", *introduced(host, there), "-o", package)
    assert "was made for host" in host.run("key", "import", package, status=7)
    imported = there.json("key", "import", package)
    assert imported["registered"] == []
    with KeyService.open(there.state) as keys:
        keys.create("web1").wipe()
        keys.create("db1").wipe()
    # No permission travels: this host says which of its VMs are on the network.
    with pytest.raises(NotAllowed):
        given_key(there, "prod", "web1")
    for vm in ("web1", "db1"):
        there.run("net", "allow", "prod", "--vm", vm)
    here = given_key(host)
    assert given_key(there, "prod", "db1")[:32] == here[:32]
    assert given_key(there, "prod", "db1")[32:] != here[32:]
    assert given_key(there) == here, "one VM id, one identifier: its peers see it twice"
    # Revoked here, it goes on there; rotated there, it is another network.
    there.run("key", "rotate", "prod")
    assert given_key(there)[:32] != here[:32]
    host.run("key", "revoke", "prod", "--yes")
    assert given_key(there, "prod", "db1")
    again = there.directory / "again.package"
    there.run("key", "enroll", "prod", *introduced(there, host), "-o", again)
    assert "revoked" in host.run("key", "import", again, status=7)


def test_a_network_with_a_new_key_is_taken_in_place_of_the_old_one_only_knowingly(
    host: Host, tmp_path: Path
) -> None:
    there = Host(tmp_path / "there", own=True)
    with KeyService.open(there.state) as keys:
        keys.create("db1").wipe()
    packages = [host.directory / name for name in ("first", "second")]
    host.run("key", "enroll", "prod", *introduced(host, there), "-o", packages[0])
    there.run("key", "import", packages[0])
    there.run("net", "allow", "prod", "--vm", "db1")
    old = given_key(there, "prod", "db1")
    host.run("key", "rotate", "prod")
    host.run("key", "enroll", "prod", *introduced(host, there), "-o", packages[1])
    text = there.run("key", "import", packages[1], status=7)
    assert "holds another key" in text
    assert f"key import {packages[1]} --replace" in text
    assert given_key(there, "prod", "db1") == old

    def look(done: list[str]) -> None:
        given_key(there, "prod", "db1")
        there.run("key", "import", packages[1], "--replace")
        assert given_key(there, "prod", "db1")[:32] == given_key(host)[:32]

    deaths([there], lambda: there.run("key", "import", packages[1], "--replace"), look)
    assert given_key(there, "prod", "db1")[:32] == given_key(host)[:32] != old[:32]
    # A VM's key is not exchanged: its images would be lost.
    package = host.directory / "vm"
    host.run("key", "enroll", "web1", *introduced(host, there), "-o", package)
    assert "does not replace" in there.run("key", "import", package, "--replace", status=2)


def test_a_vm_that_moved_away_is_not_on_the_network_until_it_comes_back(
    host: Host, tmp_path: Path
) -> None:
    there = Host(tmp_path / "there", own=True)
    package = host.directory / "package"
    host.run("key", "enroll", "web1", *introduced(host, there), "-o", package, "--move")
    assert not is_allowed(host)
    with pytest.raises(KeyGone, match="moved"):
        given_key(host)
    there.run("key", "import", package)
    there.run("key", "rotate", "web1")
    back = there.directory / "back"
    there.run("key", "enroll", "web1", *introduced(there, host), "-o", back, "--move")
    host.run("key", "import", back)
    with pytest.raises(NotAllowed, match="with another key"):
        given_key(host)
    host.run("net", "allow", "prod", "--vm", "web1")
    assert given_key(host)


def test_verbs_for_keys_name_a_network_by_its_identifier(host: Host, tmp_path: Path) -> None:
    there = Host(tmp_path / "there", own=True)
    with KeyService.open(there.state) as keys:
        keys.create("prod").wipe()
    package = host.directory / "package"
    host.run("key", "enroll", "net:prod", *introduced(host, there), "-o", package)
    there.run("key", "import", package)
    for vm, shown in (("vm:prod", "prod"), ("net:prod", "net:prod")):
        assert there.json("key", "show", vm)["vm_id"] == shown
    for verb in ("show", "test", "rotate"):
        text = there.run("key", verb, "prod", status=2)
        assert 'say "vm:prod" or "net:prod"' in text
    there.run("key", "revoke", "prod", "--yes", status=2)
    there.run("key", "revoke", "vm:prod", "--yes")
    there.run("net", "allow", "prod", "--vm", "web1", status=7)
    assert host.json("key", "show", "prod")["kmi"] == "net:prod"
    host.run("key", "test", "prod")
    host.run("key", "reseal", "prod", "--pcrs", "7")
    assert given_key(host)


def test_a_host_whose_tpm_is_replaced_allows_nobody_until_told(tmp_path: Path) -> None:
    host = Host(tmp_path / "host", own=True)
    with KeyService.open(host.state) as keys:
        keys.create("web1").wipe()
        keys.networks.create("prod")
        keys.networks.allow("prod", "web1")
    shutil.rmtree(host.state / "tpm")
    host.run("init", "--replace-tpm", "--recovery-key-file", "-", stdin=host.recovery_key)
    assert not is_allowed(host)
    assert host.json("net", "list")[0]["allowed"] == []


def test_nothing_is_missing_on_a_host_without_networks(tmp_path: Path) -> None:
    host = Host(tmp_path / "host")
    assert host.json("net", "list") == []
    assert not (host.state / "networks").exists()
    with KeyService.open(host.state) as keys, pytest.raises(NotFound):
        keys.networks.deny("prod", "web1")
    host.run("accept-rollback", "--ledger")
    assert not (host.state / "networks").exists()
