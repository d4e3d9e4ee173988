"""From a recipe to a model and its texts, and everything that can be refused before a long pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hawqkit import distributed
from hawqkit.allocation import allocate_table
from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.models import LoadedModel, Sequences, load_batches, load_model
from hawqkit.pipeline.choosing import size_tables
from hawqkit.recipe import Recipe, TextSection
from hawqkit.records import Layer, ModelFacts
from hawqkit.sensitivity.probing import ProbeSettings, fitting_layers
from hawqkit.targets import find_target

HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Inputs:
    """A recipe, resolved.

    Attributes:
        model: ready to be measured.
        calibration: sequences that choose, then those that only predict.
        texts: name -> sequences for validation; `held-out` comes first.
    """

    model: LoadedModel
    calibration: Sequences
    texts: dict[str, Sequences]


def load_inputs(recipe: Recipe) -> Inputs:
    """Load the model and every text, and refuse at once all that would fail later.

    Raises:
        InputError: everything that is wrong with model, texts, layers and targets, together.
    """
    device = recipe.model.device
    if device == "auto" and distributed.launched():
        device = distributed.processes().device
    model = load_model(
        recipe.model.source,
        revision=recipe.model.revision,
        dtype=recipe.model.dtype,
        device=device,
        trust_remote_code=recipe.model.trust_remote_code,
        include=recipe.layers.include,
        exclude=recipe.layers.exclude,
    )
    problems: list[HawqkitError] = []
    texts: dict[str, Sequences] = {}
    sections = {"calibration": recipe.calibration, HELD_OUT: recipe.held_out, **recipe.other_texts}
    for name, section in sections.items():
        try:
            texts[name] = load_text(section, model, getattr(section, "withheld", 0))
        except InputError as error:
            problems.append(error)
    try:
        layers, _ = fitting_layers(model, recipe.formats, recipe.layers.misfits)
        wrong = target_problems(recipe.export, layers, recipe.formats, model.facts)
        problems += wrong
        if not wrong:
            refuse_impossible(recipe, layers, model.facts)
    except InputError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError(f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))
    return Inputs(model, texts.pop("calibration"), texts)


def refuse_impossible(recipe: Recipe, layers: Sequence[Layer], facts: ModelFacts) -> None:
    """Refuse budgets that no mix can meet, before anything is measured.

    Sizes do not depend on scores, so a table of zeros shows whether there is a mix at all.

    Raises:
        BudgetError: says what can be had.
    """
    counted = [recipe.counted_target()] if recipe.budget.size is not None else []
    allocate_table(
        layers,
        recipe.formats,
        np.zeros((len(layers), len(recipe.formats))),
        budgets=recipe.budget.limits(),
        runtime=recipe.runtime,
        size_tables=size_tables(counted, layers, recipe.formats, facts),
        size_target=counted[0] if counted else None,
    )


def load_text(section: TextSection, model: LoadedModel, withheld: int = 0) -> Sequences:
    """Load one text of a recipe."""
    return load_batches(
        section.source,
        model,
        split=section.split,
        sequences=section.sequences,
        length=section.length,
        seed=section.seed,
        withheld=withheld,
        config=section.config,
        column=section.column,
        packing=section.packing,
        answers_only=section.answers_only,
    )


def target_problems(
    targets: Sequence[str], layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> list[HawqkitError]:
    """Return what the targets cannot hold, asked for one format at a time, before anything runs."""
    found: list[HawqkitError] = []
    for name in targets:
        target = find_target(name)
        lines: list[str] = []
        for format_name in formats:
            problems = target.problems({x.name: format_name for x in layers}, layers, facts)
            if problems:
                more = f" (and {len(problems) - 1} more layers)" if len(problems) > 1 else ""
                lines.append(f"{problems[0]}{more}")
        if lines:
            text = "\n  - ".join(dict.fromkeys(lines))
            found.append(Unsupported(f"target {name} cannot hold what may be chosen:\n  - {text}"))
    return found


def probe_settings(recipe: Recipe) -> ProbeSettings:
    """Return how a recipe says to probe."""
    s = recipe.sensitivity
    return ProbeSettings(
        rounding=recipe.rounding,
        batch=s.batch,
        cache=s.cache,
        checkpointing=s.checkpointing,
        positions=s.positions,
        seed=s.seed,
        misfits=recipe.layers.misfits,
    )


def describe_processes() -> str:
    """Return a sentence about processes, devices and threads."""
    here = distributed.processes()
    devices = distributed.gather(here.device)
    count = f"{here.count} process{'es' if here.count > 1 else ''}"
    return f"{count} on {', '.join(devices)}, {torch.get_num_threads()} threads each"
