"""Each layer's curvature beside its bits, the limit on the KL, and the choice at another risk."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from markupsafe import Markup
from report_reading import Page, read_page
from rich.cells import cell_len
from rich.console import Console
from synthetic import Run, make_run

from hawqkit.records import (
    Allocation,
    BlockSpectrum,
    Curvature,
    Eigenvalues,
    Estimate,
    KlBudget,
    Mix,
    OtherRisk,
    Ranks,
    RankStatistics,
    Spectrum,
    exact_estimate,
)
from hawqkit.report import html, print_summary, render_report
from hawqkit.report.layer_curvature import curvature_columns

EPS = (1e-2, 1e-5)
MEASURED = ("model.layers.1.self_attn.v_proj", "model.layers.3.mlp.down_proj")
HOSTILE = "<script>alert('x')</script>\x1b[31m"


@pytest.fixture(scope="module")
def run() -> Run:
    return make_run(5)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out: they take seconds and have tests of their own."""
    blank = {name: Markup("<svg></svg>") for name in ("heat", "depth", "bits", "stability")}
    monkeypatch.setattr(html, "_figures", lambda *_: blank)


def block(name: str, number: int) -> BlockSpectrum:
    """Return a block whose figures are all told apart by `number`."""
    size = 1000 * (number + 1)

    def sampled(value: float) -> Estimate:
        return Estimate(value, value / 20, 10, 600, "lanczos quadrature")

    counts = tuple(
        Estimate(r, r / 10, 10, 600, "lanczos quadrature", (r / 2, 2 * r))
        for r in (17.0 + number, 170.0 + number)
    )
    return BlockSpectrum(
        name=name,
        block=number,
        size=size,
        method="lanczos quadrature",
        top=Eigenvalues((7.25 + number,), (1e-4,), (True,), size, 20, 1e-6, "magnitude"),
        ranks=Ranks(
            EPS,
            (EPS[0], 2e-5),
            counts,
            tuple(
                Estimate(1 - c.value / size, c.stderr / size, 10, 600, c.method) for c in counts
            ),
            tuple(exact_estimate(0.0, products=0, method="dense") for _ in counts),
            size,
            2e-5,
            7.25 + number,
            "lanczos quadrature",
            600,
        ),
        statistics=RankStatistics(
            stable=sampled(3.5 + number),
            trace_ratio=sampled(11.5 + number),
            participation=sampled(31.5 + number),
            entropy=sampled(71.5 + number),
            trace=sampled(90.5 + number),
            frobenius=sampled(12.0),
            largest=7.25 + number,
            size=size,
            products=600,
        ),
        smallest=0.0,
        products=600,
    )  # fmt: skip


def spectrum(run: Run, kind: str = "gauss-newton") -> Spectrum:
    return Spectrum(
        kind=kind,
        objective="cross-entropy",
        blocks=tuple(block(name, 2 * i + 1) for i, name in enumerate(MEASURED)),
        whole=None,
        traces={},
        settings={},
        model=run.sensitivities.model.source,
        model_hash=run.sensitivities.model.hash,
        data=None,
        fingerprint="f" * 64,
    )


def page_of(run: Run, allocation: Allocation | None = None, **records: object) -> Page:
    text = render_report(run.sensitivities, allocation or run.allocation, **records)  # type: ignore[arg-type]
    page = read_page(text)
    assert page.problems == []
    return page


def layer_table(page: Page) -> list[list[str]]:
    return next(t for t in page.tables if t[0][:2] == ["layer", "shape"])


def test_without_a_spectrum_the_table_holds_what_the_probe_measured(run: Run) -> None:
    s = run.sensitivities
    head, *rows = layer_table(page_of(run))
    assert head == ["layer", "shape", "bits (format)", "trace of G, nats", "participation ratio"]
    assert [row[0] for row in rows] == [layer.name for layer in s.layers]
    for index, row in enumerate(rows):
        name = run.allocation.layers[row[0]]
        assert row[2] == f"{name[3]} ({name})"
        assert float(row[3].split(" ± ")[0]) == pytest.approx(s.trace[index], rel=0.05)
        assert float(row[4]) == pytest.approx(s.participation_ratio[index], rel=5e-3)


