from __future__ import annotations

from pathlib import Path

import pytest
import torch
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked
from torch import Tensor

from hawqkit.formats import Format, parse_format
from hawqkit.quantize.stored import rounded_values
from hawqkit.targets.quanto import TYPES

pytestmark = pytest.mark.targets

FORMATS = ("int4-g128-asym", "int2-g128-asym", "int8-channel", "none", "fp8-e4m3-channel",
           "fp8-e5m2-channel")  # fmt: skip


def theirs(weight: Tensor, format: Format) -> Tensor:
    """Round as quanto says it does."""
    if format.family != "integer":
        return rounded_values(weight, format, rounding="nearest", scale_dtype=torch.float32)
    groups = weight.reshape(-1, format.group_size or weight.shape[1])
    if format.bits == 8:
        scale = groups.abs().amax(1, keepdim=True) / 127
        return (torch.clamp(torch.round(groups / scale), -127, 127) * scale).view_as(weight)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    last = 2 ** (format.bits or 0) - 1
    scale = (high - low) / last
    codes = torch.clamp(torch.round((groups - low) / scale), 0, last)
    return (codes * scale + low).view_as(weight)


def test_every_layer_gets_its_type_and_the_documented_grid(tmp_path: Path) -> None:
    mix, made = run_consumer("quanto", FORMATS, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert {f.name for f in chosen.values()} == set(FORMATS) - {"none"}
    assert made.layers == {
        name: {"type": TYPES[f.name], "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("quanto", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name).float()
        # float32 scales and products; a code may differ where a quotient is a half
        off = (made.weights[name] - theirs(weight, format_)).abs() > 1e-6 * weight.abs().max()
        assert float(off.float().mean()) < 1e-3, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("quanto", "logits")
