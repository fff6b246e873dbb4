"""Make a sealed image, and open one: verify, replay, and only then write (FORMAT.md 9).

Waits for the disk throughout; a mount calls it in a worker thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeAlias

from sealfs.errors import FormatError, IntegrityError, SealfsError
from sealfs.image.cipher import (
    BlockCipher,
    EpochTable,
    SealHook,
    Subkeys,
    TreeMacs,
    mac_of,
    same_mac,
)
from sealfs.image.format import (
    ROW_SIZE,
    SUPERBLOCK_SIZE,
    Anchor,
    EpochRow,
    Identity,
    RekeyPhase,
    Superblock,
    anchor_of,
    decode_identity,
    decode_table,
    encode_identity,
    identity_header,
)
from sealfs.image.journal import Scanned, Tail, scan
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, JOURNAL_PAGES_MAX, Geometry
from sealfs.image.plan import Buffer, Step, WritePlan
from sealfs.image.rebuild import Rebuilder
from sealfs.image.record import Record
from sealfs.image.steps import run
from sealfs.image.storage import Storage, execute
from sealfs.image.tree import Tree
from sealfs.image.volume import Volume, encode_superblock, superblock_is_authentic

ImageKeys: TypeAlias = Buffer | Mapping[int, Buffer]
"""An image's only key, or one for each key generation that its identity has one of."""

DEFAULT_GEOMETRY = Geometry()
_ZEROS_SIZE = 1 << 20
_ROWS_WANTED = 4
"""Rows of the epoch table that an opening may need: for its writes, and those that they leave."""
_READ_SIZE = 1 << 22


def create(
    storage: Storage, *, identity: Identity, image_key: Buffer, size: int, geometry: Geometry
) -> None:
    """Write a complete, empty image into an empty file; durable on return.

    Args:
        storage: an empty file.
        identity: of the new image; its uuid is fresh.
        image_key: 32 random bytes.
        size: of the disk, in bytes.
        geometry: whose journal_pages is `geometry_for(size)`'s outside of tests.
    """
    keys = Subkeys.derive(image_key, identity.uuid, identity.key_generation)
    macs = TreeMacs(keys.tree, identity.uuid)
    tree = Tree(geometry, macs, storage.path)
    root_mac = tree.refresh(size)
    pages = tree.take_changes(lambda: (0, 0))
    superblock = Superblock(
        uuid=identity.uuid,
        generation=1,
        size=size,
        geometry=geometry,
        root_mac=root_mac,
        root_slot=0,
        root_position=0,
        root_place=tree.top.place,
        tail_page=0,
        tail_sequence=0,
        tail_mac=bytes(32),
        epoch_count=0,
        table_digest=hashlib.sha256(b"").digest(),
        key_generation=identity.key_generation,
        clean=True,
    )
    # Superblocks, tables and the top page are rewritten for ever: they never lack space.
    storage.allocate(0, geometry.slot_offset(1))
    plan: WritePlan = [(Step.TRUNCATE, geometry.slot_offset(1))]
    # The journal is written, not merely reserved: overwriting it must change no metadata of
    # the file system, or RWF_DSYNC would have to sync that as well.
    end = geometry.slots_offset
    for offset in range(geometry.journal_offset, end, _ZEROS_SIZE):
        plan.append((Step.WRITE, offset, [bytes(min(_ZEROS_SIZE, end - offset))]))
    plan.extend((Step.WRITE, offset, [page]) for offset, page in pages)
    plan.extend(_identity_writes(geometry, identity, keys))
    plan.append((Step.SYNC,))
    # Crash here: no superblock; the file is under its temporary name and is thrown away.
    page = encode_superblock(superblock, keys).ljust(BLOCK_SIZE, b"\0")
    plan.append((Step.WRITE, geometry.superblock_offset(0), [page]))
    plan.append((Step.WRITE, geometry.superblock_offset(1), [bytes(BLOCK_SIZE)]))
    plan.append((Step.SYNC,))
    execute(storage, plan)


def _identity_writes(geometry: Geometry, identity: Identity, keys: Subkeys) -> WritePlan:
    content = identity.encode_content()
    mac = mac_of(keys.identity, identity_header(content) + content)
    raw = encode_identity(content, mac)
    room = geometry.identity_pages * BLOCK_SIZE
    assert len(raw) <= room, "identity fits its pages"
    padded = raw.ljust(room, b"\0")
    return [(Step.WRITE, geometry.identity_offset(copy), [padded]) for copy in (0, 1)]


