from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pico
import pyarrow
import pyarrow.parquet
import pytest
import torch
from image_cases import NAMES, classes_seen, classifier, folder, pixels, png, write
from PIL import Image
from torch import nn

from hawqkit.errors import DataError
from hawqkit.models.labelled import load_examples
from hawqkit.models.model import wrap_model


def test_an_image_folder_gives_processed_images_with_their_classes(tmp_path: Path) -> None:
    model = classifier()
    examples = load_examples(str(folder(tmp_path)), model, examples=15, withheld=9)
    assert examples.inputs["pixel_values"].shape == (24, 3, 32, 32)
    assert classes_seen(examples) == examples.labels.tolist()
    assert examples.withheld.tolist() == [False] * 15 + [True] * 9
    assert examples.names == NAMES
    facts = examples.facts
    assert (facts.kind, facts.classes, facts.sequences, facts.counted) == ("images", 3, 24, 24)
    assert facts.source == str(tmp_path)
    # The processor takes 0 to 255 to -1 to 1, and has nothing to resize.
    values = (examples.inputs["pixel_values"] + 1) / 2 * 255
    known = {pixels(c, n).transpose(2, 0, 1).tobytes() for c in range(3) for n in range(8)}
    found = {v.numpy().tobytes() for v in torch.round(values).to(torch.uint8)}
    assert found == known


def test_the_choice_depends_on_the_seed_alone_and_shares_no_example(tmp_path: Path) -> None:
    model, source = classifier(), str(folder(tmp_path))
    first = load_examples(source, model, examples=9, withheld=6, seed=1)
    again = load_examples(source, model, examples=9, withheld=6, seed=1)
    other = load_examples(source, model, examples=9, withheld=6, seed=2)
    assert first.facts == again.facts
    assert first.facts.hash != other.facts.hash
    rows = {row.numpy().tobytes() for row in first.inputs["pixel_values"]}
    assert len(rows) == 15


def test_every_class_has_its_share_among_those_that_choose_and_those_withheld(
    tmp_path: Path,
) -> None:
    folder(tmp_path, 6)
    for number in range(6, 30):
        write(tmp_path / "dog" / f"{number}.png", pixels(2, number))
    for seed in range(5):
        examples = load_examples(str(tmp_path), classifier(), examples=14, withheld=7, seed=seed)
        for part, most in ((~examples.withheld, 14), (examples.withheld, 7)):
            counts = Counter(examples.labels[part].tolist())
            for label, share in ((0, 6 / 42), (1, 6 / 42), (2, 30 / 42)):
                assert abs(counts[label] - share * most) <= 1


@pytest.mark.parametrize(("split", "taken"), [("calibration", 4), ("held-out", 3), ("test", 3)])
def test_splits_of_a_folder_are_found_by_role_or_name(
    tmp_path: Path, split: str, taken: int
) -> None:
    folder(tmp_path / "train", 4)
    folder(tmp_path / "test", 3)
    examples = load_examples(str(tmp_path), classifier(), split=split, examples=3 * taken)
    assert examples.facts.source.endswith(":train" if taken == 4 else ":test")
    with pytest.raises(DataError, match=f"there are {3 * taken}"):
        load_examples(str(tmp_path), classifier(), split=split, examples=3 * taken + 1)


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    folder(tmp_path / "one" / "train", 2)
    with pytest.raises(DataError, match=r"no split 'tset'; there are train"):
        load_examples(str(tmp_path / "one"), classifier(), split="tset", examples=2)
    folder(tmp_path / "two", 2)
    with pytest.raises(DataError, match="it has no splits"):
        load_examples(str(tmp_path / "two"), classifier(), split="train", examples=2)


def test_grey_palette_and_transparent_files_become_colour(tmp_path: Path) -> None:
    grey = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    for name, mode in zip(NAMES, ("L", "P", "RGBA"), strict=True):
        write(tmp_path / name / "a.png", grey, mode)
    examples = load_examples(str(tmp_path), classifier(), examples=3)
    values = torch.round((examples.inputs["pixel_values"] + 1) / 2 * 255).to(torch.uint8)
    for image in values:
        for channel in image:
            assert np.array_equal(channel.numpy(), grey)


def test_a_camera_turned_sideways_is_turned_back(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # the row 0 of the file is the right side of the picture
    for name in NAMES:
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "a.png", exif=exif)
    examples = load_examples(str(tmp_path), classifier(), examples=3)
    values = torch.round((examples.inputs["pixel_values"][0] + 1) / 2 * 255).to(torch.uint8)
    assert np.array_equal(values.numpy().transpose(1, 2, 0), np.rot90(pixels(0, 0), -1))


