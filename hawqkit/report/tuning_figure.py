"""The curve of a tuning run: loss of training and held-out data over the steps, and accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hawqkit.records import HeldOutLoss, Tuning
from hawqkit.report.style import (
    BLUE,
    MARKERS,
    SERIES,
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
SINGLE = 60  # steps that are drawn one by one; of more, means of so many stretches
LOG_RATIO = 50.0  # of the largest to the smallest loss, from which the axis is logarithmic


def tuning_figure(record: Tuning) -> str:
    """Return the loss over the steps, and of a classifier the accuracy beside it.

    Up to `SINGLE` steps are drawn one by one. Of more the line is the mean of `SINGLE` stretches of
    equally many steps, and the band reaches from the 10th to the 90th percentile of the steps of a
    stretch.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    has_accuracy = bool(record.data.classes) and bool(record.curve.accuracy)
    with styled():
        from matplotlib.ticker import MaxNLocator

        figure = new_figure(WIDTH, 3.6)
        panels = figure.subplots(1, 2 if has_accuracy else 1, squeeze=False)[0]
        _training(panels[0], _losses(record))
        for name, points in _by_text(record).items():
            _held_out(panels[0], record, name, [(p.loss, p.loss_stderr) for p in points])
        _scale(panels[0], record)
        panels[0].set_title("Loss: cross-entropy with the labels" if record.curve.cross_entropy
                            else "Loss of training")  # fmt: skip
        panels[0].set_ylabel("nats")
        if has_accuracy:
            _training(panels[1], [100 * a for a in record.curve.accuracy])
            for name, points in _by_text(record).items():
                values = [(p.accuracy, p.accuracy_stderr) for p in points]
                _held_out(panels[1], record, name, [_percent(v) for v in values])
            panels[1].set_title("Accuracy")
            panels[1].set_ylabel("%")
        for panel in panels:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.set_xlabel("steps of the optimizer")
            panel.grid(which="major")
        panels[0].legend(loc="best")
        return to_svg(figure, "tuning", _spoken(record))


def stretches(steps: int, count: int = SINGLE) -> list[tuple[int, int]]:
    """Return (first, end) of at most so many stretches of equally many steps, counted from 0.

    >>> stretches(5, 2), stretches(2, 60)
    ([(0, 2), (2, 5)], [(0, 1), (1, 2)])
    """
    count = min(count, steps)
    return [(steps * i // count, steps * (i + 1) // count) for i in range(count)]


def _losses(record: Tuning) -> Sequence[float]:
    return record.curve.cross_entropy or record.curve.loss


def _training(panel: Axes, values: Sequence[float]) -> None:
    """Draw what batches saw before each step; a batch's number belongs to the step it makes."""
    parts = stretches(len(values))
    single = len(values) <= SINGLE
    places = [(start + end - 1) / 2 for start, end in parts]
    means = [float(np.mean(values[start:end])) for start, end in parts]
    look: dict[str, Any] = {"color": BLUE, "linewidth": 1.3}
    if single:
        look |= {"marker": MARKERS[0], "markersize": 3.5}
    panel.plot(places, means, label="training batches", **look)
    if not single:
        ends = [np.quantile(values[start:end], (0.1, 0.9)) for start, end in parts]
        low, high = np.array(ends).T
        panel.fill_between(places, low, high, color=BLUE, alpha=0.18, linewidth=0)


def _held_out(
    panel: Axes, record: Tuning, name: str, values: Sequence[tuple[float, float | None]]
) -> None:
    points = _by_text(record)[name]
    position = 1 + list(_by_text(record)).index(name)
    panel.errorbar(
        [p.step for p in points],
        [value for value, _ in values],
        yerr=[stderr or 0.0 for _, stderr in values],
        color=SERIES[position % len(SERIES)], marker=MARKERS[position % len(MARKERS)],
        markersize=5, linewidth=1.3, elinewidth=0.8, capsize=2,
        label=label(shorten(name, 30)),
    )  # fmt: skip


def _scale(panel: Axes, record: Tuning) -> None:
    """Make the axis of losses logarithmic where they span far, and otherwise leave it."""
    values = [*_losses(record), *(point.loss for point in record.held_out)]
    if min(values) > 0 and max(values) > LOG_RATIO * min(values):
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)


def _by_text(record: Tuning) -> dict[str, list[HeldOutLoss]]:
    found: dict[str, list[HeldOutLoss]] = {}
    for point in record.held_out:
        found.setdefault(point.text, []).append(point)
    return found


def _percent(value: tuple[float, float | None]) -> tuple[float, float | None]:
    share, stderr = value
    return 100 * share, None if stderr is None else 100 * stderr


def _spoken(record: Tuning) -> str:
    """Return the figure in a sentence."""
    losses = _losses(record)
    first, last = stretches(len(losses), 5)[0], stretches(len(losses), 5)[-1]
    told = [
        f"training from {np.mean(losses[slice(*first)]):.4g} to {np.mean(losses[slice(*last)]):.4g}"
    ]
    told += [
        f"{name} from {points[0].loss:.4g} to {points[-1].loss:.4g}"
        for name, points in _by_text(record).items()
    ]
    return f"Loss in nats over {record.steps} steps of tuning: {', '.join(told)}"
