"""How many eigenvalues stand apart from the bulk, beside the number of classes (Sagun 2016, 2017).

Letters: C classes, lambda_1 >= lambda_2 >= ... eigenvalues, r_j their residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.errors import InputError
from hawqkit.estimators.eigenpairs import Eigenpairs
from hawqkit.records import Density, Eigenvalues

Array = NDArray[np.float64]
Spectrum = Density | Eigenpairs | Eigenvalues | Tensor | Array | Sequence[float]

# Evenly spread eigenvalues of a random matrix leave gaps of a few percent, a power law 1/k a ratio
# of 2 at the first and 1.5 at the second.
SEPARATION = 1.5


@dataclass(frozen=True, slots=True)
class Outliers:
    """The eigenvalues that stand apart, and where other counts would have cut.

    Attributes:
        count: outliers; 0 where no gap is wide enough.
        ratio: of the gap behind the last of them, with residuals against it; of the widest gap
            there is where `count` is 0.
        edge: largest |eigenvalue| of the rest.
        classes: C.
        expected: counts that theory names, `C - 1`, `C`, `C (C - 1)`.
        gaps: ratio behind the first, second, ... eigenvalue: gaps[j - 1] cuts after j.
        values: eigenvalues that were looked at, falling.
        residuals: an eigenvalue lies within that of each.
        separation: ratio from which a gap counts.
        note: what a reader must know.
    """

    count: int
    ratio: float
    edge: float
    classes: int
    expected: dict[str, int]
    gaps: tuple[float, ...]
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    separation: float
    note: str = ""

    @property
    def matches(self) -> tuple[str, ...]:
        """Which expected counts the outliers have."""
        return tuple(name for name, count in self.expected.items() if count == self.count)

    def gap(self, count: int) -> float | None:
        """Return the ratio of the gap after `count` eigenvalues, None where it was not seen."""
        return self.gaps[count - 1] if 1 <= count <= len(self.gaps) else None


def outliers(
    spectrum: Spectrum, classes: int, *, separation: float = SEPARATION, most: int | None = None
) -> Outliers:
    """Count the eigenvalues that stand apart from the bulk, by the widest relative gap.

    With e_j the eigenvalue of largest magnitude among those that are not the j largest, the gap
    after j is, with residuals against it,

        gap_j = (lambda_j - r_j) / (|e_j| + r of it)

    and the count is the j <= `most` with the widest, if that is `separation` or more. So an
    eigenvalue counts only if it is larger than the bulk's negative end, too.

    What theory and measurement expect: Sagun et al. 2016 and 2017 see about as many outliers as
    classes; Papyan 2020 assigns C of them to the class means, and C (C - 2) of a second
    group to the cross-class means. Where examples of one class are all alike, G has C (C - 1)
    eigenvalues beside the zeros; the widest gap is then there, and `gap(C)` tells of the other.

    Args:
        spectrum: eigenvalues one by one: a `Density` of `deflated_density`, or computed whole; what
            `top_eigenpairs` gives; or numbers, the largest there are or all.
        classes: C.
        separation: ratio from which a gap counts.
        most: largest count that is considered; None gives C (C - 1).

    Raises:
        InputError: fewer than two eigenvalues are known from the top, or an option is out of its
            range.

    >>> found = outliers([9.0, 8.0, 7.0, 1.0, 0.9, 0.8, -0.5], classes=3)
    >>> found.count, found.ratio, found.matches
    (3, 7.0, ('C',))
    """
    if classes < 2:
        raise InputError(f"classes: must be 2 or more; got {classes}.")
    if separation < 1:
        raise InputError(f"separation: must be 1 or more; got {separation}.")
    values, residuals = _known(spectrum)
    if len(values) < 2:
        raise InputError(
            f"the spectrum has {len(values)} eigenvalues that are known one by one from the top; "
            "two at least are needed, and one more than the outliers that are expected: give what "
            "deflated_density(operator, top=...) or top_eigenpairs(operator, k) returns."
        )
    expected = {"C - 1": classes - 1, "C": classes, "C (C - 1)": classes * (classes - 1)}
    most = expected["C (C - 1)"] if most is None else most
    if most < 1:
        raise InputError(f"most: must be 1 or more; got {most}.")
    gaps = _gaps(values, residuals)[:most]
    widest = int(np.argmax(gaps)) + 1
    count = widest if gaps[widest - 1] >= separation else 0
    notes = []
    if not count:
        notes.append(
            f"no gap has a ratio of {separation:g}; the widest, {gaps[widest - 1]:.3g}, is after "
            f"{widest}"
        )
    if len(gaps) < min(most, expected["C"]):
        notes.append(f"only the gaps after 1 to {len(gaps)} are known; more eigenvalues show more")
    return Outliers(
        count=count,
        ratio=float(gaps[widest - 1]),
        edge=float(np.abs(values[count:]).max()),
        classes=classes,
        expected=expected,
        gaps=tuple(gaps.tolist()),
        values=tuple(values.tolist()),
        residuals=tuple(residuals.tolist()),
        separation=separation,
        note="; ".join(notes),
    )


def _gaps(values: Array, residuals: Array) -> Array:
    """Return the ratio behind each value but the last, falling values given."""
    tiny = 64 * float(np.finfo(np.float64).eps) * float(np.abs(values).max())
    magnitude = np.abs(values)
    rest = [int(np.argmax(magnitude[j:])) + j for j in range(1, len(values))]
    edges = np.array([magnitude[i] + residuals[i] for i in rest])
    inner = values[:-1] - residuals[:-1]
    # What is zero to rounding ends the list: ratios of such numbers say nothing.
    return np.where(inner > tiny, inner / np.maximum(edges, tiny or 1.0), 0.0)


def _known(spectrum: Spectrum) -> tuple[Array, Array]:
    """Return the eigenvalues that are known without gaps from the top, falling, with residuals."""
    if isinstance(spectrum, Density):
        values, residuals = spectrum.known, spectrum.known_residuals
    elif isinstance(spectrum, (Eigenpairs, Eigenvalues)):
        values = np.asarray(spectrum.values, dtype=np.float64)
        residuals = np.asarray(spectrum.residuals, dtype=np.float64)
        if spectrum.largest == "smallest":
            values, residuals = values[:0], residuals[:0]
        if spectrum.largest == "both":  # in falling order, the upper half from the upper end
            upper = len(values) - len(values) // 2
            values, residuals = values[:upper], residuals[:upper]
    else:
        numbers = spectrum.detach().cpu() if isinstance(spectrum, Tensor) else spectrum
        values = np.asarray(numbers, dtype=np.float64).ravel()
        residuals = np.zeros(len(values))
    if not np.isfinite(values).all():
        raise InputError("the spectrum holds NaN or infinity.")
    order = np.argsort(-values, kind="stable")
    return values[order], residuals[order]
