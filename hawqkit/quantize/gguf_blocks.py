"""Weights in the types of GGUF files: encoded by ggml's own code, decoded here.

Encoding is the reference's: PyPI `libgguf` holds the C functions that `llama-quantize` rounds with.
They search scales by rules of their own, type by type, so `nearest` and `searched` give the same
bytes. Decoding is `quantize.gguf_decoding`, equal to gguf-py's bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import GGUF, Format, format_names
from hawqkit.quantize.gguf_decoding import decode_blocks
from hawqkit.quantize.rounding import check_weight

LIBRARY = "libgguf"
INSTALL = "pip install 'hawqkit[gguf]'"


@dataclass(frozen=True, slots=True)
class Blocks:
    """A weight (rows, columns) as the bytes that a GGUF file holds.

    Attributes:
        format: of the family `gguf`.
        packed: (rows, bytes of a row) uint8: the row's blocks one after the other.
    """

    format: Format
    packed: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held in memory, as many as in the file."""
        return self.packed.nbytes

    def values(self, rows: Tensor | slice, dtype: torch.dtype) -> Tensor:
        """Return what some rows stand for, (R, columns), contiguous: made in float32."""
        return decode_blocks(self.packed[rows], self.format).to(dtype)


@torch.no_grad()
def encode_blocks(
    weight: Tensor, format: Format, *, rounding: str = "searched", importance: Tensor | None = None
) -> Blocks:
    """Encode a weight as `llama-quantize` does.

    A type chooses scale and minimum of each block so that sum_j h_j (w_j - q_j)^2 is small, with h
    a rule of its own (for most types h_j grows with w_j^2), or, where `importance` is given, the
    rule that llama.cpp uses with an importance matrix. `q8_0` takes no notice of it.

    Args:
        weight: (rows, columns), any floating dtype and any strides; rounded to float32 first.
        format: of the family `gguf`; its block divides the columns.
        rounding: `nearest` or `searched`; both are the reference's way.
        importance: (columns,) mean squares of the inputs, `sum_t x_tj^2 / T`, not negative.

    Raises:
        InputError: `rounding` is unknown, or `importance` has another shape or bad entries.
        Unsupported: the format is not of this family or does not fit, or `libgguf` is missing.
        NumericalError: the weight holds NaN or infinity, or is too large for scales in float16.

    Source: ggml's `quantize_q4_K` and its neighbors, in `ggml-quants.c`.
    """
    check_weight(weight, format, rounding)
    if format.family != GGUF:
        raise Unsupported(
            f"format {format.name!r} is no GGUF type: they are "
            f"{', '.join(n for n in format_names(GGUF) if n != 'none')}."
        )
    library = _library()
    rows = weight.detach().to("cpu", torch.float32).contiguous()
    if not bool(torch.isfinite(rows).all()):
        raise NumericalError(f"the weight {tuple(weight.shape)} holds NaN or infinity in float32.")
    weights = None if importance is None else _checked_importance(importance, weight.shape[1])
    kind = library.GGMLQuantizationType[format.element.upper()]
    packed = torch.from_numpy(library.quantize_rows(rows.numpy(), kind, weights))
    blocks = Blocks(format, packed.to(weight.device))
    _refuse_overflow(blocks)
    return blocks


def _library() -> Any:
    if importlib.util.find_spec(LIBRARY) is None:
        raise Unsupported(
            f"rounding to GGUF types needs the package {LIBRARY}, ggml's own code; install it with "
            f"`{INSTALL}`."
        )
    return importlib.import_module(LIBRARY)


def _checked_importance(importance: Tensor, columns: int) -> Any:
    values = importance.detach().to("cpu", torch.float32).contiguous()
    if tuple(values.shape) != (columns,):
        raise InputError(
            f"importance of shape {tuple(values.shape)} came for {columns} columns: give one mean "
            "square for each input."
        )
    if not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        raise InputError("importance holds NaN, infinity or negative entries; give mean squares.")
    return values.numpy()


def _refuse_overflow(blocks: Blocks, chunk: int = 1 << 12) -> None:
    """Refuse a weight whose scales are infinite in float16: it would decode to NaN."""
    for start in range(0, len(blocks.packed), chunk):
        some = blocks.values(slice(start, start + chunk), torch.float32)
        if not bool(torch.isfinite(some).all()):
            raise NumericalError(
                f"weights are too large for format {blocks.format.name!r}, whose scales are "
                "float16 (up to 65504); keep the layer ('none')."
            )
