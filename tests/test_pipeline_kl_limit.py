"""`max_predicted_kl` and the other risk from a probed pico model, against every mix there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pico
import pytest

import hawqkit as hk
from hawqkit.allocation.grouping import merge_layers
from hawqkit.errors import BudgetError, InputError
from hawqkit.formats import parse_format
from hawqkit.models.model import wrap_model
from hawqkit.pipeline.choosing import ChoiceSettings, choose, size_tables
from hawqkit.records import Allocation, Sensitivities, to_array
from hawqkit.runtimes import RUNTIMES, Runtime
from hawqkit.sensitivity.confidence import KlLimit, upper_kl
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.probing import ProbeSettings, probe
from hawqkit.store import read_record, write_record

FORMATS = ["int3-g32", "int4-g32", "int8-g32"]
CONFIDENCES = (0.5, 0.8, 0.9, 0.99)


@pytest.fixture(scope="module", autouse=True)
def fused_runtime() -> Iterator[None]:
    """Make a runtime known that fuses layers as vllm does and, unlike it, runs every format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, "fused", Runtime("fused", RUNTIMES["vllm"].fused, "for tests"))
        yield


@pytest.fixture(scope="module")
def table() -> Sensitivities:
    """Return the table of a model whose 8 groups in vllm have 6,561 mixes."""
    model = wrap_model(pico.llama(), name="pico")
    layers = [layer for layer in model.layers if "layers" in layer.name]
    model = wrap_model(model.module, name="pico", include=[x.name for x in layers])
    return probe(
        model, pico.sequences(16, 16, withheld=6), FORMATS, settings=ProbeSettings(batch=8)
    )


@pytest.fixture(scope="module")
def seen(table: Sensitivities) -> Sensitivities:
    """Return the same table without withheld sequences: the summed score predicts."""
    return replace(table, withheld=0, samples=None)


def settings(value: float, confidence: float = 0.5, **more: object) -> ChoiceSettings:
    return ChoiceSettings(  # type: ignore[arg-type]
        **{
            "budgets": {},
            "runtime": "fused",
            "max_predicted_kl": KlLimit(value, confidence),
            **more,
        }
    )


def every_mix(table: Sensitivities) -> tuple[list[dict[str, str]], np.ndarray, np.ndarray]:
    """Return all mixes that vllm's groups allow, their stored bits and their summed scores."""
    groups, _ = merge_layers([layer.name for layer in table.layers], "fused")
    values = to_array(table.scores["token"].values)
    bits = np.array(
        [
            [parse_format(f).total_bits(x.rows, x.columns, x.dtype_bits) for f in FORMATS]
            for x in table.layers
        ]
    )
    mixes, sizes, sums = [], [], []
    for columns in itertools.product(range(3), repeat=len(groups)):
        rows = [(i, c) for members, c in zip(groups, columns, strict=True) for i in members]
        mixes.append({table.layers[i].name: FORMATS[c] for i, c in rows})
        sizes.append(sum(bits[cell] for cell in rows))
        sums.append(sum(values[cell] for cell in rows))
    return mixes, np.array(sizes), np.array(sums)


@pytest.mark.parametrize("share", [0.9, 0.3, 0.1, 0.03])
def test_no_mix_with_a_summed_score_within_the_limit_is_smaller(
    seen: Sensitivities, share: float
) -> None:
    _, sizes, sums = every_mix(seen)
    value = float(share * sums.max())
    allocation, _ = choose(seen, settings(value))
    kept = allocation.kl_budget
    assert kept is not None
    assert kept.amount == sizes[sums <= value].min()
    assert (
        kept.score_limit
        == allocation.objective
        == pytest.approx(sums[sizes <= kept.amount].min(), rel=1e-12)
    )
    assert kept.upper == kept.kl == pytest.approx(allocation.objective, rel=1e-12)
    assert kept.smaller_score is not None
    assert kept.smaller_score > value
    assert allocation.budgets == {"max_predicted_kl": value}
    assert allocation.totals.bits_per_weight * sum(x.numel for x in seen.layers) == kept.amount


