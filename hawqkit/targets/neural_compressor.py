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
from typing import Any

from hawqkit.formats import Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import Entries, quoted_regex, verify

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


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    text = json_text({quoted_regex(name): value for name, value in wanted.items()})
    names = module_names(layers, facts)
    verify(NAME, list(json.loads(text).items()), last_prefix, names, wanted)
    return {FILE: text}


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


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
