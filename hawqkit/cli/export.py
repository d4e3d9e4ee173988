"""`hawqkit export`: write a run's allocation for a quantizer, and push it where that is asked."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command()
@run_argument
@click.option("--target", metavar="NAME", required=True, help="See `hawqkit targets`.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write.  [default: RUN/exports/NAME]",
)
@click.option(
    "--push",
    "repository",
    metavar="USER/NAME",
    help="Commit it to this model repository, with a model card; private if it is new.",
)
@click.option("--public", is_flag=True, help="With --push: a new repository is public.")
@click.option(
    "--stage",
    "staged",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Lay out in a folder what --push commits; alone, nothing is pushed.",
)
def export(
    folder: Path,
    target: str,
    output: Path | None,
    repository: str | None,
    public: bool,
    staged: Path | None,
) -> None:
    """Write the allocation of RUN in the form that a target reads."""
    from hawqkit import pipeline
    from hawqkit.pipeline.pushing import REPOSITORY, contents_of, push, stage

    if public and repository is None:
        raise click.UsageError("--public says how a new repository is made: give --push too.")
    if repository is not None and not REPOSITORY.fullmatch(repository):
        raise click.UsageError(f"--push {repository!r}: write USER/NAME.")
    written = folder / "exports" / target if output is None else output
    pipeline.export_run(folder, target, written)
    click.echo(f"written to {written}")
    if repository is None and staged is None:
        return
    contents = contents_of(folder, written, target, repository or folder.name)
    if staged is not None:
        stage(contents, staged)
        click.echo(f"laid out in {staged}")
    if repository is not None:
        click.echo(f"pushed to {push(contents, repository, private=not public)}")
