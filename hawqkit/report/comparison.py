"""The chosen mix beside the baselines, from whichever records there are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hawqkit.errors import StateMismatch, did_you_mean
from hawqkit.formats import parse_format
from hawqkit.records import (
    Allocation,
    Linearized,
    Measured,
    Prediction,
    Score,
    Sensitivities,
    Totals,
    Validation,
)

CHOSEN = "chosen"
HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Row:
    """One mix, with what is known of it; `measured` is empty if nothing was measured.

    Attributes:
        chosen: True for the mix that the allocation holds.
        objective: its summed score, None if only its measurement is known.
        linearized: prediction and measurement on the same withheld sequences, if they were made.
    """

    name: str
    about: str
    chosen: bool
    totals: Totals
    objective: float | None
    prediction: Prediction | None
    measured: Mapping[str, Measured]
    linearized: Linearized | None = None


@dataclass(frozen=True, slots=True)
class Agreement:
    """Predicted against measured for one mix on one text; `ratio` is measured over predicted."""

    name: str
    text: str
    chosen: bool
    prediction: Prediction
    measured: Measured
    ratio: float | None
    ratio_stderr: float | None


def compare(allocation: Allocation | None, validation: Validation | None) -> list[Row]:
    """Return a row for each mix: the chosen one first, then baselines in their order."""
    rows: dict[str, Row] = {}
    if allocation is not None:
        rows[CHOSEN] = Row(
            CHOSEN, "this allocation", True, allocation.totals, allocation.objective,
            allocation.prediction, {},
        )  # fmt: skip
        for mix in allocation.baselines:
            rows[mix.name] = Row(
                mix.name, mix.about, False, mix.totals, mix.objective, mix.prediction, {}
            )
    for index, checked in enumerate(validation.mixes if validation else ()):
        key = CHOSEN if index == 0 else checked.name
        known = rows.get(key)
        rows[key] = Row(
            key,
            checked.about or (known.about if known else ""),
            index == 0,
            _sizes(checked.totals, known),
            known.objective if known else None,
            checked.prediction or (known.prediction if known else None),
            checked.measured,
            checked.linearized,
        )
    return list(rows.values())


def texts_of(validation: Validation | None) -> list[str]:
    """Return the names of the texts, the one of the calibration's source first."""
    names = list(validation.texts) if validation else []
    return sorted(names, key=lambda name: name != HELD_OUT)


def target_names(rows: list[Row]) -> list[str]:
    """Return every target that any mix has a size for."""
    return list(dict.fromkeys(target for row in rows for target in row.totals.size))


def agreements(rows: list[Row], texts: list[str]) -> list[Agreement]:
    """Return predicted against measured for each mix and text that have both."""
    found = []
    for row in rows:
        for text in texts:
            if row.prediction is None or text not in row.measured:
                continue
            measured = row.measured[text]
            ratio, stderr = ratio_of(
                measured.kl, measured.kl_stderr, row.prediction.kl, row.prediction.kl_stderr
            )
            found.append(
                Agreement(row.name, text, row.chosen, row.prediction, measured, ratio, stderr)
            )
    return found


def ratio_of(
    top: float, top_stderr: float, bottom: float, bottom_stderr: float
) -> tuple[float | None, float | None]:
    """Return top / bottom and its standard error, the two being independent (delta method).

    >>> ratio_of(3.0, 0.3, 2.0, 0.0)
    (1.5, 0.15)
    """
    if bottom <= 0 or top <= 0:
        return None, None
    ratio = top / bottom
    return ratio, ratio * math.hypot(top_stderr / top, bottom_stderr / bottom)


def score_used(sensitivities: Sensitivities, allocation: Allocation | None) -> Score:
    """Return the score that chose; without an allocation the one that `auto` stands for.

    Raises:
        StateMismatch: the two records are of different runs.
    """
    if allocation is None:
        return sensitivities.scores[sensitivities.auto]
    if allocation.sensitivities and allocation.sensitivities != sensitivities.fingerprint:
        raise StateMismatch(
            f"the allocation was solved on sensitivities {allocation.sensitivities[:12]}, these "
            f"are {sensitivities.fingerprint[:12]}: both would mix two runs; allocate again."
        )
    name = sensitivities.auto if allocation.score == "auto" else allocation.score
    if name not in sensitivities.scores:
        raise StateMismatch(
            f"the allocation was solved with the score {name!r}, which the sensitivities lack "
            f"(they hold {', '.join(sorted(sensitivities.scores))}); allocate again."
            + did_you_mean(name, sorted(sensitivities.scores))
        )
    known = {layer.name for layer in sensitivities.layers}
    strangers = [layer for layer in allocation.layers if layer not in known]
    if strangers:
        raise StateMismatch(
            f"the allocation names layer {strangers[0]!r}, which the sensitivities lack "
            f"({len(strangers)} such); the two are of different models: allocate again."
        )
    return sensitivities.scores[name]


def bits_label(format_name: str, stored_bits: int) -> str:
    """Return the code bits of a format as a short label, behind a slash those of inputs.

    >>> bits_label("int4-g64", 32), bits_label("none", 16), bits_label("w4a8", 32)
    ('4', '16', '4/8')
    """
    form = parse_format(format_name)
    inputs = "" if form.activation_bits is None else f"/{form.activation_bits}"
    return f"{form.code_bits(stored_bits)}{inputs}"


def _sizes(totals: Totals, known: Row | None) -> Totals:
    """Return measured totals, with the target sizes of the allocation where they lack them."""
    if totals.size or known is None:
        return totals
    return replace(totals, size=known.totals.size)
