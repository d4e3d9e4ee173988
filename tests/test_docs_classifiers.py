"""The recipe and the example in docs/classifiers.md are run, so that they stay true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from PIL import Image

import hawqkit
from hawqkit.recipe import load_recipe

TEXT = (Path(__file__).parents[1] / "docs" / "classifiers.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_the_recipe_is_sound(tmp_path: Path) -> None:
    (recipe,) = blocks("yaml")
    (tmp_path / "r.yaml").write_text(recipe)
    read = load_recipe(tmp_path / "r.yaml")
    assert read.model.fold_batch_norm
    assert read.other_texts["sketches"].examples == 1000


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(5):
            folder = tmp_path / "photos" / split / f"class {label}"
            folder.mkdir(parents=True)
            for number in range(10):
                pixels = generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    pico.save_image_classifier(tmp_path / "my-resnet")
    code, _ = blocks("python")
    for asked, there in (("512", "30"), ("256", "20"), ("1000", "50")):
        assert asked in code
        code = code.replace(asked, there)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "docs/classifiers.md", "exec"), names)
    assert len(names["folding"].folded) == 6
    assert all(layer.macs > 0 for layer in names["model"].layers)
    assert set(names["allocation"].layers) == {layer.name for layer in names["model"].layers}
    assert isinstance(names["validation"], hawqkit.Validation)


def test_the_example_of_another_loss_runs() -> None:
    _, code = blocks("python")
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    pico.fill(module, 1)
    x = torch.randn(128, 4, generator=generator)
    y = (torch.randn(128, 3, generator=generator) > 0).float()
    names: dict[str, object] = {"module": module, "x": x, "y": y}
    names["held_out"] = hawqkit.make_examples(x, targets=y)
    exec(compile(code, "docs/classifiers.md", "exec"), names)
    assert names["measured"].loss == "logistic loss"
    assert names["measured"].chosen.curved > 0
