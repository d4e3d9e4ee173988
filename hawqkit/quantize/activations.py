"""Calibration of activations: one pass over data finds the range of every layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hawqkit import distributed
from hawqkit.errors import InputError, NumericalError, StateMismatch, did_you_mean
from hawqkit.formats import ACTIVATION_BITS
from hawqkit.models.batch import Batch, Data, run_model
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.input_rounding import first_input, input_modules, real_entries
from hawqkit.quantize.observers import Seen, find_range
from hawqkit.records import DataFacts, Layer
from hawqkit.records.activations import MODES, OBSERVERS, STATIC, ActivationRanges, LayerRange
from hawqkit.store import fingerprint, to_plain

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

OBSERVER, PERCENTILE = "mse", 99.9  # docs/activations.md compares the observers
# Of a forward pass: enough for full speed on a CPU, see `sensitivity.probing`.
_TOKENS, _EXAMPLES = 1024, 64
_NAMED = 3  # layers that a warning names


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """How the inputs of layers are quantized.

    Attributes:
        observer: how a static range is found: `min-max`, `percentile`, `mse` or `entropy`, see
            `quantize.observers`.
        mode: `static`, a range for all inputs of a layer, or `dynamic`, one for each token or
            pixel, made of its features when it comes; observer and percentile mean nothing then.
        percentile: of the observer `percentile`, in percent of the entries.
        symmetric: ranges as wide below 0 as above; inputs that are never negative keep an unsigned
            grid.
        batch: examples of a forward pass, None for as many as run at full speed.
    """

    observer: str = OBSERVER
    mode: str = STATIC
    percentile: float = PERCENTILE
    symmetric: bool = False
    batch: int | None = None

    def __post_init__(self) -> None:
        """Refuse what there is not; all problems at once."""
        problems = []
        for what, given, known in (
            ("observer", self.observer, OBSERVERS),
            ("mode", self.mode, MODES),
        ):
            if given not in known:
                problems.append(
                    f"activations: unknown {what} {given!r}: known are {', '.join(known)}."
                    + did_you_mean(given, known)
                )
        if not 50 < self.percentile <= 100:
            problems.append(
                f"activations: percentile {self.percentile:g}: must be above 50 and at most 100; "
                "99.9 leaves one entry in a thousand beyond each end."
            )
        if self.batch is not None and self.batch < 1:
            problems.append(f"activations: batch {self.batch}: must be at least 1.")
        if problems:
            raise InputError("\n".join(problems))

    def made(self, ranges: ActivationRanges) -> bool:
        """Whether ranges were made with these settings."""
        other = (ranges.observer, ranges.mode, ranges.percentile, ranges.symmetric)
        return other == (self.observer, self.mode, self.percentile_used, self.symmetric)

    @property
    def percentile_used(self) -> float | None:
        """The percentile where the observer takes one."""
        return self.percentile if self.observer == "percentile" else None


def calibrate_activations(
    model: LoadedModel,
    data: Data,
    layers: Sequence[Layer],
    bits: Sequence[int],
    *,
    observer: str = OBSERVER,
    mode: str = STATIC,
    percentile: float = PERCENTILE,
    symmetric: bool = False,
    batch: int | None = None,
    examples: int | None = None,
    track: Track | None = None,
) -> ActivationRanges:
    """Find the range of every layer's inputs: one forward pass over the data that choose.

    A layer that is called several times, or a weight that several modules use, has one range over
    all calls. Padded positions are not seen, and examples that only predict (`withheld`) are not
    run. With several processes each runs its share; all return the same.

    Args:
        model: the original model.
        data: calibration data.
        layers: to calibrate; those that only look up are passed over.
        bits: widths that ranges are made for; `mse` and `entropy` depend on them.
        observer: `min-max`, `percentile`, `mse` or `entropy`.
        mode: `static` or `dynamic`; nothing is observed for the latter.
        percentile: of the observer `percentile`.
        symmetric: ranges as wide below 0 as above.
        batch: examples of a forward pass, None for as many as run at full speed.
        examples: the first so many of those that choose, None for all of them.
        track: wraps the batches to show progress, `(items, stage, total) -> items`.

    Raises:
        InputError: a width, an observer or a mode that there is not.
        NumericalError: an input is NaN or infinite; names the layer.
    """
    settings = ActivationSettings(observer, mode, percentile, symmetric, batch)
    odd = sorted(set(bits) - set(ACTIVATION_BITS))
    if odd or not bits:
        raise InputError(
            f"activations: bits {', '.join(map(str, odd)) or 'are missing'}: known are "
            f"{', '.join(map(str, ACTIVATION_BITS))}."
        )
    found = ActivationRanges(
        model=model.facts.hash,
        data=data.facts.hash,
        observer=settings.observer,
        mode=settings.mode,
        percentile=settings.percentile_used,
        symmetric=settings.symmetric,
        bits=tuple(sorted(set(bits), reverse=True)),
        examples=0,
        layers={},
    )
    if settings.mode == STATIC:
        rows = torch.nonzero(~data.withheld)[:, 0].tolist()[:examples]
        seen = _observe(model, data, layers, settings, rows, track)
        ranges = {n: _layer_range(s, settings, found.bits) for n, s in seen.items()}
        found = replace(found, layers=ranges, examples=len(rows), warnings=_warnings(seen))
    return replace(found, fingerprint=fingerprint(to_plain(found)))


def _observe(
    model: LoadedModel,
    data: Data,
    layers: Sequence[Layer],
    settings: ActivationSettings,
    rows: Sequence[int],
    track: Track | None,
) -> dict[str, Seen]:
    size = calibration_batch(settings.batch, data.facts)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    mine = list(distributed.processes().mine(parts))
    seen = {layer.name: Seen() for layer in layers if input_modules(model.module, layer)}
    counted = settings.observer != "min-max"
    with _watched(model.module, layers, seen, counted) as watch, torch.no_grad():
        for part in track(mine, "activations", len(mine)) if track else mine:
            watch.batch = data.micro_batch(part)
            run_model(model.module, watch.batch, model.device)
    everyone: list[dict[str, Seen]] = distributed.gather(seen)
    merged = everyone[0]
    for other in everyone[1:]:
        for name, more in other.items():
            merged[name].merge(more)
    return merged


def calibration_batch(asked: int | None, data: DataFacts) -> int:
    """Return examples of a forward pass: as asked, or as many as run at full speed."""
    return asked or max(1, min(_EXAMPLES, _TOKENS // max(data.length, 1)))


@dataclass(slots=True)
class _Watch:
    batch: Batch | None = None


@contextmanager
def _watched(
    module: nn.Module, layers: Sequence[Layer], seen: dict[str, Seen], counted: bool
) -> Iterator[_Watch]:
    watch = _Watch()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert watch.batch is not None
            values = first_input(name, inputs)
            try:
                seen[name].add(real_entries(values, watch.batch.attention), counted=counted)
            except NumericalError as error:
                raise NumericalError(
                    f"layer {name}: of its inputs {error}; no range can be found. Check the "
                    "checkpoint and the data, or load the model in a wider dtype."
                ) from error

        return look

    handles = [
        child.register_forward_pre_hook(hook(layer.name))
        for layer in layers
        for child in input_modules(module, layer)
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _layer_range(seen: Seen, settings: ActivationSettings, bits: Sequence[int]) -> LayerRange:
    ranges = {
        b: find_range(
            seen,
            settings.observer,
            b,
            symmetric=settings.symmetric,
            percentile=settings.percentile_used,
        )
        for b in bits
    }
    low, high = (seen.low, seen.high) if seen.count else (0.0, 0.0)
    return LayerRange(low, high, seen.count, ranges)


def _warnings(seen: dict[str, Seen]) -> tuple[str, ...]:
    never = [name for name, s in seen.items() if not s.count]
    silent = [name for name, s in seen.items() if s.count and s.low == s.high == 0]
    return tuple(
        f"activations: {len(names)} layers {what}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        + "; exclude them if other data use them."
        for names, what in (
            (never, "were never called, so that their ranges are empty"),
            (silent, "were given nothing but 0"),
        )
        if names
    )


def refuse_other_model(ranges: ActivationRanges, model: LoadedModel) -> None:
    """Refuse ranges that were observed in another model.

    Raises:
        StateMismatch: the hashes differ.
    """
    if ranges.model != model.facts.hash:
        raise StateMismatch(
            f"the activation ranges were observed in a model of hash {ranges.model[:12]}, and this "
            f"one has {model.facts.hash[:12]}; calibrate this model's activations."
        )
