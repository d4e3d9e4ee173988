"""onnx: a graph for ONNX Runtime, every layer's weight as codes behind a DequantizeLinear.

    model.onnx          the graph; input names as the model's forward has them, output `logits`,
                        any number of examples
    quantization.json   layer name -> format name, and the model that they belong to
    README.md           how to run it

Held are weights of 4 and 8 bits, by channel or in groups, with and without zero points, and inputs
of layers quantized to 8 bits with a range found beforehand. Other widths have no kernels in ONNX
Runtime, so they are refused: `bits` holds them.

Sizes are exact, because a graph is a sum of its parts: `measure_graph` makes the graph once and
notes its bytes in the model's facts. This module needs no torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hawqkit import __version__
from hawqkit.errors import Unsupported
from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.contract import (
    ALL_KINDS,
    Capabilities,
    IntegerFormats,
    choice_problem,
    mix_problems,
    require,
)
from hawqkit.targets.onnx_parts import (
    Place,
    activation_parts,
    field_bytes,
    filled_bytes,
    has_activations,
    initializer_bytes,
    parts,
)

if TYPE_CHECKING:
    from hawqkit.models.batch import Data
    from hawqkit.models.model import LoadedModel

NAME = "onnx"
ABOUT = "model.onnx: weights as codes behind DequantizeLinear, for ONNX Runtime (classifiers)"
RUNTIMES: tuple[str, ...] = ("onnxruntime",)
SIZED = True

GRAPH = "model.onnx"
BITS = "quantization.json"
README = "README.md"
KIND = "hawqkit-onnx"
SCHEMA = 1
WIDTHS = (4, 8)

_README = """\
# {title}, quantized by hawqkit

`model.onnx` takes {inputs} and returns `logits`, for any number of examples.
`{bits}` says which layer has which format.

| format | layers | weights |
|---|---|---|
{rows}

Every other tensor is float32.

## Run it
It needs `pip install "onnxruntime>=1.20"` and no hawqkit.

```python
import onnxruntime

options = onnxruntime.SessionOptions()
# Without this, ONNX Runtime rounds the inputs of 4 and 8 bit matrix products to 8 bits by itself.
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
# Where no format ends in -a8 or a8, this decodes weights once and not in every run: convolutions
# are then as fast as float32, with matrices in float32 in memory.
# options.add_session_config_entry("session.disable_quant_qdq", "1")
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
logits, = session.run(["logits"], {{{feed}}})
```
"""


def capabilities() -> Capabilities:
    """Return what ONNX Runtime has kernels for."""
    return Capabilities(
        integers=(
            IntegerFormats(WIDTHS, symmetric=(True, False)),
            IntegerFormats((4,), symmetric=(True, False), activations=(8,)),
            IntegerFormats((8,), (None,), symmetric=(True, False), activations=(8,)),
        ),
        kinds=ALL_KINDS,
        tied=True,
    )


def problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return everything that the target cannot hold, each with the layer and what would fit."""
    found = []
    known = {layer.name: layer for layer in layers}
    for name, format_name in mix.items():
        problem = choice_problem(name, format_name, known)
        if problem is None:
            problem = _format_problem(known[name], parse_format(format_name))
        if problem is not None:
            found.append(problem)
    return found


def _format_problem(layer: Layer, format: Format) -> str | None:
    what = f"layer {layer.name!r} in format {format.name!r}: "
    if not format.quantizes:
        return None
    if format.family != INTEGER:
        return (
            f"{what}the graph holds integers alone; use an integer format such as int4-g64, or "
            "export 'bits'."
        )
    if format.bits not in WIDTHS:
        return (
            f"{what}ONNX Runtime has kernels for weights of {' and '.join(map(str, WIDTHS))} bits, "
            f"none for {format.bits}; choose among such formats, or export 'bits'."
        )
    if format.activation_bits is None or layer.kind == "embedding":
        return None
    if format.activation_bits != 8:
        return (
            f"{what}ONNX Runtime computes with inputs of 8 bits, not of {format.activation_bits}; "
            "choose an '-a8' format, or export 'bits'."
        )
    if format.bits == 8 and format.group_size is not None and layer.kind in ("linear", "conv1d"):
        plain = f"int8-channel{'' if format.symmetric else '-asym'}-a8"
        return (
            f"{what}ONNX Runtime 1.32 takes a scale of a group for one of a channel where both "
            f"sides of a matrix product are integers, and fails; choose {plain!r}."
        )
    return None


