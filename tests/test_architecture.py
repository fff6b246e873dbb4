"""The rules of the house, by syntax tree: who imports whom, and who may touch what.

cli -> mount, net -> image, keys -> errors; image and keys do not know each other. Operating system,
event loop, TPM and cipher each have their owners, so that the rest can be tested without them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sealfs"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT = {
    "errors": set(),
    "control": {"errors"},
    "image": {"image", "errors"},
    "keys": {"keys", "errors"},
    "mount": {"mount", "control", "image", "keys", "errors"},
    "net": {"net", "control", "keys", "errors"},
    "cli": {"cli", "mount", "net", "control", "image", "keys", "errors"},
}
DIRECTION = (
    "cli -> mount, net; both -> control, keys; mount -> image; all -> errors; "
    "image and keys do not import each other, nor do mount and net"
)

# Library -> the rooms or modules that own it, and why nobody else may have it.
OWNERS: dict[str, tuple[tuple[str, ...], str]] = {
    "pyfuse3": (
        ("mount/namespace", "mount/files", "mount/attributes", "mount/session"),
        "pyfuse3 ends where the namespace ends; lane and images know nothing of it",
    ),
    "trio": (("mount", "net", "control"),
             "the event loop is the daemons'; image and keys are plain calls"),
    "tpm2_pytss": (("keys/tpm", "keys/tpm_context", "keys/tpm_duplicate", "keys/tpm_policies",
                    "keys/tpm_templates", "keys/tpm_errors"),
                   "one place speaks to the TPM"),
    "cryptography": (("image/cipher", "image/blockseal", "keys", "net/cipher", "net/noise"),
                     "bytes are sealed in one place, keys in one room"),
    "click": (("cli",), "arguments are the command line's"),
    "rich": (("cli/output",), "what is drawn on a terminal is drawn in one module"),
    "ctypes": (("image/storage", "mount/kernel", "mount/lane", "mount/relay",
                "mount/protocol", "keys/hardening"),
               "system calls that Python lacks stay where the kernel is spoken to"),
    "subprocess": (("cli", "keys/swtpm", "mount/kernel", "net/kernel"),
                   "few places start programs"),
    "fcntl": (("image/storage", "keys/statedir", "keys/swtpm", "keys/broker", "keys/keyd_wire",
               "cli/newborn", "cli/sealed",
               "cli/sealing", "mount", "net/port", "net/link", "net/service"),
              "locks are taken where files are owned"),
}  # fmt: skip

# What a pure module may not have: it takes bytes and returns bytes.
IMPURE = {"os", "io", "time", "random", "secrets", "socket", "threading", "logging", "pathlib",
          "subprocess", "fcntl", "ctypes", "mmap", "tempfile", "shutil", "signal", "trio",
          "select"}  # fmt: skip
PURE = {
    "errors": "exceptions carry facts",
    "image/layout": "arithmetic",
    "image/format": "bytes to records and back",
    "image/plan": "writes as data",
    "image/steps": "generators",
    "image/tree": "the tree is driven by its volume",
    "image/journal": "records are scanned from bytes that others read",
    "image/rebuild": "pages are read by who calls it",
    "image/allocator": "slots are numbers",
    "image/check": "reads through the volume's storage",
    "keys/policy": "digests in software",
    "keys/records": "bytes to records and back",
    "keys/hostrecord": "bytes to records and back",
    "keys/recovery": "keys come in as arguments",
    "keys/pin": "text to bytes",
    "keys/protection": "what is asked for",
    "keys/signed": "bytes to signed policies and back; keys come in as arguments",
    "keys/software": "the subkey comes in as an argument",
    "keys/tombstone": "bytes to records and back",
    "keys/wire": "bytes",
    "keys/labels": "constants",
    "cli/arguments": "texts to values",
    "net/frame": "bytes to fields and back",
    "net/window": "numbers",
    "net/noise": "keys come in as arguments",
    "net/handshake": "bytes to records and back; keys come in as arguments",
    "net/association": "time and randomness come in, frames go out",
    "net/learned": "a table",
    "net/outbox": "arithmetic",
    "net/counters": "numbers to texts",
    "net/labels": "constants",
}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Return (line, module) of every import, those for type checking only left out."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            found.append((node.lineno, node.module or ""))
            found.extend((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    name = name_of(path)
    room = name.split("/")[0]
    if room == "__init__":
        return
    assert room in MAY_IMPORT, f"{name}: a new room needs its line here and in the design"
    for line, module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "sealfs" or len(parts) < 2 or parts[1] == "__version__":
            continue
        assert parts[1] in MAY_IMPORT[room], f"{name}:{line} imports {module}: {DIRECTION}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_libraries_have_owners(path: Path) -> None:
    name = name_of(path)
    for line, module in imports_of(path):
        library = module.split(".")[0]
        owners, reason = OWNERS.get(library, ((), ""))
        if owners:
            is_owner = any(name == owner or name.startswith(f"{owner}/") for owner in owners)
            assert is_owner, f"{name}:{line} imports {module}: {reason}; owners are {owners}"


@pytest.mark.parametrize("name", sorted(PURE))
def test_pure_modules_stay_pure(name: str) -> None:
    for line, module in imports_of(PACKAGE / f"{name}.py"):
        assert module.split(".")[0] not in IMPURE, (
            f"{name}:{line} imports {module}, but it is pure ({PURE[name]}): I/O, clock and "
            "randomness come in as arguments"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_states_its_charter(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} says not what it does"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_a_grab_bag(path: Path) -> None:
    assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, path
