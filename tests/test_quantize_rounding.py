from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load, save

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import Format, parse_format
from hawqkit.quantize.rounding import (
    CPU_CHUNK,
    Quantized,
    codes_from_scales,
    dequantize,
    quantize_weight,
    scale_dtype_for,
    scales_of,
)

BITS = (2, 3, 4, 5, 6, 8)
NAMES = [f"int{b}-{g}{a}" for b in BITS for g in ("g32", "g64", "channel") for a in ("", "-asym")]
SHRINKS = (1.0, 0.93, 0.86)


def gaussian(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (0.05 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)).to(dtype)


def to_bfloat16(x: float) -> float:
    """Round to 8 significant bits, ties to even: bfloat16 away from its limits."""
    if x == 0.0:
        return x
    mantissa, exponent = np.frexp(x)
    return float(np.ldexp(np.rint(mantissa * 256.0), int(exponent) - 8))


def reference_group(
    group: NDArray[np.float64], bits: int, symmetric: bool, shrink: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], float, int]:
    """One group by the book: values, codes, scale, zero point."""
    half = 2 ** (bits - 1)
    if symmetric:
        scale = -shrink * float(group[np.argmax(np.abs(group))]) / half
    else:
        scale = shrink * (max(group.max(), 0.0) - min(group.min(), 0.0)) / (2**bits - 1)
    scale = to_bfloat16(scale) or 1.0
    zero = 0
    if not symmetric and np.any(group):
        zero = int(
            np.clip(np.rint(-half - shrink * min(group.min(), 0.0) / scale), -half, half - 1)
        )
    codes = np.clip(np.rint(group / scale) + zero, -half, half - 1).astype(np.int64)
    return (codes - zero) * scale, codes, scale, zero


