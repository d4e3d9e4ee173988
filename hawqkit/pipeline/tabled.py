"""From a table of scores that anyone made to an allocation with its proof. No torch, no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from hawqkit.allocation import Problem, ScoreTable, Solution, read_scores, solve, table_problem
from hawqkit.allocation.frontier import sweep_resource
from hawqkit.allocation.problem import cost_resource, largest_choice, smallest_choice
from hawqkit.allocation.resources import LATENCY, Resource
from hawqkit.errors import BudgetError, RecipeError
from hawqkit.recipe.values import parse_bytes, parse_milliseconds
from hawqkit.records import TableAllocation, Taken
from hawqkit.store import write_record

ALIASES = {"latency": LATENCY}  # as a run calls it
OPTION = "--budget"


def allocate_csv(
    path: str | Path, budgets: Mapping[str, float], output: str | Path | None = None
) -> TableAllocation:
    """Choose a format for every layer of a table, so that the summed score is smallest.

    Args:
        path: a CSV file with the columns `layer`, `format`, `score`, then any of `bytes`, `bops`,
            `latency_ms` and `group` (see `hawqkit.allocation.score_tables`).
        budgets: column -> limit, in the column's unit; all hold together. The frontier trades the
            first of them.
        output: where to write the result as JSON; None writes nothing.

    Raises:
        TableError: the file is wrong; every problem with its line.
        BudgetError: no budget came, a limit is not a number above 0, or nothing fits; says what can
            be had.
    """
    table = read_scores(path, list(budgets))
    if not budgets:
        raise BudgetError(
            f"{path}: no budget came: limit at least one of the columns "
            f"{', '.join(table.costs) or 'bytes, bops, latency_ms'}, as in {OPTION} bytes=5.6e6."
        )
    problem = table_problem(table, budgets)
    allocation = _describe(table, problem, solve(problem), budgets)
    if output is not None:
        write_record(output, allocation)
    return allocation


def read_limits(assignments: Sequence[str]) -> dict[str, float]:
    """Read `bytes=5.6e6`, `bytes=80MB`, `latency_ms=3.1`, `latency=3.1ms` from a command line.

    >>> read_limits(["bytes=5.6MB", "latency=3.1ms", "bops=2.1e9"])
    {'bytes': 5600000.0, 'latency_ms': 3.1, 'bops': 2100000000.0}

    Raises:
        RecipeError: every assignment that cannot be read, and those that contradict each other.
    """
    limits: dict[str, float] = {}
    problems: list[str] = []
    for assignment in assignments:
        given, equals, text = (part.strip() for part in assignment.partition("="))
        name = ALIASES.get(given, given)
        if not (given and equals and text):
            problems.append(f"{assignment}: expected COLUMN=LIMIT, as in {OPTION} bytes=5.6e6.")
            continue
        try:
            limit = _limit(name, text)
        except ValueError as error:
            problems.append(f"{given}: {error}")
            continue
        if limits.setdefault(name, limit) != limit:
            problems.append(
                f"{given}: set twice, to {limits[name]:g} and to {limit:g}, which contradict each "
                "other; keep one."
            )
    if problems:
        raise RecipeError(OPTION, problems)
    return limits


def _limit(name: str, text: str) -> float:
    limit = _number(name, text)
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"{text} is no limit; it must be a finite number above 0.")
    return limit


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        if name == "bytes":
            return float(parse_bytes(text))
        if name == LATENCY:
            return parse_milliseconds(text)
    raise ValueError(f"{text!r} is no number; write it like 5.6e6.")


def _describe(
    table: ScoreTable, problem: Problem, solution: Solution, budgets: Mapping[str, float]
) -> TableAllocation:
    limited = {resource.name: resource for resource in problem.resources}
    counted = {
        name: limited[name] if name in limited else cost_resource(problem, costs, float(2**62))
        for name, costs in table.costs.items()
    }
    layers = problem.mix(solution.choice)
    formats = [table.formats.index(name) for name in layers.values()]
    return TableAllocation(
        layers=layers,
        budgets=dict(budgets),
        taken={
            name: _taken(problem, resource, solution, budgets.get(name))
            for name, resource in counted.items()
        },
        scores={
            name: float(table.scores[row, column])
            for row, (name, column) in enumerate(zip(layers, formats, strict=True))
        },
        objective=solution.objective,
        certificate=solution.certificate,
        frontier=sweep_resource(problem, limited[next(iter(budgets))], solution.choice),
        groups=_groups(table),
        formats=table.formats,
        table=table.source,
        table_hash=table.sha256,
        warnings=_warnings(table),
    )


def _taken(problem: Problem, resource: Resource, solution: Solution, limit: float | None) -> Taken:
    def figure(choice_amount: int) -> float:
        return choice_amount / resource.scale

    return Taken(
        limit,
        figure(resource.used(solution.choice)),
        figure(resource.used(smallest_choice(problem, resource.costs))),
        figure(resource.used(largest_choice(problem, resource.costs))),
    )


def _groups(table: ScoreTable) -> dict[str, tuple[str, ...]]:
    groups: dict[str, list[str]] = {}
    for layer, key in table.groups.items():
        groups.setdefault(key, []).append(layer)
    return {key: tuple(members) for key, members in groups.items()}


def _warnings(table: ScoreTable) -> tuple[str, ...]:
    if not table.unread:
        return ()
    names = ", ".join(repr(name) for name in table.unread)
    several = len(table.unread) > 1
    return (f"the column{'s' if several else ''} {names} {'were' if several else 'was'} not read.",)
