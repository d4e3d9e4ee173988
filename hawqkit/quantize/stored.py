"""Weights of the formats that are no integers, as they are stored; one way in for all of them.

A family (`quantize.floats`, `quantize.gguf_blocks`) gives a class that fulfills `Stored` and a
function that makes it. Integers have their own, faster way: `quantize.rounding`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from hawqkit.errors import NumericalError
from hawqkit.formats import FLOAT, GGUF, INTEGER, Format
from hawqkit.quantize.rounding import check_weight, not_finite, round_into, scales_of


class Stored(Protocol):
    """A weight (rows, columns) in one format."""

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""

    def values(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return what some rows stand for, (R, columns), contiguous.

        In float32 that is, bit for bit, what the format's reference decodes.
        """


def store(
    weight: Tensor, format: Format, *, rounding: str, scale_dtype: torch.dtype = torch.float32
) -> Stored:
    """Round a weight to a format that is no integer.

    Args:
        weight: (rows, columns), any floating dtype and any strides.
        format: of the family `float` or `gguf`; it must fit the columns.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which the scales of fp8 are kept; other formats have their own.

    Raises:
        InputError: `rounding` is unknown.
        Unsupported: the format does not fit the columns, or its library is not installed.
        NumericalError: the weight holds NaN or infinity.
    """
    check_weight(weight, format, rounding)
    if not bool(torch.isfinite(weight).all()):
        raise NumericalError(not_finite(weight))
    if format.family == FLOAT:
        from hawqkit.quantize.floats import round_floats

        return round_floats(weight, format, rounding=rounding, scale_dtype=scale_dtype)
    if format.family == GGUF:
        from hawqkit.quantize.gguf_blocks import encode_blocks

        return encode_blocks(weight, format, rounding=rounding)
    raise AssertionError(f"{format.name} is of the family {format.family}")


@torch.no_grad()
def rounded_values(
    weight: Tensor, format: Format, *, rounding: str, scale_dtype: torch.dtype
) -> Tensor:
    """Return what `weight` becomes in any format: (rows, columns), float32, or float64 if it is so.

    Args:
        weight: (rows, columns), any floating dtype and any strides.
        format: any but `none`.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which the scales of integers and of fp8 are kept.

    Raises:
        InputError, Unsupported, NumericalError: as `store` and `rounding.quantize_weight`.
    """
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if format.family != INTEGER:
        stored = store(weight, format, rounding=rounding, scale_dtype=scale_dtype)
        return stored.values(slice(None), wide)
    scales, zeros = scales_of(weight, format, rounding=rounding, scale_dtype=scale_dtype)
    values = torch.empty(weight.shape, dtype=wide, device=weight.device)
    round_into(values, weight, scales, zeros, format)
    return values
