"""The spectral density by stochastic Lanczos quadrature; runs can be resumed.

Letters: n dimensions, S draws, m steps, b draws side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.eigenpairs import Eigenpairs
from hawqkit.estimators.lanczos import Lanczos
from hawqkit.estimators.probes import draw_probe, seeded
from hawqkit.estimators.unfinished import read_unfinished, remove_unfinished, write_unfinished
from hawqkit.estimators.vectors import norms, project_out, scale_rows, working_dtype
from hawqkit.journal import Journal
from hawqkit.records.density import Density

Source = SymmetricOperator | Tensor | Callable[[Tensor], Tensor]
Arrays = dict[str, NDArray[Any]]

# Steps between saves of a draw that is under way: two vectors are written each time.
SAVE_EVERY = 10


def density(
    source: Source,
    *,
    steps: int = 90,
    draws: int = 10,
    seed: int = 0,
    deflated: Eigenpairs | None = None,
    reorthogonalize: bool = False,
    batch: int = 1,
    folder: str | Path | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Density:
    """Measure the spectrum by stochastic Lanczos quadrature and keep the raw tridiagonals.

    From a vector u uniform on the sphere, m Lanczos steps give a tridiagonal T whose Gauss rule has
    `u' A^j u` exactly for j < 2 m (Golub and Meurant 1994; Ubaru, Chen and Saad 2017; for networks
    Ghorbani, Krishnan and Xiao 2019). The mean over draws estimates `tr f(A) / n`. How wide the
    curves of a plot are is decided later: `Density.evaluate`.

    It holds three vectors for each of `batch` draws, beside what a product needs.

    Args:
        source: an operator or a dense matrix.
        steps: m; at most the dimensions that there are.
        draws: S.
        seed: of the starting vectors; a draw depends on the seed and its number alone.
        deflated: eigenpairs that are taken out and counted exactly; those that have not converged
            stay in.
        reorthogonalize: keep all m vectors and make each new one orthogonal to them.
        batch: draws that run side by side.
        folder: where each draw's tridiagonal is kept, and the state of the one under way every ten
            steps; a run that finds them goes on there, to the same bits.
        facts: what the operator depends on (model, data, seeds), kept in the folder and compared.

    Raises:
        InputError: steps, draws or batch below 1.
        StateMismatch: the folder is of other facts, or of another operator: one product tells.

    >>> measured = density(torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0])).double(), draws=4)
    >>> measured.count_above(0.5).interval[0] <= 2 <= measured.count_above(0.5).interval[1]
    True
    """
    operator = as_operator(source)
    for name, value in (("steps", steps), ("draws", draws), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name}: must be at least 1; got {value}.")
    run = _Run(operator, steps, seed, deflated, reorthogonalize)
    if run.rest == 0:
        draws = 0
    if folder is None:
        run.measure(list(range(draws)), batch, None)
    else:
        run.resume(folder, draws, batch, facts or {})
    return run.result(draws, deflated)


class _Run:
    """The draws of one density, measured or read."""

    def __init__(
        self,
        operator: SymmetricOperator,
        steps: int,
        seed: int,
        deflated: Eigenpairs | None,
        reorthogonalize: bool,
    ) -> None:
        self.operator, self.seed, self.reorthogonalize = operator, seed, reorthogonalize
        self.before = operator.products
        dtype = working_dtype(operator)
        self.known, self.known_residuals = np.empty(0), np.empty(0)
        self.basis = torch.empty(0, operator.size, device=operator.device, dtype=dtype)
        self.notes: list[str] = list(operator.notes)
        if deflated is not None:
            good = deflated.converged
            self.known, self.known_residuals = deflated.values[good], deflated.residuals[good]
            self.basis = deflated.vectors.T.to(operator.device, dtype)
            if not good.all():
                self.basis = self.basis[torch.from_numpy(good).to(operator.device)]
                self.notes.append(f"{int((~good).sum())} pairs that had not converged stayed in")
        self.rest = operator.size - len(self.known)
        self.steps = max(1, min(steps, self.rest))
        self.found: dict[int, Arrays] = {}
        self.journal: Journal | None = None

    def measure(self, missing: list[int], batch: int, folder: Path | None) -> None:
        """Measure draws, some side by side, and write each down."""
        for first in range(0, len(missing), batch):
            group = missing[first : first + batch]
            run = self._start(group)
            if folder is not None and self.journal is not None and not self.reorthogonalize:
                read_unfinished(folder, self.journal.fingerprint, group, run)
            while run.steps < self.steps and run.running.any():
                run.advance()
                if folder is not None and run.steps % SAVE_EVERY == 0 and run.steps < self.steps:
                    self._save(folder, group, run)
            for place, draw in enumerate(group):
                self.found[draw] = self._tridiagonal(run, place)
                if self.journal is not None:
                    self.journal.write(draw, self.found[draw])
            if folder is not None:
                remove_unfinished(folder)

    def resume(self, folder: str | Path, draws: int, batch: int, facts: Mapping[str, Any]) -> None:
        """Read the draws that a folder holds and measure the others."""
        own = {
            "steps": self.steps,
            "seed": self.seed,
            "size": self.operator.size,
            "dtype": str(self.operator.dtype).removeprefix("torch."),
            "batch": batch,
            "reorthogonalize": self.reorthogonalize,
            # Rounded: they may come from a run with another number of threads.
            "deflated": [float(f"{value:.3e}") for value in self.known],
        }
        self.journal = Journal(folder, {**dict(facts), "lanczos": own})
        for draw in range(draws):
            arrays = self.journal.read(draw)
            if arrays is not None:
                self.found[draw] = arrays
        if self.found:
            self._check_same_operator(min(self.found), folder)
        self.measure([d for d in range(draws) if d not in self.found], batch, Path(folder))

    def result(self, draws: int, deflated: Eigenpairs | None) -> Density:
        """Return the density of all draws."""
        found = [self.found[draw] for draw in range(draws)]
        spent = sum(int(arrays["steps"][0]) for arrays in found)
        shape = (0, self.steps)
        return Density(
            alphas=np.stack([f["alphas"] for f in found]) if found else np.empty(shape),
            betas=np.stack([f["betas"] for f in found]) if found else np.empty((0, shape[1] - 1)),
            complete=np.array([bool(f["complete"][0]) for f in found], dtype=bool),
            size=self.operator.size,
            known=self.known,
            known_residuals=self.known_residuals,
            seed=self.seed,
            products=spent + (0 if deflated is None else deflated.products),
            note="; ".join(self.notes),
        )

    def _start(self, group: list[int]) -> Lanczos:
        size, device, dtype = self.operator.size, self.operator.device, self.basis.dtype
        rows = torch.empty(len(group), size, device=device, dtype=dtype)
        for row, draw in zip(rows, group, strict=True):
            row.copy_(draw_probe(size, "gaussian", seeded(self.seed, draw)))
        scale_rows(rows, 1 / norms(rows))
        project_out(rows, self.basis)
        scale_rows(rows, 1 / norms(rows))
        scale = float(np.abs(self.known).max(initial=0.0))
        return Lanczos(self.operator, rows, self.basis, self.reorthogonalize, scale)

    def _tridiagonal(self, run: Lanczos, place: int) -> Arrays:
        alphas, betas = np.full(self.steps, np.nan), np.full(self.steps - 1, np.nan)
        length = int(np.isfinite(run.alphas[place]).sum())
        alphas[:length] = run.alphas[place, :length]
        betas[: length - 1] = run.betas[place, : length - 1]
        complete = not run.running[place] or length == self.rest
        return {
            "alphas": alphas,
            "betas": betas,
            "complete": np.array([complete]),
            "steps": np.array([length], dtype=np.int64),
        }

    def _save(self, folder: Path, group: list[int], run: Lanczos) -> None:
        if self.journal is not None and not self.reorthogonalize:
            write_unfinished(folder, self.journal.fingerprint, group, run)

    def _check_same_operator(self, draw: int, folder: str | Path) -> None:
        """Make the first step of a kept draw again and compare it."""
        run = self._start([draw])
        run.advance()
        kept = self.found[draw]
        there, now = float(kept["alphas"][0]), float(run.alphas[0, 0])
        scale = max(abs(there), abs(float(run.betas[0, 0])))
        if len(kept["betas"]) and np.isfinite(kept["betas"][0]):
            scale = max(scale, abs(float(kept["betas"][0])))
        # Wide enough for another number of threads and half precision, narrow for another model.
        tolerance = float(torch.finfo(self.operator.dtype).eps) ** 0.4 * scale
        if abs(there - now) > tolerance:
            raise StateMismatch(
                f"{folder}: was measured with another operator: the first step of draw {draw} gave "
                f"{there:.6g} there and gives {now:.6g} now. Choose another folder, or remove this "
                "one to measure again."
            )
