"""Fisher matrices of gradients: labels drawn from the model, or the true ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit.curvature.gauss_newton import JACOBIANS
from hawqkit.curvature.objective import Objective, output_residual
from hawqkit.curvature.of_model import ModelOperator, make_operator
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.models.model import LoadedModel

UNITS = ("prediction", "example")


def fisher(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    products: str = "auto",
    unit: str = "prediction",
    seed: int = 0,
    memory_bytes: int | None = None,
) -> ModelOperator:
    """Return the sampled Fisher matrix `1/n sum_i g_i g_i'` with labels drawn from the model.

    g_i is the gradient of prediction i's loss with a label `y_i ~ p(y | z_i)`, one a prediction;
    its expectation over labels is the Gauss-Newton matrix. It is applied as J' (r r') J, with r the
    gradient at the outputs, so no gradient is ever stored. The same seed gives the same labels in
    every pass, batching and number of processes, so batches must come in one order.

    Args:
        model: a network in eval mode.
        objective: the loss; it must be able to draw labels.
        batches: as for `hessian`.
        parameters: as for `hessian`.
        products: how `J v` is made, as for `gauss_newton`.
        unit: `prediction`, g_i one a counted prediction; `example`, one a row of a batch, summed
            over its predictions, still divided by the number of predictions: the same expectation.
        seed: of the labels.
        memory_bytes: as for `hessian`.

    Raises:
        Unsupported: the objective cannot draw labels.
        InputError: as for `hessian`.
    """
    if objective.residual is None:
        raise Unsupported(
            f"fisher: the {objective.name} cannot draw labels from the model; give `residual` to "
            "Objective, or use gauss_newton, which is the expectation over labels."
        )

    def residual(z: Tensor, batch: Any, example: int) -> Tensor:
        assert objective.residual is not None
        with torch.no_grad():
            return objective.residual(z, batch, Draws((seed,), example))

    return _outer(
        model,
        objective,
        batches,
        residual,
        kind="Fisher matrix",
        unit=unit,
        parameters=parameters,
        products=products,
        memory_bytes=memory_bytes,
    )


def empirical_fisher(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    products: str = "auto",
    unit: str = "prediction",
    memory_bytes: int | None = None,
) -> ModelOperator:
    """Return the empirical Fisher matrix `1/n sum_i g_i g_i'`, g_i gradients with the true labels.

    It is no approximation of the Hessian away from a perfect fit (Kunstner et al. 2019).

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        parameters: as for `hessian`.
        products: how `J v` is made, as for `gauss_newton`.
        unit: `prediction`, g_i one a counted prediction (a token, in language models); `example`,
            one a row of a batch, summed over its predictions.
        memory_bytes: as for `hessian`.

    Raises:
        InputError: as for `hessian`.
    """

    def residual(z: Tensor, batch: Any, example: int) -> Tensor:
        return output_residual(objective, z, batch)

    return _outer(
        model,
        objective,
        batches,
        residual,
        kind="empirical Fisher matrix",
        unit=unit,
        parameters=parameters,
        products=products,
        memory_bytes=memory_bytes,
    )


def _outer(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    residual: Any,
    *,
    kind: str,
    unit: str,
    parameters: Iterable[str | nn.Parameter] | None,
    products: str,
    memory_bytes: int | None,
) -> ModelOperator:
    """Return `1/n sum J' r r' J`, with r cut into predictions or examples."""
    if unit not in UNITS:
        raise InputError(
            f"unit: got {unit!r}; allowed are {', '.join(UNITS)}." + did_you_mean(unit, UNITS)
        )

    def factor(z: Tensor, batch: Any, example: int, U: Tensor) -> Tensor:
        r: Tensor = residual(z, batch, example)
        within = _axes_of(unit, z.ndim)
        return r * (r * U).sum(within, keepdim=True) if within else r * r * U

    return make_operator(
        model,
        objective,
        batches,
        choose_parameters(model, parameters),
        backends=JACOBIANS,
        products=products,
        kind=kind,
        factor=factor,
        memory_bytes=memory_bytes,
        ordered=kind == "Fisher matrix",
    )


def _axes_of(unit: str, ndim: int) -> tuple[int, ...]:
    """Return the axes of outputs (B, ..., C) that belong to one unit, counted from the end."""
    if ndim == 1:
        return ()
    return (-1,) if unit == "prediction" else tuple(range(-(ndim - 1), 0))


class Draws:
    """Numbers of a batch's examples, by (seed, index of the example in the data) alone."""

    def __init__(self, seed: Sequence[int], first: int) -> None:
        self._seed, self._first = seed, first

    def __call__(self, example: int, shape: tuple[int, ...], *, normal: bool) -> Tensor:
        """Return one example's numbers."""
        sequence = np.random.SeedSequence([*self._seed, self._first + example])
        generator = np.random.Generator(np.random.Philox(sequence))
        numbers = generator.standard_normal(shape) if normal else generator.random(shape)
        return torch.as_tensor(np.asarray(numbers, dtype=np.float64))
