from __future__ import annotations

from pathlib import Path

import pytest
from consumer_cases import logits_with, run_consumer, texts
from consumer_matrix import checked

from hawqkit.formats import parse_format

pytestmark = pytest.mark.targets

PLAIN = ("int4-g64", "int3-channel", "int8-g32", "int2-g32", "none", "int4-g128")
WIDE = ("int4-g64-asym", "int6-g32", "int8-channel-asym", "int5-g64", "none", "int2-g32-asym")


@pytest.mark.parametrize("formats", [PLAIN, WIDE], ids=["plain", "wide"])
def test_every_layer_gets_its_format_and_the_forward_pass_is_ours(
    formats: tuple[str, ...], tmp_path: Path
) -> None:
    data = texts(tmp_path / "data")
    mix, made = run_consumer("gptqmodel", formats, tmp_path, "--data", str(data))
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert made.layers == {
        name: {"bits": f.bits, "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("gptqmodel", "widths")
    for name, format_ in chosen.items():
        assert format_.bits is not None
        weight = made.model.weight(name)
        error = (made.weights[name] - weight).square().mean() / weight.square().mean()
        # a uniform grid over some four standard deviations each way has steps of 8 / 2^b of one and
        # an error of step^2 / 12; GPTQ trades weights' errors against outputs', at most tenfold
        assert 0 < float(error) < 10 * (8 / 2**format_.bits) ** 2 / 12, name
    ours_logits = logits_with(made.model, made.weights)
    # its CPU kernel computes in float16: 2^-11 relative for each of some ten operations in a row
    assert (made.logits - ours_logits).abs().max() < 0.02 * ours_logits.abs().max()
    checked("gptqmodel", "logits")
