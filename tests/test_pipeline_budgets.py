"""Bit operations and latency as budgets of a run: recipe, command line, Python."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pico
import pytest
from command_line import make_run, refuse, sets, succeed

import hawqkit as hk
from hawqkit.allocation import shape_key
from hawqkit.errors import BudgetError, InputError, RecipeError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.pipeline.folder import RunFolder
from hawqkit.recipe import load_budget, load_recipe, parse_milliseconds
from hawqkit.records import Sensitivities

FORMATS = ("int3-g32", "int4-g32", "int8-g32")
RECIPE = "model: {source: m}\nformats: [int4-g64]\nbudget: "


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run whose recipe limits bit operations and latency by shapes."""
    home = tmp_path_factory.mktemp("budgets")
    pico.save(home / "model")
    first = make_run(home, *sets("budget.bops=1e12"))
    layers = RunFolder(first).read_sensitivities().layers
    shapes = {shape_key(x): x.macs * 1e-6 for x in layers}
    rows = [
        f'"{shape}",{name},{time * (parse_format(name).bits or 32):.9f}'
        for shape, time in shapes.items()
        for name in FORMATS
    ]
    (home / "latency.csv").write_text("shape,format,milliseconds\n" + "\n".join(rows) + "\n")
    return home


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    return finished


def table_of(folder: Path) -> Sensitivities:
    return RunFolder(folder / "run").read_sensitivities()


def operations(table: Sensitivities, mix: dict[str, str]) -> int:
    """Count bit operations of weights alone in plain integers: activations stay in 32 bits."""
    return sum(x.macs * (parse_format(mix[x.name]).bits or 32) * 32 for x in table.layers)


def test_a_run_counts_operations_where_they_are_limited(here: Path) -> None:
    record = json.loads((here / "run" / "allocation.json").read_text())
    table = table_of(here)
    # 32 tokens, each of which takes rows x columns multiply-accumulates.
    assert {x.name: x.macs for x in table.layers} == {x.name: 32 * x.numel for x in table.layers}
    assert record["budgets"] == {"average_bits": 4.5, "bops": 1e12}
    assert record["totals"]["bops"] == operations(table, record["layers"])
    assert record["totals"]["latency_ms"] is None


def test_operations_are_limited_again_from_the_command_line(here: Path) -> None:
    table = table_of(here)
    limit = operations(table, {x.name: "int4-g32" for x in table.layers}) + 1
    done = succeed("allocate", "run", "--budget", f"bops={limit}", "-o", "b.json")
    record = json.loads((here / "b.json").read_text())
    assert operations(table, record["layers"]) == record["totals"]["bops"] <= limit
    assert f"{record['totals']['bops']:,} BOPs" in done.output
    refuse(here, "allocate", "run", "--budget", "bops=5", words="bops = 5 BOPs cannot be met")


def test_latency_by_shapes_is_limited_together_with_bits(here: Path) -> None:
    table = table_of(here)

    def time(mix: dict[str, str]) -> float:
        return sum(x.macs * 1e-6 * (parse_format(mix[x.name]).bits or 32) for x in table.layers)

    limit = time({x.name: "int4-g32" for x in table.layers}) * 1.1
    done = succeed(
        "allocate", "run", "--budget", f"latency={limit}ms", "--budget", "average_bits=4.2",
        "--latency-table", "latency.csv", "-o", "l.json",
    )  # fmt: skip
    record = json.loads((here / "l.json").read_text())
    assert record["totals"]["latency_ms"] == pytest.approx(time(record["layers"]), abs=1e-6)
    assert record["totals"]["latency_ms"] <= limit
    assert record["totals"]["average_bits"] <= 4.2
    assert " ms" in done.output
    for mix in record["baselines"]:
        assert mix["totals"]["latency_ms"] <= limit


def test_a_table_without_a_limit_and_a_limit_without_a_table_are_refused(here: Path) -> None:
    refuse(here, "allocate", "run", "--budget", "latency=3ms", words="without a table")
    refuse(here, "allocate", "run", "--latency-table", "latency.csv", words="without a limit")
    (here / "few.csv").write_text("layer,format,milliseconds\nx,int4-g32,1\n")
    run = ("allocate", "run", "--budget", "latency_ms=3", "--latency-table")
    refuse(here, *run, "few.csv", words="42 rows missing")
    refuse(here, *run, "none.csv", words="there is no such file")


def test_impossible_operations_and_latency_are_refused_before_the_probe(here: Path) -> None:
    run = ("run", "r.yaml", "-o", "new", "--set")
    refuse(here, *run, "budget.bops=1000", words="bops = 1,000 BOPs cannot be met")
    latency = "budget.latency={limit: 1us, table: latency.csv}"
    refuse(here, *run, latency, words="latency_ms = 0.001 ms cannot be met")
    refuse(here, *run, "budget.latency={limit: 1s, table: no.csv}", words="no such file")
    refuse(here, *run, "budget.latency=3ms", words="names no table")


