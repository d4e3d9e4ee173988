"""`report.html`: one file, no network, no script; from whichever records there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from hawqkit.formats import parse_format
from hawqkit.records import (
    Allocation,
    Frontier,
    Provenance,
    Sensitivities,
    Spectrum,
    Tuning,
    Validation,
)
from hawqkit.report import figures, nouns, wording
from hawqkit.report.accuracy import shift_of
from hawqkit.report.arrangement import arrange
from hawqkit.report.choice import budget_sentences, risk_view, spread_sentence
from hawqkit.report.classification import classification_view
from hawqkit.report.comparison import (
    Row,
    agreements,
    compare,
    ratio_of,
    score_used,
    target_names,
    texts_of,
)
from hawqkit.report.glossary import glossary
from hawqkit.report.headline import make_headline, model_name, original_bytes
from hawqkit.report.layer_curvature import curvature_columns
from hawqkit.report.linearized import gap_sentences, linearized_rows
from hawqkit.report.spectral_section import spectrum_view
from hawqkit.report.tuned import tuning_view
from hawqkit.report.tuning_figure import tuning_figure
from hawqkit.report.usage import make_usage
from hawqkit.store import write_text_atomic

TEMPLATE = "template.html.j2"
SPECTRUM_PAGE = "spectrum_page.html.j2"
DOUBTFUL = 10  # least stable layers that are named
OTHER_MIX = (
    "the folder tuning/ is of another mix than the allocation beside it, and is left out here; "
    "tune again, or restore the allocation."
)
LOW_BITS = 2  # where second order misleads


def write_report(
    path: str | Path,
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    validation: Validation | None = None,
    *,
    frontier: Frontier | None = None,
    provenance: Provenance | None = None,
    spectrum: Spectrum | None = None,
    tuning: Tuning | None = None,
    exports: Mapping[str, str | Path] | None = None,
) -> Path:
    """Write the report as one HTML file, atomically, and return where it lies.

    Args:
        path: the file; its folder is made.
        sensitivities: what the probe found.
        allocation: without it, sections on the choice are left out.
        validation: without it, nothing is said about measurements.
        frontier: without it, the section on other sizes is left out.
        provenance: without it, costs, versions and dates are left out.
        spectrum: with its densities; without it, nothing is said about eigenvalues and rank.
        tuning: how the chosen mix was tuned; that of another mix is left out, with a warning.
        exports: target -> folder, for the commands that use them.

    Raises:
        Unsupported: matplotlib is not installed.
        StateMismatch: the records are of different runs.
    """
    text = render_report(
        sensitivities,
        allocation,
        validation,
        frontier=frontier,
        provenance=provenance,
        spectrum=spectrum,
        tuning=tuning,
        exports=exports,
    )
    return write_text_atomic(path, text)


def render_report(
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    validation: Validation | None = None,
    *,
    frontier: Frontier | None = None,
    provenance: Provenance | None = None,
    spectrum: Spectrum | None = None,
    tuning: Tuning | None = None,
    exports: Mapping[str, str | Path] | None = None,
) -> str:
    """Return the report as HTML; equal records give equal text. See `write_report`."""
    rows = compare(allocation, validation)
    texts = texts_of(validation)
    pairs = agreements(rows, texts)
    score = score_used(sensitivities, allocation)
    words = nouns.nouns_for(sensitivities, validation)
    shown = _of_choice(tuning, allocation)
    linear = linearized_rows(rows)
    context: dict[str, Any] = {
        "sensitivities": sensitivities,
        "allocation": allocation,
        "validation": validation,
        "frontier": frontier,
        "provenance": provenance,
        "name": model_name(sensitivities),
        "nouns": words,
        "blocks": arrange(sensitivities.layers).blocks,
        "classification": classification_view(validation, words),
        "loss_shift": shift_of(validation, words) if validation is not None else None,
        "accuracy_of": partial(_accuracy_of, validation),
        "headline": make_headline(sensitivities, allocation, validation),
        "rows": rows,
        "texts": texts,
        "targets": target_names(rows),
        "pairs": pairs,
        "linearized": linear,
        "gap": gap_sentences(linear, words),
        "score": score,
        "power": _power(sensitivities, score.values),
        "formats": _format_counts(sensitivities, allocation),
        "shifts": _shifts(validation),
        "doubtful": _doubtful(allocation),
        "low": _low_layers(allocation),
        "budget": budget_sentences(allocation, words) if allocation is not None else (),
        "spread": spread_sentence(allocation),
        "risk": risk_view(sensitivities, allocation),
        "columns": curvature_columns(sensitivities, allocation, spectrum),
        "usage": make_usage(allocation, exports, words),
        "warnings": _warnings(sensitivities, allocation, validation, spectrum, tuning)
        + ([OTHER_MIX] if tuning is not None and shown is None else []),
        "tuning": tuning_view(shown),
        "spectrum": spectrum_view(spectrum) if spectrum is not None else None,
        "original_bytes": original_bytes(sensitivities),
        "glossary": glossary(words),
        "figure": _figures(sensitivities, allocation, validation, frontier, bool(pairs), shown),
    }
    return _environment().get_template(TEMPLATE).render(context)


def write_spectrum_report(
    path: str | Path, spectrum: Spectrum, provenance: Provenance | None = None
) -> Path:
    """Write a spectrum alone as one HTML file, for a run that has not been probed.

    Args:
        path: the file; its folder is made.
        spectrum: with its densities.
        provenance: without it, the date is left out.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    context = {"spectrum": spectrum_view(spectrum), "provenance": provenance}
    return write_text_atomic(path, _environment().get_template(SPECTRUM_PAGE).render(context))


