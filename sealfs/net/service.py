"""One process of a host that serves all its attachments, and the socket by which it is told.

The socket is `RUN_DIR/net.sock`, for root only (`sealfs/control.py`). Verbs:

    attach   vm, network, device, port, link, peers, pins, backend -> attachment
    detach   name -> nothing
    recheck  asks at once whether each VM is still allowed
    status   -> state directory, attachments
    metrics  -> text
    stop     ends the service, where nothing is attached

Keys never pass through it: the service asks the key service itself.

Concurrency: everything runs in one trio thread. Each attachment is a task of its own; what goes
wrong in one ends that one, and its state says why. `_places` is read and written between two trio
checkpoints only, so that of two requests for one device the second is always refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from sealfs.control import ControlServer, Document, run_directory
from sealfs.errors import Busy, NotFound, StorageFailed, UsageError
from sealfs.keys.hardening import harden
from sealfs.net import kernel
from sealfs.net.attachment import Attachment
from sealfs.net.counters import prometheus
from sealfs.net.link import Address, EthernetLink, Link, UdpLink
from sealfs.net.port import Port, QemuPort, TapPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sealfs.net.grant import Grant, Grants

SOCKET_NAME: Final = "net.sock"
LOCK_NAME: Final = "net.lock"
PEERS_MAX: Final = 64
"""Peers of one attachment: a frame for all of them is sealed for each."""
ATTACHMENTS_MAX: Final = 1024
BACKENDS: Final = ("userspace", "kernel")

log = logging.getLogger("sealfs.net")


@dataclass(frozen=True, slots=True)
class Request:
    """What `attach` is asked for."""

    vm: str
    network: str
    device: int
    tap: str | None
    qemu: Path | None
    listen: Address | None
    ethernet: str | None
    peers: tuple[Address, ...]
    backend: str
    pins: dict[str, bytearray] = field(repr=False)
    """By the name of the key that takes it."""

    @property
    def name(self) -> str:
        """The attachment's name: the VM's device."""
        return f"{self.vm}/{self.device}"

    @classmethod
    def parse(cls, document: Document) -> Request:
        """Return what a request means.

        Raises:
            UsageError: it means nothing.
        """
        port, link, peers = (document.get(name) for name in ("port", "link", "peers"))
        device, vm, network = (document.get(name) for name in ("device", "vm", "network"))
        if not (isinstance(vm, str) and isinstance(network, str) and vm and network):
            raise UsageError("attach", "needs a VM and a network")
        if not isinstance(device, int) or not 0 <= device < 256:
            raise UsageError(vm, f"has no network device {device}; they are 0 to 255")
        tap, qemu = _one_of(vm, "port", port, ("tap", "qemu"))
        listen, ethernet = _one_of(vm, "link", link, ("listen", "device"))
        if not isinstance(peers, list) or not 0 < len(peers) <= PEERS_MAX:
            raise UsageError(vm, f"needs 1 to {PEERS_MAX} peers")
        addresses = tuple(Address.parse(str(peer)) for peer in peers)
        if len(set(addresses)) != len(addresses):
            raise UsageError(vm, "a peer is named twice")
        backend = document.get("backend", BACKENDS[0])
        if backend not in BACKENDS:
            raise UsageError(vm, f"has no backend {backend!r}: {' or '.join(BACKENDS)}")
        if backend == "kernel" and not (tap and ethernet):
            raise UsageError(vm, "the kernel backend needs a device to make, and raw Ethernet")
        pins = document.get("pins", {})
        if not isinstance(pins, dict) or not all(isinstance(pin, str) for pin in pins.values()):
            raise UsageError(vm, "has PINs that are none")
        return cls(
            vm, network, device, tap, Path(qemu) if qemu else None,
            Address.parse(listen) if listen else None, ethernet, addresses, backend,
            {name: bytearray(pin.encode()) for name, pin in pins.items()},
        )  # fmt: skip

    def open_port(self) -> Port:
        """Open the VM's side."""
        if self.tap is not None and self.backend == "kernel":
            return kernel.KernelPort(self.tap)
        if self.tap is not None:
            return TapPort(self.tap)
        assert self.qemu is not None
        return QemuPort(self.qemu)

    def open_link(self) -> Link:
        """Open the peers' side."""
        if self.listen is not None:
            return UdpLink(self.listen, self.peers)
        assert self.ethernet is not None
        return EthernetLink(self.ethernet, self.peers, has_frames=self.backend != "kernel")

    def open_kernel(self, sci: bytes) -> kernel.KernelKeys | None:
        """Make the kernel's MACsec device, where that backend is asked for."""
        if self.backend != "kernel":
            return None
        assert self.tap is not None
        assert self.ethernet is not None
        kernel.require()
        return kernel.KernelKeys(self.tap, self.ethernet, sci)


def _one_of(
    vm: str, what: str, document: object, names: tuple[str, str]
) -> tuple[str | None, str | None]:
    """Return the two texts of a document that has exactly one of them."""
    if isinstance(document, dict) and len(document) == 1:
        (name, text), *_ = document.items()
        if name in names and isinstance(text, str) and text:
            return (text, None) if name == names[0] else (None, text)
    raise UsageError(vm, f"needs a {what}: {names[0]} or {names[1]}")


