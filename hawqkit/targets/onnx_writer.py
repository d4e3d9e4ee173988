"""Put a mix of formats into a model's ONNX graph, and write it; `onnx` says what lies where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import Format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.of_layer import quantize_layer
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import Allocation
from hawqkit.records.activations import ActivationRanges
from hawqkit.targets import onnx as layout
from hawqkit.targets.folders import published
from hawqkit.targets.onnx_graph import float_graph, users_of
from hawqkit.targets.onnx_parts import (
    Codes,
    Place,
    activation_parts,
    dequantized_name,
    has_activations,
    parts,
)

# Layer -> (scale, zero point) of its input: t' = (clamp(round(t / scale) + zero, 0, 255) - zero)
# scale.
Scales = Mapping[str, tuple[float, int]]


def write_folder(
    allocation: Allocation, folder: Path, model: LoadedModel, ranges: ActivationRanges | None
) -> list[Path]:
    """Write the graph, the formats and the README, and return the files.

    Args:
        allocation: the mix and how weights are rounded.
        folder: where they shall lie.
        model: the original.
        ranges: of the layers' inputs, needed where a format quantizes them.

    Raises:
        InputError: the folder holds something else, or a range is missing; nothing is changed.
        Unsupported: ranges are dynamic, or as `float_graph`.
    """
    mix, layers, facts = allocation.layers, model.layers, model.facts
    graph, places = float_graph(model)
    scales = _scales(mix, places, ranges)
    put_in(graph, places, mix, lambda n, f: codes_of(model, n, f, allocation.rounding), scales)
    with published(folder, layout.is_export) as place:
        (place / layout.GRAPH).write_bytes(graph.SerializeToString(deterministic=True))
        (place / layout.BITS).write_bytes(layout.bits_text(mix, layers, facts).encode())
        (place / layout.README).write_bytes(layout.readme(mix, layers, facts).encode())
    return [folder / name for name in sorted((layout.BITS, layout.GRAPH, layout.README))]


def _scales(
    mix: Mapping[str, str], places: Mapping[str, Place], ranges: ActivationRanges | None
) -> Scales:
    """Return the scale and zero point of each input that a mix quantizes."""
    found = {}
    for name, format_ in layout.quantized(mix, places):
        if not has_activations(places[name], format_):
            continue
        if ranges is None:
            raise InputError(
                f"layer {name!r} in format {format_.name!r}: no range of its input is known; "
                "calibrate the activations, and give the ranges."
            )
        grid = ranges.grid(name, format_.activation_bits or 0)
        if grid is None:
            raise Unsupported(
                f"layer {name!r} in format {format_.name!r}: its inputs get a range a token, and "
                f"target {layout.NAME!r} stores ranges found beforehand; calibrate with mode "
                "'static', or export 'bits'."
            )
        found[name] = (grid.scale, grid.zero)
    return found


def put_in(
    graph: Any,
    places: Mapping[str, Place],
    mix: Mapping[str, str],
    codes: Callable[[str, Format], Codes],
    scales: Scales,
) -> None:
    """Replace the weights that a mix quantizes, in place.

    Args:
        graph: from `float_graph`.
        places: from `float_graph`.
        mix: layer name -> format name.
        codes: returns the weight of a layer in a format, see `codes_of`.
        scales: of the inputs of the layers whose format quantizes them.

    Raises:
        NumericalError: from `codes`.
        Unsupported: a layer that was to be quantized would still be in float.
    """
    chosen = layout.quantized(mix, places)
    nodes, initializers = [], []
    for name, format_ in chosen:
        own, made = parts(places[name], format_, codes(name, format_))
        initializers += own
        nodes += made
    replaced = {places[name].name for name, _ in chosen}
    kept = [t for t in graph.graph.initializer if t.name not in replaced]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend([*kept, *initializers])
    _quantize_inputs(graph.graph, places, chosen, scales)
    others = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend([*nodes, *others])
    _refuse_left_over(graph.graph, replaced)


@torch.no_grad()
def codes_of(model: LoadedModel, name: str, format: Format, rounding: str) -> Codes:
    """Round a layer's weight: the codes and scales that `quantize.apply.applied` decodes.

    Raises:
        NumericalError: a scale is not finite in its 16 bits.
    """
    layer = next(x for x in model.layers if x.name == name)
    dtype = scale_dtype_for(layer.dtype)
    made = quantize_layer(model, name, format.weights, rounding=rounding, scale_dtype=dtype)
    scales = made.scales.float().cpu()
    if not bool(torch.isfinite(scales).all()):
        raise NumericalError(
            f"layer {name!r}: its weights are too large for scales in {dtype}; load the model in "
            "bfloat16 or float32."
        )
    zeros = None if made.zeros is None else made.zeros.cpu().numpy()
    return Codes(made.codes.cpu().numpy(), scales.numpy(), zeros)


def _quantize_inputs(
    graph: Any, places: Mapping[str, Place], chosen: list[tuple[str, Format]], scales: Scales
) -> None:
    """Put QuantizeLinear and DequantizeLinear behind the tensors that layers with ranges read."""
    made: dict[tuple[str, float, int], str] = {}
    for name, format_ in chosen:
        if not has_activations(places[name], format_):
            continue
        scale, zero = scales[name]
        for node in users_of(graph, places[name]):
            tensor = node.input[0]
            key = (tensor, scale, zero)
            if key not in made:
                suffix = "" if not any(k[0] == tensor for k in made) else f"_{len(made)}"
                made[key] = dequantized_name(tensor, suffix)
                _insert_behind(graph, tensor, *activation_parts(tensor, scale, zero, suffix))
            node.input[0] = made[key]


def _insert_behind(graph: Any, tensor: str, initializers: list[Any], nodes: list[Any]) -> None:
    graph.initializer.extend(initializers)
    at = next((i + 1 for i, n in enumerate(graph.node) if tensor in n.output), 0)
    for offset, node in enumerate(nodes):
        graph.node.insert(at + offset, node)


def _refuse_left_over(graph: Any, replaced: set[str]) -> None:
    """Count: each quantized weight comes out of one node, and from no float initializer."""
    floats = {t.name for t in graph.initializer}
    outputs = [name for node in graph.node for name in node.output if name in replaced]
    bad = sorted((replaced & floats) | {n for n in replaced if outputs.count(n) != 1})
    if bad:
        raise Unsupported(f"these weights would have stayed in float: {', '.join(bad)}.")
