"""One thick-restart block Lanczos run: a basis, its projected matrix, its Ritz pairs.

Letters: n dimensions, m basis vectors (rows), b rows of a block, d deflated rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.estimators.lanczos import BREAKDOWN
from hawqkit.estimators.probes import draw_probes
from hawqkit.estimators.vectors import (
    combine_in_place,
    multiply,
    norms,
    project_out,
    scale_rows,
    working_dtype,
)

Array = NDArray[np.float64]
Order = Callable[[Array], NDArray[np.int64]]  # Ritz values -> their places, the best first


@dataclass
class Ritz:
    """Ritz values of the present basis with the residual bounds of their vectors."""

    values: Array
    residuals: Array
    vectors: Array  # (m, m), in coordinates of the basis
    order: NDArray[np.int64]

    @property
    def scale(self) -> float:
        """Largest |Ritz value|."""
        return float(np.abs(self.values).max())


class Krylov:
    """A V = V T + F: rows of V orthonormal to each other and to what is deflated, T = V' A V whole.

    All of T's new columns are computed by the full orthogonalization, so a restart needs no special
    shape of T: the Ritz vectors that are kept and the next block go on as any other basis (Wu and
    Simon 2000). Where a block loses rank, the Krylov space is invariant; random rows take the place
    of what vanished, with zeros in T.

    Args:
        operator: A.
        capacity: rows that the basis may hold.
        block: b.
        deflated: (d, n) orthonormal rows that the basis stays orthogonal to.
        generator: of starting rows.
        order: which Ritz values are wanted.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        capacity: int,
        block: int,
        deflated: Tensor,
        generator: torch.Generator,
        order: Order,
    ) -> None:
        self._operator, self._deflated, self._generator = operator, deflated, generator
        self._order = order
        self._dtype = working_dtype(operator)
        self._room = operator.size - len(deflated)  # dimensions of the complement
        self.capacity = min(capacity, self._room)
        self._block = min(block, self.capacity)
        self._rows = torch.empty(
            self.capacity, operator.size, device=operator.device, dtype=self._dtype
        )
        self._T = np.zeros((self.capacity, self.capacity))
        self._outside = np.zeros((len(deflated), self.capacity))  # what A V has along the deflated
        self._filled = 0
        self._next = self._random_rows(self._block, self._rows[:0])
        self._coupling = np.zeros((self._block, 0))  # F in terms of the next rows
        self.ritz: Ritz | None = None
        self.steps = 0  # blocks that were multiplied

    @property
    def next_cost(self) -> int:
        """Products that `extend` will make."""
        return len(self._next)

    @property
    def whole(self) -> bool:
        """Whether the basis spans all that there is: the Ritz pairs are then eigenpairs."""
        return self._filled == self._room

    def extend(self) -> Ritz:
        """Take up the next block, multiply it, and return the Ritz pairs."""
        self.steps += 1
        start, stop = self._filled, self._filled + len(self._next)
        self._rows[start:stop] = self._next
        self._filled = stop
        W = multiply(self._operator, self._rows[start:stop])
        self._outside[:, start:stop] = project_out(W, self._deflated).numpy()
        H = project_out(W, self._rows[:stop]).numpy()  # (m, b)
        self._T[:stop, start:stop] = H
        self._T[start:stop, :stop] = H.T
        square = self._T[start:stop, start:stop]
        self._T[start:stop, start:stop] = (square + square.T) / 2
        self._next, self._coupling = self._orthonormalize(W)
        theta, S = np.linalg.eigh(self._T[:stop, :stop])
        along = self._coupling @ S[start:stop]  # (b', m)
        leaking = self._outside[:, :stop] @ S
        residuals = np.sqrt((along**2).sum(0) + (leaking**2).sum(0))
        self.ritz = Ritz(theta, residuals, S, self._order(theta))
        return self.ritz

    def restart_if_full(self, wanted: int) -> None:
        """Shrink the basis to the best Ritz vectors where the next block would not fit."""
        if self._filled + len(self._next) <= self.capacity:
            return
        assert self.ritz is not None
        most = self.capacity - 2 * len(self._next)
        keep = max(wanted, min(most, wanted + (self.capacity - wanted) // 2))
        picked = self.ritz.order[:keep]
        S = self.ritz.vectors[:, picked]
        combine_in_place(self._rows, torch.from_numpy(S), self._filled)
        self._outside[:, :keep] = self._outside[:, : self._filled] @ S
        self._T[:] = 0
        self._T[np.arange(keep), np.arange(keep)] = self.ritz.values[picked]
        self._filled = keep

    def take(self, count: int) -> tuple[Array, Array, Tensor]:
        """Return values, residuals and vectors (rows) of the best pairs; the basis is used up."""
        assert self.ritz is not None
        picked = self.ritz.order[:count]
        S = torch.from_numpy(self.ritz.vectors[:, picked])
        combine_in_place(self._rows, S, self._filled)
        rows = self._rows[: len(picked)].clone()
        self._rows = self._rows[:0]
        return self.ritz.values[picked], self.ritz.residuals[picked], rows

    def _orthonormalize(self, W: Tensor) -> tuple[Tensor, Array]:
        """Return orthonormal rows Q and R, (b', b), with W' = Q' R; fill up what lost its rank."""
        basis = self._rows[: self._filled]
        limit = min(self._block, self._room - self._filled)
        scale = np.abs(self._T[: self._filled, : self._filled]).max(initial=0.0)
        tiny = BREAKDOWN * float(torch.finfo(self._dtype).eps) * scale
        Q, columns = W[:0], []
        for i in range(len(W)):
            w = W[i : i + 1]
            coefficients = project_out(w, Q)[:, 0]
            length = float(norms(w)[0])
            column = np.zeros(len(W) + self._block)
            column[: len(Q)] = coefficients.numpy()
            columns.append(column)
            if length <= tiny or len(Q) >= limit:
                continue
            column[len(Q)] = length
            scale_rows(w, torch.tensor([1 / length], dtype=torch.float64))
            # A short remainder still holds rounding along the basis, which is now as long as it.
            project_out(w, basis, passes=1)
            project_out(w, self._deflated, passes=1)
            scale_rows(w, 1 / norms(w))
            Q = torch.cat([Q, w])
        found = len(Q)
        if found < limit:
            Q = torch.cat([Q, self._random_rows(limit - found, torch.cat([basis, Q]))])
        R = np.zeros((len(Q), len(W)))
        R[:found] = np.stack(columns, 1)[:found]
        return Q, R

    def _random_rows(self, count: int, basis: Tensor) -> Tensor:
        """Return orthonormal random rows, orthogonal to the basis and to what is deflated."""
        rows = draw_probes(
            self._operator.size,
            count,
            "gaussian",
            self._generator,
            device=self._operator.device,
            dtype=self._dtype,
        )
        for i in range(count):
            row = rows[i : i + 1]
            scale_rows(row, 1 / norms(row))
            for _ in range(3):  # the complement may be one dimension of many
                for known in (self._deflated, basis, rows[:i]):
                    project_out(row, known, passes=1)
                scale_rows(row, 1 / norms(row))
        return rows
