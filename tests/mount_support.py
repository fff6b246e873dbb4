"""What the live tests of the mount share: a tiny key service, a fake image, and a running mount.

`TinyKeys` stands in for the key service: derived keys, the real registry under a known key. So
these tests need no TPM. `FakeImage` is a disk in memory with the image's interface, for tests and
measurements of the lane alone. Run as a program, this module serves a mount in the foreground.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sealfs.errors import KeyRefused
from sealfs.image.format import Anchor
from sealfs.image.layout import BLOCK_SIZE
from sealfs.image.reader import SEND_BLOCKS_MAX, SENT, UNSURE
from sealfs.keys import ledger as ledgers
from sealfs.keys.ledger import Ledger
from sealfs.keys.registry import Registry, RegistryFile
from sealfs.keys.statedir import LEDGER_FILE, REGISTRY_FILE, ImageLock, StateDir
from sealfs.keys.vmkey import IMAGE_KEY_SIZE, NewImageKey

ROOT = Path(__file__).resolve().parent.parent
DEADLINE = 30.0  # seconds for whatever should take a moment


# A key service without a TPM.


_KEY = b"tests" * 8


@contextlib.contextmanager
def _lend_key(info: bytes) -> Iterator[bytearray]:
    yield bytearray(_KEY)


class TinyVmKey:
    def __init__(self, kmi: str, key: bytes) -> None:
        self.kmi = kmi
        self.recovery_slots: tuple[bytes, ...] = ()
        self._key = key

    def __enter__(self) -> TinyVmKey:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wrap_image_key(self, uuid: bytes, key: bytes | bytearray) -> bytes:
        return AESGCM(self._key).encrypt(bytes(12), bytes(key), uuid)

    def unwrap_image_key(self, uuid: bytes, wrapped: bytes) -> bytearray:
        return bytearray(AESGCM(self._key).decrypt(bytes(12), wrapped, uuid))


class TinyCounter:
    """A counter in a file, as a TPM has it in its own memory."""

    def __init__(self, state: Path) -> None:
        self._path = state / "counter"

    def read(self, held: Any) -> int:
        return int(self._path.read_text()) if self._path.exists() else 0

    def increment(self, held: Any) -> None:
        self._path.write_text(str(self.read(held) + 1))


class TinyKeys:
    """The key service's interface; a VM id listed in `refused` gets no key."""

    def __init__(self, state: Path, name_of: Any = None) -> None:
        self._state = state
        self._pins: dict[str, bytes] = {}
        kept = self._kept = StateDir.create(state)
        self.ledger = Ledger(
            kept, bytes(16), counter=TinyCounter(state), subkey=_lend_key, subject="ledger"
        )
        self.registry = Registry(kept, bytes(16), _lend_key, self.ledger, name_of=name_of)
        with kept.lock() as held:
            if not (state / LEDGER_FILE).exists():
                kept.write(LEDGER_FILE, ledgers.new(bytes(16), 0, {}, _KEY), held)
            if not (state / REGISTRY_FILE).exists():
                none = RegistryFile(bytes(16), ()).with_mac(_KEY)
                kept.write(REGISTRY_FILE, none.encode(), held)

    def unseal(self, kmi: str, vm_id: str) -> TinyVmKey:
        if (self._state / "bug").exists():
            raise ValueError("a bug of the key service")
        refused = self._state / "refused"
        if refused.exists() and vm_id in refused.read_text().split():
            raise KeyRefused(vm_id, "revoked")
        return TinyVmKey(kmi, hmac.digest(b"tests", kmi.encode(), hashlib.sha256))

    def image_key(self, kmi: str, vm_id: str, image_uuid: bytes, wrapped: bytes) -> bytearray:
        with self.unseal(kmi, vm_id) as vm_key:
            return vm_key.unwrap_image_key(image_uuid, wrapped)

    def new_image_key(self, vm_id: str, image_uuid: bytes) -> NewImageKey:
        with self.unseal(vm_id, vm_id) as vm_key:
            key = bytearray(os.urandom(IMAGE_KEY_SIZE))
            return NewImageKey(key, vm_id, vm_key.wrap_image_key(image_uuid, key), ())

    def lock_image(self, subject: object, uuid: bytes, *, shared: bool) -> ImageLock:
        return self._kept.lock_image(subject, uuid, shared=shared)

    def unlock(self, vm_id: str, pin: bytearray) -> None:
        self._pins[vm_id] = bytes(pin)

    def lock(self, vm_id: str) -> bool:
        return self._pins.pop(vm_id, None) is not None

    def unlocked(self) -> list[str]:
        return list(self._pins)

    @property
    def state_path(self) -> Path:
        return self._state.resolve()

    def close(self) -> None:
        pass


