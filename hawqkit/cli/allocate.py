"""`hawqkit allocate`: choose again from a saved run, or from a table of anyone's scores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hawqkit.records import Allocation, KlBudget


@click.command()
@click.argument("source", metavar="RUN_OR_TABLE", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--budget",
    "budgets",
    metavar="NAME=LIMIT",
    multiple=True,
    help="average_bits=4.5, bits_per_weight=4.7, size=80MB, bops=2.1e9 or latency=3.1ms; of a "
    "TABLE the name of a column, as in bytes=5.6e6. May be repeated, all limits hold.",
)
@click.option(
    "--max-predicted-kl",
    "limit",
    metavar="NATS[@CONFIDENCE]",
    help="The smallest mix whose predicted KL stays below, as in 0.05 or 0.05@0.9; a budget too.",
)
@click.option(
    "--latency-table",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Milliseconds of each layer or shape in each format, for latency=LIMIT.",
)
@click.option("--runtime", metavar="NAME", help="Which layers must share a format.")
@click.option("--score", metavar="NAME", help="Which prediction of the loss decides.")
@click.option(
    "--risk",
    type=click.FloatRange(min=0),
    help="Standard deviations added to every score.",
)
@click.option(
    "--interactions/--no-interactions",
    default=None,
    help="Whether what layers do together enters the choice.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the allocation.  [default: RUN/allocation.json; of a TABLE nowhere]",
)
def allocate(
    source: Path,
    budgets: tuple[str, ...],
    limit: str | None,
    latency_table: Path | None,
    runtime: str | None,
    score: str | None,
    risk: float | None,
    interactions: bool | None,
    output: Path | None,
) -> None:
    """Choose again from the sensitivities of a run folder, or from a TABLE of anyone's scores.

    Needs no torch and no model. Of a run, what is not given comes from its recipe; budgets replace
    all of its budgets. A TABLE is a CSV file with the columns layer, format and score, then any of
    bytes, bops, latency_ms, and group: layers with the same group share a format.
    """
    if source.is_file():
        given = {
            "--max-predicted-kl": limit,
            "--latency-table": latency_table,
            "--runtime": runtime,
            "--score": score,
            "--risk": risk,
            "--interactions": interactions,
        }
        _allocate_table(source, budgets, output, [k for k, v in given.items() if v is not None])
        return
    from hawqkit import pipeline
    from hawqkit.pipeline.folder import RunFolder
    from hawqkit.recipe import load_budget

    limits = [*budgets, *([] if limit is None else [f"max_predicted_kl={limit}"])]
    budget = load_budget(limits) if limits else None
    allocation = pipeline.allocate_run(
        source,
        budgets=budget.limits() if budget else None,
        max_predicted_kl=budget.kl_limit() if budget else None,
        runtime=runtime,
        score=score,
        risk=risk,
        output=output,
        latency_table=latency_table,
        interactions=interactions,
    )
    click.echo(describe(allocation, RunFolder(source).read_data().many))
    click.echo(f"written to {output or source / 'allocation.json'}")


def _allocate_table(
    table: Path, budgets: tuple[str, ...], output: Path | None, unused: list[str]
) -> None:
    """Choose from a table, print what was chosen, and write it where that is asked for."""
    if unused:
        raise click.UsageError(
            f"{', '.join(unused)}: only for a run folder, and {table} is a table; what it says is "
            "in its columns layer, format, score, bytes, bops, latency_ms and group."
        )
    from rich.console import Console

    from hawqkit.pipeline.tabled import allocate_csv, read_limits
    from hawqkit.report.table_allocation import print_table_allocation

    allocation = allocate_csv(table, read_limits(budgets), output)
    print_table_allocation(Console(), allocation)
    click.echo(f"written to {output}" if output else "written nowhere; -o FILE keeps it as JSON")


def describe(allocation: Allocation, many: str) -> str:
    """Return an allocation in a few lines.

    Args:
        allocation: of a run.
        many: what its data are called, `images` say.
    """
    totals, gap = allocation.totals, allocation.certificate.relative_gap
    sizes = "".join(f", {size:,} bytes as {target}" for target, size in totals.size.items())
    taken = f"{totals.average_bits:.4f} average bits, {totals.bits_per_weight:.4f} bits per weight"
    sizes += "" if totals.bops is None else f", {totals.bops:,} BOPs"
    sizes += "" if totals.latency_ms is None else f", {totals.latency_ms:.6g} ms"
    widths = Counter(allocation.layers.values())
    lines = [
        taken + sizes,
        "layers: " + ", ".join(f"{n} x {name}" for name, n in sorted(widths.items())),
        f"score {allocation.score}: {allocation.objective:.5f} nats"
        + ("" if allocation.interactions else f", relative gap {gap:.1e}"),
    ]
    if allocation.prediction is not None:
        p = allocation.prediction
        lines.append(
            f"predicted KL {p.kl:.5f} +- {p.kl_stderr:.5f} nats, from {p.sequences} withheld {many}"
        )
        if allocation.interactions:
            lines.append(
                f"with what layers do together: {p.joint:.5f} +- {p.joint_stderr:.5f} nats; it "
                f"entered the choice, gap {gap:.1e}"
            )
        if p.spread is not None:
            lines.append(
                f"spread {100 * p.spread:.1f} %: so far the KL of a mix scatters about its "
                "prediction if rounding errors are random"
            )
    if allocation.kl_budget is not None:
        lines += _kept(allocation.kl_budget)
    return "\n".join([*lines, *(f"warning: {w}" for w in allocation.warnings)])


def _kept(kept: KlBudget) -> list[str]:
    """Say how the limit on the KL was kept, and what the next smaller mix would do."""
    sure = f" with confidence {kept.confidence:g}" if kept.quantile else ""
    limit = f"KL stays below {kept.upper:.5f} nats{sure}, within the limit {kept.value:g}"
    lines = [f"{limit}; smallest in {kept.minimized}: {kept.amount:,}"]
    if kept.amount_bound < kept.amount:
        lines.append(f"the best mix of less than {kept.amount_bound:,} does not keep it")
    if kept.smaller_amount is not None and kept.smaller_upper is not None:
        lines.append(f"the best of {kept.smaller_amount:,} would reach {kept.smaller_upper:.5f}")
    return lines
