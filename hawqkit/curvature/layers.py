"""Which parameters make a layer, and every layer's operator on one shared graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import ModelOperator
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.errors import InputError, did_you_mean
from hawqkit.models.layers import matches
from hawqkit.models.model import LoadedModel

KINDS = ("hessian", "gauss-newton")

Chosen = Iterable[str] | Mapping[str, Iterable[str | nn.Parameter]] | None


def choose_layers(
    model: nn.Module | LoadedModel, layers: Chosen = None
) -> dict[str, tuple[str, ...]]:
    """Return layer name -> names of its parameters, in the model's order.

    A layer is the weight that a loaded model's `layers` name; of any other network, every parameter
    of two dimensions or more. It is called by its module's path where the parameter is `weight`,
    else by the parameter's own name.

    Args:
        model: the network.
        layers: names or globs of such layers; or name -> parameters, for groups of one's own, such
            as `{"block 0": ["model.layers.0"]}`; None takes all.

    Raises:
        InputError: there is no layer, a pattern matches none, or a parameter is in two groups.

    >>> choose_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    {'0': ('0.weight',), '2': ('2.weight',)}
    """
    if isinstance(layers, Mapping):
        groups = {n: choose_parameters(model, chosen).names for n, chosen in layers.items()}
        _refuse_overlap(groups)
        return groups
    known = _all_layers(model)
    if not known:
        raise InputError(
            "the model has no parameter of two dimensions or more, so it has no layers; give "
            "layers={name: [parameters]}."
        )
    if layers is None:
        return known
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(matches(name, pattern) for name in known):
            raise InputError(
                f"layers: {pattern!r} matches none of the {len(known)} layers, named like "
                f"{next(iter(known))!r}." + did_you_mean(pattern, list(known))
            )
    if not patterns:
        raise InputError("layers: the list is empty; None takes all.")
    return {n: names for n, names in known.items() if any(matches(n, p) for p in patterns)}


def layer_operators(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    layers: Chosen = None,
    kind: str = "hessian",
    products: str = "auto",
    keep_graphs: bool = True,
    memory_bytes: int | None = None,
) -> dict[str, ModelOperator]:
    """Return every layer's diagonal block as an operator, `{layer: H_ll}`.

    With `keep_graphs` the blocks share one gradient graph a batch: the first product of any of them
    makes it, and all later ones, of all layers, differentiate it. Without, and for Gauss-Newton
    blocks, every product makes its own graph.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        layers: see `choose_layers`.
        kind: `hessian` or `gauss-newton`.
        products: as for `hessian`.
        keep_graphs: whether the graphs of all batches are kept; they must fit together.
        memory_bytes: as for `hessian`.

    Raises:
        InputError: as for `hessian`, or a layer is unknown.
    """
    groups = choose_layers(model, layers)
    parameters = [name for names in groups.values() for name in names]
    if check_kind(kind) == "hessian":
        whole = hessian(
            model,
            objective,
            batches,
            parameters=parameters,
            products=products,
            keep_graphs=keep_graphs and products in ("auto", "autograd"),
            memory_bytes=memory_bytes,
        )
    else:
        whole = gauss_newton(
            model,
            objective,
            batches,
            parameters=parameters,
            products=products,
            memory_bytes=memory_bytes,
        )
    return {layer: whole.block(*names) for layer, names in groups.items()}


def check_kind(kind: str) -> str:
    """Return the kind of matrix, or refuse one that is unknown."""
    if kind not in KINDS:
        raise InputError(
            f"kind: got {kind!r}; allowed are {', '.join(KINDS)}." + did_you_mean(kind, KINDS)
        )
    return kind


def _all_layers(model: nn.Module | LoadedModel) -> dict[str, tuple[str, ...]]:
    if isinstance(model, LoadedModel):
        first = {id(p): n for n, p in model.module.named_parameters()}
        return {layer.name: (first[id(model.parameter(layer.name))],) for layer in model.layers}
    return {
        name.removesuffix(".weight"): (name,)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point()
    }


def _refuse_overlap(groups: Mapping[str, tuple[str, ...]]) -> None:
    owner: dict[str, str] = {}
    for group, names in groups.items():
        for name in names:
            if name in owner:
                raise InputError(
                    f"layers: parameter {name!r} is in {owner[name]!r} and in {group!r}; a "
                    "parameter belongs to one layer."
                )
            owner[name] = group
