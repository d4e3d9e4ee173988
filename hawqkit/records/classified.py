"""What a classifier and its mixes do with labelled examples: accuracy, flips, confusion.

Letters in shapes: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hawqkit.records.measured import Integers


@dataclass(frozen=True, slots=True)
class Confusion:
    """How many examples of each class were put into which class; pairs that occur, and no others.

    Attributes:
        classes: C.
        cells: true class * C + predicted class of every pair that occurs, ascending.
        counts: examples of each of these pairs.
    """

    classes: int
    cells: tuple[int, ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuse pairs of classes that there are not."""
        inside = all(0 <= cell < self.classes**2 for cell in self.cells)
        if len(self.cells) != len(self.counts) or not inside or min(self.counts, default=1) < 1:
            raise ValueError(f"confusion is no table of counts of {self.classes} classes")

    def to_array(self) -> Integers:
        """Return the counts (C, C): rows are true classes, columns predicted ones.

        >>> make_confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).to_array()
        array([[1, 0],
               [1, 1]])
        """
        table = np.zeros(self.classes**2, dtype=np.int64)
        table[list(self.cells)] = self.counts
        return table.reshape(self.classes, self.classes)


def make_confusion(labels: Integers, predicted: Integers, classes: int) -> Confusion:
    """Count pairs of a true and a predicted class.

    Args:
        labels: (S,) true classes of the examples.
        predicted: (S,) most likely classes.
        classes: C.
    """
    cells, counts = np.unique(labels * classes + predicted, return_counts=True)
    return Confusion(classes, tuple(cells.tolist()), tuple(counts.tolist()))


@dataclass(frozen=True, slots=True)
class Flip:
    """One example that a mix puts into another class than the original does.

    Attributes:
        index: of the example in its data set.
        label: its true class.
        before: most likely class of the original.
        after: most likely class of the mix.
        before_probability: that the original gives to its class.
        after_probability: that the mix gives to its class.
        picture: a small PNG of the example in base64, its brightness stretched over the whole
            range; empty where the example is no picture, or none is kept.
    """

    index: int
    label: int
    before: int
    after: int
    before_probability: float
    after_probability: float
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Classified:
    """What one model does with labelled examples, alone and beside others on the same examples.

    The error of a share a of n examples is binomial, sqrt(a (1 - a) / n); that of the difference of
    two shares counts the b examples that only one of them has right and the c that only the other
    has, sqrt(b + c - (b - c)^2 / n) / n, since all others cancel (the spread behind McNemar's
    test). Where examples come in clusters, both are jackknife errors over clusters instead.

    Attributes:
        accuracy: share of examples whose most likely class is the true one.
        accuracy_stderr: its error.
        interval: its 95 % interval by Wilson's score, also right near 0 and 1.
        loss: mean cross-entropy, in nats.
        loss_stderr: its error.
        difference: accuracy minus the original's, paired.
        difference_stderr: its error.
        against_chosen: accuracy minus that of the chosen mix, paired.
        against_chosen_stderr: its error.
        loss_difference: loss minus the original's, paired.
        loss_difference_stderr: its error.
        became_wrong: flipped examples that the original has right.
        became_right: flipped examples that this model has right.
        stayed_wrong: flipped examples that neither has right.
        confusion: of true and predicted classes; None where it is not kept.
        flips: the flipped examples of which the original was surest, those first.
    """

    accuracy: float
    accuracy_stderr: float
    interval: tuple[float, float]
    loss: float
    loss_stderr: float
    difference: float = 0.0
    difference_stderr: float = 0.0
    against_chosen: float = 0.0
    against_chosen_stderr: float = 0.0
    loss_difference: float = 0.0
    loss_difference_stderr: float = 0.0
    became_wrong: int = 0
    became_right: int = 0
    stayed_wrong: int = 0
    confusion: Confusion | None = None
    flips: tuple[Flip, ...] = ()

    @property
    def flipped(self) -> int:
        """Number of examples in another class than the original's."""
        return self.became_wrong + self.became_right + self.stayed_wrong


@dataclass(frozen=True, slots=True)
class Classification:
    """The original and every mix on one set of labelled examples.

    Attributes:
        count: examples.
        classes: C, that the model tells apart.
        names: of the classes, in their order; empty where they have none.
        original: what the original does.
        mixes: name of a mix -> what it does; the chosen one first.
    """

    count: int
    classes: int
    names: tuple[str, ...]
    original: Classified
    mixes: dict[str, Classified]

    def __post_init__(self) -> None:
        """Refuse names and flips that do not belong to the classes, and no mix at all."""
        if not self.mixes:
            raise ValueError("a classification holds no mix")
        if len(self.names) not in (0, self.classes):
            raise ValueError(f"{len(self.names)} names for {self.classes} classes")
        for model in (self.original, *self.mixes.values()):
            if model.confusion is not None and model.confusion.classes != self.classes:
                raise ValueError(f"a confusion is not of {self.classes} classes")
            for flip in model.flips:
                inside = all(0 <= c < self.classes for c in (flip.label, flip.before, flip.after))
                if not inside or not 0 <= flip.index < self.count:
                    raise ValueError(f"a flipped example is not of {self.classes} classes")

    @property
    def chosen(self) -> Classified:
        """What the chosen mix does."""
        return next(iter(self.mixes.values()))

    def name_of(self, index: int) -> str:
        """Return what a class is called."""
        return self.names[index] if self.names else f"class {index}"
