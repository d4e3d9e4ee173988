"""What can be wrong between the fields of a recipe when each of them is right by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from hawqkit.errors import did_you_mean
from hawqkit.formats import SCALE_BITS, parse_format, with_activations
from hawqkit.recipe.data_sections import CLASSIFIERS, IMAGES, TextSection, foreign_keys
from hawqkit.recipe.document import Path
from hawqkit.recipe.tuning_section import foreign_tune_keys
from hawqkit.recipe.values import BUILTIN
from hawqkit.records.activations import DYNAMIC
from hawqkit.runtimes import refuse_formats
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES
from hawqkit.sensitivity.scores import resolve_score
from hawqkit.targets import find_target

if TYPE_CHECKING:
    from hawqkit.recipe.schema import BudgetSection

NEEDS_POSITIONS = ("token", "token-summed", "shrunk")  # scores made from sampled positions
BUILTIN_SPLITS = ("calibration", "held-out")


Problem = tuple[Path, str]


def contradictions(parts: Mapping[str, Any]) -> list[Problem]:
    """Return (path, message) of everything that is wrong between fields.

    Args:
        parts: field -> its value, or None where the value itself is wrong already.
    """
    found = _text_problems(parts) + _task_problems(parts)
    budget, formats = parts.get("budget"), parts.get("formats")
    if budget is not None and formats is not None:
        found += _impossible(budget, formats)
    if formats is not None and parts.get("runtime") is not None:
        wrong = refuse_formats(parts["runtime"], formats)
        found += [] if wrong is None else [(("runtime",), wrong)]
    if budget is not None and budget.latency is not None and budget.latency.table is None:
        message = (
            "names no table of what each layer takes; write latency: {limit: 3.1ms, table: "
            "latency.csv}."
        )
        found.append((("budget", "latency"), message))
    counts = budget is None or budget.size is not None or budget.max_predicted_kl is not None
    if not counts and parts.get("size_target") is not None:
        message = (
            "says whose bytes budget.size counts or max_predicted_kl makes small, and there is "
            "neither; leave this out."
        )
        found.append((("size_target",), message))
    sensitivity = parts.get("sensitivity")
    if sensitivity is not None and sensitivity.positions == 0:
        score = resolve_score(sensitivity.score)
        if score in NEEDS_POSITIONS:
            message = f"the score {score} is made from sampled positions; ask for at least 1."
            found.append((("sensitivity", "positions"), message))
    return found + _activation_problems(parts) + _curvature_problems(parts)


def _activation_problems(parts: Mapping[str, Any]) -> list[Problem]:
    """Return what was said of the inputs of layers, or is not known of them."""
    formats = parts.get("formats")
    if formats is None:
        return []
    rounding = with_activations(formats)
    if not rounding and parts.get("activations") is not None:
        message = (
            f"none of the formats {', '.join(formats)} rounds the inputs of layers; use formats "
            "like w4a8 or int4-g64-a8, or leave this out."
        )
        return [(("activations",), message)]
    sensitivity = parts.get("sensitivity")
    if rounding and sensitivity is not None and sensitivity.score in CURVATURE_SCORES:
        message = (
            f"{sensitivity.score} knows the errors of weights alone, and {rounding[0]} rounds the "
            "inputs of layers too; use another score, such as token or trace, and name this one in "
            "sensitivity.also."
        )
        return [(("sensitivity", "score"), message)]
    return _target_problems(parts, rounding)


def _target_problems(parts: Mapping[str, Any], rounding: Sequence[str]) -> list[Problem]:
    """Say so where a target's consumer rounds inputs otherwise than they would be measured."""
    asked = parts.get("activations")
    if asked is not None and asked.mode == DYNAMIC and asked.symmetric:
        return []
    fixed = [
        name
        for name in parts.get("export") or ()
        if (can := find_target(name).capabilities()).dynamic_inputs
        and any(can.hold(parse_format(form)) for form in rounding)
    ]
    if not fixed:
        return []
    message = (
        f"what reads {', '.join(fixed)} rounds the inputs of layers token by token and "
        "symmetrically, and here they would be measured otherwise; write activations: {mode: "
        "dynamic, symmetric: true}."
    )
    return [(("activations",), message)]


def _curvature_problems(parts: Mapping[str, Any]) -> list[Problem]:
    """Compare what the true Hessian is measured on with the text that there is."""
    sensitivity, calibration = parts.get("sensitivity"), parts.get("calibration")
    if sensitivity is None or calibration is None or not sensitivity.curvature_scores():
        return []
    wanted, task = sensitivity.curvature.sequences, _task(parts)
    there, what = calibration.count(task), "examples" if task in CLASSIFIERS else "sequences"
    if wanted <= there:
        return []
    message = (
        f"{', '.join(sensitivity.curvature_scores())} would be measured on {wanted} of the "
        f"calibration's {what}, and it has {there} that choose; ask for fewer here, or for more "
        "there."
    )
    return [(("sensitivity", "curvature", "sequences"), message)]


def _task(parts: Mapping[str, Any]) -> str:
    model = parts.get("model")
    return "causal-lm" if model is None else str(model.task)


