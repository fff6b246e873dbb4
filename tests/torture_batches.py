"""Crash states and tampers by the million, in batches that can be repeated one by one.

    tools/torture crash --states 1000000          random workloads of three operations and more
    tools/torture tamper --tampers 200000         random alterations of every structure
    tools/torture tamper --every-bit              each bit of an image's metadata, one at a time
    tools/torture crash --replay 17               one batch again: must give the same digest

A batch is made from its number alone. What was done is kept beside (`--state`), so that a run may
be ended at any moment and goes on where it was; `--summary FILE` writes what was reached. A state
counts once, whatever its seed: by workload, crash point and fate of each pending sector.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tamper_bits
import test_crash
import test_tamper
from crash_support import (
    LETTERS,
    PREFIXES,
    REKEYS,
    SMALL_COMMIT_BLOCKS,
    Lab,
    Recipe,
    set_limit,
)
from torture_record import Record, state_path

STATES_IN_BATCH = 1000
TAMPERS_IN_BATCH = 1000
LETTERS_MAX = 6
REKEY_EVERY = 4
FAULTS = ("", "", "", "", "kill", "eio", "short")
REPORT_EVERY = 10.0  # seconds


@dataclass
class Batch:
    """What one batch reached."""

    number: int
    figures: Counter[str] = field(default_factory=Counter)
    keys: list[int] = field(default_factory=list)
    """A hash for each thing tried, to count it once."""
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """Return what must be the same when the batch is run again."""
        figures = json.dumps(sorted(self.figures.items()))
        keys = array("Q", sorted(self.keys)).tobytes()
        return hashlib.sha256(figures.encode() + keys).hexdigest()[:16]


def crash_batch(number: int) -> Batch:
    """Run random workloads until a thousand crash states were examined.

    Each fourth batch has a rekey under way, and its steps among the operations.
    """
    set_limit("SMALL_COMMIT_BLOCKS", SMALL_COMMIT_BLOCKS)
    began = time.perf_counter()
    rng = random.Random(f"torture crash {number}")
    lab = Lab(seed=number, cap_point=6, inner=0.05, later=0.05, again=0.1)
    tried: set[tuple[str, str]] = set()
    has_rekey = number % REKEY_EVERY == 0
    prefixes = list(REKEYS if has_rekey else PREFIXES)
    operations = LETTERS + "kppKi" if has_rekey else LETTERS
    while lab.figures["states"] + lab.figures["states inside recovery"] < STATES_IN_BATCH:
        letters = "".join(rng.choices(operations, k=rng.randint(3, LETTERS_MAX)))
        fault = rng.choice(FAULTS)
        recipe = Recipe(number, rng.choice(prefixes), letters.rstrip("f") or "w")
        if (recipe.prefix, recipe.letters) in tried:
            continue  # the same branch of history would draw the same salts
        tried.add((recipe.prefix, recipe.letters))
        if fault:
            recipe = replace(recipe, fault=fault, fault_at=rng.randint(1, 30))
        test_crash.run(lab, recipe)
    batch = Batch(number, Counter(lab.figures))
    batch.figures["nonces"] = len(lab.nonces)
    batch.keys = [key_of(str(replace(recipe, seed=0))) for recipe in lab.seen]
    batch.seconds = time.perf_counter() - began
    return batch


def tamper_batch(number: int) -> Batch:
    """Alter, a thousand times, one to three things, and judge what comes of it."""
    began = time.perf_counter()
    rng = random.Random(f"torture tamper {number}")
    states, older = test_tamper.history(test_tamper.IDENTITY)
    others, _ = test_tamper.history(test_tamper.OTHER)
    batch = Batch(number)
    while batch.figures["tampers"] < TAMPERS_IN_BATCH:
        name = rng.choice(list(states))
        state = states[name]
        raw = bytearray(state.raw)
        label, kinds = name, test_tamper.KINDS
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            structure = rng.choice([each for each, spans in state.spans.items() if spans])
            kind = rng.choice(kinds)
            altered = test_tamper.tampered(
                rng, replace(state, raw=bytes(raw)), structure, kind, others=others[name],
                older=older,
            )  # fmt: skip
            if altered is not None:
                raw = altered
                label += f" {structure}/{kind}"
            if len(raw) < len(state.raw):
                break
            # Two replays at once may be a whole older state, which is another test's.
            kinds = ("flip", "zero", "punch")
        if raw == state.raw:
            continue
        right = test_tamper.verdict(state, raw)
        outcome = test_tamper.judge(raw, right, label=f"batch {number}: {label}")
        batch.figures["tampers"] += 1
        batch.figures[outcome] += 1
        batch.keys.append(key_of(name + hashlib.sha256(raw).hexdigest()))
    batch.seconds = time.perf_counter() - began
    return batch


def bits_batch(number: int) -> Batch:
    """Flip each bit of one page of metadata, in its turn."""
    began = time.perf_counter()
    batch = Batch(number, tamper_bits.whole_page(number))
    batch.seconds = time.perf_counter() - began
    return batch


def key_of(text: str) -> int:
    """Return 64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


