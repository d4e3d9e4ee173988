"""Rounding a layer of a model: with the scales that it brings, else with scales made for it."""

from __future__ import annotations

import torch
from torch import Tensor

from hawqkit.formats import Format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.rounding import Quantized, codes_from_scales, scales_of


def layer_scales(
    model: LoadedModel, name: str, format: Format, *, rounding: str, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return scales (rows, groups) and zero points of a layer's weight.

    Those in `model.scales` where they are of this format, whatever `rounding` says, else those that
    `rounding.scales_of` makes.

    Args:
        model: the model.
        name: of the layer.
        format: of the weight; bits of inputs mean nothing here.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which scales are kept.

    Raises:
        InputError, Unsupported, NumericalError: as `rounding.scales_of`.
    """
    known = model.scales.get(name)
    if known is not None and known.format == format.weights.name:
        return known.scales, known.zeros
    return scales_of(model.weight(name), format, rounding=rounding, scale_dtype=scale_dtype)


def quantize_layer(
    model: LoadedModel, name: str, format: Format, *, rounding: str, scale_dtype: torch.dtype
) -> Quantized:
    """Return a layer's weight as codes and scales; see `layer_scales` for which.

    Raises:
        InputError, Unsupported, NumericalError: as `rounding.quantize_weight`.
    """
    scales, zeros = layer_scales(model, name, format, rounding=rounding, scale_dtype=scale_dtype)
    return codes_from_scales(model.weight(name), scales, zeros, format)
