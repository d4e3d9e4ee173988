"""Terminal tables: what `hawqkit show` prints. Every table fits 80 columns.

A table that would be wider is cut into several: sizes and prediction in one, each text in one of
its own, formats in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from hawqkit.formats import parse_format
from hawqkit.records import (
    Allocation,
    Cost,
    Provenance,
    Sensitivities,
    Spectrum,
    Validation,
)
from hawqkit.report.choice import risk_view, spread_sentence
from hawqkit.report.classification_tables import accuracy_table, loss_table
from hawqkit.report.comparison import (
    Row,
    agreements,
    compare,
    score_used,
    target_names,
    texts_of,
)
from hawqkit.report.layer_curvature import curvature_table
from hawqkit.report.linearized import linearized_parts
from hawqkit.report.nouns import Nouns, nouns_for
from hawqkit.report.spectral_tables import spectrum_tables
from hawqkit.report.terminal import add_columns, new_table
from hawqkit.report.wording import (
    DASH,
    ELLIPSIS,
    clean,
    common_prefix,
    compact,
    duration,
    fixed,
    gigabytes,
    loss_sentence,
    megabytes,
    percent,
    perplexity,
    power_label,
    scale_of_ten,
    shorten,
    significant,
    with_error,
)

WIDTH = 80
ENDS = 8  # rows at each end of a shortened table
LONGEST_NAME = 28  # longer names are cut before a format moves to the next table


def print_summary(
    console: Console,
    sensitivities: Sensitivities | None = None,
    allocation: Allocation | None = None,
    validation: Validation | None = None,
    provenance: Provenance | None = None,
    *,
    spectrum: Spectrum | None = None,
    full: bool = False,
) -> None:
    """Print every table that the given records allow, the result first.

    Args:
        console: where to print; tables are laid out for its width.
        sensitivities: for the layers and the most sensitive ones.
        allocation: for sizes, formats and predictions.
        validation: for what was measured.
        provenance: for what it cost.
        spectrum: for eigenvalues, rank and degeneracy.
        full: print every layer, not only the first and last ones.

    Raises:
        StateMismatch: the allocation was not made from these sensitivities.
    """
    record = sensitivities or allocation
    note = loss_sentence(record.loss) if record is not None else ""
    parts: list[RenderableType] = [Text(f"{note}\n")] if note else []
    parts += result_tables(allocation, validation)
    parts += agreement_tables(allocation, validation)
    parts += linearized_parts(compare(allocation, validation), nouns_for(sensitivities, validation))
    if sensitivities is not None:
        parts.append(sensitivities_table(sensitivities, allocation))
        parts.append(layers_table(sensitivities, allocation, full=full, width=console.width))
        if spectrum is not None and spectrum.blocks:
            parts.append(curvature_table(sensitivities, allocation, spectrum, full=full))
    if allocation is not None and sensitivities is not None:
        parts += risk_parts(sensitivities, allocation, full=full)
    if spectrum is not None:
        parts += spectrum_tables(spectrum, full=full)
    if provenance is not None and provenance.costs:
        parts.append(cost_table(provenance.costs))
    records = (sensitivities, allocation, validation)
    for warning in (w for record in records if record is not None for w in record.warnings):
        parts.append(Text(f"warning: {clean(warning)}\n"))
    for part in parts:
        console.print(part)


def result_tables(
    allocation: Allocation | None, validation: Validation | None = None
) -> list[RenderableType]:
    """Return the result against the baselines: sizes and prediction, then a table for each text."""
    rows = compare(allocation, validation)
    if not rows:
        return []
    spread = spread_sentence(allocation)
    tables: list[RenderableType] = [*_sizes_tables(rows)]
    tables += [Text(f"{spread}\n")] if spread else []
    nouns = nouns_for(None, validation)
    for text in texts_of(validation):
        tables.append(_text_table(rows, text, nouns))
        if validation is not None and text in validation.classification:
            tables.append(accuracy_table(text, validation.classification[text], nouns))
    if validation is not None:
        tables += loss_table(validation, nouns)
    return tables


def agreement_tables(allocation: Allocation | None, validation: Validation | None) -> list[Table]:
    """Return predicted against measured KL, a table for each text that has both."""
    rows = compare(allocation, validation)
    tables = []
    for text in texts_of(validation):
        found = agreements(rows, [text])
        if not found:
            continue
        table = new_table(f"Predicted and measured KL on {clean(text)}, nats")
        add_columns(
            table, "mix", "predicted", "with inter-\nactions", "measured", "measured /\npredicted"
        )
        for each in found:
            table.add_row(
                _name(each.name),
                with_error(each.prediction.kl, each.prediction.kl_stderr),
                with_error(each.prediction.joint, each.prediction.joint_stderr),
                with_error(each.measured.kl, each.measured.kl_stderr),
                with_error(each.ratio, each.ratio_stderr),
                style="bold" if each.chosen else "",
            )
        tables.append(table)
    return tables


def layers_table(
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    *,
    full: bool = False,
    width: int = WIDTH,
) -> Group:
    """Return each layer with its format, stability, and predicted KL in every format.

    Args:
        sensitivities: the table.
        allocation: which format each layer got, None if nothing was chosen.
        full: every layer; otherwise the first and last eight, and how many lie between.
        width: characters a line; formats that do not fit go to further tables.

    Raises:
        StateMismatch: the allocation was not made from these sensitivities.
    """
    score = score_used(sensitivities, allocation)
    power = scale_of_ten([v for row in score.values for v in row if v is not None])
    prefix = common_prefix([layer.name for layer in sensitivities.layers])
    longest = max(len(clean(layer.name)) for layer in sensitivities.layers) - len(prefix)
    fixed_part = 22 if allocation else 1  # format, kept, and the spaces between them
    cell = 1 + max(5, *(len(part) for f in sensitivities.formats for part in f.split("-")))
    chunk = max((max(width, WIDTH) - fixed_part - min(longest, LONGEST_NAME)) // cell, 1)
    bounds = [*range(0, len(sensitivities.formats), chunk), len(sensitivities.formats)]
    tables: list[RenderableType] = []
    for start, stop in pairwise(bounds):
        formats = sensitivities.formats[start:stop]
        table = new_table(
            f"Layers: KL predicted by score {clean(score.name)!r}, {power_label(power)}"
            + (f"; all under {prefix}" if prefix else "")
        )
        heads = ["layer", *(["format", "kept"] if allocation else [])]
        add_columns(table, *heads, *(f.replace("-", "\n") for f in formats))
        room = max(width, WIDTH) - fixed_part - cell * len(formats)
        for index in _shown(len(sensitivities.layers), full):
            if index is None:
                hidden = len(sensitivities.layers) - 2 * ENDS
                table.add_row(Text(f"{ELLIPSIS} {hidden} more", style="italic"))
                continue
            cells = [compact(_scaled(v, power)) for v in score.values[index][start:stop]]
            name = shorten(sensitivities.layers[index].name[len(prefix) :], room)
            table.add_row(Text(name), *_decision(sensitivities, allocation, index), *cells)
        tables.append(table)
    return Group(*tables)


def sensitivities_table(
    sensitivities: Sensitivities,
    allocation: Allocation | None = None,
    *,
    top: int = 10,
) -> Table:
    """Return the layers that would suffer most, at the format whose width is nearest to 4 bits.

    Raises:
        StateMismatch: the allocation was not made from these sensitivities.
    """
    score = score_used(sensitivities, allocation)
    column = min(range(len(sensitivities.formats)), key=lambda f: _from_four(sensitivities, f))
    losses = [row[column] for row in score.values]
    order = sorted(
        (i for i, v in enumerate(losses) if v is not None), key=lambda i: -(losses[i] or 0.0)
    )
    power = scale_of_ten([v for v in losses if v is not None])
    table = new_table(
        f"Most sensitive layers at {clean(sensitivities.formats[column])} "
        f"(KL in {power_label(power)})"
    )
    prefix = common_prefix([layer.name for layer in sensitivities.layers])
    add_columns(table, "layer", "predicted KL", "trace", "participation\nratio", "weights")
    for index in order[:top]:
        layer = sensitivities.layers[index]
        table.add_row(
            Text(shorten(layer.name[len(prefix) :], 24)),
            with_error(_scaled(losses[index], power), _scaled(score.stderr[index][column], power)),
            with_error(sensitivities.trace[index], sensitivities.trace_stderr[index]),
            significant(sensitivities.participation_ratio[index], 3),
            f"{layer.numel / 1e6:.2f}M" if layer.numel >= 1e5 else f"{layer.numel:,}",
        )
    return table


def risk_parts(
    sensitivities: Sensitivities, allocation: Allocation, *, full: bool = False
) -> list[RenderableType]:
    """Return what another risk would choose: sentences, and the layers that change."""
    view = risk_view(sensitivities, allocation)
    if view is None:
        return []
    about = Text(f"{view.sentences[-1]}\n")
    if not view.changes:
        return [about]
    table = new_table("Layers that another risk stores in another format")
    add_columns(table, "layer", *view.heads, "one unit\nadds", "participation\nratio")
    prefix = common_prefix([layer.name for layer in sensitivities.layers])
    for index in _shown(len(view.changes), full):
        if index is None:
            hidden = len(view.changes) - 2 * ENDS
            table.add_row(Text(f"{ELLIPSIS} {hidden} more", style="italic"))
            continue
        change = view.changes[index]
        name = Text(shorten(change.layer[len(prefix) :], 24))
        formats = (Text(shorten(f, 14)) for f in (change.chosen, change.other))
        table.add_row(name, *formats, change.deviation, change.ratio)
    return [about, table]


def cost_table(costs: Mapping[str, Cost]) -> Table:
    """Return what each stage took, beside what `check` had predicted."""
    table = new_table("Cost (1 gradient-equivalent = one plain forward and backward pass)")
    add_columns(table, "stage", "time", "predicted", "gradient-eq.", "peak memory", "predicted")
    for stage, cost in costs.items():
        table.add_row(
            _name(stage),
            duration(cost.seconds),
            duration(cost.predicted_seconds),
            significant(cost.gradient_equivalents, 3),
            gigabytes(cost.peak_memory_bytes),
            gigabytes(cost.predicted_memory_bytes or 0),
        )
    if len(costs) > 1:
        table.add_section()
        table.add_row("all", duration(sum(c.seconds for c in costs.values())), "",
                      significant(sum(c.gradient_equivalents for c in costs.values()), 3),
                      gigabytes(max(c.peak_memory_bytes for c in costs.values())), "")  # fmt: skip
    return table


def _sizes_tables(rows: list[Row]) -> list[Table]:
    """Return the sizes of each mix; more than two targets take tables of their own."""
    table = new_table("Result: sizes, and predicted KL in nats")
    targets = target_names(rows)
    first = targets if len(targets) <= 2 else []
    heads = [_target_head(target) for target in first]
    add_columns(table, "mix", "average\nbits", "bits per\nweight", *heads, "predicted KL")
    for row in rows:
        p = row.prediction
        table.add_row(
            _name(row.name),
            fixed(row.totals.average_bits, 3),
            fixed(row.totals.bits_per_weight, 3),
            *(megabytes(row.totals.size.get(target)) for target in first),
            with_error(p.kl, p.kl_stderr) if p else DASH,
            style="bold" if row.chosen else "",
        )
    tables = [table]
    for start in range(0, len(targets) if not first else 0, 4):
        some = targets[start : start + 4]
        more = new_table("Size of what each target writes")
        add_columns(more, "mix", *(_target_head(target) for target in some))
        for row in rows:
            sizes = (megabytes(row.totals.size.get(target)) for target in some)
            more.add_row(_name(row.name), *sizes, style="bold" if row.chosen else "")
        tables.append(more)
    return tables


def _target_head(target: str) -> str:
    return clean(target).replace("-", "-\n") + "\nMB"


def _text_table(rows: Sequence[Row], text: str, nouns: Nouns) -> Table:
    table = new_table(f"Measured on {clean(text)}: KL to the original model in nats")
    last = () if nouns.classes else ("perplexity",)
    add_columns(table, "mix", "measured KL", "minus chosen", "same top-1", *last)
    for row in rows:
        m = row.measured.get(text)
        if m is None:
            continue
        table.add_row(
            _name(row.name),
            with_error(m.kl, m.kl_stderr),
            DASH if row.chosen else with_error(m.difference, m.difference_stderr),
            percent(m.same_top1),
            *(() if nouns.classes else (perplexity(m.loss),)),
            style="bold" if row.chosen else "",
        )
    return table


def _decision(
    sensitivities: Sensitivities, allocation: Allocation | None, index: int
) -> list[Text | str]:
    if allocation is None:
        return []
    name = sensitivities.layers[index].name
    return [
        Text(shorten(allocation.layers.get(name, DASH), 14)),
        percent(allocation.stability.get(name), 0),
    ]


def _shown(count: int, full: bool) -> list[int | None]:
    """Return the indices of the rows to print; None stands for what is left out."""
    if full or count <= 2 * ENDS + 1:
        return list(range(count))
    return [*range(ENDS), None, *range(count - ENDS, count)]


def _from_four(sensitivities: Sensitivities, column: int) -> float:
    """Return how far a format is from 4 bits; far more where it fits few layers."""
    name = sensitivities.formats[column]
    misfits = sum(not parse_format(name).fits(layer.columns) for layer in sensitivities.layers)
    return abs((parse_format(name).bits or 32) - 4) + 100 * misfits


def _scaled(value: float | None, power: int) -> float | None:
    return None if value is None else value / 10.0**power


def _name(name: str) -> Text:
    return Text(shorten(name, 14))
