"""Blocks sealed again, part by part: what is under an old image key, or under the rarest epochs.

Both walk over the groups in order, and seal what they find again by the ordinary commit, so that a
crash is one of a commit (FORMAT.md 11). A part is an exclusive operation: what it reads is what is
committed, and nothing else is committed before it has ended. A write that is accepted meanwhile is
newer, and is committed later: it always wins.

Nothing that was sealed again is found a second time: a walk may be left after any part, for ever or
until it goes on. What does not verify cannot be sealed again; it is left as it is, and named.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

from sealfs.errors import BlockDamaged, StorageFailed
from sealfs.image.cache import ImageCache
from sealfs.image.check import Finding, lost_findings
from sealfs.image.committer import Committer
from sealfs.image.format import RekeyPhase
from sealfs.image.layout import BLOCK_SIZE, ENTRY_SIZE, runs_of
from sealfs.image.reader import Reader
from sealfs.image.steps import Steps
from sealfs.image.tree import NO_SLOT
from sealfs.image.volume import RECORD_BLOCKS_MAX, Volume

GROUPS_MAX = 64
"""Groups that one part looks at: where there is nothing to do, some milliseconds."""

AHEAD_MAX = 1 << 14
"""Groups that are listed at a time: 8 GiB of disk."""

PART_BLOCKS_MAX = RECORD_BLOCKS_MAX // 2
"""Blocks that a part seals again at most: 4 MiB, in one record."""

FINDINGS_MAX = 1000
"""Findings that are kept; there may be as many as blocks."""

RETIRED = "there is room in its epoch table"

FREE_SHARE = 2
"""A retirement frees one row in that many: half of the table."""


@dataclass(frozen=True, slots=True)
class Swept:
    """What one part did."""

    size: int
    """Bytes of the disk that were sealed again."""
    looked_size: int
    """Bytes of the disk that it got on by."""
    is_done: bool = False
    """The whole walk has come to its end."""
    needs_room: bool = False
    """Nothing could be done: the dirty cache is full."""
    what: str = ""
    """What has come to its end, for the log."""


@dataclass(slots=True)
class _Look:
    """What a part is to do: what it found in the groups it looked at."""

    next_group: int
    is_last: bool = True
    passed: int = 0
    """Groups that are done with it."""
    blocks: list[int] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)
    leaves: list[tuple[int, bytes, int, bytes]] = field(default_factory=list)
    """Of groups that were not in memory; as `Tree.admit_leaf` wants them."""
    renewed: list[int] = field(default_factory=list)
    """Groups of which the leaf page's MAC alone is under the old key."""

    def stop(self, group: int) -> None:
        """Leave this group and those after it to the next part."""
        self.next_group, self.is_last = group, False


