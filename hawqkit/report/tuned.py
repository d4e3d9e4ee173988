"""What tuning changed, as tables for the terminal."""

from __future__ import annotations

from dataclasses import replace

from rich.console import RenderableType
from rich.table import Table

from hawqkit.records import Allocation, Tuning
from hawqkit.report.tables import result_tables

STRETCHES = 5  # of the curve


def tuning_tables(allocation: Allocation, record: Tuning) -> tuple[RenderableType, ...]:
    """Return the loss along the steps, and the mix before and after on held-out data.

    Args:
        allocation: whose mix was tuned.
        record: how, and what was measured.
    """
    tables: list[RenderableType] = [_curve(record)]
    if record.validation is not None:
        alone = replace(allocation, baselines=())
        tables += result_tables(alone, record.validation)
    return tuple(tables)


def _curve(record: Tuning) -> Table:
    """Return the mean loss of a few stretches of equally many steps."""
    table = Table(
        title=f"Tuning: {record.steps} steps on {record.examples} examples",
        title_justify="left",
        box=None,
    )
    for heading in ("steps", "mean loss", "learning rate at their end"):
        table.add_column(heading, justify="right", no_wrap=True)
    count = min(STRETCHES, record.steps)
    for part in range(count):
        start, end = record.steps * part // count, record.steps * (part + 1) // count
        losses = record.curve.loss[start:end]
        table.add_row(
            f"{start + 1}-{end}",
            f"{sum(losses) / len(losses):.5f}",
            f"{record.curve.learning_rate[end - 1]:.3g}",
        )
    return table
