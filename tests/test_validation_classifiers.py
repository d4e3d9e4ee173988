from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
import torch
from classifier_cases import CLASSES, NAMES, case, examples, images, labelled, logits_of, network
from PIL import Image

import hawqkit as hk
from hawqkit.errors import InputError, StateMismatch
from hawqkit.quantize.apply import applied
from hawqkit.records import Classified, Validation, make_confusion
from hawqkit.statistics import share, wilson
from hawqkit.store import read_record, write_record
from hawqkit.validation.classifying import MOST_FLIPS
from hawqkit.validation.pictures import SIDE, thumbnails
from hawqkit.validation.validating import validate_mixes


def tables() -> tuple[Any, dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Return labels and the logits of every mix and the original on the held-out images."""
    run = case()
    found = {"original": logits_of(run.model, run.held_out).numpy()}
    mixes = {"chosen": run.allocation.layers}
    mixes |= {mix.name: mix.layers for mix in run.allocation.baselines}
    for name, mix in mixes.items():
        with applied(run.model, mix, rounding=run.allocation.rounding):
            found[name] = logits_of(run.model, run.held_out).numpy()
    return run, found, run.held_out.labels.numpy()


def losses(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max(1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return np.asarray(-logs[np.arange(len(labels)), labels])


def test_accuracy_flips_and_differences_are_those_of_the_logits() -> None:
    run, logits, labels = tables()
    found = run.validation.classification["held-out"]
    count = len(labels)
    top = {name: table.argmax(1) for name, table in logits.items()}
    right = {name: (t == labels).astype(float) for name, t in top.items()}
    assert found.count == count
    assert set(found.mixes) == set(logits) - {"original"}
    assert found.chosen is found.mixes["chosen"]
    assert found.chosen.flipped > MOST_FLIPS  # else the test shows little
    for name, model in {"original": found.original, **found.mixes}.items():
        r, before, chosen = right[name], right["original"], right["chosen"]
        assert model.accuracy == pytest.approx(r.mean())
        assert model.accuracy_stderr == pytest.approx(np.sqrt(r.var() / count))
        assert model.difference == pytest.approx(r.mean() - before.mean())
        assert model.difference_stderr == pytest.approx(np.sqrt((r - before).var() / count))
        assert model.against_chosen == pytest.approx(r.mean() - chosen.mean())
        assert model.against_chosen_stderr == pytest.approx(np.sqrt((r - chosen).var() / count))
        flipped = top[name] != top["original"]
        assert model.flipped == flipped.sum()
        assert model.became_wrong == ((before == 1) & (r == 0)).sum()
        assert model.became_right == ((before == 0) & (r == 1)).sum()
        assert model.stayed_wrong == (flipped & (before == 0) & (r == 0)).sum()
        loss, first = losses(logits[name], labels), losses(logits["original"], labels)
        # Logits are float32, in batches of another size.
        assert model.loss == pytest.approx(loss.mean(), rel=1e-5)
        assert model.loss_difference == pytest.approx((loss - first).mean(), abs=1e-5)
        wanted = (loss - first).std(ddof=1) / np.sqrt(count)
        assert model.loss_difference_stderr == pytest.approx(wanted, rel=1e-4, abs=1e-12)


def test_flips_agree_with_the_share_of_equal_predictions() -> None:
    validation = case().validation
    for text, found in validation.classification.items():
        for mix in validation.mixes:
            same = mix.measured[text].same_top1
            assert 1 - same == pytest.approx(found.mixes[mix.name].flipped / found.count)


def test_mcnemar_counts_give_the_error_of_a_difference() -> None:
    run, logits, labels = tables()
    before = logits["original"].argmax(1) == labels
    after = logits["chosen"].argmax(1) == labels
    lost, won, count = (before & ~after).sum(), (~before & after).sum(), len(labels)
    found = run.validation.classification["held-out"].chosen
    wanted = np.sqrt(lost + won - (lost - won) ** 2 / count) / count
    assert found.difference_stderr == pytest.approx(wanted)
    # Unpaired, the two binomial errors would say much more.
    assert found.difference_stderr < 0.9 * np.hypot(found.accuracy_stderr, 0.03)


def test_confusion_counts_every_pair_of_true_and_predicted_class() -> None:
    run, logits, labels = tables()
    found = run.validation.classification["held-out"]
    for name, model in {"original": found.original, **found.mixes}.items():
        wanted = np.zeros((CLASSES, CLASSES), dtype=np.int64)
        for label, said in zip(labels, logits[name].argmax(1), strict=True):
            wanted[label, said] += 1
        assert model.confusion is not None
        np.testing.assert_array_equal(model.confusion.to_array(), wanted)


def test_kept_flips_are_those_of_which_the_original_was_surest() -> None:
    run, logits, labels = tables()
    kept = run.validation.classification["held-out"].chosen.flips
    first, second = (torch.tensor(logits[n]).softmax(1).numpy() for n in ("original", "chosen"))
    flipped = np.flatnonzero(first.argmax(1) != second.argmax(1))
    order = sorted(flipped.tolist(), key=lambda row: -first[row].max())
    assert [flip.index for flip in kept] == order[:MOST_FLIPS]
    for flip in kept:
        row = flip.index
        assert (flip.label, flip.before, flip.after) == (
            labels[row], first[row].argmax(), second[row].argmax()
        )  # fmt: skip
        assert flip.before_probability == pytest.approx(first[row].max(), rel=1e-5)
        assert flip.after_probability == pytest.approx(second[row].max(), rel=1e-5)
        assert flip.picture
    baseline = run.validation.classification["held-out"].mixes["uniform"]
    assert baseline.flips
    assert not any(flip.picture for flip in baseline.flips)


def test_calibration_is_measured_on_the_examples_that_chose_alone() -> None:
    run = case()
    seen = run.validation.calibration
    assert seen is not None
    kept = ~run.calibration.withheld.numpy()
    labels = run.calibration.labels.numpy()[kept]
    before = logits_of(run.model, run.calibration).numpy()[kept]
    with applied(run.model, run.allocation.layers, rounding=run.allocation.rounding):
        after = logits_of(run.model, run.calibration).numpy()[kept]
    assert seen.count == kept.sum() == 32
    assert seen.original.loss == pytest.approx(losses(before, labels).mean(), rel=1e-5)
    assert seen.chosen.loss == pytest.approx(losses(after, labels).mean(), rel=1e-5)
    assert seen.original.accuracy == (before.argmax(1) == labels).mean()
    assert seen.chosen.accuracy == (after.argmax(1) == labels).mean()
    assert list(seen.mixes) == ["chosen"]
    assert seen.chosen.confusion is None
    assert seen.chosen.flips == ()


def test_examples_of_one_cluster_move_together_in_every_error() -> None:
    x = images(40, 7)
    clusters = np.arange(40) // 4
    data = examples(40, 7, document=clusters)
    run = case()
    found = validate_mixes(run.model, run.allocation, {"held-out": data}, track=lambda x, *_: x)
    model = found.classification["held-out"].chosen
    with applied(run.model, run.allocation.layers, rounding=run.allocation.rounding):
        after = logits_of(run.model, data).numpy().argmax(1)
    with torch.no_grad():
        before = network()(x).argmax(1).numpy()
    labels = labelled(x, seed=7).numpy()
    difference = (after == labels).astype(float) - (before == labels)
    left_out = np.array([difference[clusters != c].mean() for c in range(10)])
    wanted = np.sqrt(9 / 10 * ((left_out - left_out.mean()) ** 2).sum())
    assert model.difference_stderr == pytest.approx(wanted)
    independent = np.sqrt(difference.var() / 40)
    assert abs(model.difference_stderr - independent) > 1e-4 * independent


def test_size_of_a_batch_changes_nothing_but_rounding() -> None:
    run = case()
    one, many = (
        validate_mixes(run.model, run.allocation, {"x": run.held_out}, track=lambda x, *_: x,
                       batch=batch).classification["x"]
        for batch in (7, 150)
    )  # fmt: skip
    assert one.chosen.confusion == many.chosen.confusion
    assert [f.index for f in one.chosen.flips] == [f.index for f in many.chosen.flips]
    assert one.chosen.loss == pytest.approx(many.chosen.loss, rel=1e-6)


def test_wilson_ends_are_where_the_score_test_just_refuses() -> None:
    for part, count in ((0.5, 20), (0.95, 300), (0.0, 7), (1.0, 7)):
        ends = wilson(part, count)
        assert ends[0] < ends[1]
        for end in ends:
            if end not in (0.0, 1.0):
                z = abs(part - end) / np.sqrt(end * (1 - end) / count)
                assert z == pytest.approx(1.959964, rel=1e-5)
    assert wilson(1.0, 7)[1] == 1.0
    assert wilson(0.0, 7)[0] == 0.0


def test_binomial_error_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, count = 0.85, 400
    inside = 0
    for _ in range(1000):
        mean, stderr = share((rng.random(count) < truth).astype(float), np.arange(count))
        inside += abs(mean - truth) <= stderr
    # 68.3 % +- 1.5 %, and a little for the grid of k / 400; five standard errors
    assert abs(inside / 1000 - 0.683) < 0.08


def test_records_survive_the_disk_and_old_files_can_be_read(tmp_path: Path) -> None:
    validation = case().validation
    path = write_record(tmp_path / "validation.json", validation)
    assert read_record(path, Validation) == validation
    plain = json.loads(path.read_text())
    assert plain["schema"] == 1
    del plain["classification"], plain["calibration"]
    path.write_text(json.dumps(plain))
    old = read_record(path, Validation)
    assert old.classification == {}
    assert old.calibration is None
    assert old.mixes == validation.mixes


def test_a_damaged_confusion_is_refused(tmp_path: Path) -> None:
    path = write_record(tmp_path / "validation.json", case().validation)
    plain = json.loads(path.read_text())
    plain["classification"]["held-out"]["original"]["confusion"]["cells"][0] = CLASSES**2
    path.write_text(json.dumps(plain))
    with pytest.raises(StateMismatch, match="no table of counts of 5 classes"):
        read_record(path, Validation)
    plain = json.loads(write_record(path, case().validation).read_text())
    plain["classification"]["held-out"]["mixes"]["chosen"]["flips"][0]["after"] = CLASSES
    path.write_text(json.dumps(plain))
    with pytest.raises(StateMismatch, match="not of 5 classes"):
        read_record(path, Validation)


def test_the_record_stays_small(tmp_path: Path) -> None:
    path = write_record(tmp_path / "validation.json", case().validation)
    assert path.stat().st_size < 120_000
    wide = make_confusion(np.arange(1000), np.arange(1000)[::-1].copy(), 1000)
    assert len(wide.cells) == len(wide.counts) == 1000  # and not a million


def test_classes_are_those_that_the_model_tells_apart_and_names_fit_them() -> None:
    run = case()
    assert run.validation.classification["held-out"].names == NAMES
    x = images(20, 5)
    few = hk.make_examples(x, torch.zeros(20), names=("a", "b"))  # facts know one class
    found = validate_mixes(run.model, run.allocation, {"x": few}, track=lambda x, *_: x)
    assert found.classification["x"].classes == CLASSES
    assert found.classification["x"].names == ()
    assert found.classification["x"].name_of(3) == "class 3"


def test_language_models_have_no_classes_and_take_no_calibration() -> None:
    model = hk.wrap_model(pico.llama(), name="llama")
    text = pico.sequences()
    sensitivities = hk.probe(model, text, ["int4-channel", "int8-channel"])
    allocation = hk.allocate(sensitivities, average_bits=8, baselines=(), draws=0)
    validation = hk.validate(model, allocation, text)
    assert validation.classification == {}
    assert validation.calibration is None
    with pytest.raises(InputError, match="has no labels"):
        hk.validate(model, allocation, text, calibration=text)


def opened(picture: str) -> Any:
    return Image.open(io.BytesIO(base64.b64decode(picture)))


def test_thumbnails_are_the_inputs_stretched_from_black_to_white() -> None:
    data = examples(3, 11)
    for row, picture in enumerate(thumbnails(data, range(3))):
        found = np.asarray(opened(picture))
        values = data.inputs["(first)"][row].double().numpy().transpose(1, 2, 0)
        wanted = 255 * (values - values.min()) / (values.max() - values.min())
        assert found.shape == (8, 8, 3)
        assert np.abs(found - wanted).max() <= 0.5 + 1e-9
        assert found.min() == 0
        assert found.max() == 255


def test_large_thumbnails_are_made_small_and_keep_their_shape() -> None:
    ramp = torch.linspace(0, 1, 200).expand(1, 1, 100, 200).contiguous()
    data = hk.make_examples(ramp, [0])
    (picture,) = thumbnails(data, [0])
    found = np.asarray(opened(picture)).astype(float)
    assert found.shape == (SIDE // 2, SIDE)
    assert np.abs(found - found[0]).max() == 0
    steps = np.diff(found[0])[2:-2]  # a ramp stays a ramp, but where the filter meets the edges
    assert np.abs(steps - 255 / (SIDE - 1)).max() <= 1.05  # two roundings to whole numbers


def test_pictures_with_channels_last_and_of_one_value_are_drawn() -> None:
    last = hk.make_examples(np.full((1, 9, 5, 3), 0.25, dtype=np.float32), [0])
    found = np.asarray(opened(thumbnails(last, [0])[0]))
    assert found.shape == (9, 5, 3)
    assert set(np.unique(found).tolist()) <= {127, 128}


@pytest.mark.parametrize(
    "inputs",
    [
        np.zeros((2, 7), dtype=np.float32),
        np.zeros((2, 5, 8, 8), dtype=np.float32),
        np.zeros((2, 3, 8, 8), dtype=np.int64),
        {"a": np.zeros((2, 3, 8, 8)), "b": np.zeros((2, 3, 8, 8))},
    ],
)
def test_what_is_no_picture_has_no_thumbnail(inputs: Any) -> None:
    assert thumbnails(hk.make_examples(inputs, [0, 1]), [0, 1]) == ["", ""]


def test_a_model_that_is_always_right_has_an_interval_and_no_nan() -> None:
    run = case()
    data = examples(30, 13)
    always = hk.make_examples(data.inputs, labelled(images(30, 13), right=1.1), classes=CLASSES)
    found = validate_mixes(run.model, run.allocation, {"x": always}, track=lambda x, *_: x)
    original: Classified = found.classification["x"].original
    assert original.accuracy == 1.0
    assert original.accuracy_stderr == 0.0
    assert original.interval[1] == 1.0
    assert original.interval[0] == pytest.approx(30 / (30 + 1.959964**2), rel=1e-5)