def read_identity(storage: Storage, geometry: Geometry = DEFAULT_GEOMETRY) -> Identity:
    """Return the newest copy of the identity whose checksum is right; no key is needed.

    What it says is to be believed only after `open_volume` has verified it.

    Raises:
        FormatError: there is no identity, or of an unknown version.
        IntegrityError: both copies are damaged.
    """
    return _identities(storage, geometry)[0][0]


def _identities(storage: Storage, geometry: Geometry) -> list[tuple[Identity, bytes, bytes]]:
    found: list[tuple[Identity, bytes, bytes]] = []
    failures: list[SealfsError] = []
    for copy in (0, 1):
        # Past the page cache, as its writers read it: after a failed write that shows a copy which
        # is not on the disk, and that may name a key which no copy there is authenticated by.
        size = geometry.identity_pages * BLOCK_SIZE
        raw = storage.read_direct(geometry.identity_offset(copy), size)
        try:
            found.append(decode_identity(raw, storage.path))
        except (FormatError, IntegrityError) as exc:
            failures.append(exc)
    if not found:
        raise failures[0]
    return sorted(found, key=lambda item: -item[0].generation)


def peek(storage: Storage, geometry: Geometry = DEFAULT_GEOMETRY) -> Superblock:
    """Return the newest superblock that decodes, *unverified*: for `stat` before the first open.

    Raises:
        FormatError: there is none.
    """
    found, failures = [], []
    for copy in (0, 1):
        raw = storage.read(geometry.superblock_offset(copy), SUPERBLOCK_SIZE)
        try:
            found.append(Superblock.decode(raw, storage.path))
        except FormatError as exc:
            failures.append(exc)
    if not found:
        raise failures[0]
    return max(found, key=lambda superblock: superblock.generation)


class Lineage(NamedTuple):
    """An image's own word for where it comes from, authenticated, at an open."""

    newest: Anchor
    """The state that this open arrives at."""
    ancestors: frozenset[Anchor]
    """States that it descends from, as far back as it knows; itself among them."""

    def descends_from(self, state: Anchor) -> bool:
        """Whether it continues a state; every image continues its own creation."""
        return state.sequence == 0 or state in self.ancestors


Witness = Callable[[Lineage], Anchor | None]
"""Somebody outside the image who remembers how far it has come. Called at an open when all that
is needed has been verified, before anything is written; raises if this image is older, or
returns what it remembers, which the image names in its superblocks from then on."""


