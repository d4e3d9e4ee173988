"""Losses as sums over counted predictions, and their pieces on the side of the outputs.

The loss of a data set is `L = (sum over batches of loss sums) / (sum over batches of counts)`: sums
are divided once, so cutting the data into other batches, or padding it, changes nothing.

Letters in shapes: B examples of a batch, T positions, C classes or output numbers, k vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hawqkit.errors import InputError
from hawqkit.models.batch import FIRST
from hawqkit.models.batches import MicroBatch
from hawqkit.models.examples import ExampleBatch

IGNORED = -100  # label of a prediction that does not count, as in torch and transformers


class Draw(Protocol):
    """Random numbers of one example: same example and seed, same numbers, in whatever batch."""

    def __call__(self, example: int, shape: tuple[int, ...], *, normal: bool) -> Tensor:
        """Return float64 numbers on the CPU, uniform in [0, 1) or standard normal."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss that is a sum over counted predictions.

    Attributes:
        outputs: (model, batch) -> outputs z, a tensor whose first axis is examples and whose last
            is the numbers of one prediction.
        loss: (z, batch) -> (sum, count): the summed loss, a scalar tensor, and how many predictions
            it is over. Zero is allowed for a batch that counts nothing.
        curvature: (z, batch, U) -> second derivative of the sum times each of the vectors
            U (k, *z.shape); None derives it from `loss`.
        residual: (z, batch, draw) -> gradient of the sum with labels drawn from the model itself,
            for the sampled Fisher; None where the loss is no log-likelihood that can be drawn from.
        root: (z, batch, X) -> R X with R R' the second derivative by z, for X of z's shape; None
            where it is not known. Traces of all layers at once need it; `probe` makes one where
            there is none.
        name: what records call it. What a probe has measured is kept under this name, so two losses
            must not share one.
    """

    outputs: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[Tensor, Any], tuple[Tensor, Tensor | float]]
    curvature: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    residual: Callable[[Tensor, Any, Draw], Tensor] | None = None
    root: Callable[[Tensor, Any, Tensor], Tensor] | None = None
    name: str = "objective"


def cross_entropy(*, shift: bool | None = None) -> Objective:
    """Return the softmax cross-entropy, in nats, over predictions whose label is not -100.

    `sum = -sum_i log softmax(z_i)[y_i]`, `count` = how many y_i count. Batches are pairs (inputs,
    targets), or dictionaries of a Hugging Face model's arguments with `labels`, or the
    micro-batches of `Sequences`. Logits are (B, ..., C) or, as in torch, (B, C, ...) for targets
    (B, ...). A causal language model that is given no `labels` predicts its own attended
    `input_ids`.

    Args:
        shift: whether logits of a position predict the next position's label. None does so for
            micro-batches of `Sequences`, and for dictionaries where the model can generate and is
            no encoder-decoder; pairs are taken as they are.

    >>> objective = cross_entropy()
    >>> z, y = torch.zeros(2, 4), torch.tensor([1, -100])
    >>> total, count = objective.loss(z, (None, y))
    >>> round(float(total), 4), int(count)
    (1.3863, 1)
    """

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        return _classes_last(_shifted(model, batch, shift), batch)

    def loss(z: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        y = _labels(z, batch)
        wide = z.to(torch.promote_types(z.dtype, torch.float32)).reshape(-1, z.shape[-1])
        total = nn.functional.cross_entropy(
            wide, y.reshape(-1), reduction="sum", ignore_index=IGNORED
        )
        return total, (y != IGNORED).sum()

    def curvature(z: Tensor, batch: Any, U: Tensor) -> Tensor:
        counted = (_labels(z, batch) != IGNORED).unsqueeze(-1)
        p = torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32)) * counted
        pU = p * U  # (k, B, ..., C)
        return (pU - p * pU.sum(-1, keepdim=True)).to(z.dtype)

    def residual(z: Tensor, batch: Any, draw: Draw) -> Tensor:
        counted = (_labels(z, batch) != IGNORED).unsqueeze(-1)
        p = torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32))
        cumulative = p.cumsum(-1)
        shape = tuple(z.shape[1:-1])
        u = torch.stack([draw(i, shape, normal=False) for i in range(z.shape[0])])
        point = u.to(p.device, p.dtype).unsqueeze(-1) * cumulative[..., -1:]
        y = torch.searchsorted(cumulative, point, right=True).clamp_(max=z.shape[-1] - 1)
        return (p.scatter_add(-1, y, -torch.ones_like(point)) * counted).to(z.dtype)

    def root(z: Tensor, batch: Any, X: Tensor) -> Tensor:
        counted = (_labels(z, batch) != IGNORED).unsqueeze(-1)
        p = torch.softmax(z, -1, dtype=torch.promote_types(z.dtype, torch.float32)) * counted
        q = p.sqrt()  # (diag q - p q') (diag q - p q')' = diag p - p p', since |q| = 1
        return (q * X - p * (q * X).sum(-1, keepdim=True)).to(z.dtype)

    return Objective(outputs, loss, curvature, residual, root, "cross-entropy")


def squared_error() -> Objective:
    """Return half the squared distance, averaged over predictions: `1/2 sum_i |z_i - y_i|^2 / n`.

    A prediction is the last axis of outputs (B, ..., C), or each number of outputs (B,). It is the
    negative log-likelihood of y ~ N(z, I), so its Gauss-Newton matrix is the Fisher matrix, and the
    sampled Fisher draws y from there. Batches are pairs, or dictionaries with `labels`.

    >>> total, count = squared_error().loss(torch.tensor([[3.0, 4.0]]), (None, torch.zeros(1, 2)))
    >>> float(total), count
    (12.5, 1)
    """

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        return _call(model, batch)

    def loss(z: Tensor, batch: Any) -> tuple[Tensor, float]:
        y = _targets(batch)
        if y is None or y.shape != z.shape:
            came = "none" if y is None else tuple(y.shape)
            raise InputError(
                f"squared_error: targets must have the outputs' shape {tuple(z.shape)}; got {came}."
                " Broadcasting one against the other would be another loss."
            )
        return ((z - y) ** 2).sum() / 2, z.numel() // _width(z)

    def curvature(z: Tensor, batch: Any, U: Tensor) -> Tensor:
        return U

    def residual(z: Tensor, batch: Any, draw: Draw) -> Tensor:
        noise = [draw(i, tuple(z.shape[1:]), normal=True) for i in range(z.shape[0])]
        return torch.stack(noise).to(z.device, z.dtype)

    def root(z: Tensor, batch: Any, X: Tensor) -> Tensor:
        return X

    return Objective(outputs, loss, curvature, residual, root, "squared error")


def output_curvature(objective: Objective, z: Tensor, batch: Any, U: Tensor) -> Tensor:
    """Return the second derivative of the loss sum with respect to z times each vector of U.

    Args:
        objective: its `curvature` is used if it has one.
        z: outputs; the result is a constant.
        batch: whose loss.
        U: (k, *z.shape).
    """
    if objective.curvature is not None:
        with torch.no_grad():
            return objective.curvature(z.detach(), batch, U)
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        total, _ = objective.loss(leaf, batch)
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        if not gradient.requires_grad:  # a loss that is linear in the outputs
            return torch.zeros_like(U)
        rows = [torch.autograd.grad(gradient, leaf, u, retain_graph=True)[0] for u in U]
    return torch.stack(rows)


def output_residual(objective: Objective, z: Tensor, batch: Any) -> Tensor:
    """Return the gradient of the loss sum by the outputs, with the batch's own labels."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        total, _ = objective.loss(leaf, batch)
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def _width(z: Tensor) -> int:
    """Return how many numbers one prediction has."""
    return z.shape[-1] if z.ndim > 1 else 1


