"""Dense symmetric matrices with known eigenvalues in a random basis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = Sequence[float] | NDArray[np.float64]


def rotated(values: Values, seed: int = 0) -> Tensor:
    """Return Q diag(values) Q', (n, n) float64, Q a random orthogonal matrix."""
    eigenvalues = torch.tensor(np.asarray(values, dtype=np.float64))
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def projector(n: int, r: int, seed: int = 0) -> Tensor:
    """Return an orthogonal projector of rank r, (n, n)."""
    return rotated([1.0] * r + [0.0] * (n - r), seed)
