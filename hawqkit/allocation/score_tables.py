"""A table of scores that anyone may have made: which layer loses how much in which format.

    layer,format,score,bytes,bops,latency_ms,group
    conv1,int4,0.31,1152,57802752,0.21,
    conv1,int8,0.02,2304,231211008,0.36,

`layer`, `format` and `score` must be there. `bytes`, `bops`, `latency_ms`, or any other column that
a budget names, says what the layer takes in that format. Layers with the same non-empty `group`
share a format. Names of formats are free. A layer that lacks a format cannot take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from hawqkit.allocation.csv_files import CsvFile, read_csv
from hawqkit.allocation.problem import Booleans, Problem, cost_resource, group_problem
from hawqkit.allocation.resources import BOPS, LATENCY, CostTable, exact_costs
from hawqkit.errors import did_you_mean
from hawqkit.records import Floats, Layer

NAMES = ("layer", "format", "score")
COSTS = ("bytes", BOPS, LATENCY)
GROUP = "group"


@dataclass(frozen=True, slots=True, eq=False)
class ScoreTable:
    """What a file says.

    Attributes:
        source: the file, as it was named.
        sha256: of its bytes.
        layers: L names, in the order of the file.
        formats: F names, likewise.
        scores: (L, F) >= 0; NaN where the file has no row.
        available: (L, F) whether it has one.
        groups: layer -> key, for layers with one.
        costs: column -> what each choice takes, in integers.
        unread: columns that nothing was made of.
    """

    source: str
    sha256: str
    layers: tuple[str, ...]
    formats: tuple[str, ...]
    scores: Floats
    available: Booleans
    groups: dict[str, str]
    costs: dict[str, CostTable]
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cell:
    """One row of the file; numbers that cannot be read are None."""

    line: int
    layer: str
    format: str
    group: str
    score: Fraction | None
    costs: dict[str, Fraction | None]


def read_scores(path: str | Path, limits: Sequence[str] = ()) -> ScoreTable:
    """Read a table of scores, and refuse everything that is wrong with it at once.

    Args:
        path: a CSV file; see the module for its columns.
        limits: names of budgets, each of which needs a column.

    Raises:
        TableError: the file cannot be read, a column is missing, a cell is empty or no number of at
            least 0, a row stands twice, a layer is in two groups, or the layers of a group have no
            format in common; each with its line.
        InputError: the sums of a column are beyond 64-bit integers.
    """
    file = read_csv(path)
    file.require(NAMES)
    columns = [name for name in file.columns if name in COSTS or name in limits]
    columns = [name for name in columns if name not in (*NAMES, GROUP)]
    _require_limits(file, limits)
    cells = [
        _Cell(
            row.line,
            file.text(row, "layer"),
            file.text(row, "format"),
            row.cells.get(GROUP, ""),
            file.number(row, "score"),
            {name: file.number(row, name) for name in columns},
        )
        for row in file.rows
    ]
    named = [cell for cell in cells if cell.layer and cell.format]
    _check_rows(file, named)
    groups = _groups(file, named)
    file.refuse()
    read = {*NAMES, GROUP, *columns}
    return _table(file, cells, groups, columns, [c for c in file.columns if c not in read])


def table_problem(table: ScoreTable, budgets: Mapping[str, float]) -> Problem:
    """Return the allocation problem of a table.

    Args:
        table: from `read_scores`, which was told the names of the budgets.
        budgets: column -> limit, in the column's unit; all hold together.

    Raises:
        BudgetError: a limit is not a number above 0.
    """
    # The solver knows names alone; of a row in a table there is no shape to tell.
    layers = [Layer(name, "table", 1, 1, "float32") for name in table.layers]
    problem = group_problem(
        layers, table.formats, table.scores, table.available, groups=table.groups
    )
    resources = tuple(
        cost_resource(problem, table.costs[name], limit) for name, limit in budgets.items()
    )
    return replace(problem, resources=resources)


def _require_limits(file: CsvFile, limits: Sequence[str]) -> None:
    there = [name for name in file.columns if name not in (*NAMES, GROUP)]
    for name in limits:
        if name not in there:
            columns = ", ".join(there) or "none"
            file.complain(
                1,
                f"line 1: the budget {name!r} needs a column of that name; columns that can be "
                f"limited: {columns}." + did_you_mean(name, there),
            )


def _check_rows(file: CsvFile, cells: Sequence[_Cell]) -> None:
    seen: dict[tuple[str, str], int] = {}
    for cell in cells:
        first = seen.setdefault((cell.layer, cell.format), cell.line)
        if first != cell.line:
            file.complain(
                cell.line,
                f"line {cell.line}: layer {cell.layer!r} in format {cell.format!r} stands on line "
                f"{first} already; keep one of them.",
            )


def _groups(file: CsvFile, cells: Sequence[_Cell]) -> dict[str, str]:
    """Return layer -> group; complain of layers in two, and of groups with nothing in common."""
    groups: dict[str, tuple[str, int]] = {}
    for cell in cells:
        group, line = groups.setdefault(cell.layer, (cell.group, cell.line))
        if group != cell.group:
            file.complain(
                cell.line,
                f"line {cell.line}: layer {cell.layer!r} is in group {cell.group!r} here and in "
                f"{group!r} on line {line}; a layer has one group in all its rows.",
            )
    formats: dict[str, set[str]] = {}
    for cell in cells:
        formats.setdefault(cell.layer, set()).add(cell.format)
    members: dict[str, list[str]] = {}
    for layer, (group, _) in groups.items():
        if group:
            members.setdefault(group, []).append(layer)
    for group, layers in members.items():
        if not set.intersection(*(formats[layer] for layer in layers)):
            lines = [groups[layer][1] for layer in layers]
            file.complain(
                lines[0],
                f"line {lines[0]}: the layers of group {group!r} ({', '.join(layers)}) must share "
                "a format, and no format stands in the rows of all of them.",
            )
    return {layer: group for layer, (group, _) in groups.items() if group}


def _table(
    file: CsvFile,
    cells: Sequence[_Cell],
    groups: dict[str, str],
    columns: Sequence[str],
    unread: Sequence[str],
) -> ScoreTable:
    layers = tuple(dict.fromkeys(cell.layer for cell in cells))
    formats = tuple(dict.fromkeys(cell.format for cell in cells))
    row_of = {name: row for row, name in enumerate(layers)}
    column_of = {name: column for column, name in enumerate(formats)}
    scores = np.full((len(layers), len(formats)), np.nan)
    amounts: dict[str, list[list[Fraction | None]]] = {
        name: [[None] * len(formats) for _ in layers] for name in columns
    }
    for cell in cells:
        row, column = row_of[cell.layer], column_of[cell.format]
        assert cell.score is not None, "a file without problems has every score"
        scores[row, column] = float(cell.score)
        for name, amount in cell.costs.items():
            amounts[name][row][column] = amount
    return ScoreTable(
        source=file.source,
        sha256=file.sha256,
        layers=layers,
        formats=formats,
        scores=scores,
        available=np.isfinite(scores),
        groups=groups,
        costs={name: exact_costs(name, table) for name, table in amounts.items()},
        unread=tuple(unread),
    )