def open_volume(
    storage: Storage, *, image_key: ImageKeys, random: Callable[[int], bytes],
    geometry: Geometry = DEFAULT_GEOMETRY, read_only: bool = False,
    record_roots: bool = False, on_seal: SealHook | None = None,
    witness: Witness | None = None,
) -> tuple[Volume, Identity]:  # fmt: skip
    """Verify an image, bring it up to date, and return it with its verified identity.

    Nothing is written before everything that is needed has been verified; nothing at all when
    `read_only`, or when there is nothing to recover. Keys are copied: the caller may wipe his.

    Raises:
        FormatError: not a sealed image, or one this sealfs cannot read.
        IntegrityError: a structure does not authenticate: damaged, altered, or the wrong key.
        NoSpace: the epoch table is full.
        StorageFailed: reading or writing failed.
        RolledBack: the witness remembers a later state, or one this image does not continue.
    """
    path = storage.path
    superblock, copy, raw, keys = _live_superblock(storage, image_key, geometry)
    geometry = superblock.geometry
    if storage.size() < geometry.slot_offset(1):
        raise IntegrityError(
            path,
            f"is cut off: {storage.size()} bytes, its headers and journal alone take"
            f" {geometry.slots_offset}",
        )
    rows = _epoch_rows(storage, superblock, copy)
    table = EpochTable(rows, geometry.table_rows_max, path)
    image_keys = _copies_of(image_key, superblock)
    cipher = BlockCipher(image_keys, superblock.uuid, path, rows, on_seal)
    old_key = None
    if superblock.rekey.phase is RekeyPhase.SWEEPING:
        old_key = cipher.subkeys(_old_generation(superblock, cipher, path)).tree
    identity = _verified_identity(storage, superblock, cipher)
    macs = TreeMacs(keys.tree, superblock.uuid, old_key)
    journal = _read_journal(storage, superblock)
    scanned = scan(
        lambda page, count: bytes(journal[page * BLOCK_SIZE : (page + count) * BLOCK_SIZE]),
        page_count=geometry.journal_pages,
        tail=Tail(superblock.tail_page, superblock.tail_sequence, superblock.tail_mac),
        uuid=superblock.uuid,
        epoch=rows[-1].epoch if rows else 0,
        key=keys.journal,
        cipher=cipher,
        path=path,
    )
    tree = _load_tree(storage, superblock, macs, cipher, [item.record for item in scanned])
    volume = Volume(
        storage,
        superblock=superblock,
        live_copy=copy,
        live_raw=raw,
        keys=keys,
        macs=macs,
        cipher=cipher,
        table=table,
        tree=tree,
        random=random,
        record_roots=record_roots,
    )
    _occupy_slots(volume)
    volume.recovering = True
    for item in scanned:
        volume.apply(_known_part(volume, item.record))
        for i, block in enumerate(item.record.inline_blocks):
            page = item.payload_page + i
            if block < volume.geometry.group_count_max * volume.geometry.group_blocks:
                volume.inline[block] = geometry.journal_page_offset(page)
        _forget_holes(volume, item)
        volume.journal.advance(item.record, item.mac)
    volume.recovering = False
    # With a leaf or node page lost, the root is another one: what it held is not known.
    if scanned and not volume.lost_groups and not tree.lost:
        expected = scanned[-1].record.root_mac
        if expected is not None and not same_mac(tree.refresh(volume.size), expected):
            raise IntegrityError(path, "the tree after replay is not the one last recorded")
    if witness is not None:
        lineage = lineage_of(superblock, scanned, volume.journal.tail)
        remembered = witness(lineage)
        if remembered is not None:
            volume.pins = (remembered,)
    if not read_only:
        if table.rows_max - len(table.rows) < _ROWS_WANTED:
            volume.compact_table()
        if scanned or tree.rebuilt:
            _finish_recovery(volume, journal)
    return volume, identity


def _load_tree(
    storage: Storage, superblock: Superblock, macs: TreeMacs, cipher: BlockCipher,
    records: list[Record],
) -> Tree:  # fmt: skip
    """Load the tree of a superblock; node pages that are damaged are rebuilt, or lost."""

    def read_page(offset: int) -> bytes:
        return storage.read(offset, BLOCK_SIZE)

    tree = Tree.load(
        superblock.geometry,
        macs,
        storage.path,
        read_page,
        root_mac=superblock.root_mac,
        size=superblock.size,
        location=(superblock.root_slot, superblock.root_position, superblock.root_place),
    )
    if tree.missing:
        entries = [entries for r in records for entries in (r.direct_entries, r.inline_entries)]
        Rebuilder(
            tree,
            superblock.geometry,
            macs,
            read_page=read_page,
            open_block=cipher.open_block,
            slot_count=superblock.geometry.slot_count_of(storage.size()),
            later_slots={slot for record in records for slot in record.slots},
            later_nonces={
                each[at : at + 12] for each in entries for at in range(0, len(each), ENTRY_SIZE)
            },
        ).run()
        if any(lost.level == superblock.geometry.depth for lost in tree.lost):
            raise IntegrityError(storage.path, tree.lost[0].cause)
    return tree


def _known_part(volume: Volume, record: Record) -> Record:
    """Return what a record says of blocks that are not lost with a node page."""
    tree, group_blocks = volume.tree, volume.geometry.group_blocks
    if not tree.lost:
        return record

    def is_known(block: int) -> bool:
        return not any(lost.first <= block < lost.first + lost.count for lost in tree.lost)

    def known(blocks: list[int], entries: bytes) -> tuple[list[int], bytes]:
        kept = [i for i, block in enumerate(blocks) if is_known(block)]
        parts = (entries[i * ENTRY_SIZE : (i + 1) * ENTRY_SIZE] for i in kept)
        return [blocks[i] for i in kept], b"".join(parts)

    for slot in record.slots:
        volume.allocator.occupy(slot)
    direct_blocks, direct_entries = known(record.direct_blocks, record.direct_entries)
    inline_blocks, inline_entries = known(record.inline_blocks, record.inline_entries)
    return replace(
        record,
        allocs=[each for each in record.allocs if is_known(each[0] * group_blocks)],
        groups=[each for each in record.groups if is_known(each[0] * group_blocks)],
        direct_blocks=direct_blocks,
        direct_entries=direct_entries,
        inline_blocks=inline_blocks,
        inline_entries=inline_entries,
    )


