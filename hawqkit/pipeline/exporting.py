"""Write the allocation of a run for a target; the model is loaded only where it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hawqkit.errors import StateMismatch
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import Allocation, ModelFacts
from hawqkit.targets import find_target, gguf, onnx
from hawqkit.targets.contract import require

if TYPE_CHECKING:
    from hawqkit.models import Data, LoadedModel
    from hawqkit.recipe import Recipe


def export_run(folder: str | Path, target: str, output: str | Path | None = None) -> list[Path]:
    """Write the allocation of a run folder for one target, as `hawqkit run` would have.

    A target that writes weights loads the model of the run's recipe, and writes the tuned weights
    if the run was tuned; one that writes names alone is written from the records, without torch.

    Args:
        folder: a run folder with an allocation.
        target: `compressed-tensors`, `bits`, `onnx`; `hawqkit targets` lists them.
        output: folder to write; None is `RUN/exports/TARGET`.

    Raises:
        Unsupported: the target cannot hold the mix; nothing is written.
        InputError: the folder holds no run, or `output` holds something else.
        StateMismatch: the model or the records are not those that the allocation was chosen for.
    """
    run = RunFolder(Path(folder))
    module = find_target(target)
    allocation = run.read_allocation()
    table = run.read_sensitivities()
    require(target, module.problems(allocation.layers, table.layers, table.model))
    where = Path(output) if output else run.export(target)
    if not module.SIZED:
        refuse_other_model(allocation, table.model)
        return list(module.write_from_facts(allocation, where, table.layers, table.model))
    from hawqkit.models.signature import with_inputs  # these import torch
    from hawqkit.pipeline.inputs import load_inputs
    from hawqkit.pipeline.tuning import open_tuned

    inputs = load_inputs(run.read_recipe())
    model = inputs.model
    if target == onnx.NAME:
        model = with_inputs(model, inputs.calibration)
    refuse_other_model(allocation, model.facts)
    tuned = open_tuned(run, model, allocation)
    if tuned is not None and tuned.allocation is not None:
        allocation, model = tuned.allocation, tuned.model
    return list(module.write(allocation, where, model))


def trace_as_asked(recipe: Recipe, model: LoadedModel, data: Data) -> LoadedModel:
    """Return the model with the bytes of its ONNX graph in its facts, if one is to be written.

    Raises:
        HawqkitError: the packages of the extra `onnx` are missing.
        Unsupported: torch cannot export the model, or a layer is not found in the graph.
    """
    if onnx.NAME not in (*recipe.export, recipe.size_target):
        return model
    return onnx.measure_graph(model, data)


def lay_out_as_asked(recipe: Recipe, model: LoadedModel) -> LoadedModel:
    """Return the model with the layout of its GGUF file in its facts, if one is to be written.

    Raises:
        Unsupported: no GGUF file of the model can be written, or the packages are missing.
        InputError: the file that it was loaded from is gone.
    """
    if gguf.NAME not in (*recipe.export, recipe.size_target):
        return model
    return gguf.measure_gguf(model)


def refuse_other_model(allocation: Allocation, facts: ModelFacts) -> None:
    """Refuse an allocation of another model.

    Raises:
        StateMismatch: the hashes of the weights differ.
    """
    if allocation.model != facts.hash:
        raise StateMismatch(
            f"this allocation was chosen for a model with hash {allocation.model[:12]}, but "
            f"{facts.source} now has {facts.hash[:12]}; run the recipe again."
        )
