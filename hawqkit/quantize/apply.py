"""Put a mix of formats into a model and take it out again, bit for bit.

A mix maps layer names to format names; a layer that it does not name keeps its values. What the
model then computes with is what a checkpoint of that mix decodes to, in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, NumericalError, did_you_mean
from hawqkit.formats import Format, fitting_formats, parse_format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.rounding import round_into, scale_dtype_for, scales_of


class Switch:
    """Two sets of values for some weights of a model, and a cheap way to go from one to the other.

    The rounded values are made once, when the switch is made; `quantized` and `original` then only
    exchange the storage behind the parameters. The original storage is never written to, so it
    comes back bit for bit. Parameters stay the same objects, so tied weights stay tied. Memory: one
    more copy of the layers that the mix quantizes.
    """

    def __init__(
        self, model: LoadedModel, mix: Mapping[str, str], *, rounding: str = "searched"
    ) -> None:
        """Round every layer of the mix; the model is not changed yet.

        Args:
            model: the model.
            mix: layer name -> format name.
            rounding: `nearest` or `searched`.

        Raises:
            InputError: a layer or format is unknown, or does not fit; all problems are listed.
            NumericalError: a weight holds NaN or infinity.
        """
        formats = check_mix(model, mix)
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
        """Let the model compute with the rounded weights."""
        for parameter, _, values in self._pairs:
            parameter.data = values

    def original(self) -> None:
        """Let the model compute with its own weights again: the very storage that it had."""
        for parameter, storage, _ in self._pairs:
            parameter.data = storage


@contextmanager
def applied(
    model: LoadedModel, mix: Mapping[str, str], *, rounding: str = "searched"
) -> Iterator[Switch]:
    """Quantize a model inside a `with` block, and restore it bit for bit, also after an exception.

        with applied(model, {"model.layers.0.mlp.up_proj": "int4-g64"}) as switch:
            ...                  # the mix
            switch.original()    # the model as it was
            switch.quantized()   # the mix again

    Raises:
        InputError, NumericalError: as `Switch`; the model has not been touched then.
    """
    switch = Switch(model, mix, rounding=rounding)
    try:
        switch.quantized()
        yield switch
    finally:
        switch.original()


def apply_(model: LoadedModel, mix: Mapping[str, str], *, rounding: str = "searched") -> None:
    """Quantize a model for good: the original values of the layers in the mix are gone.

    Raises:
        InputError, NumericalError: as `Switch`; the model has not been touched then.
    """
    Switch(model, mix, rounding=rounding).quantized()


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
                f"that fit: {', '.join(fitting_formats(columns[name]))}."
            )
    if problems:
        raise InputError("\n".join(["the mix does not fit the model:", *problems]))
    return formats


@torch.no_grad()
def _rounded(
    model: LoadedModel, name: str, format: Format, rounding: str, scale_dtype: torch.dtype
) -> Tensor:
    """Return the dequantized weight (rows, columns), float64 for a float64 weight, else float32."""
    weight = model.weight(name)
    try:
        scales, zeros = scales_of(weight, format, rounding=rounding, scale_dtype=scale_dtype)
    except NumericalError as error:
        raise NumericalError(f"layer {name!r}: {error}") from error
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    values = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    round_into(values, weight, scales, zeros, format)
    return values
