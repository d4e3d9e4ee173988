"""A classifier from the recipe to ONNX Runtime: latency table, budgets, export, the file run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import command_line
import image_cases
import numpy as np
import onnx_cases as cases
import pico
import pytest
import torch

import hawqkit as hk
from hawqkit.pipeline.folder import RunFolder
from hawqkit.quantize.apply import applied

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

BUDGET = "budget: {size: 40kB, latency: {table: latency.csv, limit: 1s}}"
RECIPE = f"""\
model: {{source: model, task: image-classification, fold_batch_norm: true}}
calibration: {{source: photos, examples: 12, withheld: 3}}
held_out: {{source: others, examples: 9}}
formats: [int4-channel, w8a8, int8-channel]
{BUDGET}
export: [onnx]
validate: {{baselines: [uniform]}}
stability: {{draws: 2}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("onnx")
    pico.save_image_classifier(home / "model", pico.image_classifier(names=image_cases.NAMES))
    image_cases.folder(home / "photos")
    for label, name in enumerate(image_cases.NAMES):
        for number in range(4):
            image = image_cases.pixels(label, 100 + number)
            image_cases.write(home / "others" / name / f"{number}.png", image)
    (home / "pico.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HAWQKIT_CACHE", str(home / "cache"))
        (home / "plain.yaml").write_text(RECIPE.replace(BUDGET, "budget: {average_bits: 5}"))
        few = ("--rounds", "3", "--mixes", "4", "--batch", "2")
        command_line.succeed("latency", "plain.yaml", "-o", "latency.csv", *few)
        command_line.succeed("run", "pico.yaml", "-o", "one")
    return home


def test_the_table_has_every_layer_in_every_format_of_the_recipe_and_in_none(home: Path) -> None:
    with (home / "latency.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    layers = RunFolder(home / "one").read_sensitivities().layers
    formats = ("int4-channel", "w8a8", "int8-channel", "none")
    assert rows[0]["layer"] == "(fixed)"
    assert "batch 2" in rows[0]["operation"]
    assert [(r["layer"], r["format"]) for r in rows[1:]] == [
        (layer.name, f) for layer in layers for f in formats
    ]
    assert all(float(row["milliseconds"]) >= 0 for row in rows)


def test_the_run_kept_the_bytes_and_counted_them_exactly(home: Path) -> None:
    run = RunFolder(home / "one")
    allocation = run.read_allocation()
    total = sum(p.stat().st_size for p in (home / "one/exports/onnx").iterdir())
    assert allocation.totals.size == {"onnx": total}
    assert total <= 40_000
    assert allocation.totals.latency_ms is not None
    assert len(set(allocation.layers.values())) > 1
    told = json.loads((home / "one/exports/onnx/quantization.json").read_text())
    assert told["layers"] == allocation.layers


def test_the_exported_file_computes_what_was_validated(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    allocation = RunFolder(home / "one").read_allocation()
    model = hk.load_model(str(home / "model"), task="image-classification")
    data = hk.load_examples(str(home / "others"), model, examples=9)
    model, _ = hk.with_folded_batch_norms(model, data)
    batch = data.micro_batch(range(9))
    given = batch.inputs(torch.device("cpu"))
    with torch.no_grad(), applied(model, allocation.layers, activations=allocation.activations):
        wanted = model.module(**given).logits.numpy()
    found = cases.run_graph(home / "one/exports/onnx/model.onnx", given)
    # an input midway between two of 255 codes may get either
    assert np.abs(found - wanted).max() < np.abs(wanted).max() / 255
    assert np.median(np.abs(found - wanted)) < 2e-5 * np.abs(wanted).max()


def test_a_saved_run_is_exported_again_with_the_same_graph(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HAWQKIT_CACHE", str(home / "cache"))
    command_line.succeed("export", "one", "--target", "onnx", "-o", "again")
    first, again = (home / place / "model.onnx" for place in ("one/exports/onnx", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_formats_that_the_target_lacks_are_refused_before_anything_is_measured(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    done = command_line.invoke("check", "plain.yaml", *command_line.sets("formats=[int3-channel]"))
    assert done.exit_code == 2
    assert "target onnx cannot hold" in done.output
    assert "none for 3" in done.output
