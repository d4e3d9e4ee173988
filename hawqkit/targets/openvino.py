"""OpenVINO: `openvino.json`, passes of NNCF's `compress_weights` in the order in which they run.

    [{"mode": "int8_sym", "group_size": -1, "layers": [...]},
     {"mode": "int4_asym", "group_size": 64, "layers": ["model.layers.0.mlp.up_proj", ...]}]

A pass compresses whatever is not ignored, so `apply.py` ignores the nodes of all other layers, by
their exact names. A pass has one mode and one group size. NNCF 3.4 takes no pass over a model that
has weights of 3 bits already: so those come last, and a mix has one format of 3 bits. Layers are
found by the names that OpenVINO gives to what it traces, `__module.<layer>/aten::linear/MatMul`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import exact, verify

NAME = "openvino"
ABOUT = "openvino.json for NNCF, with a script that compresses an OpenVINO model"
RUNTIMES: tuple[str, ...] = ("openvino",)
SIZED = False

FILE = "openvino.json"
ORDER = (8, 4, 2, 3)

CONSUMER = Consumer(
    title="NNCF",
    requirement="nncf==3.4.0",
    rounding="to the nearest value of the same grid, with scales that are stored in float16 once "
    "the codes are made",
    agrees=("nearest",),
    more="MODEL is a folder of `save_pretrained`, or of an OpenVINO model as `optimum-cli export "
    "openvino`\nwrites it (`openvino_model.xml`), which then keeps its cache. Load the output so:\n"
    "```python\n"
    "import openvino\n\n"
    'model = openvino.Core().compile_model("PATH/TO/OUTPUT/openvino_model.xml", "CPU")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return the modes of NNCF: 8 bits by row, others by group."""
    groups = (32, 64, 128, None)
    return Capabilities(
        integers=(
            IntegerFormats((8,), (None,), symmetric=(True, False)),
            IntegerFormats((4,), groups, symmetric=(True, False)),
            IntegerFormats((2, 3), groups),
        )
    )


def own_problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return the layers of a second format of 3 bits."""
    threes: dict[str, list[str]] = {}
    for name, format_name in mix.items():
        if format_name in capabilities().formats() and parse_format(format_name).bits == 3:
            threes.setdefault(format_name, []).append(name)
    most = max(threes, key=lambda f: len(threes[f]), default="")
    return [
        f"layer {name!r} in format {format_name!r}: NNCF takes no second pass of 3 bits, and most "
        f"layers of 3 bits have {most!r} here; {most!r} or another width fits."
        for format_name, names in threes.items()
        if format_name != most
        for name in names
    ]


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    text = json_text(passes(mix))
    entries = [
        (name, {k: v for k, v in made.items() if k != "layers"})
        for made in json.loads(text)
        for name in made["layers"]
    ]
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    verify(NAME, entries, exact, module_names(layers, facts), wanted)
    return {FILE: text}


def settings(format: Format) -> dict[str, Any]:
    """Return the arguments of one pass.

    >>> settings(parse_format("int4-g64-asym"))
    {'mode': 'int4_asym', 'group_size': 64}
    """
    symmetry = "sym" if format.symmetric else "asym"
    return {"mode": f"int{format.bits}_{symmetry}", "group_size": format.group_size or -1}


def passes(mix: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the passes in the order in which NNCF takes them.

    >>> [made["mode"] for made in passes({"a": "int3-g64", "b": "int8-channel", "c": "int2-g64"})]
    ['int8_sym', 'int2_sym', 'int3_sym']
    """
    members: dict[str, list[str]] = {}
    for name, format_name in mix.items():
        if format_name != "none":
            members.setdefault(format_name, []).append(name)
    ordered = sorted(members, key=lambda f: ORDER.index(parse_format(f).bits or 0))
    return [{**settings(parse_format(f)), "layers": members[f]} for f in ordered]


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration, own_problems)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
