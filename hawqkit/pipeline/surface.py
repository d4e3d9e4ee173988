"""The Python surface: the stages as functions of records, with no recipe and no run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hawqkit.allocation import BASELINES, BUDGETS
from hawqkit.errors import InputError, did_you_mean
from hawqkit.pipeline.choosing import ChoiceSettings, choose
from hawqkit.records import CROSS_ENTROPY, Allocation, Linearized, Sensitivities, Validation
from hawqkit.sensitivity.confidence import KlLimit
from hawqkit.targets import find_target

if TYPE_CHECKING:
    from hawqkit.models import Data, LoadedModel
    from hawqkit.tuning.outcome import Tuned


def allocate(
    sensitivities: Sensitivities,
    *,
    runtime: str = "transformers",
    score: str = "auto",
    risk: float = 0.0,
    baselines: Sequence[str] = BASELINES,
    draws: int = 32,
    size_target: str | None = None,
    max_predicted_kl: float | Mapping[str, float] | None = None,
    latency_table: str | Path | None = None,
    groups: Mapping[str, str] | None = None,
    interactions: bool | str = "auto",
    **budgets: float,
) -> Allocation:
    """Choose the format of every layer: minimize the summed score within all budgets, exactly.

    With interactions the choice goes, among mixes whose summed score is within a tenth of its
    optimum, by what two layers' errors do together; the certificate holds the gap.

    With `max_predicted_kl` it is the size that is minimized: the smallest mix whose predicted KL
    stays at or below the limit,

        kl + z sqrt((spread kl)^2 + stderr^2) <= value

    with z the one-sided normal quantile of the confidence, `spread` the relative deviation of the
    KL under random rounding, sqrt(2 / participation ratio of the network), and `stderr` the
    standard error of the prediction. `kl_budget` of the result holds the figures.

    Args:
        sensitivities: from `probe`, or read from a run folder.
        runtime: profile of layers that share a format.
        score: a score's name; `auto` is the one that compares best.
        risk: standard deviations added to every score.
        baselines: other mixes to predict beside the chosen one.
        draws: resampled probes for stability; 0 leaves it out.
        size_target: the target whose bytes `size` limits (by default `compressed-tensors`) or
            `max_predicted_kl` makes small (by default no target's: the stored bits of the layers).
        max_predicted_kl: nats; or `{"value": 0.05, "confidence": 0.9}`, by default 0.5, which
            limits the prediction itself.
        latency_table: CSV file with the columns `layer` or `shape`, `format`, `milliseconds`, which
            `latency_ms` needs.
        groups: layer name -> key; layers with the same key share a format, whatever the runtime.
        interactions: whether what layers do together enters the choice; `auto` for classifiers,
            where the best score chooses and the KL is not limited.
        **budgets: `average_bits`, `bits_per_weight`, `size` (bytes), `bops` (multiply-accumulates x
            weight bits x activation bits, for one example), `latency_ms`; several hold together.

    Raises:
        BudgetError: nothing fits; the message says what can be had.
        InputError: a name is unknown, or the latency table lacks rows; lists all of them.
        Unsupported: `bops` is limited, and operations were not counted.
    """
    unknown = [name for name in budgets if name not in BUDGETS]
    if unknown:
        raise InputError(
            f"unknown budget {unknown[0]!r}: known are {', '.join(BUDGETS)}."
            + did_you_mean(unknown[0], BUDGETS)
        )
    if "size" in budgets and size_target is None:
        size_target = "compressed-tensors"
    settings = ChoiceSettings(
        budgets=budgets,
        max_predicted_kl=_kl_limit(max_predicted_kl),
        runtime=runtime,
        score=score,
        risk=risk,
        targets=(size_target,) if size_target else (),
        size_target=size_target,
        baselines=baselines,
        draws=draws,
        latency_table=latency_table,
        groups=groups or {},
        interactions=interactions,
    )
    return choose(sensitivities, settings)[0]


def _kl_limit(given: float | Mapping[str, float] | None) -> KlLimit | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        given = {"value": given}
    unknown = set(given) - {"value", "confidence"}
    if unknown or "value" not in given:
        raise InputError(
            f"max_predicted_kl has the keys {', '.join(map(str, given)) or 'none'}; it takes a "
            "value and may take a confidence, as in {'value': 0.05, 'confidence': 0.9}."
        )
    return KlLimit(**given)


def validate(
    model: LoadedModel,
    allocation: Allocation,
    held_out: Data,
    *,
    calibration: Data | None = None,
    tuned: Tuned | None = None,
    **other_texts: Data,
) -> Validation:
    """Measure an allocation and its baselines on text or examples that the choice never saw.

    Args:
        model: the original; it comes back bit for bit.
        allocation: from `allocate`.
        held_out: text or labelled examples of the calibration's source.
        calibration: the data that chose. With what was withheld of them the record also holds a
            prediction with linear logits, beside what is measured there; with labelled examples
            the loss there too, which shows how far the held-out data have shifted.
        tuned: the allocation after `tune`, measured as one more mix.
        **other_texts: further texts or examples; the shift is reported apart.

    Raises:
        InputError: `calibration` has neither labels nor withheld sequences; or the allocation was
            chosen by another loss than the cross-entropy, or the data have no classes.
    """
    from hawqkit.sensitivity.probing import MOST_EXAMPLES, untracked
    from hawqkit.validation.validating import validate_mixes

    _refuse_other_loss(allocation, {"held-out": held_out, **other_texts})
    texts = {"held-out": held_out, **other_texts}
    batch = 4
    if all(text.facts.classes for text in texts.values()):
        longest = max(text.facts.length for text in texts.values())
        batch = min(MOST_EXAMPLES, max(batch, 1024 // longest))
    return validate_mixes(
        model,
        allocation,
        texts,
        track=untracked,
        batch=batch,
        calibration=calibration,
        tuned=tuned.variant() if tuned is not None else None,
    )


def _refuse_other_loss(allocation: Allocation, given: Mapping[str, Data]) -> None:
    """Refuse what has no KL divergence, or would set one beside the increase of another loss."""
    why = [f"{n} has targets and no classes" for n, d in given.items() if _has_targets(d)]
    if allocation.loss != CROSS_ENTROPY:
        why.insert(0, f"the allocation was chosen by increases of {allocation.loss}")
    if why:
        raise InputError(
            f"{'; '.join(why)}; the KL divergence is of classifiers and language models "
            "with their cross-entropy alone. measure_loss(model, allocation, held_out, objective) "
            "measures what the chosen mix and the baselines add to the loss that probe was given."
        )


def _has_targets(data: Data) -> bool:
    return data.facts.by_example and not data.facts.classes


def predict_linearized(
    model: LoadedModel,
    allocation: Allocation,
    data: Data,
    *,
    batch: int | None = None,
) -> Linearized:
    """Predict the KL of an allocation with logits linear in all rounding errors, softmax exact.

        KL(softmax(z) || softmax(z + sum over layers of J_l dW_l))

    Made by one pass in forward mode over the examples that were withheld from choosing, beside the
    quadratic form and what is measured on the same examples; see `Linearized`.

    Args:
        model: the original; it comes back bit for bit.
        allocation: from `allocate`.
        data: the data that chose, some of it withheld.
        batch: sequences or examples that go through the model together.

    Raises:
        InputError: fewer than two examples were withheld, or the loss is not the cross-entropy.
        NumericalError: the derivative is not finite, or depends on the step of the difference that
            stands in for it.
    """
    from hawqkit.sensitivity.probing import MOST_EXAMPLES, untracked
    from hawqkit.validation.linearized import linearized_kl

    _refuse_other_loss(allocation, {"data": data})
    if batch is None:
        batch = 4
        if data.facts.classes:
            batch = min(MOST_EXAMPLES, max(batch, 1024 // data.facts.length))
    return linearized_kl(
        model,
        allocation.layers,
        data,
        rounding=allocation.rounding,
        activations=allocation.activations,
        batch=batch,
        track=untracked,
    )


def export(
    allocation: Allocation,
    target: str,
    folder: str | Path,
    *,
    model: LoadedModel | None = None,
    sensitivities: Sensitivities | None = None,
    examples: Data | None = None,
) -> list[Path]:
    """Write an allocation for a quantizer or runtime.

    Args:
        allocation: from `allocate`.
        target: `compressed-tensors`, `bits`, `onnx`; `hawqkit targets` lists them.
        folder: is made, or replaced if it is an earlier export.
        model: the original; needed by targets that write weights.
        sensitivities: what the allocation was chosen from; enough for `bits`, and needs no torch.
        examples: what the model is run on; needed by `onnx` where `measure_graph` was not called.

    Raises:
        InputError: neither model nor sensitivities are given.
        Unsupported: the target cannot hold it; every reason at once.
    """
    module = find_target(target)
    if model is not None:
        if examples is not None:
            from hawqkit.models.signature import with_inputs

            model = with_inputs(model, examples)
        return list(module.write(allocation, Path(folder), model))
    if sensitivities is None:
        raise InputError(
            f"export of target {target!r}: give model=, or sensitivities= for a target without "
            "weights; an allocation alone does not say what its layers are."
        )
    layers, facts = sensitivities.layers, sensitivities.model
    return list(module.write_from_facts(allocation, Path(folder), layers, facts))
