"""AutoRound: `layer_config.json`, a settings object for each layer by its exact name.

    {"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 64, "sym": true, "data_type": "int"},
     "model.layers.0.mlp.down_proj": {"bits": 16, "act_bits": 16, "data_type": "float"}, ...}

What its version 0.16.1 does with that, each met by `apply.py` or refused here:

- a layer inside the blocks that is not named gets the scheme of the whole model: kept ones are
  named with 16 bits;
- a name that is no layer of the model is searched for as a regular expression, so a wrong one hits
  others without a word: names come from the model, and the script compares them;
- a layer whose rows or columns are no multiple of 32 is put to 16 bits;
- with `iters=0` it takes a path that packs 2, 4 and 8 bits alone: `disable_model_free=True`;
- with a symmetric scheme of the whole model, asymmetric layers are written in a layout that its
  loader passes over, and their weights come out random: then the scheme is asymmetric;
- weights of 8 bits with a zero point are refused by itself.
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
from hawqkit.targets.matching import exact, verify

NAME = "auto-round"
ABOUT = "layer_config.json for AutoRound, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("transformers", "vllm")
SIZED = False

FILE = "layer_config.json"
KEPT = {"bits": 16, "act_bits": 16, "data_type": "float"}
_IN_BLOCK = re.compile(r"\.\d+\.")

CONSUMER = Consumer(
    title="AutoRound",
    requirement="auto-round==0.16.1",
    rounding="to codes that it learns from calibration text (`--iters 200 --data texts.jsonl`), or "
    "to the nearest ones (`--iters 0`, the default of the script)",
    agrees=("nearest",),
    more="The numbers agree for `--iters 0`, but that AutoRound stores its scales in float16.\n"
    "Learned codes lose less than that.\n\n"
    "Load the output with transformers where `auto-round` is installed, or with vLLM:\n"
    "```python\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/OUTPUT", device_map="cpu")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what AutoRound packs and loads: 2 to 8 bits, asymmetric below 8."""
    return Capabilities(
        integers=(
            IntegerFormats((2, 3, 4, 5, 6), symmetric=(True, False)),
            IntegerFormats((8,)),
        ),
        rows_multiple=32,
        columns_multiple=32,
    )


def settings(format: Format) -> dict[str, Any]:
    """Return the settings of one layer.

    >>> settings(parse_format("int3-channel"))
    {'bits': 3, 'group_size': -1, 'sym': True, 'data_type': 'int'}
    """
    if not format.quantizes:
        return dict(KEPT)
    return {
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "sym": format.symmetric,
        "data_type": "int",
    }


def layer_config(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, dict[str, Any]]:
    """Return the settings of every layer that is quantized, or that a scheme would reach."""
    chosen = {name: settings(parse_format(f)) for name, f in mix.items() if f != "none"}
    embeddings = {x.name for x in layers if x.kind == "embedding"}
    kept = [n for n in kept_names(mix, layers, facts) if _IN_BLOCK.search(n)]
    return chosen | {name: dict(KEPT) for name in kept if name not in embeddings}


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = layer_config(mix, layers, facts)
    text = json_text(wanted)
    verify(NAME, list(json.loads(text).items()), exact, module_names(layers, facts), wanted)
    return {FILE: text}


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
