"""Other ways to choose, within the same budgets: what the chosen mix has to beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawqkit.allocation.exact import solve
from hawqkit.allocation.problem import Problem, with_scores
from hawqkit.allocation.resources import SizeTable, cost_table
from hawqkit.allocation.sizes import mix_totals
from hawqkit.errors import BudgetError, InputError, did_you_mean
from hawqkit.formats import parse_format
from hawqkit.records import Floats, Integers, Mix

BASELINES = ("uniform", "ends", "weight-error", "hawq-v2")
END_BITS = 8

Found = tuple[Integers, str]


def make_baselines(
    problem: Problem,
    names: Sequence[str] = BASELINES,
    *,
    weight_error: Floats | None = None,
    trace_scores: Floats | None = None,
    size_tables: Sequence[SizeTable] = (),
) -> tuple[tuple[Mix, ...], tuple[str, ...]]:
    """Return the baselines that can be had, and a sentence for each one that cannot.

    Groups of the runtime hold for all of them, and every mix is within every budget. `objective` is
    the summed score of `problem`, whatever chose the mix, so that the figures can be compared.

    - `uniform`: the widest width within the budgets; of two formats of that width the one of lower
      score. Formats that every layer can take come first; only where none of those fits, layers
      that cannot take a format get the nearest that they can, and `about` names them.
    - `ends`: 8 bit in the first and last k blocks and in layers outside of the blocks, one format
      elsewhere; k and format are those of smallest summed score within the budgets, so that it is
      the best that this rule can do. Of a network without a chain of blocks it is the first and
      last k layers, as is usual for convolutional ones.
    - `weight-error`: the exact solution for |dW|^2 as score.
    - `hawq-v2`: the exact solution for 1/2 tr(G)/n |dW|^2 (Dong et al. 2020).

    Args:
        problem: table, groups and budgets.
        names: which baselines, in this order.
        weight_error: (L, F) |dW|^2, for `weight-error`.
        trace_scores: (L, F) the score `trace`, for `hawq-v2`.
        size_tables: targets whose bytes enter the totals.

    Raises:
        InputError: a name is unknown, or the table that a baseline needs did not come.
        NumericalError: a table holds a negative, NaN or infinite value in a cell that is needed.
    """
    tables = {"weight-error": weight_error, "hawq-v2": trace_scores}
    for name in names:
        if name not in BASELINES:
            raise InputError(
                f"unknown baseline {name!r}: known are {', '.join(BASELINES)}."
                + did_you_mean(name, BASELINES)
            )
        if name in tables and tables[name] is None:
            raise InputError(f"baseline {name!r} needs its table of scores, and none came.")
    mixes, warnings = [], []
    for name in names:
        table = tables.get(name)
        try:
            if table is not None:
                choice, about = _solved(problem, name, table)
            else:
                choice, about = _uniform(problem) if name == "uniform" else _ends(problem)
        except BudgetError as error:
            warnings.append(f"baseline {name} is left out: {error}")
            continue
        sizes = mix_totals(problem, choice, size_tables)
        mixes.append(Mix(name, about, problem.mix(choice), sizes, problem.objective(choice)))
    return tuple(mixes), tuple(warnings)


def _solved(problem: Problem, name: str, table: Floats) -> Found:
    chosen = solve(with_scores(problem, table)).choice
    if name == "hawq-v2":
        return chosen, "Exact allocation by HAWQ-V2's score, average Hessian trace times |dW|^2."
    return chosen, "Exact allocation by the weight error |dW|^2 alone."


def _uniform(problem: Problem) -> Found:
    everywhere = problem.allowed.all(axis=0)
    for columns in (np.flatnonzero(everywhere), np.flatnonzero(~everywhere)):
        candidates = [(c, _spread(problem, c)) for c in columns.tolist()]
        fitting = [(c, choice) for c, choice in candidates if problem.fits(choice)]
        if fitting:
            column, choice = max(
                fitting, key=lambda item: (_width(problem, item[0]), -problem.objective(item[1]))
            )
            about = f"Every layer in {problem.formats[column]}, the widest that fits the budget."
            return choice, about + _exceptions(problem, choice, column)
    raise BudgetError("no single format for all layers is within the budget.")


def _ends(problem: Problem) -> Found:
    where, what = _depths(problem)
    count = max((d for d in where if d is not None), default=-1) + 1
    eights = [c for c, n in enumerate(problem.formats) if parse_format(n).bits == END_BITS]
    if count < 3:
        raise BudgetError(f"the network has {count} {what}s; ends and a middle need three.")
    if not eights:
        raise BudgetError(f"the formats {', '.join(problem.formats)} have none of 8 bits.")
    spreads = [_spread(problem, c) for c in range(len(problem.formats))]
    inner = [c for c in range(len(problem.formats)) if _width(problem, c) < END_BITS]
    best: tuple[float, Integers, int, int, int] | None = None
    for k in range(1, (count - 1) // 2 + 1):
        outside = {None, *range(k), *range(count - k, count)}
        at_end = np.array([any(where[i] in outside for i in group) for group in problem.groups])
        for eight in eights:
            for column in inner:
                choice = np.where(at_end, spreads[eight], spreads[column])
                score = problem.objective(choice)
                if (best is None or score < best[0]) and problem.fits(choice):
                    best = (score, choice, k, eight, column)
    if best is None:
        raise BudgetError(f"8 bit in the first and last {what} is over the budget at every width.")
    _, choice, k, eight, column = best
    ends = what if k == 1 else f"{k} {what}s"
    others = " and the layers outside of the blocks" if what == "block" else ""
    about = (
        f"First and last {ends}{others} in {problem.formats[eight]}, all others in "
        f"{problem.formats[column]}."
    )
    return choice, about + _exceptions(problem, choice, eight, column)


def _depths(problem: Problem) -> tuple[list[int | None], str]:
    """Return how deep every layer lies, None outside of the chain, and what is counted.

    The chain is that of transformer blocks, where every block's layers stand together. Where block
    numbers come again, as in the stages of a convolutional network, it is that of the layers.
    """
    blocks = [layer.block for layer in problem.layers]
    runs = [b for i, b in enumerate(blocks) if b is not None and (i == 0 or blocks[i - 1] != b)]
    if len(set(runs)) == len(runs) >= 3:
        depth = {b: d for d, b in enumerate(sorted(runs))}
        return [None if b is None else depth[b] for b in blocks], "block"
    return list(range(len(blocks))), "layer"


def _width(problem: Problem, column: int) -> int:
    """Return the code bits of a format; `none` is as wide as the widest stored dtype."""
    stored = max(layer.dtype_bits for layer in problem.layers)
    return parse_format(problem.formats[column]).code_bits(stored)


def _spread(problem: Problem, column: int) -> Integers:
    """Put one format everywhere; groups that cannot take it get the nearest that they can.

    Nearest: the same width, else the next narrower, else the next wider; of one width the smaller.
    """
    wanted = _width(problem, column)
    bits = cost_table(problem.layers, problem.formats, "bits_per_weight")
    choice = np.full(len(problem.groups), column, dtype=np.int64)
    for group in np.flatnonzero(~problem.allowed[:, column]).tolist():
        members = list(problem.groups[group])
        options = np.flatnonzero(problem.allowed[group]).tolist()
        choice[group] = min(options, key=lambda c: _distance(problem, c, wanted, bits[members, c]))
    return choice


def _distance(
    problem: Problem, column: int, wanted: int, bits: Integers
) -> tuple[bool, int, int, int]:
    width = _width(problem, column)
    return (width > wanted, abs(width - wanted), int(bits.sum()), column)


def _exceptions(problem: Problem, choice: Integers, *columns: int) -> str:
    """Name the layers that could not take one of the formats, and what they got."""
    odd = [g for g, c in enumerate(choice.tolist()) if c not in columns]
    if not odd:
        return ""
    named = [f"{problem.group_names[g]} {problem.formats[int(choice[g])]}" for g in odd[:3]]
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return f" Where it does not fit the columns: {', '.join(named)}{more}."
