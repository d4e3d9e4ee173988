"""Judge a mix that somebody else made: predict it, and set it beside a run's own. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hawqkit.allocation.sizes import totals
from hawqkit.errors import InputError
from hawqkit.formats import NONE, fitting_formats, parse_format, with_activations
from hawqkit.journal import locked
from hawqkit.pipeline.choosing import recipe_choice, size_tables
from hawqkit.pipeline.folder import IMPORTED, RunFolder
from hawqkit.records import Allocation, Mix, Prediction, Samples, Sensitivities, Totals, to_array
from hawqkit.sensitivity.prediction import predict
from hawqkit.store import write_record
from hawqkit.targets import find_target
from hawqkit.targets.contract import capped
from hawqkit.targets.foreign import read_foreign

RESERVED = ("chosen", "tuned", "original")


@dataclass(frozen=True, slots=True)
class Imported:
    """A foreign mix beside a run's own.

    Attributes:
        mix: its formats, sizes and, where its formats were probed, its prediction.
        chosen: the run's allocation, which has the mix among its baselines now.
        kind: whose form it had.
        notes: what the names of formats do not say of it.
        unprobed: formats of the mix that the run has not probed; while there are any, nothing is
            predicted.
    """

    mix: Mix
    chosen: Allocation
    kind: str
    notes: tuple[str, ...]
    unprobed: tuple[str, ...]


def import_mix(folder: str | Path, source: str | Path, name: str | None = None) -> Imported:
    """Read a foreign mix and add it to the baselines of a run's allocation.

    `hawqkit validate` then measures it beside the others, with hawqkit's own rounding to each
    format. A mix of the same name is replaced.

    Args:
        folder: a run that has an allocation.
        source: a quantized checkpoint's folder or `config.json`, or a GGUF file.
        name: in tables; by default the folder's or file's.

    Raises:
        InputError: there is nothing to read, the mix is of another model, or the name is taken by a
            mix that hawqkit made.
        Unsupported: a layer is stored in a way that no format names.
    """
    run, path = RunFolder(Path(folder)), Path(source)
    with locked(run.path):
        table, allocation = run.read_sensitivities(), run.read_allocation()
        found = read_foreign(path, table.layers, table.model)
        _refuse_misfits(found.layers, table, path)
        about = f"{IMPORTED}the {found.kind} mix of {path.name}"
        label = _label(name or path.stem or found.kind, allocation)
        unprobed = tuple(sorted(set(found.layers.values()) - {*table.formats, NONE.name}))
        mix = Mix(
            label,
            about,
            found.layers,
            _totals(run, table, found.layers),
            None if unprobed else _objective(table, found.layers, allocation.score),
            None if unprobed else _prediction(table, found.layers),
        )
        others = tuple(m for m in allocation.baselines if m.name != label)
        changed = replace(allocation, baselines=(*others, mix))
        write_record(run.allocation, changed)
    return Imported(mix, changed, found.kind, found.notes, unprobed)


def _label(name: str, allocation: Allocation) -> str:
    label = "".join(c if c.isalnum() or c in "-_. " else "-" for c in name).strip() or "imported"
    own = {m.name for m in allocation.baselines if not m.about.startswith(IMPORTED)}
    if label in own or label in RESERVED:
        raise InputError(
            f"the name {label!r} is taken by a mix that hawqkit made; give another with --name."
        )
    return label


def _refuse_misfits(mix: Mapping[str, str], table: Sensitivities, path: Path) -> None:
    columns = {layer.name: layer.columns for layer in table.layers}
    wrong = [
        f"layer {name!r}: {format_name!r} does not fit its {columns[name]} columns; these do: "
        f"{', '.join(fitting_formats(columns[name], parse_format(format_name).family))}"
        for name, format_name in mix.items()
        if not parse_format(format_name).fits(columns[name])
    ]
    rounding = with_activations(sorted(set(mix.values())))
    if rounding and table.activations is None:
        wrong.append(
            f"{', '.join(rounding)} round the inputs of layers, and this run has not calibrated "
            "their ranges; put such a format into the recipe's formats and run it again"
        )
    if wrong:
        raise InputError("\n".join([f"{path}: the mix does not fit this run:", *capped(wrong)]))


def _totals(run: RunFolder, table: Sensitivities, mix: Mapping[str, str]) -> Totals:
    """Return the sizes; of targets, those that can hold the mix."""
    formats = tuple(sorted(set(mix.values())))
    names = [
        target
        for target in recipe_choice(run).targets
        if find_target(target).SIZED
        and not find_target(target).problems(mix, table.layers, table.model)
    ]
    return totals(table.layers, mix, size_tables(names, table.layers, formats, table.model))


def _objective(table: Sensitivities, mix: Mapping[str, str], score: str) -> float:
    values = to_array(table.scores[score].values)
    column = {name: i for i, name in enumerate(table.formats)}
    return float(
        sum(
            values[row, column[mix[layer.name]]]
            for row, layer in enumerate(table.layers)
            if mix[layer.name] != NONE.name
        )
    )


def _prediction(table: Sensitivities, mix: Mapping[str, str]) -> Prediction | None:
    samples: Samples | None = table.samples
    if samples is None or not table.withheld:
        return None
    formats = table.formats
    if NONE.name not in formats:  # a layer that stays loses nothing
        nothing = np.zeros((*samples.directional.shape[:2], 1))
        samples = replace(samples, directional=np.concatenate([samples.directional, nothing], 2))
        formats = (*formats, NONE.name)
    return predict(samples, table.layers, formats, mix)
