"""Table in, allocation out: one format for each layer under budgets. No torch.

Names are resolved on first use, so that a command that solves nothing does not wait for scipy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.allocation.allocate import Allocated, allocate_table, make_problem
    from hawqkit.allocation.baselines import BASELINES, make_baselines
    from hawqkit.allocation.brute import solve_by_enumeration
    from hawqkit.allocation.exact import Solution, solve
    from hawqkit.allocation.frontier import sweep_frontier, sweep_resource
    from hawqkit.allocation.latency import LatencyFile, read_latencies, shape_key
    from hawqkit.allocation.problem import Problem, build_problem, with_scores
    from hawqkit.allocation.resources import (
        BUDGETS,
        CostTable,
        Resource,
        SizeTable,
        bops_table,
        exact_costs,
    )
    from hawqkit.allocation.score_tables import ScoreTable, read_scores, table_problem
    from hawqkit.allocation.sizes import mix_totals, totals
    from hawqkit.allocation.smallest import Smallest, solve_smallest, stored_resource
    from hawqkit.allocation.stability import keep_shares, shares_of_choices

__all__ = [
    "BASELINES",
    "BUDGETS",
    "Allocated",
    "CostTable",
    "LatencyFile",
    "Problem",
    "Resource",
    "ScoreTable",
    "SizeTable",
    "Smallest",
    "Solution",
    "allocate_table",
    "bops_table",
    "build_problem",
    "exact_costs",
    "keep_shares",
    "make_baselines",
    "make_problem",
    "mix_totals",
    "read_latencies",
    "read_scores",
    "shape_key",
    "shares_of_choices",
    "solve",
    "solve_by_enumeration",
    "solve_smallest",
    "stored_resource",
    "sweep_frontier",
    "sweep_resource",
    "table_problem",
    "totals",
    "with_scores",
]

_MODULES = {
    "allocate": ("Allocated", "allocate_table", "make_problem"),
    "baselines": ("BASELINES", "make_baselines"),
    "brute": ("solve_by_enumeration",),
    "exact": ("Solution", "solve"),
    "frontier": ("sweep_frontier", "sweep_resource"),
    "latency": ("LatencyFile", "read_latencies", "shape_key"),
    "problem": ("Problem", "build_problem", "with_scores"),
    "resources": (
        "BUDGETS",
        "CostTable",
        "Resource",
        "SizeTable",
        "bops_table",
        "exact_costs",
    ),
    "score_tables": ("ScoreTable", "read_scores", "table_problem"),
    "sizes": ("mix_totals", "totals"),
    "smallest": ("Smallest", "solve_smallest", "stored_resource"),
    "stability": ("keep_shares", "shares_of_choices"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