def test_arrays_of_pixels_and_arrays_that_are_ready(tmp_path: Path) -> None:
    images = np.stack([pixels(n % 3, n) for n in range(12)])
    labels = np.arange(12) % 3
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    model = classifier()
    examples = load_examples(str(tmp_path / "a.npz"), model, examples=12)
    assert classes_seen(examples) == examples.labels.tolist()
    ready = (images.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    np.savez(tmp_path / "b.npz", images=ready, labels=labels)
    plain = wrap_model(model.module, name="no processor")
    again = load_examples(str(tmp_path / "b.npz"), plain, examples=12)
    assert again.labels.tolist() == examples.labels.tolist()
    torch.testing.assert_close(again.inputs, examples.inputs, rtol=0, atol=1e-6)
    named = np.array(NAMES)[labels]
    np.savez(tmp_path / "c.npz", images=images, labels=named)
    third = load_examples(str(tmp_path / "c.npz"), model, examples=12)
    assert third.facts.counted == 12
    assert classes_seen(third) == third.labels.tolist()


def test_grey_arrays_fit_a_model_of_one_channel_and_a_module_of_one_argument(
    tmp_path: Path,
) -> None:
    images = np.stack([pixels(n % 3, n, 1) for n in range(6)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(6) % 3)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 900, 3))
    model = wrap_model(net, name="net", processor=pico.image_processor(32, 1))
    examples = load_examples(str(tmp_path / "a.npz"), model, examples=6)
    (tensor,) = examples.inputs.values()
    assert tensor.shape == (6, 1, 32, 32)
    assert examples.facts.classes == 3


@pytest.fixture
def data_set() -> datasets.Dataset:
    rows = [(c, n) for n in range(6) for c in range(3)]
    return datasets.Dataset.from_dict(
        {
            "id": list(range(18)),
            "picture": [{"bytes": png(pixels(c, n)), "path": None} for c, n in rows],
            "kind": [c for c, _ in rows],
        },
        features=datasets.Features(
            {
                "id": datasets.Value("int64"),
                "picture": datasets.Image(),
                "kind": datasets.ClassLabel(names=["bird", "cat", "dog"]),
            }
        ),
    )


def to_parquet(data: datasets.Dataset, path: Path) -> str:
    data.to_parquet(path / "a.parquet")
    return str(path / "a.parquet")


def to_disk(data: datasets.Dataset, path: Path) -> str:
    data.save_to_disk(path / "saved")
    return str(path / "saved")


def to_splits(data: datasets.Dataset, path: Path) -> str:
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(path / "saved")
    return str(path / "saved")


def to_hub_layout(data: datasets.Dataset, path: Path) -> str:
    (path / "hub" / "data").mkdir(parents=True)
    data.to_parquet(path / "hub" / "data" / "train-00000-of-00001.parquet")
    data.select([0]).to_parquet(path / "hub" / "data" / "test-00000-of-00001.parquet")
    return str(path / "hub")


@pytest.mark.parametrize("save", [to_parquet, to_disk, to_splits, to_hub_layout])
def test_data_sets_are_read_by_the_types_of_their_columns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data_set: datasets.Dataset,
    save: Callable[[datasets.Dataset, Path], str],
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = save(data_set, tmp_path)
    examples = load_examples(source, classifier(), examples=12, withheld=6)
    assert classes_seen(examples) == examples.labels.tolist()
    assert Counter(examples.labels.tolist()) == {0: 6, 1: 6, 2: 6}


def test_classes_of_a_data_set_are_matched_by_name_whatever_their_order(
    tmp_path: Path, data_set: datasets.Dataset
) -> None:
    model = classifier(names=("Dog", "Bird", "CAT"))
    examples = load_examples(to_parquet(data_set, tmp_path), model, examples=18)
    assert examples.names == ("Dog", "Bird", "CAT")
    place = {0: 1, 1: 2, 2: 0}  # bird, cat, dog
    assert [place[c] for c in classes_seen(examples)] == examples.labels.tolist()


def test_parquet_without_a_word_about_images_needs_no_more_than_bytes(tmp_path: Path) -> None:
    rows = [(c, n) for n in range(4) for c in range(3)]
    table = pyarrow.table(
        {"jpeg": [png(pixels(c, n)) for c, n in rows], "label": [c for c, _ in rows]}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    examples = load_examples(str(tmp_path / "a.parquet"), classifier(), examples=12)
    assert classes_seen(examples) == examples.labels.tolist()


def test_columns_are_named_where_none_stands_out(
    tmp_path: Path, data_set: datasets.Dataset
) -> None:
    more = data_set.rename_column("picture", "one")
    more = more.add_column("two", data_set.data.column("picture")).cast_column(
        "two", datasets.Image()
    )
    source = to_parquet(more, tmp_path)
    with pytest.raises(DataError, match=r"stands out; there are.*'one' \(images\)"):
        load_examples(source, classifier(), examples=6)
    examples = load_examples(source, classifier(), examples=6, column="two", labels="kind")
    assert classes_seen(examples) == examples.labels.tolist()
    with pytest.raises(DataError, match=r"no column 'tow'.*Did you mean 'two'"):
        load_examples(source, classifier(), examples=6, column="tow")
    with pytest.raises(DataError, match="'kind' holds classes, not images"):
        load_examples(source, classifier(), examples=6, column="kind")
