"""The generalized Gauss-Newton matrix of a model's mean loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hawqkit.curvature.objective import Objective, output_curvature
from hawqkit.curvature.of_model import ModelOperator, Table, make_operator
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.curvature.products.autograd import AutogradJacobian
from hawqkit.curvature.products.difference import DifferenceJacobian
from hawqkit.curvature.products.forward import ForwardJacobian
from hawqkit.models.model import LoadedModel

JACOBIANS: Table = {
    "autograd": AutogradJacobian,
    "forward": ForwardJacobian,
    "difference": DifferenceJacobian,
}


def gauss_newton(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    products: str = "auto",
    memory_bytes: int | None = None,
) -> ModelOperator:
    """Return `G = 1/n sum_i J_i' L_zz J_i` as an operator, J the Jacobian of the outputs z.

    L_zz is the second derivative of the loss by the outputs: `diag p - p p'` for softmax
    cross-entropy, the identity for half the squared distance. There G is also the Fisher matrix,
    and positive semi-definite (Schraudolph 2002; Martens 2020, section 9).

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        parameters: as for `hessian`.
        products: how `J v` is made: `autograd`, `forward`, `difference` (of the outputs), or
            `auto`.
        memory_bytes: as for `hessian`.

    Raises:
        InputError: as for `hessian`.
        Unsupported: as for `hessian`.

    >>> import torch
    >>> from hawqkit.curvature.objective import squared_error
    >>> net = nn.Linear(2, 1, bias=False).eval()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> gauss_newton(net, squared_error(), [(x, torch.zeros(2, 1))]).dense().tolist()
    [[0.5, 0.0], [0.0, 4.5]]
    """

    def factor(z: Tensor, batch: Any, example: int, U: Tensor) -> Tensor:
        return output_curvature(objective, z, batch, U)

    return make_operator(
        model,
        objective,
        batches,
        choose_parameters(model, parameters),
        backends=JACOBIANS,
        products=products,
        kind="Gauss-Newton matrix",
        factor=factor,
        memory_bytes=memory_bytes,
    )
