"""The allocation as a multiple-choice knapsack, with every budget counted in integers.

Letters in shapes: L layers, F formats, G groups of layers that share a format, R resources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hawqkit.allocation.grouping import merge_layers
from hawqkit.allocation.resources import (
    BITS,
    BOPS,
    BUDGETS,
    CostTable,
    Resource,
    SizeTable,
    bops_table,
    cost_table,
    read_limit,
    whole_limit,
)
from hawqkit.errors import BudgetError, InputError, NumericalError, Unsupported, did_you_mean
from hawqkit.formats import fitting_formats, parse_format
from hawqkit.records import Floats, Integers, Layer

Booleans = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Choose one format for each group, so that the summed score is smallest within all resources.

    Attributes:
        layers: all layers, in the model's order.
        groups: lists of layer indices that share a format.
        group_names: a layer's name, or the key that its members have in common.
        formats: names of the columns.
        scores: (G, F) predicted loss in nats, summed over members; NaN where not allowed.
        allowed: (G, F) whether every member can take the format.
        resources: the budgets; all hold together.
    """

    layers: tuple[Layer, ...]
    groups: tuple[tuple[int, ...], ...]
    group_names: tuple[str, ...]
    formats: tuple[str, ...]
    scores: Floats
    allowed: Booleans
    resources: tuple[Resource, ...]

    def mix(self, choice: Integers) -> dict[str, str]:
        """Return layer name -> format name, in the order of the layers."""
        named = {
            index: self.formats[int(column)]
            for members, column in zip(self.groups, choice, strict=True)
            for index in members
        }
        return {layer.name: named[index] for index, layer in enumerate(self.layers)}

    def objective(self, choice: Integers) -> float:
        """Return the summed score of a choice (G,), in nats, whatever the order of groups."""
        return math.fsum(self.scores[np.arange(choice.size), choice])

    def used(self, choice: Integers) -> list[int]:
        """Return what a choice (G,) takes of each resource; for `size` the true bytes."""
        return [
            r.used(choice) if r.exact is None else int(r.exact(self.mix(choice)))
            for r in self.resources
        ]

    def excess(self, choice: Integers) -> list[int]:
        """Return by how much a choice (G,) is over each limit; 0 or less is within it."""
        return [u - r.limit for u, r in zip(self.used(choice), self.resources, strict=True)]

    def fits(self, choice: Integers) -> bool:
        """Whether a choice (G,) is within every budget."""
        return all(excess <= 0 for excess in self.excess(choice))


def build_problem(
    layers: Sequence[Layer],
    formats: Sequence[str],
    scores: Floats,
    *,
    runtime: str = "transformers",
    budgets: Mapping[str, float],
    sizes: Sequence[SizeTable] = (),
    available: Booleans | None = None,
    groups: Mapping[str, str] | None = None,
    costs: Sequence[CostTable] = (),
) -> Problem:
    """Merge the layers into groups and turn every budget into integers.

    A limit x of average bits becomes floor(x * entries) bits, in exact rational arithmetic. `size`
    holds for each table of `sizes`, whose fixed part is set so that the table is exact at the mix
    of smallest formats. `bops` is counted from the layers unless a table of that name comes;
    `latency_ms`, or any other name, limits the table of that name.

    Args:
        layers: L layers; their stored dtype says what `none` takes.
        formats: F format names.
        scores: (L, F) predicted loss in nats; NaN where a format does not fit the layer.
        runtime: profile that says which layers share a format.
        budgets: name -> limit, `average_bits`, `bits_per_weight`, `size`, `bops`, `latency_ms` or
            that of a table; an empty one limits nothing.
        sizes: tables of the targets that `size` is counted for.
        available: (L, F) False where a layer must not take a format that fits it.
        groups: layer name -> key; layers with the same key share a format, whatever the runtime.
        costs: tables of other budgets.

    Raises:
        InputError: a name is unknown or comes twice, a shape is wrong, or nothing is there.
        BudgetError: a limit is not a positive number, or `size` or `latency_ms` came without what
            it limits.
        NumericalError: a score that is needed is negative, NaN or infinite.
        Unsupported: a layer or a group has no format that it can take, or `bops` came and the
            multiply-accumulates of a layer were not counted.
    """
    layers, formats = tuple(layers), tuple(formats)
    _check_names(layers, formats, budgets, costs)
    allowed = _allowed_cells(layers, formats, available)  # (L, F)
    _check_layers(layers, formats, allowed)
    if BOPS in budgets and all(table.name != BOPS for table in costs):
        costs = (*costs, bops_table(layers, formats))
    problem = group_problem(layers, formats, scores, allowed, runtime=runtime, groups=groups)
    others = [name for name in budgets if name not in BUDGETS]
    resources = tuple(
        resource
        for name in (*BUDGETS, *others)
        if name in budgets
        for resource in _resources(problem, name, budgets[name], sizes, costs)
    )
    return replace(problem, resources=resources)


