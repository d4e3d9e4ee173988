from __future__ import annotations

from pathlib import Path

import pytest
from consumer_cases import logits_with, run_consumer
from consumer_matrix import checked

from hawqkit.formats import parse_format

pytestmark = pytest.mark.targets

FORMATS = ("int2-g64-asym", "int3-g32-asym", "int4-channel-asym", "none", "int8-g128-asym",
           "int5-g64-asym", "int6-channel-asym")  # fmt: skip


def test_every_layer_gets_its_width_and_is_no_worse_than_a_grid_of_it(tmp_path: Path) -> None:
    mix, made = run_consumer("hqq", FORMATS, tmp_path)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("hqq", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name).float()
        groups = weight.view(-1, format_.group_size or weight.shape[1])
        step = (groups.amax(1) - groups.amin(1)) / (2 ** (format_.bits or 0) - 1)
        error = (made.weights[name] - weight).view_as(groups).abs()
        # a grid from the smallest to the largest entry, moved by less than a step
        assert bool((error.amax(1) < 1.01 * step).all()), name
        assert float(error.square().mean()) < 1.1 * float(step.square().mean() / 12), name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("hqq", "logits")
