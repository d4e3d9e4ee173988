"""Products by forward mode: over reverse mode for the Hessian, alone for the Jacobian.

`H v` is the directional derivative of the gradient: `jvp(grad(loss), w, v)`. It needs no graph of a
gradient, so it holds less than double backward, but every operator in the model, and in its
backward pass, must have a forward derivative.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.curvature.objective import Objective
from hawqkit.curvature.products.autograd import multiply
from hawqkit.curvature.products.contract import Backend, Problem, Sums, beside, independent, parts

Named = dict[str, Tensor]


class _Outputs(nn.Module):
    """A model whose forward pass gives the objective's outputs, for functional_call."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = module
        self._objective = objective
        self.training = module.training

    def forward(self, batch: Any) -> Tensor:
        """Return the outputs that count."""
        return self._objective.outputs(self.model, batch)


class ForwardHessian(Backend):
    """Forward over reverse."""

    name = "forward"

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return H V of the batch's loss sum."""
        weights = _weights(problem)
        wrapped = _Outputs(problem.module, problem.objective)

        def total(weights: Named) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            z = torch.func.functional_call(wrapped, weights, (batch,))
            loss, count = problem.objective.loss(z, batch)
            return loss, (loss.detach(), torch.as_tensor(count, dtype=torch.float64))

        gradient = torch.func.grad(total, has_aux=True)

        def product(tangents: Named) -> tuple[Named, Any]:
            answer: Any = torch.func.jvp(gradient, (weights,), (tangents,), has_aux=True)
            first, made, facts = answer
            return made, (*facts, *(g.detach().any() for g in first.values()))

        chunk = problem.vectors_at_once(batch, V.shape[1])
        products, looped, facts = [], "", None
        for part in parts(V, chunk):
            made, facts, reason = _over_vectors(product, _tangents(problem, part))
            pieces = list(made.values())
            products.append(problem.parameters.join(pieces, part.shape[1]))
            looped = looped or reason
        assert facts is not None
        loss, count, *moved = (float(f.flatten()[0]) for f in facts)
        made_all = beside(products)
        # Forward mode has no graph that tells what is unused: there both derivatives are all zeros.
        unused = frozenset(
            name
            for (name, place), any_first in zip(
                problem.parameters.blocks.items(), moved, strict=True
            )
            if not any_first and not bool(made_all[place].any())
        )
        return Sums(made_all[None], loss, count, unused, looped)


class ForwardJacobian(Backend):
    """J V by forward mode, J' by reverse mode."""

    name = "forward"

    def batch(self, problem: Problem, number: int, example: int, batch: Any, V: Tensor) -> Sums:
        """Return J' M J V of the batch."""
        assert problem.factor is not None
        weights = _weights(problem)
        wrapped = _Outputs(problem.module, problem.objective)

        def outputs(weights: Named) -> Tensor:
            z: Tensor = torch.func.functional_call(wrapped, weights, (batch,))
            return z

        def product(tangents: Named) -> tuple[Named, tuple[()]]:
            return {"z": torch.func.jvp(outputs, (weights,), (tangents,))[1]}, ()

        z = problem.objective.outputs(problem.module, batch)
        total, count = problem.objective.loss(z.detach(), batch)
        parameters = list(problem.parameters.tensors)
        products, looped = [], ""
        unused: frozenset[str] = frozenset(problem.parameters.names)
        for part in parts(V, problem.vectors_at_once(batch, V.shape[1])):
            made, _, first = _over_vectors(product, _tangents(problem, part))
            MJV = problem.factor(z.detach(), batch, example, made["z"])
            pieces, second = multiply([z], parameters, [MJV])
            unused = independent(problem.parameters, pieces)
            products.append(problem.parameters.join(pieces, part.shape[1]))
            looped = looped or first or second
        return Sums(beside(products)[None], float(total), float(count), unused, looped)


def _weights(problem: Problem) -> Named:
    pairs = zip(problem.parameters.names, problem.parameters.tensors, strict=True)
    return {f"model.{name}": tensor.detach() for name, tensor in pairs}


def _tangents(problem: Problem, V: Tensor) -> Named:
    pairs = zip(problem.parameters.names, problem.parameters.split(V), strict=True)
    return {f"model.{name}": piece for name, piece in pairs}  # (k, *shape)


def _over_vectors(
    product: Callable[[Named], tuple[Named, Any]], tangents: Named
) -> tuple[Named, Any, str]:
    """Map a product over the leading axis, together where every operator allows it."""
    count = next(iter(tangents.values())).shape[0]
    looped = ""
    if count > 1:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made, facts = torch.func.vmap(product)(tangents)
            slow = [str(w.message) for w in caught if "batching rule" in str(w.message)]
            return made, facts, slow[0].splitlines()[0][:160] if slow else ""
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            looped = str(error).splitlines()[0][:160]
    rows = []
    facts = None
    for j in range(count):
        made, facts = product({name: piece[j] for name, piece in tangents.items()})
        rows.append(made)
    if count == 1:  # a view: stacking would copy what is as large as the model
        return {name: value[None] for name, value in rows[0].items()}, facts, looped
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}, facts, looped