@pytest.mark.parametrize("confidence", CONFIDENCES[1:])
def test_spread_alone_scales_the_limit_exactly(seen: Sensitivities, confidence: float) -> None:
    exact = tuple(tuple(0.0 for _ in FORMATS) for _ in seen.layers)
    score = replace(seen.scores["token"], stderr=exact)
    sure = replace(seen, scores={**seen.scores, "token": score})
    _, sizes, sums = every_mix(seen)
    value = float(0.2 * sums.max())
    kept = choose(sure, settings(value, confidence))[0].kl_budget
    assert kept is not None
    assert kept.spread is not None
    # With no standard error the limit is sum (1 + z spread) <= value.
    most = value / (1 + KlLimit(1.0, confidence).quantile * kept.spread)
    assert kept.amount == sizes[sums <= most].min()


@pytest.mark.parametrize("withheld", [True, False])
def test_more_confidence_never_gives_a_smaller_mix(
    table: Sensitivities, seen: Sensitivities, withheld: bool
) -> None:
    start = table if withheld else seen
    _, _, sums = every_mix(table)
    found = [choose(start, settings(0.2 * sums.max(), c))[0].kl_budget for c in CONFIDENCES]
    amounts = [kept.amount for kept in found if kept is not None]
    assert len(amounts) == len(CONFIDENCES)
    assert amounts == sorted(amounts)
    assert amounts[0] < amounts[-1]


def test_withheld_sequences_predict_and_the_next_smaller_best_mix_fails(
    table: Sensitivities,
) -> None:
    mixes, sizes, sums = every_mix(table)
    limit = KlLimit(float(0.1 * sums.max()), 0.9)
    allocation, _ = choose(table, settings(limit.value, limit.confidence))
    kept = allocation.kl_budget
    assert kept is not None

    def upper(index: int) -> float:
        p = predict(table.samples, table.layers, table.formats, mixes[index])
        return upper_kl(p.kl, p.kl_stderr, p.spread, limit)

    def best(size: int) -> int:
        inside = np.flatnonzero(sizes <= size)
        return int(inside[sums[inside].argmin()])

    assert allocation.layers == mixes[best(kept.amount)]
    assert kept.upper == pytest.approx(upper(best(kept.amount)), rel=1e-12)
    assert kept.upper <= limit.value
    below = best(int(sizes[sizes < kept.amount].max()))
    assert (kept.smaller_amount, kept.smaller_upper) == (
        sizes[below],
        pytest.approx(upper(below), rel=1e-12),
    )
    assert kept.smaller_upper is not None
    assert kept.smaller_upper > limit.value
    p = allocation.prediction
    assert p is not None
    assert (kept.kl, kept.kl_stderr, kept.spread) == (p.kl, p.kl_stderr, p.spread)
    assert kept.source == "withheld sequences"
    # Baselines are within the size that was found, so that they can be compared.
    for name in ("uniform", "hawq-v2"):
        compared = choose(
            table, settings(limit.value, limit.confidence, baselines=(name,))
        )[0].baselines  # fmt: skip
        for mix in compared:
            assert mix.totals.bits_per_weight <= allocation.totals.bits_per_weight


def test_the_bytes_of_a_target_are_made_small_where_it_is_named(seen: Sensitivities) -> None:
    mixes, _, sums = every_mix(seen)
    value = float(0.15 * sums.max())
    named = settings(value, targets=("compressed-tensors",))
    allocation, _ = choose(seen, named)
    kept = allocation.kl_budget
    assert kept is not None
    assert kept.minimized == "bytes of compressed-tensors"
    (counted,) = size_tables(["compressed-tensors"], seen.layers, seen.formats, seen.model)
    inside = [counted.exact(m) for m, s in zip(mixes, sums, strict=True) if s <= value]
    # Headers stay outside of what is made small; those of two mixes differ by less than 1 KiB.
    assert allocation.totals.size["compressed-tensors"] <= min(inside) + 1024


