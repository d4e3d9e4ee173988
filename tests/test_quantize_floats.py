"""Floating-point formats against brute force, and bit for bit against libraries that have them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close as close

from hawqkit.errors import NumericalError, Unsupported
from hawqkit.formats import FLOATS, parse_format
from hawqkit.quantize.errors_of import make_errors
from hawqkit.quantize.floats import decode_table, encoder, largest_of, round_floats
from hawqkit.quantize.stored import rounded_values, store

ELEMENTS = ("e2m1", "e2m3", "e3m2", "e4m3", "e5m2", "nf4", "fp4")


def weight(seed: int = 0) -> Tensor:
    """Return a weight with an empty row, an outlier, and a group far below all others."""
    made = torch.randn(48, 256, generator=torch.Generator().manual_seed(seed)) * 0.02
    made[3] = 0
    made[5, 7] = 3.0
    made[6, :16] = 1e-20
    return made


def values(name: str, w: Tensor, rounding: str = "nearest") -> Tensor:
    return store(w, parse_format(name), rounding=rounding).values(slice(None), torch.float32)


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_number_becomes_the_nearest_value_of_its_element(element: str) -> None:
    table = decode_table(element)
    finite = table[torch.isfinite(table)].double()
    largest = largest_of(element)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * largest / 3
    got = table[encoder(element)(x).int()].double()
    inside = x.double().clamp(-largest, largest)
    least = (inside[:, None] - finite[None]).abs().min(1).values
    close((got - inside).abs(), least, rtol=0, atol=1e-7 * largest)  # the table is float32
    assert torch.equal(table[encoder(element)(finite.float()).int()].double(), finite)


@pytest.mark.parametrize("element", ["e2m1", "e2m3", "e3m2"])
def test_ties_of_minifloats_go_to_the_even_code(element: str) -> None:
    table = decode_table(element)
    half = table[: len(table) // 2]
    middles = (half[1:] + half[:-1]) / 2
    codes = encoder(element)(middles).int()
    assert bool((codes % 2 == 0).all())
    assert bool(((codes - torch.arange(len(middles))).abs() <= 1).all())


@pytest.mark.parametrize("name", FLOATS)
def test_searched_never_has_a_larger_error_and_scales_decide_alone(name: str) -> None:
    w, form = weight(), parse_format(name)
    near, best = values(name, w), values(name, w, "searched")
    width = form.group_size or (w.numel() if form.per_tensor else w.shape[1])

    def squares(x: Tensor) -> Tensor:
        return (x - w).double().square().view(-1, width).sum(1)

    assert bool((squares(best) <= squares(near) * (1 + 1e-5)).all())
    assert torch.isfinite(best).all()
    assert torch.count_nonzero(best[3]) == 0
    made = round_floats(w, form, rounding="searched")
    assert bool((made.scales > 0).all())
    assert torch.equal(made.values(torch.tensor([5, 1]), torch.float32), best[[5, 1]])


@pytest.mark.parametrize("name", FLOATS)
def test_stored_scales_are_those_that_decode(name: str) -> None:
    made = round_floats(weight(), parse_format(name), rounding="searched")
    stored = made.stored_scales
    if made.tensor_scale is not None:
        decoded = stored.float() / made.tensor_scale
    elif stored.dtype == torch.uint8:
        decoded = torch.exp2(stored.double() - 127).float()
    else:
        decoded = stored.float()
    assert torch.equal(decoded, made.scales)


def test_stored_bits_count_codes_and_scales() -> None:
    taken = {name: parse_format(name).total_bits(64, 256, 16) / (64 * 256) for name in FLOATS}
    assert taken["mxfp4"] == 4.25
    assert taken["mxfp8-e4m3"] == 8.25
    assert taken["nf4-g64"] == 4.5
    assert taken["nvfp4"] == 4.5 + 32 / (64 * 256)
    assert taken["fp8-e4m3-tensor"] == 8 + 16 / (64 * 256)
    assert taken["fp8-e5m2-channel"] == 8 + 16 / 256


def test_errors_of_a_layer_may_mix_families() -> None:
    w = weight()
    names = ["int4-g64", "mxfp4", "int4-g32", "fp8-e4m3-channel", "nvfp4"]
    forms = [parse_format(n) for n in names]
    options = {"rounding": "searched", "scale_dtype": torch.bfloat16}
    want = torch.stack([rounded_values(w, f, **options) - w for f in forms])  # type: ignore[arg-type]
    for keep in ("codes", "none"):
        errors = make_errors(w, forms, keep=keep, **options)  # type: ignore[arg-type]
        out = torch.empty(len(forms), *w.shape)
        errors.fill(w, out)
        close(out, want, rtol=0, atol=1e-9)  # product and sum may be fused, with one rounding
        norms = want.double().square().sum((1, 2))
        close(errors.squared_norms, norms, rtol=1e-5, atol=0)  # rows are summed in float32
        some = torch.empty(len(forms), 2, w.shape[1])
        errors.fill(w, some, torch.tensor([9, 2]))
        assert torch.equal(some, out[:, [9, 2]])


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(Unsupported, match="32 does not divide 40"):
        store(torch.zeros(2, 40), parse_format("mxfp4"), rounding="nearest")
    bad = weight()
    bad[1, 1] = float("nan")
    with pytest.raises(NumericalError, match="row 1, column 1"):
        store(bad, parse_format("nvfp4"), rounding="nearest")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8-e4m3-channel", {"num_bits": 8, "strategy": "channel"}),
        ("fp8-e4m3-tensor", {"num_bits": 8, "strategy": "tensor"}),
        ("nvfp4", {"num_bits": 4, "strategy": "tensor_group", "group_size": 16}),
    ],
)
def test_equals_compressed_tensors_bit_for_bit(name: str, options: dict[str, object]) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    w = weight()
    small = name == "nvfp4"
    scale_dtype = torch.float8_e4m3fn if small else None
    args = QuantizationArgs(type="float", symmetric=True, scale_dtype=scale_dtype, **options)
    whole = w.view(1, -1) if options["strategy"] == "tensor" else w
    grouped = w.view(len(w), -1, 16) if small else whole
    low, high = grouped.amin(-1), grouped.amax(-1)
    if options["strategy"] == "channel":
        low, high = low[:, None], high[:, None]
    glob = generate_gparam(w.min().view(1), w.max().view(1)) if small else None
    scales, _ = calculate_qparams(low, high, args, glob)
    want = fake_quantize(w, scales, torch.zeros_like(scales), args, global_scale=glob)
    assert torch.equal(values(name, w), want)


@pytest.mark.parametrize("name", [n for n in FLOATS if n.startswith("mxfp")])
def test_scales_of_mx_formats_are_the_powers_of_two_of_the_specification(name: str) -> None:
    w, form = weight().double().abs(), parse_format(name)
    made = round_floats(w, form, rounding="nearest")
    top = {"e2m1": 2, "e2m3": 2, "e3m2": 4, "e4m3": 8, "e5m2": 15}[form.element]
    largest = w.view(48, -1, 32).amax(-1)
    want = torch.exp2(torch.floor(torch.log2(largest)) - top)
    assert torch.equal(made.scales.double(), torch.where(largest > 0, want, 1.0))


@pytest.mark.parametrize("name", [n for n in FLOATS if n[:3] in ("nf4", "fp4")])
def test_equals_bitsandbytes_bit_for_bit(name: str) -> None:
    from bitsandbytes import functional

    w, form = weight(), parse_format(name)
    packed, state = functional.quantize_4bit(w, blocksize=form.group_size, quant_type=form.element)
    assert torch.equal(values(name, w), functional.dequantize_4bit(packed, state).float())
