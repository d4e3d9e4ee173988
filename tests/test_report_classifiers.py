from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
from classifier_cases import CLASSES, NAMES, Case, case
from command_line import succeed
from report_reading import Page, read_page
from rich.cells import cell_len
from rich.console import Console
from synthetic import make_run

from hawqkit.errors import StateMismatch
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import (
    Classification,
    Classified,
    DataFacts,
    Flip,
    Validation,
    make_confusion,
)
from hawqkit.report import print_summary, render_report
from hawqkit.report.accuracy import losing_classes, shift_of
from hawqkit.report.confusion_figure import confusion_figure, shown_columns
from hawqkit.report.nouns import IMAGES, amount, nouns_of
from hawqkit.report.wording import percent_with_error, points, with_error
from hawqkit.store import write_record

# The score `token` and formats keep their names whatever the data are.
OF_TEXT = re.compile(
    r"\b(?<!“)(?<!score )(tokens?|perplexity|sequences?|texts?|documents?)\b", re.IGNORECASE
)
HOSTILE = "<script>alert('x')</script>\"&$\\frac{1}{$\x1b[31m\u202e_"


def render(run: Case, validation: Validation | None = None) -> str:
    """Return the page; with a validation of its own, without the sections on the choice."""
    allocation = run.allocation if validation is None else None
    return render_report(run.sensitivities, allocation, validation or run.validation)


def held_out_alone(**changes: Any) -> Validation:
    """Return the validation on one data set, with other fields."""
    validation = case().validation
    name = "held-out"
    only = replace(
        validation,
        texts={name: validation.texts[name]},
        mixes=tuple(replace(m, measured={name: m.measured[name]}) for m in validation.mixes),
        classification={name: validation.classification[name]},
        calibration=None,
    )
    return replace(only, **changes)


def words(page: Page) -> str:
    return " ".join(page.text.split())


@lru_cache
def of_kind(kind: str) -> tuple[Case, Page]:
    """Return the run as if its data were of another kind, with no pictures and no names."""
    run = case()
    facts = {name: replace(f, kind=kind) for name, f in run.validation.texts.items()}
    bare = {
        name: replace(
            found,
            names=(),
            mixes={
                mix: replace(m, flips=tuple(replace(f, picture="") for f in m.flips))
                for mix, m in found.mixes.items()
            },
        )
        for name, found in run.validation.classification.items()
    }
    changed = replace(
        run,
        sensitivities=replace(run.sensitivities, data=replace(run.sensitivities.data, kind=kind)),
        validation=replace(run.validation, texts=facts, classification=bare),
    )
    return changed, read_page(render(changed))


@pytest.fixture(scope="module")
def page() -> Page:
    return read_page(render(case()))


def test_the_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert page.problems == []
    assert len(page.ids) == len(set(page.ids))
    pixels = "data:image/png;base64,"
    assert [load for load in page.loads if not load[2].startswith(("#", pixels))] == []
    assert {"script", "iframe", "link", "object", "embed"}.isdisjoint(page.tags)
    assert {"classification", "shift", "figure-confusion-0"} <= set(page.ids)


def test_a_page_about_images_does_not_speak_of_text(page: Page) -> None:
    assert OF_TEXT.findall(words(page)) == []
    assert "Measured on 48 images of 5 classes (photos 1); 16 of them were withheld" in words(page)
    assert "On 150 images that the choice never saw (held-out)" in words(page)
    assert "its most likely class stays the same" in words(page)
    assert "held-out images" in words(page)


@pytest.mark.parametrize(("kind", "many"), [("arrays", "examples"), ("labelled text", "texts")])
def test_other_kinds_of_data_have_their_own_words(kind: str, many: str) -> None:
    found = words(of_kind(kind)[1])
    assert f"On 150 {many} that the choice never saw" in found
    assert "image" not in found.replace("images 1", "")
    assert not re.search(r"\b(tokens|perplexity|sequences?|documents?)\b", found, re.IGNORECASE)


