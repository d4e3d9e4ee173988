"""The errors dW_f = Q_f(W) - W of one weight in many formats, kept small or made again each time.

Letters in shapes: F formats, a weight is (rows, columns).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from hawqkit.errors import InputError, did_you_mean
from hawqkit.formats import INTEGER, Format
from hawqkit.quantize.rounding import (
    Quantized,
    codes_from_scales,
    decode_into,
    round_into,
    scales_of,
)
from hawqkit.quantize.stored import Stored, store

KEEPS = ("codes", "none")

# Codes of integers, or their scales and zero points alone, or another family's own form.
Part = Quantized | tuple[Tensor, Tensor | None] | Stored


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """Everything that is needed to write the errors of one layer in all its formats.

    With `codes` an entry costs a byte a format and a fill only decodes; with `none` just the scales
    are kept and a fill divides and rounds again. The numbers are equal, bit for bit.

    Attributes:
        formats: F formats, in the order of `fill`.
        parts: one (scales, zero points) a format or, with `codes`, one stack of codes for each run
            of formats of one group size and symmetry: (F', rows, columns).
        squared_norms: (F,) float64, |dW_f|^2.
    """

    formats: tuple[Format, ...]
    parts: tuple[Part, ...]
    squared_norms: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that are held."""
        return self.squared_norms.nbytes + sum(
            _bytes(part) if isinstance(part, tuple) else part.nbytes for part in self.parts
        )

    @torch.no_grad()
    def fill(self, weight: Tensor, out: Tensor, rows: Tensor | slice | None = None) -> None:
        """Write dW_f = dequantized - weight into `out`, for all rows or for some of them.

        Args:
            weight: (rows, columns), the weight that the errors were made for, any strides.
            out: (F, R, columns), contiguous, on the weight's device: float64, or float32 where the
                weight is not float64.
            rows: the R rows wanted, default all.

        Raises:
            InputError: `out` has another shape or dtype, or is not contiguous.
        """
        part_of = slice(None) if rows is None else rows
        some = weight[part_of]
        shape = (len(self.formats), *some.shape)
        wide = torch.promote_types(weight.dtype, torch.float32)
        good = out.dtype in (wide, torch.float64) and out.is_contiguous()
        if tuple(out.shape) != shape or not good:
            raise InputError(
                f"a buffer of shape {tuple(out.shape)} and dtype {out.dtype} came for the errors: "
                f"give a contiguous buffer of shape {shape} and dtype {wide}."
            )
        minus = _negative(some, out.dtype)
        at = 0
        for part in self.parts:
            if isinstance(part, Quantized):
                _decode_stack(out[at : at + len(part.codes)], part, part_of, minus)
                at += len(part.codes)
            elif not isinstance(part, tuple):
                out[at].copy_(part.values(part_of, wide)).add_(minus)
                at += 1
            else:
                scales, zeros = part
                zeros = None if zeros is None else zeros[part_of]
                round_into(out[at], some, scales[part_of], zeros, self.formats[at], minus)
                at += 1


def make_errors(
    weight: Tensor,
    formats: Sequence[Format],
    *,
    rounding: str,
    scale_dtype: torch.dtype,
    keep: str,
) -> LayerErrors:
    """Round one weight to every format and keep what is needed to write the errors again.

    Args:
        weight: (rows, columns), any floating dtype and any strides.
        formats: F formats; each must fit the columns. `none` makes no error and may not be here.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which scales are kept.
        keep: `codes` (int8 codes and scales stay in memory) or `none` (only the scales stay);
            formats that are no integers keep their codes in any case.

    Raises:
        InputError: `keep` or `rounding` is unknown.
        Unsupported: a format does not fit the columns.
        NumericalError: the weight holds NaN or infinity.
    """
    if keep not in KEEPS:
        raise InputError(
            f"unknown way to keep errors {keep!r}: known are {', '.join(KEEPS)}."
            + did_you_mean(keep, KEEPS)
        )
    parts: list[Part] = []
    norms = torch.empty(len(formats), dtype=torch.float64)
    wide = torch.promote_types(weight.dtype, torch.float32)
    buffer = torch.empty(weight.shape, dtype=wide, device=weight.device)
    minus = _negative(weight, buffer.dtype)
    for index, format in enumerate(formats):
        if format.family != INTEGER:
            stored = store(weight, format, rounding=rounding, scale_dtype=scale_dtype)
            buffer.copy_(stored.values(slice(None), wide)).add_(minus)
            parts.append(stored)
            norms[index] = _squared_norm(buffer)
            continue
        scales, zeros = scales_of(weight, format, rounding=rounding, scale_dtype=scale_dtype)
        if keep == "codes":
            part = codes_from_scales(weight, scales, zeros, format)
            decode_into(buffer, part, minus)
            parts.append(part)
        else:
            round_into(buffer, weight, scales, zeros, format, minus)
            parts.append((scales, zeros))
        norms[index] = _squared_norm(buffer)
    return LayerErrors(tuple(formats), tuple(_stacked(parts)), norms)


def _stacked(parts: Sequence[Part]) -> Iterator[Part]:
    """Put neighbors of one group size and symmetry into one tensor.

    A batch of one short sequence spends more time on launching operations than on decoding; a stack
    is decoded by two operations, whatever the number of formats.
    """

    def shape(part: Part) -> object:
        return (part.scales.shape, part.zeros is None) if isinstance(part, Quantized) else id(part)

    for _, run in groupby(parts, shape):
        some = list(run)
        whole = [part for part in some if isinstance(part, Quantized)]
        if not whole:
            yield from some
            continue
        zeros = [part.zeros for part in whole if part.zeros is not None]
        yield Quantized(
            torch.stack([part.codes for part in whole]),
            torch.stack([part.scales for part in whole]),
            torch.stack(zeros) if zeros else None,
        )


def _decode_stack(out: Tensor, stack: Quantized, rows: Tensor | slice, minus: Tensor) -> None:
    """Write (codes - zero points) * scales + minus into out (F', R, columns)."""
    scales = stack.scales[:, rows].to(out.dtype)[..., None]  # (F', R, groups, 1)
    shape = (*scales.shape[:3], -1)
    y = out.view(shape)
    y.copy_(stack.codes[:, rows].view(shape))
    if stack.zeros is not None:
        y.sub_(stack.zeros[:, rows].to(out.dtype)[..., None])
    torch.addcmul(minus.view(shape[1:]), y, scales, out=y)


def _negative(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return -W, contiguous, of a dtype."""
    return torch.neg(weight.to(dtype)).contiguous()


def _squared_norm(error: Tensor) -> float:
    """Return |error|^2: squares summed in float32 within a row, the rows in float64."""
    return float(torch.linalg.vector_norm(error, dim=1).double().square().sum())


def _bytes(pair: tuple[Tensor, Tensor | None]) -> int:
    return sum(t.nbytes for t in pair if t is not None)
