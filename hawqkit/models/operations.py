"""Multiply-accumulates of every layer, counted while the model runs on real inputs.

Letters in shapes: b examples of a batch, I inputs and O outputs of a layer, g groups, k kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.errors import Unsupported
from hawqkit.models.batch import Batch, Data, run_model
from hawqkit.models.model import LoadedModel
from hawqkit.models.orientation import weight_kind
from hawqkit.records import Layer


@dataclass(frozen=True, slots=True)
class Operations:
    """What one layer does in a forward pass.

    Attributes:
        macs: multiply-accumulates for one example, over all calls.
        input_shape: of the first call's input, its batch dimension included; None without calls.
        output_shape: of its output.
        calls: how often its weight was used; 0 for a layer that the inputs do not reach.
    """

    macs: int
    input_shape: tuple[int, ...] | None
    output_shape: tuple[int, ...] | None
    calls: int


def count_operations(model: LoadedModel, batch: Batch) -> dict[str, Operations]:
    """Count what every layer does, for one example.

        Linear, Conv1D            I multiply-accumulates an output entry
        convolution               I/g prod(k) an output entry, whatever stride and dilation
        transposed convolution    O/g prod(k) an input entry, those of cropped outputs included
        embedding                 none: it is a look-up

    Products of two activations, as in attention, have no weight and are in no layer; a multiply-
    accumulate is two of the operations that FLOP counts mean.

    Args:
        model: its layers are counted, each with all modules that its weight is tied to.
        batch: what the model is run on.

    Returns:
        layer name -> operations, in the order of `model.layers`.

    Raises:
        Unsupported: no whole number comes out for each example, as under routing.
    """
    seen: dict[str, list[_Call]] = {layer.name: [] for layer in model.layers}
    with _watching(model, seen), torch.no_grad():
        run_model(model.module, batch, model.device)
    examples = len(batch.index)
    return {name: _operations(name, calls, examples) for name, calls in seen.items()}


def with_operations(model: LoadedModel, data: Data) -> LoadedModel:
    """Return the model with `macs` in its layers, counted on two single examples.

    The two are the shortest and the longest where lengths differ, else the first and the last.

    Args:
        model: loaded or wrapped.
        data: what it will be run on.

    Raises:
        Unsupported: the two need different numbers of operations, so that no one number is true of
            an example; the message names layers and shapes.
    """
    one, other = _most_different(data)
    counted = count_operations(model, data.micro_batch([one]))
    if other != one:
        again = count_operations(model, data.micro_batch([other]))
        differing = [name for name, found in counted.items() if found != again[name]]
        if differing:
            raise Unsupported(_varying(differing, counted, again, one, other))
    layers = tuple(replace(x, macs=counted[x.name].macs) for x in model.layers)
    return replace(model, layers=layers)


@dataclass(frozen=True, slots=True)
class _Call:
    macs: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@contextmanager
def _watching(model: LoadedModel, seen: dict[str, list[_Call]]) -> Iterator[None]:
    handles = []
    hooked: set[int] = set()
    for layer in model.layers:
        for name in (layer.name, *layer.tied):
            module = model.module.get_submodule(name)
            if id(module) in hooked:
                continue  # the same module under a second name
            hooked.add(id(module))
            hook = _counter(layer, seen[layer.name])
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(layer: Layer, calls: list[_Call]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        calls.append(_Call(_macs(module, given, output), tuple(given.shape), tuple(output.shape)))

    return hook


def _macs(module: nn.Module, given: Tensor, output: Tensor) -> int:
    weight = module.get_parameter("weight")
    kind = weight_kind(module)
    if kind == "embedding":
        return 0
    if kind == "transposed-convolution":
        return given.numel() * math.prod(weight.shape[1:])  # (I, O/g, *k)
    inputs = weight.shape[0] if kind == "conv1d" else math.prod(weight.shape[1:])
    return output.numel() * inputs


def _operations(name: str, calls: list[_Call], examples: int) -> Operations:
    if not calls:
        return Operations(0, None, None, 0)
    total = sum(call.macs for call in calls)
    if total % examples:
        raise Unsupported(
            f"{name}: {total:,} multiply-accumulates for {examples} examples are no whole number "
            "for each, so the examples differ in what they need, and one example has no fixed "
            "number of operations."
        )
    return Operations(total // examples, calls[0].input_shape, calls[0].output_shape, len(calls))


def _most_different(data: Data) -> tuple[int, int]:
    """Return the shortest and the longest example, the first and the last where all are as long."""
    last = len(data) - 1
    if data.micro_batch([0]).attention is None:
        return 0, last
    attention = data.micro_batch(range(len(data))).attention
    assert attention is not None
    lengths = attention.sum(1)
    shortest, longest = int(lengths.argmin()), int(lengths.argmax())
    return (shortest, longest) if shortest != longest else (0, last)


def _varying(
    names: list[str],
    counted: dict[str, Operations],
    again: dict[str, Operations],
    one: int,
    other: int,
) -> str:
    name = max(names, key=lambda n: counted[n].macs)
    more = f" (and {len(names) - 1} more layers)" if len(names) > 1 else ""
    first, second = counted[name], again[name]
    return (
        f"operations cannot be counted, because shapes vary from example to example: {name}{more} "
        f"sees {first.input_shape} in example {one} ({first.macs:,} multiply-accumulates) and "
        f"{second.input_shape} in example {other} ({second.macs:,}). A budget in bit operations "
        "needs examples of one size: resize images to it, cut texts to a length that all of them "
        "reach, or set another budget."
    )
