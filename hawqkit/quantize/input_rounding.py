"""Rounding of what layers are given: to a static grid, or to one for each token.

Letters in shapes: B examples, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.errors import Unsupported
from hawqkit.models.orientation import CONVOLUTIONS, TRANSPOSED
from hawqkit.records import Layer
from hawqkit.records.activations import ActivationRanges, Grid


@torch.no_grad()
def fake_quantize(values: Tensor, scale: Tensor | float, zero: Tensor | float, bits: int) -> Tensor:
    """Round values to a grid: `(clamp(round(x / s) + z, 0, 2^b - 1) - z) s`, in the dtype of `x`.

    Computed in float32, or float64 if `x` is that; ties round to even. NaN stays NaN.

    >>> fake_quantize(torch.tensor([-1.0, 0.26, 9.0]), 0.5, 0, 4)
    tensor([0.0000, 0.5000, 7.5000])

    Args:
        values: any shape.
        scale: positive; a tensor that broadcasts, or a number.
        zero: code of the value 0, likewise.
        bits: of a code.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    codes = (wide / scale).round_().add_(zero).clamp_(0, (1 << bits) - 1)
    return codes.sub_(zero).mul_(scale).to(values.dtype)


@torch.no_grad()
def fake_quantize_tokens(
    values: Tensor, bits: int, *, features: int = -1, symmetric: bool = False
) -> Tensor:
    """Round each token to a grid of its own: `make_grid` of its smallest and largest feature.

    A pixel of an image is a token whose features are its channels. No integer kernel of a
    convolution works so, since one patch then holds several scales: the figures are those of a
    computation in floating point.

    Args:
        values: any shape.
        bits: of a code.
        features: dimension of the features.
        symmetric: signed grids, as wide below 0 as above.
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    half, steps = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        scale = wide.abs().amax(features, keepdim=True) / (half - 1)
        zero = torch.full_like(scale, half)
    else:
        low = wide.amin(features, keepdim=True).clamp_(max=0.0)
        scale = wide.amax(features, keepdim=True).clamp_(min=0.0) / steps - low / steps
        zero = torch.zeros_like(scale)
    scale = scale.float().to(wide.dtype)
    scale = scale.masked_fill_(scale == 0, 1.0)
    if not symmetric:
        zero = (-low / scale).round_().clamp_(0, steps)
    return fake_quantize(values, scale, zero, bits)


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    """Rounds what one module is given.

    Attributes:
        bits: of a code.
        grid: for all inputs, None for one a token.
        features: dimension of the features of a token.
        symmetric: of the grids of tokens.
    """

    bits: int
    grid: Grid | None
    features: int = -1
    symmetric: bool = False

    def __call__(self, values: Tensor) -> Tensor:
        """Return the rounded values, of the same shape and dtype."""
        if self.grid is None:
            return fake_quantize_tokens(
                values, self.bits, features=self.features, symmetric=self.symmetric
            )
        return fake_quantize(values, self.grid.scale, self.grid.zero, self.bits)


def input_quantizer(
    ranges: ActivationRanges, layer: str, module: nn.Module, bits: int
) -> InputQuantizer:
    """Return what rounds the inputs of one of a layer's modules.

    Raises:
        InputError: ranges of so many bits, or of this layer, were not made.
    """
    spatial = len(module.kernel_size) if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) else 0
    features = -1 - spatial
    return InputQuantizer(bits, ranges.grid(layer, bits), features, ranges.symmetric)


def input_modules(module: nn.Module, layer: Layer) -> list[nn.Module]:
    """Return the modules that compute with a layer's weight: all that hold it but embeddings."""
    held = [module.get_submodule(name) for name in (layer.name, *layer.tied)]
    return [child for child in held if not isinstance(child, nn.Embedding)]


def first_input(name: str, inputs: tuple[Any, ...]) -> Tensor:
    """Return what a layer is given.

    Raises:
        Unsupported: it comes by keyword, where hooks do not see it.
    """
    if not inputs or not isinstance(inputs[0], Tensor):
        raise Unsupported(
            f"layer {name}: is not given its input as the first positional argument, so the input "
            "cannot be quantized; exclude the layer, or use formats without activation bits."
        )
    return inputs[0]


def real_entries(values: Tensor, attention: Tensor | None) -> Tensor:
    """Return the entries of an input (B, T, ...) at real positions; all if there are no others."""
    if attention is None or values.ndim < 3 or values.shape[:2] != attention.shape:
        return values
    return values[attention.to(values.device)]
