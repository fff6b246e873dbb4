"""Making, moving and removing a sealed file: whatever step a crash comes after, all still opens."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mount_support import TinyKeys, opened_by

from sealfs.errors import AlreadyExists, Busy, ForeignImage, NotFound, SealfsError
from sealfs.image.cache import BlockCache
from sealfs.keys.statedir import StateDir
from sealfs.mount import opener as opener_module
from sealfs.mount.names import Ownership
from sealfs.mount.opener import Opener

OWNER = Ownership(uid=os.getuid(), gid=os.getgid(), mode=0o600)


class Crash(BaseException):
    """The process ends here; nothing catches it."""


class Steps:
    """Counts the steps that change something durably, and crashes before the n-th."""

    def __init__(self, crash_at: int) -> None:
        self.left = crash_at
        self.dead = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **named: Any) -> Any:
            if self.dead:
                raise Crash  # a dead process tidies nothing up
            if self.left == 0:
                self.dead = True
                raise Crash
            self.left -= 1
            return function(*arguments, **named)

        return wrapper


class Place:
    """A host that can be restarted: its state directory and its images."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.images = directory / "images"
        self.images.mkdir()
        self.opener = self.restarted()

    def restarted(self) -> Opener:
        cache = BlockCache(4 << 20, 4 << 20)
        self.opener = Opener(TinyKeys(self.state), cache, read_only=False)
        return self.opener

    def make(self, name: str, content: bytes) -> None:
        path = self.images / f"{name}.sealed"
        self.opener.create(path, name, OWNER)
        image = opened_by(self.opener, path)
        image.write(0, content)
        image.close()

    def content(self, name: str) -> bytes | None:
        """Return what the image says; None where there is none."""
        try:
            image = opened_by(self.opener, self.images / f"{name}.sealed")
        except NotFound:
            return None
        try:
            return image.read(0, 100)
        finally:
            image.close()

    def registered(self) -> set[str]:
        return {Path(entry.path).name for entry in TinyKeys(self.state).registry.entries()}


@contextlib.contextmanager
def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[Steps]:
    steps = Steps(at)
    with monkeypatch.context() as patch:
        for owner, name in (
            (StateDir, "write"),
            (Path, "rename"),
            (Path, "unlink"),
            (opener_module.os, "link"),
            (opener_module, "sync_directory"),
        ):
            patch.setattr(owner, name, steps.around(getattr(owner, name)))
        with contextlib.suppress(Crash):
            yield steps


def every_crash(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Place], None],
    prepare: Callable[[Place], None] = lambda place: None,
) -> Iterator[Place]:
    """Yield the host after each crash in the middle of `act`, restarted."""
    for at in itertools.count():
        directory = tmp_path / str(at)
        directory.mkdir()
        place = Place(directory)
        prepare(place)
        with crashing(monkeypatch, at) as steps:
            act(place)
        place.restarted()
        if not steps.dead:
            assert at >= 3, "too few steps for a crash test"
            return
        yield place


def test_create_crashes_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = set()
    for place in every_crash(tmp_path, monkeypatch, lambda place: place.make("a", b"new")):
        found = place.content("a")
        outcomes.add(found is not None)
        if found is None:
            place.make("a", b"again")  # nothing is in the way
            assert place.content("a") == b"again"
        else:
            with pytest.raises(AlreadyExists):
                place.make("a", b"again")
    assert outcomes == {False, True}


def test_move_crashes_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def move(place: Place) -> None:
        place.opener.move(place.images / "a.sealed", place.images / "b.sealed")

    places = []
    for place in every_crash(tmp_path, monkeypatch, move, lambda place: place.make("a", b"one")):
        found = (place.content("a"), place.content("b"))
        assert found in ((b"one", None), (None, b"one"))
        places.append(found[0] is None)
        here = "b" if places[-1] else "a"
        place.opener.move(place.images / f"{here}.sealed", place.images / "c.sealed")
        assert place.content("c") == b"one"
    assert set(places) == {False, True}


