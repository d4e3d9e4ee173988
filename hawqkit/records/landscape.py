"""The loss on a line or a plane through the weights, as it was measured. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from hawqkit.errors import InputError
from hawqkit.records.measured import Floats, Table, to_array
from hawqkit.records.schema import SCHEMA


@dataclass(frozen=True, slots=True)
class LandscapeAxis:
    """One direction d, and where along it the loss was measured.

    Attributes:
        name: `top-1`, `random`, `gradient`, `eigenvector 1`, or `given`.
        normalization: `none`, `filter`, `layer` or `unit`: what the length of d was made.
        length: |d|, the Euclidean distance in weight space that one unit of t is.
        positions: t of each point, rising; the weights there are w + t d.
        slope: g . d at the center, with g the gradient; None where it was not measured.
        eigenvalue: of the eigenvector that d was made from; None for any other direction.
        residual: an eigenvalue of that matrix lies within it of `eigenvalue`.
    """

    name: str
    normalization: str
    length: float
    positions: tuple[float, ...]
    slope: float | None = None
    eigenvalue: float | None = None
    residual: float | None = None


@dataclass(frozen=True, slots=True)
class Landscape:
    """Mean losses `L(w + t_1 d_1 + t_2 d_2)` on a grid, and the quadratic model at its center.

    Attributes:
        axes: one direction, or two.
        losses: `losses[i][j]` at t_1 = axes[0].positions[i], t_2 = axes[1].positions[j]; with one
            axis each row has one entry. None where the loss is no finite number.
        center: L(w).
        curvatures: `d_a' H d_b` with the Hessian H at the center; None where it was not measured.
        cosine: of the angle between the directions; None with one axis.
        objective: name of the loss.
        count: predictions that each loss is the mean of.
        size: n, the parameters that directions are over.
        seed: of random directions, and of the search for eigenvectors.
        passes: forward passes over the data.
        products: Hessian-vector products.
        model: name of the model, and the hash of its weights at the center.
        data_hash: of the batches.
        notes: what a reader must know.
    """

    axes: tuple[LandscapeAxis, ...]
    losses: Table
    center: float
    curvatures: tuple[tuple[float, ...], ...] | None
    cosine: float | None
    objective: str
    count: float
    size: int
    seed: int
    passes: int
    products: int
    model: str
    model_hash: str
    data_hash: str
    notes: tuple[str, ...] = ()
    schema: int = SCHEMA

    @property
    def dimensions(self) -> int:
        """1 for a line, 2 for a plane."""
        return len(self.axes)

    @property
    def values(self) -> Floats:
        """Losses as an array, (s_1,) or (s_1, s_2); NaN where the loss is no finite number."""
        grid = to_array(self.losses)
        return grid[:, 0] if self.dimensions == 1 else grid

    def positions(self, axis: int = 0) -> Floats:
        """Return t along an axis, (s,)."""
        return np.array(self.axes[axis].positions, dtype=np.float64)

    def quadratic(self, *t: ArrayLike) -> Floats:
        """Return the quadratic model `L + sum_a t_a g . d_a + 1/2 sum_ab t_a t_b d_a' H d_b`.

        Along a unit eigenvector at a minimum it is `L + lambda t^2 / 2`.

        Args:
            t: one number or array for each axis; they are broadcast.

        Raises:
            InputError: slopes and curvatures were not measured, or another number of arguments.
        """
        if self.curvatures is None:
            raise InputError(
                "quadratic: slopes and curvatures were not measured; take the landscape with "
                "quadratic=True."
            )
        if len(t) != self.dimensions:
            raise InputError(f"quadratic: the landscape has {self.dimensions} axes; got {len(t)}.")
        places = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in t))
        total = np.full(places[0].shape, self.center)
        for axis, place, row in zip(self.axes, places, self.curvatures, strict=True):
            total += (axis.slope or 0.0) * place
            for other, curvature in zip(places, row, strict=True):
                total += curvature * place * other / 2
        return total

    @property
    def quadratic_values(self) -> Floats:
        """The quadratic model at every point that was measured, in the shape of `values`.

        Raises:
            InputError: slopes and curvatures were not measured.
        """
        grid = np.meshgrid(*(self.positions(a) for a in range(self.dimensions)), indexing="ij")
        return self.quadratic(*grid)
