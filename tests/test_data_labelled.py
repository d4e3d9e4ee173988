from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pico
import pyarrow
import pyarrow.parquet
import pytest

from hawqkit.errors import DataError, InputError, RecipeError
from hawqkit.models.labelled import load_examples
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.pipeline.inputs import load_inputs
from hawqkit.recipe import load_recipe

NAMES = ("bad", "fine", "good")


def classifier(*, names: tuple[str, ...] = NAMES, tokenizer=None) -> LoadedModel:
    module = pico.text_classifier(names=names)
    return wrap_model(module, name="bert", tokenizer=tokenizer or pico.tokenizer())


def texts(count: int) -> list[tuple[str, int]]:
    """Return texts that begin with their class, and no two of which are equal."""
    return [("abc"[n % 3] + "xyz " * (n % 5) + f"{n}", n % 3) for n in range(count)]


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def classes_seen(examples) -> list[int]:
    first = pico.tokenizer()("abc")["input_ids"]
    return [first.index(t) for t in examples.inputs["input_ids"][:, 0].tolist()]


def test_texts_are_cut_padded_on_the_right_and_labelled(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": t, "label": c} for t, c in texts(30)])
    tokenizer = pico.tokenizer()
    tokenizer.padding_side = "left"
    model = classifier(tokenizer=tokenizer)
    examples = load_examples(source, model, examples=20, withheld=10, length=8)
    ids, mask = examples.inputs["input_ids"], examples.inputs["attention_mask"]
    assert ids.shape == (30, 8)
    assert classes_seen(examples) == examples.labels.tolist()
    written = {}
    for text, label in texts(30):
        tokens = pico.tokenizer()(text)["input_ids"][:8]
        written[tuple(tokens)] = label
    for row, real, label in zip(ids, mask, examples.labels.tolist(), strict=True):
        length = int(real.sum())
        assert real.tolist() == [1] * length + [0] * (8 - length)
        assert written[tuple(row[:length].tolist())] == label
    facts = examples.facts
    assert (facts.kind, facts.classes, facts.sequences, facts.length) == ("labelled text", 3, 30, 8)
    assert facts.tokens == int(mask.sum())
    assert examples.withheld.sum() == 10
    short = examples.micro_batch([int(mask.sum(1).argmin())])
    assert short.inputs(model.device)["input_ids"].shape[1] == int(mask.sum(1).min())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "data set"])
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, kind: str) -> None:
    rows = [{"text": t + ', "quoted"', "label": c} for t, c in texts(24)]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        jsonl(path, rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    examples = load_examples(str(path), classifier(), examples=16, withheld=8)
    assert classes_seen(examples) == examples.labels.tolist()
    again = load_examples(
        jsonl(tmp_path / "again.jsonl", rows), classifier(), examples=16, withheld=8
    )
    assert examples.facts.hash == again.facts.hash
    assert examples.names == NAMES


def test_names_are_looked_up_in_the_model(tmp_path: Path) -> None:
    model = classifier(names=("Good", "Bad", "Fine"))
    rows = [{"text": t, "label": NAMES[c]} for t, c in texts(24)]
    examples = load_examples(jsonl(tmp_path / "a.jsonl", rows), model, examples=24)
    assert [(1, 2, 0)[c] for c in classes_seen(examples)] == examples.labels.tolist()
    other = classifier(names=("x", "y", "z"))
    with pytest.raises(DataError, match=r"3 of its 3 classes are none of the model's"):
        load_examples(jsonl(tmp_path / "a.jsonl", rows), other, examples=24)


def test_sorted_names_where_the_model_has_none(tmp_path: Path) -> None:
    model = wrap_model(pico.text_classifier(), name="m", tokenizer=pico.tokenizer())
    rows = [{"text": t, "label": NAMES[c]} for t, c in texts(24)]
    examples = load_examples(jsonl(tmp_path / "a.jsonl", rows), model, examples=24)
    assert examples.names == NAMES
    assert classes_seen(examples) == examples.labels.tolist()


def test_columns_are_named_and_rows_without_text_left_out(tmp_path: Path) -> None:
    rows = [{"id": n, "said": t, "mood": c} for n, (t, c) in enumerate(texts(24))]
    rows[3]["said"], rows[4]["said"] = None, "  "
    source = jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"stands out; there are 'id' \(whole numbers\)"):
        load_examples(source, classifier(), examples=8)
    examples = load_examples(source, classifier(), examples=22, labels="mood", column="said")
    assert Counter(examples.labels.tolist()) == Counter(
        c for n, (_, c) in enumerate(texts(24)) if n not in (3, 4)
    )
    with pytest.raises(DataError, match="there are 22"):
        load_examples(source, classifier(), examples=23, labels="mood", column="said")
    with pytest.raises(InputError, match="text and label at once"):
        load_examples(
            jsonl(tmp_path / "b.jsonl", [{"a": "x"}, {"a": "y"}]),
            classifier(),
            examples=2,
            labels="a",
            column="a",
        )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": 1}', "rows 1 have no"),
        ("a.jsonl", '{"text": "a", "label": 5}\n{"text": "b", "label": 1}', "outside the 3 clas"),
        ("a.jsonl", '{"text": "a", "label": 1.5}', "'label' \\(something else\\)"),
        ("a.jsonl", '{"text": "", "label": 1}', "'text' holds no text"),
        ("a.jsonl", "{", "line 1: not JSON"),
        ("a.csv", "text,label\na,1\nb,2,3\n", "rows 2 do not have the 2 fields"),
        ("a.csv", "text,text\na,1\n", "must name each column once"),
        ("a.csv", 'text,label\n"a,1\n', "not a readable CSV"),
        ("a.csv", "text,label\n", "it holds no rows"),
        ("a.csv", "text,label\na,b\u00e9\n", "1 of its 1 classes are none"),
        ("a.parquet", "nothing", "not a readable Parquet"),
        ("a.txt", "text", "labelled rows come from"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / name), classifier(), examples=1)


