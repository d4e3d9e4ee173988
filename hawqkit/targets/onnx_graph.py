"""The float ONNX graph of a model, made by torch's own exporter, its layers' weights in reach.

Each layer's weight is an initializer of its own, named after the layer, in the one shape that its
quantized form is read in (`onnx_parts.Place`); whatever the mix, the rest of the graph is the same.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from hawqkit.errors import Unsupported
from hawqkit.models.model import LoadedModel
from hawqkit.models.signature import stand_ins
from hawqkit.records import Layer
from hawqkit.targets.onnx_parts import (
    Place,
    dequantized_name,
    field_bytes,
    onnx_package,
    weight_name,
)

OPSET = 21  # the first with 4-bit integers and with scales of blocks
IR_VERSION = 10  # of the file's layout, that belongs to it
EXAMPLES = 2  # one would be taken for a constant
OUTPUT = "logits"
LARGEST = 2**31 - 1  # bytes of a protobuf message
_MOST_LETTERS = 300  # of a foreign error
_TEXTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_QUIETED = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def float_graph(model: LoadedModel) -> tuple[Any, dict[str, Place]]:
    """Return the ONNX model (`onnx.ModelProto`) of a network and where its layers stand in it.

    Batch norms stay as they are: folding one would change the weight whose codes are stored. Layers
    that the traced run does not reach are in neither.

    Args:
        model: a classifier whose facts hold its inputs.

    Raises:
        Unsupported: torch cannot export it, a layer's weight is not found where it can be
            replaced, or the graph is larger than a protobuf message may be.
    """
    if model.task == "causal-lm":
        raise Unsupported(
            f"{model.facts.source!r} is a language model, and this target traces classifiers; "
            "export 'compressed-tensors' or 'bits'."
        )
    given = stand_ins(model.facts, EXAMPLES)
    module = _in_float32(model.module)
    reached = _reached(module, model.layers, given)
    graph = _exported(module, given, model, reached)
    places, lost = {}, []
    for layer in model.layers:
        if layer.name not in reached:
            continue
        found = _placed(graph.graph, layer, model)
        if isinstance(found, Place):
            places[layer.name] = found
        else:
            lost.append(f"layer {layer.name!r}: {found}")
    if lost:
        raise Unsupported(
            "the exported graph does not show where these layers are computed, so they would stay "
            "in float; exclude them, or export 'bits':\n" + "\n".join(f"  - {x}" for x in lost)
        )
    return graph, {name: _with_growth(graph.graph, place) for name, place in places.items()}


def users_of(graph: Any, place: Place) -> list[Any]:
    """Return the nodes that multiply a layer's weight with something."""
    return [n for n in graph.node if place.name in n.input and n.input[0] in place.inputs]


def _with_growth(graph: Any, place: Place) -> Place:
    growth = 0
    for node in users_of(graph, place):
        renamed = type(node)()
        renamed.CopyFrom(node)
        renamed.input[0] = dequantized_name(node.input[0])
        growth += field_bytes(int(renamed.ByteSize())) - field_bytes(int(node.ByteSize()))
    return replace(place, growth=growth)


def _in_float32(module: nn.Module) -> nn.Module:
    same = all(
        p.device.type == "cpu" and (not p.is_floating_point() or p.dtype == torch.float32)
        for p in [*module.parameters(), *module.buffers()]
    )
    return module if same else deepcopy(module).to("cpu", torch.float32)


@torch.no_grad()
def _reached(module: nn.Module, layers: Sequence[Layer], given: dict[str, Any]) -> set[str]:
    """Return the layers that a run calls."""
    called: set[str] = set()
    handles = []
    for layer in layers:
        for name in (layer.name, *layer.tied):

            def note(*_: Any, owner: str = layer.name) -> None:
                called.add(owner)

            handles.append(module.get_submodule(name).register_forward_hook(note))
    try:
        module(**_floats(given))
    finally:
        for handle in handles:
            handle.remove()
    return called


def _floats(given: dict[str, Any]) -> dict[str, Any]:
    return {n: t.float() if t.is_floating_point() else t for n, t in given.items()}


def _exported(
    module: nn.Module, given: dict[str, Any], model: LoadedModel, reached: set[str]
) -> Any:
    onnx_package()
    kept = {
        weight_name(name)
        for layer in model.layers
        if layer.name in reached
        for name in (layer.name, *layer.tied)
    }
    shapes = {name: _dynamic(name, tensor) for name, tensor in given.items()}
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs=_floats(given),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
        # The exporter raises many kinds of errors, for whatever the network does.
        except Exception as error:
            cause = error.__cause__ or error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:_MOST_LETTERS]
            raise Unsupported(
                f"torch cannot export {model.facts.source!r} to ONNX for any number of examples: "
                f"{reason}. A forward that fixes the batch size or branches on values cannot be "
                "traced; export 'bits' instead."
            ) from error
        proto = _simplified(program, kept)
    if proto.ByteSize() > LARGEST:
        raise Unsupported(
            f"the graph of {model.facts.source!r} takes {proto.ByteSize():,} bytes, and one ONNX "
            f"file holds {LARGEST:,} at most; export 'bits' instead."
        )
    return proto


def _dynamic(name: str, tensor: Any) -> dict[int, Any]:
    auto = torch.export.Dim.AUTO
    length = {1: auto} if name in _TEXTS and tensor.ndim == 2 else {}
    return {0: torch.export.Dim.DYNAMIC, **length}


