"""Pictures of a loss landscape: a curve on a line; contours or a surface on a plane."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import InputError, did_you_mean
from hawqkit.records.landscape import Landscape, LandscapeAxis
from hawqkit.report.style import (
    BLUE,
    INK,
    LOSS_MAP,
    ORANGE,
    label,
    new_figure,
    styled,
    to_svg,
)
from hawqkit.report.wording import clean, significant
from hawqkit.store import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

VIEWS = ("auto", "contour", "surface")
UNITS = {"cross-entropy": "nats", "squared error": "half squared distance"}
LENGTHS = {"filter": "in norms of each filter", "layer": "in norms of each parameter"}
SHADES, LINES = 24, 8
LIGHT = 0.62  # share of the color map that is light enough for lines to be seen on it
# Largest over smallest loss above which levels are spaced by ratio.
LOGARITHMIC = 50.0
FINE = 201  # points of a smooth curve
SAME_SCALE = 3.0  # ratio of the axes' lengths up to which a plane is drawn undistorted

Array = NDArray[np.float64]


def landscape_figure(landscape: Landscape, *, view: str = "auto") -> str:
    """Return a landscape as inline SVG; the arguments are those of `draw_landscape`.

    Raises:
        InputError: the view is unknown, or does not fit the landscape.
        Unsupported: matplotlib is not installed.
    """
    with styled():
        return to_svg(make_figure(landscape, view), "landscape", _title(landscape))


def draw_landscape(
    landscape: Landscape, path: str | Path, *, view: str = "auto", dpi: int = 150
) -> Path:
    """Write a picture of a landscape, and return its path.

    The measured loss stands beside the quadratic model at the center, where that was measured. Loss
    levels are spaced by ratio where the loss spans more than a factor of 50.

    Args:
        landscape: what `loss_landscape` gives.
        path: ends in `.png` or `.svg`.
        view: `contour` or `surface` (in three dimensions) for a plane; `auto` is a curve for a line
            and contours for a plane.
        dpi: pixels per inch of a PNG.

    Raises:
        InputError: the suffix or the view is unknown, or the view does not fit the landscape.
        Unsupported: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise InputError(f"path: {path.name!r} ends neither in .png nor in .svg; name it so.")
    if path.suffix.lower() == ".svg":
        return write_text_atomic(path, landscape_figure(landscape, view=view))
    with styled():
        buffer = io.BytesIO()
        figure = make_figure(landscape, view)
        figure.savefig(
            buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None}
        )
    return write_bytes_atomic(path, buffer.getvalue())


def make_figure(landscape: Landscape, view: str = "auto") -> Figure:
    """Return the figure, made inside of `styled`.

    Raises:
        InputError: the view is unknown, or does not fit the landscape.
    """
    if view not in VIEWS:
        raise InputError(
            f"view: {view!r} is unknown; there are {', '.join(VIEWS)}." + did_you_mean(view, VIEWS)
        )
    if landscape.dimensions == 1:
        if view != "auto":
            raise InputError(f"view: {view!r} needs two directions; the landscape has one.")
        return _line(landscape)
    if view == "surface":
        return _surface(landscape)
    return _contour(landscape)


