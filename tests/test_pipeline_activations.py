"""Formats that round inputs, from the recipe to the export, and again from what is on disk."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import numpy as np
import pico
import pytest
import torch

import hawqkit as hk
from hawqkit.pipeline.folder import RunFolder
from hawqkit.quantize.apply import applied
from hawqkit.records import ActivationRanges, make_grid
from hawqkit.store import read_record

RECIPE = (
    command_line.RECIPE.replace("[int3-g32, int4-g32, int8-g32]", "[w4a4, int4-channel, w8a8]")
    .replace("sequences: 2", "sequences: 3")
    .replace("withheld: 2", "withheld: 3")
)
SECTION = "activations: {observer: percentile, percentile: 99.5}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("activations")
    pico.save(home / "model", pico.llama())
    (home / "pico.yaml").write_text(RECIPE + SECTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("HAWQKIT_CACHE", str(home / "cache"))
        command_line.succeed("probe", "pico.yaml", "-o", "one")
        for verb in (["allocate"], ["validate"], ["export", "--target", "bits"]):
            command_line.succeed(verb[0], "one", *verb[1:])
    return home


@pytest.fixture
def here(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    monkeypatch.setenv("HAWQKIT_CACHE", str(home / "cache"))
    return home


def test_a_run_keeps_its_ranges_and_exports_them(here: Path) -> None:
    ranges = read_record(here / "one/activations.json", ActivationRanges)
    assert (ranges.observer, ranges.percentile, ranges.bits) == ("percentile", 99.5, (8, 4))
    written = json.loads((here / "one/exports/bits/bits.json").read_text())
    told = written["activations"]
    assert (told["mode"], told["observer"], told["symmetric"]) == ("static", "percentile", False)
    rounding = {n: f for n, f in written["layers"].items() if f != "int4-channel"}
    assert set(told["layers"]) == set(rounding)
    assert rounding
    for name, cell in told["layers"].items():
        assert cell["bits"] == int(rounding[name][-1])
        grid = make_grid(cell["low"], cell["high"], cell["bits"])
        assert (cell["scale"], cell["zero"]) == (grid.scale, grid.zero)
    recipe = (here / "one/recipe.yaml").read_text()
    assert "percentile: 99.5" in recipe
    assert "activations" in json.loads((here / "one/provenance.json").read_text())["costs"]


def test_validation_measures_rounded_inputs(here: Path) -> None:
    """The measured KL of a mix is that of plain hooks on the modules."""
    run = RunFolder(here / "one")
    allocation, validation = run.read_allocation(), run.read_validation()
    assert allocation.activations is not None
    assert validation is not None
    model = hk.load_model(str(here / "model"), exclude=["lm_head", "model.embed_tokens"])
    text = hk.load_batches("builtin", model, sequences=3, length=32, split="held-out")
    mix = validation.mixes[0]
    assert set(allocation.layers.values()) & {"w4a4", "w8a8"}

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model.module(input_ids=text.tokens).logits[:, :-1].double().log_softmax(-1)

    original = logits()
    ranges = allocation.activations
    with applied(model, allocation.layers, rounding=allocation.rounding, activations=ranges):
        changed = logits()
    kl = float((original.exp() * (original - changed)).sum(-1).mean())
    np.testing.assert_allclose(mix.measured["held-out"].kl, kl, rtol=1e-3)


def test_probing_again_changes_no_record_and_a_lost_file_comes_back(here: Path) -> None:
    before = command_line.contents(here / "one")
    steady = {n for n in before if not n.startswith("provenance")}
    command_line.succeed("probe", "pico.yaml", "-o", "one")
    after = command_line.contents(here / "one")
    assert {n: after[n] for n in steady} == {n: before[n] for n in steady}
    (here / "one/activations.json").unlink()
    shown = command_line.invoke("show", "one")
    assert shown.exit_code == 2
    assert "activations.json: no such file" in shown.stderr
    command_line.succeed("probe", "pico.yaml", "-o", "one")
    assert command_line.contents(here / "one")["activations.json"] == before["activations.json"]


def test_other_ranges_are_refused_and_the_folder_stays(here: Path) -> None:
    before = command_line.contents(here / "one")
    done = command_line.invoke(
        "probe", "pico.yaml", "-o", "one", "--set", "activations={observer: mse}"
    )
    assert done.exit_code == 2
    assert "activations" in done.stderr
    assert command_line.contents(here / "one") == before
    path = here / "one/activations.json"
    kept = path.read_text()
    path.write_text(kept.replace('"fingerprint": "', '"fingerprint": "0'))
    shown = command_line.invoke("export", "one", "--target", "bits")
    assert shown.exit_code == 2
    assert "are other ranges than those" in shown.stderr
    path.write_text(kept)


def test_check_rehearses_the_calibration(here: Path) -> None:
    output = command_line.succeed("check", "pico.yaml").output
    assert "activations 0 s" in output
    assert "w8a8" in output


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["formats=[int4-channel]"], "none of the formats int4-channel rounds"),
        (["activations={mode: dynamic, observer: mse}"], "leave the observer out"),
        (["activations={percentile: 99}"], "percentile is of observer: percentile"),
        (["activations={observer: percentile, percentile: 20}"], "a number above 50"),
        (["activations={observer: minmax}"], "min-max"),
        (["formats=[w4a8, int4-channel-a8]"], "w4a8 and int4-channel-a8 are one format"),
        (["formats=[w4a16]"], "inputs are quantized to 2, 3, 4, 5, 6, 8 bits"),
        (["sensitivity.score=hessian-trace"], "knows the errors of weights alone"),
        (
            ["export=[compressed-tensors]", "activations={mode: dynamic, symmetric: true}"],
            "use that or 'int4-channel', or export 'bits'",
        ),
        (
            ["export=[compressed-tensors]", "formats=[w8a8, int4-g32]"],
            "write activations: {mode: dynamic, symmetric: true}",
        ),
    ],
)
def test_wrong_recipes_are_refused(here: Path, changes: list[str], words: str) -> None:
    done = command_line.invoke("check", "pico.yaml", *command_line.sets(*changes))
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())


def test_dynamic_ranges_need_no_calibration(here: Path) -> None:
    made = command_line.sets("activations={mode: dynamic}")
    command_line.succeed("probe", "pico.yaml", "-o", "dynamic", *made)
    command_line.succeed("allocate", "dynamic")
    command_line.succeed("export", "dynamic", "--target", "bits")
    ranges = read_record(here / "dynamic/activations.json", ActivationRanges)
    assert (ranges.mode, ranges.layers, ranges.examples) == ("dynamic", {}, 0)
    told = json.loads((here / "dynamic/exports/bits/bits.json").read_text())["activations"]
    assert (told["mode"], told["layers"]) == ("dynamic", {})
    # The resolved recipe says the same when it is read again.
    command_line.succeed("probe", "dynamic/recipe.yaml", "-o", "dynamic")


def test_the_python_surface_carries_the_ranges(here: Path, tmp_path: Path) -> None:
    model = hk.load_model(str(here / "model"), exclude=["lm_head", "model.embed_tokens"])
    batches = hk.load_batches("builtin", model, sequences=4, length=32)
    settings = hk.ActivationSettings(observer="mse", symmetric=True)
    found = hk.probe(model, batches, ["w4a4", "w8a8"], activations=settings)
    allocation = hk.allocate(found, average_bits=6.0, draws=0, baselines=())
    assert allocation.activations == found.activations
    held_out = hk.load_batches("builtin", model, sequences=2, length=32, split="held-out")
    measured = hk.validate(model, allocation, held_out).mixes[0].measured["held-out"]
    assert measured.kl > 0
    hk.export(allocation, "bits", tmp_path / "bits", model=model)
    told = json.loads((tmp_path / "bits/bits.json").read_text())["activations"]
    assert told["symmetric"] is True
