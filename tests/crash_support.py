"""Workloads, crash states and the oracle of test_crash.py.

A *workload* is a prefix (how the image came to be) and operations, one letter each. It is run on
a simulated disk; at every operation of the disk during the last letter, and at each
acknowledgement, crash states are drawn and each is *examined*: the image is opened again and the
oracle asked. Distinct states are counted by recipe: workload, crash point, fate of each pending
sector. Every choice comes from the seed, so a failure prints one line that repeats it:

    PYTHONPATH=. python tests/test_crash.py 'RECIPE'

Recipe: `SEED PREFIX:LETTERS [kill:N | eio:N | short:N] [@POINT FATES]...`; a fate is `n`, `o`, or
letters with counts (`n3o5`), as simulation.py names them; the second `@` is inside the recovery.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import random
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from simulation import Fates, SimulatedDisk, SimulatedStorage, crash_fates
from test_refcheck import refcheck

from sealfs.errors import NoSpace, SealfsError
from sealfs.image.cache import BlockCache
from sealfs.image.format import Anchor, Identity
from sealfs.image.image import SealedImage
from sealfs.image.layout import Geometry
from sealfs.image.recovery import Lineage, read_identity

PAGE = 4096
GEOMETRY = Geometry(
    group_blocks=4, fanout=4, depth=2, header_pages=4, identity_pages=1, journal_pages=12
)
BLOCKS_MAX = 64
BLOCKS = 40
SMALL_COMMIT_BLOCKS = 3
"""In place of sealfs's own limit, so that commits of four blocks are big ones here."""
KEY = hashlib.sha256(b"image key").digest()
KEYS = {1: KEY} | {n: hashlib.sha256(b"image key %d" % n).digest() for n in range(2, 30)}
"""By key generation; a workload that replaces the image key takes the next one."""
IDENTITY = Identity(
    uuid=bytes(range(16)), vm_id="vm", kmi="vm", label="", wrapped_keys=((1, b"opaque"),)
)
PREFIXES = {"empty": "", "flushed": "bf", "settled": "bfc", "full": "bfcwfsfwf"}
"""Nothing; content in the journal; content in the tree; a journal with little room left."""
REKEYS = {
    "begun": "bfcwfk",
    "switched": "bfcwfkpxf",
    "half": "bfckppw",
    "checked": "bfckppppppw",
    "again": "bfcKwfkpp",
}
"""A rekey in progress: two keys in the identity; the new one in use; some groups sealed again; all
of them; and the second one of an image."""


LEDGER_SHARE = 0.15
"""How often, at an operation of the disk, the host's ledger goes on."""


def set_limit(name: str, value: int, setter: Callable[[object, str, int], None] = setattr) -> None:
    """Change a limit of sealfs.image in whichever modules have it."""
    rooms = [each for at, each in sys.modules.items() if at.startswith("sealfs.image.")]
    found = [module for module in rooms if hasattr(module, name)]
    assert found, f"sealfs.image has no limit {name}"
    for module in found:
        setter(module, name, value)


LETTERS = "wsxgfdGScr"
REKEY_BLOCKS = 5
"""Blocks that a part of a rekey seals again: a group, and a part of the next one."""
POINTS_MAX = 10_000
"""No workload has so many points; one that has does not end."""


class CrashFailure(AssertionError):
    """The promise is broken; the message holds the recipe."""


@dataclass(frozen=True)
class Recipe:
    """One branch of history, repeatable."""

    seed: int
    prefix: str
    letters: str
    fault: str = ""
    fault_at: int = 0
    choices: tuple[tuple[int, Fates], ...] = ()

    def __str__(self) -> str:
        parts = [str(self.seed), f"{self.prefix}:{self.letters}"]
        if self.fault:
            parts.append(f"{self.fault}:{self.fault_at}")
        for point, fates in self.choices:
            parts += [f"@{point}", ",".join(map(_short, fates)) or "-"]
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        seed, workload, *rest = text.split()
        prefix, letters = workload.split(":")
        fault, fault_at = "", 0
        if rest and not rest[0].startswith("@"):
            fault, number = rest.pop(0).split(":")
            fault_at = int(number)
        points = [int(word[1:]) for word in rest[::2]]
        fates = [() if w == "-" else tuple(map(_long, w.split(","))) for w in rest[1::2]]
        return cls(
            int(seed), prefix, letters, fault, fault_at, tuple(zip(points, fates, strict=True))
        )

    def crashed(self, point: int, fates: Fates) -> Recipe:
        return replace(self, choices=(*self.choices, (point, fates)))


