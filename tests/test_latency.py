from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_cases as cases
import pytest
import torch
from click.testing import CliRunner
from scipy.optimize import nnls
from scipy.stats import betabinom, chisquare
from torch import nn

from hawqkit.allocation.latency import read_latencies, shape_key
from hawqkit.cli import cli
from hawqkit.errors import InputError, Unsupported
from hawqkit.pipeline.timing import write_latencies
from hawqkit.records import LatencyTable, LayerTime

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from hawqkit.targets import onnx_timing
from hawqkit.targets.onnx_latency import (
    CONCENTRATIONS,
    LOOSENESS,
    MISFIT,
    _draw,
    _draw_near,
    fit_times,
    measure_latency,
)

LAYERS = tuple("abcd")
FORMATS = ("x", "y", "z")
CELLS = [(layer, name) for layer in LAYERS for name in FORMATS]


def random_mixes(count: int, seed: int = 0) -> list[dict[str, str]]:
    generator = np.random.default_rng(seed)
    return [{n: FORMATS[generator.integers(3)] for n in LAYERS} for _ in range(count)]


def total(mix: dict[str, str], truth: dict[tuple[str, str], float], fixed: float) -> float:
    return fixed + sum(truth[layer, name] for layer, name in mix.items())


def test_times_that_add_up_predict_mixes_that_were_not_measured() -> None:
    generator = np.random.default_rng(1)
    truth = {cell: float(generator.uniform(0.1, 1.0)) for cell in CELLS}
    alone = [1.4 * truth[cell] for cell in CELLS]  # between neighbors all are faster by one factor
    mixes = random_mixes(30)
    times = np.array([total(mix, truth, 0.5) for mix in mixes])
    fit = fit_times(CELLS, alone, mixes, times, np.zeros(30))
    np.testing.assert_allclose(fit.values, [0.5, *truth.values()], rtol=1e-6)
    assert fit.misfit < 1e-6


def test_the_table_solves_the_documented_least_squares_problem() -> None:
    generator = np.random.default_rng(2)
    truth = {cell: float(generator.uniform(0.1, 1.0)) for cell in CELLS}
    alone = np.array([truth[cell] * generator.uniform(0.7, 1.5) for cell in CELLS])
    mixes = random_mixes(20)
    errors = generator.uniform(0.01, 0.03, 20)
    times = np.array([total(m, truth, 0.2) for m in mixes]) + errors * generator.normal(size=20)
    fit = fit_times(CELLS, alone.tolist(), mixes, times, errors)
    # an independent solver, equation by equation
    weights = 1 / np.sqrt(errors**2 + (MISFIT * times) ** 2)
    sums = np.array(
        [
            [
                1.0,
                *(sum(alone[CELLS.index((n, f))] for n, g in m.items() if g == f) for f in FORMATS),
            ]
            for m in mixes
        ]
    )
    factors = nnls(sums * weights[:, None], times * weights)[0][1:]
    centers = [factors[FORMATS.index(f)] * a for (_, f), a in zip(CELLS, alone, strict=True)]
    rows, wanted = [], []
    for mix, time, weight in zip(mixes, times, weights, strict=True):
        rows.append([weight, *(weight * (mix[n] == f) for n, f in CELLS)])
        wanted.append(weight * time)
    for index, center in enumerate(centers):
        near = 1 / (LOOSENESS * center + onnx_timing.CLOCK)
        rows.append([near * (k == index + 1) for k in range(len(CELLS) + 1)])
        wanted.append(near * center)
    np.testing.assert_allclose(fit.values, nnls(np.array(rows), np.array(wanted))[0], atol=1e-7)
    assert (fit.stderr > 0).all()


def test_what_does_not_add_up_shows_in_the_misfit() -> None:
    truth = dict.fromkeys(CELLS, 1.0)
    mixes = random_mixes(40)
    # neighbors of unlike formats cost more: no table of single layers can say that
    borders = np.array([sum(m[p] != m[q] for p, q in pairwise(LAYERS)) for m in mixes])
    times = np.array([total(mix, truth, 0.0) for mix in mixes]) + 0.5 * borders
    fit = fit_times(CELLS, [1.0] * len(CELLS), mixes, times, np.zeros(40))
    assert 0.03 < fit.misfit < 0.3


