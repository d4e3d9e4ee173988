"""From a recipe to a model and its texts, and everything that can be refused before a long pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from hawqkit import distributed
from hawqkit.allocation import allocate_table
from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.models import LoadedModel, Sequences, load_batches, load_model
from hawqkit.pipeline.choosing import size_tables
from hawqkit.pipeline.progress import notices
from hawqkit.recipe import (
    CalibrationSection,
    HeldOutSection,
    ModelSection,
    Recipe,
    SpectrumSection,
    TextSection,
)
from hawqkit.recipe.consistency import BUILTIN
from hawqkit.records import Layer, ModelFacts
from hawqkit.sensitivity.probing import ProbeSettings, fitting_layers, micro_batch_size
from hawqkit.spectrum.measuring import resolve_layers
from hawqkit.targets import find_target
from hawqkit.targets.contract import capped

HELD_OUT = "held-out"

Placed = TypeVar("Placed", ModelSection, CalibrationSection, HeldOutSection)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A recipe, resolved.

    Attributes:
        model: ready to be measured.
        calibration: sequences that choose, then those that only predict.
        texts: name -> sequences for validation; `held-out` comes first.
        spectrum: sequences that the spectrum is measured on, None if it is not measured.
    """

    model: LoadedModel
    calibration: Sequences
    texts: dict[str, Sequences]
    spectrum: Sequences | None = None


def load_inputs(recipe: Recipe) -> Inputs:
    """Load the model and every text, and refuse at once all that would fail later.

    Raises:
        InputError: everything that is wrong with model, texts, layers and targets, together.
    """
    model = load_recipe_model(recipe)
    problems: list[HawqkitError] = []
    texts: dict[str, Sequences] = {}
    sections = {"calibration": recipe.calibration, HELD_OUT: recipe.held_out, **recipe.other_texts}
    for name, section in sections.items():
        try:
            texts[name] = load_text(section, model, getattr(section, "withheld", 0))
        except InputError as error:
            problems.append(error)
    if "calibration" in texts:
        problems += _without_pairs(recipe, texts["calibration"], model)
    spectrum = None
    if recipe.spectrum is not None:
        try:
            spectrum = load_spectrum_text(recipe.calibration, recipe.spectrum, model)
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
    return Inputs(model, texts.pop("calibration"), texts, spectrum)


def load_recipe_model(recipe: Recipe) -> LoadedModel:
    """Load the model that a recipe names, with the layers that it chooses."""
    device = recipe.model.device
    if device == "auto" and distributed.launched():
        device = distributed.processes().device
    with notices():
        return load_model(
            recipe.model.source,
            revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            device=device,
            trust_remote_code=recipe.model.trust_remote_code,
            include=recipe.layers.include,
            exclude=recipe.layers.exclude if _excludes(recipe) else (),
            exclude_if_there=() if _excludes(recipe) else recipe.layers.exclude,
        )


def _excludes(recipe: Recipe) -> bool:
    """Whether `layers.exclude` is written out: then its patterns must match; a default need not."""
    return "exclude" in recipe.layers.model_fields_set


def settle(recipe: Recipe, model: LoadedModel) -> Recipe:
    """Return the recipe as a run folder keeps it: it means the same in any working directory.

    Local paths become absolute, and of the default `layers.exclude` those patterns stay that match
    a module of this model, so that reading the file later refuses nothing that the run has
    accepted.
    """
    layers = recipe.layers
    if not _excludes(recipe):
        names = [name for name, _ in model.module.named_modules(remove_duplicate=False)]
        there = tuple(p for p in layers.exclude if any(fnmatchcase(n, p) for n in names))
        layers = layers.model_copy(update={"exclude": there})
    return recipe.model_copy(
        update={
            "model": _placed(recipe.model),
            "calibration": _placed(recipe.calibration),
            "held_out": _placed(recipe.held_out),
            "other_texts": {name: _placed(text) for name, text in recipe.other_texts.items()},
            "layers": layers,
        }
    )


def _placed(section: Placed) -> Placed:
    path = Path(section.source).expanduser()
    if section.source == BUILTIN or not path.exists():
        return section  # a hub id, package:NAME/FILE, the built-in text
    return section.model_copy(update={"source": str(path.absolute())})


def refuse_impossible(recipe: Recipe, layers: Sequence[Layer], facts: ModelFacts) -> None:
    """Refuse budgets that no mix can meet, before anything is measured.

    Sizes do not depend on scores, so a table of zeros shows whether there is a mix at all.

    Raises:
        BudgetError: says what can be had.
    """
    if not recipe.budget.limits():
        return  # which KL can be had is known after the probe
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


def _without_pairs(recipe: Recipe, text: Sequences, model: LoadedModel) -> list[HawqkitError]:
    """Return the problem of a confidence where no two sequences are measured side by side.

    The participation ratio that it needs comes from pairs of sequences of one micro-batch.
    """
    limit = recipe.budget.kl_limit()
    if limit is None or limit.quantile == 0:
        return []
    size = micro_batch_size(recipe.sensitivity.batch, text.facts.length, model.device.type)
    if size > 1:
        return []
    return [
        InputError(
            f"budget.{limit} needs the participation ratio of the whole network, which comes from "
            "pairs of sequences of one micro-batch, and micro-batches hold one: set "
            "sensitivity.batch to 2 or more, or ask for confidence 0.5."
        )
    ]


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


def load_spectrum_text(
    calibration: CalibrationSection, section: SpectrumSection, model: LoadedModel
) -> Sequences:
    """Load the few sequences of calibration text that a spectrum is measured on.

    Raises:
        InputError: there is too little text, or the section's patterns match no layer.
    """
    resolve_layers(model, section.layers)
    few = {"sequences": section.sequences, "length": section.length}
    return load_text(calibration.model_copy(update=few), model)


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
            text = "\n".join(capped(list(dict.fromkeys(lines))))
            found.append(Unsupported(f"target {name} cannot hold what may be chosen:\n{text}"))
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
