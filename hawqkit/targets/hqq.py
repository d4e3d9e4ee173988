"""HQQ: `hqq.json`, the widths and groups of layers by their exact names.

    {"model.layers.0.mlp.up_proj": {"nbits": 4, "group_size": 64}, ...}

HQQ 0.2.8 has no configuration by names: its models take one for all layers that are called alike
in all blocks. So `apply.py` puts an `HQQLinear` in the place of each layer that is named, and saves
with HQQ's own functions. transformers 5.23 does not load it (`HqqConfig` is not implemented).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.configuration import (
    Consumer,
    exact,
    json_text,
    module_names,
    no_size,
    no_size_table,
    problems_of,
    sharing_problems,
    verify,
    write_all,
)
from hawqkit.targets.contract import Capabilities, IntegerFormats, require

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

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
    found = problems(mix, layers, facts)
    require(NAME, found or sharing_problems(mix, allocation.runtime))
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    text = json_text(wanted)
    verify(NAME, list(json.loads(text).items()), exact, module_names(layers, facts), wanted)
    return write_all(NAME, CONSUMER, allocation, folder, layers, facts, {FILE: text})


def settings(format: Format) -> dict[str, Any]:
    """Return the settings of one layer; the group size is null for the whole row.

    >>> settings(parse_format("int3-g64-asym"))
    {'nbits': 3, 'group_size': 64}
    """
    return {"nbits": format.bits, "group_size": format.group_size}
