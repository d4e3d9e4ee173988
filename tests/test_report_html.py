from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_reading import read_page
from synthetic import Run, make_run, make_sensitivities, tiny_run

from hawqkit.errors import StateMismatch
from hawqkit.records import Skipped, to_array
from hawqkit.report import render_report, write_report
from hawqkit.report.headline import make_headline
from hawqkit.report.wording import with_error

EXPORTS = {"bits": "run/exports/bits", "compressed-tensors": "run/exports/compressed-tensors"}
PIXELS = "data:image/png;base64,"  # color bars: pixels that stand in the page itself
HOSTILE = "<script>alert('x')</script>\"&$\\frac{1}{$\x1b[31m\u202e_"


def render(run: Run) -> str:
    return render_report(
        run.sensitivities,
        run.allocation,
        run.validation,
        frontier=run.frontier,
        provenance=run.provenance,
        exports=EXPORTS,
    )


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(5)


@pytest.fixture(scope="module")
def html(run: Run) -> str:
    return render(run)


def test_page_is_well_formed_and_ids_are_unique(html: str) -> None:
    page = read_page(html)
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    assert html.startswith("<!DOCTYPE html>")


def test_page_loads_nothing_and_runs_no_script(html: str) -> None:
    page = read_page(html)
    assert [load for load in page.loads if not load[2].startswith(("#", PIXELS))] == []
    assert {"script", "iframe", "link", "object", "embed"}.isdisjoint(page.tags)
    assert not any(name.startswith("on") for name in page.attributes)
    assert re.findall(r"url\((?!#)|@import|@font-face", html) == []


def test_links_inside_of_the_page_lead_somewhere(html: str) -> None:
    page = read_page(html)
    wanted = {value[1:] for _, _, value in page.loads if not value.startswith(PIXELS)}
    wanted |= set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted
    assert wanted <= set(page.ids)


def test_every_section_and_figure_is_there(html: str) -> None:
    page = read_page(html)
    sections = (
        "result cost bits sensitivities frontier prediction shift stability skipped use "
        "provenance terms"
    )
    figures = "result bits heat depth frontier agreement stability"
    for name in [*sections.split(), *(f"figure-{figure}" for figure in figures.split())]:
        assert name in page.ids
    assert page.tags.count("svg") == 7


def test_result_table_holds_the_numbers_of_the_records(run: Run, html: str) -> None:
    table = next(t for t in read_page(html).tables if t[0][0] == "mix" and "perplexity" in t[0])
    rows = [row for row in table[1:] if len(row) > 1]
    texts = list(run.validation.texts)
    assert len(rows) == len(texts) * len(run.validation.mixes)
    cells = iter(rows)
    for text in texts:
        for mix in run.validation.mixes:
            row, m = next(cells), mix.measured[text]
            assert row[0] == mix.name
            assert float(row[1]) == pytest.approx(mix.totals.average_bits, abs=5e-4)
            assert float(row[2]) == pytest.approx(mix.totals.bits_per_weight, abs=5e-4)
            size = mix.totals.size["compressed-tensors"]
            assert float(row[3]) == pytest.approx(size / 1e6, abs=5e-3)
            assert mix.prediction is not None
            assert numbers(row[5]) == pytest.approx(
                [mix.prediction.kl, mix.prediction.kl_stderr], rel=0.05
            )
            assert numbers(row[6]) == pytest.approx([m.kl, m.kl_stderr], rel=0.05)
            if mix.name != "chosen":
                assert numbers(row[7]) == pytest.approx(
                    [m.difference, m.difference_stderr], rel=0.05
                )
            assert float(row[8].removesuffix(" %")) == pytest.approx(100 * m.same_top1, abs=0.05)
            assert float(row[9]) == pytest.approx(m.perplexity, abs=5e-3)


def test_full_table_holds_every_score_with_its_error(run: Run, html: str) -> None:
    s = run.sensitivities
    table = next(t for t in read_page(html).tables if t[0][1].startswith("int2-g64"))
    assert [row[0] for row in table[1:]] == [layer.name for layer in s.layers]
    score = s.scores["shrunk"]
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    units = [head.removeprefix(f) for f, head in zip(s.formats, table[0][1:], strict=True)]
    powers = [int(unit.translate(superscripts).removesuffix(" nats")[2:]) for unit in units]
    for index, row in enumerate(table[1:]):
        for column, cell in enumerate(row[1:]):
            value, stderr = numbers(cell)
            scale = 10.0 ** powers[column]
            assert value * scale == pytest.approx(score.values[index][column], rel=0.02)
            assert stderr * scale == pytest.approx(score.stderr[index][column], rel=0.06)


def test_headline_says_the_measured_numbers(run: Run, html: str) -> None:
    text = " ".join(read_page(html).text.split())
    chosen, uniform = run.validation.mixes[0], run.validation.mixes[1]
    m, u = chosen.measured["held-out"], uniform.measured["held-out"]
    assert f"{with_error(m.kl, m.kl_stderr)} nats of KL divergence" in text
    assert f"differs by {with_error(u.kl, u.kl_stderr)} nats. The mix loses less" in text
    assert f"{m.kl / u.kl:.2f} times as much" in text


def test_a_mix_that_is_not_better_is_not_called_better(run: Run) -> None:
    def sentences(difference: float, stderr: float) -> str:
        uniform = run.validation.mixes[1]
        measured = {
            name: replace(m, difference=difference, difference_stderr=stderr)
            for name, m in uniform.measured.items()
        }
        mixes = (run.validation.mixes[0], replace(uniform, measured=measured))
        validation = replace(run.validation, mixes=mixes)
        return " ".join(make_headline(run.sensitivities, run.allocation, validation).sentences)

    assert "no difference that this measurement can tell" in sentences(0.01, 0.01)
    assert "The mix loses more" in sentences(-0.1, 0.01)


