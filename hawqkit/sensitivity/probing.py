"""Probe a model: errors of all layers, then micro-batch by micro-batch, resumable and in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawqkit import distributed
from hawqkit.costs import available_bytes
from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import NONE, Format, fitting_formats, parse_format
from hawqkit.journal import Journal
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.errors_of import LayerErrors, make_errors
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import SCHEMA, Floats, Layer, Samples, Sensitivities, Skipped
from hawqkit.sensitivity.dual_probe import DualProbe
from hawqkit.sensitivity.summary import summarize
from hawqkit.store import Arrays, fingerprint

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

# A matrix product of about a thousand tokens already runs at full speed on a CPU; more only costs
# memory. An accelerator wants more.
CPU_TOKENS, DEVICE_TOKENS = 1024, 8192
MOST_SEQUENCES = 16
CODES_SHARE = 0.25  # of the free memory, that int8 codes may take


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How to probe; every field is honored or refused.

    Attributes:
        rounding: `nearest` or `searched`.
        batch: sequences of a micro-batch, or `auto`. It decides which pairs of sequences there are,
            and so belongs to the fingerprint.
        cache: `codes` keeps int8 codes of all errors, `none` makes them again in each pass, `auto`
            decides by the memory that is free. The numbers are the same.
        checkpointing: recompute blocks in the backward pass.
        positions: sampled positions a sequence for the token scores; 0 leaves them out.
        seed: of sampled labels and positions.
        misfits: `refuse` or `skip` layers whose columns a group size does not divide.
    """

    rounding: str = "searched"
    batch: int | str = "auto"
    cache: str = "auto"
    checkpointing: bool = False
    positions: int = 16
    seed: int = 0
    misfits: str = "refuse"


def untracked(items: Iterable[Any], stage: str, total: int) -> Iterable[Any]:
    """Show no progress."""
    return items


def probe(
    model: LoadedModel,
    batches: Sequences,
    formats: Sequence[str],
    *,
    settings: ProbeSettings | None = None,
    folder: str | Path | None = None,
    track: Track = untracked,
) -> Sensitivities:
    """Measure how much every layer suffers in every format: one forward and backward pass a batch.

    With several processes each one measures its share of the micro-batches; all return the same.

    Args:
        model: from `load_model` or `wrap_model`.
        batches: from `load_batches`; sequences flagged `withheld` enter predictions alone.
        formats: names, for instance `["int3-g64", "int4-g64"]`.
        settings: see `ProbeSettings`.
        folder: of the journal, so that a killed probe goes on where it stopped; None keeps none.
        track: wraps the micro-batches to show progress, `(items, stage, total) -> items`.

    Returns:
        the table of every score, with `samples` attached.

    Raises:
        InputError: no formats, an unknown one, or one named twice.
        Unsupported: a format does not fit a layer (and misfits are refused).
        NumericalError: weights or gradients are not finite.
        StateMismatch: the journal belongs to another model, data, format list or seed.
    """
    settings = settings or ProbeSettings()
    layers, skipped = fitting_layers(model, formats, settings.misfits)
    size = micro_batch_size(settings.batch, batches.facts.length, model.device.type)
    facts = probe_facts(model, batches, layers, formats, settings)
    journal = open_journal(folder, facts)
    errors = layer_errors(model, layers, formats, settings, track)
    weights = {layer.name: model.weight(layer.name) for layer in layers}
    tasks = list(enumerate(batches.micro_batches(size)))
    mine = list(distributed.processes().mine(tasks))
    results: dict[int, Arrays] = {}
    with DualProbe(
        model.module,
        layers,
        weights,
        errors,
        formats=formats,
        positions=settings.positions,
        seed=settings.seed,
        checkpointing=settings.checkpointing,
    ) as dual:
        for number, batch in track(mine, "probe", len(mine)):
            found = journal.read(number) if journal else None
            if found is None:
                found = dual.measure(batch)
                if journal:
                    journal.write(number, found)
            results[number] = found
    everyone: dict[int, Arrays] = {}
    for part in distributed.gather(results):
        everyone |= part
    return summarize(
        join_samples([everyone[n] for n in sorted(everyone)], batches),
        weight_errors(layers, formats, errors),
        model=model.facts,
        data=batches.facts,
        layers=layers,
        skipped=skipped,
        formats=formats,
        rounding=settings.rounding,
        fingerprint=fingerprint(facts),
    )


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
    return [parse_format(f) for f in formats]


