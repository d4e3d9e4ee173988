"""Independent answers to test against: dense matrices and plain autograd, nothing of hawqkit's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def sequence_gradients(
    module: nn.Module, names: Sequence[str], tokens: Tensor, attention: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Return each sequence's gradient of its summed cross-entropies, by plain autograd.

    Args:
        module: (tokens, attention_mask) -> logits.
        names: of parameters.
        tokens, attention: (B, T).
        labels: (B, T) label of the prediction made at each position, -1 where none counts.
    """
    parameters = {n: module.get_parameter(n) for n in names}
    result: dict[str, list[Tensor]] = {n: [] for n in names}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for row in range(len(tokens)):
            length = int(attention[row].sum())
            logits = module(input_ids=tokens[row : row + 1, :length]).logits[0]
            loss = nn.functional.cross_entropy(
                logits, labels[row, :length], reduction="sum", ignore_index=-1
            )
            for name, gradient in zip(
                names, torch.autograd.grad(loss, list(parameters.values())), strict=True
            ):
                result[name].append(gradient)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
    return {n: torch.stack(g) for n, g in result.items()}


def gauss_newton(
    module: nn.Module, name: str, tokens: Tensor, counted: Tensor, lengths: Sequence[int]
) -> Tensor:
    """Return the dense Gauss-Newton matrix of the mean loss for one parameter, flattened.

    `G = 1/n sum over counted predictions of J' (diag p - p p') J`, J the Jacobian of the logits.
    """
    values = {n: p.detach() for n, p in module.named_parameters()}
    numel = values[name].numel()
    total, count = torch.zeros(numel, numel, dtype=values[name].dtype), 0
    for row, length in enumerate(lengths):
        ids = tokens[row : row + 1, :length]
        at = counted[row, 1:length].nonzero()[:, 0]  # predictions are made one position earlier

        def logits(w: Tensor, ids: Tensor = ids, at: Tensor = at) -> Tensor:
            out = torch.func.functional_call(module, {**values, name: w}, (), {"input_ids": ids})
            return out.logits[0, at]  # (n, V)

        jacobian = torch.func.jacrev(logits)(values[name]).flatten(2)  # (n, V, numel)
        p = torch.softmax(logits(values[name]), -1)
        mean = torch.einsum("nv,nvk->nk", p, jacobian)
        total += torch.einsum("nv,nvk,nvl->kl", p, jacobian, jacobian) - mean.T @ mean
        count += len(at)
    return total / count


def token_terms(
    inputs: Tensor, gradients: Tensor, errors: Mapping[str, Tensor]
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Return sum |d|^2 |a|^2 and, by format, (sum (d_o (dW a)_o)^2, sum (d . dW a)^2), in loops."""
    norm, out = 0.0, dict.fromkeys(errors, (0.0, 0.0))
    for a, d in zip(inputs, gradients, strict=True):
        norm += float(d @ d) * float(a @ a)
        for name, error in errors.items():
            y = error @ a
            before = out[name]
            out[name] = (before[0] + float((d * y) @ (d * y)), before[1] + float(d @ y) ** 2)
    return norm, out
