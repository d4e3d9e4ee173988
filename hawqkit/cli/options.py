"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

recipe_argument: Decorator = click.argument("recipe", metavar="RECIPE")

run_argument: Decorator = click.argument(
    "folder",
    metavar="RUN",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)

set_option: Decorator = click.option(
    "--set",
    "overrides",
    metavar="PATH=VALUE",
    multiple=True,
    help="Change one value of the recipe, as in budget.average_bits=4.5; may be repeated.",
)

output_folder_option: Decorator = click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The run folder.  [default: runs/NAME-OF-THE-RECIPE]",
)


def run_folder(recipe: str, output: Path | None) -> Path:
    """Return the folder of a run: what was asked for, or `runs/` and the recipe's name."""
    return Path("runs") / Path(recipe).stem if output is None else output
