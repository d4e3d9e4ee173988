"""The report's first screen: the result in sentences that a stranger understands, key figures."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records import Allocation, Classification, Measured, Sensitivities, Validation
from hawqkit.report.comparison import HELD_OUT, Row, compare, texts_of
from hawqkit.report.nouns import Nouns, nouns_for
from hawqkit.report.wording import (
    clean,
    fixed,
    megabytes,
    percent,
    percent_with_error,
    perplexity,
    plural,
    points,
    weights,
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
    nouns = nouns_for(sensitivities, validation)
    text = next(iter(texts_of(validation)), None)
    classes = validation.classification.get(text or "") if validation else None
    if chosen is not None and text is not None and text in chosen.measured and validation:
        counted = validation.texts[text].counted
        sentences.append(_measured_sentence(chosen.measured[text], text, counted, nouns))
        sentences += [_accuracy_sentence(classes, nouns)] if classes else []
        uniform = _uniform(rows, text)
        if uniform is not None:
            sentences.append(_verdict(uniform, uniform.measured[text], chosen.measured[text]))
        sentences += _other_texts(chosen, texts_of(validation)[1:], nouns)
    elif chosen is not None and chosen.prediction is not None:
        sentences.append(
            f"It is predicted to differ from the original by "
            f"{with_error(chosen.prediction.kl, chosen.prediction.kl_stderr)} nats of KL "
            "divergence. Nothing has been measured yet."
        )
    tiles = _tiles(sensitivities, rows, text, nouns)
    return Headline(title, tuple(sentences), (*tiles, *_class_tiles(classes, nouns)))


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
        f"be compressed ({weights(numel)} of its {weights(sensitivities.model.parameters)} "
        f"weights) and measured {each} when stored in fewer bits"
    )
    if chosen is None:
        return f"{done}. No formats have been chosen yet."
    return (
        f"{done}. It then chose a format for each within the budget: "
        f"{fixed(chosen.totals.average_bits, 2)} bits a weight on average "
        f"({fixed(chosen.totals.bits_per_weight, 2)} with scales) instead of "
        f"{stored_bits(sensitivities):g}."
    )


def _measured_sentence(m: Measured, text: str, counted: int, nouns: Nouns) -> str:
    distance = with_error(m.kl, m.kl_stderr)
    same = percent_with_error(m.same_top1, m.same_top1_stderr)
    what = nouns.count(counted) if nouns.classes else f"{counted:,} predictions of text"
    return (
        f"On {what} that the choice never saw ({clean(text)}), the "
        f"compressed model differs from the original by {distance} nats of KL divergence "
        f"(0 would be no change); its {nouns.guess} stays the same in {same} of them."
    )


def _accuracy_sentence(found: Classification, nouns: Nouns) -> str:
    before, after = found.original, found.chosen
    told = abs(after.difference) > CLEAR * after.difference_stderr
    change = points(after.difference, after.difference_stderr)
    return (
        f"The original classifies {percent_with_error(before.accuracy, before.accuracy_stderr)} of "
        f"these {nouns.many} correctly, the compressed model "
        f"{percent_with_error(after.accuracy, after.accuracy_stderr)}: a paired difference of "
        f"{change} points{'' if told else ', which this measurement cannot tell from none'}. "
        f"{plural(after.became_wrong, nouns.one, nouns.many)} became wrong and "
        f"{after.became_right:,} became right."
    )


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


def _other_texts(chosen: Row, texts: list[str], nouns: Nouns) -> list[str]:
    return [
        f"On other {nouns.data} ({clean(text)}) the mix differs by "
        f"{with_error(chosen.measured[text].kl, chosen.measured[text].kl_stderr)} nats."
        for text in texts
        if text in chosen.measured
    ]


def _tiles(
    sensitivities: Sensitivities, rows: list[Row], text: str | None, nouns: Nouns
) -> list[Tile]:
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
    where = f"held-out {nouns.data}" if text == HELD_OUT else clean(text)
    tiles.append(Tile(fixed(m.kl, 3), "nats of KL divergence", f"measured on {where}"))
    uniform = _uniform(rows, text)
    if uniform is not None and uniform.measured[text].kl > 0:
        theirs = uniform.measured[text].kl
        tiles.append(
            Tile(f"{m.kl / theirs:.2f} ×", "the loss of uniform", f"which loses {fixed(theirs, 3)}")
        )
    if not nouns.classes:
        tiles.append(
            Tile(percent(m.same_top1), "same next token", f"perplexity {perplexity(m.loss, 1)}")
        )
    return tiles


def _class_tiles(found: Classification | None, nouns: Nouns) -> list[Tile]:
    if found is None:
        return []
    after = found.chosen
    before = percent(found.original.accuracy)
    return [
        Tile(percent(after.accuracy), "accuracy", f"original {before}"),
        Tile(percent(after.flipped / found.count), f"of {nouns.many} flip", "to another class"),
    ]


def _uniform(rows: list[Row], text: str) -> Row | None:
    found = (r for r in rows if not r.chosen and r.name == UNIFORM and text in r.measured)
    return next(found, None)
