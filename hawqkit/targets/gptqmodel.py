r"""GPTQModel: `dynamic.json`, settings by regular expressions on the names of modules.

    {"+:^model\\\\.layers\\\\.0\\\\.mlp\\\\.(?:gate|up|gate_up)_proj$":
         {"bits": 4, "group_size": 64, "sym": true},
     "-:^model\\\\.layers\\\\.0\\\\.mlp\\\\.down_proj$": {}}

`+:` gives settings, `-:` keeps a module as it is. The first pattern that matches the start of a
name decides (GPTQModel 7.6.0, and vLLM with `re.match`), so each ends in `$`. vLLM asks for the
name of the fused matrix, `qkv_proj` or `gate_up_proj`: layers that share a format have one pattern
that matches it too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, kept_names, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import first_prefix, quoted_regex, verify

NAME = "gptqmodel"
ABOUT = "dynamic.json for GPTQModel, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("gptqmodel", "vllm")
SIZED = False

FILE = "dynamic.json"
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

CONSUMER = Consumer(
    title="GPTQModel",
    requirement="gptqmodel==7.6.0",
    rounding="column by column, each error passed on to the next columns by the second moments of "
    "the inputs (GPTQ)",
    more="GPTQ loses less than rounding to the nearest value, most of all at few bits.\n\n"
    'Load the output with `GPTQModel.load("PATH/TO/OUTPUT")` or with vLLM. transformers 5.23\n'
    "reads one width for all layers and cannot load it.",
)


def capabilities() -> Capabilities:
    """Return what GPTQModel quantizes and packs."""
    return Capabilities(
        integers=(IntegerFormats((2, 3, 4, 5, 6, 8), symmetric=(True, False)),),
        rows_multiple=32,
        columns_multiple=32,
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    text = json_text(dynamic(mix, layers, facts))
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    for fused, members in fused_groups(mix).items():
        wanted[fused] = wanted[members[0]]
    verify(NAME, entries(text), first_prefix, module_names(layers, facts), wanted)
    return {FILE: text}


def settings(format: Format) -> dict[str, Any]:
    """Return the settings of one layer.

    >>> settings(parse_format("int3-channel-asym"))
    {'bits': 3, 'group_size': -1, 'sym': False}
    """
    return {"bits": format.bits, "group_size": format.group_size or -1, "sym": format.symmetric}


def dynamic(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, dict[str, Any]]:
    """Return pattern -> settings, in the order in which they are tried."""
    groups = fused_groups(mix)
    member_of = {name: fused for fused, members in groups.items() for name in members}
    found: dict[str, dict[str, Any]] = {}
    for name, format_name in mix.items():
        format_ = parse_format(format_name)
        if format_.quantizes:
            found[f"+:{_pattern(name, member_of.get(name))}"] = settings(format_)
    for name in kept_names(mix, layers, facts):
        found[f"-:{quoted_regex(name)}"] = {}
    return found


def fused_groups(mix: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the name of a fused matrix -> its layers, where all of them share a format.

    >>> fused_groups({"a.gate_proj": "int4-g32", "a.up_proj": "int4-g32", "b.up_proj": "int4-g32"})
    {'a.gate_up_proj': ['a.gate_proj', 'a.up_proj']}
    """
    found = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in mix):
        for fused, leaves in FUSED.items():
            members = [_join(parent, leaf) for leaf in leaves]
            formats = {mix.get(name, "none") for name in members}
            if len(formats) == 1 and formats != {"none"} and _join(parent, fused) not in mix:
                found[_join(parent, fused)] = members
    return found


def _pattern(name: str, fused: str | None) -> str:
    if fused is None:
        return quoted_regex(name)
    parent, _, leaf = fused.rpartition(".")
    names = "|".join(x.removesuffix("_proj") for x in (*FUSED[leaf], leaf))
    return f"^{re.escape(_join(parent, ''))}(?:{names})_proj$"


def _join(parent: str, leaf: str) -> str:
    return f"{parent}.{leaf}" if parent else leaf


def entries(text: str) -> list[tuple[str, Any]]:
    """Return (pattern, settings) as the consumer reads them; None keeps a module."""
    parsed: dict[str, Any] = json.loads(text)
    return [(key[2:], None if key.startswith("-:") else value) for key, value in parsed.items()]


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
