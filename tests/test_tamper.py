"""Somebody alters the file while nobody looks: every structure, every kind of alteration.

The verdict on a tampered image is one of three, block by block:

- the newest content;
- BlockDamaged, naming that block or its group, and only where a page of it was altered;
- the whole image is refused with a FormatError or IntegrityError that names the path, before
  anything was written to the storage.

Never wrong content, another exception, or a hang. What the format does not promise (FORMAT.md 1.3)
is modelled as precisely as it is written there: when the last records of the journal are gone, and
none is left behind them, the content is that before the first one gone; and superblocks and
journal of one older snapshot, together, are that snapshot.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
from simulation import SimulatedDisk, SimulatedStorage

from sealfs.errors import BlockDamaged, FormatError, IntegrityError, SealfsError
from sealfs.image import committer
from sealfs.image.cache import BlockCache
from sealfs.image.format import Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.recovery import Lineage, Witness

PAGE = 4096
BLOCKS = 40
GROUP = 4
KEY = hashlib.sha256(b"image key").digest()
IDENTITY = Identity(uuid=bytes(range(16)), vm_id="vm", kmi="vm")
OTHER = replace(IDENTITY, uuid=bytes(range(16, 32)))
GEOMETRY = Geometry(
    group_blocks=GROUP, fanout=4, depth=2, header_pages=6, identity_pages=2, journal_pages=24
)
SALTS = random.Random(0)
READS_MAX = 20_000
"""More calls of the storage than that are a hang."""

Span = tuple[int, int]
"""(offset, size) in the file."""


def opened(
    storage: SimulatedStorage, *, read_only: bool = False, witness: Witness | None = None
) -> SealedImage:
    return SealedImage.open(
        storage,
        image_key=KEY,
        cache=BlockCache(0, 64 * PAGE),
        random=SALTS.randbytes,
        geometry=GEOMETRY,
        read_only=read_only,
        witness=witness,
    )


def lineage_of(raw: bytes | bytearray) -> Lineage:
    """Return what an image says of where it comes from."""
    found: list[Lineage] = []

    def witness(lineage: Lineage) -> None:
        found.append(lineage)

    storage = SimulatedStorage(SimulatedDisk.of(raw))
    opened(storage, read_only=True, witness=witness).abandon()
    return found[0]


def fill(value: int) -> bytes:
    return bytes([value]) * PAGE


@dataclass
class State:
    """A file, and what is right about it."""

    raw: bytes
    content: list[int]
    """The byte that fills each block."""
    before: dict[int, list[int]] = field(default_factory=dict)
    """Record in the journal to the content before it."""
    changed: dict[int, set[int]] = field(default_factory=dict)
    """Record in the journal to the blocks it changes."""
    spans: dict[str, list[Span]] = field(default_factory=dict)
    """Structure to where its members are."""
    records: dict[int, Span] = field(default_factory=dict)
    slots: dict[int, set[int]] = field(default_factory=dict)
    """Group to the slots that the superblock's tree, or a record, gives it."""
    nodes: list[tuple[Span, range]] = field(default_factory=list)
    """Both places of each node page, and the blocks that it covers."""


class History:
    """One image's life, with snapshots on the way."""

    def __init__(self, identity: Identity) -> None:
        self.storage = SimulatedStorage()
        self.content = [0] * BLOCKS
        self.snapshots: list[State] = []
        self.value = identity.uuid[0] + 1
        SealedImage.create(
            self.storage, identity=identity, image_key=KEY, size=BLOCKS * PAGE, geometry=GEOMETRY
        )
        self.image = opened(self.storage)

    def write(self, *blocks: int) -> set[int]:
        for block in blocks:
            self.value = self.value % 250 + 1
            self.image.write(block * PAGE, fill(self.value))
            self.content[block] = self.value
        self.image.flush()
        return set(blocks)

    def discard(self, first: int, count: int) -> set[int]:
        self.image.discard(first * PAGE, count * PAGE)
        self.content[first : first + count] = [0] * count
        return set(range(first, first + count))

    def checkpoint(self) -> None:
        self.image.checkpoint()
        self.snapshots.append(self.state())

    def reopen(self) -> None:
        self.storage.reopen()
        self.image = opened(self.storage)

    def state(self) -> State:
        return State(bytes(self.storage.disk.cached), list(self.content))


