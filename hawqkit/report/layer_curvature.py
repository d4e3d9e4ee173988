"""What is known of each layer's curvature beside its bits: trace, λₘₐₓ, ranks, degeneracy.

The probe gives trace and participation ratio of every layer, a spectrum the rest for the layers it
was measured on, the scores of the true Hessian their own trace and eigenvalue. A column in which
nothing was measured is left out; in one that is there, a layer without a figure has a dash.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from hawqkit.formats import parse_format
from hawqkit.records import Allocation, BlockSpectrum, Estimate, Sensitivities, Spectrum
from hawqkit.report.comparison import bits_label
from hawqkit.report.spectral_tables import degeneracy_text, eigenvalue_text, thresholds
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import (
    DASH,
    clean,
    common_prefix,
    compact,
    percent,
    shorten,
    significant,
    with_error,
)
from hawqkit.sensitivity.curvature_scores import layer_eigenvalues_of, layer_traces_of

NAME = 19
ENDS = 8  # rows at each end of a shortened table


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a layer.

    Attributes:
        text: as a reader sees it, a dash where nothing was measured.
        value: what rows are ordered by, None where nothing was measured.
        short: for the terminal.
        probe: it comes from the probe, in a column whose other figures come from the spectrum.
    """

    text: str = DASH
    value: float | None = None
    short: str = DASH
    probe: bool = False


NOTHING = Cell()


@dataclass(frozen=True, slots=True)
class Column:
    """A column in which at least one layer has a figure.

    Attributes:
        head: its name on the page.
        short: its name in the terminal, empty where it is left out there.
        words: its name in a list of orders.
        cells: one a layer.
        ranks: where each layer stands if the largest figure comes first, unmeasured ones last.
    """

    head: str
    short: str
    words: str
    cells: tuple[Cell, ...]
    ranks: tuple[int, ...] = ()


def curvature_columns(
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    spectrum: Spectrum | None = None,
) -> tuple[Column, ...]:
    """Return every column in which something was measured, the bits first."""
    columns = [
        *_bits(sensitivities, allocation),
        _probe_trace(sensitivities),
        *_hessian_scores(sensitivities),
        *_spectral(sensitivities, spectrum),
    ]
    return tuple(
        Column(c.head, c.short, c.words, c.cells, _ranks(c.cells))
        for c in columns
        if any(cell.value is not None for cell in c.cells)
    )


def curvature_table(
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    spectrum: Spectrum | None = None,
    *,
    full: bool = False,
) -> Table:
    """Return the columns that fit 80 characters as a terminal table.

    Args:
        sensitivities: for trace and participation ratio.
        allocation: for the bits, None if nothing was chosen.
        spectrum: for eigenvalues, ranks and degeneracy.
        full: every layer; otherwise the first and last eight, and how many lie between.
    """
    columns = [c for c in curvature_columns(sensitivities, allocation, spectrum) if c.short]
    names = [layer.name for layer in sensitivities.layers]
    prefix = common_prefix(names)
    table = new_table(
        f"Curvature of each layer beside its bits ({DASH}: not measured)"
        + (f"; all under {prefix}" if prefix else "")
    )
    add_columns(table, "layer", *(c.short for c in columns))
    shown: list[int | None] = list(range(len(names)))
    if not full and len(names) > 2 * ENDS + 1:
        shown = [*range(ENDS), None, *range(len(names) - ENDS, len(names))]
    for index in shown:
        if index is None:
            more = Text(f"… {len(names) - 2 * ENDS} more", style="italic")
            table.add_row(more, *[""] * len(columns))
            continue
        name = Text(shorten(names[index][len(prefix) :], NAME))
        table.add_row(name, *(c.cells[index].short for c in columns))
    return table


def _bits(sensitivities: Sensitivities, allocation: Allocation | None) -> list[Column]:
    if allocation is None:
        return []
    cells = []
    for layer in sensitivities.layers:
        name = allocation.layers.get(layer.name)
        if name is None:
            cells.append(NOTHING)
            continue
        bits = parse_format(name).code_bits(layer.dtype_bits)
        short = bits_label(name, layer.dtype_bits)
        cells.append(Cell(f"{short} ({clean(name)})", float(bits), short))
    return [Column("bits (format)", "bits", "bits", tuple(cells))]


def _probe_trace(sensitivities: Sensitivities) -> Column:
    pairs = zip(sensitivities.trace, sensitivities.trace_stderr, strict=True)
    cells = tuple(_figure(value, stderr) for value, stderr in pairs)
    return Column("trace of G, nats", "trace", "trace", cells)


