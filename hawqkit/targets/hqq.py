"""HQQ: `hqq.json`, the widths and groups of layers by their exact names.

    {"model.layers.0.mlp.up_proj": {"nbits": 4, "group_size": 64}, ...}

HQQ 0.2.8 has no configuration by names: its models take one for all layers that are called alike
in all blocks. So `apply.py` puts an `HQQLinear` in the place of each layer that is named, and saves
with HQQ's own functions. transformers 5.23 does not load it (`HqqConfig` is not implemented).
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

NAME = "hqq"
ABOUT = "hqq.json for HQQ, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("hqq",)
SIZED = False

FILE = "hqq.json"

CONSUMER = Consumer(
    title="HQQ",
    requirement="hqq==0.2.8.post1",
    rounding="to a grid whose zero point, a float but for 4 bits, it improves in some twenty "
    "steps for a sparse error (half-quadratic optimization)",
    more="Load the output with HQQ:\n"
    "```python\n"
    "from hqq.models.hf.base import AutoHQQHFModel\n\n"
    'model = AutoHQQHFModel.from_quantized("PATH/TO/OUTPUT", compute_dtype=torch.bfloat16,\n'
    '                                      device="cpu")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what it packs: every width with a zero point for each group."""
    return Capabilities(integers=(IntegerFormats((2, 3, 4, 5, 6, 8), symmetric=(False,)),))


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    text = json_text(wanted)
    verify(NAME, list(json.loads(text).items()), exact, module_names(layers, facts), wanted)
    return {FILE: text}


def settings(format: Format) -> dict[str, Any]:
    """Return the settings of one layer; the group size is null for the whole row.

    >>> settings(parse_format("int3-g64-asym"))
    {'nbits': 3, 'group_size': 64}
    """
    return {"nbits": format.bits, "group_size": format.group_size}


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
