"""Every layer's diagonal block in turn: top eigenpairs, density, rank, Frobenius norm."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from hawqkit.curvature.layers import Chosen, layer_operators
from hawqkit.curvature.objective import Objective
from hawqkit.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hawqkit.estimators.ranks import deflated_density, rank
from hawqkit.estimators.traces import frobenius_norm
from hawqkit.models.model import LoadedModel
from hawqkit.records import Density, Estimate, Ranks


def layer_top_eigenpairs(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    k: int = 1,
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    largest: str = "magnitude",
    tolerance: float = 1e-4,
    seed: int = 0,
) -> dict[str, Eigenpairs]:
    """Return the top k eigenpairs of every layer's block, `{layer: pairs of H_ll}`.

    `k = 1` gives the score of HAWQ (Dong et al. 2019). A layer of fewer than k dimensions gives all
    it has.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        k: pairs of each layer.
        layers: see `choose_layers`; None takes all.
        kind: `hessian` or `gauss-newton`.
        largest: as for `top_eigenpairs`.
        tolerance: relative residual.
        seed: of the starting vectors.

    Raises:
        InputError: a layer is unknown, or an option is out of its range.
    """
    operators = layer_operators(model, objective, batches, layers=layers, kind=kind)
    return {
        name: top_eigenpairs(op, min(k, op.size), largest=largest, tolerance=tolerance, seed=seed)
        for name, op in operators.items()
    }


def layer_densities(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    top: int = 20,
    steps: int = 60,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, Density]:
    """Return the spectral density of every layer's block, `{layer: Density}`.

    The arguments are those of `deflated_density` and `layer_operators`. From a density come counts,
    masses, moments and, by `ranks_of` and `statistics_of`, ranks and effective ranks.

    Raises:
        InputError: a layer is unknown, or an option is out of its range.
    """
    operators = layer_operators(model, objective, batches, layers=layers, kind=kind)
    return {
        name: deflated_density(op, top=top, steps=steps, draws=draws, seed=seed)
        for name, op in operators.items()
    }


def layer_ranks(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    eps: float | Sequence[float],
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    relative: bool = False,
    top: int = 20,
    steps: int = 60,
    draws: int = 10,
    seed: int = 0,
) -> dict[str, Ranks]:
    """Return numerical rank and degeneracy of every layer's block, `{layer: Ranks}`; see `rank`.

    An eps below a layer's measured noise floor is lifted to it, and its `Ranks` says so.

    Raises:
        InputError: a layer is unknown, or an option is out of its range.

    >>> import torch
    >>> from hawqkit.curvature.objective import squared_error
    >>> net = nn.Sequential(nn.Linear(3, 1, bias=False)).eval()
    >>> x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    >>> found = layer_ranks(net, squared_error(), [(x, torch.zeros(2, 1))], 0.1)
    >>> found["0"].counts[0].count, round(found["0"].degeneracy[0].value, 3)
    (2, 0.333)
    """
    operators = layer_operators(model, objective, batches, layers=layers, kind=kind)
    return {
        name: rank(op, eps, relative=relative, top=top, steps=steps, draws=draws, seed=seed)
        for name, op in operators.items()
    }


def layer_frobenius_norms(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    relative_error: float = 0.05,
    products: int = 1024,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return the Frobenius norm of every layer's block, `{layer: |H_ll|_F}`.

    With the trace it gives the participation ratio `tr^2 / |H_ll|_F^2`. All data share a probe:
    with probes of examples, which `layer_traces` has, the mean of `|H_ll v|^2` would be the sum of
    the examples' squared norms.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        layers: see `choose_layers`; None takes all.
        kind: `hessian` or `gauss-newton`.
        relative_error: as for `frobenius_norm`.
        products: of each layer, at most.
        seed: of the probes.

    Raises:
        InputError: a layer is unknown, or an option is out of its range.
    """
    operators = layer_operators(model, objective, batches, layers=layers, kind=kind)
    return {
        name: frobenius_norm(op, relative_error=relative_error, products=products, seed=seed)
        for name, op in operators.items()
    }
