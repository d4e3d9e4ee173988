from __future__ import annotations

from pathlib import Path

import pytest
import torch
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked
from torch import Tensor

from hawqkit.formats import parse_format
from hawqkit.quantize.stored import rounded_values

pytestmark = pytest.mark.targets

FORMATS = ("int2-g64-asym", "mxfp4", "int3-g128-asym", "nvfp4", "none", "int5-g32-asym",
           "mxfp8-e4m3", "int8-g64-asym")  # fmt: skip
MODES = {"mxfp4": "mxfp4", "mxfp8-e4m3": "mxfp8", "nvfp4": "nvfp4"}


def affine(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round as MLX does: see the first lines of hawqkit/targets/mlx.py."""
    x = weight.reshape(-1, group)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    last = 2**bits - 1
    below = low.abs() > high.abs()
    scale = ((high - low) / last).clamp(min=1e-7) * torch.where(below, 1.0, -1.0)
    edge = torch.where(below, low, high)
    code = torch.round(edge / scale)
    scale = torch.where(code != 0, edge / code, scale)
    bias = torch.where(code != 0, edge, 0.0)
    codes = torch.clamp(torch.round((x - bias) / scale), 0, last)
    return (codes * scale + bias).view_as(weight)


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied"])
def test_every_layer_gets_its_mode_and_the_documented_grid(tied: bool, tmp_path: Path) -> None:
    more = {"model.embed_tokens": "int6-g32-asym"}
    mix, made = run_consumer("mlx", FORMATS, tmp_path, more=more, tied=tied, runtime="mlx")
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"mode": MODES.get(f.name, "affine"), "bits": f.bits, "group_size": f.group_size}
        for name, f in chosen.items()
    }
    checked("mlx", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name).float()
        if format_.family == "integer":
            assert format_.bits is not None
            assert format_.group_size is not None
            ours = affine(weight, format_.bits, format_.group_size)
            # float32 scales and products: 2^-23; a code may differ where a quotient is a half
            off = (made.weights[name] - ours).abs() > 1e-6 * weight.abs().max()
            assert float(off.float().mean()) < 1e-3, name
        else:
            ours = rounded_values(weight, format_, rounding="nearest", scale_dtype=torch.float32)
            # mxfp*: other powers of two; nvfp4: no scale of the whole weight
            error = (made.weights[name] - weight).norm()
            assert 0.75 < error / (ours - weight).norm() < 1.25, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("mlx", "logits")