def seal_new(state: Path, path: Path, *, vm_id: str, size: int) -> None:
    """Make a registered sealed image at `path`."""
    from sealfs.image.cache import BlockCache
    from sealfs.image.image import SealedImage
    from sealfs.mount.names import Ownership
    from sealfs.mount.opener import Opener

    opener = Opener(TinyKeys(state), BlockCache(4 << 20, 4 << 20), read_only=False)
    opener.create(path, vm_id, Ownership(uid=0, gid=0, mode=0o600))
    image = opened_by(opener, path)
    assert isinstance(image, SealedImage)
    image.resize(size)
    image.close()
    opener.note({image.uuid: image.progress})


def open_offline(state: Path, path: Path, registered: Path | None = None) -> Any:
    """Open a sealed image outside any mount, with recovery; `registered` is its real path."""
    from sealfs.image.cache import BlockCache
    from sealfs.mount.opener import Opener

    keys = TinyKeys(state)
    if registered is not None:
        entry = keys.registry.lookup(registered)
        keys.registry.add(path, entry.image_uuid, entry.vm_id)
    # Tests open copies beside the image itself.
    keys.lock_image = lambda *_, **__: ImageLock(-1)  # type: ignore[method-assign]
    return opened_by(Opener(keys, BlockCache(4 << 20, 4 << 20), read_only=False), path)


def opened_by(opener: Any, path: Path) -> Any:
    """Open an image and let go of the lock on its uuid: tests open copies beside it."""
    opened = opener.open(path)
    opened.lock.close()
    return opened.image


# A disk in memory with the image's interface.


class FakeImage:
    def __init__(self, path: Path, size: int) -> None:
        self.path = str(path)
        self.size = size
        self.uuid = bytes(16)
        self.is_dirty = False
        self.poisoned = None
        self.is_quick_to_flush = self.is_rekeying = self.wants_retirement = False
        self.read_only = False
        self.progress = Anchor(0, bytes(16))
        self.oldest_dirty = None
        self.dirty_size = 0
        self.needs_checkpoint = self.wants_checkpoint = False
        self._data = bytearray(size)
        self._view = memoryview(self._data)

    def try_read(self, offset: int, size: int) -> Any:
        return self._view[offset : min(offset + size, self.size)]

    def try_write(self, offset: int, data: Any) -> bool:
        self._view[offset : offset + len(data)] = data
        return True

    def send_blocks(self, offset: int, size: int, outbox: Any, header: bytes) -> int:
        if offset + size > self.size:
            return UNSURE
        outbox.put(header, self._view[offset : offset + size])
        return SENT

    def plan_read(self, offset: int, size: int) -> Any:
        if offset + size > self.size:
            return None

        def fetch(view: memoryview, may_wait: bool) -> bool:
            view[:] = self._view[offset : offset + size]
            return True

        return fetch

    def taker(self) -> None:
        return None

    def quick(self) -> FakeImage:
        return self

    def answer(self, offset: int, size: int, outbox: Any, header: bytes) -> bool:
        if not size or (offset | size) % BLOCK_SIZE or size > SEND_BLOCKS_MAX * BLOCK_SIZE:
            return False
        return self.send_blocks(offset, size, outbox, header) == SENT

    def read_steps(self, offset: int, size: int) -> Any:
        return (yield lambda: bytes(self._view[offset : min(offset + size, self.size)]))

    def write_steps(self, offset: int, data: Any) -> Any:
        yield lambda: None
        return self.try_write(offset, data)

    def _nothing(self, *_: Any) -> Any:
        yield lambda: None

    flush_steps = checkpoint_steps = close_steps = preallocate_steps = _nothing

    def discard_steps(self, offset: int, size: int) -> Any:
        yield lambda: None
        self._view[offset : offset + size] = bytes(size)

    def seek_steps(self, offset: int, whence: int) -> Any:
        yield lambda: None
        if offset >= self.size:
            return None
        return offset if whence == os.SEEK_DATA else self.size

    def remembering(self, state: Any) -> None:
        pass

    remembered = remembering

    def status(self) -> dict[str, Any]:
        return {"size": self.size}


class FakeKeys:
    state_path = Path("/nonexistent")

    def unlocked(self) -> list[str]:
        return []


