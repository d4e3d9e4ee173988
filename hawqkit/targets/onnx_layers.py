"""Single layers of a model's ONNX graph, cut out with what they read in a real run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from hawqkit.formats import Format
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.targets.onnx_graph import IR_VERSION, OPSET, float_graph
from hawqkit.targets.onnx_parts import Codes, Place, onnx_package
from hawqkit.targets.onnx_timing import Timed, open_session
from hawqkit.targets.onnx_writer import Scales, codes_of, put_in

# What a layer is timed with: its bias and the activation behind it, which runtimes fuse.
_FOLLOWERS = ("Add", "Relu", "Clip", "BatchNormalization")


@dataclass(frozen=True, slots=True)
class Setting:
    """A float graph with everything that makes it quantized and run.

    Attributes:
        graph: `onnx.ModelProto`.
        places: where its layers stand.
        codes: returns the weight of a layer in a format.
        scales: of the inputs of layers, those that they had in the run.
        feed: inputs of the run by name.
        values: tensor that a layer reads -> its values in the run.
        threads: of one operation.
    """

    graph: Any
    places: dict[str, Place]
    codes: Callable[[str, Format], Codes]
    scales: Scales
    feed: dict[str, Any]
    values: dict[str, Any]
    threads: int

    def quantized(self, graph: Any, places: Mapping[str, Place], mix: Mapping[str, str]) -> Any:
        """Return a copy of a graph in a mix."""
        copy = type(graph)()
        copy.CopyFrom(graph)
        put_in(copy, places, mix, self.codes, self.scales)
        return copy


def make_setting(model: LoadedModel, examples: Data, batch: int, threads: int) -> Setting:
    """Make the float graph of a model, run it once on a batch, and keep what layers read in it."""
    graph, places = float_graph(model)
    given = examples.micro_batch(range(batch)).inputs(model.device)
    names = [x.name for x in graph.graph.input]
    arrays = [value.float() if value.is_floating_point() else value for value in given.values()]
    by_name = dict(zip((x.name for x in model.facts.inputs), arrays, strict=True))
    feed = {name: by_name[name].cpu().numpy() for name in names}
    values = _values(graph, places, feed)
    scales = {
        name: _scale([values[t] for t in place.inputs])
        for name, place in places.items()
        if place.inputs
    }

    @cache
    def codes(name: str, format: Format) -> Codes:
        return codes_of(model, name, format, "nearest")

    return Setting(graph, places, codes, scales, feed, values, threads)


def _values(graph: Any, places: Mapping[str, Place], feed: Mapping[str, Any]) -> dict[str, Any]:
    """Run the float graph once, and return what each layer reads."""
    onnx = onnx_package()
    stored = {t.name for t in graph.graph.initializer}
    read = {name for place in places.values() for name in _outside(graph, _nodes(graph, place))}
    wanted = sorted(read - stored - set(feed))
    copy = type(graph)()
    copy.CopyFrom(graph)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted)
    found = open_session(copy, threads=1, optimize=False).run(wanted, dict(feed)) if wanted else []
    return dict(feed) | dict(zip(wanted, found, strict=True))


def _scale(values: Sequence[Any]) -> tuple[float, int]:
    low = min(0.0, *(float(v.min()) for v in values))
    high = max(0.0, *(float(v.max()) for v in values))
    scale = float(np.float32((high - low) / 255)) or 1.0
    return scale, round(-low / scale)


def _nodes(graph: Any, place: Place) -> list[Any]:
    """Return the nodes that read a layer's weight, and bias and activation behind them."""
    stored = {t.name for t in graph.graph.initializer}
    nodes = [n for n in graph.graph.node if place.name in n.input]
    for node in list(nodes):
        last = node
        while True:
            readers = [n for n in graph.graph.node if last.output[0] in n.input]
            if len(readers) != 1 or readers[0].op_type not in _FOLLOWERS:
                break
            if any(x not in stored and x != last.output[0] for x in readers[0].input):
                break
            last = readers[0]
            nodes.append(last)
    return nodes


def _outside(graph: Any, nodes: Sequence[Any]) -> list[str]:
    stored = {t.name for t in graph.graph.initializer}
    inside = {name for n in nodes for name in n.output}
    names = [x for n in nodes for x in n.input if x and x not in stored and x not in inside]
    return list(dict.fromkeys(names))


def signature(setting: Setting, place: Place) -> tuple[Any, ...]:
    """Return what tells the computation of a layer from others: operations, shapes, attributes."""
    nodes = _nodes(setting.graph, place)
    steps = tuple(
        (n.op_type, *(str(a) for a in sorted(n.attribute, key=lambda a: a.name))) for n in nodes
    )
    shapes = tuple(setting.values[x].shape for x in _outside(setting.graph, nodes))
    return place.use, place.dims, steps, shapes


def single_layer(setting: Setting, name: str, format_name: str) -> Timed:
    """Return the graph of one layer in one format, and what it reads."""
    onnx = onnx_package()
    place = setting.places[name]
    nodes = _nodes(setting.graph, place)
    read = {x for n in nodes for x in n.input}
    feed = {x: setting.values[x] for x in _outside(setting.graph, nodes)}
    inside = {x for n in nodes for x in n.input}
    outputs = [x for n in nodes for x in n.output if x and x not in inside]
    graph = onnx.helper.make_graph(
        nodes,
        "layer",
        [
            onnx.helper.make_tensor_value_info(
                x, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape
            )
            for x, v in feed.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(x) for x in outputs],
        [t for t in setting.graph.graph.initializer if t.name in read],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=list(setting.graph.opset_import),
        ir_version=setting.graph.ir_version,
    )
    return setting.quantized(model, {name: place}, {name: format_name}), feed


def nothing() -> Timed:
    """Return a graph of one number, whose time is what any run takes."""
    helper = onnx_package().helper
    facts = [helper.make_tensor_value_info(x, 1, [1]) for x in ("x", "y")]
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "nothing", facts[:1], facts[1:])
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    return model, {"x": np.zeros(1, dtype=np.float32)}


def operation(setting: Setting, place: Place) -> str:
    """Say what a layer computes: operation, weight, attributes that are not 1, inputs."""
    nodes = _nodes(setting.graph, place)
    first = nodes[0]
    dims = "x".join(map(str, place.dims))
    facts = []
    for attribute in first.attribute:
        value = onnx_package().helper.get_attribute_value(attribute)
        shown = set(value) if isinstance(value, (list, tuple)) else {value}
        if attribute.name in ("strides", "group", "dilations") and shown != {1}:
            facts.append(f"{attribute.name} {'x'.join(map(str, sorted(shown)))}")
    read = ["x".join(map(str, setting.values[x].shape)) for x in _outside(setting.graph, [first])]
    return " ".join([first.op_type, dims, *facts, "on", *read])
