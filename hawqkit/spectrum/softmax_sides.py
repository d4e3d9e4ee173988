"""What softmax cross-entropy looks like at the outputs, read off from any objective that is one.

Letters in shapes: B examples, T positions, C classes, k vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hawqkit.curvature.objective import Objective, output_residual
from hawqkit.errors import Unsupported

# p minus the gradient at the logits is the one-hot label, up to the rounding of half precision.
ONE_HOT = 0.02


@dataclass(frozen=True, slots=True)
class Sides:
    """Probabilities and labels of a batch's predictions.

    Attributes:
        p: (B, ..., C) probabilities, float32 at least; zero where a prediction does not count.
        hot: (B, ..., C) one-hot labels; zero where a prediction does not count.
        others: p with the label's own probability taken out.
    """

    p: Tensor
    hot: Tensor
    others: Tensor

    @property
    def wrong(self) -> Tensor:
        """1 - p_y, (B, ..., 1), as a sum, since the difference loses all digits as p_y nears 1."""
        return self.others.sum(-1, keepdim=True)


def softmax_sides(objective: Objective, z: Tensor, batch: Any) -> Sides:
    """Return probabilities and labels of a batch, whatever form its targets have.

    The gradient of the summed loss by the logits is p - e_y where a prediction counts, and zero
    where it does not; so p minus it is the label.

    Raises:
        Unsupported: the loss is no softmax cross-entropy with one label a prediction.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    p = torch.softmax(z.detach(), -1, dtype=wide)
    residual = output_residual(objective, z, batch).to(wide)
    hot = p - residual  # one-hot, or p where nothing counts
    nearest = torch.zeros_like(p).scatter_(-1, hot.argmax(-1, keepdim=True), 1.0)
    labeled = ((hot - nearest).abs() <= ONE_HOT).all(-1, keepdim=True)
    left_out = (residual == 0).all(-1, keepdim=True)
    if not bool((labeled | left_out).all()):
        raise Unsupported(
            f"the {objective.name} is no softmax cross-entropy with one label a prediction (the "
            "gradient at the logits is not p - e_y), so its matrix has no parts by classes. Soft "
            "or smoothed labels and other losses have none either."
        )
    counted = labeled & ~left_out
    hot = nearest * counted
    p = p * counted
    return Sides(p, hot, p * (1 - hot))


def same_class(sides: Sides, U: Tensor) -> Tensor:
    """Return M U with `M = p_y (p - e_y)(p - e_y)'` for each prediction.

    Args:
        sides: of the batch.
        U: (k, B, ..., C).
    """
    direction = sides.others - sides.wrong * sides.hot  # p - e_y
    own = (sides.p * sides.hot).sum(-1, keepdim=True)
    return own * direction * (direction * U).sum(-1, keepdim=True)


def other_classes(sides: Sides, U: Tensor) -> Tensor:
    """Return M U with `M = sum over c' other than y of p_c' (p - e_c')(p - e_c')'`.

    With q = p but for q_y = 0 it is `(1 - p_y) p p' - p q' - q p' + diag q`, all of whose terms
    are as small as 1 - p_y.

    Args:
        sides: of the batch.
        U: (k, B, ..., C).
    """
    p, q = sides.p, sides.others
    pU, qU = ((x * U).sum(-1, keepdim=True) for x in (p, q))
    return sides.wrong * p * pU - p * qU - q * pU + q * U