def size_table(
    layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[Integers, int]:
    """Return bytes (L, F) of each choice, and the bytes that no choice changes.

    `fixed` makes the mix of stored dtypes exact. Other mixes are off by the line of the README that
    a format takes, and by quantized inputs that several layers share, which are counted for each.

    Raises:
        Unsupported: the graph was not made, see `measure_graph`.
    """
    places = _places(facts)
    costs = np.zeros((len(layers), len(formats)), dtype=np.int64)
    kept = np.zeros(len(layers), dtype=np.int64)
    for row, layer in enumerate(layers):
        kept[row] = _layer_bytes(layer, "none", places)
        for column, name in enumerate(formats):
            if parse_format(name).fits(layer.columns):
                costs[row, column] = _layer_bytes(layer, name, places)
    return costs, int(size({}, layers, facts) - kept.sum())


def _layer_bytes(layer: Layer, name: str, places: Mapping[str, Place]) -> int:
    format_, listed = parse_format(name), len(_line(layer.name, name).encode())
    place = places.get(layer.name)
    if place is None:
        return listed
    if not format_.quantizes:
        return listed + initializer_bytes("FLOAT", place.dims, place.name)
    own = listed + _parts_bytes(*parts(place, format_, None))
    if has_activations(place, format_):
        own += sum(_parts_bytes(*activation_parts(t, 1.0, 0)) for t in place.inputs)
        own += place.growth
    return own


def size(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
    """Return the bytes of all files that `write` writes for this mix, equal to the byte.

    Layers that read the same tensor are taken to have found the same range for it.

    Raises:
        Unsupported: the target cannot hold the mix, or the graph was not made (`measure_graph`).
    """
    require(NAME, mix_problems(mix, layers))
    places = _places(facts)
    graph = int(facts.graph["graph"])
    inputs: dict[str, None] = {}
    for name, format_ in quantized(mix, places):
        place = places[name]
        graph -= initializer_bytes("FLOAT", place.dims, place.name)
        graph += _parts_bytes(*parts(place, format_, None))
        if has_activations(place, format_):
            inputs |= dict.fromkeys(place.inputs)
            graph += place.growth
    graph += sum(_parts_bytes(*activation_parts(tensor, 1.0, 0)) for tensor in inputs)
    texts = bits_text(mix, layers, facts) + readme(mix, layers, facts)
    return int(facts.graph["head"]) + field_bytes(graph) + len(texts.encode())


def _parts_bytes(initializers: Sequence[Any], nodes: Sequence[Any]) -> int:
    return sum(field_bytes(filled_bytes(t)) for t in initializers) + sum(
        field_bytes(int(node.ByteSize())) for node in nodes
    )


def _places(facts: ModelFacts) -> dict[str, Place]:
    if not facts.graph:
        raise Unsupported(
            f"the bytes of target {NAME!r} are known once the graph of {facts.source!r} was made: "
            "call measure_graph(model, examples) before probing, or use the budget bits_per_weight."
        )
    return {name: Place.of(plain) for name, plain in facts.graph["layers"].items()}


def quantized(mix: Mapping[str, str], places: Mapping[str, Place]) -> list[tuple[str, Format]]:
    """Return the layers of the graph that a mix quantizes, in its order, with their formats."""
    pairs = [(name, parse_format(mix.get(name, "none"))) for name in places]
    return [(name, format_) for name, format_ in pairs if format_.quantizes]


def bits_text(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return `quantization.json`."""
    head = {
        "kind": KIND,
        "schema": SCHEMA,
        "version": __version__,
        "model": {"source": facts.source, "hash": facts.hash},
    }
    lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}," for k, v in head.items()]
    entries = "".join(_line(x.name, mix.get(x.name, "none")) for x in layers)
    return "\n".join(["{", *lines, '  "layers": {']) + entries.rstrip(",") + "\n  }\n}\n"


def _line(name: str, format_name: str) -> str:
    return f"\n    {json.dumps(name, ensure_ascii=False)}: {json.dumps(format_name)},"


def readme(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> str:
    """Return README.md: what the graph takes, what it holds, how to run it."""
    count: Counter[str] = Counter()
    entries: Counter[str] = Counter()
    for layer in layers:
        name = mix.get(layer.name, "none")
        count[name] += 1
        entries[name] += layer.numel
    rows = [f"| {n} | {count[n]} | {entries[n]:,} |" for n in sorted(count)]
    names = [x.name for x in facts.inputs]
    return _README.format(
        title=facts.source,
        inputs=" and ".join(
            f"`{x.name}` ({x.dtype}, {' x '.join(map(str, ('examples', *x.shape)))})"
            for x in facts.inputs
        ),
        bits=BITS,
        rows="\n".join(rows),
        feed=", ".join(f'"{n}": {n}' for n in names),
    )


def write(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write graph, formats and README; see `contract.Target.write`.

    Raises:
        HawqkitError: the packages of the extra `onnx` are missing.
        Unsupported: the target cannot hold the mix, it is a language model, its inputs are not
            known (`measure_graph`), torch cannot export it, or a layer is not found.
    """
    from hawqkit.targets.onnx_writer import write_folder

    require(NAME, problems(allocation.layers, model.layers, model.facts))
    return write_folder(allocation, Path(folder), model, allocation.activations)


def write_from_facts(
    allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
) -> list[Path]:
    """Refuse: the graph holds the weights, which the records of a run do not.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(f"target {NAME!r} writes weights: give the model, as `load_model` loads it.")


def measure_graph(model: LoadedModel, examples: Data) -> LoadedModel:
    """Return the model with its inputs and the bytes of its ONNX graph in its facts.

    With that, `size` is exact, and `write` knows what to trace the model with. Fold batch norms
    before, and probe the model that comes back: facts belong to one graph.

    Args:
        model: a classifier.
        examples: what it will be run on.

    Raises:
        HawqkitError: the packages of the extra `onnx` are missing.
        Unsupported: torch cannot export the model, or a layer is not found in the graph.
    """
    from hawqkit.models.signature import with_inputs
    from hawqkit.targets.onnx_graph import float_graph

    model = with_inputs(model, examples)
    proto, places = float_graph(model)
    graph = int(proto.graph.ByteSize())
    facts = {
        "head": int(proto.ByteSize()) - field_bytes(graph),
        "graph": graph,
        "layers": {name: asdict(place) for name, place in places.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return replace(model, facts=replace(model.facts, graph=plain))


def is_export(folder: Path) -> bool:
    """Whether an earlier export of this target wrote a folder."""
    try:
        content = json.loads((folder / BITS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
