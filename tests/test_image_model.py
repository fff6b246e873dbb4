"""A sealed image beside a bytearray: whatever is done to it, it reads as the bytearray does.

Hypothesis draws the operations. Closing and opening again keeps everything; a killed process, or a
power cut, keeps for each block what was flushed last or something written since, and then the
bytearray is what was found. refcheck.py, which shares no code with sealfs, reads every file that a
process left behind, and must find the same before sealfs recovers it. No nonce is ever used twice
under one key, recoveries and crashes included.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from sending import sent
from simulation import SimulatedDisk, SimulatedStorage, tears
from test_image import IDENTITY, KEY, PAGE
from test_refcheck import refcheck

from sealfs.image import committer, tree
from sealfs.image.cache import BlockCache
from sealfs.image.format import next_generation
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry, block_count_of
from sealfs.image.recovery import read_identity

SIZE_MAX = 64 * PAGE
WRAPPED = replace(IDENTITY, wrapped_keys=((1, b"wrapped"),))

# Few blocks, so that operations meet; rarely some far away.
blocks = st.integers(0, 19)
offsets = st.one_of(
    blocks.map(lambda block: block * PAGE),
    blocks.map(lambda block: block * PAGE),
    st.integers(0, 4).map(lambda group: group * 4 * PAGE),
    st.integers(0, 20 * PAGE - 1),
    st.integers(0, 63).map(lambda block: block * PAGE),
)
sizes = st.one_of(
    st.sampled_from([PAGE, PAGE, 4 * PAGE, 8 * PAGE, 16 * PAGE]),
    st.sampled_from([1, 511, PAGE - 1, PAGE + 1]),
    st.integers(1, 9 * PAGE),
)


def key_of(generation: int) -> bytes:
    return KEY if generation == 1 else bytes([generation]) * 32


class ImageMachine(RuleBasedStateMachine):
    """One image's life."""

    @initialize(
        size=st.sampled_from([0, 5 * PAGE + 77, 40 * PAGE]),
        fanout=st.sampled_from([2, 4]),
        clean=st.sampled_from([0, 2, 64]),
        dirty=st.sampled_from([6, 24, 64]),
        journal=st.sampled_from([12, 24]),
        roots=st.booleans(),
        seed=st.integers(0, 1 << 16),
    )
    def begin(
        self, size: int, fanout: int, clean: int, dirty: int, journal: int, roots: bool, seed: int
    ) -> None:
        self.limits = committer.SMALL_COMMIT_BLOCKS, tree.LEAVES_MAX
        committer.SMALL_COMMIT_BLOCKS, tree.LEAVES_MAX = 3, 3
        self.geometry = Geometry(
            group_blocks=4, fanout=fanout, depth=4 if fanout == 2 else 2, header_pages=6,
            identity_pages=1, journal_pages=journal,
        )  # fmt: skip
        self.rng = random.Random(seed)
        self.cache = BlockCache(clean * PAGE, dirty * PAGE)
        self.roots = roots
        self.seals: set[tuple[bytes, int, int]] = set()
        self.storage = SimulatedStorage()
        SealedImage.create(
            self.storage, identity=WRAPPED, image_key=KEY, size=size, geometry=self.geometry
        )
        self.model = bytearray(size)
        self.version = 0
        self.open()
        self.settled()

    def open(self) -> None:
        self.image = SealedImage.open(
            self.storage,
            image_key=self.keys(),
            cache=self.cache,
            random=self.rng.randbytes,
            geometry=self.geometry,
            record_roots=self.roots,
            on_seal=self.on_seal,
        )

    def keys(self) -> dict[int, bytes]:
        """Return the image keys that the identity names, no others."""
        disk = SimulatedDisk.of(self.storage.disk.device())
        identity = read_identity(SimulatedStorage(disk), self.geometry)
        return {generation: key_of(generation) for generation, _ in identity.wrapped_keys}

    def on_seal(self, salt: bytes, epoch: int, counter: int, block: int) -> None:
        assert (salt, epoch, counter) not in self.seals, "a nonce is used twice"
        self.seals.add((salt, epoch, counter))

    # -- what is durable

    def settled(self) -> None:
        """Everything is durable now."""
        self.versions: dict[int, list[bytes]] = {}
        """Contents since, of each block that was written; the durable one is the first."""
        self.sizes = [len(self.model)]

    def block(self, block: int) -> bytes:
        return bytes(self.model[block * PAGE : (block + 1) * PAGE]).ljust(PAGE, b"\0")

    def change(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        touched = range(offset // PAGE, block_count_of(end))
        for block in touched:
            self.versions.setdefault(block, [self.block(block)])
        if end > len(self.model):
            # One larger than the dirty cache is taken, and made durable, in parts.
            begin = max(offset, len(self.model)) // PAGE * PAGE + PAGE
            self.sizes.extend(range(begin, end, PAGE))
            self.model.extend(bytes(end - len(self.model)))
        self.model[offset:end] = data
        self.sizes.append(len(self.model))
        for block in touched:
            self.versions[block].append(self.block(block))

    def found_after_a_crash(self) -> None:
        """Open what a process left behind; refcheck first."""
        report = refcheck.check(bytes(self.storage.disk.device()), self.keys(), self.geometry)
        assert report.errors == []
        self.open()
        assert self.image.size == report.size
        assert self.image.size in self.sizes
        found = self.image.read(0, SIZE_MAX)
        assert len(found) == self.image.size
        for block in range(block_count_of(len(found))):
            content = found[block * PAGE : (block + 1) * PAGE].ljust(PAGE, b"\0")
            assert content in self.versions.get(block, [self.block(block)]), f"block {block}"
            assert content == report.blocks.get(block, bytes(PAGE)), f"refcheck: block {block}"
        self.model = bytearray(found)
        self.settled()

    # -- operations

    @rule(offset=offsets, size=sizes)
    def write(self, offset: int, size: int) -> None:
        size = min(size, SIZE_MAX - offset)
        self.version += 1
        data = random.Random(self.version).randbytes(size)
        self.image.write(offset, data)
        self.change(offset, data)

    @rule(block=blocks, count=st.integers(1, 3))
    def write_blocks(self, block: int, count: int) -> None:
        self.write(block * PAGE, count * PAGE)

    @rule(group=st.integers(0, 4), count=st.integers(1, 3))
    def write_groups(self, group: int, count: int) -> None:
        self.write(group * 4 * PAGE, count * 4 * PAGE)

    @rule(offset=offsets, size=sizes)
    def write_and_flush(self, offset: int, size: int) -> None:
        self.write(offset, size)
        self.flush()

    @rule(offset=offsets, size=sizes)
    def read(self, offset: int, size: int) -> None:
        assert self.image.read(offset, size) == self.model[offset : offset + size]
        block = offset // PAGE * PAGE
        length = PAGE * (1 + size % 3)
        content = sent(self.image, block, length)
        if block + length <= len(self.model):
            assert content in (None, self.model[block : block + length])
        else:
            assert content is None

    @rule()
    def read_all(self) -> None:
        assert self.image.size == len(self.model)
        assert self.image.read(0, SIZE_MAX) == self.model

    @rule()
    def flush(self) -> None:
        self.image.flush()
        self.settled()
        assert not self.image.is_dirty

    @rule()
    def checkpoint(self) -> None:
        self.image.checkpoint()
        self.settled()
        assert not self.image.needs_checkpoint

    @rule(offset=offsets, size=sizes)
    def discard(self, offset: int, size: int) -> None:
        self.image.discard(offset, size)
        end = min(offset + size, len(self.model))
        if offset < end:
            self.model[offset:end] = bytes(end - offset)
            self.settled()
        self.read_all()

    @rule(size=st.one_of(offsets, st.sampled_from([20 * PAGE, 40 * PAGE + 9, SIZE_MAX])))
    def resize(self, size: int) -> None:
        self.image.resize(size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))
        self.settled()
        self.read_all()

    @rule(offset=offsets, size=sizes)
    def preallocate(self, offset: int, size: int) -> None:
        self.image.preallocate(offset, min(size, SIZE_MAX - offset))
        assert self.image.size == len(self.model)

    @rule(offset=offsets)
    def seek(self, offset: int) -> None:
        data = self.image.seek(offset, os.SEEK_DATA)
        hole = self.image.seek(offset, os.SEEK_HOLE)
        if offset >= len(self.model):
            assert data is hole is None
            return
        assert not any(self.model[offset : len(self.model) if data is None else data])
        assert hole is not None
        assert offset <= hole <= len(self.model)
        assert not any(self.model[hole : hole // PAGE * PAGE + PAGE])
        if data is not None and data > offset:
            assert hole == offset

    @rule(data=st.booleans())
    def check(self, data: bool) -> None:
        assert self.image.check(data=data) == []
        self.settled()

    @rule(parts=st.integers(0, 9), blocks=st.integers(1, 6))
    def rekey(self, parts: int, blocks: int) -> None:
        if not self.image.is_rekeying:
            new = next_generation(self.image.identity.key_generation)
            self.image.begin_rekey(b"wrapped", key_of(new))
        for _ in range(parts):
            if self.image.is_rekeying:
                self.image.rekey_part(blocks)

    @rule(parts=st.integers(1, 9))
    def retire(self, parts: int) -> None:
        for _ in range(parts):
            if not self.image.is_rekeying and self.image.status()["epochs"]:
                self.image.retire_part(3)

    @rule()
    def reopen(self) -> None:
        self.image.close()
        self.storage.reopen()
        report = refcheck.check(bytes(self.storage.disk.cached), self.keys(), self.geometry)
        assert report.errors == []
        assert report.clean
        self.open()
        self.settled()
        self.read_all()

    @rule()
    def kill(self) -> None:
        self.image.abandon()
        self.storage.reopen()
        self.found_after_a_crash()

    @rule(seed=st.integers(0, 1 << 16))
    def power_cut(self, seed: int) -> None:
        self.image.abandon()
        rng = random.Random(seed)
        fates = []
        for op in self.storage.disk.pending:
            torn = tears(op, rng)
            fates.append(rng.choice(torn) if torn and rng.random() < 0.5 else rng.choice("no"))
        self.storage = SimulatedStorage(self.storage.disk.crash(tuple(fates)))
        self.found_after_a_crash()

    def teardown(self) -> None:
        if not hasattr(self, "image"):
            return
        try:
            self.image.close()
            report = refcheck.check(bytes(self.storage.disk.cached), self.keys(), self.geometry)
            assert report.errors == []
            assert report.size == len(self.model)
            for block in range(block_count_of(len(self.model))):
                assert report.blocks.get(block, bytes(PAGE)) == self.block(block)
            assert (self.cache.dirty_size, self.cache.clean_size) == (0, 0)
        finally:
            committer.SMALL_COMMIT_BLOCKS, tree.LEAVES_MAX = self.limits


TestImage = ImageMachine.TestCase
TestImage.settings = settings(
    derandomize=True,
    deadline=None,
    max_examples=250,
    stateful_step_count=40,
    suppress_health_check=list(HealthCheck),
)
