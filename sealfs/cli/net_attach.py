"""`net attach`, `net detach` and `net status`: a VM's network device, and the network service.

One process of the host serves all attachments: the first `attach` starts it, and it ends when
nothing is attached any more. Commands ask it over its control socket and hold no key of their own.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sealfs.cli import asked, interrupts
from sealfs.cli.asked import pin_file_option
from sealfs.cli.errors import Interrupted
from sealfs.cli.net import SOCKET, VM, net_command
from sealfs.cli.output import print_json, print_table, printable, size_text
from sealfs.cli.settings import PATH, Settings, common_options
from sealfs.control import call, run_directory
from sealfs.errors import Busy, KeyRefused, NotFound, PinNeeded, StorageFailed, UsageError
from sealfs.keys.records import DEVICE_MAX
from sealfs.keys.vmkey import wipe
from sealfs.mount import daemon

if TYPE_CHECKING:
    from sealfs.net.grants import Keys

START_WAIT_S: Final = 10.0
WATCH_S: Final = 1.0
UNIX: Final = "unix:"

DEVICE_INDEX = click.option(
    "--device-index",
    "index",
    type=click.IntRange(0, DEVICE_MAX),
    default=0,
    show_default=True,
    metavar="N",
    help="Which network device of the VM, from 0.",
)
RUN_DIR = click.option(
    "--run-dir",
    type=PATH,
    metavar="DIR",
    help="Where the network service's socket is; else /run/sealfs.",
)


@net_command.command("attach", short_help="Attach a VM's network device to a network.")
@VM
@click.option("--net", "network", required=True, metavar="NET-ID", help="The network.")
@DEVICE_INDEX
@click.option("--qemu", metavar="unix:PATH", help="A socket for QEMU's `-netdev dgram`.")
@click.option("--tap", metavar="NAME", help="A TAP device: libvirt, containers, any hypervisor.")
@click.option("--listen", metavar="ADDRESS:PORT", help="UDP: this host's end.")
@click.option("--device", metavar="NAME", help="Raw Ethernet by this device, without UDP.")
@click.option(
    "--peer",
    "peers",
    multiple=True,
    required=True,
    metavar="ADDRESS:PORT",
    help="Another host's end (raw Ethernet: its device's address); may be repeated.",
)
@click.option(
    "--backend",
    type=click.Choice(["userspace", "kernel"]),
    default="userspace",
    show_default=True,
    help="Who seals frames: this service, or the kernel's MACsec (raw Ethernet); --tap names the "
    "device that the kernel makes then.",
)
@click.option(
    "--keyd",
    is_flag=False,
    flag_value="",
    metavar="[SOCKET]",
    help="Have keys come from `sealfs keyd`, for a service that is started now.",
)
@click.option("-f", "--foreground", is_flag=True, help="Stay while it is attached; then detach it.")
@click.option("--log", "log_file", type=PATH, metavar="FILE", help="Log of a service started now.")
@RUN_DIR
@common_options
@pin_file_option
def attach_device(
    settings: Settings,
    vm: str,
    network: str,
    index: int,
    qemu: str | None,
    tap: str | None,
    listen: str | None,
    device: str | None,
    peers: tuple[str, ...],
    backend: str,
    keyd: str | None,
    foreground: bool,
    log_file: Path | None,
    run_dir: Path | None,
) -> int:
    """Attach a network device of a VM to a network; returns when the VM may use it.

    Every frame that leaves the VM is sealed for the peers, every frame that comes from them is
    verified and opened (IEEE 802.1AE, MACsec); anything else is dropped and counted. Prints what
    the hypervisor is to be told. The VM must be allowed on the network (`net allow`).

    The other ends of a network are named on each host. An end answers whoever is on the network,
    from the addresses that it was told.
    """
    settings.situation.network = network
    service = _Service(settings, run_dir)
    request: dict[str, Any] = {
        "vm": vm,
        "network": network,
        "device": index,
        "port": _port(qemu, tap),
        "link": _one("--listen", listen, "--device", device, ("listen", "device")),
        "peers": list(peers),
        "backend": backend,
    }
    found = service.attached(request, keyd, log_file)
    lines = _for_hypervisor(found, backend)
    if settings.json:
        print_json({"attachment": found, "hypervisor": lines})
    else:
        print(f'{printable(str(found["name"]))} on "{network}": the guest\'s MTU is {found["mtu"]}')
        for line in lines:
            print(f"    {printable(line)}")
    return service.watch(str(found["name"])) if foreground else 0


@net_command.command("detach")
@VM
@DEVICE_INDEX
@RUN_DIR
@common_options
def detach_device(settings: Settings, vm: str, index: int, run_dir: Path | None) -> None:
    """Detach a network device of a VM: nothing passes any more, in either direction."""
    service = _Service(settings, run_dir)
    try:
        service.detach(f"{vm}/{index}")
    except NotFound:
        raise NotFound(f"{vm}/{index}", "is not attached on this host") from None
    if settings.json:
        print_json({"detached": f"{vm}/{index}"})


@net_command.command("status")
@click.option("--prometheus", is_flag=True, help="As metrics, for Prometheus to scrape.")
@RUN_DIR
@common_options
def show_status(settings: Settings, prometheus: bool, run_dir: Path | None) -> None:
    """Show what is attached on this host: peers, traffic, and what was dropped."""
    service = _Service(settings, run_dir)
    if prometheus:
        with contextlib.suppress(NotFound):
            print(service.call("metrics")["text"], end="")
        return
    attachments = service.attachments()
    if settings.json:
        print_json(attachments)
        return
    print_table(
        ("DEVICE", "NETWORK", "STATE", "PEERS UP", "SENT", "RECEIVED", "DROPPED", "MTU"),
        [_row(one) for one in attachments],
    )


class _Service:
    """The network service of this host, as a command talks to it."""

    def __init__(self, settings: Settings, run_dir: Path | None) -> None:
        self._settings = settings
        self._run_dir = run_directory() if run_dir is None else run_dir.absolute()
        self.socket = self._run_dir / SOCKET

    def call(self, verb: str, **arguments: object) -> dict[str, Any]:
        """Ask it. Raises NotFound: there is none; and what it raises."""
        return call(self.socket, verb, **arguments)

    def attachments(self) -> list[dict[str, Any]]:
        """Return what is attached; nothing where no service runs."""
        try:
            return list(self.call("status")["attachments"])
        except NotFound:
            return []

    def start(self, keyd: str | None, log_file: Path | None) -> None:
        """Start it, unless it runs.

        Raises:
            Busy: it serves another state directory.
            KeyServiceError, UsageError: it cannot be started.
        """
        state = str(self._settings.state.resolve())
        deadline = time.monotonic() + START_WAIT_S
        while True:
            try:
                served = self.call("status")["state"]
            except NotFound:
                if time.monotonic() > deadline:
                    raise
            else:
                if served != state:
                    raise Busy(self.socket, f'serves the state directory "{served}"')
                return
            try:
                self._start(state, keyd, log_file)
            except Busy:
                time.sleep(0.05)  # another command is starting it, or it is just ending

    def _start(self, state: str, keyd: str | None, log_file: Path | None) -> None:
        open_keys = _opener(self._settings, keyd)
        log_file = None if log_file is None else log_file.absolute()
        verbose = max(1, self._settings.verbose)

        def serve(ready: Callable[[], None]) -> int:
            from sealfs.net import service
            from sealfs.net.grants import KeyServiceGrants

            daemon.set_up_log(
                foreground=False, file=log_file, fallback=self._run_dir / "net.log", verbose=verbose
            )
            with contextlib.closing(open_keys()) as keys:
                grants = KeyServiceGrants(keys)
                service.serve(grants, self._run_dir, state=state, on_ready=ready)
            return 0

        interrupts.uninstall()
        try:
            daemon.detach(self.socket, serve)
        finally:
            interrupts.install()

    def attached(
        self, request: dict[str, Any], keyd: str | None, log_file: Path | None
    ) -> dict[str, Any]:
        """Attach a device, by a service that is started if need be; return its status.

        Raises:
            As `start`, and what the service raises.
        """
        for is_last in (False, False, True):
            self.start(keyd, log_file)
            try:
                return self._attach(request)
            except (NotFound, StorageFailed) as error:
                # It ended just now, with what was attached last.
                if is_last or error.subject != str(self.socket):
                    raise
        raise AssertionError("the last one returns or raises")

    def _attach(self, request: dict[str, Any]) -> dict[str, Any]:
        """Attach a device, with PINs where its keys take some."""
        pins: dict[str, bytearray] = {}
        try:
            while True:
                texts = {name: pin.decode() for name, pin in pins.items()}
                try:
                    answer = self.call("attach", **request, pins=texts)
                except PinNeeded as error:
                    if error.subject in pins:
                        raise
                    pins[error.subject] = self._pin(error.subject, str(request["vm"]), error)
                else:
                    return dict(answer["attachment"])
        except BaseException:
            self.stop()
            raise
        finally:
            for pin in pins.values():
                wipe(pin)

    def detach(self, name: str) -> None:
        """Detach a device; the service ends with the last one."""
        self.call("detach", name=name)
        self.stop()

    def stop(self) -> None:
        """End the service, unless something is attached."""
        with contextlib.suppress(Busy, NotFound, StorageFailed):
            self.call("stop")

    def watch(self, name: str) -> int:
        """Return when a device is no longer attached; detach it when interrupted.

        Raises:
            KeyRefused: the VM is no longer allowed.
            StorageFailed: it failed, or the service ended.
        """
        try:
            while True:
                time.sleep(WATCH_S)
                try:
                    found = self.call("status")["attachments"]
                except NotFound:
                    if not self.socket.exists():
                        return 0  # it ended as it should, with its last attachment
                    raise StorageFailed(name, "the network service died") from None
                state = next((one["state"] for one in found if one["name"] == name), None)
                if state is None:
                    return 0
                if state == "revoked":
                    self.detach(name)
                    raise KeyRefused(name, "is no longer allowed on its network: it was cut off")
                if str(state).startswith("failed"):
                    self.detach(name)
                    raise StorageFailed(name, str(state))
        except (Interrupted, KeyboardInterrupt):
            with contextlib.suppress(NotFound):
                self.detach(name)
            return 0

    def _pin(self, name: str, vm: str, error: PinNeeded) -> bytearray:
        settings = self._settings
        if settings.pin_file is not None and name == vm:
            return settings.ask_pin(name)
        if not sys.stdin.isatty():
            raise error
        return asked.pin(f"PIN of {name}", None)


def _opener(settings: Settings, keyd: str | None) -> Callable[[], Keys]:
    """Return what opens the service's key service: its own, or keyd.

    Opened and closed once: a host that is not set up is told here, not by a daemon.
    """
    state = settings.state.absolute()  # a daemon's working directory is the root
    opener: Callable[[], Any]
    if keyd is None:
        from sealfs.keys.service import KeyService

        opener = partial(KeyService.open, state, tpm=settings.tpm)
    else:
        from sealfs.keys.keyd_wire import SOCKET_NAME
        from sealfs.keys.remote import RemoteKeys

        opener = partial(RemoteKeys.open, Path(keyd).absolute() if keyd else state / SOCKET_NAME)
    opener().close()
    return opener


def _port(qemu: str | None, tap: str | None) -> dict[str, str]:
    if qemu is not None:
        path = qemu.removeprefix(UNIX)
        if not qemu.startswith(UNIX) or not path:
            raise UsageError("--qemu", f'is "unix:" and a path, not "{qemu}"')
        qemu = str(Path(path).absolute())
    return _one("--qemu", qemu, "--tap", tap, ("qemu", "tap"))


def _one(
    one: str, this: str | None, other: str, that: str | None, names: tuple[str, str]
) -> dict[str, str]:
    """Return whichever of two options was given, by its name on the control socket."""
    if this is not None and that is None:
        return {names[0]: this}
    if that is not None and this is None:
        return {names[1]: that}
    raise UsageError("net attach", f"takes {one} or {other}: one of them")


def _for_hypervisor(found: dict[str, Any], backend: str) -> list[str]:
    """Return what the hypervisor is to be told of an attachment.

    The guest's address is that of the identifier it sends under: one for each device of each VM.
    """
    mtu, address = found["mtu"], bytes.fromhex(found["sci"])[:6].hex(":")
    place = str(found["port"])
    if place.startswith("/"):
        ends = ("local.type=unix", f"local.path={place}.qemu", "remote.type=unix",
                f"remote.path={place}")  # fmt: skip
        number = f"sealfs{found['device']}"
        return [
            f"-netdev {shlex.quote(','.join(('dgram', f'id={number}', *ends)))}",
            f"-device virtio-net-pci,netdev={number},mac={address},host_mtu={mtu}",
        ]
    if backend == "kernel":
        return [f"ip link set {shlex.quote(place)} master BRIDGE"]
    # sealfs holds the TAP's one file: a guest gets the device itself, by a macvtap.
    return [
        f"<interface type='direct'><mac address='{address}'/>"
        f"<source dev='{place}' mode='passthrough'/><model type='virtio'/></interface>",
    ]


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    peers = found["peers"]
    up = sum(peer["state"] == "up" for peer in peers)
    dropped = sum(found["drops"].values()) + sum(sum(peer["drops"].values()) for peer in peers)
    return (
        str(found["name"]),
        str(found["network"]),
        str(found["state"]),
        f"{up} of {len(peers)}",
        size_text(sum(peer["bytes_out"] for peer in peers)),
        size_text(sum(peer["bytes_in"] for peer in peers)),
        str(dropped),
        str(found["mtu"]),
    )
