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
from typing import Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, kept_names, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import Entries, quoted_regex, verify

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
    nearest=FOUR.__contains__,
)


def capabilities() -> Capabilities:
    """Return the formats of its linear layers, of which a model has one."""
    return Capabilities(
        integers=(IntegerFormats((8,), (None,), activations=(8,)),),
        names=tuple(FOUR),
        mixed=False,
        dynamic_inputs=True,
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    chosen = [f for f in mix.values() if f != "none"]
    common = settings(parse_format(chosen[0] if chosen else "nf4-g64"))
    kept = kept_names(mix, layers, facts)
    text = json_text({**common, SKIPPED: [quoted_regex(name) for name in kept]})
    parsed = json.loads(text)
    entries = [(pattern, None) for pattern in parsed.pop(SKIPPED)] + [("", parsed)]
    wanted = {name: common for name, f in mix.items() if f != "none"}
    verify(NAME, entries, decided, module_names(layers, facts), wanted)
    return {FILE: text}


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


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