def test_other_budgets_hold_too_or_the_error_says_which_is_in_the_way(seen: Sensitivities) -> None:
    _, sizes, sums = every_mix(seen)
    entries = sum(layer.numel for layer in seen.layers)
    value = float(0.05 * sums.max())
    stored = sizes[sums <= value].min() / entries
    both = {"bits_per_weight": float(np.ceil(stored * 1e4) / 1e4), "average_bits": 8.0}
    allocation, _ = choose(seen, settings(value, budgets=both))
    assert allocation.kl_budget is not None
    assert allocation.kl_budget.amount == sizes[sums <= value].min()
    assert set(allocation.budgets) == {"bits_per_weight", "average_bits", "max_predicted_kl"}
    tight = {**both, "bits_per_weight": 3.6}
    with pytest.raises(BudgetError) as caught:
        choose(seen, settings(value, budgets=tight))
    least = sums[sizes <= 3.6 * entries].min()
    message = str(caught.value)
    assert "bits_per_weight = 3.6 contradict each other" in message
    assert "average_bits" not in message
    assert float(message.split("KL is ")[1].split(",")[0]) == pytest.approx(least, rel=2e-3)


def test_an_unreachable_limit_is_refused_with_the_least_kl(seen: Sensitivities) -> None:
    _, _, sums = every_mix(seen)
    with pytest.raises(BudgetError, match=r"max_predicted_kl = .* cannot be met") as caught:
        choose(seen, settings(float(sums.min() / 2)))
    least = float(str(caught.value).split("reach is ")[1].split(". Raise")[0])
    assert sums.min() <= least <= 1.002 * sums.min()


def test_the_python_surface_takes_a_number_or_a_mapping(table: Sensitivities) -> None:
    _, _, sums = every_mix(table)
    value = float(0.2 * sums.max())
    options = {"runtime": "fused", "draws": 3, "baselines": ("uniform",)}
    plain = hk.allocate(table, max_predicted_kl=value, **options)
    sure = hk.allocate(table, max_predicted_kl={"value": value, "confidence": 0.99}, **options)
    assert plain.kl_budget is not None
    assert sure.kl_budget is not None
    assert (plain.kl_budget.confidence, sure.kl_budget.confidence) == (0.5, 0.99)
    assert plain.kl_budget.amount < sure.kl_budget.amount
    assert set(sure.stability) == {layer.name for layer in table.layers}
    with pytest.raises(InputError, match="it takes a value"):
        hk.allocate(table, max_predicted_kl={"confidence": 0.9})
    with pytest.raises(InputError, match="above 0"):
        hk.allocate(table, max_predicted_kl="few")  # type: ignore[arg-type]


def test_the_record_comes_back_from_its_file(table: Sensitivities, tmp_path: Path) -> None:
    _, _, sums = every_mix(table)
    allocation, _ = choose(table, settings(float(0.2 * sums.max()), 0.9))
    write_record(tmp_path / "a.json", allocation)
    assert read_record(tmp_path / "a.json", Allocation) == allocation


@pytest.mark.parametrize("score", ["trace", "token"])
def test_the_other_risk_is_what_a_choice_at_that_risk_gives(
    table: Sensitivities, score: str
) -> None:
    plain = ChoiceSettings({"average_bits": 4.3}, score=score)
    without, _ = choose(table, plain)
    with_risk, _ = choose(table, replace(plain, risk=1.0))
    assert without.other_risk is not None
    assert with_risk.other_risk is not None
    assert (without.other_risk.risk, with_risk.other_risk.risk) == (1.0, 0.0)
    assert without.other_risk.mix.layers == with_risk.layers
    assert with_risk.other_risk.mix.layers == without.layers
    assert without.other_risk.mix.prediction is not None
    assert with_risk.prediction is not None
    assert without.other_risk.mix.prediction.kl == with_risk.prediction.kl
    name = table.layers[0].name
    column = table.formats.index(without.layers[name])
    found = table.scores[score]
    relative = without.other_risk.deviations[name]
    if score == "trace":
        ratio = table.participation_ratio[0]
        assert ratio is not None
        assert relative == pytest.approx((2 / ratio) ** 0.5)
        assert "participation ratio" in without.other_risk.deviation
    else:
        value, stderr = found.values[0][column], found.stderr[0][column]
        assert value is not None
        assert stderr is not None
        assert relative == pytest.approx(stderr / value)


def test_no_other_risk_where_its_deviation_is_not_known(table: Sensitivities) -> None:
    unknown = replace(table, participation_ratio=(None,) * len(table.layers))
    allocation, _ = choose(unknown, ChoiceSettings({"average_bits": 4.3}, score="trace"))
    assert allocation.other_risk is None
