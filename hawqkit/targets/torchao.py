"""torchao: `torchao.json`, an `FqnToConfig` as torchao writes it in JSON, by exact names.

    {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": {
        "model.layers.0.mlp.up_proj": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {
            "weight_dtype": {"_type": "torch.dtype", "_data": "int3"}, ...}}, ...}}}

It is also what stands in the `config.json` of the result, whose keys transformers sorts: patterns,
of which the first decides, would lose their order (torchao 0.18.0), so names are exact. A parameter
of that name decides before a module, `re:` begins a pattern, and `_default` is for all others.

Layers that are not named stay. transformers 5.23 leaves out the head unless it is told that there
are no modules to leave out, which `apply.py` does. Codes of all widths are stored as int8.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import Entries, verify

NAME = "torchao"
ABOUT = "torchao.json for TorchAoConfig of transformers, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("transformers",)
SIZED = False

FILE = "torchao.json"
FP8 = {"fp8-e4m3-channel": "float8_e4m3fn", "fp8-e5m2-channel": "float8_e5m2"}

CONSUMER = Consumer(
    title="torchao",
    requirement="torchao==0.18.0",
    rounding="symmetric integers to the nearest value of a grid with scale = 2 largest magnitude / "
    "(2^bits - 1), all else as `nearest` does",
    more="It keeps scales of integers in the dtype of the weights, and stores each code in a byte\n"
    "whatever its width: the files do not shrink below 8 bits.\n\n"
    "Load the output with transformers where torchao is installed:\n"
    "```python\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/OUTPUT")\n'
    "```",
    nearest=lambda name: name in FP8 or not parse_format(name).symmetric,
)


def capabilities() -> Capabilities:
    """Return what its configurations for weights alone compute."""
    return Capabilities(
        integers=(IntegerFormats((2, 3, 4, 5, 6, 8), symmetric=(True, False)),), names=tuple(FP8)
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    text = json_text(tagged("FqnToConfig", 1, {"fqn_to_config": wanted}))
    entries = list(json.loads(text)["_data"]["fqn_to_config"].items())
    verify(NAME, entries, decided, module_names(layers, facts), wanted)
    return {FILE: text}


def decided(entries: Entries, name: str) -> Any:
    """Decide as torchao does: its parameter, itself, the first pattern, what is for all others."""
    if name.startswith("re:"):
        return None  # it fails on such a module
    keyed = dict(entries)
    for exact in (f"{name}.weight", name):
        if exact in keyed:
            return keyed[exact]
    patterns = [(key[3:], value) for key, value in entries if key.startswith("re:")]
    for candidate in (f"{name}.weight", name):
        for pattern, value in patterns:
            if re.fullmatch(pattern, candidate):
                return value
    return keyed.get("_default")


def tagged(kind: str, version: int | None, data: Any) -> dict[str, Any]:
    """Return an object in torchao's JSON: its type, the version where it has one, its content.

    >>> tagged("PerGroup", 1, {"group_size": 32})
    {'_type': 'PerGroup', '_version': 1, '_data': {'group_size': 32}}
    """
    return {"_type": kind} | ({} if version is None else {"_version": version}) | {"_data": data}


def settings(format: Format) -> dict[str, Any]:
    """Return the configuration of one layer.

    >>> settings(parse_format("int3-channel"))["_data"]["weight_dtype"]
    {'_type': 'torch.dtype', '_data': 'int3'}
    """
    if format.family != INTEGER:
        dtype = tagged("torch.dtype", None, FP8[format.name])
        by_row = tagged("PerRow", 1, {"dim": -1})
        data = {"weight_dtype": dtype, "set_inductor_config": False, "granularity": by_row}
        return tagged("Float8WeightOnlyConfig", 2, data)
    if format.group_size is None:
        granularity = tagged("PerAxis", 1, {"axis": 0})
    else:
        granularity = tagged("PerGroup", 1, {"group_size": format.group_size})
    mapping = "SYMMETRIC" if format.symmetric else "ASYMMETRIC"
    data = {
        "weight_dtype": tagged("torch.dtype", None, f"int{format.bits}"),
        "granularity": granularity,
        "mapping_type": tagged("MappingType", None, mapping),
    }
    return tagged("IntxWeightOnlyConfig", 2, data)


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
