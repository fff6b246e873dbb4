"""The named mutants, one for each step and rule of the format, and the survivors that are accepted.

Each breaks one rule by a small edit of one source file, and names the tests that are to catch it,
the cheapest first. The text it replaces must be there exactly once: a mutant that no longer fits
the source is an error and not a survivor. `mutants_run.py` runs them, `tools/mutants` is the
command; the list follows FORMAT.md: 8.2, 8.3, 8.1 and 8.4, 9, 3 to 7, rewrites of 5, rekeys
(11), the ledger; then the network links, and what a mount answers reads with, which is C in part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class StaleMutant(Exception):
    """A mutant does not fit the source any more."""


NOT_RUN = "not the_harness_catches and not the_model_finds"
"""Tests of the tests: they mutate by themselves."""

GOLDEN = "tests/test_golden.py"
IMAGE = "tests/test_image.py"
JOURNAL = "tests/test_journal.py"
TREE = "tests/test_tree.py"
CIPHER = "tests/test_cipher.py"
SPACE = "tests/test_image_space.py"
STORAGE = "tests/test_storage.py"
TAMPER = "tests/test_tamper.py"
LEDGER = "tests/test_ledger.py"
IDENTITY = "tests/test_identity.py"
GAPS = "tests/test_mutant_gaps.py"
REBUILD = "tests/test_rebuild.py"
CUTS = "tests/test_crash.py::test_every_short_workload_survives_power_cuts"
KILLS = "tests/test_crash.py::test_every_short_workload_survives_a_kill"
FAILS = "tests/test_crash.py::test_a_failing_call_is_survived_or_stops_everything"
CRASH = "tests/test_crash.py"
REKEY = "tests/test_rekey.py"
REKEY_CRASH = "tests/test_crash_rekey.py"
FULL_TABLE = f"{SPACE}::test_a_full_epoch_table_refuses_writes_and_still_opens"
PREALLOCATED = f"{SPACE}::test_a_slot_that_a_preallocation_is_about_to_give_is_nobody_elses"

_REST = (GOLDEN, GAPS, IMAGE, SPACE, TAMPER, CUTS, KILLS, FAILS, CRASH)
DRAWN_TESTS = {
    "journal.py": (JOURNAL, *_REST),
    "tree.py": (TREE, *_REST),
    "image.py": (IDENTITY, *_REST),
}
"""For a drawn mutant of each file, the cheapest first. test_image_model.py is not among them: what
Hypothesis draws depends on the sources, so its finding something new need not be the mutant's."""


@dataclass(frozen=True)
class Mutant:
    """One rule broken."""

    name: str
    rule: str
    """Where it stands: a section of FORMAT.md, with the step, or what else says it."""
    path: str
    """Below sealfs."""
    edits: tuple[tuple[str, str], ...]
    """(what is there exactly once, what is put in its place)."""
    tests: tuple[str, ...]
    is_quick: bool = True
    """Whether it is caught in a few seconds."""

    def applied(self, room: Path) -> dict[str, str]:
        """Return the mutated sources: path below `room` to content.

        Raises:
            StaleMutant: what it replaces is not there, or more than once.
        """
        path = f"sealfs/{self.path}"
        content = (room / path).read_text()
        for old, new in self.edits:
            count = content.count(old)
            if count != 1:
                raise StaleMutant(f"{self.name}: is {count} times in {path}: {old!r}")
            content = content.replace(old, new)
        return {path: content}


VOLUME, RECOVERY, SCAN = "image/volume.py", "image/recovery.py", "image/journal.py"
FILE, TREE_FILE, CIPHER_FILE = "image/storage.py", "image/tree.py", "image/cipher.py"
COMMITTER, SPACE_FILE, IMAGE_FILE = "image/committer.py", "image/space.py", "image/image.py"
LEDGER_FILE, REBUILD_FILE, READER = "keys/ledger.py", "image/rebuild.py", "image/reader.py"
IDENTITY_FILE, SWEEP = "image/identity.py", "image/sweep.py"