def fitting_layers(
    model: LoadedModel, formats: Sequence[str], misfits: str
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Return the layers that all formats fit, and those skipped.

    Raises:
        Unsupported: a group size does not divide a layer's columns and `misfits` is `refuse`, or
            no layer is left.
        InputError: `misfits` is neither.
    """
    if misfits not in ("refuse", "skip"):
        raise InputError(f"misfits {misfits!r}: allowed are refuse, skip.")
    parsed = parse_formats(formats)
    kept, problems, skipped = [], [], list(model.skipped)
    for layer in model.layers:
        bad = [f.name for f in parsed if not f.fits(layer.columns)]
        if not bad:
            kept.append(layer)
            continue
        fit = [f for f in fitting_formats(layer.columns) if not f.endswith("-asym")]
        reason = f"{layer.columns} columns do not divide into groups of {', '.join(bad)}"
        skipped.append(Skipped(layer.name, layer.kind, (layer.rows, layer.columns), reason))
        problems.append(f"layer {layer.name}: {reason}; formats that fit: {', '.join(fit)}.")
    if problems and misfits == "refuse":
        shown = "\n  - ".join(problems[:6])
        more = f"\n  (and {len(problems) - 6} more layers)" if len(problems) > 6 else ""
        raise Unsupported(
            f"{len(problems)} layers do not take all formats:\n  - {shown}{more}\n"
            "Use formats that fit, exclude these layers, or set layers.misfits to skip."
        )
    if not kept:
        raise Unsupported("no layer is left that takes all formats; " + problems[0])
    return tuple(kept), tuple(skipped)


def micro_batch_size(asked: int | str, length: int, device_type: str) -> int:
    """Return sequences of a micro-batch; `auto` depends on length and device alone.

    So it is the same for every process and for a resumed run. At least two, since the participation
    ratio needs pairs.
    """
    if asked != "auto":
        if not isinstance(asked, int) or asked < 1:
            raise InputError(f"batch {asked!r}: must be auto or a whole number of at least 1.")
        return asked
    tokens = CPU_TOKENS if device_type == "cpu" else DEVICE_TOKENS
    return max(2, min(MOST_SEQUENCES, tokens // max(length, 1)))


def probe_facts(
    model: LoadedModel,
    batches: Sequences,
    layers: Sequence[Layer],
    formats: Sequence[str],
    settings: ProbeSettings,
) -> dict[str, Any]:
    """Return everything that the samples depend on; its hash is the run's fingerprint."""
    return {
        "schema": SCHEMA,
        "model": model.facts.hash,
        "data": batches.facts.hash,
        "layers": [layer.name for layer in layers],
        "formats": list(formats),
        "rounding": settings.rounding,
        "positions": settings.positions,
        "seed": settings.seed,
        "batch": micro_batch_size(settings.batch, batches.facts.length, model.device.type),
        "dtype": str(next(model.module.parameters()).dtype).removeprefix("torch."),
        "device": model.device.type,
    }


def open_journal(folder: str | Path | None, facts: dict[str, Any]) -> Journal | None:
    """Open the journal: the main process writes its facts before the others look."""
    if folder is None:
        return None
    if not distributed.processes().is_main:
        distributed.wait()
    journal = Journal(folder, facts)
    if distributed.processes().is_main:
        distributed.wait()
    return journal


def layer_errors(
    model: LoadedModel,
    layers: Sequence[Layer],
    formats: Sequence[str],
    settings: ProbeSettings,
    track: Track = untracked,
) -> dict[str, LayerErrors]:
    """Round every layer to every format, and keep what is needed to make the errors again."""
    parsed = [f for f in parse_formats(formats) if f.quantizes]
    keep = choose_cache(settings.cache, layers, len(parsed), str(model.device))
    errors = {}
    for layer in track(layers, "round", len(layers)):
        try:
            errors[layer.name] = make_errors(
                model.weight(layer.name),
                parsed,
                rounding=settings.rounding,
                scale_dtype=scale_dtype_for(layer.dtype),
                keep=keep,
            )
        except NumericalError as error:
            raise NumericalError(f"layer {layer.name}: {error}") from error
    return errors


def choose_cache(asked: str, layers: Sequence[Layer], formats: int, device: str) -> str:
    """Return `codes` or `none`; `auto` keeps codes while they take a quarter of the free memory."""
    if asked != "auto":
        return asked
    needed = sum(layer.numel for layer in layers) * formats
    return "codes" if needed <= CODES_SHARE * available_bytes(device) else "none"


def weight_errors(
    layers: Sequence[Layer], formats: Sequence[str], errors: dict[str, LayerErrors]
) -> Floats:
    """Return |dW|^2 (L, F); zero for `none`, NaN where a format does not fit."""
    table = np.full((len(layers), len(formats)), np.nan)
    if NONE.name in formats:
        table[:, list(formats).index(NONE.name)] = 0.0
    for row, layer in enumerate(layers):
        made = errors[layer.name]
        columns = [list(formats).index(f.name) for f in made.formats]
        table[row, columns] = made.squared_norms.numpy()
    return table


def join_samples(parts: Sequence[Arrays], batches: Sequences) -> Samples:
    """Put micro-batches together, in the order of sequences."""
    offsets = np.cumsum([0, *(len(p["index"]) for p in parts)])
    pairs = [p["pairs"] + start for p, start in zip(parts, offsets, strict=False)]
    joined = {
        n: np.concatenate([p[n] for p in parts]) for n in parts[0] if n not in ("pairs", "labels")
    }
    samples = Samples(
        **joined,
        pairs=np.concatenate(pairs),
        document=batches.document.numpy().astype(np.int64),
        withheld=batches.withheld.numpy().astype(np.int64),
    )
    if not np.array_equal(samples.index, np.arange(len(batches))):
        raise NumericalError(
            "micro-batches are missing or came twice; remove the journal and retry."
        )
    return samples