def _of_choice(tuning: Tuning | None, allocation: Allocation | None) -> Tuning | None:
    """Return the tuning if it is of the chosen mix."""
    fits = tuning is not None and allocation is not None and tuning.layers == allocation.layers
    return tuning if fits else None


def _figures(
    sensitivities: Sensitivities,
    allocation: Allocation | None,
    validation: Validation | None,
    frontier: Frontier | None,
    has_pairs: bool,
    tuning: Tuning | None,
) -> dict[str, Markup]:
    """Return every figure that the records allow; the SVG is ours, its labels are escaped."""
    score = score_used(sensitivities, allocation)
    drawn = {"heat": figures.heat_figure(sensitivities, score, allocation)}
    drawn["depth"] = figures.depth_figure(sensitivities)
    if allocation is not None:
        drawn["bits"] = figures.bits_figure(sensitivities, allocation)
        if allocation.stability:
            drawn["stability"] = figures.stability_figure(sensitivities, allocation)
    if validation is not None:
        drawn["result"] = figures.result_figure(allocation, validation)
        if has_pairs:
            drawn["agreement"] = figures.agreement_figure(allocation, validation)
    if frontier is not None:
        drawn["frontier"] = figures.frontier_figure(frontier)
    if tuning is not None:
        drawn["tuning"] = tuning_figure(tuning)
    return {name: Markup(svg) for name, svg in drawn.items()}


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_resource),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.globals["style"] = Markup(_resource("style.css"))
    environment.globals["power_label"] = wording.power_label
    environment.globals["loss_sentence"] = wording.loss_sentence
    for function in (
        nouns.amount,
        nouns.extent,
        wording.compact,
        wording.duration,
        wording.fixed,
        wording.gigabytes,
        wording.megabytes,
        wording.percent,
        wording.percent_with_error,
        wording.perplexity,
        wording.plural,
        wording.significant,
        wording.with_error,
    ):
        environment.filters[function.__name__] = function
    environment.filters["scaled"] = _scaled
    return environment


def _resource(name: str) -> str:
    return files("hawqkit.report").joinpath(name).read_text(encoding="utf-8")


def _finalize(value: object) -> object:
    """Clean every text that a record brings; markup of our own stays as it is."""
    return (
        wording.clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _scaled(value: float | None, power: int) -> float | None:
    return None if value is None else value / 10.0**power


def _power(sensitivities: Sensitivities, values: tuple[tuple[float | None, ...], ...]) -> list[int]:
    """Return the unit of each format's column in the full table."""
    columns = range(len(sensitivities.formats))
    return [wording.scale_of_ten([row[c] or 0.0 for row in values]) for c in columns]


def _format_counts(
    sensitivities: Sensitivities, allocation: Allocation | None
) -> list[tuple[str, int, float]]:
    """Return (format, layers, share of weights), coarsest first."""
    if allocation is None:
        return []
    layers: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    for layer in sensitivities.layers:
        if layer.name in allocation.layers:
            layers[allocation.layers[layer.name]] += 1
            weights[allocation.layers[layer.name]] += layer.numel
    every = sum(weights.values())
    order = sorted(layers, key=lambda f: (parse_format(f).bits or 99, f))
    return [(name, layers[name], weights[name] / every) for name in order]


def _shifts(validation: Validation | None) -> list[dict[str, Any]]:
    """Return each text with what the chosen mix loses there, over the first text's loss."""
    if validation is None or not validation.mixes:
        return []
    measured = validation.mixes[0].measured
    names = [name for name in texts_of(validation) if name in measured]
    found = []
    for name in names:
        home, here = measured[names[0]], measured[name]
        ratio = ratio_of(here.kl, here.kl_stderr, home.kl, home.kl_stderr)
        loss, stderr = validation.original.get(name, (None, None))
        found.append(
            {
                "name": name, "facts": validation.texts[name], "measured": here, "loss": loss,
                "loss_stderr": stderr, "ratio": ratio if name != names[0] else (None, None),
            }
        )  # fmt: skip
    return found


def _accuracy_of(validation: Validation | None, text: str, row: Row) -> float | None:
    """Return the accuracy of a mix on a data set, None where it was not measured."""
    found = validation.classification.get(text) if validation is not None else None
    if found is None:
        return None
    model = found.chosen if row.chosen else found.mixes.get(row.name)
    return model.accuracy if model is not None else None


def _doubtful(allocation: Allocation | None) -> list[tuple[str, str, float]]:
    """Return (layer, format, share) of the least stable layers."""
    if allocation is None:
        return []
    order = sorted(allocation.stability.items(), key=lambda item: (item[1], item[0]))
    return [
        (name, allocation.layers.get(name, wording.DASH), share)
        for name, share in order[:DOUBTFUL]
        if share < 1.0
    ]


def _low_layers(allocation: Allocation | None) -> int:
    """Return how many layers are stored in so few bits that the prediction misleads."""
    if allocation is None:
        return 0
    bits = (parse_format(name).bits for name in allocation.layers.values())
    return sum(b is not None and b <= LOW_BITS for b in bits)


def _warnings(
    *records: Sensitivities | Allocation | Validation | Spectrum | Tuning | None,
) -> list[str]:
    return list(dict.fromkeys(w for r in records if r is not None for w in r.warnings))
