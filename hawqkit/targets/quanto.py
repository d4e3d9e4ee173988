"""quanto (optimum-quanto): `quanto.json`, one pass of its `quantize` for each type.

    [{"weights": "qint4", "include": ["model.layers.0.mlp.up_proj", ...]},
     {"weights": "qint8", "include": [...]}]

`include` holds globs on names; each is quoted, so that it matches one name alone. The groups of its
types of 2 and 4 bits are no setting: quanto 0.2.7 takes 128 columns, or the next smaller multiple
of 32 that divides the row, and the whole row where it has no more than 128 columns or none divides
it. A layer for which that is no format of the mix is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from hawqkit.formats import parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import Entries, quoted_glob, verify

NAME = "quanto"
ABOUT = "quanto.json for optimum-quanto, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("quanto",)
SIZED = False

FILE = "quanto.json"
TYPES = {
    "int2-g128-asym": "qint2",
    "int2-channel-asym": "qint2",
    "int4-g128-asym": "qint4",
    "int4-channel-asym": "qint4",
    "int8-channel": "qint8",
    "fp8-e4m3-channel": "qfloat8_e4m3fn",
    "fp8-e5m2-channel": "qfloat8_e5m2",
}

CONSUMER = Consumer(
    title="quanto",
    requirement="optimum-quanto==0.2.7",
    rounding="2 and 4 bits to a grid from the smallest to the largest entry, on which zero need "
    "not lie, 8 bits to one with scale = largest magnitude / 127, and floats as `nearest` does",
    more="Load the output with quanto:\n"
    "```python\n"
    "from optimum.quanto import QuantizedModelForCausalLM\n\n"
    'model = QuantizedModelForCausalLM.from_pretrained("PATH/TO/OUTPUT")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return the formats of its types; the columns of a layer decide between those of one type."""
    return Capabilities(
        integers=(
            IntegerFormats((2, 4), (128, None), symmetric=(False,)),
            IntegerFormats((8,), (None,)),
        ),
        names=("fp8-e4m3-channel", "fp8-e5m2-channel"),
    )


def own_problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return the layers whose columns quanto groups otherwise than their format does."""
    found = []
    for layer in layers:
        format_name = mix.get(layer.name, "none")
        if TYPES.get(format_name) not in ("qint2", "qint4"):
            continue
        form = parse_format(format_name)
        taken = group_of(layer.columns)
        if form.fits(layer.columns) and (form.group_size or layer.columns) != taken:
            whole = taken in (128, layer.columns)
            other = f"int{form.bits}-{'g128' if taken == 128 else 'channel'}-asym, "
            found.append(
                f"layer {layer.name!r} in format {format_name!r}: of its {layer.columns} columns "
                f"quanto groups {taken} by itself; these fit: {other if whole else ''}"
                "int8-channel, none."
            )
    return found


def group_of(columns: int) -> int:
    """Return how many columns quanto groups in its types of 2 and 4 bits.

    >>> group_of(96), group_of(128), group_of(512), group_of(576), group_of(200)
    (96, 128, 128, 96, 200)
    """
    fitting = [g for g in (128, 96, 64, 32) if columns > 128 and columns % g == 0]
    return fitting[0] if fitting else columns


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    text = json_text(passes(mix))
    entries = [(glob, made["weights"]) for made in json.loads(text) for glob in made["include"]]
    wanted = {name: TYPES[f] for name, f in mix.items() if f != "none"}
    verify(NAME, entries, first_glob, module_names(layers, facts), wanted)
    return {FILE: text}


def first_glob(entries: Entries, name: str) -> Any:
    """Decide by the first glob that matches: a later pass finds no linear layer any more."""
    return next((value for glob, value in entries if fnmatchcase(name, glob)), None)


def passes(mix: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the arguments of each `quantize`.

    >>> passes({"up": "int8-channel", "down": "none", "gate[0]": "int8-channel"})
    [{'weights': 'qint8', 'include': ['up', 'gate[[]0]']}]
    """
    members: dict[str, list[str]] = {}
    for name, format_name in mix.items():
        if format_name != "none":
            members.setdefault(TYPES[format_name], []).append(quoted_glob(name))
    return [{"weights": kind, "include": globs} for kind, globs in members.items()]


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration, own_problems)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
