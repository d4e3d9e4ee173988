"""`hawqkit import`: judge a mix that somebody else made by a run's sensitivities."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command("import")
@run_argument
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.option("--name", metavar="NAME", help="Its name in tables.  [default: the file's]")
def import_(folder: Path, source: Path, name: str | None) -> None:
    """Set the mix of a quantized checkpoint beside the one that RUN chose.

    SOURCE is a folder or config.json of compressed-tensors, GPTQ, AWQ, AutoRound, bitsandbytes or
    MLX, or a GGUF file. The mix becomes a baseline of RUN: `hawqkit validate` measures it, and the
    report shows it. What is judged are its formats, rounded by hawqkit. Needs no torch.
    """
    from hawqkit.pipeline.importing import import_mix

    found = import_mix(folder, source, name)
    mix, chosen = found.mix, found.chosen
    counts = Counter(mix.layers.values())
    click.echo(f"{mix.name}: {found.kind}, " + ", ".join(f"{n} x {f}" for f, n in counts.items()))
    for label, sizes, objective, predicted in (
        (mix.name, mix.totals, mix.objective, mix.prediction),
        ("chosen", chosen.totals, chosen.objective, chosen.prediction),
    ):
        score = "not predicted" if objective is None else f"summed score {objective:.5f} nats"
        kl = "" if predicted is None else f", predicted KL {predicted.kl:.5f} +- "
        kl += "" if predicted is None else f"{predicted.kl_stderr:.5f}"
        click.echo(
            f"  {label}: {sizes.average_bits:.4f} average bits, {sizes.bits_per_weight:.4f} bits "
            f"per weight, {score}{kl}"
        )
    for note in found.notes:
        click.echo(f"note: {note}")
    if found.unprobed:
        click.echo(
            f"note: {', '.join(found.unprobed)} not probed in this run, so there is no prediction; "
            "add them to the recipe's formats for one. It can be measured all the same."
        )
    click.echo(f"next: hawqkit validate {folder}")
