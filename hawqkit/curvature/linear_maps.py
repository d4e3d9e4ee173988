"""Layers whose module computes `y = W x + b` at each position, with each example apart.

There a change of W acts through y alone, so products with H_ll can be made at the module's output,
and each example can be given a probe of its own. Whether that holds is found out on the data: two
examples of the first batch must not meet, and the weight's gradient must be that of the one use.

Letters in shapes: B examples, P positions of an example, I inputs and O outputs of one position, k
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.curvature.parameters import norm
from hawqkit.curvature.passes import differentiable
from hawqkit.curvature.products.contract import Problem


@dataclass(frozen=True, slots=True, eq=False)
class LinearMap:
    """A module that multiplies each position of its input by its weight.

    Attributes:
        parameter: name of the weight.
        module: whose `weight` it is.
    """

    parameter: str
    module: nn.Module

    @property
    def outputs(self) -> int:
        """O."""
        weight: Tensor = self.module.get_parameter("weight")
        return weight.shape[1 if _is_transposed(self.module) else 0]

    def columns(self, x: Tensor) -> Tensor:
        """Return the module's input as what the weight is multiplied with, (B, P, I)."""
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            m = self.module
            if isinstance(m, nn.Conv1d):  # as a picture of height one
                x = x.unsqueeze(2)
            unfolded = nn.functional.unfold(
                x,
                _in_plane(m.kernel_size, 1),
                dilation=_in_plane(m.dilation, 1),
                padding=_in_plane(m.padding, 0),
                stride=_in_plane(m.stride, 1),
            )
            return unfolded.transpose(1, 2)
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def rows(self, y: Tensor) -> Tensor:
        """Return the module's output, or its gradient, as (B, P, O)."""
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            return y.flatten(2).transpose(1, 2)
        return y.reshape(y.shape[0], -1, y.shape[-1])

    def output(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Return (B, P, O) in the shape of the module's output, the inverse of `rows`."""
        if isinstance(self.module, (nn.Conv1d, nn.Conv2d)):
            return rows.transpose(1, 2).reshape(shape)
        return rows.reshape(shape)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor of the weight's shape as (O, I)."""
        return weight.T if _is_transposed(self.module) else weight.flatten(1)


@dataclass(slots=True)
class Use:
    """One call of a module: its input, and its output in the graph."""

    inputs: Tensor
    output: Tensor


def linear_maps(module: nn.Module, layers: Mapping[str, Sequence[str]]) -> dict[str, LinearMap]:
    """Return those layers that are the weight of one linear or convolutional module."""
    owners = {
        f"{name}.weight" if name else "weight": child for name, child in module.named_modules()
    }
    found = {}
    for layer, names in layers.items():
        owner = owners.get(names[0]) if len(names) == 1 else None
        if owner is not None and _is_linear(owner):
            found[layer] = LinearMap(names[0], owner)
    return found


@contextmanager
def uses_of(maps: Mapping[str, LinearMap]) -> Iterator[dict[str, list[Use]]]:
    """Note the uses of modules inside; their outputs become nodes of the graph."""
    uses: dict[str, list[Use]] = {layer: [] for layer in maps}
    handles = []
    for layer, linear in maps.items():

        def hook(
            _: nn.Module, inputs: tuple[Any, ...], y: Any, layer: str = layer
        ) -> Tensor | None:
            if not (torch.is_grad_enabled() and isinstance(y, Tensor)):
                return None
            if not (inputs and isinstance(inputs[0], Tensor)):
                return None
            if not y.requires_grad:  # nothing before this layer is measured
                y = y.detach().requires_grad_()
            uses[layer].append(Use(inputs[0].detach(), y))
            # A copy: an activation that works in place must not change what is differentiated by.
            copy: Tensor = y.clone()
            return copy

        handles.append(linear.module.register_forward_hook(hook))
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def examples_of(batch: Any) -> int | None:
    """Return how many examples a batch has; None where that cannot be told from its tensors."""
    sizes = set(_sizes(batch))
    return sizes.pop() if len(sizes) == 1 and None not in sizes else None


def take_examples(batch: Any, index: Tensor) -> Any:
    """Return some examples of a batch, in any order and number of times."""
    if isinstance(batch, Tensor):
        return batch.index_select(0, index.to(batch.device))
    if isinstance(batch, Mapping):
        return {key: take_examples(value, index) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(take_examples(value, index) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        changed = {f.name: take_examples(getattr(batch, f.name), index) for f in fields(batch)}
        return replace(batch, **changed)
    return batch


def apart(problem: Problem, maps: Mapping[str, LinearMap], batch: Any) -> dict[str, LinearMap]:
    """Return the maps through which alone their weights act, if examples are apart.

    With a random cotangent u at the outputs z of two examples, one of them at a time, it looks
    whether the gradient at the other example's y is zero, exactly, and whether the weight's
    gradient is `sum_p d_p x_p'`. And the loss must be the sum of the examples' losses.
    """
    count = examples_of(batch)
    if not maps or not count:
        return {}
    try:
        pair = take_examples(batch, torch.tensor([0, count - 1]))
        weights = problem.parameters.only([m.parameter for m in maps.values()])
        with differentiable(problem.module, weights, twice=False), uses_of(maps) as uses:
            z = problem.objective.outputs(problem.module, pair)
            if z.shape[0] != 2 or not z.requires_grad or not _loss_adds_up(problem, z, pair):
                return {}
            once = {layer: use[0] for layer, use in uses.items() if len(use) == 1}
            return _alone(z, {layer: maps[layer] for layer in once}, once)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        return {}  # probes over whole batches then tell what is wrong, if something is


def _alone(
    z: Tensor, maps: Mapping[str, LinearMap], uses: Mapping[str, Use]
) -> dict[str, LinearMap]:
    """Return the maps of which one example's outputs touch no other, and that are all there is."""
    u = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u.to(z.device, z.dtype)
    layers = [n for n, use in uses.items() if len(use.inputs) == len(use.output) == 2]
    weights = {n: maps[n].module.get_parameter("weight") for n in layers}
    outputs = [uses[n].output for n in layers]
    found = _gradients_of(z, u, 0, outputs)
    touching = {n for n, d in zip(layers, found, strict=True) if d is None or bool(d[1].any())}
    # What a weight's gradient is made of is the same for every example: one shows it.
    found = _gradients_of(z, u, 1, [*outputs, *weights.values()])
    alone = {}
    for name, d, g in zip(layers, found[: len(layers)], found[len(layers) :], strict=True):
        if name in touching or d is None or g is None or bool(d[0].any()):
            continue
        X, D = maps[name].columns(uses[name].inputs)[1], maps[name].rows(d)[1]
        far = norm([maps[name].matrix(g) - D.T @ X])
        if far <= _rounding(weights[name]) * norm([D]) * norm([X]):
            alone[name] = maps[name]
    return alone


def _gradients_of(
    z: Tensor, u: Tensor, row: int, inputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of one example's outputs along u."""
    seed = torch.zeros_like(u)
    seed[row] = u[row]
    return torch.autograd.grad(z, inputs, seed, retain_graph=True, allow_unused=True)


def _rounding(tensor: Tensor) -> float:
    """Return a share that rounding stays far below, and that another use of a weight exceeds."""
    return math.sqrt(torch.finfo(tensor.dtype).eps)


def _loss_adds_up(problem: Problem, z: Tensor, pair: Any) -> bool:
    z = z.detach()
    total, count = problem.objective.loss(z, pair)
    apart_total, apart_count = 0.0, 0.0
    for row in range(2):
        one, predictions = problem.objective.loss(
            z[row : row + 1], take_examples(pair, torch.tensor([row]))
        )
        apart_total += float(one)
        apart_count += float(predictions)
    near = _rounding(z) * max(abs(float(total)), abs(apart_total))
    return abs(float(total) - apart_total) <= near and float(count) == apart_count


def _sizes(item: Any) -> Iterator[int | None]:
    """Yield the lengths of a batch's tensors; None for what cannot be taken apart."""
    if isinstance(item, Tensor):
        yield item.shape[0] if item.ndim else None
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _sizes(value)
    elif isinstance(item, (list, tuple)) and not hasattr(item, "_fields"):
        for value in item:
            yield from _sizes(value)
    elif is_dataclass(item) and not isinstance(item, type):
        for f in fields(item):
            yield from _sizes(getattr(item, f.name))
    elif item is not None and not isinstance(item, (bool, str)):
        yield None


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return bool(plain) and not isinstance(module.padding, str)
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Say whether it is GPT-2's linear layer, whose weight is (I, O)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers")


def _in_plane(sizes: Any, other: int) -> tuple[int, ...]:
    """Return the two sizes of a plane; the sizes of a line are its second."""
    given = tuple(int(s) for s in sizes)
    return given if len(given) == 2 else (other, *given)
