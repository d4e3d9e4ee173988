"""`sensitivity.risk`: tables with risk, and what another risk would have chosen. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hawqkit.allocation import Allocated, SizeTable, mix_totals, solve, with_scores
from hawqkit.errors import InputError
from hawqkit.records import Floats, Mix, OtherRisk, Sensitivities, to_array
from hawqkit.sensitivity.curvature_scores import TOP_EIGENVALUE, deviation_of
from hawqkit.sensitivity.scores import ISOTROPIC, with_risk

OTHER = 1.0  # the risk that is compared with a choice without any


def risked(sensitivities: Sensitivities, name: str, risk: float) -> Floats:
    """Return a score (L, F) with `risk` standard deviations added.

    Raises:
        InputError: `risk` is positive and a deviation is not known.
    """
    score = sensitivities.scores[name]
    deviation = deviation_of(sensitivities, name)
    ratios = to_array(sensitivities.participation_ratio)
    return with_risk(name, to_array(score.values), to_array(score.stderr), ratios, risk, deviation)


def compare_risk(
    sensitivities: Sensitivities,
    found: Allocated,
    name: str,
    risk: float,
    size_tables: Sequence[SizeTable] = (),
) -> OtherRisk | None:
    """Solve once more within the same budgets: at risk 0 where there is one, else at risk 1.

    Returns None where the deviation of a layer is not known, so that no risk can be asked for.

    Args:
        sensitivities: the table.
        found: the allocation at `risk`.
        name: the score that chose.
        risk: of the allocation.
        size_tables: targets whose bytes enter the sizes.
    """
    other = 0.0 if risk else OTHER
    try:
        table = risked(sensitivities, name, other)
        unit = risked(sensitivities, name, 1.0) - risked(sensitivities, name, 0.0)
    except InputError:
        return None
    choice = solve(with_scores(found.problem, table)).choice
    layers = found.problem.mix(choice)
    sizes = mix_totals(found.problem, choice, size_tables)
    about = f"The exact allocation at risk {other:g} within the same budgets."
    mix = Mix(f"risk {other:g}", about, layers, sizes, found.problem.objective(choice))
    relative = _relative(sensitivities, name, unit, found.layers)
    what = "examples" if sensitivities.data.by_example else "text"
    return OtherRisk(other, _deviation(name, what), mix, relative)


def _deviation(name: str, what: str) -> str:
    """Say what one unit of risk adds to a score."""
    if name in ISOTROPIC:
        return "the standard deviation under random rounding, sqrt(2 / participation ratio)"
    if name == TOP_EIGENVALUE:
        return f"the standard deviation over shards of the {what}"
    return "the standard error of the score"


def _relative(
    sensitivities: Sensitivities, name: str, unit: Floats, mix: Mapping[str, str]
) -> dict[str, float | None]:
    """Return layer -> one unit of risk over the score, in the layer's format of the mix."""
    values = to_array(sensitivities.scores[name].values)
    found: dict[str, float | None] = {}
    for row, layer in enumerate(sensitivities.layers):
        column = sensitivities.formats.index(mix[layer.name])
        value, added = float(values[row, column]), float(unit[row, column])
        found[layer.name] = added / value if value > 0 and np.isfinite(added) else None
    return found
