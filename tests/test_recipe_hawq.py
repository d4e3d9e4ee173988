"""The recipes of the HAWQ family run on small models and files in place of those they name."""

from __future__ import annotations

import json
from pathlib import Path

import image_cases
import pico
import pytest
from command_line import sets, succeed

SMALL = ["sensitivity.curvature.sequences=4", "sensitivity.curvature.shards=2", "stability.draws=2"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("hawq")
    module = pico.image_classifier(names=image_cases.NAMES)
    pico.save_image_classifier(here / "resnet", module)
    image_cases.folder(here / "images" / "train", 16)
    image_cases.folder(here / "images" / "validation", 8)
    return here


def images(home: Path) -> list[str]:
    source = home / "images"
    return [
        f"model.source={home / 'resnet'}",
        f"calibration.source={source}", "calibration.examples=12", "calibration.withheld=6",
        f"held_out.source={source}", "held_out.examples=12",
        *SMALL,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "score", "interactions"),
    [
        ("hawq-v1", "top-eigenvalue", 0.0),
        ("hawq-v2", "hessian-trace", 0.0),
        ("hawq-v3", "token", 0.5),
    ],
)
def test_a_recipe_of_image_classifiers_runs(
    home: Path, name: str, score: str, interactions: float
) -> None:
    out = home / name
    changes = images(home)
    if name == "hawq-v3":
        changes.append("budget={average_bits: 6.0}")
    succeed("run", name, "-o", str(out), *sets(*changes))
    allocation = json.loads((out / "allocation.json").read_text())
    assert (allocation["score"], allocation["interactions"]) == (score, interactions)
    frontier = json.loads((out / "frontier.json").read_text())
    assert frontier["chosen"]["objective"] > 0
    assert len(frontier["points"]) > 1
    assert (out / "exports" / "bits" / "bits.json").exists()
    assert (out / "report.html").stat().st_size > 10_000


def test_q_bert_adds_the_deviation_over_shards(tmp_path: Path) -> None:
    pico.save_text_classifier(tmp_path / "bert")
    rows = [
        {"sentence": f"{'good' if i % 2 else 'bad'} number {i}", "label": i % 2} for i in range(40)
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    for name in ("text", "other"):
        (tmp_path / f"{name}.jsonl").write_text(lines.replace("number", name) + "\n")
    changes = [
        f"model.source={tmp_path / 'bert'}",
        f"calibration.source={tmp_path / 'text.jsonl'}", "calibration.examples=12",
        "calibration.withheld=6", f"held_out.source={tmp_path / 'other.jsonl'}",
        "calibration.split=calibration", "held_out.split=held-out",
        "held_out.examples=12", "formats=[int2-channel, int4-channel]",
        "budget.average_bits=3.0", *SMALL,
    ]  # fmt: skip
    out = tmp_path / "run"
    succeed("run", "q-bert", "-o", str(out), *sets(*changes))
    allocation = json.loads((out / "allocation.json").read_text())
    assert (allocation["score"], allocation["risk"]) == ("top-eigenvalue", 1.0)
    assert allocation["other_risk"]["risk"] == 0.0
