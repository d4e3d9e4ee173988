"""ModelOpt (NVIDIA): `quant_cfg.json`, an ordered list of globs on the names of quantizers.

    {"quant_cfg": [
        {"quantizer_name": "*", "enable": false},
        {"quantizer_name": "model.layers.0.mlp.up_proj.weight_quantizer",
         "cfg": {"num_bits": 4, "block_sizes": {"-1": 64}, "axis": null}}],
     "algorithm": "max"}

The last entry that matches decides (ModelOpt 0.47.0), so the one that turns everything off comes
first. JSON has no integer keys and no tuples: `apply.py` turns "-1" and [4, 3] into those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import last_glob, quoted_glob, verify

NAME = "modelopt"
ABOUT = "quant_cfg.json for NVIDIA ModelOpt, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("transformers",)
SIZED = False

FILE = "quant_cfg.json"
QUANTIZER = ".weight_quantizer"
FP8 = {"fp8-e4m3-channel": 0, "fp8-e4m3-tensor": None}  # name -> axis that has scales

CONSUMER = Consumer(
    title="ModelOpt",
    requirement="nvidia-modelopt==0.47.0",
    rounding="integers to the nearest value of a grid without hawqkit's extra level, with scale = "
    "largest magnitude / (2^(bits-1) - 1)",
    more="The output holds the stored weights and `modelopt_state.pth`; weights are rounded while\n"
    "the model runs (fake quantization). Load it so:\n"
    "```python\n"
    "import modelopt.torch.opt as mto\n\n"
    "mto.enable_huggingface_checkpointing()\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/OUTPUT")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what its quantizers compute, and which layers its exporters merge."""
    return Capabilities(
        integers=(IntegerFormats((2, 3, 4, 5, 6, 8)),), names=tuple(FP8), shares="vllm"
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    text = json_text({"quant_cfg": quant_cfg(mix), "algorithm": "max"})
    parsed = json.loads(text)["quant_cfg"]
    entries = [(entry["quantizer_name"], entry.get("cfg")) for entry in parsed]
    wanted = {name + QUANTIZER: settings(parse_format(f)) for name, f in mix.items() if f != "none"}
    names = [name + QUANTIZER for name in module_names(layers, facts)]
    verify(NAME, entries, last_glob, names, wanted)
    return {FILE: text}


def settings(format: Format) -> dict[str, Any]:
    """Return the attributes of the quantizer of one weight.

    >>> settings(parse_format("int3-channel"))
    {'num_bits': 3, 'axis': 0}
    >>> settings(parse_format("fp8-e4m3-tensor"))
    {'num_bits': [4, 3], 'axis': None}
    """
    if format.family != INTEGER:
        return {"num_bits": [4, 3], "axis": FP8[format.name]}
    if format.group_size is None:
        return {"num_bits": format.bits, "axis": 0}
    return {"num_bits": format.bits, "axis": None, "block_sizes": {"-1": format.group_size}}


def quant_cfg(mix: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the entries in the order in which they override each other."""
    chosen = ((name, parse_format(format_name)) for name, format_name in mix.items())
    entries = [
        {"quantizer_name": quoted_glob(name) + QUANTIZER, "cfg": settings(format_)}
        for name, format_ in chosen
        if format_.quantizes
    ]
    return [{"quantizer_name": "*", "enable": False}, *entries]


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
