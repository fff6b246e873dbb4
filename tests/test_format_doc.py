"""FORMAT.md's tables against the structs of `sealfs.image.format`: neither may drift alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sealfs.image import format as image_format

DOCUMENT = Path(image_format.__file__).with_name("FORMAT.md")
HEADER = "| Offset | Size | Type | Field | Meaning |"
SIZES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
IN_THE_TEXT = {"Node page", "Identity"}
"""Node page: columns, their sizes follow the fanout. Identity: its last row has no fixed size."""


def sections() -> dict[str, list[str]]:
    """Return the lines under each heading, by title without its number."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in DOCUMENT.read_text().splitlines():
        heading = re.fullmatch(r"#+ (?:[\d.]+ )?(.*)", line)
        if heading:
            title = heading[1]
        found.setdefault(title, []).append(line)
    return found


def table(lines: list[str]) -> list[tuple[str, str, str, str]]:
    """Return (offset, size, type, field) of each row of the one table in these lines."""
    start = lines.index(HEADER)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        assert len(cells) == 5, line
        rows.append((cells[0], cells[1], cells[2], cells[3]))
    assert HEADER not in lines[start + 1 :], "a section has two tables"
    return rows


def fixed(name: str) -> list[tuple[str, int, int]]:
    """Return (field, offset, size) of the rows whose size is a number."""
    return [(f, int(o), int(s)) for o, s, _, f in table(sections()[name]) if s.isdigit()]


@pytest.mark.parametrize("name", sorted(image_format.LAYOUTS))
def test_the_code_has_the_fields_offsets_and_sizes_of_the_document(name: str) -> None:
    assert [tuple(row) for row in image_format.LAYOUTS[name]] == fixed(name)


def test_every_table_of_the_document_is_held_against_code() -> None:
    with_table = {name for name, lines in sections().items() if HEADER in lines}
    assert with_table - {"Node page"} == set(image_format.LAYOUTS)


@pytest.mark.parametrize("name", sorted(image_format.LAYOUTS))
def test_a_table_has_no_gap_and_types_fit_their_sizes(name: str) -> None:
    at = 0
    for offset, size, kind, field in table(sections()[name]):
        assert int(offset) == at, f"{name}.{field}"
        if not size.isdigit():
            assert name in IN_THE_TEXT
            break
        at += int(size)
        assert SIZES.get(kind, int(size)) == int(size), f"{name}.{field}"


def test_the_superblock_is_one_sector_and_its_mac_is_last() -> None:
    rows = fixed("Superblock")
    assert rows[-1] == ("mac", 480, 32)


def test_node_columns_follow_each_other() -> None:
    at = 0
    for offset, size, _, _ in table(sections()["Node page"]):
        value = 0 if offset == "0" else int(offset.removesuffix(" F"))
        assert value == at
        at += 1 if size == "F" else int(size.removesuffix(" F"))
    assert at * 136 <= 4096, "F = 128 must fit into a page"


def test_magics_are_those_of_the_document() -> None:
    text = DOCUMENT.read_text()
    for name, magic in image_format.MAGICS.items():
        printed = magic.decode().replace("\0", "\\0")
        assert f"`{printed}`" in text or f'"{printed}"' in text, name
    in_text = set(re.findall(r"[`\"](SEAL[A-Z0-9]+)(?:\\0)?[`\"]", text))
    assert in_text == {magic.rstrip(b"\0").decode() for magic in image_format.MAGICS.values()}


def test_labels_are_those_of_the_document() -> None:
    rows = re.findall(r"^\| `(sealfs1 (\w+))` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: label.encode() for label, name in rows} == dict(image_format.LABELS)