def _hessian_scores(sensitivities: Sensitivities) -> list[Column]:
    """Return what the scores of the true Hessian measured."""
    curvature = sensitivities.curvature
    if curvature is None:
        return []
    found = []
    if curvature.traces:
        pairs = zip(*(a.tolist() for a in layer_traces_of(curvature)), strict=True)
        cells = tuple(_figure(value, stderr) for value, stderr in pairs)
        found.append(Column("trace of the Hessian, nats", "", "trace of the Hessian", cells))
    if curvature.eigenvalues:
        pairs = zip(*(a.tolist() for a in layer_eigenvalues_of(curvature)), strict=True)
        cells = tuple(_figure(value, spread) for value, spread in pairs)
        head = "λₘₐₓ of the Hessian, mean ± deviation over shards"
        found.append(Column(head, "", "λₘₐₓ over shards", cells))
    return found


def _spectral(sensitivities: Sensitivities, spectrum: Spectrum | None) -> list[Column]:
    """Return eigenvalue, ranks and degeneracy; of the participation ratio also the probe's."""
    names = [layer.name for layer in sensitivities.layers]
    probe = tuple(_ratio(value) for value in sensitivities.participation_ratio)
    if spectrum is None:
        return [Column("participation ratio", "particip.\nratio", "participation ratio", probe)]
    blocks = {block.name: block for block in spectrum.blocks}

    def column(head: str, short: str, words: str, cell: Callable[[BlockSpectrum], Cell]) -> Column:
        cells = (cell(blocks[name]) if name in blocks else NOTHING for name in names)
        return Column(head + of, short, words, tuple(cells))

    hessian = spectrum.kind == "hessian"
    of = " of the Hessian" if hessian else ""
    ratio = column("participation ratio", "particip.\nratio", "participation ratio",
                   lambda b: _statistic(b, "participation"))  # fmt: skip
    if hessian:  # another matrix than the probe's, so that the two stay apart
        extra = [Column("participation ratio of G", "", "participation ratio of G", probe)]
    else:
        extra = []
        ratio = Column(ratio.head, ratio.short, ratio.words, _or_probe(ratio.cells, probe))
    return [
        column("λₘₐₓ", "lambda\nmax", "λₘₐₓ", _largest),
        column("stable rank", "stable\nrank", "stable rank", lambda b: _statistic(b, "stable")),
        column("tr / λ₁", "", "tr / λ₁", lambda b: _statistic(b, "trace_ratio")),
        *extra,
        ratio,
        column("entropy rank", "entropy\nrank", "entropy rank", lambda b: _statistic(b, "entropy")),
        *(
            column(
                f"degeneracy at eps = {eps:g}",
                f"degen. at\n{eps:g}" if index == 0 else "",
                f"degeneracy at {eps:g}",
                lambda b, i=index: _degeneracy(b, i),  # type: ignore[misc]
            )
            for index, eps in enumerate(thresholds(spectrum))
        ),
    ]


def _figure(value: float | None, stderr: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return NOTHING
    return Cell(with_error(value, stderr), value, compact(value))


def _ratio(value: float | None) -> Cell:
    if value is None:
        return NOTHING
    return Cell(significant(value, 3), value, significant(value, 3))


def _or_probe(measured: Sequence[Cell], probe: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the spectrum's figures, and the probe's where there is none."""
    return tuple(
        m if m.value is not None else Cell(p.text, p.value, p.short, p.value is not None)
        for m, p in zip(measured, probe, strict=True)
    )


def _largest(block: BlockSpectrum) -> Cell:
    text = eigenvalue_text(block.largest, block.largest_residual)
    return Cell(text, block.largest, compact(block.largest))


def _statistic(block: BlockSpectrum, name: str) -> Cell:
    if block.statistics is None:
        return NOTHING
    found: Estimate = getattr(block.statistics, name)
    stderr = found.stderr if found.samples else None
    return Cell(with_error(found.value, stderr), found.value, significant(found.value, 3))


def _degeneracy(block: BlockSpectrum, column: int) -> Cell:
    """Return 1 - rank/n at a threshold, with the eps that was used where it was lifted."""
    text = degeneracy_text(block, column)
    asked, used = block.ranks.asked[column], block.ranks.eps[column]
    lifted = f" (eps {used:.1e})" if used > asked else ""
    share = block.ranks.degeneracy[column].value
    short = percent(max(share, 0.0)) if block.resolves(column) else "bounds"
    return Cell(text + lifted, share, short + ("*" if lifted else ""))


def _ranks(cells: Sequence[Cell]) -> tuple[int, ...]:
    """Return each cell's place if the largest comes first; ties keep the model's order."""

    def key(index: int) -> tuple[bool, float]:
        value = cells[index].value
        return value is None, -(value or 0.0)

    places = {index: place for place, index in enumerate(sorted(range(len(cells)), key=key))}
    return tuple(places[index] for index in range(len(cells)))
