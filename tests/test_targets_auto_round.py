from __future__ import annotations

import json
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.records import Layer
from hawqkit.targets import auto_round


def test_layers_inside_the_blocks_that_are_kept_are_named_with_16_bits(tmp_path: Path) -> None:
    layers, facts = model(("model.layers.0.up", "model.layers.0.down", "lm_head"))
    mix = {"model.layers.0.up": "int3-g32", "lm_head": "none"}
    auto_round.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    written = json.loads((tmp_path / "out" / "layer_config.json").read_text())
    assert written == {
        "model.layers.0.up": {"bits": 3, "group_size": 32, "sym": True, "data_type": "int"},
        "model.layers.0.down": {"bits": 16, "act_bits": 16, "data_type": "float"},
    }


def test_what_auto_round_would_put_to_16_bits_is_refused() -> None:
    _, facts = model(("up",))
    for rows, columns, word in ((100, 128, "100 rows"), (128, 100, "100 columns")):
        layer = Layer("up", "linear", rows, columns, "float32")
        (problem,) = auto_round.problems({"up": "int4-channel"}, [layer], facts)
        assert word in problem
        assert "multiples of 32" in problem


def test_eight_bits_with_a_zero_point_are_refused_with_what_fits(tmp_path: Path) -> None:
    layers, facts = model(("up",))
    with pytest.raises(Unsupported, match=r"these fit: int8-g32, int8-g64, int8-g128, int8-chan"):
        auto_round.write_from_facts(
            allocation({"up": "int8-g32-asym"}), tmp_path / "out", layers, facts
        )


def test_a_tied_weight_is_refused() -> None:
    _, facts = model(("up",))
    layer = Layer("up", "linear", 128, 128, "float32", tied=("head",))
    (problem,) = auto_round.problems({"up": "int4-g32"}, [layer], facts)
    assert "'head'" in problem
