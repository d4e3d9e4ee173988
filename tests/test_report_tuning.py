from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifier_cases import case
from report_reading import Page, read_page
from rich.console import Console
from synthetic import make_run

from hawqkit.errors import StateMismatch
from hawqkit.records import Allocation, DataFacts, HeldOutLoss, LearnedScale, Tuning, TuningCurve
from hawqkit.report import render_report, tuning_tables
from hawqkit.report.tuning_figure import SINGLE, tuning_figure
from hawqkit.report.wording import percent_with_error, with_error
from hawqkit.store import read_record, to_plain, write_record

IMAGES = DataFacts("photos", "ab" * 32, 96, 1, 96, 96, 96, 0, "images", 5)
HOSTILE = "<script>alert('x')</script>\x1b[31m_"


def record(
    steps: int,
    allocation: Allocation | None = None,
    *,
    data: DataFacts = IMAGES,
    names: tuple[str, ...] = ("held-out",),
    **changes: Any,
) -> Tuning:
    """Return a tuning whose loss falls as 1 / sqrt(step), with noise."""
    rng = np.random.default_rng(steps)
    loss = (0.3 + 1.5 / np.sqrt(1 + np.arange(steps))) * np.exp(rng.normal(0, 0.2, steps))
    right = np.clip(0.9 - 0.3 * loss, 0, 1)
    at = sorted({round(k * steps / 10) for k in range(11)})
    made = Tuning(
        model="m",
        tuned="t",
        layers=dict(allocation.layers) if allocation is not None else {"a": "int4-g64"},
        data=data,
        examples=96,
        settings={"batch": 8, "optimizer": "adamw", "distillation": None},
        steps=steps,
        curve=TuningCurve(
            tuple(loss.tolist()),
            tuple(np.linspace(1e-3, 0, steps).tolist()),
            tuple(np.ones(steps).tolist()),
            tuple(loss.tolist()),
            tuple(right.tolist()),
        ),
        held_out=tuple(
            HeldOutLoss(name, step, 64, 0.5 + 1.4 / (1 + step) ** 0.5, 0.04, 0.6, 0.05)
            for step in at
            for name in names
        ),
    )
    return replace(made, **changes)


def page_of(tuning: Tuning | None) -> Page:
    run = case()
    return read_page(
        render_report(run.sensitivities, run.allocation, run.validation, tuning=tuning)
    )


def table(page: Page, *heads: str) -> list[list[str]]:
    return next(t for t in page.tables if t[0][: len(heads)] == list(heads))


def printed(tuning: Tuning) -> str:
    console = Console(file=io.StringIO(), width=80)
    for part in tuning_tables(case().allocation, tuning):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("steps", [1, 2, SINGLE, SINGLE + 1, 20_000])
def test_the_figure_is_one_svg_of_bounded_size_and_the_same_twice(steps: int) -> None:
    svg = tuning_figure(record(steps))
    assert svg.startswith("<svg")
    assert svg == tuning_figure(record(steps))
    assert len(svg) < 120_000
    assert "training batches" in svg
    assert "held-out" in svg
    assert "Accuracy" in svg


def line_points(svg: str) -> list[int]:
    """Return the number of points of every path that is drawn as a line of a series."""
    paths = re.findall(r'<path d="(M[^"]*)"[^>]*style="fill: none; stroke: #0072b2', svg)
    return [len(re.findall(r"[ML]", path)) for path in paths]


def test_few_steps_are_drawn_one_by_one_and_many_as_means_with_a_band() -> None:
    few, many = tuning_figure(record(40)), tuning_figure(record(5000))
    assert max(line_points(few)) == 40
    assert max(line_points(many)) == SINGLE
    band = "fill: #0072b2; fill-opacity: 0.18"
    assert band not in few.replace("opacity: 0.18; stroke", "")
    assert "PolyCollection" in many or "FillBetweenPolyCollection" in many


def test_the_label_says_where_each_loss_begins_and_ends() -> None:
    made = record(1000)
    label = re.search(r'aria-label="([^"]*)"', tuning_figure(made))
    assert label is not None
    start, end = np.mean(made.curve.loss[:200]), np.mean(made.curve.loss[-200:])
    assert f"over 1000 steps of tuning: training from {start:.4g} to {end:.4g}" in label[1]
    first, last = made.held_out[0].loss, made.held_out[-1].loss
    assert f"held-out from {first:.4g} to {last:.4g}" in label[1]


