"""What was asked of the choice, how it was kept, and what another risk would choose."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records import Allocation, KlBudget, Prediction, Sensitivities
from hawqkit.report.comparison import compare
from hawqkit.report.nouns import TEXT, Nouns
from hawqkit.report.wording import (
    clean,
    megabytes,
    percent,
    plural,
    significant,
    with_error,
)


@dataclass(frozen=True, slots=True)
class Change:
    """A layer that another risk stores in another format.

    Attributes:
        layer: its name.
        chosen: its format in the allocation.
        other: its format at the other risk.
        deviation: what one unit of risk adds to its score, relative, in the chosen format.
        ratio: its participation ratio.
    """

    layer: str
    chosen: str
    other: str
    deviation: str
    ratio: str


@dataclass(frozen=True, slots=True)
class RiskView:
    """The choice with and without risk.

    Attributes:
        sentences: what was compared, and what came out.
        heads: what the columns of formats are called.
        changes: every layer that changes.
    """

    sentences: tuple[str, ...]
    heads: tuple[str, str]
    changes: tuple[Change, ...]


def spread_sentence(allocation: Allocation | None) -> str:
    """Say in words how far the KL of a mix scatters under random rounding; empty if not known."""
    found = [row.prediction for row in compare(allocation, None) if row.prediction is not None]
    spread = found[0].spread if found else None
    if spread is None and allocation is not None and allocation.kl_budget is not None:
        spread = allocation.kl_budget.spread
    if spread is None:
        return ""
    return (
        f"Spread {percent(spread)}: by the luck of rounding alone, the KL of a mix comes out so "
        "much above or below its prediction (one standard deviation if rounding errors are "
        "random). The ± says how well the prediction itself is known."
    )


def budget_sentences(allocation: Allocation, nouns: Nouns = TEXT) -> tuple[str, ...]:
    """Say what was asked for, and how a limit on the KL was kept."""
    kept = allocation.kl_budget
    asked = " and ".join(_asked(name, x, kept) for name, x in allocation.budgets.items())
    first = (
        f"The budget was {asked}; layers share formats as the runtime "
        f"“{clean(allocation.runtime)}” needs it."
    )
    return (first, *(_kept(kept, nouns) if kept is not None else ()))


def risk_view(sensitivities: Sensitivities, allocation: Allocation | None) -> RiskView | None:
    """Return what another risk would change, None where nothing was compared."""
    if allocation is None or allocation.other_risk is None:
        return None
    other = allocation.other_risk
    ratios = {
        layer.name: ratio
        for layer, ratio in zip(
            sensitivities.layers, sensitivities.participation_ratio, strict=True
        )
    }
    changes = tuple(
        Change(
            name,
            chosen,
            other.mix.layers[name],
            percent(other.deviations.get(name)),
            significant(ratios.get(name), 3),
        )
        for name, chosen in allocation.layers.items()
        if other.mix.layers.get(name, chosen) != chosen
    )
    now, then = f"risk {allocation.risk:g}", f"risk {other.risk:g}"
    what = (
        f"This allocation was chosen at {now}. One unit of risk adds {clean(other.deviation)} to "
        f"every score “{clean(allocation.score)}”, so that layers whose loss is least certain get "
        "more bits."
    )
    count = len(allocation.layers)
    outcome = f"At {then}, within the same budgets, none of the {count} layers would change."
    if changes:
        outcome = (
            f"At {then}, within the same budgets, {plural(len(changes), 'layer')} of {count} would "
            "be stored in another format"
            f"{_compared(allocation.prediction, other.mix.prediction, then)}."
        )
    return RiskView((what, outcome), (now, then), changes)


def _compared(now: Prediction | None, then: Prediction | None, name: str) -> str:
    if now is None or then is None:
        return ""
    return (
        f"; the predicted KL is {with_error(now.kl, now.kl_stderr)} nats as it is and "
        f"{with_error(then.kl, then.kl_stderr)} nats at {name}"
    )


def _asked(name: str, limit: float, kept: KlBudget | None) -> str:
    if name == "size":
        return f"{megabytes(int(limit))} MB ({int(limit):,} bytes)"
    if name == "bops":
        return f"{limit:,.6g} bit operations for one example"
    if name == "latency_ms":
        return f"{limit:g} ms by the latency table"
    if name == "max_predicted_kl":
        sure = f" with confidence {kept.confidence:g}" if kept and kept.quantile else ""
        return f"a predicted KL of at most {significant(limit)} nats{sure}, in the smallest mix"
    return f"{significant(limit)} {clean(name).replace('_', ' ')}"


def _kept(kept: KlBudget, nouns: Nouns) -> list[str]:
    predicted = with_error(kept.kl, kept.kl_stderr)
    source = f"from {nouns.count(kept.sequences)}, {nouns.name(kept.source)}"
    if kept.quantile:
        first = (
            f"The KL is predicted as {predicted} nats ({source}). With the spread of "
            f"{percent(kept.spread)} under random rounding it stays below "
            f"{significant(kept.upper)} nats with confidence {kept.confidence:g}: prediction + "
            f"{significant(kept.quantile, 3)} √((spread × prediction)² + standard error²)."
        )
    else:
        first = f"The KL is predicted as {predicted} nats ({source})."
    if kept.smaller_amount is None or kept.smaller_upper is None or kept.smaller_score is None:
        return [first, "No mix is smaller: every layer is in its smallest format."]
    gap = (kept.amount - kept.amount_bound) / kept.amount if kept.amount > 0 else 0.0
    proven = f"less than {kept.amount_bound:,} (relative gap {significant(gap, 2)})"
    second = (
        f"It takes {kept.amount:,} {clean(kept.minimized)}. No mix of {proven} has a summed score "
        f"of {significant(kept.score_limit)} nats or less: the best, of {kept.smaller_amount:,}, "
        f"has {significant(kept.smaller_score)}, and its KL is only known to stay below "
        f"{significant(kept.smaller_upper)}."
    )
    return [first, second]
