"""`hawqkit formats`: every number format and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hawqkit.formats import Format

SHAPE = (4096, 4096)  # rows, columns: an attention projection of a 7B model
STORED_BITS = 16


def _scope(form: Format) -> str:
    """Return how many columns share a scale, in words."""
    if form.bits is None:
        return "-"
    return "all rows" if form.per_tensor else str(form.group_size or "all")


@click.command()
def formats() -> None:
    """List the number formats, with the bits that each entry of a weight really takes."""
    from rich.console import Console
    from rich.table import Table

    from hawqkit.formats import ACTIVATION_BITS, format_names, parse_format

    rows, columns = SHAPE
    table = Table(
        title=f"Formats, with bits per weight of a {rows} x {columns} layer stored in bfloat16",
        title_justify="left",
        box=None,
    )
    for heading, justify in (
        ("format", "left"),
        ("bits", "right"),
        ("columns a scale", "right"),
        ("zero point", "left"),
        ("bits per weight", "right"),
    ):
        table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in format_names():
        format_ = parse_format(name)
        taken = format_.total_bits(rows, columns, STORED_BITS) / (rows * columns)
        table.add_row(
            name,
            "stored" if format_.bits is None else str(format_.bits),
            _scope(format_),
            "-" if format_.symmetric else "yes",
            f"{taken:.4f}",
        )
    console = Console()
    console.print(table)
    widths = ", ".join(map(str, ACTIVATION_BITS))
    console.print(
        f"Each int format may end in -a<bits>, with bits one of {widths}:\n"
        "the layer's inputs are quantized too, which stores nothing more.\n"
        "w4a8 is short for int4-channel-a8, w4a8-asym for int4-channel-asym-a8.",
        highlight=False,
    )
