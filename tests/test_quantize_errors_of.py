from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.quantize.errors_of import LayerErrors, make_errors
from hawqkit.quantize.rounding import CPU_CHUNK, dequantize, quantize_weight

FORMATS = [
    parse_format(n)
    for n in ("int2-g32", "int3-g64", "int4-channel", "int5-g64-asym", "int6-g128", "int8-g64")
]


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = 0.05 * torch.randn(96, 128, generator=generator)
    plain[3] = 0.0
    return {
        "float32": plain,
        "transposed": plain.t().contiguous().t(),
        "bfloat16": plain.bfloat16(),
        "float64": plain.double() * (1 + 1e-9),
        "several chunks": 0.05 * torch.randn(2 * CPU_CHUNK // 128 + 3, 128, generator=generator),
    }


def made(weight: Tensor, keep: str, rounding: str = "searched") -> tuple[LayerErrors, Tensor]:
    errors = make_errors(weight, FORMATS, rounding=rounding, scale_dtype=torch.bfloat16, keep=keep)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    out = torch.full((len(FORMATS), *weight.shape), torch.nan, dtype=dtype)
    errors.fill(weight, out)
    return errors, out


@pytest.mark.parametrize("rounding", ["nearest", "searched"])
@pytest.mark.parametrize("which", list(weights()))
def test_codes_kept_and_codes_made_again_give_the_same_bits(which: str, rounding: str) -> None:
    weight = weights()[which]
    kept, from_codes = made(weight, "codes", rounding)
    remade, from_scales = made(weight, "none", rounding)
    assert torch.equal(from_codes, from_scales)
    assert torch.equal(kept.squared_norms, remade.squared_norms)
    for index, format_ in enumerate(FORMATS):
        q = quantize_weight(weight, format_, rounding=rounding, scale_dtype=torch.bfloat16)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        assert torch.equal(from_codes[index], dequantize(q, format_, dtype) - weight.to(dtype))


@pytest.mark.parametrize("keep", ["codes", "none"])
@pytest.mark.parametrize("rows", [slice(5, 20), torch.tensor([7, 0, 95, 7])])
def test_some_rows_are_the_rows_of_the_whole(rows: slice | Tensor, keep: str) -> None:
    weight = weights()["transposed"]
    errors, whole = made(weight, keep)
    out = torch.full((len(FORMATS), len(weight[rows]), 128), torch.nan)
    errors.fill(weight, out, rows)
    assert torch.equal(out, whole[:, rows])


@pytest.mark.parametrize("which", ["float32", "float64"])
def test_a_float64_buffer_holds_the_errors_of_the_same_codes(which: str) -> None:
    weight = weights()[which]
    for keep in ("codes", "none"):
        errors, single = made(weight, keep)
        out = torch.full(single.shape, torch.nan, dtype=torch.float64)
        errors.fill(weight, out)
        for index, format_ in enumerate(FORMATS):
            q = quantize_weight(weight, format_, scale_dtype=torch.bfloat16)
            exact = dequantize(q, format_, torch.float64) - weight.double()
            assert torch.equal(out[index], exact)


def test_norms_are_those_of_the_errors() -> None:
    errors, out = made(weights()["float32"], "none")
    exact = out.double().square().sum(dim=(1, 2))
    assert errors.squared_norms.dtype is torch.float64
    torch.testing.assert_close(errors.squared_norms, exact, rtol=1e-6, atol=0.0)


def test_bytes_held_are_those_of_codes_scales_and_zero_points() -> None:
    weight = weights()["float32"]
    kept, remade = made(weight, "codes")[0], made(weight, "none")[0]
    groups = [96 * f.groups_per_row(128) for f in FORMATS]
    small = sum(2 * g for g in groups) + groups[3] + 8 * len(FORMATS)
    assert remade.nbytes == small
    assert kept.nbytes == small + weight.numel() * len(FORMATS)


def test_a_buffer_of_another_shape_or_dtype_is_refused() -> None:
    weight = weights()["float32"]
    errors, out = made(weight, "codes")
    for wrong in (out[1:], out.half(), out.transpose(1, 2)):
        with pytest.raises(InputError, match="give a contiguous buffer"):
            errors.fill(weight, wrong)


def test_wrong_requests_are_refused() -> None:
    weight = weights()["float32"]
    with pytest.raises(InputError, match="Did you mean 'codes'"):
        made(weight, "code")
    with pytest.raises(InputError, match="unknown rounding"):
        made(weight, "none", "best")
    with pytest.raises(Unsupported, match="96 columns"):
        made(weight.t(), "none")
    weight[1, 2] = torch.inf
    with pytest.raises(NumericalError, match="row 1, column 2"):
        made(weight, "codes")
