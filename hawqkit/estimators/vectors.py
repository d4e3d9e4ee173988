"""Arithmetic on long vectors, stored as rows: sums run in float64, vectors keep their own dtype.

Letters: n entries of a vector, b and m counts of vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator

# Entries that are summed in the vectors' own dtype before float64 takes over: few enough that
# float32 sums stay good to about 1e-6, many enough that a product runs at full speed.
CHUNK = 1 << 16


def working_dtype(operator: SymmetricOperator) -> torch.dtype:
    """Return the dtype of basis vectors: the operator's, but float32 at least."""
    return torch.promote_types(operator.dtype, torch.float32)


def multiply(operator: SymmetricOperator, rows: Tensor) -> Tensor:
    """Return A applied to each row, (b, n), in the rows' dtype, as memory of its own."""
    product = operator.matvec(rows[0])[None] if len(rows) == 1 else operator.matmat(rows.T).T
    return torch.clone(product.to(rows.dtype), memory_format=torch.contiguous_format)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Return all inner products of rows, (m, b), float64 on the CPU.

    Args:
        left: (m, n).
        right: (b, n).
    """
    if left.dtype == torch.float64:
        return (left @ right.T).cpu()
    parts = [
        left[:, i : i + CHUNK] @ right[:, i : i + CHUNK].T for i in range(0, left.shape[1], CHUNK)
    ]
    return torch.stack(parts).to("cpu", torch.float64).sum(0)


def inner_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner product of each row with its partner, (b,), float64 on the CPU."""
    parts = [
        torch.linalg.vecdot(left[:, i : i + CHUNK], right[:, i : i + CHUNK])
        for i in range(0, left.shape[1], CHUNK)
    ]
    return torch.stack(parts).to("cpu", torch.float64).sum(0)


def norms(rows: Tensor) -> Tensor:
    """Return the length of each row, (b,), float64 on the CPU."""
    return inner_rows(rows, rows).sqrt()


def subtract(rows: Tensor, coefficients: Tensor, basis: Tensor) -> None:
    """Subtract `coefficients' basis` from rows in place.

    Args:
        rows: (b, n).
        coefficients: (m, b).
        basis: (m, n).
    """
    rows.addmm_(coefficients.T.to(rows.device, rows.dtype), basis, alpha=-1)


def project_out(rows: Tensor, basis: Tensor, *, passes: int = 2) -> Tensor:
    """Make rows orthogonal to an orthonormal basis in place and return the coefficients, (m, b).

    Two passes: after one, what is left of the basis is as large as the rounding of what was removed
    (Kahan and Parlett: twice is enough).
    """
    total = torch.zeros(len(basis), len(rows), dtype=torch.float64)
    if len(basis):
        for _ in range(passes):
            coefficients = inner(basis, rows)
            subtract(rows, coefficients, basis)
            total += coefficients
    return total


def scale_rows(rows: Tensor, factors: Tensor) -> None:
    """Multiply each row by its factor in place."""
    rows.mul_(factors.to(rows.device, rows.dtype)[:, None])


def combine_in_place(basis: Tensor, coefficients: Tensor, count: int) -> None:
    """Replace the first k rows by `coefficients' basis`, without a second basis in memory.

    Args:
        basis: (m, n); its first `count` rows are used.
        coefficients: (count, k), k <= count.
        count: rows that are combined.
    """
    turned = coefficients.T.to(basis.device, basis.dtype)  # (k, count)
    for i in range(0, basis.shape[1], CHUNK):
        basis[: len(turned), i : i + CHUNK] = turned @ basis[:count, i : i + CHUNK]
