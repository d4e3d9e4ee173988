"""An allocation of anyone's table as terminal tables: what it takes, and each layer's format."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hawqkit.records import TableAllocation
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import DASH, ELLIPSIS, clean, percent, shorten, significant

ENDS = 20  # rows at each end of a shortened table


def print_table_allocation(console: Console, allocation: TableAllocation) -> None:
    """Print every layer's format, what the mix takes of each budget, and the proof."""
    console.print(layers_table(allocation))
    console.print(budgets_table(allocation))
    for line in closing_lines(allocation):
        console.print(Text(line))


def layers_table(allocation: TableAllocation) -> Table:
    """Return each layer's format with its part of the summed score; a long list is shortened."""
    keys = {name: key for key, members in allocation.groups.items() for name in members}
    table = new_table(f"Formats of {len(allocation.layers)} layers")
    add_columns(table, "layer", "format", "score", "share of sum", *(["group"] if keys else []))
    rows = list(allocation.layers.items())
    hidden = len(rows) - 2 * ENDS
    for index, (name, format_name) in enumerate(rows):
        if hidden > 1 and ENDS <= index < len(rows) - ENDS:
            if index == ENDS:
                table.add_row(Text(f"{ELLIPSIS} {hidden} more", style="italic"))
            continue
        score = allocation.scores[name]
        share = percent(score / allocation.objective) if allocation.objective > 0 else DASH
        group = [Text(shorten(clean(keys.get(name, "")), 16))] if keys else []
        table.add_row(
            Text(clean(name)),
            Text(shorten(clean(format_name), 24)),
            significant(score),
            share,
            *group,
        )
    return table


def budgets_table(allocation: TableAllocation) -> Table:
    """Return what the mix takes of each column, beside its limit and what could be had."""
    table = new_table("What the mix takes")
    add_columns(table, "column", "takes", "limit", "of it", "least", "most")
    for name, taken in allocation.taken.items():
        table.add_row(
            Text(clean(name)),
            _number(taken.taken),
            DASH if taken.limit is None else _number(taken.limit),
            DASH if taken.limit is None else percent(taken.taken / taken.limit),
            _number(taken.least),
            _number(taken.most),
        )
    return table


def closing_lines(allocation: TableAllocation) -> list[str]:
    """Return the layers by format, the summed score, and what is proven of it."""
    counts = Counter(allocation.layers.values())
    proof = allocation.certificate
    lines = [
        "layers: "
        + ", ".join(f"{counts[f]} x {clean(f)}" for f in allocation.formats if f in counts),
        (
            f"summed score {allocation.objective:.8g}, proven not below {proof.bound:.8g} within "
            f"the budgets: relative gap {proof.relative_gap:.1e} ({proof.status})"
        ),
    ]
    return [*lines, *(f"warning: {clean(warning)}" for warning in allocation.warnings)]


def _number(value: float) -> str:
    """Write an amount in full where it is whole, else with nine digits."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.9g}"
