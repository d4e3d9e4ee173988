"""Pictures of landscapes: what is written in them, that it can be read, and what is refused."""

from __future__ import annotations

import builtins
import itertools
import struct
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawqkit as hk
from hawqkit.errors import InputError, Unsupported
from hawqkit.records import Landscape, LandscapeAxis
from hawqkit.records.measured import to_table
from hawqkit.report.landscape_figures import landscape_figure, make_figure
from hawqkit.report.style import styled

T = np.linspace(-2.0, 2.0, 9)


def line(scale: float = 1.0) -> Landscape:
    """Return a quartic whose quadratic model has slope 0.5 and curvature 3."""
    losses = scale * (1 + 0.5 * T + 1.5 * T**2 + 0.1 * T**4)
    axis = LandscapeAxis("top-1", "none", 1.0, tuple(T.tolist()), 0.5 * scale, 3.0, 1e-6)
    return Landscape(
        (axis,), to_table(losses[:, None]), scale, ((3.0 * scale,),), None, "cross-entropy", 100.0,
        50, 0, 10, 1, "net", "hash", "data",
    )  # fmt: skip


def plane(scale: float = 1.0) -> Landscape:
    """Return a plane that rises along the first direction alone, ten times as far as the second."""
    t = 10 * T
    losses = scale * (1 + 0.1 * t[:, None] ** 2 + 0 * T[None, :])
    axes = (
        LandscapeAxis("random 1", "filter", 7.0, tuple(t.tolist()), 0.0),
        LandscapeAxis("gradient", "unit", 1.0, tuple(T.tolist()), 0.0),
    )
    return Landscape(
        axes, to_table(losses), scale, ((0.2 * scale, 0.0), (0.0, 0.0)), 0.1, "squared error",
        100.0, 50, 0, 82, 2, "net", "hash", "data",
    )  # fmt: skip


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