class Machine:
    """A clock that sessions of known times push on; `slow` changes how fast everything runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slow: Callable[[float], float] = lambda now: 1.0
        self.order: list[str] = []

    def session(self, graph: Any, **_: Any) -> Any:
        machine = self

        class Session:
            def run(self, outputs: Any, feed: Any) -> None:
                machine.order.append(graph["name"])
                machine.now += graph["seconds"] * machine.slow(machine.now)

        return Session()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(onnx_timing, "open_session", made.session)
    monkeypatch.setattr(onnx_timing.time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(onnx_timing.time, "thread_time", lambda: made.now)
    monkeypatch.setattr(onnx_timing, "interruptions", lambda: 0)
    return made


def graphs(count: int) -> list[tuple[Any, dict[str, Any]]]:
    return [({"name": str(k), "seconds": 1e-3 * (k + 1)}, {}) for k in range(count)]


def test_a_machine_that_becomes_slower_for_good_changes_no_ratio(machine: Machine) -> None:
    given = graphs(20)  # three blocks
    machine.slow = lambda now: 1.0 + now / 3  # several times as slow at the end
    times, errors = onnx_timing.time_graphs(given, threads=1, rounds=15, seed=0)
    ratios = times / times[0]
    assert machine.slow(machine.now) > 2
    np.testing.assert_allclose(ratios, np.arange(1, 21), rtol=0.06)
    assert (errors > 0).all()


def test_a_steady_machine_is_read_exactly_and_in_changing_orders(machine: Machine) -> None:
    times, errors = onnx_timing.time_graphs(graphs(5), threads=1, rounds=9, seed=0)
    np.testing.assert_allclose(times, np.arange(1, 6), rtol=1e-9)
    np.testing.assert_allclose(errors, 0, atol=1e-9)
    rounds = [tuple(dict.fromkeys(machine.order[k:])) for k in range(0, len(machine.order), 5)]
    assert len(set(rounds)) > 3


def test_interruptions_of_a_few_readings_do_not_move_the_time(machine: Machine) -> None:
    calls = iter(range(10**6))
    machine.slow = lambda now: 50.0 if next(calls) % 11 == 0 else 1.0
    times, _ = onnx_timing.time_graphs(graphs(4), threads=1, rounds=31, seed=0)
    np.testing.assert_allclose(times, np.arange(1, 5), rtol=0.02)


def test_readings_that_another_process_disturbs_are_taken_again(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter(range(10**6))
    state = {"count": 0}

    def slow(_: float) -> float:
        disturbed = next(taken) % 2 == 0  # half of all readings, which a median does not stand
        state["count"] += disturbed
        return 9.0 if disturbed else 1.0

    machine.slow = slow
    monkeypatch.setattr(onnx_timing, "interruptions", lambda: state["count"])
    times, errors = onnx_timing.time_graphs(graphs(3), threads=1, rounds=15, seed=0)
    np.testing.assert_allclose(times, [1.0, 2.0, 3.0], rtol=1e-9)
    np.testing.assert_allclose(errors, 0, atol=1e-9)


class Branches(nn.Module):
    """Two equal convolutions, a head, and a layer that is never reached."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Linear(16, 16)
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(image))
        x = torch.relu(self.second(x)) + x
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def measured() -> tuple[Any, LatencyTable]:
    model, examples = cases.loaded(cases.filled(Branches()), {"image": cases.images(4, 4, 12, 12)})
    formats = ["none", "int8-channel", "w8a8", "int4-channel", "int4-g32"]
    return model, measure_latency(model, examples, formats, batch=2, rounds=3, mixes=6)


def test_every_layer_has_a_row_for_every_format_that_fits(measured: Any) -> None:
    model, table = measured
    names = {(row.layer, row.format) for row in table.rows}
    four = ("none", "int8-channel", "w8a8", "int4-channel")
    assert names == {(layer.name, f) for layer in model.layers for f in four}
    assert len(table.rows) == len(names)
    by_layer: dict[str, list[LayerTime]] = {}
    for row in table.rows:
        by_layer.setdefault(row.layer, []).append(row)
        assert row.milliseconds >= 0
        assert np.isfinite(row.stderr)
        assert row.alone > 0 or row.layer == "unused"
    assert all(r.milliseconds == 0 for r in by_layer["unused"])
    # equal layers are timed once by themselves
    pairs = zip(by_layer["first"], by_layer["second"], strict=True)
    assert all(one.alone == other.alone for one, other in pairs)
    assert by_layer["first"][0].operation == "Conv 4x4x3x3 on 2x4x12x12"
    assert by_layer["first"][0].shape == "convolution:4x36@20736"
    assert (table.batch, table.threads, table.mixes) == (2, 1, 11)
    assert table.runtime.startswith("onnxruntime ")


