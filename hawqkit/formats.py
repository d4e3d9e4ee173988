"""The grammar of number formats, and the bits that each of them really stores.

A format name is permanent: it stands in recipes, tables and files of users.

    int<bits>-<group>[-asym]         bits: 2 3 4 5 6 8     group: g32 g64 g128 channel
    int<bits>-<group>[-asym]-a<a>    the same, and the layer's inputs in a bits: 2 3 4 5 6 8
    w<bits>a<a>[-asym]               int<bits>-channel[-asym]-a<a>
    none                             the layer keeps its stored dtype
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from hawqkit.errors import InputError, did_you_mean

INTEGER_BITS = (2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
SCALE_BITS = 16
WORD_BITS = 32  # codes are packed into 32-bit words, row by row

_INTEGER = re.compile(
    r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?(?:-a(?P<acts>\d+))?"
)
_PAIR = re.compile(r"w(?P<bits>\d+)a(?P<acts>\d+)(?P<asym>-asym)?")
_GRAMMAR = (
    f"bits are {', '.join(map(str, INTEGER_BITS))}; groups are g32, g64, g128, channel; a name may "
    "end in -a<bits> for the bits of the layer's inputs, and w4a8 is short for int4-channel-a8."
)


@dataclass(frozen=True, slots=True)
class Format:
    """One number format for a weight of shape (rows, columns); groups run along the columns.

    Attributes:
        name: the permanent name.
        bits: bits of a code; None for `none`.
        group_size: columns that share a scale; None means the whole row (`channel`).
        symmetric: True if there is no zero point.
        activation_bits: bits of the layer's inputs (see `quantize.activations`); None where they
            stay as they are. An embedding looks up and has no input to quantize: there it means
            nothing.
    """

    name: str
    bits: int | None
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int | None = None

    @property
    def quantizes(self) -> bool:
        """False for `none`, which keeps the stored dtype."""
        return self.bits is not None

    @property
    def weights(self) -> Format:
        """The same format of the weight, with inputs as they are.

        >>> parse_format("w4a8").weights.name
        'int4-channel'
        """
        if self.activation_bits is None:
            return self
        plain = replace(self, activation_bits=None)
        return replace(plain, name=_integer_name(plain))

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
        many bits as a code, packed into words along the rows. Quantized inputs store nothing that
        counts: a static range is two numbers a layer, a dynamic one none.

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


def _integer_name(format: Format) -> str:
    group = "channel" if format.group_size is None else f"g{format.group_size}"
    tail = "" if format.activation_bits is None else f"-a{format.activation_bits}"
    return f"int{format.bits}-{group}{'' if format.symmetric else '-asym'}{tail}"


NONE = Format("none", None)


def format_names() -> tuple[str, ...]:
    """Return the name of every format of weights, coarsest first, `none` last.

    Each but `none` may end in `-a<bits>`; those names are too many to list, see `NAME_PATTERN`.
    """
    groups = [*(f"g{g}" for g in GROUP_SIZES), "channel"]
    names = (f"int{b}-{g}{a}" for b in INTEGER_BITS for g in groups for a in ("", "-asym"))
    return (*names, NONE.name)


# Every name with the bits of activations, as a regular expression that JSON schemas understand.
NAME_PATTERN = (
    f"^(int[{''.join(map(str, INTEGER_BITS))}]-({'|'.join(f'g{g}' for g in GROUP_SIZES)}|channel)"
    f"(-asym)?-a[{''.join(map(str, ACTIVATION_BITS))}]"
    f"|w[{''.join(map(str, INTEGER_BITS))}]a[{''.join(map(str, ACTIVATION_BITS))}](-asym)?)$"
)


def pair_names() -> tuple[str, ...]:
    """Return `w2a2` to `w8a8`: weights by channel and inputs, coarsest first."""
    return tuple(f"w{w}a{a}" for w in INTEGER_BITS for a in ACTIVATION_BITS)


@lru_cache(maxsize=1024)
def parse_format(name: str) -> Format:
    """Read a format name.

    >>> parse_format("int4-g64-asym")
    Format(name='int4-g64-asym', bits=4, group_size=64, symmetric=False, activation_bits=None)
    >>> parse_format("w4a8")
    Format(name='w4a8', bits=4, group_size=None, symmetric=True, activation_bits=8)

    Raises:
        InputError: the name is not in the grammar; the message says which part is wrong.
    """
    if name == NONE.name:
        return NONE
    match = _INTEGER.fullmatch(str(name)) or _PAIR.fullmatch(str(name))
    if match is None:
        raise InputError(f"unknown format {name!r}: {_problem(str(name))}")
    parts = match.groupdict()
    bits, acts = int(parts["bits"]), parts["acts"]
    group = int(parts["group"]) if parts.get("group") else None
    what = []
    if bits not in INTEGER_BITS:
        what.append(f"there is no integer format with {bits} bits")
    if group is not None and group not in GROUP_SIZES:
        what.append(f"there is no integer format with groups of {group}")
    if acts is not None and int(acts) not in ACTIVATION_BITS:
        what.append(
            f"inputs are quantized to {', '.join(map(str, ACTIVATION_BITS))} bits, not to {acts} "
            "(leave that part off to keep them as they are)"
        )
    if what:
        hint = "" if "inputs" in what[0] else _hint(name)
        raise InputError(f"unknown format {name!r}: {'; '.join(what)}; {_GRAMMAR}{hint}")
    return Format(name, bits, group, parts["asym"] is None, None if acts is None else int(acts))


def _problem(name: str) -> str:
    """Say why a name is not in the grammar at all."""
    if re.fullmatch(rf"{NONE.name}-?a\d+", name):
        return (
            "'none' keeps a layer as it is stored, its inputs too; they are quantized beside its "
            f"weights: use an integer format such as int8-channel-a{name.rpartition('a')[2]}."
        )
    return f"formats are int<bits>-<group>[-asym] and 'none'; {_GRAMMAR}{_hint(name)}"


def _hint(name: str) -> str:
    plain = (*format_names(), *pair_names())
    _, dash, acts = name.rpartition("-a")
    if dash and acts.isdigit():  # of a long name it is the first part that is misspelled
        plain = (*(f"{n}{dash}{acts}" for n in format_names() if n != NONE.name), *pair_names())
    return did_you_mean(name, plain)


def same_formats(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of names that stand for one format.

    >>> same_formats(["w4a8", "int4-g64", "int4-channel-a8"])
    [('w4a8', 'int4-channel-a8')]
    """
    first: dict[Format, str] = {}
    found = []
    for name in names:
        meaning = replace(parse_format(name), name="")
        if first.setdefault(meaning, name) != name:
            found.append((first[meaning], name))
    return found


def with_activations(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of those formats that quantize a layer's inputs, in their order."""
    return tuple(n for n in names if parse_format(n).activation_bits is not None)


def activation_bits_of(names: Sequence[str]) -> tuple[int, ...]:
    """Return the bits of inputs that formats ask for, widest first, each once.

    >>> activation_bits_of(["w4a4", "int4-g64", "w8a8", "int3-channel-a4"])
    (8, 4)
    """
    found = {parse_format(n).activation_bits for n in names} - {None}
    return tuple(sorted((b for b in found if b is not None), reverse=True))


def fitting_formats(columns: int) -> tuple[str, ...]:
    """Return the names of all formats of weights whose group size divides `columns`."""
    return tuple(n for n in format_names() if parse_format(n).fits(columns))
