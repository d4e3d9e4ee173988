"""Trace estimators that sketch the range of an operator: Hutch++ and XTrace.

Both grow: a larger sketch keeps all products of the smaller one. Vectors are rows.
Letters: n dimensions, k rows of the sketch, b new ones.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.estimators.probes import draw_probes
from hawqkit.estimators.vectors import (
    inner,
    inner_rows,
    multiply,
    norms,
    project_out,
    scale_rows,
    working_dtype,
)

Array = NDArray[np.float64]


class RangeBasis:
    """An orthonormal basis Q of span(A omega_1, A omega_2, ...), one row a vector.

    Attributes:
        rows: (k, n) Q.
        R: (k, k) upper triangular, float64: `A omega_i = sum_j R[j, i] Q_j`.
        full: a product of a random vector lay in the span of those before it, so the span holds the
            whole range of A.
    """

    def __init__(self, operator: SymmetricOperator) -> None:
        self._dtype = working_dtype(operator)
        self.rows = torch.empty(0, operator.size, device=operator.device, dtype=self._dtype)
        self.R = torch.zeros(0, 0, dtype=torch.float64)
        self.full = False

    def extend(self, Y: Tensor) -> Tensor:
        """Take up the products Y, (b, n), which are overwritten; return the new rows of Q."""
        # Rounding of a product leaves a few eps of its length outside of the range.
        smallest = 100 * torch.finfo(self._dtype).eps
        old = len(self.rows)
        for y in Y:
            y = y[None]
            length = float(norms(y)[0])
            coefficients = project_out(y, self.rows)[:, 0]
            left = float(norms(y)[0])
            if left <= smallest * length:
                self.full = True
                break
            scale_rows(y, torch.tensor([1 / left], dtype=torch.float64))
            project_out(y, self.rows, passes=1)
            self.rows = torch.cat([self.rows, y])
            grown = torch.zeros(len(self.rows), len(self.rows), dtype=torch.float64)
            grown[:-1, :-1] = self.R
            grown[:-1, -1] = coefficients
            grown[-1, -1] = left
            self.R = grown
        return self.rows[old:]


class XTrace:
    """XTrace (Epperly, Tropp and Webber 2024, section 2): leave one probe out, average.

    With Q_i a basis of the products of all probes but i, and P_i its projector,
    `t_i = tr(Q_i' A Q_i) + a_i w_i' (1 - P_i) A (1 - P_i) w_i`, where for spherical probes
    `a_i = (n - k + 1) / |(1 - P_i) w_i|^2` puts what is left of the probe back on its sphere.
    """

    name = "xtrace"
    price = 2

    def __init__(self, operator: SymmetricOperator, kind: str, generator: torch.Generator) -> None:
        self._operator, self._kind, self._generator = operator, kind, generator
        self._basis = RangeBasis(operator)
        self._probes = self._basis.rows
        self._image = self._basis.rows  # A Q, row by row
        self._own: list[float] = []  # w_i' A w_i
        self.products = 0

    @property
    def samples(self) -> int:
        """Probes so far, k."""
        return len(self._probes)

    @property
    def exhausted(self) -> bool:
        """Whether more probes would add nothing."""
        return self._basis.full or self.samples >= self._operator.size

    def extend(self, count: int) -> None:
        """Add probes, at two products each."""
        count = min(count, self._operator.size - self.samples)
        V = _draw(self._operator, count, self._kind, self._generator)
        Y = multiply(self._operator, V)
        own = inner_rows(V, Y).tolist()
        new = self._basis.extend(Y)
        self.products += count + len(new)
        self._own += own[: len(new)]
        self._probes = torch.cat([self._probes, V[: len(new)]])
        if len(new):
            self._image = torch.cat([self._image, multiply(self._operator, new)])

    def estimates(self) -> tuple[Array, bool]:
        """Return the estimates that each leave one probe out, and whether they are exact."""
        Q, R = self._basis.rows, self._basis.R
        H = inner(Q, self._image)
        H = (H + H.T) / 2
        if self.exhausted:
            return np.array([float(torch.trace(H))]), True
        W = inner(Q, self._probes)  # (k, k), a column a probe
        S = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype), upper=True).T
        S = S / S.norm(dim=0)  # the direction of Q that only product i spans
        X = W - S * (S * W).sum(0)
        rest = torch.tensor(self._own, dtype=R.dtype) - 2 * (X * R).sum(0) + (X * (H @ X)).sum(0)
        if self._kind == "spherical":
            n = self._operator.size
            rest = rest * (n - len(R) + 1) / (n - (X**2).sum(0))
        return (torch.trace(H) - (S * (H @ S)).sum(0) + rest).numpy(), False


class HutchPlusPlus:
    """Hutch++ (Meyer, Musco, Musco and Woodruff 2021): `tr(Q' A Q)` plus Hutchinson on the rest.

    The rest of a probe g needs no product beyond A g and A Q, so both parts can grow:
    `g' (1 - QQ') A (1 - QQ') g = g'Ag - 2 c'Q'Ag + c'Hc` with `c = Q'g` and `H = Q'AQ`.
    """

    name = "hutch++"
    price = 3

    def __init__(self, operator: SymmetricOperator, kind: str, generator: torch.Generator) -> None:
        self._operator, self._kind, self._generator = operator, kind, generator
        self._basis = RangeBasis(operator)
        self._image = self._basis.rows
        self._probes, self._products_of = self._basis.rows, self._basis.rows
        self.products = 0

    @property
    def samples(self) -> int:
        """Probes of the rest so far."""
        return len(self._probes)

    @property
    def exhausted(self) -> bool:
        """Whether the sketch holds the whole range."""
        return self._basis.full or len(self._basis.rows) >= self._operator.size

    def extend(self, count: int) -> None:
        """Add rows to the sketch and probes of the rest, at three products each."""
        sketch = min(count, self._operator.size - len(self._basis.rows))
        V = _draw(self._operator, sketch, self._kind, self._generator)
        new = self._basis.extend(multiply(self._operator, V))
        self.products += sketch + len(new)
        if len(new):
            self._image = torch.cat([self._image, multiply(self._operator, new)])
        if self.exhausted:
            return
        V = _draw(self._operator, count, self._kind, self._generator)
        self._probes = torch.cat([self._probes, V])
        self._products_of = torch.cat([self._products_of, multiply(self._operator, V)])
        self.products += count

    def estimates(self) -> tuple[Array, bool]:
        """Return one estimate a probe of the rest, and whether they are exact."""
        Q = self._basis.rows
        H = inner(Q, self._image)
        H = (H + H.T) / 2
        if self.exhausted:
            return np.array([float(torch.trace(H))]), True
        C, QAG = inner(Q, self._probes), inner(Q, self._products_of)  # (k, probes)
        rest = inner_rows(self._probes, self._products_of) - 2 * (C * QAG).sum(0)
        return (torch.trace(H) + rest + (C * (H @ C)).sum(0)).numpy(), False


def _draw(operator: SymmetricOperator, count: int, kind: str, generator: torch.Generator) -> Tensor:
    return draw_probes(
        operator.size,
        count,
        kind,
        generator,
        device=operator.device,
        dtype=working_dtype(operator),
    )