def reference(
    weight: NDArray[np.float64], format_: Format, rounding: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    assert format_.bits is not None
    rows, columns = weight.shape
    size = format_.group_size or columns
    values, codes = np.empty_like(weight), np.empty(weight.shape, dtype=np.int64)
    for row, start in itertools.product(range(rows), range(0, columns, size)):
        part = slice(start, start + size)
        group = weight[row, part]
        shrinks = SHRINKS if rounding == "searched" else SHRINKS[:1]
        found = [reference_group(group, format_.bits, format_.symmetric, r) for r in shrinks]
        best = min(found, key=lambda f: float(np.sum((f[0] - group) ** 2)))
        values[row, part], codes[row, part] = best[:2]
    return values, codes


@pytest.mark.parametrize("rounding", ["nearest", "searched"])
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_values_equal_those_of_a_float64_reference(name: str, rounding: str) -> None:
    format_ = parse_format(name)
    weight = gaussian(7, 128, seed=len(name))
    weight[2, :32] = 0.0
    weight[3] = 0.0
    weight[4, 64:] = 0.03
    weight[5] = -weight[5].abs()
    quantized = quantize_weight(weight, format_, rounding=rounding, scale_dtype=torch.bfloat16)
    values, codes = reference(weight.numpy(), format_, rounding)
    assert np.array_equal(quantized.codes.numpy(), codes)
    assert np.array_equal(dequantize(quantized, format_, torch.float64).numpy(), values)


@pytest.mark.parametrize("name", ["int2-g32", "int4-g64", "int8-channel", "int3-g64-asym"])
def test_float32_differs_from_the_float64_reference_only_at_ties(name: str) -> None:
    format_ = parse_format(name)
    weight = gaussian(32, 128, dtype=torch.float32)
    quantized = quantize_weight(weight, format_, scale_dtype=torch.bfloat16)
    _, codes = reference(weight.double().numpy(), format_, "searched")
    assert np.mean(quantized.codes.numpy() != codes) < 2e-3  # quotients that round to a half


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_entry_gets_the_extra_level_and_codes_stay_in_range(name: str) -> None:
    format_ = parse_format(name)
    assert format_.bits is not None
    half = 1 << (format_.bits - 1)
    weight = gaussian(16, 128, seed=3, dtype=torch.float32)
    quantized = quantize_weight(weight, format_, rounding="nearest", scale_dtype=torch.bfloat16)
    assert quantized.codes.dtype is torch.int8
    assert -half <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= half - 1
    if format_.symmetric:
        size = format_.group_size or 128
        groups = weight.view(-1, size)
        largest = groups.abs().argmax(-1, keepdim=True)
        codes = quantized.codes.view(-1, size).gather(1, largest)
        # The scale is rounded to 8 bits, so at 8 bits the largest entry may land one level inside.
        assert bool((codes <= -half + (1 if format_.bits == 8 else 0)).all())
        signs = groups.gather(1, largest).sign().view(quantized.scales.shape)
        assert torch.equal(quantized.scales.float().sign(), -signs)


@pytest.mark.parametrize(
    ("bits", "nearest", "searched"), [(4, 0.85, 0.79), (3, 0.76, 0.66), (2, 0.60, 0.52)]
)
def test_signed_scales_lower_the_squared_error_of_plain_absmax_on_gaussian_weights(
    bits: int, nearest: float, searched: float
) -> None:
    format_ = parse_format(f"int{bits}-g64")
    weight = gaussian(512, 512, dtype=torch.float32)
    groups = weight.view(-1, 64)
    scale = groups.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    half = 1 << (bits - 1)
    plain = float(((groups / scale).round().clamp(-half, half - 1) * scale - groups).square().sum())
    for rounding, expected in (("nearest", nearest), ("searched", searched)):
        q = quantize_weight(weight, format_, rounding=rounding, scale_dtype=torch.bfloat16)
        ratio = float((dequantize(q, format_) - weight).square().sum()) / plain
        assert abs(ratio - expected) < 0.02  # 4,096 groups leave less than 0.005


def test_searched_is_never_worse_than_nearest_in_any_group() -> None:
    weight = gaussian(64, 256, seed=5)
    for name in NAMES:
        format_ = parse_format(name)
        errors = []
        for rounding in ("searched", "nearest"):
            q = quantize_weight(weight, format_, rounding=rounding, scale_dtype=torch.bfloat16)
            error = dequantize(q, format_, torch.float64) - weight
            errors.append(error.view(*q.scales.shape, -1).square().sum(-1))
        assert bool((errors[0] <= errors[1] * (1 + 1e-12)).all())
        if format_.bits in (2, 3, 4):  # finer grids gain nothing from clipping
            assert bool((errors[0] < errors[1]).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_zero_and_constant_groups_give_finite_numbers(name: str, dtype: torch.dtype) -> None:
    format_ = parse_format(name)
    weight = torch.zeros(4, 64, dtype=dtype)
    weight[1] = 0.75
    weight[2] = -0.75
    weight[3, 5] = 1e-6  # with a float16 scale some of these underflow
    scale_dtype = scale_dtype_for(str(dtype).removeprefix("torch."))
    quantized = quantize_weight(weight, format_, scale_dtype=scale_dtype)
    values = dequantize(quantized, format_)
    assert bool(torch.isfinite(values).all())
    assert bool((quantized.scales != 0).all())
    assert bool((quantized.codes[0] == 0).all())
    assert bool((values[0] == 0).all())
    tolerance = 0.75 * 2**-7  # half a step of the widest format, and the scale's 8 bits
    if format_.bits == 8:
        assert float((values[1:3] - weight[1:3].float()).abs().max()) <= tolerance


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym"])
def test_nan_and_infinity_are_refused_with_their_place(bad: float, name: str) -> None:
    weight = gaussian(8, 64, dtype=torch.float32)
    weight[5, 17] = bad
    with pytest.raises(NumericalError, match="row 5, column 17"):
        quantize_weight(weight, parse_format(name), scale_dtype=torch.bfloat16)


def test_what_cannot_be_rounded_is_refused_with_what_can() -> None:
    weight = gaussian(4, 96)
    with pytest.raises(Unsupported, match=r"96 columns.*Formats that fit.*int2-g32"):
        quantize_weight(weight, parse_format("int4-g64"), scale_dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="nothing to round"):
        quantize_weight(weight, parse_format("none"), scale_dtype=torch.bfloat16)
    with pytest.raises(InputError, match="Did you mean 'searched'"):
        scales_of(weight, parse_format("int4-g32"), rounding="search", scale_dtype=torch.bfloat16)
    with pytest.raises(Unsupported, match="must be a floating-point matrix"):
        quantize_weight(weight[0], parse_format("int4-g32"), scale_dtype=torch.bfloat16)
    symmetric = quantize_weight(weight, parse_format("int4-g32"), scale_dtype=torch.bfloat16)
    with pytest.raises(InputError, match="decode a weight in the format"):
        dequantize(symmetric, parse_format("int4-g32-asym"))


@pytest.mark.parametrize("name", ["int4-g64", "int3-channel", "int4-g64-asym"])
def test_chunks_and_strides_change_nothing(name: str) -> None:
    format_ = parse_format(name)
    rows = 3 * CPU_CHUNK // 512 + 7  # several chunks, the last one short
    weight = gaussian(rows, 512, dtype=torch.float32)
    whole = quantize_weight(weight, format_, scale_dtype=torch.bfloat16)
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    parts = [
        quantize_weight(part, format_, scale_dtype=torch.bfloat16)
        for part in transposed.split(rows // 5)
    ]
    assert torch.equal(whole.codes, torch.cat([p.codes for p in parts]))
    assert torch.equal(whole.scales, torch.cat([p.scales for p in parts]))


def test_scales_and_codes_made_apart_equal_the_whole() -> None:
    weight = gaussian(24, 128, dtype=torch.bfloat16)
    for name in NAMES:
        format_ = parse_format(name)
        whole = quantize_weight(weight, format_, scale_dtype=torch.bfloat16)
        scales, zeros = scales_of(weight, format_, scale_dtype=torch.bfloat16)
        again = codes_from_scales(weight, scales, zeros, format_)
        assert torch.equal(whole.codes, again.codes)
        assert torch.equal(whole.scales, again.scales)
        assert (whole.zeros is None) == format_.symmetric
        assert zeros is None or torch.equal(zeros, again.zeros)


@pytest.mark.parametrize("name", ["int3-g32", "int8-channel", "int5-g64-asym"])
def test_values_survive_a_safetensors_file_bit_for_bit(name: str) -> None:
    format_ = parse_format(name)
    quantized = quantize_weight(gaussian(9, 64), format_, scale_dtype=torch.float16)
    parts = {"codes": quantized.codes, "scales": quantized.scales}
    if quantized.zeros is not None:
        parts["zeros"] = quantized.zeros
    back = load(save(parts))
    again = Quantized(back["codes"], back["scales"], back.get("zeros"))
    assert again.nbytes == quantized.nbytes == sum(t.nbytes for t in parts.values())
    assert torch.equal(dequantize(again, format_), dequantize(quantized, format_))


def test_the_value_is_the_product_of_code_and_scale_in_the_asked_dtype() -> None:
    format_ = parse_format("int8-g32")
    quantized = quantize_weight(gaussian(8, 64), format_, scale_dtype=torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        scale = quantized.scales.to(dtype).repeat_interleave(32, dim=1)
        assert torch.equal(dequantize(quantized, format_, dtype), quantized.codes.to(dtype) * scale)


def test_scales_keep_half_precision_and_get_float32s_range_otherwise() -> None:
    dtypes = ["float16", "bfloat16", "float32", "float64"]
    assert [scale_dtype_for(d) for d in dtypes] == [torch.float16, *[torch.bfloat16] * 3]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 10_000),
    sparsity=st.sampled_from([0.0, 0.5, 0.98]),
)
def test_no_error_exceeds_what_the_grid_allows(
    name: str, exponent: int, seed: int, sparsity: float
) -> None:
    format_ = parse_format(name)
    assert format_.bits is not None
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 64, generator=generator, dtype=torch.float64) * 2.0**exponent
    weight *= torch.rand(4, 64, generator=generator, dtype=torch.float64) >= sparsity
    quantized = quantize_weight(weight, format_, rounding="nearest", scale_dtype=torch.bfloat16)
    error = (dequantize(quantized, format_, torch.float64) - weight).view(
        *quantized.scales.shape, -1
    )
    step = quantized.scales.double().abs().unsqueeze(-1)
    # Symmetric: entries of the other side clip by up to one step. Asymmetric: the zero point is
    # rounded, so an end moves by half a step. The scale's 8 bits move an end by 2^-9 of the range.
    limit = 1.0 + (1 << format_.bits) * 2.0**-9
    assert bool((error.abs() <= step * limit).all())