def lineage_of(superblock: Superblock, scanned: Sequence[Scanned], tail: Tail) -> Lineage:
    """Return where the state at `tail` comes from: superblock's anchors, and the records since."""
    states = {anchor_of(item.record.sequence, item.mac) for item in scanned}
    states.add(anchor_of(superblock.tail_sequence, superblock.tail_mac))
    states.update(superblock.anchors)
    return Lineage(tail.anchor, frozenset(states))


def _forget_holes(volume: Volume, item: Scanned) -> None:
    """Drop inline payloads of blocks that the same record made holes, or cut off."""
    for block in item.record.inline_blocks:
        group, index = divmod(block, volume.geometry.group_blocks)
        leaf = volume.tree.leaf(group)
        if leaf is None or leaf[index * 32 + 28] == 0:
            volume.inline.pop(block, None)


def _finish_recovery(volume: Volume, journal: memoryview) -> None:
    storage, geometry = volume.storage, volume.geometry
    # What was read may live in the page cache alone: its writer was killed inside its DSYNC.
    # Writing a block home on the strength of it could then lose both versions. And the length
    # of the file may be what was lost: slots that records name are part of it again.
    plan: WritePlan = volume.length_plan()
    plan.append((Step.SYNC,))
    for block, offset in sorted(volume.inline.items()):
        group, index = divmod(block, geometry.group_blocks)
        home = geometry.block_offset(volume.tree.slot_of(group), index)
        at = offset - geometry.journal_offset
        payload: Buffer = journal[at : at + BLOCK_SIZE]
        plan.append((Step.WRITE, home, [payload]))
    execute(storage, plan)
    volume.inline.clear()
    # Crash anywhere in here: the records are still there; recovered again, to the same bytes.
    run(volume.checkpoint_steps(new_epoch=True))


def _copies_of(image_key: ImageKeys, superblock: Superblock) -> dict[int, bytearray]:
    if isinstance(image_key, Mapping):
        return {generation: bytearray(key) for generation, key in image_key.items()}
    return {superblock.key_generation: bytearray(image_key)}


def _old_generation(superblock: Superblock, cipher: BlockCipher, path: str) -> int:
    """Return the key generation that is being replaced, whose key is still needed."""
    old = superblock.rekey.old_generation
    if old not in cipher.generations:
        raise IntegrityError(
            path,
            f"is half under key generation {old}, half under {superblock.key_generation}, and its"
            f" identity has no key of generation {old} (altered outside sealfs)",
        )
    return old


def _live_superblock(
    storage: Storage, image_key: ImageKeys, geometry: Geometry
) -> tuple[Superblock, int, bytes, Subkeys]:
    found: list[tuple[Superblock, int, bytes, Subkeys]] = []
    failures: list[FormatError] = []
    decoded = 0
    for copy in (0, 1):
        raw = storage.read_direct(geometry.superblock_offset(copy), BLOCK_SIZE)[:SUPERBLOCK_SIZE]
        try:
            superblock = Superblock.decode(raw, storage.path)
        except FormatError as exc:
            failures.append(exc)
            continue
        decoded += 1
        key: Buffer | None
        if isinstance(image_key, Mapping):
            key = image_key.get(superblock.key_generation)
        else:
            key = image_key
        if key is None:
            continue
        keys = Subkeys.derive(key, superblock.uuid, superblock.key_generation)
        if superblock_is_authentic(raw, keys):
            found.append((superblock, copy, raw, keys))
    if not found:
        if not decoded:
            raise failures[0]
        raise IntegrityError(
            storage.path,
            "no superblock authenticates (damaged, altered outside sealfs, or another key)",
        )
    live = max(found, key=lambda item: item[0].generation)
    if len(found) == 2 and (
        found[0][0].uuid != found[1][0].uuid or found[0][0].generation == found[1][0].generation
    ):
        raise IntegrityError(
            storage.path, "its two superblocks are of two images (altered outside sealfs)"
        )
    found_geometry = live[0].geometry
    journal_pages = found_geometry.journal_pages
    if replace(geometry, journal_pages=journal_pages) != found_geometry or not (
        4 <= journal_pages <= JOURNAL_PAGES_MAX
    ):
        raise FormatError(storage.path, f"superblock: unknown geometry {found_geometry}")
    return live


