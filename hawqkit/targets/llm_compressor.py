r"""llm-compressor: `recipe.yaml`, groups of layers by regular expressions on names.

    default_stage:
      default_modifiers:
        QuantizationModifier:
          config_groups:
            group_0:
              targets: ['re:^model\.layers\.0\.mlp\.up_proj$', ...]
              weights: {num_bits: 4, type: int, symmetric: true, strategy: group, ...}
          ignore: [lm_head, ...]

A target `re:...` is matched by the start of a name (`re.match`, compressed-tensors 0.19.0), so each
ends in `$`; one without `re:` is an exact name, or the class of the module. Layers of one group
share their settings. Zero points are refused: what is saved with them does not load again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, kept_names, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import first_prefix, quoted_regex, verify

NAME = "llm-compressor"
ABOUT = "recipe.yaml for llm-compressor, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("transformers", "vllm")
SIZED = False

FILE = "recipe.yaml"
FP8 = {"fp8-e4m3-channel": "channel", "fp8-e4m3-tensor": "tensor"}
INPUTS_8 = {
    "num_bits": 8,
    "type": "int",
    "symmetric": True,
    "strategy": "token",
    "dynamic": True,
}

CONSUMER = Consumer(
    title="llm-compressor",
    requirement="llmcompressor==0.14.0.1",
    rounding="to the nearest value of a grid with scale = 2 largest magnitude / (2^bits - 1)",
    more="To let GPTQ round in its place, write `GPTQModifier` for `QuantizationModifier` in\n"
    "`recipe.yaml` and give the script `--data texts.jsonl`.\n\n"
    "Load the output with vLLM, or with transformers where `compressed-tensors` is installed:\n"
    "```python\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/OUTPUT")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what its saved models hold and load again."""
    return Capabilities(
        integers=(
            IntegerFormats((2, 3, 4, 8)),
            IntegerFormats((8,), (None,), activations=(8,)),
        ),
        names=tuple(FP8),
        dynamic_inputs=True,
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    text = recipe_text(mix, layers, facts)
    wanted = {n: group(parse_format(f)) for n, f in mix.items() if f != "none"}
    verify(NAME, entries(text), first_prefix, module_names(layers, facts), wanted)
    return {FILE: text}


def group(format: Format) -> dict[str, Any]:
    """Return the settings of a group of layers.

    >>> group(parse_format("int3-g64"))["weights"]["strategy"]
    'group'
    """
    weights: dict[str, Any] = {
        "num_bits": format.bits,
        "type": "int" if format.family == INTEGER else "float",
        "symmetric": True,
        "strategy": FP8.get(format.name, "group" if format.group_size else "channel"),
        "dynamic": False,
    }
    if format.group_size is not None:
        weights["group_size"] = format.group_size
    inputs = {} if format.activation_bits is None else {"input_activations": dict(INPUTS_8)}
    return {"weights": weights, **inputs}


def recipe_text(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return `recipe.yaml`."""
    members: dict[str, list[str]] = {}
    for name, format_name in mix.items():
        if format_name != "none":
            members.setdefault(format_name, []).append(name)
    groups = {
        f"group_{index}": {
            "targets": [f"re:{quoted_regex(name)}" for name in names],
            **group(parse_format(format_name)),
        }
        for index, (format_name, names) in enumerate(members.items())
    }
    kept = [f"re:{quoted_regex(name)}" for name in kept_names(mix, layers, facts)]
    modifier = {"config_groups": groups, "ignore": kept}
    recipe = {"default_stage": {"default_modifiers": {"QuantizationModifier": modifier}}}
    text: str = yaml.safe_dump(recipe, sort_keys=False, width=10_000)
    return text


def entries(text: str) -> list[tuple[str, Any]]:
    """Return (pattern, settings of its group) as the consumer reads them; None keeps a module."""
    parsed = yaml.safe_load(text)["default_stage"]["default_modifiers"]["QuantizationModifier"]
    found: list[tuple[str, Any]] = [(kept[3:], None) for kept in parsed["ignore"]]
    for settings in parsed["config_groups"].values():
        targets = settings.pop("targets")
        found += [(target[3:], settings) for target in targets]
    return found


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