def test_bytes_that_are_no_text_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,1\n")
    with pytest.raises(DataError, match="byte 11 is not UTF-8"):
        load_examples(str(tmp_path / "a.csv"), classifier(), examples=1)
    with pytest.raises(DataError, match=r"no such file.*Did you mean 'a.csv'"):
        load_examples(str(tmp_path / "aa.csv"), classifier(), examples=1)
    with pytest.raises(DataError, match="config 'en' is for data sets of the hub"):
        load_examples(str(tmp_path / "a.csv"), classifier(), examples=1, config="en")
    with pytest.raises(DataError, match="it has no splits, so no 'train'"):
        load_examples(str(tmp_path / "a.csv"), classifier(), examples=1, split="train")


def test_tokenizers_and_lengths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": t, "label": c} for t, c in texts(6)])
    with pytest.raises(InputError, match="length: got 257; it must be 2 or more, at most 256"):
        load_examples(source, classifier(), examples=3, length=257)
    with pytest.raises(DataError, match="has no tokenizer"):
        load_examples(
            source,
            wrap_model(pico.text_classifier(names=NAMES), name="bert"),
            examples=3,
            length=8,
        )
    without = pico.tokenizer()
    without.pad_token = None
    with pytest.raises(DataError, match="has no padding token"):
        load_examples(source, classifier(tokenizer=without), examples=3, length=8)
    larger = pico.tokenizer()
    larger.add_tokens([f"{n}" for n in range(10, 40)] + ["xyz"])
    with pytest.raises(DataError, match=r"makes token \d+, and the model has 96"):
        load_examples(source, classifier(tokenizer=larger), examples=6, length=8)


