"""Rounding that gradients pass: straight through, or to the step size as well (LSQ).

Forward values are those of `quantize.rounding` and `quantize.input_rounding`, bit for bit for the
same scales. Rounding has no useful derivative, so backward takes that of what is around it. With w
a value, s its scale, z its zero point, codes from low to high, r = w / s + z and v the result:

    dv/dw = 1 where the code is not clipped, else 0
    dv/ds = round(r) - r inside, low - z below, high - z above

(Bengio et al. 2013, arXiv:1308.3432; Esser et al. 2020, arXiv:1902.08153, equations 3 and 5). LSQ
counts as clipped what lies beyond the outermost levels, |r| > code. Where the scale is not learned
but made of the values, the largest of them lies on the outermost level but for the rounding of the
scale and of the zero point, and must not be stuck there: see `SLACK`.

Letters in shapes: a weight is (rows, columns); g columns share a scale; groups = columns / g.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hawqkit.formats import Format
from hawqkit.quantize.input_rounding import InputQuantizer, fake_quantize
from hawqkit.quantize.rounding import round_into, scales_of

# Steps beyond the outermost level that still let gradients pass where the scale is made of the
# values: symmetric, and with a zero point. A scale in bfloat16 is off by up to 1/257 of itself, so
# an end that lies n steps from zero moves by n/257: not quite half a step with n = 128, and a whole
# one with n = 255. The zero point's own rounding moves it by another half.
SLACK = (0.5, 1.5)


def round_weight(
    weight: Tensor,
    format: Format,
    scales: Tensor,
    zeros: Tensor | None,
    step: Tensor | None = None,
) -> Tensor:
    """Round a weight to given scales; gradients pass straight through.

    The gradient of the step is the sum over its group, times `1 / sqrt(g Q)` (LSQ, section 2.2),
    with Q of `positive_levels`. Only first derivatives.

    Args:
        weight: (rows, columns), float32 or float64.
        format: an integer format that fits.
        scales: (rows, groups) as they are stored; they make the codes.
        zeros: (rows, groups) int8, None in symmetric formats.
        step: (rows, groups), of which `scales` is the stored form: it gets a gradient as if it
            were the scales themselves. None where scales are not learned.

    Returns:
        (rows, columns) in the weight's dtype.

    >>> from hawqkit.formats import parse_format
    >>> weight, scale = torch.tensor([[0.9, -0.2, 5.0]]), torch.tensor([[1.0]])
    >>> round_weight(weight, parse_format("int2-channel"), scale, None)
    tensor([[1., -0., 1.]])
    """
    result: Tensor = _RoundWeight.apply(weight, step, scales, zeros, format)  # type: ignore[no-untyped-call]
    return result


def round_input(values: Tensor, quantizer: InputQuantizer, step: Tensor | None = None) -> Tensor:
    """Round what a layer is given; gradients pass straight through. Only first derivatives.

    Grids of tokens are made of the values themselves: nothing is clipped, so all gradients pass.
    The gradient of the step is the sum over all entries, times `1 / sqrt(n Q)` with n the entries
    of a token, or of the whole input of an example where the layer convolves.

    Args:
        values: (examples, ...).
        quantizer: its grid makes the codes, but for the scale where there is a step.
        step: a single number, the scale of the grid; None where it is not learned.
    """
    if quantizer.grid is None:
        rounded: Tensor = _PassTokens.apply(values, quantizer)  # type: ignore[no-untyped-call]
        return rounded
    grid = quantizer.grid
    scale = grid.scale if step is None else float(step.detach())
    factor = 1.0
    if step is not None:
        entries = values[0].numel() if quantizer.features != -1 else values.shape[-1]
        factor = step_factor(entries, max(grid.zero, grid.largest - grid.zero))
    result: Tensor = _RoundInput.apply(values, step, scale, grid.zero, grid.bits, factor)  # type: ignore[no-untyped-call]
    return result


def positive_levels(format: Format) -> int:
    """Return Q of LSQ: levels above zero, 2^(b-1) - 1; the paper's Q_P of signed data."""
    assert format.bits is not None
    return (1 << (format.bits - 1)) - 1


def step_factor(entries: int, levels: int) -> float:
    """Return the factor of a step's gradient, `1 / sqrt(n Q)` (LSQ, section 2.2).

    >>> step_factor(25, 4)
    0.1
    """
    return 1.0 / math.sqrt(entries * levels)