class FakeOpener:
    def __init__(self, size: int) -> None:
        self._size = size
        self.keys = FakeKeys()

    def open(self, path: Path) -> Any:
        fd = os.open(path, os.O_RDONLY)
        return FakeImage(path, self._size), path.stem, fd, None

    def note(self, images: Any) -> None:
        pass

    def bump(self) -> None:
        pass

    def vm_id_of(self, path: Path) -> str:
        return path.stem

    def size_of(self, path: Path, status: os.stat_result) -> int:
        return self._size


# A mount that runs in its own process.


@dataclass
class Mounted:
    source: Path
    mountpoint: Path
    state: Path
    run_dir: Path
    log: Path
    process: subprocess.Popen[bytes]

    def log_text(self) -> str:
        return self.log.read_text()

    def status(self) -> dict[str, Any]:
        from sealfs.mount.control import find_mount

        found = find_mount(self.mountpoint, self.run_dir)
        assert found is not None
        return found.status

    def kill(self) -> None:
        """Kill -9 the daemon and take the dead mount away."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        subprocess.run(["umount", "-l", str(self.mountpoint)], check=True)

    def unmount(self) -> None:
        from sealfs.mount.session import unmount

        unmount(self.mountpoint, run_dir=self.run_dir)
        assert self.process.wait(DEADLINE) == 0


@contextlib.contextmanager
def mounted(
    source: Path,
    mountpoint: Path,
    *,
    options: str = "",
    fake: int = 0,
    helper: bool = False,
    traceback_expected: bool = False,
) -> Iterator[Mounted]:
    """Serve `source` at `mountpoint` by a process of its own; unmounted afterwards."""
    base = source.parent
    mountpoint.mkdir(exist_ok=True)
    log = base / f"{mountpoint.name}.log"
    log.unlink(missing_ok=True)
    arguments = [
        sys.executable, "-m", "tests.mount_support", str(source), str(mountpoint),
        "--state", str(base / "state"), "--run-dir", str(base / "run"), "--log", str(log),
        "-o", options, "--fake", str(fake),
        *(["--helper"] if helper else []),
    ]  # fmt: skip
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == b"ready\n", (log.read_text() if log.exists() else "", line)
        yield Mounted(source, mountpoint, base / "state", base / "run", log, process)
    finally:
        is_up = process.poll() is None
        if is_up:
            subprocess.run(["umount", str(mountpoint)], check=False, capture_output=True)
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                process.wait(DEADLINE)
        if process.stdout is not None:
            process.stdout.close()
        if _is_mounted(mountpoint):
            subprocess.run(["umount", "-l", str(mountpoint)], check=False)
    text = log.read_text()
    assert ("Traceback" in text) == traceback_expected, text
    crashes = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS)
    assert not (is_up and process.returncode in crashes), "the daemon crashed at its end"


def _is_mounted(mountpoint: Path) -> bool:
    from sealfs.mount.kernel import mounted_at

    return mounted_at(str(mountpoint)) is not None


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"timed out: {what}"
        time.sleep(0.01)


def main() -> int:
    from sealfs.image.cache import BlockCache
    from sealfs.keys.hardening import harden
    from sealfs.mount import daemon, kernel, session
    from sealfs.mount.options import MountOptions

    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("mountpoint", type=Path)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("-o", dest="options", default="")
    parser.add_argument("--fake", type=int, default=0)
    parser.add_argument("--helper", action="store_true", help="mount as an ordinary user does")
    chosen = parser.parse_args()
    options = MountOptions.parse(chosen.options, is_root=os.geteuid() == 0)

    def ready() -> None:
        print("ready", flush=True)

    source, mountpoint = session.check_places(chosen.source, chosen.mountpoint)
    daemon.set_up_log(foreground=False, file=chosen.log, verbose=1)
    harden()
    if chosen.helper:
        kernel.mount = kernel.mount_by_helper
    cache = BlockCache(clean_max=options.cache_size, dirty_max=options.dirty_size)
    opener: Any
    if chosen.fake:
        opener = FakeOpener(chosen.fake)
    else:
        from sealfs.keys.remote import RemoteKeys
        from sealfs.mount.opener import Opener

        keys: Any = TinyKeys(chosen.state) if options.keyd is None else None
        if keys is None:
            keys = RemoteKeys.open(Path(options.keyd or ""))
        opener = Opener(keys, cache, read_only=options.read_only)
    return session.serve_mount(
        source, mountpoint, options=options, opener=opener, cache=cache,
        run_dir=chosen.run_dir, ready=ready,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
