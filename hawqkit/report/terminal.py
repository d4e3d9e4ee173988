"""The one style of tables in a terminal."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text


def new_table(title: str) -> Table:
    """Return an empty table in the one style of the terminal."""
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )


def add_columns(table: Table, first: str, *others: str) -> None:
    """Add a column of names and columns of numbers, whose cells never break."""
    table.add_column(Text(first), overflow="fold", vertical="bottom")
    for header in others:
        justify: Literal["left", "right"] = "left" if header == "format" else "right"
        table.add_column(Text(header, justify=justify), justify=justify, no_wrap=True)