@cache
def history(identity: Identity) -> tuple[dict[str, State], list[State]]:
    """Return the states to tamper with, and older snapshots of the same image."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(committer, "SMALL_COMMIT_BLOCKS", 3)
        life = History(identity)
        life.write(*range(8), 12, 13, 22)
        life.checkpoint()
        life.write(1, 2)
        life.write(13)
        life.checkpoint()
        life.discard(5, 2)
        life.write(*range(24, 28), 30, 38)
        life.checkpoint()
        life.image.close()
        life.reopen()
        life.write(*range(4))
        life.write(30, 31)
        life.checkpoint()
        life.write(22, 23)
        life.write(*range(24, 28), 16)
        life.checkpoint()
        life.image.close()
        clean = life.state()
        locate(clean)
        life.reopen()
        life.write(12)
        life.checkpoint()
        base = life.state()
        locate(base)
        journal = State(b"", [])
        steps: tuple[Callable[[], set[int]], ...] = (
            lambda: life.write(1, 30),
            lambda: life.write(*range(24, 28), 33),
            lambda: life.discard(16, 4),
            lambda: life.write(23, 34, 37),
            lambda: life.write(2, 33),
        )
        for step in steps:
            before = list(life.content)
            sequence = life.image.sequence + 1
            changed = step()
            assert life.image.sequence == sequence, "one record for each step"
            journal.before[sequence] = before
            journal.changed[sequence] = changed
        tree = life.image._volume.tree
        for group in tree.groups():
            journal.slots.setdefault(group, set()).add(tree.slot_of(group))
        life.image.abandon()
        journal.raw, journal.content = bytes(life.storage.disk.cached), list(life.content)
        locate(journal)
    return {"clean": clean, "journal": journal}, life.snapshots


def locate(state: State) -> None:
    """Find where everything is, from what the live superblock names."""
    g = GEOMETRY
    spans = state.spans
    for copy, name in enumerate("ab"):
        spans[f"superblock {name}"] = [(g.superblock_offset(copy), 512)]
        spans[f"identity {name}"] = [(g.identity_offset(copy), 160)]
        spans[f"table {name}"] = [(g.table_offset(copy), 120)]
    raw = state.raw
    for name in ("record header", "record body", "record payload"):
        spans[name] = []
    for page in range(g.journal_pages):
        at = g.journal_page_offset(page)
        if raw[at : at + 8] != b"SEALREC1":
            continue
        sequence = int.from_bytes(raw[at + 24 : at + 32], "little")
        if sequence not in state.before:
            continue
        count = int.from_bytes(raw[at + 44 : at + 48], "little")
        inline = int.from_bytes(raw[at + 124 : at + 128], "little")
        payload = at + (count - inline) * PAGE
        state.records[sequence] = (at, count * PAGE)
        spans["record header"].append((at, 256))
        spans["record body"].append((at + 256, payload - at - 256))
        spans["record payload"] += [(payload + i * PAGE, PAGE) for i in range(inline)]
    assert set(state.records) == set(state.before)
    image = opened(SimulatedStorage(SimulatedDisk.of(raw)), read_only=True)
    tree = image._volume.tree
    for name in ("node", "node's other place", "leaf", "leaf's other place", "data"):
        spans[name] = []
    for level in tree.nodes[1:]:
        for node in level.values():
            if node.slot < 0:
                continue
            count = g.fanout**node.level * GROUP
            covered = range(node.index * count, min((node.index + 1) * count, BLOCKS))
            state.nodes.append(((g.node_offset(node.slot, node.position, 0), 2 * PAGE), covered))
            for name, place in (("node", node.place), ("node's other place", 1 - node.place)):
                spans[name].append((g.node_offset(node.slot, node.position, place), PAGE))
    for group in tree.groups():
        slot = tree.slot_of(group)
        state.slots.setdefault(group, set()).add(slot)
        _, place, _ = tree.leaf_source(group)
        spans["leaf"].append((g.leaf_offset(slot, place), PAGE))
        spans["leaf's other place"].append((g.leaf_offset(slot, 1 - place), PAGE))
        spans["data"] += [
            (g.block_offset(slot, index), PAGE)
            for index in range(GROUP)
            if state.content[group * GROUP + index]
        ]
    spans["length"] = [(at, PAGE) for at in range(0, len(raw), PAGE)]


# -- tampering

KINDS = ("flip", "zero", "swap", "index", "image", "older", "truncate", "punch")


def tampered(
    rng: random.Random, state: State, structure: str, kind: str, *,
    others: State, older: list[State],
) -> bytearray | None:  # fmt: skip
    """Return an altered file; None where this alteration changes nothing."""
    raw = bytearray(state.raw)
    offset, size = rng.choice(state.spans[structure])
    end = offset + size
    original = bytes(raw[offset:end])
    match kind:
        case "flip":
            raw[rng.randrange(offset, min(end, len(raw)))] ^= 1 << rng.randrange(8)
        case "zero":
            raw[offset:end] = bytes(size)
        case "punch":
            first, last = offset // PAGE * PAGE, -(-end // PAGE) * PAGE
            raw[first:last] = bytes(last - first)
        case "truncate":
            del raw[rng.randrange(offset, end) :]
        case "swap" | "index":
            # The neighbour in the file, or a member of the same kind elsewhere.
            family = structure.split(" ")[0] if kind == "index" else ""
            spans = [
                span
                for name, members in state.spans.items()
                if name.startswith(family) and name != "length"
                for span in members
                if span[0] != offset
            ]
            if kind == "swap":
                spans = [(at, size) for at in (offset + PAGE, offset - PAGE) if 0 <= at < len(raw)]
            if not spans:
                return None
            at, other_size = rng.choice(spans)
            if kind == "swap" and structure.startswith(("superblock", "identity", "table")):
                # The other copy is the neighbour.
                at, other_size = (offset + 6 * PAGE) % (12 * PAGE), size
            count = min(size, other_size)
            other = bytes(raw[at : at + count])
            raw[offset : offset + count] = other
            if kind == "swap":
                raw[at : at + count] = original[:count]
        case "image":
            raw[offset:end] = others.raw[offset:end].ljust(size, b"\0")
        case "older":
            raw[offset:end] = rng.choice(older).raw[offset:end].ljust(size, b"\0")
    del raw[len(state.raw) :]
    return None if raw == state.raw else raw


@dataclass
class Verdict:
    """What is right to find in a tampered file."""

    content: list[int]
    damaged: set[int]
    """Blocks that may be damaged."""
    must_refuse: bool = False
    must_open: bool = False


def verdict(state: State, raw: bytearray) -> Verdict:
    """Say what may come of it, from what differs."""
    pages = {
        page
        for page in range(-(-len(state.raw) // PAGE))
        if raw[page * PAGE : (page + 1) * PAGE] != state.raw[page * PAGE : (page + 1) * PAGE]
    }
    right = Verdict(list(state.content), set())
    for group, slots in state.slots.items():
        for slot in slots:
            first = GEOMETRY.slot_offset(slot) // PAGE
            if pages & {first, first + 1}:
                right.damaged.update(range(group * GROUP, (group + 1) * GROUP))
            right.damaged.update(
                group * GROUP + index for index in range(GROUP) if first + 2 + index in pages
            )
    for (offset, size), covered in state.nodes:
        if pages.intersection(range(offset // PAGE, (offset + size) // PAGE)):
            # And what it covers is there, in most cases: it is rebuilt.
            right.damaged.update(covered)
    superblocks = {GEOMETRY.superblock_offset(copy) // PAGE for copy in (0, 1)}
    if pages & superblocks:
        # The older superblock's tree, brought up to date by the records that are still there.
        right.damaged.update(range(BLOCKS))
    gone = {
        sequence
        for sequence, (at, size) in state.records.items()
        if pages.intersection(range(at // PAGE, (at + size) // PAGE))
    }
    if gone:
        first_gone = min(gone)
        right.content = list(state.before[first_gone])
        for sequence in range(first_gone, max(state.records) + 1):
            # The blocks of an acknowledged record are at home: their old content is not.
            right.damaged |= state.changed[sequence]
        right.must_refuse = gone != set(range(first_gone, max(state.records) + 1))
        right.must_open = len(gone) == 1 and len(pages) == 1 and not right.must_refuse
    return right


def open_or_refusal(storage: SimulatedStorage) -> tuple[SealedImage | None, SealfsError | None]:
    try:
        return opened(storage), None
    except SealfsError as exc:
        return None, exc


def read_or_damaged(image: SealedImage, block: int) -> tuple[bytes | None, int]:
    """Read a block; return its content, or None and the block that is named."""
    try:
        return image.read(block * PAGE, PAGE), block
    except BlockDamaged as exc:
        return None, exc.block


def judge(raw: bytearray, right: Verdict, *, label: object) -> str:
    """Open and read everything; return `refused`, `damaged` or `right`, or fail."""
    storage = SimulatedStorage(SimulatedDisk.of(raw), path="/images/tampered.sealed")
    reads = 0
    changes: list[str] = []

    def on_read(name: str, offset: int, size: int) -> None:
        nonlocal reads
        reads += 1
        assert reads < READS_MAX, f"{label}: it hangs"

    storage.on_read = on_read
    storage.on_call = lambda name, offset, size: changes.append(name)
    image, refusal = open_or_refusal(storage)
    if image is None:
        assert isinstance(refusal, (FormatError, IntegrityError)), f"{label}: {refusal!r}"
        assert storage.path in str(refusal), f"{label}: {refusal}"
        assert changes == [], f"{label}: {changes} before the refusal {refusal}"
        assert not right.must_open, f"{label}: {refusal}"
        return "refused"
    assert not right.must_refuse, f"{label}: it opens"
    damaged = set()
    for block in range(BLOCKS):
        found, named_block = read_or_damaged(image, block)
        if found is None:
            lost = {each.first_block for each in image.lost_ranges}
            assert named_block in {block, block // GROUP * GROUP} | lost, f"{label}: {block}"
            assert block in right.damaged, f"{label}: block {block} was not touched"
            damaged.add(block)
        else:
            assert found == fill(right.content[block]), f"{label}: block {block} is wrong"
    named = {
        block
        for finding in image.check(data=True)
        for block in range(finding.first_block, finding.first_block + finding.block_count)
    }
    assert named == damaged, f"{label}: check names {named}, reads {damaged}"
    # As one read too: all of it, or a block that is damaged.
    try:
        whole = image.read(0, BLOCKS * PAGE)
    except BlockDamaged:
        assert damaged, f"{label}: one long read fails"
    else:
        assert whole == b"".join(map(fill, right.content)), f"{label}: a long read is wrong"
        assert not damaged, f"{label}: a long read hides damage"
    image.abandon()
    return "damaged" if damaged else "right"


STRUCTURES = (
    *("superblock a", "superblock b", "identity a", "identity b", "table a", "table b"),
    *("record header", "record body", "record payload"),
    *("node", "node's other place", "leaf", "leaf's other place", "data", "length"),
)
TIMES = 40
"""Tampers of one structure in one kind."""
COUNTS = {"refused": 0, "damaged": 0, "right": 0}


def cell(structure: str, kind: str) -> Iterator[tuple[State, bytearray, str]]:
    """Yield tampered files of one structure and kind of alteration."""
    states, older = history(IDENTITY)
    others, _ = history(OTHER)
    rng = random.Random(f"{structure} {kind}")
    for number in range(TIMES):
        for _ in range(20):
            name = "journal" if number % 2 or structure.startswith("record") else "clean"
            raw = tampered(rng, states[name], structure, kind, others=others[name], older=older)
            if raw is not None:
                yield states[name], raw, f"{structure}, {kind}, {number}, {name}"
                break


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_tampered_structure_is_noticed_or_does_not_matter(structure: str) -> None:
    for kind in KINDS:
        for state, raw, label in cell(structure, kind):
            COUNTS[judge(raw, verdict(state, raw), label=label)] += 1


def test_so_many_tampers_were_tried(capsys: pytest.CaptureFixture[str]) -> None:
    if not any(COUNTS.values()):
        pytest.skip("counts the tampers of the tests before it")
    total = sum(COUNTS.values())
    with capsys.disabled():
        print(f" {total} tampers: {COUNTS} ", end="")
    assert total >= 4000
    assert min(COUNTS.values()) > 500


def test_the_states_that_are_tampered_with_are_right() -> None:
    for identity in (IDENTITY, OTHER):
        states, older = history(identity)
        for state in (*states.values(), *older):
            assert judge(bytearray(state.raw), Verdict(state.content, set()), label="") == "right"


# -- many structures at once

CLASSES = {
    "superblocks": ("superblock a", "superblock b"),
    "tables": ("table a", "table b"),
    "nodes": ("node", "node's other place"),
    "leaves": ("leaf", "leaf's other place"),
    "data": ("data",),
    "headers": ("superblock a", "superblock b", "identity a", "identity b", "table a", "table b"),
    "tree": ("node", "node's other place", "leaf", "leaf's other place"),
    "slots": ("node", "node's other place", "leaf", "leaf's other place", "data"),
}


@pytest.mark.parametrize("name", ["clean", "journal"])
@pytest.mark.parametrize("structures", CLASSES)
@pytest.mark.parametrize("source", ["older", "image"])
def test_a_whole_class_of_structures_from_elsewhere_is_noticed(
    name: str, structures: str, source: str
) -> None:
    states, older = history(IDENTITY)
    state = states[name]
    for other in older if source == "older" else [history(OTHER)[0][name]]:
        raw = bytearray(state.raw)
        for structure in CLASSES[structures]:
            for at, size in state.spans[structure]:
                raw[at : at + size] = other.raw[at : at + size].ljust(size, b"\0")
        result = judge(raw, verdict(state, raw), label=f"{name} {structures} {source}")
        if raw != state.raw and source == "image" and structures in ("nodes", "tree", "slots"):
            assert result == "refused"


def test_superblocks_and_journal_of_a_snapshot_are_that_snapshot_or_damaged() -> None:
    states, older = history(IDENTITY)
    g = GEOMETRY
    for state in states.values():
        for snapshot in older:
            raw = bytearray(state.raw)
            raw[: g.slots_offset] = snapshot.raw[: g.slots_offset]
            right = Verdict(snapshot.content, set(range(BLOCKS)))
            judge(raw, right, label="headers and journal of a snapshot")


def test_a_whole_older_image_opens_and_its_anchors_tell() -> None:
    states, older = history(IDENTITY)
    now = lineage_of(states["journal"].raw)
    for snapshot in older:
        storage = SimulatedStorage(SimulatedDisk.of(snapshot.raw))
        image = opened(storage)
        assert image.read(0, BLOCKS * PAGE) == b"".join(map(fill, snapshot.content))
        was = lineage_of(snapshot.raw)
        assert was.newest == image.progress
        assert was.newest.sequence < now.newest.sequence
        assert not was.descends_from(now.newest)
        assert now.descends_from(was.newest)


def test_a_cut_off_journal_is_the_state_before_and_its_anchors_tell() -> None:
    state = history(IDENTITY)[0]["journal"]
    pristine = lineage_of(state.raw)
    for first_gone in sorted(state.records):
        raw = bytearray(state.raw)
        for sequence in range(first_gone, max(state.records) + 1):
            at, size = state.records[sequence]
            raw[at : at + size] = bytes(size)
        assert judge(raw, verdict(state, raw), label=first_gone) != "refused"
        cut = lineage_of(raw)
        assert cut.newest.sequence < pristine.newest.sequence
        assert not cut.descends_from(pristine.newest)
        assert pristine.descends_from(cut.newest)


# -- what damage does to writers


def damaged_block() -> tuple[SealedImage, int, SimulatedStorage]:
    """An image whose block 2 does not authenticate."""
    state = history(IDENTITY)[0]["clean"]
    raw = bytearray(state.raw)
    (slot,) = state.slots[0]
    raw[GEOMETRY.block_offset(slot, 2) + 17] ^= 1
    storage = SimulatedStorage(SimulatedDisk.of(raw))
    return opened(storage), 2, storage


def test_a_part_of_a_damaged_block_cannot_be_written_and_the_whole_heals_it() -> None:
    image, block, storage = damaged_block()
    with pytest.raises(BlockDamaged):
        image.write(block * PAGE + 100, b"x")
    with pytest.raises(BlockDamaged):
        image.discard(block * PAGE + 100, 50)
    image.write(block * PAGE, fill(99))
    image.close()
    storage.reopen()
    image = opened(storage)
    assert image.read(block * PAGE, PAGE) == fill(99)
    assert image.check(data=True) == []


def test_a_damaged_block_does_not_concern_its_neighbours() -> None:
    image, block, _ = damaged_block()
    content = history(IDENTITY)[0]["clean"].content
    image.write((block - 1) * PAGE, fill(7))
    image.flush()
    assert image.read((block - 1) * PAGE, PAGE) == fill(7)
    assert image.read((block + 1) * PAGE, PAGE) == fill(content[block + 1])
    with pytest.raises(BlockDamaged):
        image.read(block * PAGE, PAGE)


def test_a_damaged_leaf_page_is_healed_by_writing_its_whole_group() -> None:
    state = history(IDENTITY)[0]["clean"]
    raw = bytearray(state.raw)
    (slot,) = state.slots[0]
    for place in (0, 1):
        raw[GEOMETRY.leaf_offset(slot, place) + 40] ^= 1
    storage = SimulatedStorage(SimulatedDisk.of(raw))
    image = opened(storage)
    with pytest.raises(BlockDamaged):
        image.write(0, fill(9))
    image.write(0, b"".join(map(fill, (1, 2, 3, 4))))
    image.close()
    storage.reopen()
    image = opened(storage)
    assert image.read(0, GROUP * PAGE) == b"".join(map(fill, (1, 2, 3, 4)))


def test_a_damaged_leaf_page_that_a_record_needs_costs_its_group_alone() -> None:
    state = history(IDENTITY)[0]["journal"]
    fresh = opened(SimulatedStorage(SimulatedDisk.of(state.raw)), read_only=True)
    tried = 0
    for offset, _ in state.spans["leaf"] + state.spans["leaf's other place"]:
        raw = bytearray(state.raw)
        raw[offset + 5] ^= 4
        storage = SimulatedStorage(SimulatedDisk.of(raw))
        image = opened(storage)
        if not image.lost_groups:
            image.abandon()
            continue
        tried += 1
        [group] = image.lost_groups
        blocks = range(group * GROUP, (group + 1) * GROUP)
        known = {
            block for block in blocks for changed in state.changed.values() if block in changed
        }
        for block in range(BLOCKS):
            found, _ = read_or_damaged(image, block)
            if block in blocks and block not in known:
                assert found is None, block
            else:
                assert found == fresh.read(block * PAGE, PAGE), block
        image.abandon()
        # Recovered once more, the same; written whole, a block is well again.
        storage.reopen()
        again = opened(storage)
        assert not again.lost_groups
        lost = next(block for block in blocks if block not in known)
        with pytest.raises(BlockDamaged, match="unknown epoch 0"):
            again.read(lost * PAGE, PAGE)
        again.write(lost * PAGE, fill(77))
        again.close()
        storage.reopen()
        healed = opened(storage, read_only=True)
        assert healed.read(lost * PAGE, PAGE) == fill(77)
    assert tried >= 3


def test_another_key_opens_nothing_and_writes_nothing() -> None:
    for state in history(IDENTITY)[0].values():
        storage = SimulatedStorage(SimulatedDisk.of(state.raw))
        changes: list[str] = []
        storage.on_call = lambda name, offset, size, changes=changes: changes.append(name)
        with pytest.raises(IntegrityError):
            SealedImage.open(
                storage, image_key=bytes(32), cache=BlockCache(0, PAGE), geometry=GEOMETRY
            )
        assert changes == []
