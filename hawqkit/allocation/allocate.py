"""From a table of scores and budgets to the best mix: the one call that other rooms need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqkit.allocation.exact import Solution, solve
from hawqkit.allocation.problem import (
    BUDGETS,
    Booleans,
    Problem,
    SizeTable,
    build_problem,
    totals,
)
from hawqkit.errors import BudgetError, InputError, did_you_mean
from hawqkit.records import Floats, Layer, Totals


@dataclass(frozen=True, slots=True, eq=False)
class Allocated:
    """The best mix (layer name -> format name), its proof, its sizes, and the problem it solves."""

    layers: dict[str, str]
    solution: Solution
    totals: Totals
    problem: Problem


def allocate_table(
    layers: Sequence[Layer],
    formats: Sequence[str],
    scores: Floats,
    *,
    budgets: Mapping[str, float],
    runtime: str = "transformers",
    size_tables: Sequence[SizeTable] = (),
    size_target: str | None = None,
    available: Booleans | None = None,
    gap: float = 0.0,
) -> Allocated:
    """Choose the format of every layer so that the summed score is smallest within all budgets.

    >>> import numpy as np
    >>> layers = [Layer(name, "linear", 8, 64, "float32") for name in ("up", "down")]
    >>> scores = np.array([[0.9, 0.2, 0.01], [0.3, 0.1, 0.01]])  # (layers, formats), nats
    >>> formats = ["int2-g64", "int4-g64", "int6-g64"]
    >>> found = allocate_table(layers, formats, scores, budgets={"average_bits": 4})
    >>> found.layers, round(found.solution.objective, 6), found.totals.average_bits
    ({'up': 'int4-g64', 'down': 'int4-g64'}, 0.3, 4.0)

    Args:
        layers: L layers.
        formats: F format names.
        scores: (L, F) predicted loss in nats; NaN where a format does not fit the layer.
        budgets: `average_bits`, `bits_per_weight`, `size` (bytes) -> limit; all hold together.
        runtime: profile that says which layers share a format.
        size_tables: targets whose bytes are counted in the totals.
        size_target: the target that `size` limits; None limits the files of each one.
        available: (L, F) False where a layer must not take a format that fits it.
        gap: relative gap at which the solver may stop; 0 asks for the optimum.

    Raises:
        BudgetError: no budget came, or none can meet it; says what can be had.
        InputError: a name, a shape or a target is wrong.
        NumericalError: a score that is needed is negative, NaN or infinite.
        Unsupported: a layer or a group has no format that it can take.
    """
    if not budgets:
        raise BudgetError(f"no budget came: give at least one of {', '.join(BUDGETS)}.")
    problem = make_problem(
        layers,
        formats,
        scores,
        budgets=budgets,
        runtime=runtime,
        size_tables=size_tables,
        size_target=size_target,
        available=available,
    )
    solution = solve(problem, gap=gap)
    mix = problem.mix(solution.choice)
    return Allocated(mix, solution, totals(problem.layers, mix, size_tables), problem)


def make_problem(
    layers: Sequence[Layer],
    formats: Sequence[str],
    scores: Floats,
    *,
    budgets: Mapping[str, float],
    runtime: str = "transformers",
    size_tables: Sequence[SizeTable] = (),
    size_target: str | None = None,
    available: Booleans | None = None,
) -> Problem:
    """Return the problem that `allocate_table` solves; without budgets it limits nothing."""
    return build_problem(
        layers,
        formats,
        scores,
        runtime=runtime,
        budgets=budgets,
        sizes=_limited_tables(size_tables, size_target),
        available=available,
    )


def _limited_tables(tables: Sequence[SizeTable], target: str | None) -> Sequence[SizeTable]:
    if target is None:
        return tables
    known = [table.target for table in tables]
    if target not in known:
        raise InputError(
            f"size is to be counted for {target!r}, whose size table did not come; came: "
            f"{', '.join(known) or 'none'}." + did_you_mean(target, known)
        )
    return [table for table in tables if table.target == target]
