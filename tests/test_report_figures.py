from __future__ import annotations

import builtins
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from synthetic import Run, make_run, tiny_run

from hawqkit.errors import Unsupported
from hawqkit.records import Layer
from hawqkit.report import figures
from hawqkit.report.arrangement import arrange
from hawqkit.report.comparison import score_used
from hawqkit.report.style import light

Draw = Callable[[Run], str]
DRAW: dict[str, Draw] = {
    "result": lambda r: figures.result_figure(r.allocation, r.validation),
    "bits": lambda r: figures.bits_figure(r.sensitivities, r.allocation),
    "heat": lambda r: figures.heat_figure(
        r.sensitivities, score_used(r.sensitivities, r.allocation), r.allocation
    ),
    "frontier": lambda r: figures.frontier_figure(r.frontier),
    "agreement": lambda r: figures.agreement_figure(r.allocation, r.validation),
    "stability": lambda r: figures.stability_figure(r.sensitivities, r.allocation),
    "depth": lambda r: figures.depth_figure(r.sensitivities),
}


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(4)


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


@pytest.mark.parametrize("name", DRAW)
def test_figure_is_well_formed_and_the_same_twice(name: str, run: Run) -> None:
    svg = DRAW[name](run)
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg")
    assert root.get("aria-label")
    assert root.get("viewBox")
    assert svg == DRAW[name](run)
    assert "<metadata" not in svg


@pytest.mark.parametrize("name", DRAW)
def test_smallest_run_can_be_drawn(name: str) -> None:
    ET.fromstring(DRAW[name](tiny_run()))


def test_bits_figure_writes_the_bits_of_every_layer(run: Run) -> None:
    svg = DRAW["bits"](run)
    cells = [t for t in texts(svg) if t in {"2", "3", "4", "5", "6", "8"}]
    ticks = [str(b) for b in range(4)]
    expected = [f.removeprefix("int")[0] for f in run.allocation.layers.values()]
    for bits in "23456 8".replace(" ", ""):
        assert cells.count(bits) == expected.count(bits) + ticks.count(bits)


def test_stability_figure_writes_percentages(run: Run) -> None:
    name = run.sensitivities.layers[0].name
    odd = replace(run.allocation, stability={**run.allocation.stability, name: 0.37})
    assert "37" in texts(figures.stability_figure(run.sensitivities, odd))


def test_result_figure_shows_every_mix_on_every_text(run: Run) -> None:
    shown = texts(DRAW["result"](run))
    assert {"chosen", "uniform", "ends", "weight-error", "hawq-v2"} <= set(shown)
    assert {"held-out", "wikipedia"} <= set(shown)


def test_log_axes_are_labelled_in_plain_numbers(run: Run) -> None:
    for name in ("frontier", "depth", "agreement", "heat"):
        assert not [t for t in texts(DRAW[name](run)) if "mathdefault" in t or "$" in t]


def test_names_with_dollar_and_underscore_are_drawn_as_they_are(run: Run) -> None:
    mixes = tuple(
        replace(m, name="_a$b$<i>" if m.name == "uniform" else m.name) for m in run.validation.mixes
    )
    baselines = tuple(
        replace(m, name="_a$b$<i>" if m.name == "uniform" else m.name)
        for m in run.allocation.baselines
    )
    svg = figures.result_figure(
        replace(run.allocation, baselines=baselines), replace(run.validation, mixes=mixes)
    )
    assert "_a$b$<i>" in [t.strip() for t in texts(svg)]


def test_missing_matplotlib_is_said_with_how_to_install_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def blocked(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    with pytest.raises(Unsupported, match=r"pip install 'hawqkit\[plots\]'"):
        figures.depth_figure(run.sensitivities)


def test_drawing_leaves_the_users_settings_alone(run: Run) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 31.0}):
        styled_by_user = DRAW["bits"](run)
        assert mpl.rcParams["font.size"] == 31.0
    assert styled_by_user == DRAW["bits"](run)


def layer(name: str, block: int | None) -> Layer:
    return Layer(name, "linear", 64, 64, "float32", block)


def all_cells(layers: list[Layer]) -> list[int]:
    return sorted(i for s in arrange(layers).strips for i in s.cells if i is not None)


def test_transformer_layers_form_kinds_by_blocks_with_the_rest_below() -> None:
    layers = [layer("embed", None)]
    layers += [layer(f"h.{b}.{k}", b) for b in range(3) for k in ("attn.c_proj", "mlp.c_proj")]
    found = arrange(layers)
    assert found.blocks
    assert [s.label for s in found.strips] == ["attn.c_proj", "mlp.c_proj", "embed"]
    assert found.strips[0].cells == (1, 3, 5)
    assert all_cells(layers) == list(range(7))


@pytest.mark.parametrize("count", [1, 2, 29, 30, 31, 210, 1300])
def test_layers_without_blocks_are_cut_into_strips_that_hold_each_once(count: int) -> None:
    layers = [layer(f"fc{i}", None) for i in range(count)]
    found = arrange(layers)
    assert not found.blocks
    assert all_cells(layers) == list(range(count))
    assert len({len(s.cells) for s in found.strips}) == 1
    assert len(found.strips) <= 40


def test_irregular_blocks_fall_back_to_strips() -> None:
    layers = [layer(f"stage.{b}.conv{b}", b) for b in range(12)]
    assert not arrange(layers).blocks
    assert all_cells(layers) == list(range(12))


def test_text_on_a_cell_has_contrast() -> None:
    assert light((1.0, 1.0, 0.85, 1.0))
    assert not light((0.03, 0.11, 0.35, 1.0))
