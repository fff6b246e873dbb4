"""Images that were not made by sealfs: `tools/make-vectors` wrote them from FORMAT.md alone.

They are committed, so that a later sealfs that cannot read format 1 any more fails here. Each good
one is read in full, before and after a recovery; each broken one is refused, or shows exactly the
damage that it has, in the words that the manifest names. refcheck.py agrees with all of it.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulation import SimulatedDisk, SimulatedStorage
from test_refcheck import refcheck

from sealfs import errors
from sealfs.errors import BlockDamaged
from sealfs.image import recovery
from sealfs.image.cache import BlockCache
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry

HERE = Path(__file__).parent
IMAGES = HERE / "images" / "v1"
MAKE_VECTORS = HERE.parent / "tools" / "make-vectors"
MANIFEST: dict[str, Any] = json.loads((IMAGES / "manifest.json").read_text())
GEOMETRY = Geometry(**MANIFEST["geometry"])
KEYS = {int(at): bytes.fromhex(key) for at, key in MANIFEST["image_keys"].items()}
PAGE = 4096

NAMES = sorted(MANIFEST["images"])
REFUSED = [name for name in NAMES if MANIFEST["images"][name]["error"]]
REBUILT = ["node-flipped", "top-flipped"]
DAMAGED = REBUILT + [name for name in NAMES if MANIFEST["images"][name]["damaged"]]
GOOD = [name for name in NAMES if name not in REFUSED and name not in DAMAGED]


def raw_of(name: str) -> bytes:
    return gzip.decompress((IMAGES / f"{name}.sealed.gz").read_bytes())


def keys_of(name: str) -> dict[int, bytes]:
    """Return the image keys that its reader has."""
    return {at: KEYS[at] for at, _ in MANIFEST["images"][name]["wrapped_keys"]}


def opened(storage: SimulatedStorage, name: str, *, read_only: bool) -> SealedImage:
    return SealedImage.open(
        storage,
        image_key=keys_of(name),
        cache=BlockCache(0, 16 * PAGE),
        random=lambda size: b"r" * size,
        geometry=GEOMETRY,
        read_only=read_only,
    )


def digests(image: SealedImage) -> dict[str, str]:
    """Digest of each block that is not zero; the last one is padded."""
    found = {}
    for block in range(-(-image.size // PAGE)):
        content = image.read(block * PAGE, PAGE).ljust(PAGE, b"\0")
        if any(content):
            found[str(block)] = hashlib.sha256(content).hexdigest()
    return found


def expected_blocks(name: str) -> dict[str, str]:
    return dict(MANIFEST["images"][name]["blocks"])


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_image_is_the_one_that_was_committed(name: str) -> None:
    assert hashlib.sha256(raw_of(name)).hexdigest() == MANIFEST["images"][name]["sha256"]


def test_the_generator_still_writes_the_same_images(tmp_path: Path) -> None:
    subprocess.run([sys.executable, MAKE_VECTORS, tmp_path], check=True)
    assert json.loads((tmp_path / "manifest.json").read_text()) == MANIFEST
    for path in tmp_path.glob("*.gz"):
        assert gzip.decompress(path.read_bytes()) == raw_of(path.name.removesuffix(".sealed.gz"))
    assert len(list(tmp_path.iterdir())) == len(list(IMAGES.iterdir()))


def test_the_generator_shares_no_code_with_what_it_tests() -> None:
    imports = [
        line
        for line in MAKE_VECTORS.read_text().splitlines()
        if line.startswith(("import", "from"))
    ]
    assert imports
    assert not any("sealfs" in line or "refcheck" in line for line in imports)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_is_read_and_recovered(name: str) -> None:
    expected = MANIFEST["images"][name]
    storage = SimulatedStorage(SimulatedDisk.of(raw_of(name)))
    image = opened(storage, name, read_only=True)
    assert image.uuid.hex() == MANIFEST["uuid"]
    assert image.identity.vm_id == MANIFEST["vm_id"]
    wrapped = tuple((at, raw.encode()) for at, raw in expected["wrapped_keys"])
    assert image.identity.wrapped_keys == wrapped
    assert image.is_rekeying == (name == "rekeying")
    assert image.identity.recovery_slots == (b"one", b"")
    assert (image.size, image.sequence) == (expected["size"], expected["sequence"])
    assert digests(image) == expected_blocks(name)
    assert image.check(data=True) == []
    image.close()
    assert bytes(storage.disk.cached) == raw_of(name)
    storage.reopen()
    image = opened(storage, name, read_only=False)
    assert digests(image) == expected_blocks(name)
    image.write(PAGE, b"x" * PAGE)
    image.close()
    storage.reopen()
    assert digests(opened(storage, name, read_only=True)) == expected_blocks(name) | {
        "1": hashlib.sha256(b"x" * PAGE).hexdigest()
    }


@pytest.mark.parametrize("name", GOOD)
def test_refcheck_reads_a_good_image(name: str) -> None:
    report = refcheck.check(raw_of(name), keys_of(name), GEOMETRY)
    assert report.errors == []
    assert report.size == MANIFEST["images"][name]["size"]
    assert report.sequence == MANIFEST["images"][name]["sequence"]
    found = {str(block): hashlib.sha256(raw).hexdigest() for block, raw in report.blocks.items()}
    assert found == expected_blocks(name)


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_sibling_is_refused(name: str) -> None:
    expected = MANIFEST["images"][name]
    for read_only in (True, False):
        storage = SimulatedStorage(SimulatedDisk.of(raw_of(name)), path="/images/broken.sealed")
        with pytest.raises(getattr(errors, expected["error"]), match=expected["message"]) as info:
            opened(storage, name, read_only=read_only)
        assert type(info.value).__name__ == expected["error"]
        assert "/images/broken.sealed" in str(info.value)
        assert bytes(storage.disk.cached) == raw_of(name)
    assert refcheck.check(raw_of(name), keys_of(name), GEOMETRY).errors


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_sibling_shows_its_damage_and_the_rest(name: str) -> None:
    expected = MANIFEST["images"][name]
    storage = SimulatedStorage(SimulatedDisk.of(raw_of(name)))
    image = opened(storage, name, read_only=False)
    damaged = set(expected["damaged"])
    for block in range(-(-image.size // PAGE)):
        if block in damaged:
            with pytest.raises(BlockDamaged):
                image.read(block * PAGE, PAGE)
            continue
        content = image.read(block * PAGE, PAGE).ljust(PAGE, b"\0")
        digest = hashlib.sha256(content).hexdigest()
        assert digest == expected["blocks"].get(str(block), digest if not any(content) else "")
    named = {
        block
        for finding in image.check(data=True)
        for block in range(finding.first_block, finding.first_block + finding.block_count)
    }
    assert named == damaged
    assert refcheck.check(raw_of(name), keys_of(name), GEOMETRY).errors
    assert bool(image.rebuilt_nodes) == (name in REBUILT)
    if name in REBUILT:
        assert refcheck.check(storage.disk.durable, keys_of(name), GEOMETRY).errors == []


def test_a_rekey_in_progress_is_counted_and_brought_to_its_end() -> None:
    storage = SimulatedStorage(SimulatedDisk.of(raw_of("rekeying")))
    found = refcheck.check(raw_of("rekeying"), KEYS, GEOMETRY)
    assert (found.phase, found.cursor) == (1, 2)
    assert found.under(1) == {"epochs": 2, "identities": 2, "wrapped keys": 2, "nodes": 1,
                              "leaves": 1, "blocks": 1}  # fmt: skip
    assert found.under(2)["blocks"] == 5
    image = opened(storage, "rekeying", read_only=False)
    while not image.rekey_part().is_done:
        pass
    assert digests(image) == expected_blocks("rekeying")
    image.close()
    found = refcheck.check(storage.disk.durable, KEYS, GEOMETRY)
    assert (found.errors, found.under(1)) == ([], {})
    done = refcheck.check(raw_of("rekeyed"), KEYS, GEOMETRY)
    assert (done.errors, done.under(1)) == ([], {})


def test_the_identity_is_readable_without_a_key() -> None:
    storage = SimulatedStorage(SimulatedDisk.of(raw_of("tree")))
    identity = recovery.read_identity(storage, GEOMETRY)
    assert (identity.vm_id, identity.label, identity.kmi) == ("golden", "a label", "kmi:golden")
    assert recovery.peek(storage, GEOMETRY).generation == 2
