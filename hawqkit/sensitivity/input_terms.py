"""What rounded inputs of a layer do: `g . da` of each example, from the gradient at the input.

A layer whose inputs a become a + da and whose weight W becomes W + dW changes its output by
`(W + dW)(a + da) - W a = dW (a + da) + W da`. With d the gradient at the output, the second term
changes the loss by `sum_t d_t . W da_t = sum_t g_t . da_t`, where g = W' d is the gradient at the
input: autograd makes it anyway, to go on to the layers below. The first term is that of a weight
error, met with rounded inputs.

Letters: B examples, T positions, I features, A widths of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.quantize.input_rounding import InputQuantizer
from hawqkit.sensitivity.uses import Use, wide


@dataclass(frozen=True, slots=True, eq=False)
class InputSums:
    """Sums over the input of one call of a layer, example by example.

    Attributes:
        squares: (B,) |g|^2.
        count: (B,) entries at real positions.
        linear: (B, A) g . da.
        error: (B, A) |da|^2.
    """

    squares: Tensor
    count: Tensor
    linear: Tensor
    error: Tensor

    def __add__(self, other: InputSums) -> InputSums:
        """Return the sums over two calls."""
        names = self.__dataclass_fields__
        return InputSums(*(getattr(self, n) + getattr(other, n) for n in names))


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of a layer in a pass.

    Attributes:
        use: what it was given and the gradients at its output.
        rounded: the same with rounded inputs, for each width; empty where there is no input to
            round, or no format rounds it.
        sums: of the input; None in the same cases.
    """

    use: Use
    rounded: tuple[Use, ...] = ()
    sums: InputSums | None = None


@torch.no_grad()
def sum_inputs(
    source: Tensor,
    gradient: Tensor,
    quantizers: Sequence[InputQuantizer],
    attention: Tensor | None,
) -> tuple[list[Tensor], InputSums]:
    """Round an input to each width; return the rounded inputs and the sums.

    Args:
        source: the input, (B, ..., I) or, for convolutions, (B, I, ...).
        gradient: of the sampled loss at it, through this layer alone; the same shape.
        quantizers: A of them.
        attention: (B, T) real positions, for inputs (B, T, ...); others are real throughout.
    """
    a, g, batch = wide(source), wide(gradient), len(source)
    padded = attention is not None and source.ndim >= 3 and source.shape[:2] == attention.shape
    real = None
    entries = torch.full((batch,), math.prod(source.shape[1:]), device=a.device, dtype=a.dtype)
    if attention is not None and padded:
        real = attention.to(a).view(*attention.shape, *[1] * (source.ndim - 2))
        entries = attention.to(a).sum(1) * math.prod(source.shape[2:])
    rounded, linear, errors = [], [], []
    for quantizer in quantizers:
        rounded.append(quantizer(source))
        da = wide(rounded[-1]) - a
        if real is not None:
            da.mul_(real)
        errors.append(da.square().reshape(batch, -1).sum(1))
        linear.append(da.mul_(g).reshape(batch, -1).sum(1))
    squares = g.square().reshape(batch, -1).sum(1)
    return rounded, InputSums(squares, entries, torch.stack(linear, 1), torch.stack(errors, 1))
