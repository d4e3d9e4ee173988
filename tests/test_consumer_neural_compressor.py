from __future__ import annotations

from pathlib import Path

import pytest
import torch
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked

from hawqkit.formats import parse_format
from hawqkit.quantize.rounding import dequantize, quantize_weight

pytestmark = pytest.mark.targets

FORMATS = ("int4-g64", "int3-channel", "int8-g32", "int2-g32-asym", "none", "int6-g64-asym",
           "int5-g128")  # fmt: skip


def test_nearest_rounding_in_neural_compressor_is_ours(tmp_path: Path) -> None:
    mix, made = run_consumer("neural-compressor", FORMATS, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("neural-compressor", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name)
        ours = dequantize(
            quantize_weight(weight, format_, rounding="nearest", scale_dtype=torch.float32), format_
        )
        # codes from float32 scales, which are stored in float16, as is the product: 2^-11 for each
        off = (made.weights[name] - ours).abs() > 2**-10 * weight.abs().max()
        assert float(off.float().mean()) < 0.001, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-4 * ours_logits.abs().max()
    checked("neural-compressor", "logits")
