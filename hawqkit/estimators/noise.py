"""How exact an operator's products are: the level below which its eigenvalues mean nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError
from hawqkit.estimators.probes import draw_probes, seeded
from hawqkit.estimators.vectors import multiply, norms, project_out, scale_rows, working_dtype

Source = SymmetricOperator | Tensor | Callable[[Tensor], Tensor]

POWER_STEPS = 4  # towards the top eigenvector, where products are largest and rounding with them


def noise_floor(source: Source, *, trials: int = 2, seed: int = 0) -> float:
    """Measure how far products are from linear, as an eigenvalue.

    For orthonormal u (near the top eigenvector, by a few steps of power iteration) and v (random),
    and `w = (u + v) / sqrt 2`, an exact product has `A w = (A u + A v) / sqrt 2`. The length of the
    difference is what rounding adds to a unit vector's product, and so how large an eigenvalue of
    pure noise can be. The largest over the trials is returned, and at least eps |A u|.

    Args:
        source: an operator or a dense matrix.
        trials: each costs three products; the power iteration four more.
        seed: of the vectors.

    Returns:
        the floor, in the operator's own units.

    Raises:
        InputError: fewer than one trial.

    >>> noise_floor(torch.eye(8).double()) < 1e-14
    True
    """
    operator = as_operator(source)
    if trials < 1:
        raise InputError(f"trials: must be at least 1; got {trials}.")
    generator = seeded(seed)
    device, dtype = operator.device, working_dtype(operator)

    def draw() -> Tensor:
        v = draw_probes(operator.size, 1, "gaussian", generator, device=device, dtype=dtype)
        scale_rows(v, 1 / norms(v))
        return v

    u = draw()
    for _ in range(POWER_STEPS):
        w = multiply(operator, u)
        length = norms(w)
        if float(length[0]) == 0:
            return 0.0
        scale_rows(w, 1 / length)
        u = w
    floor = 0.0
    eps = float(torch.finfo(operator.dtype).eps)
    for _ in range(trials):
        v = draw()
        if operator.size > 1:
            project_out(v, u)
            scale_rows(v, 1 / norms(v))
        # The vectors are first rounded to the operator's dtype, as it would round them.
        a, b = (x.to(operator.dtype).to(dtype) for x in (u, v))
        del v
        # In place, and each vector is dropped as soon as it has served: they are as large as the
        # model, and an operator holds several of its own during a product.
        defect = multiply(operator, a)
        along = float(norms(defect)[0])
        defect += multiply(operator, b)
        defect *= 2**-0.5
        b += a
        b *= 2**-0.5
        defect -= multiply(operator, b)
        floor = max(floor, float(norms(defect)[0]), eps * along)
    return floor
