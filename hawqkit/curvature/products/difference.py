"""Products by finite differences of first derivatives, for models that only those fit.

`H v = (g(w + e v) - g(w - e v)) / 2e` with `e = cbrt(eps) |w| / |v|`, where truncation, e^2, and
rounding, eps / e, are alike for a loss whose derivatives are all of one size. It is made at e, 2e
and 4e. Where three gradients differ by more than one percent, they are made again from e / 8 and
e / 64: in float32 a step along random directions of a whole language model is too long (of a
product of SmolLM2 3 % was truncation at e, 0.07 % at e / 8). Where none agrees the loss is not
smooth at this distance, as with the kinks of ReLU, and the product is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hawqkit.curvature.operator import all_finite
from hawqkit.curvature.parameters import norm
from hawqkit.curvature.products.autograd import multiply
from hawqkit.curvature.products.contract import Backend, Problem, Sums, beside, independent
from hawqkit.errors import NumericalError

STEPS = (1, 2, 4)
DISAGREEMENT = 0.01
SHORTER = (1.0, 1 / 8, 1 / 64)  # of the step, in the order in which they are tried
# Rounding errors of a gradient, over eps |g|: differences below them are zero as far as can be
# seen.
ROUNDING = 10


class DifferenceHessian(Backend):
    """Central differences of gradients: six gradients a product, and three vectors beside one.

    The share of the step that served last is where the next product starts, since a vector's
    neighbors in a Krylov space ask for the like of it.
    """

    name = "difference"
    rows = len(STEPS)
    twice = False

    def __init__(self) -> None:
        self._place = 0
        self._tried = 1

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return the batch's differences at each step."""
        products = V.new_zeros(self.rows, *V.shape)
        unused: frozenset[str] = frozenset()
        loss, count, scale = 0.0, 0.0, 0.0
        for j in range(V.shape[1]):
            step = SHORTER[self._place] * _step(problem, V[:, j])
            with moved(problem, V[:, j]) as move:
                for row, times in enumerate(STEPS):
                    for sign in (1.0, -1.0):
                        move(sign * times * step)
                        gradient, unused, loss, count = _gradient(problem, batch)
                        share = sign / (2 * times * step)
                        products[row, :, j].add_(gradient, alpha=share)
                        scale = max(scale, norm([gradient]))
        return Sums(products, loss, count, unused, scale=scale)

    def finish(self, problem: Problem, means: Tensor, V: Tensor, scale: float) -> Tensor:
        """Return the differences at the smallest step, if the three agree."""
        for j in range(V.shape[1]):
            floor = _floor(problem, scale, V[:, j], self._place)
            refuse_disagreement(means[:, :, j], floor, "gradients")
        self._tried = 1
        return means[0]

    def again(self) -> bool:
        """Take another share of the step; False, and start afresh, when all have been tried."""
        self._place = (self._place + 1) % len(SHORTER)
        self._tried = self._tried % len(SHORTER) + 1
        return self._tried > 1


class DifferenceJacobian(Backend):
    """J V by central differences of the outputs, J' by reverse mode."""

    name = "difference"
    twice = False

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return J' M J V of the batch."""
        assert problem.factor is not None
        columns = [self._derivative(problem, batch, V[:, j]) for j in range(V.shape[1])]
        z = problem.objective.outputs(problem.module, batch)
        total, count = problem.objective.loss(z.detach(), batch)
        MJV = problem.factor(z.detach(), batch, example, torch.stack(columns))
        # One by one: this back-end is for models that hold one backward pass.
        products = []
        unused: frozenset[str] = frozenset()
        for row in MJV:
            pieces, _ = multiply([z], list(problem.parameters.tensors), [row[None]])
            unused = independent(problem.parameters, pieces)
            products.append(problem.parameters.join(pieces, 1))
        return Sums(beside(products)[None], float(total), float(count), unused)

    def _derivative(self, problem: Problem, batch: Any, v: Tensor) -> Tensor:
        """Return J v, of the outputs' shape."""
        step = _step(problem, v)
        made: list[Tensor] = []
        size = 0.0
        with moved(problem, v) as move, torch.no_grad():
            for times in STEPS:
                sides = []
                for sign in (1.0, -1.0):
                    move(sign * times * step)
                    sides.append(problem.objective.outputs(problem.module, batch))
                made.append((sides[0] - sides[1]) / (2 * times * step))
                size = norm(sides[:1])
        refuse_disagreement(torch.stack(made), _floor(problem, size, v, 0), "outputs")
        return made[0]


@contextmanager
def moved(problem: Problem, v: Tensor) -> Iterator[Callable[[float], None]]:
    """Give a function that sets the weights to w + step v; at the end they are w, bit for bit."""
    parameters = problem.parameters.tensors
    originals = [p.detach().clone() for p in parameters]
    pieces = problem.parameters.split(v)

    def move(step: float) -> None:
        with torch.no_grad():
            for parameter, original, piece in zip(parameters, originals, pieces, strict=True):
                parameter.copy_(original).add_(piece, alpha=step)

    try:
        yield move
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


def refuse_disagreement(made: Tensor, floor: float, what: str) -> None:
    """Refuse derivatives that depend on the step.

    Args:
        made: (3, ...) the derivative at e, 2e and 4e.
        floor: norm below which a difference is rounding.
        what: of what the differences are.

    Raises:
        NumericalError: two of them differ by more than a percent of the first and by more than the
            floor.
    """
    if not all_finite(made):
        return  # named with its parameter and batch by the operator
    size = norm([made[0]])
    apart = max(norm([made[0] - other]) for other in made[1:])
    if apart > DISAGREEMENT * size + floor:
        share = apart / size if size else float("inf")
        raise NumericalError(
            f"finite differences of {what} at three steps, each twice the one before, differ by "
            f"{share:.1%} of the product, more than {DISAGREEMENT:.0%}: the model is not smooth "
            "over that distance (ReLU, max pooling), or its rounding is too coarse. Use "
            "products='autograd' or 'forward', or float64 for a smooth model."
        )


def _gradient(problem: Problem, batch: Any) -> tuple[Tensor, frozenset[str], float, float]:
    z = problem.objective.outputs(problem.module, batch)
    total, count = problem.objective.loss(z, batch)
    parameters = problem.parameters
    gradients: Sequence[Tensor | None] = [None] * len(parameters.names)
    if total.requires_grad:
        gradients = torch.autograd.grad(total, parameters.tensors, allow_unused=True)
    rows = [None if g is None else g[None] for g in gradients]
    unused = independent(parameters, rows)
    return parameters.join(rows, 1)[:, 0], unused, float(total.detach()), float(count)


def _step(problem: Problem, v: Tensor) -> float:
    """Return e; one where weights or vector are all zero, since any distance serves then."""
    size, length = norm(problem.parameters.tensors), norm([v])
    return float(_eps(problem) ** (1 / 3)) * (size or 1.0) / (length or 1.0)


def _floor(problem: Problem, size: float, v: Tensor, place: int) -> float:
    """Return the norm below which a difference is rounding; zero for shorter steps.

    They have more of it, and an allowance for it would let them pass where nothing can be seen.
    """
    return 0.0 if place else ROUNDING * _eps(problem) * size / _step(problem, v)


def _eps(problem: Problem) -> float:
    return max(float(torch.finfo(t.dtype).eps) for t in problem.parameters.tensors)
