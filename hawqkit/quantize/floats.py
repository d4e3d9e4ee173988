"""Round a weight to floating-point formats: places in a table, times the scale of the group.

Letters in shapes: a weight is (rows, columns); a group is `g` neighboring columns of one row, or a
row, or the whole weight; groups = columns / g.

    value = table[code] * scale     in float32

Elements are rounded to nearest, ties to the even code, and saturate. With a the largest magnitude
of a group, M that of the element (e2m1: 6, e2m3: 7.5, e3m2: 28, e4m3: 448, e5m2: 57344, tables: 1):

    nf4, fp4     s = a                                     (bitsandbytes)
    fp8-*        s = a / M                                 (compressed-tensors)
    mxfp*        s = 2^(floor(log2 a) - floor(log2 M))     (OCP MX v1.0, section 6.3)
    nvfp4        s = e4m3(t a / 6) / t, t = 448 * 6 / (largest magnitude of the weight)
                                                           (compressed-tensors)

`searched` tries smaller a (or, for mxfp*, the next larger power of two) and takes, group by group,
the smallest squared error. Where a group is all zeros its scale is 1 and its codes are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hawqkit.formats import Format
from hawqkit.quantize.rounding import SHRINKS, row_chunks

# Of each element: bits of exponent and mantissa; those of the tables have none.
MINIFLOATS = {"e2m1": (2, 1), "e2m3": (2, 3), "e3m2": (3, 2)}
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}

# NormalFloat4: quantiles of a normal distribution (Dettmers et al. 2023, appendix E), and the
# 4-bit float of bitsandbytes, whose codes are in no order; both as bitsandbytes has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4_HALF = (0.0, 0.0052083333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4_HALF, *(-x for x in _FP4_HALF))

E8M0_BIAS = 127
LARGEST_E4M3 = 448.0


@dataclass(frozen=True, slots=True)
class FloatCodes:
    """A weight in a floating-point format.

    Attributes:
        format: the format.
        codes: (rows, columns) uint8, places in `table`.
        scales: (rows, groups) float32, by which an entry of the table is multiplied; (1, 1) where
            the whole weight shares one.
        table: (2^bits,) float32.
        stored_scales: the scales as files hold them: float32 (nf4, fp4), the asked dtype (fp8),
            e4m3 (nvfp4), or exponents of powers of two, plus 127, as uint8 (mxfp*).
        tensor_scale: () float32, t of nvfp4; None elsewhere.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    table: Tensor
    stored_scales: Tensor
    tensor_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return self.codes.nbytes + self.scales.nbytes + self.stored_scales.nbytes

    def values(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return what some rows stand for, (R, columns); the product is taken in float32."""
        codes = self.codes[rows]
        scales = self.scales if self.format.per_tensor else self.scales[rows]
        out = self.table[codes.reshape(-1).int()].view(codes.shape)
        groups = out.view(codes.shape[0], scales.shape[1], -1)
        return groups.mul_(scales[..., None]).view(codes.shape).to(dtype)


@torch.no_grad()
def round_floats(
    weight: Tensor, format: Format, *, rounding: str, scale_dtype: torch.dtype = torch.float32
) -> FloatCodes:
    """Round a weight to a format of the family `float`.

    Args:
        weight: (rows, columns), finite, any floating dtype and any strides.
        format: the format; its group size divides the columns.
        rounding: `nearest` or `searched`.
        scale_dtype: dtype in which the scales of fp8 are kept; others have their own.
    """
    rows, columns = weight.shape
    device = weight.device
    groups = format.groups_per_row(columns)
    largest = _largest(weight, groups)  # (rows, groups)
    if format.per_tensor:
        largest = largest.max().view(1, 1)
    tensor_scale = _tensor_scale(largest) if format.name == "nvfp4" else None
    kept = scale_dtype if format.element in FLOAT8 else torch.float32
    scales = _search(weight, format, largest, tensor_scale, rounding, kept)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    encode = encoder(format.element)
    for part, chunk in row_chunks(weight):
        scale = scales.effective if format.per_tensor else scales.effective[part]
        x = chunk.view(len(chunk), scale.shape[1], -1) / scale[..., None]
        codes[part] = encode(x).view(chunk.shape)
    table = decode_table(format.element).to(device)
    return FloatCodes(format, codes, scales.effective, table, scales.stored, tensor_scale)


@lru_cache(maxsize=16)
def decode_table(element: str) -> Tensor:
    """Return the value of every code of an element, float32; NaN where a code means none.

    >>> decode_table("e2m1").tolist()[:8]
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    if element == "nf4":
        return torch.tensor(NF4)
    if element == "fp4":
        return torch.tensor(FP4)
    if element in FLOAT8:
        return torch.arange(256, dtype=torch.uint8).view(FLOAT8[element]).float()
    exponents, mantissas = MINIFLOATS[element]
    codes = torch.arange(1 << (exponents + mantissas))
    exponent, mantissa = codes >> mantissas, codes % (1 << mantissas)
    bias = (1 << (exponents - 1)) - 1
    fraction = mantissa.float() / (1 << mantissas) + (exponent > 0)
    half = fraction * torch.exp2((exponent.clamp(min=1) - bias).float())
    return torch.cat([half, -half])


def largest_of(element: str) -> float:
    """Return the largest magnitude of an element.

    >>> largest_of("e3m2"), largest_of("e4m3"), largest_of("nf4")
    (28.0, 448.0, 1.0)
    """
    table = decode_table(element)
    return float(table[torch.isfinite(table)].abs().max())


def encoder(element: str) -> Callable[[Tensor], Tensor]:
    """Return the function that turns numbers into the codes nearest to them, uint8.

    Ties go to the even code of a minifloat, and to the smaller value of a table.
    """
    if element in FLOAT8:
        dtype, largest = FLOAT8[element], largest_of(element)
        return lambda x: x.float().clamp(-largest, largest).to(dtype).view(torch.uint8)
    if element in MINIFLOATS:
        return lambda x: _minifloat_codes(x, *MINIFLOATS[element])
    return lambda x: _table_codes(x, decode_table(element).to(x.device))


def _minifloat_codes(x: Tensor, exponents: int, mantissas: int) -> Tensor:
    """Round to a signed float without infinities; subnormals and saturation as OCP MX has them."""
    bias = (1 << (exponents - 1)) - 1
    top = (1 << exponents) - 1 - bias
    largest = (2.0 - 2.0**-mantissas) * 2.0**top
    size = x.abs().clamp_(max=largest)
    _, above = torch.frexp(size)  # size = f 2^above with f in [1/2, 1)
    exponent = (above - 1).clamp_(min=1 - bias).masked_fill_(size == 0, 1 - bias)
    steps = torch.ldexp(size, mantissas - exponent).round_()  # ties to even
    # A mantissa that rounds up to 2^(m + 1) carries into the exponent by itself.
    code = steps.int() + ((exponent + bias - 1) << mantissas)
    return (code + (torch.signbit(x).int() << (exponents + mantissas))).to(torch.uint8)


def _table_codes(x: Tensor, table: Tensor) -> Tensor:
    """Return the place of the nearest value of a table in any order."""
    ordered, places = table.sort(stable=True)
    first = torch.cat([torch.ones_like(places[:1], dtype=torch.bool), ordered[1:] > ordered[:-1]])
    ordered, places = ordered[first], places[first]  # fp4 has a zero with either sign
    middles = (ordered[1:] + ordered[:-1]) / 2
    return places[torch.bucketize(x, middles)].to(torch.uint8)


@dataclass(frozen=True, slots=True)
class _Scales:
    effective: Tensor
    stored: Tensor


def _largest(weight: Tensor, groups: int) -> Tensor:
    """Return the largest magnitude of each group, (rows, groups), float32 or float64."""
    found = [chunk.view(len(chunk), groups, -1).abs().amax(-1) for _, chunk in row_chunks(weight)]
    return torch.cat(found)


def _tensor_scale(largest: Tensor) -> Tensor:
    most = largest.max().float()
    scale = LARGEST_E4M3 * largest_of("e2m1") / most
    return torch.where(torch.isfinite(scale), scale, torch.ones_like(most))


def _scales(
    format: Format, largest: Tensor, tensor_scale: Tensor | None, attempt: float, kept: torch.dtype
) -> _Scales:
    """Return the scales for one attempt: a shrink factor, or for mxfp* a number of doublings."""
    empty = largest == 0
    if format.scale_bits == 8 and tensor_scale is None:  # powers of two
        _, above = torch.frexp(largest.float())
        _, top = torch.frexp(torch.tensor(largest_of(format.element)))
        exponent = (above - int(top) + int(attempt)).clamp_(-E8M0_BIAS, E8M0_BIAS)
        exponent = exponent.masked_fill_(empty, 0)
        effective = torch.ldexp(torch.ones_like(largest, dtype=torch.float32), exponent)
        return _Scales(effective, (exponent + E8M0_BIAS).to(torch.uint8))
    scale = (largest * attempt).float() / largest_of(format.element)
    if tensor_scale is None:
        stored = scale.to(kept)
        stored = stored.masked_fill_(empty | (stored == 0), 1.0)
        return _Scales(stored.float(), stored)
    stored = (scale * tensor_scale).clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    # e4m3 ends at 2^-9: a group that needs a smaller scale gets that one, so that none is zero.
    least = torch.full_like(scale, 2.0**-9).to(torch.float8_e4m3fn)
    stored = _where(stored.float() == 0, least, stored)
    return _Scales(stored.float() / tensor_scale, stored)


def _search(
    weight: Tensor,
    format: Format,
    largest: Tensor,
    tensor_scale: Tensor | None,
    rounding: str,
    kept: torch.dtype,
) -> _Scales:
    """Return the scales with the smallest squared error of the attempts, group by group."""
    powers = format.scale_bits == 8 and tensor_scale is None
    attempts = (0.0, 1.0) if powers else SHRINKS
    first = _scales(format, largest, tensor_scale, attempts[0], kept)
    if rounding != "searched":
        return first
    best, least = first, _errors(weight, format, first.effective)
    for attempt in attempts[1:]:
        other = _scales(format, largest, tensor_scale, attempt, kept)
        error = _errors(weight, format, other.effective)
        better = error < least
        least = torch.where(better, error, least)
        best = _Scales(
            torch.where(better, other.effective, best.effective),
            _where(better, other.stored, best.stored),
        )
    return best


def _errors(weight: Tensor, format: Format, scales: Tensor) -> Tensor:
    """Return each group's squared error, shaped as the scales."""
    encode, table = encoder(format.element), decode_table(format.element).to(weight.device)
    found = []
    for part, chunk in row_chunks(weight):
        scale = scales if format.per_tensor else scales[part]
        x = chunk.view(len(chunk), scale.shape[1], -1)
        y = table[encode(x / scale[..., None]).int()] * scale[..., None]
        found.append((y - x).square_().sum(-1))
    errors = torch.cat(found)
    return errors.sum().view(1, 1) if format.per_tensor else errors


def _where(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose between tensors of a dtype that torch.where has no kernel for."""
    if yes.dtype != torch.float8_e4m3fn:
        return torch.where(mask, yes, no)
    raw = torch.where(mask, yes.view(torch.uint8), no.view(torch.uint8))
    return raw.view(torch.float8_e4m3fn)
