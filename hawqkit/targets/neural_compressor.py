r"""neural-compressor (Intel): `rtn_config.json`, settings by regular expressions on names.

    {"^model\\\\.layers\\\\.0\\\\.mlp\\\\.up_proj$":
         {"bits": 4, "group_size": 64, "use_sym": true, "use_full_range": true}, ...}

`apply.py` makes of it an `RTNConfig` with one `set_local` an entry, and "fp32" for all else. Names
are matched by their start and the last match decides (version 3.10), so each pattern ends in `$`.
`use_full_range` gives the symmetric grid of hawqkit's `nearest`: 2^bits levels, with the extra one
on the side of the largest entry. Refused are 8 bits with a zero point: codes above 127 overflow
when its packed layer decodes them, and some percent of the weights come out wrong without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.configuration import (
    Consumer,
    Entries,
    json_text,
    module_names,
    no_size,
    no_size_table,
    problems_of,
    quoted_regex,
    sharing_problems,
    verify,
    write_all,
)
from hawqkit.targets.contract import Capabilities, IntegerFormats, require

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

NAME = "neural-compressor"
ABOUT = "rtn_config.json for Intel neural-compressor, with a script that runs it"
RUNTIMES: tuple[str, ...] = ("neural-compressor",)
SIZED = False

FILE = "rtn_config.json"

CONSUMER = Consumer(
    title="neural-compressor",
    requirement="neural-compressor[pt]==3.10",
    rounding="to the nearest value of the same grid, with scales that are stored in float16",
    agrees=("nearest",),
    more="Load the output into the model that it was made from:\n"
    "```python\n"
    "from neural_compressor.torch.quantization import load\n\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH/TO/MODEL")\n'
    'model = load("PATH/TO/OUTPUT", model)\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what its rounding to nearest takes and its packed layers give back."""
    return Capabilities(
        integers=(
            IntegerFormats((2, 3, 4, 5, 6), symmetric=(True, False)),
            IntegerFormats((8,)),
        )
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
    found = problems(mix, layers, facts)
    require(NAME, found or sharing_problems(mix, allocation.runtime))
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    text = json_text({quoted_regex(name): value for name, value in wanted.items()})
    names = module_names(layers, facts)
    verify(NAME, list(json.loads(text).items()), last_prefix, names, wanted)
    return write_all(NAME, CONSUMER, allocation, folder, layers, facts, {FILE: text})


def last_prefix(entries: Entries, name: str) -> Any:
    """Decide by the last entry whose regular expression matches a prefix (`re.match`)."""
    matching = [value for text, value in entries if re.match(text, name)]
    return matching[-1] if matching else None


def settings(format: Format) -> dict[str, Any]:
    """Return the arguments of the `RTNConfig` of one layer.

    >>> settings(parse_format("int3-channel-asym"))
    {'bits': 3, 'group_size': -1, 'use_sym': False, 'use_full_range': False}
    """
    return {
        "bits": format.bits,
        "group_size": format.group_size or -1,
        "use_sym": format.symmetric,
        "use_full_range": format.symmetric,
    }
