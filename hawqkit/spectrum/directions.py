"""Directions in weight space: eigenvectors, random ones, the gradient, given ones; and lengths.

Letters: n chosen parameters, d a direction (n,).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.curvature.operator import WHOLE
from hawqkit.curvature.parameters import Parameters
from hawqkit.errors import InputError, did_you_mean
from hawqkit.estimators.eigenpairs import Eigenpairs
from hawqkit.estimators.probes import draw_probe, seeded
from hawqkit.models.orientation import is_transposed

Wanted = str | Tensor | Mapping[str, Tensor] | Eigenpairs

RANDOM, GRADIENT = "random", "gradient"
AUTO, NONE, FILTER, LAYER, UNIT = "auto", "none", "filter", "layer", "unit"
NORMALIZATIONS = (AUTO, FILTER, LAYER, UNIT)
MOST = 2
_TOP = re.compile(r"top-([1-9]\d*)")
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True, eq=False)
class Direction:
    """One direction.

    Attributes:
        name: what a picture calls it.
        vector: (n,).
        normalization: what its length was made; `none` leaves it as it came.
        eigenvalue: where it is an eigenvector.
        residual: of the eigenvalue.
    """

    name: str
    vector: Tensor
    normalization: str = NONE
    eigenvalue: float | None = None
    residual: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Eigenvector `place` of given pairs."""

    pairs: Eigenpairs
    place: int


Wish = str | Tensor | Mapping[str, Tensor] | Chosen


def read_wishes(directions: Wanted | Sequence[Wanted]) -> list[Wish]:
    """Return what was asked for as one wish or two.

    Eigenpairs alone stand for their first two vectors, the columns of a matrix for a vector each,
    and eigenpairs in a sequence for their first vector.

    Raises:
        InputError: none, more than two, or something that is no direction.
    """
    wishes: list[Any] = []
    if isinstance(directions, Eigenpairs):
        wishes = [Chosen(directions, i) for i in range(min(MOST, len(directions.values)))]
    elif isinstance(directions, Tensor):
        wishes = list(directions.unbind(1)) if directions.ndim == 2 else [directions]
    elif isinstance(directions, str | Mapping) or not isinstance(directions, Sequence):
        wishes = [directions]
    else:
        wishes = [Chosen(wish, 0) if isinstance(wish, Eigenpairs) else wish for wish in directions]
    if not 1 <= len(wishes) <= MOST:
        raise InputError(f"directions: {len(wishes)} came; give one for a line or two for a plane.")
    for wish in wishes:
        if isinstance(wish, str):
            _check_name(wish)
        elif not isinstance(wish, Tensor | Mapping | Chosen):
            raise InputError(
                f"directions: got {type(wish).__name__}; a direction is 'top-1', 'random', "
                "'gradient', a flat tensor, a mapping name -> tensor, or Eigenpairs."
            )
    return wishes


def rank_of(wish: Wish) -> int:
    """Return k where the wish is `top-k`, else 0."""
    found = _TOP.fullmatch(wish) if isinstance(wish, str) else None
    return int(found[1]) if found else 0


def make_direction(wish: Wish, parameters: Parameters, seed: int, place: int) -> Direction:
    """Return a direction that needs no pass over the data.

    Args:
        wish: `random`, a tensor, a mapping or an eigenvector.
        parameters: what it is over.
        seed: of a random one.
        place: which of the two; random ones are independent.

    Raises:
        InputError: its shape or its names do not fit the parameters.
    """
    if isinstance(wish, str):
        return Direction(
            wish, _moved(draw_probe(parameters.size, "gaussian", seeded(seed, place)), parameters)
        )
    if isinstance(wish, Chosen):
        number = f"eigenvector {wish.place + 1}"
        return replace(eigen_direction(wish.pairs, wish.place, parameters), name=number)
    if isinstance(wish, Tensor):
        if wish.shape != (parameters.size,):
            raise InputError(
                f"directions: a tensor of shape {tuple(wish.shape)} came; {parameters.size} "
                f"numbers are in the chosen parameters, so it must be ({parameters.size},). For "
                "some of them give a mapping name -> tensor."
            )
        return Direction("given", _moved(wish, parameters))
    return Direction("given", _placed(wish, parameters))


def eigen_direction(pairs: Eigenpairs, i: int, parameters: Parameters) -> Direction:
    """Return eigenvector i, in its place among the parameters.

    Raises:
        InputError: the eigenvectors are not over these parameters or some of them.
    """
    known, size = parameters.blocks, len(pairs.vectors)
    if list(pairs.blocks) == [WHOLE] and WHOLE not in known and size == parameters.size:
        vector = _moved(pairs.vectors[:, i], parameters)
    else:
        named = pairs.named(i)
        for name, part in named.items():
            if name not in known or known[name].stop - known[name].start != part.numel():
                raise InputError(
                    f"directions: the eigenvectors have {size} entries with a block {name!r} of "
                    f"{part.numel()}, which is none of the {len(known)} chosen parameters "
                    f"({parameters.size} entries); choose the same `parameters` as for the "
                    "operator that they are of."
                )
        shapes = dict(zip(parameters.names, (t.shape for t in parameters.tensors), strict=True))
        vector = _placed({n: p.reshape(shapes[n]) for n, p in named.items()}, parameters)
    return Direction(
        f"top-{i + 1}", vector, NONE, float(pairs.values[i]), float(pairs.residuals[i])
    )


