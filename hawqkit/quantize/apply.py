"""Put a mix of formats into a model, and take it out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, did_you_mean
from hawqkit.formats import parse_format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.rounding import dequantize, quantize_weight, scale_dtype_for
from hawqkit.records import Layer


class Switch:
    """Turns a model between its original weights and a mix; either way costs no copy."""

    def __init__(self, pairs: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
        self._pairs = pairs

    def original(self) -> None:
        """Put the original weights back: the very storage that was there."""
        for parameter, before, _ in self._pairs:
            parameter.data = before

    def quantized(self) -> None:
        """Put the mix's weights in."""
        for parameter, _, after in self._pairs:
            parameter.data = after


@contextmanager
def applied(model: LoadedModel, mix: Mapping[str, str], *, rounding: str) -> Iterator[Switch]:
    """Give the model the weights of a mix, inside the `with` block.

    Tied weights stay tied, since the parameter itself stays. The original storage comes back at the
    end, also when something raises.

    Args:
        model: the original.
        mix: layer name -> format name; layers that are not named keep their weights.
        rounding: `nearest` or `searched`.

    Raises:
        InputError: a layer or format name is unknown.
        Unsupported: a format does not fit its layer.
    """
    switch = Switch(_pairs(model, mix, rounding))
    try:
        switch.quantized()
        yield switch
    finally:
        switch.original()


def apply_mix(model: LoadedModel, mix: Mapping[str, str], *, rounding: str) -> None:
    """Give the model the weights of a mix for good; see `applied`."""
    Switch(_pairs(model, mix, rounding)).quantized()


def _pairs(
    model: LoadedModel, mix: Mapping[str, str], rounding: str
) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    layers = {layer.name: layer for layer in model.layers}
    unknown = [name for name in mix if name not in layers]
    if unknown:
        raise InputError(
            f"the model has no layer {unknown[0]!r} ({len(unknown)} of {len(mix)} names are unknown); "
            "this allocation is of another model." + did_you_mean(unknown[0], list(layers))
        )
    pairs = []
    for name, format_name in mix.items():
        if parse_format(format_name).quantizes:
            after = quantized_values(model, layers[name], format_name, rounding)
            parameter = model.parameter(name)
            pairs.append((parameter, parameter.data, after))
    return pairs


@torch.no_grad()
def quantized_values(
    model: LoadedModel, layer: Layer, format_name: str, rounding: str
) -> Tensor:
    """Return a layer's dequantized weight in the orientation and dtype of its parameter."""
    weight = model.weight(layer.name)
    format_ = parse_format(format_name)
    quantized = quantize_weight(
        weight, format_, rounding=rounding, scale_dtype=scale_dtype_for(layer.dtype)
    )
    values = dequantize(quantized, format_, torch.promote_types(weight.dtype, torch.float32))
    values = values.to(weight.dtype)
    return values.t().contiguous() if layer.kind == "conv1d" else values
