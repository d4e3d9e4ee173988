"""The recipe and the example in docs/tuning.md are run, so that they stay true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tuning_cases import small_data, small_model

from hawqkit.recipe import TuneSection, load_recipe
from hawqkit.tuning.settings import TuneSettings

TEXT = (Path(__file__).parents[1] / "docs" / "tuning.md").read_text()
REST = """\
model: {source: m, task: image-classification}
calibration: {source: c}
held_out: {source: h}
formats: [w4a4, w8a8]
budget: {average_bits: 4.0}
"""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_the_section_is_sound(tmp_path: Path) -> None:
    (section,) = blocks("yaml")
    (tmp_path / "r.yaml").write_text(REST + section)
    tune = load_recipe(tmp_path / "r.yaml").tune
    assert (tune.examples, tune.learned_scales, tune.weight_decay) == (10_000, "both", 1e-4)


def test_every_key_is_told_of_with_its_default() -> None:
    table = TEXT.split("| key | default |")[1].split("\n\n")[0]
    named = set(
        re.findall(r"`([a-z_]+)`", "".join(r.split("|")[1] for r in table.splitlines()[2:]))
    )
    assert named | {"length"} == set(TuneSection.model_fields)
    section, settings = TuneSection(), TuneSettings()
    for name in set(TuneSection.model_fields) - {"examples", "sequences", "length"}:
        assert getattr(section, name) == getattr(settings, name)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {
        "net": small_model(steps=30).module,
        "examples": small_data(48, withheld=8),
        "training": small_data(64),
        "held_out": small_data(32, seed=5),
    }
    exec(compile(code, "docs/tuning.md", "exec"), names)
    assert names["validation"].mixes[-1].name == "tuned"
    assert names["again"].record == names["tuned"].record
    assert (tmp_path / "out" / "bits.json").exists()
