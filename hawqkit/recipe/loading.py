"""From a file to a recipe, with every problem reported at once."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path as File
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from hawqkit.errors import RecipeError
from hawqkit.recipe.consistency import contradictions
from hawqkit.recipe.data_sections import with_task_defaults
from hawqkit.recipe.document import Document, Path, apply_overrides, locate, read_document
from hawqkit.recipe.problems import explain
from hawqkit.recipe.schema import BudgetSection, Recipe
from hawqkit.recipe.shipped import find_recipe


def load_recipe(path: str | File, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: a file, or the name of a shipped recipe.
        overrides: `a.b=c`, as in `budget.average_bits=4.5`; c is YAML.

    Raises:
        RecipeError: anything is wrong; `problems` holds every problem, in the order of the file.
    """
    document = read_document(find_recipe(path))
    apply_overrides(document, overrides)
    problems: dict[Path, str] = {}
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        own = [e for e in error.errors(include_url=False) if e["loc"]]  # () is found again below
        problems = explain(own, document, Recipe)
    for where, message in contradictions(_sound_parts(with_task_defaults(document.data), problems)):
        problems.setdefault(where, locate(document, where, message))
    if recipe is None or document.problems or problems:
        raise RecipeError(document.source, [*document.problems, *_in_order(document, problems)])
    return recipe


def load_budget(assignments: Sequence[str]) -> BudgetSection:
    """Read `average_bits=4.5`, `size=80MB`, `latency=3.1ms` from a command line.

    `latency_ms=3.1` is the same as the last, as records call it.

    Raises:
        RecipeError: unknown names, values that are no limits, no limit at all.
    """
    document = Document("--budget", {})
    named = [re.sub(r"^\s*latency_ms\s*=", "latency=", text) for text in assignments]
    apply_overrides(document, named, option="--budget")
    try:
        budget = BudgetSection.model_validate(document.data)
    except ValidationError as error:
        problems = explain(error.errors(include_url=False), document, BudgetSection)
        raise RecipeError("--budget", [*document.problems, *problems.values()]) from None
    if document.problems:
        raise RecipeError("--budget", document.problems)
    return budget


def _in_order(document: Document, problems: Mapping[Path, str]) -> list[str]:
    def line(path: Path) -> int:
        number = re.search(r"\d+", document.origin(path))
        return int(number[0]) if number else 0

    return [problems[path] for path in sorted(problems, key=line)]


def _sound_parts(data: Mapping[str, Any], problems: Mapping[Path, str]) -> dict[str, Any]:
    """Return every field that can be read; of a text, the keys that are wrong are taken out."""
    parts: dict[str, Any] = {}
    for name, info in Recipe.model_fields.items():
        key = info.alias or name
        if key not in data:
            parts[name] = None if info.is_required() else info.get_default()
            continue
        wrong = [path for path in problems if path[:1] == (key,)]
        value = data[key]
        if wrong and key in ("calibration", "held_out", "other_texts"):
            value = _without(value, [path[1:] for path in wrong])
        elif wrong:
            value = None
        try:
            kind: Any = Annotated[info.annotation, key, *info.metadata]
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
            parts[name] = None if value is None else adapter.validate_python(value)
        except ValidationError:
            parts[name] = None
    return parts


def _without(value: Any, paths: Sequence[Path]) -> Any:
    """Return a copy without the keys at `paths`; None where a source itself is wrong."""
    copy = deepcopy(value)
    for path in paths:
        if not path or path[-1] == "source":
            return None
        here = copy
        for step in path[:-1]:
            here = here[step]
        here.pop(path[-1], None)
    return copy