def test_every_figure_of_a_spectrum_stands_in_the_row_of_its_layer(run: Run) -> None:
    columns = curvature_columns(run.sensitivities, run.allocation, spectrum(run))
    names = [layer.name for layer in run.sensitivities.layers]
    heads = {column.head: column for column in columns}
    wanted = {"λₘₐₓ": 7.25, "stable rank": 3.5, "tr / λ₁": 11.5, "entropy rank": 71.5}
    for head, value in wanted.items():
        cells = heads[head].cells
        for number, name in enumerate(MEASURED):
            cell = cells[names.index(name)]
            assert cell.value == value + 2 * number + 1
            assert float(cell.text.split(" ± ")[0]) == pytest.approx(cell.value, rel=0.02)
        others = [c for name, c in zip(names, cells, strict=True) if name not in MEASURED]
        assert {(c.text, c.value) for c in others} == {("–", None)}
    degenerate = heads["degeneracy at eps = 0.01"].cells[names.index(MEASURED[0])]
    assert degenerate.text == "99.100 ± 0.090 %"  # 1 - 18 / 2000
    lifted = heads["degeneracy at eps = 1e-05"].cells[names.index(MEASURED[0])]
    assert lifted.text.endswith("(eps 2.0e-05)")


def test_the_probe_fills_participation_ratios_and_its_figures_are_told_apart(run: Run) -> None:
    s = run.sensitivities
    columns = curvature_columns(s, run.allocation, spectrum(run))
    ratios = next(c for c in columns if c.head == "participation ratio")
    for layer, cell, probe in zip(s.layers, ratios.cells, s.participation_ratio, strict=True):
        if layer.name in MEASURED:
            assert cell.value == 31.5 + 2 * MEASURED.index(layer.name) + 1
        else:
            assert cell.value == probe
        assert cell.probe == (layer.name not in MEASURED)
    text = " ".join(page_of(run, spectrum=None).text.split())
    assert "hawqkit spectrum measures λₘₐₓ" in text


def test_a_hessians_participation_ratio_is_not_mixed_with_that_of_g(run: Run) -> None:
    columns = curvature_columns(run.sensitivities, run.allocation, spectrum(run, "hessian"))
    heads = [column.head for column in columns]
    assert "participation ratio of G" in heads
    assert "participation ratio of the Hessian" in heads
    assert "λₘₐₓ of the Hessian" in heads
    assert not any(cell.probe for column in columns for cell in column.cells)


def test_scores_of_the_true_hessian_bring_their_columns(run: Run) -> None:
    count = len(run.sensitivities.layers)
    curvature = Curvature(
        sequences=((0,), (1,)),
        length=8,
        counts=(7, 7),
        relative_error=0.1,
        traces=((4.0,) * count, (6.0,) * count),
        trace_stderr=((0.0,) * count,) * 2,
        eigenvalues=((1.0,) * count, (3.0,) * count),
        residuals=((0.0,) * count,) * 2,
    )
    columns = curvature_columns(replace(run.sensitivities, curvature=curvature), run.allocation)
    found = {column.words: column.cells[0].value for column in columns}
    assert found["trace of the Hessian"] == 5.0
    assert found["λₘₐₓ over shards"] == 2.0


def test_what_nothing_was_measured_for_is_left_out(run: Run) -> None:
    s = run.sensitivities
    bare = replace(s, participation_ratio=(None,) * len(s.layers))
    assert [c.words for c in curvature_columns(bare)] == ["trace"]
    one = replace(s, participation_ratio=(1.0, *(None,) * (len(s.layers) - 1)))
    (ratio,) = [c for c in curvature_columns(one) if c.words == "participation ratio"]
    assert [cell.text for cell in ratio.cells] == ["1", *["–"] * (len(s.layers) - 1)]
    text = render_report(one)
    assert text.count('title="not measured"') == len(s.layers) - 1
    assert "A dash: not measured." in text


