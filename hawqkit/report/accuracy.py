"""A classifier in rows of cells: accuracy, the classes that lose, the loss here and there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hawqkit.records import Classification, Classified, Validation
from hawqkit.report.comparison import CHOSEN, texts_of
from hawqkit.report.nouns import Nouns
from hawqkit.report.wording import (
    DASH,
    clean,
    percent,
    percent_with_error,
    points,
    with_error,
)

MOST_LOSING = 8  # classes that a figure and a table show
ORIGINAL = "original"
CALIBRATION = "calibration"


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """One model on one data set, as cells of a table.

    Attributes:
        name: the mix, or `original`.
        chosen: True for the chosen mix.
        accuracy: with its error.
        interval: its 95 % interval.
        difference: minus the original, in points.
        against: minus the chosen mix, in points.
        flips: share of examples in another class than the original's.
        wrong: examples that became wrong.
        right: examples that became right.
        otherwise: examples that changed from one wrong class to another.
    """

    name: str
    chosen: bool
    accuracy: str
    interval: str
    difference: str
    against: str
    flips: str
    wrong: str
    right: str
    otherwise: str


@dataclass(frozen=True, slots=True)
class LosingClass:
    """A class of which the chosen mix has fewer examples right than the original.

    Attributes:
        index: of the class.
        count: examples.
        before: that the original has right.
        after: that the chosen mix has right.
        taken: class that gained most of them.
        gained: how many more of them it takes.
    """

    index: int
    count: int
    before: int
    after: int
    taken: int
    gained: int


@dataclass(frozen=True, slots=True)
class LossRow:
    """The original and the chosen mix on one data set, as cells of a table."""

    name: str
    count: str
    original: str
    chosen: str
    difference: str
    original_accuracy: str
    chosen_accuracy: str


@dataclass(frozen=True, slots=True)
class Shift:
    """Loss on what chose and on what the choice never saw.

    Attributes:
        rows: calibration first, where it was measured.
        sentences: how far the data have shifted, in words.
    """

    rows: tuple[LossRow, ...]
    sentences: tuple[str, ...]


def accuracy_rows(found: Classification) -> list[AccuracyRow]:
    """Return a row for the original, the chosen mix and each baseline."""
    rows = [_accuracy_row(ORIGINAL, found.original, found.count, None)]
    for place, (name, model) in enumerate(found.mixes.items()):
        chosen = place == 0
        rows.append(_accuracy_row(CHOSEN if chosen else name, model, found.count, chosen))
    return rows


def _accuracy_row(name: str, model: Classified, count: int, chosen: bool | None) -> AccuracyRow:
    low, high = (f"{100 * end:.1f}" for end in model.interval)
    original = chosen is None
    return AccuracyRow(
        name,
        bool(chosen),
        percent_with_error(model.accuracy, model.accuracy_stderr),
        f"{low} to {high} %",
        DASH if original else points(model.difference, model.difference_stderr),
        DASH if chosen else points(model.against_chosen, model.against_chosen_stderr),
        DASH if original else percent(model.flipped / count),
        DASH if original else f"{model.became_wrong:,}",
        DASH if original else f"{model.became_right:,}",
        DASH if original else f"{model.stayed_wrong:,}",
    )


def losing_classes(found: Classification) -> list[LosingClass]:
    """Return the classes of which the chosen mix loses most examples, the worst first.

    What a class loses are the examples that the original has right and the mix has not, less those
    that go the other way; of equal classes the smaller one is worse.
    """
    if found.original.confusion is None or found.chosen.confusion is None:
        return []
    before = found.original.confusion.to_array()
    after = found.chosen.confusion.to_array()
    counts, lost = before.sum(1), before.diagonal() - after.diagonal()
    order = sorted(np.flatnonzero(lost > 0).tolist(), key=lambda c: (-lost[c], counts[c], c))
    rows = []
    for c in order[:MOST_LOSING]:
        gained = after[c] - before[c]
        taken = int(gained.argmax())
        rows.append(
            LosingClass(
                c, int(counts[c]), int(before[c, c]), int(after[c, c]), taken, int(gained[taken])
            )
        )
    return rows


def shift_of(validation: Validation, nouns: Nouns) -> Shift | None:
    """Return loss and accuracy where the mix was chosen and elsewhere; None of language models."""
    sets = {} if validation.calibration is None else {CALIBRATION: validation.calibration}
    known = validation.classification
    sets |= {name: known[name] for name in texts_of(validation) if name in known}
    if not known or len(sets) < 2:
        return None
    rows = tuple(_loss_row(name, found) for name, found in sets.items())
    first, *others = sets
    sentences = [_shift_sentence((first, sets[first]), (name, sets[name])) for name in others]
    if first == CALIBRATION:
        sentences.append(
            f"The mix was chosen on the calibration {nouns.many}. A loss that is higher elsewhere "
            "in the original too is no effect of the compression: the data differ, or the model "
            "has learned the calibration's by heart."
        )
    return Shift(rows, tuple(sentences))


def _loss_row(name: str, found: Classification) -> LossRow:
    before, after = found.original, found.chosen
    return LossRow(
        name,
        f"{found.count:,}",
        with_error(before.loss, before.loss_stderr),
        with_error(after.loss, after.loss_stderr),
        with_error(after.loss_difference, after.loss_difference_stderr),
        percent_with_error(before.accuracy, before.accuracy_stderr),
        percent_with_error(after.accuracy, after.accuracy_stderr),
    )


def _shift_sentence(home: tuple[str, Classification], away: tuple[str, Classification]) -> str:
    (first, here), (second, there) = home, away

    def gap(one: tuple[float, float], two: tuple[float, float]) -> str:
        return with_error(two[0] - one[0], math.hypot(one[1], two[1]))

    models = ((here.original, there.original), (here.chosen, there.chosen))
    loss = [gap((a.loss, a.loss_stderr), (b.loss, b.loss_stderr)) for a, b in models]
    old, new = here.chosen, there.chosen
    added = gap(
        (old.loss_difference, old.loss_difference_stderr),
        (new.loss_difference, new.loss_difference_stderr),
    )
    return (
        f"From {clean(first)} to {clean(second)} the original's loss changes by {loss[0]} nats and "
        f"the chosen mix's by {loss[1]}; what compression adds to the loss changes by {added}."
    )
