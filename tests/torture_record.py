"""What a long job has reached, in a file: a run may be ended at any moment and goes on there."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Record:
    """The document of one job; `batches` names the member that has one entry for each batch."""

    batches = "batches"

    def __init__(self, path: Path, job: str, **more: Any) -> None:
        self._path = path
        self.job = job
        self.document: dict[str, Any] = {
            "job": job, "commit": commit(), **more, "figures": {}, "seconds": 0.0,
            self.batches: {},
        }  # fmt: skip
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["job"] != job:
                sys.exit(f"{path} is of another job: {kept['job']}")
            self.document = kept
        if self.document["commit"] != commit():
            began = self.document["commit"]
            print(f"note: began on {began}, this is {commit()}", file=sys.stderr)

    def note(self, number: int, entry: Any, figures: dict[str, int], seconds: float) -> None:
        """Take a finished batch into account."""
        sums = self.document["figures"]
        for name, count in figures.items():
            sums[name] = sums.get(name, 0) + count
        self.document["figures"] = dict(sorted(sums.items()))
        self.document["seconds"] = round(self.document["seconds"] + seconds, 1)
        self.document[self.batches][str(number)] = entry
        self.document["until"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def save(self) -> None:
        """Write it down."""
        self._put(self._path, self.text().encode())

    def text(self) -> str:
        """Return the document, for people as well."""
        return json.dumps(self.document, indent=1) + "\n"

    def wanted(self) -> Iterator[int]:
        """Yield the numbers of batches that were not run yet, without an end."""
        number = 0
        while True:
            if str(number) not in self.document[self.batches]:
                yield number
            number += 1

    def line(self) -> str:
        """Return where it is."""
        figures = ", ".join(f"{count} {name}" for name, count in self.document["figures"].items())
        return f"{self.job}: {figures}"

    @staticmethod
    def _put(path: Path, content: bytes) -> None:
        temporary = path.with_suffix(".new")
        temporary.write_bytes(content)
        os.replace(temporary, path)


def state_path(given: Path | None, job: str) -> Path:
    """Return where the progress of a job is kept."""
    path = given or ROOT / ".scratch" / f"torture-{job}.json"
    path.parent.mkdir(exist_ok=True)
    return path


def commit() -> str:
    """Return what is tested."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()
