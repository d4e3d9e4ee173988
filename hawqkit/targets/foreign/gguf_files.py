"""The mix of a GGUF file: the type of each tensor, under the names of the model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hawqkit.errors import InputError
from hawqkit.formats import GGUFS
from hawqkit.records import Layer, ModelFacts
from hawqkit.targets.contract import capped
from hawqkit.targets.foreign.contract import Collected, ForeignMix
from hawqkit.targets.gguf_names import layer_tensors, require_gguf, tensor_names

PLAIN = ("F64", "F32", "F16", "BF16")


def read_gguf(path: Path, layers: Sequence[Layer], facts: ModelFacts) -> ForeignMix:
    """Read the types of a GGUF file's tensors; the data are not touched.

    Raises:
        InputError: the file cannot be read, or a layer is not in it, or in another shape.
        Unsupported: the package `gguf` is missing.
    """
    gguf = require_gguf(f"reading {path}")
    try:
        tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise InputError(f"{path}: this is no GGUF file that can be read: {error}") from error
    names = layer_tensors(layers, tensor_names(facts))
    found = Collected()
    wrong = []
    for layer in layers:
        tensor = tensors.get(names.get(layer.name, ""))
        shape = () if tensor is None else tuple(int(n) for n in reversed(tensor.shape))
        if tensor is None or shape != (layer.rows, layer.columns):
            wrong.append(f"layer {layer.name!r}: {shape or 'nothing'} in place of "
                         f"{(layer.rows, layer.columns)}")  # fmt: skip
            continue
        kind = tensor.tensor_type.name
        if kind in PLAIN:
            found.keep(layer)
        else:
            found.give(layer, kind.lower() if kind.lower() in GGUFS else None, kind)
    if wrong:
        head = f"{path} is of another model; {len(wrong)} of {len(layers)} layers differ:"
        raise InputError("\n".join([head, *capped(wrong)]))
    return found.mix("gguf")
