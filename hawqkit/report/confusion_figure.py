"""The picture of a classifier's confusion: what the classes that lose most are taken for.

Letters in shapes: C classes, R rows and K columns that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hawqkit.records import Classification, Integers
from hawqkit.report.style import (
    INK,
    LOSS_MAP,
    bare,
    label,
    light,
    new_figure,
    styled,
    to_svg,
)
from hawqkit.report.wording import short_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize

WIDTH = 9.6
LONGEST = 16  # characters of a class's name
MOST_COLUMNS = 10  # beside which all other classes share one
CHANGE_MAP = "PuOr_r"  # orange is more, purple is fewer; both ends differ in lightness from white
OTHERS = "others"


def confusion_figure(found: Classification, rows: Sequence[int], place: int = 0) -> str:
    """Return what some classes are taken for by the original, and how the chosen mix changes it.

    Args:
        found: with both confusions.
        rows: the true classes to show.
        place: number of the data set, which keeps the ids of several figures apart.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    if found.original.confusion is None or found.chosen.confusion is None:
        raise ValueError("the confusion was not kept")
    before = found.original.confusion.to_array()
    change = found.chosen.confusion.to_array() - before
    columns = shown_columns(change, rows)
    names = [label(short_class(found.name_of(c), LONGEST)) for c in columns]
    panels = [_some(table, rows, columns) for table in (before, change)]
    if not any(table[:, -1].any() for table in panels):
        panels = [table[:, :-1] for table in panels]
    else:
        names.append(OTHERS)
    with styled():
        from matplotlib import colormaps
        from matplotlib.colors import Normalize, PowerNorm

        longest = max(len(name) for name in names)
        figure = new_figure(WIDTH, 1.25 + 0.3 * len(rows) + 0.055 * longest)
        axes = figure.subplots(1, 2, sharey=True)
        most, limit = int(panels[0].max()), max(int(np.abs(panels[1]).max()), 1)
        # The diagonal holds most examples; under the root the few beside it can be seen too.
        _panel(axes[0], panels[0], colormaps[LOSS_MAP], PowerNorm(0.5, 0, max(most, 1)), "d")
        _panel(axes[1], panels[1], colormaps[CHANGE_MAP], Normalize(-limit, limit), "+d")
        axes[0].set_title("Original: how many are taken for which class")
        axes[1].set_title("Change in the chosen mix")
        for panel in axes:
            panel.set_xticks(
                range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor"
            )
            panel.set_xlabel("taken for")
        axes[0].set_yticks(
            range(len(rows)), [label(short_class(found.name_of(c), LONGEST)) for c in rows]
        )
        axes[0].set_ylabel("true class")
        return to_svg(figure, f"confusion-{place}", "Confusion of the classes that lose most")


def shown_columns(change: Integers, rows: Sequence[int]) -> list[int]:
    """Return the classes that get a column: the rows' own, and where their examples go, in order.

    Args:
        change: (C, C) confusion of the mix minus that of the original.
        rows: R true classes.
    """
    moved = np.abs(change[list(rows)]).sum(0)
    moved[list(rows)] = 0
    others = [c for c in np.argsort(-moved, kind="stable").tolist() if moved[c] > 0]
    room = max(MOST_COLUMNS - len(rows), 0)
    return sorted([*rows, *others[:room]])


def _some(table: Integers, rows: Sequence[int], columns: Sequence[int]) -> Integers:
    """Return rows of a table, and the sum of all other columns behind those that are shown."""
    picked = table[list(rows)]
    shown = picked[:, list(columns)]
    rest = picked.sum(1) - shown.sum(1)
    return np.hstack([shown, rest[:, None]])


def _panel(axes: Axes, table: Integers, colors: Colormap, norm: Normalize, form: str) -> None:
    height, width = table.shape
    axes.pcolormesh(
        np.arange(width + 1) - 0.5, np.arange(height + 1) - 0.5, table, cmap=colors, norm=norm,
        edgecolors="white", linewidth=0.8,
    )  # fmt: skip
    for (row, column), count in np.ndenumerate(table):
        if count:
            ink = INK if light(colors(norm(float(count)))) else "white"
            axes.text(column, row, format(int(count), form), ha="center", va="center_baseline",
                      fontsize=7.5, color=ink)  # fmt: skip
    axes.set_ylim(height - 0.5, -0.5)
    bare(axes)
