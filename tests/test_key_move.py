"""A VM goes to another host and comes back: two software TPMs, deaths at each write, forgeries."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import keys_support as ks
import pytest
from verbs_support import CONTENT, Host, deaths

from sealfs.errors import FormatError, KeyGone, KeyRecordDamaged, KeyRefused, UsageError
from sealfs.keys import enrolment
from sealfs.keys.enrolment import HOST_KIND, PACKAGE_KIND, HostId, Package, PackedImage
from sealfs.keys.ledger import Progress
from sealfs.keys.service import KeyService
from sealfs.keys.tombstone import Tombstone, Why
from sealfs.keys.tpm_duplicate import check_storage_key

pytestmark = pytest.mark.tpm


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, Host]:
    directory = tmp_path_factory.mktemp("hosts")
    return Host(directory / "a", own=True), Host(directory / "b", own=True)


@pytest.fixture
def hosts(prepared: tuple[Host, Host], tmp_path: Path) -> tuple[Host, Host]:
    """Two hosts as they were set up; each test has them anew, at the same place."""
    for host in prepared:
        clean = host.directory.with_name(f"{host.directory.name}.clean")
        if clean.exists():
            host.restore(clean)
        else:
            shutil.copytree(host.directory, clean)
    return prepared


def introduced(host: Host, other: Host) -> tuple[object, ...]:
    """The other host's id at this one, and what to say to confirm it."""
    file = host.directory / f"{other.directory.name}.enroll"
    if not file.exists():
        other.run("host-id", "-o", file)
    found = HostId.decode(enrolment.from_text(HOST_KIND, file.read_bytes(), "x"), "x")
    return ("--to", file, "--fingerprint", found.fingerprint)


def packed(host: Host, other: Host, *options: object, name: str = "package") -> Path:
    path = host.directory / name
    path.unlink(missing_ok=True)
    host.run("key", "enroll", "web1", *introduced(host, other), "-o", path, *options)
    return path


def copied(disk: Path, host: Host) -> Path:
    target = host.images / disk.name
    shutil.copy(disk, target)
    return target


def read_package(path: Path) -> Package:
    return Package.decode(enrolment.from_text(PACKAGE_KIND, path.read_bytes(), "x"), "x")