def group_problem(
    layers: Sequence[Layer],
    formats: Sequence[str],
    scores: Floats,
    allowed: Booleans,
    *,
    runtime: str = "transformers",
    groups: Mapping[str, str] | None = None,
) -> Problem:
    """Return the problem without budgets; a format here is a name, whatever it stands for.

    Args:
        layers: L layers.
        formats: F names.
        scores: (L, F) >= 0; cells that are not allowed are not read.
        allowed: (L, F) whether a layer can take a format.
        runtime: profile that says which layers share a format.
        groups: layer name -> key; layers with the same key share a format.

    Raises:
        InputError: a shape is wrong, or a group is given for an unknown layer.
        NumericalError: a score that is needed is negative, NaN or infinite.
        Unsupported: a group has no format that each of its layers can take.
    """
    layers, formats = tuple(layers), tuple(formats)
    indices, names = merge_layers([layer.name for layer in layers], runtime, groups)
    merged = np.stack([allowed[members].all(axis=0) for members in indices])  # (G, F)
    _check_groups(layers, formats, indices, merged)
    table = np.asarray(scores, dtype=np.float64)
    return Problem(
        layers=layers,
        groups=tuple(map(tuple, indices)),
        group_names=tuple(names),
        formats=formats,
        scores=_group_scores(layers, formats, indices, table, merged),
        allowed=merged,
        resources=(),
    )


def cost_resource(problem: Problem, table: CostTable, asked: float) -> Resource:
    """Return the budget on what a table counts.

    Raises:
        InputError: the table has another shape.
        BudgetError: the limit is not a positive number.
    """
    costs = group_costs(problem, _of_shape(problem, f"cost table of {table.name!r}", table.costs))
    limit = whole_limit(read_limit(table.name, asked), table.scale)
    return Resource(table.name, costs, table.fixed, limit, table.unit, table.scale, float(asked))


def with_scores(problem: Problem, scores: Floats) -> Problem:
    """Return the same problem with another (L, F) table of scores.

    Raises:
        InputError: the table has another shape.
        NumericalError: a score that is needed is negative, NaN or infinite.
    """
    table = np.asarray(scores, dtype=np.float64)
    groups = [list(members) for members in problem.groups]
    merged = _group_scores(problem.layers, problem.formats, groups, table, problem.allowed)
    return replace(problem, scores=merged)


def group_costs(problem: Problem, table: Integers) -> Integers:
    """Sum an (L, F) table over the members of each group: (G, F), 0 where not allowed."""
    table = np.asarray(table, dtype=np.int64)
    summed = np.stack([table[list(members)].sum(axis=0) for members in problem.groups])
    return np.where(problem.allowed, summed, 0)


def _check_names(
    layers: Sequence[Layer],
    formats: Sequence[str],
    budgets: Mapping[str, float],
    costs: Sequence[CostTable],
) -> None:
    if not layers:
        raise InputError("no layers came: there is nothing to allocate.")
    if not formats:
        raise InputError("no formats came: give at least one.")
    for what, names in (("layer", [layer.name for layer in layers]), ("format", list(formats))):
        twice = [n for n in names if names.count(n) > 1] if len(set(names)) < len(names) else []
        if twice:
            raise InputError(f"{what} {twice[0]!r} came twice: each may come once.")
    known = list(dict.fromkeys([*BUDGETS, *(table.name for table in costs)]))
    for name in budgets:
        if name not in known:
            raise InputError(
                f"unknown budget {name!r}: known are {', '.join(known)}."
                + did_you_mean(name, known)
            )


def _allowed_cells(
    layers: Sequence[Layer], formats: Sequence[str], available: Booleans | None
) -> Booleans:
    forms = [parse_format(name) for name in formats]
    fits = np.array([[f.fits(layer.columns) for f in forms] for layer in layers], dtype=np.bool_)
    if available is None:
        return fits
    if np.shape(available) != fits.shape:
        raise InputError(f"`available` has shape {np.shape(available)}; it must be {fits.shape}.")
    return np.logical_and(fits, available)


