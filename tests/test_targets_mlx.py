from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from configuration_cases import allocation, model

from hawqkit.errors import Unsupported
from hawqkit.targets import mlx


def test_the_group_of_the_model_divides_the_columns_of_every_layer(tmp_path: Path) -> None:
    layers, facts = model(("a", "b", "c", "d"))
    layers = [replace(x, columns=n) for x, n in zip(layers, (512, 96, 48, 128), strict=True)]
    mix = {"a": "int3-g128-asym", "b": "mxfp4", "c": "nvfp4", "d": "none"}
    mlx.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    common = {key: found.pop(key) for key in ("group_size", "bits", "mode")}
    # mlx-lm passes over a layer whose columns are no multiple of this one, whatever its own is
    assert all(layer.columns % common["group_size"] == 0 for layer in layers if mix[layer.name])
    assert common == {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    assert found == {
        "a": {"group_size": 128, "bits": 3, "mode": "affine"},
        "b": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "c": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "d": False,
        "norm_like": False,
    }


@pytest.mark.parametrize("name", ["bits", "mode", "group_size"])
def test_a_layer_called_as_a_setting_of_the_model_is_refused(name: str, tmp_path: Path) -> None:
    layers, facts = model((name, "b"))
    for format_name in ("int4-g64-asym", "none"):
        mix = {name: format_name, "b": "int4-g64-asym"}
        with pytest.raises(Unsupported, match=f"'{name}'.*would get"):
            mlx.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)


def test_a_tied_embedding_is_quantized_as_one(tmp_path: Path) -> None:
    layers, facts = model(("model.embed_tokens",))
    layers = [replace(layers[0], kind="embedding", tied=("lm_head",))]
    mix = {"model.embed_tokens": "int6-g64-asym"}
    mlx.write_from_facts(allocation(mix, "mlx"), tmp_path / "out", layers, facts)
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert found["model.embed_tokens"]["bits"] == 6
