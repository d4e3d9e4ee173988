"""Round one weight to a format: scales first, then codes, then the values that these stand for.

Letters in shapes: a weight is (rows, columns) = (outputs, inputs); a group is `g` neighboring
columns of one row that share a scale; groups = columns / g. Codes of b bits are signed,
-2^(b-1) .. 2^(b-1) - 1.

Every value that leaves here is `(code - zero point) * scale` in the asked dtype, and the scale is
rounded to its stored dtype BEFORE codes are made: what is measured is what a checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError, Unsupported, did_you_mean
from hawqkit.formats import Format, fitting_formats

ROUNDINGS = ("nearest", "searched")

# Shrinking the scale trades the few clipped entries against a finer grid for all others. Three
# values take most of the gain, and each more costs a pass over the weight.
SHRINKS = (1.0, 0.93, 0.86)

# Entries handled at once: 2^17 float32 entries and two buffers of the same size stay in the cache,
# and are still long enough to hide the cost of launching an operation.
CPU_CHUNK = 1 << 17
DECODE_CHUNK = 1 << 19  # decoding has no such buffers
DEVICE_CHUNK = 1 << 25


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight as codes and scales.

    Attributes:
        codes: (rows, columns) int8.
        scales: (rows, groups) in the scale dtype; signed in symmetric formats, never zero.
        zeros: (rows, groups) int8 zero points; None in symmetric formats.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def take(self, rows: Tensor | slice) -> Quantized:
        """Return some rows; a slice copies nothing."""
        zeros = None if self.zeros is None else self.zeros[rows]
        return Quantized(self.codes[rows], self.scales[rows], zeros)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory (codes take a byte each, whatever the format)."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.zeros) if t is not None)


def scale_dtype_for(stored: str) -> torch.dtype:
    """Return the dtype in which the scales of a weight stored as `stored` are kept.

    bfloat16 and float16 stay; float32 and float64 get bfloat16, which has float32's range, so that
    no scale underflows in 16 bits.

    >>> scale_dtype_for("float32"), scale_dtype_for("float16")
    (torch.bfloat16, torch.float16)
    """
    return torch.float16 if stored == "float16" else torch.bfloat16


def quantize_weight(
    weight: Tensor, format: Format, *, rounding: str = "searched", scale_dtype: torch.dtype
) -> Quantized:
    """Round `weight` to `format`: exactly `codes_from_scales` of `scales_of`.

    Args:
        weight: (rows, columns), any floating dtype and any strides.
        format: an integer format whose group size divides the columns.
        rounding: `nearest` or `searched`, see `scales_of`.
        scale_dtype: dtype in which scales are kept.

    Raises:
        InputError: `rounding` is unknown.
        Unsupported: the format does not fit the columns, or is `none`.
        NumericalError: the weight holds NaN or infinity.
    """
    scales, zeros = scales_of(weight, format, rounding=rounding, scale_dtype=scale_dtype)
    return codes_from_scales(weight, scales, zeros, format)


@torch.no_grad()
def scales_of(
    weight: Tensor, format: Format, *, rounding: str = "searched", scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return scales (rows, groups) and, for asymmetric formats, int8 zero points (rows, groups).

    With b bits, w a group and r the shrink factor:

        symmetric     s = -r w_max / 2^(b-1), w_max the entry of largest magnitude WITH its sign,
                      so that the extra level -2^(b-1) lies on the side of w_max
        asymmetric    s = r (hi - lo) / (2^b - 1), lo = min(0, min w), hi = max(0, max w),
                      zero point z = round(-2^(b-1) - r lo / s)

    `nearest` takes r = 1; `searched` takes, group by group, the r of `SHRINKS` with the smallest
    squared error (the first of equals). Where s is zero, that is for all-zero groups and for those
    whose scale underflows, s is 1 and z is 0, so that their codes are 0.

    Raises:
        InputError, Unsupported, NumericalError: as `quantize_weight`.
    """
    check_weight(weight, format, rounding)
    rows, columns = weight.shape
    groups = format.groups_per_row(columns)
    scales = torch.empty(rows, groups, dtype=scale_dtype, device=weight.device)
    zeros = None if format.symmetric else torch.empty_like(scales, dtype=torch.int8)
    shrinks = SHRINKS if rounding == "searched" else SHRINKS[:1]
    for part, chunk in row_chunks(weight):
        x = chunk.view(-1, columns // groups)  # (rows * groups, g)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # (rows * groups, 1)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise NumericalError(not_finite(weight))
        scale, zero = _best_of(x, low, high, format, shrinks, scale_dtype)
        scales[part] = scale.view(-1, groups).to(scale_dtype)
        if zeros is not None and zero is not None:
            zeros[part] = zero.view(-1, groups).to(torch.int8)
    return scales, zeros


@torch.no_grad()
def codes_from_scales(
    weight: Tensor, scales: Tensor, zeros: Tensor | None, format: Format
) -> Quantized:
    """Return codes = clamp(round(w / s) + z, -2^(b-1), 2^(b-1) - 1) beside the given scales.

    Ties round to even. The quotient is taken in float32 (float64 for a float64 weight).

    Args:
        weight: (rows, columns), the weight that the scales were made for.
        scales: (rows, groups) from `scales_of`.
        zeros: (rows, groups) from `scales_of`, None in symmetric formats.
        format: the format that the scales were made for.
    """
    groups = scales.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part, chunk in row_chunks(weight):
        x = chunk.view(-1, weight.shape[1] // groups)
        rounded = torch.empty_like(x)
        _round_into(rounded, x, *_as_columns(scales[part], zeros, part, x.dtype), format)
        codes[part] = rounded.view(chunk.shape).to(torch.int8)
    return Quantized(codes, scales, zeros)


@torch.no_grad()
def dequantize(quantized: Quantized, format: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values (rows, columns) that a quantized weight stands for, in `dtype`.

        value = (code - zero point) * scale

    In float32 that is, bit for bit, what transformers decodes from an exported checkpoint.

    Raises:
        InputError: the weight was quantized in a format of the other symmetry.
    """
    if (quantized.zeros is None) != format.symmetric:
        raise InputError(
            f"format '{format.name}' has {'no' if format.symmetric else 'a'} zero point, and the "
            f"quantized weight has {'none' if quantized.zeros is None else 'one'}: decode a weight "
            "in the format that it was quantized in."
        )
    values = torch.empty(quantized.codes.shape, dtype=dtype, device=quantized.codes.device)
    decode_into(values, quantized)
    return values


@torch.no_grad()
def decode_into(out: Tensor, quantized: Quantized, plus: Tensor | None = None) -> None:
    """Write the dequantized values into `out` (rows, columns), plus `plus` where it is given.

    With `plus` = -W that is the error dW, where the CPU fuses product and sum, with one rounding.

    Args:
        out: (rows, columns), contiguous.
        quantized: codes and scales.
        plus: (rows, columns), contiguous, of the dtype of `out`.
    """
    for part in _parts(out, DECODE_CHUNK):
        scale, zero = _as_columns(quantized.scales[part], quantized.zeros, part, out.dtype)
        y = out[part].view(scale.shape[0], -1)
        y.copy_(quantized.codes[part].view(y.shape))
        _scale_back(y, scale, zero, None if plus is None else plus[part].view(y.shape))


@torch.no_grad()
def round_into(
    out: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    format: Format,
    plus: Tensor | None = None,
) -> None:
    """Write what `decode_into` would of `codes_from_scales(...)`, without keeping the codes.

    Args:
        out: (rows, columns), contiguous.
        weight: (rows, columns).
        scales: (rows, groups) from `scales_of`.
        zeros: (rows, groups) from `scales_of`, None in symmetric formats.
        format: the format that the scales were made for.
        plus: added to the values, (rows, columns), contiguous, of the dtype of `out`.
    """
    for part, chunk in row_chunks(weight):
        scale, zero = _as_columns(scales[part], zeros, part, out.dtype)
        y = out[part].view(scale.shape[0], -1)
        x = chunk.view(y.shape)
        # Codes are made in the weight's precision, also where the values are asked in another one.
        codes = y if out.dtype == x.dtype else torch.empty_like(x)
        _round_into(codes, x, scale.to(x.dtype), None if zero is None else zero.to(x.dtype), format)
        if codes is not y:
            y.copy_(codes)
        _scale_back(y, scale, zero, None if plus is None else plus[part].view(y.shape))


def check_weight(weight: Tensor, format: Format, rounding: str) -> None:
    """Refuse what cannot be rounded to `format`, but for entries that are not finite.

    Raises:
        InputError: `rounding` is unknown.
        Unsupported: the format is `none`, or the weight is no matrix, or does not fit.
    """
    if rounding not in ROUNDINGS:
        raise InputError(
            f"unknown rounding {rounding!r}: known are {', '.join(ROUNDINGS)}."
            + did_you_mean(rounding, ROUNDINGS)
        )
    if format.bits is None:
        raise Unsupported("format 'none' keeps the stored values: there is nothing to round.")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise Unsupported(
            f"a weight of shape {tuple(weight.shape)} and dtype {weight.dtype} cannot be rounded: "
            "it must be a floating-point matrix (rows, columns)."
        )
    columns = weight.shape[1]
    if not format.fits(columns):
        raise Unsupported(
            f"format '{format.name}' does not fit a weight of {columns} columns: "
            f"{format.columns_divisor} does not divide {columns}. "
            f"Formats that fit: {', '.join(fitting_formats(columns, format.family))}."
        )


def not_finite(weight: Tensor) -> str:
    """Return the message for a weight that holds NaN or infinity."""
    bad = ~torch.isfinite(weight)
    row, column = (int(i) for i in bad.nonzero()[0])
    return (
        f"the weight holds {int(bad.sum())} entries that are NaN or infinite, the first at row "
        f"{row}, column {column}: such a weight cannot be rounded. Load a sound checkpoint, or "
        "exclude the layer."
    )


def _parts(weight: Tensor, on_cpu: int) -> Iterator[slice]:
    """Yield slices of rows that are worth working on at once."""
    limit = on_cpu if weight.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, limit // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        yield slice(start, min(start + step, weight.shape[0]))


def row_chunks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows as contiguous float32 (float64 stays), without a copy where they already are."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for part in _parts(weight, CPU_CHUNK):
        yield part, weight[part].to(dtype).contiguous()


def _as_columns(
    scales: Tensor, zeros: Tensor | None, part: slice, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points of some rows as (rows * groups, 1) of `dtype`."""
    zero = None if zeros is None else zeros[part].reshape(-1, 1).to(dtype)
    return scales.reshape(-1, 1).to(dtype), zero


def _round_into(out: Tensor, x: Tensor, scale: Tensor, zero: Tensor | None, format: Format) -> None:
    """Write the codes of x (groups, g) into out, as floating-point numbers."""
    assert format.bits is not None
    half = 1 << (format.bits - 1)
    torch.div(x, scale, out=out).round_()
    if zero is not None:
        out.add_(zero)
    out.clamp_(-half, half - 1)


def _scale_back(
    codes: Tensor, scale: Tensor, zero: Tensor | None, plus: Tensor | None = None
) -> None:
    """Turn codes (groups, g) into values, in place, plus `plus`."""
    if zero is not None:
        codes.sub_(zero)
    if plus is None:
        codes.mul_(scale)
    else:
        torch.addcmul(plus, codes, scale, out=codes)


def _best_of(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    format: Format,
    shrinks: tuple[float, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return the scale and zero point (groups, 1) of the shrink factor with the smallest error."""
    best, best_zero = _candidate(low, high, shrinks[0], format, dtype)
    if len(shrinks) == 1:
        return best, best_zero
    buffer = torch.empty_like(x)
    least = _error(x, best, best_zero, format, buffer)
    for shrink in shrinks[1:]:
        scale, zero = _candidate(low, high, shrink, format, dtype)
        error = _error(x, scale, zero, format, buffer)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scale, best)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best, best_zero


def _candidate(
    low: Tensor, high: Tensor, shrink: float, format: Format, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return the scale, rounded to `dtype` and never zero, and the zero point, all (groups, 1)."""
    assert format.bits is not None
    half = 1 << (format.bits - 1)
    if format.symmetric:
        # A comparison of the two ends finds the largest magnitude without gathering an argmax.
        extreme = torch.where(high >= -low, high, low)
        scale = (extreme * (-shrink / half)).to(dtype).to(low.dtype)
        return scale.masked_fill_(scale == 0, 1.0), None
    low, high = low.clamp(max=0.0) * shrink, high.clamp(min=0.0) * shrink
    steps = 2 * half - 1
    scale = (high / steps - low / steps).to(dtype).to(low.dtype)  # high - low could overflow
    empty = scale == 0
    scale = scale.masked_fill_(empty, 1.0)
    zero = (-half - low / scale).round_().clamp_(-half, half - 1)
    return scale, zero.masked_fill_(empty, 0.0)


def _error(x: Tensor, scale: Tensor, zero: Tensor | None, format: Format, buffer: Tensor) -> Tensor:
    """Return the root of each group's squared error (groups, 1), computed in units of the scale."""
    _round_into(buffer, x, scale, zero, format)
    if zero is not None:
        buffer.sub_(zero)
    buffer.addcdiv_(x, scale, value=-1.0)
    root: Tensor = torch.linalg.vector_norm(buffer, dim=-1, keepdim=True)
    return root.mul_(scale.abs())
