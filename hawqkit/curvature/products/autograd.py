"""Products by reverse mode twice: the gradient's graph is differentiated again.

`H v = d/dw (g(w) . v)`. For J' M J the Jacobian's product comes from reverse mode alone too: `J' u`
is linear in u, so its derivative by u, applied to v, is `J v`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hawqkit.curvature.products.contract import Backend, Problem, Sums, beside, independent, parts


@dataclass(frozen=True, slots=True)
class Graph:
    """A batch's gradient with the graph that it came from.

    Attributes:
        gradients: by name of the parameter; None where the loss does not depend on it.
        loss: summed loss.
        count: counted predictions.
        versions: of the parameters; in-place changes of weights make a graph stale.
    """

    gradients: dict[str, Tensor | None]
    loss: float
    count: float
    versions: tuple[int, ...]


class AutogradHessian(Backend):
    """Double backward.

    Args:
        keep: whether every batch's graph is kept between products, which saves a forward and a
            backward pass a product and needs the memory of all graphs together.
    """

    name = "autograd"

    def __init__(self, *, keep: bool = False) -> None:
        self.keeps = keep
        self._graphs: dict[int, Graph] = {}

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return H V of the batch's loss sum."""
        graph = self._graph(problem, number, batch)
        chunk = problem.vectors_at_once(batch, V.shape[1])
        parameters = list(problem.parameters.tensors)
        gradients = [graph.gradients[name] for name in problem.parameters.names]
        products, looped = [], ""
        for part in parts(V, chunk):
            pieces, reason = multiply(gradients, parameters, problem.parameters.split(part))
            products.append(problem.parameters.join(pieces, part.shape[1]))
            looped = looped or reason
        return Sums(
            beside(products)[None],
            graph.loss,
            graph.count,
            independent(problem.parameters, gradients),
            looped,
        )

    def _graph(self, problem: Problem, number: int, batch: Any) -> Graph:
        versions = tuple(p._version for p in problem.module.parameters())
        kept = self._graphs.get(number)
        if kept is not None and kept.versions == versions:
            return kept
        graph = gradient_graph(problem, batch)
        if self.keeps:
            self._graphs[number] = graph
        return graph


def gradient_graph(problem: Problem, batch: Any) -> Graph:
    """Return the gradient of a batch's loss sum with its graph.

    Never `backward(create_graph=True)`: the graph and the parameter's `.grad` would hold each
    other.
    """
    versions = tuple(p._version for p in problem.module.parameters())
    z = problem.objective.outputs(problem.module, batch)
    total, count = problem.objective.loss(z, batch)
    wanted = problem.wanted
    gradients: Sequence[Tensor | None] = [None] * len(wanted.names)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, wanted.tensors, create_graph=True, allow_unused=True)
    refuse_severed(gradients, total)
    named = dict(zip(wanted.names, gradients, strict=True))
    return Graph(named, float(total.detach()), float(count), versions)


class AutogradJacobian(Backend):
    """J' M J by reverse mode three times, of which the second is over the outputs alone."""

    name = "autograd"

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return J' M J V of the batch."""
        assert problem.factor is not None
        z = problem.objective.outputs(problem.module, batch)
        total, count = problem.objective.loss(z.detach(), batch)
        parameters = list(problem.parameters.tensors)
        backward = linear_backward(z, parameters)
        if backward is None:
            zeros = V.new_zeros(1, *V.shape)
            names = frozenset(problem.parameters.names)
            return Sums(zeros, float(total), float(count), names)
        u, gradients = backward
        products, looped = [], ""
        for part in parts(V, problem.vectors_at_once(batch, V.shape[1])):
            (JV,), first = multiply(gradients, [u], problem.parameters.split(part))
            if JV is None:
                JV = z.new_zeros(part.shape[1], *z.shape)
            MJV = problem.factor(z.detach(), batch, example, JV)
            pieces, second = multiply([z], parameters, [MJV])
            products.append(problem.parameters.join(pieces, part.shape[1]))
            looped = looped or first or second
        return Sums(
            beside(products)[None],
            float(total),
            float(count),
            independent(problem.parameters, gradients),
            looped,
        )


