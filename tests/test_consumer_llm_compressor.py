from __future__ import annotations

from pathlib import Path

import pytest
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked

from hawqkit.formats import parse_format

pytestmark = pytest.mark.targets

FORMATS = ("int4-g64", "int3-channel", "int8-g32", "none", "int2-g32", "fp8-e4m3-channel",
           "int4-channel")  # fmt: skip


def test_every_layer_gets_its_format_and_the_forward_pass_is_ours(tmp_path: Path) -> None:
    mix, made = run_consumer("llm-compressor", FORMATS, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": f.group_size, "inputs": None}
        for name, f in chosen.items()
    }
    checked("llm-compressor", "widths")
    for name, format_ in chosen.items():
        if format_.element:
            continue
        assert format_.bits is not None
        weight = made.model.weight(name)
        groups = weight.reshape(weight.shape[0], -1, format_.group_size or weight.shape[1])
        scale = groups.abs().amax(-1, keepdim=True) / ((2**format_.bits - 1) / 2)
        low, high = -(2 ** (format_.bits - 1)), 2 ** (format_.bits - 1) - 1
        expected = ((groups / scale).round().clamp(low, high) * scale).reshape(weight.shape)
        # float32; a code may differ where a weight lies between two
        off = (made.weights[name] - expected).abs() > 1e-5 * weight.abs().max()
        assert float(off.float().mean()) < 0.001, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products
    assert (made.logits - ours_logits).abs().max() < 1e-4 * ours_logits.abs().max()
    checked("llm-compressor", "logits")
