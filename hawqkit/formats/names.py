"""The grammar of format names. A name is permanent: it stands in recipes, tables and files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from hawqkit.errors import InputError, did_you_mean
from hawqkit.formats.floats import FLOATS
from hawqkit.formats.format import FLOAT, GGUF, INTEGER, NONE, Format
from hawqkit.formats.gguf import GGUFS
from hawqkit.formats.integers import (
    GROUP_SIZES,
    INTEGER_BITS,
    integer_names,
    pair_names,
    parse_integer,
)

_GRAMMAR = (
    f"bits are {', '.join(map(str, INTEGER_BITS))}; groups are "
    f"{', '.join(f'g{g}' for g in GROUP_SIZES)}, channel; a name may end in -a<bits> for the bits "
    "of the layer's inputs, and w4a8 is short for int4-channel-a8. `hawqkit formats` lists all."
)


def format_names(family: str | None = None) -> tuple[str, ...]:
    """Return the name of every format of weights, family by family and coarsest first, `none` last.

    Each integer format may end in `-a<bits>`; those names are too many to list, see `NAME_PATTERN`.

    Args:
        family: `integer`, `float` or `gguf` alone, `none` last too.
    """
    names = {INTEGER: integer_names(), FLOAT: tuple(FLOATS), GGUF: tuple(GGUFS)}
    chosen = names.values() if family is None else [names[family]]
    return (*(n for part in chosen for n in part), NONE.name)


@lru_cache(maxsize=1024)
def parse_format(name: str) -> Format:
    """Read a format name.

    >>> form = parse_format("int4-g64-asym")
    >>> form.bits, form.group_size, form.symmetric, form.activation_bits
    (4, 64, False, None)
    >>> parse_format("w4a8").activation_bits, parse_format("q4_k").block
    (8, (256, 144))

    Raises:
        InputError: the name is not in the grammar; the message says which part is wrong.
    """
    text = str(name)
    if text == NONE.name:
        return NONE
    found = FLOATS.get(text) or GGUFS.get(text)
    if found is not None:
        return found
    made, what = parse_integer(text)
    if made is not None:
        return made
    if what:
        hint = "" if "inputs" in what[0] else _hint(text)
        raise InputError(f"unknown format {name!r}: {'; '.join(what)}; {_GRAMMAR}{hint}")
    raise InputError(f"unknown format {name!r}: {_problem(text)}")


def _problem(name: str) -> str:
    """Say why a name is not in the grammar at all."""
    if re.fullmatch(rf"{NONE.name}-?a\d+", name):
        return (
            "'none' keeps a layer as it is stored, its inputs too; they are quantized beside its "
            f"weights: use an integer format such as int8-channel-a{name.rpartition('a')[2]}."
        )
    head, dash, acts = name.rpartition("-a")
    if dash and acts.isdigit() and (head in FLOATS or head in GGUFS):
        return (
            f"{head} is of weights alone; inputs are quantized beside integer weights, such as "
            f"int8-channel-a{acts}."
        )
    return f"formats are int<bits>-<group>[-asym] and 'none'; {_GRAMMAR}{_hint(name)}"


def _hint(name: str) -> str:
    plain = (*format_names(), *pair_names())
    _, dash, acts = name.rpartition("-a")
    if dash and acts.isdigit():  # of a long name it is the first part that is misspelled
        plain = (*(f"{n}{dash}{acts}" for n in integer_names()), *pair_names())
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


def fitting_formats(columns: int, family: str = INTEGER) -> tuple[str, ...]:
    """Return the names of all formats of weights of a family that fit `columns`, and `none`."""
    return tuple(n for n in format_names(family) if parse_format(n).fits(columns))
