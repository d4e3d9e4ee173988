"""Figures of whole mixes: result, frontier, predicted against measured; and of layers by depth.

Every function returns one inline SVG. Figures of single layers and formats are in `grids`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hawqkit.records import Allocation, Frontier, FrontierPoint, Sensitivities, Validation
from hawqkit.report.arrangement import kind_of, short_kinds
from hawqkit.report.comparison import Agreement, Row, agreements, compare, texts_of
from hawqkit.report.grids import bits_figure, heat_figure, stability_figure
from hawqkit.report.style import (
    BLUE,
    INK,
    LINE,
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
from hawqkit.report.wording import shorten, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "agreement_figure",
    "bits_figure",
    "depth_figure",
    "frontier_figure",
    "heat_figure",
    "result_figure",
    "stability_figure",
]

WIDTH = 9.6
MOST_SERIES = len(SERIES)
_ONE = 1e-6  # relative, below which points of a frontier are one point


def result_figure(allocation: Allocation | None, validation: Validation) -> str:
    """Return measured KL of every mix with error bars of one standard error, a panel for each text.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    rows, texts = compare(allocation, validation), texts_of(validation)
    rows = [row for row in rows if row.measured]
    with styled():
        figure = new_figure(WIDTH, 0.85 + 0.36 * len(rows))
        panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
        for panel, text in zip(panels, texts, strict=True):
            _result_panel(panel, rows, text)
        panels[0].set_yticks(range(len(rows)), [label(shorten(row.name, 24)) for row in rows])
        for tick, row in zip(panels[0].get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if row.chosen else "normal")
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        return to_svg(figure, "result", "Measured KL divergence of each mix")


def _result_panel(panel: Axes, rows: list[Row], text: str) -> None:
    top = max(row.measured[text].kl for row in rows if text in row.measured)
    for position, row in enumerate(rows):
        if text not in row.measured:
            continue
        m = row.measured[text]
        color = BLUE if row.chosen else SOFT
        panel.barh(position, m.kl, height=0.56, color=color, alpha=1.0 if row.chosen else 0.45)
        panel.errorbar(m.kl, position, xerr=m.kl_stderr, color=INK, capsize=3, linewidth=1.1)
        panel.text(
            m.kl + m.kl_stderr + 0.02 * top,
            position,
            with_error(m.kl, m.kl_stderr),
            va="center",
            fontsize=8,
            fontweight="bold" if row.chosen else "normal",
        )
    panel.set_xlim(0, 1.5 * top if top > 0 else 1.0)  # a mix that rounds nothing loses nothing
    panel.set_title(label(shorten(text, 40)))
    panel.set_xlabel("KL divergence to the original model, nats (shorter is better)")
    panel.grid(axis="x")
    panel.tick_params(axis="y", length=0)


def frontier_figure(frontier: Frontier) -> str:
    """Return size against summed score, with the proven bound, uniform formats and the choice.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    points = sorted(frontier.points, key=lambda p: p.average_bits)
    bits = [p.average_bits for p in points]
    uniform = list(frontier.uniform.items())
    everything = [*points, *frontier.uniform.values(), frontier.chosen]
    floor = _floor([v for p in everything for v in (p.objective, p.bound)])
    with styled():
        figure = new_figure(WIDTH, 4.1)
        axes = figure.subplots()
        axes.set_yscale("log")
        _widen(axes, everything, floor)
        best = np.maximum([p.objective for p in points], floor)
        bound = np.maximum([p.bound for p in points], floor)
        axes.fill_between(bits, bound, best, color=BLUE, alpha=0.22, linewidth=0)
        axes.plot(bits, best, color=BLUE, marker="o", markersize=3, label="best mix found")
        axes.plot(bits, bound, color=INK, linestyle=":", linewidth=1.1, label="proven lower bound")
        axes.plot(
            [p.average_bits for _, p in uniform],
            [max(p.objective, floor) for _, p in uniform],
            linestyle="none", marker="s", markersize=6, color=ORANGE, markerfacecolor="white",
            markeredgewidth=1.5, label="uniform",
        )  # fmt: skip
        for name, p in uniform:
            axes.annotate(
                label(name), (p.average_bits, max(p.objective, floor)), xytext=(7, 4),
                textcoords="offset points", fontsize=8, color=INK,
            )  # fmt: skip
        chosen = frontier.chosen
        axes.plot(
            chosen.average_bits, max(chosen.objective, floor), linestyle="none", marker="*",
            markersize=15, color=INK, markeredgecolor="white", label="chosen", zorder=5,
        )  # fmt: skip
        axes.annotate(
            f"chosen: {chosen.average_bits:.2f} bits",
            (chosen.average_bits, max(chosen.objective, floor)), xytext=(-10, -14),
            textcoords="offset points", ha="right", fontsize=8.5, fontweight="bold",
        )  # fmt: skip
        plain_log_ticks(axes.yaxis)
        axes.margins(x=0.07, y=0.08)
        axes.set_xlabel("average bits of a weight's code")
        axes.set_ylabel("predicted KL (summed score), nats")
        axes.grid(which="major")
        axes.legend(loc="upper right")
        return to_svg(figure, "frontier", "Predicted loss of the best mix at every size")


def _widen(axes: Axes, points: list[FrontierPoint], floor: float) -> None:
    """Make room around points that are one, but for rounding, as those of a single format are."""
    losses = [max(v, floor) for p in points for v in (p.objective, p.bound)]
    sizes = [p.average_bits for p in points]
    if max(losses) < (1 + _ONE) * min(losses):
        axes.set_ylim(min(losses) / 2, max(losses) * 2)
    if max(sizes) < (1 + _ONE) * min(sizes):
        axes.set_xlim(min(sizes) - 0.5, max(sizes) + 0.5)


def agreement_figure(allocation: Allocation | None, validation: Validation) -> str:
    """Return measured against predicted KL, both with error bars, beside the diagonal.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    texts = texts_of(validation)
    found = [a for a in agreements(compare(allocation, validation), texts) if a.ratio is not None]
    with styled():
        figure = new_figure(WIDTH, 4.6)
        axes = figure.subplots()
        values = [v for a in found for v in (a.prediction.kl, a.measured.kl)] or [0.1, 1.0]
        low, high = min(values) / 1.5, max(values) * 1.6
        line = np.array([low, high])
        axes.fill_between(
            line, 0.9 * line, 1.1 * line, color=LINE, alpha=0.6, linewidth=0, label="within 10 %"
        )
        axes.plot(line, line, color=SOFT, linewidth=1, label="measured = predicted")
        for position, text in enumerate(texts):
            _agreement_series(axes, [a for a in found if a.text == text], text, position)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_xlabel("predicted KL, nats")
        axes.set_ylabel("measured KL, nats")
        plain_log_ticks(axes.xaxis)
        plain_log_ticks(axes.yaxis)
        axes.grid(which="major")
        axes.legend(loc="upper left")
        return to_svg(figure, "agreement", "Measured against predicted KL divergence")