JOBS: dict[str, tuple[Callable[[int], Batch], str]] = {
    "crash": (crash_batch, "states"),
    "tamper": (tamper_batch, "tampers"),
    "every-bit": (bits_batch, "bits"),
}


class Progress(Record):
    """What a job has reached, on disk after each batch; each thing tried counts once."""

    batches = "digests"

    def __init__(self, path: Path, job: str) -> None:
        super().__init__(path, job, distinct=0)
        self._keys_path = path.with_suffix(".keys")
        self.keys: set[int] = set()
        if path.exists():
            found = array("Q")
            found.frombytes(self._keys_path.read_bytes())
            self.keys = set(found)

    def add(self, batch: Batch) -> None:
        """Take a finished batch into account."""
        self.keys.update(batch.keys)
        self.note(batch.number, batch.digest, batch.figures, batch.seconds)
        # Bits are all different without a note of each.
        self.document["distinct"] = len(self.keys) + self.document["figures"].get("bits", 0)

    def save(self) -> None:
        """Write it down; a run that is ended goes on from here."""
        self._put(self._keys_path, array("Q", sorted(self.keys)).tobytes())
        super().save()

    def line(self) -> str:
        return f"{super().line()}; {self.document['distinct']} distinct"


def main() -> int:
    """Run a job until it has reached what was asked for."""
    parser = argparse.ArgumentParser(prog="tools/torture")
    parser.add_argument("job", choices=("crash", "tamper"))
    parser.add_argument("--states", "--tampers", dest="wanted", type=int, default=10_000)
    parser.add_argument("--every-bit", action="store_true", help="Of metadata; with tamper.")
    parser.add_argument("--state", type=Path, help="Where the progress is kept.")
    parser.add_argument("--summary", type=Path, help="Write what was reached, as JSON.")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--replay", type=int, metavar="BATCH")
    chosen = parser.parse_args()
    job = "every-bit" if chosen.every_bit else chosen.job
    wanted = tamper_bits.bit_count() if chosen.every_bit else chosen.wanted
    run, _ = JOBS[job]
    progress = Progress(state_path(chosen.state, job), job)
    if chosen.replay is not None:
        batch = run(chosen.replay)
        known = progress.document["digests"].get(str(chosen.replay))
        print(f"batch {chosen.replay}: {batch.digest}, {dict(batch.figures)}; was {known}")
        return 0 if known in (None, batch.digest) else 1
    reported = time.monotonic()
    with multiprocessing.get_context("fork").Pool(chosen.processes) as pool:
        numbers = progress.wanted()
        waiting: list[Any] = []
        with contextlib.suppress(KeyboardInterrupt):
            while progress.document["distinct"] < wanted:
                while len(waiting) < chosen.processes + 1:
                    waiting.append(pool.apply_async(run, (next(numbers),)))
                progress.add(waiting.pop(0).get())
                progress.save()
                if time.monotonic() - reported >= REPORT_EVERY:
                    reported = time.monotonic()
                    print(progress.line(), file=sys.stderr)
        pool.terminate()
    print(progress.line())
    if chosen.summary is not None:
        chosen.summary.write_text(progress.text())
    return 0 if progress.document["distinct"] >= wanted else 1


if __name__ == "__main__":
    sys.exit(main())
