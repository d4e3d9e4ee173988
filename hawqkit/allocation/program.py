"""The integer program of a knapsack, given to HiGHS."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from hawqkit.allocation.relaxation import Knapsack, cost_rows, one_each
from hawqkit.errors import HawqkitError
from hawqkit.records import Integers

SOLVER = "HiGHS (scipy.optimize.milp)"
# Below sums of this size HiGHS's absolute tolerances (1e-6) end the search at mixes that are not
# optimal: scores are lifted to it, whatever their unit.
TARGET_SUM = 1e6
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def _stray_output_dropped() -> Iterator[None]:
    """Send file descriptor 1 to nowhere for a moment.

    HiGHS in scipy 1.17 writes a debug line ("HighsMipSolverData::transformNewIntegerFeasible...")
    to C's stdout although its output is off; it would stand between the lines of a table that
    another program reads. C buffers of its own, so both ends have to be flushed. The lock keeps two
    threads from restoring each other's redirection.
    """
    with _ONE_AT_A_TIME:
        library = ctypes.CDLL(None)
        library.fflush(None)
        try:
            kept = os.dup(1)
        except OSError:  # the process has no standard output
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            yield
        finally:
            library.fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What HiGHS found: a choice (G,) or None, and a proven bound in the unit of the scores."""

    choice: Integers | None
    bound: float
    finished: bool


def run_program(
    knapsack: Knapsack, *, about: float, gap: float = 0.0, time_limit: float | None = None
) -> Outcome:
    """Minimize the summed score over the cells that are kept.

    Args:
        knapsack: scores, costs, limits.
        about: the expected sum, which is scaled to 1e6.
        gap: relative gap at which HiGHS may stop.
        time_limit: seconds after which HiGHS stops with what it has; None for no limit.

    Raises:
        HawqkitError: HiGHS failed for another reason than a limit or an empty feasible set.
    """
    kept = knapsack.kept
    cells = np.argwhere(kept)  # (cells, 2)
    scale = TARGET_SUM / about if about > 0.0 else 1.0
    constraints = [LinearConstraint(one_each(cells, kept.shape[0]), 1.0, 1.0)]
    if len(knapsack.slack):
        rows = cost_rows(knapsack, cells)
        constraints.append(LinearConstraint(rows, -np.inf, knapsack.slack.astype(np.float64)))
    options: dict[str, float] = {"mip_rel_gap": gap}
    if time_limit is not None:
        options["time_limit"] = time_limit
    with _stray_output_dropped():
        result = milp(
            knapsack.scores[kept] * scale,
            integrality=np.ones(len(cells)),
            bounds=Bounds(0.0, 1.0),
            constraints=constraints,
            options=options,
        )
    if result.status == _INFEASIBLE:
        return Outcome(None, math.inf, finished=True)
    if result.status not in (_OPTIMAL, _LIMIT):
        raise HawqkitError(f"HiGHS could not solve the allocation: {result.message}")
    bound = -math.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) / scale
    if result.x is None:
        return Outcome(None, bound, finished=False)
    shares = np.full(kept.shape, -1.0)
    shares[kept] = result.x
    choice = np.asarray(shares.argmax(axis=1), dtype=np.int64)
    return Outcome(choice, bound, finished=result.status == _OPTIMAL)
