"""The report's section on a classifier: what its template is written from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hawqkit.records import Classification, Flip, Validation
from hawqkit.report.accuracy import accuracy_rows, losing_classes
from hawqkit.report.comparison import texts_of
from hawqkit.report.confusion_figure import confusion_figure
from hawqkit.report.nouns import Nouns
from hawqkit.report.wording import percent, short_class

LONGEST = 32  # characters of a class's name under a picture


@dataclass(frozen=True, slots=True)
class FlipView:
    """One flipped example as the gallery shows it."""

    index: str
    picture: str
    label: str
    before: str
    after: str
    before_right: bool
    after_right: bool
    before_probability: str
    after_probability: str


def classification_view(validation: Validation | None, nouns: Nouns) -> list[dict[str, Any]]:
    """Return what the section is written from, one entry for each data set; draws its figures.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    if validation is None:
        return []
    found = []
    for place, name in enumerate(texts_of(validation)):
        if name not in validation.classification:
            continue
        here = validation.classification[name]
        losing = losing_classes(here)
        figure = confusion_figure(here, [c.index for c in losing], place) if losing else ""
        flips = [_flip(here, flip) for flip in here.chosen.flips]
        found.append(
            {
                "name": name, "place": place, "count": nouns.count(here.count),
                "rows": accuracy_rows(here), "classification": here, "losing": losing,
                "figure": Markup(figure), "flips": flips, "flipped": here.chosen.flipped,
                "pictured": any(flip.picture for flip in flips),
            }
        )  # fmt: skip
    return found


def _flip(found: Classification, flip: Flip) -> FlipView:
    def name(index: int) -> str:
        return short_class(found.name_of(index), LONGEST)

    return FlipView(
        str(flip.index),
        flip.picture,
        name(flip.label),
        name(flip.before),
        name(flip.after),
        flip.before == flip.label,
        flip.after == flip.label,
        percent(flip.before_probability, 0),
        percent(flip.after_probability, 0),
    )