def _check_layers(layers: Sequence[Layer], formats: Sequence[str], allowed: Booleans) -> None:
    for row in np.flatnonzero(~allowed.any(axis=1)):
        layer = layers[int(row)]
        fitting = fitting_formats(layer.columns, parse_format(formats[0]).family)
        raise Unsupported(
            f"layer {layer.name!r} ({layer.columns} columns) can take none of the formats "
            f"{', '.join(formats)}: a group size must divide the columns. Formats that fit: "
            f"{', '.join(fitting)}. Add one of them or exclude the layer."
        )


def _check_groups(
    layers: Sequence[Layer],
    formats: Sequence[str],
    groups: Sequence[Sequence[int]],
    merged: Booleans,
) -> None:
    for index in np.flatnonzero(~merged.any(axis=1)):
        members = ", ".join(layers[i].name for i in groups[int(index)])
        raise Unsupported(
            f"the layers {members} must share a format, in this runtime or as they are grouped, "
            f"but there is none of {', '.join(formats)} that each of them can take. Add a format "
            "that fits them all."
        )


def _group_scores(
    layers: Sequence[Layer],
    formats: Sequence[str],
    groups: Sequence[Sequence[int]],
    scores: Floats,
    allowed: Booleans,
) -> Floats:
    if scores.shape != (len(layers), len(formats)):
        raise InputError(
            f"the scores have shape {scores.shape}; {len(layers)} layers and {len(formats)} "
            "formats need one row a layer and one column a format."
        )
    needed = np.zeros_like(scores, dtype=np.bool_)  # (L, F)
    for members, row in zip(groups, allowed, strict=True):
        needed[list(members)] = row
    wrong = needed & ~(np.isfinite(scores) & (scores >= 0.0))
    for row, column in np.argwhere(wrong):
        value = scores[row, column]
        raise NumericalError(
            f"the score of layer {layers[row].name!r} in format {formats[column]!r} is {value:g}: "
            "a score predicts a KL divergence, so it must be finite and not negative. Look for NaN "
            "in weights or gradients, or mark the cell as not available."
        )
    summed = np.stack([scores[list(members)].sum(axis=0) for members in groups])
    return np.where(allowed, summed, np.nan)


def _resources(
    problem: Problem,
    name: str,
    asked: float,
    sizes: Sequence[SizeTable],
    costs: Sequence[CostTable],
) -> list[Resource]:
    limit = read_limit(name, asked)
    if name == "size":
        if not sizes:
            raise BudgetError(
                f"budget size = {asked} came without a target: bytes are those of the files that a "
                "target writes. Name one in `export`, or ask for bits_per_weight."
            )
        return [size_resource(problem, table, whole_limit(limit, 1), asked) for table in sizes]
    if name in BITS:
        entries = sum(layer.numel for layer in problem.layers)
        bits = group_costs(problem, cost_table(problem.layers, problem.formats, name))
        amount = whole_limit(limit, entries)
        return [Resource(name, bits, 0, amount, "bits", entries, float(asked), None)]
    found = [cost_resource(problem, table, asked) for table in costs if table.name == name]
    if not found:
        raise BudgetError(
            f"budget {name} = {asked} came without a table of what each layer takes in each "
            "format: give it a latency table."
        )
    return found


def size_resource(problem: Problem, table: SizeTable, limit: int, asked: float) -> Resource:
    """Return the budget on the bytes of one target, exact at the mix of smallest formats."""
    costs = group_costs(problem, _of_shape(problem, f"size table of {table.target!r}", table.costs))
    resource = Resource("size", costs, int(table.fixed), limit, "bytes", 1, asked, table.exact)
    # The smallest mix decides whether a limit can be met at all: there the table has to be exact.
    small = smallest_choice(problem, costs)
    off = int(table.exact(problem.mix(small))) - resource.used(small)
    return replace(resource, fixed=resource.fixed + off)


def _of_shape(problem: Problem, what: str, table: Integers) -> Integers:
    shape = (len(problem.layers), len(problem.formats))
    if np.shape(table) != shape:
        raise InputError(f"the {what} has shape {np.shape(table)}; it must be {shape}.")
    return table


def smallest_choice(problem: Problem, costs: Integers) -> Integers:
    """Return the allowed choice (G,) of least cost; ties go to the first column."""
    masked = np.where(problem.allowed, costs, np.iinfo(np.int64).max)
    return np.asarray(masked.argmin(axis=1), dtype=np.int64)


def largest_choice(problem: Problem, costs: Integers) -> Integers:
    """Return the allowed choice (G,) of greatest cost; ties go to the first column."""
    masked = np.where(problem.allowed, costs, np.iinfo(np.int64).min)
    return np.asarray(masked.argmax(axis=1), dtype=np.int64)
