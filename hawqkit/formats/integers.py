"""Integer formats, with or without a zero point, with or without bits for a layer's inputs.

int<bits>-<group>[-asym]         bits: 2 3 4 5 6 8     group: g32 g64 g128 channel
int<bits>-<group>[-asym]-a<a>    the same, and the layer's inputs in a bits: 2 3 4 5 6 8
w<bits>a<a>[-asym]               int<bits>-channel[-asym]-a<a>
"""

from __future__ import annotations

import re

from hawqkit.formats.format import Format

INTEGER_BITS = (2, 3, 4, 5, 6, 8)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_INTEGER = re.compile(
    r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<channel>channel))(?P<asym>-asym)?(?:-a(?P<acts>\d+))?"
)
_PAIR = re.compile(r"w(?P<bits>\d+)a(?P<acts>\d+)(?P<asym>-asym)?")

# Every name with the bits of activations, as a regular expression that JSON schemas understand.
NAME_PATTERN = (
    f"^(int[{''.join(map(str, INTEGER_BITS))}]-({'|'.join(f'g{g}' for g in GROUP_SIZES)}|channel)"
    f"(-asym)?-a[{''.join(map(str, ACTIVATION_BITS))}]"
    f"|w[{''.join(map(str, INTEGER_BITS))}]a[{''.join(map(str, ACTIVATION_BITS))}](-asym)?)$"
)


def integer_names() -> tuple[str, ...]:
    """Return the names of all integer formats of weights alone, coarsest first."""
    groups = [*(f"g{g}" for g in GROUP_SIZES), "channel"]
    return tuple(f"int{b}-{g}{a}" for b in INTEGER_BITS for g in groups for a in ("", "-asym"))


def pair_names() -> tuple[str, ...]:
    """Return `w2a2` to `w8a8`: weights by channel and inputs, coarsest first."""
    return tuple(f"w{w}a{a}" for w in INTEGER_BITS for a in ACTIVATION_BITS)


def parse_integer(name: str) -> tuple[Format | None, list[str]]:
    """Read the name of an integer format.

    Returns:
        the format, None where the name is not one of an integer format or a number in it is wrong;
        and what is wrong with its numbers.

    >>> parse_integer("int7-g64")
    (None, ['there is no integer format with 7 bits'])
    """
    match = _INTEGER.fullmatch(name) or _PAIR.fullmatch(name)
    if match is None:
        return None, []
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
        return None, what
    form = Format(name, bits, group, parts["asym"] is None, None if acts is None else int(acts))
    return form, []
