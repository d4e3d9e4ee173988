"""The Hessian of a model's mean loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import ModelOperator, make_operator
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.curvature.products.autograd import AutogradHessian
from hawqkit.curvature.products.difference import DifferenceHessian
from hawqkit.curvature.products.forward import ForwardHessian
from hawqkit.errors import InputError
from hawqkit.models.model import LoadedModel


def hessian(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    products: str = "auto",
    keep_graphs: bool = False,
    memory_bytes: int | None = None,
) -> ModelOperator:
    """Return the Hessian of the mean loss as an operator, `H_ij = d^2 L / dw_i dw_j`.

    Products: `autograd`, double backward; `forward`, forward over reverse mode, with less memory,
    where every operator has a forward derivative; `difference`, finite differences of gradients,
    for smooth models of which only first-order training fits. `auto` takes the first of these that
    works, and `backend` and `backend_reason` tell which and why.

    Args:
        model: a network in eval mode.
        objective: the loss, a sum over counted predictions.
        batches: a re-iterable of pairs (inputs, targets), of dictionaries for Hugging Face models,
            or `Sequences`; every product goes through all of them.
        parameters: names, globs, module paths, or parameters; see `choose_parameters`.
        products: `auto`, `autograd`, `forward` or `difference`.
        keep_graphs: keep every batch's gradient graph between products, with `autograd`: a product
            costs less, and the graphs of all batches must fit together.
        memory_bytes: what several products made together may take; None is half of the free memory.

    Raises:
        InputError: a name is unknown, batches can be walked through once only, or an option is not
            one of those above.
        Unsupported: the model is in training mode, or its loss cannot be differentiated so.

    >>> import torch
    >>> from hawqkit.curvature.objective import squared_error
    >>> net = nn.Linear(2, 1, bias=False).eval()
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> H = hessian(net, squared_error(), [(x, torch.zeros(2, 1))])  # x'x / n
    >>> H.dense().tolist()
    [[0.5, 0.0], [0.0, 4.5]]
    """
    if keep_graphs and products not in ("auto", "autograd"):
        raise InputError(
            f"keep_graphs: graphs are kept by products='autograd' only; got products={products!r}."
        )
    table = {
        "autograd": lambda: AutogradHessian(keep=keep_graphs),
        "forward": ForwardHessian,
        "difference": DifferenceHessian,
    }
    return make_operator(
        model,
        objective,
        batches,
        choose_parameters(model, parameters),
        backends=table,
        products=products,
        kind="Hessian",
        memory_bytes=memory_bytes,
        keeps=keep_graphs,
    )
