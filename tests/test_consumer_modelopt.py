from __future__ import annotations

from pathlib import Path

import pytest
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked

from hawqkit.formats import parse_format

pytestmark = pytest.mark.targets

FORMATS = ("int4-g64", "int3-channel", "int8-g32", "fp8-e4m3-channel", "none", "int2-g32",
           "fp8-e4m3-tensor", "int6-g128")  # fmt: skip


def test_every_layer_gets_its_format_and_the_numbers_are_those_of_its_grid(tmp_path: Path) -> None:
    mix, made = run_consumer("modelopt", FORMATS, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": f.group_size} for name, f in chosen.items()
    }
    checked("modelopt", "widths")
    for name, format_ in chosen.items():
        if format_.element:
            continue
        assert format_.bits is not None
        weight = made.model.weight(name)
        groups = weight.reshape(weight.shape[0], -1, format_.group_size or weight.shape[1])
        scale = groups.abs().amax(-1, keepdim=True) / (2 ** (format_.bits - 1) - 1)
        expected = ((groups / scale).round() * scale).reshape(weight.shape)
        # float32; a code may differ where a weight lies between two
        off = (made.weights[name] - expected).abs() > 1e-5 * weight.abs().max()
        assert float(off.float().mean()) < 0.001, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products
    assert (made.logits - ours_logits).abs().max() < 1e-4 * ours_logits.abs().max()
    checked("modelopt", "logits")
