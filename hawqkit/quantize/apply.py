"""Put a mix of formats into a model and take it out again, bit for bit.

A mix maps layer names to format names; a layer that it does not name keeps its values. What the
model then computes with is what a checkpoint of that mix decodes to, in the dtype of the model.
Formats with bits of activations also round what a layer is given, by a hook on its module; an
embedding is given indices, so there is nothing to round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hawqkit.errors import InputError, NumericalError, did_you_mean
from hawqkit.formats import INTEGER, Format, fitting_formats, parse_format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.activations import refuse_other_model
from hawqkit.quantize.input_rounding import (
    InputQuantizer,
    first_input,
    input_modules,
    input_quantizer,
)
from hawqkit.quantize.of_layer import layer_scales
from hawqkit.quantize.rounding import round_into, scale_dtype_for
from hawqkit.quantize.stored import rounded_values
from hawqkit.records import ActivationRanges

_MOST_PROBLEMS = 8


class Switch:
    """Two sets of values for some weights of a model, and a cheap way to go from one to the other.

    The rounded values are made once, when the switch is made; `quantized` and `original` then only
    exchange the storage behind the parameters. The original storage is never written to, so it
    comes back bit for bit. Parameters stay the same objects, so tied weights stay tied. Memory: one
    more copy of the layers that the mix quantizes. Inputs are rounded by hooks that are there only
    while the model is quantized.
    """

    def __init__(
        self,
        model: LoadedModel,
        mix: Mapping[str, str],
        *,
        rounding: str = "searched",
        activations: ActivationRanges | None = None,
    ) -> None:
        """Round every layer of the mix; the model is not changed yet.

        Args:
            model: the model.
            mix: layer name -> format name.
            rounding: `nearest` or `searched`.
            activations: ranges of the layers' inputs; needed where a format has bits for them.

        Raises:
            InputError: a layer or format is unknown, or does not fit, or a range is missing; all
                problems are listed.
            StateMismatch: the ranges are of another model.
            NumericalError: a weight holds NaN or infinity.
        """
        formats = check_mix(model, mix)
        self._inputs = _input_hooks(model, formats, activations)
        self._handles: list[RemovableHandle] = []
        self._pairs: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for layer in model.layers:
            format = formats.get(layer.name)
            if format is None or not format.quantizes:
                continue
            values = _rounded(model, layer.name, format, rounding, scale_dtype_for(layer.dtype))
            parameter = model.parameter(layer.name)
            values = model.from_rows(layer.name, values).to(parameter.dtype)
            self._pairs.append((parameter, parameter.data, values))

    def quantized(self) -> None:
        """Let the model compute with the rounded weights, and with rounded inputs."""
        for parameter, _, values in self._pairs:
            parameter.data = values
        if not self._handles:
            self._handles = [m.register_forward_pre_hook(hook) for m, hook in self._inputs]

    def original(self) -> None:
        """Let the model compute with its own weights again: the very storage that it had."""
        for parameter, storage, _ in self._pairs:
            parameter.data = storage
        for handle in self._handles:
            handle.remove()
        self._handles = []


@contextmanager
def applied(
    model: LoadedModel,
    mix: Mapping[str, str],
    *,
    rounding: str = "searched",
    activations: ActivationRanges | None = None,
) -> Iterator[Switch]:
    """Quantize a model inside a `with` block, and restore it bit for bit, also after an exception.

        with applied(model, {"model.layers.0.mlp.up_proj": "int4-g64"}) as switch:
            ...                  # the mix
            switch.original()    # the model as it was
            switch.quantized()   # the mix again

    Raises:
        InputError, StateMismatch, NumericalError: as `Switch`; the model is not touched then.
    """
    switch = Switch(model, mix, rounding=rounding, activations=activations)
    try:
        switch.quantized()
        yield switch
    finally:
        switch.original()


def apply_(
    model: LoadedModel,
    mix: Mapping[str, str],
    *,
    rounding: str = "searched",
    activations: ActivationRanges | None = None,
) -> None:
    """Quantize a model for good: the original values of the layers in the mix are gone.

    Hooks that round inputs stay in the modules.

    Raises:
        InputError, StateMismatch, NumericalError: as `Switch`; the model is not touched then.
    """
    Switch(model, mix, rounding=rounding, activations=activations).quantized()


def check_mix(model: LoadedModel, mix: Mapping[str, str]) -> dict[str, Format]:
    """Return the formats of a mix by layer.

    Raises:
        InputError: a layer or format is unknown, or does not fit; all problems are listed.
    """
    columns = {layer.name: layer.columns for layer in model.layers}
    formats: dict[str, Format] = {}
    problems: list[str] = []
    for name, text in mix.items():
        if name not in columns:
            problems.append(
                f"layer {name!r} is not among the {len(columns)} chosen layers of the model."
                + did_you_mean(name, list(columns))
            )
            continue
        try:
            formats[name] = parse_format(text)
        except InputError as error:
            problems.append(f"layer {name!r}: {error}")
            continue
        if not formats[name].fits(columns[name]):
            problems.append(
                f"layer {name!r}: {text!r} does not divide its {columns[name]} columns; formats "
                f"that fit: {', '.join(fitting_formats(columns[name], formats[name].family))}."
            )
    if problems:
        raise InputError("\n".join(["the mix does not fit the model:", *problems]))
    return formats


class _RoundsInput:
    """A hook that rounds what its module is given, before the module computes."""

    def __init__(self, layer: str, quantizer: InputQuantizer) -> None:
        self._layer, self._quantizer = layer, quantizer

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the first one rounded."""
        return self._quantizer(first_input(self._layer, inputs)), *inputs[1:]


def _input_hooks(
    model: LoadedModel, formats: Mapping[str, Format], ranges: ActivationRanges | None
) -> list[tuple[nn.Module, _RoundsInput]]:
    """Return the hooks of all layers whose format rounds their inputs."""
    found: list[tuple[nn.Module, _RoundsInput]] = []
    problems: list[str] = []
    for layer in model.layers:
        format = formats.get(layer.name)
        if format is None or format.activation_bits is None:
            continue
        try:
            for module in input_modules(model.module, layer):
                if ranges is None:
                    raise InputError(
                        f"layer {layer.name!r}: {format.name!r} rounds its inputs, and no ranges "
                        "came; pass activations=, from calibrate_activations."
                    )
                made = input_quantizer(ranges, layer.name, module, format.activation_bits)
                found.append((module, _RoundsInput(layer.name, made)))
        except InputError as error:
            problems.append(str(error))
    if problems:
        shown = problems[:_MOST_PROBLEMS]
        more = len(problems) - len(shown)
        shown += [f"(and {more} more layers)"] if more else []
        raise InputError("\n".join(["the inputs of the mix cannot be rounded:", *shown]))
    if found and ranges is not None:
        refuse_other_model(ranges, model)
    return found


@torch.no_grad()
def _rounded(
    model: LoadedModel, name: str, format: Format, rounding: str, scale_dtype: torch.dtype
) -> Tensor:
    """Return the dequantized weight (rows, columns), float64 for a float64 weight, else float32."""
    weight = model.weight(name)
    try:
        if format.family != INTEGER:
            return rounded_values(weight, format, rounding=rounding, scale_dtype=scale_dtype)
        scales, zeros = layer_scales(
            model, name, format, rounding=rounding, scale_dtype=scale_dtype
        )
    except NumericalError as error:
        raise NumericalError(f"layer {name!r}: {error}") from error
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    round_into(values, weight, scales, zeros, format)
    return values