@torch.no_grad()
def first_steps(
    weight: Tensor, format: Format, *, start: str, rounding: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the steps (rows, groups) that learning begins with, and the zero points, which stay.

        lsq       2 mean|w| / sqrt(Q) over the group (LSQ, section 2.1)
        rounded   the scale that `rounding` would take, so that tuning begins with the model as it
                  is quantized without tuning

    In symmetric formats a step keeps the sign that `rounding` gives it, which puts the extra level
    on the side of the largest entry. All-zero groups get the step 1.

    Args:
        weight: (rows, columns).
        format: an integer format that fits.
        start: `lsq` or `rounded`.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which scales are stored.

    Raises:
        InputError, Unsupported, NumericalError: as `rounding.scales_of`.
    """
    scales, zeros = scales_of(weight, format, rounding=rounding, scale_dtype=scale_dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    steps = scales.to(wide)
    if start == "lsq":
        groups = weight.to(wide).abs().reshape(*scales.shape, -1)
        size = 2 * groups.mean(-1) / math.sqrt(positive_levels(format))
        held = size.to(scale_dtype) != 0  # else no 16-bit scale can hold it
        steps = torch.where(held, torch.copysign(size, steps), steps)
    return steps, zeros


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        step: Tensor | None,
        scales: Tensor,
        zeros: Tensor | None,
        format: Format,
    ) -> Tensor:
        ctx.save_for_backward(weight, scales, zeros)
        ctx.format, ctx.learned = format, step is not None
        values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        round_into(values, weight, scales, zeros, format)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, zeros = ctx.saved_tensors
        format: Format = ctx.format
        half = 1 << ((format.bits or 0) - 1)
        shape = (*scales.shape, -1)  # (rows, groups, g)
        zero = 0.0 if zeros is None else zeros.to(weight.dtype)[..., None]
        ratio = weight.reshape(shape) / scales.to(weight.dtype)[..., None]
        low, high = -half - zero, half - 1 - zero
        slack = 0.0 if ctx.learned else SLACK[zeros is not None]
        passed, inner = _passed(gradient.reshape(shape), ratio, low, high, slack)
        of_step = None
        if ctx.learned and ctx.needs_input_grad[1]:
            slope = _slope(ratio, inner, low, high)
            factor = step_factor(shape_size(weight, scales), positive_levels(format))
            of_step = (gradient.reshape(shape) * slope).sum(-1) * factor
        return passed.reshape(weight.shape), of_step, None, None, None


def shape_size(weight: Tensor, scales: Tensor) -> int:
    """Return g, the entries that share a scale."""
    return weight.shape[1] // scales.shape[1]


def _passed(
    gradient: Tensor, ratio: Tensor, low: Any, high: Any, slack: float
) -> tuple[Tensor, Tensor]:
    """Return the gradient where a value is not clipped, and 1 there, 0 elsewhere.

    Products with a mask of numbers take half the time of `torch.where` on a CPU.
    """
    inner = ((ratio > low - slack) & (ratio < high + slack)).to(gradient.dtype)
    return gradient * inner, inner


def _slope(ratio: Tensor, inner: Tensor, low: Any, high: Any) -> Tensor:
    """Return dv/ds: round(r) - r inside, the bound outside."""
    return ratio.clamp(low, high).round_().sub_(ratio * inner)


class _RoundInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor | None,
        scale: float,
        zero: int,
        bits: int,
        factor: float,
    ) -> Tensor:
        ctx.save_for_backward(values, step)
        ctx.grid, ctx.factor = (scale, zero, bits), factor
        rounded: Tensor = fake_quantize(values, scale, zero, bits)
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step = ctx.saved_tensors
        scale, zero, bits = ctx.grid
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        ratio = wide / scale
        low, high = -float(zero), float((1 << bits) - 1 - zero)
        # A static range is of calibration data: what lies beyond it is clipped, but for roundings.
        slack = SLACK[1] if step is None else 0.0
        passed, inner = _passed(gradient, ratio, low, high, slack)
        of_step = None
        if step is not None and ctx.needs_input_grad[1]:
            slope = _slope(ratio, inner, low, high)
            of_step = (gradient.to(wide.dtype) * slope).sum().mul(ctx.factor).to(step.dtype)
        return passed, of_step, None, None, None, None


class _PassTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, quantizer: InputQuantizer) -> Tensor:
        return quantizer(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None