def test_a_finished_probe_is_kept_when_a_limit_comes_later(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(finished / "model")
    run = make_run(tmp_path)
    assert {x.macs for x in RunFolder(run).read_sensitivities().layers} == {0}
    monkeypatch.chdir(tmp_path)
    refuse(tmp_path, "allocate", "run", "--budget", "bops=1e12", words="never counted")
    table = (finished / "latency.csv").read_text()
    (tmp_path / "latency.csv").write_text(table)
    done = succeed(
        "run", "r.yaml", "-o", "run",
        *sets("budget.bops=1e12", "budget.latency={limit: 1s, table: latency.csv}"),
    )  # fmt: skip
    assert "taken from the run folder" in done.output
    record = RunFolder(run).read_allocation()
    assert record.totals.bops is not None
    assert record.budgets["latency_ms"] == 1000.0
    # The folder's recipe means the same elsewhere, and its own limits can be asked for again.
    kept = RunFolder(run).read_recipe().budget.latency_table()
    assert kept == str(tmp_path / "latency.csv")
    monkeypatch.chdir(finished)
    succeed("allocate", str(run), "-o", str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "again.json").read_text())["layers"] == record.layers


def test_python_limits_operations_latency_and_ties_layers(here: Path) -> None:
    table = table_of(here)
    names = [x.name for x in table.layers]
    plain = {"baselines": (), "draws": 0}
    tied = hk.allocate(
        table, average_bits=5, bops=1e9, latency_ms=1e3, latency_table=here / "latency.csv",
        groups={names[0]: "a", names[-1]: "a"}, **plain,
    )  # fmt: skip
    assert tied.layers[names[0]] == tied.layers[names[-1]]
    assert (tied.totals.bops or 0) <= 1e9
    free = hk.allocate(table, average_bits=5, **plain)
    assert free.objective <= tied.objective
    with pytest.raises(BudgetError, match="latency_table="):
        hk.allocate(table, latency_ms=3, **plain)
    with pytest.raises(InputError, match="without a limit"):
        hk.allocate(table, average_bits=5, latency_table=here / "latency.csv", **plain)
    bare = replace(table, layers=tuple(replace(x, macs=0) for x in table.layers))
    with pytest.raises(Unsupported, match="14 of 14 layers"):
        hk.allocate(bare, bops=1e9, **plain)


def test_the_smallest_mix_below_a_loss_keeps_to_operations(here: Path) -> None:
    table = table_of(here)
    plain = {"baselines": (), "draws": 0}
    least = operations(table, dict.fromkeys([x.name for x in table.layers], "int3-g32"))
    loose = hk.allocate(table, max_predicted_kl=1.0, bops=1e12, **plain)
    assert loose.totals.bops == least
    tight = hk.allocate(table, max_predicted_kl=loose.prediction.kl * 0.5, bops=1e12, **plain)  # type: ignore[union-attr]
    assert (tight.totals.bops or 0) > least
    with pytest.raises(BudgetError, match="contradict each other"):
        hk.allocate(
            table,
            max_predicted_kl=loose.prediction.kl * 0.5,  # type: ignore[union-attr]
            bops=least * 1.001,
            **plain,
        )


def test_a_recipe_reads_operations_and_latency(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + "{bops: 2.1e9, latency: {table: latency.csv, limit: 3.1ms}}\n")
    budget = load_recipe(file).budget
    assert budget.limits() == {"bops": 2.1e9, "latency_ms": 3.1}
    assert budget.latency_table() == "latency.csv"
    again = tmp_path / "again.yaml"
    again.write_text(load_recipe(file).resolved_yaml())
    assert load_recipe(again) == load_recipe(file)
    assert load_budget(["latency=850us", "bops=7"]).limits() == {"bops": 7, "latency_ms": 0.85}
    assert load_budget(["latency_ms=3.1"]).limits() == {"latency_ms": 3.1}


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("{latency: 3.1ms}", "budget.latency (line 3): names no table"),
        ("{latency: {table: t.csv}}", "budget.latency.limit"),
        ("{latency: {table: t.csv, limit: 3 parsecs}}", "is not a time; allowed: milliseconds"),
        ("{latency: {table: t.csv, limit: 0ms}}", "above 0"),
        ("{latency: {table: '', limit: 1}}", "not empty"),
        ("{latency: {tables: t.csv, limit: 1}}", "Did you mean 'table'?"),
        ("{bops: -3}", "above 0"),
        ("{bops: 2 billion}", "allowed: a number"),
        ("{bop: 3}", "Did you mean 'bops'?"),
    ],
)
def test_what_is_wrong_with_them_is_told_with_its_place(
    tmp_path: Path, budget: str, words: str
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE + budget + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert len(caught.value.problems) == 1
    assert words in caught.value.problems[0]


@pytest.mark.parametrize(
    "time", ["3.1", "3.1 ms", "0.0031s", "3100us", "3100000ns", 3.1, "31e-1ms"]
)
def test_times_are_exact_decimals(time: str | float) -> None:
    assert parse_milliseconds(time) == 3.1


@pytest.mark.parametrize("time", ["", "ms", "-3ms", "3m", "3 MS", True, None, [3]])
def test_what_is_no_time_is_refused(time: object) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_milliseconds(time)  # type: ignore[arg-type]
