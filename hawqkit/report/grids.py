"""Figures of single layers: bits, stability, and the heat map of layer x format.

Layers stand as `arrangement` lays them out: a row for each kind, a column for each block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hawqkit.formats import parse_format
from hawqkit.records import Allocation, Score, Sensitivities, to_array
from hawqkit.report.arrangement import Arrangement, arrange
from hawqkit.report.comparison import bits_label
from hawqkit.report.style import (
    DOUBT_MAP,
    INK,
    LOSS_MAP,
    SOFT,
    bare,
    label,
    light,
    new_figure,
    plain_log_ticks,
    styled,
    to_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

WIDTH = 9.6
MOST_LABELLED = 44  # columns in which a cell still has room for two characters
MOST_VECTOR_CELLS = 6000  # beyond, cells are drawn as one image: the page stays small
DOUBTS = (0.05, 0.1, 0.2, 0.5, 1.0)  # ends of the scale of relative errors
LEAST_COLUMNS = 16  # a model of few layers is not stretched over the whole width

Array = NDArray[np.float64]


def bits_figure(sensitivities: Sensitivities, allocation: Allocation) -> str:
    """Return the bits of every layer in the model's order; darker means more bits.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    layers = sensitivities.layers
    used = {allocation.layers[layer.name] for layer in layers if layer.name in allocation.layers}
    stored = max(layer.dtype_bits for layer in layers)
    formats = sorted(used, key=lambda f: (parse_format(f).code_bits(stored), f))
    arrangement = arrange(layers)
    values = np.full((len(arrangement.strips), arrangement.columns), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for row, strip in enumerate(arrangement.strips):
        for column, index in enumerate(strip.cells):
            if index is not None and layers[index].name in allocation.layers:
                name = allocation.layers[layers[index].name]
                values[row, column] = formats.index(name)
                texts[row, column] = bits_label(name, layers[index].dtype_bits)
    with styled():
        from matplotlib.colors import BoundaryNorm, ListedColormap
        from matplotlib.patches import Patch

        colors = _steps(LOSS_MAP, len(formats))
        norm = BoundaryNorm(np.arange(len(formats) + 1) - 0.5, len(formats))
        figure = new_figure(WIDTH, 1.0 + 0.27 * len(arrangement.strips))
        axes = figure.subplots()
        _cells(axes, arrangement, values, ListedColormap(colors), norm, texts)
        counts = [sum(f == name for f in allocation.layers.values()) for name in formats]
        handles = [Patch(facecolor=color, edgecolor=SOFT, linewidth=0.5) for color in colors]
        names = [f"{label(f)} ({count})" for f, count in zip(formats, counts, strict=True)]
        figure.legend(handles, names, loc="outside upper left", ncols=min(len(formats), 6))
        return to_svg(figure, "bits", "Bits of each layer")


def stability_figure(sensitivities: Sensitivities, allocation: Allocation) -> str:
    """Return in how many percent of resampled probes each layer keeps its format; dark = doubtful.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    layers = sensitivities.layers
    arrangement = arrange(layers)
    values = np.full((len(arrangement.strips), arrangement.columns), np.nan)
    texts = np.full(values.shape, "", dtype=object)
    for row, strip in enumerate(arrangement.strips):
        for column, index in enumerate(strip.cells):
            share = None if index is None else allocation.stability.get(layers[index].name)
            if share is not None:
                values[row, column] = share
                texts[row, column] = f"{100 * share:.0f}"
    with styled():
        from matplotlib import colormaps
        from matplotlib.colors import Normalize

        figure = new_figure(WIDTH, 0.8 + 0.27 * len(arrangement.strips))
        axes = figure.subplots()
        mapped = colormaps[f"{DOUBT_MAP}_r"]
        _cells(axes, arrangement, values, mapped, Normalize(0.0, 1.0), texts)
        return to_svg(figure, "stability", "How often each layer keeps its format")


def heat_figure(
    sensitivities: Sensitivities, score: Score, allocation: Allocation | None = None
) -> str:
    """Return predicted loss of every layer in every format, beside its relative standard error.

    Each strip of the arrangement is repeated for every format, coarsest first. The format that the
    allocation chose carries a dot.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    arrangement = arrange(sensitivities.layers)
    values, stderr = to_array(score.values), to_array(score.stderr)
    with np.errstate(divide="ignore", invalid="ignore"):
        doubt = np.where(values > 0, stderr / values, np.nan)
    losses = np.where(
        values > 0, values, np.nan
    )  # a loss of exactly zero has no color on a log scale
    rows = len(arrangement.strips) * len(sensitivities.formats)
    gaps = 0.45 * (len(arrangement.strips) - 1)
    with styled():
        from matplotlib import colormaps
        from matplotlib.colors import LogNorm, Normalize

        figure = new_figure(WIDTH, 1.25 + 0.135 * (rows + gaps))
        panels = figure.subplots(1, 2, sharey=True)
        finite = losses[np.isfinite(losses)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (1e-3, 1.0)
        typical = np.nanquantile(doubt, 0.95) if np.isfinite(doubt).any() else 0.0
        end = next((d for d in DOUBTS if typical <= d), DOUBTS[-1])
        norms = (LogNorm(low, high if high > low else 10 * low), Normalize(0.0, end))
        sides = zip(panels, (losses, doubt), norms, (LOSS_MAP, DOUBT_MAP), strict=True)
        for axes, table, norm, name in sides:
            _heat_panel(axes, arrangement, table, colormaps[name], norm)
        _heat_labels(panels[0], arrangement, sensitivities.formats)
        if allocation is not None:
            _mark_chosen(panels[0], arrangement, sensitivities, allocation, norms[0], losses)
        panels[0].set_title("Predicted loss, nats", pad=8)
        panels[1].set_title("Its standard error, relative", pad=8)
        _color_bars(figure, panels, norms)
        return to_svg(figure, "heat", "Predicted loss of each layer in each format")


def _heat_panel(
    axes: Axes, arrangement: Arrangement, table: Array, cmap: Colormap, norm: Normalize
) -> None:
    formats = table.shape[1]
    for position, strip in enumerate(arrangement.strips):
        top = position * (formats + 0.45)
        block = np.full((formats, len(strip.cells)), np.nan)
        for column, index in enumerate(strip.cells):
            if index is not None:
                block[:, column] = table[index]
        _mesh(axes, block, top, cmap, norm)
        exists = np.array([index is not None for index in strip.cells])
        missing = np.isnan(block) & exists
        ys, xs = np.nonzero(missing)
        if len(xs):
            axes.plot(xs, top + ys, linestyle="none", marker="x", markersize=2.5, color=SOFT,
                      markeredgewidth=0.6)  # fmt: skip
    axes.set_xlim(-0.5, max(arrangement.columns, LEAST_COLUMNS) - 0.5)
    axes.set_ylim(len(arrangement.strips) * (formats + 0.45) - 0.95, -0.5)
    _column_ticks(axes, arrangement)
    bare(axes)


def _heat_labels(axes: Axes, arrangement: Arrangement, formats: tuple[str, ...]) -> None:
    """Name every format beside its row, and every strip left of its formats."""
    height = len(formats) + 0.45
    starts = [position * height for position in range(len(arrangement.strips))]
    rows = [start + row for start in starts for row in range(len(formats))]
    names = [label(name) for name in formats] * len(starts)
    axes.set_yticks(rows, names, fontsize=6.5)
    axes.tick_params(axis="y", pad=2)
    middles = [start + 0.5 * (len(formats) - 1) for start in starts]
    side = axes.secondary_yaxis(-0.17)
    side.set_yticks(
        middles, [label(strip.label) for strip in arrangement.strips], fontweight="bold"
    )
    side.tick_params(length=0)
    side.spines[:].set_visible(False)


def _mark_chosen(
    axes: Axes,
    arrangement: Arrangement,
    sensitivities: Sensitivities,
    allocation: Allocation,
    norm: Normalize,
    losses: Array,
) -> None:
    from matplotlib import colormaps

    height = len(sensitivities.formats) + 0.45
    spots: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for position, strip in enumerate(arrangement.strips):
        for column, index in enumerate(strip.cells):
            name = "" if index is None else sensitivities.layers[index].name
            chosen = allocation.layers.get(name)
            if index is None or chosen not in sensitivities.formats:
                continue
            row = sensitivities.formats.index(chosen)
            loss = losses[index, row]
            bright = bool(np.isnan(loss)) or light(colormaps[LOSS_MAP](float(norm(loss))))
            spots[bright].append((column, position * height + row))
    for bright, found in spots.items():
        axes.plot(
            [x for x, _ in found], [y for _, y in found], linestyle="none", marker="o",
            markersize=2.6, color=INK if bright else "white", markeredgewidth=0,
        )  # fmt: skip


def _color_bars(figure: Figure, panels: Any, norms: tuple[Normalize, ...]) -> None:
    from matplotlib.cm import ScalarMappable

    for axes, norm, name, extend in zip(
        panels, norms, (LOSS_MAP, DOUBT_MAP), ("neither", "max"), strict=True
    ):
        bar = figure.colorbar(
            ScalarMappable(norm, name), ax=axes, location="bottom", extend=extend, aspect=45,
            shrink=0.9, pad=0.02,
        )  # fmt: skip
        bar.outline.set_visible(False)
        if extend == "max":
            ticks = np.linspace(0.0, norm.vmax or 1.0, 6)
            bar.set_ticks(list(ticks), labels=[f"{100 * t:.0f} %" for t in ticks])
        else:
            plain_log_ticks(bar.ax.xaxis)


def _cells(
    axes: Axes,
    arrangement: Arrangement,
    values: Array,
    cmap: Colormap,
    norm: Normalize,
    texts: NDArray[Any],
) -> None:
    """Draw one cell for each layer, with its text where columns leave room for it."""
    _mesh(axes, values, 0.0, cmap, norm)
    if arrangement.columns <= MOST_LABELLED:
        size = 8.0 if arrangement.columns <= 32 else 6.5
        for row, column in np.argwhere(~np.isnan(values)):
            color = cmap(norm(values[row, column]))
            axes.text(
                float(column), float(row), texts[row, column], ha="center", va="center_baseline",
                fontsize=size, color=INK if light(color) else "white",
            )  # fmt: skip
    axes.set_xlim(-0.5, max(arrangement.columns, LEAST_COLUMNS) - 0.5)
    axes.set_ylim(len(arrangement.strips) - 0.5, -0.5)
    axes.set_yticks(
        range(len(arrangement.strips)), [label(strip.label) for strip in arrangement.strips]
    )
    _column_ticks(axes, arrangement)
    bare(axes)


def _mesh(axes: Axes, block: Array, top: float, cmap: Colormap, norm: Normalize) -> None:
    xs = np.arange(block.shape[1] + 1) - 0.5
    ys = np.arange(block.shape[0] + 1) - 0.5 + top
    axes.pcolormesh(
        xs, ys, np.ma.masked_invalid(block), cmap=cmap, norm=norm, edgecolors="white",
        linewidth=0.5, rasterized=block.size > MOST_VECTOR_CELLS,
    )  # fmt: skip


def _column_ticks(axes: Axes, arrangement: Arrangement) -> None:
    step = next(s for s in (1, 5, 10, 20, 50, 100, 10**6) if arrangement.columns / s <= 12)
    axes.set_xticks(range(0, arrangement.columns, step))
    axes.set_xlabel("block" if arrangement.blocks else "position within the row's layers")


def _steps(name: str, count: int) -> list[tuple[float, float, float, float]]:
    """Return colors of a map at equal distances, leaving out its palest and darkest ends."""
    from matplotlib import colormaps

    return [colormaps[name](x) for x in np.linspace(0.12, 0.95, count)] if count > 1 else [
        colormaps[name](0.4)
    ]  # fmt: skip
