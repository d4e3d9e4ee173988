from __future__ import annotations

from pathlib import Path

import numpy as np
import pico
import pytest
from image_cases import NAMES, classes_seen, classifier, folder, pixels, write

from hawqkit.errors import DataError, InputError, Unsupported
from hawqkit.models.labelled import load_examples
from hawqkit.models.model import wrap_model


def test_unreadable_files_are_all_named(tmp_path: Path) -> None:
    folder(tmp_path, 4)
    (tmp_path / "cat" / "1.png").write_bytes(b"not an image")
    whole = (tmp_path / "dog" / "2.png").read_bytes()
    (tmp_path / "dog" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="2 images cannot be used") as caught:
        load_examples(str(tmp_path), classifier(), examples=12)
    assert "cat/1.png: no image, or a damaged one" in str(caught.value)
    assert "dog/2.png: " in str(caught.value)


def test_an_empty_class_is_refused_by_name(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    (tmp_path / "emu").mkdir()
    with pytest.raises(DataError, match="no images in emu; each sub-folder is a class"):
        load_examples(str(tmp_path), classifier(), examples=4)


def test_too_few_examples_say_how_many_there_are(tmp_path: Path) -> None:
    folder(tmp_path, 4)
    with pytest.raises(DataError, match=r"Asked were 13 \(10 that choose and 3 withheld\).*12"):
        load_examples(str(tmp_path), classifier(), examples=10, withheld=3)


def test_classes_that_are_none_of_the_models_are_refused_with_both_lists(tmp_path: Path) -> None:
    folder(tmp_path, 2, ("bird", "cta", "emu"))
    with pytest.raises(DataError, match=r"2 of its 3 classes are none of the model's 3") as caught:
        load_examples(str(tmp_path), classifier(), examples=4)
    assert "'cta' Did you mean 'cat'" in str(caught.value)
    assert "'bird', 'cat', 'dog'" in str(caught.value)


def test_names_meet_a_model_without_names_in_sorted_order_if_their_number_fits(
    tmp_path: Path,
) -> None:
    folder(tmp_path / "three", 3)
    model = wrap_model(pico.image_classifier(classes=3), name="m", processor=pico.image_processor())
    examples = load_examples(str(tmp_path / "three"), model, examples=9)
    assert examples.names == NAMES
    assert classes_seen(examples) == examples.labels.tolist()
    folder(tmp_path / "two", 3, ("cat", "dog"))
    with pytest.raises(DataError, match=r"2 classes.*and the model tells 3 apart without"):
        load_examples(str(tmp_path / "two"), model, examples=4)


@pytest.mark.parametrize(("wrong", "words"), [(3, "instance 3"), (-1, "name another split")])
def test_labels_outside_the_classes_are_refused(tmp_path: Path, wrong: int, words: str) -> None:
    images = np.stack([pixels(0, n) for n in range(6)])
    np.savez(tmp_path / "a.npz", images=images, labels=[0, 1, 2, wrong, 0, 1])
    with pytest.raises(DataError, match=r"1 labels lie outside the 3 classes") as caught:
        load_examples(str(tmp_path / "a.npz"), classifier(), examples=4)
    assert words in str(caught.value)


def test_arrays_with_another_number_of_channels_are_refused_with_both_shapes(
    tmp_path: Path,
) -> None:
    grey = np.stack([pixels(0, n, 1) for n in range(4)])
    np.savez(tmp_path / "a.npz", images=grey, labels=[0, 1, 2, 0])
    with pytest.raises(DataError, match=r"shape \(1, 32, 32\), and the model reads \(3, 32, 32\)"):
        load_examples(str(tmp_path / "a.npz"), classifier(), examples=4)
    np.savez(tmp_path / "b.npz", images=np.zeros((4, 1, 8, 8), np.float32), labels=[0, 1, 2, 0])
    with pytest.raises(DataError, match=r"shape \(1, 8, 8\), and the model reads \(3, 8, 8\)"):
        load_examples(str(tmp_path / "b.npz"), classifier(), examples=4)


def test_colour_never_becomes_grey(tmp_path: Path) -> None:
    model = classifier(channels=1)
    with pytest.raises(DataError, match=r"shape \(3, 32, 32\), and the model reads \(1, 32, 32\)"):
        load_examples(str(folder(tmp_path, 2)), model, examples=4)


def test_images_of_the_wrong_size_are_refused_with_both_shapes(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    with pytest.raises(DataError, match=r"come out as \(3, 24, 24\), and the model reads \(3, 32"):
        load_examples(str(tmp_path), classifier("vit", read=24), examples=4)


def test_a_processor_that_leaves_sizes_apart_is_named(tmp_path: Path) -> None:
    folder(tmp_path, 2)
    write(tmp_path / "cat" / "wide.png", np.zeros((32, 40, 3), np.uint8))
    model = classifier()
    model.processor.do_resize = False
    with pytest.raises(DataError, match=r"2 different shapes.*\(3, 32, 40\) \(cat/wide.png\)"):
        load_examples(str(tmp_path), model, examples=7)


def test_pixels_without_a_processor_are_refused(tmp_path: Path) -> None:
    model = wrap_model(pico.image_classifier(names=NAMES), name="m")
    with pytest.raises(InputError, match=r"no image processor.*save one in its folder"):
        load_examples(str(folder(tmp_path, 2)), model, examples=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, "must hold the arrays.*it holds 'images'"),
        (
            {"images": np.zeros((3, 8, 8, 3), np.uint8), "labels": np.zeros(2, int)},
            "one whole number or name for each image",
        ),
        (
            {"images": np.zeros((3, 8, 8, 3), np.uint8), "labels": np.zeros(3)},
            "one whole number or name for each image",
        ),
        (
            {"images": np.zeros((3, 8, 8, 3), np.int64), "labels": np.zeros(3, int)},
            "images are int64; give uint8",
        ),
        (
            {"images": np.zeros((3, 8), np.uint8), "labels": np.zeros(3, int)},
            r"must be \(S, H, W\)",
        ),
        (
            {"images": np.zeros((3, 8, 8), np.float32), "labels": np.zeros(3, int)},
            r"must be \(S, C, H, W\)",
        ),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, content, message: str) -> None:
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(DataError, match=message):
        load_examples(str(tmp_path / "a.npz"), classifier(), examples=2)


def test_sources_that_are_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match="not a readable"):
        load_examples(str(tmp_path / "a.npz"), classifier(), examples=2)
    with pytest.raises(DataError, match="no such file"):
        load_examples(str(tmp_path / "b.npz"), classifier(), examples=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot read this folder"):
        load_examples(str(tmp_path / "empty"), classifier(), examples=2)
    with pytest.raises(DataError, match="it has no columns, so leave column 'a'"):
        load_examples(str(folder(tmp_path / "f", 2)), classifier(), examples=2, column="a")
    with pytest.raises(InputError, match="examples: got 0"):
        load_examples(str(tmp_path / "f"), classifier(), examples=0)


def test_a_language_model_has_no_use_for_labels(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(), name="llama", tokenizer=pico.tokenizer())
    with pytest.raises(Unsupported, match="predicts tokens and no labels; use load_batches"):
        load_examples(str(tmp_path), model, examples=2)