COMMIT = (
    Mutant(
        "a failed seal gives its nonces back", "3.3; 8.2 step 1", CIPHER_FILE,
        (
            ("        self._counter += len(blocks)\n", ""),
            ("        if self._on_seal:\n", "        self._counter += len(blocks)\n"
             "        if self._on_seal:\n"),
        ),
        (CIPHER,),
    ),
    Mutant(
        "direct data is not written", "8.2 step 2", VOLUME,
        (("        plan.extend(self._home_writes(batch.direct, direct, new_slots))\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "a GROUP's leaf page is not written", "8.2 step 2", VOLUME,
        (("            view[:BLOCK_SIZE] = leaf\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "no sync between data and record", "8.2 step 3", VOLUME,
        (("        if slots or plan:\n            plan.append((Step.SYNC,))\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "no sync between direct data of old groups and record", "8.2 step 3", VOLUME,
        (("        if slots or plan:\n", "        if slots:\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "no sync between new groups and record", "8.2 step 3", VOLUME,
        (("        if slots or plan:\n", "        if plan:\n"),),
        (CUTS,),
    ),
    Mutant(
        "the record is only written", "8.2 step 4", VOLUME,
        (("[(Step.DURABLE, offset, whole)]", "[(Step.WRITE, offset, whole)]"),),
        (CUTS,),
    ),
    Mutant(
        "the payload is only written", "8.2 step 4", VOLUME,
        (("execute(self.storage, [(Step.DURABLE, offset, whole)])",
          "execute(self.storage, [(Step.DURABLE, offset, [head]),"
          " (Step.WRITE, offset + len(head), [written.payload])])"),),
        (CUTS,),
    ),
    Mutant(
        "the record comes before its data", "8.2 steps 2 and 4", VOLUME,
        (
            ("        execute(self.storage, plan)\n        _give_back(direct)\n",
             "        self._late = plan\n"),
            ("        execute(self.storage, [(Step.DURABLE, offset, whole)])\n",
             "        execute(self.storage, [(Step.DURABLE, offset, whole)])\n"
             "        execute(self.storage, self._late)\n"),
        ),
        (CUTS,),
    ),
    Mutant(
        "a durable record is not applied", "8.2 step 5", VOLUME,
        (("frames, start)\n        self.apply(written.record, written.leaves)\n",
          "frames, start)\n"),),
        (CUTS,),
    ),
    Mutant(
        "inline blocks are not written home", "8.2 step 5; 8.3 step 1", VOLUME,
        (("        if record.inline_blocks:\n", "        if False:\n"),),
        (CUTS,),
    ),
    Mutant(
        "inline blocks are written home before their record", "8.1; 8.2 step 5", VOLUME,
        (("payload, inline_entries = self._seal_run(batch.inline, frames)\n",
          "payload, inline_entries = self._seal_run(batch.inline, frames)\n"
          "        plan.extend(self._home_writes(batch.inline, payload, new_slots))\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "a flush is answered before it is one", "8.2 step 6", IMAGE_FILE,
        (("        if not self.is_dirty and self.poisoned is None:\n"
          "            self.oldest_dirty = None  # what",
          "        if self.poisoned is None and self.dirty_size < 3 * BLOCK_SIZE:\n"
          "            self.oldest_dirty = None  # what"),),
        (CUTS,),
    ),
    Mutant(
        "a size alone is not committed", "8.2 step 6", COMMITTER,
        (("if count or size != self._volume.size:", "if count:"),),
        (CUTS,),
    ),
)  # fmt: skip

CHECKPOINT = (
    Mutant(
        "leaf pages are written in place", "8.3 step 2", TREE_FILE,
        (("            node.places[i] ^= 1\n", ""),),
        (TREE,),
    ),
    Mutant(
        "node pages are written in place", "8.3 step 2", TREE_FILE,
        (("                    node.place ^= 1\n", "                    pass\n"),),
        (TREE,),
    ),
    Mutant(
        "the epoch table goes to the live copy", "4.2; 8.3 step 2", VOLUME,
        (("self.geometry.table_offset(1 - self._live_copy)",
          "self.geometry.table_offset(self._live_copy)"),),
        (CUTS,),
    ),
    Mutant(
        "the epoch table is not written", "4.2; 8.3 step 2", VOLUME,
        (("        plan.extend(self._table_plan())\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "no sync between pages and superblock", "8.3 step 3", VOLUME,
        (("replay again.\n        plan.append((Step.SYNC,))\n", "replay again.\n"),),
        (CUTS,),
    ),
    Mutant(
        "the superblock comes before its pages", "8.3 steps 2 and 4", VOLUME,
        (
            ("        execute(self.storage, plan)\n        self._fence()\n",
             "        self._fence()\n"),
            ("        execute(self.storage, [(Step.DURABLE, offset, [page])])\n",
             "        execute(self.storage, [(Step.DURABLE, offset, [page])])\n"
             "        execute(self.storage, plan)\n"),
        ),
        (CUTS,),
    ),
    Mutant(
        "the superblock is only written", "8.3 step 4", VOLUME,
        (("[(Step.DURABLE, offset, [page])]", "[(Step.WRITE, offset, [page])]"),),
        (CUTS,),
    ),
    Mutant(
        "the superblock goes over the live one", "4.1; 8.3 step 4", VOLUME,
        (("offset = self.geometry.superblock_offset(1 - self._live_copy)\n        # Crash",
          "offset = self.geometry.superblock_offset(self._live_copy)\n        # Crash"),),
        (CUTS,),
    ),
    Mutant(
        "the generation does not grow", "4.1", VOLUME,
        (("generation=old.generation + 1,", "generation=old.generation,"),),
        (CUTS,),
    ),
    Mutant(
        "the fence does not look", "4.1; two openers", VOLUME,
        (("        execute(self.storage, plan)\n        self._fence()\n",
          "        execute(self.storage, plan)\n"),),
        (GAPS,),
    ),
    Mutant(
        "a commit after a sleep does not look", "4.1; two openers", VOLUME,
        (("        self._fence_after_sleep()\n        geometry", "        geometry"),),
        (GAPS,),
    ),
    Mutant(
        "blocks go home after a sleep without a look", "4.1; two openers", VOLUME,
        (("            self._fence_after_sleep()\n            new_slots",
          "            new_slots"),),
        (GAPS,),
    ),
    Mutant(
        "a checkpoint after a sleep does not look", "4.1; two openers", VOLUME,
        (("        self._fence_after_sleep()\n        execute(self.storage, plan)\n",
          "        execute(self.storage, plan)\n"),),
        (GAPS,),
    ),
    Mutant(
        "the fence looks at its own superblock alone", "4.1; two openers", VOLUME,
        (("        newer = int.from_bytes(other[32:40], \"little\") > self.superblock.generation\n",
          "        newer = False\n"),),
        (GAPS,),
    ),
    Mutant(
        "a superblock forgets what is remembered", "4.1, anchors", VOLUME,
        (("dict.fromkeys((tail.anchor, *pins, *old.anchors))",
          "dict.fromkeys((tail.anchor, *old.anchors))"),),
        (CUTS,),
    ),
    Mutant(
        "a superblock forgets older states", "4.1, anchors", VOLUME,
        (("dict.fromkeys((tail.anchor, *pins, *old.anchors))",
          "dict.fromkeys((tail.anchor, *pins))"),),
        (TAMPER,), is_quick=False,
    ),
    Mutant(
        "journal pages are used again before a checkpoint", "8.3 step 5", SCAN,
        (("if self.used_pages + gap + page_count > self.page_count:", "if False:"),),
        (JOURNAL, CUTS),
    ),
    Mutant(
        "a moved group's slot is used again at once", "8.3 step 5, busy", VOLUME,
        (("                self.allocator.free(old)\n",
          "                self.allocator.put_back(old)\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "an emptied group's slot is used again at once", "8.3 step 5, busy", VOLUME,
        (("        self.allocator.free(slot)\n", "        self.allocator.put_back(slot)\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "freed slots are used by the checkpoint that frees them", "8.3 step 5, busy", VOLUME,
        (("        self.space.reserve_nodes(self.tree.unplaced_nodes_max())\n",
          "        self.allocator.release()\n"
          "        self.space.reserve_nodes(self.tree.unplaced_nodes_max())\n"),),
        (GAPS,),
    ),
    Mutant(
        "freed node positions are used by the checkpoint that frees them", "8.3 step 5", VOLUME,
        (("            self.allocator.free_node(slot, position)\n",
          "            self.allocator._free_nodes.append((slot, position))\n"),),
        (GAPS,),
    ),
    Mutant(
        "slots are punched before the checkpoint", "8.3 step 5", VOLUME,
        (("        self.space.note_given_up(slot)\n",
          "        execute(self.storage, [(Step.PUNCH, self.geometry.slot_offset(slot),"
          " self.geometry.slot_size)])\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "holes are punched before their record", "8.1; 8.3 step 5", VOLUME,
        (("        execute(self.storage, [(Step.DURABLE, offset, whole)])\n",
          "        for run in record.holes:\n"
          "            for group, index, part in self.live_parts(*run):\n"
          "                at = self.geometry.block_offset(self.tree.slot_of(group), index)\n"
          "                execute(self.storage, [(Step.PUNCH, at, part * BLOCK_SIZE)])\n"
          "        execute(self.storage, [(Step.DURABLE, offset, whole)])\n"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "a hole is punched though it was written again", "8.1", SPACE_FILE,
        (("holes = [i for i in range(count) if entries[i * ENTRY_SIZE + 28] == 0]",
          "holes = list(range(count))"),),
        (IMAGE, CUTS),
    ),
    Mutant(
        "a hole is punched though it is about to be written", "8.3 step 5; 8.4", SPACE_FILE,
        (("            if self.keep(group):\n", "            if False:\n"),),
        (GAPS,),
    ),
    Mutant(
        "the file is cut before the checkpoint", "8.3 step 5", VOLUME,
        (("            self.space.note_cut()\n",
          "            named = [*self.tree.chunks(), *map(self.tree.slot_of, self.tree.groups())]\n"
          "            cut = self.geometry.slot_offset(max(named) + 1)\n"
          "            if leaves is not None and cut < self.storage.size():\n"
          "                execute(self.storage, [(Step.TRUNCATE, cut)])\n"),),
        (CUTS,), is_quick=False,
    ),
)  # fmt: skip

WRITING = (
    Mutant(
        "a whole group is written over itself", "8.1", COMMITTER,
        (("slot = reserved if reserved != NO_SLOT else self._take_whole_slot()",
          "slot = reserved if reserved != NO_SLOT else self._tree.slot_of(group)"),),
        (IMAGE, CUTS), is_quick=False,
    ),
    Mutant(
        "a block with a live copy is written in place", "8.1", COMMITTER,
        (("is_direct = not is_small and leaf[at + 28] == 0", "is_direct = not is_small"),),
        (CUTS,), is_quick=False,
    ),
    Mutant(
        "a failed operation does not poison", "8.4", IMAGE_FILE,
        (("            self.poisoned = self.poisoned or str(exc) or type(exc).__name__\n", ""),),
        (FAILS,),
    ),
    Mutant(
        "a poisoned image answers a flush", "8.4", IMAGE_FILE,
        (("        if not self.is_dirty and self.poisoned is None:\n",
          "        if not self.is_dirty or self.poisoned is not None:\n"),),
        (FAILS,),
    ),
    Mutant(
        "a poisoned image is written at its close", "8.4", IMAGE_FILE,
        (("            if not self.read_only and self.poisoned is None:\n                yield",
          "            if not self.read_only:\n                self.poisoned = None\n"
          "                yield"),),
        (GAPS,),
    ),
    Mutant(
        "a failed fdatasync is no failure", "8.4", FILE,
        (("            raise StorageFailed(self.path, f\"fdatasync failed: {exc.strerror}\")"
          " from exc\n", "            pass\n"),),
        (GAPS,),
    ),
    Mutant(
        "a durable write is not", "8.2 step 4", FILE,
        (("self._write(offset, buffers, os.RWF_DSYNC)", "self._write(offset, buffers, 0)"),),
        (GAPS,),
    ),
    Mutant(
        "a short write is taken for a whole one", "short writes loop", FILE,
        (("        while pending:\n            try:\n",
          "        if pending:\n            try:\n"),),
        (GAPS,),
    ),
    Mutant(
        "a quick write is accepted without its space", "8.4", COMMITTER,
        (("            volume.space.reserve(slot, index, part)\n", ""),),
        (SPACE,),
    ),
    Mutant(
        "a write is accepted without space for the nodes above", "8.4", COMMITTER,
        (("            volume.space.reserve_nodes(len(self._new_nodes)"
          " * self._geometry.depth)\n", ""),),
        (SPACE,),
    ),
    Mutant(
        "no row of the epoch table is kept for a recovery", "4.2; 8.4", IMAGE_FILE,
        (("ROWS_KEPT = ROWS_FOR_RECOVERY + 2\n", "ROWS_KEPT = 0\n"),),
        (FULL_TABLE,),
    ),
    Mutant(
        "slots in flight are given back", "8.3, busy", COMMITTER,
        (("g for g in self.reserved if g not in self.allocating and not self.is_dirty_group(g)",
          "g for g in self.reserved if not self.is_dirty_group(g)"),),
        (PREALLOCATED,),
    ),
)  # fmt: skip

RECOVER = (
    Mutant(
        "writers do not lock each other out", "9 step 1; two openers", FILE,
        (("lock = struct.pack(\"hhqqi4x\", kind,",
          "lock = struct.pack(\"hhqqi4x\", fcntl.F_UNLCK,"),),
        (GAPS,),
    ),
    Mutant(
        "superblocks are not verified", "9 step 2", RECOVERY,
        (("        if superblock_is_authentic(raw, keys):\n            found",
          "        if True:\n            found"),),
        (GOLDEN, TAMPER),
    ),
    Mutant(
        "the older superblock is taken", "4.1; 9 step 2", RECOVERY,
        (("    live = max(found,", "    live = min(found,"),),
        (GOLDEN, CUTS),
    ),
    Mutant(
        "two superblocks of one generation are taken", "4.1", RECOVERY,
        (("or found[0][0].generation == found[1][0].generation", ""),),
        (GAPS,),
    ),
    Mutant(
        "superblocks are read from the page cache", "9", RECOVERY,
        (("storage.read_direct(geometry.superblock_offset(copy), BLOCK_SIZE)",
          "storage.read(geometry.superblock_offset(copy), BLOCK_SIZE)"),),
        (GAPS,),
    ),
    Mutant(
        "the journal is read from the page cache", "9", RECOVERY,
        (("part = storage.read_direct(geometry.journal_offset",
          "part = storage.read(geometry.journal_offset"),),
        (GAPS,),
    ),
    Mutant(
        "the epoch table is read from the page cache", "9", RECOVERY,
        (("storage.read_direct(geometry.table_offset(candidate), padded)",
          "storage.read(geometry.table_offset(candidate), padded)"),),
        (GAPS,),
    ),
    Mutant(
        "the epoch table is compared with the page cache", "9; 8.3 step 2", VOLUME,
        (("there = self.storage.read_direct(offset,", "there = self.storage.read(offset,"),),
        (GAPS,),
    ),
    Mutant(
        "a direct read comes from the page cache", "9", FILE,
        (("os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC", "os.O_RDONLY | os.O_CLOEXEC"),),
        (GAPS,),
    ),
    Mutant(
        "epoch rows are not verified", "9 step 3", RECOVERY,
        (("        if same_mac(hashlib.sha256(raw).digest(), superblock.table_digest):\n",
          "        if True:\n"),),
        (GOLDEN, TAMPER),
    ),
    Mutant(
        "the other copy of the epoch table is not tried", "9 step 3", RECOVERY,
        (("for candidate in (copy, 1 - copy):", "for candidate in (copy,):"),),
        (GAPS,),
    ),
    Mutant(
        "node pages are not verified", "6.2; 9 step 4", TREE_FILE,
        (("        return any(same_mac(self._mac_of(ref, node, macs), ref.mac) for macs in",
          "        return any(bool(self._mac_of(ref, node, macs)) for macs in"),),
        (TREE,),
    ),
    Mutant(
        "only the hinted place of a node page is tried", "6.2", TREE_FILE,
        (("for place in (ref.place & 1, 1 - (ref.place & 1)):", "for place in (ref.place & 1,):"),),
        (TREE,),
    ),
    Mutant(
        "only the hinted place of a leaf page is tried", "6.2", VOLUME,
        (("for place in (hint & 1, 1 - (hint & 1)):", "for place in (hint & 1,):"),),
        (GAPS,),
    ),
    Mutant(
        "a zero page is a leaf page of holes", "G3; 6.1", VOLUME,
        (("            if self.tree.verify_leaf(group, page, mac):\n",
          "            if self.tree.verify_leaf(group, page, mac) or not any(page):\n"),),
        (TAMPER,), is_quick=False,
    ),
    Mutant(
        "what a lost node page covers is holes", "6.4; G3", TREE_FILE,
        (("            self.check_lost(group * self._geometry.group_blocks, 1)\n", ""),),
        (REBUILD,),
    ),
    Mutant(
        "what a lost node page covers is holes to a read that need not wait", "6.4; G3", READER,
        (("                self._tree.check_lost(first, count)\n", "                pass\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a run is sent though a block of it is newer in memory", "1.2; 8.2 step 5", READER,
        (("        elif cache.has_newer(first, count):\n", "        elif count > 1000:\n"),),
        ("tests/test_blockread.py", IMAGE),
    ),
    Mutant(
        "a write is accepted though its space is being given back", "8.4", COMMITTER,
        (("            and not self._volume.space.is_reclaiming(group)\n", ""),),
        (SPACE, IMAGE, CUTS),
    ),
    Mutant(
        "a write is accepted without its space", "8.4", COMMITTER,
        (("            and self._volume.space.has(node.slots[i], index, count)\n", ""),),
        (SPACE, IMAGE, CUTS),
    ),
    Mutant(
        "a record is made longer than half the journal", "7", COMMITTER,
        (("return min(RECORD_BLOCKS_MAX - count,"
          " pages - pages * (8 + ENTRY_SIZE) // BLOCK_SIZE - 1)",
          "return RECORD_BLOCKS_MAX - count"),),
        (SPACE, IMAGE, CUTS),
    ),
    Mutant(
        "a live block is written in place", "8.1", COMMITTER,
        (("        batch.inline += compress(blocks, flags)\n", ""),
         ("compress(blocks, flags.translate(_INVERTED))", "blocks"),),
        (CUTS,),
    ),
    Mutant(
        "a search for data passes over what is lost", "6.4; G3", COMMITTER,
        (("        found = min(found, min(lost, default=beyond))\n", ""),),
        (REBUILD,),
    ),
    Mutant(
        "a discard passes over what is lost", "6.4", IMAGE_FILE,
        (("        self._tree.check_lost(first, last - first)\n", ""),),
        (REBUILD,),
    ),
    Mutant(
        "a shrink cuts what is lost", "6.4", IMAGE_FILE,
        (("        self._tree.check_lost(tail, block_count_of(self.size) - tail)\n", ""),),
        (REBUILD,),
    ),
    Mutant(
        "slots that a lost node page may name are free", "6.4; 8.3, busy", RECOVERY,
        (("    for slot in range(slot_count) if volume.tree.lost else", "    for slot in"),),
        (REBUILD,),
    ),
    Mutant(
        "node positions that a lost node page may name are free", "6.4; 8.3, busy", RECOVERY,
        (("        if not volume.tree.lost:\n", "        if True:\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a record brings a lost node page back as a new one", "6.4; 9 step 6", RECOVERY,
        (("    if not tree.lost:\n        return record\n", "    return record\n"),),
        (REBUILD,),
    ),
    Mutant(
        "an image without its top page opens", "6.4", RECOVERY,
        (("            raise IntegrityError(storage.path, tree.lost[0].cause)\n",
          "            pass\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a node page is rebuilt without proof", "6.4", REBUILD_FILE,
        (("            if self._tree.is_proven(ref, node):\n                return node\n",
          "            return node\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a rebuilt node page is written where it lay", "6.4", TREE_FILE,
        (("        self.rebuilt.append(ref)\n",
          "        self.rebuilt.append(ref)\n"
          "        node.slot, node.position, node.place = ref.slot, ref.position, ref.place\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a rebuilt node page is not written", "9 step 10", RECOVERY,
        (("        if scanned or tree.rebuilt:\n", "        if scanned:\n"),),
        (REBUILD,),
    ),
    Mutant(
        "a page newer than the superblock is taken for its tree's", "6.4", REBUILD_FILE,
        (("        return bool(self._later_nonces) and any(", "        return False and any("),),
        (REBUILD,),
    ),
    Mutant(
        "the oldest page of a child is tried first", "6.4", REBUILD_FILE,
        (("key=cmp_to_key(compare))", "key=cmp_to_key(compare), reverse=True)"),),
        (REBUILD,),
    ),
    Mutant(
        "the tree may name slots past the end of the file", "6.3; 9 step 4", RECOVERY,
        (("    if highest >= slot_count:\n", "    if False:\n"),),
        (GOLDEN, TAMPER),
    ),
    Mutant(
        "the tree may name a slot twice", "6.3", RECOVERY,
        (("        if slot < slot_count and not volume.allocator.occupy(slot):\n",
          "        if slot < slot_count and volume.allocator.occupy(slot) is None:\n"),),
        (GOLDEN,),
    ),
    Mutant(
        "a record of any sequence is taken", "7; 9 step 5", SCAN,
        (("        or header.sequence != position.sequence + 1\n", ""),),
        (JOURNAL,),
    ),
    Mutant(
        "a record of any chain is taken", "7; 9 step 5", SCAN,
        (("        or not same_mac(header.previous_mac, position.mac)\n", ""),),
        (JOURNAL,),
    ),
    Mutant(
        "a record of any epoch is taken", "7; 9 step 5", SCAN,
        (("        or header.epoch != epoch\n", ""),),
        (JOURNAL,),
    ),
    Mutant(
        "a record of any page is taken", "7; 9 step 5", SCAN,
        (("        or header.page != page\n", ""),),
        (JOURNAL,),
    ),
    Mutant(
        "a record of any length is taken", "7", SCAN,
        (("        or header.page_count > page_count // 2\n", ""),),
        (GAPS,),
    ),
    Mutant(
        "a record's body is not verified", "7; 9 step 5", SCAN,
        (("    if not same_mac(mac_of(key, record_mac_input(head)), header.mac):\n"
          "        return None\n", ""),),
        (JOURNAL, TAMPER),
    ),
    Mutant(
        "a record's header is not verified", "7; 9 step 5", SCAN,
        (("return header if same_mac(mac_of(key, header_mac_input(first)), header.header_mac)"
          " else None", "return header"),),
        (JOURNAL,),
    ),
    Mutant(
        "a record's payload is not verified", "7; 9 step 5", SCAN,
        (("    if not _payload_opens(read, record, payload_page, cipher):\n        return None\n",
          ""),),
        (JOURNAL, CUTS),
    ),
    Mutant(
        "a record at the journal's beginning is not looked for", "7", SCAN,
        (("dict.fromkeys((position.page, 0))", "dict.fromkeys((position.page,))"),),
        (JOURNAL,),
    ),
    Mutant(
        "nobody looks ahead", "9 step 5", SCAN,
        (("    _look_ahead(read, page_count, position, uuid, epoch, key, path)\n", ""),),
        (JOURNAL,),
    ),
    Mutant(
        "looking ahead passes over newer epochs", "9 step 5", SCAN,
        (("header.epoch > epoch or header.sequence > position.sequence + 1",
          "header.epoch == epoch and header.sequence > position.sequence + 1"),),
        (JOURNAL,),
    ),
    Mutant(
        "looking ahead minds older epochs", "9 step 5", SCAN,
        (("if header is None or header.epoch < epoch:", "if header is None:"),),
        (JOURNAL,),
    ),
    Mutant(
        "looking ahead minds a torn last record", "9 step 5", SCAN,
        (("header.sequence > position.sequence + 1:", "header.sequence > position.sequence:"),),
        (JOURNAL, CUTS),
    ),
    Mutant(
        "records are not applied", "9 step 6", RECOVERY,
        (("        volume.apply(_known_part(volume, item.record))\n", ""),),
        (GOLDEN,),
    ),
    Mutant(
        "a damaged leaf page that a record needs costs the image", "9 step 6", RECOVERY,
        (("    volume.recovering = True\n", ""),),
        (GAPS,),
    ),
    Mutant(
        "blocks of a lost leaf page are holes", "9 step 6; G3", VOLUME,
        (("        return (LOST * max(count, 0)).ljust(BLOCK_SIZE, b\"\\0\")\n",
          "        return bytes(max(count, 0) and BLOCK_SIZE)\n"),),
        (GAPS,),
    ),
    Mutant(
        "the root is compared though a leaf page is lost", "9 steps 6 and 7", RECOVERY,
        (("    if scanned and not volume.lost_groups and not tree.lost:\n",
          "    if scanned and not tree.lost:\n"),),
        (GAPS,),
    ),
    Mutant(
        "an older inline payload goes over a newer direct block", "9 steps 6 and 9", VOLUME,
        (("            for block in blocks:\n                self.inline.pop(block, None)\n",
          "            pass\n"),),
        (GAPS,),
    ),
    Mutant(
        "an older inline payload goes over a newer group", "9 steps 6 and 9", VOLUME,
        (("            self._forget_inline(group * self.geometry.group_blocks,"
          " self.geometry.group_blocks)\n        self._set", "        self._set"),),
        (CUTS,),
    ),
    Mutant(
        "an inline payload goes over a later hole", "9 steps 6 and 9", VOLUME,
        (
            ("            self.space.note_holes(group, index, part)\n"
             "        self._forget_inline(first, count)\n",
             "            self.space.note_holes(group, index, part)\n"),
            ("        self.space.note_given_up(slot)\n"
             "        self._forget_inline(group * self.geometry.group_blocks,"
             " self.geometry.group_blocks)\n",
             "        self.space.note_given_up(slot)\n"),
        ),
        (GAPS,),
    ),
    Mutant(
        "an inline payload goes over a hole of its own record", "9 steps 6 and 9", RECOVERY,
        (("        _forget_holes(volume, item)\n", ""),),
        (GAPS, GOLDEN, CUTS),
    ),
    Mutant(
        "holes of a record come before its entries", "7, body order", VOLUME,
        (
            ("        for first, count in record.holes:\n"
             "            self._make_holes(first, count)\n\n", "\n"),
            ("        for group, slot in record.allocs:\n",
             "        for first, count in record.holes:\n"
             "            self._make_holes(first, count)\n"
             "        for group, slot in record.allocs:\n"),
        ),
        (GAPS, GOLDEN),
    ),
    Mutant(
        "a record begins in the last page of the one before", "7", SCAN,
        (("        page = record.page + record.page_count\n",
          "        page = record.page + max(1, record.page_count - 1)\n"),),
        (JOURNAL,),
    ),
    Mutant(
        "a group of which a part becomes a hole loses its slot", "7", VOLUME,
        (("            if part == self.geometry.group_blocks:\n                self._give_up",
          "            if part:\n                self._give_up"),),
        (GAPS, CUTS),
    ),
    Mutant(
        "a shrink leaves what is beyond it", "7", VOLUME,
        (("            self._make_holes(first, self.geometry.size_max // BLOCK_SIZE - first)\n",
          ""),),
        (CUTS,),
    ),
    Mutant(
        "the end of a shrunk block is not zeroed", "2; 7", IMAGE_FILE,
        (("            yield from self._zero_steps(size, stop)\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "an ALLOC may meet a live group", "7", VOLUME,
        (("            if self.tree.slot_of(group) != NO_SLOT:\n                raise",
          "            if False:\n                raise"),),
        (GAPS,),
    ),
    Mutant(
        "slots that a record's ALLOC names are free in recovery", "8.3, busy", VOLUME,
        (("            self.allocator.occupy(slot)\n            self.tree.put_group(group, slot,",
          "            self.tree.put_group(group, slot,"),),
        (CUTS,),
    ),
    Mutant(
        "slots that a record's GROUP names are free in recovery", "8.3, busy", VOLUME,
        (("            self.allocator.occupy(slot)\n            if leaves is None:",
          "            if leaves is None:"),),
        (CUTS,),
    ),
    Mutant(
        "slots of the tree are free in recovery", "8.3, busy", RECOVERY,
        (("    _occupy_slots(volume)\n    volume.", "    volume."),),
        (GOLDEN, IMAGE),
    ),
    Mutant(
        "the root after replay is not compared", "9 step 7", RECOVERY,
        (("        if expected is not None and not same_mac(",
          "        if False and not same_mac("),),
        (GAPS,),
    ),
    Mutant(
        "recovery writes before the witness has seen it", "9 step 8; freshness", RECOVERY,
        (("    if witness is not None:\n",
          "    if scanned and not read_only:\n        _finish_recovery(volume, journal)\n"
          "    if witness is not None:\n"),),
        (GAPS,),
    ),
    Mutant(
        "recovery writes though it is to read only", "9", RECOVERY,
        (("    if not read_only:\n        if table", "    if True:\n        if table"),),
        (GOLDEN,),
    ),
    Mutant(
        "a slot past the end of the file in a record is damage", "9 step 8", VOLUME,
        (("        for group, slot, mac in record.groups:\n",
          "        count = self.geometry.slot_count_of(self.storage.size())\n"
          "        if leaves is None and any(g[1] >= count for g in"
          " (*record.groups, *record.allocs)):\n"
          "            raise IntegrityError(self.path, 'is cut off')\n"
          "        for group, slot, mac in record.groups:\n"),),
        (GAPS,),
    ),
    Mutant(
        "recovery does not make the file longer", "9 step 8", RECOVERY,
        (("    plan: WritePlan = volume.length_plan()\n", "    plan: WritePlan = []\n"),),
        (GAPS,),
    ),
    Mutant(
        "recovery writes home before it syncs", "9 step 8", RECOVERY,
        (("    plan.append((Step.SYNC,))\n    for block, offset in", "    for block, offset in"),),
        (CUTS, KILLS),
    ),
    Mutant(
        "recovery does not write inline blocks home", "9 step 9", RECOVERY,
        (("        plan.append((Step.WRITE, home, [payload]))\n", ""),),
        (CUTS,),
    ),
    Mutant(
        "recovery ends without a checkpoint", "9 step 10", RECOVERY,
        (("    run(volume.checkpoint_steps(new_epoch=True))\n", ""),),
        (GAPS, CUTS, KILLS),
    ),
    Mutant(
        "recovery keeps the epoch", "3.2; 9 step 10", RECOVERY,
        (("    run(volume.checkpoint_steps(new_epoch=True))\n",
          "    run(volume.checkpoint_steps(new_epoch=False))\n"),),
        (GAPS, CUTS, KILLS),
    ),
)  # fmt: skip

STRUCTURES = (
    Mutant(
        "a row's salt is not fresh", "3.2", CIPHER_FILE,
        (("row = EpochRow(epoch, key_generation, random(32))",
          "row = EpochRow(epoch, key_generation, bytes(32))"),),
        (CIPHER,),
    ),
    Mutant(
        "an epoch's number is used again", "4.2", CIPHER_FILE,
        (("epoch = self.rows[-1].epoch + 1 if self.rows else 1", "epoch = 1"),),
        (CIPHER,),
    ),
    Mutant(
        "an epoch never ends", "3.2", CIPHER_FILE,
        (("return self._epoch == 0 or self._counter >= EPOCH_BLOCKS_MAX",
          "return self._epoch == 0"),),
        (CIPHER,),
    ),
    Mutant(
        "a forked process seals", "3.2", CIPHER_FILE,
        (("        if os.getpid() != self._pid:\n", "        if False:\n"),),
        (CIPHER,),
    ),
    Mutant(
        "rows that entries name are dropped", "4.2", CIPHER_FILE,
        (("            if row.epoch in in_use or i == len(self.rows) - 1\n",
          "            if i == len(self.rows) - 1\n"),),
        (CIPHER,),
    ),
    Mutant(
        "rows that a damaged leaf page may name are dropped", "4.2", VOLUME,
        (("                return  # what the damaged",
          "                continue  # what the damaged"),),
        (GAPS,),
    ),
    Mutant(
        "a block opens elsewhere", "3.3", CIPHER_FILE,
        (
            ("from sealfs.image import _blockseal as runs",
             "from sealfs.image import blockseal as runs\n"
             "    runs._INDEX = type('', (), {'pack': staticmethod(lambda block: bytes(8))})"),
            ("self._prefix + _INDEX.pack(block))", "self._prefix + _INDEX.pack(0))"),
        ),
        (CIPHER,),
    ),
    Mutant(
        "places are in the MAC of a node page", "6.2", TREE_FILE,
        (("return bytes(self.macs) + self.slots.tobytes() if self.level == 1 else"
          " bytes(self.macs)",
          "return bytes(self.macs) + self.slots.tobytes() + bytes(self.places)"
          " if self.level == 1 else bytes(self.macs)"),),
        (TREE,),
    ),
    Mutant(
        "slots of groups are not in the MAC of a node page", "6.2", TREE_FILE,
        (("return bytes(self.macs) + self.slots.tobytes() if self.level == 1 else"
          " bytes(self.macs)", "return bytes(self.macs)"),),
        (TREE,),
    ),
    Mutant(
        "the root does not know the size", "6.3", CIPHER_FILE,
        (("self._mac(MAGICS[\"root\"], 0, size, top)", "self._mac(MAGICS[\"root\"], 0, 0, top)"),),
        (CIPHER,),
    ),
    Mutant(
        "the identity is not verified", "5", RECOVERY,
        (("        if same_mac(mac_of(key, identity_header(content) + content), mac):\n",
          "        if key:\n"),),
        (GAPS,),
    ),
    Mutant(
        "a damaged leaf page cannot be healed", "one bad page", IMAGE_FILE,
        (("            if part < self._geometry.group_blocks\n            and self._tree.slot_of",
          "            if self._tree.slot_of"),),
        (GAPS,),
    ),
)  # fmt: skip

REKEYS = (
    Mutant(
        "the next key is used while one identity alone has it", "11.1", IMAGE_FILE,
        (("            yield from self.rewrite_identity_steps(self.identity)\n"
          "            yield from self._guarded(self._sweep.switch_steps())\n",
          "            yield from self._guarded(self._sweep.switch_steps())\n"),),
        (REKEY,),
    ),
    Mutant(
        "one superblock alone says that a rekey is under way", "11.1", SWEEP,
        (("in the other superblock.\n        yield from volume.checkpoint_steps()\n",
          "in the other superblock.\n"),),
        (REKEY,),
    ),
    Mutant(
        "one superblock alone says that all is under the new key", "11.1", IMAGE_FILE,
        (("that is about to go.\n        yield from self._guarded(volume.checkpoint_steps())\n",
          "that is about to go.\n"),),
        (REKEY,),
    ),
    Mutant(
        "the old key goes before the superblock says that nothing needs it", "11.1", IMAGE_FILE,
        (("            yield from self._guarded(volume.checkpoint_steps(phase=RekeyPhase.SWEPT))\n",
          "            yield from self.rewrite_identity_steps(replace(\n"
          "                self.identity, key_generation=volume.superblock.key_generation,\n"
          "                wrapped_keys=self.identity.wrapped_keys[-1:]))\n"
          "            yield from "
          "self._guarded(volume.checkpoint_steps(phase=RekeyPhase.SWEPT))\n"),),
        (REKEY_CRASH,),
    ),
    Mutant(
        "the old wrapped key stays in the identity", "11.1", IMAGE_FILE,
        (("for each in self.identity.wrapped_keys if each[0] == generation)",
          "for each in self.identity.wrapped_keys)"),),
        (REKEY,),
    ),
    Mutant(
        "an identity is rewritten by what the page cache shows", "5; 9", IDENTITY_FILE,
        (("    return storage.read_direct(offset, geometry.identity_pages * BLOCK_SIZE)\n",
          "    return storage.read(offset, geometry.identity_pages * BLOCK_SIZE)\n"),),
        (REKEY_CRASH,), is_quick=False,
    ),
    Mutant(
        "records go on under the old key", "11.2", VOLUME,
        (("        self.superblock, self._live_raw, self._keys = superblock, raw, keys\n",
          "        self.superblock, self._live_raw = superblock, raw\n"),),
        (REKEY,),
    ),
    Mutant(
        "the tree goes on under the old key", "11.2", VOLUME,
        (("            self._macs.begin(keys.tree)\n", "            pass\n"),),
        (REKEY,),
    ),
    Mutant(
        "pages under the old key are not accepted", "11.2", CIPHER_FILE,
        (("        self.accepted = (self, TreeMacs(self._key, self._uuid))\n"
          "        self._key = key\n", "        self._key = key\n"),),
        (REKEY,),
    ),
    Mutant(
        "a reader accepts no page under the old key", "11.2", RECOVERY,
        (("    macs = TreeMacs(keys.tree, superblock.uuid, old_key)\n",
          "    macs = TreeMacs(keys.tree, superblock.uuid)\n"),),
        (REKEY,),
    ),
    Mutant(
        "a damaged page under the old key is not rebuilt", "6.4; 11.2", REBUILD_FILE,
        (("            return [macs.leaf(index, page) for macs in self._macs.accepted]\n",
          "            return [self._macs.leaf(index, page)]\n"),),
        (REKEY,),
    ),
    Mutant(
        "an identity of before the rekey is accepted", "11.3", RECOVERY,
        (("        if identity.key_generation not in allowed or identity.uuid",
          "        if not allowed or identity.uuid"),
         ("    }.get(rekey.phase, {own}) & cipher.generations\n",
          "    }.get(rekey.phase, {own})\n")),
        (REKEY,),
    ),
    Mutant(
        "rows of any key generation are accepted", "4.2", RECOVERY,
        (("        if row.key_generation not in allowed:\n",
          "        if row.key_generation > 255:\n"),),
        (REKEY,),
    ),
    Mutant(
        "the cursor goes on before the blocks are sealed", "11.4", SWEEP,
        (("        size = yield from self._do_steps(look)\n        # Only now",
          "        volume.cursor = look.next_group\n"
          "        size = yield from self._do_steps(look)\n        # Only now"),),
        (REKEY_CRASH,), is_quick=False,
    ),
    Mutant(
        "nobody looks once more before the old key goes", "11.4", SWEEP,
        (("        if left is not None:\n", "        if left is not None and left < 0:\n"),),
        (REKEY,),
    ),
    Mutant(
        "records come between a new MAC and its superblock", "11.4", SWEEP,
        (("            self._tree.change_leaf(group)\n"
          "        yield from self._volume.checkpoint_steps()\n",
          "            self._tree.change_leaf(group)\n"
          "        self._tree.refresh(self._volume.size)\n"
          "        if False:\n            yield lambda: None\n"),),
        (REKEY,),
    ),
    Mutant(
        "a block that is sealed again replaces a newer write", "11.4", "image/cache.py",
        (("        self.committing = dict(zip(blocks, frames, strict=True))\n",
          "        self.committing = dict(zip(blocks, frames, strict=True))\n"
          "        for block in blocks:\n            self.dirty.pop(block, None)\n"),),
        (REKEY,),
    ),
    Mutant(
        "damage does not keep the old key", "11.4", SWEEP,
        (("        damaged = [*self.findings, *lost_findings(self._volume)]\n",
          "        damaged = lost_findings(self._volume)\n"),
         ("            if not self._tree.is_under_new_key(group, page) or self._members(page):\n",
          "            if not self._tree.is_under_new_key(group, page):\n")),
        (REKEY,),
    ),
    Mutant(
        "the old image key stays in memory", "11.1", VOLUME,
        (("        self.cipher.forget_generation(old, self.table.rows)\n", ""),),
        (REKEY,),
    ),
    Mutant(
        "a row that was drawn behind the walk is dropped", "11.6", SWEEP,
        (("for row in self._volume.table.rows if row.epoch < self._newest_epoch]",
          "for row in self._volume.table.rows[:-1]]"),),
        (REKEY,),
    ),
    Mutant(
        "rows of damaged blocks are dropped", "11.6", SWEEP,
        (("            if not self.findings:\n                yield from",
          "            if True:\n                yield from"),),
        (REKEY,),
    ),
    Mutant(
        "writes leave no row for a sweep", "4.2", IMAGE_FILE,
        (("ROWS_KEPT = ROWS_FOR_RECOVERY + 2\n", "ROWS_KEPT = ROWS_FOR_RECOVERY\n"),),
        (REKEY,),
    ),
)  # fmt: skip

LEDGERS = (
    Mutant(
        "the counter goes before the ledger", "ledger, counter rule", LEDGER_FILE,
        (("                self._rewrite(found, mac_key, held)\n"
          "                # Crash here: the file is one ahead, which the next `begin` takes up.\n"
          "                self._counter.increment(held)\n",
          "                self._counter.increment(held)\n"
          "                self._rewrite(found, mac_key, held)\n"),),
        (LEDGER,), is_quick=False,
    ),
    Mutant(
        "one value is burned in place of two", "ledger, counter rule", LEDGER_FILE,
        (("BURNED: Final = 2", "BURNED: Final = 1"),),
        (LEDGER,), is_quick=False,
    ),
    Mutant(
        "a ledger behind the counter is taken", "ledger, counter rule", LEDGER_FILE,
        (("        if found.value < value:\n            raise", "        if found.value < value:\n"
          "            return False\n            raise"),),
        (LEDGER,), is_quick=False,
    ),
    Mutant(
        "a note turns an image back", "ledger, never behind", LEDGER_FILE,
        (("is None or old.sequence < progress.sequence", "is None or old != progress"),),
        (LEDGER,), is_quick=False,
    ),
    Mutant(
        "rows are not chained", "ledger, rows", LEDGER_FILE,
        (
            ("not _is_mac(mac_key, chain + body, mac):", "not _is_mac(mac_key, body, mac):"),
            ("return body + _mac(mac_key, self.chain + body)",
             "return body + _mac(mac_key, body)"),
        ),
        (GAPS,),
    ),
    Mutant(
        "a ledger that is gone is an empty one", "ledger", LEDGER_FILE,
        (("        if raw is None:\n            raise",
          "        if raw is None:\n            return LedgerFile(self._host_id, 0, {}, 0, b\"\")\n"
          "            raise"),),
        (LEDGER,), is_quick=False,
    ),
    Mutant(
        "another host's ledger is taken", "ledger", LEDGER_FILE,
        (("        if found.host_id != self._host_id:\n", "        if False:\n"),),
        (LEDGER,), is_quick=False,
    ),
)  # fmt: skip

REWRITE = (
    Mutant(
        "a rewrite begins with the only good identity", "5", IDENTITY_FILE,
        (("order = sorted((0, 1), key=lambda index: copies[index] == newest)", "order = [0, 1]"),),
        (IDENTITY,),
    ),
    Mutant(
        "a rewritten identity is not made durable", "5", IDENTITY_FILE,
        (("(Step.DURABLE, geometry", "(Step.WRITE, geometry"),), (IDENTITY,),
    ),
    Mutant(
        "a rewrite keeps the generation", "5", IDENTITY_FILE,
        (("generation=newest.generation + 1)", "generation=newest.generation)"),), (IDENTITY,),
    ),
    Mutant(
        "a forged identity is continued", "5", IDENTITY_FILE,
        (("return identity if same_mac(mac, expected) else None", "return identity"),),
        (IDENTITY,),
    ),
    Mutant(
        "a failed rewrite does not poison the image", "5; 8.2", IMAGE_FILE,
        (("yield from self._guarded(write_steps())", "yield from write_steps()"),), (IDENTITY,),
    ),
)  # fmt: skip

NET_CIPHER, NET_WINDOW, NET_NOISE = "net/cipher.py", "net/window.py", "net/noise.py"
NET_ASSOCIATION, NET_ATTACHMENT = "net/association.py", "net/attachment.py"
NET_HANDSHAKE, NET_OUTBOX = "net/handshake.py", "net/outbox.py"
FRAMES, PARTS = "tests/test_net_frames.py", "tests/test_net_parts.py"
NOISE, KEY_AGREEMENT = "tests/test_net_noise.py", "tests/test_net_association.py"
MIDDLE = "tests/test_net_attachment.py"

NETS = (
    Mutant(
        "a packet number is used again when sealing fails", "802.1AE 10.5.2", NET_CIPHER,
        (
            ("        self.next_number = number + 1\n", ""),
            ("        return size + _AROUND\n",
             "        self.next_number = number + 1\n        return size + _AROUND\n"),
        ),
        (FRAMES,),
    ),
    Mutant(
        "a forked process sends", "net/cipher.py", NET_CIPHER,
        (("    for key in list(_sending):\n        key.wipe()\n", "    return\n"),),
        (FRAMES,),
    ),
    Mutant(
        "the security tag is not authenticated", "802.1AE 10.5.3", NET_CIPHER,
        (("plain, out[at:data], out[data", "plain, out[at : at + 12], out[data"),),
        (FRAMES,),
    ),
    Mutant(
        "a forged frame moves the window", "RFC 6479", NET_CIPHER,
        (
            ("        window.mark(number)\n        return size\n", "        return size\n"),
            ("        data = at + HEADER_SIZE\n        try:\n",
             "        window.mark(number)\n        data = at + HEADER_SIZE\n        try:\n"),
        ),
        (FRAMES,),
    ),
    Mutant(
        "a repeated frame is delivered again", "RFC 6479", NET_CIPHER,
        (("            if refusal is not None:\n                return refusal\n", ""),),
        (FRAMES, MIDDLE),
    ),
    Mutant(
        "the window's ring is not cleared", "RFC 6479", NET_WINDOW,
        (("                    words[word & 63] = 0\n", "                    pass\n"),),
        (FRAMES,),
    ),
    Mutant(
        "the window is one too wide", "RFC 6479", NET_WINDOW,
        (("number - WINDOW + 1", "number - WINDOW"),), (FRAMES,),
    ),
    Mutant(
        "packet numbers end at 32 bits", "802.1AE 10.6.2", NET_WINDOW,
        (("            number += 1 << 32\n", "            pass\n"),), (FRAMES, KEY_AGREEMENT),
    ),
    Mutant(
        "the pre-shared key is not hashed", "Noise 9.2", NET_NOISE,
        (("        self.mix_hash(temporary)\n", ""),), (NOISE,),
    ),
    Mutant(
        "a public key of low order is taken", "RFC 7748 6.1", NET_NOISE,
        (("low order: the shared secret would be zero (RFC 7748 6.1)\n"
          "        raise NotAuthentic from None\n",
          "low order: the shared secret would be zero (RFC 7748 6.1)\n"
          "        return bytes(32)\n"),),
        (NOISE,),
    ),
    Mutant(
        "a wrong answer spoils the offer", "Noise 5.3", NET_NOISE,
        (("        symmetric = self._symmetric.copy()\n        public = message[:KEY_SIZE]\n"
          "        symmetric.mix_public(public)\n        symmetric.mix_key",
          "        symmetric = self._symmetric\n        public = message[:KEY_SIZE]\n"
          "        symmetric.mix_public(public)\n        symmetric.mix_key"),),
        (NOISE,),
    ),
    Mutant(
        "who has not the network key costs a handshake", "net/handshake.py", NET_HANDSHAKE,
        (("    if not hmac.compare_digest(secrets.mac(message), mac):\n", "    if False:\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "words are sealed under the keys for frames", "net/association.py", NET_ASSOCIATION,
        (("sender(WORD_INFO), receiver(WORD_INFO),",
          "sender(ASSOCIATION_INFO), receiver(ASSOCIATION_INFO),"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "the answering end uses keys that nobody confirmed", "net/association.py", NET_ASSOCIATION,
        (("        self.counts.answered += 1\n",
          "        self.counts.answered += 1\n        self.opened(self._pending, now)\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "a repeated first message is answered", "net/association.py", NET_ASSOCIATION,
        (("        if self._table.is_repeated(first.ephemeral):\n", "        if False:\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "first messages are not limited", "net/association.py", NET_ASSOCIATION,
        (("        if now < self._answer_at:\n", "        if False:\n"),), (KEY_AGREEMENT,),
    ),
    Mutant(
        "two ends that begin at once both insist", "net/association.py", NET_ASSOCIATION,
        (("        if is_under_way and self._sci < first.sci:\n", "        if is_under_way:\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "the old key opens for ever", "net/association.py", NET_ASSOCIATION,
        (("        if self._previous is not None and now >= self._previous_until:\n",
          "        if self._previous is None:\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "keys are not replaced", "net/association.py", NET_ASSOCIATION,
        (("            age >= timing.rekey_age + (0 if", "            age >= 1e9 + (0 if"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "keys are kept for ever where no others can be had", "net/association.py", NET_ASSOCIATION,
        (("        if self.current is not None and now - self.current.made_at >= age_max:\n",
          "        if self.current is not None and age_max < 0:\n"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "an association number in use is given again", "net/association.py", NET_ASSOCIATION,
        (("in (in_use | own | late, in_use | own, own):", "in (set[int](),):"),),
        (KEY_AGREEMENT,),
    ),
    Mutant(
        "a peer takes the number of another with its SCI", "net/association.py", NET_ASSOCIATION,
        (("        own = others | (", "        own = ("),), (KEY_AGREEMENT,),
    ),
    Mutant(
        "a plain frame is delivered", "README, links", NET_ATTACHMENT,
        (("            drops[Drop.PLAIN] += 1\n            return\n",
          "            self.port.write((memoryview(frame),))\n            return\n"),),
        (MIDDLE,),
    ),
    Mutant(
        "a VM that is no longer allowed goes on", "README, links", NET_ATTACHMENT,
        (("                await self._obey()\n"
          "                nursery.cancel_scope.cancel()\n",
          "                await self._obey()\n"),),
        (MIDDLE,),
    ),
    Mutant(
        "what nobody could ask about is sealed all the same", "README, links", NET_ATTACHMENT,
        (("                if self._is_suspended:\n"
          "                    drops[Drop.NOT_ALLOWED] += 1\n                    continue\n", ""),),
        (MIDDLE,),
    ),
    Mutant(
        "every frame goes to every peer", "README, links", NET_ATTACHMENT,
        (("return self._all if found is None else (found,)", "return self._all"),), (MIDDLE,),
    ),
    Mutant(
        "more segments at once than the kernel takes", "linux/udp.h", NET_OUTBOX,
        ((" and self._count < SEGMENT_COUNT_MAX", ""),), (PARTS,),
    ),
)  # fmt: skip

QUICK_C, DEVICE_C = "image/_blockread.c", "mount/_device.c"
TAKER_C, STATE_H = "image/_blocktake.c", "image/_state.h"
BATCH_C, SEAL_C = "image/_blockbatch.c", "image/_blockseal.c"
DEVICE_FILE, LANE_FILE = "mount/device.py", "mount/lane.py"
QUICK, DEVICE, TAKER = "tests/test_quick.py", "tests/test_device.py", "tests/test_taker.py"
BLOCKBATCH, BLOCKSEAL = "tests/test_blockbatch.py", "tests/test_blockseal.py"
LONG_READS, LANE = "tests/test_long_reads.py", "tests/test_lane.py"
_ANSWERS, _WAITS, _SHARES = "Quick.answer", "Device.next", "lane.py, long reads"

BATCHES = (
    Mutant(
        "an entry that is there passes for a hole", "8.1", BATCH_C,
        (("leaf[index * ENTRY_SIZE + FLAGS_AT] != 0", "leaf[index * ENTRY_SIZE + FLAGS_AT] > 1"),),
        (BLOCKBATCH,),
    ),
    Mutant(
        "entries go to the leaf page of the group before", "7, applied", BATCH_C,
        (("                goto end;\n            last = group;\n        }\n        to[i]",
          "                goto end;\n        }\n        last = group;\n        to[i]"),
         ("        if (i == 0 || group != last) {\n"
          "            leaf = leaf_of(leaves, group, &number);\n            if (leaf == NULL && ",
          "        if (i == 0 || group > last + 1) {\n"
          "            leaf = leaf_of(leaves, group, &number);\n"
          "            if (leaf == NULL && "),),
        (BLOCKBATCH,),
    ),
    Mutant(
        "entries are set before it is known that all can be", "_blockbatch.set_entries", BATCH_C,
        (("        to[i] = leaf + index * ENTRY_SIZE;\n",
          "        to[i] = leaf + index * ENTRY_SIZE;\n"
          "        memcpy(to[i], (char *)entries.buf + i * ENTRY_SIZE, ENTRY_SIZE);\n"),),
        (BLOCKBATCH,),
    ),
    Mutant(
        "a block goes home to the group before", "8.2 step 5", BATCH_C,
        (("PyLong_AsUnsignedLongLong(PySequence_Fast_GET_ITEM(starts, part++));",
          "PyLong_AsUnsignedLongLong("
          "PySequence_Fast_GET_ITEM(starts, part ? part - 1 : 0)), part++;"),),
        (BLOCKBATCH,),
    ),
    Mutant(
        "the MAC of a leaf page does not know the group", "6.1", SEAL_C,
        (("        put_le(head + prefix.len, index_of[i], 8);\n",
          "        put_le(head + prefix.len, index_of[0], 8);\n"),),
        (BLOCKSEAL,),
    ),
    Mutant(
        "the MAC of a leaf page is one of those before, too", "6.1", SEAL_C,
        (("    return EVP_MAC_init(ctx, NULL, 0, NULL) == 1 && EVP_MAC_update(ctx, head",
          "    return EVP_MAC_update(ctx, head"),),
        (BLOCKSEAL,),
    ),
    Mutant(
        "a group without a slot is taken for a usual one", "7, ALLOC", COMMITTER,
        (("len(flags) if unknown < 0 else unknown", "len(flags)"),), (IMAGE, CUTS),
    ),
    Mutant(
        "a leaf page gets the MAC of another", "6.1", TREE_FILE,
        (("        groups = list(self._stale_leaves)\n",
          "        groups = list(self._stale_leaves)[::-1]\n"),
         ("        for at, group in enumerate(groups):\n",
          "        for at, group in enumerate(self._stale_leaves):\n"),),
        (TREE,),
    ),
)  # fmt: skip

READS = (
    Mutant(
        "a dirty block is sent as it was", _ANSWERS, QUICK_C,
        (("    int newer = has_any_of(self->cache, name_dirty, first, count);\n",
          "    int newer = 0;\n"),),
        (QUICK,),
    ),
    Mutant(
        "a block under commit is sent as it was", _ANSWERS, QUICK_C,
        (("        newer = has_any_of(self->cache, name_committing, first, count);\n",
          "        newer = 0;\n"),),
        (QUICK,),
    ),
    Mutant(
        "only the first block of a run is looked for among newer ones", _ANSWERS, QUICK_C,
        (("i < count && !found; i++)", "i < 1 && !found; i++)"),), (QUICK,),
    ),
    Mutant(
        "what is in the journal only is read at home", _ANSWERS, QUICK_C,
        (("    int is_away = PyObject_IsTrue(away);", "    int is_away = 0;"),), (QUICK,),
    ),
    Mutant(
        "a block beyond the end is sent", _ANSWERS, QUICK_C,
        (("    if (offset > disk_size || size > disk_size - offset)\n",
          "    if (offset > disk_size)\n"),),
        (QUICK,),
    ),
    Mutant(
        "one block more than an answer has room for", _ANSWERS, QUICK_C,
        (("size > BLOCKS_MAX * BLOCK_SIZE || (", "size > (BLOCKS_MAX + 1) * BLOCK_SIZE || ("),),
        (QUICK,),
    ),
    Mutant(
        "an offset within a block is that of the block", _ANSWERS, QUICK_C,
        (("|| (offset | size) % BLOCK_SIZE)", "|| size % BLOCK_SIZE)"),), (QUICK,),
    ),
    Mutant(
        "a run may cross groups", _ANSWERS, QUICK_C,
        (("    if (index + count > self->group_blocks)\n        return 0;\n", ""),), (QUICK,),
    ),
    Mutant(
        "images share clean blocks", _ANSWERS, QUICK_C,
        (("PyObject *key = PyLong_FromUnsignedLongLong(self->base + block)",
          "PyObject *key = PyLong_FromUnsignedLongLong(block)"),),
        (QUICK,),
    ),
    Mutant(
        "a clean block that is sent stays the next to go", _ANSWERS, QUICK_C,
        (("    moved = PyObject_CallMethodOneArg(self->clean, name_move_to_end, key);\n",
          "    moved = Py_NewRef(Py_None);\n"),),
        (QUICK,),
    ),
    Mutant(
        "hits are not counted", _ANSWERS, QUICK_C,
        (("    one = PyLong_FromLong(1);\n", "    one = PyLong_FromLong(0);\n"),), (QUICK,),
    ),
    Mutant(
        "every block that is met is kept", _ANSWERS, QUICK_C,
        (("++self->met % self->keep_every)", "++self->met == 0)"),), (QUICK,),
    ),
    Mutant(
        "a group without a slot is read", _ANSWERS, STATE_H,
        (("    if (i >= (size_t)present.len || !((unsigned char *)present.buf)[i]) {\n",
          "    if (i >= (size_t)present.len) {\n"),),
        (QUICK, TAKER),
    ),
    Mutant(
        "what does not authenticate is sent", "3.3", QUICK_C,
        (("            return NOT_AUTHENTIC;\n        }\n", "        }\n"),), (QUICK,),
    ),
    Mutant(
        "what does not authenticate stays in memory", "3.3", QUICK_C,
        (("            OPENSSL_cleanse(plain, size);", "           "),),
        (QUICK,),
    ),
    Mutant(
        "a block is opened wherever it lies", "3.3", QUICK_C,
        (("* ENTRY_SIZE, block + (uint64_t)i,\n", "* ENTRY_SIZE, block,\n"),),
        (QUICK,),
    ),
    Mutant(
        "keys are not let go of", _ANSWERS, QUICK_C,
        (("    forget_keys((Opener *)object);\n", ""),), (QUICK,),
    ),
    Mutant(
        "a request of another length is answered", _WAITS, DEVICE_C,
        (("asked.length != count || asked.offset", "asked.offset"),), (DEVICE,),
    ),
    Mutant(
        "every request is a read", _WAITS, DEVICE_C,
        (("    if (opcode == OPCODE_READ && answer(", "    if (!is_write && answer("),), (DEVICE,),
    ),
    Mutant(
        "an offset that cannot be is answered", _WAITS, DEVICE_C,
        (("asked.length != count || asked.offset > INT64_MAX)", "asked.length != count)"),),
        (DEVICE,),
    ),
    Mutant(
        "whatever is said is an answer", _WAITS, DEVICE_C,
        (("found == Py_True", "found != NULL && found != Py_False"),), (DEVICE,),
    ),
    Mutant(
        "what was raised is left for who comes next", _WAITS, DEVICE_C,
        (("        Py_XDECREF(words[i]);\n    PyErr_Clear();\n",
          "        Py_XDECREF(words[i]);\n"),),
        (DEVICE,),
    ),
    Mutant(
        "the answer's length leaves its header out", _WAITS, DEVICE_C,
        (("(uint32_t)sizeof(header) + asked.size", "asked.size"),), (DEVICE,),
    ),
    Mutant(
        "answers wait for the next request", _WAITS, DEVICE_C,
        (("            if (flush(self) < 0)\n                return NULL;\n            if (nano",
          "            if (nano"),),
        (DEVICE,),
    ),
    Mutant(
        "a guest that waits for each answer waits for the next request", _WAITS, DEVICE_C,
        (("        if (is_lone && flush(self) < 0)\n            return NULL;\n", ""),), (DEVICE,),
    ),
    Mutant(
        "others never run while reads come", _WAITS, DEVICE_C,
        (("        if (++answered >= ANSWERED_MAX)\n", "        if (++answered == 0)\n"),),
        (DEVICE,),
    ),
    Mutant(
        "others are not looked at", _WAITS, DEVICE_C,
        (("if (poll(self->others, self->other_count, 0) > 0)", "if (0)"),),
        (DEVICE,),
    ),
    Mutant(
        "runs are not counted", _WAITS, DEVICE_C,
        (("            self->runs += self->in_a_row > 0;\n", ""),), (DEVICE,),
    ),
    Mutant(
        "the twin keeps answers back for the next request", _WAITS, DEVICE_FILE,
        (("if failed := self._outbox.flush():", "if failed := list[int]():"),), (DEVICE,),
    ),
    Mutant(
        "the twin tells nobody of answers that were not taken", _WAITS, DEVICE_FILE,
        (("                self._not_taken(failed)\n", "                pass\n"),), (DEVICE,),
    ),
    Mutant(
        "the twin counts a run for each time there is none", _WAITS, DEVICE_FILE,
        (("            self._in_a_row = 0\n            if", "            if"),), (DEVICE,),
    ),
    Mutant(
        "the twin minds the others before the device", _WAITS, DEVICE_FILE,
        (("                if any(found == self._fd for found, _ in ready):\n"
          "                    count = self._read()\n"
          "                elif ready:\n                    return OTHERS\n",
          "                if ready:\n                    return OTHERS\n"),),
        (DEVICE,),
    ),
    Mutant(
        "a long read of what is newer in the cache comes from the disk", "reader.py", READER,
        (("        if self._cache.has_newer(first, count):\n            return None\n", ""),),
        (LONG_READS,),
    ),
    Mutant(
        "a long read leaves in holes what was read before", "reader.py", READER,
        (("            if present < count:\n                view[:] = bytes(len(view))\n", ""),),
        (LONG_READS,),
    ),
    Mutant(
        "a long read counts holes as blocks", "reader.py", READER,
        (("                present += entries[28::ENTRY_SIZE].count(1)\n",
          "                present += len(entries) // ENTRY_SIZE\n"),),
        (LONG_READS,),
    ),
    Mutant(
        "a long read that may not wait waits", "reader.py", READER,
        (("read = self._read_whole if may_wait else self._storage.read_nowait",
          "read = self._read_whole"),),
        (LONG_READS,),
    ),
    Mutant(
        "a long read goes beyond the end", "image.py", IMAGE_FILE,
        (("        if offset + size > self.size:\n            return None\n", ""),),
        (LONG_READS,),
    ),
    Mutant(
        "what a worker fails at is not answered", _SHARES, LANE_FILE,
        (("            self._token.run_sync_soon(self._read_anew, unique, disk, offset, size)\n",
          "            self._is_shared = False\n"),),
        (LANE,),
    ),
    Mutant(
        "what a worker fails at is answered twice", _SHARES, LANE_FILE,
        (("            fetch(self._there[:size], True)\n        except Exception:\n",
          "            fetch(self._there[:size], True)\n        except Exception:\n"
          "            self._answer(unique, self._there[:size])\n"),),
        (LANE,),
    ),
    Mutant(
        "after one that failed no worker shares any more", _SHARES, LANE_FILE,
        (("        self._is_shared = False\n        self._start(", "        self._start("),),
        (LANE,), is_quick=False,
    ),
    Mutant(
        "the lane and the worker read into one buffer", _SHARES, LANE_FILE,
        (("            fetch(self._there[:size], True)\n",
          "            self._there = self._here\n            fetch(self._there[:size], True)\n"),),
        (LANE,),
    ),
    Mutant(
        "two workers read into one buffer", _SHARES, LANE_FILE,
        (("if not self._is_lone and not self._is_shared:", "if not self._is_lone:"),), (LANE,),
    ),
    Mutant(
        "a guest that waits for each answer waits for a worker", _SHARES, LANE_FILE,
        (("if not self._is_lone and not self._is_shared:", "if not self._is_shared:"),), (LANE,),
    ),
    Mutant(
        "what the lane would have to wait for is answered", _SHARES, LANE_FILE,
        (("            if not fetch(self._here[:size], False):\n                return False\n",
          "            fetch(self._here[:size], False)\n"),),
        (LANE,),
    ),
    Mutant(
        "images are closed while a worker reads", _SHARES, LANE_FILE,
        (("while self._fetcher.count or self._is_shared:", "while self._fetcher.count:"),), (LANE,),
    ),
    Mutant(
        "it spins beside workers", "lane.py", LANE_FILE,
        (("if self._due or self._disks.workers.busy_count or now >", "if self._due or now >"),),
        (LANE,),
    ),
    Mutant(
        "it spins for an idle guest", "lane.py", LANE_FILE,
        (("busy_count or now > self._idle_from_ns:", "busy_count:"),), (LANE,),
    ),
)  # fmt: skip

CACHE_FILE, DISK_FILE = "image/cache.py", "mount/disk.py"
CACHE = "tests/test_cache.py"
_ACCEPTS, _RECEIVES = "Taker.take", "Device.next, writes"

WRITES = (
    Mutant(
        "a write beyond the end is accepted", _ACCEPTS, TAKER_C,
        (("    if (offset > disk_size || size > disk_size - offset)\n",
          "    if (offset > disk_size)\n"),),
        (TAKER,),
    ),
    Mutant(
        "an image that takes no writes takes them here", "8.4", TAKER_C,
        (("    PyObject *checked = PyObject_CallNoArgs(self->check);",
          "    PyObject *checked = Py_NewRef(Py_None);"),),
        (TAKER,),
    ),
    Mutant(
        "a closed image takes writes", "8.4", IMAGE_FILE,
        (("        if self._is_closed:\n            # What",
          "        if False:\n            # What"),),
        (TAKER,),
    ),
    Mutant(
        "space that is being given back is written to", _ACCEPTS, TAKER_C,
        (("        status = is_true(self->space, name_punching);\n", "        status = 0;\n"),),
        (TAKER,),
    ),
    Mutant(
        "a group that is about to lose its slot is written to", _ACCEPTS, TAKER_C,
        (("        status = is_true(self->space, name_leaving);\n", "        status = 0;\n"),),
        (TAKER,),
    ),
    Mutant(
        "space is asked for of a write's first eighth alone", "8.4", TAKER_C,
        (("    unsigned wanted = (2u << last) - (1u << first);\n",
          "    unsigned wanted = 1u << first;\n    (void)last;\n"),),
        (TAKER,),
    ),
    Mutant(
        "blocks of the next group are written by the slot of the first", _ACCEPTS, TAKER_C,
        (("        part = part < count ? part : count;\n", "        part = count;\n"),),
        (TAKER,),
    ),
    Mutant(
        "a leaf page that is not in memory is not waited for", _ACCEPTS, TAKER_C,
        (("        if (at_number(self->leaves, group) == NULL)\n",
          "        if (at_number(self->leaves, group) == NULL && PyErr_Occurred())\n"),),
        (TAKER,),
    ),
    Mutant(
        "the clean cache keeps what was overwritten", _ACCEPTS, TAKER_C,
        (("(has && PyODict_DelItem(self->clean, clean_key) < 0)", "has > 1"),), (TAKER,),
    ),
    Mutant(
        "a write makes another image's clean block go", _ACCEPTS, TAKER_C,
        (("FromUnsignedLongLong(self->base + block)", "FromUnsignedLongLong(block)"),), (TAKER,),
    ),
    Mutant(
        "a frame that a block had is nobody's", _ACCEPTS, TAKER_C,
        (("    else if (old != NULL && PyList_Append(old_frames, old) < 0)\n",
          "    else if (old != NULL && old_frames == NULL)\n"),),
        (TAKER,),
    ),
    Mutant(
        "frames that are given back lie the other way round", _ACCEPTS, TAKER_C,
        (("(old_frames != NULL && PyList_Reverse(old_frames) < 0) ||\n        ", ""),), (TAKER,),
    ),
    Mutant(
        "frames that were not used are lost", _ACCEPTS, TAKER_C,
        (("    if (left == 0 && (old", "    if ((old"),), (TAKER,),
    ),
    Mutant(
        "what landed is written into the frames the block had", _ACCEPTS, TAKER_C,
        (("    if (old != NULL && content != NULL)\n", "    if (old != NULL)\n"),), (TAKER,),
    ),
    Mutant(
        "a reader under way keeps what was overwritten", _ACCEPTS, TAKER_C,
        (("        PyObject_SetAttr(self->reader, name_version, next) < 0)\n",
          "        PyObject_SetAttr(self->reader, name_version, version) < 0)\n"),),
        (TAKER,),
    ),
    Mutant(
        "each write is the oldest", _ACCEPTS, TAKER_C,
        (("    if (oldest == Py_None) {\n", "    {\n"),), (TAKER,),
    ),
    Mutant(
        "half of the frames is few", _ACCEPTS, TAKER_C,
        (("* 2 >= self->slab.len / BLOCK_SIZE)", "* 2 > self->slab.len / BLOCK_SIZE)"),), (TAKER,),
    ),
    Mutant(
        "a view is accepted that the garbage collector may take apart", _ACCEPTS, TAKER_C,
        (("    else if (slab.obj != NULL && PyMemoryView_Check(slab.obj))", "    else if (0)"),),
        (TAKER,),
    ),
    Mutant(
        "nobody is told of few frames by the long way", "cache.py", IMAGE_FILE,
        (("        self._cache.shared.look()\n", ""),), (TAKER,),
    ),
    Mutant(
        "less than half of an odd number of frames is not few", "cache.py", CACHE_FILE,
        (("        if len(self.free) * 2 < self._frame_count:\n",
          "        if len(self.free) < self._frame_count // 2:\n"),),
        (CACHE, TAKER),
    ),
    Mutant(
        "images opened at the same time have a slab each", "cache.py", CACHE_FILE,
        (("        with self._attaching:\n", "        if True:\n"),), (CACHE,),
    ),
    Mutant(
        "frames are given back in a worker", "cache.py", IMAGE_FILE,
        (("            self._cache.detach()  # not",
          "            yield self._cache.detach  # not"),),
        (LANE,),
    ),
    Mutant(
        "a sweep takes frames that writes have taken", "11.4", SWEEP,
        (("        if len(look.blocks) > self._cache.free_count:\n", "        if False:\n"),),
        (REKEY,),
    ),
    Mutant(
        "a synchronous write is answered before it is durable", _RECEIVES, DEVICE_C,
        ((" ||\n        asked.flags & O_DSYNC)", ")"),), (DEVICE,),
    ),
    Mutant(
        "a direct write leaves the kernel's pages as they were", _RECEIVES, DEVICE_C,
        ((" || is_beside_readers(handle, &asked))", ")"),), (DEVICE,),
    ),
    Mutant(
        "what the kernel writes back is looked after like a direct write", _RECEIVES, DEVICE_C,
        ((" || asked->write_flags & WRITE_CACHE)", ")"),), (DEVICE,),
    ),
    Mutant(
        "a write of another length is accepted", _RECEIVES, DEVICE_C,
        ((" || count != sizeof(asked) + asked.size", ""),), (DEVICE,),
    ),
    Mutant(
        "what came into frames is not brought back", _RECEIVES, DEVICE_C,
        (("    gather(self, count);\n    return 0;\n", "    return 0;\n"),), (DEVICE,),
    ),
    Mutant(
        "frames are received into from the first on", _RECEIVES, DEVICE_C,
        (("PyList_GET_ITEM(free, last - i)", "PyList_GET_ITEM(free, i)"),), (DEVICE,),
    ),
    Mutant(
        "frames that just suffice are not received into", _RECEIVES, DEVICE_C,
        (("_SIZE(free) < LANDING_BLOCKS)", "_SIZE(free) <= LANDING_BLOCKS)"),),
        (DEVICE,),
    ),
    Mutant(
        "what lies beyond the longest write is lost", _RECEIVES, DEVICE_C,
        (("(struct iovec){buffer + whole,", "(struct iovec){buffer,"),),
        (DEVICE,),
    ),
    Mutant(
        "a view is held that the garbage collector may take apart", _RECEIVES, DEVICE_C,
        (("memory == NULL || PyMemoryView_Check(memory) ||", "memory == NULL ||"),),
        (DEVICE,),
    ),
    Mutant(
        "a frame that cannot be is received into", _RECEIVES, DEVICE_C,
        (("        if (frame < 0 || frame >= frame_count)\n", "        if (frame < -1)\n"),),
        (DEVICE,),
    ),
    Mutant(
        "what is not accepted is answered", _RECEIVES, DEVICE_C,
        (("    if (taken == Py_True) {\n", "    if (taken != NULL && taken != Py_False) {\n"),),
        (DEVICE,),
    ),
)  # fmt: skip

NAMED: tuple[Mutant, ...] = (
    *COMMIT, *CHECKPOINT, *WRITING, *RECOVER, *STRUCTURES, *REWRITE, *REKEYS, *LEDGERS, *NETS,
    *BATCHES, *READS, *WRITES,
)  # fmt: skip

_TRUE = "equivalent: `present` is only asked for being zero or not"
_ROOM = (
    "equivalent: each page begins at most one record of one sequence, so the search ends by itself"
    " after page_count records; a second fence"
)
_COVERED = (
    "only performance: the old end of the last block is read, and then wholly covered by the data"
)
_BEYOND = "only performance: a block beyond the end is a hole, it is read and is not used"
_NOTHING = "equivalent: an edge of no bytes is zeroed, and a write of nothing does nothing"
ACCEPTED: dict[str, str] = {
    "looking ahead minds older epochs": "equivalent: epochs and sequences grow together, and at"
    " most one record after the last one taken exists, so a record of an older epoch never has a"
    " sequence beyond the next one",
    "journal.py scan: pages_found += record.page_count => pass": _ROOM,
    "journal.py scan: raise IntegrityError(path, 'journal: more records than it has room for')"
    " => pass": _ROOM,
    "tree.py Node.__init__: 0 => 1": "equivalent: the position of a node without a slot is not"
    " looked at, and set together with the slot",
    "tree.py Tree.verify_leaf: len(page) == BLOCK_SIZE and any((same_mac(macs.leaf(group, page),"
    " mac) for macs in self._macs.accepted)) => any((same_mac(macs.leaf(group, page), mac) for macs"
    " in self._macs.accepted))": "equivalent: the MAC is that of 4096 bytes, so a shorter page"
    " never has it",
    "tree.py Tree.put_group: 1 => 2": _TRUE,
    "tree.py Tree._refresh_node: 1 => 2 #4": _TRUE,
    "tree.py Tree.put_group: 1 => 0 #2": "equivalent: both places of a slot that nothing durable"
    " names are free; which of them a new leaf page goes to first does not matter",
    "tree.py Tree.refresh: 1 => 0 #2": "equivalent: there are no nodes at level 0",
    "image.py SealedImage.try_read: 1 => 0": "only performance: one block more is looked for"
    " where the read ends on a block's border, and cut off again",
    "image.py SealedImage.try_read: not offset % BLOCK_SIZE and end - offset == len(out) => end -"
    " offset == len(out)": "equivalent: a read of whole blocks' length that begins within one"
    " touches one block more, so that the lengths differ",
    "image.py SealedImage._merge_edges: end % BLOCK_SIZE and end < self.size => end %"
    " BLOCK_SIZE": _COVERED,
    "image.py SealedImage._merge_edges: end < self.size => end <= self.size": _COVERED,
    "image.py SealedImage.write_steps: is_edge and block * BLOCK_SIZE < self.size =>"
    " is_edge": _BEYOND,
    "image.py SealedImage.write_steps: block * BLOCK_SIZE < self.size => block * BLOCK_SIZE <="
    " self.size": _BEYOND,
    "image.py SealedImage.write: 20 => 21": "only performance: a long write goes in larger pieces",
    "image.py SealedImage.discard_steps: last * BLOCK_SIZE => last // BLOCK_SIZE": _NOTHING,
    "image.py SealedImage.discard_steps: first * BLOCK_SIZE > offset => first * BLOCK_SIZE >="
    " offset": _NOTHING,
}
"""Name of a mutant to the reason why no test needs to catch it."""
