"""What any loss sends back from the outputs, in place of drawn labels: random signs through a root.

With x of random signs and `R R' = L_zz` the gradient `g = J' R x` has `E g g' = J' L_zz J`, the
Gauss-Newton matrix of the loss sum. So `1/2 (g . dW)^2 / n` is an unbiased estimate of the second
order of what rounding adds to the mean loss, in the unit of that loss. For the cross-entropy that
is the KL divergence in nats; for others the same quantity is
`loss(z + dz) - loss(z) - loss'(z) dz`, half the squared distance of outputs for the squared error.

Letters: B examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.linear_maps import take_examples
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.output_roots import output_root
from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.models.batch import Data
from hawqkit.models.examples import Examples
from hawqkit.records import Floats, Integers, Samples
from hawqkit.sensitivity.labels import uniforms

ADDS_UP = 1e-3  # relative: far above the rounding of a sum, far below any other mean or scale


def objective_residuals(
    objective: Objective, z: Tensor, batch: Any, indices: list[int], seed: int
) -> Tensor:
    """Return R x for random signs x, of z's shape.

    Args:
        objective: its `root`, or one made from `curvature` or `loss`, see `output_root`.
        z: outputs (B, ...).
        batch: whose loss, on the outputs' device.
        indices: global indices of the examples; signs depend on these and the seed alone.
        seed: the probe's seed.

    Raises:
        InputError, NumericalError, Unsupported: see `output_root`.
    """
    draws = uniforms(indices, z[0].numel(), seed).view(z.shape)
    wide = torch.promote_types(z.dtype, torch.float32)
    x = torch.where(draws < 0.5, 1.0, -1.0).to(z.device, wide)
    return output_root(objective, z, batch, x)


def losses_by_example(
    objective: Objective, z: Tensor, batch: Any, *, whole: bool = False
) -> tuple[Floats, Integers]:
    """Return each example's summed loss (B,) and how many predictions it counts (B,).

    Args:
        objective: the loss.
        z: outputs (B, ...).
        batch: on the outputs' device; the first axis of its tensors is examples.
        whole: whether the sum over the whole batch is computed too, to check that it is their sum.

    Raises:
        InputError: counts are no whole numbers, or the losses of examples do not add up.
        NumericalError: a loss is not finite.
    """
    z = z.detach().to(torch.promote_types(z.dtype, torch.float32))
    losses, counts = [], []
    with torch.no_grad():
        for row in range(len(z)):
            one = torch.tensor([row])
            total, count = objective.loss(z[row : row + 1], take_examples(batch, one))
            losses.append(float(total))
            counts.append(float(count))
        if whole:
            together, counted = objective.loss(z, batch)
            _refuse_other_sum(objective.name, losses, float(together), counts, float(counted))
    if not np.isfinite(losses).all():
        row = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise NumericalError(
            f"{objective.name}: the loss of an example is {losses[row]}; check its targets and the "
            "outputs of the model."
        )
    whole_counts = np.rint(counts).astype(np.int64)
    if (np.abs(whole_counts - counts) > 1e-6).any() or (whole_counts < 0).any():
        raise InputError(
            f"{objective.name}: loss counts {counts[0]:g} predictions in an example; the count "
            "must be a whole number, of what the mean is over. Put weights into the sum instead."
        )
    return np.array(losses, dtype=np.float64), whole_counts


def _refuse_other_sum(
    name: str, losses: list[float], together: float, counts: list[float], counted: float
) -> None:
    """Refuse a loss that is no sum over examples: the mean of a batch, for instance."""
    scale = sum(abs(value) for value in losses) + abs(together)
    if abs(sum(losses) - together) > ADDS_UP * scale or abs(sum(counts) - counted) > 1e-6:
        raise InputError(
            f"{name}: loss must return the sum over examples and how many predictions it is over; "
            f"for a batch of {len(losses)} it returns {together:.6g} over {counted:g}, and for its "
            f"examples one by one {sum(losses):.6g} over {sum(counts):g} together. Sum instead of "
            "averaging (reduction='sum'), and leave out what couples examples."
        )


def refuse_objective(data: Data, objective: Objective | None, also: Sequence[str] = ()) -> None:
    """Refuse examples without a loss that is known, and scores that know the cross-entropy alone.

    Raises:
        InputError: which of both, and what to do.
    """
    if objective is None and isinstance(data, Examples) and not data.facts.classes:
        raise InputError(
            f"{data.facts.source}: the examples have targets of shape "
            f"{tuple(data.labels.shape[1:])} and no classes, so the loss must be given: "
            "probe(..., objective=squared_error()), or an Objective of your own."
        )
    if objective is not None and also:
        raise InputError(
            f"also: {', '.join(also)} would be of the cross-entropy, and the objective is "
            f"{objective.name}; leave it out here. layer_traces(model, objective, examples, "
            "kind='hessian') and layer_top_eigenpairs measure them of any loss."
        )


def refuse_flat(samples: Samples, objective: Objective) -> None:
    """Refuse a loss that has no second derivative anywhere, or that counts nothing.

    Raises:
        InputError: it counts no prediction in the examples that choose.
        Unsupported: no example sent any gradient back.
    """
    if not samples.count[samples.withheld == 0].any():
        raise InputError(
            f"{objective.name}: loss counts no prediction in any example that chooses, so there is "
            "no mean; check its count, and the targets."
        )
    if not samples.squared_gradient.any():
        raise Unsupported(
            f"{objective.name}: no layer got a gradient from any example, because the second "
            "derivative by the outputs is zero everywhere, or no output depends on a layer. A loss "
            "that is linear between kinks, such as the absolute error, says nothing about small "
            "changes; take a smooth one near it (Huber's, with a delta as large as the errors)."
        )
