"""From a table of scores and budgets to the best mix: the one call that other rooms need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqkit.allocation.exact import Solution, solve
from hawqkit.allocation.problem import Booleans, Problem, build_problem
from hawqkit.allocation.resources import BUDGETS, CostTable, SizeTable
from hawqkit.allocation.sizes import mix_totals
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
    groups: Mapping[str, str] | None = None,
    costs: Sequence[CostTable] = (),
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
        budgets: `average_bits`, `bits_per_weight`, `size` (bytes), `bops`, `latency_ms`, or the
            name of a table of `costs` -> limit; all hold together.
        runtime: profile that says which layers share a format.
        size_tables: targets whose bytes are counted in the totals.
        size_target: the target that `size` limits; None limits the files of each one.
        available: (L, F) False where a layer must not take a format that fits it.
        groups: layer name -> key; layers with the same key share a format, whatever the runtime.
        costs: tables of what every layer takes in every format; `latency_ms` needs the one of that
            name, `bops` is counted from the layers without one.
        gap: relative gap at which the solver may stop; 0 asks for the optimum.

    Raises:
        BudgetError: no budget came, or none can meet it; says what can be had.
        InputError: a name, a shape or a target is wrong.
        NumericalError: a score that is needed is negative, NaN or infinite.
        Unsupported: a layer or a group has no format that it can take, or `bops` came and the
            multiply-accumulates of a layer were not counted.
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
        groups=groups,
        costs=costs,
    )
    solution = solve(problem, gap=gap)
    taken = mix_totals(problem, solution.choice, size_tables)
    return Allocated(problem.mix(solution.choice), solution, taken, problem)


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
    groups: Mapping[str, str] | None = None,
    costs: Sequence[CostTable] = (),
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
        groups=groups,
        costs=costs,
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