def _agreement_series(axes: Axes, found: list[Agreement], text: str, position: int) -> None:
    color, marker = SERIES[position % MOST_SERIES], MARKERS[position % MOST_SERIES]
    axes.errorbar(
        [a.prediction.kl for a in found],
        [a.measured.kl for a in found],
        xerr=[a.prediction.kl_stderr for a in found],
        yerr=[a.measured.kl_stderr for a in found],
        linestyle="none", marker=marker, color=color, markersize=6.5, capsize=2,
        markerfacecolor=color if position == 0 else "white", markeredgewidth=1.4,
        label=f"measured on {label(shorten(text, 30))}",
    )  # fmt: skip
    if position > 0:
        return
    # Mixes of nearly equal KL share one label, so that labels do not cover each other.
    groups: list[list[Agreement]] = []
    for each in sorted(found, key=lambda a: a.measured.kl):
        if groups and each.measured.kl < 1.22 * groups[-1][0].measured.kl:
            groups[-1].append(each)
        else:
            groups.append([each])
    for group in groups:
        axes.annotate(
            ", ".join(label(shorten(a.name, 20)) for a in group),
            (max(a.prediction.kl for a in group), min(a.measured.kl for a in group)),
            xytext=(12, -11), textcoords="offset points", fontsize=8.5,
            fontweight="bold" if any(a.chosen for a in group) else "normal",
        )  # fmt: skip


def depth_figure(sensitivities: Sensitivities) -> str:
    """Return trace (with standard errors) and participation ratio over depth, a line for each kind.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    series, has_blocks = _series_by_kind(sensitivities)
    has_ratio = any(r is not None for r in sensitivities.participation_ratio)
    with styled():
        figure = new_figure(WIDTH, 5.6 if has_ratio else 3.2)
        panels = figure.subplots(2 if has_ratio else 1, 1, sharex=True, squeeze=False)[:, 0]
        for position, (name, members) in enumerate(series.items()):
            look = {
                "color": SERIES[position % MOST_SERIES], "marker": MARKERS[position % MOST_SERIES],
                "markersize": 4.5, "linewidth": 1.1,
            }  # fmt: skip
            members = [(x, i) for x, i in members if (sensitivities.trace[i] or 0) > 0]
            panels[0].errorbar(
                [x for x, _ in members],
                [sensitivities.trace[i] for _, i in members],
                yerr=[sensitivities.trace_stderr[i] or 0.0 for _, i in members],
                elinewidth=0.8, label=label(name), **look,
            )  # fmt: skip
            if has_ratio:
                known = [(x, sensitivities.participation_ratio[i]) for x, i in series[name]]
                known = [(x, r) for x, r in known if r is not None and r > 0]
                panels[1].plot([x for x, _ in known], [r for _, r in known], **look)
        panels[0].set_title("Trace of the Fisher block: how sharply the loss curves")
        panels[0].set_ylabel("trace, nats")
        if has_ratio:
            panels[1].set_title("Participation ratio: over how many directions")
            panels[1].set_ylabel("directions")
        for panel in panels:
            panel.set_yscale("log")
            plain_log_ticks(panel.yaxis)
            panel.grid(which="major")
        panels[-1].set_xlabel("block" if has_blocks else "layer, in the model's order")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
        return to_svg(figure, "depth", "Trace and participation ratio over depth")


def _series_by_kind(sensitivities: Sensitivities) -> tuple[dict[str, list[tuple[int, int]]], bool]:
    """Return kind -> (depth, layer index); one series of all where kinds make no lines."""
    layers = sensitivities.layers
    inside = [layer for layer in layers if layer.block is not None]
    kinds = list(dict.fromkeys(kind_of(layer) for layer in inside))
    if not inside or len({layer.block for layer in inside}) < 2 or len(kinds) > MOST_SERIES:
        return {"layers": [(i, i) for i in range(len(layers))]}, False
    names = short_kinds(kinds)
    series: dict[str, list[tuple[int, int]]] = {names[kind]: [] for kind in kinds}
    for index, layer in enumerate(layers):
        if layer.block is not None:
            series[names[kind_of(layer)]].append((layer.block, index))
    return {name: sorted(members) for name, members in series.items()}, True


def _floor(values: list[float]) -> float:
    """Return what stands for zero on a log axis: a tenth of the smallest positive value."""
    positive = [v for v in values if v > 0]
    return min(positive) / 10 if positive else 1e-12
