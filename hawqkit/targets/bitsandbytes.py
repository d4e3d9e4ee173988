r"""bitsandbytes: `bitsandbytes.json`, arguments of transformers' `BitsAndBytesConfig`.

    {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false,
     "llm_int8_skip_modules": ["^lm_head$", "^model\\\\.layers\\\\.0\\\\.mlp\\\\.up_proj$", ...]}

One format for all linear layers, or none: what is not in the list is quantized. An entry of the
list leaves out a module whose name ends with it, or whose beginning, up to a dot, it matches as a
regular expression (transformers 5.23), so that "up_proj" would leave out those of all blocks; each
is a whole name between `^` and `$`. Once there is a list, the head is not left out by itself.

`nf4-g64` and `fp4-g64` are those of bitsandbytes bit for bit. `int8-channel-a8` is LLM.int8 with
threshold 0, which rounds the inputs of every layer; its threshold of 6 would keep outliers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.configuration import (
    Consumer,
    Entries,
    json_text,
    kept_names,
    module_names,
    no_size,
    no_size_table,
    problems_of,
    quoted_regex,
    range_problems,
    sharing_problems,
    verify,
    write_all,
)
from hawqkit.targets.contract import Capabilities, IntegerFormats, require

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

NAME = "bitsandbytes"
ABOUT = "bitsandbytes.json for BitsAndBytesConfig of transformers, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("transformers",)
SIZED = False

FILE = "bitsandbytes.json"
SKIPPED = "llm_int8_skip_modules"
FOUR = {"nf4-g64": "nf4", "fp4-g64": "fp4"}

CONSUMER = Consumer(
    title="bitsandbytes",
    requirement="bitsandbytes==0.50.2",
    rounding="4-bit floats as `nearest` does; integers to the nearest value of a grid with scale = "
    "largest magnitude / 127, and the inputs of each token likewise, in float16",
    more="Load the output with transformers where bitsandbytes is installed:\n"
    "```python\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/OUTPUT", device_map="cpu")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return the formats of its linear layers, of which a model has one."""
    return Capabilities(
        integers=(IntegerFormats((8,), (None,), activations=(8,)),), names=tuple(FOUR), mixed=False
    )


def problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return everything that the target cannot hold, each with the layer and what would fit."""
    return problems_of(mix, layers, facts, capabilities())


def size_table(
    layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[Integers, int]:
    """Refuse: the file holds names, no weights.

    Raises:
        Unsupported: always.
    """
    return no_size_table(NAME)


def size(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
    """Refuse: the file holds names, no weights.

    Raises:
        Unsupported: always.
    """
    raise no_size(NAME)


def write(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write configuration, script and note; see `contract.Target.write`."""
    return write_from_facts(allocation, folder, model.layers, model.facts)


def write_from_facts(
    allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
) -> list[Path]:
    """Write configuration, script and note where the model itself is not loaded.

    Raises:
        Unsupported: the target cannot hold the mix; nothing is written.
        InputError: the folder holds something else; nothing is changed.
    """
    mix = allocation.layers
    found = problems(mix, layers, facts) + range_problems(allocation)
    require(NAME, found or sharing_problems(mix, allocation.runtime))
    chosen = [f for f in mix.values() if f != "none"]
    common = settings(parse_format(chosen[0] if chosen else "nf4-g64"))
    kept = kept_names(mix, layers, facts)
    text = json_text({**common, SKIPPED: [quoted_regex(name) for name in kept]})
    parsed = json.loads(text)
    entries = [(pattern, None) for pattern in parsed.pop(SKIPPED)] + [("", parsed)]
    wanted = {name: common for name, f in mix.items() if f != "none"}
    verify(NAME, entries, decided, module_names(layers, facts), wanted)
    consumer = CONSUMER
    if all(name in FOUR for name in chosen):
        consumer = replace(CONSUMER, agrees=("nearest",))
    return write_all(NAME, consumer, allocation, folder, layers, facts, {FILE: text})


def decided(entries: Entries, name: str) -> Any:
    """Decide as transformers does: a pattern of the list leaves out, else the common settings."""
    *skipped, (_, common) = entries
    for pattern, _ in skipped:
        if re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name) or name.endswith(pattern):
            return None
    return common


def settings(format: Format) -> dict[str, Any]:
    """Return the arguments for the common format.

    >>> settings(parse_format("nf4-g64"))["bnb_4bit_quant_type"]
    'nf4'
    """
    if format.name in FOUR:
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": FOUR[format.name],
            "bnb_4bit_use_double_quant": False,
        }
    return {"load_in_8bit": True, "llm_int8_threshold": 0.0}
