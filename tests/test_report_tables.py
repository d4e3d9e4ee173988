from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType
from synthetic import Run, make_run, tiny_run

from hawqkit.errors import StateMismatch
from hawqkit.records import Totals
from hawqkit.report import (
    agreement_tables,
    cost_table,
    layers_table,
    print_summary,
    result_tables,
    sensitivities_table,
)
from hawqkit.report.wording import shorten, with_error

MANY = (*(f"int{b}-{g}" for b in (2, 3, 4, 6, 8) for g in ("g64-asym", "channel")),
        "int4-g128", "none")  # fmt: skip


def shown(*parts: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in parts:
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def summary(run: Run, *, full: bool = False, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(
        console, run.sensitivities, run.allocation, run.validation, run.provenance, full=full
    )
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run()


@pytest.mark.parametrize("formats", [None, MANY])
def test_everything_fits_80_columns_and_no_number_is_cut(formats: tuple[str, ...] | None) -> None:
    run = make_run(6) if formats is None else make_run(6, formats)
    text = summary(run, full=True)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    score = next(line for line in text.splitlines() if line.strip().startswith("5.mlp.down_proj"))
    assert "…" not in score
    for mix in run.validation.mixes:
        m = mix.measured["held-out"]
        assert with_error(m.kl, m.kl_stderr) in text


def test_summary_fits_when_names_are_very_long(run: Run) -> None:
    s = run.sensitivities
    layers = tuple(
        replace(layer, name=f"{'vision_tower.' * 5}{layer.name}.{'x' * 60}{i}")
        for i, layer in enumerate(s.layers)
    )
    text = shown(layers_table(replace(s, layers=layers), full=True))
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80


def test_result_tables_hold_the_records_numbers(run: Run) -> None:
    text = shown(*result_tables(run.allocation, run.validation))
    for mix in run.validation.mixes:
        assert mix.prediction is not None
        lines = [line for line in text.splitlines() if line.strip().startswith(f"{mix.name} ")]
        assert len(lines) == 1 + len(run.validation.texts)
        assert f"{mix.totals.average_bits:.3f}" in lines[0]
        assert f"{mix.totals.bits_per_weight:.3f}" in lines[0]
        assert f"{mix.totals.size['compressed-tensors'] / 1e6:.2f}" in lines[0]
        assert with_error(mix.prediction.kl, mix.prediction.kl_stderr) in lines[0]
        for line, text_name in zip(lines[1:], run.validation.texts, strict=True):
            m = mix.measured[text_name]
            assert with_error(m.kl, m.kl_stderr) in line
            assert f"{100 * m.same_top1:.1f} %" in line
            assert f"{m.perplexity:.2f}" in line
            if mix.name != "chosen":
                assert with_error(m.difference, m.difference_stderr) in line


def test_more_than_two_targets_get_tables_of_their_own(run: Run) -> None:
    sizes = {f"target-number-{i}": 1_000_000 * (i + 1) for i in range(7)}
    totals = Totals(4.0, 4.25, sizes)
    text = shown(*result_tables(replace(run.allocation, totals=totals, baselines=()), None))
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    for size in sizes.values():
        assert f"{size / 1e6:.2f}" in text


def test_allocation_alone_shows_predictions_and_nothing_measured(run: Run) -> None:
    text = shown(*result_tables(run.allocation))
    assert "measured" not in text.lower()
    assert agreement_tables(run.allocation, None) == []
    assert result_tables(None, None) == []


def test_layers_table_is_shortened_unless_full(run: Run) -> None:
    short = shown(layers_table(run.sensitivities, run.allocation))
    assert "… 194 more" in short
    full = shown(layers_table(run.sensitivities, run.allocation, full=True))
    assert "more" not in full
    assert full.count("self_attn.q_proj") == 30


def test_layers_table_shows_format_stability_and_dash_for_what_does_not_fit() -> None:
    run = make_run(2, ("int4-g128", "int4-g64"))
    line = next(
        line
        for line in shown(layers_table(run.sensitivities, run.allocation)).splitlines()
        if line.strip().startswith("0.self_attn.q_proj")
    )
    cells = line.split()
    name = run.sensitivities.layers[0].name
    assert cells[1] == run.allocation.layers[name] == "int4-g64"
    assert cells[2] == f"{100 * run.allocation.stability[name]:.0f}"
    assert cells[4] == "–"
    assert cells[5] != "–"


def test_most_sensitive_layers_come_first(run: Run) -> None:
    s = run.sensitivities
    column = s.formats.index("int4-g64")
    order = sorted(range(len(s.layers)), key=lambda i: -(s.scores["shrunk"].values[i][column] or 0))
    lines = shown(sensitivities_table(s, run.allocation)).splitlines()
    names = [line.split()[0] for line in lines if "_proj" in line]
    assert names == [s.layers[i].name.removeprefix("model.layers.") for i in order[:10]]


def test_cost_table_shows_predicted_beside_actual(run: Run) -> None:
    text = shown(cost_table(run.provenance.costs))
    probe = next(line for line in text.splitlines() if "probe" in line)
    assert probe.split() == [
        "probe",
        "3",
        "min",
        "52",
        "s",
        "3",
        "min",
        "35",
        "s",
        "83.2",
        "1.51",
        "GiB",
        "1.58",
        "GiB",
    ]


def test_agreement_is_the_ratio_with_its_error(run: Run) -> None:
    text = shown(*agreement_tables(run.allocation, run.validation))
    mix = run.validation.mixes[0]
    m = mix.measured["held-out"]
    assert mix.prediction is not None
    p = mix.prediction
    ratio = m.kl / p.kl
    stderr = ratio * ((m.kl_stderr / m.kl) ** 2 + (p.kl_stderr / p.kl) ** 2) ** 0.5
    assert with_error(ratio, stderr) in text


def test_names_cannot_steer_the_terminal_or_use_markup(run: Run) -> None:
    name = "[red]x[/]\x1b[2J\u202e"
    mixes = (run.validation.mixes[0], replace(run.validation.mixes[1], name=name))
    text = shown(*result_tables(None, replace(run.validation, mixes=mixes)))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[red]x[/]" in text


def test_smallest_run_prints(run: Run) -> None:
    assert "lm_head" in summary(tiny_run())


def test_allocation_of_another_run_is_refused(run: Run) -> None:
    with pytest.raises(StateMismatch, match="two runs"):
        layers_table(run.sensitivities, replace(run.allocation, sensitivities="f" * 64))


def test_shortened_names_keep_their_width() -> None:
    for width in range(4, 40):
        assert len(shorten("model.layers.12.self_attn.q_proj", width)) == min(width, 32)


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from hawqkit.report import result_tables, write_report; "
        "bad = {'torch', 'matplotlib', 'transformers'} & set(sys.modules); "
        "raise SystemExit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
