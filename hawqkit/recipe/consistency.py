"""What can be wrong between the fields of a recipe when each of them is right by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hawqkit.errors import did_you_mean
from hawqkit.formats import SCALE_BITS, parse_format
from hawqkit.recipe.document import Path

if TYPE_CHECKING:
    from hawqkit.recipe.schema import BudgetSection, TextSection

BUILTIN = "builtin"
BUILTIN_SPLITS = ("calibration", "held-out")


def contradictions(parts: Mapping[str, Any]) -> list[tuple[Path, str]]:
    """Return (path, message) of everything that is wrong between fields.

    Args:
        parts: field -> its value, or None where the value itself is wrong already.
    """
    found = _text_problems(parts)
    budget, formats = parts.get("budget"), parts.get("formats")
    if budget is not None and formats is not None:
        found += _impossible(budget, formats)
    if budget is not None and budget.size is None and parts.get("size_target") is not None:
        found.append((
            ("size_target",),
            "says which target's bytes budget.size counts, and there is no budget.size; set one, or "
            "leave this out.",
        ))  # fmt: skip
    return found


def _text_problems(parts: Mapping[str, Any]) -> list[tuple[Path, str]]:
    calibration = parts.get("calibration")
    measured: dict[Path, TextSection | None] = {("held_out",): parts.get("held_out")}
    measured |= {("other_texts", k): v for k, v in (parts.get("other_texts") or {}).items()}
    found: list[tuple[Path, str]] = []
    for path, text in {("calibration",): calibration, **measured}.items():
        if text is not None and text.source == BUILTIN:
            found += [((*path, key), message) for key, message in _builtin_problems(text)]
    for path, text in measured.items():
        if text is None or calibration is None:
            continue
        if (text.source, text.config, text.split) == (
            calibration.source, calibration.config, calibration.split,
        ):  # fmt: skip
            found.append((
                (*path, "split"),
                f"{text.split!r} of {text.source!r} is the text of calibration too; what measures must "
                "not have been seen by the choice: name another split or source.",
            ))  # fmt: skip
    return found


def _builtin_problems(text: TextSection) -> list[tuple[str, str]]:
    found = [
        (key, f"the built-in text has no {key}; leave this out, or name another source.")
        for key in ("config", "column")
        if getattr(text, key) is not None
    ]
    if text.answers_only:
        found.append(("answers_only", "the built-in text holds no conversations; name another source."))
    if text.split not in BUILTIN_SPLITS:
        found.append((
            "split",
            f"the built-in text has no split {text.split!r}; known: {', '.join(BUILTIN_SPLITS)}."
            + did_you_mean(text.split, BUILTIN_SPLITS),
        ))  # fmt: skip
    return found


def _impossible(budget: BudgetSection, formats: Sequence[str]) -> list[tuple[Path, str]]:
    """Compare the limits with what the coarsest format takes at the very least, in any layer."""
    found: list[tuple[Path, str]] = []
    floors: dict[str, Callable[[str], float]] = {"average_bits": _bits, "bits_per_weight": _stored}
    for key, least in floors.items():
        limit = getattr(budget, key)
        coarsest = min(formats, key=least)
        if limit is not None and limit < least(coarsest):
            found.append((
                ("budget", key),
                f"{limit:g} cannot be had: the smallest of the formats, {coarsest}, takes "
                f"{least(coarsest):g} in every layer; raise the limit or add a smaller format.",
            ))  # fmt: skip
    return found


def _bits(name: str) -> float:
    return parse_format(name).code_bits(SCALE_BITS)  # no model is stored in less than 16 bits


def _stored(name: str) -> float:
    format_ = parse_format(name)
    extra = SCALE_BITS + (0 if format_.symmetric else _bits(name))
    return _bits(name) + (extra / format_.group_size if format_.group_size else 0)


