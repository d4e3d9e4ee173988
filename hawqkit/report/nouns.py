"""How a report calls the data: text that comes in sequences, images, labelled texts, examples."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records import DataFacts, Sensitivities, Validation
from hawqkit.report.wording import clean, plural


@dataclass(frozen=True, slots=True)
class Nouns:
    """Words that depend on the kind of data.

    Attributes:
        one: what is measured at a time.
        many: several of them.
        data: all of them together.
        place: what one source of them is called.
        guess: what is predicted, the most likely of all.
        classes: whether each has one label.
    """

    one: str
    many: str
    data: str
    place: str
    guess: str
    classes: bool

    def count(self, number: int) -> str:
        """Return a number with the noun.

        >>> IMAGES.count(1), IMAGES.count(1200)
        ('1 image', '1,200 images')
        """
        return plural(number, self.one, self.many)

    def name(self, words: str) -> str:
        """Return words of a record, which call everything a sequence.

        >>> IMAGES.name("withheld sequences")
        'withheld images'
        """
        return clean(words).replace("sequences", self.many)


TEXT = Nouns("sequence", "sequences", "text", "text", "most likely next token", False)
IMAGES = Nouns("image", "images", "images", "data set", "most likely class", True)
LABELLED_TEXT = Nouns("text", "texts", "texts", "data set", "most likely class", True)
EXAMPLES = Nouns("example", "examples", "examples", "data set", "most likely class", True)
_KINDS = {"images": IMAGES, "labelled text": LABELLED_TEXT}


def nouns_of(facts: DataFacts | None) -> Nouns:
    """Return the words for some data.

    >>> nouns_of(DataFacts("x", "", 2, 1, 2, 2, 2, 0, "images", 10)).many
    'images'
    """
    if facts is None or (facts.kind == "text" and not facts.classes):
        return TEXT
    return _KINDS.get(facts.kind, EXAMPLES)


def nouns_for(
    sensitivities: Sensitivities | None = None, validation: Validation | None = None
) -> Nouns:
    """Return the words for a run, from whichever records there are."""
    if sensitivities is not None:
        return nouns_of(sensitivities.data)
    facts = list(validation.texts.values()) if validation is not None else []
    return nouns_of(facts[0] if facts else None)


def amount(facts: DataFacts) -> str:
    """Return how much data there is and where it is from.

    >>> amount(DataFacts("x", "", 2, 8, 16, 14, 2, 0))
    '2 sequences of up to 8 tokens (14 predictions from 2 documents, x)'
    >>> amount(DataFacts("x", "", 2, 1, 2, 2, 2, 0, "images", 10))
    '2 images of 10 classes (x)'
    """
    nouns, source = nouns_of(facts), clean(facts.source)
    if nouns.classes and not facts.classes:
        return f"{nouns.count(facts.sequences)} with targets ({source})"
    if nouns.classes:
        classes = plural(facts.classes, "class", "classes")
        return f"{nouns.count(facts.sequences)} of {classes} ({source})"
    return (
        f"{nouns.count(facts.sequences)} of up to {plural(facts.length, 'token')} "
        f"({facts.counted:,} predictions from {plural(facts.documents, 'document')}, {source})"
    )


def extent(facts: DataFacts) -> str:
    """Return how much there is in the unit of a model's input.

    >>> extent(DataFacts("x", "", 2, 8, 16, 14, 2, 0))
    '16 tokens'
    """
    nouns = nouns_of(facts)
    return nouns.count(facts.sequences) if nouns.classes else f"{facts.tokens:,} tokens"