def test_replacing_crashes_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What editors and snapshot tools do: the name always has one of the two, and opens."""

    def prepare(place: Place) -> None:
        place.make("new", b"new")
        place.make("old", b"old")

    def move(place: Place) -> None:
        place.opener.move(place.images / "new.sealed", place.images / "old.sealed")

    seen = set()
    for place in every_crash(tmp_path, monkeypatch, move, prepare):
        found = (place.content("new"), place.content("old"))
        assert found in ((b"new", b"old"), (None, b"new"))
        seen.add(found)
        # Looked at once, only what stands there is accepted.
        entries = [e for e in TinyKeys(place.state).registry.entries() if "old" in e.path]
        assert len(entries) == 1
    assert len(seen) == 2


def test_a_directory_with_its_images_moves_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(place: Place) -> None:
        (place.images / "d" / "e").mkdir(parents=True)
        for name in ("d/a", "d/e/b"):
            place.make(name, name.encode())

    def move(place: Place) -> None:
        place.opener.move(place.images / "d", place.images / "n")

    for place in every_crash(tmp_path, monkeypatch, move, prepare):
        here = "d" if (place.images / "d").exists() else "n"
        assert place.content(f"{here}/a") == b"d/a"
        assert place.content(f"{here}/e/b") == b"d/e/b"


def test_remove_crashes_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(place: Place) -> None:
        place.opener.remove(place.images / "a.sealed")

    for place in every_crash(tmp_path, monkeypatch, remove, lambda place: place.make("a", b"one")):
        if place.content("a") is None:
            place.make("a", b"two")
            assert place.content("a") == b"two"


def test_a_rename_that_fails_changes_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.make("a", b"one")
    before = place.registered()
    with pytest.raises(OSError, match="No such file"):
        place.opener.move(place.images / "a.sealed", place.images / "nowhere" / "a.sealed")
    assert place.registered() == before
    assert place.content("a") == b"one"


def test_what_was_replaced_is_not_accepted_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.make("old", b"old")
    place.make("new", b"new")
    kept = (place.images / "old.sealed").read_bytes()
    place.opener.move(place.images / "new.sealed", place.images / "old.sealed")
    assert place.content("old") == b"new"
    (place.images / "old.sealed").write_bytes(kept)
    with pytest.raises(ForeignImage):
        place.content("old")


def test_the_remains_of_a_crashed_create_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 0
    for place in every_crash(tmp_path, monkeypatch, lambda place: place.make("a", b"new")):
        (place.images / "sub").mkdir()
        strays = [path for path in place.images.iterdir() if path.name.endswith(".new")]
        left += len(strays)
        ours = place.images / "mine.new"
        ours.write_text("not ours to remove")
        assert opener_module.sweep(place.images, older_than=0) == len(strays)
        assert not [path for path in place.images.iterdir() if path.name.startswith(".")]
        assert ours.exists()
    assert left > 0


def test_what_is_being_made_is_not_swept(tmp_path: Path) -> None:
    from sealfs.image.storage import FileStorage

    stray = tmp_path / f".{'0' * 32}.new"
    with contextlib.closing(FileStorage.create(stray)):
        assert opener_module.sweep(tmp_path, older_than=0) == 0
        assert opener_module.sweep(tmp_path) == 0
    assert opener_module.sweep(tmp_path) == 0  # young
    os.utime(stray, (0, 0))
    assert opener_module.sweep(tmp_path) == 1
    with pytest.raises(SealfsError):
        FileStorage.open(stray)


def test_a_copy_of_an_image_in_use_does_not_open(tmp_path: Path) -> None:
    """Whatever the registry says of it: two writers of one uuid would part ways."""
    place = Place(tmp_path)
    place.make("a", b"one")
    path, copy = place.images / "a.sealed", place.images / "copy.sealed"
    copy.write_bytes(path.read_bytes())
    keys = TinyKeys(place.state)
    entry = keys.registry.lookup(path)
    assert entry is not None
    keys.registry.add(copy, entry.image_uuid, entry.vm_id)
    readers = Opener(keys, BlockCache(4 << 20, 4 << 20), read_only=True)
    opened = place.opener.open(path)
    for other in (place.opener, readers):
        with pytest.raises(Busy, match="as a copy"):
            other.open(copy)
    opened.image.close()
    opened.lock.close()
    first, second = readers.open(path), readers.open(copy)
    with pytest.raises(Busy, match="in use by another"):
        place.opener.open(path)
    for each in (first, second):
        each.image.close()
        each.lock.close()
    opened_by(place.opener, copy).close()


def test_damage_of_node_pages_is_logged_when_an_image_is_opened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place(tmp_path)
    place.make("web1", b"x" * 5000)
    path = place.images / "web1.sealed"

    def wiped(*, leaf_too: bool) -> str:
        """Wipe the node page, and the leaf page; return what opening the image logs."""
        image = opened_by(place.opener, path)
        tree, geometry = image._volume.tree, image._volume.geometry
        [node] = tree.nodes[1].values()
        offsets = [geometry.node_offset(node.slot, node.position, 0)]
        offsets += [geometry.leaf_offset(tree.slot_of(0), 0)] * leaf_too
        image.close()
        with path.open("r+b") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(bytes(8192))
        caplog.clear()
        opened_by(place.opener, path).close()
        [record] = caplog.records
        return record.getMessage()

    prefix = f'image="{path}" vm="web1" '
    assert wiped(leaf_too=False) == f"{prefix}node page 1.0 was damaged; rebuilt, nothing is lost"
    assert wiped(leaf_too=True) == (
        f"{prefix}bytes 0 to 8191 of the disk are lost: node page 1.0 does not authenticate:"
        " damaged, or altered outside sealfs"
    )
