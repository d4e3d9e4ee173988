"""Figures of a spectrum: densities on a logarithmic scale, and degeneracy against depth."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hawqkit.records import BlockSpectrum, Density, Spectrum
from hawqkit.report.spectral_tables import degeneracy_text, thresholds
from hawqkit.report.style import (
    BLUE,
    INK,
    MARKERS,
    ORANGE,
    SERIES,
    SOFT,
    label,
    new_figure,
    plain_log_ticks,
    styled,
    to_svg,
)
from hawqkit.report.wording import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 9.6
MOST_PANELS = 9
WIDTH_DECADES = 0.08  # of the curve that stands for one eigenvalue
POINTS = 400
LEAST_DECADES = 3.0

Array = NDArray[np.float64]


def density_figure(spectrum: Spectrum) -> str:
    """Return densities per decade of |lambda|, a panel for the whole network and for each layer.

    The share of eigenvalues below the smallest threshold is written as a number. Bands are the
    bootstrap's 95 % over draws.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    chosen = shown_blocks(spectrum)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    with styled():
        figure = new_figure(WIDTH, 0.5 + 2.5 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, block in zip(panels, chosen, strict=False):
            _density_panel(axes, block, spectrum.densities[block.name], spectrum.kind)
        for axes in panels[len(chosen) :]:
            axes.set_visible(False)
        for row in range(rows):
            panels[row * columns].set_ylabel("eigenvalues per decade, share")
        for axes in panels[max(0, len(chosen) - columns) : len(chosen)]:
            axes.set_xlabel("|eigenvalue|")
        return to_svg(figure, "density", "Spectral density on a logarithmic scale")


def shown_blocks(spectrum: Spectrum) -> tuple[BlockSpectrum, ...]:
    """Return the blocks that have room in the figure: the whole, and layers of largest trace."""
    if len(spectrum.everything) <= MOST_PANELS:
        return spectrum.everything
    room = MOST_PANELS - (spectrum.whole is not None)
    order = sorted(spectrum.blocks, key=lambda b: -_trace(b))[:room]
    best = {block.name for block in order}
    return tuple(b for b in spectrum.everything if b is spectrum.whole or b.name in best)


def degeneracy_figure(spectrum: Spectrum) -> str:
    """Return degeneracy against depth, a panel for each threshold, a series for each kind of layer.

    Bars are the 95 % intervals; where the rank is not known, they are all that is drawn.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    asked = thresholds(spectrum)
    in_blocks = all(b.block is not None for b in spectrum.blocks)
    kinds = list(dict.fromkeys(b.kind for b in spectrum.blocks)) if in_blocks else ["layers"]
    if len(kinds) > len(SERIES):
        kinds, in_blocks = ["layers"], False
    with styled():
        figure = new_figure(WIDTH, 3.3)
        panels = figure.subplots(1, len(asked), sharey=True, squeeze=False)[0]
        for column, (axes, eps) in enumerate(zip(panels, asked, strict=True)):
            for place, kind in enumerate(kinds):
                members = [
                    (b.block if in_blocks and b.block is not None else i, b)
                    for i, b in enumerate(spectrum.blocks)
                    if not in_blocks or b.kind == kind
                ]
                _degeneracy_series(axes, members, column, kind, place)
            axes.set_title(f"eps = {eps:g}")
            axes.set_ylim(-0.04, 1.04)
            axes.set_xlabel("block" if in_blocks else "layer, in the model's order")
            axes.grid(which="major")
            axes.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel("degeneracy, 1 - rank/n")
        if in_blocks:
            handles = panels[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside right upper")
        return to_svg(figure, "degeneracy", "Degeneracy of each layer against depth")


def _density_panel(axes: Axes, block: BlockSpectrum, density: Density, kind: str) -> None:
    from matplotlib.ticker import LogLocator

    top = density.largest
    title = label(shorten(block.name, 30))
    if top <= 0:
        axes.set_title(f"{title}: zero")
        return
    end = math.log10(top) + 4 * WIDTH_DECADES
    begin = min(
        math.log10(max(min(block.ranks.eps), block.ranks.noise_floor, 1e-300)), end - LEAST_DECADES
    )
    grid = np.logspace(begin, end, POINTS)
    floor = 0.3 / block.size  # less than one eigenvalue: no curve goes below
    _curve(axes, density, grid, floor, BLUE, "positive")
    if kind == "hessian":
        _curve(axes, density, -grid, floor, ORANGE, "negative")
        axes.legend(loc="lower left", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(floor, 100)
    axes.axvline(block.ranks.noise_floor, color=SOFT, linewidth=0.8, linestyle=":")
    axes.set_xlim(10**begin, 10**end)
    for axis in (axes.xaxis, axes.yaxis):
        plain_log_ticks(axis)
        axis.set_major_locator(LogLocator(base=10, numticks=6))
    last = len(block.ranks.eps) - 1
    axes.set_title(title)
    axes.text(
        0.03, 0.95,
        f"|eigenvalue| < {block.ranks.eps[last]:.1e}:\n{degeneracy_text(block, last)}",
        transform=axes.transAxes, va="top", fontsize=8, color=INK,
    )  # fmt: skip
    axes.grid(which="major")


def _curve(axes: Axes, density: Density, grid: Array, floor: float, color: str, name: str) -> None:
    values = density.evaluate(grid, WIDTH_DECADES, scale="log")
    x = np.abs(grid)
    axes.plot(x, np.maximum(values, floor), color=color, linewidth=1.2, label=name)
    if density.draws >= 2:
        band = density.band(grid, WIDTH_DECADES, scale="log")
        low, high = (np.maximum(edge, floor) for edge in band)
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)


def _degeneracy_series(
    axes: Axes,
    members: list[tuple[int, BlockSpectrum]],
    column: int,
    name: str,
    place: int,
) -> None:
    color, marker = SERIES[place % len(SERIES)], MARKERS[place % len(MARKERS)]
    known = [(x, b) for x, b in members if b.resolves(column)]
    # An interval of nothing still brings the series into the legend.
    axes.plot(
        [x for x, _ in known],
        [b.ranks.degeneracy[column].value for _, b in known],
        linestyle="-" if len(known) > 1 else "none", linewidth=0.8, marker=marker, markersize=5,
        color=color, label=label(name),
    )  # fmt: skip
    for x, b in members:
        low, high = b.ranks.degeneracy[column].interval or (0.0, 0.0)
        axes.plot([x, x], [max(low, 0.0), min(high, 1.0)], color=color, linewidth=1.0, alpha=0.7)


def _trace(block: BlockSpectrum) -> float:
    return block.statistics.trace.value if block.statistics is not None else block.ranks.largest
