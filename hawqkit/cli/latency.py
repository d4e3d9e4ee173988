"""`hawqkit latency`: how long each layer takes in each format on this machine."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="RECIPE_OR_RUN")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("latency.csv"),
    show_default=True,
    help="Where to write the table.",
)
@click.option("--runtime", metavar="NAME", default="onnxruntime", show_default=True)
@click.option(
    "--formats",
    metavar="NAME,...",
    help="Formats to measure.  [default: the recipe's, and none]",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Examples in one run.")
@click.option("--threads", type=int, default=1, show_default=True, help="Of one operation.")
@click.option("--rounds", type=int, default=15, show_default=True, help="Readings of each graph.")
@click.option("--mixes", type=int, help="Whole models to time.  [default: one a cell, 16 to 96]")
def latency(
    source: str,
    output: Path,
    runtime: str,
    formats: str | None,
    batch: int,
    threads: int,
    rounds: int,
    mixes: int | None,
) -> None:
    """Measure the latency table of a model on this machine, for `latency_ms` budgets.

    Every layer is timed alone and in whole models of mixed formats; the table is such that the
    times of layers add up to those of the models. Of a run that has an allocation, mixes around it
    are timed, so that a second table is true there. Keep the machine idle meanwhile.
    """
    from hawqkit.pipeline.timing import time_layers

    names = None if formats is None else [f.strip() for f in formats.split(",") if f.strip()]
    table = time_layers(
        source,
        output,
        runtime=runtime,
        formats=names,
        batch=batch,
        threads=threads,
        rounds=rounds,
        mixes=mixes,
    )
    layers = len({row.layer for row in table.rows})
    click.echo(
        f"{layers} layers, {len(table.rows)} rows, {table.runtime}, batch {table.batch}, "
        f"{table.threads} threads"
    )
    click.echo(
        f"whole models of {table.mixes} mixes are predicted within {100 * table.misfit:.1f} % "
        "(root mean square, each left out of its prediction)"
    )
    click.echo(f"written to {output}")