def test_hostile_names_are_escaped_everywhere(run: Run) -> None:
    s = run.sensitivities
    first = s.layers[0].name
    layers = (replace(s.layers[0], name=f"{HOSTILE}.0.{HOSTILE}"), *s.layers[1:])
    rename = {first: layers[0].name}
    allocation = replace(
        run.allocation,
        layers={rename.get(k, k): v for k, v in run.allocation.layers.items()},
        stability={rename.get(k, k): 0.01 if k in rename else v
                   for k, v in run.allocation.stability.items()},
        runtime=HOSTILE,
        warnings=(HOSTILE,),
        baselines=(replace(run.allocation.baselines[0], name=HOSTILE, about=HOSTILE),),
    )  # fmt: skip
    validation = replace(
        run.validation,
        texts={HOSTILE: run.validation.texts["held-out"]},
        original={HOSTILE: (3.0, 0.1)},
        mixes=tuple(
            replace(m, about=HOSTILE, name=HOSTILE, measured={HOSTILE: m.measured["held-out"]})
            for m in run.validation.mixes[:2]
        ),
    )
    html = render_report(
        replace(
            s,
            layers=layers,
            model=replace(s.model, source=f"hub/{HOSTILE}", architecture=HOSTILE),
            skipped=(Skipped(HOSTILE, HOSTILE, (1,), HOSTILE),),
        ),
        allocation,
        validation,
        provenance=replace(run.provenance, host=HOSTILE, versions={HOSTILE: HOSTILE}),
        exports={HOSTILE: f"x{HOSTILE}"},
    )
    page = read_page(html)
    assert page.problems == []
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script>") > 10
    assert "\x1b" not in html
    assert "\u202e" not in html
    html.encode()


def test_missing_records_leave_their_sections_out(run: Run) -> None:
    bare = read_page(render_report(run.sensitivities))
    assert bare.problems == []
    gone = {"result", "cost", "bits", "frontier", "prediction", "shift", "stability", "use"}
    assert gone.isdisjoint(bare.ids)
    assert bare.tags.count("svg") == 2
    assert "No formats have been chosen yet" in bare.text
    chosen = read_page(render_report(run.sensitivities, run.allocation))
    assert {"result", "bits", "prediction", "stability", "use"} <= set(chosen.ids)
    assert {"shift", "cost", "frontier", "figure-result"}.isdisjoint(chosen.ids)
    assert "Nothing has been measured yet" in " ".join(chosen.text.split())
    measured = read_page(render_report(run.sensitivities, None, run.validation))
    assert measured.problems == []
    assert {"result", "shift"} <= set(measured.ids)
    assert {"bits", "stability"}.isdisjoint(measured.ids)


def test_equal_records_give_equal_bytes(html: str) -> None:
    assert render(make_run(5)) == html


def test_one_layer_and_one_format_work() -> None:
    page = read_page(render(tiny_run()))
    assert page.problems == []
    assert "the 1 layer of" in page.text


def test_a_model_of_210_layers_and_12_formats_stays_below_three_megabytes() -> None:
    groups = [f"int{bits}-{group}" for bits in (2, 3, 4, 5, 6, 8) for group in ("g64", "channel")]
    run = make_run(30, tuple(groups))
    html = render(run)
    assert read_page(html).problems == []
    assert len(html.encode()) < 3_000_000


def test_formats_that_do_not_fit_a_layer_show_a_dash() -> None:
    run = make_run(3, ("int4-g128", "int4-g64", "none"))
    assert any(v is None for row in run.sensitivities.scores["shrunk"].values for v in row)
    page = read_page(render(run))
    assert page.problems == []
    table = next(t for t in page.tables if t[0][1].startswith("int4-g128"))
    missing = [row[1] == "–" for row in table[1:]]
    values = to_array(run.sensitivities.scores["shrunk"].values)
    assert missing == [bool(v != v) for v in values[:, 0]]
    assert not [cell for t in page.tables for row in t for cell in row if "nan" in cell]


def test_records_of_two_runs_are_refused_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    other = replace(run.allocation, sensitivities="0" * 64)
    path = tmp_path / "report.html"
    with pytest.raises(StateMismatch, match="two runs"):
        write_report(path, run.sensitivities, other)
    unknown = replace(run.allocation, score="shrunken")
    with pytest.raises(StateMismatch, match="Did you mean 'shrunk'"):
        write_report(path, run.sensitivities, unknown)
    fewer = make_sensitivities(2)
    with pytest.raises(StateMismatch, match="different models"):
        write_report(path, fewer, run.allocation)
    assert list(tmp_path.iterdir()) == []


def test_report_is_written_where_it_was_asked(run: Run, html: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    written = write_report(
        path,
        run.sensitivities,
        run.allocation,
        run.validation,
        frontier=run.frontier,
        provenance=run.provenance,
        exports=EXPORTS,
    )
    assert written == path
    assert path.read_text(encoding="utf-8") == html
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_commands_name_the_exported_folders(html: str) -> None:
    text = read_page(html).text
    assert "AutoModelForCausalLM.from_pretrained('run/exports/compressed-tensors')" in text
    assert "pretrained=run/exports/compressed-tensors" in text
    assert "hawqkit allocate RUN --budget average_bits=4.5" in text


def numbers(cell: str) -> list[float]:
    """Read `value ± error`, also in the form `(value ± error)e-7`."""
    match = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)(?:\)e(-?\d+))?", cell)
    assert match is not None, cell
    scale = 10.0 ** int(match[3] or 0)
    return [float(match[1]) * scale, float(match[2]) * scale]