def test_a_vm_moves_and_comes_back(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    disk = a.make("web1")
    old_image = disk.read_bytes()
    key = a.vm_key()
    package = packed(a, b, "--move")
    # Nothing in clear on the way, and nobody else's to open.
    for part in (key[:16], key[32:48]):
        assert part not in package.read_bytes()
        assert part not in enrolment.from_text(PACKAGE_KIND, package.read_bytes(), "x")
    assert "was made for host" in a.run("key", "import", package, status=7)
    # This host says where it went, and does not open it, nor make new disks for it.
    text = a.run("check", disk, status=7)
    assert "was moved to host" in text
    assert "moved to host" in a.run("key", "list")
    a.run("create", a.images / "c.sealed", "--size", "1M", "--vm-id", "web1", status=7)
    a.run("key", "rotate", "web1", status=7)
    a.run("key", "recover", disk, "--recovery-key-file", "-", stdin=a.recovery_key, status=7)
    a.run("key", "test", "--all")
    # There it opens, sealed to that TPM alone.
    there = copied(disk, b)
    assert b.json("key", "import", package, there)["registered"][0]["path"] == str(there)
    assert b.read(there) == CONTENT
    with KeyService.open(b.state) as keys:
        info = next(info for info in keys.records() if info.vm_id == "web1")
        assert info.origin == "imported"
        assert info.slots[0].is_of_this_tpm
    assert b.vm_key() == key
    # It goes on there, with a new key, and comes back; the image of before is refused then.
    b.run("resize", there, "2M")
    b.run("key", "rotate", "web1")
    back = packed(b, a, "--move", name="back")
    b.run("check", there, status=7)
    shutil.copy(there, disk)
    a.run("key", "import", back)  # found where it was registered
    assert a.read(disk) == CONTENT
    assert a.vm_key() != key
    disk.write_bytes(old_image)
    with pytest.raises(KeyRefused):
        a.read(disk)


def test_an_older_copy_is_refused_from_the_first_minute(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    disk = a.make("web1")
    older = copied(disk, b)
    a.run("resize", disk, "2M")
    package = packed(a, b)
    assert "restored from a backup" in b.run("key", "import", package, older, status=6)
    text = b.run("check", older, status=6)
    assert "registered" in text
    b.run("register", older, status=6)
    shutil.copy(disk, older)
    b.run("register", older)
    assert b.read(older) == CONTENT
    assert a.read(disk) == CONTENT, "without --move it opens on both"


def test_killed_at_any_write_a_move_leaves_a_host_that_opens(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    disk = a.make("web1")
    introduced(a, b)
    key = a.image_key(disk)
    there = copied(disk, b)
    package = a.directory / "package"

    def look(done: list[str]) -> None:
        try:
            assert a.image_key(disk) == key
        except KeyGone:
            # Moved: by its package it opens there.
            b.run("key", "import", package, there)
            assert b.image_key(there) == key
        again = packed(a, b, "--move")
        b.run("key", "import", again, there)
        assert b.read(there) == CONTENT
        with pytest.raises(KeyGone, match="moved"):
            a.image_key(disk)

    writes = deaths([a, b], lambda: packed(a, b, "--move"), look)
    assert writes[-1] == "write", "the tombstone comes last"


def test_killed_at_any_write_an_import_is_done_or_can_be_done_again(
    hosts: tuple[Host, Host],
) -> None:
    a, b = hosts
    disk = a.make("web1")
    key = a.image_key(disk)
    there = copied(disk, b)
    package = packed(a, b, "--move")

    def look(done: list[str]) -> None:
        b.run("key", "import", package, there)
        assert b.read(there) == CONTENT
        assert b.image_key(there) == key

    writes = deaths([b], lambda: b.run("key", "import", package, there), look)
    assert "write" in writes


def test_a_move_is_refused_while_the_vm_runs(hosts: tuple[Host, Host]) -> None:
    from sealfs.image.storage import FileStorage

    a, b = hosts
    disk = a.make("web1")
    storage = FileStorage.open(disk)
    output = a.directory / "package"
    enroll = ("key", "enroll", "web1", *introduced(a, b), "-o", output)
    assert str(disk) in a.run(*enroll, "--move", status=9)
    assert not output.exists()
    a.run(*enroll)
    storage.close()
    assert "exists" in a.run(*enroll, status=10)
    assert a.read(disk) == CONTENT


def test_nobody_is_enrolled_unconfirmed(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.make("web1")
    to, file, _, fingerprint = introduced(a, b)
    enroll = ("key", "enroll", "web1", to, file, "-o", a.directory / "package")
    assert "no terminal" in a.run(*enroll, status=2)
    wrong = "0" + str(fingerprint)[1:] if str(fingerprint)[0] != "0" else "1" + str(fingerprint)[1:]
    assert "another one" in a.run(*enroll, "--fingerprint", wrong, status=2)
    assert not (a.directory / "package").exists()
    a.run(*enroll, "--fingerprint", str(fingerprint).upper().replace("-", " "))
    assert fingerprint in b.run("host-id")
    own = introduced(a, a)
    assert "this one" in a.run("key", "enroll", "web1", *own, "-o", a.directory / "p", status=7)


def test_an_altered_package_is_refused(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.make("web1")
    path = packed(a, b)
    package = read_package(path)
    image = dataclasses.replace(
        package.images[0], progress=dataclasses.replace(package.images[0].progress, sequence=0)
    )
    for change in (
        {"images": (image,)},
        {"images": ()},
        {"recovery_slots": ()},
        {"is_move": True},
        {"created": 0},
        {"vm_id": "web2"},
        {"kmi": "other"},
        {"duplicate": package.duplicate[:-1] + bytes([package.duplicate[-1] ^ 1])},
        {"seed": package.seed[:-1] + bytes([package.seed[-1] ^ 1])},
        {"public": package.public[:-1] + bytes([package.public[-1] ^ 1])},
    ):
        raw = dataclasses.replace(package, **change).encode()  # type: ignore[arg-type]
        with KeyService.open(b.state) as keys, pytest.raises(KeyRecordDamaged):
            keys.moving.take(raw, "package")
    assert not ks.record_files(b.state)
    text = path.read_text()
    for damaged in ("", text[:200], text.replace("BEGIN", "BEGUN"), text.replace("\n", "\n!", 2)):
        path.write_text(damaged)
        assert b.run("key", "import", path, status=7 if "!" in damaged else 4)


def test_a_package_of_before_the_move_does_not_undo_it(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    disk = a.make("web1")
    there = copied(disk, b)
    b.run("key", "import", packed(a, b, "--move"), there)
    early = packed(b, a, name="early")
    a.run("key", "import", early)  # back, as b does not mind
    a.run("resize", disk, "2M")
    packed(a, b, "--move", name="again")
    assert "an older package" in a.run("key", "import", early, status=6)
    with pytest.raises(KeyGone):
        a.image_key(disk)


# Formats


HOST_ID = HostId(bytes(range(16)), b"\x00\x04area")


def test_a_host_id_is_what_its_description_says() -> None:
    raw = b"SEALFS\0I" + b"\0\1" + bytes(range(16)) + b"\0\6\0\4area"
    assert HOST_ID.encode() == raw
    assert HostId.decode(raw, "x") == HOST_ID
    assert re.fullmatch(r"([0-9a-f]{4}-){7}[0-9a-f]{4}", HOST_ID.fingerprint)
    text = enrolment.to_text(HOST_KIND, raw).encode()
    assert enrolment.from_text(HOST_KIND, b"Hello,\n\n> " + text + b"Bye", "x") == raw
    with pytest.raises(FormatError, match="not a VM key package"):
        enrolment.from_text(PACKAGE_KIND, text, "x")
    with pytest.raises(UsageError, match="storage key"):
        check_storage_key(HOST_ID.public, "x")


def test_a_tombstone_is_what_its_description_says() -> None:
    stone = Tombstone(Why.MOVED, "k", "web1", 7, b"h" * 16)
    raw = b"SEALFS\0G\0\1\1\0\1k\0\4web1" + (7).to_bytes(8, "big") + b"h" * 16
    assert stone.encode() == raw
    assert Tombstone.decode(raw, "x") == stone
    for size in range(len(raw)):
        with pytest.raises((FormatError, KeyRecordDamaged)):
            Tombstone.decode(raw[:size], "x")


def test_a_package_says_nothing_of_other_vms_images_nor_anything_when_refused(
    tmp_path: Path,
) -> None:
    for name in "ab":
        ks.initialised_state(tmp_path / name)
    with KeyService.open(tmp_path / "a") as a, KeyService.open(tmp_path / "b") as b:
        victim, seen = b"v" * 16, Progress(5, bytes(16))
        b.create("web1").wipe()
        b.registry.add(tmp_path / "v.sealed", victim, "web1")
        b.ledger.accept(victim, seen)
        forged = [PackedImage(victim, "/x", Progress(2**63, bytes(16)))]
        target = HostId(bytes(16), a.host_id().public)  # the twins have one TPM, and one id
        for vm_id, said in (("web1", "another key for this VM"), ("web2", 'as VM "web1"')):
            a.create(vm_id).wipe()
            package = a.moving._packed(vm_id, target, forged, None, is_move=False)
            package = dataclasses.replace(package, to_host=b.host_id().host_id)
            with (
                a.unseal(vm_id, vm_id) as key,
                key.package_mac_key() as mac_key,
                pytest.raises(KeyRefused, match=said),
            ):
                b.moving.take(package.with_mac(mac_key).encode(), "package")
            assert b.ledger.find(victim) == seen


def test_a_truncated_or_longer_package_is_refused(hosts: tuple[Host, Host]) -> None:
    a, b = hosts
    a.make("web1")
    raw = enrolment.from_text(PACKAGE_KIND, packed(a, b).read_bytes(), "x")
    assert Package.decode(raw, "x").encode() == raw
    for size in range(len(raw)):
        with pytest.raises((FormatError, KeyRecordDamaged)):
            Package.decode(raw[:size], "x")
    with pytest.raises(KeyRecordDamaged):
        Package.decode(raw + b"x", "x")
