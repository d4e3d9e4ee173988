from __future__ import annotations

from pathlib import Path

import pytest
import torch
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked

from hawqkit.formats import Format, parse_format
from hawqkit.quantize.stored import rounded_values

pytestmark = pytest.mark.targets

FORMATS = ("int8-channel", "int4-g64-asym", "int3-g128", "none", "int2-g64", "int4-channel",
           "int2-g32", "int8-channel-asym")  # fmt: skip


def type_of(format: Format) -> str:
    signed = format.symmetric and format.bits not in (2, 3)  # those have a fixed zero point
    return f"{'i' if signed else 'u'}{format.bits}"


def test_nearest_rounding_in_openvino_is_ours(tmp_path: Path) -> None:
    # NNCF gives the last layer 8 bits with a zero point by itself
    more = {"lm_head": "int4-g32"}
    mix, made = run_consumer("openvino", FORMATS, tmp_path, more=more, runtime="openvino")
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert {f.name for f in chosen.values()} == {*FORMATS, "int4-g32"} - {"none"}
    assert made.layers == {
        name: {"type": type_of(f), "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("openvino", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name).float()
        ours = rounded_values(weight, format_, rounding="nearest", scale_dtype=torch.float32)
        # the scales are stored in float16: 2^-11 of a value
        off = (made.weights[name] - ours).abs() > 2**-10 * weight.abs().max()
        assert float(off.float().mean()) < 1e-4, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("openvino", "logits")
