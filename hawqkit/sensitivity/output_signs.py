"""Random signs at the outputs: what a classifier's gradients are made from, in place of labels.

With x of random signs and R R' = diag p - p p' the curvature of the cross-entropy by the logits,
`r = R x` has the moments of `p - e_y` for a drawn label y: mean zero and covariance diag p - p p'.
So J' r serves wherever a gradient with a drawn label does, and its square is unbiased for the
Gauss-Newton matrix. Where a network is sure of itself a drawn label is nearly always the likely one
and says nothing, and once in a while it is another and says all; signs say a little every time. On
ResNet-20 they need less than half the examples for the same error.

R = diag q - p q' with q = sqrt(p), since |q| = 1. A vocabulary's worth of signs for every token
would cost more than they bring there: a text averages over its many positions.

Letters: B examples, T predictions of each, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hawqkit.sensitivity.labels import uniforms


def sign_residuals(logits: Tensor, counted: Tensor, indices: list[int], seed: int) -> Tensor:
    """Return R x at every prediction, in place of the gradient of a drawn label's cross-entropy.

    Args:
        logits: (B, T, V).
        counted: (B, T) bool, whether the prediction counts.
        indices: global indices of the examples; signs depend on these and the seed alone.
        seed: the probe's seed.

    Returns:
        (B, T, V), zero where not counted.
    """
    b, t, v = logits.shape
    draws = uniforms(indices, t * v, seed).view(b, t, v)
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = torch.where(draws < 0.5, 1.0, -1.0).to(logits.device, wide)
    p = torch.softmax(logits.detach(), -1, dtype=wide)
    q = p.sqrt()
    r = q * x - p * (q * x).sum(-1, keepdim=True)
    return (r * counted.to(r.device)[..., None]).to(logits.dtype)
