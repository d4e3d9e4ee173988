"""What the blocks of GGUF types stand for, in plain tensor operations, on any device.

Letters in shapes: n blocks of c bytes. Scales and minima of a block are float16, products are taken
in float32 and in the order of gguf-py's `dequantize`, so that results are equal bit for bit:

    q4_0 q5_0 q8_0 iq4_nl     d q                 one scale d for 32 columns
    q4_1 q5_1                 d q + m             and a minimum m
    q3_k q6_k iq4_xs          (d s) q             256 columns, whose 16 (iq4_xs: 8) groups have
    q2_k q4_k q5_k            (d s) q - (e t) 1   small integers s, and t for the minimum

Source: ggml's `dequantize_row_*` and gguf-py's `quants.py`, whose bit layouts these are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hawqkit.errors import Unsupported
from hawqkit.formats import Format

QK_K = 256
# Blocks handled at once: what they stand for, and two buffers of that size, stay in the cache.
CPU_ENTRIES, DEVICE_ENTRIES = 1 << 17, 1 << 25

# The sixteen values of iq4_nl and iq4_xs, ggml's `kvalues_iq4nl`.
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@torch.no_grad()
def decode_blocks(packed: Tensor, format: Format) -> Tensor:
    """Return the values of rows of blocks.

    Args:
        packed: (rows, bytes of a row) uint8, contiguous or not.
        format: of the family `gguf`.

    Returns:
        (rows, columns) float32.

    Raises:
        Unsupported: the format is of another family, or blocks of it do not fill the rows.

    >>> from hawqkit.formats import parse_format
    >>> block = torch.tensor([[0, 0x3C, *[1] * 32]], dtype=torch.uint8)  # scale 1, codes 1
    >>> decode_blocks(block, parse_format("q8_0")).unique()
    tensor([1.])
    """
    decode = DECODERS.get(format.element)
    if decode is None or format.block is None:
        raise Unsupported(f"format {format.name!r} is no GGUF type that can be decoded.")
    columns, size = format.block
    rows, width = packed.shape
    if width % size != 0:
        raise Unsupported(
            f"rows of {width} bytes are not made of blocks of {size} ({format.name})."
        )
    out = torch.empty(rows, width // size * columns, dtype=torch.float32, device=packed.device)
    most = CPU_ENTRIES if packed.device.type == "cpu" else DEVICE_ENTRIES
    step = max(1, most // max(1, out.shape[1]))
    for start in range(0, rows, step):
        blocks = packed[start : start + step].reshape(-1, size)  # (n, c)
        out[start : start + step] = decode(blocks).view(-1, out.shape[1])
    return out


def _half(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 at a byte of every block, (n, 1) float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _fields(data: Tensor, bits: int, shifts: Sequence[int], run: int) -> Tensor:
    """Return bit fields: for each run of bytes, one field of all of it after the other.

    Args:
        data: (n, bytes) uint8.
        bits: of a field.
        shifts: where the fields begin in a byte.
        run: bytes that are taken together; `bytes / run` runs.

    Returns:
        (n, bytes len(shifts)) uint8.
    """
    parts = data.reshape(len(data), -1, 1, run)
    moved = parts >> torch.tensor(shifts, dtype=torch.uint8, device=data.device)[:, None]
    return (moved & ((1 << bits) - 1)).flatten(1)


def _nibbles(data: Tensor, run: int) -> Tensor:
    """Return the low halves of a run of bytes, then the high ones."""
    return _fields(data, 4, (0, 4), run)


def _bits_of(data: Tensor) -> Tensor:
    """Return the bits of bytes, low ones first, (n, 8 bytes)."""
    moved = data[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=data.device)
    return (moved & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | (_bits_of(blocks[:, 2:6]) << 4)
    return _half(blocks, 0) * (codes.float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | (_bits_of(blocks[:, 4:8]) << 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)


def _nonlinear(codes: Tensor) -> Tensor:
    table = torch.tensor(NONLINEAR, dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nonlinear(_nibbles(blocks[:, 2:], 16))


def _grouped(codes: Tensor, scales: Tensor, minima: Tensor | None = None) -> Tensor:
    """Return scales * codes - minima, group by group: codes (n, 256), scales (n, groups)."""
    groups = codes.float().view(len(codes), scales.shape[1], -1)
    groups.mul_(scales[..., None])
    if minima is not None:
        groups.sub_(minima[..., None])
    return groups.view(len(codes), QK_K)


def _q2_k(blocks: Tensor) -> Tensor:
    small = blocks[:, :16]
    scales = _half(blocks, 80) * (small & 15).float()
    minima = _half(blocks, 82) * (small >> 4).float()
    return _grouped(_fields(blocks[:, 16:80], 2, (0, 2, 4, 6), 32), scales, minima)


def _q3_k(blocks: Tensor) -> Tensor:
    """Codes of two bits, minus four where the bit of the mask is off; scales of six bits."""
    low = _nibbles(blocks[:, 96:104], 8)
    high = _fields(blocks[:, 104:108], 2, (0, 2, 4, 6), 4)
    scales = _half(blocks, 108) * ((low | (high << 4)).float() - 32)
    mask = _fields(blocks[:, :32], 1, range(8), 32)
    codes = _fields(blocks[:, 32:96], 2, (0, 2, 4, 6), 32).float() - ((mask ^ 1) << 2).float()
    return _grouped(codes, scales)


def _six_bit_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eight scales and the eight minima in 12 bytes of q4_k and q5_k, float32.

    The first four of each fill the low six bits of a byte; the two bits above them, and a half of
    one of the last four bytes, make one of the others.
    """
    first, second, last = data[:, :4], data[:, 4:8], data[:, 8:]
    scales = [first & 63, (last & 15) | ((first >> 2) & 48)]
    minima = [second & 63, (last >> 4) | ((second >> 2) & 48)]
    return torch.cat(scales, 1).float(), torch.cat(minima, 1).float()


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 16:], 32)
    return _grouped(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    codes = _nibbles(blocks[:, 48:], 32) | (_fields(blocks[:, 16:48], 1, range(8), 32) << 4)
    return _grouped(codes, _half(blocks, 0) * scales, _half(blocks, 2) * minima)


def _q6_k(blocks: Tensor) -> Tensor:
    high = _fields(blocks[:, 128:192], 2, (0, 2, 4, 6), 32)
    codes = (_nibbles(blocks[:, :128], 64) | (high << 4)).float() - 32
    return _grouped(codes, _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float())


def _iq4_xs(blocks: Tensor) -> Tensor:
    """Scales of six bits: low halves in four bytes, two high bits each in the two before them."""
    low = _fields(blocks[:, 4:8], 4, (0, 4), 1)
    high = _fields(blocks[:, 2:4], 2, (0, 2, 4, 6), 1)
    scales = _half(blocks, 0) * ((low | (high << 4)).float() - 32)
    return _grouped(_nonlinear(_nibbles(blocks[:, 8:], 16)), scales)


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
