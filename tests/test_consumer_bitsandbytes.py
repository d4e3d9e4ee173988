"""bitsandbytes runs where these tests run, so all but one are part of the default tier."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from configuration_cases import allocation
from consumer_cases import TOKENS, logits_with
from consumer_matrix import checked
from torch import Tensor

from hawqkit.formats import parse_format
from hawqkit.models.loading import load_model
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.stored import rounded_values
from hawqkit.targets import find_target

# the suffix of one that is quantized, and the head, which a list alone does not keep
KEPT = ("model.layers.0.mlp.up_proj", "lm_head")


def quantized(
    format_name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, str], LoadedModel, Any]:
    """Export a mix with one format, apply it by the script, load what it saved."""
    from transformers import AutoModelForCausalLM

    source = pico.save(folder / "model", pico.llama(hidden=128, intermediate=256, seed=1))
    model = load_model(source)
    mix = {
        x.name: "none" if x.name in KEPT or x.kind != "linear" else format_name
        for x in model.layers
    }
    find_target("bitsandbytes").write(allocation(mix), folder / "export", model)
    checked("bitsandbytes", "written")
    script = folder / "export" / "apply.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(source), str(folder / "output")])
    runpy.run_path(str(script), run_name="__main__")
    made = AutoModelForCausalLM.from_pretrained(folder / "output", device_map="cpu")
    checked("bitsandbytes", "loaded")
    return mix, model, made


@torch.no_grad()
def multiplied(module: Any) -> Tensor:
    """Return the weight (rows, columns) that a layer multiplies with."""
    found: Tensor = module(torch.eye(module.in_features)).T.float().contiguous()
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "format_name", ["nf4-g64", pytest.param("fp4-g64", marks=pytest.mark.targets)]
)
def test_4_bit_layers_in_bitsandbytes_are_ours_bit_for_bit(
    format_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear4bit

    mix, model, made = quantized(format_name, tmp_path, monkeypatch)
    seen = {n: m for n, m in made.named_modules() if isinstance(m, Linear4bit)}
    assert set(seen) == {name for name, f in mix.items() if f != "none"}
    for name, module in seen.items():
        state: Any = module.weight.quant_state
        assert (f"{state.quant_type}-g{state.blocksize}", state.nested) == (format_name, False)
        ours = rounded_values(
            model.weight(name), parse_format(format_name), rounding="nearest",
            scale_dtype=torch.float32,
        )  # fmt: skip
        assert torch.equal(multiplied(module), ours), name
    checked("bitsandbytes", "widths")
    logits = made(TOKENS).logits[0].float()
    ours_logits = logits_with(model, {name: multiplied(m) for name, m in seen.items()})
    # the same float32 products in another order
    assert (logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("bitsandbytes", "logits")


@torch.no_grad()
def test_8_bit_layers_in_bitsandbytes_round_weights_and_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.nn import Linear8bitLt

    mix, model, made = quantized("int8-channel-a8", tmp_path, monkeypatch)
    seen = {n: m for n, m in made.named_modules() if isinstance(m, Linear8bitLt)}
    assert set(seen) == {name for name, f in mix.items() if f != "none"}
    x = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)).half().float()
    weights = {}
    for name, module in seen.items():
        weight = model.weight(name).float().half().float()  # it rounds them to float16 first
        scale = weight.abs().amax(1, keepdim=True) / 127
        weights[name] = torch.round(weight / scale) * scale
        # inputs of 1 are exact, what comes out is rounded to float16; codes between two may differ
        off = (multiplied(module) - weights[name]).abs() > 2**-10 * weight.abs().max()
        assert float(off.float().mean()) < 0.01, name
    name = "model.layers.0.self_attn.q_proj"
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(x / step) * step
    got = seen[name](x)
    weight = multiplied(seen[name])
    # its output is that of rounded inputs, but that it is rounded to float16; not of exact ones
    assert (got - rounded @ weight.T).norm() < 0.2 * (got - x @ weight.T).norm()
    logits = made(TOKENS).logits[0].float()
    ours_logits = logits_with(model, weights)
    # inputs of 8 bits: 1/127/sqrt(12) of the largest each, over two blocks
    assert (logits - ours_logits).norm() < 0.05 * ours_logits.norm()