def test_the_table_that_is_written_is_read_for_a_budget(tmp_path: Path, measured: Any) -> None:
    model, table = measured
    path = tmp_path / "latency.csv"
    write_latencies(table, path)
    formats = ["none", "int8-channel", "w8a8", "int4-channel"]
    costs = read_latencies(path).costs(model.layers, formats)
    for format_name in formats:
        mix = {layer.name: format_name for layer in model.layers}
        summed = costs.fixed + costs.costs[:, formats.index(format_name)].sum()
        # the file keeps nanoseconds
        assert summed / costs.scale == pytest.approx(table.predict(mix), abs=1e-5)
    assert {row.shape for row in table.rows if row.layer == "head"} == {"linear:3x4@12"}
    assert shape_key(model.layers[0]) == "convolution:4x36"  # the model itself was not changed


def test_mixes_around_an_allocation_are_near_it_and_reach_every_cell() -> None:
    choices = {f"layer{k}": ("none", "w8a8", "int8-channel") for k in range(20)}
    near = {f"layer{k}": "w8a8" for k in range(10)}  # the others keep what they have
    drawn = _draw_near(choices, near, 200, 0)
    assert drawn[0] == {n: near.get(n, "none") for n in choices}
    differing = [sum(mix[n] != drawn[0][n] for n in choices) for mix in drawn[1:]]
    # a share of the layers up to 1/2 is redrawn, and of these 2 in 3 change: 1/6 of 20 on average
    assert np.mean(differing) == pytest.approx(20 / 6, rel=0.15)
    assert {(n, f) for mix in drawn for n, f in mix.items()} == {
        (n, f) for n, found in choices.items() for f in found
    }


def test_mixes_from_everywhere_hold_uniform_ones_and_scattered_ones() -> None:
    choices = {f"layer{k}": ("none", "w8a8") for k in range(20)} | {"odd": ("w8a8",)}
    drawn = _draw(choices, ("none", "w8a8"), 2000, 0)
    assert drawn[0] == dict.fromkeys(choices, "none") | {"odd": "w8a8"}
    assert drawn[1] == dict.fromkeys(choices, "w8a8")
    floats = np.array([sum(f == "none" for f in mix.values()) for mix in drawn[2:]])
    # two formats with Dirichlet shares: a beta-binomial count, half of the mixes with each exponent
    expected = np.mean([betabinom.pmf(np.arange(21), 20, a, a) for a in CONCENTRATIONS], axis=0)
    counts = np.bincount(floats, minlength=21)
    assert chisquare(counts, 2000 * expected).pvalue > 0.001


def test_an_allocation_of_formats_that_are_not_measured_is_refused() -> None:
    model, examples = cases.loaded(*cases.cnn())
    near = {"stem": "int4-channel", "tail": "none"}
    with pytest.raises(InputError, match="stem in int4-channel, tail in none would not be"):
        measure_latency(model, examples, ["none", "w8a8"], near=near)


def test_a_mix_without_rows_is_refused(measured: Any) -> None:
    _, table = measured
    with pytest.raises(InputError, match="no row for head in int3-channel"):
        table.predict({"head": "int3-channel"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "openvno"}, "unknown runtime 'openvno'"),
        ({"batch": 9}, "batch is 9, and there are 4 examples"),
        ({"batch": 0, "threads": 0, "rounds": 1, "mixes": 1},
         "batch is 0.*threads is 0.*rounds is 1.*mixes is 1"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused_all_at_once(
    options: dict[str, Any], message: str
) -> None:
    model, examples = cases.loaded(*cases.cnn())
    with pytest.raises(InputError, match=message):
        measure_latency(model, examples, ["none"], **options)


def test_formats_that_the_runtime_lacks_are_refused() -> None:
    model, examples = cases.loaded(*cases.cnn())
    with pytest.raises(Unsupported, match="none for 3") as failure:
        measure_latency(model, examples, ["int3-channel", "w4a4"])
    assert "not of 4" in str(failure.value)
    with pytest.raises(Unsupported, match="layer 'stem': none of the formats fits"):
        measure_latency(model, examples, ["int4-g64"])


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["latency", str(tmp_path), "-o", str(tmp_path / "x.csv")])
    assert result.exit_code == 2
    assert "holds no recipe.yaml" in result.output
    assert not (tmp_path / "x.csv").exists()
