"""Write the allocation of a run for a target; the model is loaded only where it is needed."""

from __future__ import annotations

from pathlib import Path

from hawqkit.errors import StateMismatch
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import Allocation, ModelFacts
from hawqkit.targets import find_target
from hawqkit.targets.contract import require


def export_run(folder: str | Path, target: str, output: str | Path | None = None) -> list[Path]:
    """Write the allocation of a run folder for one target, as `hawqkit run` would have.

    A target that writes weights loads the model of the run's recipe; one that writes names alone is
    written from the records, without torch.

    Args:
        folder: a run folder with an allocation.
        target: `compressed-tensors`, `bits`; `hawqkit targets` lists them.
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
    from hawqkit.pipeline.inputs import load_inputs  # imports torch

    model = load_inputs(run.read_recipe()).model
    refuse_other_model(allocation, model.facts)
    return list(module.write(allocation, where, model))


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
