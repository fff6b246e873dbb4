"""What a mount does for commands, by its control socket: the verbs that concern images.

Concurrency: each verb is a task of the trio thread, and may run beside any other.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

from sealfs.control import Document, Verb
from sealfs.errors import NotFound, UsageError
from sealfs.image.layout import SIZE_MAX
from sealfs.mount import names
from sealfs.mount.driver import Disks
from sealfs.mount.namespace import Namespace
from sealfs.mount.sweeper import RATE, Sweeper


class ImageVerbs:
    """Verbs that look at the images of a mount, or change them."""

    def __init__(
        self, source: Path, mountpoint: Path, *, disks: Disks, namespace: Namespace,
        sweeper: Sweeper,
    ) -> None:  # fmt: skip
        self._source = source
        self._mountpoint = mountpoint
        self._disks = disks
        self._namespace = namespace
        self._sweeper = sweeper

    def table(self) -> dict[str, Verb]:
        """Return the verbs by name."""
        return {
            "status": self.status,
            "flush": self.flush,
            "close": self.close,
            "resize": self.resize,
            "check": self.check,
            "rewrite-identity": self.rewrite_identity,
            "rekey": self.rekey,
        }

    async def status(self, request: Document) -> Document:
        """Say what is open, and in what state."""
        images = [
            {
                **disk.image.status(),
                "path": str(disk.path),
                "vm_id": disk.vm_id,
                "handles": disk.handles,
            }
            for disk in self._disks.all()
            if disk.image is not None
        ]
        return {
            "source": str(self._source),
            "mountpoint": str(self._mountpoint),
            "images": images,
            "failures": self._disks.failures.latest(),
        }

    async def flush(self, request: Document) -> Document:
        """Flush and checkpoint one image, or all."""
        flushed = []
        for disk in self._disks.all():
            if self._is_meant(request, str(disk.path)):
                await disk.flush()
                await disk.checkpoint()
                flushed.append(str(disk.path))
        return {"flushed": flushed}

    async def close(self, request: Document) -> Document:
        """Close one image, or all, that nobody has open; their keys are dropped."""
        closed: list[str] = []
        in_use: list[str] = []
        for disk in self._disks.all():
            if self._is_meant(request, str(disk.path)):
                is_closed = await self._disks.close_idle(disk.key)
                (closed if is_closed else in_use).append(str(disk.path))
        return {"closed": closed, "in_use": in_use}

    async def resize(self, request: Document) -> Document:
        """Set the size of one plain file, in use or not; durable when answered."""
        size = request.get("size")
        if not isinstance(size, int) or not 0 <= size <= SIZE_MAX:
            raise UsageError("resize", "expected a path and a size in bytes")
        sealed = self._sealed(request)
        await self._namespace.resize(sealed, size, may_shrink=request.get("shrink") is True)
        return {"size": size}

    async def check(self, request: Document) -> Document:
        """Verify a part of one image that is open here; the asker comes again for the next.

        So whoever asks decides the rate, and a check can be left at any moment.
        """
        start = request.get("start")
        disk = next((d for d in self._disks.all() if str(d.path) == request.get("path")), None)
        if disk is None:
            raise NotFound(request.get("path"), "is not in use here")
        if not isinstance(start, int) or start < 0:
            raise UsageError("check", "expected a group to start with")
        part = await disk.check_part(start, data=request.get("data") is True)
        return {
            "findings": [[f.first_block, f.block_count, f.cause] for f in part.findings],
            "checked": part.size,
            "next": part.next_group,
        }

    async def rekey(self, request: Document) -> Document:
        """Replace the key of one image, in use or not, or make room in its epoch table.

        `action`: "begin" (or go on; durable when answered, the rest in the background), "retire",
        "pause", or "status". Answered is how far it is; an image that is not open is not.
        """
        sealed, action, rate = self._sealed(request), request.get("action"), request.get("rate")
        if action in ("begin", "retire"):
            rate = RATE if rate is None else rate
            if not isinstance(rate, int) or rate <= 0:
                raise UsageError("rekey", "expected a rate in bytes a second")
            disk = await self._namespace.acquire(sealed)
            await self._sweeper.begin(disk, rate, retire=action == "retire")
            return self._sweeper.status(disk)
        found = next((each for each in self._disks.all() if each.path == sealed), None)
        if found is None:
            raise NotFound(sealed, "is not in use here")
        if action == "pause":
            self._sweeper.pause(found)
        elif action != "status":
            raise UsageError(action, "unknown action")
        return self._sweeper.status(found)

    async def rewrite_identity(self, request: Document) -> Document:
        """Give one image that is open here other wrapped keys and recovery slots.

        Durable when answered; `done` is False where the image is not open here. The keys are
        wrapped: this process learns no VM key by it. None of them: they stay.
        """
        disk = next((d for d in self._disks.all() if str(d.path) == request.get("path")), None)
        if disk is None:
            return {"done": False}
        try:
            generation = int(request["generation"])
            given = request["wrapped_keys"]
            wrapped = None
            if given is not None:
                wrapped = tuple((int(at), base64.b64decode(raw)) for at, raw in given)
            slots = [base64.b64decode(raw) for raw in request["recovery_slots"]]
        except (KeyError, ValueError, TypeError):
            raise UsageError("rewrite-identity", "expected wrapped keys and slots") from None
        done = await disk.rewrite_identity(generation, wrapped, tuple(slots))
        return {"done": done}

    def _sealed(self, request: Document) -> Path:
        """Return the sealed file that a request names, which must be below the source."""
        path = request.get("path")
        if not isinstance(path, str):
            raise UsageError("control request", "expected a path")
        sealed = Path(path)
        if self._source not in sealed.parents or sealed.suffix != names.SUFFIX:
            raise NotFound(sealed, f'is not a sealed file below "{self._source}"')
        return sealed

    def _is_meant(self, request: Document, path: str) -> bool:
        """Whether a request without a path, or with this one in either of its views, means it."""
        wanted = request.get("path")
        if wanted is None:
            return True
        below = os.path.relpath(path, self._source)[: -len(names.SUFFIX)]
        return wanted in (path, str(self._mountpoint / below))
