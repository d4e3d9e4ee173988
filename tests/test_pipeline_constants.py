"""Weights that are zero or constant, in part or wholly, go through a whole run without NaN."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from command_line import RECIPE, succeed

FILES = ["sensitivities.json", "allocation.json", "frontier.json", "validation.json",
         "provenance.json", "exports/bits/bits.json"]  # fmt: skip
ZERO, EQUAL = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module", params=["symmetric", "asymmetric"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp(request.param)
    model = pico.llama()
    with torch.no_grad():
        first = model.model.layers[0]
        first.mlp.up_proj.weight[3] = 0  # a row
        first.mlp.up_proj.weight[5, :32] = 0  # a group
        first.self_attn.q_proj.weight[2, :32] = 0.7  # a constant group
        first.self_attn.q_proj.weight[3, 32:] = -0.7
        first.self_attn.o_proj.weight[1] = 1e-30  # squares underflow
        model.get_submodule(ZERO).weight.zero_()
        model.get_submodule(EQUAL).weight.fill_(0.25)
    pico.save(home / "model", model)
    recipe = RECIPE.replace(
        "baselines: [uniform]", "baselines: [uniform, ends, weight-error, hawq-v2]"
    )
    if request.param == "asymmetric":
        recipe = recipe.replace("-g32", "-g32-asym")
    else:
        recipe = recipe.replace("export: [bits]", "export: [bits, compressed-tensors]")
    (home / "r.yaml").write_text(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        succeed("run", "r.yaml", "-o", "run")
    return home / "run"


def numbers(node: Any) -> list[float]:
    if isinstance(node, dict):
        return [n for value in node.values() for n in numbers(value)]
    if isinstance(node, list):
        return [n for value in node for n in numbers(value)]
    return [float(node)] if isinstance(node, int | float) else []


@pytest.mark.parametrize("file", FILES)
def test_no_record_holds_nan_or_infinity(run: Path, file: str) -> None:
    text = (run / file).read_text()
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    assert np.isfinite(numbers(json.loads(text))).all()


def test_every_sensitivity_is_a_number_and_that_of_a_zero_weight_is_zero(run: Path) -> None:
    table = json.loads((run / "sensitivities.json").read_text())
    names = [layer["name"] for layer in table["layers"]]
    for score in table["scores"].values():
        for part in ("values", "stderr"):
            values = np.array(score[part], dtype=float)
            assert values.shape == (14, 3)
            assert np.isfinite(values).all()
            assert (values >= 0).all()
        assert (np.array(score["values"])[names.index(ZERO)] == 0).all()
    assert (np.array(table["weight_error"])[names.index(ZERO)] == 0).all()


def test_a_constant_weight_is_kept_to_the_rounding_of_its_scale(run: Path) -> None:
    table = json.loads((run / "sensitivities.json").read_text())
    names = [layer["name"] for layer in table["layers"]]
    error = np.array(table["weight_error"])[names.index(EQUAL)]
    norm = 0.25**2 * 32 * 64
    # A group of one value needs one code; what is left is the scale in bfloat16, 2^-9 relative.
    assert (error <= norm * 2**-16).all()


def test_the_zero_weight_takes_the_narrowest_format(run: Path) -> None:
    mix = json.loads((run / "allocation.json").read_text())["layers"]
    assert mix[ZERO].startswith("int3")


def test_every_sample_is_finite(run: Path) -> None:
    from safetensors.numpy import load_file

    for name, values in load_file(run / "samples.safetensors").items():
        assert np.isfinite(values).all(), name
    for path in run.glob("exports/compressed-tensors/*.safetensors"):
        from safetensors.torch import load_file as load

        for name, tensor in load(path).items():
            assert not tensor.is_floating_point() or torch.isfinite(tensor).all(), name