RECIPE = """\
model: {{source: {model}, task: text-classification}}
calibration: {{source: {data}, examples: 12, withheld: 6, length: 16}}
held_out: {{source: {held_out}, examples: 6, length: 16}}
formats: [int4-channel, int8-channel]
budget: {{average_bits: 5}}
export: [bits]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    pico.save_text_classifier(tmp_path / "model", pico.text_classifier(names=NAMES))
    for name in ("a", "b"):
        rows = [{"text": name + t, "label": c} for t, c in texts(24)]
        jsonl(tmp_path / f"{name}.jsonl", rows)
    values = {"model": tmp_path / "model", "data": tmp_path / "a.jsonl"}
    (tmp_path / "r.yaml").write_text(RECIPE.format(held_out=tmp_path / "b.jsonl", **values))
    return tmp_path / "r.yaml"


def test_a_recipe_loads_a_classifier_and_its_data(recipe: Path) -> None:
    inputs = load_inputs(load_recipe(recipe))
    assert inputs.model.task == "text-classification"
    assert (len(inputs.calibration), int(inputs.calibration.withheld.sum())) == (18, 6)
    assert len(inputs.texts["held-out"]) == 6
    assert inputs.calibration.facts.kind == "labelled text"


def test_a_classifiers_recipe_has_its_own_defaults_and_reads_back_equal(
    recipe: Path, tmp_path: Path
) -> None:
    text = (
        recipe.read_text().replace("examples: 12, withheld: 6, ", "").replace("examples: 6, ", "")
    )
    recipe.write_text(text)
    read = load_recipe(recipe, ["spectrum.layers=all"])
    assert (read.calibration.examples, read.calibration.withheld) == (512, 256)
    assert read.held_out.examples == 1000
    (tmp_path / "resolved.yaml").write_text(read.resolved_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == read
    assert "packing" not in read.resolved_yaml()
    pictures = load_recipe(
        recipe,
        [
            "model.task=image-classification",
            f"calibration={{source: {tmp_path}, labels: kind}}",
            f"held_out={{source: {tmp_path}, split: test}}",
            "spectrum.layers=all",
            "model.fold_batch_norm=true",
        ],
    )
    assert pictures.calibration.withheld == 256
    (tmp_path / "resolved.yaml").write_text(pictures.resolved_yaml())
    assert "length" not in pictures.resolved_yaml()
    assert load_recipe(tmp_path / "resolved.yaml") == pictures


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.packing=padded", "calibration.packing (--set): model.task is text-class"),
        ("calibration.sequences=8", "language models; give `examples`"),
        ("held_out.answers_only=false", "held_out.answers_only (--set): model.task is text"),
        ("sensitivity.curvature.length=8", "whose examples are measured whole"),
        ("other_texts.more={source: builtin}", "other_texts.more.source (--set): the built-in te"),
        ("calibration.examples=1", "at least 2"),
        ("model.task=image-classification", "calibration.length (line 2): model.task is image"),
    ],
)
def test_what_belongs_to_another_task_is_refused(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("calibration.examples=8", "calibration.examples (--set): model.task is causal-lm"),
        ("held_out.labels=mood", "held_out.labels (--set): model.task is causal-lm"),
        ("model.fold_batch_norm=true", "no batch norm to fold where model.task is causal-lm"),
    ],
)
def test_what_belongs_to_classifiers_is_refused_for_language_models(
    tmp_path: Path, override: str, message: str
) -> None:
    (tmp_path / "r.yaml").write_text(
        "model: {source: x}\nformats: [int4-g64]\nbudget: {average_bits: 4}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml", [override])
    assert message in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_folder_without_splits_cannot_calibrate_and_validate(tmp_path: Path) -> None:
    rows = [{"text": t, "label": c} for t, c in texts(24)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    pico.save_text_classifier(tmp_path / "model", pico.text_classifier(names=NAMES))
    values = {"model": tmp_path / "model", "data": tmp_path / "data"}
    (tmp_path / "r.yaml").write_text(RECIPE.format(held_out=tmp_path / "data" / ".", **values))
    with pytest.raises(InputError, match="these are the examples of calibration too"):
        load_inputs(load_recipe(tmp_path / "r.yaml"))


def test_batch_norm_is_folded_if_the_recipe_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        images = generator.integers(0, 256, (24, 20, 20, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(24) % 5)
    pico.save_image_classifier(tmp_path / "model")
    (tmp_path / "r.yaml").write_text(
        f"model: {{source: {tmp_path}/model, task: image-classification}}\n"
        f"calibration: {{source: {tmp_path}/a.npz, examples: 12, withheld: 6}}\n"
        f"held_out: {{source: {tmp_path}/b.npz, examples: 6}}\n"
        "formats: [int4-channel, int8-channel]\nbudget: {average_bits: 5}\nexport: [bits]\n"
    )
    plain = load_inputs(load_recipe(tmp_path / "r.yaml"))
    with caplog.at_level("INFO", logger="hawqkit"):
        folded = load_inputs(load_recipe(tmp_path / "r.yaml", ["model.fold_batch_norm=true"]))
    assert "batch norm: 6 folded, 0 left" in caplog.text
    assert folded.model.facts.hash != plain.model.facts.hash
    assert folded.calibration.facts == plain.calibration.facts
    model = pico.image_classifier()
    model.resnet.embedder.embedder.normalization.running_mean.zero_()
    model.resnet.embedder.embedder.normalization.running_var.fill_(1)
    pico.save_image_classifier(tmp_path / "model", model)
    with pytest.raises(InputError, match="batch norm that was never run"):
        load_inputs(load_recipe(tmp_path / "r.yaml", ["model.fold_batch_norm=true"]))
