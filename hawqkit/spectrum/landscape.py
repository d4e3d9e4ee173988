"""The loss on a line or a plane through the weights, beside the quadratic model at its center.

Letters in shapes: n chosen parameters, a axes (1 or 2), P points of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit.curvature.data import Batches, to_device
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import ModelOperator, refuse_unknown
from hawqkit.curvature.parameters import HALF, Parameters, choose_parameters
from hawqkit.distributed import broadcast, gather, processes, reduce_sum
from hawqkit.errors import InputError, NumericalError, Unsupported, did_you_mean
from hawqkit.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hawqkit.estimators.vectors import working_dtype
from hawqkit.models.model import LoadedModel
from hawqkit.records.landscape import Landscape, LandscapeAxis
from hawqkit.records.measured import to_table
from hawqkit.spectrum.directions import (
    AUTO,
    GRADIENT,
    NORMALIZATIONS,
    UNIT,
    Direction,
    Wanted,
    eigen_direction,
    make_direction,
    normalize_direction,
    rank_of,
    read_wishes,
)
from hawqkit.spectrum.gradient import mean_gradient, refuse_uncounted
from hawqkit.spectrum.identity import batches_identity, model_identity
from hawqkit.spectrum.serving import served

# Relative residual of eigenvectors: what is left of the neighboring ones changes no picture.
TOLERANCE = 1e-4
# |sine| of the angle between two directions below which they span no plane.
PARALLEL = 1e-6


def loss_landscape(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    *,
    directions: Wanted | Sequence[Wanted] = ("top-1", "top-2"),
    steps: int | Sequence[int] = 21,
    distance: float | Sequence[float] = 1.0,
    normalize: str | None = AUTO,
    biases: bool = False,
    quadratic: bool = True,
    seed: int = 0,
    parameters: Iterable[str | nn.Parameter] | None = None,
) -> Landscape:
    """Measure the mean loss on a line or a plane through the weights.

    `L(w + t_1 d_1 + t_2 d_2)`, t from -distance to distance, each a sum over all batches divided
    once by the number of counted predictions. Beside it stands the quadratic model at the center,
    `L + t'D'g + 1/2 t'D'H D t`, from one gradient and a Hessian-vector product for each direction;
    along a unit eigenvector its second term is `lambda t^2 / 2`.

    Random directions follow Li et al. 2018 (Visualizing the loss landscape of neural nets): normal
    numbers, every filter at the norm of the weights' own filter, biases and the parameters of norm
    layers left alone. The weights are the same storage with the same bits afterwards, whatever ends
    the measurement.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        directions: one for a line, two for a plane. Each is `top-k`, the Hessian's eigenvector of
            k-th largest magnitude; `random`; `gradient`, at unit length; a flat tensor (n,); a
            mapping name -> tensor, in which the other parameters are zero; or `Eigenpairs`, whose
            first vector it is. `Eigenpairs` alone, or a tensor (n, 2), make a plane.
        steps: points along each direction, or a pair; with an odd number the center is one.
        distance: of the outermost points, in units of each direction's length, or a pair.
        normalize: `filter`, `layer`, `unit` or None for both directions; `auto` is `filter` for
            random ones and None, as they come, for others. See `normalize_direction`.
        biases: whether random directions move parameters of one dimension, too.
        quadratic: whether slopes and curvatures are measured.
        seed: of random directions and of the search for eigenvectors.
        parameters: as for `hessian`; what is not chosen is not moved.

    Returns:
        the record, in every process.

    Raises:
        InputError: a direction is unknown, has another shape, or length zero; two are parallel.
        Unsupported: the model is in training mode, or cannot be differentiated twice.
        NumericalError: the loss at the center is no finite number.
        DataError: no prediction counts.

    >>> from hawqkit.curvature.objective import squared_error
    >>> net = nn.Linear(1, 1, bias=False).eval()
    >>> data = [(torch.tensor([[2.0]]), 2.0 * net.weight.detach())]  # 1/2 (2 w - y)^2, at its least
    >>> found = loss_landscape(net, squared_error(), data, directions="top-1", steps=3)
    >>> found.values.round(4).tolist(), round(found.axes[0].eigenvalue, 4)
    ([2.0, 0.0, 2.0], 4.0)
    """
    run = _Run(model, objective, batches, parameters, seed)
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise InputError(
            f"normalize: {normalize!r} is unknown; allowed are {', '.join(NORMALIZATIONS)} and "
            "None." + did_you_mean(str(normalize), NORMALIZATIONS)
        )
    wishes = read_wishes(directions)
    grids = _grids(steps, distance, len(wishes))
    found = run.directions(wishes)
    found = [normalize_direction(d, run.module, run.parameters, normalize, biases) for d in found]
    D = broadcast(torch.stack([d.vector for d in found], 1).contiguous())  # (n, a)
    cosine = _cosine(D)
    run.derive(D, quadratic)
    return run.record(_distinct(found), D, grids, cosine)


class _Run:
    """One landscape: the problem, and what was found of it so far."""

    def __init__(
        self,
        model: nn.Module | LoadedModel,
        objective: Objective,
        batches: Iterable[Any],
        parameters: Iterable[str | nn.Parameter] | None,
        seed: int,
    ) -> None:
        # The operator checks objective, batches and mode; without products it costs nothing.
        self.operator: ModelOperator = hessian(model, objective, batches, parameters=parameters)
        self.module = refuse_unknown(model)
        self.parameters = choose_parameters(model, parameters)
        self.model, self.objective, self.seed = model, objective, seed
        self.source, self.batches = batches, Batches(batches)
        self.gradient: Tensor | None = None
        self.slopes: list[float] | None = None
        self.curvatures: tuple[tuple[float, ...], ...] | None = None
        self.passes, self.count = 0, 0.0
        self.notes: list[str] = []

    def directions(self, wishes: Sequence[Any]) -> list[Direction]:
        """Return the directions as they come, before they are normalized."""
        k = max(map(rank_of, wishes))
        if k > self.operator.size:
            raise InputError(
                f"directions: 'top-{k}' was asked, the chosen parameters have "
                f"{self.operator.size} dimensions."
            )
        made: list[Direction | None] = [
            None if rank_of(wish) or wish == GRADIENT
            else make_direction(wish, self.parameters, self.seed, place)
            for place, wish in enumerate(wishes)
        ]  # fmt: skip
        pairs = self._eigenpairs(k) if k else None
        found = []
        for wish, direction in zip(wishes, made, strict=True):
            if direction is None and rank_of(wish):
                assert pairs is not None
                direction = _upright(eigen_direction(pairs, rank_of(wish) - 1, self.parameters))
            found.append(direction or self._along_gradient())
        return found

    def derive(self, D: Tensor, wanted: bool) -> None:
        """Measure slopes `D'g` and curvatures `D'H D`."""
        if not wanted:
            return
        try:
            HD = self.operator.matmat(D)  # (n, a)
        except (Unsupported, NumericalError) as error:
            raise type(error)(
                f"{error} The landscape itself needs no derivatives: take it with quadratic=False."
            ) from error
        wide = D.to(torch.float64)
        C = wide.T @ HD.to(torch.float64)
        self.curvatures = tuple(map(tuple, ((C + C.T) / 2).tolist()))
        self.slopes = (wide.T @ self._gradient().to(torch.float64)).tolist()

    def record(
        self,
        found: Sequence[Direction],
        D: Tensor,
        grids: Sequence[tuple[float, ...]],
        cosine: float | None,
    ) -> Landscape:
        """Measure the losses and put everything together."""
        origin = (0.0,) * len(grids)
        points = list(product(*grids))
        wanted = points if origin in points else [*points, origin]
        losses = dict(zip(wanted, self._losses(D, wanted), strict=True))
        if not math.isfinite(losses[origin]):
            raise NumericalError(
                f"the loss at the center is {losses[origin]}; check inputs and labels, or run the "
                "model in float32 if half precision overflows."
            )
        table = np.array([losses[point] for point in points]).reshape(len(grids[0]), -1)
        self._say(table)
        name, digest = model_identity(self.model)
        axes = tuple(
            LandscapeAxis(
                d.name, d.normalization, float(torch.linalg.vector_norm(v, dtype=torch.float64)),
                grid, self.slopes[a] if self.slopes else None, d.eigenvalue, d.residual,
            )
            for a, (d, v, grid) in enumerate(zip(found, D.T, grids, strict=True))
        )  # fmt: skip
        return Landscape(
            axes, to_table(table), losses[origin], self.curvatures, cosine, self.objective.name,
            self.count, self.operator.size, self.seed, self.passes, self.operator.products, name,
            digest, batches_identity(self.source), tuple(dict.fromkeys(self.notes)),
        )  # fmt: skip

    def _say(self, table: np.ndarray[Any, np.dtype[np.float64]]) -> None:
        """Note what a reader of the record must know."""
        bad = int((~np.isfinite(table)).sum())
        if bad:
            self.notes.append(f"at {bad} of {table.size} points the loss is no finite number.")
        if any(t.dtype in HALF for t in self.parameters.tensors):
            self.notes.append("the model is in half precision, so moved weights are rounded to it.")
        self.notes.extend(self.operator.notes)

    def _losses(self, D: Tensor, points: Sequence[tuple[float, ...]]) -> list[float]:
        """Return the mean loss at every point."""
        device = self.parameters.device
        sums = torch.zeros(len(points), 2, dtype=torch.float64)
        with torch.no_grad(), displaced(self.parameters, D) as move:
            for row, point in zip(sums, points, strict=True):
                move(point)
                for _, _, batch in processes().mine(self.batches):
                    batch = to_device(batch, device)
                    z = self.objective.outputs(self.module, batch)
                    total, count = self.objective.loss(z, batch)
                    row += torch.tensor([float(total), float(count)], dtype=torch.float64)
        self.passes += len(points)
        if processes().count > 1:
            sums = reduce_sum(sums.to(device)).cpu()
        self.count = refuse_uncounted(float(sums[0, 1]))
        means: list[float] = (sums[:, 0] / sums[:, 1]).tolist()
        return means

    def _gradient(self) -> Tensor:
        """Return the gradient of the mean loss, (n,), measured once."""
        if self.gradient is None:
            self.gradient = mean_gradient(
                self.module, self.objective, self.batches, self.parameters
            )
            self.passes += 1
        return self.gradient

    def _along_gradient(self) -> Direction:
        gradient = self._gradient()
        length = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        if not 0 < float(length) < math.inf:
            raise InputError(
                f"directions: the gradient has length {float(length)}, so it is no direction; "
                "take 'random' or an eigenvector."
            )
        return Direction(GRADIENT, gradient / length.to(gradient.dtype), UNIT)

    def _eigenpairs(self, k: int) -> Eigenpairs:
        """Return the top k pairs, found by the main process with products of all."""
        pairs: Eigenpairs | None = None
        with served({"H": self.operator}) as operators:
            if processes().is_main:
                pairs = top_eigenpairs(operators["H"], k, tolerance=TOLERANCE, seed=self.seed)
        if processes().count > 1:
            pairs = _shared(pairs, self.operator, k)
        assert pairs is not None
        if pairs.note:
            self.notes.extend(pairs.note.split("; "))
        return pairs


@contextmanager
def displaced(parameters: Parameters, D: Tensor) -> Iterator[Callable[[Sequence[float]], None]]:
    """Give a function that sets the weights to `w + D t`; afterwards they are w, bit for bit.

    The weights lie in memory of their own while they are moved: the model's own storage is never
    written to, so nothing has to be copied back, and an interruption can lose nothing.

    Args:
        parameters: what is moved.
        D: (n, a).
    """
    originals = [p.data for p in parameters.tensors]
    moved = [torch.empty_like(original) for original in originals]
    columns = [list(parameters.named(d).values()) for d in D.T]

    def move(t: Sequence[float]) -> None:
        for i, parameter in enumerate(parameters.tensors):
            if not any(t):
                parameter.data = originals[i]
                continue
            # Sums run in the directions' dtype, so that half precision rounds once.
            total = originals[i].to(parameters.dtype, copy=True)
            for share, pieces in zip(t, columns, strict=True):
                total.add_(pieces[i], alpha=share)
            parameter.data = moved[i].copy_(total)

    try:
        yield move
    finally:
        for parameter, original in zip(parameters.tensors, originals, strict=True):
            parameter.data = original


def _grids(
    steps: int | Sequence[int], distance: float | Sequence[float], axes: int
) -> list[tuple[float, ...]]:
    """Return the positions along each axis; the middle one of an odd number is 0 exactly."""
    counts = _each("steps", steps, axes)
    reaches = _each("distance", distance, axes)
    for count, reach in zip(counts, reaches, strict=True):
        if count != int(count) or count < 2:
            raise InputError(f"steps: must be a whole number of at least 2; got {count}.")
        if not 0 < reach < math.inf:
            raise InputError(f"distance: must be a positive number; got {reach}.")
    return [
        tuple(reach * (2 * i - (count - 1)) / (count - 1) for i in range(int(count)))
        for count, reach in zip(counts, reaches, strict=True)
    ]


def _each(name: str, given: float | Sequence[float], axes: int) -> list[float]:
    """Return a number for each axis, from one for all or from as many."""
    found = [float(x) for x in given] if isinstance(given, Sequence) else [float(given)] * axes
    if len(found) != axes:
        raise InputError(
            f"{name}: {len(found)} numbers came for {axes} directions; give one, or one for each."
        )
    return found


def _cosine(D: Tensor) -> float | None:
    """Return the cosine between two directions, and refuse two that are parallel."""
    if D.shape[1] == 1:
        return None
    u, v = (d / torch.linalg.vector_norm(d) for d in D.to(torch.float64).T)
    cosine = float(u @ v)
    if float(torch.linalg.vector_norm(v - cosine * u)) < PARALLEL:
        raise InputError(
            "directions: the two are parallel, so they span no plane; give two different ones, or "
            "one for a line."
        )
    return cosine


def _upright(direction: Direction) -> Direction:
    """Give an eigenvector the sign that makes its largest entry positive: its own is arbitrary."""
    vector = direction.vector
    return replace(direction, vector=vector * vector[vector.abs().argmax()].sign())


def _distinct(found: Sequence[Direction]) -> list[Direction]:
    """Number directions of the same name."""
    if len({d.name for d in found}) == len(found):
        return list(found)
    return [replace(d, name=f"{d.name} {i}") for i, d in enumerate(found, 1)]


def _shared(pairs: Eigenpairs | None, operator: ModelOperator, k: int) -> Eigenpairs:
    """Return the main process's pairs, to all of them."""
    nothing = torch.empty(0, k)
    known: Eigenpairs = gather(None if pairs is None else replace(pairs, vectors=nothing))[0]
    if pairs is None:
        dtype = working_dtype(operator)
        vectors = torch.empty(operator.size, k, dtype=dtype, device=operator.device)
    else:
        vectors = pairs.vectors.contiguous()
    return replace(known, vectors=broadcast(vectors))