def test_a_page_about_text_has_no_classes_and_keeps_its_words() -> None:
    run = make_run(2)
    page = read_page(render_report(run.sensitivities, run.allocation, run.validation))
    found = words(page)
    assert "classification" not in page.ids
    assert "Measured on 64 sequences of up to 256 tokens (16,320 predictions" in found
    assert "predictions of text that the choice never saw" in found
    assert "accuracy" not in found.lower()
    assert "flip" not in found.lower()
    assert "Perplexity" in found


def test_the_table_of_accuracies_holds_the_numbers_of_the_record(page: Page) -> None:
    run = case()
    table = next(t for t in page.tables if t[0][:3] == ["model", "accuracy", "95 % interval"])
    rows = iter(row for row in table[1:] if len(row) > 1)
    for found in run.validation.classification.values():
        for name, model in {"original": found.original, **found.mixes}.items():
            row = next(rows)
            assert row[0] == name
            assert row[1] == percent_with_error(model.accuracy, model.accuracy_stderr)
            assert row[2] == f"{100 * model.interval[0]:.1f} to {100 * model.interval[1]:.1f} %"
            if name != "original":
                assert row[3] == points(model.difference, model.difference_stderr)
                assert row[5] == f"{100 * model.flipped / found.count:.1f} %"
                assert row[6:] == [
                    str(n) for n in (model.became_wrong, model.became_right, model.stayed_wrong)
                ]
            if name != "chosen":
                assert row[4] == points(model.against_chosen, model.against_chosen_stderr)
    assert next(rows, None) is None


def test_the_headline_says_accuracy_and_flips(page: Page) -> None:
    found = case().validation.classification["held-out"]
    before, after = found.original, found.chosen
    assert f"{percent_with_error(after.accuracy, after.accuracy_stderr)}: a paired" in words(page)
    assert f"of {points(after.difference, after.difference_stderr)} points" in words(page)
    assert f"original {100 * before.accuracy:.1f} %" in words(page)
    assert f"{100 * after.flipped / found.count:.1f} %of images flip" in words(page)


def test_flipped_images_stand_with_what_they_are_and_became(page: Page) -> None:
    run = case()
    kept = [f for c in run.validation.classification.values() for f in c.chosen.flips]
    shown = [value for tag, name, value in page.loads if (tag, name) == ("img", "src")]
    assert shown == [f"data:image/png;base64,{flip.picture}" for flip in kept]
    first = kept[0]
    wanted = (
        f"is {NAMES[first.label]}was {NAMES[first.before]} {100 * first.before_probability:.0f} %"
        f"now {NAMES[first.after]} {100 * first.after_probability:.0f} %image {first.index}"
    )
    assert wanted in words(page)


def test_without_pictures_flips_are_a_table_of_places_and_classes() -> None:
    run, page = of_kind("labelled text")
    assert "img" not in page.tags
    table = next(t for t in page.tables if t[0][:3] == ["text", "true class", "original"])
    flips = run.validation.classification["held-out"].chosen.flips
    assert [row[0] for row in table[1:]] == [str(flip.index) for flip in flips]
    for row, flip in zip(table[1:], flips, strict=True):
        assert row[1] == f"class {flip.label}"
        marks = ["✓" if flip.label == c else "✗" for c in (flip.before, flip.after)]
        assert row[2] == f"{marks[0]} class {flip.before}"
        assert row[4] == f"{marks[1]} class {flip.after}"


def test_the_shift_shows_the_loss_on_calibration_and_elsewhere(page: Page) -> None:
    validation = case().validation
    assert validation.calibration is not None
    sets = {"calibration": validation.calibration, **validation.classification}
    table = next(t for t in page.tables if "chosen mix's loss, nats" in t[0])
    assert [row[0] for row in table[1:]] == list(sets)
    for row, found in zip(table[1:], sets.values(), strict=True):
        assert row[1] == str(found.count)
        assert row[2] == with_error(found.original.loss, found.original.loss_stderr)
        assert row[3] == with_error(found.chosen.loss, found.chosen.loss_stderr)
        added = found.chosen
        assert row[4] == with_error(added.loss_difference, added.loss_difference_stderr)
    here, there = sets["calibration"].original, sets["held-out"].original
    error = np.hypot(here.loss_stderr, there.loss_stderr)
    change = with_error(there.loss - here.loss, float(error))
    assert f"From calibration to held-out the original's loss changes by {change} nats" in words(
        page
    )


