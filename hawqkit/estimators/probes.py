"""Random probe vectors v with E v v' = I, drawn on the CPU in float64 and then moved.

A probe depends on the seed and on its place in the sequence alone: not on the device, the dtype, or
how many are drawn together.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from hawqkit.errors import InputError, did_you_mean

PROBES = ("rademacher", "gaussian", "spherical")


def check_probes(kind: str) -> None:
    """Refuse an unknown kind of probe.

    Raises:
        InputError: it is none of `PROBES`.
    """
    if kind not in PROBES:
        raise InputError(
            f"probes: {kind!r} is unknown; there are {', '.join(PROBES)}."
            + did_you_mean(kind, PROBES)
        )


def seeded(*seeds: int) -> torch.Generator:
    """Return a CPU generator for a seed and its sub-seeds, such as (seed, draw).

    `numpy.random.SeedSequence` mixes them, so that neighbouring draws are independent.
    """
    state = np.random.SeedSequence([abs(s) for s in seeds]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def draw_probe(size: int, kind: str, generator: torch.Generator) -> Tensor:
    """Return one probe, (n,), float64 on the CPU.

    Args:
        size: n.
        kind: `rademacher`, entries +-1; `gaussian`, standard normal; `spherical`, uniform on the
            sphere of radius sqrt(n).
        generator: of the CPU.

    Raises:
        InputError: the kind is unknown.

    >>> float(draw_probe(16, "spherical", seeded(0)).norm().round(decimals=9))
    4.0
    """
    check_probes(kind)
    if kind == "rademacher":
        v = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64)
        return v.mul_(2).sub_(1)
    v = torch.randn(size, generator=generator, dtype=torch.float64)
    return v.mul_(math.sqrt(size) / float(v.norm())) if kind == "spherical" else v


def draw_probes(
    size: int,
    count: int,
    kind: str,
    generator: torch.Generator,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return probes as rows, (count, n), each moved as soon as it is drawn.

    Args:
        size: n.
        count: how many.
        kind: see `draw_probe`.
        generator: of the CPU.
        device: where they go.
        dtype: what they become.
    """
    rows = torch.empty(count, size, device=device, dtype=dtype)
    for row in rows:
        row.copy_(draw_probe(size, kind, generator))
    return rows
