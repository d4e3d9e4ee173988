"""Probe a model: errors of all layers, then micro-batches, resumable and in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hawqkit import distributed
from hawqkit.costs import available_bytes
from hawqkit.curvature.objective import Objective
from hawqkit.errors import InputError, NumericalError
from hawqkit.formats import NONE
from hawqkit.journal import Journal
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.activations import ActivationSettings, refuse_other_model
from hawqkit.quantize.errors_of import LayerErrors, make_errors
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import (
    CROSS_ENTROPY,
    SCHEMA,
    ActivationRanges,
    DataFacts,
    Floats,
    Layer,
    Samples,
    Sensitivities,
)
from hawqkit.sensitivity.columns import plan_columns, weight_formats
from hawqkit.sensitivity.curvature_probe import CurvatureProbe, CurvatureSettings
from hawqkit.sensitivity.curvature_scores import with_curvature
from hawqkit.sensitivity.dual_probe import PAIRED, DualProbe
from hawqkit.sensitivity.fitting import fitting_layers, ranges_for
from hawqkit.sensitivity.objective_signs import refuse_flat, refuse_objective
from hawqkit.sensitivity.summary import summarize
from hawqkit.store import Arrays, fingerprint

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

# A matrix product of about a thousand tokens already runs at full speed on a CPU; more only costs
# memory. An accelerator wants more.
CPU_TOKENS, DEVICE_TOKENS = 1024, 8192
MOST_SEQUENCES = 16
MOST_EXAMPLES = 64  # of a classifier, whose layers' errors are made again for each batch
PAIRED_EXAMPLES = 4  # of them, whose gradients are multiplied with each other
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
        misfits: `refuse` or `skip` layers whose columns some formats do not divide, or measure
            them in those that fit, `partial`.
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
    batches: Data,
    formats: Sequence[str],
    *,
    settings: ProbeSettings | None = None,
    also: Sequence[str] = (),
    curvature: CurvatureSettings | None = None,
    activations: ActivationRanges | ActivationSettings | None = None,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    track: Track = untracked,
) -> Sensitivities:
    """Measure how much every layer suffers in every format: one forward and backward pass a batch.

    With several processes each one measures its share of the micro-batches; all return the same.

    Scores predict the KL divergence in nats. With an `objective` they predict what the mean of its
    loss grows by, to second order in the change of the outputs, `1/2 dz' L_zz dz` for each
    prediction: the part that is left where the gradient of the loss averages out, as it does in a
    trained network. Random signs go back through a root of L_zz, which is the objective's `root`,
    or is made of its `curvature` or of its `loss` differentiated twice (see
    `curvature.output_roots`), so L_zz must be positive semi-definite.

    Args:
        model: from `load_model` or `wrap_model`.
        batches: from `load_batches` or `make_examples`; what is flagged `withheld` enters
            predictions alone.
        formats: names, for instance `["int3-g64", "int4-g64"]`.
        settings: see `ProbeSettings`.
        also: scores of the true Hessian to measure too, `hessian-trace` and `top-eigenvalue`; they
            need second derivatives and cost many times the probe.
        curvature: what those may cost; see `CurvatureSettings`.
        activations: ranges of the layers' inputs, for formats that round them; or how to find them
            on the same data, first of all, which by default is `mse`.
        objective: the loss, for instance `squared_error()`; None is the softmax cross-entropy of
            the model's own predictions. Examples with `targets` need one.
        folder: of the journal, so that a killed probe goes on where it stopped; None keeps none.
        track: wraps the micro-batches to show progress, `(items, stage, total) -> items`.

    Returns:
        the table of every score, with `samples` attached.

    Raises:
        InputError: no formats, an unknown one, or one named twice; `also` names another score, or
            one beside an objective; the objective is no sum over examples, or is missing.
        Unsupported: a format does not fit a layer (and misfits are refused), or a score of `also`
            needs derivatives that the model does not have; or the objective has no root.
        NumericalError: weights or gradients are not finite.
        StateMismatch: the journal belongs to another model, data, format list or seed, or the
            ranges to another model.
    """
    settings = settings or ProbeSettings()
    refuse_objective(batches, objective, also)
    ranges = ranges_for(model, batches, formats, settings.misfits, activations, track)
    prober = Prober(model, batches, formats, settings, folder, ranges, objective)
    beside = None
    if also:
        home = Path(folder) / "curvature" if folder is not None else None
        beside = CurvatureProbe(model, batches, prober.layers, also, curvature, home)
    prober.prepare(track)
    with prober:
        for number in track(prober.mine, "probe", len(prober.mine)):
            prober.measure(number)
    found = prober.finish()
    if beside is None:
        return found
    for piece in track(beside.pieces, "curvature", len(beside.pieces)):
        beside.measure(piece)
    return with_curvature(found, beside.finish())


class Prober:
    """The steps of `probe`, for callers that time them: prepare, measure each of `mine`, finish.

    Attributes:
        layers: what is measured; all formats fit each of them.
        facts: everything that the results depend on; their hash is `fingerprint`.
        mine: numbers of this process's micro-batches.
        count: number of all micro-batches.
        keep: `codes` or `none`, what the cache holds (known after `prepare`).
        errors: layer name -> errors in every format (filled by `prepare`).
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Data,
        formats: Sequence[str],
        settings: ProbeSettings,
        folder: str | Path | None = None,
        activations: ActivationRanges | None = None,
        objective: Objective | None = None,
    ) -> None:
        refuse_objective(batches, objective)
        if activations is not None:
            refuse_other_model(activations, model)
        self._model, self._batches, self._settings = model, batches, settings
        self._activations, self._objective = activations, objective
        self.formats = tuple(formats)
        self.layers, self.skipped = fitting_layers(model, formats, settings.misfits)
        self.size = micro_batch_size(settings.batch, batches.facts, model.device.type)
        self.facts = self._facts()
        self.fingerprint = fingerprint(self.facts)
        self._journal = _open_journal(folder, self.facts)
        self.count = -(-len(batches) // self.size)
        self.mine = list(distributed.processes().mine(range(self.count)))
        self.keep = settings.cache
        self.errors: dict[str, LayerErrors] = {}
        self._results: dict[int, Arrays] = {}
        self._dual: DualProbe | None = None

    def prepare(self, track: Track = untracked) -> None:
        """Round every layer to every format, and keep what is needed to make the errors again."""
        parsed = weight_formats(self.formats)
        self.keep = choose_cache(
            self._settings.cache, self.layers, len(parsed), str(self._model.device)
        )
        for layer in track(self.layers, "round", len(self.layers)):
            try:
                self.errors[layer.name] = make_errors(
                    self._model.weight(layer.name),
                    [form for form in parsed if form.fits(layer.columns)],
                    rounding=self._settings.rounding,
                    scale_dtype=scale_dtype_for(layer.dtype),
                    keep=self.keep,
                )
            except NumericalError as error:
                raise NumericalError(f"layer {layer.name}: {error}") from error

    def __enter__(self) -> Prober:
        """Put the probe's hooks into the model."""
        self._dual = DualProbe(
            self._model.module,
            self.layers,
            {layer.name: self._model.weight(layer.name) for layer in self.layers},
            self.errors,
            formats=self.formats,
            activations=self._activations,
            positions=self._settings.positions,
            seed=self._settings.seed,
            checkpointing=self._settings.checkpointing,
            paired=PAIRED_EXAMPLES if self._batches.facts.by_example else PAIRED,
            signs=bool(self._batches.facts.classes),
            objective=self._objective,
        )
        self._dual.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        """Take the hooks out again."""
        if self._dual is not None:
            self._dual.__exit__(*reason)
            self._dual = None

    def measure(self, number: int) -> bool:
        """Measure a micro-batch, or take it from the journal; return whether it was measured."""
        found = self._journal.read(number) if self._journal else None
        measured = found is None
        if found is None:
            assert self._dual is not None, "measure() needs the with block"
            start = number * self.size
            rows = range(start, min(start + self.size, len(self._batches)))
            found = self._dual.measure(self._batches.micro_batch(rows))
            if self._journal:
                self._journal.write(number, found)
        self._results[number] = found
        return measured

    def finish(self) -> Sensitivities:
        """Gather every process's micro-batches and evaluate all scores."""
        everyone: dict[int, Arrays] = {}
        for part in distributed.gather(self._results):
            everyone |= part
        samples = join_samples([everyone[n] for n in sorted(everyone)], self._batches)
        if self._objective is not None:
            refuse_flat(samples, self._objective)
        found = summarize(
            samples,
            weight_errors(self.layers, self.formats, self.errors),
            model=self._model.facts,
            data=self._batches.facts,
            layers=self.layers,
            skipped=self.skipped,
            formats=self.formats,
            rounding=self._settings.rounding,
            fingerprint=self.fingerprint,
            loss=CROSS_ENTROPY if self._objective is None else self._objective.name,
        )
        ranges = self._activations
        if ranges is None:
            return found
        warnings = (*found.warnings, *ranges.warnings)
        known = ranges.fingerprint
        return replace(found, warnings=warnings, activations=ranges, activations_fingerprint=known)

    def _facts(self) -> dict[str, Any]:
        ranges = self._activations
        return {
            **({} if self._objective is None else {"objective": self._objective.name}),
            **({} if ranges is None else {"activations": ranges.fingerprint}),
            "schema": SCHEMA,
            "model": self._model.facts.hash,
            "data": self._batches.facts.hash,
            "layers": [layer.name for layer in self.layers],
            "formats": list(self.formats),
            "rounding": self._settings.rounding,
            "positions": self._settings.positions,
            "seed": self._settings.seed,
            "batch": self.size,
            "dtype": str(next(self._model.module.parameters()).dtype).removeprefix("torch."),
            "device": self._model.device.type,
        }


def micro_batch_size(asked: int | str, data: DataFacts, device_type: str) -> int:
    """Return sequences of a micro-batch; `auto` depends on the data and device alone.

    So it is the same for every process and for a resumed run. At least two, since the participation
    ratio needs pairs.
    """
    if asked != "auto":
        if not isinstance(asked, int) or asked < 1:
            raise InputError(f"batch {asked!r}: must be auto or a whole number of at least 1.")
        return asked
    tokens = CPU_TOKENS if device_type == "cpu" else DEVICE_TOKENS
    most = MOST_EXAMPLES if data.by_example else MOST_SEQUENCES
    return max(2, min(most, tokens // max(data.length, 1)))


def _open_journal(folder: str | Path | None, facts: dict[str, Any]) -> Journal | None:
    """Open the journal: the main process writes its facts before the others look."""
    if folder is None:
        return None
    if not distributed.processes().is_main:
        distributed.wait()
    journal = Journal(folder, facts)
    if distributed.processes().is_main:
        distributed.wait()
    return journal


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
        for group in plan_columns(formats, made.formats):
            table[row, list(group.formats)] = made.squared_norms.numpy()[list(group.errors)]
    return table


def join_samples(parts: Sequence[Arrays], batches: Data) -> Samples:
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
