"""Predictions beside what was measured on the very same sequences or examples."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hawqkit.records import Linearized
from hawqkit.report.comparison import Row
from hawqkit.report.nouns import Nouns
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import DASH, clean, shorten, significant, with_error

CLEAR = 2.0  # parts below two standard errors are not told from none


def linearized_rows(rows: Sequence[Row]) -> list[tuple[Row, Linearized]]:
    """Return the mixes that have such a prediction."""
    return [(row, row.linearized) for row in rows if row.linearized is not None]


def linearized_parts(rows: Sequence[Row], nouns: Nouns) -> list[RenderableType]:
    """Return tables, and sentences about the first mix in them; nothing without any."""
    found = linearized_rows(rows)
    if not found:
        return []
    sentences = "\n".join([*gap_sentences(found, nouns), ""])
    return [_values(found, nouns), _ratios(found, nouns), Text(sentences)]


def gap_sentences(found: Sequence[tuple[Row, Linearized]], nouns: Nouns) -> list[str]:
    """Say which part of the gap is the softmax's and which the network's, for the first mix.

    Where outputs had to be differenced, a last sentence says why.
    """
    if not found:
        return []
    row, first = found[0]
    what = "the chosen mix" if row.chosen else clean(row.name)
    gap = (
        f"On these {nouns.count(first.sequences)} {what} loses "
        f"{with_error(first.measured, first.measured_stderr)} nats; second order, all layers "
        f"together, gives {with_error(first.quadratic, first.quadratic_stderr)}. Between the two, "
        f"the softmax beyond second order adds {_part(first.softmax, first.softmax_stderr)} and "
        f"the network beyond first order {_part(first.network, first.network_stderr)}."
    )
    reasons = {one.reason for _, one in found if one.how == "difference"}
    differenced = [
        "Logits were differentiated by differences of outputs, since forward mode did not serve: "
        f"{clean(reason)}"
        for reason in sorted(reasons)
    ]
    return [gap, *differenced]


def _part(value: float, stderr: float) -> str:
    told = abs(value) > CLEAR * stderr
    return with_error(value, stderr) + ("" if told else " (not told from none)")


def _values(found: Sequence[tuple[Row, Linearized]], nouns: Nouns) -> Table:
    table = new_table(f"Predicted and measured KL on the same withheld {nouns.many}, nats")
    add_columns(
        table, "mix", "sum of\nlayers", "joint", "linear logits,\nexact softmax",
        "logits on\na parabola", "measured",
    )  # fmt: skip
    for row, one in found:
        told = row.prediction
        table.add_row(
            Text(shorten(row.name, 12)),
            significant(told.kl, 2) if told else DASH,
            significant(told.joint, 2) if told else DASH,
            with_error(one.kl, one.kl_stderr),
            with_error(one.parabolic, one.parabolic_stderr),
            with_error(one.measured, one.measured_stderr),
            style="bold" if row.chosen else "",
        )
    return table


def _ratios(found: Sequence[tuple[Row, Linearized]], nouns: Nouns) -> Table:
    table = new_table(f"Predicted over measured on the same withheld {nouns.many}, paired")
    add_columns(table, "mix", "linear logits,\nexact softmax", "logits on\na parabola")
    for row, one in found:
        table.add_row(
            Text(shorten(row.name, 14)),
            with_error(one.ratio, one.ratio_stderr),
            with_error(one.parabolic_ratio, one.parabolic_ratio_stderr),
            style="bold" if row.chosen else "",
        )
    return table
