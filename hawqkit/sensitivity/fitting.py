"""Which layers a list of formats fits, and the ranges of inputs that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.formats import (
    INTEGER,
    Format,
    activation_bits_of,
    fitting_formats,
    parse_format,
    same_formats,
)
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.activations import ActivationSettings, calibrate_activations
from hawqkit.records import ActivationRanges, Layer, Skipped

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

MISFITS = ("refuse", "skip", "partial")
MISFIT_LINES = 6  # widths that a message names: most models have two or three


def parse_formats(formats: Sequence[str]) -> list[Format]:
    """Return the formats in their order.

    Raises:
        InputError: there is none, an unknown one, or one comes twice.
    """
    if not formats:
        raise InputError("no formats came; name at least one, for instance int4-g64.")
    twice = sorted({f for f in formats if list(formats).count(f) > 1})
    if twice:
        raise InputError(f"formats named more than once: {', '.join(twice)}; name each once.")
    for pair in same_formats(formats):
        raise InputError(f"{' and '.join(pair)} are one format; name it once.")
    return [parse_format(f) for f in formats]


def fitting_layers(
    model: LoadedModel, formats: Sequence[str], misfits: str
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Return the layers to measure, and those skipped.

    Layers that all formats fit are always among them. Where some do not fit, `refuse` raises,
    `skip` leaves the layer out, and `partial` keeps it with those that fit, if there are any.

    Raises:
        Unsupported: a group size does not divide a layer's columns and `misfits` is `refuse`, or
            no layer is left.
        InputError: `misfits` is none of the three.
    """
    if misfits not in MISFITS:
        allowed = f"misfits {misfits!r}: allowed are {', '.join(MISFITS)}."
        raise InputError(allowed + did_you_mean(misfits, MISFITS))
    parsed = parse_formats(formats)
    kept, skipped = [], list(model.skipped)
    found: dict[int, list[str]] = {}  # columns -> names of the layers that have so many
    for layer in model.layers:
        bad = [f.name for f in parsed if not f.fits(layer.columns)]
        fitting = any(f.quantizes and f.name not in bad for f in parsed)
        if not bad or (misfits == "partial" and fitting):
            kept.append(layer)
            continue
        reason = f"{layer.columns} columns do not divide into groups of {', '.join(bad)}"
        skipped.append(Skipped(layer.name, layer.kind, (layer.rows, layer.columns), reason))
        found.setdefault(layer.columns, []).append(layer.name)
    if found and misfits == "refuse":
        raise Unsupported(
            f"{sum(map(len, found.values()))} layers do not take all formats:\n"
            + "\n".join(_misfit_lines(found, parsed))
            + "\nUse formats that fit, exclude these layers, or set layers.misfits to skip (leave "
            "them out) or partial (each takes those that fit)."
        )
    if not kept:
        raise Unsupported(
            "no layer is left that takes all formats:\n" + "\n".join(_misfit_lines(found, parsed))
        )
    return tuple(kept), tuple(skipped)


def _misfit_lines(found: Mapping[int, Sequence[str]], formats: Sequence[Format]) -> list[str]:
    """Return a line for each number of columns: which layers have it, and what fits them."""
    lines = []
    for columns, names in list(found.items())[:MISFIT_LINES]:
        bad = [f.name for f in formats if not f.fits(columns)]
        families = dict.fromkeys((*(f.family for f in formats), INTEGER))
        fit = dict.fromkeys(
            f
            for family in families
            for f in fitting_formats(columns, family)
            if not f.endswith("-asym")
        )
        more = f" (and {len(names) - 2} more layers)" if len(names) > 2 else ""
        lines.append(
            f"  - {', '.join(names[:2])}{more}: {columns} columns do not divide into groups of "
            f"{', '.join(bad)}; formats that fit: {', '.join(fit)}."
        )
    rest = list(found.items())[MISFIT_LINES:]
    if rest:
        lines.append(f"  (and layers of {', '.join(str(columns) for columns, _ in rest)} columns)")
    return lines


def ranges_for(
    model: LoadedModel,
    data: Data,
    formats: Sequence[str],
    misfits: str,
    given: ActivationRanges | ActivationSettings | None = None,
    track: Track | None = None,
) -> ActivationRanges | None:
    """Return the ranges of the inputs of all layers that formats fit: given, or found on data.

    Returns None where no format rounds inputs.

    Raises:
        InputError: ranges or settings came, and no format rounds inputs.
    """
    layers, bits = fitting_layers(model, formats, misfits)[0], activation_bits_of(formats)
    if not bits and given is not None:
        raise InputError(
            f"activations came, and none of the formats {', '.join(formats)} rounds the inputs of "
            "layers; use formats like w4a8 or int4-g64-a8, or leave activations out."
        )
    if not bits or isinstance(given, ActivationRanges):
        return given if isinstance(given, ActivationRanges) else None
    options = asdict(given or ActivationSettings())
    return calibrate_activations(model, data, layers, bits, track=track, **options)