def normalize_direction(
    direction: Direction, module: nn.Module, parameters: Parameters, how: str | None, biases: bool
) -> Direction:
    """Return the direction at the length that was asked for.

    `filter`: every filter of d gets the norm of the same filter of the weights, `d_f |w_f| / |d_f|`
    (Li et al. 2018, section 4); a filter makes one output: a row of a linear weight, a kernel of a
    convolution. `layer`: every parameter of d gets the norm of that parameter. `unit`: |d| = 1.
    What is zero in the weights is not moved by the first two; a parameter of one dimension is one
    filter.

    Args:
        direction: as it was made.
        module: the model, whose modules tell on which axis of a weight the outputs are.
        parameters: what the direction is over.
        how: one of these, None, or `auto`: `filter` for random directions, None for others.
        biases: whether random directions move parameters of one dimension, too.

    Raises:
        InputError: nothing is left of the direction, or it holds NaN or infinity.
    """
    if how == AUTO:
        how = FILTER if direction.name == RANDOM else None
    vector = direction.vector.clone()
    for (name, piece), weight in zip(
        parameters.named(vector).items(), parameters.tensors, strict=True
    ):
        if direction.name == RANDOM and not biases and piece.ndim < 2:
            piece.zero_()
        if how in (FILTER, LAYER):
            shape, axes = _filters(piece, module, name) if how == FILTER else (piece.shape, None)
            cut = piece.view(shape)
            cut.mul_(_ratio(weight.detach().to(piece.dtype).reshape(shape), cut, axes))
    _refuse_nothing(direction.name, vector)
    if how == UNIT:
        vector /= torch.linalg.vector_norm(vector, dtype=torch.float64).to(vector.dtype)
    return replace(direction, vector=vector, normalization=how or NONE)


def _filters(
    piece: Tensor, module: nn.Module, name: str
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return a shape to view a parameter in, and the axes inside of a filter; None for all."""
    shape = tuple(piece.shape)
    if piece.ndim < 2:
        return shape, None
    owner = module.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, _TRANSPOSED):  # (inputs, outputs / groups, ...)
        groups = owner.groups
        cut = (groups, shape[0] // groups, *shape[1:])
        return cut, (1, *range(3, len(cut)))
    if is_transposed(owner):  # (inputs, outputs)
        return shape, (0,)
    return shape, tuple(range(1, piece.ndim))


def _ratio(weight: Tensor, d: Tensor, axes: tuple[int, ...] | None) -> Tensor:
    """Return |w| / |d| over some axes, zero where d is."""
    wide = torch.float64
    target, own = (
        torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=wide) for x in (weight, d)
    )
    return torch.where(own > 0, target / own, 0.0).to(d.dtype)


def _refuse_nothing(name: str, vector: Tensor) -> None:
    length = float(torch.linalg.vector_norm(vector, dtype=torch.float64))
    if not math.isfinite(length):
        raise InputError(f"directions: {name!r} holds NaN or infinity; give finite numbers.")
    if length == 0:
        reason = (
            "random directions leave parameters of one dimension alone unless biases=True, and "
            "filters whose weights are zero are not moved"
            if name == RANDOM
            else "all its entries, or the weights that it is normalized by, are zero"
        )
        raise InputError(f"directions: {name!r} has length zero: {reason}.")


def _check_name(name: str) -> None:
    if name not in (RANDOM, GRADIENT) and not _TOP.fullmatch(name):
        known = ("top-1", "top-2", RANDOM, GRADIENT)
        raise InputError(
            f"directions: {name!r} is unknown; there are 'top-1', 'top-2' and so on for "
            "eigenvectors of the Hessian, 'random' and 'gradient'." + did_you_mean(name, known)
        )


def _moved(vector: Tensor, parameters: Parameters) -> Tensor:
    return vector.detach().to(parameters.device, parameters.dtype)


def _placed(named: Mapping[str, Tensor], parameters: Parameters) -> Tensor:
    """Return named tensors as one flat vector; parameters without a tensor are zero."""
    vector = torch.zeros(parameters.size, dtype=parameters.dtype, device=parameters.device)
    places = parameters.named(vector)
    for name, part in named.items():
        if name not in places:
            raise InputError(
                f"directions: {name!r} is no chosen parameter; they are named like "
                f"{parameters.names[0]!r}." + did_you_mean(str(name), parameters.names)
            )
        if part.shape != places[name].shape:
            raise InputError(
                f"directions: the tensor for {name!r} has shape {tuple(part.shape)}; the "
                f"parameter has {tuple(places[name].shape)}."
            )
        places[name].copy_(part.detach())
    return vector
