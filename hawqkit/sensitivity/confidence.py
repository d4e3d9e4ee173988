"""How large the KL of a mix may be, with a confidence: what `budget.max_predicted_kl` limits.

Letters: L layers, F formats, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from hawqkit.errors import InputError
from hawqkit.records import Floats, Samples, Sensitivities, to_array
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.scores import SCORES, sums_of
from hawqkit.sensitivity.summary import facts_of

MAX_PREDICTED_KL = "max_predicted_kl"
DEFAULT_CONFIDENCE = 0.5

CHOOSING = "the scores that choose"

Mix = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KlLimit:
    """A limit on the predicted KL of a mix, and how sure it must hold.

    >>> KlLimit(0.05).confidence, str(KlLimit(0.05, 0.9))
    (0.5, 'max_predicted_kl = 0.05 at confidence 0.9')

    Attributes:
        value: in nats, above 0.
        confidence: from 0.5, the prediction itself, to below 1.

    Raises:
        InputError: one of them is out of its range.
    """

    value: float
    confidence: float = DEFAULT_CONFIDENCE

    def __post_init__(self) -> None:
        """Refuse what is no limit."""
        if not (_is_number(self.value) and 0 < self.value < math.inf):
            raise InputError(f"{MAX_PREDICTED_KL} = {self.value!r}: a limit is a number above 0.")
        if not (_is_number(self.confidence) and 0.5 <= self.confidence < 1):
            raise InputError(
                f"{MAX_PREDICTED_KL}: confidence {self.confidence!r} is out of range; it goes from "
                "0.5, the prediction itself, to below 1, as in 0.9."
            )

    @property
    def quantile(self) -> float:
        """The one-sided quantile z of the standard normal: 0 at confidence 0.5, 1.28 at 0.9."""
        return NormalDist().inv_cdf(self.confidence)

    def __str__(self) -> str:
        """Name the limit as a message does."""
        sure = f" at confidence {self.confidence:g}" if self.confidence > 0.5 else ""
        return f"{MAX_PREDICTED_KL} = {self.value:g}{sure}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def upper_kl(kl: float, stderr: float, spread: float | None, limit: KlLimit) -> float:
    """Return what the KL of a mix stays below with the limit's confidence.

        upper = kl + z sqrt((spread kl)^2 + stderr^2)

    `spread = sqrt(2 / participation ratio)` of the whole network is how far, relatively, dW' G dW
    of random rounding errors lies from its mean; `stderr` is how well the mean is known. The two
    are independent, so that their variances add; z is the quantile of the confidence. At
    confidence 0.5 z is 0 and the upper limit is the prediction itself.

    >>> round(upper_kl(0.2, 0.006, 0.03, KlLimit(0.3, 0.9)), 5)
    0.21087

    Args:
        kl: predicted, in nats.
        stderr: its standard error, in nats.
        spread: relative, None where the participation ratio is not known.
        limit: whose confidence counts.

    Raises:
        InputError: a confidence above 0.5 needs the spread or the error, and it is not known.
    """
    z = limit.quantile
    if z == 0:
        return kl
    if spread is None:
        raise InputError(
            f"{limit} needs the participation ratio of the whole network, and this run has no "
            "pairs for it: probe with sensitivity.batch of 2 or more, or ask for confidence 0.5."
        )
    if not math.isfinite(stderr):
        raise InputError(
            f"{limit} needs the standard error of the prediction, and a single document or cluster "
            "has none: calibrate on data of several documents or clusters, or ask for "
            "confidence 0.5."
        )
    return kl + z * math.hypot(spread * kl, stderr)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicts the KL of whole mixes, in nats with a standard error.

    Attributes:
        expect: mix -> (KL, standard error).
        spread: sqrt(2 / participation ratio) of the whole network, None where it is not known.
        source: what predicts, `withheld images` say.
        sequences: how many of them.
    """

    expect: Callable[[Mix], tuple[float, float]]
    spread: float | None
    source: str
    sequences: int

    def upper(self, mix: Mix, limit: KlLimit) -> float:
        """Return what the KL of a mix stays below with the limit's confidence."""
        return upper_kl(*self.expect(mix), self.spread, limit)


def make_forecast(sensitivities: Sensitivities, name: str) -> Forecast:
    """Return how mixes are predicted: from withheld sequences, else from the score that chooses.

    Without withheld sequences the KL is the summed score, which the choice has seen: too low on
    average (the winner's curse). Its standard error is the jackknife of the whole sum where the
    samples are there; else the sum of the cells' errors, which is never too small, whatever their
    correlation.

    Args:
        sensitivities: the table, with its samples where they are known.
        name: the score that chooses.
    """
    ratio = sensitivities.network_participation_ratio
    spread = math.sqrt(2 / ratio) if ratio else None
    samples: Samples | None = sensitivities.samples
    layers, formats = sensitivities.layers, sensitivities.formats
    if samples is not None and sensitivities.withheld:

        def withheld(mix: Mix) -> tuple[float, float]:
            found = predict(samples, layers, formats, mix)
            return found.kl, found.kl_stderr

        source = f"withheld {sensitivities.data.many}"
        return Forecast(withheld, spread, source, sensitivities.withheld)
    score = sensitivities.scores[name]
    values, stderr = to_array(score.values), to_array(score.stderr)
    replicates = None if samples is None else _replicates(sensitivities, samples, name)
    columns = {form: index for index, form in enumerate(formats)}
    rows = np.arange(len(layers))

    def summed(mix: Mix) -> tuple[float, float]:
        chosen = np.array([columns[mix[layer.name]] for layer in layers])
        kl = math.fsum(values[rows, chosen])
        if replicates is None:
            return kl, float(stderr[rows, chosen].sum())
        return kl, _jackknifed(replicates[:, rows, chosen].sum(1))

    return Forecast(summed, spread, CHOOSING, sensitivities.data.sequences)


def _replicates(sensitivities: Sensitivities, samples: Samples, name: str) -> Floats | None:
    """Return the score's table without each cluster in turn, (C, L, F); None for other scores."""
    if name not in SCORES:
        return None
    sums = sums_of(samples)
    left_out = {key: value.sum(0) - value for key, value in sums.items()}
    table = SCORES[name](left_out, facts_of(sensitivities))
    # A cell in which nothing is rounded is exactly zero in the table, whatever the formula says.
    zero = to_array(sensitivities.scores[name].values) == 0
    return np.where(zero, 0.0, table)


def _jackknifed(replicates: Floats) -> float:
    """Return the jackknife's standard error from (C,) replicates, infinite for a single cluster."""
    count = len(replicates)
    if count < 2:
        return math.inf
    spread = ((replicates - replicates.mean()) ** 2).sum()
    return float(np.sqrt((count - 1) / count * spread))
