"""Power iteration: the plain reference beside Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError
from hawqkit.estimators.eigenpairs import Eigenpairs, check_arguments, rounding_of
from hawqkit.estimators.probes import draw_probes, seeded
from hawqkit.estimators.vectors import (
    inner_rows,
    multiply,
    norms,
    project_out,
    scale_rows,
    subtract,
    working_dtype,
)

Source = SymmetricOperator | Tensor | Callable[[Tensor], Tensor]


def power_iteration(
    source: Source,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
) -> Eigenpairs:
    """Return k eigenpairs of largest magnitude by power iteration, one by one: the plain reference.

    `v <- A v / |A v|` in the complement of the pairs before it, until `|A v - theta v|` is at most
    the tolerance times |theta_1|. Lanczos needs far fewer products; this is easy to check by eye.
    A pair +theta, -theta of equal magnitude never converges, and says so.

    Args:
        source: an operator or a dense matrix.
        k: how many.
        tolerance: residual over the largest |theta|.
        max_products: budget for each pair.
        seed: of the starting vectors.

    Raises:
        InputError: k is more than n, or no product may be made.

    >>> float(power_iteration(torch.diag(torch.tensor([1.0, 4.0])).double()).values.round(5)[0])
    4.0
    """
    operator = as_operator(source)
    check_arguments(operator, k, "magnitude", 1, None)
    if max_products < 1:
        raise InputError(f"max_products: must be at least 1; got {max_products}.")
    before, generator = operator.products, seeded(seed)
    device, dtype = operator.device, working_dtype(operator)
    found = torch.empty(0, operator.size, device=device, dtype=dtype)
    values: list[float] = []
    residuals: list[float] = []
    for _ in range(k):
        v = draw_probes(operator.size, 1, "gaussian", generator, device=device, dtype=dtype)
        scale = max(map(abs, values), default=0.0)
        v, theta, residual = _iterate(operator, v, found, scale, tolerance, max_products)
        values.append(theta)
        residuals.append(residual)
        found = torch.cat([found, v])
    scale = max(map(abs, values))
    errors = np.array(residuals) + rounding_of(operator) * scale
    return Eigenpairs(
        np.array(values),
        errors,
        found.T,
        errors <= tolerance * scale,
        operator.products - before,
        tolerance,
        "magnitude",
        dict(operator.blocks),
    )


def _iterate(
    operator: SymmetricOperator,
    v: Tensor,
    found: Tensor,
    scale: float,
    tolerance: float,
    max_products: int,
) -> tuple[Tensor, float, float]:
    """Return v, theta and |A v - theta v| of the largest pair in the complement of `found`."""
    project_out(v, found)
    scale_rows(v, 1 / norms(v))
    for step in range(max_products):
        w = multiply(operator, v)
        theta = float(inner_rows(v, w)[0])
        rest = w.clone()
        subtract(rest, torch.tensor([[theta]], dtype=torch.float64), v)
        residual = float(norms(rest)[0])
        project_out(w, found)
        length = norms(w)
        small = residual <= tolerance * max(abs(theta), scale)
        if small or step == max_products - 1 or float(length[0]) == 0:
            break
        scale_rows(w, 1 / length)
        v = w
    return v, theta, residual
