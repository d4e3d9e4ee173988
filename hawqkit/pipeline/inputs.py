"""From a recipe to a model and its data, and everything that can be refused before a long pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from hawqkit import distributed
from hawqkit.allocation import allocate_table, read_latencies
from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.models import Data, LoadedModel, load_batches, load_examples, load_model
from hawqkit.models.folding import Folding, with_folded_batch_norms
from hawqkit.models.operations import with_operations
from hawqkit.pipeline.choosing import size_tables
from hawqkit.pipeline.exporting import lay_out_as_asked, trace_as_asked
from hawqkit.pipeline.kernels import kernel_cells
from hawqkit.pipeline.latency import latency_costs
from hawqkit.pipeline.progress import notices
from hawqkit.recipe import (
    CLASSIFIERS,
    BudgetSection,
    CalibrationSection,
    HeldOutSection,
    ModelSection,
    Recipe,
    SpectrumSection,
    TextSection,
)
from hawqkit.recipe.values import BUILTIN
from hawqkit.records import DataFacts, Layer, ModelFacts
from hawqkit.sensitivity.fitting import fitting_layers
from hawqkit.sensitivity.probing import ProbeSettings, micro_batch_size
from hawqkit.spectrum.measuring import resolve_layers
from hawqkit.targets import find_target
from hawqkit.targets.contract import capped

HELD_OUT = "held-out"
_LOG = logging.getLogger(__name__)

Placed = TypeVar("Placed", ModelSection, CalibrationSection, HeldOutSection)


@dataclass(frozen=True, slots=True)
class Inputs:
    """A recipe, resolved.

    Attributes:
        model: ready to be measured.
        calibration: sequences or examples that choose, then those that only predict.
        texts: name -> data for validation; `held-out` comes first.
        spectrum: what the spectrum is measured on, None if it is not measured.
    """

    model: LoadedModel
    calibration: Data
    texts: dict[str, Data]
    spectrum: Data | None = None


def load_inputs(recipe: Recipe) -> Inputs:
    """Load the model and every text, and refuse at once all that would fail later.

    Raises:
        InputError: everything that is wrong with model, texts, layers and targets, together.
    """
    model = load_recipe_model(recipe)
    problems: list[HawqkitError] = []
    texts = _load_texts(recipe, model, problems)
    if "calibration" in texts:
        problems += _without_pairs(recipe, texts["calibration"], model)
        problems += _same_data(recipe, texts)
        try:
            model = fold_as_asked(recipe, model, texts["calibration"])
        except InputError as error:
            problems.append(error)
    spectrum = None
    if recipe.spectrum is not None:
        try:
            spectrum = load_spectrum_text(recipe.calibration, recipe.spectrum, model)
        except InputError as error:
            problems.append(error)
    try:
        model = lay_out_as_asked(recipe, model)
        if "calibration" in texts:
            model = count_as_asked(recipe, model, texts["calibration"])
            model = trace_as_asked(recipe, model, texts["calibration"])
        layers, _ = fitting_layers(model, recipe.formats, recipe.layers.misfits)
        wrong = target_problems(recipe.export, layers, recipe.formats, model.facts)
        problems += wrong
        if not wrong and ("calibration" in texts or not _needs_operations(recipe)):
            refuse_impossible(recipe, layers, model.facts)
    except InputError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputError(f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))
    return Inputs(model, texts.pop("calibration"), texts, spectrum)


def _load_texts(
    recipe: Recipe, model: LoadedModel, problems: list[HawqkitError]
) -> dict[str, Data]:
    """Return what can be loaded of a recipe's data by name; what is wrong goes to `problems`."""
    texts: dict[str, Data] = {}
    for name, section in _sections(recipe).items():
        try:
            texts[name] = load_text(section, model, getattr(section, "withheld", 0))
        except InputError as error:
            problems.append(error)
    return texts


def _sections(recipe: Recipe) -> dict[str, TextSection]:
    return {"calibration": recipe.calibration, HELD_OUT: recipe.held_out, **recipe.other_texts}


def load_recipe_model(recipe: Recipe) -> LoadedModel:
    """Load the model that a recipe names, with the layers that it chooses."""
    device = recipe.model.device
    if device == "auto" and distributed.launched():
        device = distributed.processes().device
    with notices():
        return load_model(
            recipe.model.source,
            task=recipe.model.task,
            revision=recipe.model.revision,
            dtype=recipe.model.dtype,
            device=device,
            trust_remote_code=recipe.model.trust_remote_code,
            include=recipe.layers.include,
            exclude=recipe.layers.exclude if _excludes(recipe) else (),
            exclude_if_there=() if _excludes(recipe) else recipe.layers.exclude,
        )


def fold_as_asked(recipe: Recipe, model: LoadedModel, data: Data) -> LoadedModel:
    """Return the model with its batch norms folded, if the recipe says so, and log what was done.

    Raises:
        InputError: a batch norm was never run.
    """
    if not recipe.model.fold_batch_norm:
        return model
    folded, folding = with_folded_batch_norms(model, data)
    with notices():
        _LOG.info("%s", describe_folding(folding))
    return folded


def describe_folding(folding: Folding) -> str:
    """Return lines about what was folded, and what was left with its reason."""
    first = (
        f"batch norm: {len(folding.folded)} folded, {len(folding.left)} left; outputs change by "
        f"{folding.difference:.1e} of the largest"
    )
    return "\n".join([first, *capped([f"{n}: {why}" for n, why in folding.left.items()])])


