"""The allocation as a multiple-choice knapsack, with every budget counted in integers.

Letters in shapes: L layers, F formats, G groups of layers that share a format, R resources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import BudgetError, InputError, NumericalError, Unsupported, did_you_mean
from hawqkit.formats import fitting_formats, parse_format
from hawqkit.records import Floats, Integers, Layer, Totals
from hawqkit.runtimes import group_key, merge_groups

Booleans = NDArray[np.bool_]
ExactSize = Callable[[Mapping[str, str]], int]

BUDGETS = ("average_bits", "bits_per_weight", "size")


@dataclass(frozen=True, slots=True, eq=False)
class SizeTable:
    """Bytes of the files that one target writes, as a sum over layers.

    Attributes:
        target: name of the target.
        costs: (L, F) bytes that layer l takes in format f; cells that do not exist are not read.
        fixed: bytes that no choice changes.
        exact: bytes of all files for one whole mix (layer name -> format name); headers make it
            differ a little from `fixed` plus the sum of `costs`.
    """

    target: str
    costs: Integers
    fixed: int
    exact: ExactSize


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """One budget in integers: fixed + sum over groups of costs[g, choice[g]] must be <= limit.

    Attributes:
        name: `average_bits`, `bits_per_weight` or `size`.
        costs: (G, F), 0 where the format is not allowed.
        fixed: what no choice changes.
        limit: the largest integer within what was asked.
        unit: `bits` or `bytes`.
        scale: what to divide an integer by to get the user's figure (entries of all layers, or 1).
        asked: the limit as it came.
        exact: true bytes of a whole mix, for `size`.
    """

    name: str
    costs: Integers
    fixed: int
    limit: int
    unit: str
    scale: int = 1
    asked: float = math.inf
    exact: ExactSize | None = None

    def used(self, choice: Integers) -> int:
        """Return what a choice (G,) takes by the additive table, in integers."""
        return self.fixed + int(self.costs[np.arange(choice.size), choice].sum())

    def figure(self, amount: int) -> str:
        """Write an integer amount in the user's unit, rounded up so that it can be asked for."""
        if self.unit == "bytes":
            return f"{amount:,} bytes"
        return f"{math.ceil(Fraction(amount, self.scale) * 10_000) / 10_000:g}"


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
) -> Problem:
    """Merge the layers into groups and turn every budget into integers.

    A limit x of average bits becomes floor(x * entries) bits, in exact rational arithmetic. `size`
    holds for each table of `sizes`, whose fixed part is set so that the table is exact at the mix
    of smallest formats.

    Args:
        layers: L layers; their stored dtype says what `none` takes.
        formats: F format names.
        scores: (L, F) predicted loss in nats; NaN where a format does not fit the layer.
        runtime: profile that says which layers share a format.
        budgets: `average_bits`, `bits_per_weight`, `size` -> limit; an empty one limits nothing.
        sizes: tables of the targets that `size` is counted for.
        available: (L, F) False where a layer must not take a format that fits it.

    Raises:
        InputError: a name is unknown or comes twice, a shape is wrong, or nothing is there.
        BudgetError: a limit is not a positive number, or `size` came without a target.
        NumericalError: a score that is needed is negative, NaN or infinite.
        Unsupported: a layer or a group has no format that it can take.
    """
    layers, formats = tuple(layers), tuple(formats)
    _check_names(layers, formats, budgets)
    scores = np.asarray(scores, dtype=np.float64)
    allowed = _allowed_cells(layers, formats, available)  # (L, F)
    groups = merge_groups([layer.name for layer in layers], runtime)
    names = [
        layers[g[0]].name if len(g) == 1 else group_key(layers[g[0]].name, runtime) for g in groups
    ]
    merged = np.stack([allowed[g].all(axis=0) for g in groups])  # (G, F)
    _check_groups(layers, formats, groups, allowed, merged)
    problem = Problem(
        layers=layers,
        groups=tuple(map(tuple, groups)),
        group_names=tuple(names),
        formats=formats,
        scores=_group_scores(layers, formats, groups, scores, merged),
        allowed=merged,
        resources=(),
    )
    resources = tuple(
        resource
        for name in BUDGETS
        if name in budgets
        for resource in _resources(problem, name, budgets[name], sizes)
    )
    return replace(problem, resources=resources)


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


def cost_table(layers: Sequence[Layer], formats: Sequence[str], name: str) -> Integers:
    """Return the (L, F) bits that `average_bits` or `bits_per_weight` counts; 0 where none fits.

    Raises:
        InputError: `name` is neither of the two.
    """
    if name not in BUDGETS[:2]:
        raise InputError(f"unknown bit count {name!r}: known are average_bits, bits_per_weight.")
    table = np.zeros((len(layers), len(formats)), dtype=np.int64)
    for column, form in enumerate(map(parse_format, formats)):
        for row, layer in enumerate(layers):
            if not form.fits(layer.columns):
                continue
            if name == "average_bits":
                table[row, column] = layer.numel * form.code_bits(layer.dtype_bits)
            else:
                table[row, column] = form.total_bits(layer.rows, layer.columns, layer.dtype_bits)
    return table


