"""The examples, run as a user would run them: on a pico model, or on what they make themselves."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pico
import pytest
import torch

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


def example(name: str) -> dict[str, object]:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_the_backpack_example_estimates_every_layers_exact_trace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = example("backpack_trace")["main"](0.05)
    assert list(found) == ["0", "2"]
    for estimate, exact in found.values():
        assert abs(estimate.value - exact) < 4 * estimate.stderr
        assert estimate.stderr <= 0.05 * abs(estimate.value)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_the_two_class_example_agrees_with_its_dense_spectrum(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = example("two_class_mlp")
    found = module["main"](16)  # 354 parameters
    exact, pairs, density = found["exact"], found["pairs"], found["density"]
    largest = exact[exact.abs().argsort(descending=True)][:5].numpy()
    assert pairs.values == pytest.approx(largest, abs=1e-6)
    assert density.draws == 10
    for eps, count in zip(module["EPS"], found["ranks"].counts, strict=True):
        assert count.count == int((exact.abs() >= eps).sum())
        assert density.mass(-eps, eps).covers(float((exact.abs() < eps).double().mean()))
    shown = capsys.readouterr().out
    assert shown.count("mass within") == 3
    assert "eigenvalue 5" in shown


def test_the_resnet_example_draws_density_and_landscape(tmp_path: Path) -> None:
    found = example("pyhessian_resnet")["main"](str(tmp_path), 20, 32)
    names = {"density.png", "top-eigenvector.png", "plane.png", "surface.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    line, pairs = found["line"], found["pairs"]
    assert line.curvatures[0][0] == pytest.approx(pairs.values[0], rel=1e-3)
    t, loss = line.positions(), torch.from_numpy(line.values)
    near = abs(t) <= 0.051  # where the quadratic model holds
    model = line.quadratic(t[near]) - line.center
    assert (loss.numpy()[near] - line.center) == pytest.approx(model, rel=0.3, abs=1e-3)


def test_the_example_of_any_loss_predicts_what_it_measures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = example("any_loss")["main"]()
    chosen, uniform = measured.mixes
    assert chosen.prediction is not None
    error = (chosen.prediction.joint_stderr**2 + chosen.curved_stderr**2) ** 0.5
    assert abs(chosen.prediction.joint - chosen.curved) < 4 * error
    assert chosen.curved < uniform.curved
    assert "Huber loss of the original" in capsys.readouterr().out