def test_no_shift_is_shown_where_one_data_set_was_measured() -> None:
    assert shift_of(held_out_alone(), IMAGES) is None
    seen = held_out_alone(calibration=case().validation.calibration)
    page = read_page(render(case(), seen))
    assert "shift" in page.ids
    assert "On another source" not in words(page)


def made(before: np.ndarray, after: np.ndarray, flips: tuple[Flip, ...] = ()) -> Classification:
    """Return a classification from two tables of counts (C, C)."""

    def confusion(table: np.ndarray) -> Classified:
        labels, said = np.repeat(np.argwhere(table >= 0), table.ravel(), axis=0).T
        return Classified(0.5, 0.1, (0.4, 0.6), 1.0, 0.1, became_wrong=9, flips=flips,
                          confusion=make_confusion(labels, said, len(table)))  # fmt: skip

    original, chosen = confusion(before), confusion(after)
    count = int(before.sum())
    return Classification(count, len(before), (), original, {"chosen": chosen})


def test_classes_that_lose_most_come_first_with_where_they_go() -> None:
    before = np.diag([10, 20, 5, 8])
    after = np.array([[7, 0, 3, 0], [1, 17, 0, 2], [0, 0, 5, 0], [0, 1, 0, 7]])
    found = losing_classes(made(before, after))
    # Classes 0 and 1 lose three each: of the smaller one that is more.
    assert [(c.index, c.count, c.before, c.after) for c in found] == [
        (0, 10, 10, 7), (1, 20, 20, 17), (3, 8, 8, 7)
    ]  # fmt: skip
    assert [(c.taken, c.gained) for c in found] == [(2, 3), (3, 2), (1, 1)]


def test_columns_of_the_picture_are_the_rows_and_where_they_go() -> None:
    change = np.zeros((30, 30), dtype=np.int64)
    change[4, 4], change[4, 9], change[4, 20], change[7, 7], change[7, 2] = -5, 4, 1, -3, 3
    assert shown_columns(change, [4, 7]) == [2, 4, 7, 9, 20]
    change[4] = -np.arange(30)
    change[4, 4] = 435
    assert len(shown_columns(change, [4, 7])) == 10


def test_the_picture_shows_every_count_of_its_rows() -> None:
    before = np.diag([10, 20, 5, 8])
    after = np.array([[7, 0, 3, 0], [1, 17, 0, 2], [0, 0, 5, 0], [0, 1, 0, 7]])
    svg = confusion_figure(made(before, after), [0, 1], 3)
    assert 'id="confusion-3-' in svg
    shown = re.findall(r">([+-]?\d+)</text>", svg)
    assert sorted(shown, key=int) == sorted(["10", "20", "-3", "+3", "+1", "-3", "+2"], key=int)
    assert "others" not in svg


def test_a_thousand_classes_with_long_names_stay_small_and_readable() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 5000)
    said = np.where(rng.random(5000) < 0.7, labels, rng.integers(0, 1000, 5000))
    after = np.where(rng.random(5000) < 0.9, said, rng.integers(0, 1000, 5000))

    def model(top: np.ndarray) -> Classified:
        return Classified(0.7, 0.01, (0.68, 0.72), 1.0, 0.1, became_wrong=400,
                          confusion=make_confusion(labels, top, 1000))  # fmt: skip

    names = tuple(f"{HOSTILE if i % 2 else 'a very long name of a class '}{i}" for i in range(1000))
    found = Classification(5000, 1000, names, model(said), {"chosen": model(after)})
    html = render(case(), held_out_alone(classification={"held-out": found}))
    page = read_page(html)
    assert page.problems == []
    assert "script" not in page.tags
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "others" in words(page)
    table = next(t for t in page.tables if t[0][0] == "class")
    assert len(table) == 1 + 8
    assert len(html.encode()) < 400_000


