"""What can be wrong between the fields of a recipe when each of them is right by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from hawqkit.errors import did_you_mean
from hawqkit.formats import SCALE_BITS, parse_format
from hawqkit.recipe.document import Path
from hawqkit.sensitivity.scores import resolve_score

if TYPE_CHECKING:
    from hawqkit.recipe.schema import BudgetSection, TextSection

BUILTIN = "builtin"
NEEDS_POSITIONS = ("token", "token-summed", "shrunk")  # scores made from sampled positions
BUILTIN_SPLITS = ("calibration", "held-out")


Problem = tuple[Path, str]


def contradictions(parts: Mapping[str, Any]) -> list[Problem]:
    """Return (path, message) of everything that is wrong between fields.

    Args:
        parts: field -> its value, or None where the value itself is wrong already.
    """
    found = _text_problems(parts)
    budget, formats = parts.get("budget"), parts.get("formats")
    if budget is not None and formats is not None:
        found += _impossible(budget, formats)
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
    return found + _curvature_problems(parts)


def _curvature_problems(parts: Mapping[str, Any]) -> list[Problem]:
    """Compare what the true Hessian is measured on with the text that there is."""
    sensitivity, calibration = parts.get("sensitivity"), parts.get("calibration")
    if sensitivity is None or calibration is None or not sensitivity.curvature_scores():
        return []
    wanted = sensitivity.curvature.sequences
    if wanted <= calibration.sequences:
        return []
    message = (
        f"{', '.join(sensitivity.curvature_scores())} would be measured on {wanted} of the "
        f"calibration's sequences, and it has {calibration.sequences} that choose; ask for fewer "
        "here, or for more there."
    )
    return [(("sensitivity", "curvature", "sequences"), message)]


def _text_problems(parts: Mapping[str, Any]) -> list[Problem]:
    calibration = parts.get("calibration")
    measured: dict[Path, TextSection | None] = {("held_out",): parts.get("held_out")}
    measured |= {("other_texts", k): v for k, v in (parts.get("other_texts") or {}).items()}
    found: list[Problem] = []
    for path, text in {("calibration",): calibration, **measured}.items():
        if text is not None and text.source == BUILTIN:
            found += [((*path, key), message) for key, message in _builtin_problems(text)]
    for path, text in measured.items():
        if text is not None and calibration is not None and _origin(text) == _origin(calibration):
            message = (
                f"{text.split!r} of {text.source!r} is the text of calibration too; validation "
                "measures on text that the choice never saw: name another split or source."
            )
            found.append(((*path, "split"), message))
    return found


def _origin(text: TextSection) -> tuple[str | None, ...]:
    if text.source.lower().endswith((".txt", ".jsonl", ".parquet")):
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
    extra = SCALE_BITS + (0 if format_.symmetric else _bits(name))
    return _bits(name) + (extra / format_.group_size if format_.group_size else 0)
