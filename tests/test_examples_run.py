"""The three examples, run on a pico model as a user would run them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pico
import pytest

from hawqkit.pipeline import run as run_recipe
from hawqkit.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPE = """\
model: {{source: {model}}}
calibration: {{sequences: 6, length: 64, withheld: 4}}
held_out: {{sequences: 4, length: 64}}
layers: {{exclude: [lm_head, model.embed_tokens]}}
formats: [int3-g32, int4-g32, int8-g32]
budget: {{average_bits: 4.0}}
stability: {{draws: 4}}
validate: {{baselines: [uniform, weight-error]}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run")
    model = pico.save(home / "model", pico.llama())
    recipe = home / "pico.yaml"
    recipe.write_text(RECIPE.format(model=model))
    run_recipe(load_recipe(recipe, []), home / "out")
    return home


def test_a_run_leaves_every_file(finished: Path) -> None:
    names = {p.name for p in (finished / "out").iterdir()}
    assert names >= {
        "recipe.yaml", "provenance.json", "probe", "sensitivities.json", "samples.safetensors",
        "allocation.json", "frontier.json", "validation.json", "exports", "report.html",
    }  # fmt: skip


def test_running_again_changes_no_record(finished: Path) -> None:
    out = finished / "out"
    names = ("sensitivities.json", "allocation.json", "validation.json")
    before = {n: (out / n).read_bytes() for n in names}
    run_recipe(load_recipe(finished / "pico.yaml", []), out)
    assert {n: (out / n).read_bytes() for n in names} == before


def test_a_lost_micro_batch_and_table_are_made_again_bit_for_bit(finished: Path) -> None:
    out = finished / "out"
    before = (out / "sensitivities.json").read_bytes()
    (out / "sensitivities.json").unlink()
    sorted((out / "probe").glob("batch-*"))[0].unlink()
    run_recipe(load_recipe(finished / "pico.yaml", []), out)
    assert (out / "sensitivities.json").read_bytes() == before


def test_the_export_continues_a_prompt_in_plain_transformers(finished: Path) -> None:
    module = runpy.run_path(str(ROOT / "examples" / "load_export.py"))
    assert module["main"](str(finished / "out/exports/compressed-tensors"), "We the").startswith(
        "We"
    )


def test_allocating_again_needs_no_torch(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/allocate_again.py"), str(finished / "out"), "5", "6"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proven not below") == 2


def test_the_python_surface_measures_the_chosen_mix(finished: Path) -> None:
    module = runpy.run_path(str(ROOT / "examples" / "python_surface.py"))
    validation = module["main"](str(finished / "model"), 6, 64)
    assert validation.mixes[0].name == "chosen"
    assert validation.mixes[0].measured["held-out"].kl > 0
