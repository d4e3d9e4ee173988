"""Measuring the scores of the true Hessian: resumed, and input that is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from curvature_cases import EXHAUSTING, measured, small_gpt2, text

from hawqkit.errors import DataError, InputError, StateMismatch
from hawqkit.sensitivity.curvature_probe import CurvatureProbe
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES


@pytest.mark.parametrize("left", [0, 1, 3])
def test_a_measurement_that_was_cut_off_ends_with_the_same_bits(tmp_path: Path, left: int) -> None:
    settings = dataclasses.replace(EXHAUSTING, max_probes=20, max_products=20)
    whole = measured(settings, tmp_path / "whole")
    model = small_gpt2()
    probe = CurvatureProbe(model, text(), model.layers, CURVATURE_SCORES, settings, tmp_path / "j")
    assert len(probe.pieces) == 4
    for piece in probe.pieces[:left]:
        assert probe.measure(piece)
    again = CurvatureProbe(model, text(), model.layers, CURVATURE_SCORES, settings, tmp_path / "j")
    assert [again.measure(piece) for piece in again.pieces] == [i >= left for i in range(4)]
    assert again.finish() == whole == measured(settings)


def test_a_score_is_added_to_those_that_are_there(tmp_path: Path) -> None:
    model, data = small_gpt2(), text()
    settings = dataclasses.replace(EXHAUSTING, max_probes=20, max_products=20)
    first = CurvatureProbe(model, data, model.layers, ["top-eigenvalue"], settings, tmp_path)
    for piece in first.pieces:
        first.measure(piece)
    both = CurvatureProbe(model, data, model.layers, CURVATURE_SCORES, settings, tmp_path)
    fresh = {piece.score for piece in both.pieces if both.measure(piece)}
    assert fresh == {"hessian-trace"}
    assert both.finish().eigenvalues == first.finish().eigenvalues


def test_another_setting_is_refused_with_what_differs(tmp_path: Path) -> None:
    model, data = small_gpt2(), text()
    CurvatureProbe(model, data, model.layers, ["hessian-trace"], EXHAUSTING, tmp_path)
    other = dataclasses.replace(EXHAUSTING, length=6)
    with pytest.raises(StateMismatch, match="length: there 7, now 6"):
        CurvatureProbe(model, data, model.layers, ["hessian-trace"], other, tmp_path)


@pytest.mark.parametrize(
    ("scores", "change", "error", "words"),
    [
        (["hesian-trace"], {}, InputError, "Did you mean 'hessian-trace'"),
        (["trace"], {}, InputError, "from the dual probe anyhow"),
        ([], {}, InputError, "no score was named"),
        (["hessian-trace"], {"shards": 4}, InputError, "use fewer shards"),
        (["hessian-trace"], {"max_probes": 1}, InputError, "must be 2 or more"),
        (["hessian-trace"], {"max_products": 1}, InputError, "must be 2 or more"),
        (["hessian-trace"], {"relative_error": 0.0}, InputError, "above 0"),
        (["hessian-trace"], {"sequences": 4}, DataError, "4 were asked, and 3 of"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    scores: list[str], change: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = small_gpt2()
    settings = dataclasses.replace(EXHAUSTING, **change)
    with pytest.raises(error, match=words):
        CurvatureProbe(model, text(), model.layers, scores, settings)
