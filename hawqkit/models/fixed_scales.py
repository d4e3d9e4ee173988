"""Scales that a weight lies on already: a tuned or imported model brings its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FixedScales:
    """Scales of one layer's weight in one format; rounding to that format takes these.

    Attributes:
        format: name of the format, without bits of inputs.
        scales: (rows, groups) in the dtype that scales are stored in, never zero.
        zeros: (rows, groups) int8 zero points; None in symmetric formats.
    """

    format: str
    scales: Tensor
    zeros: Tensor | None = None