class Sweep:
    """The walks over one image. All steps are exclusive."""

    def __init__(
        self, volume: Volume, cache: ImageCache, reader: Reader, committer: Committer,
        guard: Callable[[Steps[None]], Steps[None]],
    ) -> None:  # fmt: skip
        """Take what it works with; `guard` poisons the image where steps do not reach their end."""
        self.findings: list[Finding] = []
        """What could not be sealed again in this walk."""
        self.is_futile = False
        """A retirement of epochs was of no avail: too much is damaged."""
        self._volume = volume
        self._tree = volume.tree
        self._cache = cache
        self._reader = reader
        self._committer = committer
        self._guard = guard
        self._group_blocks = volume.geometry.group_blocks
        self._targets: frozenset[int] | None = None
        """Epochs whose blocks are sealed again; None: yet to be chosen."""
        self._checked: int | None = None
        """How far the look at what is left under the old key has come."""
        self._counted: Counter[int] | None = None
        """Blocks of each epoch, of the groups that a retirement has counted."""
        self._newest_epoch = 0
        self._ahead: list[int] = []
        """Some groups, ascending."""
        self._at = 0

    # -- another image key

    def switch_steps(self) -> Steps[None]:
        """Take the next image key into use; both copies of the identity have it already.

        Both superblocks say so before there is a record under it: were one damaged, the other,
        under the old key, could not even tell that records are missing.
        """
        volume = self._volume
        volume.cursor = 0
        self._targets = self._checked = None
        self.findings.clear()
        yield from volume.checkpoint_steps(new_epoch=True, phase=RekeyPhase.SWEEPING)
        # Crash here: a writer draws an epoch before its first record, in the other superblock.
        yield from volume.checkpoint_steps()
        # Crash from here on: the superblock says how far it has come; swept on from there.

    def rekey_part_steps(self, blocks_max: int) -> Steps[Swept]:
        """Seal some more of what is under the old image key again; durable on return.

        Done when nothing in the image is under it, which was looked for once more.

        Raises:
            BlockDamaged: all the rest is done, but what does not verify is left.
        """
        volume = self._volume
        if self._targets is None:
            now = volume.superblock.key_generation
            self._targets = frozenset(
                row.epoch for row in volume.table.rows if row.key_generation != now
            )
        if self._checked is not None:
            return (yield from self._check_steps())
        look = yield from self._look_steps(volume.cursor, blocks_max, renew=True)
        if look is None:
            return Swept(0, 0, needs_room=True)
        size = yield from self._do_steps(look)
        # Only now: the next checkpoint's superblock says that these groups are done.
        volume.cursor = look.next_group
        if look.is_last:
            yield from self._refuse_damage_steps()
            self._checked = 0
        return Swept(size, look.passed * self._group_blocks * BLOCK_SIZE)

    def _check_steps(self) -> Steps[Swept]:
        """Look whether the groups are free of the old key before it is given up."""
        assert self._checked is not None
        start = self._checked
        groups = self._groups(start)
        left = yield partial(self._under_old_key, groups[:GROUPS_MAX])
        if left is not None:
            # Left by a walk that met damage: it may have been healed since.
            self._volume.cursor, self._checked = left, None
            return Swept(0, 0)
        if len(groups) > GROUPS_MAX:
            self._checked = groups[GROUPS_MAX]
            return Swept(0, 0)
        yield from self._guard(self._volume.checkpoint_steps())
        if (yield self._tree.renew_nodes):
            yield from self._guard(self._volume.checkpoint_steps())
        self._checked = None
        return Swept(0, 0, is_done=True)

    def _under_old_key(self, groups: list[int]) -> int | None:
        """Return the first of these groups that has anything under the old key."""
        for group in groups:
            page, _ = self._page(group)
            if not self._tree.is_under_new_key(group, page) or self._members(page):
                return group
        return None

    def _refuse_damage_steps(self) -> Steps[None]:
        """Raise where something could not be sealed again; the walk begins there once more."""
        damaged = [*self.findings, *lost_findings(self._volume)]
        if not damaged:
            return
        first = min(finding.first_block for finding in damaged)
        count = sum(finding.block_count for finding in damaged)
        self.findings.clear()
        self._volume.cursor = first // self._group_blocks
        if self._volume.table.is_nearly_full:
            # Or what is left could not be written anew.
            yield self._volume.compact_table
            yield from self._guard(self._volume.checkpoint_steps())
        what = "does not verify" if count == 1 else f"and {count - 1} more do not verify"
        raise BlockDamaged(
            self._volume.path, first,
            f"{what}: all others are under the new image key, and the old one stays until these"
            " are written anew or discarded, and the rekey has gone on",
        )  # fmt: skip

    # -- fewer epochs

    @property
    def wants_retirement(self) -> bool:
        """Whether the epoch table runs low, and sealing blocks again may help."""
        volume = self._volume
        return volume.table.is_nearly_full and not self.is_futile and not volume.tree.lost

    def retire_part_steps(self, blocks_max: int) -> Steps[Swept]:
        """Go on to free rows of the epoch table; what was sealed again is durable on return.

        The first walk counts the blocks of each epoch, and drops the rows that have none. Where
        that frees too few, a second one seals again the blocks of the epochs that have fewest:
        half of the rows, and hardly ever half of the blocks.
        """
        if self._targets is None:
            return (yield from self._count_steps())
        look = yield from self._look_steps(self._at, blocks_max, renew=False)
        if look is None:
            return Swept(0, 0, needs_room=True)
        size = yield from self._do_steps(look)
        self._at = look.next_group
        if look.is_last:
            self.is_futile = bool(self.findings)  # of which epochs they are is not told apart
            if not self.findings:
                yield from self._drop_rows_steps(self._targets)
            self._begin_again()
        return Swept(
            size, look.passed * self._group_blocks * BLOCK_SIZE, look.is_last, what=RETIRED
        )

    def _count_steps(self) -> Steps[Swept]:
        if self._counted is None:
            self._counted, self._at = Counter(), 0
            self._newest_epoch = self._volume.table.rows[-1].epoch
        groups = self._groups(self._at)
        part = yield partial(self._count, groups[:GROUPS_MAX])
        if part is None:
            self.is_futile = True  # what a damaged leaf page names is not known
            self._begin_again()
            return Swept(0, 0, is_done=True, what="epochs cannot be retired: it is damaged")
        self._counted.update(part)
        if len(groups) > GROUPS_MAX:
            self._at = groups[GROUPS_MAX]
            return Swept(0, 0)
        counted = self._counted
        # Epochs drawn since the walk began may be named behind its back; older ones are not.
        known = [row.epoch for row in self._volume.table.rows if row.epoch < self._newest_epoch]
        unused = frozenset(known).difference(counted)
        if unused:
            yield from self._drop_rows_steps(unused)
        if not self._volume.table.is_nearly_full:
            self._begin_again()
            return Swept(0, 0, is_done=True)
        used = sorted((epoch for epoch in known if epoch in counted), key=counted.__getitem__)
        self._targets = frozenset(used[: len(used) // FREE_SHARE + 1])
        self._at = 0
        return Swept(0, 0)

    def _count(self, groups: list[int]) -> Counter[int] | None:
        counted: Counter[int] = Counter()
        for group in groups:
            try:
                page, _ = self._page(group)
            except (BlockDamaged, StorageFailed):
                return None
            counted.update(epoch for epoch, flags in _entries(page) if flags)
        return counted

    def _drop_rows_steps(self, epochs: frozenset[int]) -> Steps[None]:
        """Drop rows that no entry names; durable on return."""
        table = self._volume.table
        table.compact({row.epoch for row in table.rows} - epochs)
        yield from self._guard(self._volume.checkpoint_steps())

    def _begin_again(self) -> None:
        self._targets = self._counted = None
        self._at = 0
        self.findings.clear()

    # -- one part

    def _groups(self, start: int) -> list[int]:
        """Return the groups that are there from `start` on, one more than a part looks at.

        From a list that is made now and then: finding them passes over every node page, which took
        a tenth of the time of an image of 1 TiB. A group that has come since holds nothing old.
        """
        at = bisect_left(self._ahead, start)
        found = [
            group
            for group in self._ahead[at : at + GROUPS_MAX + 1]
            if self._tree.slot_of(group) != NO_SLOT
        ]
        if len(found) <= GROUPS_MAX or self._ahead[0] > start:
            self._ahead = list(islice(self._tree.groups(start), AHEAD_MAX))
            found = self._ahead[: GROUPS_MAX + 1]
        return found

    def _look_steps(self, start: int, blocks_max: int, *, renew: bool) -> Steps[_Look | None]:
        """Read what the next part is to seal again; None where the cache has no room for it."""
        room = min(blocks_max, PART_BLOCKS_MAX, self._cache.free_count)
        if room <= 0:
            return None
        groups = self._groups(start)
        noted = len(self.findings)
        look: _Look = yield partial(self._look, groups, room, renew)
        if len(look.blocks) > self._cache.free_count:
            del self.findings[noted:]  # writes came first: the next part looks again
            return None
        return look

    def _look(self, groups: list[int], room: int, renew: bool) -> _Look:
        """Collect from these groups what is to be done, in a worker: at most `room` blocks."""
        look = _Look(self._volume.geometry.group_count_max)
        for group in groups:
            left = room - len(look.blocks)
            if look.passed == GROUPS_MAX or not left:
                look.stop(group)
                break
            first = group * self._group_blocks
            try:
                page, place = self._page(group)
            except (BlockDamaged, StorageFailed):
                self._note(first, self._group_blocks, "leaf page does not authenticate")
                look.passed += 1
                continue
            members = self._members(page)
            if len(members) > left and look.blocks:
                look.stop(group)
                break
            if members and self._group_blocks <= left and self._is_full(page):
                # It moves as a whole then, and is written once instead of twice (FORMAT.md 8.1).
                members = list(range(self._group_blocks))
            good = self._read(group, page, members[:left], look.content)
            look.blocks += [first + index for index in good]
            if self._tree.leaf(group) is None:
                look.leaves.append((group, page, place, self._tree.leaf_source(group)[2]))
            if len(members) > left:
                look.stop(group)
                break
            if renew and not members and not self._tree.is_under_new_key(group, page):
                look.renewed.append(group)
            look.passed += 1
        return look

    def _page(self, group: int) -> tuple[bytes, int]:
        """Return (leaf page, place) of a group; any thread.

        Raises:
            BlockDamaged, StorageFailed: it cannot be verified, or read.
        """
        leaf = self._tree.leaf(group)
        source = self._tree.leaf_source(group)
        if leaf is not None:
            return bytes(leaf), source[1]
        return self._volume.read_leaf(group, source)

    def _members(self, page: bytes) -> list[int]:
        """Return which blocks of a group to seal again, by their place in it."""
        targets = self._targets
        assert targets is not None, "chosen before the first look"
        return [i for i, (epoch, flags) in enumerate(_entries(page)) if flags and epoch in targets]

    def _is_full(self, page: bytes) -> bool:
        return all(flags for _, flags in islice(_entries(page), self._group_blocks))

    def _read(self, group: int, page: bytes, members: list[int], content: bytearray) -> list[int]:
        """Read blocks of a group; return those that verify, of which `content` has more now."""
        good: list[int] = []
        for start, count in runs_of(members):
            run = self._opened(group, page, start, count)
            if isinstance(run, bytearray):
                good += range(start, start + count)
                content += run
                continue
            for index in range(start, start + count):
                one = self._opened(group, page, index, 1)
                if isinstance(one, bytearray):
                    good.append(index)
                    content += one
                elif self._is_target(page, index):
                    self._note(group * self._group_blocks + index, 1, one)
        return good

    def _opened(self, group: int, page: bytes, index: int, count: int) -> bytearray | str:
        """Return the content of a run of blocks, or why one of them is not to be had."""
        volume = self._volume
        run = bytearray(count * BLOCK_SIZE)
        offset = volume.geometry.block_offset(self._tree.slot_of(group), index)
        entries = page[index * ENTRY_SIZE : (index + count) * ENTRY_SIZE]
        try:
            volume.storage.read_into(offset, run)
            volume.cipher.open_blocks(group * self._group_blocks + index, memoryview(run), entries)
        except (BlockDamaged, StorageFailed) as exc:
            return exc.detail
        return run

    def _is_target(self, page: bytes, index: int) -> bool:
        assert self._targets is not None
        return int.from_bytes(page[index * ENTRY_SIZE :][:4], "little") in self._targets

    def _note(self, first: int, count: int, cause: str) -> None:
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(first, count, cause))

    def _do_steps(self, look: _Look) -> Steps[int]:
        """Seal again what was found, durable on return; return how many bytes."""
        changed = {block // self._group_blocks for block in look.blocks} | {*look.renewed}
        self._committer.reserve_leaves(sorted(changed))
        passing = [leaf for leaf in look.leaves if leaf[0] in changed]
        for leaf in passing:
            self._tree.admit_leaf(*leaf)
        if look.blocks:
            yield from self._guard(self._committer.seal_again_steps(look.blocks, look.content))
        if look.renewed:
            yield from self._guard(self._renew_steps(look.renewed))
        for group, *_ in passing:
            self._tree.forget_leaf(group)  # the VM's own stay instead
        return len(look.blocks) * BLOCK_SIZE

    def _renew_steps(self, groups: list[int]) -> Steps[None]:
        """Give leaf pages as they are a MAC under the present key.

        No record says so: none may come before the superblock that has their MACs.
        """
        for group in groups:
            # One by one: a page that is changed stays, one that was only loaded makes room.
            yield from self._reader.load_leaves_steps([group])
            self._tree.change_leaf(group)
        yield from self._volume.checkpoint_steps()


def _entries(page: bytes) -> Iterator[tuple[int, int]]:
    """Return (epoch, flags) of each entry of a leaf page."""
    words = array("I", page)
    return zip(words[0::8], words[7::8], strict=True)
