"""`max_predicted_kl` from the command line: in a recipe, on a run, round trips and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
from command_line import RECIPE, make_run, refuse, sets, succeed

from hawqkit.errors import RecipeError
from hawqkit.pipeline.choosing import recipe_choice
from hawqkit.pipeline.folder import RunFolder
from hawqkit.recipe import load_budget, load_recipe
from hawqkit.sensitivity.confidence import KlLimit

# A limit that pico's 14 layers keep between all in 3 and all in 8 bits.
LIMIT = "0.03@0.9"
ASK = sets(
    "budget.average_bits=", f"budget.max_predicted_kl={LIMIT}", "calibration.withheld=4",
    "calibration.sequences=8", "sensitivity.batch=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe, its model, and a run of the smallest mix within a limit."""
    folder = tmp_path_factory.mktemp("limit")
    pico.save(folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAWQKIT_CACHE", str(folder / "cache"))
        make_run(folder, *ASK)
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.setenv("HAWQKIT_CACHE", str(made / "cache"))
    return made


def record(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_a_run_keeps_the_limit_of_its_recipe_and_says_so(here: Path) -> None:
    written = record(here / "run" / "allocation.json")
    assert written["budgets"] == {"max_predicted_kl": 0.03}
    kept = written["kl_budget"]
    assert (kept["value"], kept["confidence"]) == (0.03, 0.9)
    assert kept["kl"] < kept["upper"] <= 0.03 < kept["smaller_upper"]
    assert kept["kl"] == written["prediction"]["kl"]
    assert kept["source"] == "withheld sequences"
    assert 3 < written["totals"]["average_bits"] < 8
    assert "with confidence 0.9, in the smallest mix" in (here / "run/report.html").read_text()
    assert record(here / "run/exports/bits/bits.json")["budgets"] == {"max_predicted_kl": 0.03}


def test_the_resolved_recipe_reads_back_to_the_same_choice(here: Path) -> None:
    run = RunFolder.at(here / "run")
    recipe = run.read_recipe()
    assert recipe.budget.limits() == {}
    assert recipe.budget.kl_limit() == KlLimit(0.03, 0.9)
    assert recipe_choice(run).max_predicted_kl == KlLimit(0.03, 0.9)
    text = run.recipe.read_text()
    assert load_recipe(run.recipe).resolved_yaml() == text
    before = run.allocation.read_bytes()
    succeed("allocate", "run")
    assert run.allocation.read_bytes() == before


def test_allocate_with_more_confidence_or_a_smaller_limit_is_never_smaller(here: Path) -> None:
    amounts = []
    for limit in ("0.03", "0.03@0.9", "0.03@0.99", "0.01@0.99"):
        output = succeed("allocate", "run", "--max-predicted-kl", limit, "-o", "a.json").output
        kept = record(here / "a.json")["kl_budget"]
        amounts.append(kept["amount"])
        assert f"smallest in stored bits: {kept['amount']:,}" in output
        assert f"KL stays below {kept['upper']:.5f} nats" in output
        assert ("with confidence" in output) == ("@" in limit)
        assert "spread" in output
    assert amounts == sorted(amounts)
    assert amounts[0] < amounts[-1]


def test_options_replace_the_budgets_of_the_recipe_and_hold_together(here: Path) -> None:
    succeed("allocate", "run", "--budget", "average_bits=6", "-o", "a.json")
    written = record(here / "a.json")
    assert written["budgets"] == {"average_bits": 6.0}
    assert written["kl_budget"] is None
    both = ("--budget", "average_bits=7", "--max-predicted-kl", "0.02")
    succeed("allocate", "run", *both, "--risk", "0.5", "-o", "a.json")
    written = record(here / "a.json")
    assert written["budgets"] == {"average_bits": 7.0, "max_predicted_kl": 0.02}
    assert written["kl_budget"]["upper"] <= 0.02
    assert written["other_risk"]["risk"] == 0.0
    assert written["other_risk"]["mix"]["prediction"]["kl"] > 0
    as_mapping = "max_predicted_kl={value: 0.02, confidence: 0.8}"
    succeed("allocate", "run", "--budget", as_mapping, "-o", "a.json")
    assert record(here / "a.json")["kl_budget"]["confidence"] == 0.8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-predicted-kl", "1e-9"], "max_predicted_kl = 1e-09 cannot be met"),
        (["--max-predicted-kl", "1e-9"], "the least that these 14 layers reach is 0.00"),
        (
            ["--max-predicted-kl", "0.001", "--budget", "average_bits=3.1"],
            "max_predicted_kl = 0.001 and average_bits = 3.1 contradict each other",
        ),
        (["--max-predicted-kl", "0.05@1"], "a number below 1"),
        (["--max-predicted-kl", "0.05@0.2"], "a number of at least 0.5"),
        (["--max-predicted-kl", "-1"], "a number above 0"),
        (["--max-predicted-kl", "little"], "'little' is no limit on the KL"),
        (["--budget", "max_predictd_kl=1"], "Did you mean 'max_predicted_kl'?"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    here: Path, arguments: list[str], words: str
) -> None:
    refuse(here, "allocate", "run", *arguments, words=words)


def test_check_says_what_the_probe_will_tell(here: Path) -> None:
    output = " ".join(succeed("check", "r.yaml", *ASK).output.split())
    assert "max_predicted_kl = 0.03 at confidence 0.9: whether it is possible, the probe" in output
    wide = [part.replace("average_bits=", "average_bits=5") for part in ASK]
    both = succeed("check", "r.yaml", *wide).output
    assert "budget: average_bits 5: possible" in both


def test_a_confidence_without_pairs_of_sequences_is_refused_before_the_probe(here: Path) -> None:
    alone = [part.replace("batch=4", "batch=1") for part in ASK]
    refuse(here, "check", "r.yaml", *alone, words="sensitivity.batch to 2 or more")
    refuse(here, "run", "r.yaml", "-o", "none", *alone, words="ask for confidence 0.5")
    succeed("check", "r.yaml", *(part.replace(LIMIT, "0.03") for part in alone))


def test_a_limit_may_be_a_number_text_or_a_mapping() -> None:
    ways = {
        "max_predicted_kl=0.05": KlLimit(0.05),
        "max_predicted_kl=5": KlLimit(5.0),
        "max_predicted_kl=5e-2 @ 0.9": KlLimit(0.05, 0.9),
        "max_predicted_kl={value: 0.05, confidence: 0.9}": KlLimit(0.05, 0.9),
        "max_predicted_kl.value=0.05": KlLimit(0.05),
    }
    for way, limit in ways.items():
        assert load_budget([way]).kl_limit() == limit


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{value: 0.05, confidense: 0.9}", "Did you mean 'confidence'?"),
        ("{confidence: 0.9}", "max_predicted_kl.value"),
        ("true", "no limit on the KL"),
        ("[0.05]", "no limit on the KL"),
        (".inf", "a finite number"),
        ("0.05@", "no limit on the KL"),
    ],
)
def test_a_limit_of_another_form_is_refused_with_its_place(given: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_budget([f"max_predicted_kl={given}"])
    assert words in str(caught.value)


def test_size_target_says_whose_bytes_are_made_small(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    asked = ["size_target=compressed-tensors", "budget.max_predicted_kl=0.1"]
    recipe = load_recipe(tmp_path / "r.yaml", asked)
    assert recipe.size_target == "compressed-tensors"
    with pytest.raises(RecipeError, match="there is neither"):
        load_recipe(tmp_path / "r.yaml", asked[:1])