def _call(model: nn.Module, batch: Any) -> Tensor:
    """Run the model on a batch and return its outputs or logits."""
    if isinstance(batch, ExampleBatch):
        arguments = dict(batch.tensors)
        first = [arguments.pop(FIRST)] if FIRST in arguments else []
        result = model(*first, **arguments)
    elif isinstance(batch, MicroBatch):
        keywords: dict[str, Any] = {"input_ids": batch.tokens, "attention_mask": batch.attention}
        result = model(**keywords, **_without_cache(model))
    elif isinstance(batch, Mapping):
        keywords = {name: value for name, value in batch.items() if name != "labels"}
        result = model(**keywords, **_without_cache(model))
    else:
        result = _call_pair(model, batch)
    z = getattr(result, "logits", result)
    if not isinstance(z, Tensor):
        raise InputError(
            f"the model returns {type(result).__name__}, neither a tensor nor an object with "
            "`.logits`; say which outputs count with Objective(outputs=..., loss=...)."
        )
    return z


def _call_pair(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise InputError(
            f"a batch is {type(batch).__name__}; it must be a pair (inputs, targets), a dictionary,"
            " or a micro-batch. For others give Objective(outputs=..., loss=...)."
        )
    inputs = batch[0]
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that keeps a generating model from filling its cache."""
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _shifted(model: nn.Module, batch: Any, shift: bool | None) -> Tensor:
    """Return logits, without the last position where each predicts the next one's label."""
    z = _call(model, batch)
    if shift is None:
        shift = isinstance(batch, MicroBatch) or (isinstance(batch, Mapping) and _causal(model))
    if shift and z.ndim < 3:
        raise InputError(
            f"cross_entropy(shift=True) needs logits of shape (B, T, C); got {tuple(z.shape)}."
        )
    if isinstance(batch, Mapping) and not shift and "labels" not in batch:
        raise InputError(
            f"the batch has {', '.join(map(repr, batch))} but no 'labels', and the model is no "
            "causal language model, whose inputs could stand for them; add labels."
        )
    return z[:, :-1] if shift else z


def _causal(model: nn.Module) -> bool:
    can_generate = getattr(model, "can_generate", None)
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return callable(can_generate) and bool(can_generate()) and not encoder


def _targets(batch: Any) -> Tensor | None:
    """Return a batch's labels as they came, None where a language model predicts its inputs."""
    if isinstance(batch, ExampleBatch):
        return batch.labels
    if isinstance(batch, MicroBatch):
        return torch.where(batch.counted, batch.tokens, IGNORED)
    if isinstance(batch, Mapping):
        if (labels := batch.get("labels")) is not None:
            return torch.as_tensor(labels)
        attended = batch.get("attention_mask")
        tokens = batch["input_ids"]
        return tokens if attended is None else torch.where(attended.bool(), tokens, IGNORED)
    return torch.as_tensor(batch[1])


def _labels(z: Tensor, batch: Any) -> Tensor:
    """Return labels of shape z.shape[:-1], cut to predictions that are shifted by one position."""
    y = _targets(batch)
    assert y is not None
    if isinstance(batch, ExampleBatch) and y.is_floating_point():
        raise InputError(
            "cross_entropy: these examples have floating targets, and it needs whole numbers, the "
            "classes; give make_examples whole numbers, or take another objective."
        )
    if y.ndim >= 2 and z.ndim >= 3 and y.shape[1] == z.shape[1] + 1:
        y = y[:, 1:]
    if y.shape != z.shape[:-1]:
        raise InputError(
            f"cross_entropy: logits of shape {tuple(z.shape)} need labels of shape "
            f"{tuple(z.shape[:-1])}; got {tuple(y.shape)}."
        )
    return y.long()


def _classes_last(z: Tensor, batch: Any) -> Tensor:
    """Move the classes of (B, C, ...) logits to the end, where targets say that they are second."""
    if z.ndim < 3 or isinstance(batch, (MicroBatch, Mapping)):
        return z
    y = _targets(batch)
    assert y is not None
    last, second = y.shape == z.shape[:-1], y.shape == z.shape[:1] + z.shape[2:]
    if last and second:
        raise InputError(
            f"cross_entropy: in logits of shape {tuple(z.shape)} the classes may be the second or "
            "the last axis, and both fit the targets; say which with Objective(outputs=...)."
        )
    return z.movedim(1, -1) if second else z
