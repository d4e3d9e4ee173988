from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from consumer_cases import ROOT, consumer, logits_with, run_consumer
from consumer_matrix import checked
from safetensors.torch import load_file, save_file
from torch import Tensor

from hawqkit.formats import Format, parse_format
from hawqkit.quantize.stored import rounded_values

pytestmark = pytest.mark.targets

# g128 of 128 columns is the whole row
FORMATS = ("int2-g64", "int3-channel-asym", "int8-g32", "int4-g32-asym", "fp8-e4m3-channel", "none",
           "int6-g64", "fp8-e5m2-channel")  # fmt: skip
MX = ("mxfp4", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp8-e4m3", "mxfp8-e5m2")


def dtype_of(format: Format) -> str:
    if format.family == "integer":
        return f"torch.int{format.bits}"
    return "torch.float8_e4m3fn" if "e4m3" in format.name else "torch.float8_e5m2"


def symmetric_grid(weight: Tensor, format: Format) -> Tensor:
    """Round as torchao says it does: scale = 2 a / (2^b - 1), codes -2^(b-1) .. 2^(b-1) - 1."""
    groups = weight.reshape(-1, format.group_size or weight.shape[1])
    half = 2 ** ((format.bits or 0) - 1)
    scale = groups.abs().amax(1, keepdim=True) / ((2 * half - 1) / 2)
    # -a lies in the middle of two codes at every width: the reciprocal, as there, decides for them
    codes = torch.clamp(torch.round(groups * (1.0 / scale)), -half, half - 1)
    return (codes * scale).view_as(weight)


def test_every_layer_gets_its_type_and_our_values_where_the_grid_is_ours(tmp_path: Path) -> None:
    # transformers leaves out the head by itself, unless it is told not to
    more = {"lm_head": "int8-channel-asym"}
    mix, made = run_consumer("torchao", FORMATS, tmp_path, more=more)
    chosen = {name: parse_format(f) for name, f in mix.items() if f != "none"}
    assert "lm_head" in made.layers
    assert {f.name for f in chosen.values()} == {*FORMATS, "int8-channel-asym"} - {"none"}
    assert made.layers == {
        name: {"dtype": dtype_of(f), "group_size": None if f.group_size == w else f.group_size}
        for name, f in chosen.items()
        for w in [made.weights[name].shape[1]]
    }
    checked("torchao", "widths")
    for name, format_ in chosen.items():
        weight = made.model.weight(name).float()
        if format_.family == "integer" and format_.symmetric:
            ours = symmetric_grid(weight, format_)
        else:
            ours = rounded_values(weight, format_, rounding="nearest", scale_dtype=torch.float32)
        # float32 scales and products: 2^-23, and torchao decodes with a product of its own
        off = (made.weights[name] - ours).abs() > 1e-6 * weight.abs().max()
        # a quotient may lie within 2^-23 of the middle between two codes
        assert float(off.float().mean()) < 1e-4, name
    ours_logits = logits_with(made.model, made.weights)
    # the same float32 products in another order
    assert (made.logits - ours_logits).abs().max() < 1e-5 * ours_logits.abs().max()
    checked("torchao", "logits")


def test_formats_of_ocp_mx_are_those_of_torchao_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator)
    weight *= torch.exp2(
        torch.randint(-40, 40, (96, 8), generator=generator).float()
    ).repeat_interleave(32, dim=1)
    weight[3, :32] = 0
    weight[4, 32:64] = 2.0**-20 * torch.arange(32)
    save_file({"weight": weight}, tmp_path / "weight.safetensors")
    done = subprocess.run(
        [consumer("torchao"), ROOT / "tests" / "consumers" / "torchao.py", "floats",
         tmp_path / "weight.safetensors", tmp_path / "result.safetensors"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "result.safetensors")
    assert set(theirs) == set(MX)
    for name in MX:
        ours = rounded_values(
            weight, parse_format(name), rounding="nearest", scale_dtype=torch.float32
        )
        # == and not the bits: a negative zero is zero
        assert bool((ours == theirs[name]).all()), name
