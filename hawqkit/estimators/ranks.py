"""Rank and degeneracy of an operator: dense where it is small, else by pairs and quadrature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.densities import density
from hawqkit.estimators.effective_ranks import ranks_of, statistics_of
from hawqkit.estimators.eigenpair_files import read_eigenpairs, save_eigenpairs
from hawqkit.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hawqkit.estimators.noise import noise_floor
from hawqkit.estimators.vectors import inner_rows, multiply, norms, subtract
from hawqkit.records.density import Density
from hawqkit.records.spectral import Ranks, RankStatistics
from hawqkit.store import fingerprint

Source = SymmetricOperator | Tensor | Callable[[Tensor], Tensor]

DENSE_UP_TO = 2048
# Deflation needs good vectors, not good values: what a residual of r leaves behind is of size r.
TOLERANCE = 1e-4
PAIRS = "eigenpairs.safetensors"


def deflated_density(
    source: Source,
    *,
    top: int = 20,
    steps: int = 60,
    draws: int = 10,
    dense_up_to: int = DENSE_UP_TO,
    seed: int = 0,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Density:
    """Measure a spectrum for counting: the top of it one by one, the rest by quadrature.

    Ritz values are never counted as they are: one starting vector sees a multiple eigenvalue once.
    The largest |lambda| are found with residual bounds and copies, taken out, and the draws live in
    what is left. Small operators are multiplied out and solved densely: all eigenvalues are known.

    Args:
        source: an operator or a dense matrix.
        top: eigenpairs that are found first; 0 for none.
        steps: Lanczos steps of each draw.
        draws: starting vectors.
        dense_up_to: largest n that is solved densely, in float64.
        seed: of everything.
        folder: keeps eigenpairs and draws; see `density`.
        facts: what the operator depends on.

    Raises:
        InputError: a count is out of its range.
        StateMismatch: the folder is of another run.
    """
    operator = as_operator(source)
    if top < 0:
        raise InputError(f"top: must be 0 or more; got {top}.")
    if operator.size <= dense_up_to:
        return dense_spectrum(operator, seed=seed)
    pairs = None
    if top:
        pairs = _kept_pairs(operator, min(top, operator.size), seed, folder, facts or {})
    return density(
        operator, steps=steps, draws=draws, seed=seed, deflated=pairs, folder=folder, facts=facts
    )


def dense_spectrum(source: Source, *, seed: int = 0) -> Density:
    """Return all eigenvalues of an operator, by n products and a dense solver in float64.

    Args:
        source: an operator or a dense matrix.
        seed: kept in the record; nothing is drawn.
    """
    operator = as_operator(source)
    A = operator.dense().to("cpu", torch.float64)
    values = np.linalg.eigvalsh(((A + A.T) / 2).numpy())[::-1].copy()

    return Density(
        alphas=np.empty((0, 0)),
        betas=np.empty((0, 0)),
        complete=np.empty(0, dtype=bool),
        size=operator.size,
        known=values,
        known_residuals=np.zeros(len(values)),
        seed=seed,
        products=operator.size,
        note="; ".join(operator.notes),
    )


def rank(
    source: Source,
    eps: float | Sequence[float],
    *,
    relative: bool = False,
    top: int = 20,
    steps: int = 60,
    draws: int = 10,
    confidence: float = 0.95,
    seed: int = 0,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Ranks:
    """Return the numerical rank #{|lambda| >= eps} and the degeneracy 1 - rank/n, for each eps.

    Up to 2,048 dimensions it is counted densely, with standard error 0; above, see
    `deflated_density`. An eps below the measured noise floor of the products is lifted to it, and
    `Ranks.eps`, `Ranks.noise_floor` and the note tell. Where eigenvalues fall as a power law, the
    rank is a matter of eps: give a grid.

    Args:
        source: an operator or a dense matrix.
        eps: thresholds of |lambda|.
        relative: thresholds are shares of the largest |lambda|.
        top: eigenpairs that are found and counted one by one.
        steps: Lanczos steps of each draw.
        draws: starting vectors.
        confidence: of the intervals.
        seed: of everything.
        folder: keeps eigenpairs and draws, so that a killed run goes on.
        facts: what the operator depends on, kept in the folder and compared.

    Raises:
        InputError: an eps that is not positive.
        StateMismatch: the folder is of another run.

    >>> rank(torch.diag(torch.tensor([4.0, 1.0, 1e-9, 0.0])).double(), 1e-6).counts[0].count
    2
    """
    operator = as_operator(source)
    floor = noise_floor(operator, seed=seed)
    spectrum = deflated_density(
        operator, top=top, steps=steps, draws=draws, seed=seed, folder=folder, facts=facts
    )
    return ranks_of(spectrum, eps, noise_floor=floor, relative=relative, confidence=confidence)


def rank_statistics(
    source: Source,
    *,
    top: int = 20,
    steps: int = 60,
    draws: int = 10,
    confidence: float = 0.95,
    seed: int = 0,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> RankStatistics:
    """Return stable rank, tr/lambda_1, participation ratio and entropy rank; see `statistics_of`.

    Up to 2,048 dimensions they are computed densely. The arguments are those of `rank`.

    >>> rank_statistics(torch.diag(torch.tensor([1.0, 1.0, 0.0])).double()).entropy.value
    2.0
    """
    if draws < 2:
        raise InputError("rank statistics: one draw gives no error bar; take two or more.")
    spectrum = deflated_density(
        source, top=top, steps=steps, draws=draws, seed=seed, folder=folder, facts=facts
    )
    return statistics_of(spectrum, confidence=confidence)


def _kept_pairs(
    operator: SymmetricOperator,
    top: int,
    seed: int,
    folder: str | Path | None,
    facts: Mapping[str, Any],
) -> Eigenpairs:
    """Return the eigenpairs that a folder holds, or find and keep them."""
    if folder is None:
        return top_eigenpairs(operator, top, tolerance=TOLERANCE, seed=seed)
    path = Path(folder) / PAIRS
    own = {"top": top, "seed": seed, "size": operator.size, "tolerance": TOLERANCE}
    print_ = fingerprint({**dict(facts), "eigenpairs": own})
    if path.exists():
        pairs, found = read_eigenpairs(path)
        if found != print_:
            raise StateMismatch(
                f"{path}: holds eigenpairs of another operator or other settings. Choose another "
                "folder, or remove this one to measure again."
            )
        _check_pair(operator, pairs, path)
        return pairs
    pairs = top_eigenpairs(operator, top, tolerance=TOLERANCE, seed=seed)
    save_eigenpairs(path, pairs, fingerprint=print_)
    return pairs


def _check_pair(operator: SymmetricOperator, pairs: Eigenpairs, path: Path) -> None:
    """Refuse kept pairs whose first is no eigenpair of this operator."""
    v = pairs.vectors[:, :1].T.contiguous()
    w = multiply(operator, v)
    theta = float(inner_rows(v, w)[0])
    subtract(w, torch.tensor([[theta]], dtype=torch.float64), v)
    value, scale = float(pairs.values[0]), float(np.abs(pairs.values).max())
    # Wide enough for another number of threads and half precision, narrow for another model.
    room = 2 * float(pairs.residuals[0]) + float(torch.finfo(operator.dtype).eps) ** 0.4 * scale
    if abs(theta - value) > room or float(norms(w)[0]) > room:
        raise StateMismatch(
            f"{path}: its first eigenvalue is {value:.6g}, the operator gives {theta:.6g} for its "
            "vector: it was measured with another operator. Choose another folder, or remove this "
            "one to measure again."
        )
