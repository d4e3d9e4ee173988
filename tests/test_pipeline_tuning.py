"""`hawqkit tune` on a run folder, and what validation and export make of it."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import pico
import pytest
import torch
from command_line import refuse, sets, succeed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hawqkit as hk
from hawqkit.errors import InputError, StateMismatch
from hawqkit.pipeline.folder import RunFolder
from hawqkit.quantize.apply import applied
from hawqkit.recipe import load_recipe
from hawqkit.records import Tuning
from hawqkit.store import read_record

TUNE = [
    "tune.sequences=8",
    "tune.steps=4",
    "tune.batch=4",
    "tune.learning_rate=0.003",
    "tune.learned_scales=weights",
    "tune.distillation={alpha: 1.0}",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tuning")
    pico.save(home / "model", pico.llama())
    folder = command_line.make_run(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        shown = succeed("tune", "run", *sets(*TUNE)).output
    assert "4 steps on 8 sequences" in shown
    assert "tuned" in shown
    return folder


@pytest.fixture
def here(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(run.parent)
    return run.parent


def loaded(run: Path) -> tuple[hk.models.LoadedModel, hk.Tuned]:
    model = hk.load_model(run.parent / "model", exclude=["lm_head", "model.embed_tokens"])
    return model, hk.load_tuned(run / "tuning", model, RunFolder(run).read_allocation())


def test_the_folder_says_how_it_was_tuned(run: Path) -> None:
    record = read_record(run / "tuning" / "tuning.json", Tuning)
    assert (record.steps, record.examples, record.data.sequences) == (4, 8, 8)
    assert record.settings["distillation"] == {"alpha": 1.0, "temperature": 2.0}
    assert {s.what for s in record.learned} == {"weight"}
    names = [mix.name for mix in record.validation.mixes]
    assert names == ["chosen", "tuned"]
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["seeds"]["tune"] == 0
    assert provenance["costs"]["tune"]["gradient_equivalents"] == pytest.approx(4 * 4 * 4 / 3)


def test_the_same_command_finds_it_done_and_another_is_refused(here: Path) -> None:
    again = succeed("tune", "run", *sets(*TUNE)).output
    assert "taken from the run folder, nothing has changed" in again
    changed = [*TUNE[:2], "tune.batch=2", *TUNE[3:]]
    refuse(here, "tune", "run", *sets(*changed), words="settings.batch: there 4, now 2")
    refuse(here, "tune", "run", *sets("tune.optimizer=adam"), words="Did you mean 'adamw'?")
    words = "only the section tune can be changed here"
    refuse(here, "tune", "run", *sets("budget.average_bits=3"), words=words)
    refuse(here, "tune", "run", *sets("tune.sequences=100000"), words="tune: ")


def test_validation_measures_the_tuned_model_beside_the_others(run: Path, here: Path) -> None:
    shown = succeed("validate", "run").output
    assert "tuned" in shown
    found = RunFolder(run).read_validation()
    assert [mix.name for mix in found.mixes] == ["chosen", "uniform", "tuned"]
    record = read_record(run / "tuning" / "tuning.json", Tuning)
    now, before = found.mixes[-1].measured["held-out"], record.validation.mixes[-1]
    assert now.kl == pytest.approx(before.measured["held-out"].kl, rel=1e-9)
    model, tuned = loaded(run)
    data = pico.sequences(3, 20)
    with applied(tuned.model, tuned.mix), torch.no_grad():
        decoded = tuned.model.module(input_ids=data.tokens).logits
    with torch.no_grad():
        kept = tuned.model.module(input_ids=data.tokens).logits
        original = model.module(input_ids=data.tokens).logits
    assert torch.equal(decoded, kept)
    assert not torch.equal(decoded, original)


def test_export_writes_the_tuned_weights_with_their_learned_scales(run: Path, here: Path) -> None:
    pytest.importorskip("compressed_tensors")
    succeed("export", "run", "--target", "compressed-tensors")
    folder = run / "exports" / "compressed-tensors"
    _, tuned = loaded(run)
    stored = load_file(folder / "model.safetensors")
    name = next(iter(tuned.model.scales))
    assert torch.equal(stored[f"{name}.weight_scale"], tuned.model.scales[name].scales)
    norm = "model.norm.weight"
    assert torch.equal(stored[norm], tuned.model.module.state_dict()[norm])
    read = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    tokens = pico.sequences(3, 20).tokens
    with torch.no_grad():
        logits = read(input_ids=tokens).logits
        wanted = tuned.model.module(input_ids=tokens).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)  # sdpa may sum otherwise


def test_the_tuned_folder_is_a_model_that_can_be_probed_again(run: Path, here: Path) -> None:
    _, tuned = loaded(run)
    again = hk.load_model(run / "tuning" / "tuned", exclude=["lm_head", "model.embed_tokens"])
    state = tuned.unrounded_model().module.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.module.state_dict().items())
    succeed("probe", "r.yaml", "-o", "again", *sets("model.source=run/tuning/tuned"))
    found = RunFolder(here / "again").read_sensitivities()
    assert found.model.hash == again.facts.hash
    succeed(
        "spectrum", "r.yaml", "-o", "again",
        *sets(
            "model.source=run/tuning/tuned", "spectrum.layers=[]", "spectrum.top=1",
            "spectrum.steps=3", "spectrum.draws=1", "spectrum.sequences=1", "spectrum.length=8",
        ),
    )  # fmt: skip


def test_another_allocation_does_not_pass_for_the_tuned_one(tmp_path: Path, run: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    succeed("allocate", str(copy), "--budget", "average_bits=3.5")
    for verb in (["validate"], ["export", "--target", "compressed-tensors"]):
        done = command_line.invoke(verb[0], str(copy), *verb[1:])
        assert done.exit_code == 2
        assert "was tuned for another mix" in done.stderr
    model, _ = loaded(run)
    with pytest.raises(StateMismatch, match="another mix"):
        hk.load_tuned(copy / "tuning", model, RunFolder(copy).read_allocation())
    with pytest.raises(InputError, match=r"tuning\.json: no such file"):
        hk.load_tuned(tmp_path, model)


def test_a_recipe_with_the_section_tunes_as_part_of_its_run(
    here: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("run", "r.yaml", "-o", "whole", *sets(*TUNE))
    whole = here / "whole"
    record, apart = (read_record(f / "tuning" / "tuning.json", Tuning) for f in (whole, run))
    assert record == apart
    names = [mix.name for mix in RunFolder(whole).read_validation().mixes]
    assert names == ["chosen", "uniform", "tuned"]
    assert load_recipe(whole / "recipe.yaml").tune.steps == 4
    assert "tuned" in (whole / "report.html").read_text()
    succeed("tune", "whole")  # its own recipe says how


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("tune={examples: 5}", "this is of classifiers; give `sequences`"),
        ("tune={epochs: 2, steps: 3}", "has epochs and steps"),
        ("tune={momentum: 0.5}", "momentum is of sgd, and optimizer is adamw"),
        ("tune={warmup: 1.5}", "tune.warmup"),
        ("tune={distillation: {alpha: 0}}", "tune.distillation.alpha"),
        ("tune={epoch: 2}", "Did you mean 'epochs'?"),
    ],
)
def test_what_is_wrong_with_the_section_is_said(here: Path, assignment: str, words: str) -> None:
    refuse(here, "check", "r.yaml", *sets(assignment), words=words)


def test_a_resolved_recipe_means_the_same() -> None:
    base = "model: {{source: m{task}}}\n{data}formats: [w4a4]\nbudget: {{average_bits: 4}}\n{tune}"
    images = base.format(
        task=", task: image-classification",
        data="calibration: {source: c}\nheld_out: {source: h}\nexport: [bits]\n",
        tune="tune: {examples: 7, optimizer: sgd, momentum: 0.5, distillation: {}}\n",
    )
    text = base.format(task="", data="", tune="tune: {sequences: 7, length: 9, steps: 3}\n")
    for content in (images, text):
        path = Path("r.yaml")
        path.write_text(content)
        recipe = load_recipe(path)
        path.write_text(recipe.resolved_yaml())
        assert load_recipe(path) == recipe


@pytest.fixture(autouse=True)
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "here" not in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("tmp_path"))
