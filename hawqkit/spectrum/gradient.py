"""The gradient of a model's mean loss, flat, over all batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.parameters import Parameters
from hawqkit.curvature.passes import differentiable
from hawqkit.distributed import processes, reduce_sum
from hawqkit.errors import DataError


def mean_gradient(
    module: nn.Module, objective: Objective, batches: Batches, parameters: Parameters
) -> Tensor:
    """Return the gradient of the mean loss over all batches and processes, (n,).

    Raises:
        DataError: no prediction counts.
    """
    total = torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device)
    counted = torch.zeros(1, dtype=torch.float64)
    for _, _, batch in processes().mine(batches):
        batch = to_device(batch, parameters.device)
        with differentiable(module, parameters, twice=False):
            summed, count = objective.loss(objective.outputs(module, batch), batch)
            counted += float(count)
            if not summed.requires_grad:
                continue
            pieces = torch.autograd.grad(summed, parameters.tensors, allow_unused=True)
        rows = [None if piece is None else piece[None] for piece in pieces]
        total += parameters.join(rows, 1)[:, 0]
    if processes().count > 1:
        total = reduce_sum(total)
        counted = reduce_sum(counted.to(parameters.device)).cpu()
    return total / refuse_uncounted(float(counted))


def refuse_uncounted(count: float) -> float:
    """Return the number of counted predictions, or refuse zero."""
    if count == 0:
        raise DataError(
            "no prediction counts in any batch (all labels are ignored), so the mean loss is not "
            "defined; check the labels."
        )
    return count
