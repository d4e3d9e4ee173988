"""The upper limit of a mix's KL, and the forecasts behind it, against closed forms and loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pico
import pytest

from hawqkit.errors import InputError
from hawqkit.models.model import wrap_model
from hawqkit.records import Sensitivities, to_array
from hawqkit.sensitivity.confidence import (
    CHOOSING,
    KlLimit,
    make_forecast,
    upper_kl,
)
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.probing import ProbeSettings, probe
from hawqkit.sensitivity.scores import SCORES, sums_of
from hawqkit.sensitivity.summary import facts_of

FORMATS = ["int3-g32", "int4-g32", "none"]


@pytest.fixture(scope="module")
def table() -> Sensitivities:
    model = wrap_model(pico.llama(), name="pico")
    return probe(
        model, pico.sequences(10, 16, withheld=4), FORMATS, settings=ProbeSettings(batch=5)
    )


def unwithheld(table: Sensitivities) -> Sensitivities:
    """Return the same table, in which all sequences choose."""
    samples = replace(table.samples, withheld=np.zeros_like(table.samples.withheld))
    return replace(table, samples=samples, withheld=0)


def some_mix(table: Sensitivities) -> dict[str, str]:
    return {layer.name: FORMATS[i % 3] for i, layer in enumerate(table.layers)}


@pytest.mark.parametrize(
    ("confidence", "quantile"),
    # Abramowitz and Stegun, table 26.5.
    [(0.5, 0.0), (0.9, 1.28155), (0.95, 1.64485), (0.975, 1.95996), (0.99, 2.32635)],
)
def test_the_quantile_is_that_of_one_side_of_the_normal(confidence: float, quantile: float) -> None:
    assert KlLimit(1.0, confidence).quantile == pytest.approx(quantile, abs=5e-6)


def test_variances_of_rounding_and_of_the_prediction_add() -> None:
    limit = KlLimit(1.0, 0.9)
    rounding = upper_kl(0.2, 0.0, 0.1, limit) - 0.2
    sampling = upper_kl(0.2, 0.03, 0.0, limit) - 0.2
    both = upper_kl(0.2, 0.03, 0.1, limit) - 0.2
    assert rounding == pytest.approx(1.2815516 * 0.1 * 0.2)
    assert sampling == pytest.approx(1.2815516 * 0.03)
    assert both**2 == pytest.approx(rounding**2 + sampling**2)


def test_the_share_of_normal_draws_below_the_upper_limit_is_the_confidence() -> None:
    rng = np.random.default_rng(0)
    draws = 0.2 * (1 + 0.1 * rng.standard_normal(200_000)) + 0.03 * rng.standard_normal(200_000)
    for confidence in (0.5, 0.8, 0.9, 0.99):
        below = (draws <= upper_kl(0.2, 0.03, 0.1, KlLimit(1.0, confidence))).mean()
        # Four standard errors of a share of 200,000 draws.
        assert below == pytest.approx(confidence, abs=4 * math.sqrt(0.25 / 200_000))


def test_half_confidence_limits_the_prediction_and_needs_neither_spread_nor_error() -> None:
    assert upper_kl(0.2, math.inf, None, KlLimit(1.0)) == 0.2
    with pytest.raises(InputError, match=r"participation ratio.*sensitivity\.batch of 2"):
        upper_kl(0.2, 0.01, None, KlLimit(1.0, 0.9))
    with pytest.raises(InputError, match=r"standard error.*data of several"):
        upper_kl(0.2, math.inf, 0.1, KlLimit(1.0, 0.9))


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, "0.05", True, None])
def test_what_is_no_limit_is_refused(value: object) -> None:
    with pytest.raises(InputError, match="above 0"):
        KlLimit(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.49, 1.0, -0.9, math.nan, "0.9"])
def test_what_is_no_confidence_is_refused(confidence: object) -> None:
    with pytest.raises(InputError, match=r"from 0\.5"):
        KlLimit(0.1, confidence)  # type: ignore[arg-type]


def test_withheld_sequences_predict_where_there_are_any(table: Sensitivities) -> None:
    forecast = make_forecast(table, "token")
    mix = some_mix(table)
    found = predict(table.samples, table.layers, table.formats, mix)
    assert forecast.expect(mix) == (found.kl, found.kl_stderr)
    assert forecast.spread == found.spread
    assert (forecast.source, forecast.sequences) == ("withheld sequences", 4)


@pytest.mark.parametrize("name", ["token", "trace", "directional", "shrunk"])
def test_without_them_the_sum_predicts_with_the_jackknife_of_the_sum(
    table: Sensitivities, name: str
) -> None:
    every = unwithheld(table)
    sums, facts = sums_of(every.samples), facts_of(every)
    whole, _ = SCORES[name]({k: v.sum(0) for k, v in sums.items()}, facts), None
    mix = some_mix(every)
    columns = [FORMATS.index(mix[layer.name]) for layer in every.layers]
    rows = [i for i, c in enumerate(columns) if c != 2]  # `none` loses nothing
    scores = dict(every.scores)
    values = np.array(whole)
    values[:, 2] = 0.0
    scores[name] = replace(scores[name], values=tuple(map(tuple, values.tolist())))
    forecast = make_forecast(replace(every, scores=scores), name)

    kl, stderr = forecast.expect(mix)
    assert kl == pytest.approx(sum(whole[r, columns[r]] for r in rows), rel=1e-12)
    clusters = len(sums["count"])
    left_out = []
    for cluster in range(clusters):  # the plain jackknife, one refit after the other
        kept = {k: np.delete(v, cluster, axis=0).sum(0) for k, v in sums.items()}
        refit = SCORES[name](kept, facts)
        left_out.append(sum(refit[r, columns[r]] for r in rows))
    variance = (clusters - 1) / clusters * np.sum((left_out - np.mean(left_out)) ** 2)
    assert stderr == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert forecast.source == CHOOSING


def test_a_table_alone_predicts_with_an_error_that_is_never_too_small(table: Sensitivities) -> None:
    every = unwithheld(table)
    alone = make_forecast(replace(every, samples=None), "token")
    mix = some_mix(every)
    kl, stderr = alone.expect(mix)
    cells = [(i, FORMATS.index(mix[layer.name])) for i, layer in enumerate(every.layers)]
    score = every.scores["token"]
    assert kl == pytest.approx(sum(to_array(score.values)[c] for c in cells))
    assert stderr == pytest.approx(sum(to_array(score.stderr)[c] for c in cells))


def test_no_pairs_of_sequences_give_no_spread(table: Sensitivities) -> None:
    forecast = make_forecast(replace(table, network_participation_ratio=None), "token")
    assert forecast.spread is None
    mix = some_mix(table)
    assert forecast.upper(mix, KlLimit(1.0)) == forecast.expect(mix)[0]
    with pytest.raises(InputError, match="participation ratio"):
        forecast.upper(mix, KlLimit(1.0, 0.9))
