"""Layouts of compressed-tensors beside packed integers, loaded by plain transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pico
import pytest
import torch
from test_targets_compressed_tensors import allocation, logits_of, reloaded, total_bytes, wrapped

from hawqkit.errors import Unsupported
from hawqkit.models import load_model
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.quantize.apply import applied
from hawqkit.targets import compressed_tensors

WIDE = {
    "model.layers.0.mlp.up_proj": "fp8-e4m3-channel",
    "model.layers.0.mlp.down_proj": "fp8-e4m3-tensor",
    "model.layers.0.self_attn.q_proj": "int4-g32",
}
FOUR = {
    "model.layers.1.mlp.up_proj": "nvfp4",
    "model.layers.1.mlp.down_proj": "mxfp4",
    "model.layers.1.self_attn.o_proj": "int3-channel",
}
W8A8 = {"model.layers.0.mlp.gate_proj": "w8a8", "model.layers.1.mlp.gate_proj": "int8-channel-a8"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_that_transformers_decodes_equal_ours_bit_for_bit(
    tmp_path: Path, dtype: str
) -> None:
    pico.save(tmp_path / "source", pico.llama(dtype=getattr(torch, dtype)))
    model = load_model(str(tmp_path / "source"), dtype=dtype)
    mix = {**WIDE, **(FOUR if dtype == "bfloat16" else {})}
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    size = compressed_tensors.size(mix, model.layers, model.facts)
    assert total_bytes(tmp_path / "out") == size
    loaded = reloaded(tmp_path / "out")
    found = logits_of(loaded)  # transformers decodes when a layer is called
    with applied(model, mix, rounding="searched"):
        for name in mix:
            assert torch.equal(loaded.get_submodule(name).weight, model.weight(name)), name
        expected = logits_of(model.module)
    # Sums of the same products, in the dtype of the model.
    assert float((found - expected).abs().max()) < (1e-5 if dtype == "float32" else 0.05)


def test_rounded_inputs_are_those_of_the_consumer_but_for_its_scale(tmp_path: Path) -> None:
    model = wrapped(pico.llama())
    data = pico.sequences(4, 20)
    names = [layer for layer in model.layers if layer.name in W8A8]
    ranges = calibrate_activations(model, data, names, (8,), mode="dynamic", symmetric=True)
    mix = {**W8A8, "model.layers.0.mlp.up_proj": "int4-g32"}
    made = replace(allocation(mix), activations=ranges)
    compressed_tensors.write(made, tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == compressed_tensors.size(mix, model.layers, model.facts)
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    by_layout = {group["format"]: group for group in config["config_groups"].values()}
    assert set(by_layout) == {"int-quantized", "pack-quantized"}
    assert by_layout["int-quantized"]["input_activations"]["strategy"] == "token"
    found = logits_of(reloaded(tmp_path / "out"))
    with applied(model, mix, rounding="searched", activations=ranges):
        ours = logits_of(model.module)
    with applied(model, {n: f.replace("w8a8", "int8-channel").replace("-a8", "")
                         for n, f in mix.items()}):  # fmt: skip
        unrounded = logits_of(model.module)
    # compressed-tensors divides a token's largest magnitude by 127.5, hawqkit and vLLM by 127: the
    # two round the same inputs to grids that differ by 0.4 percent of a step per step.
    assert float((found - ours).abs().max()) < 2 * float((unrounded - ours).abs().max())
    assert float((found - unrounded).abs().max()) > 0


def test_inputs_that_its_runtimes_round_in_another_way_are_refused(tmp_path: Path) -> None:
    model = wrapped(pico.llama())
    names = [layer for layer in model.layers if layer.name in W8A8]
    for mode, symmetric in (("static", True), ("dynamic", False)):
        ranges = calibrate_activations(
            model, pico.sequences(4, 20), names, (8,), mode=mode, symmetric=symmetric
        )
        made = replace(allocation(W8A8), activations=ranges)
        with pytest.raises(Unsupported, match=r"activations: \{mode: dynamic, symmetric: true\}"):
            compressed_tensors.write(made, tmp_path / "out", model)
        assert not (tmp_path / "out").exists()


def test_formats_without_a_layout_are_refused_with_what_fits() -> None:
    model = wrapped(pico.llama())
    name = "model.layers.0.mlp.up_proj"
    for format_name, words in (
        ("w4a8", "use that or 'int4-channel'"),
        ("mxfp6-e2m3", "has no layout for it"),
        ("fp8-e5m2-channel", "fp8-e4m3-channel"),
        ("nf4-g64", "has no layout for it"),
        ("nvfp4", "decodes it to bfloat16, and the model is stored in float32"),
    ):
        (problem,) = compressed_tensors.problems({name: format_name}, model.layers, model.facts)
        assert words in problem
        assert name in problem
    capable = compressed_tensors.capabilities()
    assert {"int3-g64", "nvfp4", "fp8-e4m3-tensor"} <= set(capable.formats())
    assert "nf4-g64" not in capable.formats()


def test_shapes_that_vllm_has_no_four_bit_kernel_for_on_a_cpu_are_refused(tmp_path: Path) -> None:
    narrow = pico.llama(hidden=64, intermediate=80)  # fused, gate and up have 160 rows
    pico.save(tmp_path / "source", narrow)
    model = load_model(str(tmp_path / "source"))
    block = "model.layers.0.mlp"
    fused = {f"{block}.gate_proj": "int4-g32", f"{block}.up_proj": "int4-g32"}
    for_vllm = replace(allocation(fused), runtime="vllm-cpu")
    assert compressed_tensors.write(for_vllm, tmp_path / "fits", model)
    wide = {**fused, f"{block}.down_proj": "int4-channel"}
    for_vllm = replace(allocation(wide), runtime="vllm-cpu")
    with pytest.raises(Unsupported, match=r"down_proj.* in multiples of 32, not 64 x 80"):
        compressed_tensors.write(for_vllm, tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    assert compressed_tensors.write(allocation(wide), tmp_path / "out", model)
