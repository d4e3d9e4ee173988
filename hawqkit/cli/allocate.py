"""`hawqkit allocate`: choose again from a saved run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hawqkit.cli.options import run_argument

if TYPE_CHECKING:
    from hawqkit.records import Allocation, KlBudget


@click.command()
@run_argument
@click.option(
    "--budget",
    "budgets",
    metavar="NAME=LIMIT",
    multiple=True,
    help="average_bits=4.5, bits_per_weight=4.7 or size=80MB; may be repeated, all limits hold.",
)
@click.option(
    "--max-predicted-kl",
    "limit",
    metavar="NATS[@CONFIDENCE]",
    help="The smallest mix whose predicted KL stays below, as in 0.05 or 0.05@0.9; a budget too.",
)
@click.option("--runtime", metavar="NAME", help="Which layers must share a format.")
@click.option("--score", metavar="NAME", help="Which prediction of the loss decides.")
@click.option(
    "--risk",
    type=click.FloatRange(min=0),
    help="Standard deviations added to every score.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write the allocation.  [default: RUN/allocation.json]",
)
def allocate(
    folder: Path,
    budgets: tuple[str, ...],
    limit: str | None,
    runtime: str | None,
    score: str | None,
    risk: float | None,
    output: Path | None,
) -> None:
    """Choose again from the sensitivities of RUN; needs no torch and no model.

    What is not given comes from the run's recipe; budgets replace all of its budgets.
    """
    from hawqkit import pipeline
    from hawqkit.recipe import load_budget

    given = [*budgets, *([] if limit is None else [f"max_predicted_kl={limit}"])]
    budget = load_budget(given) if given else None
    allocation = pipeline.allocate_run(
        folder,
        budgets=budget.limits() if budget else None,
        max_predicted_kl=budget.kl_limit() if budget else None,
        runtime=runtime,
        score=score,
        risk=risk,
        output=output,
    )
    click.echo(describe(allocation))
    click.echo(f"written to {output or folder / 'allocation.json'}")


def describe(allocation: Allocation) -> str:
    """Return an allocation in a few lines."""
    totals, gap = allocation.totals, allocation.certificate.relative_gap
    sizes = "".join(f", {size:,} bytes as {target}" for target, size in totals.size.items())
    taken = f"{totals.average_bits:.4f} average bits, {totals.bits_per_weight:.4f} bits per weight"
    widths = Counter(allocation.layers.values())
    lines = [
        taken + sizes,
        "layers: " + ", ".join(f"{n} x {name}" for name, n in sorted(widths.items())),
        f"score {allocation.score}: {allocation.objective:.5f} nats, relative gap {gap:.1e}",
    ]
    if allocation.prediction is not None:
        p = allocation.prediction
        lines.append(f"predicted KL {p.kl:.5f} +- {p.kl_stderr:.5f} nats, from withheld sequences")
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
