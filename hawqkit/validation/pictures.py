"""Small pictures of the examples that a classifier reads as images, as PNG.

Letters in shapes: S examples, C channels (1 or 3), H height, W width.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.models.batch import Data
from hawqkit.models.examples import Examples

SIDE = 64  # pixels of the longer side at most: a photograph then takes about 10 kB
LEAST = 4  # rows and columns; fewer are no picture
_COLORS = {1: 0, 3: 2}  # channels -> PNG's colour type
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def thumbnails(data: Data, rows: Sequence[int]) -> list[str]:
    """Return a small PNG of each example in base64; empty strings where they are no pictures.

    Examples are pictures if the model reads one floating array (S, C, H, W) or (S, H, W, C) of one
    or three channels. What a model reads is normalized, with means and deviations that are not
    known here; so each picture's values are stretched from black to white.

    Args:
        data: the examples.
        rows: which ones.
    """
    pixels = _pixels(data)
    if pixels is None:
        return [""] * len(rows)
    return [base64.b64encode(_png(_stretched(pixels[row]))).decode("ascii") for row in rows]


def _pixels(data: Data) -> Tensor | None:
    """Return pictures (S, C, H, W), None if the examples are none."""
    if not isinstance(data, Examples) or len(data.inputs) != 1:
        return None
    (array,) = data.inputs.values()
    if array.ndim != 4 or not array.is_floating_point():
        return None
    if array.shape[1] not in _COLORS and array.shape[3] in _COLORS:
        array = array.permute(0, 3, 1, 2)
    fits = array.shape[1] in _COLORS and min(array.shape[2:]) >= LEAST
    return array if fits else None


def _stretched(picture: Tensor) -> NDArray[np.uint8]:
    """Return one picture (C, H, W) as bytes (H, W, C), its longer side at most SIDE."""
    values = picture.detach().to(torch.float64)
    height, width = values.shape[1:]
    longer = max(height, width)
    if longer > SIDE:
        size = [max(round(side * SIDE / longer), 1) for side in (height, width)]
        resize = torch.nn.functional.interpolate
        values = resize(values[None], size, mode="bilinear", antialias=True)[0]
    low, high = values.min(), values.max()
    values = (values - low) / (high - low) if high > low else torch.full_like(values, 0.5)
    return np.ascontiguousarray((255 * values).round().permute(1, 2, 0).numpy().astype(np.uint8))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Return (H, W, C) as a PNG file: 8 bits a channel, no filter, no metadata (ISO 15948)."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLORS[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return _SIGNATURE + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
