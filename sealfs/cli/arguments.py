"""What arguments may look like: sizes and PCR lists."""

from __future__ import annotations

import re

import click

from sealfs.image.layout import SIZE_MAX

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,20})([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_PCRS = re.compile(r"\d{1,2}(,\d{1,2})*", re.ASCII)


class SizeType(click.ParamType[int]):
    """A disk's size in bytes, or with a binary unit."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(str(value))
        if match is None:
            self.fail(f'"{value}" is not a size; write bytes, or 10G (K, M, G, T are binary)')
        size = int(match[1]) * _UNITS[match[2].upper()]
        if not 1 <= size <= SIZE_MAX:
            self.fail(f"{size} bytes; a disk has 1 byte to {SIZE_MAX >> 40} TiB")
        return size


class PcrType(click.ParamType[tuple[int, ...]]):
    """A list of PCRs: `0,2,7`. Which numbers there are is the key service's to say."""

    name = "pcrs"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the numbers in the order given."""
        if isinstance(value, tuple):
            return value
        if not _PCRS.fullmatch(str(value)):
            self.fail(f'"{value}" is not a list of PCRs such as 0,2,7')
        return tuple(int(number) for number in str(value).split(","))


SIZE = SizeType()
PCRS = PcrType()
