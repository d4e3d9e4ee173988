"""Ranges of the layers' inputs, and the grids of numbers that they are rounded to; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hawqkit.errors import InputError, did_you_mean
from hawqkit.records.schema import SCHEMA

STATIC, DYNAMIC = "static", "dynamic"
MODES = (STATIC, DYNAMIC)
OBSERVERS = ("min-max", "percentile", "mse", "entropy")


@dataclass(frozen=True, slots=True)
class Grid:
    """Values (code - zero) scale for codes 0 .. 2^bits - 1; 0 is always one of them.

    Attributes:
        scale: positive, a number that float32 holds.
        zero: code of the value 0; 0 for an unsigned grid, 2^(bits-1) for a symmetric signed one.
        bits: of a code.
    """

    scale: float
    zero: int
    bits: int

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


def make_grid(low: float, high: float, bits: int, *, symmetric: bool = False) -> Grid:
    """Return the grid of a range.

        asymmetric              s = (high - low) / (2^b - 1),  z = round(-low / s)
        symmetric, signed       s = m / (2^(b-1) - 1),         z = 2^(b-1),   m = max(-low, high)
        nothing below 0         s = high / (2^b - 1),          z = 0

    The range is widened to hold 0, which padding and ReLU produce, so that 0 stays exactly 0. An
    empty range (all inputs are 0) gets scale 1.

    >>> make_grid(0.0, 51.0, 8), make_grid(-7.0, 3.0, 4, symmetric=True)
    (Grid(scale=0.2..., zero=0, bits=8), Grid(scale=1.0, zero=8, bits=4))

    Args:
        low: smallest value to hold.
        high: largest value to hold.
        bits: of a code, at least 2.
        symmetric: as far above 0 as below, where there is anything below.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    half, steps = 1 << (bits - 1), (1 << bits) - 1
    if symmetric and low < 0:
        scale, zero = max(-low, high) / (half - 1), half
    else:
        scale, zero = high / steps - low / steps, 0
    rounded = float(np.float32(scale))
    if rounded == 0:
        return Grid(1.0, 0, bits)
    if zero == 0:
        zero = min(max(round(-low / rounded), 0), steps)
    return Grid(rounded, zero, bits)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """What was seen of one layer's inputs.

    Attributes:
        low: smallest entry.
        high: largest entry.
        count: entries seen, over all calls; 0 if the layer was never called.
        ranges: bits -> (low, high) that the grid of so many bits covers.
    """

    low: float
    high: float
    count: int
    ranges: dict[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """How the inputs of layers are quantized: `activations.json`.

    Attributes:
        model: hash of the model that they were observed in.
        data: hash of the calibration data.
        observer: one of `OBSERVERS`; how a static range was found.
        mode: `static`, one range for all inputs of a layer; or `dynamic`, a range for each token
            or pixel, made of its own features when it comes, for which nothing is observed.
        percentile: that the observer `percentile` kept below the range, else None.
        symmetric: whether ranges reach as far below 0 as above.
        bits: the widths that ranges were made for.
        examples: examples that were run.
        layers: layer name -> what was seen; empty where ranges are dynamic. Layers that only look
            up (embeddings) have no input to quantize and are not in it.
        fingerprint: hash of everything above.
        warnings: for instance layers that were never called.
    """

    model: str
    data: str
    observer: str
    mode: str
    percentile: float | None
    symmetric: bool
    bits: tuple[int, ...]
    examples: int
    layers: dict[str, LayerRange]
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Refuse modes and observers that there are not, and ranges that are none."""
        if self.mode not in MODES or self.observer not in OBSERVERS:
            raise ValueError(f"there is no mode {self.mode!r} or observer {self.observer!r}")
        for name, found in self.layers.items():
            for bits in self.bits:
                low, high = found.ranges.get(bits, (1.0, 0.0))
                if not -np.inf < low <= high < np.inf:
                    raise ValueError(f"layer {name} has no range for {bits} bits")

    def grid(self, layer: str, bits: int) -> Grid | None:
        """Return the grid of a layer's inputs; None where each token gets its own.

        Raises:
            InputError: ranges of so many bits, or of this layer, were not made.
        """
        if bits not in self.bits:
            raise InputError(
                f"layer {layer!r}: its inputs are wanted in {bits} bits, and ranges were made for "
                f"{', '.join(map(str, self.bits))}; calibrate for {bits} bits too."
            )
        if self.mode == DYNAMIC:
            return None
        if layer not in self.layers:
            raise InputError(
                f"layer {layer!r}: no range of its inputs is known; calibrate it too."
                + did_you_mean(layer, list(self.layers))
            )
        low, high = self.layers[layer].ranges[bits]
        return make_grid(low, high, bits, symmetric=self.symmetric)
