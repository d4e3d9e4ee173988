"""`hawqkit run` with the scores of the true Hessian: asked for, killed, resumed, chosen from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pico
import pytest
import torch
from command_line import RECIPE, contents, invoke, refuse, sets, succeed
from processes import run_on_two

from hawqkit.journal import Journal
from hawqkit.pipeline.folder import RunFolder
from hawqkit.recipe import load_recipe
from hawqkit.records import Sensitivities, to_array

SECTION = """\
sensitivity:
  score: hessian-trace
  also: [top-eigenvalue]
  curvature: {sequences: 4, length: 12, shards: 2, max_probes: 4}
"""
BOTH = ("hessian-trace", "top-eigenvalue")
PROBE = ("probe", "r.yaml", "-o", "run")
PIECES = 8  # 2 scores, 2 shards, 14 layers in 2 chunks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its model, and a finished run in `run`."""
    home = tmp_path_factory.mktemp("curvature")
    # float64 as far as Llama goes, so that two processes and one can be compared.
    pico.save(home / "model", pico.llama(hidden=16, intermediate=32, dtype=torch.float64))
    (home / "r.yaml").write_text(RECIPE.replace("-g32", "-channel") + SECTION)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        succeed("run", "r.yaml", "-o", "run")
    return home


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the recipe and the model, without the run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copy(made / "r.yaml", tmp_path / "r.yaml")
    return tmp_path


def table(run: Path) -> Sensitivities:
    return RunFolder(run).read_sensitivities()


def test_a_run_chooses_by_the_hessian_and_keeps_both_scores(made: Path) -> None:
    found = table(made / "run")
    assert set(BOTH) < set(found.scores)
    assert found.curvature is not None
    assert to_array(found.curvature.traces).shape == (2, 14)
    assert [len(shard) for shard in found.curvature.sequences] == [2, 2]
    allocation = RunFolder(made / "run").read_allocation()
    assert allocation.score == "hessian-trace"
    assert set(allocation.stability) == {layer.name for layer in found.layers}
    assert allocation.prediction is not None
    assert allocation.prediction.cross_fitted is None  # the folds do not make this score
    costs = json.loads((made / "run/provenance.json").read_text())["costs"]
    assert costs["curvature"]["seconds"] > 0
    assert "hessian-trace" in (made / "run/report.html").read_text()


def test_the_recipe_of_the_run_says_what_was_asked(made: Path) -> None:
    recipe = load_recipe(made / "run/recipe.yaml", [])
    assert recipe.sensitivity == load_recipe(made / "r.yaml", []).sensitivity
    assert recipe.sensitivity.curvature_scores() == BOTH
    assert recipe.sensitivity.curvature.relative_error == 0.1
    plain = load_recipe(made / "r.yaml", ["sensitivity.score=auto", "sensitivity.also=[]"])
    assert plain.sensitivity.curvature_scores() == ()


