"""Frobenius norms of all layers' blocks, from products with random signs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from hawqkit.curvature.layers import Chosen, check_kind, choose_layers, layer_operators
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import ModelOperator
from hawqkit.errors import InputError
from hawqkit.models.model import LoadedModel
from hawqkit.records.spectral import Estimate

FIRST = 16  # probes before the first decision
LARGEST = 128  # probes of one step
CONFIDENCE = 0.95


def layer_frobenius_norms(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    relative_error: float = 0.05,
    max_probes: int = 1024,
    seed: int = 0,
    kind: str = "hessian",
    memory_bytes: int | None = None,
) -> dict[str, Estimate]:
    """Return every layer's Frobenius norm with its standard error, `{layer: |H_ll|_F}`.

    `E |H_ll v|^2 = |H_ll|_F^2` for random signs v: it is Hutchinson's estimate of the trace of
    `H'H`. A probe is shared by all of the data: probes of examples, as `layer_traces` has them,
    would give the sum of the examples' squared norms. With `tr(H_ll)` it gives the participation
    ratio `tr^2 / |H_ll|_F^2`.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        layers: see `choose_layers`.
        relative_error: a layer stops when its standard error is this share of its value.
        max_probes: it stops here at the latest, and its note says so.
        seed: of the probes, which depend on seed, layer and number alone.
        kind: `hessian` or `gauss-newton`.
        memory_bytes: as for `hessian`.

    Returns:
        estimates of the norm, not of its square: `stderr` is that of the mean of squares over twice
        the norm, and `interval` holds the roots of the ends of its Student t interval.

    Raises:
        InputError: a layer is unknown, or an option is out of range.
        Unsupported: as for `hessian`.
    """
    if not relative_error > 0:
        raise InputError(f"relative_error: got {relative_error}; it must be above 0.")
    if max_probes < 2:
        raise InputError(f"max_probes: got {max_probes}; an error bar needs 2 or more.")
    operators = layer_operators(
        model, objective, batches, layers=layers, kind=check_kind(kind), memory_bytes=memory_bytes
    )
    known = list(choose_layers(model)) if not isinstance(layers, dict) else list(operators)
    return {
        name: _norm(operator, (seed, known.index(name)), relative_error, max_probes)
        for name, operator in operators.items()
    }


def _norm(
    operator: ModelOperator, seeds: tuple[int, int], relative_error: float, max_probes: int
) -> Estimate:
    squares = np.empty(0)
    more = min(FIRST, max_probes)
    while True:
        squares = np.concatenate([squares, _squares(operator, seeds, len(squares), more)])
        have, mean = len(squares), float(squares.mean())
        stderr = float(squares.std(ddof=1)) / math.sqrt(have)
        # The relative error of a root is half of that of its square.
        share = stderr / (2 * mean) if mean > 0 else 0.0
        if share <= relative_error or have >= max_probes:
            break
        needed = int(have * (share / relative_error) ** 2) + 1
        more = min(max(needed - have, 1), LARGEST, max_probes - have)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, have - 1)) * stderr
    return Estimate(
        value=math.sqrt(mean),
        stderr=stderr / (2 * math.sqrt(mean)) if mean > 0 else 0.0,
        samples=have,
        products=have,
        method="hutchinson",
        interval=(math.sqrt(max(mean - half, 0.0)), math.sqrt(mean + half)),
        note=""
        if share <= relative_error
        else f"stopped at max_probes = {max_probes}, above the relative error asked for",
    )


def _squares(
    operator: ModelOperator, seeds: tuple[int, int], first: int, count: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return |H v|^2 of probes numbered from `first`."""
    rows = []
    for number in range(first, first + count):
        stream = np.random.SeedSequence([*seeds, number])
        generator = torch.Generator().manual_seed(int(stream.generate_state(1)[0]))
        rows.append(torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8))
    signs = torch.stack(rows, 1).to(operator.device, operator.dtype).mul_(2).sub_(1)
    norms = torch.linalg.vector_norm(operator.matmat(signs), dim=0, dtype=torch.float64)
    return np.asarray(norms.square().cpu().numpy())
