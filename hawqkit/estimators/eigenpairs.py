"""Eigenpairs at either end of the spectrum, with residual bounds and an honest word on convergence.

Letters: n dimensions, k pairs, m basis vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError, did_you_mean
from hawqkit.estimators.krylov import Krylov, Ritz
from hawqkit.estimators.probes import seeded
from hawqkit.estimators.vectors import (
    working_dtype,
)
from hawqkit.records.spectral import Eigenvalues

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Source = SymmetricOperator | Tensor | Callable[[Tensor], Tensor]

ENDS = ("magnitude", "algebraic", "smallest", "both")
# Chance that a run to find missed copies stops too early.
MISS_PROBABILITY = 0.01
_SIDES = {"both": ("algebraic", "smallest")}


@dataclass(frozen=True, slots=True, eq=False)
class Eigenpairs:
    """Eigenvalues, eigenvectors, and how good they are.

    Attributes:
        values: (k,).
        residuals: (k,) |A v - theta v| for unit v, by the recurrence, never below the rounding of
            the vectors' dtype; an eigenvalue lies within that of each value.
        vectors: (n, k), orthonormal, on the operator's device.
        converged: (k,) residual <= tolerance * largest |theta|.
        products: that were spent.
        tolerance: relative residual that was asked for.
        largest: which pairs were asked for.
        blocks: name of a parameter -> its rows in `vectors`.
        note: what a reader must know.
    """

    values: Array
    residuals: Array
    vectors: Tensor
    converged: NDArray[np.bool_]
    products: int
    tolerance: float
    largest: str
    blocks: Mapping[str, slice]
    note: str = ""

    def named(
        self, i: int, shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> dict[str, Tensor]:
        """Return eigenvector i as named tensors: flat, or in the shapes given.

        Args:
            i: which pair.
            shapes: name -> shape.
        """
        parts = {name: self.vectors[place, i] for name, place in self.blocks.items()}
        return {n: p.reshape(shapes[n]) if shapes and n in shapes else p for n, p in parts.items()}

    def record(self) -> Eigenvalues:
        """Return the values without the vectors."""
        return Eigenvalues(
            tuple(self.values.tolist()),
            tuple(self.residuals.tolist()),
            tuple(bool(c) for c in self.converged),
            len(self.vectors),
            self.products,
            self.tolerance,
            self.largest,
            self.note,
        )


def top_eigenpairs(
    source: Source,
    k: int = 10,
    *,
    largest: str = "magnitude",
    tolerance: float = 1e-6,
    max_products: int | None = None,
    memory_bytes: int | None = None,
    block: int = 1,
    deflate: bool = True,
    seed: int = 0,
) -> Eigenpairs:
    """Return k eigenpairs by thick-restart Lanczos with full reorthogonalization.

    It stops when `|beta s_i| <= tolerance * |theta|_max` for all of them (Parlett, The Symmetric
    Eigenvalue Problem, 13.2). A single vector sees one direction of each eigenspace, so afterwards,
    with `deflate`, further runs look in the complement of what was found until its best value is no
    better than the worst of the k: multiple eigenvalues then appear as often as they are. A `block`
    of b vectors finds multiplicities up to b by itself.

    Args:
        source: an operator or a dense matrix.
        k: how many.
        largest: `magnitude`, the largest |lambda|; `algebraic`, the largest; `smallest`, the most
            negative; `both`, half of k from either end, in falling order.
        tolerance: residual over the largest |theta|.
        max_products: budget; None gives 40 (4 k + 40). Pairs that have not converged say so.
        memory_bytes: limit for the basis; None lets it hold 4 k + 40 vectors.
        block: vectors that are multiplied together.
        deflate: look for further copies of multiple eigenvalues.
        seed: of the starting vectors.

    Raises:
        InputError: k is more than n, an unknown `largest`, a budget or memory that cannot hold k.

    >>> pairs = top_eigenpairs(torch.diag(torch.tensor([3.0, -5.0, 3.0, 1.0])).double(), 3)
    >>> pairs.values.round(9).tolist()
    [-5.0, 3.0, 3.0]
    """
    operator = as_operator(source)
    check_arguments(operator, k, largest, block, max_products)
    budget = max_products if max_products is not None else 40 * (4 * k + 40)
    search = _Search(operator, k, largest, tolerance, budget, seed)
    search.capacity = _capacity(operator, k, block, memory_bytes)
    search.run(largest, k, block, None)
    if deflate:
        for side in _SIDES.get(largest, (largest,)):
            search.look_again(side, block, memory_bytes)
    return search.result()


class _Search:
    """Runs in the complement of what earlier runs found, under one budget."""

    def __init__(
        self,
        operator: SymmetricOperator,
        k: int,
        largest: str,
        tolerance: float,
        budget: int,
        seed: int,
    ) -> None:
        self.operator, self.k, self.largest, self.tolerance = operator, k, largest, tolerance
        self.before, self.budget = operator.products, budget
        self.generator = seeded(seed)
        self.capacity = 0
        self.values, self.residuals = np.empty(0), np.empty(0)
        self.rows = torch.empty(
            0, operator.size, device=operator.device, dtype=working_dtype(operator)
        )
        self.notes: list[str] = list(operator.notes)

    @property
    def spent(self) -> int:
        return self.operator.products - self.before

    @property
    def scale(self) -> float:
        return float(np.abs(self.values).max(initial=0.0))

    def run(self, end: str, count: int, block: int, bar: float | None) -> bool:
        """Find `count` pairs of an end; False when they are no better than the bar, or not found.

        With a bar, the run ends as soon as nothing better than the bar can be hidden.
        """
        run = Krylov(
            self.operator,
            self.capacity - len(self.rows),
            block,
            self.rows,
            self.generator,
            lambda theta: _order(theta, end),
        )
        while True:
            ritz = run.extend()
            scale = max(self.scale, ritz.scale)
            best = ritz.order[:count]
            done = len(best) == count and (
                run.whole or bool((ritz.residuals[best] <= self.tolerance * scale).all())
            )
            if bar is not None:
                if self._clear(run, ritz, end, bar, done):
                    return False
                done = done and self._better(ritz, end, bar, scale)
            out_of_budget = self.spent + run.next_cost > self.budget and len(best) == count
            if done or out_of_budget:
                if bar is not None and not done:
                    self.notes.append("the budget ended before copies were ruled out")
                    return False
                self._add(*run.take(count))
                return True
            run.restart_if_full(count)

    def look_again(self, side: str, block: int, memory_bytes: int | None) -> None:
        """Look for pairs of one side that the runs so far missed."""
        while len(self.rows) < self.operator.size:
            chosen = _pick(self.values, self.k, self.largest)
            bar = _bar(self.values[chosen], side, self.largest)
            if memory_bytes is None:
                self.capacity = len(self.rows) + max(44, 4 * block)
            if self.capacity - len(self.rows) < min(
                2 * block + 2, self.operator.size - len(self.rows)
            ):
                self.notes.append(
                    "memory ended before copies of multiple eigenvalues were ruled out"
                )
                return
            if self.spent + block > self.budget:
                self.notes.append("the budget ended before copies were ruled out")
                return
            if not self.run(side, 1, block, bar):
                return

    def result(self) -> Eigenpairs:
        chosen = _pick(self.values, self.k, self.largest)
        values, rows = self.values[chosen], self.rows[torch.from_numpy(chosen)]
        scale = self.scale
        floor = rounding_of(self.operator) * scale
        residuals = self.residuals[chosen] + floor
        converged = residuals <= max(self.tolerance * scale, 0.0)
        if not converged.all():
            self.notes.append(
                f"{int((~converged).sum())} of {self.k} pairs have not converged to "
                f"{self.tolerance:g} within {self.spent} products"
            )
        return Eigenpairs(
            values,
            residuals,
            rows.T,
            converged,
            self.spent,
            self.tolerance,
            self.largest,
            dict(self.operator.blocks),
            "; ".join(self.notes),
        )

    def _clear(self, run: Krylov, ritz: Ritz, end: str, bar: float, done: bool) -> bool:
        """Say whether the complement holds nothing better than the bar.

        A Lanczos run of j steps from a random start misses the largest eigenvalue by more than e
        times the spectrum's width with probability below `1.648 sqrt(n) exp(-sqrt(e) (2 j - 1))`
        (Kuczynski and Wozniakowski 1992, theorem 4.2). So an eigenvalue at the bar would show.
        """
        if run.whole:
            return float(_key(ritz.values, end).max()) <= bar + self.tolerance * self.scale
        log = np.log(1.648 * np.sqrt(self.operator.size) / MISS_PROBABILITY)
        e = (log / (2 * run.steps - 1)) ** 2
        top, bottom = float(ritz.values.max()), float(ritz.values.min())
        above = top <= bar - e * (bar - bottom)
        below = -bottom <= bar - e * (bar + top)
        if e < 1 and {"algebraic": above, "smallest": below}.get(end, above and below):
            return True
        best = float(_key(ritz.values, end).max())
        return done and e < 0.25 and best <= bar + self.tolerance * max(self.scale, ritz.scale)

    def _better(self, ritz: Ritz, end: str, bar: float, scale: float) -> bool:
        return float(_key(ritz.values, end).max()) > bar + self.tolerance * scale

    def _add(self, values: Array, residuals: Array, rows: Tensor) -> None:
        self.values = np.concatenate([self.values, values])
        self.residuals = np.concatenate([self.residuals, residuals])
        self.rows = torch.cat([self.rows, rows])


def rounding_of(operator: SymmetricOperator) -> float:
    """Return what rounding alone may leave of a residual, over the largest |theta|.

    Measured on dense matrices of a few hundred rows: up to 8 eps in float64, 1 eps in float32,
    whose sums run in float64.
    """
    return max(4 * float(torch.finfo(operator.dtype).eps), 32 * float(np.finfo(np.float64).eps))


def _key(theta: Array, end: str) -> Array:
    """Return what is largest for the pairs that are wanted."""
    return {"magnitude": np.abs(theta), "algebraic": theta, "smallest": -theta}[end]


def _order(theta: Array, end: str) -> Integers:
    """Return places of Ritz values, the best first; for `both`, the two ends in turn."""
    if end != "both":
        return np.argsort(-_key(theta, end), kind="stable")
    falling = np.argsort(-theta, kind="stable")
    turns = np.empty_like(falling)
    half = (len(falling) + 1) // 2
    turns[0::2], turns[1::2] = falling[:half], falling[half:][::-1]
    return turns


def _pick(values: Array, k: int, largest: str) -> Integers:
    """Return the k best in the order of a result."""
    chosen = _order(values, largest)[:k]
    return chosen[np.argsort(-values[chosen], kind="stable")] if largest == "both" else chosen


def _bar(values: Array, side: str, largest: str) -> float:
    """Return the key of the worst pair of a side, which a newly found one must beat."""
    keys = np.sort(_key(values, side))[::-1]
    if largest != "both":
        return float(keys[-1])
    count = len(keys) - len(keys) // 2 if side == "algebraic" else len(keys) // 2
    return float(keys[count - 1]) if count else np.inf


def check_arguments(
    operator: SymmetricOperator, k: int, largest: str, block: int, max_products: int | None
) -> None:
    """Refuse what no run could give."""
    if largest not in ENDS:
        raise InputError(
            f"largest: {largest!r} is unknown; there are {', '.join(ENDS)}."
            + did_you_mean(largest, ENDS)
        )
    if not 1 <= k <= operator.size:
        raise InputError(
            f"k: {k} eigenpairs were asked, the operator has n = {operator.size} dimensions; "
            f"ask for 1 to {operator.size}."
        )
    if block < 1:
        raise InputError(f"block: must be at least 1; got {block}.")
    if max_products is not None and max_products < k + block:
        raise InputError(
            f"max_products: {max_products} are fewer than k + block = {k + block}, without which "
            "there are no k Ritz pairs."
        )


def _capacity(operator: SymmetricOperator, k: int, block: int, memory_bytes: int | None) -> int:
    """Return how many rows the basis may have."""
    most = max(4 * k + 40, k + 4 * block)
    if memory_bytes is None:
        return most
    row = operator.size * torch.empty(0, dtype=working_dtype(operator)).element_size()
    # Beside the basis: the pairs that are given back, a block, its product and one more.
    beside, fewest = k + 3 * block, min(k + 3 * block, operator.size)
    affordable = memory_bytes // row - beside
    if affordable < fewest:
        raise InputError(
            f"memory_bytes: {memory_bytes:,} hold {memory_bytes // row} vectors of {row:,} bytes; "
            f"k = {k} pairs with block = {block} need {fewest + beside}, "
            f"{(fewest + beside) * row:,} bytes."
        )
    return min(most, affordable)
