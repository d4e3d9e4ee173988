"""A spectrum as the report's template wants it: sentences, rows of cells, figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hawqkit.records import BlockSpectrum, Spectrum
from hawqkit.report import spectral_figures
from hawqkit.report.spectral_tables import (
    count_text,
    degeneracy_text,
    describe,
    eigenvalue_text,
    estimate_text,
    interval_text,
    power_law_cells,
    thresholds,
)
from hawqkit.report.wording import DASH, significant, with_error


@dataclass(frozen=True, slots=True)
class Cells:
    """One block's row in the tables.

    Attributes:
        name: of the layer.
        size: n.
        trace: with its standard error, as the four ranks.
        largest: the eigenvalue of largest magnitude and its residual.
        ranks: (rank ± stderr, interval, degeneracy, eps used where it was lifted) per threshold.
        negative: (smallest eigenvalue, count, interval) for a Hessian.
        eigenvalues: (value, residual, converged).
        notes: of the block.
        power_law: K, exponent, distance, threshold, verdict.
    """

    name: str
    size: str
    method: str
    trace: str
    largest: str
    stable: str
    trace_ratio: str
    participation: str
    entropy: str
    ranks: tuple[tuple[str, str, str, str], ...]
    negative: tuple[str, str, str]
    eigenvalues: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]
    power_law: tuple[str, ...]


def spectrum_view(spectrum: Spectrum) -> dict[str, Any]:
    """Return what the section is written from; draws its figures.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    figures = {"density": spectral_figures.density_figure(spectrum)}
    if spectrum.blocks:
        figures["degeneracy"] = spectral_figures.degeneracy_figure(spectrum)
    return {
        "about": describe(spectrum),
        "record": spectrum,
        "hessian": spectrum.kind == "hessian",
        "eps": [f"{eps:g}" for eps in thresholds(spectrum)],
        "rows": [_cells(block) for block in spectrum.everything],
        "near_zero": [_near_zero(block) for block in spectrum.everything],
        "figure": {name: Markup(svg) for name, svg in figures.items()},
    }


def _cells(block: BlockSpectrum) -> Cells:
    s, ranks = block.statistics, block.ranks
    named = (s.trace, s.stable, s.trace_ratio, s.participation, s.entropy) if s else (None,) * 5
    texts = [
        DASH if e is None else with_error(e.value, e.stderr if e.samples else None) for e in named
    ]
    top = block.top
    pairs = () if top is None else zip(top.values, top.residuals, top.converged, strict=True)
    negative = ranks.negative[-1]
    return Cells(
        block.name,
        f"{block.size:,}",
        block.method,
        texts[0],
        eigenvalue_text(block.largest, block.largest_residual),
        stable=texts[1],
        trace_ratio=texts[2],
        participation=texts[3],
        entropy=texts[4],
        ranks=tuple(
            (
                count_text(block, i),
                interval_text(ranks.counts[i]),
                degeneracy_text(block, i),
                f"{used:.1e}" if used > asked else "",
            )
            for i, (used, asked) in enumerate(zip(ranks.eps, ranks.asked, strict=True))
        ),
        negative=(significant(block.smallest), estimate_text(negative), interval_text(negative)),
        eigenvalues=tuple(
            (significant(value, 6), f"{residual:.1e}", "yes" if done else "no")
            for value, residual, done in pairs
        ),
        notes=block.notes,
        power_law=tuple(power_law_cells(block)),
    )


def _near_zero(block: BlockSpectrum) -> str:
    last = len(block.ranks.eps) - 1
    eps = block.ranks.eps[last]
    share = degeneracy_text(block, last)
    return f"{block.name}: {share} of {block.size:,} eigenvalues are below {eps:.1e} in magnitude"
