"""The report's first screen: the result in sentences that a stranger understands, key figures."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records import Allocation, Measured, Sensitivities, Validation
from hawqkit.report.comparison import HELD_OUT, Row, compare, texts_of
from hawqkit.report.wording import (
    clean,
    fixed,
    megabytes,
    percent,
    percent_with_error,
    plural,
    with_error,
)

CLEAR = 2.0  # differences below two standard errors are not called differences
UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class Tile:
    """One key figure."""

    value: str
    label: str
    note: str


@dataclass(frozen=True, slots=True)
class Headline:
    """Title, sentences and key figures."""

    title: str
    sentences: tuple[str, ...]
    tiles: tuple[Tile, ...]


def make_headline(
    sensitivities: Sensitivities, allocation: Allocation | None, validation: Validation | None
) -> Headline:
    """Say what was done and what came out, from the records that there are."""
    rows = compare(allocation, validation)
    chosen = rows[0] if rows else None
    name = model_name(sensitivities)
    title = f"{name} in {fixed(chosen.totals.average_bits, 2)} bits" if chosen else name
    sentences = [_what_was_done(sensitivities, chosen)]
    text = next(iter(texts_of(validation)), None)
    if chosen is not None and text is not None and text in chosen.measured and validation:
        sentences += _measured_sentences(rows, text, validation.texts[text].counted)
        sentences += _other_texts(chosen, texts_of(validation)[1:])
    elif chosen is not None and chosen.prediction is not None:
        sentences.append(
            f"It is predicted to differ from the original by "
            f"{with_error(chosen.prediction.kl, chosen.prediction.kl_stderr)} nats of KL "
            "divergence. Nothing has been measured yet."
        )
    return Headline(title, tuple(sentences), tuple(_tiles(sensitivities, rows, text)))


def model_name(sensitivities: Sensitivities) -> str:
    """Return the last part of the model's source."""
    source = clean(sensitivities.model.source).rstrip("/")
    return source.rpartition("/")[2] or source


def original_bytes(sensitivities: Sensitivities) -> int:
    """Return the bytes of the original's tensors and side files; 0 if its tensors are not known."""
    model = sensitivities.model
    if not model.tensors:
        return 0
    return sum(tensor.nbytes for tensor in model.tensors) + sum(model.side_files.values())


def stored_bits(sensitivities: Sensitivities) -> float:
    """Return the average bits that the layers take as they are stored in the original."""
    numel = sum(layer.numel for layer in sensitivities.layers)
    return sum(layer.numel * layer.dtype_bits for layer in sensitivities.layers) / numel


def _what_was_done(sensitivities: Sensitivities, chosen: Row | None) -> str:
    layers = sensitivities.layers
    numel = sum(layer.numel for layer in layers)
    each = "how much it suffers" if len(layers) == 1 else "how much each of them suffers"
    done = (
        f"hawqkit took the {plural(len(layers), 'layer')} of {model_name(sensitivities)} that can "
        f"be compressed ({numel / 1e6:.1f} million of its "
        f"{sensitivities.model.parameters / 1e6:.1f} million weights) and measured {each} when "
        "stored in fewer bits"
    )
    if chosen is None:
        return f"{done}. No formats have been chosen yet."
    return (
        f"{done}. It then chose a format for each within the budget: "
        f"{fixed(chosen.totals.average_bits, 2)} bits a weight on average "
        f"({fixed(chosen.totals.bits_per_weight, 2)} with scales) instead of "
        f"{stored_bits(sensitivities):g}."
    )


def _measured_sentences(rows: list[Row], text: str, counted: int) -> list[str]:
    m = rows[0].measured[text]
    distance = with_error(m.kl, m.kl_stderr)
    same = percent_with_error(m.same_top1, m.same_top1_stderr)
    sentences = [
        (
            f"On {counted:,} predictions of text that the choice never saw ({clean(text)}), the "
            f"compressed model differs from the original by {distance} nats of KL divergence "
            f"(0 would be no change); its most likely next token stays the same in {same} of them."
        )
    ]
    uniform = _uniform(rows, text)
    if uniform is not None:
        sentences.append(_verdict(uniform, uniform.measured[text], m))
    return sentences


def _verdict(uniform: Row, theirs: Measured, ours: Measured) -> str:
    bits = fixed(uniform.totals.average_bits, 2)
    start = (
        f"One format for all layers ({bits} bits) differs by "
        f"{with_error(theirs.kl, theirs.kl_stderr)} nats"
    )
    gap = f"paired difference {with_error(theirs.difference, theirs.difference_stderr)} nats"
    if abs(theirs.difference) <= CLEAR * theirs.difference_stderr:
        return f"{start}: no difference that this measurement can tell ({gap})."
    word = "less" if theirs.difference > 0 else "more"
    ratio = f", {ours.kl / theirs.kl:.2f} times as much" if theirs.kl > 0 else ""
    return f"{start}. The mix loses {word}{ratio} ({gap})."


def _other_texts(chosen: Row, texts: list[str]) -> list[str]:
    return [
        f"On other text ({clean(text)}) the mix differs by "
        f"{with_error(chosen.measured[text].kl, chosen.measured[text].kl_stderr)} nats."
        for text in texts
        if text in chosen.measured
    ]


def _tiles(sensitivities: Sensitivities, rows: list[Row], text: str | None) -> list[Tile]:
    if not rows:
        ratio = sensitivities.network_participation_ratio
        return [
            Tile(f"{len(sensitivities.layers):,}", "layers measured", ""),
            Tile(f"{len(sensitivities.formats)}", "formats each", ""),
            *(
                [Tile(f"{ratio:,.0f}", "participation ratio", "of the whole network")]
                if ratio
                else []
            ),
        ]
    chosen = rows[0]
    tiles = [
        Tile(
            fixed(chosen.totals.average_bits, 2),
            "average bits",
            f"{fixed(chosen.totals.bits_per_weight, 2)} per weight with scales",
        )
    ]
    if chosen.totals.size:
        target, size = max(chosen.totals.size.items(), key=lambda item: item[1])
        before = original_bytes(sensitivities)
        was = f"; original {megabytes(before)} MB" if before else ""
        tiles.append(Tile(f"{megabytes(size)} MB", "size", f"{clean(target)}{was}"))
    if text is None or text not in chosen.measured:
        if chosen.prediction is not None:
            tiles.append(
                Tile(fixed(chosen.prediction.kl, 3), "nats, predicted KL", "not measured yet")
            )
        return tiles
    m = chosen.measured[text]
    where = "held-out text" if text == HELD_OUT else clean(text)
    tiles.append(Tile(fixed(m.kl, 3), "nats of KL divergence", f"measured on {where}"))
    uniform = _uniform(rows, text)
    if uniform is not None and uniform.measured[text].kl > 0:
        theirs = uniform.measured[text].kl
        tiles.append(
            Tile(f"{m.kl / theirs:.2f} ×", "the loss of uniform", f"which loses {fixed(theirs, 3)}")
        )
    tiles.append(
        Tile(percent(m.same_top1), "same next token", f"perplexity {fixed(m.perplexity, 1)}")
    )
    return tiles


def _uniform(rows: list[Row], text: str) -> Row | None:
    found = (r for r in rows if not r.chosen and r.name == UNIFORM and text in r.measured)
    return next(found, None)