def _short(fate: str) -> str:
    if len(fate) == 1:
        return fate
    return "".join(f"{letter}{len(list(run))}" for letter, run in itertools.groupby(fate))


def _long(word: str) -> str:
    runs = re.findall(r"([nozg])(\d+)", word)
    return "".join(letter * int(count) for letter, count in runs) or word


def seeded(label: str) -> Callable[[int], bytes]:
    """Return a source of randomness of one branch: siblings draw different salts."""
    numbers = itertools.count()
    return lambda size: hashlib.shake_256(f"{label}|{next(numbers)}".encode()).digest(size)


class Oracle:
    """What may be read: for each block the value last acknowledged and every later one."""

    def __init__(self) -> None:
        self.memory = [Anchor(0, bytes(16))]
        """States of the image that the host's ledger may hold now: one, or two while it writes."""
        self.sizes = [BLOCKS * PAGE]
        self.versions = [[bytes(PAGE)] for _ in range(BLOCKS_MAX)]

    @property
    def size(self) -> int:
        return self.sizes[-1]

    def remembering(self, state: Anchor) -> Oracle:
        """Return the same oracle where the ledger is known to hold this state."""
        same = copy.copy(self)
        same.memory = [state]
        return same

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        while done < len(data):
            block, start = divmod(offset + done, PAGE)
            piece = data[done : done + PAGE - start]
            old = self.versions[block][-1]
            self.versions[block].append(old[:start] + piece + old[start + len(piece) :])
            done += len(piece)

    def discard(self, first: int, count: int) -> None:
        for block in range(first, first + count):
            self.versions[block].append(bytes(PAGE))

    def resize(self, size: int) -> None:
        if size < self.size:
            block, kept = divmod(size, PAGE)
            for each in range(block, BLOCKS_MAX):
                old = self.versions[each][-1] if each == block else b""
                self.versions[each].append(old[:kept].ljust(PAGE, b"\0"))
        self.sizes.append(size)

    def acknowledge(self, blocks: range = range(BLOCKS_MAX), *, size: bool = True) -> None:
        for block in blocks:
            del self.versions[block][:-1]
        if size:
            del self.sizes[:-1]

    def adopt(self, content: bytes) -> None:
        """Take what is read for the newest of the allowed values."""
        self.sizes.append(len(content))
        padded = content.ljust(BLOCKS_MAX * PAGE, b"\0")
        for block, versions in enumerate(self.versions):
            versions.append(padded[block * PAGE : (block + 1) * PAGE])

    def settle(self, content: bytes) -> None:
        """After a crash: what was read is what there is."""
        self.sizes = [len(content)]
        padded = content.ljust(BLOCKS_MAX * PAGE, b"\0")
        self.versions = [[padded[i * PAGE : (i + 1) * PAGE]] for i in range(BLOCKS_MAX)]

    def latest(self) -> bytes:
        return b"".join(each[-1] for each in self.versions)[: self.size]

    def complaint(self, content: bytes) -> str | None:
        """Return what is wrong with the content of a reopened image, None if nothing."""
        if len(content) not in self.sizes:
            return f"size {len(content)}, allowed {self.sizes}"
        for block in range(-(-len(content) // PAGE)):
            value = content[block * PAGE : (block + 1) * PAGE]
            allowed = [version[: len(value)] for version in self.versions[block]]
            if value not in allowed:
                begins = [version[:8].hex() for version in allowed]
                return f"block {block} begins {value[:8].hex()}, allowed {begins}"
        return None


@dataclass
class Lab:
    """One run: its seed, how much it tries, what it has reached."""

    seed: int = 1
    cap_point: int = 4
    """States at each operation of the disk; at an acknowledgement twice as many."""
    inner: float = 0.02
    """Share of states whose recovery is crashed too."""
    later: float = 0.05
    """Share of recovered images that are worked on and opened once more."""
    again: float = 0.2
    """Share of states that are opened a second time, after a power cut."""
    cache_blocks: int = BLOCKS_MAX
    storage: Callable[[SimulatedDisk], SimulatedStorage] = SimulatedStorage
    randomness: Callable[[str], Callable[[int], bytes]] = seeded
    only: Recipe | None = None
    figures: Counter[str] = field(default_factory=Counter)
    nonces: set[tuple[bytes, int, int]] = field(default_factory=set)
    seen: set[Recipe] = field(default_factory=set)
    base: SimulatedDisk | None = None

    def fail(self, recipe: Recipe, text: str) -> CrashFailure:
        command = f"PYTHONPATH=. python tests/test_crash.py '{recipe}'"
        return CrashFailure(f"{text}\nrecipe: {recipe}\nagain: {command}")

    def fresh(self) -> SimulatedDisk:
        """Return a disk with an empty image."""
        if self.base is None:
            self.base = SimulatedDisk()
            create(SimulatedStorage(self.base))
        return self.base.clone()

    def rng(self, label: object) -> random.Random:
        return random.Random(f"{self.seed}|{label}")

    # -- opening

    def open(
        self, storage: SimulatedStorage, recipe: Recipe, stage: str, memory: list[Anchor],
        *, read_only: bool = False,
    ) -> SealedImage:  # fmt: skip
        """Open an image, watching that nothing is written before everything is verified."""
        written: list[str] = []
        journal = range(2 * GEOMETRY.header_pages * PAGE, self.slots_at())

        def on_call(name: str, offset: int, size: int) -> None:
            longer = name == "truncate" and offset >= storage.size()  # section 9, step 6
            if name != "allocate" and not longer:
                if read_only or (not written and name != "sync"):
                    raise self.fail(recipe, f"open wrote ({name}) before it synced")
                written.append(name)

        def on_read(name: str, offset: int, size: int) -> None:
            if written and offset in journal:
                raise self.fail(recipe, "open read the journal after it had begun to write")

        def on_seal(salt: bytes, epoch: int, counter: int, block: int) -> None:
            if (salt, epoch, counter) in self.nonces:
                raise self.fail(recipe, f"nonce {epoch}/{counter} is used twice (block {block})")
            self.nonces.add((salt, epoch, counter))

        def witness(lineage: Lineage) -> Anchor:
            for state in memory:
                if lineage.newest.sequence < state.sequence:
                    raise self.fail(recipe, f"{lineage.newest} is older than the ledger's {state}")
                if not lineage.descends_from(state):
                    raise self.fail(recipe, f"does not show that it continues the ledger's {state}")
            self.figures["ledgers asked"] += 1
            if not read_only:
                del memory[1:]
            return memory[0]

        storage.on_call, storage.on_read = on_call, on_read
        try:
            return SealedImage.open(
                storage,
                image_key=keys_of(storage),
                cache=BlockCache(
                    clean_max=self.cache_blocks * PAGE, dirty_max=self.cache_blocks * PAGE
                ),
                random=self.randomness(f"{recipe}|{stage}"),
                geometry=GEOMETRY,
                read_only=read_only,
                record_roots=self.rng(f"{recipe.prefix}{recipe.letters}").random() < 0.5,
                on_seal=on_seal,
                witness=witness,
            )
        finally:
            storage.on_call = storage.on_read = None

    def slots_at(self) -> int:
        return (2 * GEOMETRY.header_pages + GEOMETRY.journal_pages) * PAGE

    def reopened(
        self, storage: SimulatedStorage, recipe: Recipe, stage: str, memory: list[Anchor]
    ) -> SealedImage:
        try:
            return self.open(storage, recipe, stage, memory)
        except (SealfsError, ValueError, LookupError, AttributeError, struct.error) as exc:
            if isinstance(exc, CrashFailure):
                raise
            raise self.fail(recipe, f"does not open ({stage}): {exc!r}") from exc

    def content(self, image: SealedImage, recipe: Recipe) -> bytes:
        try:
            content = image.read(0, image.size)
        except SealfsError as exc:
            raise self.fail(recipe, f"a block does not read: {exc}") from exc
        if len(content) != image.size:
            raise self.fail(recipe, f"{len(content)} bytes read of {image.size}")
        return content

    def refcheck(self, disk: SimulatedDisk, recipe: Recipe, stage: str) -> tuple[bytes, bytes]:
        """Return (content, root) as the independent reader sees them."""
        report = refcheck.check(disk.durable, KEYS, GEOMETRY)
        if report.errors:
            raise self.fail(recipe, f"refcheck ({stage}): {'; '.join(report.errors)}")
        blocks = (report.blocks.get(i, bytes(PAGE)) for i in range(-(-report.size // PAGE)))
        return b"".join(blocks)[: report.size], report.root

    def one_key(self, disk: SimulatedDisk, recipe: Recipe) -> None:
        """Fail unless everything is under one key, which is the only one in both identities."""
        report = refcheck.check(disk.durable, KEYS, GEOMETRY)
        if {generation for generation, _ in report.found} != {report.key_generation}:
            raise self.fail(recipe, f"is under several keys: {dict(report.found)}")
        if (report.phase, report.found[report.key_generation, "identities"]) != (0, 2):
            raise self.fail(recipe, f"the rekey has not ended: phase {report.phase}")

    # -- crash states

    def at_point(
        self, disk: SimulatedDisk, oracle: Oracle, recipe: Recipe, point: int, *,
        full: bool, expected: bytes | None = None,
    ) -> None:  # fmt: skip
        """Draw crash states of this moment and examine each."""
        depth = len(recipe.choices)
        if self.only is not None:
            if depth < len(self.only.choices) and self.only.choices[depth][0] == point:
                fates = self.only.choices[depth][1]
                self.examine(disk, oracle, recipe.crashed(point, fates), expected)
            return
        cap = self.cap_point * (2 if full else 1) if depth == 0 else 1 + full
        rng = self.rng(f"{recipe}@{point}")
        for fates in crash_fates(disk.pending, rng, full=full, cap=cap):
            self.examine(disk, oracle, recipe.crashed(point, fates), expected)

    def examine(
        self, disk: SimulatedDisk, oracle: Oracle, recipe: Recipe, expected: bytes | None
    ) -> None:
        """Cut the power, open again, ask the oracle."""
        if recipe in self.seen:
            return
        self.seen.add(recipe)
        depth = len(recipe.choices)
        self.figures["states" if depth == 1 else "states inside recovery"] += 1
        rng = self.rng(recipe)
        crashed = disk.crash(recipe.choices[-1][1])
        told, root = self.refcheck(crashed, recipe, "before recovery")
        if expected is not None and told != expected:
            raise self.fail(recipe, "a crash inside recovery changed what is recovered")
        if complaint := oracle.complaint(told):
            raise self.fail(recipe, f"refcheck reads: {complaint}")
        if rng.random() < self.again:
            self.read_only(crashed, recipe, told, oracle.memory)
        storage = self.storage(crashed)
        inside = self.only is not None or (rng.random() < self.inner and depth < 3)
        # Both states are asked for; the ledger holds one of them, and so it stays.
        memory = list(oracle.memory)
        rng.shuffle(memory)
        if inside:
            self.watch(storage, oracle.remembering(memory[0]), recipe, told)
        image = self.reopened(storage, recipe, "after the crash", memory)
        content = self.content(image, recipe)
        if content != told:
            complaint = oracle.complaint(content) or "but it is allowed"
            raise self.fail(recipe, f"sealfs and refcheck read different content: {complaint}")
        if image.root_mac != root:
            raise self.fail(recipe, "sealfs and refcheck have different roots")
        if image.lost_groups:
            raise self.fail(recipe, f"leaf pages of groups {image.lost_groups} are lost")
        image.abandon()
        if self.only is not None or rng.random() < self.again:
            self.cut_again(crashed, recipe, content, memory)
        if self.only is not None or rng.random() < self.later:
            life_goes_on(self, recipe, crashed, content)

    def read_only(
        self, disk: SimulatedDisk, recipe: Recipe, content: bytes, memory: list[Anchor]
    ) -> None:
        """Opened for reading, an image shows the same and is not written."""
        storage = self.storage(disk.clone())
        image = self.open(storage, recipe, "read-only", memory, read_only=True)
        if self.content(image, recipe) != content:
            raise self.fail(recipe, "opened read-only, it reads other bytes")
        image.close()
        if storage.disk.pending or storage.disk.durable != disk.durable:
            raise self.fail(recipe, "opened read-only, it was written")

    def watch(
        self, storage: SimulatedStorage, oracle: Oracle, recipe: Recipe, expected: bytes | None
    ) -> Callable[[], None]:
        """Examine crash states at every operation of this storage from now on.

        Returns what is to be called at an acknowledgement.
        """
        points = itertools.count(1)

        def draw(*, full: bool) -> None:
            point = next(points)
            assert point < POINTS_MAX
            self.at_point(storage.disk, oracle, recipe, point, full=full, expected=expected)

        storage.on_point = lambda kind: draw(full=False) if kind == "op" else None
        return lambda: draw(full=True)

    def cut_again(
        self, disk: SimulatedDisk, recipe: Recipe, content: bytes, memory: list[Anchor]
    ) -> None:
        """After recovery everything is durable: with or without what is pending, the same."""
        for stage, fates in (("lost", "o"), ("done", "n")):
            after = disk.crash((fates,) * len(disk.pending))
            told, _ = self.refcheck(after, recipe, f"after recovery, {stage}")
            image = self.reopened(
                self.storage(after), recipe, f"second time, {stage}", list(memory)
            )
            if self.content(image, recipe) != content or told != content:
                raise self.fail(recipe, f"a second open ({stage}) gives other bytes")
            image.abandon()
            self.figures["second opens"] += 1


def keys_of(storage: SimulatedStorage) -> dict[int, bytes]:
    """Return what the key service gives for an image: a key for each wrapped one, no others."""
    on_read, storage.on_read = storage.on_read, None
    try:
        wrapped = read_identity(storage, GEOMETRY).wrapped_keys
    finally:
        storage.on_read = on_read
    return {generation: KEYS[generation] for generation, _ in wrapped}


def create(storage: SimulatedStorage) -> None:
    SealedImage.create(
        storage, identity=IDENTITY, image_key=KEY, size=BLOCKS * PAGE, geometry=GEOMETRY
    )


class Session:
    """A process working on an image, with the oracle beside it."""

    def __init__(self, lab: Lab, recipe: Recipe, disk: SimulatedDisk, oracle: Oracle) -> None:
        self.lab, self.recipe, self.disk, self.oracle = lab, recipe, disk, oracle
        self.on_acknowledge: Callable[[], None] | None = None
        self._opens = itertools.count()
        self._values = itertools.count(1)
        self.storage = lab.storage(disk)
        self.storage.rng = lab.rng(f"{recipe}|failing sync")
        self._ledger_rng = lab.rng(f"{recipe.prefix}{recipe.letters}|ledger")
        self.image = self._open()
        self.storage.on_step = self.ledger_step

    def _open(self) -> SealedImage:
        stage = f"session {next(self._opens)}"
        return self.lab.open(self.storage, self.recipe, stage, self.oracle.memory)

    def ledger_step(self) -> None:
        """Now and then the host begins to note how far the image has come, or has noted it."""
        memory = self.oracle.memory
        if self._ledger_rng.random() > LEDGER_SHARE:
            return
        if len(memory) == 2:
            del memory[0]
            self.image.remembered(memory[0])
        elif self.image.progress != memory[0]:
            memory.append(self.image.progress)
            self.image.remembering(memory[1])

    def acknowledged(self, blocks: range = range(BLOCKS_MAX), *, size: bool = True) -> None:
        self.oracle.acknowledge(blocks, size=size)
        if self.on_acknowledge is not None:
            self.on_acknowledge()

    def write(self, offset: int, size: int) -> None:
        size = min(size, self.oracle.size - offset)
        if size <= 0:
            return
        value = struct.pack(">HHI", next(self._values), offset // PAGE, 0xC0FFEE)
        data = (value * (size // 8 + 1))[:size]
        self.oracle.write(offset, data)
        self.image.write(offset, data)

    def discard(self, first: int, count: int) -> None:
        count = min(count, self.oracle.size // PAGE - first)
        if count > 0:
            self.oracle.discard(first, count)
            self.image.discard(first * PAGE, count * PAGE)
            self.acknowledged(range(first, first + count), size=False)

    def resize(self, size: int) -> None:
        before = self.oracle.size
        self.oracle.resize(size)
        self.image.resize(size)
        beyond = range(-(-size // PAGE), BLOCKS_MAX) if size < before else range(0)
        self.acknowledged(beyond)

    def reopen(self) -> None:
        self.image.close()
        self.acknowledged()
        self.storage.reopen()
        self.storage.on_step = None
        self.image = self._open()
        self.storage.on_step = self.ledger_step

    def do(self, letter: str) -> None:
        try:
            self._do(letter)
        except NoSpace:
            # A long write is accepted in parts: what the image now shows goes on from here.
            content = self.image.read(0, self.image.size)
            if complaint := self.oracle.complaint(content):
                raise self.lab.fail(self.recipe, f"after ENOSPC: {complaint}") from None
            self.oracle.adopt(content)

    def _do(self, letter: str) -> None:
        match letter:
            case "w":  # one block
                self.write(PAGE, PAGE)
            case "s":  # a part of a block
                self.write(2 * PAGE + 700, 900)
            case "x":  # across the end of a group, unaligned at both ends
                self.write(6 * PAGE + 2000, 3 * PAGE - 1700)
            case "g":  # a whole group
                self.write(8 * PAGE, 4 * PAGE)
            case "b":  # three groups and a part of the fourth
                self.write(0, 14 * PAGE)
            case "f":
                self.image.flush()
                self.acknowledged()
            case "d":
                self.discard(6, 4)
            case "G":
                self.resize(56 * PAGE)
            case "S":
                self.resize(9 * PAGE + 1000)
            case "c":
                self.image.checkpoint()  # a flush too
                self.acknowledged()
            case "r":
                self.reopen()
            # These are in no list of letters: test_identity.py, test_crash_rekey.py try them.
            case "i":
                known = self.image.identity
                wrapped = tuple((g, b"rewrapped %d" % known.generation)
                                for g, _ in known.wrapped_keys)  # fmt: skip
                self.image.rewrite_identity(replace(known, wrapped_keys=wrapped))
            case "k":
                self.begin_rekey()
            case "p":
                if self.image.is_rekeying:
                    self.image.rekey_part(REKEY_BLOCKS)
            case "K":
                self.begin_rekey()
                while self.image.is_rekeying:
                    self.image.rekey_part(REKEY_BLOCKS)

    def begin_rekey(self) -> None:
        if not self.image.is_rekeying:
            new = self.image.identity.key_generation + 1
            self.image.begin_rekey(b"wrapped %d" % new, KEYS[new])


def life_goes_on(lab: Lab, recipe: Recipe, disk: SimulatedDisk, content: bytes) -> None:
    """Work on a recovered image; what is flushed then survives a power cut and another open."""
    oracle = Oracle()
    oracle.settle(content)
    letters = "".join(lab.rng(f"{recipe}|later").choices(LETTERS, k=4))
    session = Session(lab, replace(recipe, letters=f"{recipe.letters}+{letters}"), disk, oracle)
    for letter in letters:
        session.do(letter)
    session.do("f")
    was_rekeying = session.image.is_rekeying
    if was_rekeying:
        session.do("K")
        lab.figures["rekeys ended after"] += 1
    session.image.abandon()
    crashed = disk.crash(("o",) * len(disk.pending))
    lab.refcheck(crashed, recipe, f"after {letters} after recovery")
    if was_rekeying:
        lab.one_key(crashed, recipe)
    image = lab.reopened(lab.storage(crashed), recipe, "later", oracle.memory)
    if lab.content(image, recipe) != oracle.latest():
        raise lab.fail(recipe, f"what was flushed after recovery ({letters}) is lost")
    image.abandon()
    lab.figures["lives after"] += 1