def group_costs(problem: Problem, table: Integers) -> Integers:
    """Sum an (L, F) table over the members of each group: (G, F), 0 where not allowed."""
    table = np.asarray(table, dtype=np.int64)
    summed = np.stack([table[list(members)].sum(axis=0) for members in problem.groups])
    return np.where(problem.allowed, summed, 0)


def totals(
    layers: Sequence[Layer], mix: Mapping[str, str], size_tables: Sequence[SizeTable] = ()
) -> Totals:
    """Return the three sizes of a mix; `size` holds the true bytes for every table.

    Raises:
        InputError: a layer has no format in the mix.
    """
    absent = [layer.name for layer in layers if layer.name not in mix]
    if absent:
        raise InputError(f"the mix has no format for {absent[0]!r}: it must name every layer.")
    codes = stored = 0
    for layer in layers:
        form = parse_format(mix[layer.name])
        codes += layer.numel * form.code_bits(layer.dtype_bits)
        stored += form.total_bits(layer.rows, layer.columns, layer.dtype_bits)
    entries = sum(layer.numel for layer in layers)
    sizes = {table.target: int(table.exact(mix)) for table in size_tables}
    return Totals(codes / entries, stored / entries, sizes)


def _check_names(
    layers: Sequence[Layer], formats: Sequence[str], budgets: Mapping[str, float]
) -> None:
    if not layers:
        raise InputError("no layers came: there is nothing to allocate.")
    if not formats:
        raise InputError("no formats came: give at least one.")
    for what, names in (("layer", [layer.name for layer in layers]), ("format", list(formats))):
        twice = [n for n in names if names.count(n) > 1] if len(set(names)) < len(names) else []
        if twice:
            raise InputError(f"{what} {twice[0]!r} came twice: each may come once.")
    for name in budgets:
        if name not in BUDGETS:
            raise InputError(
                f"unknown budget {name!r}: known are {', '.join(BUDGETS)}."
                + did_you_mean(name, BUDGETS)
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


def _check_groups(
    layers: Sequence[Layer],
    formats: Sequence[str],
    groups: Sequence[Sequence[int]],
    allowed: Booleans,
    merged: Booleans,
) -> None:
    for row in np.flatnonzero(~allowed.any(axis=1)):
        layer = layers[int(row)]
        raise Unsupported(
            f"layer {layer.name!r} ({layer.columns} columns) can take none of the formats "
            f"{', '.join(formats)}: a group size must divide the columns. Formats that fit: "
            f"{', '.join(fitting_formats(layer.columns))}. Add one of them or exclude the layer."
        )
    for index in np.flatnonzero(~merged.any(axis=1)):
        members = ", ".join(layers[i].name for i in groups[int(index)])
        raise Unsupported(
            f"the layers {members} must share a format in this runtime, but there is none of "
            f"{', '.join(formats)} that each of them can take. Add a format that fits them all."
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
    problem: Problem, name: str, asked: float, sizes: Sequence[SizeTable]
) -> list[Resource]:
    limit = _rational(name, asked)
    if name == "size":
        if not sizes:
            raise BudgetError(
                f"budget size = {asked} came without a target: bytes are those of the files that a "
                "target writes. Name one in `export`, or ask for bits_per_weight."
            )
        return [size_resource(problem, table, math.floor(limit), asked) for table in sizes]
    entries = sum(layer.numel for layer in problem.layers)
    costs = group_costs(problem, cost_table(problem.layers, problem.formats, name))
    return [
        Resource(name, costs, 0, math.floor(limit * entries), "bits", entries, float(asked), None)
    ]


def size_resource(problem: Problem, table: SizeTable, limit: int, asked: float) -> Resource:
    """Return the budget on the bytes of one target, exact at the mix of smallest formats."""
    shape = (len(problem.layers), len(problem.formats))
    if np.shape(table.costs) != shape:
        raise InputError(
            f"the size table of {table.target!r} has shape {np.shape(table.costs)}; it must be "
            f"{shape}."
        )
    costs = group_costs(problem, table.costs)
    resource = Resource("size", costs, int(table.fixed), limit, "bytes", 1, asked, table.exact)
    # The smallest mix decides whether a limit can be met at all: there the table has to be exact.
    small = smallest_choice(problem, costs)
    off = int(table.exact(problem.mix(small))) - resource.used(small)
    return replace(resource, fixed=resource.fixed + off)


def smallest_choice(problem: Problem, costs: Integers) -> Integers:
    """Return the allowed choice (G,) of least cost; ties go to the first column."""
    masked = np.where(problem.allowed, costs, np.iinfo(np.int64).max)
    return np.asarray(masked.argmin(axis=1), dtype=np.int64)


def largest_choice(problem: Problem, costs: Integers) -> Integers:
    """Return the allowed choice (G,) of greatest cost; ties go to the first column."""
    masked = np.where(problem.allowed, costs, np.iinfo(np.int64).min)
    return np.asarray(masked.argmax(axis=1), dtype=np.int64)


def _rational(name: str, asked: float) -> Fraction:
    try:
        limit = Fraction(asked) if isinstance(asked, int) else Fraction(str(float(asked)))
    except (TypeError, ValueError):
        limit = Fraction(0)
    if limit <= 0:
        raise BudgetError(f"budget {name} = {asked!r}: a limit must be a finite number above 0.")
    return limit
