"""What tuning changed: tables for the terminal, and the section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import RenderableType
from rich.table import Table

from hawqkit.records import Allocation, HeldOutLoss, LearnedScale, Tuning
from hawqkit.report.nouns import Nouns, nouns_of
from hawqkit.report.tables import result_tables
from hawqkit.report.tuning_figure import stretches
from hawqkit.report.wording import (
    clean,
    percent,
    percent_with_error,
    plural,
    significant,
    with_error,
)

STRETCHES = 5  # of the curve in the terminal
ROWS = 10  # of it in the report, and of the scales that moved furthest


@dataclass(frozen=True, slots=True)
class TuningView:
    """What the report says of a tuning run.

    Attributes:
        sentences: how it was tuned.
        heads: of the columns of `stretches`.
        stretches: rows of the curve of training.
        held_out: (data, step, examples, loss, accuracy) as texts, in the order of steps.
        scales: (layer, what, scales, change) of the learned scales that moved furthest.
        learned: how many layers have learned scales.
        classes: whether there is an accuracy.
    """

    sentences: tuple[str, ...]
    heads: tuple[str, ...]
    stretches: tuple[tuple[str, ...], ...]
    held_out: tuple[tuple[str, ...], ...]
    scales: tuple[tuple[str, str, int, str], ...]
    learned: int
    classes: bool


def tuning_tables(allocation: Allocation, record: Tuning) -> tuple[RenderableType, ...]:
    """Return the loss along the steps, and the mix before and after on held-out data.

    Args:
        allocation: whose mix was tuned.
        record: how, and what was measured.
    """
    nouns = nouns_of(record.data)
    tables: list[RenderableType] = [_curve(record, nouns)]
    if record.held_out:
        tables.append(_held_out(record, nouns))
    if record.validation is not None:
        alone = replace(allocation, baselines=())
        tables += result_tables(alone, record.validation)
    return tuple(tables)


def tuning_view(record: Tuning | None) -> TuningView | None:
    """Return the section of the report, None where nothing was tuned."""
    if record is None:
        return None
    nouns = nouns_of(record.data)
    moved = sorted(record.learned, key=lambda scale: -abs(scale.change))[:ROWS]
    return TuningView(
        sentences=_sentences(record, nouns),
        heads=_heads(record, nouns),
        stretches=tuple(_rows(record, nouns, ROWS)),
        held_out=tuple(_point(point) for point in record.held_out),
        scales=tuple(_scale(scale) for scale in moved),
        learned=len(record.learned),
        classes=nouns.classes,
    )


def _sentences(record: Tuning, nouns: Nouns) -> tuple[str, ...]:
    s = record.settings
    told = [
        (
            f"The chosen mix was trained for {plural(record.steps, 'step')} of {s['batch']} "
            f"{nouns.many} with {s['optimizer']}, on {nouns.count(record.examples)} "
            f"({clean(record.data.source)})."
        )
    ]
    taught = s["distillation"]
    if taught is not None:
        told.append(
            f"The original taught it with {percent(taught['alpha'], 0)} of the loss, at "
            f"temperature {significant(taught['temperature'])}; the figure shows the cross-entropy "
            "with the labels, which training lowers only as far as they enter."
            if record.curve.cross_entropy
            else "The figure shows the whole loss, the original's part included, which held-out "
            "losses do not have."
        )
    return tuple(told)


def _heads(record: Tuning, nouns: Nouns) -> tuple[str, ...]:
    apart = ("cross-entropy",) if record.curve.cross_entropy and _taught(record) else ()
    right = ("accuracy",) if nouns.classes and record.curve.accuracy else ()
    return ("steps", "mean loss", *apart, *right, "learning rate at their end")


def _rows(record: Tuning, nouns: Nouns, count: int) -> list[tuple[str, ...]]:
    """Return rows of a few stretches of equally many steps, as `_heads` names their columns."""
    heads, curve = _heads(record, nouns), record.curve
    rows = []
    for start, end in stretches(record.steps, count):
        cells = [f"{start + 1}-{end}" if end > start + 1 else f"{end}"]
        cells.append(f"{_mean(curve.loss[start:end]):.5f}")
        if "cross-entropy" in heads:
            cells.append(f"{_mean(curve.cross_entropy[start:end]):.5f}")
        if "accuracy" in heads:
            cells.append(percent(_mean(curve.accuracy[start:end]), 2))
        rows.append((*cells, f"{curve.learning_rate[end - 1]:.3g}"))
    return rows


def _curve(record: Tuning, nouns: Nouns) -> Table:
    """Return the mean loss of a few stretches of equally many steps."""
    table = Table(
        title=f"Tuning: {plural(record.steps, 'step')} on {nouns.count(record.examples)}",
        title_justify="left",
        box=None,
    )
    for heading in _heads(record, nouns):
        table.add_column(heading, justify="right")
    for row in _rows(record, nouns, STRETCHES):
        table.add_row(*row)
    return table


def _held_out(record: Tuning, nouns: Nouns) -> Table:
    """Return held-out losses along the way."""
    table = Table(title="Held-out loss along the way", title_justify="left", box=None)
    table.add_column("data" if nouns.classes else "text")
    for heading in ("after step", nouns.many, "loss", *(["accuracy"] if nouns.classes else [])):
        table.add_column(heading, justify="right")
    for point in record.held_out:
        table.add_row(*_point(point)[: len(table.columns)])
    return table


def _point(point: HeldOutLoss) -> tuple[str, ...]:
    accuracy = (
        percent(point.accuracy, 2)
        if point.accuracy_stderr is None
        else percent_with_error(point.accuracy, point.accuracy_stderr)
    )
    loss = with_error(point.loss, point.loss_stderr)
    return clean(point.text), f"{point.step:,}", f"{point.examples:,}", loss, accuracy


def _scale(scale: LearnedScale) -> tuple[str, str, int, str]:
    return clean(scale.layer), scale.what, scale.count, f"{100 * scale.change:+.2f} %"


def _taught(record: Tuning) -> bool:
    return record.settings["distillation"] is not None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