@pytest.mark.parametrize("entries", [0, 3, 5])
def test_a_measurement_killed_between_pieces_ends_with_the_same_bytes(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    write, left = Journal.write, [entries]

    def killed(self: Journal, *arguments: object) -> None:
        left[0] -= self.folder.parent.name == "curvature"
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", killed)
        assert invoke(*PROBE).exit_code == 130
    assert not (here / "run/sensitivities.json").exists()
    done = succeed(*PROBE)
    if entries:
        assert f"curvature: {entries} of {PIECES} pieces from the journal" in done.stdout
    whole = made / "run"
    for name in ("sensitivities.json", "samples.safetensors"):
        assert (here / "run" / name).read_bytes() == (whole / name).read_bytes()


def test_a_score_that_a_run_lacks_is_added_as_the_message_says(made: Path, here: Path) -> None:
    plain = sets("sensitivity.score=auto", "sensitivity.also=[]")
    succeed(*PROBE, *plain)
    assert table(here / "run").curvature is None
    assert not (here / "run/curvature").exists()
    words = "--set sensitivity.also=[hessian-trace]"
    refuse(here, "allocate", "run", "--score", "hessian-trace", words=words)
    done = succeed("probe", "run/recipe.yaml", "-o", "run", *words.split())
    assert "probe: taken from the run folder" in done.stdout
    found = table(here / "run")
    assert "top-eigenvalue" not in found.scores
    assert found.scores["hessian-trace"] == table(made / "run").scores["hessian-trace"]
    said = succeed("allocate", "run", "--score", "hessian-trace").stdout
    assert "score hessian-trace" in said
    again = succeed("probe", "run/recipe.yaml", "-o", "run")
    assert "curvature: taken from the run folder, nothing has changed" in again.stdout
    succeed(*PROBE, *plain)  # and gone again, as that recipe asks for none
    assert table(here / "run").curvature is None


@pytest.mark.parametrize("risk", ["0", "1"])
@pytest.mark.parametrize("score", [*BOTH, "token"])
def test_a_run_that_has_them_is_chosen_from_by_any_score(
    made: Path, tmp_path: Path, score: str, risk: str
) -> None:
    out = tmp_path / "a.json"
    succeed("allocate", str(made / "run"), "--score", score, "--risk", risk, "-o", str(out))
    found = json.loads(out.read_text())
    assert found["score"] == score
    assert found["totals"]["average_bits"] <= 4.5


def test_a_run_by_the_top_eigenvalue_ends_with_a_report(here: Path) -> None:
    options = ("sensitivity.score=top-eigenvalue", "sensitivity.also=[]", "sensitivity.risk=1.0")
    succeed("run", "r.yaml", "-o", "run", *sets(*options))
    allocation = RunFolder(here / "run").read_allocation()
    assert (allocation.score, allocation.risk) == ("top-eigenvalue", 1.0)
    assert "top-eigenvalue" in (here / "run/report.html").read_text()
    assert not (here / "run/curvature/hessian-trace").exists()


def test_a_single_shard_leaves_stability_out_and_says_so(here: Path) -> None:
    succeed("run", "r.yaml", "-o", "run", *sets("sensitivity.curvature.shards=1"))
    allocation = RunFolder(here / "run").read_allocation()
    assert allocation.stability == {}
    assert any("stability is not known" in w for w in allocation.warnings)


def test_check_predicts_what_they_cost_and_writes_nothing(here: Path) -> None:
    before = contents(here)
    assert "curvature" in succeed("check", "r.yaml").stdout
    plain = sets("sensitivity.score=auto", "sensitivity.also=[]")
    assert "curvature" not in succeed("check", "r.yaml", *plain).stdout
    assert contents(here) == before


def test_another_setting_in_the_same_folder_is_refused(made: Path, here: Path) -> None:
    shutil.copytree(made / "run", here / "run")
    change = sets("sensitivity.curvature.length=10")
    refuse(here, *PROBE, *change, words="length: there 12, now 10")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("sensitivity.also=[token]", "unknown score of the true Hessian 'token'"),
        ("sensitivity.also=[hessian-trace, hessian-trace]", "stands more than once"),
        ("sensitivity.curvature.sequences=5", "it has 4 that choose"),
        ("sensitivity.curvature.shards=5", "use fewer shards, or raise it"),
        ("sensitivity.curvature.max_products=1", "at least 2"),
        ("sensitivity.curvature.max_probes=1", "at least 2"),
        ("sensitivity.curvature.relative_error=0.0", "above 0"),
        ("sensitivity.curvature.probes=3", "unknown key; known here: sequences, length, shards"),
    ],
)
def test_a_bad_section_is_refused_before_anything_is_written(
    here: Path, setting: str, words: str
) -> None:
    refuse(here, "run", "r.yaml", "-o", "new", "--set", setting, words=words)


def test_a_small_text_is_no_problem_where_no_such_score_is_asked_for(here: Path) -> None:
    options = ["calibration.sequences=2", "sensitivity.score=auto", "sensitivity.also=[]"]
    assert load_recipe(here / "r.yaml", options).calibration.sequences == 2


@pytest.mark.timeout(400)  # an interpreter for each of two processes, on cores that others use
def test_two_processes_give_what_one_gives(made: Path, here: Path) -> None:
    run_on_two("-m", "hawqkit", *PROBE)
    assert json.loads((here / "run/provenance.json").read_text())["processes"] == 2
    one, two = (table(f / "run").curvature for f in (made, here))
    assert one is not None
    assert two is not None
    assert one.fingerprint == two.fingerprint
    # Llama's norms and softmax run in float32 whatever the weights are: 5e-8 of each product.
    for name in ("traces", "eigenvalues"):
        a, b = (to_array(getattr(c, name)) for c in (one, two))
        assert a == pytest.approx(b, rel=1e-5)
