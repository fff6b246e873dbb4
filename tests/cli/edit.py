"""Damage a sealed image in one of the ways the transcripts need: edit.py IMAGE WAY [ARGUMENT].

`version N` and `features N` rewrite both superblocks; `--remac` gives them a right MAC again, with
the image's key from the state directory, as an attacker who has the key could. `flip OFFSET`
inverts a byte; `block N` damages the ciphertext of a block of the disk, `zero N` wipes it;
`node N` and `leaf N` wipe both places of that node page of level 1, or of a group's leaf page;
`cut SIZE` truncates.
"""

from __future__ import annotations

import argparse
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sealfs.cli import sealed
from sealfs.image.cipher import Subkeys, mac_of
from sealfs.image.format import SUPERBLOCK_SIZE
from sealfs.image.layout import Geometry
from sealfs.image.recovery import read_identity
from sealfs.image.volume import Volume
from sealfs.keys.service import KeyService

VERSION_AT, FEATURES_AT = 8, 12  # FORMAT.md 4.1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("image", type=Path)
    ways = ["version", "features", "flip", "block", "zero", "node", "leaf", "cut"]
    parser.add_argument("way", choices=ways)
    parser.add_argument("argument", type=int)
    parser.add_argument("--remac", action="store_true")
    chosen = parser.parse_args()
    fd = os.open(chosen.image, os.O_RDWR)
    match chosen.way:
        case "version" | "features":
            at = VERSION_AT if chosen.way == "version" else FEATURES_AT
            for copy in (0, 1):
                rewrite(fd, chosen.image, copy, at, chosen.argument, chosen.remac)
        case "flip":
            flip(fd, chosen.argument)
        case "block":
            flip(fd, place_of_block(chosen.image, chosen.argument))
        case "zero":
            os.pwrite(fd, bytes(4096), place_of_block(chosen.image, chosen.argument))
        case "node" | "leaf":
            offset = place_of_page(chosen.image, chosen.argument, is_node=chosen.way == "node")
            os.pwrite(fd, bytes(8192), offset)
        case "cut":
            os.ftruncate(fd, chosen.argument)


def flip(fd: int, offset: int) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 0xFF]), offset)


def rewrite(fd: int, path: Path, copy: int, at: int, value: int, remac: bool) -> None:
    offset = Geometry().superblock_offset(copy)
    raw = bytearray(os.pread(fd, SUPERBLOCK_SIZE, offset))
    if not any(raw):
        return
    struct.pack_into("<I", raw, at, value)
    if remac:
        with image_keys(path) as keys:
            raw[-32:] = mac_of(keys.superblock, bytes(raw[:-32]))
    os.pwrite(fd, raw, offset)


class image_keys:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Subkeys:
        storage = sealed.peek_storage(self._path)
        identity = read_identity(storage)
        storage.close()
        with KeyService.open(Path(os.environ["SEALFS_STATE"])) as keys:
            wrapped = identity.wrapped_keys[0][1]
            image_key = keys.image_key(identity.kmi, identity.vm_id, identity.uuid, wrapped)
        return Subkeys.derive(image_key, identity.uuid, identity.key_generation)

    def __exit__(self, *_: object) -> None:
        pass


def place_of_block(path: Path, block: int) -> int:
    with opened(path) as volume:
        group, index = divmod(block, volume.geometry.group_blocks)
        return volume.geometry.block_offset(volume.tree.slot_of(group), index)


def place_of_page(path: Path, index: int, *, is_node: bool) -> int:
    with opened(path) as volume:
        if not is_node:
            return volume.geometry.leaf_offset(volume.tree.slot_of(index), 0)
        node = volume.tree.nodes[1][index]
        return volume.geometry.node_offset(node.slot, node.position, 0)


@contextmanager
def opened(path: Path) -> Iterator[Volume]:
    storage = sealed.peek_storage(path)
    identity = read_identity(storage)
    with KeyService.open(Path(os.environ["SEALFS_STATE"])) as keys:
        image = sealed.open_with(storage, identity, keys, None)
    yield image._volume
    image.abandon()


if __name__ == "__main__":
    main()
