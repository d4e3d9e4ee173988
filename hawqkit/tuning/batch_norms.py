"""Statistics of batch norms, measured again in a network whose weights have changed.

A batch norm that normalizes with its batch sees what it would have seen in training; over many
batches the mean and the variance of its inputs, pooled, are those of all examples ("precise batch
norm": Wu and Johnson 2021, arXiv:2105.07576, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hawqkit import distributed
from hawqkit.models.batch import Data, predictions

BATCH = 64  # examples of a batch: its own statistics must be near those of all
MOST = 2048  # examples that are looked at


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Return the batch norms of a network that keep statistics, in its order."""
    found = (m for m in module.modules() if isinstance(m, _BatchNorm))
    return [m for m in found if m.running_mean is not None and m.running_var is not None]


@torch.no_grad()
def re_estimate(module: nn.Module, data: Data, rows: Sequence[int], device: torch.device) -> int:
    """Give every batch norm the mean and unbiased variance of its inputs, each channel's own.

    With x the inputs of a norm, pooled over the batches, each of which the norms before it have
    normalized with its own statistics:

        mean = sum x / n,   var = (sum over batches of n_b (var_b + mean_b^2) - n mean^2) / (n - 1)

    A norm that is not called keeps what it has. With several processes each runs its share of the
    batches. The network ends in evaluation mode.

    Args:
        module: the network.
        data: examples.
        rows: those to use, in this order; at most `MOST` of them.
        device: that the network lies on.

    Returns:
        The examples that were looked at.
    """
    norms = batch_norms(module)
    batches = _batches(rows[:MOST])
    if not norms or not batches:
        return 0
    totals = [torch.zeros(2, n.num_features, dtype=torch.float64, device=device) for n in norms]
    counts = torch.zeros(len(norms), dtype=torch.float64, device=device)
    with _by_batch(norms, _adder(norms, totals, counts)):
        for part in distributed.processes().mine(batches):
            predictions(module, data.micro_batch(part), device)
    counts = distributed.reduce_sum(counts)
    for norm, total, count in zip(norms, totals, counts.tolist(), strict=True):
        mean, square = distributed.reduce_sum(total)
        if count < 2:
            continue
        mean = mean / count
        variance = (square - count * mean**2) / (count - 1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance.clamp_(min=0.0))  # rounding: it is a sum of squares
    return sum(map(len, batches))


def _batches(rows: Sequence[int]) -> list[Sequence[int]]:
    """Cut into batches of `BATCH`; a rest is left out, unless it is all there is."""
    whole = [rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH)]
    return whole or ([rows] if len(rows) > 1 else [])


def _adder(
    norms: Sequence[_BatchNorm], totals: Sequence[Tensor], counts: Tensor
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that adds sums and sums of squares of a norm's inputs."""
    places = {id(norm): index for index, norm in enumerate(norms)}

    def add(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        place = places[id(norm)]
        values = inputs[0].transpose(0, 1).flatten(1)  # (channels, examples x pixels)
        mean = values.mean(1).double()
        entries = values.shape[1]
        totals[place][0] += entries * mean
        totals[place][1] += entries * (values.var(1, correction=0).double() + mean**2)
        counts[place] += entries

    return add


@contextmanager
def _by_batch(
    norms: Sequence[_BatchNorm], hook: Callable[[nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Let norms use the statistics of their batch, and change none of their own, inside `with`."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 0.0
            norm.num_batches_tracked = None
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum, tracked in before:
            norm.momentum, norm.num_batches_tracked = momentum, tracked
            norm.eval()
