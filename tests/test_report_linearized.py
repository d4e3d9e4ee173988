from __future__ import annotations

import io
from dataclasses import replace

from classifier_cases import case
from rich.cells import cell_len
from rich.console import Console

from hawqkit.records import Linearized, Validation
from hawqkit.report.comparison import compare
from hawqkit.report.glossary import glossary
from hawqkit.report.html import render_report
from hawqkit.report.linearized import gap_sentences, linearized_parts, linearized_rows
from hawqkit.report.nouns import IMAGES, TEXT
from hawqkit.report.wording import with_error


def shown(validation: Validation) -> str:
    rows = compare(case().allocation, validation)
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    for part in linearized_parts(rows, IMAGES):
        console.print(part)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def with_linearized(change: dict[str, object]) -> Validation:
    """Return the case's validation with some fields of the chosen mix's figures replaced."""
    validation = case().validation
    first, *rest = validation.mixes
    assert first.linearized is not None
    linearized = replace(first.linearized, **change)  # type: ignore[arg-type]
    return replace(validation, mixes=(replace(first, linearized=linearized), *rest))


def test_tables_hold_the_mix_with_its_figures_in_80_columns() -> None:
    run = case()
    text = shown(run.validation)
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "withheld images" in text
    one = run.validation.mixes[0].linearized
    assert isinstance(one, Linearized)
    for value in (
        with_error(one.kl, one.kl_stderr),
        with_error(one.parabolic, one.parabolic_stderr),
        with_error(one.measured, one.measured_stderr),
        with_error(one.ratio, one.ratio_stderr),
        with_error(one.parabolic_ratio, one.parabolic_ratio_stderr),
    ):
        assert value in text


def test_the_sentence_parts_the_gap_and_says_what_it_cannot_tell() -> None:
    told = {"softmax": -0.002, "softmax_stderr": 0.003, "network": 0.05, "network_stderr": 0.004}
    rows = linearized_rows(compare(case().allocation, with_linearized(told)))
    (sentence,) = gap_sentences(rows, IMAGES)
    assert "On these 16 images the chosen mix loses" in sentence
    assert "the softmax beyond second order adds -0.0020 ± 0.0030 (not told from none)" in sentence
    assert sentence.endswith("the network beyond first order 0.0500 ± 0.0040.")
    why = {"how": "difference", "reason": "no jvp of [red]x"}
    rows = linearized_rows(compare(case().allocation, with_linearized(why)))
    assert gap_sentences(rows, TEXT)[1].endswith("did not serve: no jvp of [red]x")


def test_without_a_parabola_and_without_any_of_it_nothing_is_invented() -> None:
    names = ("parabolic", "parabolic_stderr", "parabolic_ratio", "parabolic_ratio_stderr")
    none = dict.fromkeys((*names, "ratio", "ratio_stderr"))
    text = shown(with_linearized(none))
    assert [line for line in text.splitlines() if "chosen" in line][1].count("–") == 2
    validation = case().validation
    bare = tuple(replace(mix, linearized=None) for mix in validation.mixes)
    assert shown(replace(validation, mixes=bare)) == ""


def test_the_html_report_shows_them_and_explains_the_term() -> None:
    run = case()
    page = render_report(run.sensitivities, run.allocation, run.validation)
    one = run.validation.mixes[0].linearized
    assert one is not None
    assert "linear logits, exact softmax" in page
    assert with_error(one.quadratic, one.quadratic_stderr) in page
    assert with_error(one.parabolic_ratio, one.parabolic_ratio_stderr) in page
    assert "Linear logits" in dict(glossary(IMAGES))
    bare = tuple(replace(mix, linearized=None) for mix in run.validation.mixes)
    page = render_report(run.sensitivities, run.allocation, replace(run.validation, mixes=bare))
    assert "linear logits, exact softmax" not in page
