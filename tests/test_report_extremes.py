"""Numbers at the edge of what a report can show: losses beyond all bounds, a single format."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace

import pytest
from report_reading import read_page
from rich.console import Console
from synthetic import make_run

from hawqkit.records import Frontier, FrontierPoint, Validation
from hawqkit.report import print_summary, render_report
from hawqkit.report.figures import frontier_figure, result_figure
from hawqkit.report.wording import perplexity


def of_loss(validation: Validation, loss: float) -> Validation:
    """Return measurements whose losses somebody has edited."""
    return replace(
        validation,
        original=dict.fromkeys(validation.original, (loss, 0.04)),
        mixes=tuple(
            replace(m, measured={n: replace(x, loss=loss) for n, x in m.measured.items()})
            for m in validation.mixes
        ),
    )


@pytest.mark.parametrize(
    ("loss", "words"), [(1e30, "over 1e300"), (690.0, "4.6e+299"), (30.0, "1.1e+13")]
)
def test_a_loss_whose_perplexity_cannot_be_said_is_no_crash(loss: float, words: str) -> None:
    run = make_run(2)
    validation = of_loss(run.validation, loss)
    page = read_page(render_report(run.sensitivities, run.allocation, validation))
    text = " ".join(page.text.split())
    assert page.problems == []
    assert f"where the original has a perplexity of {words}" in text
    assert f"perplexity {words}" in text
    table = next(t for t in page.tables if t[0][0] == "mix" and t[0][-1] == "perplexity")
    assert {row[-1] for row in table[1:] if len(row) > 1} == {words}
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, run.sensitivities, run.allocation, validation)
    file = console.file
    assert isinstance(file, io.StringIO)
    assert words in file.getvalue()


def test_perplexities_of_everyday_losses_are_as_ever() -> None:
    assert [perplexity(x) for x in (0.0, 3.02, 13.8)] == ["1.00", "20.49", "984609.11"]
    assert perplexity(3.02, 1) == "20.5"
    assert perplexity(float("nan")) == "–"


def test_a_run_of_one_format_is_drawn_without_complaint() -> None:
    """All points are one, but for rounding: no axis has a length of its own."""
    run = make_run(2, ("int4-g64",))
    point = run.frontier.chosen
    shaken = tuple(
        FrontierPoint(point.average_bits, point.bits_per_weight, v, v * (1 - 1e-15))
        for v in (point.objective, point.objective * (1 + 4e-16), point.objective * (1 - 3e-16))
    )
    alone = Frontier(shaken, {"int4-g64": shaken[1]}, shaken[0])
    still = replace(
        run.validation,
        mixes=tuple(
            replace(m, measured={n: replace(x, kl=0.0, kl_stderr=0.0)
                                 for n, x in m.measured.items()})
            for m in run.validation.mixes
        ),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        svg = frontier_figure(alone)
        result_figure(run.allocation, still)
        render_report(run.sensitivities, run.allocation, run.validation, frontier=alone)
    ticks = [float(t) for t in re.findall(r">(\d+\.?\d*(?:e-?\d+)?)</text>", svg)]
    assert any(0.5 * point.objective < t < 2 * point.objective for t in ticks)
    assert len(set(ticks)) > 3
