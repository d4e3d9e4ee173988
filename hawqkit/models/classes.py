"""From labels as a source writes them to the classes of a model, and a fair choice of examples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hawqkit.errors import DataError, did_you_mean

Label = int | str
_GENERIC = re.compile(r"LABEL_\d+")
_WHOLE = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Labels:
    """Labels of all rows of a source.

    Attributes:
        source: what records call it.
        values: (S) whole numbers or names.
        names: of the classes that whole numbers stand for, where the source says them.
    """

    source: str
    values: tuple[Label, ...]
    names: tuple[str, ...] = ()


def make_labels(source: str, values: Sequence[Any], names: Sequence[str] = ()) -> Labels:
    """Check labels as they were read.

    Raises:
        DataError: a label is missing, or neither a whole number nor text; the message names rows.
    """
    wrong = [
        row
        for row, value in enumerate(values, start=1)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == ""
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        first = values[wrong[0] - 1]
        raise DataError(
            f"{source}: rows {', '.join(map(str, wrong[:5]))}{more} have no label that is a whole "
            f"number or a name, but {first!r}; complete the labels, or leave these rows out."
        )
    return Labels(source, tuple(values), tuple(names))


def draw(labels: Labels, examples: int, withheld: int, seed: int) -> list[int]:
    """Return the rows of examples that choose, then of those that only predict; no row twice.

    Both parts hold each class in its share of the source, as nearly as whole examples allow: the
    k-th of a class's n rows, in random order, stands at (k + u) / n for a random u in [0, 1), and
    rows are taken in the order of where they stand.

    Args:
        labels: of all rows.
        examples: how many may choose.
        withheld: how many more only predict.
        seed: of the order.

    Raises:
        DataError: there are fewer rows.

    >>> rows = draw(Labels("x", (0, 0, 0, 1, 1, 1)), 4, 2, seed=0)
    >>> sorted(rows), sorted(r // 3 for r in rows[:4])
    ([0, 1, 2, 3, 4, 5], [0, 0, 1, 1])
    """
    count, wanted = len(labels.values), examples + withheld
    if count < wanted:
        parts = f" ({examples} that choose and {withheld} withheld)" if withheld else ""
        raise DataError(
            f"{labels.source}: too few examples. Asked were {wanted}{parts}, and there are "
            f"{count}; ask for fewer, or give more."
        )
    generator = torch.Generator().manual_seed(seed)
    rows: dict[Label, list[int]] = {}
    for row in torch.randperm(count, generator=generator).tolist():
        rows.setdefault(labels.values[row], []).append(row)
    places: list[tuple[float, int]] = []
    for label in sorted(rows, key=str):
        start = float(torch.rand(1, generator=generator))
        members = rows[label]
        places += [((k + start) / len(members), row) for k, row in enumerate(members)]
    return [row for _, row in sorted(places)[:wanted]]


def to_classes(
    labels: Labels, config: Mapping[str, Any], classes: int
) -> tuple[list[int], tuple[str, ...]]:
    """Return the model's class of every row, and the names of the classes.

    Names are looked up in the model's `label2id`, upper and lower case and punctuation aside. Where
    the model has no names of its own, the source's order counts, sorted if it has none. Whole
    numbers without names are classes as they are.

    Args:
        labels: of all rows.
        config: of the model; `label2id` is read.
        classes: that the model tells apart.

    Raises:
        DataError: a name is none of the model's, a number is outside its classes, or the model has
            no names and the source has another number of them.
    """
    known = _own_names(config, classes)
    values, names = labels.values, labels.names
    if any(isinstance(v, str) for v in values):
        spelled = [str(v) for v in values]
        # A CSV file holds numbers as text.
        if all(_WHOLE.fullmatch(v) for v in spelled) and not set(spelled) <= set(known):
            values = tuple(int(v) for v in spelled)
        else:
            names = tuple(sorted(set(spelled)))
            place = {name: index for index, name in enumerate(names)}
            values = tuple(place[v] for v in spelled)
    numbers = [int(v) for v in values]
    if not names:
        _check_range(labels.source, numbers, classes)
        return numbers, known
    _check_range(labels.source, numbers, len(names))
    target = _matched(labels.source, names, known) if known else _in_order(labels, names, classes)
    return [target[n] for n in numbers], known or names


def _own_names(config: Mapping[str, Any], classes: int) -> tuple[str, ...]:
    """Return the names that a model gives its classes, none if they are LABEL_0 and so on."""
    table = config.get("label2id") or {}
    names = {int(index): str(name) for name, index in table.items()}
    if sorted(names) != list(range(classes)) or all(map(_GENERIC.fullmatch, names.values())):
        return ()
    return tuple(names[index] for index in range(classes))


def _matched(source: str, names: Sequence[str], known: Sequence[str]) -> list[int]:
    places = {_plain(name): index for index, name in enumerate(known)}
    if len(places) < len(known):
        places = {name: index for index, name in enumerate(known)}
    found = [places.get(name, places.get(_plain(name))) for name in names]
    missing = [name for name, place in zip(names, found, strict=True) if place is None]
    if missing:
        some = ", ".join(repr(n) + did_you_mean(n, known).rstrip("?") for n in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"{source}: {len(missing)} of its {len(names)} classes are none of the model's "
            f"{len(known)}: {some}{more}. The model's are {', '.join(map(repr, known[:8]))}"
            f"{' ...' if len(known) > 8 else ''}; rename the classes, or give their numbers."
        )
    return [place for place in found if place is not None]


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _in_order(labels: Labels, names: Sequence[str], classes: int) -> list[int]:
    if len(names) != classes:
        raise DataError(
            f"{labels.source}: it has {len(names)} classes ({', '.join(map(repr, names[:5]))}"
            f"{' ...' if len(names) > 5 else ''}) and the model tells {classes} apart without "
            "naming them, so which is which is unknown; name the classes in the model's label2id, "
            "or give their numbers as labels."
        )
    return list(range(classes))


def _check_range(source: str, numbers: Sequence[int], classes: int) -> None:
    wrong = sorted({n for n in numbers if not 0 <= n < classes})
    if not wrong:
        return
    count = sum(1 for n in numbers if not 0 <= n < classes)
    hint = (
        " -1 marks rows without a label: name another split, such as validation."
        if wrong == [-1]
        else " Check the labels, or load a model with as many classes as the data have."
    )
    raise DataError(
        f"{source}: {count} labels lie outside the {classes} classes (0 to {classes - 1}), for "
        f"instance {', '.join(map(str, wrong[:5]))}.{hint}"
    )
