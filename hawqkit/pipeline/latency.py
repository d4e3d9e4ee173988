"""The latency table that a budget on milliseconds needs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hawqkit.allocation import CostTable, read_latencies
from hawqkit.allocation.resources import LATENCY
from hawqkit.errors import BudgetError, InputError
from hawqkit.records import Layer


def latency_costs(
    budgets: Mapping[str, float],
    table: str | Path | None,
    layers: Sequence[Layer],
    formats: Sequence[str],
) -> tuple[CostTable, ...]:
    """Return what each layer takes of the latency, if that is limited.

    Raises:
        BudgetError: latency is limited, and no table came.
        InputError: a table came without a limit, cannot be read, or lacks rows; lists all of them.
    """
    if table is None and LATENCY in budgets:
        raise BudgetError(
            f"budget {LATENCY} = {budgets[LATENCY]:g} came without a table of what each layer "
            "takes: name one, as latency.table in the recipe, --latency-table FILE, or "
            "latency_table= in Python."
        )
    if table is not None and LATENCY not in budgets:
        raise InputError(
            f"the latency table {table} came without a limit: ask for one, as in --budget "
            f"latency=3.1ms or {LATENCY}=3.1, or leave the table out."
        )
    return () if table is None else (read_latencies(table).costs(layers, formats),)