def drawn(landscape: Landscape, view: str) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """Return the picture (rows, columns, 4), and text -> its box in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    with styled():
        figure = make_figure(landscape, view)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        hidden = set()  # matplotlib keeps ticks beyond the ends of an axis, and does not draw them
        for axis in [a for axes in figure.axes for a in (axes.xaxis, axes.yaxis)]:
            low, high = sorted(axis.get_view_interval())
            beyond = [t for t in axis.get_major_ticks() if not low <= t.get_loc() <= high]
            hidden |= {id(tick.label1) for tick in beyond}
        found = [
            t
            for t in figure.findobj(Text)
            if t.get_visible() and t.get_text().strip() and id(t) not in hidden
        ]
        boxes = {f"{i}: {t.get_text()}": t.get_window_extent() for i, t in enumerate(found)}
        return np.asarray(canvas.buffer_rgba()), boxes


VIEWS = {
    "line": (line(), "auto"),
    "contour": (plane(), "contour"),
    "surface": (plane(), "surface"),
    "long numbers": (plane(1.23456e-7), "contour"),
    "large numbers": (line(98765.0), "auto"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_no_text_is_cut_off_and_none_lies_on_another(name: str) -> None:
    landscape, view = VIEWS[name]
    picture, boxes = drawn(landscape, view)
    opaque = picture[..., 3] > 0
    assert opaque.any()
    assert not any(edge.any() for edge in (opaque[0], opaque[-1], opaque[:, 0], opaque[:, -1]))
    if view == "surface":
        return  # boxes of slanted labels are wider than the labels
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].padded(-0.5).overlaps(boxes[other].padded(-0.5)), (one, other)


def test_axes_say_what_they_are_and_in_which_unit() -> None:
    shown = " ".join(texts(landscape_figure(line())))
    for words in (
        "t along top-1 eigenvector, eigenvalue 3", "distance in weight space",
        "mean loss, nats", "measured", "quadratic model, curvature 3",
    ):  # fmt: skip
        assert words in shown
    shown = " ".join(texts(landscape_figure(plane())))
    for words in (
        "t along random direction 1", "in norms of each filter", "t along gradient",
        "distance in weight space", "mean loss, half squared distance", "quadratic model",
    ):  # fmt: skip
        assert words in shown
    longer = replace(line(), axes=(replace(line().axes[0], length=2.5),), objective="my loss")
    shown = " ".join(texts(landscape_figure(longer)))
    assert "in units of 2.5 in weight space" in shown
    assert "mean loss (my loss)" in shown


def test_the_line_shows_the_measured_points_and_the_model() -> None:
    with styled():
        measured, model = make_figure(line()).axes[0].lines
    np.testing.assert_allclose(measured.get_ydata(), 1 + 0.5 * T + 1.5 * T**2 + 0.1 * T**4)
    x = np.asarray(model.get_xdata(), dtype=np.float64)
    np.testing.assert_allclose(model.get_ydata(), 1 + 0.5 * x + 1.5 * x**2)


def test_the_first_direction_of_a_plane_is_horizontal() -> None:
    """The loss changes with the first direction alone, so its level lines are upright."""
    with styled():
        axes = make_figure(plane()).axes[0]
    lines = axes.collections[1]  # after the shades
    assert axes.get_xlim() == (-20.0, 20.0)
    assert axes.get_ylim() == (-2.0, 2.0)
    vertices = [p.vertices for p in lines.get_paths() if len(p.vertices)]
    assert len(vertices) == 8
    for line_ in vertices:
        assert len(np.unique(np.abs(line_[:, 0]).round(6))) == 1
        assert set(line_[:, 1]) >= {-2.0, 2.0}


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_levels_are_spaced_by_ratio_only_over_a_wide_range(scale: float) -> None:
    from matplotlib.colors import LogNorm

    with styled():
        narrow, wide = (
            make_figure(replace(plane(scale), losses=to_table(scale * values)))
            for values in (1 + T[:, None] ** 2 + 0 * T, 0.01 + T[:, None] ** 2 + 0 * T)
        )
    assert not isinstance(narrow.axes[0].collections[0].norm, LogNorm)
    assert isinstance(wide.axes[0].collections[0].norm, LogNorm)


@pytest.mark.parametrize("view", ["auto", "surface"])
def test_losses_that_are_missing_or_all_alike_can_be_drawn(view: str) -> None:
    losses = plane().values
    losses[0, 0] = np.nan
    ET.fromstring(landscape_figure(replace(plane(), losses=to_table(losses)), view=view))
    flat = replace(plane(), losses=to_table(0 * plane().values + 2.0))
    ET.fromstring(landscape_figure(flat, view=view))
    without = replace(plane(), curvatures=None)
    assert "quadratic model" not in texts(landscape_figure(without, view=view))


def test_files_are_written_and_the_same_twice(tmp_path: Path) -> None:
    path = hk.draw_landscape(plane(), tmp_path / "plane.png", dpi=50)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (320, 260)  # 6.4 x 5.2 inches
    assert hk.draw_landscape(plane(), tmp_path / "again.png", dpi=50).read_bytes() == data
    svg = hk.draw_landscape(line(), tmp_path / "line.svg").read_text()
    assert ET.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert svg == hk.draw_landscape(line(), tmp_path / "line.svg").read_text()


def test_unknown_suffixes_and_views_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither in \.png nor in \.svg"):
        hk.draw_landscape(line(), tmp_path / "line.pdf")
    with pytest.raises(InputError, match="Did you mean 'surface'"):
        hk.draw_landscape(plane(), tmp_path / "plane.png", view="surfase")
    with pytest.raises(InputError, match="needs two directions"):
        hk.draw_landscape(line(), tmp_path / "line.png", view="surface")


def test_without_matplotlib_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unsupported, match=r"pip install 'hawqkit\[plots\]'"):
        hk.draw_landscape(line(), tmp_path / "line.png")
