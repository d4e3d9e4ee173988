"""A spectrum as it was measured: known eigenvalues and tridiagonals. No torch.

Letters: n dimensions, S draws, m steps, w weights of quadrature nodes theta.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import InputError
from hawqkit.records.quadrature import (
    bound_below,
    evaluate_log_kernel,
    gauss_rule,
    share_interval,
)
from hawqkit.records.spectral import (
    Estimate,
    exact_estimate,
    student_interval,
    student_quantile,
)

Array = NDArray[np.float64]

# Share of n that the bounds of a count may leave open. Steps too few to tell small eigenvalues from
# zero lump them into one node: draws then agree on a count that none of them has seen.
OPEN_SHARE = 0.1
# In the note of a count with wider ones.
UNRESOLVED = "unresolved: its bounds leave more than a tenth of the spectrum open; more steps help"


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """Stochastic Lanczos quadrature of a spectrum, with the raw tridiagonals kept.

    Draw s started from a vector u_s that is uniform on the unit sphere, so its quadrature estimates
    `u_s' f(A) u_s`, whose mean is `tr f(A) / n`. Eigenvalues that were found one by one stand in
    `known`; the draws then live in the complement of their eigenvectors, which has
    `rest = n - len(known)` dimensions. A spectrum that was computed whole has no draws.

    Attributes:
        alphas: (S, m) diagonals, NaN after a draw has ended early.
        betas: (S, m - 1) off-diagonals, likewise.
        complete: (S,) whether the draw's Krylov space was exhausted: its quadrature is then exact.
        size: n.
        known: (k,) eigenvalues that were found and deflated.
        known_residuals: (k,) an eigenvalue lies within that of each.
        seed: of the draws.
        products: operator-vector products behind all of it.
        note: what a reader must know.
    """

    alphas: Array
    betas: Array
    complete: NDArray[np.bool_]
    size: int
    known: Array
    known_residuals: Array
    seed: int
    products: int
    note: str = ""

    @property
    def draws(self) -> int:
        """Starting vectors, S."""
        return len(self.alphas)

    @property
    def steps(self) -> int:
        """Lanczos steps of a draw, m."""
        return int(self.alphas.shape[1])

    @property
    def rest(self) -> int:
        """Dimensions that the draws live in."""
        return self.size - len(self.known)

    @property
    def method(self) -> str:
        """`dense` where all eigenvalues are known, else `lanczos quadrature`."""
        return "lanczos quadrature" if self.draws else "dense"

    @property
    def largest(self) -> float:
        """Largest |eigenvalue| in sight: known, or a node."""
        seen = [np.abs(self.known), np.abs(self.nodes_and_weights()[0]).ravel()]
        return float(max((x.max() for x in seen if x.size), default=0.0))

    def nodes_and_weights(self) -> tuple[Array, Array]:
        """Return the nodes and weights of every draw, (S, m) each; a row of weights sums to 1.

        The weight of a node is the squared first entry of its eigenvector (Golub and Welsch 1969).
        A draw that ended early is filled up with nodes at 0 of weight 0.
        """
        if not self.steps:
            return self.alphas, self.alphas
        return gauss_rule(np.nan_to_num(self.alphas), np.nan_to_num(self.betas))

    def draws_of(self, function: Callable[[Array], Array]) -> Array:
        """Return each draw's estimate of `tr f(A)`, (S,): the known plus `rest sum w f(theta)`."""
        nodes, weights = self.nodes_and_weights()
        values = np.where(weights > 0, function(nodes), 0.0)
        return np.asarray(function(self.known).sum() + self.rest * (weights * values).sum(1))

    def trace_of(self, function: Callable[[Array], Array], *, confidence: float = 0.95) -> Estimate:
        """Return an estimate of `tr f(A)`.

        With one draw the error is the one of theory for a vector uniform on the sphere of d
        dimensions, `2 d / (d + 2) (tr f^2 - (tr f)^2 / d)`, with the traces as that draw sees them.

        Args:
            function: f, on arrays.
            confidence: of the interval.
        """
        if not self.draws:
            return self._exact(float(function(self.known).sum()))
        samples = self.draws_of(function)
        value, note = float(samples.mean()), self.note
        if self.draws > 1:
            stderr = float(samples.std(ddof=1)) / math.sqrt(self.draws)
            interval = student_interval(value, stderr, self.draws, confidence)
        else:
            first = value - float(function(self.known).sum())
            second = float(self.draws_of(lambda x: function(x) ** 2)[0])
            second -= float((function(self.known) ** 2).sum())
            spread = max(0.0, second - first**2 / self.rest)
            stderr = math.sqrt(2 * self.rest / (self.rest + 2) * spread)
            interval = student_interval(value, stderr, 10**9, confidence)
            note = "; ".join(filter(None, (note, "one draw: its error is that of theory")))
        return Estimate(
            value, stderr, self.draws, self.products, self.method, interval, note, confidence
        )

    def moments(self, k: int, *, confidence: float = 0.95) -> tuple[Estimate, ...]:
        """Return estimates of `tr A^j / n` for j = 1 to k.

        A Gauss rule of m nodes gives `u' A^j u` exactly up to j = 2 m - 1.

        Raises:
            InputError: k is more than that.
        """
        if self.draws and k > 2 * self.steps - 1 and not self.complete.all():
            raise InputError(
                f"moments: {self.steps} steps give {2 * self.steps - 1} moments; {k} were asked."
            )
        return tuple(
            self.trace_of(lambda x, j=j: x**j, confidence=confidence).scaled(1 / self.size)  # type: ignore[misc]
            for j in range(1, k + 1)
        )

    def count(self, low: float, high: float, *, confidence: float = 0.95) -> Estimate:
        """Return the number of eigenvalues in [low, high].

        The interval is the Chebyshev-Markov-Stieltjes bound of each draw, widened by the sampling
        error (`share_interval`), and drawn in to whole numbers.

        Raises:
            InputError: low > high.
        """
        if not low <= high:
            raise InputError(f"count: the interval [{low}, {high}] is empty; give low <= high.")
        below, above = self._bounds(low), self._bounds(high)
        known, r = self.known, self.known_residuals
        return self._count(
            lambda x: (x >= low) & (x <= high),
            np.maximum(above[0] - below[1], 0.0),
            np.minimum(above[1] - below[0], 1.0),
            int(((known - r >= low) & (known + r <= high)).sum()),
            int(((known + r >= low) & (known - r <= high)).sum()),
            confidence,
        )

    def mass(self, low: float, high: float, *, confidence: float = 0.95) -> Estimate:
        """Return the share of the eigenvalues in [low, high]; see `count`."""
        return self.count(low, high, confidence=confidence).scaled(1 / self.size)

    def count_above(self, eps: float, *, confidence: float = 0.95) -> Estimate:
        """Return the numerical rank `#{|lambda| >= eps}`; see `count`.

        Raises:
            InputError: eps is not positive.
        """
        _refuse_nonpositive("eps", eps)
        below, above = self._bounds(-eps), self._bounds(eps)
        known, r = np.abs(self.known), self.known_residuals
        return self._count(
            lambda x: np.abs(x) >= eps,
            1 - np.minimum(above[1] - below[0], 1.0),
            1 - np.maximum(above[0] - below[1], 0.0),
            int((known - r >= eps).sum()),
            int((known + r >= eps).sum()),
            confidence,
        )

    def count_negative(self, eps: float, *, confidence: float = 0.95) -> Estimate:
        """Return `#{lambda <= -eps}`, the directions of negative curvature; see `count`.

        Raises:
            InputError: eps is not positive.
        """
        _refuse_nonpositive("eps", eps)
        low = -2 * max(self.largest, eps) - 1.0
        return self.count(low, -eps, confidence=confidence)

    def evaluate(self, grid: Array, width: float, *, scale: str = "linear") -> Array:
        """Return the density on a grid, (G,), every node widened to a normal curve.

        Args:
            grid: (G,) eigenvalues.
            width: standard deviation of the curve; in decades where the scale is `log`.
            scale: `linear`, per unit of lambda; or `log`, per decade of |lambda|, where eigenvalues
                of the sign of the grid count: negative ones stand on a negative grid.

        Raises:
            InputError: the width is not positive, the scale is unknown, or a grid for `log` holds
                zero or both signs.
        """
        return np.asarray(self._per_draw(grid, width, scale).mean(0))

    def band(
        self,
        grid: Array,
        width: float,
        *,
        scale: str = "linear",
        confidence: float = 0.95,
        resamples: int = 500,
        seed: int = 0,
    ) -> tuple[Array, Array]:
        """Return the bootstrap band of `evaluate`, low and high, (G,) each: draws are resampled.

        Raises:
            InputError: there is one draw alone; see `evaluate` for the others.
        """
        curves = self._per_draw(grid, width, scale)
        if self.draws == 1:
            raise InputError("band: one draw says nothing about its own spread; take two or more.")
        generator = np.random.default_rng(seed)
        picks = generator.multinomial(len(curves), np.full(len(curves), 1 / len(curves)), resamples)
        tails = (1 - confidence) / 2
        low, high = np.quantile(picks @ curves / len(curves), [tails, 1 - tails], axis=0)
        return low, high

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """Return everything as arrays, for `hawqkit.store.write_arrays`."""
        return {
            "alphas": self.alphas,
            "betas": self.betas,
            "complete": self.complete,
            "known": self.known,
            "known_residuals": self.known_residuals,
            "facts": np.array([self.size, self.seed, self.products], dtype=np.int64),
            "note": np.frombuffer(self.note.encode(), dtype=np.uint8),
        }

    @staticmethod
    def from_arrays(arrays: dict[str, NDArray[np.generic]]) -> Density:
        """Return what `to_arrays` took apart.

        Raises:
            KeyError: an array is missing.
        """
        floats = {
            name: np.asarray(arrays[name], dtype=np.float64)
            for name in ("alphas", "betas", "known", "known_residuals")
        }
        size, seed, products = (int(x) for x in np.asarray(arrays["facts"], dtype=np.int64))
        return Density(
            complete=np.asarray(arrays["complete"], dtype=bool),
            size=size,
            seed=seed,
            products=products,
            note=np.asarray(arrays["note"], dtype=np.uint8).tobytes().decode(),
            **floats,
        )

    def _exact(self, value: float) -> Estimate:
        return exact_estimate(value, products=self.products, method=self.method)

    def _bounds(self, x: float) -> tuple[Array, Array]:
        if not self.draws:
            return np.zeros(1), np.zeros(1)
        return bound_below(self.alphas, self.betas, self.complete, x)

    def _count(
        self,
        inside: Callable[[Array], NDArray[np.bool_]],
        lower: Array,
        upper: Array,
        surely: int,
        perhaps: int,
        confidence: float,
    ) -> Estimate:
        known = int(inside(self.known).sum())
        if not self.draws and surely == perhaps:
            return self._exact(float(known))
        low, high, stderr, share, blind = 0.0, 0.0, 0.0, 0.0, False
        if self.draws:
            nodes, weights = self.nodes_and_weights()
            shares = (weights * inside(nodes)).sum(1)
            share = float(shares.mean())
            blind = bool(inside(nodes)[weights > 0].all())
            theory = 2 * share * (1 - share) / (self.rest + 2)
            variance = float(shares.var(ddof=1)) if self.draws > 1 else max(0.0, theory)
            stderr = self.rest * math.sqrt(variance / self.draws)
            low, high = share_interval(lower, upper, self.rest, confidence)
        low, high = surely + self.rest * low, perhaps + self.rest * high
        whole = math.ceil(low - 1e-9 * self.size), math.floor(high + 1e-9 * self.size)
        interval = (float(whole[0]), float(whole[1])) if whole[0] <= whole[1] else (low, high)
        value, note = known + self.rest * share, self.note
        half = (interval[1] - interval[0]) / 2
        if blind and half > 0:
            # All n, says every draw alike: not since it is so, but since none looked that near to
            # zero. What is known is the bounds.
            value = sum(interval) / 2
        wide = 2 * half > OPEN_SHARE * self.size
        if wide:
            note = "; ".join(filter(None, (note, UNRESOLVED)))
        if wide or stderr == 0:
            stderr = max(stderr, half / student_quantile((1 + confidence) / 2, 10**9))
        return Estimate(
            value, stderr, self.draws, self.products, self.method, interval, note, confidence
        )

    def _per_draw(self, grid: Array, width: float, scale: str) -> Array:
        """Return each draw's curve, (S, G); one row where nothing was drawn."""
        _refuse_nonpositive("width", width)
        nodes, weights = self.nodes_and_weights() if self.draws else (np.zeros((1, 0)),) * 2
        ones = np.ones((len(nodes), len(self.known)))
        nodes = np.concatenate([ones * self.known, nodes], 1)
        weights = np.concatenate([ones, weights * self.rest], 1) / self.size
        grid = np.asarray(grid, dtype=np.float64)
        if scale == "log":
            return evaluate_log_kernel(nodes, weights, grid, width)
        if scale != "linear":
            raise InputError(f"scale: {scale!r} is unknown; take 'linear' or 'log'.")
        kernel = np.exp(-(((grid - nodes[..., None]) / width) ** 2) / 2)  # (S, m, G)
        return np.asarray(
            (weights[..., None] * kernel).sum(1) / (width * math.sqrt(2 * math.pi)),
            dtype=np.float64,
        )


def _refuse_nonpositive(name: str, value: float) -> None:
    if not value > 0:
        raise InputError(f"{name}: must be a positive number; got {value}.")