def _verified_identity(storage: Storage, superblock: Superblock, cipher: BlockCipher) -> Identity:
    """Return the newest copy of the identity that authenticates (FORMAT.md 5, 11.3).

    An identity whose MAC is under a key that was replaced is one that was put back.
    """
    rekey = superblock.rekey
    own = superblock.key_generation
    allowed = {
        RekeyPhase.SWEEPING: {rekey.old_generation},
        RekeyPhase.SWEPT: {rekey.old_generation, own},
    }.get(rekey.phase, {own}) & cipher.generations
    for identity, content, mac in _identities(storage, superblock.geometry):
        if identity.key_generation not in allowed or identity.uuid != superblock.uuid:
            continue
        key = cipher.subkeys(identity.key_generation).identity
        if same_mac(mac_of(key, identity_header(content) + content), mac):
            return identity
    raise IntegrityError(storage.path, "identity does not authenticate (altered outside sealfs)")


def _epoch_rows(storage: Storage, superblock: Superblock, copy: int) -> list[EpochRow]:
    geometry = superblock.geometry
    size = min(superblock.epoch_count, geometry.table_rows_max) * ROW_SIZE
    padded = -(-size // BLOCK_SIZE) * BLOCK_SIZE
    for candidate in (copy, 1 - copy):
        pages = storage.read_direct(geometry.table_offset(candidate), padded) if size else b""
        raw = pages[:size]
        if same_mac(hashlib.sha256(raw).digest(), superblock.table_digest):
            return _checked_rows(decode_table(raw, storage.path), superblock, storage.path)
    raise IntegrityError(storage.path, "epoch table does not authenticate")


def _checked_rows(rows: list[EpochRow], superblock: Superblock, path: str) -> list[EpochRow]:
    """Refuse rows of a key generation that has nothing in the image."""
    allowed = {superblock.key_generation}
    if superblock.rekey.phase is RekeyPhase.SWEEPING:
        allowed.add(superblock.rekey.old_generation)
    for row in rows:
        if row.key_generation not in allowed:
            expected = " or ".join(map(str, sorted(allowed)))
            raise FormatError(
                path,
                f"epoch table: epoch {row.epoch} is of key generation {row.key_generation},"
                f" expected {expected}",
            )
    return rows


def _occupy_slots(volume: Volume) -> None:
    """Mark what the tree names as busy; each slot once, and within the file."""
    slot_count = volume.geometry.slot_count_of(volume.storage.size())
    chunks = volume.tree.chunks()
    # What pages that are rebuilt held stays as it is until the superblock names it no more.
    held = {(ref.slot, ref.position) for ref in volume.tree.rebuilt}
    for slot, positions in chunks.items():
        if not volume.allocator.occupy(slot):
            raise IntegrityError(volume.path, f"slot {slot} is used twice")
        if not volume.tree.lost:
            held_here = [position for each, position in held if each == slot]
            volume.allocator.add_chunk(slot, [*positions, *held_here])
    highest = max(chunks, default=-1)
    for group in volume.tree.groups():
        slot = volume.tree.slot_of(group)
        highest = max(highest, slot)
        if slot < slot_count and not volume.allocator.occupy(slot):
            raise IntegrityError(volume.path, f"slot {slot} is used twice")
    if highest >= slot_count:
        raise IntegrityError(
            volume.path,
            f"is cut off: its tree names slot {highest}, the file ends after {slot_count} slots",
        )
    # Any other slot, or node position, may be one that a lost node page names.
    for slot in range(slot_count) if volume.tree.lost else [slot for slot, _ in held]:
        if slot < slot_count:
            volume.allocator.occupy(slot)


def _read_journal(storage: Storage, superblock: Superblock) -> memoryview:
    """Read the whole journal past the page cache, in one go: at most 64 MiB, for a moment."""
    geometry = superblock.geometry
    size = geometry.journal_pages * BLOCK_SIZE
    journal = memoryview(bytearray(size))
    for at in range(0, size, _READ_SIZE):
        part = storage.read_direct(geometry.journal_offset + at, min(_READ_SIZE, size - at))
        journal[at : at + len(part)] = part
    return journal