def test_hostile_class_names_are_escaped_beside_pictures() -> None:
    names = tuple(f"{HOSTILE}{i}" for i in range(CLASSES))
    found = replace(case().validation.classification["held-out"], names=names)
    html = render(case(), held_out_alone(classification={"held-out": found}))
    page = read_page(html)
    assert page.problems == []
    assert "script" not in page.tags
    shown = 3 * len(found.chosen.flips) + 2 * len(losing_classes(found))
    assert page.text.count("<script>alert('x')</script>") == shown
    assert "\x1b" not in html


def test_a_mix_that_flips_nothing_is_said_to_flip_nothing() -> None:
    table = np.diag([3, 4])
    same = replace(made(table, table), mixes={"chosen": made(table, table).original})
    still = replace(same.chosen, became_wrong=0)
    still_same = replace(same, original=still, mixes={"chosen": still})
    validation = held_out_alone(classification={"held-out": still_same})
    found = words(read_page(render(case(), validation)))
    assert "No class has fewer images right than in the original." in found
    assert "The chosen mix flips none of the images." in found


def test_validations_of_before_still_make_a_page() -> None:
    page = read_page(render(case(), held_out_alone(classification={})))
    assert page.problems == []
    assert {"classification", "shift"}.isdisjoint(page.ids)
    assert OF_TEXT.findall(words(page)) == []


def test_terminal_tables_show_accuracy_and_loss_within_80_columns() -> None:
    run = case()
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, run.sensitivities, run.allocation, run.validation)
    file = console.file
    assert isinstance(file, io.StringIO)
    text = file.getvalue()
    assert max(cell_len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "perplexity" not in text
    assert "Accuracy on held-out: 150 images" in text
    for found in run.validation.classification.values():
        for model in found.mixes.values():
            assert with_error(100 * model.accuracy, 100 * model.accuracy_stderr) in text
    assert run.validation.calibration is not None
    seen = run.validation.calibration.chosen
    line = next(x for x in text.splitlines() if x.strip().startswith("calibration"))
    assert with_error(seen.loss, seen.loss_stderr) in line


def test_kinds_are_told_by_the_facts_of_the_data() -> None:
    facts = DataFacts("x", "", 3, 9, 20, 3, 3, 0, "labelled text", 2)
    assert amount(facts) == "3 texts of 2 classes (x)"
    assert nouns_of(replace(facts, kind="text")).many == "examples"  # labelled after all
    assert nouns_of(None).many == "sequences"


def test_a_recipe_on_images_reports_classes_from_end_to_end(tmp_path: Path) -> None:
    model = pico.save_image_classifier(tmp_path / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 16)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=np.arange(count) % 4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{source: {model}, task: image-classification}}\n"
        f"calibration: {{source: {tmp_path / 'train.npz'}, examples: 16, withheld: 8}}\n"
        f"held_out: {{source: {tmp_path / 'test.npz'}, examples: 16}}\n"
        "formats: [int2-channel, int4-channel]\nbudget: {average_bits: 3}\nexport: [bits]\n"
        "validate: {baselines: [uniform]}\nstability: {draws: 2}\n"
    )
    done = succeed("run", str(recipe), "--output", str(tmp_path / "run"))
    assert "Accuracy on held-out: 16 images" in done.output
    assert OF_TEXT.findall(done.output.replace("bits", "")) == []
    folder = RunFolder(tmp_path / "run")
    validation = folder.read_validation()
    assert validation is not None
    assert validation.calibration is not None
    assert validation.calibration.count == 16
    page = read_page(folder.report.read_text(encoding="utf-8"))
    assert page.problems == []
    assert {"classification", "shift"} <= set(page.ids)
    before = folder.validation.read_bytes()
    succeed("validate", str(folder.path))
    assert folder.validation.read_bytes() == before


def test_a_validation_whose_classes_are_of_other_mixes_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    found = case().validation.classification["held-out"]
    fewer = replace(found, mixes={"chosen": found.chosen})
    write_record(folder.validation, held_out_alone(classification={"held-out": fewer}))
    with pytest.raises(StateMismatch, match="does not hold every mix"):
        folder.read_validation()
    write_record(folder.validation, held_out_alone(classification={"elsewhere": found}))
    with pytest.raises(StateMismatch, match="does not hold every mix"):
        folder.read_validation()
    write_record(folder.validation, held_out_alone())
    assert folder.read_validation() == held_out_alone()