def _data_sections(parts: Mapping[str, Any]) -> dict[Path, TextSection]:
    named: dict[Path, TextSection | None] = {
        ("calibration",): parts.get("calibration"),
        ("held_out",): parts.get("held_out"),
    }
    named |= {("other_texts", k): v for k, v in (parts.get("other_texts") or {}).items()}
    return {path: section for path, section in named.items() if section is not None}


def _task_problems(parts: Mapping[str, Any]) -> list[Problem]:
    """Return what was said that means nothing for what the model predicts."""
    if parts.get("model") is None:
        return []
    task, sections = _task(parts), _data_sections(parts)
    found: list[Problem] = []
    for path, section in sections.items():
        for key, reason in foreign_keys(task).items():
            if key in section.model_fields_set:
                found.append(((*path, key), reason))
        if task in CLASSIFIERS and section.source == BUILTIN:
            message = "the built-in text has no labels; name the data of this classifier."
            found.append(((*path, "source"), message))
    tune = parts.get("tune")
    for key, reason in foreign_tune_keys(task).items():
        if tune is not None and key in tune.model_fields_set:
            found.append((("tune", key), reason))
    if task not in CLASSIFIERS and parts["model"].fold_batch_norm:
        message = f"there is no batch norm to fold where model.task is {task}; leave this out."
        found.append((("model", "fold_batch_norm"), message))
    return found + _lengths(parts, task)


def _lengths(parts: Mapping[str, Any], task: str) -> list[Problem]:
    """Return the lengths that would be ignored: examples are measured whole."""
    sensitivity, spectrum = parts.get("sensitivity"), parts.get("spectrum")
    reason = f"model.task is {task}, whose examples are measured whole; leave it out."
    found: list[Problem] = []
    curvature = None if sensitivity is None else sensitivity.curvature
    if task in CLASSIFIERS and curvature is not None and "length" in curvature.model_fields_set:
        found.append((("sensitivity", "curvature", "length"), reason))
    if task == IMAGES and spectrum is not None and "length" in spectrum.model_fields_set:
        found.append((("spectrum", "length"), reason))
    return found


def _text_problems(parts: Mapping[str, Any]) -> list[Problem]:
    calibration, sections = parts.get("calibration"), _data_sections(parts)
    found: list[Problem] = []
    if _task(parts) in CLASSIFIERS:
        sections = {path: x for path, x in sections.items() if x.source != BUILTIN}
    for path, text in sections.items():
        if text.source == BUILTIN:
            found += [((*path, key), message) for key, message in _builtin_problems(text)]
    what = "data" if _task(parts) in CLASSIFIERS else "text"
    for path, text in sections.items():
        if path == ("calibration",) or calibration is None:
            continue
        if _origin(text) == _origin(calibration):
            message = (
                f"{text.split!r} of {text.source!r} is the {what} of calibration too; validation "
                f"measures on {what} that the choice never saw: name another split or source."
            )
            found.append(((*path, "split"), message))
    return found


def _origin(text: TextSection) -> tuple[str | None, ...]:
    if text.source.lower().endswith((".txt", ".jsonl", ".parquet", ".csv", ".npz")):
        # A local file has no splits: both names mean all of it, however its path is written.
        return str(File(text.source).expanduser().resolve()), text.config, ""
    return text.source, text.config, text.split


def _builtin_problems(text: TextSection) -> list[tuple[str, str]]:
    found = [
        (key, f"the built-in text has no {key}; leave this out, or name another source.")
        for key in ("config", "column")
        if getattr(text, key) is not None
    ]
    if text.answers_only:
        message = "the built-in text holds no conversations; name another source."
        found.append(("answers_only", message))
    if text.split not in BUILTIN_SPLITS:
        message = (
            f"the built-in text has no split {text.split!r}; known: {', '.join(BUILTIN_SPLITS)}."
        )
        found.append(("split", message + did_you_mean(text.split, BUILTIN_SPLITS)))
    return found


def _impossible(budget: BudgetSection, formats: Sequence[str]) -> list[Problem]:
    """Compare the limits with what the smallest format takes at the very least, in any layer."""
    found: list[Problem] = []
    floors: dict[str, Callable[[str], float]] = {"average_bits": _bits, "bits_per_weight": _stored}
    for key, least in floors.items():
        limit = getattr(budget, key)
        smallest = min(formats, key=least)
        if limit is not None and limit < least(smallest):
            message = (
                f"{limit:g} cannot be had: {smallest}, the smallest of the formats, takes at least "
                f"{least(smallest):g} in every layer; raise the limit or add a smaller format."
            )
            found.append((("budget", key), message))
    return found


def _bits(name: str) -> float:
    return parse_format(name).code_bits(SCALE_BITS)  # no weight is stored in less than 16 bits


def _stored(name: str) -> float:
    format_ = parse_format(name)
    if format_.block is not None:
        return 8 * format_.block[1] / format_.block[0]
    extra = format_.scale_bits + (0 if format_.symmetric else _bits(name))
    return _bits(name) + (extra / format_.group_size if format_.group_size else 0)
