"""The grammar of number formats, and the bits that each of them really stores.

A format name is permanent: it stands in recipes, tables and files of users.

    int<bits>-<group>[-asym]     bits: 2 3 4 5 6 8     group: g32 g64 g128 channel
    none                         the layer keeps its stored dtype
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from hawqkit.errors import InputError, did_you_mean

INTEGER_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_BITS = 16
WORD_BITS = 32  # codes are packed into 32-bit words, row by row

_INTEGER = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?")


@dataclass(frozen=True, slots=True)
class Format:
    """One number format for a weight of shape (rows, columns); groups run along the columns.

    Attributes:
        name: the permanent name.
        bits: bits of a code; None for `none`.
        group_size: columns that share a scale; None means the whole row (`channel`).
        symmetric: True if there is no zero point.
    """

    name: str
    bits: int | None
    group_size: int | None = None
    symmetric: bool = True

    @property
    def quantizes(self) -> bool:
        """False for `none`, which keeps the stored dtype."""
        return self.bits is not None

    def fits(self, columns: int) -> bool:
        """Whether the group size divides the columns."""
        return self.group_size is None or columns % self.group_size == 0

    def groups_per_row(self, columns: int) -> int:
        """Return the number of scales a row of `columns` entries has."""
        return 1 if self.group_size is None else columns // self.group_size

    def code_bits(self, stored_bits: int) -> int:
        """Return bits per entry of the codes alone; `none` counts its stored dtype."""
        return stored_bits if self.bits is None else self.bits

    def total_bits(self, rows: int, columns: int, stored_bits: int) -> int:
        """Return the bits that a (rows, columns) weight takes: codes, padding, scales, zero points.

        Codes are packed into 32-bit words row by row; a scale takes 16 bits; a zero point takes as
        many bits as a code, packed into words along the rows.

        >>> parse_format("int4-g64").total_bits(2, 128, 32) / (2 * 128)
        4.25
        """
        if self.bits is None:
            return rows * columns * stored_bits
        groups = self.groups_per_row(columns)
        codes = rows * _padded(columns * self.bits)
        zeros = 0 if self.symmetric else groups * _padded(rows * self.bits)
        return codes + rows * groups * SCALE_BITS + zeros


def _padded(bits: int) -> int:
    return -(-bits // WORD_BITS) * WORD_BITS


NONE = Format("none", None)


def format_names() -> tuple[str, ...]:
    """Return every format name, coarsest first, `none` last."""
    groups = [*(f"g{g}" for g in GROUP_SIZES), "channel"]
    names = (f"int{b}-{g}{a}" for b in INTEGER_BITS for g in groups for a in ("", "-asym"))
    return (*names, NONE.name)


@lru_cache(maxsize=256)
def parse_format(name: str) -> Format:
    """Read a format name.

    >>> parse_format("int4-g64-asym")
    Format(name='int4-g64-asym', bits=4, group_size=64, symmetric=False)

    Raises:
        InputError: the name is not in the grammar; the message says which part is wrong.
    """
    if name == NONE.name:
        return NONE
    match = _INTEGER.fullmatch(str(name))
    if match is None:
        raise InputError(
            f"unknown format {name!r}: formats are int<bits>-<group>[-asym] and 'none'; bits are "
            f"{', '.join(map(str, INTEGER_BITS))}; groups are g32, g64, g128, channel."
            + did_you_mean(name, format_names())
        )
    bits = int(match["bits"])
    group = None if match["channel"] else int(match["group"])
    if bits not in INTEGER_BITS or (group is not None and group not in GROUP_SIZES):
        what = f"{bits} bits" if bits not in INTEGER_BITS else f"groups of {group}"
        raise InputError(
            f"unknown format {name!r}: there is no integer format with {what}; bits are "
            f"{', '.join(map(str, INTEGER_BITS))}; groups are g32, g64, g128, channel."
            + did_you_mean(name, format_names())
        )
    return Format(name, bits, group, match["asym"] is None)


def fitting_formats(columns: int) -> tuple[str, ...]:
    """Return the names of all formats whose group size divides `columns`."""
    return tuple(n for n in format_names() if parse_format(n).fits(columns))