def test_rows_can_be_ordered_by_every_column_without_a_script(run: Run) -> None:
    text = render_report(run.sensitivities, run.allocation)
    page = read_page(text)
    columns = curvature_columns(run.sensitivities, run.allocation)
    assert page.tags.count("input") == len(columns) + 1
    styles = re.findall(r'<tr style="([^"]+)">', text)
    for number, column in enumerate(columns, 1):
        assert f"order-{number}" in page.ids
        assert f"#order-{number}:checked) tbody tr {{ order: var(--o{number}); }}" in text
        ranks = [int(re.search(rf"--o{number}:(\d+);", style)[1]) for style in styles]  # type: ignore[index]
        assert sorted(ranks) == list(range(len(run.sensitivities.layers)))
        values = [cell.value for cell in column.cells]
        ordered = [values[ranks.index(place)] for place in range(len(ranks))]
        assert ordered == sorted(ordered, reverse=True)  # type: ignore[type-var]


def test_layers_that_were_not_measured_come_last_in_every_order(run: Run) -> None:
    columns = curvature_columns(run.sensitivities, run.allocation, spectrum(run))
    names = [layer.name for layer in run.sensitivities.layers]
    stable = next(c for c in columns if c.words == "stable rank")
    assert stable.ranks[names.index(MEASURED[1])] == 0
    assert stable.ranks[names.index(MEASURED[0])] == 1
    rest = [r for n, r in zip(names, stable.ranks, strict=True) if n not in MEASURED]
    assert rest == list(range(2, len(names)))  # in the model's order


def summary(run: Run, allocation: Allocation, found: Spectrum | None = None) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, run.sensitivities, allocation, spectrum=found, full=True)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_shows_the_same_beside_the_bits_in_80_columns(run: Run) -> None:
    text = summary(run, run.allocation, spectrum(run))
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    part = text.split("Curvature of each layer beside its bits")[1]
    row = next(line for line in part.splitlines() if "1.self_attn.v_proj" in line).split()
    bits = run.allocation.layers[MEASURED[0]][3]
    assert row[1] == bits
    assert row[3:] == ["8.25", "4.5", "32.5", "72.5", "99.1", "%"]


def test_the_spread_stands_beside_the_predicted_kl_in_words(run: Run) -> None:
    sentence = "Spread 3.0 %: by the luck of rounding alone, the KL of a mix comes out"
    assert run.allocation.prediction is not None
    assert run.allocation.prediction.spread == 0.0305
    assert sentence in " ".join(summary(run, run.allocation).split())
    assert sentence in " ".join(page_of(run).text.split())
    unknown = replace(
        run.allocation, prediction=replace(run.allocation.prediction, spread=None), baselines=()
    )
    assert "by the luck of rounding" not in summary(run, unknown)
    assert "by the luck of rounding" not in page_of(run, unknown).text