def _line(landscape: Landscape) -> Figure:
    axis, t, measured = landscape.axes[0], landscape.positions(), landscape.values
    figure = new_figure(5.6, 3.9)
    axes = figure.subplots()
    axes.plot(t, measured, color=BLUE, marker="o", markersize=3.5, label="measured")
    if landscape.curvatures is not None:
        fine = np.linspace(t[0], t[-1], FINE)
        curvature = significant(landscape.curvatures[0][0], 3)
        axes.plot(
            fine, landscape.quadratic(fine), color=ORANGE, linestyle="--",
            label=f"quadratic model, curvature {curvature}",
        )  # fmt: skip
    low, high = _range(measured)
    if high > low:  # the model may leave the picture; the measured loss fills it
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_xlim(t[0], t[-1])
    axes.set_xlabel(_axis_label(axis))
    axes.set_ylabel(_loss_label(landscape))
    axes.grid(which="major")
    axes.set_title(_title(landscape))
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _contour(landscape: Landscape) -> Figure:
    first, second = landscape.axes
    x, y = landscape.positions(0), landscape.positions(1)
    losses = np.ma.masked_invalid(landscape.values.T)  # rows are the vertical axis
    shades, lines, norm = _levels(landscape.values)
    figure = new_figure(6.4, 5.2)
    axes = figure.subplots()
    drawn = axes.contourf(x, y, losses, levels=shades, cmap=_light_map(), norm=norm)
    axes.contour(x, y, losses, levels=lines, colors=INK, linewidths=0.8)
    handles = [_stroke(INK, "-", "measured")]
    if landscape.curvatures is not None:
        fine = np.linspace(x[0], x[-1], FINE), np.linspace(y[0], y[-1], FINE)
        model = landscape.quadratic(*np.meshgrid(*fine))
        if model.max() > lines[0] and model.min() < lines[-1]:
            axes.contour(*fine, model, levels=lines, colors=ORANGE, linewidths=1.1, linestyles="--")
            handles.append(_stroke(ORANGE, "--", "quadratic model"))
    axes.plot(0, 0, color=INK, marker="+", markersize=10, markeredgewidth=1.6)
    _same_scale(axes, first, second)
    axes.set_xlabel(_axis_label(first))
    axes.set_ylabel(_axis_label(second))
    axes.set_title(_title(landscape))
    bar = figure.colorbar(drawn, ax=axes, label=_loss_label(landscape))
    bar.set_ticks(list(lines))
    bar.ax.set_yticklabels([significant(level, 3) for level in lines])
    bar.ax.minorticks_off()
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _surface(landscape: Landscape) -> Figure:
    from matplotlib.ticker import MaxNLocator

    X, Y = np.meshgrid(landscape.positions(0), landscape.positions(1), indexing="ij")
    losses = landscape.values
    _, _, norm = _levels(losses)
    figure = new_figure(6.4, 5.2)
    figure.set_layout_engine("none")  # it does not know how far labels reach in three dimensions
    axes: Any = figure.add_axes((0.0, 0.1, 0.94, 0.96), projection="3d")
    axes.plot_surface(
        X,
        Y,
        losses,
        cmap=_light_map(),
        norm=norm,
        edgecolor=INK,
        linewidth=0.25,
        rstride=1,
        cstride=1,
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel(_axis_label(landscape.axes[0], "\n"), labelpad=20)
    axes.set_ylabel(_axis_label(landscape.axes[1], "\n"), labelpad=20)
    axes.set_zlabel(_loss_label(landscape), labelpad=6)
    axes.set_box_aspect((1, 1, 0.75), zoom=0.9)
    axes.view_init(elev=28, azim=-55)
    figure.suptitle(_title(landscape), x=0.03, ha="left", fontsize=10, fontweight="bold")
    return figure


def _levels(losses: Array) -> tuple[Array, Array, Normalize]:
    """Return levels of shades and of lines, and how they become colors."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = _range(losses)
    if not high > low:
        high = low + max(abs(low), 1.0) * 1e-6
    if low > 0 and high / low > LOGARITHMIC:
        shades, lines = (np.geomspace(low, high, n) for n in (SHADES + 1, LINES + 2))
        return shades, lines[1:-1], LogNorm(low, high)
    shades, lines = (np.linspace(low, high, n) for n in (SHADES + 1, LINES + 2))
    return shades, lines[1:-1], Normalize(low, high)


def _range(losses: Array) -> tuple[float, float]:
    finite = losses[np.isfinite(losses)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _stroke(color: str, style: Literal["-", "--"], name: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=style, linewidth=1.0, label=name)


def _same_scale(axes: Axes, first: LandscapeAxis, second: LandscapeAxis) -> None:
    """Draw the plane undistorted where both axes have one unit and are about as long."""
    spans = [a.positions[-1] - a.positions[0] for a in (first, second)]
    alike = first.normalization == second.normalization
    if alike and max(spans) <= SAME_SCALE * min(spans):
        axes.set_aspect("equal")


def _light_map() -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps[LOSS_MAP](np.linspace(0.0, LIGHT, 256)))


def _called(axis: LandscapeAxis) -> str:
    """Return what a reader calls a direction: `top-1 eigenvector`, `random direction 2`."""
    word, _, number = axis.name.partition(" ")
    if word.startswith("top-"):
        word = f"{word} eigenvector"
    elif word in ("random", "given"):
        word = f"{word} direction"
    return f"{word} {number}".strip()


def _axis_label(axis: LandscapeAxis, comma: str = ", ") -> str:
    eigenvalue = ""
    if axis.eigenvalue is not None:
        eigenvalue = f"{comma}eigenvalue {significant(axis.eigenvalue, 3)}"
    unit = LENGTHS.get(axis.normalization, "distance in weight space")
    if axis.normalization not in LENGTHS and not math.isclose(axis.length, 1.0, rel_tol=1e-3):
        unit = f"in units of {significant(axis.length, 3)} in weight space"
    return label(f"t along {_called(axis)}{eigenvalue}\n{unit}")


def _loss_label(landscape: Landscape) -> str:
    unit = UNITS.get(landscape.objective)
    return f"mean loss, {unit}" if unit else label(f"mean loss ({clean(landscape.objective)})")


def _title(landscape: Landscape) -> str:
    names = " and ".join(axis.name for axis in landscape.axes)
    return label(f"Loss along {names}")
