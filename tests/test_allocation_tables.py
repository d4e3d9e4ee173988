"""Tables that anyone made: what is read, what is refused, and the best mix by enumeration."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import runpy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from hawqkit.allocation import (
    read_latencies,
    read_scores,
    solve,
    solve_by_enumeration,
    table_problem,
)
from hawqkit.errors import BudgetError, RecipeError, TableError
from hawqkit.pipeline import allocate_csv
from hawqkit.pipeline.tabled import read_limits
from hawqkit.records import TableAllocation
from hawqkit.store import read_record

ROOT = Path(__file__).resolve().parents[1]
HEADER = ["layer", "format", "score", "bytes", "latency_ms", "group"]
Rows = list[list[str]]


def write(folder: Path, text: str) -> Path:
    file = folder / "table.csv"
    file.write_text(text, encoding="utf-8")
    return file


def problems(file: Path, *limits: str) -> list[str]:
    with pytest.raises(TableError) as caught:
        read_scores(file, limits)
    return list(caught.value.problems)


GOOD = """\
layer,format,score,bytes,group
a,int4,0.5,100,
a,int8,0.1,200,
b,int4,0.3,10,g
c,w4a8,1e-3,20.25,g
b,w4a8,0.2,15,g
"""


def test_names_are_free_and_a_layer_cannot_take_what_it_has_no_row_for(tmp_path: Path) -> None:
    table = read_scores(write(tmp_path, GOOD), ["bytes"])
    assert table.layers == ("a", "b", "c")
    assert table.formats == ("int4", "int8", "w4a8")
    assert table.available.tolist() == [
        [True, True, False],
        [True, False, True],
        [False, False, True],
    ]
    assert table.groups == {"b": "g", "c": "g"}
    assert table.costs["bytes"].scale == 100
    problem = table_problem(table, {"bytes": 236})
    assert problem.groups == ((0,), (1, 2))
    assert problem.mix(solve(problem).choice) == {"a": "int8", "b": "w4a8", "c": "w4a8"}


def test_what_a_spreadsheet_writes_is_read(tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    text = '\ufefflayer, format ,score,bytes\r\n"conv,1", int4 ,1E-3, 7 \r\n\r\n,,,\r\n'
    file.write_bytes(text.encode())
    table = read_scores(file)
    assert (table.layers, table.formats) == (("conv,1",), ("int4",))
    assert table.costs["bytes"].costs.tolist() == [[7]]


def test_every_problem_of_a_file_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = (
        "layer,format,score,bytes,group\n"  # 1
        "a,int4,abc,1,g\n"  # 2
        "a,int4,0.5,1,g\n"  # 3: twice
        "a,int8,nan,1,h\n"  # 4: two problems
        "b,int2,-0.1,1,g\n"  # 5; and g has nothing in common
        "c,int4,inf,,\n"  # 6
        "c,int8,0.1\n"  # 7
        "c,int2,0.1,1e101,\n"  # 8
        ",int2,0.1,,\n"  # 9
        "d,int2,0.1,,\n"  # 10
    )
    found = problems(write(tmp_path, text), "bops")
    places = [problem.partition(":")[0] for problem in found]
    assert places == [
        "line 1", "line 2", "line 2", "line 3", "line 4", "line 4", "line 5", "line 6",
        "lines 6, 9-10", "line 7", "line 8", "line 9",
    ]  # fmt: skip
    text = "\n".join(found)
    for words in (
        "budget 'bops' needs a column",
        "score is 'abc', which is no number",
        "group 'g' (a, b) must share a format",
        "'a' in format 'int4' stands on line 2 already",
        "score is nan",
        "'a' is in group 'h' here and in 'g' on line 2",
        "score is -0.1: a number of at least 0",
        "score is inf: not finite",
        "bytes is empty",
        "has 3 cells, and the header has 5",
        "bytes is 1e101",
        "layer is empty",
    ):
        assert words in text


def test_missing_columns_are_named_with_the_nearest_one_and_the_rest_is_still_checked(
    tmp_path: Path,
) -> None:
    found = problems(write(tmp_path, "layer,fmt,scores,bytes\na,int4,1,x\n"), "byte")
    assert "no column 'format'" in found[0]
    assert "no column 'score'" in found[1]
    assert "Did you mean 'scores'?" in found[1]
    assert "Did you mean 'bytes'?" in found[2]
    assert "line 2: bytes is 'x'" in found[3]
    assert "cannot" not in found[0]
    for name in ("score", "group"):
        (one,) = problems(write(tmp_path, GOOD), name)
        assert f"budget '{name}' needs a column" in one


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the file is empty"),
        (b"layer,format,score\n", "no rows below the header"),
        (b"layer;format;score\na;b;1\n", "semicolons part the cells"),
        (b"layer,format,score,score\na,b,1,2\n", "'score' stands twice"),
        (b"layer,format,score\n\xff\xfe\n", "byte 19 is not UTF-8"),
        (b'layer,format,score\n"a,b,1\n', "not CSV from here on"),
        (b"layer,format,score\na,b,1e400\n", "not finite"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    file = tmp_path / "table.csv"
    file.write_bytes(data)
    assert words in "\n".join(problems(file))
    assert "no such file" in problems(tmp_path / "nothing.csv")[0]
    assert "a folder" in problems(tmp_path)[0]


def test_a_limit_below_the_least_says_what_the_least_is(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    with pytest.raises(BudgetError, match=r"at least 135\.25 bytes and at most 235\.25 bytes"):
        allocate_csv(file, {"bytes": 135.24})
    assert allocate_csv(file, {"bytes": 135.25}).taken["bytes"].taken == 135.25
    with pytest.raises(BudgetError, match="above 0"):
        allocate_csv(file, {"bytes": 0})
    with pytest.raises(BudgetError, match="at least one of the columns bytes"):
        allocate_csv(file, {})


def test_any_column_can_be_limited_and_one_that_is_not_read_is_told(tmp_path: Path) -> None:
    text = "layer,format,score,joule,note\na,x,1,0.5,hm\na,y,0,1.5,\n"
    file = write(tmp_path, text)
    found = allocate_csv(file, {"joule": 1})
    assert found.layers == {"a": "x"}
    assert found.warnings == ("the column 'note' was not read.",)
    assert found.taken["joule"].most == 1.5


def random_table(rng: np.random.Generator, digits: int) -> Rows:
    unit = 10.0 ** float(rng.integers(-2, 5))
    rows = []
    for layer in range(int(rng.integers(2, 7))):
        group = ("", "", "g", "h")[int(rng.integers(4))]
        for form in range(4):
            if form and rng.random() < 0.2:
                continue
            score = float(rng.random() ** 4) * 10.0 ** float(rng.integers(-3, 3))
            cost = [round(float(rng.random()) * unit, digits) for _ in range(2)]
            rows.append([f"l{layer}", f"f{form}", repr(score), *map(repr, cost), group])
    return rows


def every_mix(rows: Rows) -> list[tuple[float, Fraction, Fraction]]:
    """(score, bytes, latency) of every mix that ties groups, recounted from the text alone."""
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        cells.setdefault(row[0], {})[row[1]] = row
    groups: dict[str, list[str]] = {}
    for name, found in cells.items():
        groups.setdefault(next(iter(found.values()))[5] or f"alone {name}", []).append(name)
    options = [sorted(set.intersection(*(set(cells[n]) for n in g))) for g in groups.values()]
    mixes = []
    for picks in itertools.product(*options):
        chosen = [cells[n][f] for g, f in zip(groups.values(), picks, strict=True) for n in g]
        costs = [sum((Fraction(row[k]) for row in chosen), Fraction()) for k in (3, 4)]
        mixes.append((math.fsum(float(row[2]) for row in chosen), *costs))
    return mixes


@pytest.mark.parametrize("seed", range(60))
def test_the_best_mix_within_both_limits_comes_out_to_the_last_digit(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = random_table(rng, digits=(0, 3, 9)[seed % 3])
    file = tmp_path / "table.csv"
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([HEADER, *rows])
    mixes = every_mix(rows)
    _, *costs = mixes[int(rng.integers(len(mixes)))]
    slack = 1.0 if seed % 2 else 1.0 + float(rng.random())
    limits = [max(float(c) * slack, 1e-9) for c in costs]  # at slack 1 met to the last digit
    fitting = [
        score
        for score, *used in mixes
        if all(u <= Fraction(repr(x)) for u, x in zip(used, limits, strict=True))
    ]
    budgets = dict(zip(HEADER[3:5], limits, strict=True))
    if not fitting:
        with pytest.raises(BudgetError):
            allocate_csv(file, budgets)
        return
    found = allocate_csv(file, budgets)
    assert found.objective == pytest.approx(min(fitting), rel=1e-12)
    assert found.certificate.bound <= min(fitting) * (1 + 1e-12)
    assert found.certificate.relative_gap <= 1e-9
    for name, limit in budgets.items():
        assert found.taken[name].taken <= limit
        assert found.taken[name].limit == limit
    problem = table_problem(read_scores(file, list(budgets)), budgets)
    assert solve_by_enumeration(problem)[1] == pytest.approx(min(fitting), rel=1e-12)
    # The frontier: nothing that takes as little has a lower score than its bound.
    column = HEADER.index(found.frontier.budget) - 2
    for point in (*found.frontier.points, found.frontier.chosen):
        least = min(mix[0] for mix in mixes if float(mix[column]) <= point.taken * (1 + 1e-12))
        assert point.bound <= least * (1 + 1e-9)
    for point in found.frontier.points:
        assert point.score == pytest.approx(point.bound, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("seed", range(10))
def test_digits_beyond_the_solvers_arithmetic_never_break_a_limit(
    tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(100 + seed)
    rows = random_table(rng, digits=17)
    file = tmp_path / "table.csv"
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([HEADER, *rows])
    mixes = every_mix(rows)
    limits = [float(c) * (1 + 1e-12) for c in mixes[int(rng.integers(len(mixes)))][1:]]
    found = allocate_csv(file, dict(zip(HEADER[3:5], limits, strict=True)))
    exact = {(r[0], r[1]): r for r in rows}
    for column, limit in zip((3, 4), limits, strict=True):
        used = sum(Fraction(exact[item][column]) for item in found.layers.items())
        assert used <= Fraction(repr(limit))
    fitting = [
        mix[0]
        for mix in mixes
        if all(u <= Fraction(repr(x)) for u, x in zip(mix[1:], limits, strict=True))
    ]
    assert found.objective == pytest.approx(min(fitting), rel=1e-12)


def test_the_record_is_read_back_equal(tmp_path: Path) -> None:
    found = allocate_csv(write(tmp_path, GOOD), {"bytes": 236}, tmp_path / "out" / "a.json")
    assert read_record(tmp_path / "out" / "a.json", TableAllocation) == found
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.json"]
    assert sum(found.scores.values()) == pytest.approx(found.objective)


def test_limits_of_a_command_line_take_units_and_are_refused_together() -> None:
    assert read_limits(["bytes=5.6e6", "latency=850us", "x=2"]) == {
        "bytes": 5.6e6,
        "latency_ms": 0.85,
        "x": 2.0,
    }
    assert read_limits(["bytes=1.5GiB"]) == {"bytes": 1.5 * 2**30}
    with pytest.raises(RecipeError) as caught:
        read_limits(["bytes", "=3", "bytes=3parsecs", "latency=3m", "x=1MB", "y=1", "y=2"])
    assert len(caught.value.problems) == 6
    assert "set twice" in caught.value.problems[-1]


def test_the_documented_table_and_comparison_are_what_comes_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "allocation.md").read_text()
    blocks = re.findall(r"```(?:csv|text)\n(.*?)```", page, re.DOTALL)
    (table,) = [block for block in blocks if block.startswith("layer,format,score")]
    found = allocate_csv(write(tmp_path, table), {"bytes": 4500, "latency_ms": 0.65})
    assert found.layers == {"conv1": "int8", "conv2": "int4", "shortcut": "int4"}
    for field in ("layers", "certificate", "taken", "frontier", "scores", "groups", "table_hash"):
        assert f"`{field}`" in page
        assert hasattr(found, field)
    (latency,) = [block for block in blocks if block.startswith("layer,shape,format")]
    times = read_latencies(write(tmp_path, latency))
    assert (times.fixed, len(times.layers), len(times.shapes)) == (120_000_000, 1, 1)
    runpy.run_path(str(ROOT / "examples" / "hawq_v3_resnet18.py"))["main"]()
    printed = [line.split()[:7] for line in capsys.readouterr().out.splitlines()]
    (shown,) = [block for block in blocks if block.startswith("budget ")]
    assert [line.split()[:7] for line in shown.splitlines()] == printed  # the gap is rounding


def test_all_nine_published_allocations_of_hawq_v3_come_out(tmp_path: Path) -> None:
    figures = json.loads((ROOT / "examples" / "hawq_v3_resnet18.json").read_text())
    example = runpy.run_path(str(ROOT / "examples" / "hawq_v3_resnet18.py"))
    found = example["main"](str(tmp_path))
    assert [one.name for one in found] == list(figures["published_bits"])
    for one in found:
        bits = figures["published_bits"][one.name]
        published = {n: f"int{b}" for n, b in zip(figures["layers"], bits, strict=True)}
        table = {
            (row["layer"], row["format"]): row
            for row in csv.DictReader((tmp_path / f"{one.name}.csv").open())
        }
        taken = sum(Fraction(table[item][one.column]) for item in published.items())
        assert taken <= Fraction(repr(one.limit))
        score = math.fsum(float(table[item]["score"]) for item in published.items())
        assert one.published == pytest.approx(score, rel=1e-12)
        assert one.ours.objective <= score * (1 + 1e-12)
        assert one.ours.taken[one.column].taken <= one.limit
        assert one.ours.certificate.relative_gap <= 1e-12
        for first, second in figures["tied_pairs"]:
            names = figures["layers"]
            assert one.ours.layers[names[first]] == one.ours.layers[names[second]]
        # They are not only as good: they are the same.
        assert one.ours.layers == published
        assert one.verdict == "identical"
