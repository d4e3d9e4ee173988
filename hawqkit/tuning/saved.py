"""A tuned model on disk: a folder that transformers loads, and what it takes to round it again.

tuned/model.safetensors     the trained weights before rounding, in their stored dtypes
tuned/scales.safetensors    NAME/scales and NAME/zeros of every rounded layer
tuned/config.json           and the files of the tokenizer or processor, if transformers can
                            load the folder: a network of its own, with the names it expects
activations.json            ranges of inputs, if a format rounds them
tuning.json                 the record; written last, so where it stands, all of it does
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hawqkit.errors import StateMismatch
from hawqkit.formats import parse_format
from hawqkit.models.fixed_scales import FixedScales
from hawqkit.models.model import LoadedModel, own_state, with_values
from hawqkit.quantize.rounding import round_into, scale_dtype_for
from hawqkit.records import ActivationRanges, Allocation, Tuning
from hawqkit.store import Arrays, read_arrays, read_record, share, write_arrays, write_record
from hawqkit.targets.folders import published
from hawqkit.tuning.outcome import Tuned

RECORD, RANGES, TUNED = "tuning.json", "activations.json", "tuned"
WEIGHTS, SCALES, CONFIG = "model.safetensors", "scales.safetensors", "config.json"


def write_tuned(folder: Path, tuned: Tuned) -> None:
    """Write a tuned model into a folder; the record comes last.

    Raises:
        InputError: `tuned/` is there and is none of ours.
    """
    (folder / RECORD).unlink(missing_ok=True)
    if tuned.activations is not None:
        write_record(folder / RANGES, tuned.activations)
    with published(folder / TUNED, _is_tuned) as place:
        loose = tuned.unrounded_model()
        dtypes = {t.name: t.dtype for t in loose.facts.tensors}
        state = {
            name: _own(t.to(getattr(torch, dtypes[name])) if name in dtypes else t)
            for name, t in own_state(loose.module).items()
        }
        save_file(state, place / WEIGHTS, metadata={"format": "pt"})
        write_arrays(place / SCALES, _to_arrays(tuned.model.scales), {"tuned": tuned.record.tuned})
        share(place / WEIGHTS)
        if loose.facts.config and set(dtypes) == set(state):
            text = json.dumps(loose.facts.config, indent=2, sort_keys=True) + "\n"
            (place / CONFIG).write_text(text, encoding="utf-8")
            loose.save_side_files(place)
    write_record(folder / RECORD, tuned.record)


def load_tuned(
    folder: str | Path, model: LoadedModel, allocation: Allocation | None = None
) -> Tuned:
    """Read a tuned model.

    Args:
        folder: that `tune` was given, or `RUN/tuning`.
        model: the original, which is not changed.
        allocation: whose mix was tuned; makes the allocation of the result.

    Raises:
        InputError: the folder holds no finished tuning.
        StateMismatch: it is of another model or mix, or damaged.
    """
    folder = Path(folder)
    record = read_record(folder / RECORD, Tuning)
    if record.model != model.facts.hash:
        raise StateMismatch(
            f"{folder}: is of a model with hash {record.model[:12]}, and {model.facts.source} has "
            f"{model.facts.hash[:12]}; load the model that was tuned."
        )
    if allocation is not None and dict(allocation.layers) != record.layers:
        changed = [n for n, f in allocation.layers.items() if record.layers.get(n) != f]
        raise StateMismatch(
            f"{folder}: was tuned for another mix ({len(changed)} layers differ, such as "
            f"{(changed or ['-'])[0]}); tune again, or remove the folder."
        )
    loose, scales = _read(folder / TUNED, model, record)
    ranges = None
    if (folder / RANGES).exists():
        ranges = read_record(folder / RANGES, ActivationRanges)
    unrounded = {name: loose.parameter(name).detach().clone() for name in scales}
    module = loose.module
    _round(loose, record.layers, scales)
    found = with_values(model, module, scales)
    if found.facts.hash != record.tuned:
        raise StateMismatch(
            f"{folder}: its weights have hash {found.facts.hash[:12]}, and the record says "
            f"{record.tuned[:12]}; the files are damaged or mixed up: tune again."
        )
    rounding = str(record.settings["rounding"])
    return Tuned(
        found,
        dict(record.layers),
        rounding,
        ranges,
        unrounded,
        record,
        fitted(allocation, found, ranges),
        taken=True,
    )


def fitted(
    allocation: Allocation | None, tuned: LoadedModel, ranges: ActivationRanges | None
) -> Allocation | None:
    """Return an allocation for the tuned model: its hash, its ranges, the same mix."""
    if allocation is None:
        return None
    return replace(allocation, model=tuned.facts.hash, activations=ranges)


def _is_tuned(folder: Path) -> bool:
    return (folder / SCALES).is_file() and (folder / WEIGHTS).is_file()


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _to_arrays(scales: Mapping[str, FixedScales]) -> Arrays:
    """Return scales as float32, which holds every 16-bit scale exactly."""
    arrays: Arrays = {}
    for name, known in scales.items():
        arrays[f"{name}/scales"] = known.scales.detach().cpu().float().numpy()
        if known.zeros is not None:
            arrays[f"{name}/zeros"] = known.zeros.cpu().numpy()
    return arrays or {"(none)": np.zeros(0, dtype=np.float32)}


@torch.no_grad()
def _read(
    folder: Path, model: LoadedModel, record: Tuning
) -> tuple[LoadedModel, dict[str, FixedScales]]:
    """Return a copy of the model with the unrounded weights, and the scales of its layers."""
    arrays, _ = read_arrays(folder / SCALES)
    try:
        state = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise StateMismatch(f"{folder / WEIGHTS}: cannot be read ({error}); tune again.") from error
    module: nn.Module = copy.deepcopy(model.module)
    own = own_state(module)
    odd = sorted(set(own) ^ set(state))
    if odd:
        raise StateMismatch(f"{folder / WEIGHTS}: {odd[0]} is not in it and the model; tune again.")
    for name, tensor in own.items():
        tensor.copy_(state[name])
    loose = replace(model, module=module, scales={})
    scales = {}
    for layer in model.layers:
        if f"{layer.name}/scales" not in arrays:
            continue
        dtype, device = scale_dtype_for(layer.dtype), loose.weight(layer.name).device
        zeros = arrays.get(f"{layer.name}/zeros")
        scales[layer.name] = FixedScales(
            parse_format(record.layers[layer.name]).weights.name,
            torch.from_numpy(arrays[f"{layer.name}/scales"]).to(device, dtype),
            None if zeros is None else torch.from_numpy(zeros).to(device),
        )
    return loose, scales


@torch.no_grad()
def _round(model: LoadedModel, mix: Mapping[str, str], scales: Mapping[str, FixedScales]) -> None:
    """Leave rounded values in the parameters of a copy."""
    for name, known in scales.items():
        rows = model.weight(name)
        wide = torch.promote_types(rows.dtype, torch.float32)
        values = torch.empty(rows.shape, dtype=wide, device=rows.device)
        round_into(values, rows, known.scales, known.zeros, parse_format(mix[name]))
        parameter = model.parameter(name)
        parameter.data = model.from_rows(name, values).to(parameter.dtype)
