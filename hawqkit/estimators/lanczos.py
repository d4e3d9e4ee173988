"""The Lanczos recurrence for several starting vectors side by side, three vectors each.

Letters: n dimensions, b starting vectors, m steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.estimators.vectors import (
    inner_rows,
    multiply,
    norms,
    project_out,
    scale_rows,
)

Array = NDArray[np.float64]

# What rounding leaves of a vector that should vanish, in units of eps times the operator's scale.
BREAKDOWN = 32


@dataclass
class Lanczos:
    """b Lanczos recurrences `A v_j = beta_{j-1} v_{j-1} + alpha_j v_j + beta_j v_{j+1}`.

    It holds the vectors v_{j-1} and v_j of those that still run, and makes a third. Without
    reorthogonalization the later vectors lose orthogonality: nodes near eigenvalues that have
    converged then repeat with their weight shared among the copies, which moves no quadrature by
    more than rounding (Greenbaum 1989).

    A recurrence whose beta is rounding alone has exhausted its Krylov space; it ends there.

    Attributes:
        operator: A.
        current: (b, n) v_j of the running ones; starts as unit vectors.
        deflated: (d, n) orthonormal rows; A is replaced by its compression onto their complement.
        reorthogonalize: keep all vectors and make each new one orthogonal to them, twice.
        scale: largest |eigenvalue| that was deflated: what it leaves behind is rounding.
        previous: (b, n) v_{j-1}; zeros at the start.
        alphas: (b, j) so far, NaN after an end; all b recurrences, ended or not.
        betas: (b, j) so far, the last one is the length of the vector that comes next.
        running: (b,) which have not ended.
    """

    operator: SymmetricOperator
    current: Tensor
    deflated: Tensor
    reorthogonalize: bool = False
    scale: float = 0.0
    previous: Tensor = field(init=False)
    alphas: Array = field(init=False)
    betas: Array = field(init=False)
    running: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.current)
        self.previous = torch.zeros_like(self.current)
        self.alphas = np.empty((count, 0))
        self.betas = np.empty((count, 0))
        self.running = np.ones(count, dtype=bool)
        self._kept: list[Tensor] = []

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return int(self.alphas.shape[1])

    def advance(self) -> None:
        """Make one step: one product for each recurrence that still runs."""
        count = len(self.running)
        alpha, beta = np.full(count, np.nan), np.full(count, np.nan)
        if self.running.any():
            alpha[self.running], beta[self.running] = self._step()
        self.alphas = np.concatenate([self.alphas, alpha[:, None]], 1)
        self.betas = np.concatenate([self.betas, beta[:, None]], 1)
        ended = self.running & (np.nan_to_num(beta) <= self._vanishing())
        if ended.any():
            kept = torch.from_numpy(~ended[self.running])
            self.current = self.current[kept.to(self.current.device)]
            self.previous = self.previous[kept.to(self.current.device)]
            self._kept = [rows[kept.to(rows.device)] for rows in self._kept]
            self.running = self.running & ~ended

    def _step(self) -> tuple[Array, Array]:
        V = self.current
        W = multiply(self.operator, V)
        if self.reorthogonalize:
            self._kept.append(V.clone())
        project_out(W, self.deflated, passes=1)
        if self.steps:
            before = torch.from_numpy(self.betas[self.running, -1])
            scale_rows(self.previous, before)
            W.sub_(self.previous)
        alpha = inner_rows(V, W)
        self.previous.copy_(V)
        scale_rows(self.previous, alpha)
        W.sub_(self.previous)
        self.previous.copy_(V)
        if self.reorthogonalize:
            self._make_orthogonal(W)
        beta = norms(W)
        safe = torch.where(beta > 0, beta, torch.ones_like(beta))
        scale_rows(W, 1 / safe)
        self.current = W
        return alpha.numpy(), beta.numpy()

    def _make_orthogonal(self, W: Tensor) -> None:
        for _ in range(2):
            project_out(W, self.deflated, passes=1)
            for rows in self._kept:
                along = inner_rows(rows, W)
                W.sub_(rows * along.to(W.device, W.dtype)[:, None])

    def _vanishing(self) -> Array:
        """Return the length, recurrence by recurrence, that counts as zero."""
        entries = np.concatenate([self.alphas, self.betas], 1)
        scale = np.maximum(np.nan_to_num(np.abs(entries)).max(1), self.scale)
        eps = float(torch.finfo(self.current.dtype).eps)
        return np.asarray(BREAKDOWN * eps * scale, dtype=np.float64)