def _simplified(program: Any, kept: set[str]) -> Any:
    """Fold constants and drop what nothing reads, with the layers' weights untouched."""
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript import optimizer

    def fold(node: ir.Node) -> bool | None:
        touches = any(value is not None and value.name in kept for value in node.inputs)
        return False if touches and node.op_type != "Shape" else None

    model = program.model
    outputs = model.graph.outputs
    while len(outputs) > 1:  # the first is the logits, as transformers orders them
        outputs.pop()
    optimizer.fold_constants(model, should_fold=fold)
    for step in (
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.RemoveUnusedFunctionsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    proto = ir.to_proto(model)
    proto.ir_version = IR_VERSION
    del proto.graph.value_info[:], proto.metadata_props[:], proto.graph.metadata_props[:]
    for part in (*proto.graph.node, *proto.graph.initializer, *proto.graph.input):
        del part.metadata_props[:]
    _rename(proto.graph, proto.graph.output[0].name, OUTPUT)
    for value in (*proto.graph.input, *proto.graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) and not dims[0].HasField("dim_value"):
            dims[0].dim_param = "batch"
    return proto


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
    for value in graph.output:
        if value.name == old:
            value.name = new


def _placed(graph: Any, layer: Layer, model: LoadedModel) -> Place | str:
    """Bring a layer's weight to its one place, and return it, or what was found instead."""
    names = [weight_name(n) for n in (layer.name, *layer.tied)]
    found = [t for t in graph.initializer if t.name in names]
    if not found:
        return "it runs, but no initializer has its name"
    tensor = found[0]
    for other in found[1:]:
        _read_instead(graph, other.name, tensor.name)
        graph.initializer.remove(other)
    name = weight_name(layer.name)
    if tensor.name != name:
        _read_instead(graph, tensor.name, name)
        tensor.name = name
    readers = [node for node in graph.node if name in node.input]
    kinds = sorted({node.op_type for node in readers})
    module = model.module.get_submodule(layer.name)
    if kinds == ["Conv"]:
        return _place(graph, tensor, "conv", readers, 1)
    if kinds == ["ConvTranspose"]:
        return _place(graph, tensor, "transposed", readers, int(getattr(module, "groups", 1)))
    if layer.kind in ("linear", "conv1d") and set(kinds) <= {"Transpose", "Gemm", "MatMul"}:
        return _inputs_first(graph, tensor, layer, readers)
    if layer.kind in ("embedding", "linear") and set(kinds) <= {"Gather", "Transpose", "Gemm"}:
        return _outputs_first(graph, tensor, readers)
    return f"its weight is read by {', '.join(kinds) or 'nothing'}"


def _read_instead(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = new


def _inputs_first(graph: Any, tensor: Any, layer: Layer, readers: Sequence[Any]) -> Place | str:
    """Store the weight of a Linear as (inputs, outputs): so MatMul reads it, 4 bits wide too."""
    onnx = onnx_package()
    values = onnx.numpy_helper.to_array(tensor)
    users: list[Any] = []
    for node in readers:
        stored_first = layer.kind == "conv1d"
        if node.op_type == "Transpose":
            if stored_first or _perm(node) != [1, 0]:
                return "its weight is transposed in an unknown way"
            users += [n for n in graph.node if node.output[0] in n.input]
            _read_instead(graph, node.output[0], tensor.name)
            graph.node.remove(node)
            continue
        if node.op_type == "Gemm":
            if bool(_attribute(node, "transB", 0)) == stored_first:
                return "its weight is read by a Gemm in an unknown orientation"
            _set_attribute(node, "transB", 0)
        elif not stored_first:
            return "its weight is read by a MatMul that does not transpose it"
        users.append(node)
    if layer.kind == "linear":
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values.T), tensor.name))
    strange = [n.op_type for n in users if n.op_type not in ("MatMul", "Gemm")]
    if strange or any(n.input[1] != tensor.name for n in users):
        return f"its weight is read by {', '.join(strange) or 'the left side of a product'}"
    for node in users:
        _split_bias(graph, node)
    return _place(graph, tensor, "columns", users, 1)


def _outputs_first(graph: Any, tensor: Any, readers: Sequence[Any]) -> Place:
    """Keep (rows, columns): an embedding, or one that a head shares."""
    return _place(graph, tensor, "rows", [n for n in readers if n.op_type == "Gemm"], 1)


def _split_bias(graph: Any, node: Any) -> None:
    """Move the bias of a Gemm into an Add: integer kernels take no float bias."""
    onnx = onnx_package()
    if node.op_type != "Gemm" or len(node.input) < 3:
        return
    bias, out = node.input[2], node.output[0]
    del node.input[2]
    node.output[0] = f"{out}_product"
    at = list(graph.node).index(node)
    graph.node.insert(at + 1, onnx.helper.make_node("Add", [node.output[0], bias], [out]))


def _place(graph: Any, tensor: Any, use: str, users: Sequence[Any], groups: int) -> Place:
    inputs = tuple(dict.fromkeys(node.input[0] for node in users))
    return Place(tensor.name, use, tuple(int(d) for d in tensor.dims), groups, inputs)


def _perm(node: Any) -> list[int]:
    return list(_attribute(node, "perm", [1, 0]))


def _attribute(node: Any, name: str, default: Any) -> Any:
    onnx = onnx_package()
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    return default


def _set_attribute(node: Any, name: str, value: int) -> None:
    onnx = onnx_package()
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what the exporter says about packages that are not needed and about itself."""
    loggers = [logging.getLogger(name) for name in _QUIETED]
    levels = [x.level for x in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
