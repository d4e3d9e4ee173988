"""Rounding with gradients: values as `quantize` makes them, gradients by closed forms."""

from __future__ import annotations

import math

import numpy as np
import pico
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hawqkit.errors import InputError
from hawqkit.formats import format_names, parse_format
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.activations import calibrate_activations
from hawqkit.quantize.apply import applied
from hawqkit.quantize.input_rounding import InputQuantizer
from hawqkit.quantize.rounding import scales_of
from hawqkit.records import Grid, make_grid
from hawqkit.tuning.fake_quantize import first_steps, round_input, round_weight
from hawqkit.tuning.outcome import range_of
from hawqkit.tuning.settings import TuneSettings
from hawqkit.tuning.student import SMALLEST_STEP, Student

FORMATS = [name for name in format_names("integer") if name != "none" and "g128" not in name]


def weight_of(rows: int = 3, columns: int = 64, seed: int = 0, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype)


class EveryKind(nn.Module):
    """A layer of every kind, one of them tied and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.table = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.grouped(self.plain(x).relu())).mean((2, 3))
        return self.head(y + self.table(torch.arange(len(x))))


def every_kind() -> LoadedModel:
    net = EveryKind()
    pico.fill(net)
    return wrap_model(net, name="every kind")


@pytest.mark.parametrize("learned", ["none", "weights"])
@pytest.mark.parametrize("rounding", ["nearest", "searched"])
@pytest.mark.parametrize("format", ["int2-channel", "int4-channel-asym", "int8-channel"])
def test_forward_is_what_apply_gives_bit_for_bit(format: str, rounding: str, learned: str) -> None:
    model = every_kind()
    assert {x.kind for x in model.layers} >= {"convolution", "transposed-convolution", "embedding"}
    mix = {layer.name: format for layer in model.layers}
    settings = TuneSettings(learned_scales=learned)
    student = Student(model, mix, settings, rounding=rounding, activations=None)
    student.round()
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with applied(model, mix, rounding=rounding), torch.no_grad():
        wanted = {x.name: model.parameter(x.name).clone() for x in model.layers}
        logits = model.module(x)
    for name, values in wanted.items():
        assert torch.equal(student.module.get_submodule(name).weight, values)
    assert student.module.head.weight is student.module.table.weight
    assert torch.equal(student.module(x), logits)


def test_gpt2s_transposed_weights_are_rounded_along_their_inputs() -> None:
    model = wrap_model(pico.gpt2(), name="gpt2", exclude=["lm_head"])
    mix = {layer.name: "int3-g32" for layer in model.layers}
    student = Student(model, mix, TuneSettings(), rounding="nearest", activations=None)
    student.round()
    with applied(model, mix, rounding="nearest"):
        for layer in model.layers:
            values = student.module.get_submodule(layer.name).weight
            assert torch.equal(values, model.parameter(layer.name))


def test_class_parameters_and_state_stay_what_they_were() -> None:
    model = every_kind()
    before = {n: (type(m), list(m.state_dict())) for n, m in model.module.named_modules()}
    mix = {layer.name: "int4-channel" for layer in model.layers}
    student = Student(model, mix, TuneSettings(), rounding="nearest", activations=None)
    student.round()
    now = {n: (type(m), list(m.state_dict())) for n, m in student.module.named_modules()}
    assert now == before
    state = student.module.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in model.module.state_dict().items())
    bare = student.release()
    assert "weight" not in vars(bare.plain)
    assert torch.equal(bare.plain.weight, model.module.plain.weight)


def lsq_reference(w: float, s: float, z: int, low: int, high: int) -> tuple[float, float]:
    """Return dv/dw and dv/ds of one entry, by equations 3 and 5 of the paper."""
    ratio = w / s
    if ratio <= low - z:
        return 0.0, low - z
    if ratio >= high - z:
        return 0.0, high - z
    return 1.0, round(ratio) - ratio  # Python rounds halves to even, as torch does


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_the_paper_entry_by_entry(name: str) -> None:
    format = parse_format(name)
    weight = weight_of().requires_grad_()
    scales, zeros = scales_of(
        weight.detach(), format, rounding="nearest", scale_dtype=torch.float64
    )
    scales = scales * 0.6  # so that some entries are clipped at either end
    step = scales.clone().requires_grad_()
    above = weight_of(seed=7)
    round_weight(weight, format, scales, zeros, step).backward(above)
    half, groups = 1 << (format.bits - 1), scales.shape[1]
    size = 64 // groups
    of_weight, of_step = np.zeros((3, 64)), np.zeros((3, groups))
    for row in range(3):
        for column in range(64):
            group = column // size
            z = 0 if zeros is None else int(zeros[row, group])
            s = float(scales[row, group])
            slope, step_slope = lsq_reference(
                float(weight.detach()[row, column]), s, z, -half, half - 1
            )
            of_weight[row, column] = slope * float(above[row, column])
            of_step[row, group] += step_slope * float(above[row, column])
    factor = 1 / math.sqrt(size * (half - 1))
    np.testing.assert_allclose(weight.grad.numpy(), of_weight, rtol=1e-14)
    np.testing.assert_allclose(step.grad.numpy(), of_step * factor, rtol=1e-9, atol=1e-12)
    assert 0 < (of_weight == 0).mean() < 1


def surrogate(weight: Tensor, scale: Tensor, residual: Tensor, low: float, high: float) -> Tensor:
    """Return s (clip(w / s) + r) with the rounding residual r held: what LSQ differentiates."""
    return ((weight / scale).clamp(low, high) + residual) * scale


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_finite_differences_of_the_clip_around_the_rounding(bits: int) -> None:
    format = parse_format(f"int{bits}-channel")
    low, high = float(-(1 << (bits - 1))), float((1 << (bits - 1)) - 1)
    weight = weight_of(2, 32).requires_grad_()
    start = 2 * weight.detach().abs().mean(1, keepdim=True) / math.sqrt(high) * 0.4
    step = start.clone().requires_grad_()
    above = weight_of(2, 32, seed=3)
    (round_weight(weight, format, start, None, step) * above).sum().backward()
    ratio = (weight.detach() / start).clamp(low, high)
    residual = ratio.round() - ratio

    def loss(w: Tensor, s: Tensor) -> float:
        return float((surrogate(w, s, residual, low, high) * above).sum())

    h = 1e-6
    w = weight.detach()
    for row, column in [(0, 0), (0, 5), (1, 9), (1, 31)]:
        nudge = torch.zeros_like(w)
        nudge[row, column] = h
        slope = (loss(w + nudge, start) - loss(w - nudge, start)) / (2 * h)
        assert float(weight.grad[row, column]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    for row in range(2):
        nudge = torch.zeros_like(start)
        nudge[row] = h
        slope = (loss(w, start + nudge) - loss(w, start - nudge)) / (2 * h)
        wanted = slope / math.sqrt(32 * high)
        assert float(step.grad[row, 0]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_the_forward_of_clipped_entries_has_the_steps_slope_itself() -> None:
    """Out there the rounded value is `bound x s`, whose derivative needs no convention."""
    format = parse_format("int3-channel")
    weight = torch.tensor([[10.0, 20.0, -30.0, 40.0]], dtype=torch.float64)
    step = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    h = 1e-6
    round_weight(weight, format, step.detach(), None, step).sum().backward()
    up = round_weight(weight, format, step.detach() + h, None).sum()
    down = round_weight(weight, format, step.detach() - h, None).sum()
    slope = float(up - down) / (2 * h)
    assert slope == pytest.approx(3 * 3 - 4)
    assert step.grad.item() == pytest.approx(slope / math.sqrt(4 * 3))


@pytest.mark.parametrize("name", FORMATS)
def test_scales_of_the_weight_itself_never_block_its_largest_and_smallest_entries(
    name: str,
) -> None:
    """Their scale is rounded to 16 bits, so they may lie a little beyond the outermost level."""
    format = parse_format(name)
    weight = weight_of(200, dtype=torch.float32).requires_grad_()
    scales, zeros = scales_of(
        weight.detach(), format, rounding="nearest", scale_dtype=torch.bfloat16
    )
    round_weight(weight, format, scales, zeros).sum().backward()
    half = 1 << (format.bits - 1)
    groups = weight.detach().view(200, scales.shape[1], -1)
    passed = weight.grad.view(groups.shape)
    zero = 0 if zeros is None else zeros[..., None].float()
    place = groups / scales.float()[..., None] + zero
    beyond = torch.maximum(-half - place, place - (half - 1))
    assert bool((passed[beyond < 0.5] == 1).all())
    assert bool((passed[beyond > 1.5] == 0).all())
    if format.symmetric:
        ends = [groups.abs().argmax(-1, keepdim=True)]
        assert bool((passed[beyond > 0.5] == 0).all())
    else:
        ends = [groups.argmax(-1, keepdim=True), groups.argmin(-1, keepdim=True)]
    for end in ends:
        assert bool((passed.gather(-1, end) == 1).all())


def test_lsq_begins_with_its_formula_and_keeps_the_sign_of_the_largest_entry() -> None:
    format = parse_format("int4-g32")
    weight = weight_of(4, 64, dtype=torch.float32)
    weight[2] = 0  # a filter of zeros has no scale
    steps, zeros = first_steps(
        weight, format, start="lsq", rounding="nearest", scale_dtype=torch.bfloat16
    )
    groups = weight.view(4, 2, 32)
    size = 2 * groups.abs().mean(-1) / math.sqrt(7)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    wanted = torch.where(largest > 0, -size, size)
    wanted[2] = 1
    assert zeros is None
    torch.testing.assert_close(steps, wanted)
    rounded, _ = first_steps(
        weight, format, start="rounded", rounding="searched", scale_dtype=torch.bfloat16
    )
    scales, _ = scales_of(weight, format, rounding="searched", scale_dtype=torch.bfloat16)
    assert torch.equal(rounded, scales.float())


def test_learned_steps_stay_on_their_side_of_zero() -> None:
    model = every_kind()
    mix = {"plain": "int4-channel"}
    settings = TuneSettings(learned_scales="weights")
    student = Student(model, mix, settings, rounding="nearest", activations=None)
    (weight,) = student.weights
    start = weight.start.clone()
    with torch.no_grad():
        weight.step.mul_(-3)
        weight.step[0] = start[0] * 2
    student.hold()
    assert torch.equal(weight.step[0], start[0] * 2)
    torch.testing.assert_close(weight.step[1:], start[1:] * SMALLEST_STEP)


GRIDS = [(Grid(0.25, 0, 4), -1), (Grid(0.125, 5, 4), -1), (Grid(0.5, 8, 4), -3)]


@pytest.mark.parametrize(("grid", "features"), GRIDS)
def test_inputs_are_rounded_as_when_they_are_measured(grid: Grid, features: int) -> None:
    quantizer = InputQuantizer(grid.bits, grid, features)
    values = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2)) * 2
    step = torch.tensor(grid.scale, requires_grad=True)
    assert torch.equal(round_input(values, quantizer), quantizer(values))
    assert torch.equal(round_input(values, quantizer, step), quantizer(values))


@pytest.mark.parametrize(("grid", "features"), GRIDS)
def test_gradients_of_inputs_are_those_of_the_paper(grid: Grid, features: int) -> None:
    quantizer = InputQuantizer(grid.bits, grid, features)
    generator = torch.Generator().manual_seed(2)
    values = (
        torch.randn(4, 3, 5, 5, generator=generator, dtype=torch.float64) * 2
    ).requires_grad_()
    above = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    step = torch.tensor(grid.scale, requires_grad=True)
    round_input(values, quantizer, step).backward(above)
    pairs = [
        lsq_reference(v, grid.scale, grid.zero, 0, grid.largest)
        for v in values.detach().flatten().tolist()
    ]
    wanted = np.array([p[0] for p in pairs]) * above.flatten().numpy()
    of_step = float((np.array([p[1] for p in pairs]) * above.flatten().numpy()).sum())
    entries = 75 if features == -3 else 5  # of an example's image, or of a token
    levels = max(grid.zero, 15 - grid.zero)
    np.testing.assert_allclose(values.grad.flatten().numpy(), wanted, rtol=1e-14)
    assert step.grad.item() == pytest.approx(of_step / math.sqrt(entries * levels), rel=1e-6)


def test_grids_of_tokens_pass_every_gradient() -> None:
    quantizer = InputQuantizer(4, None, -1)
    values = weight_of(3, 8).requires_grad_()
    above = weight_of(3, 8, seed=1)
    rounded = round_input(values, quantizer)
    assert torch.equal(rounded, quantizer(values.detach()))
    rounded.backward(above)
    assert torch.equal(values.grad, above)


@given(
    st.floats(2.0**-20, 2.0**20, width=32),
    st.sampled_from([2, 3, 4, 5, 6, 8]),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_learned_grid_survives_as_a_range(
    scale: float, bits: int, share: float, symmetric: bool
) -> None:
    top = (1 << bits) - 1
    zero = (1 << (bits - 1)) * (share > 0.5) if symmetric else round(share * top)
    grid = Grid(scale, zero, bits)
    low, high = range_of(grid, symmetric=symmetric)
    assert make_grid(low, high, bits, symmetric=symmetric) == grid


def test_learned_input_steps_begin_as_lsq_says() -> None:
    model = wrap_model(pico.llama(), name="llama", exclude=["lm_head"])
    data = pico.sequences(4, 12, ragged=True)
    layers = [x for x in model.layers if x.kind == "linear"]
    ranges = calibrate_activations(model, data, layers, [4])
    mix = {layer.name: "w4a4" for layer in layers}
    settings = TuneSettings(learned_scales="inputs", start="lsq")
    student = Student(model, mix, settings, rounding="nearest", activations=ranges)
    student.begin_as_lsq(data, [[0, 1], [2, 3]])
    seen: dict[str, list[Tensor]] = {x.name: [] for x in layers}
    handles = [
        model.module.get_submodule(n).register_forward_pre_hook(
            lambda _, args, n=n: seen[n].append(args[0])
        )
        for n in seen
    ]
    for row in range(4):  # one by one: nothing is padded
        length = int(data.attention[row].sum())
        with torch.no_grad():
            model.module(input_ids=data.tokens[row : row + 1, :length])
    for handle in handles:
        handle.remove()
    for wanted in student.inputs:
        values = torch.cat([v.flatten() for v in seen[wanted.name]]).double()
        grid = ranges.grid(wanted.name, 4)
        levels = max(grid.zero, 15 - grid.zero)
        expected = 2 * float(values.abs().mean()) / math.sqrt(levels)
        assert wanted.step.item() == pytest.approx(expected, rel=1e-5)  # float32 sums


def test_scales_of_tokens_cannot_be_learned() -> None:
    model = wrap_model(pico.llama(), name="llama", include=["model.layers.0"])
    ranges = calibrate_activations(model, pico.sequences(2, 8), model.layers, [8], mode="dynamic")
    mix = {model.layers[0].name: "w4a8"}
    settings = TuneSettings(learned_scales="both")
    with pytest.raises(InputError, match=r"q_proj.*a grid for each token.*learned_scales to none"):
        Student(model, mix, settings, rounding="nearest", activations=ranges)
    with pytest.raises(InputError, match=r"rounds its inputs, and no ranges came"):
        Student(model, mix, settings, rounding="nearest", activations=None)
    with pytest.raises(InputError, match=r"no format of the mix rounds inputs"):
        Student(
            model,
            {model.layers[0].name: "int4-g32"},
            TuneSettings(learned_scales="inputs"),
            rounding="nearest",
            activations=None,
        )