def test_the_section_holds_the_numbers_of_the_record() -> None:
    made = record(25, case().allocation, learned=(
        LearnedScale("stem", "weight", 8, -0.031), LearnedScale("head", "input", 1, 0.25),
    ))  # fmt: skip
    page = page_of(made)
    assert page.problems == []
    assert {"tuning", "figure-tuning"} <= set(page.ids)
    rows = table(page, "data set", "after step", "images", "loss, nats", "accuracy")[1:]
    assert rows == [
        [p.text, str(p.step), "64", with_error(p.loss, p.loss_stderr),
         percent_with_error(p.accuracy, p.accuracy_stderr)]
        for p in made.held_out
    ]  # fmt: skip
    rows = table(page, "steps", "mean loss", "accuracy")[1:]
    parts = np.array_split(np.array(made.curve.loss), [2, 5, 7, 10, 12, 15, 17, 20, 22])
    assert [row[1] for row in rows] == [f"{part.mean():.5f}" for part in parts]
    scales = table(page, "layer", "of its")[1:]
    assert scales == [["head", "input", "1", "+25.00 %"], ["stem", "weight", "8", "-3.10 %"]]
    text = " ".join(page.text.split())
    assert "trained for 25 steps of 8 images with adamw, on 96 images (photos)" in text
    assert not re.search(r"\bsequences?\b", text)


def test_without_tuning_there_is_no_section_and_another_mix_is_named() -> None:
    assert "tuning" not in page_of(None).ids
    page = page_of(record(5))
    assert "tuning" not in page.ids
    assert "tuning/ is of another mix than the allocation beside it" in page.text


def test_a_text_has_sequences_and_no_accuracy() -> None:
    run = make_run(2)
    facts = DataFacts("builtin", "ab" * 32, 96, 32, 3072, 2976, 9, 0)
    made = record(30, run.allocation, data=facts)
    page = read_page(render_report(run.sensitivities, run.allocation, tuning=made))
    assert table(page, "text", "after step", "sequences", "loss, nats")[1][0] == "held-out"
    assert "Accuracy" not in tuning_figure(made)
    assert "Tuning: 30 steps on 96 sequences" in printed(made)


def test_records_of_before_the_curve_was_whole_are_read_and_drawn(tmp_path: Path) -> None:
    made = record(12, case().allocation)
    plain = to_plain(made)
    del plain["held_out"], plain["curve"]["cross_entropy"], plain["curve"]["accuracy"]
    (tmp_path / "tuning.json").write_text(json.dumps(plain))
    old = read_record(tmp_path / "tuning.json", Tuning)
    assert (old.curve.loss, old.held_out, old.curve.accuracy) == (made.curve.loss, (), ())
    page = page_of(old)
    assert "figure-tuning" in page.ids
    assert not any(t[0][:2] == ["data set", "after step"] for t in page.tables)
    assert "Accuracy" not in tuning_figure(old)
    assert "Tuning: 12 steps on 96 images" in printed(old)
    write_record(tmp_path / "new.json", made)
    assert read_record(tmp_path / "new.json", Tuning) == made


def test_a_curve_that_does_not_fit_its_steps_is_refused(tmp_path: Path) -> None:
    for change in ({"held_out": [{**to_plain(record(4))["held_out"][0], "step": 9}]},
                   {"curve": {**to_plain(record(4))["curve"], "accuracy": [0.5]}}):  # fmt: skip
        (tmp_path / "tuning.json").write_text(json.dumps({**to_plain(record(4)), **change}))
        with pytest.raises(StateMismatch, match="steps"):
            read_record(tmp_path / "tuning.json", Tuning)


def test_distillation_is_told_and_shown_apart() -> None:
    allocation = case().allocation
    taught = {"batch": 8, "optimizer": "sgd", "distillation": {"alpha": 0.7, "temperature": 2.0}}
    made = record(20, allocation, settings=taught)
    whole = replace(made, curve=replace(made.curve, loss=tuple(9.0 for _ in range(20))))
    rows = table(page_of(whole), "steps", "mean loss", "cross-entropy", "accuracy")[1:]
    assert {row[1] for row in rows} == {"9.00000"}
    assert rows[0][2] == f"{np.mean(made.curve.loss[:2]):.5f}"
    assert "70 % of the loss, at temperature 2" in page_of(whole).text
    assert "training from 9" not in tuning_figure(whole)


def test_hostile_names_are_only_text() -> None:
    made = record(70, case().allocation, names=(HOSTILE, "held-out"))
    page = page_of(made)
    assert page.problems == []
    assert "script" not in page.tags
    assert "\x1b" not in printed(made)
