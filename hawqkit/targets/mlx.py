"""MLX: `quantization.json`, the `quantization` of an MLX model's config.json, by exact names.

    {"group_size": 32, "bits": 4, "mode": "affine",
     "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 3, "mode": "affine"},
     "lm_head": false, ...}

The first three are for layers that are not named; all are. mlx-lm 0.32.2 passes over a layer whose
columns are no multiple of the first group size, whatever its own is, without a word: so the
smallest one stands there, which divides the others.

`affine` is no grid of hawqkit: with w_e the end of a group with the larger magnitude and w_o the
other one, s = (w_o - w_e) / (2^bits - 1), q = round(w_e / s), scale w_e / q, bias w_e; where q is
0, the scale is s and the bias 0. So that w_e is exact, and zero is a code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.configuration import Consumer, json_text, kept_names, module_names
from hawqkit.targets.configured import Configured
from hawqkit.targets.contract import Capabilities, IntegerFormats
from hawqkit.targets.matching import exact, verify

NAME = "mlx"
ABOUT = "quantization.json for MLX, with a script that runs it by mlx-lm"
RUNTIMES: tuple[str, ...] = ("mlx",)
SIZED = False

FILE = "quantization.json"
FLOATS = {
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8-e4m3": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
DEFAULTS = {"group_size": 64, "bits": 4, "mode": "affine"}

CONSUMER = Consumer(
    title="MLX",
    requirement="mlx-lm==0.32.2",
    rounding="integers to a grid on which the end of each group with the larger magnitude is "
    "exact, mxfp4 and mxfp8 with scales to the nearest power of two, nvfp4 without a scale of the "
    "whole weight",
    more='On Linux install `"mlx[cpu]"` or `"mlx[cuda]"` beside it. Load the output with mlx-lm:\n'
    "```python\n"
    "from mlx_lm import load\n\n"
    'model, tokenizer = load("PATH/TO/OUTPUT")\n'
    "```",
)


def capabilities() -> Capabilities:
    """Return what its kernels multiply with; embeddings are quantized too, tied ones as one."""
    return Capabilities(
        integers=(IntegerFormats((2, 3, 4, 5, 6, 8), (32, 64, 128), symmetric=(False,)),),
        names=tuple(FLOATS),
        kinds=("linear", "embedding"),
        tied=True,
    )


def configuration(
    mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
) -> dict[str, str]:
    """Return file name -> text, matched again with the consumer's rule."""
    wanted = {n: settings(parse_format(f)) for n, f in mix.items() if f != "none"}
    by_default = min(wanted.values(), key=lambda entry: entry["group_size"], default=DEFAULTS)
    kept: dict[str, Any] = dict.fromkeys(kept_names(mix, layers, facts), False)
    text = json_text({**kept, **wanted, **by_default})
    entries = [(key, value) for key, value in json.loads(text).items() if key not in by_default]
    verify(NAME, entries, exact, module_names(layers, facts), {**kept, **wanted})
    return {FILE: text}


def settings(format: Format) -> dict[str, Any]:
    """Return the settings of one layer.

    >>> settings(parse_format("int3-g64-asym"))
    {'group_size': 64, 'bits': 3, 'mode': 'affine'}
    """
    if format.family != INTEGER:
        return dict(FLOATS[format.name])
    return {"group_size": format.group_size, "bits": format.bits, "mode": "affine"}


_TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
write, write_from_facts = _TARGET.write, _TARGET.write_from_facts