def count_as_asked(recipe: Recipe, model: LoadedModel, data: Data) -> LoadedModel:
    """Return the model with its operations counted, if a budget needs them.

    Raises:
        InputError: the latency table cannot be read.
        Unsupported: shapes vary from example to example.
    """
    return with_operations(model, data) if _needs_operations(recipe) else model


def _needs_operations(recipe: Recipe) -> bool:
    """Whether bit operations are limited, or a latency table has rows of shapes."""
    table = recipe.budget.latency_table()
    return recipe.budget.bops is not None or bool(table and read_latencies(table).shapes)


def _same_data(recipe: Recipe, texts: Mapping[str, Data]) -> list[HawqkitError]:
    """Return the problems of data that validate a choice which they have made.

    Recipes are compared by name and split; whether a folder has splits is known when it was read.
    """
    if recipe.model.task not in CLASSIFIERS:
        return []
    sections = _sections(recipe)
    origins = {name: _origin(sections[name], data) for name, data in texts.items()}
    return [
        InputError(
            f"{name}: {texts[name].facts.source} has no splits, so these are the examples of "
            "calibration too; validation measures on what the choice never saw: name another "
            "folder or file, or put `train` and `test` folders into this one."
        )
        for name, origin in origins.items()
        if name != "calibration" and origin == origins["calibration"]
    ]


def _origin(section: TextSection, data: Data) -> str:
    path = Path(section.source).expanduser()
    if not path.exists():
        return data.facts.source
    return f"{path.resolve()}{data.facts.source.removeprefix(section.source)}"


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
            "budget": _placed_budget(recipe.budget),
        }
    )


def _placed_budget(budget: BudgetSection) -> BudgetSection:
    """Return the budget with the path of its latency table made absolute."""
    if budget.latency is None or budget.latency.table is None:
        return budget
    table = str(Path(budget.latency.table).expanduser().absolute())
    latency = budget.latency.model_copy(update={"table": table})
    return budget.model_copy(update={"latency": latency})


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
    budget = recipe.budget
    allocate_table(
        layers,
        recipe.formats,
        np.zeros((len(layers), len(recipe.formats))),
        budgets=budget.limits(),
        runtime=recipe.runtime,
        size_tables=size_tables(counted, layers, recipe.formats, facts),
        size_target=counted[0] if counted else None,
        costs=latency_costs(budget.limits(), budget.latency_table(), layers, recipe.formats),
        available=kernel_cells(len(layers), recipe.formats, recipe.runtime),
    )


def _without_pairs(recipe: Recipe, text: Data, model: LoadedModel) -> list[HawqkitError]:
    """Return the problem of a confidence where nothing is measured side by side.

    The participation ratio that it needs comes from pairs of one micro-batch.
    """
    limit = recipe.budget.kl_limit()
    if limit is None or limit.quantile == 0:
        return []
    size = micro_batch_size(recipe.sensitivity.batch, text.facts, model.device.type)
    if size > 1:
        return []
    return [
        InputError(
            f"budget.{limit} needs the participation ratio of the whole network, which comes from "
            f"pairs of {text.facts.many} of one micro-batch, and micro-batches hold one: set "
            "sensitivity.batch to 2 or more, or ask for confidence 0.5."
        )
    ]


def load_text(section: TextSection, model: LoadedModel, withheld: int = 0) -> Data:
    """Load the text, or the labelled examples, that one section of a recipe names."""
    if model.task in CLASSIFIERS:
        return load_examples(
            section.source,
            model,
            split=section.split,
            examples=section.examples,
            seed=section.seed,
            withheld=withheld,
            config=section.config,
            column=section.column,
            labels=section.labels,
            length=section.length,
        )
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
) -> Data:
    """Load the few sequences or examples of calibration that a spectrum is measured on.

    Raises:
        InputError: there is too little of it, or the section's patterns match no layer.
    """
    resolve_layers(model, section.layers)
    few = {"sequences": section.sequences, "examples": section.sequences, "length": section.length}
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
            # Where misfits are `partial`, no layer is given a format that does not fit it.
            fitting = [x.name for x in layers if parse_format(format_name).fits(x.columns)]
            problems = target.problems(dict.fromkeys(fitting, format_name), layers, facts)
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


def describe_data(facts: DataFacts) -> str:
    """Return how much data there is, in the words of its kind.

    >>> describe_data(DataFacts("d", "", 768, 1, 768, 768, 768, 0, "images", 10))
    '768 images of 10 classes'
    """
    if not facts.classes:
        return (
            f"{facts.sequences} sequences of up to {facts.length} tokens from {facts.documents} "
            "documents"
        )
    what = {"images": "images", "labelled text": f"texts of up to {facts.length} tokens"}
    return f"{facts.sequences} {what.get(facts.kind, 'examples')} of {facts.classes} classes"


def describe_processes() -> str:
    """Return a sentence about processes, devices and threads."""
    here = distributed.processes()
    devices = distributed.gather(here.device)
    count = f"{here.count} process{'es' if here.count > 1 else ''}"
    return f"{count} on {', '.join(devices)}, {torch.get_num_threads()} threads each"
