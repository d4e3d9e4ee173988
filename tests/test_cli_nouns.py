"""Messages of a run on images speak of images, those of a run on text of sequences."""

from __future__ import annotations

import re
from pathlib import Path

import command_line
import numpy as np
import pico
import pytest
from command_line import invoke, sets, succeed
from report_reading import read_page

from hawqkit.errors import InputError
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import DataFacts
from hawqkit.sensitivity.confidence import KlLimit, make_forecast, upper_kl
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.scores import with_risk

# The score `token` keeps its name whatever the data are.
OF_TEXT = re.compile(
    r"\b(?<!“)(?<!score )(?<!score ')(tokens?|perplexity|sequences?|texts?|documents?)\b", re.I
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("nouns")
    model = pico.save_image_classifier(home / "model")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 16)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(home / f"{split}.npz", images=pixels, labels=np.arange(count) % 4)
    (home / "r.yaml").write_text(
        f"model: {{source: {model}, task: image-classification}}\n"
        f"calibration: {{source: {home / 'train.npz'}, examples: 16, withheld: 8}}\n"
        f"held_out: {{source: {home / 'test.npz'}, examples: 16}}\n"
        "formats: [int2-channel, int4-channel]\nbudget: {average_bits: 3}\nexport: [bits]\n"
        "validate: {baselines: [uniform]}\nstability: {draws: 2}\n"
        "tune: {examples: 16, steps: 2, batch: 8}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        shown = succeed("run", "r.yaml", "-o", "run").output
    (home / "shown.txt").write_text(shown)
    return home


def test_no_verb_of_a_run_on_images_speaks_of_text(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    verbs = (
        ["check", "r.yaml"],
        ["show", "run", "--full"],
        ["allocate", "run", "-o", "other.json"],
        ["allocate", "run", "--max-predicted-kl", "9@0.9", "-o", "other.json"],
        ["tune", "run"],
        ["validate", "run"],
    )
    said = [(images / "shown.txt").read_text(), *(succeed(*verb).output for verb in verbs)]
    assert [OF_TEXT.findall(text) for text in said] == [[] for _ in said]
    assert "from 8 withheld images" in said[3]
    assert "2 steps on 16 images" in said[5]
    page = read_page((images / "run" / "report.html").read_text(encoding="utf-8"))
    assert {"tuning", "figure-tuning"} <= set(page.ids)
    text = " ".join(page.text.split())
    assert OF_TEXT.findall(text) == []
    assert "Hash of data held-out" in text


def test_refusals_of_a_run_on_images_do_not_speak_of_text_either(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images)
    one = ["budget={max_predicted_kl: 0.1, confidence: 0.9}", "sensitivity.batch=1"]
    curvature = ["sensitivity={score: hessian-trace, curvature: {sequences: 1, shards: 2}}"]
    same = [f"held_out.source={images / 'train.npz'}"]
    for changes in (one, curvature, same):
        done = invoke("check", "r.yaml", *sets(*changes))
        assert done.exit_code == 2, done.output
        message = re.sub(r"`?(\w+\.)*sequences`?( of)?", "", done.stderr)  # the key has that name
        assert OF_TEXT.findall(message.replace("calibration.npz", "")) == []


def test_a_limit_on_the_kl_names_what_predicts(images: Path) -> None:
    found = RunFolder(images / "run").read_sensitivities()
    assert make_forecast(found, "token").source == "withheld images"
    kinds = {"images": "images", "labelled text": "texts", "arrays": "examples"}
    for kind, many in kinds.items():
        assert DataFacts("x", "", 2, 1, 2, 2, 2, 0, kind, 10).many == many
    assert DataFacts("x", "", 2, 8, 16, 14, 2, 0).many == "sequences"


def test_messages_that_do_not_know_the_data_name_none(images: Path) -> None:
    found = RunFolder(images / "run").read_sensitivities()
    assert found.samples is not None
    mix = {layer.name: found.formats[0] for layer in found.layers}
    with pytest.raises(InputError) as nothing:
        predict(found.samples, found.layers, found.formats, mix, np.zeros(0, dtype=np.int64))
    with pytest.raises(InputError) as risky:
        with_risk("trace", np.ones((2, 1)), np.ones((2, 1)), np.full(2, np.nan), 1.0)
    with pytest.raises(InputError) as unpaired:
        upper_kl(0.1, 0.01, None, KlLimit(0.2, 0.9))
    for error in (nothing, risky, unpaired):
        assert "sequence" not in str(error.value)


def test_a_run_on_text_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pico.save(tmp_path / "model")
    command_line.make_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    shown = succeed("allocate", "run", "-o", "other.json").output
    assert "from 2 withheld sequences" in shown
