"""Terminal tables of a spectrum: what `hawqkit spectrum` ends with and `hawqkit show` repeats.

Every table fits 80 columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hawqkit.records import BlockSpectrum, Estimate, RankStatistics, Spectrum
from hawqkit.records.density import UNRESOLVED
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import (
    DASH,
    clean,
    compact,
    percent,
    percent_with_error,
    plural,
    shorten,
    significant,
    with_error,
)

NAME = 19
MOST_EIGENVALUES = 10
ENDS = 8  # rows at each end of a shortened table


def spectrum_tables(spectrum: Spectrum, *, full: bool = False) -> list[RenderableType]:
    """Return a spectrum as tables: rank and degeneracy, effective ranks, top eigenvalues.

    Args:
        spectrum: the record.
        full: every layer and eigenvalue, not the first and last ones alone.
    """
    rows = _shown(spectrum.everything, full)
    parts: list[RenderableType] = [Text(describe(spectrum), style="bold")]
    parts += [_rank_table(spectrum, rows, column) for column in range(len(thresholds(spectrum)))]
    parts.append(_statistics_table(rows))
    parts.append(_top_table(spectrum, full))
    if any(block.power_law is not None for block in spectrum.everything):
        parts.append(_power_law_table(rows))
    if spectrum.kind == "hessian":
        parts.append(_negative_table(rows))
    if any(u > a for b in spectrum.everything for u, a in _lifted(b)):
        parts.append(Text("eps used: lifted to the measured noise floor of the products"))
    parts += [Text(f"warning: {clean(w)}") for w in spectrum.warnings]
    return parts


def describe(spectrum: Spectrum) -> str:
    """Return in one line what was measured."""
    counts = plural(len(spectrum.blocks), "layer")
    whole = " and of the whole network" if spectrum.whole is not None else ""
    matrix = "Hessian" if spectrum.kind == "hessian" else "Gauss-Newton matrix"
    text = ""
    if spectrum.data is not None:
        text = f", on {plural(spectrum.data.counted, 'prediction')} of {spectrum.data.source}"
    return clean(f"Spectrum of the {matrix} ({spectrum.objective}) of {counts}{whole}{text}")


def thresholds(spectrum: Spectrum) -> tuple[float, ...]:
    """Return the thresholds that were asked for, the same for every block."""
    return spectrum.everything[0].ranks.asked


def count_text(block: BlockSpectrum, column: int) -> str:
    """Return the rank at a threshold: exact, with its standard error, or not known but bounded."""
    return estimate_text(block.ranks.counts[column])


def estimate_text(count: Estimate) -> str:
    """Return a count, with its standard error where it was sampled, or that it is not known.

    >>> estimate_text(Estimate(7.0, 0.0, 0, 9, "dense", (7.0, 7.0)))
    '7'
    >>> estimate_text(Estimate(7.1, 0.2, 3, 9, "lanczos quadrature", (7.0, 8.0)))
    '7.10 ± 0.20'
    """
    if UNRESOLVED in count.note:
        return "unresolved"
    exact = count.samples == 0 or count.stderr < 0.005
    return f"{count.count:,}" if exact else with_error(count.value, count.stderr)


def interval_text(count: Estimate) -> str:
    """Return the interval of a count, `exact` where it was counted one by one."""
    if count.interval is None:
        return DASH
    low, high = count.interval
    return "exact" if low == high else f"{low:,.0f} to {high:,.0f}"


def degeneracy_text(block: BlockSpectrum, column: int) -> str:
    """Return 1 - rank/n in percent; its bounds where the rank is not known."""
    share = block.ranks.degeneracy[column]
    if not block.resolves(column) and share.interval is not None:
        low, high = share.interval
        return f"{percent(max(low, 0.0), 0).removesuffix(' %')} to {percent(high, 0)}"
    value = percent(max(share.value, 0.0), 2)
    if share.samples == 0 or share.stderr < 5e-5:
        return value
    return percent_with_error(share.value, share.stderr)


def eigenvalue_text(value: float, residual: float | None) -> str:
    """Return an eigenvalue with the bound of its error; a node of the quadrature has none."""
    if residual is None:
        return f">= {significant(abs(value))}"
    return f"{significant(value, 5)} ± {residual:.0e}"


def _rank_table(spectrum: Spectrum, rows: Sequence[BlockSpectrum | int], column: int) -> Table:
    asked = thresholds(spectrum)[column]
    table = new_table(f"Numerical rank: eigenvalues with |lambda| >= eps = {asked:g}")
    add_columns(table, "block", "n", "rank", "95 % interval", "degeneracy\n1 - rank/n", "eps\nused")
    for row in rows:
        if isinstance(row, int):
            table.add_row(f"{row} more", *[""] * 5, style="dim")
            continue
        used = row.ranks.eps[column]
        table.add_row(
            _name(row),
            compact_count(row.size),
            count_text(row, column),
            interval_text(row.ranks.counts[column]),
            degeneracy_text(row, column),
            f"{used:.0e}" if used > asked else "",
        )
    return table


def compact_count(count: int) -> str:
    """Return a count in few characters.

    >>> compact_count(7760), compact_count(134_515_008)
    ('7760', '134.5M')
    """
    return f"{count}" if count < 10**6 else f"{count / 1e6:.1f}M"


def _statistics_table(rows: Sequence[BlockSpectrum | int]) -> Table:
    table = new_table("Trace, largest eigenvalue, and what else is called rank")
    add_columns(
        table,
        "block",
        "trace",
        "lambda_max",
        "stable\nrank",
        "trace /\nlambda_1",
        "particip.\nratio",
        "entropy\nrank",
    )
    for row in rows:
        if isinstance(row, int):
            table.add_row(f"{row} more", *[""] * 6, style="dim")
            continue
        table.add_row(
            _name(row),
            *statistics_cells(row.statistics)[:1],
            compact(row.largest),
            *statistics_cells(row.statistics)[1:],
        )
    return table


def statistics_cells(statistics: RankStatistics | None) -> list[str]:
    """Return trace, stable rank, tr/lambda_1, participation ratio and entropy rank."""
    if statistics is None:
        return [DASH] * 5
    found = (
        statistics.trace,
        statistics.stable,
        statistics.trace_ratio,
        statistics.participation,
        statistics.entropy,
    )
    return [_short(estimate) for estimate in found]


def _short(estimate: Estimate) -> str:
    """Return a value, and its relative error where it was sampled."""
    value = compact(estimate.value)
    if estimate.samples == 0 or estimate.stderr == 0:
        return value
    return f"{value} ±{100 * min(estimate.relative_error, 9.99):.0f}%"


def _top_table(spectrum: Spectrum, full: bool) -> Table:
    """Return the top eigenvalues of the whole network, or of the layer where they are largest."""
    have = [block for block in spectrum.everything if block.top is not None]
    best = max(have, key=lambda b: abs(b.largest), default=None)
    if best is None or best.top is None:
        table = new_table("No eigenpairs were asked for (spectrum.top is 0)")
        add_columns(table, "block", "largest |node|")
        for block in spectrum.everything:
            table.add_row(_name(block), significant(block.ranks.largest))
        return table
    table = new_table(f"Top eigenvalues of {clean(best.name)}, with residuals |A v - lambda v|")
    add_columns(table, "number", "eigenvalue", "residual", "converged")
    pairs = zip(best.top.values, best.top.residuals, best.top.converged, strict=True)
    for number, (value, residual, done) in enumerate(pairs, 1):
        if number > MOST_EIGENVALUES and not full:
            break
        table.add_row(
            str(number), significant(value, 6), f"{residual:.1e}", "yes" if done else "no"
        )
    return table


def power_law_cells(block: BlockSpectrum) -> list[str]:
    """Return K, exponent with its error, distance, threshold and the verdict on the power law."""
    law = block.power_law
    if law is None:
        return [DASH] * 5
    return [
        f"{law.K:,}",
        with_error(law.exponent, law.stderr),
        significant(law.distance, 2),
        significant(law.threshold, 2),
        "not refused" if law.accepted else "refused",
    ]


def _power_law_table(rows: Sequence[BlockSpectrum | int]) -> Table:
    table = new_table("Power law lambda_k = lambda_1 k^-s of the K largest known eigenvalues")
    add_columns(table, "block", "K", "exponent s", "KS distance", "threshold", "verdict")
    for row in rows:
        if isinstance(row, int):
            table.add_row(f"{row} more", *[""] * 5, style="dim")
            continue
        table.add_row(_name(row), *power_law_cells(row))
    return table


def _negative_table(rows: Sequence[BlockSpectrum | int]) -> Table:
    table = new_table("Negative curvature: eigenvalues of at most -eps, the smallest eps of each")
    add_columns(table, "block", "smallest\neigenvalue", "eps", "how many", "95 % interval")
    for row in rows:
        if isinstance(row, int):
            table.add_row(f"{row} more", *[""] * 4, style="dim")
            continue
        count = row.ranks.negative[-1]
        table.add_row(
            _name(row),
            significant(row.smallest),
            f"{row.ranks.eps[-1]:.1e}",
            estimate_text(count),
            interval_text(count),
        )
    return table


def _lifted(block: BlockSpectrum) -> zip[tuple[float, float]]:
    return zip(block.ranks.eps, block.ranks.asked, strict=True)


def _name(block: BlockSpectrum) -> Text:
    return Text(shorten(block.name, NAME))


def _shown(blocks: Sequence[BlockSpectrum], full: bool) -> list[BlockSpectrum | int]:
    """Return the rows of a table; a number stands for how many are left out."""
    if full or len(blocks) <= 2 * ENDS + 1:
        return list(blocks)
    return [*blocks[:ENDS], len(blocks) - 2 * ENDS, *blocks[-ENDS:]]
