"""Terminal tables of a classifier: accuracy with flips, and the loss where it was chosen."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hawqkit.records import Classification, Validation
from hawqkit.report.accuracy import accuracy_rows, shift_of
from hawqkit.report.nouns import Nouns
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import clean, shorten

NAME = 14


def accuracy_table(text: str, found: Classification, nouns: Nouns) -> Table:
    """Return accuracy, paired differences in points, and flips of every mix on one data set."""
    table = new_table(
        f"Accuracy on {clean(text)}: {nouns.count(found.count)}; differences in points"
    )
    add_columns(
        table, "mix", "accuracy\n%", "minus\noriginal", "minus\nchosen", "flips\n%",
        "became\nwrong", "became\nright",
    )  # fmt: skip
    for row in accuracy_rows(found):
        # The unit stands in the head: 80 columns are few.
        accuracy, flips = (cell.removesuffix(" %") for cell in (row.accuracy, row.flips))
        cells = (accuracy, row.difference, row.against, flips, row.wrong, row.right)
        table.add_row(_name(row.name), *cells, style="bold" if row.chosen else "")
    return table


def loss_table(validation: Validation, nouns: Nouns) -> list[RenderableType]:
    """Return the loss where the mix was chosen and elsewhere; nothing of language models."""
    shift = shift_of(validation, nouns)
    if shift is None:
        return []
    table = new_table("Loss in nats: the shift of the data")
    heads = ("original", "chosen mix", "chosen minus\noriginal")
    add_columns(table, nouns.place, nouns.many, *heads)
    for row in shift.rows:
        table.add_row(_name(row.name), row.count, row.original, row.chosen, row.difference)
    return [table]


def _name(name: str) -> Text:
    return Text(shorten(name, NAME))
