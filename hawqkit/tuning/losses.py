"""The loss of tuning: cross-entropy with labels, and divergence from the original.

Letters in shapes: N counted predictions, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from hawqkit.models.batch import Batch, refuse_labels
from hawqkit.tuning.settings import Distillation


def counted_logits(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits (N, V) of counted predictions, at least float32, and their labels (N,).

    Raises:
        DataError: a label lies outside the classes.
    """
    refuse_labels(batch.targets, batch.predicts, logits.shape[-1])
    chosen = logits[batch.predicts.to(logits.device)]
    labels = batch.targets[batch.predicts].to(logits.device)
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32)), labels


def summed_loss(
    logits: Tensor, labels: Tensor, taught: Tensor | None, distillation: Distillation | None
) -> Tensor:
    """Return the sum over predictions of `(1 - alpha) CE + alpha T^2 KL(p_T || q_T)`, in nats.

    Without distillation it is the summed cross-entropy.

    Args:
        logits: (N, V) of the network that is tuned.
        labels: (N,) true classes.
        taught: (N, V) logits of the original; needed for distillation alone.
        distillation: its weight and temperature.
    """
    if distillation is None or taught is None:
        return cross_entropy(logits, labels, reduction="sum")
    alpha, t = distillation.alpha, distillation.temperature
    original = (taught.to(logits.dtype) / t).log_softmax(-1)
    apart = kl_div((logits / t).log_softmax(-1), original, reduction="sum", log_target=True)
    apart = alpha * t**2 * apart
    if alpha == 1:
        return apart
    return (1 - alpha) * cross_entropy(logits, labels, reduction="sum") + apart
