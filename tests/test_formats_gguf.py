from __future__ import annotations

import importlib.util

import gguf
import libgguf
import numpy as np
import pytest
import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import GGUF, format_names, parse_format
from hawqkit.quantize.gguf_blocks import Blocks, encode_blocks
from hawqkit.quantize.gguf_decoding import decode_blocks
from hawqkit.quantize.stored import store

NAMES = [name for name in format_names(GGUF) if name != "none"]
PLAIN = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]  # gguf-py has encoders of its own for these
COLUMNS = 512


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


def hostile(rows: int = 24, columns: int = COLUMNS) -> Tensor:
    """Return rows of every kind: normal, all zero, one outlier, denormal, huge, constant, steps."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    weight[1] = 0.0
    weight[2] *= 1e-3
    weight[2, 77] = 40.0
    weight[3] *= 1e-41
    weight[4] *= 1e-7
    weight[5] *= 1e4
    weight[6] = 0.25
    weight[7] = -3.0
    weight[8] = weight[8].abs()
    weight[9] = -weight[9].abs()
    weight[10, ::2] = 0.0
    weight[11] = torch.linspace(-1, 1, columns)
    weight[12, :256] = 0.0
    weight[13] = weight[13].sign()
    return weight


def same_bits(ours: Tensor, theirs: np.ndarray) -> bool:
    """Whether two float32 arrays agree in every bit, the sign of zero too."""
    return bool(np.array_equal(ours.numpy().view(np.uint32), theirs.view(np.uint32)))


@pytest.mark.parametrize("name", NAMES)
def test_block_sizes_are_those_of_the_reference(name: str) -> None:
    assert parse_format(name).block == gguf.GGML_QUANT_SIZES[kind(name)]
    assert parse_format(name).total_bits(3, 512, 32) == 8 * 3 * libgguf.row_size(kind(name), 512)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_gguf_py_bit_for_bit(name: str) -> None:
    blocks = encode_blocks(hostile(), parse_format(name), rounding="nearest")
    values = blocks.values(slice(None), torch.float32)
    assert same_bits(values, gguf.quants.dequantize(blocks.packed.numpy(), kind(name)))
    assert values.shape == (24, COLUMNS)
    # float64 holds the same numbers
    assert torch.equal(blocks.values(slice(None), torch.float64), values.double())


@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_as_gguf_py_decodes_them(name: str) -> None:
    """Encoders use a part of the bit patterns; a foreign file may hold all of them."""
    columns, size = gguf.GGML_QUANT_SIZES[kind(name)]
    generator = torch.Generator().manual_seed(5)
    packed = torch.randint(256, (64, 2 * size), generator=generator, dtype=torch.uint8)
    with np.errstate(all="ignore"):  # random float16 scales hold infinities and NaN
        theirs = gguf.quants.dequantize(packed.numpy(), kind(name))
    ours = decode_blocks(packed, parse_format(name))
    assert ours.shape == (64, 2 * columns)
    number = ~np.isnan(theirs)
    assert number.mean() > 0.5
    assert np.array_equal(number, ~np.isnan(ours.numpy()))
    assert np.array_equal(ours.numpy().view(np.uint32)[number], theirs.view(np.uint32)[number])


@pytest.mark.parametrize("name", PLAIN)
def test_plain_types_are_encoded_as_gguf_py_encodes_them(name: str) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(40, 96, generator=generator)
    weight[3] = 0.0
    packed = encode_blocks(weight, parse_format(name)).packed
    assert np.array_equal(packed.numpy(), gguf.quants.quantize(weight.numpy(), kind(name)))


def by_hand_iq4_nl(block: np.ndarray) -> float:
    """Return the least squared error of a block with the table of iq4_nl, over a grid of scales."""
    table = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.float64)
    most = np.abs(block).max()
    errors = []
    for scale in np.concatenate([s * np.linspace(0.7, 1.3, 301) * most / 120 for s in (1, -1)]):
        near = np.abs(block[:, None] / scale - table[None]).argmin(1)
        errors.append((((table[near] * scale) - block) ** 2 * block**2).sum())
    return float(min(errors))


def test_iq4_nl_finds_nearly_the_best_scale_for_its_own_weighting() -> None:
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(16, 32, generator=generator)
    values = encode_blocks(weight, parse_format("iq4_nl")).values(slice(None), torch.float64)
    found = ((values - weight) ** 2 * weight**2).sum(1)
    best = torch.tensor([by_hand_iq4_nl(row) for row in weight.double().numpy()])
    # The grid has 602 scales of either sign, ggml tries 15 of one: nearer to the best than to the
    # double of it, and never better by more than the step of the grid.
    assert 0.99 * float(best.sum()) < float(found.sum()) < 1.3 * float(best.sum())


@pytest.mark.parametrize("name", NAMES)
def test_errors_shrink_with_bits_and_stay_below_those_of_a_uniform_grid(name: str) -> None:
    """A floor under every encoder: no worse than rounding groups to 2^bits - 1 even steps."""
    generator = torch.Generator().manual_seed(13)
    weight = torch.randn(64, COLUMNS, generator=generator)
    format = parse_format(name)
    assert format.bits is not None
    assert format.group_size is not None
    values = encode_blocks(weight, format).values(slice(None), torch.float32)
    groups = weight.view(64, -1, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**format.bits - 1)
    plain = (((groups - low) / step).round() * step + low).view_as(weight)
    ratio = float((values - weight).square().sum() / (plain - weight).square().sum())
    # signed grids with one scale waste up to half a step at one end
    assert ratio < 1.6, ratio


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_stay_zero_and_no_value_is_lost_to_infinity(name: str) -> None:
    weight = hostile()
    values = encode_blocks(weight, parse_format(name)).values(slice(None), torch.float32)
    assert torch.equal(values[1], torch.zeros(COLUMNS))
    assert torch.equal(values[12, :256], torch.zeros(256))
    assert bool(torch.isfinite(values).all())
    assert float((values[3]).abs().max()) < 1e-30  # below float16's smallest scale


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "q6_k", "iq4_xs"])
def test_rows_are_taken_by_slice_and_by_index(name: str) -> None:
    blocks = encode_blocks(hostile(), parse_format(name))
    whole = blocks.values(slice(None), torch.float32)
    some = torch.tensor([5, 0, 17])
    assert torch.equal(blocks.values(some, torch.float32), whole[some])
    assert torch.equal(blocks.values(slice(4, 9), torch.float32), whole[4:9])
    assert blocks.values(some, torch.float32).is_contiguous()


def test_many_rows_are_decoded_in_parts_that_leave_no_seam() -> None:
    generator = torch.Generator().manual_seed(17)
    blocks = encode_blocks(torch.randn(1100, 256, generator=generator), parse_format("q8_0"))
    theirs = gguf.quants.dequantize(blocks.packed.numpy(), kind("q8_0"))
    assert same_bits(blocks.values(slice(None), torch.float32), theirs)


def test_both_roundings_are_the_reference_and_store_finds_them() -> None:
    weight = hostile()
    format = parse_format("q4_k")
    nearest = store(weight, format, rounding="nearest")
    searched = store(weight, format, rounding="searched")
    assert isinstance(nearest, Blocks)
    assert isinstance(searched, Blocks)
    assert torch.equal(nearest.packed, searched.packed)
    assert nearest.nbytes == 24 * 2 * 144
    with pytest.raises(InputError, match="unknown rounding 'best'"):
        store(weight, format, rounding="best")


def test_strides_and_half_precision_change_nothing() -> None:
    generator = torch.Generator().manual_seed(19)
    weight = torch.randn(256, 8, generator=generator, dtype=torch.float64).bfloat16()
    format = parse_format("q5_k")
    assert torch.equal(
        encode_blocks(weight.T, format).packed,
        encode_blocks(weight.T.float().contiguous(), format).packed,
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "q8_0"])
def test_importance_lowers_the_weighted_error(name: str) -> None:
    generator = torch.Generator().manual_seed(23)
    weight = torch.randn(32, 256, generator=generator)
    importance = torch.exp(2 * torch.randn(256, generator=generator))
    format = parse_format(name)

    def error(blocks: Blocks) -> float:
        values = blocks.values(slice(None), torch.float64)
        return float(((values - weight).square() * importance).sum())

    blind = error(encode_blocks(weight, format))
    assert error(encode_blocks(weight, format, importance=importance)) < 0.95 * blind


def test_bad_importance_is_refused() -> None:
    weight = torch.ones(2, 32)
    for bad in (torch.ones(31), torch.full((32,), float("nan")), -torch.ones(32)):
        with pytest.raises(InputError, match="importance"):
            encode_blocks(weight, parse_format("q4_0"), importance=bad)


def test_weights_that_a_scale_cannot_hold_are_refused() -> None:
    weight = torch.ones(2, 256)
    weight[1, 3] = 1e9
    for name in NAMES:
        with pytest.raises(NumericalError, match=f"too large for format '{name}'"):
            encode_blocks(weight, parse_format(name))
    weight[1, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        encode_blocks(weight, parse_format("q4_k"))
    with pytest.raises(NumericalError, match="infinity"):
        encode_blocks(torch.full((1, 32), 1e300, dtype=torch.float64), parse_format("q4_0"))


def test_columns_that_blocks_do_not_fill_are_refused() -> None:
    with pytest.raises(Unsupported, match="'q4_k' does not fit a weight of 576 columns"):
        encode_blocks(torch.ones(2, 576), parse_format("q4_k"))
    with pytest.raises(Unsupported, match="no GGUF type"):
        encode_blocks(torch.ones(2, 64), parse_format("int4-g64"))
    with pytest.raises(Unsupported, match="rows of 17 bytes"):
        decode_blocks(torch.zeros(2, 17, dtype=torch.uint8), parse_format("q4_0"))


def test_a_missing_library_names_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libgguf" else find(name, *a)
    )
    with pytest.raises(Unsupported, match=r"pip install 'hawqkit\[gguf\]'"):
        encode_blocks(torch.ones(2, 32), parse_format("q4_0"))
