"""The recipes that come with the package."""

from __future__ import annotations

from pathlib import Path as File
from typing import NamedTuple


class Shipped(NamedTuple):
    """A recipe that comes with the package; `about` is the first comment line of the file."""

    name: str
    path: File
    about: str


def shipped_recipes() -> list[Shipped]:
    """Return the shipped recipes, by name: from the installed package, or from the checkout."""
    here = File(__file__).resolve().parents[1]
    homes = [here / "_recipes", here.parent / "recipes"]
    home = next((h for h in homes if (h / "recipe.schema.json").is_file()), None)
    files = [] if home is None else sorted(home.glob("*.yaml"))
    return [Shipped(file.stem, file, _about(file)) for file in files]


def _about(file: File) -> str:
    comments = [line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#")]
    return next((c for c in comments if c and not c.startswith("yaml-language-server")), "")


def find_recipe(path: str | File) -> File:
    """Return a recipe's file: `path` itself, or the shipped recipe of that name."""
    shipped = {recipe.name: recipe.path for recipe in shipped_recipes()}
    if File(path).exists() or str(path) not in shipped:
        return File(path)
    return shipped[str(path)]