def kept(**changes: object) -> KlBudget:
    plain = KlBudget(
        0.2, 0.9, 1.2815516, 0.181, 0.006, 0.0305, 0.1913, "withheld sequences", 16, "stored bits",
        451_000_000, 450_995_490, 0.174, 450_889_408, 0.1741, 0.2003, 11,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def test_the_report_says_how_a_limit_on_the_kl_was_kept(run: Run) -> None:
    allocation = replace(run.allocation, budgets={"max_predicted_kl": 0.2}, kl_budget=kept())
    text = " ".join(page_of(run, allocation).text.split())
    assert "a predicted KL of at most 0.2 nats with confidence 0.9, in the smallest mix" in text
    assert "predicted as 0.1810 ± 0.0060 nats (from 16 sequences, withheld sequences)" in text
    assert "it stays below 0.1913 nats with confidence 0.9: prediction + 1.28 √(" in text
    proof = "No mix of less than 450,995,490 (relative gap 1e-05) has a summed score of 0.174 nats"
    assert f"It takes 451,000,000 stored bits. {proof}" in text
    assert "nats or less: the best, of 450,889,408, has 0.1741, and its KL is only known" in text
    assert "to stay below 0.2003" in text
    assert "hawqkit allocate RUN --budget max_predicted_kl=0.1 " in text
    plain = replace(
        allocation,
        kl_budget=kept(confidence=0.5, quantile=0.0, smaller_amount=None, kl_stderr=None),
    )
    text = " ".join(page_of(run, plain).text.split())
    assert "a predicted KL of at most 0.2 nats, in the smallest mix" in text
    assert "√((" not in text
    assert "No mix is smaller: every layer is in its smallest format." in text


def with_other(run: Run, **formats: str) -> Allocation:
    """Return the allocation with what risk 1 would choose: other formats for the named layers."""
    names = {f"model.layers.{name}": form for name, form in formats.items()}
    assert run.allocation.prediction is not None
    prediction = replace(run.allocation.prediction, kl=0.777, kl_stderr=0.011)
    mix = Mix(
        "risk 1", "", {**run.allocation.layers, **names}, run.allocation.totals, 0.1, prediction
    )
    deviations: dict[str, float | None] = dict.fromkeys(run.allocation.layers, 0.25)
    return replace(run.allocation, other_risk=OtherRisk(1.0, "a deviation", mix, deviations))


def test_the_report_shows_the_layers_that_another_risk_changes(run: Run) -> None:
    changed = {"2.mlp.up_proj": "int8-g64", "4.self_attn.q_proj": "int8-g64"}
    assert all(run.allocation.layers[f"model.layers.{n}"] != f for n, f in changed.items())
    allocation = with_other(run, **changed)
    page = page_of(run, allocation)
    table = next(t for t in page.tables if t[0][1:3] == ["risk 0", "risk 1"])
    ratios = dict(
        zip(
            (layer.name for layer in run.sensitivities.layers),
            run.sensitivities.participation_ratio,
            strict=True,
        )
    )
    assert [row[0] for row in table[1:]] == [f"model.layers.{name}" for name in changed]
    for row in table[1:]:
        assert row[1:4] == [run.allocation.layers[row[0]], "int8-g64", "25.0 %"]
        assert float(row[4]) == pytest.approx(ratios[row[0]], rel=5e-3)
    text = " ".join(page.text.split())
    assert "chosen at risk 0. One unit of risk adds a deviation to every score “shrunk”" in text
    sentence = f"2 layers of {len(ratios)} would be stored in another format"
    assert sentence in text
    assert "and 0.777 ± 0.011 nats at risk 1" in text
    shown = summary(run, allocation)
    assert sentence in " ".join(shown.split())
    assert max(cell_len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_a_risk_that_changes_nothing_is_said_to(run: Run) -> None:
    page = page_of(run, with_other(run))
    text = " ".join(page.text.split())
    assert f"none of the {len(run.allocation.layers)} layers would change" in text
    assert not [t for t in page.tables if t[0][1:2] == ["risk 0"]]
    assert "risk" not in page_of(run).ids


def test_hostile_texts_of_the_new_records_are_escaped(run: Run) -> None:
    allocation = with_other(run, **{"2.mlp.up_proj": HOSTILE})
    assert allocation.other_risk is not None
    allocation = replace(
        allocation,
        budgets={"max_predicted_kl": 0.2},
        other_risk=replace(allocation.other_risk, deviation=HOSTILE),
        kl_budget=kept(source=HOSTILE, minimized=HOSTILE),
    )
    text = render_report(run.sensitivities, allocation)
    page = read_page(text)
    assert page.problems == []
    assert "script" not in page.tags
    assert "\x1b" not in text
    assert "\x1b" not in summary(run, allocation)
