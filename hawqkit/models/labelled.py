"""Labelled examples for a classifier from where they lie: images, or text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from hawqkit.errors import DataError, InputError, Unsupported
from hawqkit.models.batch import FIRST, predictions
from hawqkit.models.classes import Labels, draw, make_labels, to_classes
from hawqkit.models.examples import ATTENTION, Examples, make_examples
from hawqkit.models.images import open_pictures, prepare, refused_shape
from hawqkit.models.model import LoadedModel
from hawqkit.models.sources import first_line
from hawqkit.models.tables import CLASS, TEXT, WHOLE, find_column, open_table
from hawqkit.models.tasks import CAUSAL_LM, IMAGES, TEXTS

_UNBOUNDED = 1 << 20  # tokenizers that know no limit say some 1e30


def load_examples(
    source: str,
    model: LoadedModel,
    *,
    split: str = "calibration",
    examples: int = 512,
    seed: int = 0,
    withheld: int = 0,
    config: str | None = None,
    column: str | None = None,
    labels: str | None = None,
    length: int = 256,
) -> Examples:
    """Read images or texts with labels, choose some, and prepare them for a classifier.

    Images go through the model's image processor; texts are cut to `length` tokens, and padded.
    Every class has its share of the source among those that choose and among those withheld; which
    examples these are depends on the seed alone.

    Args:
        source: for images a folder with a sub-folder for each class, a `.npz` file with `images`
            and `labels`, a `.parquet` file, a data set's folder or id; for text a `.jsonl`, `.csv`
            or `.parquet` file, a data set's folder or id.
        model: the classifier; its processor or tokenizer and its names of classes are used.
        split: `calibration` (train), `held-out` (test, else validation), or one that there is.
        examples: how many may be used for choosing.
        seed: of the choice.
        withheld: how many more to give that only predict; no example is in both.
        config: configuration of a data set of the hub.
        column: column of images or text; None for the only one.
        labels: column of labels; None for the only column of classes, or one called so.
        length: tokens of a text, at most.

    Raises:
        InputError: an option is out of range, or the model cannot read such data.
        DataError: the source or its labels do not fit the model, something cannot be read, or there
            is too little.
        HawqkitError: the hub cannot be reached.
    """
    for name, value, least in (("examples", examples, 1), ("withheld", withheld, 0)):
        if value < least:
            raise InputError(f"{name}: got {value}; it must be {least} or more.")
    count = (examples, withheld)
    if _reads_images(model):
        pictures = open_pictures(source, split=split, config=config, column=column, labels=labels)
        rows = draw(pictures.labels, *count, seed)
        pixels = prepare(model, pictures, rows)
        # transformers' image models call it so; other networks have one argument.
        argument = "pixel_values" if model.task == IMAGES else FIRST
        return _finish(model, pictures.labels, rows, {argument: pixels}, withheld, seed, "images")
    texts, known = _read_texts(source, split, config, column, labels)
    rows = draw(known, *count, seed)
    tokens = _tokenize(model, [texts[row] for row in rows], length)
    return _finish(model, known, rows, tokens, withheld, seed, "labelled text")


def _reads_images(model: LoadedModel) -> bool:
    if model.task == CAUSAL_LM:
        raise Unsupported(
            f"{model.facts.source} is a language model, which predicts tokens and no labels; use "
            "load_batches, or load it with a task of classification."
        )
    return model.task == IMAGES or (model.task != TEXTS and model.tokenizer is None)


def _finish(
    model: LoadedModel,
    labels: Labels,
    rows: list[int],
    inputs: dict[str, torch.Tensor],
    withheld: int,
    seed: int,
    kind: str,
) -> Examples:
    """Run the model on two examples, which shows its classes, and put everything together."""
    classes = _classes(model, labels.source, inputs)
    numbers, names = to_classes(labels, model.facts.config, classes)
    return make_examples(
        inputs,
        torch.tensor([numbers[row] for row in rows]),
        classes=classes,
        names=names,
        withheld=withheld,
        source=labels.source,
        kind=kind,
        seed=seed,
    )


def _classes(model: LoadedModel, source: str, inputs: dict[str, torch.Tensor]) -> int:
    first = {name: value[:2] for name, value in inputs.items()}  # two: padding takes effect
    count = len(next(iter(first.values())))
    few = make_examples(first, [0] * count)
    try:
        with torch.no_grad():
            logits = predictions(model.module, few.micro_batch(range(count)), model.device)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if ATTENTION in inputs:
            raise DataError(
                f"{source}: the model fails on the first texts ({first_line(error)}); does this "
                "tokenizer belong to it?"
            ) from None
        shape = tuple(next(iter(inputs.values())).shape[1:])
        raise refused_shape(model, source, shape, error) from None
    return int(logits.shape[-1])


def _read_texts(
    source: str, split: str, config: str | None, column: str | None, labels: str | None
) -> tuple[list[str], Labels]:
    """Return the texts of all rows that have one, and their labels."""
    table = open_table(source, split=split, config=config)
    classed = find_column(table, labels, (CLASS, WHOLE, TEXT), ("label", "labels"), CLASS)
    others = {name: c for name, c in table.columns.items() if name != classed or name == column}
    texts = find_column(replace(table, columns=others), column, (TEXT,), ("text", "sentence"), TEXT)
    if texts == classed:
        raise InputError(f"{table.name}: column {texts!r} cannot be text and label at once.")
    values = table.read(texts, None)
    kept = [row for row, value in enumerate(values) if value is not None and value.strip()]
    if not kept:
        raise DataError(f"{table.name}: column {texts!r} holds no text.")
    classes: list[Any] = table.read(classed, None)
    known = make_labels(table.name, [classes[row] for row in kept], table.columns[classed].names)
    return [values[row] for row in kept], known


def _tokenize(model: LoadedModel, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    _check_length(model, length)
    tokenizer = model.tokenizer
    out = tokenizer(
        texts,
        truncation=True,
        max_length=length,
        padding=True,
        padding_side="right",
        return_attention_mask=True,
        return_tensors="pt",
    )
    found: dict[str, torch.Tensor] = {name: out[name] for name in out}
    vocabulary = model.facts.config.get("vocab_size")
    largest = int(found["input_ids"].max())
    if vocabulary is not None and largest >= vocabulary:
        raise DataError(
            f"{model.facts.source}: its tokenizer makes token {largest}, and the model has "
            f"{vocabulary}; use the tokenizer that belongs to it."
        )
    return found


def _check_length(model: LoadedModel, length: int) -> None:
    tokenizer, config = model.tokenizer, model.facts.config
    if tokenizer is None:
        raise DataError(
            f"{model.facts.source} has no tokenizer, so text cannot become tokens; give one to "
            "wrap_model, or make the tokens yourself and use make_examples."
        )
    if tokenizer.pad_token_id is None:
        raise DataError(
            f"{model.facts.source}: its tokenizer has no padding token, so texts of different "
            "length cannot be measured together; set tokenizer.pad_token and the model's "
            "pad_token_id, and save both."
        )
    limits = [config.get("max_position_embeddings"), tokenizer.model_max_length]
    limit = min((n for n in limits if n is not None and n < _UNBOUNDED), default=None)
    if length < 2 or (limit is not None and length > limit):
        most = f", at most {limit} with this model" if limit is not None else ""
        raise InputError(f"length: got {length}; it must be 2 or more{most}.")