def linear_backward(
    z: Tensor, parameters: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor | None]] | None:
    """Return u = 0, shaped as z, and `J' u` as a graph of u; None if z needs no gradient."""
    if not z.requires_grad:
        return None
    u = torch.zeros_like(z, requires_grad=True)
    gradients = torch.autograd.grad(z, parameters, u, create_graph=True, allow_unused=True)
    refuse_severed(gradients, z)
    return u, list(gradients)


def refuse_severed(gradients: Sequence[Tensor | None], head: Tensor) -> None:
    """Refuse gradients whose graph ends at a function marked `once_differentiable`.

    Such a function leaves a node that raises when it is reached, but that nothing leads away from,
    so torch takes what lies behind it for unused, and the derivative would be silently incomplete.
    Where what comes in has no derivative, under a loss that is linear, it leaves no node at all; so
    the graph of the head is searched for the function itself too.

    Args:
        gradients: with their graphs.
        head: what they are gradients of.

    Raises:
        RuntimeError: there is one; the message names it, or what leads to it.
    """
    for node, following in _edges([head]):
        if _is_once_differentiable(following):
            raise RuntimeError(_severed(node, following))
    for node, following in _edges(gradients):
        if following.name().endswith("::Error"):
            raise RuntimeError(_severed(node, following))


def _edges(tensors: Sequence[Tensor | None]) -> Iterator[tuple[Any, Any]]:
    """Yield each node of a graph once, with one that leads to it: (which, node)."""
    waiting: list[tuple[Any, Any]] = [
        (None, t.grad_fn) for t in tensors if t is not None and t.grad_fn is not None
    ]
    seen = {node for _, node in waiting}
    while waiting:
        before, node = waiting.pop()
        yield before, node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append((node, following))


def _is_once_differentiable(node: Any) -> bool:
    """Whether a node is of a Python function whose backward pass torch's decorator wraps."""
    made = getattr(node, "_forward_cls", None)
    wrapper = getattr(getattr(made, "backward", None), "__code__", None)
    return wrapper is not None and wrapper is once_differentiable(_nothing).__code__


def _nothing(ctx: Any, *gradients: Any) -> None:
    """Stand for a backward pass, to see what the decorator makes of one."""


def _severed(before: Any, node: Any) -> str:
    reached = "" if before is None else f" (reached from {before.name()})"
    return (
        "a function of the model is marked once_differentiable, so its backward pass has no "
        f"derivative: {node.name()}{reached}"
    )


def multiply(
    outputs: Sequence[Tensor | None], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[list[Tensor | None], str]:
    """Return the vector-Jacobian products of k sets of vectors, and why they were looped over.

    Args:
        outputs: what is differentiated; None, or a constant, adds nothing.
        inputs: by what.
        vectors: (k, *shape) for each output.

    Returns:
        (k, *shape) for each input, None where the outputs do not depend on it, and the reason for
        which the k were handled one by one, empty where they were not.
    """
    used = [
        (o, v) for o, v in zip(outputs, vectors, strict=True) if o is not None and o.requires_grad
    ]
    if not used:
        return [None] * len(inputs), ""
    heads, seeds = [o for o, _ in used], [v for _, v in used]
    count = seeds[0].shape[0]
    if count > 1:
        try:
            return _batched(heads, inputs, seeds)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            looped = str(error).splitlines()[0][:160]
    else:
        looped = ""
    rows = [_single(heads, inputs, [s[j] for s in seeds]) for j in range(count)]
    if count == 1:  # a view: stacking would copy what is as large as the model
        return [None if c is None else c[None] for c in rows[0]], looped
    products = [
        None if column[0] is None else torch.stack([c for c in column if c is not None])
        for column in zip(*rows, strict=True)
    ]
    return products, looped


def _batched(
    heads: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> tuple[list[Tensor | None], str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        products = torch.autograd.grad(
            heads, inputs, seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    # torch runs an operator that has no batching rule vector by vector, and warns.
    slow = [str(w.message) for w in caught if "batching rule" in str(w.message)]
    return list(products), slow[0].splitlines()[0][:160] if slow else ""


def _single(
    heads: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(heads, inputs, seeds, retain_graph=True, allow_unused=True)