class _Task:
    """A running attachment, from outside."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()


class Service:
    """The attachments of a host."""

    def __init__(
        self, grants: Grants, run_dir: Path | None = None, *, state: str = "", **options: Any
    ) -> None:
        """Make it; `run` serves.

        Args:
            grants: the key service.
            run_dir: where the socket is.
            state: the state directory that the keys are of.
            options: for each `Attachment`; tests make things faster with them.
        """
        self._grants, self._options = grants, options
        self._run_dir = run_dir or run_directory()
        self._places: dict[tuple[str, int], Attachment | None] = {}
        self._tasks: dict[Attachment, _Task] = {}
        self._nursery: trio.Nursery | None = None
        self._state = state
        self.stop_wanted = trio.Event()
        self.control = ControlServer(
            self._run_dir / SOCKET_NAME,
            {
                "attach": self._attach,
                "detach": self._detach,
                "recheck": self._recheck,
                "status": self._status,
                "metrics": self._metrics,
                "stop": self._stop,
            },
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; then all keys are forgotten and all devices given back.

        Raises:
            Busy: another process serves this directory.
            StorageFailed: the socket cannot be made.
        """
        with _locked(self._run_dir / LOCK_NAME):
            bound = self.control.bind()
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self.control.run, bound)
                task_status.started()

    def attachments(self) -> list[Attachment]:
        """Return all attachments, also those that have stopped."""
        return [attachment for attachment in self._places.values() if attachment]

    async def _attach(self, document: Document) -> Document:
        request = Request.parse(document)
        if self.stop_wanted.is_set():
            raise NotFound(self.control.path, "nobody answers: the service is ending")
        place = (request.vm, request.device)
        there = self._places.get(place)
        if place in self._places and (there is None or there in self._tasks):
            raise Busy(request.name, "is attached already; a device has one place on one network")
        if there is None and len(self._places) >= ATTACHMENTS_MAX:
            raise Busy(request.name, f"{ATTACHMENTS_MAX} devices are attached, and no more can be")
        self._places[place] = None
        try:
            attachment = await self._make(request)
        except BaseException:
            del self._places[place]
            if there is not None:
                self._places[place] = there
            raise
        self._places[place] = attachment
        self._tasks[attachment] = _Task()
        assert self._nursery is not None
        self._nursery.start_soon(self._run_one, attachment)
        log.info("%s: attached to network %s", attachment.name, attachment.network)
        return {"attachment": attachment.status()}

    async def _make(self, request: Request) -> Attachment:
        grant = await self._granted(request)
        with contextlib.ExitStack() as undo:
            undo.callback(self._grants.release, request.vm, request.device)
            undo.callback(grant.wipe)
            port = request.open_port()
            undo.callback(port.close)
            link = request.open_link()
            undo.callback(link.close)
            keys = request.open_kernel(grant.sci)
            if keys is not None:
                undo.callback(keys.close)
            attachment = Attachment(
                request.name, grant, port, link, request.peers,
                still_allowed=partial(
                    self._grants.still_allowed, request.network, request.vm, request.device
                ),
                kernel=keys, **self._options,
            )  # fmt: skip
            undo.pop_all()
        return attachment

    async def _granted(self, request: Request) -> Grant:
        opened = []
        try:
            for name, pin in request.pins.items():
                await self._grants.unlock(name, pin)
                opened.append(name)
            return await self._grants.grant(request.network, request.vm, request.device)
        finally:
            for pin in request.pins.values():
                pin[:] = bytes(len(pin))
            with trio.CancelScope(shield=True):
                for name in opened:
                    await self._grants.lock(name)

    async def _run_one(self, attachment: Attachment) -> None:
        task = self._tasks[attachment]
        try:
            with task.scope:
                await attachment.run()
        except Exception:
            attachment.state = "failed: internal error; see the log"
            log.exception("%s: stopped by an internal error", attachment.name)
        finally:
            self._grants.release(attachment.vm, attachment.device)
            del self._tasks[attachment]
            task.ended.set()

    async def _detach(self, document: Document) -> Document:
        name = str(document.get("name"))
        for place, attachment in self._places.items():
            if attachment is not None and attachment.name == name:
                task = self._tasks.get(attachment)
                if task is not None:
                    task.scope.cancel()
                    await task.ended.wait()
                del self._places[place]
                log.info("%s: detached", name)
                return {}
        raise NotFound(name, "is not attached; VM and device are meant, as web1/0")

    async def _recheck(self, document: Document) -> Document:
        for attachment in self._tasks:
            attachment.recheck()
        return {}

    async def _status(self, document: Document) -> Document:
        found = [attachment.status() for attachment in self.attachments()]
        return {"state": self._state, "attachments": found}

    async def _stop(self, document: Document) -> Document:
        if self._places:
            raise Busy(self.control.path, f"{len(self._places)} devices are attached")
        self.stop_wanted.set()
        return {}

    async def _metrics(self, document: Document) -> Document:
        return {"text": prometheus(attachment.status() for attachment in self.attachments())}


def serve(
    grants: Grants,
    run_dir: Path | None = None,
    *,
    state: str = "",
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve in this process until SIGTERM or SIGINT, or until it is told to stop.

    Raises:
        Busy: another process serves this directory.
        StorageFailed: the socket cannot be made.
    """
    harden()
    trio.run(_serve, Service(grants, run_dir, state=state), on_ready)


async def _serve(service: Service, on_ready: Callable[[], None] | None) -> None:
    with _first_of_group(), trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            nursery.start_soon(_end_when_told, service, nursery.cancel_scope)
            if on_ready is not None:
                on_ready()
            async for _ in signals:
                nursery.cancel_scope.cancel()


async def _end_when_told(service: Service, scope: trio.CancelScope) -> None:
    await service.stop_wanted.wait()
    await service.control.drained()
    scope.cancel()


@contextlib.contextmanager
def _first_of_group() -> Iterator[None]:
    """Raise what a nursery put into a group of one."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException = group
        while isinstance(found, BaseExceptionGroup) and len(found.exceptions) == 1:
            found = found.exceptions[0]
        raise found from None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise StorageFailed(path, exc.strerror or str(exc)) from exc
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(path.parent / SOCKET_NAME, "another process serves it") from None
        yield
    finally:
        os.close(lock)
