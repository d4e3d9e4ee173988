from __future__ import annotations

from pathlib import Path

import pytest
import torch
from consumer_cases import logits_with, run_consumer, texts
from consumer_matrix import checked

from hawqkit.formats import parse_format
from hawqkit.quantize.rounding import dequantize, quantize_weight

pytestmark = pytest.mark.targets

SYMMETRIC = ("int2-g64", "int3-channel", "int8-g32", "int4-g32", "int5-g128", "none", "int6-g64")
MIXED = ("int4-g64-asym", "int8-channel", "int3-g32", "none", "int2-g32-asym", "int4-g128")


@pytest.mark.parametrize("formats", [SYMMETRIC, MIXED], ids=["symmetric", "mixed"])
def test_nearest_rounding_in_auto_round_is_ours(formats: tuple[str, ...], tmp_path: Path) -> None:
    mix, made = run_consumer("auto-round", formats, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("auto-round", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name)
        ours = dequantize(
            quantize_weight(weight, format_, rounding="nearest", scale_dtype=torch.float16),
            format_,
        )
        # fp16 weights: 2^-11 of a weight; a code may differ where a weight lies between two
        off = (made.weights[name] - ours).abs() > 1e-3 * weight.abs().max()
        assert float(off.float().mean()) < 0.01, name
    ours_logits = logits_with(made.model, made.weights)
    # the consumer computes in float16: 2^-11 relative for each of some ten operations in a row
    assert (made.logits - ours_logits).abs().max() < 0.02 * ours_logits.abs().max()
    checked("auto-round", "logits")


def test_learned_rounding_keeps_the_mix(tmp_path: Path) -> None:
    data = texts(tmp_path / "data")
    options = ("--iters", "2", "--data", str(data), "--tokens", "64", "--samples", "8")
    mix, made = run_consumer("auto-round", SYMMETRIC, tmp_path, *options)
    bits = {name: parse_format(f).bits for name, f in mix.items() if f != "none"}
    assert {name: entry["bits"] for name, entry in made.layers.items()} == bits
    checked("auto-round", "widths")
    assert torch.isfinite(made.logits).all()
